//! What allocating a tensor in an arena costs: `cargo bench -p genie-benches --bench arena`.
//!
//! Prints nanoseconds for one allocation and one free, the mean over many and
//! the worst batch of a hundred, beside the budget. The baseline, in the same run, is the same
//! churn through the process's own allocator.

use std::time::Instant;

use genie_dataplane::memory::{Arena, Backing, Region};

/// Bytes of the arena; nothing is written, so this takes no time.
const ARENA_BYTES: usize = 256 << 20;

/// What a replacement, an allocation and a free, may take in nanoseconds on
/// average: less than a message to anybody, so that nobody keeps a pool.
const BUDGET_NS: f64 = 1000.0;

/// Allocations measured at a time: a look at the clock costs some 25 ns.
const BATCH: usize = 100;

/// Batches.
const BATCHES: usize = 20_000;

fn main() {
    let region = Region::with_backing(ARENA_BYTES, Backing::Shmem).expect("there is memory");
    let arena = Arena::new(region);
    let allocate = |len| arena.allocate(len).expect("the arena is large enough");
    for live in [1, 1_000, 10_000] {
        let arena_ns = churn(live, allocate);
        let heap_ns = churn(live, Vec::<u8>::with_capacity);
        println!(
            "{live:>6} live: arena {:.0} ns (worst batch {:.0}), {:.0} % of the budget of \
             {BUDGET_NS:.0} ns; heap {:.0} ns (worst batch {:.0})",
            arena_ns.0,
            arena_ns.1,
            100.0 * arena_ns.0 / BUDGET_NS,
            heap_ns.0,
            heap_ns.1
        );
    }
    assert_eq!(arena.free_bytes(), ARENA_BYTES, "everything came back");
}

/// Keeps `live` blocks of mixed lengths and replaces one after the other at
/// random; returns nanoseconds for one replacement, mean and worst batch.
fn churn<T>(live: usize, allocate: impl Fn(usize) -> T) -> (f64, f64) {
    let mut random = fastrand::Rng::with_seed(1);
    let mut blocks: Vec<T> = (0..live)
        .map(|_| allocate(random.usize(1..16 << 10)))
        .collect();
    let (mut sum, mut worst) = (0.0, 0.0f64);
    for _ in 0..BATCHES {
        let wishes: [(usize, usize); BATCH] =
            std::array::from_fn(|_| (random.usize(0..live), random.usize(1..16 << 10)));
        let began = Instant::now();
        for (index, len) in wishes {
            blocks[index] = allocate(std::hint::black_box(len));
        }
        let ns = began.elapsed().as_nanos() as f64 / BATCH as f64;
        sum += ns;
        worst = worst.max(ns);
    }
    (sum / BATCHES as f64, worst)
}
