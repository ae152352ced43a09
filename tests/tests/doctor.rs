//! `genie doctor` in the situations that it is for; its advice is followed,
//! and then it has nothing to say about that any more.
//!
//! What needs root is skipped, with the reason, where the tests are not root's.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use genie_tests::{Agent, GENEROUS, Output, Running, clean, genie_command, genie_path};
use serde_json::Value;

const NOBODY: u32 = 65534;

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("skipped: only root can make this situation");
    }
    is_root
}

fn report(output: &Output) -> Value {
    serde_json::from_str(&output.stdout)
        .unwrap_or_else(|error| panic!("--json prints JSON: {error}: {output:?}"))
}

fn doctor(folder: &Path, args: &[&str]) -> Output {
    let mut command = genie_command();
    command.args(["doctor", "--json", "--socket"]);
    command.arg(folder.join("a.sock")).args(args);
    Running::start(command).wait(GENEROUS)
}

/// A shell script in namespaces of its own, in which `$GENIE` is the binary.
fn in_namespaces(flags: &str, script: &str) -> Output {
    let mut command = Command::new("unshare");
    clean(&mut command);
    command.arg(flags).args(["sh", "-ec", script]);
    command.env("GENIE", genie_path());
    Running::start(command).wait(GENEROUS)
}

fn find<'a>(report: &'a Value, what: &str) -> &'a Value {
    let findings = report["findings"].as_array().expect("a list");
    let found = findings.iter().find(|finding| finding["what"] == what);
    found.unwrap_or_else(|| panic!("nothing on {what} in {report:#}"))
}

/// The words of a finding's advice.
fn mend(finding: &Value) -> Vec<String> {
    let mend = finding["mend"].as_str();
    let mend = mend.unwrap_or_else(|| panic!("no advice in {finding}"));
    mend.split_whitespace().map(str::to_owned).collect()
}

fn has_dpdk() -> bool {
    let output = Running::start({
        let mut command = genie_command();
        command.arg("--version");
        command
    });
    let has = !output.wait(GENEROUS).stdout.contains("DPDK: not found");
    if !has {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required"
        );
        println!("skipped: DPDK is not here to be hidden");
    }
    has
}

#[test]
fn every_finding_that_is_not_well_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let output = doctor(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = report(&output);
    assert_eq!(report["usable"], true);
    let findings = report["findings"].as_array().unwrap();
    assert!(findings.len() >= 12, "{report:#}");
    for finding in findings {
        assert!(!finding["why"].as_str().unwrap().is_empty(), "{finding}");
        let is_well = finding["state"] == "ok";
        assert_eq!(finding["mend"].is_null(), is_well, "{finding}");
    }
    let clock = find(&report, "clock synchronisation");
    if clock["state"] == "warn" {
        let advice = mend(clock).join(" ");
        let keeper = if Path::new("/run/systemd/system").exists() {
            "timedatectl set-ntp true"
        } else {
            "chronyd"
        };
        assert!(advice.contains(keeper), "{advice}");
    }
    for name in std::fs::read_dir("/sys/class/net").unwrap().flatten() {
        if name.path().join("device").exists() {
            let name = name.file_name().into_string().expect("UTF-8");
            find(&report, &format!("offloads of {name}"));
        }
    }
    let agent = find(&report, "agent");
    assert_eq!(mend(agent)[..2], ["genie", "agent"]);
}

#[test]
fn root_with_everything_has_nothing_to_mend() {
    if !is_root() || !has_dpdk() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let (listen, data) = (agent.listen.to_string(), agent.data.unwrap().to_string());
    let output = doctor(folder.path(), &["--listen", &listen, "--data", &data]);
    let report = report(&output);
    for what in [
        "TCP on loopback",
        "agent",
        "agent: tcp",
        "DPDK",
        "application socket",
    ] {
        assert_eq!(find(&report, what)["state"], "ok", "{report:#}");
    }
    for port in [listen, data] {
        let port = find(&report, &format!("port {port}"));
        assert_eq!(port["why"], "this host's agent listens there");
    }
}

#[test]
fn a_user_with_nothing_is_told_where_an_agent_of_theirs_can_listen() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let genie = folder.path().join("genie");
    fs::copy(genie_path(), &genie).unwrap();
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new(&genie);
        clean(&mut command);
        command.env_remove("GENIE_DPDK_LIB");
        command.env_remove("XDG_RUNTIME_DIR").args(args);
        command.uid(NOBODY).gid(NOBODY);
        Running::start(command)
    };
    let output = as_nobody(&["doctor", "--json"]).wait(GENEROUS);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let before = report(&output);
    assert_eq!(find(&before, "capabilities")["mend"], "sudo genie agent");
    let place = mend(find(&before, "application socket"));
    assert_eq!(place[..3], ["genie", "agent", "--socket"]);
    // The advice, and ports that no other test has.
    let socket = place[3].as_str();
    let agent = as_nobody(&[
        "agent",
        "--socket",
        socket,
        "--listen",
        "127.0.0.1:0",
        "--data",
        "127.0.0.1:0",
        "--metrics",
        "off",
    ]);
    let after = genie_tests::eventually("the agent answers", || {
        let output = as_nobody(&["doctor", "--json", "--socket", socket]).wait(GENEROUS);
        let after = report(&output);
        (find(&after, "agent")["state"] == "ok").then_some(after)
    });
    assert_eq!(find(&after, "application socket")["state"], "ok");
    assert_eq!(find(&after, "agent: tcp")["state"], "ok");
    agent.signal(rustix::process::Signal::TERM);
    let stopped = agent.wait(GENEROUS);
    assert!(stopped.status.success(), "{stopped:?}");
}

#[test]
fn without_libdpdk_its_package_is_named() {
    if !is_root() || !has_dpdk() {
        return;
    }
    // An empty file over DPDK's own library, and then no longer.
    let output = in_namespaces(
        "-m",
        r#"
        eal=$(ldconfig -p | sed -n 's/.*=> \(.*librte_eal\.so\.[0-9]*\)$/\1/p' | head -n 1)
        empty=$(mktemp)
        mount --bind "$empty" "$eal"
        "$GENIE" doctor --json
        umount "$eal"
        rm "$empty"
        "$GENIE" doctor --json
        "#,
    );
    let (hidden, back) = output.stdout.split_once('\n').expect("two reports");
    let hidden: Value = serde_json::from_str(hidden).expect("JSON");
    let dpdk = find(&hidden, "DPDK");
    assert_eq!(dpdk["state"], "warn");
    assert_eq!(dpdk["mend"], "apt-get install -y libdpdk-dev", "{dpdk}");
    let back: Value = serde_json::from_str(back).expect("JSON");
    assert_eq!(find(&back, "DPDK")["state"], "ok");
}

#[test]
fn without_huge_pages_some_can_be_reserved_as_it_says() {
    if !is_root() {
        return;
    }
    // What is written down by `reserve` is this test's alone.
    let output = in_namespaces(
        "-m",
        r#"
        free=/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages
        total=/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
        none=$(mktemp)
        echo 0 > "$none"
        mkdir -p /run/genie-hugepages
        mount -t tmpfs tmpfs /run/genie-hugepages
        chmod 755 /run/genie-hugepages
        mount --bind "$none" "$free"
        "$GENIE" doctor --json
        umount "$free"
        rm "$none"
        "$GENIE" hugepages reserve 2M:64 --json
        "$GENIE" doctor --json
        "$GENIE" hugepages release >&2
        "#,
    );
    assert!(output.status.success(), "{output:?}");
    let answers: Vec<&str> = output.stdout.lines().collect();
    let [without, reserved, with] = answers[..] else {
        panic!("three answers: {output:?}");
    };
    let without: Value = serde_json::from_str(without).expect("JSON");
    let pages = find(&without, "huge pages");
    assert_eq!(pages["state"], "warn");
    assert_eq!(pages["mend"], "genie hugepages reserve 2M:64");
    assert!(reserved.contains("64"), "{reserved}");
    let with: Value = serde_json::from_str(with).expect("JSON");
    let pages = find(&with, "huge pages");
    assert_eq!(pages["state"], "ok", "{pages}");
}

/// Somebody who introduces himself as of versions 60000 to 60002, `times` times.
fn newer_peer(times: usize) -> (SocketAddr, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        for _ in 0..times {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"GNIE\xea\x60\xea\x62").unwrap();
            let _ = stream.read(&mut [0; 8]);
        }
    });
    (address, thread)
}

#[test]
fn a_peer_of_another_version_is_named_and_one_of_ours_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (address, thread) = newer_peer(1);
    let address = address.to_string();
    let output = doctor(folder.path(), &[&address]);
    thread.join().unwrap();
    assert_eq!(output.status.code(), Some(0), "TCP works: {output:?}");
    let before = report(&output);
    let peer = find(&before, &format!("peer {address}"));
    assert_eq!(peer["state"], "broken");
    assert!(
        peer["why"]
            .as_str()
            .unwrap()
            .contains("versions 60000 to 60002"),
        "{peer}"
    );
    assert_eq!(mend(peer)[0], "scp");
    // As if the older end had been replaced: both are this build.
    let b = Agent::start(folder.path(), "b", &[]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    for node in ["b".to_owned(), b.listen.to_string()] {
        let after = report(&doctor(folder.path(), &[&node]));
        let peer = find(&after, &format!("peer {node}"));
        assert_eq!(peer["state"], "ok", "{peer}");
    }
    let path = report(&doctor(folder.path(), &["b"]));
    let why = find(&path, "peer b")["why"].as_str().unwrap();
    assert!(why.contains("over tcp, round trip"), "{why}");
    drop(a);
}

#[test]
fn an_agent_says_why_it_has_no_session_with_a_peer_of_another_version() {
    let folder = tempfile::tempdir().unwrap();
    // Once for the agent, once for the doctor.
    let (address, thread) = newer_peer(2);
    let _a = Agent::start(folder.path(), "a", &[&format!("--peer=b={address}")]);
    let report = report(&doctor(folder.path(), &["b"]));
    thread.join().unwrap();
    let peer = find(&report, "peer b");
    assert_eq!(peer["state"], "broken");
    assert!(
        peer["why"]
            .as_str()
            .unwrap()
            .contains("versions 60000 to 60002"),
        "{peer}"
    );
}

#[test]
fn a_port_that_is_taken_is_named_with_another_that_is_free() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let before = report(&doctor(folder.path(), &["--data", &address]));
    let port = find(&before, &format!("port {address}"));
    assert_eq!(port["state"], "warn");
    let advice = mend(port);
    assert_eq!(advice[..3], ["genie", "agent", "--data"]);
    let agent = Agent::start(folder.path(), "a", &["--data", &advice[3]]);
    assert_eq!(agent.data.unwrap().to_string(), advice[3]);
    let after = report(&doctor(folder.path(), &["--data", &advice[3]]));
    let port = find(&after, &format!("port {}", advice[3]));
    assert_eq!(port["state"], "ok", "{port}");
}

#[test]
fn only_where_not_even_loopback_works_is_it_a_failure() {
    if !is_root() {
        return;
    }
    let down = in_namespaces("-n", r#""$GENIE" doctor --json"#);
    assert_eq!(down.status.code(), Some(1), "{down:?}");
    let loopback = report(&down);
    assert_eq!(loopback["usable"], false);
    let loopback = find(&loopback, "TCP on loopback");
    assert_eq!(loopback["state"], "broken");
    assert_eq!(loopback["mend"], "ip link set lo up");
    let up = in_namespaces("-n", r#"ip link set lo up; "$GENIE" doctor --json"#);
    assert_eq!(up.status.code(), Some(0), "{up:?}");
}
