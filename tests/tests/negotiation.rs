//! Which path is taken, why not a better one, and what both ends say of it.

use std::path::Path;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, Running, genie_command};
use serde_json::{Value, json};

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Puts something from `a` to `b` and returns the reasons shown with it.
fn reasons_of_a_put(a: &Agent, folder: &Path) -> Value {
    let file = folder.join("m.safetensors");
    model::write(&file, &[Tensor::bytes("x", 1000)], &[]);
    let put = a.json(&["put", text(&file), "b:m"]);
    assert_eq!(put["path"], "tcp");
    put["reasons"].clone()
}

fn session(agent: &Agent) -> Value {
    let sessions = agent.status()["sessions"].clone();
    assert_eq!(sessions.as_array().map(Vec::len), Some(1), "{sessions}");
    sessions[0].clone()
}

#[test]
fn both_ends_show_the_same_reason_for_not_taking_dpdk() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start_with(folder.path(), "b", &["--transport=dpdk,tcp"]);
    let a = Agent::start_with(folder.path(), "a", &["--transport=dpdk,tcp", &b.as_peer()]);
    let reasons = reasons_of_a_put(&a, folder.path());
    assert_eq!(
        reasons,
        json!(["dpdk: node 'a': no device was given (--dpdk-device)"])
    );
    for (agent, direction) in [(&a, "dialled"), (&b, "accepted")] {
        let session = session(agent);
        assert_eq!(session["reasons"], reasons);
        assert_eq!(session["path"], "tcp");
        assert_eq!(session["direction"], direction);
        agent.assert_logs("no device was given");
    }
    let transports = a.status()["transports"].clone();
    let dpdk = transports
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["transport"] == "dpdk");
    assert_eq!(
        dpdk.unwrap()["reason"],
        "no device was given (--dpdk-device)"
    );
}

#[test]
fn a_transport_that_one_side_does_not_allow_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start_with(folder.path(), "b", &["--transport=tcp"]);
    let a = Agent::start_with(folder.path(), "a", &["--transport=dpdk,tcp", &b.as_peer()]);
    // What the dialler itself lacks comes first.
    let reasons = reasons_of_a_put(&a, folder.path());
    assert_eq!(
        reasons,
        json!(["dpdk: node 'a': no device was given (--dpdk-device)"])
    );
    drop(a);
    let a = Agent::start_with(folder.path(), "a2", &["--transport=tcp,dpdk", &b.as_peer()]);
    assert_eq!(
        reasons_of_a_put(&a, folder.path()),
        json!([]),
        "nothing better was refused"
    );
    drop((a, b));

    let b = Agent::start_with(folder.path(), "b", &["--transport=dpdk,tcp"]);
    let a = Agent::start_with(folder.path(), "a", &["--transport=tcp", &b.as_peer()]);
    let reasons = reasons_of_a_put(&a, folder.path());
    assert_eq!(
        reasons,
        json!(["dpdk: node 'a' does not allow it (--transport tcp)"])
    );
    assert_eq!(session(&b)["reasons"], reasons);
}

#[test]
fn one_transport_alone_fails_rather_than_degrades() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = genie_command();
    command
        .args([
            "agent",
            "--transport=dpdk",
            "--listen=127.0.0.1:0",
            "--data=127.0.0.1:0",
        ])
        .arg("--socket")
        .arg(folder.path().join("a.sock"));
    let output = Running::start(command).wait(GENEROUS);
    output.assert_fails_with("none of the allowed transports (dpdk) can be used");
    output.assert_fails_with("no device was given");
}

#[test]
fn peers_that_cannot_be_had_are_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    // Nobody listens there: the port was ours a moment ago.
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let args = [
        format!("--peer=wrong={}", b.listen),
        format!("--peer=gone={gone}"),
        b.as_peer(),
    ];
    let a = Agent::start(folder.path(), "a", &args.each_ref().map(String::as_str));
    let unknown = a.genie(&["ls", "c"]);
    unknown.assert_fails_with("no peer is called 'c' (known: b, gone, wrong)");
    unknown.assert_fails_with("--peer c=ADDRESS");
    a.genie(&["ls", "wrong"])
        .assert_fails_with("calls itself 'b'");
    a.genie(&["ls", "gone"])
        .assert_fails_with("is 'genie agent' running there?");
    assert_eq!(a.json(&["ls", "b"]), json!([]));
}
