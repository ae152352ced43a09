//! `--data-security aead`: what one end demands counts for both, and what
//! cannot be sealed is refused.
//!
//! What needs a DPDK device is skipped, with the reason, where there is none;
//! `GENIE_REQUIRE_DPDK=1` turns that into a failure.

use std::path::Path;

use genie_client::{Moved, Owner};
use genie_controlplane::identity::authority;
use genie_controlplane::tensor::{Dtype, TensorInfo};
use genie_controlplane::transfer::{self, Progress, Source, TransferError};
use genie_controlplane::transport::Transport;
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_tests::model::{self, Tensor};
use genie_tests::nodes::{Nodes, Setup};
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

/// What the engine of a transport says of its only session.
fn engine_session(agent: &Agent, transport: &str) -> Option<Value> {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let of_it = |one: &&Value| one["transport"].as_str().unwrap().starts_with(transport);
    let found = transports.iter().find(of_it)?;
    let sessions = found["engine"]["sessions"].as_array()?;
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
///
/// `copies` are what each end then makes of a byte: into private memory and out
/// of it, at the receiving end of packets.
fn moves_sealed(common: &[&str], at: &Path, of_a: &[&str], of_b: &[&str], copies: [u64; 2]) {
    certify(at);
    let b = start(at, "b", &[common, of_b].concat());
    let peer = b.as_peer();
    let a = start(at, "a", &[common, of_a, &[&peer]].concat());
    let (file, back) = (at.join("m.safetensors"), at.join("out.safetensors"));
    let (tensors, bytes) = tensors();
    model::write(&file, &tensors, &[("format", "pt")]);
    let put = a.json(&["put", file.to_str().unwrap(), "b:model"]);
    let got = a.json(&["get", "b:model", back.to_str().unwrap()]);
    assert_eq!(model::read(&back), model::read(&file));
    let transport = &common[0]["--transport=".len()..][..3];
    for moved in [&put, &got] {
        assert_eq!(moved["bytes"], bytes, "{moved}");
        let path = moved["path"].as_str().unwrap();
        assert!(path.starts_with(transport), "{moved}");
        let [sent, received] = copies.map(|copies| copies * bytes);
        assert_eq!(moved["received_copies"]["genie"], received, "{moved}");
        assert!(
            moved["sent_copies"]["genie"].as_u64() >= Some(sent),
            "{moved}"
        );
    }
    for agent in [&a, &b] {
        assert_eq!(agent.status()["sessions"][0]["sealed"], true);
        let session = eventually("the engine shows its session", || {
            engine_session(agent, transport)
        });
        let clean = serde_json::json!({"forged": 0, "replayed": 0, "old_epoch": 0});
        assert_eq!(session["sealed"], clean);
        let shown = agent.genie(&["status"]).stdout;
        assert!(shown.contains(" (sealed), up"), "{shown}");
    }
}

fn moves_sealed_packets(of_a: &[&str], of_b: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let Some(device) = device(at) else { return };
    let common = ["--transport=dpdk,tcp", "--liveness=2s", &device];
    moves_sealed(&common, at, of_a, of_b, [1, 2]);
}

#[test]
fn the_dialler_demands_it() {
    moves_sealed_packets(&[SEALED], &[]);
}

#[test]
fn the_acceptor_demands_it() {
    moves_sealed_packets(&[], &[SEALED]);
}

#[test]
fn tcp_connections_are_sealed_whichever_end_demands_it() {
    for ends in [[&[SEALED][..], &[]], [&[], &[SEALED]]] {
        let folder = tempfile::tempdir().unwrap();
        let common = ["--transport=tcp", "--liveness=10s"];
        moves_sealed(&common, folder.path(), ends[0], ends[1], [1, 1]);
    }
}

/// Puts a tensor of nothing but the marker; says whether it could be read on
/// the way.
fn is_readable_on_its_way(sealed: bool) -> bool {
    const MARKER: &[u8] = b"read me on my way, again and again. ";
    let nodes = tcp_nodes(sealed);
    nodes.relay.look_for(MARKER);
    let bytes = MARKER.repeat(100_000);
    put(&nodes, &bytes).expect("it arrives");
    nodes.relay.has_seen()
}

#[test]
fn nothing_of_a_tensor_can_be_read_on_its_way() {
    assert!(is_readable_on_its_way(false), "the relay sees nothing");
    assert!(!is_readable_on_its_way(true));
}

#[test]
fn what_is_changed_on_its_way_is_never_taken_and_sent_again() {
    let nodes = tcp_nodes(true);
    let bytes: Vec<u8> = (0..96u32 << 20)
        .map(|at| (at >> 3) as u8 ^ at as u8)
        .collect();
    nodes.relay.flip_one_after(bytes.len() as u64 / 2);
    let moved = put(&nodes, &bytes).expect("it goes on over new connections");
    assert_eq!(
        (moved.path.as_str(), moved.bytes),
        ("tcp", bytes.len() as u64)
    );
    let reader = Owner::Peer("a".to_owned());
    let stored = nodes.b.store.tensor("m/x", &reader).unwrap();
    let mut arrived = vec![0; bytes.len()];
    stored.lease.host().unwrap().read_at(0, &mut arrived);
    assert!(arrived == bytes);
    // Whichever end read the bit noticed it.
    let forged = [&nodes.a, &nodes.b].map(|node| {
        let engine = node.transports.engine(Transport::Tcp).unwrap();
        engine.status.snapshot().sealed.forged
    });
    assert_eq!(forged.iter().sum::<u64>(), 1, "{forged:?}");
    let change = &Nodes::session(&nodes.a).unwrap().changes[0];
    assert_eq!((change.from.as_str(), change.to.as_str()), ("tcp", "tcp"));
}

#[test]
fn a_session_that_loses_its_device_goes_on_over_sealed_connections() {
    let nodes = Nodes::start(&Setup {
        sealed: true,
        ..Setup::default()
    });
    let bytes: Vec<u8> = (0..96u32 << 20).map(|at| (at >> 5) as u8).collect();
    nodes.runtime.block_on(nodes.a.session("b")).unwrap();
    nodes.cable.cut_after(3000);
    let moved = put(&nodes, &bytes).expect("it goes on");
    assert!(nodes.cable.is_cut());
    assert_eq!(
        (moved.path.as_str(), moved.bytes),
        ("tcp", bytes.len() as u64)
    );
    let session = Nodes::session(&nodes.a).unwrap();
    assert!(
        session.sealed && session.changes[0].from.starts_with("dpdk:"),
        "{session:?}"
    );
}

/// Two agents in this process, with a relay before the data port of `b`.
fn tcp_nodes(sealed: bool) -> Nodes {
    Nodes::start(&Setup {
        preference: "tcp",
        liveness: GENEROUS,
        sealed,
        ..Setup::default()
    })
}

fn put(nodes: &Nodes, bytes: &[u8]) -> Result<Moved, TransferError> {
    let region = Region::with_backing(bytes.len(), Backing::Shmem).unwrap();
    let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
    lease.write_at(0, bytes.into());
    let info = TensorInfo {
        name: "x".to_owned(),
        dtype: Dtype::U8,
        shape: vec![bytes.len() as u64],
    };
    let source = Source {
        info,
        lease: lease.into(),
    };
    nodes.runtime.block_on(async {
        let session = nodes.a.session("b").await?;
        let progress = Progress::default();
        let to = Default::default();
        transfer::put(&session, "m", vec![source], None, to, None, &progress).await
    })
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
