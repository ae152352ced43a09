//! Strangers on the agent's ports: other versions, garbage, silence.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, eventually};

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Asserts that two agents still exchange tensors.
fn assert_works(a: &Agent, folder: &Path) {
    let file = folder.join("sound.safetensors");
    model::write(&file, &[Tensor::bytes("sound", 100_000)], &[]);
    a.json(&["put", text(&file), "b:sound"]);
    a.json(&["get", "b:sound", text(&folder.join("back.safetensors"))]);
    assert_eq!(
        model::read(&folder.join("back.safetensors")),
        model::read(&file)
    );
}

/// Reads until the agent closes the connection; returns what it said.
fn read_to_close(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is a close too.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

fn connect(address: std::net::SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(GENEROUS)).unwrap();
    stream
}

#[test]
fn a_peer_of_another_version_is_told_apart_by_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    // A peer of the future.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let future = listener.local_addr().unwrap();
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"GNIE\xea\x60\xea\x62").unwrap();
        let mut first = [0; 8];
        stream.read_exact(&mut first).unwrap();
        first
    });
    let a = Agent::start(folder.path(), "a", &[&format!("--peer=b={future}")]);
    let output = a.genie(&["ls", "b"]);
    output.assert_fails_with("speaks protocol versions 60000 to 60002, this build 3 to 3");
    assert_eq!(&peer.join().unwrap(), b"GNIE\0\x03\0\x03");

    // And one that dials.
    let mut stream = connect(a.listen);
    stream.write_all(b"GNIE\xea\x60\xea\x62").unwrap();
    assert_eq!(
        read_to_close(&mut stream)[..8],
        *b"GNIE\0\x03\0\x03",
        "so that it can say why"
    );
    a.assert_logs("versions 60000 to 60002");
}

#[test]
fn garbage_on_any_port_is_dropped_and_the_agent_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=1s"]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer(), "--liveness=1s"]);
    assert_works(&a, folder.path());
    let before = b.descriptors();
    for seed in 1..20 {
        let garbage = model::noise(seed, 2000);
        for address in [b.listen, b.data.unwrap()] {
            let mut stream = connect(address);
            // It may be closed before everything is written.
            let _ = stream.write_all(&garbage);
            read_to_close(&mut stream);
        }
        let mut stream = UnixStream::connect(&b.socket).unwrap();
        stream.set_read_timeout(Some(GENEROUS)).unwrap();
        let _ = stream.write_all(&garbage);
        read_to_close(&mut stream);
    }
    assert_works(&a, folder.path());
    eventually("all descriptors are given back", || {
        (b.descriptors() <= before).then_some(())
    });
}

#[test]
fn garbage_after_the_preamble_is_dropped_too() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=1s"]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    for seed in 1..20u64 {
        let mut bytes = b"GNIE\0\x03\0\x03".to_vec();
        if seed.is_multiple_of(2) {
            // A frame of a credible length.
            bytes.extend_from_slice(&500u32.to_be_bytes());
        }
        bytes.extend_from_slice(&model::noise(seed, 600));
        let mut stream = connect(b.listen);
        let _ = stream.write_all(&bytes);
        read_to_close(&mut stream);
        let mut stream = UnixStream::connect(&b.socket).unwrap();
        stream.set_read_timeout(Some(GENEROUS)).unwrap();
        let _ = stream.write_all(&bytes);
        read_to_close(&mut stream);
    }
    assert_works(&a, folder.path());
}

#[test]
fn a_stranger_that_stalls_is_dropped_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &["--liveness=500ms"]);
    for beginning in [&b""[..], b"GN", b"GNIE\0\x03\0\x03\0\0\0\x50half a frame"] {
        let began = Instant::now();
        let mut stream = connect(agent.listen);
        stream.write_all(beginning).unwrap();
        read_to_close(&mut stream);
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{:?}",
            began.elapsed()
        );
    }
    agent.assert_logs("did not answer for");
}

#[test]
fn an_announced_length_alone_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let mut stream = connect(agent.listen);
    stream
        .write_all(b"GNIE\0\x03\0\x03\xff\xff\xff\xff")
        .unwrap();
    read_to_close(&mut stream);
    agent.assert_logs("is longer than");
}
