//! What the protocol costs for each data packet, with no payload touched.

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use genie_benches::null_pair::{PACKETS, Pair};

fn connection(criterion: &mut Criterion) {
    let mut pair = Pair::new();
    // Budget: 200 ns a packet, both ends and the acknowledgements together.
    criterion.bench_function("connection/packet", |bencher| {
        bencher.iter_custom(|packets| {
            let transfers = packets.div_ceil(PACKETS);
            let began = Instant::now();
            for _ in 0..transfers {
                pair.transfer();
            }
            began
                .elapsed()
                .mul_f64(packets as f64 / (transfers * PACKETS) as f64)
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3));
    targets = connection
}
criterion_main!(benches);
