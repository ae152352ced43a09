//! The code agrees with the golden packets that `docs/protocol.md` explains.

use std::collections::HashMap;

use genie_proto::seal::{Opener, Sealer, Secret};
use genie_proto::wire::{
    Ack, AckRange, Body, Done, DoneAck, FLAG_FIN, Grant, HEADER_LEN, Header, Kind, Offer, Probe,
    ProbeAck, Reset, Scope, crc,
};
use genie_proto::{Digest, SessionId, TransferId};

fn vectors() -> HashMap<&'static str, Vec<u8>> {
    let text = include_str!("vectors.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, hex) = line.split_once(' ').unwrap();
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            (name, (0..hex.len()).step_by(2).map(byte).collect())
        })
        .collect()
}

fn header(kind: Kind, payload_len: usize) -> Header {
    let of_transfer = matches!(kind, Kind::Data | Kind::Done | Kind::DoneAck | Kind::Reset);
    let (slot, generation) = if of_transfer { (5, 6) } else { (0, 0) };
    Header {
        kind,
        flags: if kind == Kind::Data { FLAG_FIN } else { 0 },
        payload_len: payload_len as u16,
        session: SessionId(0x0102_0304),
        transfer: TransferId { slot, generation },
        timestamp: 0x0708_090a,
        path: 1,
        packet_number: 0x0b0c_0d0e_0f10,
        offset: if kind == Kind::Data {
            0x1112_1314_1540
        } else {
            0
        },
    }
}

#[test]
fn packets_are_the_golden_ones_both_ways() {
    let range = |first, last| AckRange { first, last };
    let ranges = [range(20, 25), range(10, 15), range(3, 3)]
        .into_iter()
        .collect();
    let bodies = [
        Body::Ack(Ack {
            delay_us: 100,
            echo: 0x2122_2324,
            credit: 512,
            ecn_ce: 0,
            ranges,
        }),
        Body::Done(Done {
            len: 0x1_0000_0001,
            digest: Digest(0xe306_9283),
        }),
        Body::DoneAck(DoneAck::Ok),
        Body::Probe(Probe {
            token: 0x3132_3334_3536_3738,
        }),
        Body::ProbeAck(ProbeAck {
            token: 0x3132_3334_3536_3738,
        }),
        Body::Reset(Reset {
            scope: Scope::ToMe,
            reason: 3,
        }),
        Body::Grant(Grant {
            total: 0x5152_5354,
            len_max: 4096,
        }),
    ];
    let names = [
        "ack",
        "done",
        "done-ack",
        "probe",
        "probe-ack",
        "reset",
        "grant",
    ];
    let mut vectors = vectors();
    for (name, body) in names.into_iter().zip(bodies) {
        let golden = vectors.remove(name).unwrap();
        let payload = body.encode();
        let header = header(body.kind(), payload.len());
        let mut packet = header.encode(crc(&payload)).to_vec();
        packet.extend_from_slice(&payload);
        assert_eq!(packet, golden, "{name}");
        assert_eq!(
            Header::parse(&golden, golden.len()),
            Ok((header, crc(&payload))),
            "{name}"
        );
        assert_eq!(
            Body::parse(body.kind(), &golden[HEADER_LEN..]),
            Ok(body),
            "{name}"
        );
    }
    check_offer(&vectors.remove("offer").unwrap());
    let golden = vectors.remove("data").unwrap();
    let payload: Vec<u8> = (0..64).collect();
    let header = header(Kind::Data, 64);
    assert_eq!(
        [&header.encode(crc(&payload))[..], &payload].concat(),
        golden
    );
    assert_eq!(
        Header::parse(&golden, golden.len()),
        Ok((header, crc(&payload)))
    );
    let sealed: Vec<_> = vectors.into_keys().collect();
    let known = |name: &&str| ["sealed", "sealed-next"].contains(name);
    assert!(sealed.iter().all(known), "a vector that nothing checks");
}

fn check_offer(golden: &[u8]) {
    let tensor: Vec<u8> = (0..16).collect();
    let offer = Offer {
        digest: Digest(crc(&tensor)),
        granted: 0x5152_5354,
        acked: 7,
        metadata: b"ABC"[..].try_into().unwrap(),
    };
    let payload = [&offer.encode()[..], &tensor].concat();
    let header = Header {
        transfer: TransferId::of_offer(0x3_0000_0005),
        offset: 0x0b0c_0d0e_0f00,
        ..header(Kind::Offer, payload.len())
    };
    let checked = crc(&payload[..offer.len_bytes()]);
    assert_eq!([&header.encode(checked)[..], &payload].concat(), golden);
    assert_eq!(Header::parse(golden, golden.len()), Ok((header, checked)));
    assert_eq!(Offer::parse(&golden[HEADER_LEN..]), Ok(offer));
    assert_eq!(header.transfer.offer_number(), Some(0x3_0000_0005));
}

#[test]
fn sealed_packets_are_the_golden_ones_both_ways() {
    let secret = Secret(std::array::from_fn(|at| at as u8));
    let (mut sealer, mut opener) = (Sealer::new(&secret), Opener::new(&secret));
    let vectors = vectors();
    let payload: Vec<u8> = (0..64).collect();
    for (name, packet_number) in [("sealed", 1), ("sealed-next", 0x40_0002)] {
        let golden = &vectors[name];
        let header = Header {
            packet_number,
            ..header(Kind::Data, 64)
        };
        let plain = [&header.encode(crc(&payload))[..], &payload].concat();
        let mut packet = plain.clone();
        let (readable, rest) = packet.split_first_chunk_mut().unwrap();
        let tag = sealer.seal(readable, rest);
        packet.extend_from_slice(&tag);
        assert_eq!(&packet, golden, "{name}");
        let len = opener.open(&mut packet).unwrap();
        assert_eq!(packet[..len], plain, "{name}");
    }
}

#[test]
fn the_page_shows_the_vectors() {
    let page = include_str!("../../../docs/protocol.md");
    let bare: String = page.split_whitespace().collect();
    for line in include_str!("vectors.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let (name, hex) = line.split_once(' ').unwrap();
        assert!(
            bare.contains(hex),
            "docs/protocol.md lacks the vector {name}"
        );
    }
}
