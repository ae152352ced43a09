//! Peers that mean harm: they come in crowds, keep silent, stall and lie. While
//! they do, a well-behaved peer is served; afterwards nothing of them is left.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use genie_controlplane::message::{Message, Request, Resume, Runs};
use genie_controlplane::strangers::{STRANGERS_MAX, STRANGERS_PER_ADDRESS};
use genie_controlplane::tensor::{Dtype, TensorInfo};
use genie_dataplane::TransferId;
use genie_tests::liar::{Good, Liar, connect_from};
use genie_tests::{Agent, GENEROUS, eventually};
use rustix::process::{Resource, getrlimit, setrlimit};

/// More memory than serving one peer takes, and far less than what liars claim.
const MEMORY_SLACK: u64 = 128 << 20;

/// As many descriptors as this process may have at all.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to the maximum");
}

/// Resident memory of an agent, in bytes.
fn memory(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()));
    let status = status.expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.and_then(|kib| kib.parse::<u64>().ok()).expect("in kB") << 10
}

/// Only the session with the good peer, and no more descriptors than before.
fn assert_nothing_left(b: &Agent, descriptors: usize) {
    eventually("the liar's sessions are gone", || {
        let sessions = b.status()["sessions"].as_array().unwrap().clone();
        sessions
            .iter()
            .all(|one| one["peer"] != "liar")
            .then_some(())
    });
    eventually("all descriptors are given back", || {
        (b.descriptors() <= descriptors).then_some(())
    });
}

#[test]
fn silent_strangers_keep_no_peer_out() {
    raise_descriptor_limit();
    let folder = tempfile::tempdir().unwrap();
    // So long that time alone frees no place.
    let b = Agent::start(folder.path(), "b", &["--liveness=60s"]);
    let good = Good::new(folder.path());
    let descriptors = b.descriptors();
    let mut silent = Vec::new();
    for host in 2..8 {
        for _ in 0..STRANGERS_PER_ADDRESS + 10 {
            silent.push(connect_from([127, 0, 0, host], b.listen).unwrap());
        }
    }
    assert!(silent.len() > STRANGERS_MAX);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer(), "--liveness=60s"]);
    good.exchange(&a);

    // Only so many are kept, and the first to come were the first to go.
    let dropped = || {
        let status = b.status();
        status["identity"]["dropped_strangers"].as_u64().unwrap() as usize
    };
    eventually("the rest is dropped", || {
        (dropped() >= silent.len() - STRANGERS_MAX).then_some(())
    });
    let mut rest = Vec::new();
    let _ = silent[0].read_to_end(&mut rest);
    assert_eq!(rest.len() % 8, 0, "nothing but a preamble was said");
    assert!(b.descriptors() <= descriptors + STRANGERS_MAX + 20);
    drop(silent);
    good.exchange(&a);
    let until = Instant::now() + GENEROUS;
    // The session with `a` stays: its control and data connections.
    while b.descriptors() > descriptors + 8 {
        let now = b.descriptors();
        assert!(Instant::now() < until, "{descriptors} before, {now} now");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn ten_thousand_connections_disturb_nobody() {
    raise_descriptor_limit();
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let (descriptors, before) = (b.descriptors(), memory(&b));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let exchanges = scope.spawn(|| {
            let mut exchanges = 0;
            while !stop.load(Ordering::Relaxed) {
                good.exchange(&a);
                exchanges += 1;
            }
            exchanges
        });
        // At both ports, from changing hosts; the last thousand stay open.
        let mut open = std::collections::VecDeque::new();
        for number in 0..10_000u32 {
            let host = 2 + (number % 200) as u8;
            let to = [b.listen, b.data.unwrap()][number as usize % 2];
            match connect_from([127, 0, 1, host], to) {
                Ok(stream) => open.push_back(stream),
                // Refused for want of room, which is as good.
                Err(error) => println!("connection {number}: {error}"),
            }
            if open.len() > 1000 {
                open.pop_front();
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(exchanges.join().unwrap() > 0, "served meanwhile");
    });
    // One that comes new is served too.
    let c = Agent::start(folder.path(), "c", &[&b.as_peer()]);
    good.exchange(&c);
    drop(c);
    let after = memory(&b);
    assert!(after < before + MEMORY_SLACK, "{before} became {after}");
    assert_nothing_left(&b, descriptors);
}

#[test]
fn lies_end_the_request_or_the_session_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--stall=1s", "--liveness=20s"]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let (descriptors, before) = (b.descriptors(), memory(&b));
    let used = b.status()["store"]["used_bytes"].clone();
    for (what, messages, reason) in lies() {
        let mut liar = Liar::connect(&b, "liar");
        for message in &messages {
            liar.say(message);
        }
        let verdict = liar.verdict();
        println!("{what}: {verdict}");
        assert!(
            verdict.contains(reason),
            "{what}: no {reason:?} in {verdict:?}"
        );
        good.exchange(&a);
    }
    assert_nothing_left(&b, descriptors);
    assert_eq!(b.status()["store"]["used_bytes"], used, "bytes are back");
    let after = memory(&b);
    assert!(after < before + MEMORY_SLACK, "{before} became {after}");
}

/// What is lied about, how, and a part of the answer.
fn lies() -> Vec<(&'static str, Vec<Message>, &'static str)> {
    let id = 5;
    let begin = |request| Message::Begin { id, request };
    let put = |count| {
        begin(Request::Put {
            prefix: "evil".into(),
            count,
            metadata: None,
            memory: Default::default(),
            key: None,
        })
    };
    let get = || {
        begin(Request::Get {
            prefix: "good".into(),
        })
    };
    let tensors = |shape: &[u64]| Message::Tensors {
        id,
        tensors: vec![TensorInfo {
            name: "x".into(),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
        }],
    };
    let transfer = TransferId {
        slot: u32::MAX,
        generation: u32::MAX,
    };
    let granted = |count, path| Message::Granted {
        id,
        path,
        transfers: vec![transfer; count],
    };
    let resumed = Message::Resumed {
        id,
        path: 1,
        grants: vec![Resume {
            index: u64::MAX,
            transfer,
            missing: vec![5..10, 20..u64::MAX],
        }],
        last: true,
    };
    let window = begin(Request::Window {
        name: "evil".into(),
        bytes: u64::MAX,
        memory: Default::default(),
    });
    let read = begin(Request::Read(Runs {
        targets: vec!["good/x".into()],
        runs: vec![(
            u32::MAX,
            genie_client::slice::Run {
                offset: u64::MAX,
                len: u64::MAX,
                stride: u64::MAX,
                count: u64::MAX,
            },
        )],
    }));
    let hello = Message::Opened {
        result: Err("no".into()),
    };
    vec![
        (
            "more tensors than there can be",
            vec![put(u64::MAX)],
            "too many",
        ),
        (
            "a shape that overflows",
            vec![put(1), tensors(&[u64::MAX, u64::MAX])],
            "no whole number of bytes",
        ),
        (
            "a tensor larger than the store",
            vec![put(1), tensors(&[1 << 50])],
            "store",
        ),
        (
            "more tensors than announced",
            vec![put(1), tensors(&[1]), tensors(&[1]), tensors(&[1])],
            "no place for it",
        ),
        (
            "a list that never comes",
            vec![put(3), tensors(&[1])],
            "no progress",
        ),
        (
            "grants nobody needs",
            vec![get(), granted(100_000, 1)],
            "no place for it",
        ),
        (
            "grants of another path",
            vec![get(), granted(1, 99)],
            "no progress",
        ),
        (
            "a grant of a wrong slot",
            vec![get(), granted(1, 1)],
            "no progress",
        ),
        ("what is missing", vec![get(), resumed], "no place for it"),
        ("a window of all memory", vec![window], "the store is full"),
        ("ranges beyond everything", vec![read], "no target"),
        ("one number twice", vec![put(3), put(3)], "twice"),
        ("who it is", vec![hello], "the other end"),
    ]
}

#[test]
fn a_flood_of_requests_ends_its_own_session() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let (descriptors, before) = (b.descriptors(), memory(&b));
    let mut liar = Liar::connect(&b, "liar");
    for id in 0..1100 {
        // Their lists never come.
        let request = Request::Put {
            prefix: format!("flood/{id}"),
            count: 10,
            metadata: None,
            memory: Default::default(),
            key: None,
        };
        liar.say(&Message::Begin { id, request });
        if id == 1000 {
            good.exchange(&a);
        }
    }
    let verdict = liar.verdict();
    assert!(verdict.contains("requests under way"), "{verdict}");
    good.exchange(&a);
    assert_nothing_left(&b, descriptors);
    let after = memory(&b);
    assert!(after < before + MEMORY_SLACK, "{before} became {after}");
}

#[test]
fn a_frame_that_never_ends_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=1s"]);
    let a = Agent::start(folder.path(), "a", &[&b.as_peer(), "--liveness=1s"]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let descriptors = b.descriptors();
    let mut liar = Liar::connect(&b, "liar");
    let began = Instant::now();
    let mut slow = liar.control.try_clone().unwrap();
    let dribble = std::thread::spawn(move || {
        // A frame of a megabyte, a byte at a time: never silent, never done.
        let mut bytes = (1u32 << 20).to_be_bytes().to_vec();
        bytes.resize(4000, 0);
        for byte in bytes {
            if slow.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    good.exchange(&a);
    let verdict = liar.verdict();
    assert!(verdict.contains("did not answer for"), "{verdict}");
    assert!(began.elapsed() < GENEROUS, "{:?}", began.elapsed());
    drop(liar);
    dribble.join().unwrap();
    good.exchange(&a);
    assert_nothing_left(&b, descriptors);
}
