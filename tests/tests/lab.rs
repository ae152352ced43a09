//! Genie between two hosts with a bad wire between them.
//!
//! Skipped, with the reason, where that cannot be built. The wire emulator is
//! looked for at `GENIE_WIRE`, then beside the `genie` binary.

use std::path::PathBuf;
use std::time::Duration;

use genie_tests::{Running, genie_command, genie_path};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(180);

fn wire() -> PathBuf {
    let beside = genie_path().with_file_name("genie-wire");
    std::env::var_os("GENIE_WIRE").map_or(beside, PathBuf::from)
}

/// Why there can be no lab here.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("the lab needs root".into());
    }
    if !wire().exists() {
        return Some(format!("{} was not built", wire().display()));
    }
    let tool = ["ip", "ethtool"].into_iter().find(|tool| {
        let there = std::process::Command::new("which").arg(tool).output();
        !there.is_ok_and(|output| output.status.success())
    });
    tool.map(|tool| format!("{tool} is not installed"))
}

/// Moves blocks over a bad wire and returns the report.
fn measure(transport: &str, profile: &str) -> Option<Value> {
    if let Some(reason) = missing() {
        assert!(
            std::env::var_os("GENIE_REQUIRE_LAB").is_none(),
            "the lab is required: {reason}"
        );
        println!("skipped: lab: {reason}");
        return None;
    }
    let mut command = genie_command();
    command.env("GENIE_WIRE", wire());
    command.args([
        "--json",
        "bench",
        "--lab",
        profile,
        "--transport",
        transport,
    ]);
    command.args([
        "--op",
        "send",
        "--block-size",
        "1000,64k,3m",
        "--batch-size",
        "2",
        "--hot",
    ]);
    command.args(["--check-consistency", "--baseline", "none"]);
    command.args(["--repeats", "2", "--duration", "300ms", "--warmup", "1ms"]);
    let output = Running::start(command).wait(LIMIT);
    let report: Value = serde_json::from_str(&output.stdout)
        .unwrap_or_else(|_| panic!("no report: {}", output.stderr));
    let failed = report["rows"][0]["error"].as_str();
    let no_dpdk = [
        "libgenie_dpdk",
        "built without",
        "DPDK does not come up",
        "net_af_packet",
    ];
    if let Some(reason) = failed.filter(|reason| no_dpdk.iter().any(|word| reason.contains(word))) {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        println!("skipped: {reason}");
        return None;
    }
    assert!(output.status.success(), "{}", output.stderr);
    Some(report)
}

fn assert_exact(report: &Value) {
    let rows = report["rows"].as_array().unwrap();
    // Three sizes; kernel TCP with each congestion control.
    let controls = if rows[0]["transport"] == "tcp" { 2 } else { 1 };
    assert_eq!(rows.len(), 3 * controls, "{report}");
    for row in rows {
        // Verified: equal digests at both ends, and every byte what was sent.
        assert_eq!(
            (&row["verified"], &row["error"]),
            (&true.into(), &Value::Null),
            "{row}"
        );
    }
    let there = &report["wire"]["directions"][0];
    for fate in ["lost", "reordered", "duplicated", "corrupted"] {
        assert!(
            there[fate].as_u64().unwrap() > 0,
            "nothing was {fate}: {there}"
        );
    }
}

#[test]
fn bytes_are_exact_over_dpdk_through_loss_reordering_duplication_and_corruption() {
    let Some(report) = measure("dpdk", "bad,seed=3") else {
        return;
    };
    assert_exact(&report);
    let rows = report["rows"].as_array().unwrap();
    let again: u64 = rows
        .iter()
        .map(|row| row["retransmits"].as_u64().unwrap())
        .sum();
    assert!(again > 0, "frames were lost, so some were sent again");
    assert_eq!(rows[0]["device"], "net_af_packet → net_af_packet");
}

#[test]
fn bytes_are_exact_over_tcp_through_the_same() {
    let Some(report) = measure("tcp", "bad,seed=4") else {
        return;
    };
    assert_exact(&report);
}

#[test]
fn without_an_emulator_two_hosts_are_joined_directly() {
    let Some(report) = measure("tcp", "none") else {
        return;
    };
    assert_eq!(report["wire"], Value::Null, "{report}");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6, "three sizes, two congestion controls");
    for row in rows {
        assert_eq!(
            (&row["verified"], &row["error"]),
            (&true.into(), &Value::Null),
            "{row}"
        );
    }
}
