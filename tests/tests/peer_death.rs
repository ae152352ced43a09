//! Peers and programs that die or fall silent in the middle: an error in time,
//! nothing half-kept, everything given back.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, Running, clean, eventually, genie_path};
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::Signal;

const TENSORS: u64 = 64;
const LEN: u64 = 16 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A file of 1 GiB: long enough on the way for a signal to find it there.
fn large_file(folder: &Path) -> PathBuf {
    let file = folder.join("large.safetensors");
    model::write_sparse(&file, TENSORS, LEN);
    file
}

fn small_file(folder: &Path) -> PathBuf {
    let file = folder.join("small.safetensors");
    model::write(&file, &[Tensor::bytes("x", 5000)], &[]);
    file
}

/// Starts a put of the large file from `a` to `b` and waits until bytes flow.
fn put_under_way(a: &Agent, b: &Agent, file: &Path) -> Running {
    let put = a.spawn(&["put", text(file), "b:large"]);
    eventually("bytes flow", || {
        let status = b.status();
        let engines = status["transports"].as_array().expect("a list");
        let received = |one: &serde_json::Value| one["engine"]["received_bytes"].as_u64();
        let bytes = engines.iter().filter_map(received).sum::<u64>();
        (bytes > LEN).then_some(())
    });
    put
}

#[test]
fn a_killed_peer_is_an_error_at_once_and_its_restart_a_new_instance() {
    let folder = tempfile::tempdir().unwrap();
    // A limit so long that only the closed connection can tell.
    let slow = "--liveness=60s";
    let mut b = Agent::start(folder.path(), "b", &[slow]);
    let address = b.listen;
    let a = Agent::start(folder.path(), "a", &[slow, &b.as_peer()]);
    let put = put_under_way(&a, &b, &large_file(folder.path()));
    let instance = a.status()["sessions"][0]["instance"].clone();
    b.kill();
    let killed = Instant::now();
    let output = put.wait(GENEROUS);
    output.assert_fails_with("peer 'b'");
    assert!(
        killed.elapsed() < Duration::from_secs(10),
        "{:?}",
        killed.elapsed()
    );
    eventually("the session is gone", || {
        (a.status()["sessions"] == serde_json::json!([])).then_some(())
    });
    eventually("the arena is given back", || {
        (a.status()["arenas"]["used_bytes"] == 0).then_some(())
    });

    let listen = format!("--listen={address}");
    let again = Agent::start(folder.path(), "b", &[slow, &listen]);
    assert_eq!(
        a.json(&["ls", "b"]),
        serde_json::json!([]),
        "its store is empty"
    );
    a.json(&["put", text(&small_file(folder.path())), "b:small"]);
    assert_ne!(a.status()["sessions"][0]["instance"], instance);
    assert_eq!(again.status()["store"]["tensors"], 1);
}

#[test]
fn a_killed_sender_leaves_the_receiver_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=60s"]);
    let mut a = Agent::start(folder.path(), "a", &["--liveness=60s", &b.as_peer()]);
    let small = small_file(folder.path());
    a.json(&["put", text(&small), "b:large"]);
    let put = put_under_way(&a, &b, &large_file(folder.path()));
    a.kill();
    put.wait(GENEROUS).assert_fails_with("the agent");
    eventually("the room made for it is given back", || {
        (b.status()["store"]["used_bytes"].as_u64()? < 1 << 20).then_some(())
    });
    let back = folder.path().join("back.safetensors");
    b.json(&["get", "large", text(&back)]);
    assert_eq!(
        model::read(&back),
        model::read(&small),
        "what was stored before is still there"
    );
}

#[test]
fn a_stopped_peer_is_an_error_within_the_liveness_limit() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=1s"]);
    let a = Agent::start(folder.path(), "a", &["--liveness=1s", &b.as_peer()]);
    let put = put_under_way(&a, &b, &large_file(folder.path()));
    b.signal(Signal::STOP);
    let stopped = Instant::now();
    let output = put.wait(GENEROUS);
    output.assert_fails_with("peer 'b'");
    // The limit, and what a loaded machine may add to it.
    assert!(
        stopped.elapsed() < Duration::from_secs(1 + 4),
        "{:?}",
        stopped.elapsed()
    );

    // Something new is refused in time as well.
    let again = Instant::now();
    a.genie(&["ls", "b"])
        .assert_fails_with("did not answer for 1s");
    assert!(
        again.elapsed() < Duration::from_secs(1 + 4),
        "{:?}",
        again.elapsed()
    );

    b.signal(Signal::CONT);
    eventually("the peer has noticed too", || {
        (b.status()["store"]["used_bytes"] == 0).then_some(())
    });
    a.json(&["put", text(&small_file(folder.path())), "b:small"]);
    let listed = a.json(&["ls", "b"]);
    assert_eq!(
        listed.as_array().map(Vec::len),
        Some(1),
        "nothing of the first put: {listed}"
    );
}

#[test]
fn an_idle_session_notices_a_stopped_peer() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=1s"]);
    let a = Agent::start(folder.path(), "a", &["--liveness=1s", &b.as_peer()]);
    a.json(&["ls", "b"]);
    // Heartbeats keep it up beyond the limit.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(
        a.status()["sessions"].as_array().map(Vec::len),
        Some(1),
        "{}",
        a.log()
    );
    b.signal(Signal::STOP);
    eventually("the session has ended", || {
        (a.status()["sessions"] == serde_json::json!([])).then_some(())
    });
}

#[test]
fn a_killed_program_gives_its_put_up_and_its_arena_back() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let file = large_file(folder.path());
    let put = put_under_way(&a, &b, &file);
    put.signal(Signal::KILL);
    eventually("both agents have given everything back", || {
        let used = (
            a.status()["arenas"]["used_bytes"].as_u64()?,
            b.status()["store"]["used_bytes"].as_u64()?,
        );
        (used == (0, 0)).then_some(())
    });
    assert_eq!(a.json(&["ls", "b"]), serde_json::json!([]));
    a.json(&["put", text(&small_file(folder.path())), "b:small"]);
    let sessions = a.status()["sessions"].clone();
    assert_eq!(sessions[0]["requests"], 0, "{sessions}");
}

#[test]
fn an_agent_whose_log_nobody_takes_works_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("log");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, mode, 0).unwrap();
    let options = std::fs::File::options().read(true).write(true).clone();
    let mut log = options.open(&pipe).unwrap();
    rustix::io::ioctl_fionbio(&log, true).unwrap();
    while log.write(&[b'.'; 4096]).is_ok() {}

    let mut genie = std::process::Command::new("sh");
    clean(&mut genie);
    let stuck = "exec \"$0\" \"$@\" 2> \"$LOG\"";
    genie
        .args(["-c", stuck])
        .arg(genie_path())
        .env("LOG", &pipe);
    let b = Agent::start(folder.path(), "b", &[]);
    let peer = b.as_peer();
    let args = ["--transport=tcp", &peer];
    let mut a = Agent::start_from(genie, folder.path(), "a", &args);
    let file = small_file(folder.path());
    a.json(&["put", text(&file), "b:small"]);
    assert_eq!(a.stop().code(), Some(0));
}

#[test]
fn sigterm_lets_a_put_end() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let mut a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let file = large_file(folder.path());
    let put = put_under_way(&a, &b, &file);
    assert_eq!(a.stop().code(), Some(0), "{}", a.log());
    let output = put.wait(GENEROUS);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(b.status()["store"]["tensors"], TENSORS);
}

#[test]
fn many_sessions_leave_no_descriptors_behind() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let small = small_file(folder.path());
    let round = |name: &str| {
        let mut a = Agent::start(folder.path(), name, &[&b.as_peer()]);
        a.json(&["put", text(&small), "b:small"]);
        if name.len().is_multiple_of(2) {
            a.kill()
        } else {
            assert_eq!(a.stop().code(), Some(0))
        }
    };
    round("warm-up");
    let settled = |limit: usize| (b.descriptors() <= limit).then_some(());
    eventually("the first session is gone", || {
        (b.status()["sessions"] == serde_json::json!([])).then_some(())
    });
    let before = b.descriptors();
    for index in 0..12 {
        round(&"x".repeat(index + 1));
    }
    eventually("descriptors are back to the start", || settled(before));
}
