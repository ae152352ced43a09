//! Peers that take all they may get, or that stop in the middle: each meets its
//! own limits, which it is told, and another peer's requests go on meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use genie_client::protocol::Failure;
use genie_client::{Client, ClientError, Dtype, FailureKind, Memory, PeerLimit, TensorInfo};
use genie_controlplane::message::{Message, Request};
use genie_dataplane::memory::accelerator::MemoryKind;
use genie_tests::liar::{Good, Liar};
use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, GENEROUS, eventually};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Longer than any test: nothing ends for want of progress.
const PATIENT: [&str; 2] = ["--stall=300s", "--liveness=60s"];

fn info(name: String, bytes: u64) -> TensorInfo {
    TensorInfo {
        name,
        dtype: Dtype::U8,
        shape: vec![bytes],
    }
}

/// Begins a put of `count` tensors of `bytes` each, of which nothing ever comes.
fn begin_put(liar: &mut Liar, id: u64, count: u64, bytes: u64) {
    begin_put_into(liar, id, count, bytes, MemoryKind::Host);
}

fn begin_put_into(liar: &mut Liar, id: u64, count: u64, bytes: u64, memory: MemoryKind) {
    let request = Request::Put {
        prefix: format!("greedy/{id}"),
        count,
        metadata: None,
        memory,
        key: None,
    };
    liar.say(&Message::Begin { id, request });
    let tensors = (0..count).map(|i| info(format!("t{i}"), bytes)).collect();
    liar.say(&Message::Tensors { id, tensors });
}

/// How many transfers are granted of a request, or how it ended.
fn granted(liar: &mut Liar) -> Result<usize, Failure> {
    match liar.hear() {
        Message::Granted { transfers, .. } => Ok(transfers.len()),
        Message::Done { result, .. } => match result {
            Err(failure) => Err(failure),
            Ok(outcome) => panic!("it was done: {outcome:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn limited(failure: &Failure, flag: &str) -> (PeerLimit, u64) {
    assert!(failure.message.contains(flag), "{failure}");
    match failure.kind {
        FailureKind::Limited { limit, figure } => (limit, figure),
        other => panic!("{other:?}: {failure}"),
    }
}

/// What `b` says that a peer has.
fn usage(b: &Agent, peer: &str) -> Value {
    let status = b.status();
    let all = status["peer_usage"].as_array().expect("a list");
    let found = all.iter().find(|one| one["peer"] == peer);
    found.cloned().unwrap_or(Value::Null)
}

fn start(folder: &Path, limits: &[&str]) -> (Agent, Agent) {
    let b = Agent::start(folder, "b", &[&PATIENT[..], limits].concat());
    let a = Agent::start(folder, "a", &[&PATIENT[..], &[&b.as_peer()]].concat());
    (a, b)
}

#[test]
fn a_greedy_peer_gets_its_part_and_another_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let limits = ["--peer-memory=8MiB", "--peer-transfers=16"];
    let (a, b) = start(folder.path(), &limits);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let mut liar = Liar::connect(&b, "liar");

    // Memory: 6 MiB are granted, 6 more are not.
    begin_put(&mut liar, 1, 1, 6 * MIB);
    assert_eq!(granted(&mut liar), Ok(1));
    begin_put(&mut liar, 2, 1, 6 * MIB);
    let refused = granted(&mut liar).unwrap_err();
    assert_eq!(
        limited(&refused, "--peer-memory"),
        (PeerLimit::Memory, 8 * MIB)
    );
    let has = usage(&b, "liar");
    let bytes = has["memory_bytes"].as_u64().unwrap();
    assert!((6 * MIB..6 * MIB + 8192).contains(&bytes), "{has}");
    good.exchange(&a);

    // Transfers: one batch has no more than brings the peer to half of its
    // limit, and every other request one.
    begin_put(&mut liar, 3, 100, 10);
    assert_eq!(granted(&mut liar), Ok(7), "8 with the one of request 1");
    for id in 4..12 {
        begin_put(&mut liar, id, 1, 10);
        assert_eq!(granted(&mut liar), Ok(1), "request {id}");
    }
    begin_put(&mut liar, 12, 1, 10);
    let refused = granted(&mut liar).unwrap_err();
    assert_eq!(
        limited(&refused, "--peer-transfers"),
        (PeerLimit::Transfers, 16)
    );
    let has = usage(&b, "liar");
    assert_eq!(has["transfers"], 16);
    assert_eq!(
        (&has["refused"]["memory"], &has["refused"]["transfers"]),
        (&1.into(), &1.into())
    );
    good.exchange(&a);

    drop(liar);
    eventually("everything is given back", || {
        let has = usage(&b, "liar");
        (has["memory_bytes"] == 0 && has["transfers"] == 0).then_some(())
    });
    good.exchange(&a);
}

#[test]
fn a_flood_of_requests_is_refused_beyond_its_rate() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = start(folder.path(), &["--peer-rate=50"]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let mut liar = Liar::connect(&b, "liar");
    let began = Instant::now();
    let mut refused = Vec::new();
    for id in 1..=500 {
        let under = Some("nothing".to_owned());
        let request = Request::List { under };
        liar.say(&Message::Begin { id, request });
        match liar.hear() {
            Message::Done { result: Ok(_), .. } => {}
            Message::Done {
                result: Err(failure),
                ..
            } => refused.push(failure),
            other => panic!("{other:?}"),
        }
    }
    // A burst of one second, and what came in at that rate since.
    let due = 51 + (began.elapsed().as_secs_f64() * 50.0) as usize;
    assert!(500 - refused.len() <= due, "{} of {due}", refused.len());
    assert!(!refused.is_empty(), "500 in {:?}", began.elapsed());
    for failure in &refused {
        assert_eq!(limited(failure, "--peer-rate"), (PeerLimit::Rate, 50));
        assert!(failure.kind.is_retryable());
    }
    assert_eq!(usage(&b, "liar")["refused"]["rate"], refused.len());
    assert_eq!(usage(&b, "a")["refused"]["rate"], 0);
    good.exchange(&a);
    // It may again, once it has waited.
    eventually("the liar is answered", || {
        liar.say(&Message::Begin {
            id: began.elapsed().as_nanos() as u64,
            request: Request::List { under: None },
        });
        loop {
            match liar.hear() {
                Message::Done { result, .. } => return result.is_ok().then_some(()),
                Message::Listed { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn a_peer_has_no_more_sessions_than_it_may() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = start(folder.path(), &["--peer-sessions=2"]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    let liars = [Liar::connect(&b, "liar"), Liar::connect(&b, "liar")];
    let refusal = Liar::refusal(&b, "liar");
    assert!(refusal.contains("--peer-sessions"), "{refusal}");
    assert!(refusal.contains("has 2 sessions"), "{refusal}");
    assert_eq!(b.status()["identity"]["refused_peers"], 1);
    good.exchange(&a);
    drop(liars);
    eventually("its sessions are forgotten", || {
        let status = b.status();
        let sessions = status["sessions"].as_array().expect("a list");
        sessions.iter().all(|one| one["peer"] == "a").then_some(())
    });
    Liar::connect(&b, "liar");
}

#[test]
fn peers_that_stop_in_the_middle_leave_room_for_others() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = start(folder.path(), &[]);
    let good = Good::new(folder.path());
    good.exchange(&a);
    // Eight peers ask for more transfers together than the engine takes of all,
    // and never send a byte; each also wants a tensor that it never accepts.
    let mut stopped = Vec::new();
    for number in 0..8 {
        let mut liar = Liar::connect(&b, &format!("stopped{number}"));
        begin_put(&mut liar, 1, 3000, 8);
        let granted = granted(&mut liar).expect("the first of them");
        let prefix = "good".to_owned();
        let request = Request::Get { prefix };
        liar.say(&Message::Begin { id: 2, request });
        stopped.push((liar, granted));
    }
    let transfers = |liars: &[(Liar, usize)]| -> u64 {
        let one = |number| usage(&b, &format!("stopped{number}"))["transfers"].as_u64();
        (0..liars.len()).filter_map(one).sum()
    };
    let all = transfers(&stopped);
    assert!(all < 4096 - 8, "room is left beside {all}");
    println!("{all} transfers of {} peers that stopped", stopped.len());

    // A batch of many tensors takes all the same engine.
    let (file, back) = (
        folder.path().join("many.safetensors"),
        folder.path().join("many-back.safetensors"),
    );
    let tensors: Vec<Tensor> = (0..6000)
        .map(|i| Tensor::bytes(&format!("t.{i}"), i % 50))
        .collect();
    model::write(&file, &tensors, &[]);
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    a.json(&["put", &text(&file), "b:many"]);
    a.json(&["get", "b:many", &text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
    good.exchange(&a);
    drop(stopped);
    eventually("nothing of them is left", || {
        let status = b.status();
        let all = status["peer_usage"].as_array().expect("a list");
        let held: u64 = all
            .iter()
            .filter(|one| one["peer"] != "a")
            .filter_map(|one| Some(one["memory_bytes"].as_u64()? + one["transfers"].as_u64()?))
            .sum();
        (held == 0).then_some(())
    });
}

/// Slots of a device are few: a peer's requests, however many, have half of them.
#[test]
fn a_peer_whose_requests_stop_leaves_slots_of_a_device_to_others() {
    const REQUESTS: u64 = 40;
    let folder = tempfile::tempdir().unwrap();
    let flags = [&PATIENT[..], &["--accelerator=sim"]].concat();
    let b = Agent::start(folder.path(), "b", &flags);
    let a = Agent::start(folder.path(), "a", &[&flags[..], &[&b.as_peer()]].concat());
    let mut liar = Liar::connect(&b, "liar");
    for id in 0..REQUESTS {
        begin_put_into(&mut liar, id, 1, 100, MemoryKind::Sim);
    }
    for number in 0..8 {
        assert_eq!(granted(&mut liar), Ok(1), "{number}");
    }
    eventually("all have begun", || {
        (usage(&b, "liar")["transfers"] == REQUESTS).then_some(())
    });
    let file = folder.path().join("model.safetensors");
    let back = folder.path().join("back.safetensors");
    let tensors: Vec<Tensor> = (0..40)
        .map(|i| Tensor::bytes(&format!("t.{i}"), 1000 + i))
        .collect();
    model::write(&file, &tensors, &[]);
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    a.json(&["put", "--memory=sim", &text(&file), "b:model"]);
    a.json(&["get", "b:model", &text(&back)]);
    assert_eq!(model::read(&back), model::read(&file));
    // Those that wait go on as slots become free: what they hold is given back.
    drop(liar);
    eventually("everything is given back", || {
        let has = usage(&b, "liar");
        (has["memory_bytes"] == 0 && has["transfers"] == 0).then_some(())
    });
    a.json(&["put", "--memory=sim", &text(&file), "b:again"]);
}

#[test]
fn a_program_is_told_the_limit_that_its_node_met() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("b.toml");
    std::fs::write(
        &config,
        "peer-memory = '1MiB'\n[limits.a]\nmemory = '2MiB'\n",
    )
    .unwrap();
    let config = format!("--config={}", config.display());
    let (a, b) = start(folder.path(), &[&config]);
    let c = Agent::start(folder.path(), "c", &[&b.as_peer()]);
    let put = |agent: &Agent, name: &str, bytes: u64| {
        let mut client = Client::connect(&agent.socket).expect("the agent listens");
        let arena = client.arena(bytes, Memory::Auto).unwrap();
        let tensor = arena.tensor("x", Dtype::U8, &[bytes]).unwrap();
        client.put(Some("b"), name, &[tensor], None)
    };
    let refused = |result| match result {
        Err(ClientError::Failed { kind, message }) => limited(&Failure { kind, message }, "peer"),
        other => panic!("{other:?}"),
    };
    let refusal = refused(put(&c, "c", MIB + MIB / 2));
    assert_eq!(refusal, (PeerLimit::Memory, MIB));
    assert_eq!(put(&a, "a", MIB + MIB / 2).unwrap().bytes, MIB + MIB / 2);
    let refusal = refused(put(&a, "a2", MIB));
    assert_eq!(refusal, (PeerLimit::Memory, 2 * MIB));
    // What it has put counts until it is removed, whoever does that.
    assert!(b.genie(&["rm", "a"]).status.success());
    put(&a, "a2", MIB).unwrap();
    let has = usage(&b, "a");
    assert_eq!(
        (&has["memory_limit_bytes"], &has["refused"]["memory"]),
        (&(2 * MIB).into(), &1.into())
    );
    let metrics = b.status()["metrics"]["address"]
        .as_str()
        .unwrap()
        .to_owned();
    let page = page(&metrics);
    for line in [
        "genie_peer_refused_total{peer=\"a\",limit=\"memory\"} 1",
        "genie_peer_refused_total{peer=\"c\",limit=\"memory\"} 1",
        "genie_peer_memory_limit_bytes{peer=\"a\"} 2097152",
    ] {
        assert!(page.lines().any(|one| one == line), "no {line} in\n{page}");
    }
    let shown = b.genie(&["status"]).stdout;
    assert!(shown.contains("refused for memory 1"), "{shown}");
}

#[test]
fn a_program_that_waits_is_served_when_its_node_may_again() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = start(folder.path(), &["--peer-rate=2"]);
    let mut client = Client::connect(&a.socket).expect("the agent listens");
    client
        .set_patience(None, Some(GENEROUS))
        .expect("the agent answers");
    let arena = client.arena(4096, Memory::Auto).unwrap();
    let tensor = arena.tensor("x", Dtype::U8, &[100]).unwrap();
    let began = Instant::now();
    for number in 0..6 {
        let name = format!("m{number}");
        client
            .put(Some("b"), &name, std::slice::from_ref(&tensor), None)
            .expect("it is tried again until it may");
    }
    // Two at once, then two a second; its own later requests wait too.
    assert!(began.elapsed() >= Duration::from_secs(1), "{began:?}");
    assert!(usage(&b, "a")["refused"]["rate"].as_u64() > Some(0));
}

fn page(address: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(GENEROUS)).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
