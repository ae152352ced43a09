//! Programs that are stopped, pipes and disks that do not answer: who waits for
//! them fails in time, and nobody else waits at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use genie_client::{Client, ClientError, FailureKind, Memory};
use genie_tests::model::{self, Tensor};
use genie_tests::stuck_disk::{self, Known, StuckDisk};
use genie_tests::{Agent, GENEROUS, Running, eventually};
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::Signal;
use serde_json::{Value, json};

const TENSORS: u64 = 64;
const LEN: u64 = 16 << 20;
const LIMIT: &str = "--deadline=500ms";

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

fn small_file(folder: &Path) -> PathBuf {
    let file = folder.join("small.safetensors");
    model::write(&file, &[Tensor::bytes("x", 5000)], &[]);
    file
}

fn pipe(path: &Path) {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path, FileType::Fifo, mode, 0).unwrap();
}

fn pair(folder: &Path) -> (Agent, Agent) {
    let b = Agent::start(folder, "b", &[]);
    let a = Agent::start(folder, "a", &[&b.as_peer()]);
    (a, b)
}

/// Asserts that another program is served, over the session too, and at once.
fn assert_serves_others(a: &Agent, folder: &Path) {
    let began = Instant::now();
    let file = small_file(folder);
    a.json(&["put", text(&file), "b:other"]);
    let back = folder.join("other.safetensors");
    a.json(&["get", "b:other", text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
    a.json(&["rm", "b:other"]);
    assert!(began.elapsed() < GENEROUS, "{:?}", began.elapsed());
}

/// The root user's connections, arenas and their bytes, but this question's own.
fn held(agent: &Agent) -> Value {
    let users = agent.status()["users"].clone();
    json!([
        users[0]["connections"],
        users[0]["arenas"],
        users[0]["bytes"]
    ])
}

#[test]
fn pipes_are_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let fifo = folder.path().join("pipe");
    pipe(&fifo);
    a.genie(&["put", text(&fifo), "b:m"])
        .assert_fails_with("not a regular file");
    a.json(&["put", text(&small_file(folder.path())), "b:m"]);
    a.genie(&["get", "b:m", text(&fifo)])
        .assert_fails_with("not a regular file");
    assert_eq!(held(&a), json!([1, 0, 0]));
    assert_eq!(b.status()["store"]["tensors"], 1);
}

#[test]
fn a_deadline_counts_from_before_the_agent_answers() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let file = small_file(folder.path());
    let back = folder.path().join("back.safetensors");
    a.json(&["put", text(&file), "m"]);
    a.signal(Signal::STOP);
    for command in [["put", text(&file), "n"], ["get", "m", text(&back)]] {
        let began = Instant::now();
        let ended = a.spawn(&[&command[..], &[LIMIT]].concat()).wait(GENEROUS);
        assert!(
            !ended.status.success() && ended.stderr.contains("given up"),
            "{ended:?}"
        );
        println!("{}: {:?}", command[0], began.elapsed());
    }
    a.signal(Signal::CONT);
    a.json(&["get", "m", text(&back)]);
}

#[test]
fn a_stopped_program_holds_up_nobody_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let file = folder.path().join("large.safetensors");
    model::write_sparse(&file, TENSORS, LEN);
    // It is stopped as soon as its tensors move.
    let stop = |program: &Running, at: &Agent, bytes: &dyn Fn(&Value) -> u64| {
        let before = bytes(&at.status());
        eventually("bytes flow", || {
            (bytes(&at.status()) > before + LEN).then_some(())
        });
        program.signal(Signal::STOP);
    };
    let received = |status: &Value| {
        let engines = status["transports"].as_array().expect("a list");
        let received = |one: &Value| one["engine"]["received_bytes"].as_u64();
        engines.iter().filter_map(received).sum::<u64>()
    };
    let put = a.spawn(&["put", text(&file), "b:large"]);
    stop(&put, &b, &received);
    assert_serves_others(&a, folder.path());
    // What it asked for needs it no more.
    eventually("its put is done", || {
        (b.status()["store"]["tensors"] == TENSORS).then_some(())
    });
    put.signal(Signal::CONT);
    let output = put.wait(GENEROUS);
    assert!(output.status.success(), "{output:?}");

    let back = folder.path().join("back.safetensors");
    let get = a.spawn(&["get", "b:large", text(&back)]);
    stop(&get, &a, &received);
    assert_serves_others(&a, folder.path());
    eventually("its get is done", || {
        (b.status()["sessions"][0]["requests"] == 0).then_some(())
    });
    assert_ne!(held(&a), json!([1, 0, 0]), "what it got is kept for it");
    get.signal(Signal::CONT);
    let output = get.wait(GENEROUS);
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(&back).unwrap() == fs::read(&file).unwrap());
    fs::remove_file(&back).unwrap();

    // One that never goes on is given up as a whole when it is killed.
    let get = a.spawn(&["get", "b:large", text(&back)]);
    stop(&get, &a, &received);
    drop(get);
    eventually("nothing is kept for it", || {
        (held(&a) == json!([1, 0, 0])).then_some(())
    });
}

#[test]
fn newer_settings_on_a_disk_that_does_not_answer_are_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let toml = folder.path().join("b.toml");
    fs::write(&toml, "").unwrap();
    let config = format!("--config={}", toml.display());
    let mut b = Agent::start(folder.path(), "b", &[&config]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    // Whoever opens it waits for somebody who writes.
    fs::remove_file(&toml).unwrap();
    pipe(&toml);
    b.signal(Signal::HUP);
    let reason = eventually("it says that it does not wait any longer", || {
        // A peer, a program, a new session.
        assert_serves_others(&a, folder.path());
        let reason = b.status()["identity"]["reload_error"].clone();
        reason.as_str().map(str::to_owned)
    });
    assert!(reason.contains("not read within"), "{reason}");
    let c = Agent::start(folder.path(), "c", &[&b.as_peer()]);
    assert_eq!(c.json(&["ls", "b"]), json!([]));

    fs::remove_file(&toml).unwrap();
    fs::write(&toml, "").unwrap();
    b.signal(Signal::HUP);
    eventually("the new file is taken", || {
        b.status()["identity"]["reload_error"]
            .is_null()
            .then_some(())
    });
    fs::remove_file(&toml).unwrap();
    pipe(&toml);
    b.signal(Signal::HUP);
    assert_eq!(b.stop().code(), Some(0), "nor does its end wait");
}

/// Mounts a disk with a file of tensors, of which at most the header can be read.
fn stuck_disk(folder: &Path, knows_header: bool) -> Option<(StuckDisk, PathBuf)> {
    let whole = folder.join("whole.safetensors");
    model::write_sparse(&whole, 1, LEN);
    let bytes = fs::read(&whole).unwrap();
    let len = bytes.len() as u64;
    let head = if knows_header { len - LEN } else { 0 };
    let head = bytes[..head as usize].to_vec();
    let at = tempfile::tempdir_in(folder).unwrap().keep();
    match StuckDisk::mount(&at, Known { head, len }) {
        Ok(disk) => Some((disk, at)),
        Err(error) => {
            println!("skipped: no file system can be mounted here: {error}");
            None
        }
    }
}

#[test]
fn a_disk_that_does_not_answer_ends_the_command_at_its_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    a.json(&["put", text(&small_file(folder.path())), "b:m"]);
    for command in ["put", "get"] {
        let Some((disk, stuck)) = stuck_disk(folder.path(), true) else {
            return;
        };
        let output = match command {
            "put" => a.genie(&["put", LIMIT, text(&stuck.join(stuck_disk::FILE)), "b:n"]),
            _ => a.genie(&["get", LIMIT, "b:m", text(&stuck.join("new"))]),
        };
        output.assert_fails_with("not done within 500ms");
        assert!(disk.is_stuck(), "{command} came as far as the bytes");
    }
    let (disk, stuck) = stuck_disk(folder.path(), true).expect("as before");
    let mut get = a.spawn(&["get", "b:m", text(&stuck.join("new"))]);
    eventually("it writes", || disk.is_stuck().then_some(()));
    assert_serves_others(&a, folder.path());
    assert!(get.is_running(), "without a deadline it waits");
    get.signal(Signal::INT);
    get.wait(GENEROUS).assert_fails_with("interrupted");
    eventually("nothing is kept for them", || {
        (held(&a) == json!([1, 0, 0])).then_some(())
    });
    assert_eq!(b.status()["store"]["tensors"], 1);
}

#[test]
fn a_disk_that_does_not_answer_holds_up_one_thread_of_the_agents() {
    let folder = tempfile::tempdir().unwrap();
    let (mut a, _b) = pair(folder.path());
    let limit = Duration::from_millis(300);
    let read = |a: &Agent, file: fs::File| {
        let mut client = Client::connect(&a.socket).unwrap();
        client.set_patience(Some(limit), None).unwrap();
        let began = Instant::now();
        match client.read_file(&file, 0, LEN, Memory::Auto) {
            Err(ClientError::Failed { kind, message }) => {
                assert_eq!(kind, FailureKind::Deadline, "{message}");
                assert!((limit..GENEROUS).contains(&began.elapsed()));
            }
            other => panic!("{other:?}"),
        }
        client.status().expect("the connection goes on");
    };
    let open = |stuck: &Path| fs::File::open(stuck.join(stuck_disk::FILE)).unwrap();
    let Some((disk, stuck)) = stuck_disk(folder.path(), false) else {
        return;
    };
    read(&a, open(&stuck));
    assert!(disk.is_stuck());
    assert_serves_others(&a, folder.path());
    // The connection has ended; the thread that waits counts as one, and holds
    // what it reads into.
    eventually("that is all that is held", || {
        (held(&a) == json!([2, 1, LEN])).then_some(())
    });
    drop(disk);
    eventually("everything is back once the disk has failed", || {
        (held(&a) == json!([1, 0, 0])).then_some(())
    });

    let (_disk, stuck) = stuck_disk(folder.path(), false).expect("as before");
    read(&a, open(&stuck));
    assert_eq!(a.stop().code(), Some(0), "nor does its end wait");
}
