//! Encoding and parsing a packet's header; once each for every packet.

use criterion::{Criterion, criterion_group, criterion_main};
use genie_proto::wire::{Header, Kind};
use genie_proto::{SessionId, TransferId};
use std::hint::black_box;

fn header() -> Header {
    Header {
        kind: Kind::Data,
        flags: 0,
        payload_len: 8896,
        session: SessionId(0x1234_5678),
        transfer: TransferId {
            slot: 3,
            generation: 9,
        },
        timestamp: 123_456,
        path: 0,
        packet_number: 77_777,
        offset: 1 << 30,
    }
}

fn wire(criterion: &mut Criterion) {
    let header = header();
    // Budget: 30 ns. A header and its check, which is a CRC over 34 bytes.
    criterion.bench_function("wire/encode", |bencher| {
        bencher.iter(|| black_box(&header).encode(black_box(0xdead_beef)));
    });
    let bytes = header.encode(0xdead_beef);
    // Budget: 30 ns. The same check, and a version and a length to compare.
    criterion.bench_function("wire/parse", |bencher| {
        bencher.iter(|| Header::parse(black_box(&bytes), black_box(40 + 8896)));
    });
}

criterion_group!(benches, wire);
criterion_main!(benches);
