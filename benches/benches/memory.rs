//! What happens to a segment's bytes: digest, placing, and the memory itself.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use genie_dataplane::memory::{Backing, Lease, Region, View};
use genie_proto::DigestBuilder;

/// The largest segment of a port of MTU 9000.
const SEGMENT: usize = 8896;

fn digest(criterion: &mut Criterion) {
    let mut digest = DigestBuilder::new(u64::MAX >> 16);
    let mut offset = 0;
    // Budget: 15 ns a segment that follows the last one: one multiplication.
    criterion.bench_function("digest/next segment", |bencher| {
        bencher.iter(|| {
            digest.add(offset, SEGMENT as u64, black_box(0x1234_5678));
            offset += SEGMENT as u64;
        });
    });
    let mut digest = DigestBuilder::new(1 << 40);
    let mut number = 0u64;
    // Budget: 100 ns a segment out of order: a power for each run that ends.
    criterion.bench_function("digest/segment out of order", |bencher| {
        bencher.iter(|| {
            number += 1;
            let offset = number.wrapping_mul(0x9e37_79b9) % (1 << 20) * SEGMENT as u64;
            digest.add(offset, SEGMENT as u64, black_box(0x1234_5678));
        });
    });
    black_box(digest.finish());
}

fn bytes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bytes");
    group.throughput(Throughput::Bytes(SEGMENT as u64));
    let region = |len| Lease::whole(Region::with_backing(len, Backing::Shmem).expect("memory"));
    let packet = vec![7u8; SEGMENT];
    let hot = region(SEGMENT);
    // Budget: 0.5 µs a hot segment, about 18 GB/s.
    group.bench_function("crc32c hot", |bencher| {
        bencher.iter(|| hot.crc32c(0..SEGMENT))
    });
    // Budget: 0.8 µs, 11 GB/s: a copy within the cache and the CRC of it.
    group.bench_function("place hot", |bencher| {
        bencher.iter(|| hot.place(0, View::from(black_box(&packet[..]))));
    });
    const COLD: usize = 256 << 20;
    let cold = region(COLD);
    let after = |at| {
        if at + 2 * SEGMENT > COLD {
            0
        } else {
            at + SEGMENT
        }
    };
    let mut at = 0;
    // Budget: 0.8 µs, 11 GB/s: the source comes from memory.
    group.bench_function("stream_crc32c cold", |bencher| {
        bencher.iter(|| {
            at = after(at);
            cold.stream_crc32c(at..at + SEGMENT)
        });
    });
    // Budget: 1.1 µs, 8 GB/s: the destination comes from memory.
    group.bench_function("place cold", |bencher| {
        bencher.iter(|| {
            at = after(at);
            cold.place(at, View::from(black_box(&packet[..])))
        });
    });
    group.finish();
}

fn regions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("region");
    group.sample_size(20);
    for len in [4096usize, 1 << 20, 64 << 20] {
        group.throughput(Throughput::Bytes(len as u64));
        // Budget: 30 µs and 0.4 ms for each MiB: every page is made present.
        // Why arenas are registered once, and tensors are only leases of them.
        group.bench_function(BenchmarkId::new("allocate", len), |bencher| {
            bencher.iter(|| Region::with_backing(black_box(len), Backing::Shmem).expect("memory"));
        });
    }
    group.finish();
    let whole = Lease::whole(Region::with_backing(1 << 20, Backing::Shmem).expect("memory"));
    // Budget: 30 ns: a count and three additions.
    criterion.bench_function("lease of a slice", |bencher| {
        bencher.iter(|| whole.slice(black_box(4096..8192)).expect("inside"));
    });
}

criterion_group!(benches, digest, bytes, regions);
criterion_main!(benches);
