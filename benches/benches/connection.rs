//! What the protocol costs for each data packet: with no payload touched, and
//! with the digest of 8 KiB computed once, by the sender.

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use genie_benches::null_pair::{PACKETS, Pair};

fn connection(criterion: &mut Criterion) {
    // Budgets: 200 ns a packet, both ends and the acknowledgements together, and
    // 650 ns with the digest: 100 Gb/s.
    measure(criterion, "connection/packet", Pair::new());
    measure(criterion, "connection/packet-digest", Pair::with_digest());
}

fn measure(criterion: &mut Criterion, name: &str, mut pair: Pair) {
    criterion.bench_function(name, |bencher| {
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
