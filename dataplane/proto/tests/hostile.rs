//! Hostile input: nothing panics, lands outside a grant, or makes memory grow.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use genie_proto::wire::{
    Ack, AckRange, Body, FLAG_VOID, HEADER_LEN, Header, Kind, Metadata, Offer, Probe, crc,
};
use genie_proto::{
    CloseReason, Config, Connection, Digest, DropCause, Event, SessionId, Time, TransferId, fuzzing,
};
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
        ("offer", 2),
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
            connection.handle_datagram(Time(1), &datagram, datagram.len(), |_| -> u32 {
                unreachable!()
            });
        }
    }
    assert_eq!(connection.stats().drops(DropCause::Overload), 20_000 - 100);
    let mut answers = 0;
    while connection
        .poll_transmit(Time(2), |_| -> u32 { unreachable!() })
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
        connection.handle_datagram(Time(1), datagram, datagram.len(), |_| -> u32 {
            unreachable!()
        });
        assert_eq!(connection.stats().drops(cause), 1, "{cause:?}");
    };
    let mut bad = good.clone();
    bad[0] = 0x15;
    handle(&bad, DropCause::Version);
    bad[0] = 0x26;
    handle(&bad, DropCause::HeaderCheck);
    bad[0] = 0x2a;
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

/// An OFFER as a peer that keeps no rule may send it.
fn offer(number: u64, transfer: TransferId, tensor: &[u8], offer: &Offer) -> Vec<u8> {
    let prefix = offer.encode();
    let header = Header {
        kind: Kind::Offer,
        flags: 0,
        payload_len: (prefix.len() + tensor.len()) as u16,
        session: SessionId(1),
        transfer,
        timestamp: 0,
        path: 0,
        packet_number: number,
        offset: 1000,
    };
    let mut packet = header.encode(crc(&prefix)).to_vec();
    packet.extend_from_slice(&prefix);
    packet.extend_from_slice(tensor);
    packet
}

#[test]
fn offers_that_were_not_granted_or_are_not_what_they_say_are_dropped() {
    let config = |offers| Config {
        offers,
        offer_len_max: 100,
        ..Config::default()
    };
    let says = |tensor: &[u8]| Offer {
        digest: Digest(crc(tensor)),
        granted: 0,
        acked: 0,
        metadata: Metadata::new(),
    };
    let number = TransferId::of_offer;
    let tensor = [7; 100];
    let mut none = Connection::new(config(0), SessionId(1), SessionId(2), Time(0));
    let datagram = offer(1, number(0), &tensor, &says(&tensor));
    none.handle_datagram(Time(1), &datagram, datagram.len(), |_| -> u32 {
        unreachable!()
    });
    assert_eq!(none.stats().drops(DropCause::NotGranted), 1);

    let mut two = Connection::new(config(2), SessionId(1), SessionId(2), Time(0));
    let mut handle = |at: u64, datagram: &[u8], cause: Option<DropCause>| {
        let before = two.stats();
        two.handle_datagram(Time(at), datagram, datagram.len(), |segment| {
            let segment = segment.expect("the whole datagram is given");
            assert!(segment.offset == 0 || segment.offset == 128);
            crc(&datagram[datagram.len() - segment.len as usize..])
        });
        let after = two.stats();
        match cause {
            Some(cause) => assert_eq!(after.drops(cause), before.drops(cause) + 1, "{cause:?}"),
            None => assert_eq!(after.dropped(), before.dropped()),
        }
        assert_eq!(
            after.dropped() - before.dropped(),
            u64::from(cause.is_some())
        );
        (
            after.offers_received - before.offers_received,
            two.poll_event(),
        )
    };
    let good = says(&tensor);
    let beyond = [
        (number(2), DropCause::NotGranted),
        (number(u64::MAX >> 1), DropCause::NotGranted),
        // The id of a transfer, granted or not, is no offer's.
        (
            TransferId {
                slot: 0,
                generation: 1,
            },
            DropCause::NotGranted,
        ),
    ];
    for (at, (id, cause)) in (10..).zip(beyond) {
        assert_eq!(
            handle(at, &offer(at, id, &tensor, &good), Some(cause)),
            (0, None)
        );
    }
    let long = [7; 101];
    let datagram = offer(20, number(0), &long, &says(&long));
    assert_eq!(
        handle(20, &datagram, Some(DropCause::OutOfBounds)),
        (0, None)
    );
    let datagram = offer(21, number(0), &tensor, &says(&[8; 100]));
    assert_eq!(
        handle(21, &datagram, Some(DropCause::PayloadCheck)),
        (0, None)
    );
    let mut datagram = offer(22, number(0), &tensor, &good);
    datagram[HEADER_LEN + 5] ^= 1;
    assert_eq!(
        handle(22, &datagram, Some(DropCause::PayloadCheck)),
        (0, None)
    );
    // Metadata that would reach beyond the packet.
    let mut datagram = offer(23, number(0), &[], &says(&[]));
    datagram[HEADER_LEN + 11] = 9;
    assert_eq!(handle(23, &datagram, Some(DropCause::Body)), (0, None));
    // The good one comes once, however often it is sent.
    let (count, event) = handle(30, &offer(30, number(1), &tensor, &good), None);
    assert_eq!(count, 1);
    assert!(
        matches!(event, Some(Event::Offered { len: 100, .. })),
        "{event:?}"
    );
    assert_eq!(
        handle(31, &offer(31, number(1), &tensor, &good), None),
        (0, None)
    );
    let datagram = offer(30, number(1), &tensor, &good);
    assert_eq!(
        handle(32, &datagram, Some(DropCause::DuplicatePacket)),
        (0, None)
    );
    // It acknowledges what was never sent.
    let lies = Offer { acked: 1, ..good };
    let (_, event) = handle(40, &offer(40, number(0), &tensor, &lies), None);
    assert!(matches!(event, Some(Event::Offered { .. })), "{event:?}");
    let closed = two.poll_event();
    assert!(
        matches!(
            closed,
            Some(Event::Closed {
                reason: CloseReason::Violation(_)
            })
        ),
        "{closed:?}"
    );
    assert!(two.is_closed() && !two.release(9));
}

/// A peer that uses its slots up with offers it gave up, and lets every GRANT be
/// lost by acknowledging what came after it.
#[test]
fn grants_that_are_lost_do_not_pile_up() {
    let config = Config {
        offers: 4,
        offer_len_max: 100,
        ..Config::default()
    };
    let mut one = Connection::new(config, SessionId(1), SessionId(2), Time(0));
    let mut number = 0;
    let mut send = |one: &mut Connection, at, kind, transfer, flags, payload: &[u8]| {
        let header = Header {
            kind,
            flags,
            payload_len: payload.len() as u16,
            session: SessionId(1),
            transfer,
            timestamp: 0,
            path: 0,
            packet_number: number,
            offset: 0,
        };
        number += 1;
        let mut packet = header.encode(crc(payload)).to_vec();
        packet.extend_from_slice(payload);
        one.handle_datagram(at, &packet, packet.len(), |_| 0);
    };
    let void = Offer {
        digest: Digest(0),
        granted: 0,
        acked: 0,
        metadata: Metadata::new(),
    };
    let mut most = 0;
    for round in 0..2000 {
        let now = Time(1_000_000 * (round + 1));
        for transfer in (4 * round..4 * round + 4).map(TransferId::of_offer) {
            send(
                &mut one,
                now,
                Kind::Offer,
                transfer,
                FLAG_VOID,
                &void.encode(),
            );
        }
        one.handle_timeout(now);
        let (mut grants, mut bare) = (0, None);
        while let Some(transmit) = one.poll_transmit(now, |_| 0) {
            let (header, _) = Header::parse(&transmit.head, transmit.head.len()).unwrap();
            grants += u32::from(header.kind == Kind::Grant);
            if header.kind == Kind::Ack {
                bare = Some(header.packet_number);
            }
        }
        most = most.max(grants);
        if let Some(bare) = bare {
            let one_packet = AckRange {
                first: bare,
                last: bare,
            };
            let ack = Body::Ack(Ack {
                delay_us: 0,
                echo: 0,
                credit: 512,
                ecn_ce: 0,
                ranges: [one_packet].into_iter().collect(),
            });
            let nobody = TransferId {
                slot: 0,
                generation: 0,
            };
            send(&mut one, now, Kind::Ack, nobody, 0, &ack.encode());
        }
    }
    // One that is new, and two that a probe timeout sends again.
    assert!(most <= 3, "{most} in a round");
    assert!(!one.is_closed());
}
