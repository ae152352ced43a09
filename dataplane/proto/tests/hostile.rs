//! Hostile input: nothing panics, lands outside a grant, or makes memory grow.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use genie_proto::wire::{Body, HEADER_LEN, Header, Kind, Probe, crc};
use genie_proto::{Config, Connection, Digest, DropCause, SessionId, Time, TransferId, fuzzing};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        fuzzing::parse(&bytes);
    }

    #[test]
    fn any_conversation_keeps_the_invariants(
        script in proptest::collection::vec(any::<u8>(), 0..2048)
    ) {
        fuzzing::converse(&script);
    }

    #[test]
    fn only_what_was_sealed_is_opened_and_once(
        script in proptest::collection::vec(any::<u8>(), 0..2048)
    ) {
        fuzzing::unseal(&script);
    }

    #[test]
    fn random_datagrams_are_dropped_and_counted(
        bytes in proptest::collection::vec(any::<u8>(), 0..100)
    ) {
        let mut connection =
            Connection::new(Config::default(), SessionId(1), SessionId(2), Time(0));
        connection.receive(TransferId { slot: 0, generation: 0 }, 1 << 20).unwrap();
        let mut placed = false;
        connection.handle_datagram(Time(1), &bytes, bytes.len(), |_| {
            placed = true;
            0
        });
        prop_assert!(!placed);
        prop_assert_eq!(connection.stats().dropped(), 1);
    }
}

/// The kept inputs of a fuzz target, with their names.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let inputs = fs::read_dir(corpus).expect("the corpus is kept beside the targets");
    inputs
        .map(|input| {
            let path = input.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

#[test]
fn the_corpus_of_parse_passes() {
    let corpus = corpus("parse");
    assert!(corpus.len() >= 15);
    for (name, bytes) in corpus {
        println!("{name}");
        fuzzing::parse(&bytes);
    }
}

#[test]
fn the_corpus_of_sealed_passes() {
    let opened: HashMap<String, usize> = corpus("sealed")
        .into_iter()
        .map(|(name, script)| {
            println!("{name}");
            (name, fuzzing::unseal(&script))
        })
        .collect();
    for (name, count) in [
        ("fair", 64),
        ("repeated", 1),
        ("changed", 0),
        ("epochs", 40),
    ] {
        assert_eq!(opened.get(name), Some(&count), "{name}");
    }
}

#[test]
fn the_corpus_of_converse_passes() {
    let received: HashMap<String, usize> = corpus("converse")
        .into_iter()
        .map(|(name, script)| {
            println!("{name}");
            (name, fuzzing::converse(&script))
        })
        .collect();
    for (name, count) in [
        ("fair", 1),
        ("both-ways", 2),
        ("empty-transfer", 1),
        ("lost-done", 1),
        ("corrupt", 1),
        ("cancel", 0),
        ("silent", 0),
        ("forged-ack", 0),
        ("forged-done", 0),
        ("close", 0),
    ] {
        assert_eq!(received.get(name), Some(&count), "{name}");
    }
}

fn packet(number: u64, transfer: TransferId, body: &Body) -> Vec<u8> {
    let payload = body.encode();
    let header = Header {
        kind: body.kind(),
        flags: 0,
        payload_len: payload.len() as u16,
        session: SessionId(1),
        transfer,
        timestamp: 0,
        path: 0,
        packet_number: number,
        offset: 0,
    };
    let mut packet = header.encode(crc(&payload)).to_vec();
    packet.extend_from_slice(&payload);
    packet
}

#[test]
fn a_flood_of_questions_is_answered_within_bounds() {
    let config = Config {
        slots_max: 100,
        ..Config::default()
    };
    let mut connection = Connection::new(config, SessionId(1), SessionId(2), Time(0));
    for number in 0..10_000 {
        let slot = number as u32;
        let probe = Body::Probe(Probe { token: number });
        let done = Body::Done(genie_proto::wire::Done {
            len: 1,
            digest: Digest(0),
        });
        let transfer = TransferId {
            slot,
            generation: 1,
        };
        for (number, body) in [(2 * number, probe), (2 * number + 1, done)] {
            let datagram = packet(number, transfer, &body);
            connection.handle_datagram(Time(1), &datagram, datagram.len(), |_| unreachable!());
        }
    }
    assert_eq!(connection.stats().drops(DropCause::Overload), 20_000 - 100);
    let mut answers = 0;
    while connection
        .poll_transmit(Time(2), |_| unreachable!())
        .is_some()
    {
        answers += 1;
    }
    assert!(answers <= 101, "{answers}");
}

#[test]
fn versions_and_types_not_spoken_here_are_told_apart() {
    let mut connection = Connection::new(Config::default(), SessionId(1), SessionId(2), Time(0));
    let transfer = TransferId {
        slot: 0,
        generation: 0,
    };
    let good = packet(1, transfer, &Body::Probe(Probe { token: 1 }));
    let mut handle = |datagram: &[u8], cause| {
        connection.handle_datagram(Time(1), datagram, datagram.len(), |_| unreachable!());
        assert_eq!(connection.stats().drops(cause), 1, "{cause:?}");
    };
    let mut bad = good.clone();
    bad[0] = 0x25;
    handle(&bad, DropCause::Version);
    bad[0] = 0x16;
    handle(&bad, DropCause::HeaderCheck);
    // OFFER is reserved.
    bad[0] = 0x18;
    let check = crc(&bad[..34]) as u16;
    bad[34..36].copy_from_slice(&check.to_be_bytes());
    handle(&bad, DropCause::Kind);
    handle(&good[..good.len() - 1], DropCause::Length);
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    handle(&bad, DropCause::PayloadCheck);
    assert_eq!(good.len(), HEADER_LEN + 8);
    assert_eq!(
        Header::parse(&good, good.len()).unwrap().0.kind,
        Kind::Probe
    );
}
