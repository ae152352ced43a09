//! The figures for people, and for spreadsheets.

use super::report::{Report, Row};
use crate::units::show_bytes;

/// The report as a table, with what could not be measured and notes below.
pub fn show(report: &Report) -> String {
    let environment = &report.environment;
    let mut text = format!(
        "{} · {} CPUs · Linux {} · {}\n\n",
        environment.cpu, environment.cpus, environment.kernel, report.date
    );
    let width = report
        .rows
        .iter()
        .chain(&report.baselines)
        .map(|row| row.name.chars().count());
    let width = width.max().unwrap_or(0).max(8);
    text += &format!(
        "{:width$}  {:>9} {:>5}  {:>7} {:>13}  {:>9} {:>9} {:>9} {:>9}  {:>8} {:>7} {:>6}  {}\n",
        "",
        "block",
        "batch",
        "GB/s",
        "95 %",
        "avg µs",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "CPU s/GB",
        "copies",
        "again",
        "verified"
    );
    for (title, rows) in [("Genie", &report.rows), ("baselines", &report.baselines)] {
        if !rows.is_empty() {
            text += &format!("{title}\n");
        }
        for row in rows {
            text += &line(row, width);
        }
    }
    for missing in &report.not_measured {
        text += &format!("not measured: {}: {}\n", missing.name, missing.reason);
    }
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    text
}

fn line(row: &Row, width: usize) -> String {
    if let Some(error) = &row.error {
        return format!(
            "{:width$}  {:>9} FAILED: {error}\n",
            row.name,
            size(row.block_size)
        );
    }
    let interval = row.gb_per_s_ci95.map_or("–".into(), |[low, high]| {
        format!("{}–{}", figure(Some(low.max(0.0))), figure(Some(high)))
    });
    let copies = row.copies_per_byte.map(|genie| {
        genie
            + row.driver_copies_per_byte.unwrap_or(0.0)
            + row.kernel_copies_per_byte.unwrap_or(0.0)
    });
    format!(
        "{:width$}  {:>9} {:>5}  {:>7} {:>13}  {:>9} {:>9} {:>9} {:>9}  {:>8} {:>7} {:>6}  {}\n",
        row.name,
        size(row.block_size),
        row.batch_size,
        figure(row.gb_per_s),
        interval,
        figure(row.avg_us),
        figure(row.p50_us),
        figure(row.p99_us),
        figure(row.p999_us),
        figure(row.cpu_s_per_gb),
        figure(copies),
        row.retransmits
            .map_or("–".into(), |count| count.to_string()),
        if row.verified { "yes" } else { "no" },
    )
}

/// A block size in binary units, as block sizes are given.
fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (factor, unit) in UNITS {
        if bytes >= factor && bytes.is_multiple_of(factor) {
            return format!("{} {unit}", bytes / factor);
        }
    }
    show_bytes(bytes)
}

/// Three significant digits.
fn figure(value: Option<f64>) -> String {
    match value {
        None => "–".into(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) if value >= 0.01 || value == 0.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.2e}"),
    }
}

/// The report as comma-separated values, one line a row.
pub fn csv(report: &Report) -> String {
    let mut text = String::from(
        "kind,name,op,transport,device,memory,cold,block_size,batch_size,threads,streams,repeats,gb_per_s,\
         ci95_low,ci95_high,blocks_per_s,avg_us,p50_us,p99_us,p999_us,cpu_s_per_gb,copies_per_byte,\
         driver_copies_per_byte,kernel_copies_per_byte,retransmits,digest,verified,reasons,error\n",
    );
    for (kind, rows) in [("genie", &report.rows), ("baseline", &report.baselines)] {
        for row in rows {
            let number = shown::<f64>;
            let [low, high] = row
                .gb_per_s_ci95
                .map_or([None, None], |ends| ends.map(Some));
            let fields = [
                kind.to_owned(),
                row.name.clone(),
                row.op.clone(),
                row.transport.clone(),
                row.device.clone().unwrap_or_default(),
                row.memory.clone().unwrap_or_default(),
                row.cold.to_string(),
                row.block_size.to_string(),
                row.batch_size.to_string(),
                shown(row.threads),
                shown(row.streams),
                row.repeats.to_string(),
                number(row.gb_per_s),
                number(low),
                number(high),
                number(row.blocks_per_s),
                number(row.avg_us),
                number(row.p50_us),
                number(row.p99_us),
                number(row.p999_us),
                number(row.cpu_s_per_gb),
                number(row.copies_per_byte),
                number(row.driver_copies_per_byte),
                number(row.kernel_copies_per_byte),
                shown(row.retransmits),
                shown(row.digest),
                row.verified.to_string(),
                row.reasons.join("; "),
                row.error.clone().unwrap_or_default(),
            ];
            text += &fields.map(|field| quoted(&field)).join(",");
            text.push('\n');
        }
    }
    text
}

fn shown<T: ToString>(value: Option<T>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

/// A field as RFC 4180 wants it.
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{Environment, NotMeasured, SCHEMA};

    fn report() -> Report {
        let good = Row {
            name: "tcp send".into(),
            block_size: 1 << 20,
            batch_size: 4,
            gb_per_s: Some(4.217),
            gb_per_s_ci95: Some([4.1, 4.3]),
            p50_us: Some(123.4),
            verified: true,
            ..Row::default()
        };
        let error = Some("no path, says \"b\"".into());
        let bad = Row {
            name: "dpdk send".into(),
            block_size: 64,
            error,
            ..Row::default()
        };
        Report {
            schema: SCHEMA,
            command: "genie bench".into(),
            date: "2026-01-01T00:00:00Z".into(),
            environment: Environment::default(),
            rows: vec![good, bad],
            baselines: vec![],
            not_measured: vec![NotMeasured {
                name: "iperf3".into(),
                reason: "not installed".into(),
            }],
            notes: vec!["noisy".into()],
            wire: None,
        }
    }

    #[test]
    fn a_row_without_figures_is_a_row_with_its_reason() {
        let text = show(&report());
        assert!(text.contains("FAILED: no path"), "{text}");
        assert!(
            text.contains("4.22") && text.contains("4.10–4.30") && text.contains("1 MiB"),
            "{text}"
        );
        assert!(
            text.contains("not measured: iperf3: not installed") && text.contains("note: noisy")
        );
    }

    #[test]
    fn every_line_of_values_has_as_many_as_the_first() {
        let text = csv(&report());
        let mut lines = text.lines();
        let columns = lines.next().unwrap().split(',').count();
        assert_eq!(lines.next().unwrap().split(',').count(), columns);
        assert!(
            lines
                .next()
                .unwrap()
                .ends_with(",false,,\"no path, says \"\"b\"\"\""),
            "{text}"
        );
    }
}
