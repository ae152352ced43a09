//! `--data-security aead`: what one end demands counts for both, and what
//! cannot be sealed is refused.
//!
//! What needs a DPDK device is skipped, with the reason, where there is none;
//! `GENIE_REQUIRE_DPDK=1` turns that into a failure.

use std::path::Path;

use genie_controlplane::identity::authority;
use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, Running, eventually, genie_command};
use serde_json::Value;

const SEALED: &str = "--data-security=aead";

/// Makes a CA in `folder` that has certified `a` and `b`.
fn certify(folder: &Path) {
    authority::init(folder).unwrap();
    for name in ["a", "b"] {
        authority::issue(folder, name, authority::in_days(1)).unwrap();
    }
}

/// The flags with which `name` shows its certificate.
fn credentials(folder: &Path, name: &str) -> Vec<String> {
    let flag = |flag, file: String| format!("--{flag}={}", folder.join(file).display());
    vec![
        flag("ca", "ca.pem".to_owned()),
        flag("cert", format!("{name}.pem")),
        flag("key", format!("{name}.key")),
    ]
}

fn start(folder: &Path, name: &str, more: &[&str]) -> Agent {
    let credentials = credentials(folder, name);
    let mut flags: Vec<&str> = credentials.iter().map(String::as_str).collect();
    flags.extend(more);
    Agent::start_with(folder, name, &flags)
}

/// The device to be shared by two agents; none, having said why, without DPDK.
fn device(folder: &Path) -> Option<String> {
    let device = format!("--dpdk-device=pair:{}", folder.join("pair").display());
    let probe = Agent::start_with(folder, "probe", &["--transport=dpdk,tcp", &device]);
    let status = probe.status();
    drop(probe);
    let transports = status["transports"].as_array().expect("a list");
    let dpdk = transports.iter().find(|one| one["transport"] == "dpdk");
    if let Some(reason) = dpdk.expect("always listed")["reason"].as_str() {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        println!("skipped: {reason}");
        return None;
    }
    Some(device)
}

/// What the DPDK engine says of its only session.
fn engine_session(agent: &Agent) -> Option<Value> {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let dpdk = transports.iter().find(|one| one["transport"] == "dpdk")?;
    let sessions = dpdk["engine"]["sessions"].as_array()?;
    sessions.first().cloned()
}

fn tensors() -> (Vec<Tensor>, u64) {
    let mut tensors: Vec<Tensor> = (0..100)
        .map(|i| Tensor::bytes(&format!("t.{i}"), i * 37))
        .collect();
    tensors.push(Tensor::bytes("large", (8 << 20) + 13));
    let bytes = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
    (tensors, bytes)
}

/// A model goes there and back; whichever end demands it, both seal.
fn moves_sealed(of_a: &[&str], of_b: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let Some(device) = device(at) else { return };
    certify(at);
    let common = ["--transport=dpdk,tcp", "--liveness=2s", &device];
    let b = start(at, "b", &[&common[..], of_b].concat());
    let peer = b.as_peer();
    let a = start(at, "a", &[&common[..], of_a, &[&peer]].concat());
    let (file, back) = (at.join("m.safetensors"), at.join("out.safetensors"));
    let (tensors, bytes) = tensors();
    model::write(&file, &tensors, &[("format", "pt")]);
    let put = a.json(&["put", file.to_str().unwrap(), "b:model"]);
    let got = a.json(&["get", "b:model", back.to_str().unwrap()]);
    assert_eq!(model::read(&back), model::read(&file));
    for moved in [&put, &got] {
        assert_eq!(moved["bytes"], bytes, "{moved}");
        let path = moved["path"].as_str().unwrap();
        assert!(path.starts_with("dpdk:"), "{moved}");
        // Into private memory and out of it, at the receiving end.
        assert_eq!(moved["received_copies"]["genie"], 2 * bytes, "{moved}");
        assert!(
            moved["sent_copies"]["genie"].as_u64() >= Some(bytes),
            "{moved}"
        );
    }
    for agent in [&a, &b] {
        assert_eq!(agent.status()["sessions"][0]["sealed"], true);
        let session = eventually("the engine shows its session", || engine_session(agent));
        let clean = serde_json::json!({"forged": 0, "replayed": 0, "old_epoch": 0});
        assert_eq!(session["sealed"], clean);
        let shown = agent.genie(&["status"]).stdout;
        assert!(shown.contains(" (sealed), up"), "{shown}");
    }
}

#[test]
fn the_dialler_demands_it() {
    moves_sealed(&[SEALED], &[]);
}

#[test]
fn the_acceptor_demands_it() {
    moves_sealed(&[], &[SEALED]);
}

#[test]
fn without_it_packets_are_plain() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let Some(device) = device(at) else { return };
    certify(at);
    let common = ["--transport=dpdk", "--liveness=2s", &device];
    let b = start(at, "b", &common);
    let a = start(at, "a", &[&common[..], &[&b.as_peer()]].concat());
    assert!(a.genie(&["ls", "b"]).status.success());
    for agent in [&a, &b] {
        assert_eq!(agent.status()["sessions"][0]["sealed"], false);
    }
}

/// An end that demands sealed data takes no path that is not, whoever dials.
#[test]
fn tcp_is_refused_by_the_end_that_demands_it() {
    for (of_a, of_b, name) in [(SEALED, "", "a"), ("", SEALED, "b")] {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        certify(at);
        let flags = |more| {
            let mut flags = vec!["--transport=tcp", "--liveness=10s"];
            flags.extend(Some(more).filter(|more: &&str| !more.is_empty()));
            flags
        };
        let b = start(at, "b", &flags(of_b));
        let peer = b.as_peer();
        let a = start(at, "a", &[&flags(of_a)[..], &[&peer]].concat());
        let reason = format!("tcp: node '{name}' demands sealed data (--data-security aead)");
        a.genie(&["ls", "b"]).assert_fails_with(&reason);
        assert_eq!(b.status()["sessions"].as_array().unwrap().len(), 0);
    }
}

/// Within a host nothing goes over a link.
#[test]
fn shared_memory_is_good_enough() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    certify(at);
    let flags = ["--transport=shm,tcp", SEALED];
    let b = start(at, "b", &flags);
    let a = start(at, "a", &[&flags[..], &[&b.as_peer()]].concat());
    assert!(a.genie(&["ls", "b"]).status.success());
    let session = a.status()["sessions"][0].clone();
    assert_eq!(session["path"], "shm", "{session}");
}

#[test]
fn it_takes_credentials() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = genie_command();
    command.args([
        "agent",
        "--listen=127.0.0.1:0",
        "--data=127.0.0.1:0",
        SEALED,
    ]);
    command.arg(format!("--socket={}/x", folder.path().display()));
    let output = Running::start(command).wait(GENEROUS);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let reason = "data-security: aead takes keys that only the two ends have: add --ca";
    assert!(output.stderr.contains(reason), "{output:?}");
}
