//! A value's way from one thread to another.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use genie_dataplane::engine::ring::ring;

fn crossing(criterion: &mut Criterion) {
    let (mut sender, mut receiver) = ring::<u64>(1024).expect("an eventfd");
    // Budget: 30 ns: in and out on one thread, nobody asleep.
    criterion.bench_function("ring/in and out", |bencher| {
        bencher.iter(|| {
            sender.try_send(black_box(1)).expect("it is empty");
            receiver.try_recv()
        });
    });
    // Budget: 40 µs: an eventfd, a wake-up and back. Why engines spin a while
    // before they sleep.
    criterion.bench_function("ring/there and back between sleepers", |bencher| {
        bencher.iter_custom(|count| {
            let (mut there, mut there_end) = ring::<u64>(8).expect("an eventfd");
            let (mut back, mut back_end) = ring::<u64>(8).expect("an eventfd");
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    while !there_end.is_closed() {
                        there_end.wait(Duration::from_secs(1));
                        while let Some(value) = there_end.try_recv() {
                            back.try_send(value).expect("one at a time");
                        }
                    }
                });
                let began = Instant::now();
                for value in 0..count {
                    there.try_send(value).expect("one at a time");
                    while back_end.try_recv().is_none() {
                        back_end.wait(Duration::from_secs(1));
                    }
                }
                let elapsed = began.elapsed();
                drop(there);
                elapsed
            })
        });
    });
}

criterion_group!(benches, crossing);
criterion_main!(benches);
