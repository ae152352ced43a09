//! Users who are not root: they put and get, and not each other's tensors.
//!
//! Skipped, with the reason, where the tests do not run as root.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, Output, eventually, genie_path};
use rustix::process::Signal;
use serde_json::{Value, json};

const ONE: u32 = 65534;
const OTHER: u32 = 65533;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// An agent of root's, and the binary where others can run it.
fn agent_of_root(folder: &Path, args: &[&str]) -> Option<(Agent, PathBuf)> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can act as several users");
        return None;
    }
    fs::set_permissions(folder, Permissions::from_mode(0o777)).unwrap();
    let genie = folder.join("genie");
    fs::copy(genie_path(), &genie).unwrap();
    Some((Agent::start(folder, "a", args), genie))
}

fn json_as(agent: &Agent, uid: u32, genie: &Path, args: &[&str]) -> Value {
    let output = agent.spawn_as(uid, genie, &[args, &["--json"]].concat());
    let output = output.wait(Duration::from_secs(120));
    assert!(output.status.success(), "{output:?}\n{}", agent.log());
    serde_json::from_str(&output.stdout).expect("--json prints JSON")
}

/// What a process has of memory files, among its descriptors or its mappings.
fn memory_files(pid: u32, kind: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/{kind}")) else {
        return Vec::new();
    };
    let is_memory = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|target| text(&target).starts_with("/memfd:"))
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(is_memory).collect()
}

#[test]
fn an_ordinary_user_puts_and_gets_2_gib_through_an_agent_of_roots() {
    let folder = tempfile::tempdir().unwrap();
    let limits = [
        "--store-bytes=3GiB",
        "--arena-bytes=5GiB",
        "--user-arena-bytes=3GiB",
    ];
    let Some((agent, genie)) = agent_of_root(folder.path(), &limits) else {
        return;
    };
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("back.safetensors"),
    );
    model::write_sparse(&file, 32, 64 << 20);
    // Something that could be lost, here and there; counted from the end,
    // since the header may be padded otherwise when it comes back.
    let places = [100, 1 << 20, (1 << 30) + 4097, (2 << 30) - 3];
    let len = |path: &Path| fs::metadata(path).unwrap().len();
    let handle = fs::File::options().write(true).open(&file).unwrap();
    for place in places {
        let at = len(&file) - place;
        handle.write_all_at(&model::noise(place, 100), at).unwrap();
    }
    let put = json_as(&agent, ONE, &genie, &["put", text(&file), "m"]);
    assert_eq!(put["bytes"], 2u64 << 30);
    assert_eq!(put["file_copies_per_byte"], 1.0);
    let got = json_as(&agent, ONE, &genie, &["get", "m", text(&back)]);
    assert_eq!(got["digest"], put["digest"]);
    let handle = fs::File::open(&back).unwrap();
    for place in places {
        let mut bytes = [0; 100];
        handle
            .read_exact_at(&mut bytes, len(&back) - place)
            .unwrap();
        assert_eq!(bytes[..], model::noise(place, 100)[..], "at {place}");
    }
    let listed = json_as(&agent, ONE, &genie, &["ls"]);
    assert_eq!(listed[0]["owner"], json!({"User": ONE}));
    assert_eq!(json_as(&agent, ONE, &genie, &["rm", "m"])["tensors"], 32);
    assert_eq!(agent.status()["store"]["used_bytes"], 0);
}

#[test]
fn a_second_user_is_refused_whatever_it_tries() {
    let folder = tempfile::tempdir().unwrap();
    let Some((agent, genie)) = agent_of_root(folder.path(), &[]) else {
        return;
    };
    let (file, back) = (
        folder.path().join("m.safetensors"),
        folder.path().join("back.safetensors"),
    );
    model::write(&file, &[Tensor::bytes("secret", 5000)], &[]);
    json_as(&agent, ONE, &genie, &["put", text(&file), "m/x"]);

    let other = |args: &[&str]| -> Output { agent.spawn_as(OTHER, &genie, args).wait(GENEROUS) };
    for prefix in ["m/x", "m", "m/x/below", "m/x/secret"] {
        other(&["put", text(&file), prefix]).assert_fails_with("another user's");
        other(&["get", prefix, text(&back)]).assert_fails_with("nothing is stored");
        other(&["rm", prefix]).assert_fails_with("nothing is stored");
    }
    assert_eq!(json_as(&agent, OTHER, &genie, &["ls"]), json!([]));
    let users = json_as(&agent, OTHER, &genie, &["status"])["users"].clone();
    let uids: Vec<_> = users
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["uid"])
        .collect();
    assert_eq!(uids, [OTHER], "of others nothing is told");

    // Nor by way of the kernel, which shows the memory files of the agent, and
    // of a program that has fetched the tensors, under /proc.
    let large = folder.path().join("large.safetensors");
    model::write_sparse(&large, 4, 128 << 20);
    json_as(&agent, ONE, &genie, &["put", text(&large), "large"]);
    let program = agent.spawn_as(ONE, &genie, &["get", "large", text(&back)]);
    eventually("the program has memory of the agent's", || {
        let found = !memory_files(program.pid(), "map_files").is_empty();
        found.then(|| program.signal(Signal::STOP))
    });
    let of_program = memory_files(program.pid(), "map_files");
    let mut of_agent = memory_files(agent.pid(), "fd");
    of_agent.extend(memory_files(agent.pid(), "map_files"));
    assert!(!of_program.is_empty() && of_agent.len() > 1);
    for file in of_agent.iter().chain(&of_program) {
        assert!(fs::File::open(file).is_ok(), "root can open {file:?}");
        let mut open = std::process::Command::new("head");
        std::os::unix::process::CommandExt::uid(&mut open, OTHER);
        let opened = open.args(["-c1", text(file)]).output().unwrap();
        let reason = String::from_utf8_lossy(&opened.stderr);
        assert!(reason.contains("Permission denied"), "{file:?}: {opened:?}");
    }
    drop(program);
    json_as(&agent, ONE, &genie, &["rm", "large"]);

    // The first still has it, and root may do everything.
    json_as(&agent, ONE, &genie, &["get", "m", text(&back)]);
    assert_eq!(
        model::read(&back).1[0].3,
        Tensor::bytes("secret", 5000).bytes
    );
    assert_eq!(agent.json(&["ls"]).as_array().unwrap().len(), 1);
    assert_eq!(agent.json(&["rm", "m/x/secret"])["tensors"], 1);
    json_as(&agent, OTHER, &genie, &["put", text(&file), "m/x"]);
}

#[test]
fn a_group_can_be_all_that_may_use_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--socket-mode=0660", "--socket-group=65534"];
    let Some((agent, genie)) = agent_of_root(folder.path(), &flags) else {
        return;
    };
    json_as(&agent, ONE, &genie, &["ls"]);
    let other = agent.spawn_as(OTHER, &genie, &["ls"]).wait(GENEROUS);
    other.assert_fails_with("no permission to use");

    // A group that the agent is not in takes a right that it need not have.
    let socket = folder.path().join("one.sock");
    let args = ["agent", "--transport=tcp", "--listen=127.0.0.1:0"];
    let more = ["--data=127.0.0.1:0", "--socket-group=65533", "--socket"];
    let args = [&args[..], &more, &[text(&socket)]].concat();
    let refused = agent.spawn_as(ONE, &genie, &args).wait(GENEROUS);
    refused.assert_fails_with("run the agent in that group");
}

#[test]
fn hugepages_are_there_or_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(
        folder.path(),
        "a",
        &["--arena-bytes=1TiB", "--user-arena-bytes=1TiB"],
    );
    let file = folder.path().join("m.safetensors");
    model::write_sparse(&file, 1, 512 << 30);
    // More than any pool here has, and refused before a byte is read.
    let put = agent.genie(&["put", text(&file), "m", "--memory=hugepage"]);
    put.assert_fails_with("no huge pages");
    put.assert_fails_with("nr_hugepages");
    model::write(&file, &[Tensor::bytes("x", 5000)], &[]);
    agent.json(&["put", text(&file), "m", "--memory=host"]);
    assert_eq!(agent.json(&["ls"])[0]["memory"], "host");
    let put = agent.genie(&["put", text(&file), "m", "--memory=best"]);
    assert_eq!(put.status.code(), Some(2), "{put:?}");
}
