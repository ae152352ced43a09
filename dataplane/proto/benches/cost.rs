//! What the protocol costs a packet, without its memory: `cargo bench -p genie-proto`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use genie_proto::congestion::Algorithm;
use genie_proto::seal::{Opener, Sealer, Secret, TAG_LEN};
use genie_proto::wire::{HEADER_LEN, Header, Kind};
use genie_proto::{Config, Connection, DigestBuilder, Incoming, SessionId, Time, TransferId};

/// The best of a few rounds, in nanoseconds an operation.
fn measure(name: &str, operations: u64, mut round: impl FnMut()) {
    let best = (0..7)
        .map(|_| {
            let begin = Instant::now();
            round();
            begin.elapsed()
        })
        .min()
        .unwrap_or(Duration::ZERO);
    println!(
        "{name:<44} {:8.1} ns",
        best.as_nanos() as f64 / operations as f64
    );
}

fn digest(name: &str, order: impl Fn(u64) -> u64) {
    const SEGMENTS: u64 = 1 << 16;
    const SEGMENT: u64 = 1408;
    // Beyond 32 bits, as the largest tensors are: five products for a shift.
    let base = 1_u64 << 40;
    measure(name, SEGMENTS, || {
        let mut builder = DigestBuilder::new(base + SEGMENTS * SEGMENT);
        for index in 0..SEGMENTS {
            builder.add(order(index) * SEGMENT, SEGMENT, index as u32);
        }
        black_box(builder.finish());
    });
}

fn bitmap() {
    const SEGMENTS: u64 = 1 << 16;
    const SEGMENT: u64 = 8896;
    measure("bitmap check and apply, in order, 8896 B", SEGMENTS, || {
        let mut incoming = Incoming::new(SEGMENTS * SEGMENT).expect("memory");
        for index in 0..SEGMENTS {
            black_box(incoming.check(index * SEGMENT, SEGMENT));
            incoming.apply(index * SEGMENT, SEGMENT, index as u32);
        }
        assert!(incoming.is_complete());
    });
}

/// Moves a transfer between two connections in bursts of 32, as engines do, with
/// neither payload nor its CRC: what is left is the protocol.
fn connections(name: &str, datagram_max: u16, lose: u64) {
    const LEN: u64 = 1 << 28;
    let config = Config {
        datagram_max,
        congestion: Algorithm::Fixed(512 * u64::from(datagram_max)),
        ..Config::default()
    };
    let packets = LEN.div_ceil(config.segment_max());
    let id = TransferId {
        slot: 0,
        generation: 1,
    };
    measure(name, packets, || {
        let mut now = Time(0);
        let mut from = Connection::new(config.clone(), SessionId(1), SessionId(2), now);
        let mut to = Connection::new(config.clone(), SessionId(2), SessionId(1), now);
        to.receive(id, LEN).expect("a fresh slot");
        from.send(id, LEN).expect("a fresh slot");
        let mut count = 0_u64;
        while !from.is_idle() {
            now = now + Duration::from_micros(10);
            for _ in 0..32 {
                let Some(transmit) = from.poll_transmit(now, |_| 0) else {
                    break;
                };
                let payload = transmit.payload.map_or(0, |segment| segment.len as usize);
                count += 1;
                if lose == 0 || !count.is_multiple_of(lose) {
                    to.handle_datagram(now, &transmit.head, transmit.head.len() + payload, |_| 0);
                }
            }
            while let Some(transmit) = to.poll_transmit(now, |_| 0) {
                from.handle_datagram(now, &transmit.head, transmit.head.len(), |_| 0);
            }
            from.handle_timeout(now);
            to.handle_timeout(now);
            while from.poll_event().is_some() {}
            while to.poll_event().is_some() {}
        }
    });
}

/// Seals and opens packets: AES-GCM, nonce, window.
fn sealing(name: &str, payload_len: usize) {
    const PACKETS: u64 = 1 << 14;
    let secret = Secret([1; 32]);
    let mut header = Header {
        kind: Kind::Data,
        flags: 0,
        payload_len: payload_len as u16,
        session: SessionId(1),
        transfer: TransferId {
            slot: 0,
            generation: 1,
        },
        timestamp: 0,
        path: 0,
        packet_number: 0,
        offset: 0,
    };
    let mut packet = vec![0; HEADER_LEN + payload_len + TAG_LEN];
    let mut numbers = 0..;
    let (mut sealer, mut opener) = (Sealer::new(&secret), Opener::new(&secret));
    let mut seal = |packet: &mut [u8]| {
        header.packet_number = numbers.next().expect("without end");
        packet[..HEADER_LEN].copy_from_slice(&header.encode(0));
        let (plain, rest) = packet.split_first_chunk_mut().expect("a header");
        let (sealed, tag) = rest.split_at_mut(rest.len() - TAG_LEN);
        tag.copy_from_slice(&sealer.seal(plain, sealed));
    };
    measure(&format!("seal {name}"), PACKETS, || {
        for _ in 0..PACKETS {
            seal(&mut packet);
        }
    });
    measure(&format!("seal and open {name}"), PACKETS, || {
        for _ in 0..PACKETS {
            seal(&mut packet);
            black_box(opener.open(&mut packet).expect("sealed just now"));
        }
    });
}

/// Many transfers of one packet each, begun at once.
fn small(name: &str) {
    const COUNT: u32 = 10_000;
    let config = Config {
        congestion: Algorithm::Fixed(512 * 1452),
        ..Config::default()
    };
    measure(name, u64::from(COUNT), || {
        let mut now = Time(0);
        let mut from = Connection::new(config.clone(), SessionId(1), SessionId(2), now);
        let mut to = Connection::new(config.clone(), SessionId(2), SessionId(1), now);
        for slot in 0..COUNT {
            let id = TransferId {
                slot,
                generation: 1,
            };
            to.receive(id, 1024).expect("a fresh slot");
            from.send(id, 1024).expect("a fresh slot");
        }
        while !(from.is_idle() && to.is_idle()) {
            now = now + Duration::from_micros(10);
            for _ in 0..32 {
                let Some(transmit) = from.poll_transmit(now, |_| 0) else {
                    break;
                };
                let payload = transmit.payload.map_or(0, |segment| segment.len as usize);
                to.handle_datagram(now, &transmit.head, transmit.head.len() + payload, |_| 0);
            }
            while let Some(transmit) = to.poll_transmit(now, |_| 0) {
                from.handle_datagram(now, &transmit.head, transmit.head.len(), |_| 0);
            }
            from.handle_timeout(now);
            to.handle_timeout(now);
            while from.poll_event().is_some() {}
            while to.poll_event().is_some() {}
        }
    });
}

fn main() {
    sealing("8896 B", 8896);
    sealing("1408 B", 1408);
    sealing("64 B", 64);
    digest("digest, segments in order", |index| index);
    digest("digest, neighbours swapped", |index| index ^ 1);
    digest("digest, backwards", |index| (1 << 16) - 1 - index);
    bitmap();
    connections("both ends, a packet of 1452 B", 1452, 0);
    connections("both ends, a packet of 8952 B", 8952, 0);
    connections("both ends, 1452 B, 1 % lost", 1452, 100);
    small("both ends, a whole transfer of 1 KiB");
}
