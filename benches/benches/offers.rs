//! What a small tensor in one packet costs, both ends and the in-memory device
//! together on one core.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use genie_benches::polled_pair::PolledPair;

fn offers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("offers");
    group.throughput(Throughput::Elements(1));
    for len in [64, 4096] {
        let mut pair = PolledPair::new(256);
        group.bench_function(BenchmarkId::new("burst", len), |bencher| {
            bencher.iter_custom(|count| {
                let began = Instant::now();
                pair.burst(count, len);
                began.elapsed()
            });
        });
        group.bench_function(BenchmarkId::new("pingpong", len), |bencher| {
            bencher.iter_custom(|count| {
                let began = Instant::now();
                pair.pingpong(count, len);
                began.elapsed()
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = offers
}
criterion_main!(benches);
