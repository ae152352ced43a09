//! The measuring loop: blocks in flight, a clock, a histogram.
//!
//! It knows nothing of what carries the blocks, so that a test can give it a
//! carrier whose delay and rate are known.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::BenchError;

/// The longest time the histogram can hold, in nanoseconds: ten minutes.
const LATENCY_MAX_NANOS: u64 = 600_000_000_000;

/// A carrier that cannot keep a rate is given up after so many times the time asked for.
const OVERTIME: u32 = 5;

/// Names a block between its begin and its completion: below the batch size.
pub type Slot = usize;

/// Something that moves blocks of one size.
pub trait Carrier {
    /// Begins to move a block; `slot` is not in use.
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError>;

    /// Adds the slots of blocks that have arrived to `done`. Waits for the
    /// first until `until`, or for ever.
    fn complete(&mut self, until: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError>;
}

/// What to do with a carrier.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Size of a block in bytes.
    pub block_size: u64,
    /// Blocks in flight at a time.
    pub batch_size: usize,
    /// How long blocks are begun; those under way are then waited for.
    pub duration: Duration,
    /// Blocks begun at the least, however long they take.
    pub blocks_min: u64,
    /// Blocks to begin each second; as many as complete if there is none.
    pub rate: Option<f64>,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Blocks that arrived.
    pub blocks: u64,
    /// From the first begin to the last arrival.
    pub elapsed: Duration,
    /// From when a block was begun to its arrival, in nanoseconds. With a rate:
    /// from when it *should* have been begun, so that a carrier that stalls
    /// cannot hide it by delaying the blocks behind (coordinated omission).
    pub latency: Histogram<u64>,
}

/// Runs a workload once.
pub fn run(carrier: &mut dyn Carrier, work: &Workload) -> Result<Sample, BenchError> {
    let mut latency = new_histogram();
    let mut begun_at = vec![Instant::now(); work.batch_size];
    let mut free: Vec<Slot> = (0..work.batch_size).rev().collect();
    let mut done = Vec::with_capacity(work.batch_size);
    let (mut begun, mut arrived) = (0, 0);
    let start = Instant::now();
    let mut last = start;
    loop {
        let now = Instant::now();
        let due = work
            .rate
            .map(|rate| start + Duration::from_secs_f64(begun as f64 / rate));
        // With a rate, what was due in time is begun, however late: it would be
        // the blocks that a stall hit hardest that are left out.
        let wanted = begun < work.blocks_min
            || match due {
                None => now - start < work.duration,
                Some(due) => due - start < work.duration && now - start < OVERTIME * work.duration,
            };
        let is_due = due.is_none_or(|due| due <= now);
        if wanted
            && is_due
            && let Some(slot) = free.pop()
        {
            begun_at[slot] = due.unwrap_or(now);
            carrier.begin(slot)?;
            begun += 1;
            continue;
        }
        if !wanted && arrived == begun {
            break;
        }
        let may_begin = wanted && !free.is_empty();
        carrier.complete(due.filter(|_| may_begin), &mut done)?;
        last = Instant::now();
        for slot in done.drain(..) {
            let nanos = (last - begun_at[slot]).as_nanos() as u64;
            latency.saturating_record(nanos);
            free.push(slot);
            arrived += 1;
        }
    }
    Ok(Sample {
        blocks: arrived,
        elapsed: last - start,
        latency,
    })
}

/// Runs a workload once on every carrier at the same time, each on a thread of
/// its own; a rate is divided among them.
pub fn run_together<C: Carrier + Send>(
    carriers: &mut [C],
    work: &Workload,
) -> Result<Sample, BenchError> {
    let share = Workload {
        rate: work.rate.map(|rate| rate / carriers.len() as f64),
        ..work.clone()
    };
    if let [only] = carriers {
        return run(only, &share);
    }
    let samples: Vec<Result<Sample, BenchError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (carriers.iter_mut())
            .map(|carrier| scope.spawn(|| run(carrier, &share)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|end| end.expect("the measuring loop does not panic"))
            .collect()
    });
    let mut together: Option<Sample> = None;
    for sample in samples {
        let sample = sample?;
        match &mut together {
            None => together = Some(sample),
            Some(all) => all.add(&sample),
        }
    }
    Ok(together.expect("there is at least one carrier"))
}

impl Sample {
    /// Takes in what another thread measured at the same time.
    pub fn add(&mut self, other: &Self) {
        self.blocks += other.blocks;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.latency
            .add(&other.latency)
            .expect("all histograms have the same bounds");
    }

    /// Bytes that arrived a second, in decimal gigabytes.
    pub fn gb_per_s(&self, block_size: u64) -> f64 {
        (self.blocks * block_size) as f64 / self.elapsed.as_secs_f64().max(1e-9) / 1e9
    }

    /// A quantile of the latency in microseconds.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1e3
    }
}

/// Three significant digits, from a nanosecond to ten minutes.
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NANOS, 3).expect("these bounds are valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of known delay and rate on the real clock: blocks leave one
    /// after another, and each arrives a delay later.
    struct Known {
        delay: Duration,
        time_each: Duration,
        free_at: Instant,
        under_way: std::collections::VecDeque<(Instant, Slot)>,
        /// Block number and length of one stall.
        stall: Option<(u64, Duration)>,
        begun: u64,
    }

    impl Known {
        fn new(delay: Duration, time_each: Duration) -> Self {
            let (free_at, under_way) = (Instant::now(), Default::default());
            Self {
                delay,
                time_each,
                free_at,
                under_way,
                stall: None,
                begun: 0,
            }
        }
    }

    impl Carrier for Known {
        fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
            let mut from = self.free_at.max(Instant::now());
            if let Some((number, length)) = self.stall
                && number == self.begun
            {
                from += length;
            }
            self.begun += 1;
            self.free_at = from + self.time_each;
            self.under_way.push_back((self.free_at + self.delay, slot));
            Ok(())
        }

        fn complete(
            &mut self,
            until: Option<Instant>,
            done: &mut Vec<Slot>,
        ) -> Result<(), BenchError> {
            let next = self.under_way.front().map(|(at, _)| *at);
            let target = match (next, until) {
                (Some(next), Some(until)) => next.min(until),
                (next, until) => next.or(until).expect("something to wait for"),
            };
            while Instant::now() < target {
                std::thread::sleep(target.saturating_duration_since(Instant::now()));
            }
            let now = Instant::now();
            while let Some((at, slot)) = self.under_way.front()
                && *at <= now
            {
                done.push(*slot);
                self.under_way.pop_front();
            }
            Ok(())
        }
    }

    fn work(batch_size: usize, millis: u64) -> Workload {
        Workload {
            block_size: 1_000_000,
            batch_size,
            duration: Duration::from_millis(millis),
            blocks_min: 1,
            rate: None,
        }
    }

    fn is_close(what: &str, measured: f64, known: f64) -> bool {
        let off = (measured - known).abs() / known;
        println!("{what}: reported {measured}, is {known}");
        off < 0.05
    }

    /// Asserts that a measurement is right. A machine that was held up makes one
    /// wrong; one that is always wrong is the harness's.
    fn assert_right(mut is_right: impl FnMut() -> bool) {
        assert!((0..4).any(|_| is_right()), "it was wrong four times");
    }

    #[test]
    fn a_known_delay_is_reported() {
        assert_right(|| {
            let mut carrier = Known::new(Duration::from_millis(60), Duration::ZERO);
            let sample = run(&mut carrier, &work(1, 1300)).unwrap();
            // One block of 1 MB every 60 ms.
            is_close("p50 in µs", sample.quantile_us(0.5), 60_000.0)
                && is_close("mean in µs", sample.latency.mean() / 1e3, 60_000.0)
                && is_close("GB/s", sample.gb_per_s(1_000_000), 1e-3 / 60e-3)
        });
    }

    #[test]
    fn a_known_rate_is_reported_with_blocks_in_flight() {
        // 1 MB every 16 ms, 48 ms away: four in flight keep it busy, eight
        // queue. Long against what a busy machine oversleeps.
        let known = || Known::new(Duration::from_millis(48), Duration::from_millis(16));
        assert_right(|| {
            let sample = run(&mut known(), &work(8, 2500)).unwrap();
            is_close("GB/s", sample.gb_per_s(1_000_000), 1e-3 / 16e-3)
                && is_close("p50 in µs", sample.quantile_us(0.5), 128_000.0)
        });
        // One in flight never fills it.
        assert_right(|| {
            let sample = run(&mut known(), &work(1, 1300)).unwrap();
            is_close("GB/s", sample.gb_per_s(1_000_000), 1e-3 / 64e-3)
        });
    }

    #[test]
    fn what_two_threads_measure_adds_up() {
        let one = |millis| {
            let mut carrier = Known::new(Duration::from_millis(millis), Duration::ZERO);
            let work = Workload {
                blocks_min: 4,
                ..work(1, 1)
            };
            run(&mut carrier, &work).unwrap()
        };
        let (mut fast, slow) = (one(10), one(40));
        fast.add(&slow);
        assert_eq!(fast.blocks, 8);
        assert_eq!(fast.latency.len(), 8);
        assert_eq!(fast.elapsed, slow.elapsed);
        assert!(fast.quantile_us(1.0) >= 40_000.0 && fast.quantile_us(0.0) < 40_000.0);
    }

    #[test]
    fn a_stall_counts_for_every_block_it_delayed() {
        let stall = Some((20, Duration::from_millis(200)));
        let closed = {
            let mut carrier = Known::new(Duration::from_millis(1), Duration::ZERO);
            carrier.stall = stall;
            run(&mut carrier, &work(1, 500)).unwrap()
        };
        // One block in hundreds was slow: the closed loop's p90 hides it.
        assert!(closed.quantile_us(0.9) < 20_000.0);
        let open = {
            let mut carrier = Known::new(Duration::from_millis(1), Duration::ZERO);
            carrier.stall = stall;
            run(
                &mut carrier,
                &Workload {
                    rate: Some(200.0),
                    ..work(1, 500)
                },
            )
            .unwrap()
        };
        // At 200 a second, the 40 blocks due during the stall all waited.
        assert!(
            open.quantile_us(0.9) > 100_000.0,
            "{}",
            open.quantile_us(0.9)
        );
        assert!(open.blocks >= 95, "{}", open.blocks);
    }

    #[test]
    fn a_stall_at_the_end_counts_too() {
        let mut carrier = Known::new(Duration::from_millis(1), Duration::ZERO);
        // The stall begins with the 90th of 100 blocks and outlasts the rest.
        carrier.stall = Some((90, Duration::from_millis(300)));
        let sample = run(
            &mut carrier,
            &Workload {
                rate: Some(200.0),
                ..work(1, 500)
            },
        )
        .unwrap();
        assert_eq!(sample.blocks, 100);
        assert!(
            sample.quantile_us(0.95) > 200_000.0,
            "{}",
            sample.quantile_us(0.95)
        );
    }

    #[test]
    fn slow_blocks_are_waited_for_and_a_failure_is_passed_on() {
        let mut carrier = Known::new(Duration::from_millis(50), Duration::ZERO);
        let sample = run(
            &mut carrier,
            &Workload {
                blocks_min: 3,
                ..work(1, 1)
            },
        )
        .unwrap();
        assert_eq!(sample.blocks, 3);
        struct Broken;
        impl Carrier for Broken {
            fn begin(&mut self, _: Slot) -> Result<(), BenchError> {
                Ok(())
            }
            fn complete(
                &mut self,
                _: Option<Instant>,
                _: &mut Vec<Slot>,
            ) -> Result<(), BenchError> {
                Err(BenchError::Refused("broken".into()))
            }
        }
        assert!(run(&mut Broken, &work(2, 10)).is_err());
    }
}
