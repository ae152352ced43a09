//! From samples and counters to the figures of a row.

use super::measure::{Sample, Workload};
use super::message::Usage;
use super::report::Row;
use super::statistics::{confidence_95, median};

/// A row's figures: medians over the repeats.
pub fn figures(described: Row, samples: &[Sample], work: &Workload) -> Row {
    let of = |figure: &dyn Fn(&Sample) -> f64| samples.iter().map(figure).collect::<Vec<_>>();
    let rates = of(&|sample| sample.gb_per_s(work.block_size));
    let blocks = of(&|sample| sample.blocks as f64 / sample.elapsed.as_secs_f64().max(1e-9));
    let quantile = |quantile: f64| median(&of(&|sample| sample.quantile_us(quantile)));
    Row {
        repeats: samples.len(),
        gb_per_s: median(&rates),
        gb_per_s_ci95: confidence_95(&rates),
        blocks_per_s: median(&blocks),
        avg_us: median(&of(&|sample| sample.latency.mean() / 1e3)),
        p50_us: quantile(0.5),
        p99_us: quantile(0.99),
        p999_us: quantile(0.999),
        ..described
    }
}

/// What the ends used for a row of Genie's: two for each thread.
pub fn account(row: &mut Row, before: &[Usage], after: &[Usage]) {
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
    row.retransmits = Some(used(&|usage| usage.retransmits));
    row.cpu_s_per_gb = Some(cpu_between(before, after) / (delivered / 1e9));
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
        account(&mut row, &before, &after);
        assert_eq!(row.cpu_s_per_gb, Some(3.0));
        assert_eq!(row.retransmits, Some(0));
    }
}
