//! Requests that are tried again, and requests with a deadline.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use genie_client::{Batch, Client, ClientError, Dtype, FailureKind, Memory, Tensor};
use genie_controlplane::message::RequestKey;
use genie_controlplane::transfer::{self, Progress, Source};
use genie_dataplane::memory::{Backing, Lease, Region, View};
use genie_tests::nodes::{Nodes, Setup};
use genie_tests::relay::Relay;
use genie_tests::{Agent, GENEROUS, eventually, model};
use rustix::process::Signal;

const LEN: usize = 64 << 20;

fn tensor(client: &mut Client, bytes: &[u8]) -> Tensor {
    let len = bytes.len() as u64;
    let arena = client.arena(len, Memory::Auto).unwrap();
    let tensor = arena.tensor("t", Dtype::U8, &[len]).unwrap();
    tensor.write(0, bytes);
    tensor
}

fn failed(result: Result<impl Sized, ClientError>) -> (FailureKind, String) {
    match result {
        Err(ClientError::Failed { kind, message }) => (kind, message),
        Err(error) => panic!("the agent gave no reason: {error}"),
        Ok(_) => panic!("it was done"),
    }
}

/// Agent `b`, where `a` will look for it.
fn start_b(folder: &Path, listen: &str) -> Agent {
    Agent::start(folder, "b", &[&format!("--listen={listen}")])
}

/// An address of the loopback interface that nobody listens on.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn a_put_waits_for_a_peer_that_is_not_there_yet() {
    let folder = tempfile::tempdir().unwrap();
    let listen = free_address();
    let a = Agent::start(folder.path(), "a", &[&format!("--peer=b={listen}")]);
    let mut client = Client::connect(&a.socket).unwrap();
    let bytes = model::noise(1, 1000);
    let tensor = tensor(&mut client, &bytes);
    let put = |client: &mut Client| client.put(Some("b"), "m", std::slice::from_ref(&tensor), None);
    let (kind, message) = failed(put(&mut client));
    assert_eq!(kind, FailureKind::Peer, "{message}");

    client.set_patience(None, Some(GENEROUS)).unwrap();
    let b = std::thread::scope(|scope| {
        let b = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            start_b(folder.path(), &listen)
        });
        put(&mut client).expect("it is tried until the peer is there");
        b.join().unwrap()
    });
    let mut at_b = Client::connect(&b.socket).unwrap();
    let got = at_b.get(None, "m", Memory::Auto).unwrap();
    assert!(got.to_vec("t").unwrap() == bytes);
}

#[test]
fn puts_and_gets_go_on_with_a_peer_that_was_killed_and_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut b = start_b(folder.path(), "127.0.0.1:0");
    let listen = b.listen.to_string();
    let a = Agent::start(folder.path(), "a", &[&b.as_peer()]);
    let mut client = Client::connect(&a.socket).unwrap();
    client.set_patience(None, Some(GENEROUS)).unwrap();
    let bytes = model::noise(2, LEN);
    let tensor = tensor(&mut client, &bytes);
    for round in 0..5 {
        let (mut told, mut killed) = (0, false);
        let put = std::thread::scope(|scope| {
            let (kill, wait) = std::sync::mpsc::channel();
            let (b, folder, listen) = (&mut b, folder.path(), &listen);
            scope.spawn(move || {
                if wait.recv().is_ok() {
                    b.kill();
                    *b = start_b(folder, listen);
                }
            });
            client.put_with(
                Some("b"),
                "m",
                std::slice::from_ref(&tensor),
                None,
                |done, _| {
                    told = done;
                    if !std::mem::replace(&mut killed, true) {
                        let _ = kill.send(());
                    }
                },
            )
        });
        put.unwrap_or_else(|error| panic!("round {round}, {told} bytes told: {error}"));
        // It may have been done just before the kill.
        client
            .put(Some("b"), "m", std::slice::from_ref(&tensor), None)
            .unwrap();
        let got = client.get(Some("b"), "m", Memory::Auto).unwrap();
        assert!(got.to_vec("t").unwrap() == bytes);
    }
    // A get of what is gone with the peer is refused, not tried for ever.
    b.kill();
    b = start_b(folder.path(), &listen);
    let began = Instant::now();
    let (kind, message) = failed(client.get(Some("b"), "m", Memory::Auto));
    assert_eq!(kind, FailureKind::NotFound, "{message}");
    assert!(began.elapsed() < GENEROUS);
    assert_eq!(b.status()["store"]["tensors"], 0);
}

#[test]
fn a_peer_that_will_never_let_us_in_is_not_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let listen = b.listen;
    let itself = free_address();
    let peers = [format!("--peer=c={listen}"), format!("--peer=me={itself}")];
    let own = format!("--listen={itself}");
    let a = Agent::start(folder.path(), "a", &[&own, &peers[0], &peers[1]]);
    let mut client = Client::connect(&a.socket).unwrap();
    let long = Duration::from_secs(24 * 3600);
    client.set_patience(None, Some(long)).unwrap();
    for (peer, reason) in [("c", "calls itself 'b'"), ("me", "this agent itself")] {
        let (kind, message) = failed(client.get(Some(peer), "m", Memory::Auto));
        assert_eq!(kind, FailureKind::Peer);
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn an_agent_that_is_told_to_stop_gives_up_trying_again() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = free_address();
    let a = Agent::start(folder.path(), "a", &[&format!("--peer=b={nobody}")]);
    let mut client = Client::connect(&a.socket).unwrap();
    let long = Duration::from_secs(24 * 3600);
    client.set_patience(None, Some(long)).unwrap();
    std::thread::scope(|scope| {
        let get = scope.spawn(|| failed(client.get(Some("b"), "m", Memory::Auto)));
        a.assert_logs("trying again");
        a.signal(Signal::TERM);
        let (kind, message) = get.join().unwrap();
        assert_eq!(kind, FailureKind::Stopping, "{message}");
    });
}

#[test]
fn what_takes_longer_than_its_deadline_fails_and_the_connection_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &["--liveness=60s"]);
    let a = Agent::start(folder.path(), "a", &["--liveness=60s", &b.as_peer()]);
    let mut client = Client::connect(&a.socket).unwrap();
    let tensor = tensor(&mut client, &model::noise(3, 1000));
    let put = |client: &mut Client| client.put(Some("b"), "m", std::slice::from_ref(&tensor), None);
    put(&mut client).unwrap();
    let window = client.create_window(Some("b"), "w", 1000, Memory::Auto);
    let window = window.unwrap();
    let limit = Duration::from_millis(300);
    client.set_patience(Some(limit), Some(GENEROUS)).unwrap();
    b.signal(Signal::STOP);
    let began = Instant::now();
    let (kind, message) = failed(put(&mut client));
    assert_eq!(kind, FailureKind::Deadline);
    assert!(message.contains("300ms"), "{message}");
    assert!(began.elapsed() >= limit);
    for ask in ["list", "remove", "write"] {
        let began = Instant::now();
        let (kind, message) = match ask {
            "list" => failed(client.list(Some("b"))),
            "remove" => failed(client.remove(Some("b"), "m")),
            _ => {
                let mut batch = Batch::write();
                batch.range(&window, 0..1000, &tensor, 0).unwrap();
                let posted = client.post(&batch).unwrap();
                failed(client.wait(posted))
            }
        };
        assert_eq!(kind, FailureKind::Deadline, "{ask}: {message}");
        assert!((limit..GENEROUS).contains(&began.elapsed()), "{ask}");
    }
    b.signal(Signal::CONT);
    client.set_patience(None, None).unwrap();
    put(&mut client).expect("the connection and the session are as good as before");
    eventually("nothing of the first attempt is held", || {
        // The window and what was put.
        (b.status()["store"]["regions"] == 2).then_some(())
    });

    let output = a.genie(&["put", "--deadline=0s", "--retry=1x", "x.safetensors", "b:m"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_put_whose_end_was_not_heard_of_is_not_done_twice() {
    let nodes = Nodes::start(&Setup::default());
    let source = || {
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let lease = Lease::new(Arc::clone(&region), 0, 1000).unwrap();
        lease.write_at(0, View::from(&model::noise(4, 1000)[..]));
        Source {
            info: genie_client::TensorInfo {
                name: "t".into(),
                dtype: Dtype::U8,
                shape: vec![1000],
            },
            lease: lease.into(),
        }
    };
    nodes.runtime.block_on(async {
        let key = RequestKey([9; 16]);
        let session = nodes.a.session("b").await.unwrap();
        let put = async || {
            let progress = Progress::default();
            let (sources, kind) = (vec![source()], Default::default());
            transfer::put(&session, "m", sources, None, kind, Some(key), &progress).await
        };
        assert!(
            transfer::recall(&session, "m", key)
                .await
                .unwrap()
                .is_none()
        );
        let first = put().await.unwrap();
        let told = transfer::recall(&session, "m", key).await.unwrap().unwrap();
        assert_eq!((told.bytes, told.digest), (first.bytes, first.digest));
        // What was removed since is not there again because of a second attempt.
        assert_eq!(transfer::remove(&session, "m").await.unwrap(), 1);
        put().await.unwrap();
        assert!(transfer::list(&session, None).await.unwrap().is_empty());
    });
}

/// The control connection is cut at every point of a put in turn, and while
/// nobody can connect a second program replaces what had arrived by then.
#[test]
fn a_put_that_is_tried_again_replaces_nothing_that_came_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    let relay = Relay::toward(b.listen);
    let peer = format!("--peer=b={}", relay.address());
    let a = Agent::start(folder.path(), "a", &[&peer]);
    let mut client = Client::connect(&a.socket).unwrap();
    client.set_patience(None, Some(GENEROUS)).unwrap();
    let mut at_b = Client::connect(&b.socket).unwrap();
    let (ours, theirs) = (model::noise(5, 1000), model::noise(6, 1000));
    let (one, other) = (tensor(&mut client, &ours), tensor(&mut at_b, &theirs));
    let stored = |at_b: &mut Client| {
        let got = at_b.get(None, "m", Memory::Auto).ok()?;
        Some(got.to_vec("t").unwrap())
    };
    let put = |client: &mut Client| client.put(Some("b"), "m", std::slice::from_ref(&one), None);
    put(&mut client).unwrap();
    let before = relay.passed();
    put(&mut client).unwrap();
    let whole = relay.passed() - before;

    let (mut replaced, mut kept) = (0, 0);
    for cut_after in (1..=whole).step_by(8) {
        at_b.remove(None, "m").unwrap();
        relay.cut_and_shut_after(cut_after);
        let expected = std::thread::scope(|scope| {
            let put = scope.spawn(|| put(&mut client));
            eventually("the put is over, or its connection cut", || {
                (put.is_finished() || relay.is_shut()).then_some(())
            });
            let replaces = relay.is_shut() && stored(&mut at_b).is_some();
            if replaces {
                let other = std::slice::from_ref(&other);
                at_b.put(None, "m", other, None).unwrap();
            }
            relay.open();
            put.join().unwrap().expect("it is tried again");
            replaces.then_some(&theirs)
        });
        let count = if expected.is_some() {
            &mut replaced
        } else {
            &mut kept
        };
        *count += 1;
        let now = stored(&mut at_b).expect("somebody put it");
        assert!(now == *expected.unwrap_or(&ours), "cut after {cut_after}");
    }
    println!("{whole} bytes: {replaced} times replaced, {kept} times not");
    assert!(replaced > 0 && kept > 0);
}
