//! Two agents over a pair of devices with several queues each, an engine for each.
//!
//! Skipped, with the reason, where there is no DPDK or no huge page;
//! `GENIE_REQUIRE_DPDK=1` turns that into a failure.

use std::path::Path;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, eventually};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// The pictures of an agent's DPDK engines.
fn engines(agent: &Agent) -> Vec<Value> {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let dpdk = transports.iter().filter(|one| one["transport"] == "dpdk");
    dpdk.cloned().collect()
}

fn device(folder: &Path) -> String {
    format!("--dpdk-device=pair:{}", folder.join("pair").display())
}

/// Two agents that dial each other, over a device of two queues.
fn pair(folder: &Path) -> Option<(Agent, Agent)> {
    let device = device(folder);
    let flags = |more: &[&'static str]| -> Vec<String> {
        let mut flags = vec!["--queues=2".to_owned(), "--liveness=2s".to_owned()];
        flags.push(device.clone());
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        flags
    };
    let start = |name: &str, flags: &[String]| {
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        Agent::start_with(folder, name, &flags)
    };
    let probe = start("probe", &flags(&["--transport=dpdk,tcp"]));
    let reason = engines(&probe)[0]["reason"].clone();
    drop(probe);
    if let Some(reason) = reason.as_str() {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        println!("skipped: {reason}");
        return None;
    }
    let b = start("b", &flags(&["--transport=dpdk,tcp"]));
    let mut of_a = flags(&["--transport=dpdk"]);
    of_a.push(b.as_peer());
    let a = start("a", &of_a);
    Some((a, b))
}

#[test]
fn two_engines_share_a_device_and_give_all_of_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let Some((a, b)) = pair(folder.path()) else {
        return;
    };
    for agent in [&a, &b] {
        let engines = engines(agent);
        let queues: Vec<_> = engines.iter().map(|one| one["queue"].as_u64()).collect();
        assert_eq!(queues, [Some(0), Some(1)], "{engines:?}");
    }
    let file = folder.path().join("m.safetensors");
    let back = folder.path().join("out.safetensors");
    let mut tensors: Vec<Tensor> = (0..200)
        .map(|i| Tensor::bytes(&format!("t.{i}"), i * 37))
        .collect();
    tensors.push(Tensor::bytes("large", (8 << 20) + 13));
    model::write(&file, &tensors, &[("format", "pt")]);
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
    let put = a.json(&["put", text(&file), "b:model"]);
    let got = a.json(&["get", "b:model", text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
    for moved in [&put, &got] {
        assert!(
            moved["path"].as_str().unwrap().starts_with("dpdk:"),
            "{moved}"
        );
        assert_eq!(moved["bytes"], bytes);
        assert_eq!(moved["copies"]["kernel"], 0, "no kernel on this path");
    }
    eventually("one queue of each end has carried it", || {
        let moved = |agent: &Agent, what: &str| -> Vec<u64> {
            let engines = engines(agent);
            let count = |one: &Value| one["engine"][what].as_u64().unwrap();
            engines.iter().map(count).collect()
        };
        let right = |counts: Vec<u64>| counts == [bytes, 0];
        let all = [(&a, "sent_bytes"), (&a, "received_bytes")];
        all.into_iter()
            .all(|(agent, what)| right(moved(agent, what)))
            .then_some(())
    });
    // The same pair again: nothing was left of it.
    drop((a, b));
    let again = pair(folder.path()).expect("there was DPDK a moment ago");
    again.0.json(&["put", text(&file), "b:model"]);
}

#[test]
fn a_device_with_one_queue_refuses_two_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vhost");
    let device = format!(
        "--dpdk-device=vdev:net_vhost0,iface={},client=1,queues=1",
        socket.display()
    );
    let flags = ["--transport=dpdk,tcp", "--queues=2", &device];
    let agent = Agent::start_with(folder.path(), "a", &flags);
    let engines = engines(&agent);
    let reason = engines[0]["reason"].as_str().expect("it is refused");
    if reason.contains("huge pages") || !reason.contains("net_vhost") {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        return println!("skipped: {reason}");
    }
    assert!(
        reason.contains("at most 1 queues, not 2"),
        "the limit is named: {reason}"
    );
    assert!(reason.contains("--queues"), "{reason}");
}
