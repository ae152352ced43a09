//! Peers that die, keep silent or go away, and transfers that are given up.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use genie_dataplane::SessionId;
use genie_dataplane::engine::{FailReason, OpenError};
use genie_dataplane::tcp::Role;

use crate::harness::{Engine, Link, PATIENCE, assert_given_back, empty, filled, open_both, quick};

#[test]
fn memory_that_changes_under_way_is_a_digest_mismatch() {
    let link = Link::new(2);
    let (from, into) = (filled(256 << 20, 1), empty(256 << 20));
    // A writer that gets no core in time changes nothing; then once more.
    let mismatched = (0..10).any(|_| {
        let stop = AtomicBool::new(false);
        let (sent, received) = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut value = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    for at in (0..from.len()).step_by(4096) {
                        value += 1;
                        from.write_at(at, value.to_ne_bytes()[..].into());
                    }
                }
            });
            let (id, received) = link.b.receive(link.ids.1, into.clone()).unwrap();
            let sent = link.a.send(link.ids.0, id, from.clone());
            let answers = (sent.and_then(|sent| sent.wait()), received.wait());
            stop.store(true, Ordering::Relaxed);
            answers
        });
        match (sent, received) {
            (Ok(sent), Ok(received)) => {
                assert_eq!(sent.digest, received.digest);
                assert_eq!(received.digest.0, into.crc32c(0..into.len()));
                false
            }
            (sent, received) => {
                assert_eq!(sent, Err(FailReason::DigestMismatch));
                assert_eq!(received, Err(FailReason::DigestMismatch));
                true
            }
        }
    });
    assert!(mismatched, "the writer never got in between");
    assert_given_back(&from);
    assert_given_back(&into);
    // The session lives on.
    link.move_and_check(&filled(1000, 2));
    link.stop();
}

#[test]
fn a_session_that_nobody_expects_is_refused() {
    let (a, b) = (Engine::quick(), Engine::quick());
    let id = a.endpoint.new_session(1);
    let begin = Instant::now();
    let refused = a.open(id, SessionId(77), Role::Dial(b.address), 2);
    assert!(
        matches!(refused, Err(OpenError::Refused(_) | OpenError::TimedOut(_))),
        "{refused:?}"
    );
    assert!(begin.elapsed() < PATIENCE / 4);
    a.stop();
    b.stop();
}

#[test]
fn nobody_listening_is_said_at_once() {
    let a = Engine::patient();
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let id = a.endpoint.new_session(1);
    let begin = Instant::now();
    let refused = a.open(id, SessionId(1), Role::Dial(free), 2);
    assert_eq!(
        refused,
        Err(OpenError::Refused(format!("nothing listens on {free}")))
    );
    assert!(begin.elapsed() < PATIENCE / 4);
    a.stop();
}

#[test]
fn a_peer_that_never_comes_is_a_timeout() {
    let b = Engine::quick();
    let id = b.endpoint.new_session(1);
    let limit = quick().open_limit;
    assert_eq!(
        b.open(id, SessionId(1), Role::Accept, 2),
        Err(OpenError::TimedOut(limit))
    );
    // A transfer in a session that is not open is refused with its lease.
    let lease = empty(100);
    let answer = b.receive(id, lease.clone()).unwrap().1.wait();
    assert!(matches!(answer, Err(FailReason::Refused(_))), "{answer:?}");
    assert_given_back(&lease);
    b.stop();
}

#[test]
fn a_peer_that_accepts_and_never_answers_is_a_timeout() {
    let a = Engine::quick();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let id = a.endpoint.new_session(1);
    let role = Role::Dial(silent.local_addr().unwrap());
    let answer = a.open(id, SessionId(1), role, 2);
    assert_eq!(answer, Err(OpenError::TimedOut(quick().open_limit)));
    a.stop();
}

#[test]
fn an_engine_that_stops_ends_its_peers_sessions_at_once() {
    let mut link = Link::new(2);
    let into = empty(1 << 20);
    let (_, received) = link.b.receive(link.ids.1, into.clone()).unwrap();
    // The command is on its way to the engine's thread.
    std::thread::sleep(Duration::from_millis(50));
    link.a.stop();
    assert_eq!(received.wait(), Err(FailReason::Closed));
    assert_given_back(&into);
    let (lost, _) = link.b.await_lost();
    assert_eq!(
        (lost.session, lost.reason),
        (link.ids.1, FailReason::Closed)
    );
    link.b.stop();
}

#[test]
fn closing_answers_both_ends() {
    let mut link = Link::new(2);
    let (from, into) = (filled(512 << 20, 1), empty(512 << 20));
    let (id, received) = link.b.receive(link.ids.1, into.clone()).unwrap();
    let sent = link.a.send(link.ids.0, id, from.clone()).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    link.a.endpoint.close(link.ids.0);
    assert_eq!(sent.wait(), Err(FailReason::Closed));
    let answer = received.wait();
    // In the middle of a chunk there is no room for a farewell.
    assert!(
        matches!(answer, Err(FailReason::Closed | FailReason::PathLost(_))),
        "{answer:?}"
    );
    assert_given_back(&from);
    assert_given_back(&into);
    let (lost, _) = link.b.await_lost();
    assert_eq!(lost.session, link.ids.1);
    link.stop();
}

#[test]
fn either_end_may_cancel_and_both_are_answered() {
    let link = Link::new(2);
    for by_receiver in [false, true] {
        let (from, into) = (filled(512 << 20, 1), empty(512 << 20));
        let (id, received) = link.b.receive(link.ids.1, into.clone()).unwrap();
        let sent = link.a.send(link.ids.0, id, from.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        let other = if by_receiver {
            drop(received);
            sent.wait()
        } else {
            drop(sent);
            received.wait()
        };
        assert_eq!(other, Err(FailReason::CancelledByPeer));
        // The next transfer is not disturbed by what was still on its way.
        link.move_and_check(&filled(3 << 20, 2));
        assert_given_back(&from);
        assert_given_back(&into);
    }
    link.stop();
}

#[test]
fn a_transfer_cancelled_before_it_is_sent_fails_at_the_sender() {
    let link = Link::new(1);
    let (id, received) = link.b.receive(link.ids.1, empty(1000)).unwrap();
    drop(received);
    link.move_and_check(&filled(10, 1));
    let from = filled(1000, 1);
    let answer = link.a.send(link.ids.0, id, from.clone()).unwrap().wait();
    assert_eq!(answer, Err(FailReason::CancelledByPeer));
    assert_given_back(&from);
    link.stop();
}

#[test]
fn connections_that_say_nothing_are_sent_away() {
    use std::io::Read;
    let link = Link::between(Engine::patient(), Engine::quick(), 1);
    let mut idle: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect(link.b.address).unwrap())
        .collect();
    // They do not keep anybody out while they wait.
    let other = open_both(&link.a, &link.b, 2);
    link.a.endpoint.close(other.0);
    for socket in &mut idle {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Vec::new();
        // Closed, with or without a refusal; not left open.
        match socket.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    link.move_and_check(&filled(1000, 1));
    link.stop();
}

#[test]
fn an_idle_session_stays() {
    let mut link = Link::between(Engine::quick(), Engine::quick(), 2);
    std::thread::sleep(3 * quick().liveness);
    link.move_and_check(&filled(1000, 1));
    let id = link.ids.1;
    link.a.endpoint.close(link.ids.0);
    assert_eq!(link.b.await_lost().0.session, id);
    link.stop();
}
