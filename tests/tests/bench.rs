//! `genie bench` across processes: its schema, its honesty, its refusals.

use std::time::Duration;

use genie_tests::{Agent, Running, genie_command};
use serde_json::Value;

/// Long enough for short rows on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(120);

fn bench(args: &str) -> genie_tests::Output {
    let mut command = genie_command();
    command.arg("bench").args(args.split(' '));
    Running::start(command).wait(LIMIT)
}

fn report(args: &str) -> Value {
    let output = bench(&format!("--json {args}"));
    assert!(output.status.success(), "{}", output.stderr);
    serde_json::from_str(&output.stdout).expect("--json prints JSON")
}

fn number(row: &Value, field: &str) -> f64 {
    row[field]
        .as_f64()
        .unwrap_or_else(|| panic!("no {field} in {row}"))
}

const SHORT: &str = "--repeats 3 --duration 100ms --warmup 20ms";

#[test]
fn a_row_has_every_field_and_they_agree() {
    let report = report(&format!(
        "--spawn --transport tcp --hot --op send,pingpong --block-size 4k,1m \
         --check-consistency --baseline memcpy,tcp {SHORT}"
    ));
    assert_eq!(report["schema"], 1);
    assert!(report["environment"]["cpus"].as_u64().unwrap() > 0);
    assert!(report["date"].as_str().unwrap().ends_with('Z'));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert_eq!(
            (&row["verified"], &row["error"]),
            (&Value::Bool(true), &Value::Null),
            "{row}"
        );
        assert_eq!(row["digest"], true);
        assert_eq!(
            (&row["transport"], &row["device"]),
            (&"tcp".into(), &"tcp → tcp".into())
        );
        let rate = number(row, "gb_per_s");
        let blocks = number(row, "blocks_per_s") * number(row, "block_size") / 1e9;
        // Medians of the same repeats.
        assert!((rate - blocks).abs() < 1e-6 * rate.max(1e-6), "{row}");
        let p50 = number(row, "p50_us");
        assert!(p50 > 0.0, "{row}");
        assert_quantiles(row);
        // One at a time: the mean latency and the rate are the same fact. The
        // rate is the median of repeats, so one that was held up counts in the
        // mean alone: of three it takes at most a third away.
        let from_latency = number(row, "block_size") / number(row, "avg_us") / 1e3;
        assert!(rate <= from_latency * 2.0, "{row}");
        assert!(rate >= from_latency * 0.3, "{row}");
        assert!(number(row, "cpu_s_per_gb") > 0.0, "{row}");
        // Over sockets the kernel copies each byte in and out, Genie none.
        let copies = |field| number(row, field);
        assert!(copies("kernel_copies_per_byte") > 1.5, "{row}");
        assert_eq!(row["retransmits"], Value::Null, "only the kernel knows");
        assert!(!row["reasons"].as_array().unwrap().is_empty());
        let [low, high] = [0, 1].map(|end| row["gb_per_s_ci95"][end].as_f64().unwrap());
        assert!(low <= high);
    }
    let baselines = report["baselines"].as_array().unwrap();
    let named = |name: &str| {
        baselines
            .iter()
            .any(|row| row["name"].as_str().unwrap().starts_with(name))
    };
    assert!(
        named("memcpy") && named("bare tcp send") && named("bare tcp pingpong"),
        "{report}"
    );
    assert!(baselines.iter().all(|row| number(row, "gb_per_s") > 0.0));
}

/// The same rows plain and sealed: what sealing copies is in the ledger.
#[test]
fn the_cost_of_sealing_is_measured_beside_plain_packets() {
    let report = report(&format!(
        "--in-process --transport mem --hot --op send --block-size 1m --baseline none \
         --check-consistency --data-security plain,aead {SHORT}"
    ));
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["mem send hot 1048576", "mem(aead) send hot 1048576"]
    );
    for (row, copies) in rows.iter().zip([1.0, 3.0]) {
        assert_eq!(row["verified"], true, "{row}");
        let copied = number(row, "copies_per_byte");
        // What is sent again is copied again; the last block of the warm-up may
        // be counted at one end only.
        assert!((copies * 0.9..copies * 1.2).contains(&copied), "{row}");
    }
}

#[test]
fn both_ends_in_one_process_measure_the_protocol_without_a_driver() {
    let report = report(&format!(
        "--in-process --transport mem --hot --op send --block-size 64k --batch-size 4 \
         --check-consistency --baseline none {SHORT}"
    ));
    let row = &report["rows"][0];
    assert_eq!(
        (&row["verified"], &row["device"]),
        (&true.into(), &"mem_pair → mem_pair".into())
    );
    // The device copies on one side, the engine places on the other.
    assert!(number(row, "copies_per_byte") > 0.99 && number(row, "driver_copies_per_byte") > 0.99);
}

/// In ordinary memory if need be: no huge pages are asked for.
#[test]
fn round_trips_on_the_engines_own_thread_are_measured_beside_the_raw_devices() {
    let output = bench(&format!(
        "--json --spawn --transport dpdk --hot --op pingpong --block-size 64,4k --baseline raw {SHORT}"
    ));
    let report: Value = serde_json::from_str(&output.stdout).expect("--json prints JSON");
    let rows = report["rows"].as_array().unwrap();
    let reason = rows[0]["error"].as_str().unwrap_or_default();
    if reason.contains("libgenie_dpdk") || reason.contains("libdpdk") {
        println!("skipped: {reason}");
        return;
    }
    assert!(output.status.success(), "{}", output.stderr);
    let named = |name: &str| {
        let baselines = report["baselines"].as_array().unwrap();
        let mut all = rows.iter().chain(baselines);
        let row = all.find(|row| row["name"] == name);
        row.unwrap_or_else(|| panic!("no '{name}' in {report}"))
    };
    for size in [64, 4096] {
        let polled = named(&format!("dpdk(polled) pingpong hot {size}"));
        let threads = named(&format!("dpdk pingpong hot {size}"));
        let raw = named(&format!("raw device pingpong {size}"));
        for row in [polled, threads] {
            assert_eq!(
                (&row["verified"], &row["digest"]),
                (&true.into(), &true.into())
            );
            assert_eq!(
                (&row["block_size"], &row["error"]),
                (&size.into(), &Value::Null)
            );
        }
        assert_eq!(raw["digest"], Value::Null);
        for row in [polled, threads, raw] {
            assert!(number(row, "p50_us") > 0.0, "{row}");
            assert_quantiles(row);
        }
    }
}

#[test]
fn what_is_read_in_place_is_what_was_sent() {
    let output = bench(&format!(
        "--json --spawn --transport dpdk --hot --op in-place --block-size 100,3m --batch-size 3 \
         --baseline none {SHORT}"
    ));
    let report: Value = serde_json::from_str(&output.stdout).expect("--json prints JSON");
    let rows = report["rows"].as_array().unwrap();
    let reason = rows[0]["error"].as_str().unwrap_or_default();
    if reason.contains("libgenie_dpdk") || reason.contains("libdpdk") {
        println!("skipped: {reason}");
        return;
    }
    assert!(output.status.success(), "{}", output.stderr);
    assert_eq!(rows.len(), 2, "{report}");
    for (row, size) in rows.iter().zip([100, 3 << 20]) {
        let name = format!("dpdk(polled) in-place hot {size}");
        assert_eq!((&row["name"], &row["error"]), (&name.into(), &Value::Null));
        assert_eq!(row["verified"], true, "{row}");
        assert!(number(row, "gb_per_s") > 0.0);
        assert_quantiles(row);
    }
    let refused = bench(&format!("--spawn --transport tcp --op in-place {SHORT}"));
    assert!(!refused.status.success());
    assert!(refused.stderr.contains("local pair"), "{}", refused.stderr);
}

#[test]
fn a_rate_is_kept_and_latency_counts_from_when_a_block_was_due() {
    let is_kept = || {
        let report = report(
            "--spawn --transport tcp --hot --op send --block-size 4k --rate 200 --batch-size 8 \
             --baseline none --repeats 3 --duration 500ms --warmup 20ms",
        );
        let blocks = number(&report["rows"][0], "blocks_per_s");
        println!("{blocks} blocks a second");
        (190.0..=210.0).contains(&blocks)
    };
    // A machine that is held up misses some.
    assert!((0..4).any(|_| is_kept()), "it was never kept");
}

#[test]
fn a_device_that_is_not_there_is_a_row_with_a_reason_and_a_failure() {
    let output = bench(&format!(
        "--json --in-process --transport dpdk,tcp --hot --op send --block-size 4k --baseline none {SHORT}"
    ));
    output.assert_fails_with("1 of 2 rows have no figures");
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    let failed = &report["rows"][0];
    assert_eq!(
        (&failed["gb_per_s"], &failed["verified"]),
        (&Value::Null, &false.into())
    );
    assert!(
        failed["error"].as_str().unwrap().contains("dpdk"),
        "{failed}"
    );
    assert_eq!(
        report["rows"][1]["verified"], true,
        "the other transport is measured all the same"
    );
}

#[test]
fn rows_without_digests_are_verified_by_comparison_and_say_so() {
    let report = report(&format!(
        "--spawn --transport tcp,shm --digest off --hot --op send --block-size 4k,1m \
         --check-consistency --baseline none {SHORT}"
    ));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert_eq!(
            (&row["verified"], &row["digest"]),
            (&true.into(), &false.into()),
            "{row}"
        );
        assert!(row["name"].as_str().unwrap().contains("no-digest"), "{row}");
    }
    assert!(
        report["notes"].to_string().contains("no digests"),
        "{report}"
    );
}

/// Higher quantiles are there if there were blocks enough, and are higher.
fn assert_quantiles(row: &Value) {
    let blocks = row["blocks"].as_u64().unwrap();
    let mut last = number(row, "p50_us");
    for (field, least) in [("p99_us", 100), ("p999_us", 1000)] {
        assert_eq!(row[field].is_number(), blocks >= least, "{row}");
        if let Some(value) = row[field].as_f64() {
            assert!(value >= last, "{row}");
            last = value;
        }
    }
}

/// Rows through agents have what the others have.
fn assert_through_agents(row: &Value, transport: &str) {
    assert_eq!(
        (&row["verified"], &row["error"], &row["transport"]),
        (&true.into(), &Value::Null, &transport.into()),
        "{row}"
    );
    assert!(number(row, "gb_per_s") > 0.0 && number(row, "cpu_s_per_gb") > 0.0);
    assert_quantiles(row);
    assert_eq!(row["retransmits"].is_u64(), transport == "dpdk", "{row}");
    assert!(row["copies_per_byte"].is_number());
    let reasons = row["reasons"].as_array().unwrap();
    assert!(reasons.contains(&"through agents".into()), "{row}");
}

#[test]
fn programs_read_and_write_windows_through_two_agents_started_for_it() {
    let report = report(&format!(
        "--spawn --transport tcp --hot --op read,write,send --block-size 4k,1m --batch-size 4 \
         --threads 2 --check-consistency --baseline none {SHORT}"
    ));
    let rows = report["rows"].as_array().unwrap();
    let by = |op: &'static str| rows.iter().filter(move |row| row["op"] == op);
    assert_eq!(
        (rows.len(), by("read").count(), by("write").count()),
        (6, 2, 2)
    );
    for row in by("read").chain(by("write")) {
        assert_through_agents(row, "tcp");
        assert_eq!(
            (&row["threads"], &row["batch_size"]),
            (&2.into(), &4.into())
        );
        assert!(row["device"].as_str().unwrap().contains(" → tcp"), "{row}");
    }
    // Engines carry it where they can.
    assert!(by("send").all(|row| row["device"] == "tcp → tcp" && row["verified"] == true));
}

#[test]
fn programs_read_and_write_windows_over_shm() {
    let report = report(&format!(
        "--spawn --transport shm --hot --op read,write --block-size 64,1m \
         --check-consistency --baseline none {SHORT}"
    ));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert_through_agents(row, "shm");
        assert!(row["device"].as_str().unwrap().contains("shm"), "{row}");
    }
}

#[test]
fn programs_measure_agents_that_run_and_leave_nothing_there() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let report = report(&format!(
        "--node b --socket {} --hot --block-size 4k --check-consistency --baseline none {SHORT}",
        a.socket.display()
    ));
    let rows = report["rows"].as_array().unwrap();
    let ops: Vec<_> = rows.iter().map(|row| row["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["send", "write", "read"]);
    for row in rows {
        assert_through_agents(row, "tcp");
        assert!(row["name"].as_str().unwrap().starts_with("b "), "{row}");
    }
    let store = &b.status()["store"];
    assert_eq!(
        (&store["tensors"], &store["used_bytes"]),
        (&0.into(), &0.into())
    );
    let nobody = bench(&format!(
        "--node c --socket {} --baseline none",
        a.socket.display()
    ));
    nobody.assert_fails_with("rows have no figures");
}

#[test]
fn blocks_of_an_accelerator_are_measured_and_called_what_they_are() {
    let report = report(&format!(
        "--spawn --transport tcp --memory sim --hot --block-size 4m --check-consistency \
         --baseline none {SHORT}"
    ));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert_through_agents(row, "tcp");
        assert_eq!(row["memory"], "sim");
        assert!(row["name"].as_str().unwrap().contains(" sim "), "{row}");
        assert!(row["reasons"].to_string().contains("simulated"), "{row}");
    }
    assert!(
        report["notes"].to_string().contains("simulated"),
        "{report}"
    );
}

#[test]
fn what_is_not_there_by_default_is_said_and_is_no_failure() {
    // Nobody has a raw device of another host's.
    let report = report(&format!(
        "--in-process --transport tcp --hot --op send --block-size 4k {SHORT}"
    ));
    let missing = report["not_measured"].as_array().unwrap();
    assert!(
        missing
            .iter()
            .any(|one| one["name"] == "raw" && one["reason"].is_string()),
        "{report}"
    );
}

#[test]
fn what_is_not_built_is_a_usage_error() {
    for (args, reason) in [
        ("--in-process --op read", "--spawn starts two"),
        ("--node b --op pingpong", "send, read and write"),
        ("--spawn --digest off --op write", "agents check every byte"),
        ("--spawn --transport mem", "--in-process"),
        ("--spawn --block-size 0", "--block-size"),
    ] {
        let output = bench(args);
        assert_eq!(output.status.code(), Some(2), "{args}");
        assert!(output.stderr.contains(reason), "{args}: {}", output.stderr);
    }
}

#[test]
fn values_are_written_for_spreadsheets() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.csv");
    let file = file.to_str().unwrap();
    let output = bench(&format!(
        "--spawn --transport tcp --hot --op send --block-size 4k --baseline none --csv {file} {SHORT}"
    ));
    assert!(output.status.success(), "{}", output.stderr);
    assert!(
        output.stdout.contains("tcp send hot 4096"),
        "{}",
        output.stdout
    );
    let text = std::fs::read_to_string(file).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn a_peer_that_is_gone_is_an_error_at_once() {
    let output =
        bench("--peer 127.0.0.1:9 --transport tcp --op send --block-size 4k --baseline none");
    output.assert_fails_with("rows have no figures");
    assert!(output.took < Duration::from_secs(20), "{:?}", output.took);
    // Also where nothing was asked for by name.
    bench("--peer 127.0.0.1:9 --quick").assert_fails_with("no transport could be measured");
}
