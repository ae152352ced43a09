//! From samples and counters to the figures of a row.

use super::measure::{Sample, Workload, new_histogram};
use super::message::Usage;
use super::report::Row;
use super::statistics::{confidence_95, median};

/// Fewer blocks than this say nothing of one in a hundred, and of one in a thousand.
const BLOCKS_P99: u64 = 100;
const BLOCKS_P999: u64 = 1000;

/// A row's figures: rates are medians over the repeats, latencies those of all
/// blocks of all repeats, so that a stall in one of them shows.
pub fn figures(described: Row, samples: &[Sample], work: &Workload) -> Row {
    let of = |figure: &dyn Fn(&Sample) -> f64| samples.iter().map(figure).collect::<Vec<_>>();
    let rates = of(&|sample| sample.gb_per_s(work.block_size));
    let blocks = of(&|sample| sample.blocks as f64 / sample.elapsed.as_secs_f64().max(1e-9));
    let mut latency = new_histogram();
    for sample in samples {
        (latency.add(&sample.latency)).expect("all histograms have the same bounds");
    }
    let count = latency.len();
    let quantile = |quantile: f64, least: u64| {
        (count >= least).then(|| latency.value_at_quantile(quantile) as f64 / 1e3)
    };
    Row {
        blocks: Some(count),
        repeats: samples.len(),
        gb_per_s: median(&rates),
        gb_per_s_ci95: confidence_95(&rates),
        blocks_per_s: median(&blocks),
        avg_us: (count > 0).then(|| latency.mean() / 1e3),
        p50_us: quantile(0.5, 1),
        p99_us: quantile(0.99, BLOCKS_P99),
        p999_us: quantile(0.999, BLOCKS_P999),
        ..described
    }
}

/// What the ends used for a row of Genie's of so many `bytes`: two for each
/// thread. As in every row, what comes back of a ping-pong is not counted again.
pub fn account(row: &mut Row, bytes: u64, before: &[Usage], after: &[Usage]) {
    let used = |of: &dyn Fn(&Usage) -> u64| -> u64 {
        let ends = before.iter().zip(after);
        ends.map(|(before, after)| of(after) - of(before)).sum()
    };
    // Each end counts what it sent and what it received: the bytes delivered
    // are half of the sum.
    let delivered = (used(&|usage| usage.bytes) as f64 / 2.0).max(1.0);
    let copied = |of: fn(&Usage) -> u64| Some(used(&of) as f64 / delivered);
    row.copies_per_byte = copied(|usage| usage.copies.genie);
    row.driver_copies_per_byte = copied(|usage| usage.copies.driver);
    row.kernel_copies_per_byte = copied(|usage| usage.copies.kernel);
    // What the kernel sends again is not Genie's to see.
    let sees = ["dpdk", "mem"].contains(&row.transport.as_str());
    row.retransmits = sees.then(|| used(&|usage| usage.retransmits));
    row.cpu_s_per_gb = Some(cpu_between(before, after) / (bytes.max(1) as f64 / 1e9));
}

/// Adds the other process's CPU time to a baseline's.
pub fn account_cpu(row: &mut Row, before: &[Usage; 2], after: &[Usage; 2]) {
    let both = cpu_between(before, after);
    let ours = after[0].cpu_seconds - before[0].cpu_seconds;
    if let Some(cpu) = &mut row.cpu_s_per_gb
        && ours > 0.0
    {
        *cpu *= both / ours;
    }
}

/// CPU seconds of all processes, each counted once, however many ends it has.
fn cpu_between(before: &[Usage], after: &[Usage]) -> f64 {
    let mut seen = Vec::new();
    let mut sum = 0.0;
    for (before, after) in before.iter().zip(after) {
        if !seen.contains(&after.process) {
            seen.push(after.process);
            sum += after.cpu_seconds - before.cpu_seconds;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(process: u32, cpu_seconds: f64, bytes: u64) -> Usage {
        Usage {
            process,
            cpu_seconds,
            bytes,
            ..Usage::default()
        }
    }

    #[test]
    fn a_process_is_counted_once_and_a_byte_once() {
        // Two threads here, a process of its own behind each.
        let before = [1, 2, 1, 3].map(|process| usage(process, 1.0, 0));
        let after = [
            usage(1, 3.0, 500_000_000),
            usage(2, 1.5, 500_000_000),
            usage(1, 3.0, 500_000_000),
            usage(3, 1.5, 500_000_000),
        ];
        let mut row = Row::default();
        account(&mut row, 1_000_000_000, &before, &after);
        assert_eq!(row.cpu_s_per_gb, Some(3.0));
        assert_eq!(row.retransmits, None, "the kernel's are not seen");
        // A ping-pong: each end counts what went and what came.
        row.transport = "dpdk".into();
        account(&mut row, 500_000_000, &before, &after);
        assert_eq!(row.cpu_s_per_gb, Some(6.0));
        assert_eq!(row.retransmits, Some(0));
    }

    #[test]
    fn a_stall_in_one_repeat_shows_and_few_blocks_have_no_tail() {
        let sample = |blocks: u64, slow_ns: u64| {
            let mut latency = new_histogram();
            latency.record_n(1_000, blocks - 2).unwrap();
            latency.record_n(slow_ns, 2).unwrap();
            Sample {
                blocks,
                elapsed: std::time::Duration::from_secs(1),
                latency,
            }
        };
        let work = Workload {
            block_size: 1000,
            batch_size: 1,
            duration: std::time::Duration::from_secs(1),
            blocks_min: 1,
            rate: None,
        };
        let one_of_three = [sample(50, 1_000), sample(50, 9_000_000), sample(50, 1_000)];
        let row = figures(Row::default(), &one_of_three, &work);
        assert_eq!((row.blocks, row.blocks_per_s), (Some(150), Some(50.0)));
        assert!(row.p99_us.unwrap() > 8_000.0 && row.p50_us.unwrap() < 2.0);
        assert_eq!(row.p999_us, None);
        let row = figures(Row::default(), &one_of_three[..1], &work);
        assert_eq!(row.p99_us, None);
    }
}
