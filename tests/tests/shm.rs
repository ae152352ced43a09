//! Agents of one host: descriptors are passed where they can be, and only there.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, clean, eventually, genie_command, genie_path};
use serde_json::{Value, json};

const NOBODY: u32 = 65534;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

fn engine(agent: &Agent, transport: &str) -> Value {
    let transports = agent.status()["transports"].clone();
    let all = transports.as_array().expect("a list");
    let found = all.iter().find(|one| one["transport"] == transport);
    found.expect("the transport is listed")["engine"].clone()
}

/// Puts a model from `a` to `b`, fetches it back, and compares; the put's figures.
fn there_and_back(a: &Agent, folder: &Path, len: usize) -> Value {
    let (file, back) = (folder.join("m.safetensors"), folder.join("back"));
    let tensors = [
        Tensor::bytes("large", len),
        Tensor::bytes("small", 3),
        Tensor::bytes("empty", 0),
    ];
    model::write(&file, &tensors, &[]);
    let put = a.json(&["put", text(&file), "b:m"]);
    let got = a.json(&["get", "b:m", text(&back)]);
    assert_eq!(put["digest"], got["digest"]);
    assert_eq!(put["path"], got["path"]);
    assert_eq!(model::read(&file), model::read(&back));
    a.json(&["rm", "b:m"]);
    put
}

#[test]
fn two_agents_of_one_host_copy_every_byte_once() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start_with(folder.path(), "b", &["--transport=auto"]);
    let a = Agent::start_with(folder.path(), "a", &["--transport=auto", &b.as_peer()]);
    let len = 20 << 20;
    let put = there_and_back(&a, folder.path(), len);
    assert_eq!(put["path"], "shm");
    assert_eq!(put["reasons"], json!([]));
    // There, and back: the receiver's kernel copies, nobody else does.
    let bytes = len as u64 + 3;
    for agent in [&a, &b] {
        // Engines publish what they did some times a second.
        let engine = eventually("its engine has said what it moved", || {
            let engine = engine(agent, "shm");
            let all = engine["sent_bytes"] == bytes && engine["received_bytes"] == bytes;
            all.then_some(engine)
        });
        assert_eq!(
            engine["copies"],
            json!({"genie": 0, "driver": 0, "kernel": bytes})
        );
    }
}

#[test]
fn a_peer_that_is_killed_is_lost_at_once_and_its_successor_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let mut b = Agent::start_with(folder.path(), "b", &["--transport=shm"]);
    let listen = format!("--listen={}", b.listen);
    let a = Agent::start_with(folder.path(), "a", &["--transport=shm", &b.as_peer()]);
    there_and_back(&a, folder.path(), 1 << 20);
    let before = a.descriptors();
    for round in 0..10 {
        b.kill();
        b = Agent::start_with(folder.path(), "b", &["--transport=shm", &listen]);
        let put = there_and_back(&a, folder.path(), 1 << 20);
        assert_eq!(put["path"], "shm", "round {round}");
    }
    let after = a.descriptors();
    assert!(
        after <= before + 2,
        "{before} descriptors before, {after} after"
    );
}

#[test]
fn agents_of_two_users_do_not_show_each_other_their_memory() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can act as two users");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let genie = folder.path().join("genie");
    fs::copy(genie_path(), &genie).unwrap();
    let mut command = Command::new(genie);
    clean(&mut command);
    command.uid(NOBODY).gid(NOBODY);
    let b = Agent::start_from(command, folder.path(), "b", &["--transport=shm,tcp"]);
    let a = Agent::start_with(folder.path(), "a", &["--transport=shm,tcp", &b.as_peer()]);
    let put = there_and_back(&a, folder.path(), 1 << 20);
    assert_eq!(put["path"], "tcp");
    let reason = put["reasons"][0].as_str().expect("a reason");
    assert!(reason.starts_with("shm: "), "{reason}");
    assert!(reason.contains("belongs to user 65534"), "{reason}");
    assert_eq!(b.status()["sessions"][0]["reasons"][0], reason);
}

/// A network namespace beside this one, with a link to it; removed when dropped.
struct Namespace(String);

impl Namespace {
    fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can make network namespaces".into());
        }
        let namespace = Self(format!("genie-shm-{}", std::process::id()));
        let name = &namespace.0;
        // Link names have at most 15 bytes.
        let (ours, theirs) = (format!("gs{}a", std::process::id()), "eth0");
        for line in [
            format!("netns add {name}"),
            format!("link add {ours} type veth peer name {theirs} netns {name}"),
            format!("addr add 10.79.13.1/30 dev {ours}"),
            format!("link set {ours} up"),
            format!("-n {name} addr add 10.79.13.2/30 dev {theirs}"),
            format!("-n {name} link set {theirs} up"),
        ] {
            let done = Command::new("ip").args(line.split(' ')).output();
            let done = done.map_err(|error| format!("ip: {error}"))?;
            if !done.status.success() {
                let said = String::from_utf8_lossy(&done.stderr);
                return Err(format!("ip {line}: {}", said.trim()));
            }
        }
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The link goes with it.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

#[test]
fn the_same_boot_id_in_another_namespace_promises_nothing() {
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(reason) => return println!("skipped: shm in namespaces: {reason}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let mut inside = Command::new("ip");
    inside.args(["netns", "exec", &namespace.0]);
    inside.arg(genie_command().get_program());
    clean(&mut inside);
    let args = [
        "--transport=auto",
        "--listen=10.79.13.2:0",
        "--data=10.79.13.2:0",
        "--allow-unauthenticated",
    ];
    let b = Agent::start_from(inside, folder.path(), "b", &args);
    let a = Agent::start_with(folder.path(), "a", &["--transport=auto", &b.as_peer()]);
    let put = there_and_back(&a, folder.path(), 1 << 20);
    assert_eq!(put["path"], "tcp");
    let reasons = put["reasons"].as_array().expect("a list");
    let is_shm = |reason: &&Value| {
        reason
            .as_str()
            .is_some_and(|text| text.starts_with("shm: "))
    };
    let reason = reasons.iter().find(is_shm).expect("a reason");
    let reason = reason.as_str().expect("text");
    assert!(
        reason.contains("its socket is not reached from here"),
        "{reason}"
    );
}
