//! Two agents over a DPDK device: the local pair of virtio_user and vhost.
//!
//! Skipped, with the reason, where there is no DPDK or no huge page;
//! `GENIE_REQUIRE_DPDK=1` turns that into a failure.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, eventually};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use serde_json::{Value, json};

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

fn transport(agent: &Agent, name: &str) -> Value {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let found = transports.iter().find(|one| one["transport"] == name);
    found
        .unwrap_or_else(|| panic!("no {name} in {status}"))
        .clone()
}

/// Two agents with the ends of a pair; none, having said why, without DPDK.
fn pair(folder: &Path, transport_flag: &str) -> Option<(Agent, Agent)> {
    let device = format!("--dpdk-device=pair:{}", folder.join("pair").display());
    let flags = ["--liveness=2s", &device];
    let start =
        |name: &str, more: &[&str]| Agent::start_with(folder, name, &[&flags[..], more].concat());
    let probe = Agent::start_with(folder, "probe", &["--transport=dpdk,tcp", &device]);
    let reason = transport(&probe, "dpdk")["reason"].clone();
    drop(probe);
    if let Some(reason) = reason.as_str() {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        println!("skipped: {reason}");
        return None;
    }
    let b = start("b", &["--transport=dpdk,tcp"]);
    let a = start("a", &[transport_flag, &b.as_peer()]);
    Some((a, b))
}

#[test]
fn a_model_takes_the_device_as_its_own_counters_show() {
    let folder = tempfile::tempdir().unwrap();
    let Some((a, b)) = pair(folder.path(), "--transport=dpdk") else {
        return;
    };
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let mut tensors: Vec<Tensor> = (0..300)
        .map(|i| Tensor::bytes(&format!("t.{i}"), i * 37))
        .collect();
    tensors.push(Tensor::bytes("large", (8 << 20) + 13));
    model::write(&file, &tensors, &[("format", "pt")]);
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();

    let moved = |from: &Agent, to: &Agent| {
        let port = |agent: &Agent, counter: &str| {
            transport(agent, "dpdk")["engine"]["port"][counter].as_u64()
        };
        // An engine publishes now and then.
        let through = port(from, "tx_bytes")?.min(port(to, "rx_bytes")?);
        (through > bytes).then_some(())
    };
    let put = a.json(&["put", text(&file), "b:model"]);
    eventually("both ports have counted the put", || moved(&a, &b));
    let got = a.json(&["get", "b:model", text(&back)]);
    eventually("both ports have counted the get", || moved(&b, &a));
    assert_eq!(model::read(&back), model::read(&file));

    for moved in [&put, &got] {
        let path = moved["path"].as_str().unwrap();
        assert!(
            ["dpdk:net_vhost", "dpdk:net_virtio_user"].contains(&path),
            "{moved}"
        );
        assert_eq!(moved["bytes"], bytes);
        assert_eq!(moved["copies"]["kernel"], 0, "no kernel on this path");
        assert!(
            moved["copies"]["driver"].as_u64() >= Some(bytes),
            "vhost copies: {moved}"
        );
    }
    assert_eq!(put["digest"], got["digest"]);
    // One copy out of the packets, and one into them where the device (the
    // virtio_user end) takes no memory but its own.
    let copies = |moved: &Value| moved["copies_per_byte"].as_f64().unwrap().round() as u64;
    let mut both = [copies(&put), copies(&got)];
    both.sort_unstable();
    assert_eq!(both, [1, 2], "{put} {got}");
    // From the application's arena to the other one: nothing at the sending
    // end, but at that of virtio_user; one copy at the receiving end.
    let sent = |moved: &Value| moved["sent_copies"]["genie"].as_u64().unwrap() / bytes;
    let mut sent = [sent(&put), sent(&got)];
    sent.sort_unstable();
    assert_eq!(sent, [0, 1], "{put} {got}");
    for moved in [&put, &got] {
        assert_eq!(moved["received_copies"]["genie"], bytes, "{moved}");
    }
    for agent in [&a, &b] {
        assert!(
            agent.status()["sessions"][0]["path"]
                .as_str()
                .unwrap()
                .starts_with("dpdk:")
        );
    }
    for agent in [&a, &b] {
        let engine = transport(agent, "dpdk")["engine"].clone();
        // An idle agent sleeps, and has not spun for all of its life.
        let idle = &engine["idle"];
        assert!(idle["sleeps"].as_u64() > Some(0), "{engine}");
        let seconds = |state: &str| {
            let time = &idle[state];
            time["secs"].as_u64().unwrap() as f64 + time["nanos"].as_u64().unwrap() as f64 / 1e9
        };
        let all: f64 = ["busy", "spin", "pause", "sleep"].map(seconds).iter().sum();
        let up = agent.status()["up_seconds"].as_f64().unwrap();
        assert!(all > 0.0 && all < up + 10.0, "{all} s of {up} s: {engine}");
        // One peer has its part of the ring, and no more than there is.
        let ring = &engine["ring"];
        let frames = |what: &str| ring[what].as_u64().unwrap();
        assert!(frames("granted") > 0, "{ring}");
        assert!(frames("granted") <= frames("credit"), "{ring}");
        assert!(frames("credit") < frames("frames"), "{ring}");
        let session = &engine["sessions"][0];
        assert!(session["window_bytes"].as_u64() > Some(0), "{session}");
        assert!(!session["round_trip_min"].is_null(), "{session}");
        let resent = &engine["resent"];
        let by_cause: u64 = ["packet_threshold", "time_threshold", "probe"]
            .map(|cause| resent[cause].as_u64().unwrap())
            .iter()
            .sum();
        assert_eq!(session["retransmits"], by_cause, "{engine}");
    }
    let tcp = &transport(&b, "tcp")["engine"];
    assert_eq!(
        (&tcp["sent_bytes"], &tcp["received_bytes"]),
        (&json!(0), &json!(0))
    );
}

#[test]
fn a_stopped_peer_on_a_device_is_an_error_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let Some((a, b)) = pair(folder.path(), "--transport=dpdk,tcp") else {
        return;
    };
    let file = folder.path().join("large.safetensors");
    model::write_sparse(&file, 64, 16 << 20);
    let put = a.spawn(&["put", text(&file), "b:large"]);
    // The peer makes room for it or receives it; either way it cannot end.
    eventually("the peer has the request", || {
        (b.status()["sessions"][0]["requests"] == 1).then_some(())
    });
    b.signal(Signal::STOP);
    let stopped = Instant::now();
    put.wait(GENEROUS).assert_fails_with("peer 'b'");
    assert!(
        stopped.elapsed() < Duration::from_secs(2 + 5),
        "{:?}",
        stopped.elapsed()
    );
    b.signal(Signal::CONT);
    eventually("the room is given back", || {
        (b.status()["store"]["used_bytes"] == 0).then_some(())
    });
    let small = folder.path().join("small.safetensors");
    model::write(&small, &[Tensor::bytes("x", 5000)], &[]);
    assert_eq!(
        a.json(&["put", text(&small), "b:small"])["reasons"],
        json!([])
    );
}

/// Closes the connection over which vhost serves virtio_user, under both
/// processes: what remains of each device is a port without a peer.
fn part(agents: [&Agent; 2], folder: &Path) {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let of_pair = sockets.lines().filter(|line| {
        // Num RefCount Protocol Flags Type St Inode Path; 03 is connected.
        let mut words = line.split_whitespace().skip(5);
        words.next() == Some("03") && line.contains(text(folder)) && line.contains("pair")
    });
    let inodes: Vec<&str> = of_pair
        .filter_map(|line| line.split_whitespace().nth(6))
        .collect();
    let mut parted = 0;
    for agent in agents {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap();
        for descriptor in descriptors.flatten() {
            let Ok(target) = std::fs::read_link(descriptor.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            if !(inodes.iter()).any(|inode| target == format!("socket:[{inode}]")) {
                continue;
            }
            let number = descriptor.file_name().to_string_lossy().parse().unwrap();
            let pid = Pid::from_raw(agent.pid() as i32).unwrap();
            let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
            let socket =
                rustix::process::pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap();
            rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).unwrap();
            parted += 1;
        }
    }
    assert!(parted > 0, "no such connection among\n{sockets}");
}

/// Puts the same model again and again; returns what each put said.
fn keep_putting(a: &Agent, file: &Path, until: impl Fn() -> bool) -> Vec<Value> {
    let mut moved = Vec::new();
    while !until() {
        let name = format!("b:put{}", moved.len());
        moved.push(a.json(&["put", text(file), &name]));
        let removed = a.genie(&["rm", &name]);
        assert!(removed.status.success(), "{removed:?}");
    }
    moved
}

/// Device, TCP, device under load: `GENIE_FAILOVER_SECONDS=60` goes on for so
/// long, `--nocapture` shows the gap of each change.
#[test]
fn puts_go_over_tcp_while_vhost_is_closed_and_return_to_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let Some((a, b)) = pair(folder.path(), "--transport=dpdk,tcp") else {
        return;
    };
    let (file, socket) = (
        folder.path().join("model.safetensors"),
        folder.path().join("pair"),
    );
    let tensors: Vec<Tensor> = (0..8)
        .map(|i| Tensor::bytes(&format!("t.{i}"), (8 << 20) + i))
        .collect();
    model::write(&file, &tensors, &[]);
    let path = || a.status()["sessions"][0]["path"].to_string();
    let over = |wanted: &str| eventually(wanted, || path().contains(wanted).then_some(()));
    let first = a.json(&["put", text(&file), "b:first"]);
    assert!(path().contains("dpdk"), "{}", path());
    let seconds = std::env::var("GENIE_FAILOVER_SECONDS");
    let seconds = seconds.map_or(0, |text| text.parse().expect("a number of seconds"));
    let (begun, limit) = (Instant::now(), Duration::from_secs(seconds));
    let ended = AtomicBool::new(false);
    let moved = std::thread::scope(|scope| {
        let load = scope.spawn(|| keep_putting(&a, &file, || ended.load(Ordering::Relaxed)));
        std::thread::sleep(Duration::from_millis(500));
        // Closed, but at once open again: nothing may come of it.
        part([&a, &b], folder.path());
        std::thread::sleep(Duration::from_secs(2));
        let changes = a.status()["sessions"][0]["path_changes"].clone();
        assert_eq!(changes, json!(0));
        loop {
            // Nobody finds the socket: it stays closed.
            let away = folder.path().join("away");
            std::fs::rename(&socket, &away).unwrap();
            part([&a, &b], folder.path());
            over("tcp");
            std::thread::sleep(Duration::from_secs(1));
            std::fs::rename(&away, &socket).unwrap();
            over("dpdk");
            std::thread::sleep(Duration::from_secs(1));
            if begun.elapsed() > limit {
                break;
            }
        }
        ended.store(true, Ordering::Relaxed);
        load.join().unwrap()
    });
    for one in &moved {
        assert_eq!(one["digest"], first["digest"], "{one}");
    }
    // A session that has nothing to do notices it as well.
    let away = folder.path().join("away");
    std::fs::rename(&socket, &away).unwrap();
    part([&a, &b], folder.path());
    over("tcp");
    std::fs::rename(&away, &socket).unwrap();
    over("dpdk");
    let paths = moved.iter().filter(|one| one["path"] == "tcp").count();
    assert!(
        0 < paths && paths < moved.len(),
        "{paths} of {}",
        moved.len()
    );
    let changes = a.status()["sessions"][0]["changes"].clone();
    println!("{} puts of 64 MiB", moved.len());
    for change in changes.as_array().unwrap() {
        let [from, to, reason] = ["from", "to", "reason"].map(|key| change[key].as_str());
        println!("{from:?} -> {to:?}: {} ms: {reason:?}", change["gap_ms"]);
    }
    assert!(changes.as_array().unwrap().len() >= 2, "{changes}");
    let reason = changes[0]["reason"].as_str().unwrap();
    assert!(reason.contains("path was lost"), "{reason}");
}

#[test]
fn programs_read_and_write_windows_over_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let Some((a, _b)) = pair(folder.path(), "--transport=dpdk") else {
        return;
    };
    let args = "--node b --op read,write --block-size 64,1m --hot --check-consistency \
                --baseline none --repeats 2 --duration 100ms --warmup 20ms";
    let mut all = vec!["bench"];
    all.extend(args.split_whitespace());
    let report = a.json(&all);
    let rows = report["rows"].as_array().expect("a list");
    assert_eq!(rows.len(), 4, "{report}");
    for row in rows {
        assert_eq!(
            (&row["verified"], &row["error"]),
            (&json!(true), &Value::Null)
        );
        let device = row["device"].as_str().expect("the agents' paths");
        assert!(device.contains("dpdk:net_v"), "{row}");
    }
}

#[test]
fn a_side_without_a_device_is_the_reason_at_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    let Some((a, b)) = pair(folder.path(), "--transport=dpdk,tcp") else {
        return;
    };
    drop(b);
    let c = Agent::start_with(folder.path(), "c", &["--transport=dpdk,tcp"]);
    drop(a);
    let device = format!(
        "--dpdk-device=pair:{}",
        folder.path().join("pair").display()
    );
    let a = Agent::start_with(
        folder.path(),
        "a",
        &["--transport=dpdk,tcp", &device, &c.as_peer()],
    );
    let small = folder.path().join("small.safetensors");
    model::write(&small, &[Tensor::bytes("x", 5000)], &[]);
    let put = a.json(&["put", text(&small), "c:small"]);
    let reasons = json!(["dpdk: node 'c': no device was given (--dpdk-device)"]);
    assert_eq!((&put["path"], &put["reasons"]), (&json!("tcp"), &reasons));
    assert_eq!(c.status()["sessions"][0]["reasons"], reasons);
    drop(a);

    let args = ["--transport=dpdk", &device, &c.as_peer()];
    let a = Agent::start_with(folder.path(), "a", &args);
    let output = a.genie(&["put", text(&small), "c:small"]);
    output.assert_fails_with("no path to peer 'c'");
    output.assert_fails_with("node 'c': no device was given");
}
