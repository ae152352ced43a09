//! Whatever people and files get wrong: a clear error, nothing half-written,
//! nothing lost, and the agent goes on.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, Running, clean, genie_command, genie_path};
use rustix::process::Signal;
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Asserts that an agent still takes and gives tensors.
fn assert_works(agent: &Agent, folder: &Path) {
    let (file, back) = (
        folder.join("sound.safetensors"),
        folder.join("back.safetensors"),
    );
    model::write(&file, &[Tensor::bytes("sound", 1000)], &[]);
    agent.json(&["put", text(&file), "sound"]);
    agent.json(&["get", "sound", text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
    fs::remove_file(back).unwrap();
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn hostile_files_are_refused_by_name_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let file = folder.path().join("bad.safetensors");
    let one = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    let cases: [(&str, &[u8], &str); 9] = [
        (one, b"12", "truncated"),
        (one, b"123456", "trailing"),
        ("{", b"", "EOF"),
        (&one.replace("U8", "F9"), b"1234", r#"unknown type "F9""#),
        (&one.replace("[4]", "[5]"), b"1234", "claims bytes 0 to 4"),
        (
            &one.replace("[0,4]", "[4,8]"),
            b"1234",
            "expected 4 bytes from 0",
        ),
        (&one.replace("\"a\"", "\"../a\""), b"1234", "'..'"),
        (
            &one.replace("\"a\"", r#""a\u0000b""#),
            b"1234",
            "control character",
        ),
        (&one.replace("\"a\"", r#""""#), b"1234", "a name is empty"),
    ];
    for (header, data, reason) in cases {
        model::write_raw(&file, header, data);
        let output = agent.genie(&["put", text(&file), "bad"]);
        output.assert_fails_with(reason);
        output.assert_fails_with("bad.safetensors");
    }
    fs::write(&file, b"short").unwrap();
    agent
        .genie(&["put", text(&file), "bad"])
        .assert_fails_with("too few for a header");
    fs::write(&file, [0xff; 100]).unwrap();
    agent
        .genie(&["put", text(&file), "bad"])
        .assert_fails_with("the header claims");
    agent
        .genie(&["put", "/dev/null", "bad"])
        .assert_fails_with("not a regular file");
    agent
        .genie(&["put", "/nowhere/x", "bad"])
        .assert_fails_with("No such file");
    assert_eq!(
        agent.json(&["ls"]),
        Value::Array(vec![]),
        "nothing was stored"
    );
    assert_works(&agent, folder.path());
}

#[test]
fn names_that_leave_their_prefix_are_usage_errors() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    for bad in ["../x", "x/../y", "/x", "x/", ".", "", "b:", "x//y", "x\ny"] {
        let output = agent.genie(&["get", bad, "/tmp/never"]);
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {output:?}");
    }
    agent
        .genie(&["get", "not/there", text(&folder.path().join("x"))])
        .assert_fails_with("nothing is stored under \"not/there\"");
    assert!(!folder.path().join("x").exists());
}

#[test]
fn one_prefix_cannot_overwrite_anothers_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let file = folder.path().join("m.safetensors");
    model::write(&file, &[Tensor::bytes("x/y", 10)], &[]);
    agent.json(&["put", text(&file), "m"]);
    model::write(&file, &[Tensor::bytes("y", 10)], &[]);
    agent
        .genie(&["put", text(&file), "m/x"])
        .assert_fails_with("already exists under the prefix");
    assert_eq!(agent.json(&["ls"])[0]["name"], "m/x/y");
}

#[test]
fn a_full_store_refuses_and_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--store-bytes", "3MiB"]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer(), "--arena-bytes", "8MiB"]);
    let (small, large) = (
        folder.path().join("s.safetensors"),
        folder.path().join("l.safetensors"),
    );
    model::write(&small, &[Tensor::bytes("x", 1 << 19)], &[]);
    model::write(&large, &[Tensor::bytes("x", 4 << 20)], &[]);
    a.json(&["put", text(&small), "b:m"]);
    // Also where it would replace: the old one must not be lost for it.
    let output = a.genie(&["put", text(&large), "b:m"]);
    output.assert_fails_with("peer 'b': the store is full");
    output.assert_fails_with("--store-bytes");
    let back = folder.path().join("back.safetensors");
    a.json(&["get", "b:m", text(&back)]);
    assert_eq!(model::read(&back), model::read(&small));
    // The tensor, and a page or less for its name.
    let used = b.status()["store"]["used_bytes"].as_u64().unwrap();
    assert!((1 << 19..(1 << 19) + 4096).contains(&used), "{used}");

    let huge = folder.path().join("h.safetensors");
    model::write_sparse(&huge, 1, 1 << 40);
    a.genie(&["put", text(&huge), "b:m"])
        .assert_fails_with("--arena-bytes");
    assert_works(&a, folder.path());
}

#[test]
fn a_full_disk_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let file = folder.path().join("m.safetensors");
    model::write(&file, &[Tensor::bytes("x", 4 << 20)], &[]);
    agent.json(&["put", text(&file), "m"]);
    // A file system of its own, gone with the command.
    let disk = folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mut command = Command::new("unshare");
    clean(&mut command);
    let script = r#"mount -t tmpfs -o size=1m tmpfs "$1" || exit 77
        "$2" get m "$1/out.safetensors"; status=$?; ls -A "$1"; exit $status"#;
    command
        .args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .args([&disk, &genie_path()])
        .env("GENIE_SOCKET", &agent.socket);
    let output = Running::start(command).wait(GENEROUS);
    if output.status.code() == Some(77) || output.stderr.contains("unshare") {
        println!(
            "skipped: no small file system can be mounted here: {}",
            output.stderr.trim()
        );
        return;
    }
    output.assert_fails_with("no room in");
    output.assert_fails_with("free some space");
    assert_eq!(output.stdout, "", "nothing may be left");
    assert_works(&agent, folder.path());
}

#[test]
fn a_limit_on_file_sizes_leaves_no_file_and_keeps_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let file = folder.path().join("m.safetensors");
    model::write(&file, &[Tensor::bytes("x", 4 << 20)], &[]);
    agent.json(&["put", text(&file), "m"]);
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("m.safetensors"), b"old").unwrap();
    let mut command = Command::new("sh");
    clean(&mut command);
    command
        .args(["-c", r#"ulimit -f 64; exec "$1" get m "$2""#, "sh"])
        .args([&genie_path(), &out.join("m.safetensors")])
        .env("GENIE_SOCKET", &agent.socket);
    Running::start(command)
        .wait(GENEROUS)
        .assert_fails_with("cannot write");
    assert_eq!(names_in(&out), ["m.safetensors"]);
    assert_eq!(fs::read(out.join("m.safetensors")).unwrap(), b"old");
    assert_works(&agent, folder.path());
}

#[test]
fn a_device_is_not_replaced_by_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    assert_works(&agent, folder.path());
    // Safe to try as root even without the check: not /dev itself.
    let link = folder.path().join("null");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    agent
        .genie(&["get", "sound", text(&link)])
        .assert_fails_with("not a regular file");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[test]
fn an_interrupted_get_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let file = folder.path().join("m.safetensors");
    model::write_sparse(&file, 8, 32 << 20);
    agent.json(&["put", text(&file), "m"]);
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let mut get = agent.spawn(&["get", "m", text(&out.join("m.safetensors"))]);
    // The unfinished file is there from the start.
    genie_tests::eventually("a get has begun", || {
        (!names_in(&out).is_empty()).then_some(())
    });
    assert!(get.is_running(), "a get of 256 MiB takes longer than that");
    get.signal(Signal::INT);
    get.wait(GENEROUS).assert_fails_with("interrupted");
    assert_eq!(names_in(&out), [""; 0]);
    assert_works(&agent, folder.path());
}

#[test]
fn a_folder_that_cannot_be_written_is_found_before_anything_moves() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let nowhere = folder.path().join("missing/m.safetensors");
    agent
        .genie(&["get", "m", text(&nowhere)])
        .assert_fails_with("cannot write in");
    agent
        .genie(&["get", "m", text(folder.path())])
        .assert_fails_with("directory");
}

#[test]
fn a_socket_without_permission_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &["--socket-mode=0660"]);
    assert_eq!(
        fs::metadata(&agent.socket).unwrap().permissions().mode() & 0o777,
        0o660
    );
    let mut command;
    if rustix::process::geteuid().is_root() {
        // Somebody else, for whom the binary must be in reach.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let genie = folder.path().join("genie");
        fs::copy(genie_path(), &genie).unwrap();
        command = Command::new(genie);
        clean(&mut command);
        command.uid(65534).gid(65534);
    } else {
        fs::set_permissions(&agent.socket, Permissions::from_mode(0o000)).unwrap();
        command = genie_command();
    }
    command.args(["status", "--socket"]).arg(&agent.socket);
    let output = Running::start(command).wait(GENEROUS);
    output.assert_fails_with("no permission to use");
    output.assert_fails_with("member of the group");
}

#[test]
fn no_agent_is_an_error_that_says_how_to_start_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = genie_command();
    command
        .args(["ls", "--socket"])
        .arg(folder.path().join("none.sock"));
    Running::start(command)
        .wait(GENEROUS)
        .assert_fails_with("start one with 'genie agent'");
}

/// Runs an agent that should not come up.
fn refused_agent(args: &[&str]) -> genie_tests::Output {
    let mut command = genie_command();
    command.args(["agent", "--transport", "tcp"]).args(args);
    Running::start(command).wait(GENEROUS)
}

#[test]
fn a_second_agent_on_the_same_addresses_is_refused_and_harms_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let other = folder.path().join("other.sock");
    let (other, taken) = (text(&other), text(&agent.socket));
    let (listen, data) = (agent.listen.to_string(), agent.data.unwrap().to_string());
    let free = "127.0.0.1:0";

    let control = refused_agent(&["--listen", &listen, "--data", free, "--socket", other]);
    control.assert_fails_with("is in use");
    control.assert_fails_with("--listen");
    let output = refused_agent(&["--listen", free, "--data", &data, "--socket", other]);
    output.assert_fails_with("--data");
    let output = refused_agent(&["--listen", free, "--data", free, "--socket", taken]);
    output.assert_fails_with("another agent answers on");
    assert_works(&agent, folder.path());
    assert!(!Path::new(other).exists(), "a socket was left behind");
}

#[test]
fn the_socket_of_a_killed_agent_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Agent::start(folder.path(), "a", &[]);
    first.kill();
    assert!(first.socket.exists());
    let second = Agent::start(folder.path(), "a", &[]);
    assert_works(&second, folder.path());
}

#[test]
fn a_file_where_the_socket_should_be_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("precious");
    fs::write(&file, b"data").unwrap();
    let free = "127.0.0.1:0";
    refused_agent(&["--listen", free, "--data", free, "--socket", text(&file)])
        .assert_fails_with("cannot make the application socket");
    assert_eq!(fs::read(&file).unwrap(), b"data");
}

#[test]
fn settings_nobody_knows_are_usage_errors_with_a_suggestion() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("genie.toml");
    fs::write(&file, "strems = 2\n").unwrap();
    let output = refused_agent(&["--config", text(&file)]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        output.stderr.contains("did you mean 'streams'?"),
        "{output:?}"
    );

    let mut command = genie_command();
    // An ordinary user may have no default place for the socket.
    let socket = folder.path().join("a.sock");
    command.args(["agent", "--socket", text(&socket)]);
    command.env("GENIE_LISTN", "127.0.0.1:1");
    let output = Running::start(command).wait(GENEROUS);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        output.stderr.contains("did you mean 'GENIE_LISTEN'?"),
        "{output:?}"
    );

    let output = refused_agent(&["--listen", "0.0.0.0:0", "--socket", text(&socket)]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        output.stderr.contains("--allow-unauthenticated"),
        "{output:?}"
    );
}

#[test]
fn an_agent_that_strangers_can_reach_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(
        folder.path(),
        "a",
        &["--data=0.0.0.0:0", "--allow-unauthenticated"],
    );
    let warning = agent.status()["warning"].as_str().unwrap().to_owned();
    assert!(warning.contains("not authenticated"), "{warning}");
    agent.assert_logs("not authenticated");
}

#[test]
fn a_local_put_that_is_given_up_is_not_stored() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let file = folder.path().join("m.safetensors");
    model::write_sparse(&file, 4, 128 << 20);
    genie_tests::eventually("a put is killed before it is done", || {
        let put = agent.spawn(&["put", text(&file), "m"]);
        // The store's memory is counted, so the copy is about to begin.
        genie_tests::eventually("the put has begun", || {
            let used = agent.status()["store"]["used_bytes"].as_u64()?;
            (used >= 512 << 20).then_some(())
        });
        put.signal(Signal::KILL);
        let done = put.wait(GENEROUS).status.success();
        if done {
            agent.json(&["rm", "m"]);
        }
        (!done).then_some(())
    });
    genie_tests::eventually("its memory is given back", || {
        (agent.status()["store"]["used_bytes"] == 0).then_some(())
    });
    assert_eq!(agent.json(&["ls"]), Value::Array(vec![]));
}

#[test]
fn sigterm_ends_an_agent_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(folder.path(), "a", &[]);
    assert_works(&agent, folder.path());
    assert_eq!(agent.stop().code(), Some(0), "{}", agent.log());
    assert!(!agent.socket.exists());
}
