//! Agents over the virtual devices that are not the local pair: memif between
//! two agents of this host, af_packet and af_xdp between two network namespaces.
//!
//! Skipped, with the reason, where there is no DPDK, no huge page or no root;
//! `GENIE_REQUIRE_DPDK=1` turns the first two into failures.

use std::path::Path;
use std::process::Command;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, clean, eventually, genie_path};
use serde_json::Value;

/// Where only root can do something.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: network namespaces need root");
    }
    root
}

fn dpdk(agent: &Agent) -> Value {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let found = transports.iter().find(|one| one["transport"] == "dpdk");
    found.expect("asked for").clone()
}

/// Whether the agent has its device; else this test is skipped.
fn has_device(agent: &Agent) -> bool {
    let Some(reason) = dpdk(agent)["reason"].as_str().map(str::to_owned) else {
        return true;
    };
    let missing = ["libgenie_dpdk", "built without", "no huge pages"];
    assert!(
        missing.iter().any(|word| reason.contains(word)),
        "the device cannot be opened: {reason}"
    );
    assert!(
        std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
        "DPDK is required: {reason}"
    );
    println!("skipped: {reason}");
    false
}

/// Moves a batch there and back; every byte went over the device, in frames as
/// long as it carries.
fn assert_exact(folder: &Path, a: &Agent, b: &Agent, driver: &str, mtu: u64) {
    let (file, back) = (
        folder.join("m.safetensors"),
        folder.join("back.safetensors"),
    );
    let mut tensors: Vec<Tensor> = (0..100)
        .map(|i| Tensor::bytes(&format!("t.{i}"), i * 37))
        .collect();
    tensors.push(Tensor::bytes("large", (4 << 20) + 13));
    model::write(&file, &tensors, &[]);
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let put = a.json(&["put", &text(&file), "b:m"]);
    let got = a.json(&["get", "b:m", &text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
    let path = format!("dpdk:{driver}");
    for moved in [&put, &got] {
        assert_eq!(
            (&moved["path"], &moved["bytes"]),
            (&path.as_str().into(), &bytes.into())
        );
    }
    assert_eq!(put["digest"], got["digest"]);
    for agent in [a, b] {
        // An engine publishes now and then.
        let carries = eventually("the device says what it carries", || {
            dpdk(agent)["engine"]["mtu"].as_u64()
        });
        assert_eq!(carries, mtu);
        let frames = eventually("the port has counted both", || {
            let port = &dpdk(agent)["engine"]["port"];
            let (sent, received) = (port["tx_bytes"].as_u64()?, port["rx_bytes"].as_u64()?);
            (sent.min(received) > bytes).then(|| port["tx_frames"].as_u64())?
        });
        assert!(frames >= bytes / mtu, "{frames} frames");
    }
}

#[test]
fn two_agents_over_memif_with_its_faults_said() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("memif.sock");
    let device = |role: &str, owner: &str| {
        let socket = socket.display();
        format!(
            "--dpdk-device=vdev:net_memif0,role={role},id=0,socket={socket},\
             socket-abstract=no{owner}"
        )
    };
    let b = Agent::start_with(
        folder.path(),
        "b",
        &["--transport=dpdk,tcp", &device("server", "")],
    );
    if !has_device(&b) {
        return;
    }
    let flags = ["--transport=dpdk", &device("client", ""), &b.as_peer()];
    let mut a = Agent::start_with(folder.path(), "a", &flags);
    eventually("both links are up", || {
        (a.genie(&["ls", "b"]).status.success()).then_some(())
    });
    assert_exact(folder.path(), &a, &b, "net_memif", 9000);
    for agent in [&a, &b] {
        let cautions = cautions(agent);
        for word in [
            "may crash this agent",
            "several descriptors",
            "started again",
        ] {
            assert!(cautions.contains(word), "{cautions}");
        }
        agent.assert_logs("may crash this agent");
        let shown = agent.genie(&["status"]).stdout;
        assert!(shown.contains("may crash this agent"), "{shown}");
    }
    a.stop();
}

/// Two hosts with a link for the control plane and one for the device.
struct Hosts {
    names: [String; 2],
}

impl Hosts {
    fn up(what: &str, data_mtu: u32) -> Self {
        let names = ["a", "b"].map(|end| format!("genie-{what}-{}-{end}", std::process::id()));
        let hosts = Self { names };
        let [a, b] = &hosts.names;
        for name in [a, b] {
            run(&format!("ip netns add {name}"));
        }
        for (link, mtu) in [("control", 1500), ("data", data_mtu)] {
            run(&format!(
                "ip -n {a} link add {link} mtu {mtu} type veth peer name {link} mtu {mtu} netns {b}"
            ));
            for name in [a, b] {
                run(&format!("ip -n {name} link set {link} up"));
            }
        }
        for (name, host) in [(a, 1), (b, 2)] {
            run(&format!(
                "ip -n {name} addr add 10.79.0.{host}/24 dev control"
            ));
        }
        hosts
    }

    /// An agent on one of them, with a device on the data link, and the flags
    /// behind it.
    fn agent(&self, folder: &Path, host: usize, device: &str, more: &[&str]) -> Agent {
        let mut command = Command::new("ip");
        clean(&mut command);
        command.args(["netns", "exec", &self.names[host]]);
        command.arg(genie_path());
        let name = ["a", "b"][host];
        let number = host + 1;
        let listen = format!("--listen=10.79.0.{number}:0");
        let data = format!("--data=10.79.0.{number}:0");
        let address = format!("--dpdk-address=10.80.0.{number}");
        let device = format!("--dpdk-device=vdev:{device}");
        let flags = ["--allow-unauthenticated", &listen, &data, &address];
        let device: Vec<_> = device.split(' ').collect();
        Agent::start_from(command, folder, name, &[&flags[..], &device, more].concat())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

fn run(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status();
    assert!(status.is_ok_and(|status| status.success()), "{command}");
}

/// Two agents between two namespaces over a device on a veth; `check` looks at
/// both once everything has moved.
fn between_hosts(
    what: &str,
    link_mtu: u32,
    device: &str,
    (driver, mtu): (&str, u64),
    check: impl Fn(&Agent),
) {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let hosts = Hosts::up(what, link_mtu);
    let b = hosts.agent(folder.path(), 1, device, &["--transport=dpdk,tcp"]);
    if !has_device(&b) {
        return;
    }
    let flags = ["--transport=dpdk", &b.as_peer()];
    let a = hosts.agent(folder.path(), 0, device, &flags);
    assert_exact(folder.path(), &a, &b, driver, mtu);
    [&a, &b].into_iter().for_each(check);
}

fn cautions(agent: &Agent) -> String {
    dpdk(agent)["engine"]["cautions"].to_string()
}

#[test]
fn two_agents_over_af_packet_on_an_ordinary_link() {
    let device = "net_af_packet0,iface=data";
    between_hosts("pkt", 1500, device, ("net_af_packet", 1500), |agent| {
        assert_eq!(cautions(agent), "[]");
    });
}

#[test]
fn two_agents_over_af_packet_with_frames_of_9000_bytes() {
    let device = "net_af_packet0,iface=data";
    between_hosts("jumbo", 9000, device, ("net_af_packet", 9000), |_| {});
}

#[test]
fn two_agents_over_af_packet_with_longer_frames_where_they_are_asked_for() {
    let device = "net_af_packet0,iface=data --dpdk-mtu=20000";
    between_hosts("long", 20_000, device, ("net_af_packet", 20_000), |_| {});
}

#[test]
fn two_agents_over_af_xdp_with_the_longest_frames_it_carries() {
    let device = "net_af_xdp0,iface=data";
    between_hosts("xdp", 3386, device, ("net_af_xdp", 3386), |agent| {
        assert!(
            cautions(agent).contains("one segment"),
            "{}",
            cautions(agent)
        );
    });
}
