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

/// What both ends used for a row of Genie's.
pub fn account(row: &mut Row, before: &[Usage; 2], after: &[Usage; 2]) {
    account_cpu(row, before, after);
    // Each end counts what it sent and what it received: the bytes delivered
    // are half of the sum.
    let bytes: u64 = (0..2).map(|end| after[end].bytes - before[end].bytes).sum();
    let delivered = (bytes as f64 / 2.0).max(1.0);
    let copied = |of: fn(&Usage) -> u64| {
        let copied: u64 = (0..2).map(|end| of(&after[end]) - of(&before[end])).sum();
        Some(copied as f64 / delivered)
    };
    row.copies_per_byte = copied(|usage| usage.copies.genie);
    row.driver_copies_per_byte = copied(|usage| usage.copies.driver);
    row.kernel_copies_per_byte = copied(|usage| usage.copies.kernel);
    row.retransmits = Some(
        (0..2)
            .map(|end| after[end].retransmits - before[end].retransmits)
            .sum(),
    );
    let cpu = cpu_between(before, after);
    row.cpu_s_per_gb = Some(cpu / (delivered / 1e9));
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

fn cpu_between(before: &[Usage; 2], after: &[Usage; 2]) -> f64 {
    let ends = if after[0].process == after[1].process {
        1
    } else {
        2
    };
    (0..ends)
        .map(|end| after[end].cpu_seconds - before[end].cpu_seconds)
        .sum()
}
