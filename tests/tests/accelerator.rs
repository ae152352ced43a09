//! Device memory through agents: from the store of one to that of another, on
//! the simulated accelerator, over TCP, `shm` and the local DPDK pair.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, eventually};
use serde_json::Value;

const SIM: &str = "--accelerator=sim";

/// Copies take a while, and those of two streams are not done in turn.
const SLOW: (&str, &str) = ("GENIE_SIM", "delay-us=300");

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Two agents over TCP, the second known to the first; `env` is the second's.
fn pair(folder: &Path, env: &[(&str, &str)]) -> (Agent, Agent) {
    pair_over("tcp", folder, env)
}

fn pair_over(transports: &str, folder: &Path, env: &[(&str, &str)]) -> (Agent, Agent) {
    let transports = format!("--transport={transports}");
    let b = Agent::start_in(folder, "b", &[&transports, SIM], env);
    let a = Agent::start_in(folder, "a", &[&transports, SIM, &b.as_peer()], &[SLOW]);
    (a, b)
}

/// A file of tensors around the length of a slot, and where to write it back.
fn files(folder: &Path) -> (PathBuf, PathBuf, u64) {
    let slot = 2 << 20;
    let lengths = [0, 1, 63, 4097, slot - 1, slot, slot + 1, 5 * slot + 12345];
    let tensors: Vec<_> = lengths
        .iter()
        .map(|len| Tensor::bytes(&format!("t.{len}"), *len))
        .collect();
    let file = folder.join("m.safetensors");
    model::write(&file, &tensors, &[("format", "pt")]);
    let bytes = lengths.iter().sum::<usize>() as u64;
    (file, folder.join("out.safetensors"), bytes)
}

fn memory_of(agent: &Agent, node: Option<&str>) -> Vec<String> {
    let listed = agent.json(&[&["ls"][..], node.as_slice()].concat());
    let listed = listed.as_array().expect("a list").iter();
    listed
        .map(|one| one["memory"].as_str().unwrap().to_owned())
        .collect()
}

/// Device to device, then to the host, then to the host's accelerator.
fn there_and_back(a: &Agent, b: &Agent, folder: &Path, path: &str) {
    let (file, back, bytes) = files(folder);
    let put = a.json(&["put", "--memory=sim", text(&file), "b:model"]);
    assert_eq!(put["bytes"], bytes);
    assert!(put["path"].as_str().unwrap().starts_with(path), "{put}");
    assert_eq!(memory_of(a, Some("b")), ["sim"; 8]);
    for memory in ["host", "sim"] {
        let memory = format!("--memory={memory}");
        let got = a.json(&["get", &memory, "b:model", text(&back)]);
        assert_eq!(
            (&got["digest"], &got["bytes"]),
            (&put["digest"], &put["bytes"])
        );
        assert_eq!(model::read(&back), model::read(&file), "{memory}");
    }
    // What was on the host goes to the host as before, in the same session.
    a.json(&["put", text(&file), "b:plain"]);
    assert!(!memory_of(b, None)[8..].contains(&"sim".to_owned()));
    a.json(&["get", "b:plain", text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
}

#[test]
fn tensors_go_from_device_to_device_over_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), &[SLOW]);
    there_and_back(&a, &b, folder.path(), "tcp");
    let status = b.status();
    let accelerator = &status["accelerators"][0];
    assert_eq!(accelerator["kind"], "sim");
    let name = accelerator["name"].as_str().unwrap();
    assert!(name.contains("simulated"), "{name}");
    assert!(accelerator["gpudirect"].is_string());
    assert_eq!(accelerator["slots_bytes"], 64 << 20);
    // All memory comes back.
    b.json(&["rm", "model"]);
    b.json(&["rm", "plain"]);
    assert_eq!(b.status()["store"]["used_bytes"], 0);
}

#[test]
fn tensors_go_from_device_to_device_over_shm() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair_over("shm,tcp", folder.path(), &[SLOW]);
    there_and_back(&a, &b, folder.path(), "shm");
}

/// Held by the test that has a pair: two agents with slots and DPDK's memory take
/// half a gigabyte of huge pages.
static ONE_PAIR: Mutex<()> = Mutex::new(());

/// Two agents over the local DPDK pair; `None` where there is no DPDK, which it says.
fn dpdk_pair(folder: &Path, env: &[(&str, &str)]) -> Option<(Agent, Agent)> {
    let device = format!("--dpdk-device=pair:{}", folder.join("pair").display());
    let flags = ["--transport=auto", &device, SIM];
    let probe = Agent::start_with(folder, "probe", &flags);
    let status = probe.status();
    drop(probe);
    let transports = status["transports"].as_array().unwrap();
    let dpdk = transports.iter().find(|one| one["transport"] == "dpdk");
    if let Some(reason) = dpdk.and_then(|one| one["reason"].as_str()) {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        println!("skipped: {reason}");
        return None;
    }
    let b = Agent::start_in(folder, "b", &flags, env);
    let flags = ["--transport=dpdk", &device, SIM, &b.as_peer()];
    let a = Agent::start_in(folder, "a", &flags, &[SLOW]);
    Some((a, b))
}

#[test]
fn tensors_go_from_device_to_device_over_the_local_dpdk_pair() {
    let _alone = ONE_PAIR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    if let Some((a, b)) = dpdk_pair(folder.path(), &[SLOW]) {
        there_and_back(&a, &b, folder.path(), "dpdk:");
    }
}

/// An agent takes the steps of GPUDirect as far as its port goes.
#[test]
fn what_no_card_receives_into_is_staged_and_the_reason_is_shown() {
    let _alone = ONE_PAIR.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let claims = ("GENIE_SIM", "gpudirect,delay-us=100");
    let Some((a, b)) = dpdk_pair(folder.path(), &[claims]) else {
        return;
    };
    there_and_back(&a, &b, folder.path(), "dpdk:");
    // The one that claims to be reachable fails at the port, which is virtual.
    let reasons = [
        (&b, "the card does not split headers from payloads: net_v"),
        (
            &a,
            "cards cannot reach the device's memory: no network card",
        ),
    ];
    for (agent, begins) in reasons {
        let status = agent.status();
        let reason = status["accelerators"][0]["gpudirect"].as_str().unwrap();
        assert!(reason.starts_with(begins), "{reason}");
        let session = &status["sessions"][0];
        let expected = format!("sim is staged through host memory: {reason}");
        let reasons = session["reasons"].as_array().unwrap();
        assert!(reasons.contains(&Value::from(expected)), "{reasons:?}");
        let shown = agent.genie(&["status"]).stdout;
        let line = format!("gpudirect: no, because {reason}");
        assert!(shown.contains(&line), "{shown}");
    }
}

#[test]
fn slots_that_the_device_does_not_register_lie_elsewhere_and_status_says_why() {
    let folder = tempfile::tempdir().unwrap();
    // Twice: on huge pages, and on ordinary ones.
    let (one, every) = (
        ("GENIE_SIM", "refuse-pins=1"),
        ("GENIE_SIM", "refuse-pins=2"),
    );
    let a = Agent::start_in(folder.path(), "a", &["--transport=tcp", SIM], &[every]);
    let status = a.status();
    let reason = status["accelerators"][0]["reason"].as_str().unwrap();
    assert_eq!(reason, "sim: pin failed with 801 (asked to refuse)");
    let b = Agent::start_in(folder.path(), "b", &["--transport=tcp", SIM], &[one]);
    let status = b.status();
    let accelerator = &status["accelerators"][0];
    match accelerator["reason"].as_str() {
        None => {
            assert_eq!(
                accelerator["slots_reason"],
                "sim: pin failed with 801 (asked to refuse)"
            );
            let (file, back, _) = files(folder.path());
            b.json(&["put", "--memory=sim", text(&file), "model"]);
            b.json(&["get", "--memory=sim", "model", text(&back)]);
            assert_eq!(model::read(&back), model::read(&file));
        }
        // No huge pages are free: ordinary ones were the only ones to try.
        Some(reason) => assert!(reason.contains("801"), "{reason}"),
    }
}

#[test]
fn a_local_store_keeps_tensors_on_the_device_too() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[SIM]);
    let (file, back, bytes) = files(folder.path());
    let put = a.json(&["put", "--memory=sim", text(&file), "model"]);
    assert_eq!(
        (&put["path"], &put["bytes"]),
        (&Value::from("local"), &bytes.into())
    );
    assert_eq!(memory_of(&a, None), ["sim"; 8]);
    for memory in ["--memory=auto", "--memory=sim"] {
        let got = a.json(&["get", memory, "model", text(&back)]);
        assert_eq!(got["digest"], put["digest"]);
        assert_eq!(model::read(&back), model::read(&file), "{memory}");
    }
}

/// How a simulated device fails in mid-transfer, the code that it gives, and
/// whether it can be used again: once, and for good, like an uncorrectable
/// memory error. Copies are late and out of turn as well.
const FAULTS: [(&str, &str, bool); 2] = [
    ("delay-us=300,fail-copy=5", "999", true),
    ("delay-us=300,sticky-copy=5", "214", false),
];

/// `b` fails in mid-transfer: typed, and nothing else is harmed.
fn fails_alone(a: &Agent, b: &Agent, folder: &Path, code: &str, again: bool) {
    let (file, back, _) = files(folder);
    // Memory of others, there before.
    a.json(&["put", text(&file), "b:before"]);
    let used = || b.status()["store"]["used_bytes"].clone();
    let before = used();
    let failed = a.genie(&["put", "--memory=sim", text(&file), "b:model"]);
    failed.assert_fails_with(&format!("sim: copy failed with {code} (asked to fail"));
    let kept = memory_of(a, Some("b"));
    assert!(!kept.contains(&"sim".to_owned()), "nothing is kept of it");
    let retried = a.genie(&["put", "--memory=sim", text(&file), "b:model"]);
    assert_eq!(retried.status.success(), again, "{retried:?}");
    if again {
        a.json(&["get", "--memory=sim", "b:model", text(&back)]);
        assert_eq!(
            model::read(&back),
            model::read(&file),
            "the next one is exact"
        );
        b.json(&["rm", "model"]);
    }
    let reasons = [a, b].map(|agent| agent.status()["accelerators"][0]["reason"].clone());
    let broken = reasons.iter().any(|reason| {
        let reason = reason.as_str().unwrap_or_default();
        reason.contains(code) && reason.contains("until the agent is started again")
    });
    assert_eq!(broken, !again, "{reasons:?}");
    // Ranges that were under way end by themselves.
    eventually("what failed is given back", || {
        (used() == before).then_some(())
    });
    // Other memory is untouched, and the session is the same one.
    a.json(&["put", text(&file), "b:after"]);
    for name in ["b:before", "b:after"] {
        a.json(&["get", name, text(&back)]);
        assert_eq!(model::read(&back), model::read(&file), "{name}");
    }
    let sessions = a.status()["sessions"].as_array().unwrap().len();
    assert_eq!(sessions, 1, "{}", a.status());
    assert_eq!(b.log().matches("session up").count(), 1);
}

#[test]
fn a_device_that_fails_in_mid_transfer_fails_the_put_and_not_the_session() {
    for (faults, code, again) in FAULTS {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = pair(folder.path(), &[("GENIE_SIM", faults)]);
        fails_alone(&a, &b, folder.path(), code, again);
    }
}

#[test]
fn a_device_that_fails_in_mid_transfer_over_the_dpdk_pair_fails_the_put_and_not_the_session() {
    let _alone = ONE_PAIR.lock().unwrap_or_else(PoisonError::into_inner);
    for (faults, code, again) in FAULTS {
        let folder = tempfile::tempdir().unwrap();
        let Some((a, b)) = dpdk_pair(folder.path(), &[("GENIE_SIM", faults)]) else {
            return;
        };
        fails_alone(&a, &b, folder.path(), code, again);
        let path = a.status()["sessions"][0]["path"].clone();
        assert!(path.as_str().unwrap().starts_with("dpdk:"), "{path}");
    }
}

#[test]
fn memory_that_is_not_there_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (file, back, _) = files(folder.path());
    let cuda = "--accelerator=cuda:7";
    let b = Agent::start_with(folder.path(), "b", &["--transport=tcp", cuda]);
    let a = Agent::start_in(
        folder.path(),
        "a",
        &["--transport=tcp", SIM, &b.as_peer()],
        &[("GENIE_SIM", "bytes=8388608")],
    );
    let put = |memory: &str| a.genie(&["put", memory, text(&file), "b:model"]);
    // The client's accelerator is there, the agent's is full.
    put("--memory=sim").assert_fails_with("sim has no room");
    put("--memory=cuda:7").assert_fails_with("CUDA");
    let status = b.status();
    let reason = status["accelerators"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("CUDA"), "{reason}");
    // A peer without.
    let small = folder.path().join("small.safetensors");
    model::write(&small, &[Tensor::bytes("t", 100)], &[]);
    let refused = a.genie(&["put", "--memory=sim", text(&small), "b:model"]);
    refused.assert_fails_with("this agent does not use sim: start it with --accelerator sim");
    a.json(&["put", text(&small), "b:model"]);
    a.json(&["get", "--memory=sim", "b:model", text(&back)]);
    assert_eq!(model::read(&back), model::read(&small));
}
