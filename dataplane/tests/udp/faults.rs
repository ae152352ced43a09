//! Devices, peers and users that give up, and what must not happen then.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::engine::udp::{self, Config};
use genie_dataplane::engine::{FailReason, OpenError, Remote};
use genie_dataplane::memory::{Lease, Region};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::harness::{
    Node, Rig, block_on, config, connect, eventually, outcome, region, rigs, short, transfer,
};
use crate::sealed;

#[test]
fn opening_toward_nobody_fails_with_the_reason() {
    let (a, b) = pair(&Options::default());
    let config = Config {
        liveness: Duration::from_millis(300),
        ..Config::default()
    };
    let a = Node::start(a, config.clone());
    let b = Node::start(b, config);
    let mut elsewhere = b.local.clone();
    elsewhere.addresses = vec!["fe80::1234".parse().unwrap()];
    let open = |local| {
        let session = a.endpoint.new_session(fastrand::u32(..));
        block_on(a.endpoint.open(
            session,
            Remote::Udp(udp::Remote {
                local,
                session,
                secrets: None,
            }),
        ))
    };
    let nobody = open(elsewhere.clone());
    assert_eq!(nobody, Err(OpenError::NoNeighbour(elsewhere.addresses[0])));
    elsewhere.addresses = vec!["10.0.0.1".parse().unwrap()];
    assert_eq!(open(elsewhere), Err(OpenError::NoCommonAddress));
    // A neighbour that answers, whose engine knows no such session.
    let refused = open(b.local.clone());
    assert!(
        matches!(refused, Err(OpenError::NoAnswer(_))),
        "{refused:?}"
    );
}

#[test]
fn cancelling_either_end_fails_the_other_and_frees_both_leases() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    for sender_cancels in [true, false] {
        let (source, destination) = (region(&vec![1; 50_000_000]), region(&vec![0; 50_000_000]));
        let memory = [
            Arc::downgrade(source.region()),
            Arc::downgrade(destination.region()),
        ];
        let (id, incoming) = block_on(b.endpoint.receive(b.session, destination)).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
        let survivor = if sender_cancels {
            drop(outgoing);
            incoming
        } else {
            drop(incoming);
            outgoing
        };
        let result = survivor.wait();
        assert!(
            matches!(result, Err(FailReason::CancelledByPeer)),
            "{result:?}"
        );
        let limit = Instant::now() + Duration::from_secs(20);
        while memory.iter().any(|memory| memory.upgrade().is_some()) {
            assert!(
                Instant::now() < limit,
                "a cancelled transfer keeps its memory"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    transfer(&a, &b, &[9; 1000]);
}

/// A frame that the device refused waits in the engine. When its transfer is
/// cancelled meanwhile, what it refers to may soon be another tensor.
#[test]
fn a_frame_that_waits_never_carries_another_tensors_bytes() {
    const FIRST: u8 = 0xaa;
    const SECOND: u8 = 0xbb;
    let (a, b) = rigs(&Options::default());
    let (jam, watch) = (Arc::clone(&a.switches), Arc::clone(&b.switches));
    let (a, b) = connect(a, b, config());
    let (one, _first) = block_on(b.endpoint.receive(b.session, region(&[0; 200_000]))).unwrap();
    let (two, second) = block_on(b.endpoint.receive(b.session, region(&[0; 200_000]))).unwrap();
    watch.records.store(true, Ordering::Relaxed);
    jam.jammed.store(true, Ordering::Relaxed);
    let source = region(&[FIRST; 200_000]);
    let memory = Arc::downgrade(source.region());
    let cancelled = block_on(a.endpoint.send(a.session, one, source)).unwrap();
    // Long enough for the engine to fill its burst; if not, nothing is tested
    // but nothing fails either.
    std::thread::sleep(Duration::from_millis(50));
    drop(cancelled);
    eventually("the lease is given back", || memory.upgrade().is_none());
    let other = block_on(a.endpoint.send(a.session, two, region(&[SECOND; 200_000]))).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    jam.jammed.store(false, Ordering::Relaxed);
    other.wait().unwrap();
    second.wait().unwrap();
    let seen = watch.seen.lock().unwrap();
    // Ethernet, IPv6 and UDP are 62 bytes; the slot is the third word behind them.
    let slot = |frame: &[u8]| u32::from_be_bytes(frame[70..74].try_into().unwrap());
    let data: Vec<_> = seen.iter().filter(|frame| frame.len() > 1000).collect();
    assert!(data.iter().any(|frame| slot(frame) == two.slot));
    for frame in data {
        let expected = if slot(frame) == one.slot {
            FIRST
        } else {
            SECOND
        };
        assert_eq!(frame[2000], expected, "slot {}", slot(frame));
    }
}

#[test]
fn a_queue_that_never_finishes_frames_is_stopped_and_everybody_is_answered() {
    dead_queue(connect);
}

/// Its frames refer to slots, and not to what is sent.
#[test]
fn a_queue_that_never_finishes_sealed_frames_is_stopped_too() {
    dead_queue(sealed::connect);
}

fn dead_queue(connect: fn(Rig, Rig, Config) -> (Node, Node)) {
    let options = Options {
        completes_on_reap: true,
        ..Options::default()
    };
    let (a, b) = rigs(&options);
    let switches = [Arc::clone(&a.switches), Arc::clone(&b.switches)];
    let (mut a, b) = connect(a, b, short());
    let (id, _incoming) = block_on(b.endpoint.receive(b.session, region(&[0; 5_000_000]))).unwrap();
    for switches in &switches {
        switches.dead.store(true, Ordering::Relaxed);
    }
    let source = region(&[1; 5_000_000]);
    let memory = Arc::downgrade(source.region());
    let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
    let answer = outcome(outgoing).expect("answered though the queue is dead");
    assert!(matches!(answer, Err(FailReason::PathLost(_))), "{answer:?}");
    assert!(memory.upgrade().is_none());
    // The engine ends by itself; nothing more can be done with its device.
    a.engine.take().unwrap().join().unwrap();
    let after = block_on(a.endpoint.receive(a.session, region(&[0; 1])));
    assert!(after.is_err());
}

#[test]
fn a_full_ring_that_never_drains_ends_with_its_sessions() {
    let (a, b) = rigs(&Options::default());
    let jam = Arc::clone(&a.switches);
    let (a, b) = connect(a, b, short());
    let (id, _incoming) = block_on(b.endpoint.receive(b.session, region(&[0; 5_000_000]))).unwrap();
    jam.jammed.store(true, Ordering::Relaxed);
    let source = region(&[1; 5_000_000]);
    let memory = Arc::downgrade(source.region());
    let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
    let answer = outcome(outgoing).expect("answered though nothing can be sent");
    assert!(matches!(answer, Err(FailReason::PathLost(_))), "{answer:?}");
    assert!(memory.upgrade().is_none());
    eventually("the session is gone", || {
        a.status.snapshot().sessions.is_empty()
    });
}

#[test]
fn a_transfer_begun_while_its_session_is_opened_is_answered_when_that_fails() {
    let (a, _b) = pair(&Options::default());
    let a = Node::start(a, short());
    let mut local = a.local.clone();
    local.addresses = vec!["fe80::1234".parse().unwrap()];
    let session = a.session;
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| {
            let remote = Remote::Udp(udp::Remote {
                local,
                session,
                secrets: None,
            });
            block_on(a.endpoint.open(session, remote))
        });
        // The command to open must come first; until then there is no session.
        let limit = Instant::now() + short().liveness / 2;
        let mut answers = Vec::new();
        while Instant::now() < limit {
            let (_, transfer) = block_on(a.endpoint.receive(session, region(&[0; 1000]))).unwrap();
            answers.push(transfer);
            std::thread::sleep(Duration::from_millis(10));
        }
        let opened = opening.join().unwrap();
        assert!(
            matches!(opened, Err(OpenError::NoNeighbour(_))),
            "{opened:?}"
        );
        for transfer in answers {
            assert_eq!(
                outcome(transfer).expect("answered"),
                Err(FailReason::Closed)
            );
        }
    });
}

#[test]
fn a_session_opened_twice_answers_both() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let again = a.open(&b);
    assert!(matches!(again, Err(OpenError::Refused(_))), "{again:?}");
    transfer(&a, &b, &[4; 10_000]);
}

#[test]
fn more_sessions_than_a_burst_has_frames_all_move() {
    const COUNT: usize = 40;
    let (a, b) = pair(&Options {
        descriptors: 64,
        ..Options::default()
    });
    let (mut a, mut b) = (Node::start(a, config()), Node::start(b, config()));
    let (mut waiting, bytes) = (Vec::new(), vec![5; 4 << 20]);
    let (source, destination) = (region(&bytes), region(&bytes));
    for _ in 0..COUNT {
        a.session = a.endpoint.new_session(fastrand::u32(..));
        b.session = b.endpoint.new_session(fastrand::u32(..));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(&a));
            a.open(&b).unwrap();
            other.join().unwrap().unwrap();
        });
        let (id, incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
        waiting.push((a.session, id, incoming));
    }
    let sending: Vec<_> = waiting
        .iter()
        .map(|(session, id, _)| block_on(a.endpoint.send(*session, *id, source.clone())).unwrap())
        .collect();
    for (outgoing, (_, _, incoming)) in sending.into_iter().zip(waiting) {
        outgoing.wait().unwrap();
        incoming.wait().unwrap();
    }
}

#[test]
fn commands_that_an_engine_did_not_take_give_their_leases_back() {
    let (a, _b) = pair(&Options::default());
    let mut a = Node::start(a, config());
    let lease = region(&[0; 4096]);
    let memory = Arc::downgrade(lease.region());
    a.endpoint.stop();
    let begun: Vec<_> = (0..1000)
        .map(|_| block_on(a.endpoint.receive(a.session, lease.clone())))
        .collect();
    drop(lease);
    a.engine.take().unwrap().join().unwrap();
    for (_, transfer) in begun.into_iter().flatten() {
        let answer = outcome(transfer).expect("answered though the engine has ended");
        assert!(answer.is_err());
    }
    eventually("every lease is given back", || memory.upgrade().is_none());
}

#[test]
fn memory_that_may_only_be_read_is_refused_as_a_destination() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let file = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    let into = Lease::whole(Region::import(file, usize::MAX).unwrap());
    let refused = block_on(b.endpoint.receive(b.session, into));
    assert!(
        matches!(refused, Err(FailReason::Refused(_))),
        "{refused:?}"
    );
    transfer(&a, &b, &[4; 10_000]);
}
