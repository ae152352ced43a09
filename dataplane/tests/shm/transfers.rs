//! Tensors between two engines, and the ends of transfers and sessions.

use std::time::{Duration, Instant};

use genie_dataplane::engine::{FailReason, OpenError};
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::shm::{Config, Local, Role};
use genie_dataplane::tcp::Token;

use crate::harness::{
    Engine, Link, PATIENCE, TOKEN, assert_given_back, bytes, empty, filled, new_ids, open_both,
    open_descriptors,
};

#[test]
fn tensors_of_all_sizes_arrive_with_one_copy_by_the_kernel() {
    let link = Link::new();
    for len in [0, 1, 63, 4096, 131_072, 131_073, (1 << 20) + 3, 40 << 20] {
        let (from, into) = (filled(len, len as u64), empty(len));
        let (sent, received) = link.try_move(&from, &into);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_eq!(bytes(&from), bytes(&into), "{len}");
        assert_eq!(sent.digest, received.digest);
        assert_eq!(sent.digest.0, from.crc32c(0..len));
        assert_eq!((sent.bytes, received.bytes), (len as u64, len as u64));
        assert_eq!((sent.copies.genie, received.copies.genie), (0, 0));
        assert_eq!(
            (sent.copies.kernel, received.copies.kernel),
            (0, len as u64)
        );
        assert_given_back(&from);
        assert_given_back(&into);
    }
    link.stop();
}

#[test]
fn both_ways_at_once_from_one_region_and_from_many() {
    let link = Link::new();
    let region = Region::with_backing(8 << 20, Backing::Shmem).unwrap();
    let mut moves = Vec::new();
    for number in 0..300u64 {
        let len = 1 + (number * 7919) % 50_000;
        // Every third lies with others in one region; there are more regions
        // than the peer may be made to hold.
        let from = if number % 3 == 0 {
            let lease = Lease::new(region.clone(), number * 20_000, len).unwrap();
            let fresh = filled(len as usize, number);
            lease.write_at(0, bytes(&fresh)[..].into());
            lease
        } else {
            filled(len as usize, number)
        };
        moves.push((from, empty(len as usize)));
    }
    // What overlaps in the shared region is settled by now.
    let expected: Vec<Vec<u8>> = moves.iter().map(|(from, _)| bytes(from)).collect();
    let mut under_way = Vec::new();
    for (number, (from, into)) in moves.iter().enumerate() {
        let ((to, its), (of, my)) = match number % 2 {
            0 => ((&link.b, link.ids.1), (&link.a, link.ids.0)),
            _ => ((&link.a, link.ids.0), (&link.b, link.ids.1)),
        };
        let (id, received) = to.receive(its, into.clone());
        under_way.push((of.send(my, id, from.clone()), received));
    }
    for (number, (sent, received)) in under_way.into_iter().enumerate() {
        let (sent, received) = (sent.wait().unwrap(), received.wait().unwrap());
        assert_eq!(sent.digest, received.digest);
        assert_eq!(bytes(&moves[number].1), expected[number], "{number}");
    }
    link.stop();
}

#[test]
fn what_was_verified_does_not_change_with_its_source() {
    let link = Link::new();
    let (from, into) = (filled(1 << 20, 1), empty(1 << 20));
    let (sent, received) = link.try_move(&from, &into);
    assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    let verified = bytes(&into);
    from.write_at(0, [0xaa; 4096][..].into());
    assert_eq!(bytes(&into), verified);
    link.stop();
}

#[test]
fn huge_pages_are_passed_too() {
    let Ok(region) = Region::with_backing(4 << 20, Backing::HUGE_2M) else {
        println!("skipped: shm from huge pages: none are free");
        return;
    };
    let link = Link::new();
    let from = Lease::new(region, 12_345, 3 << 20).unwrap();
    from.write_at(0, bytes(&filled(3 << 20, 5))[..].into());
    let into = empty(3 << 20);
    let (sent, received) = link.try_move(&from, &into);
    assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    assert_eq!(bytes(&from), bytes(&into));
    link.stop();
}

#[test]
fn a_source_that_changes_under_way_is_found_out_or_arrives_whole() {
    let link = Link::new();
    let mut mismatches = 0;
    for round in 0..40 {
        let (from, into) = (filled(4 << 20, round), empty(4 << 20));
        let (id, received) = link.b.receive(link.ids.1, into.clone());
        let sent = link.a.send(link.ids.0, id, from.clone());
        for at in 0..64 {
            from.write_at(at * 65_536, (round ^ at as u64).to_le_bytes()[..].into());
        }
        match (sent.wait(), received.wait()) {
            (Ok(sent), Ok(received)) => {
                assert_eq!(sent.digest, received.digest);
                assert_eq!(received.digest.0, into.crc32c(0..into.len()));
            }
            (sent, received) => {
                assert_eq!(sent, Err(FailReason::DigestMismatch));
                assert_eq!(received, Err(FailReason::DigestMismatch));
                mismatches += 1;
            }
        }
    }
    // How often depends on the machine; the session lived through all of it.
    println!("{mismatches} of 40 were changed between the two readings");
    link.stop();
}

#[test]
fn another_length_than_granted_is_refused_and_the_session_goes_on() {
    let link = Link::new();
    let (from, into) = (filled(1000, 1), empty(999));
    let (sent, received) = link.try_move(&from, &into);
    assert!(matches!(sent, Err(FailReason::Refused(_))), "{sent:?}");
    assert!(
        matches!(received, Err(FailReason::Protocol(_))),
        "{received:?}"
    );
    assert_eq!(bytes(&into), vec![0; 999]);
    let (from, into) = (filled(1000, 2), empty(1000));
    let (sent, received) = link.try_move(&from, &into);
    assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    link.stop();
}

#[test]
fn either_end_can_give_up_and_both_get_their_leases_back() {
    let link = Link::new();
    for round in 0..50 {
        let (from, into) = (filled(8 << 20, round), empty(8 << 20));
        let (id, received) = link.b.receive(link.ids.1, into.clone());
        let sent = link.a.send(link.ids.0, id, from.clone());
        let by_sender = round % 2 == 0;
        std::thread::sleep(Duration::from_micros(50 * round));
        if by_sender {
            sent.cancel();
        } else {
            received.cancel();
        }
        let (sent, received) = (sent.wait(), received.wait());
        match (&sent, &received) {
            (Ok(sent), Ok(received)) => assert_eq!(sent.digest, received.digest),
            (Err(FailReason::Cancelled), Err(FailReason::CancelledByPeer)) => assert!(by_sender),
            (Err(FailReason::CancelledByPeer), Err(FailReason::Cancelled)) => assert!(!by_sender),
            // Told of the digest, and gave up before the verdict.
            (Ok(_), Err(FailReason::Cancelled)) => assert!(!by_sender),
            other => panic!("{other:?}"),
        }
        assert_given_back(&from);
        assert_given_back(&into);
    }
    link.stop();
}

#[test]
fn a_peer_that_ends_is_noticed_at_once() {
    let mut link = Link::new();
    let into = empty(100);
    let (_, waiting) = link.a.receive(link.ids.0, into.clone());
    let began = Instant::now();
    link.b.stop();
    let lost = link.a.await_lost();
    assert_eq!(lost.session, link.ids.0);
    assert_eq!(waiting.wait(), Err(FailReason::Closed));
    assert!(
        began.elapsed() < PATIENCE / 2,
        "only its silence was noticed"
    );
    assert_given_back(&into);
    link.a.stop();
}

#[test]
fn a_path_that_cannot_be_says_why() {
    let (a, b) = (Engine::patient(), Engine::patient());
    let ids = new_ids(&a, &b);
    let open = |to: &Local, token: Token, expected: &str| {
        let refused = a.open(ids.0, ids.1, Role::Dial(to.clone()), token);
        let Err(OpenError::Refused(why)) = refused else {
            panic!("{refused:?}");
        };
        assert!(why.contains(expected), "{why}");
    };
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| b.open(ids.1, ids.0, Role::Accept, TOKEN));
        open(&b.local, Token([0; 16]), "does not know the session");
        // It still waits for whoever has the token.
        let again = new_ids(&a, &b);
        a.open(again.0, ids.1, Role::Dial(b.local.clone()), TOKEN)
            .unwrap();
        accepting.join().unwrap().unwrap();
    });
    let nobody = Local {
        name: format!("genie-shm-{:032x}", 1),
        ..b.local.clone()
    };
    open(&nobody, TOKEN, "not reached from here");
    let stranger = Local {
        name: "org.freedesktop.something".into(),
        ..b.local.clone()
    };
    open(&stranger, TOKEN, "a name that no engine has");
    let elsewhere = Local {
        boot: "another".into(),
        ..b.local.clone()
    };
    let refused = |peer: &Local| a.local.refuses(peer).expect("refused");
    assert!(refused(&elsewhere).contains("another host"));
    assert!(refused(&nobody).contains("not reached from here"));
    assert_eq!(a.local.refuses(&b.local), None);
    a.stop();
    b.stop();
}

#[test]
fn nobody_waits_for_ever_for_a_peer_that_never_comes() {
    let limit = Duration::from_millis(300);
    let engine = Engine::start(Config {
        open_limit: limit,
        ..Config::default()
    });
    let id = engine.endpoint.new_session(5);
    let opened = engine.open(id, id, Role::Accept, TOKEN);
    assert_eq!(opened, Err(OpenError::TimedOut(limit)));
    engine.stop();
}

#[test]
fn a_thousand_sessions_leave_no_descriptor_behind() {
    let (a, b) = (Engine::patient(), Engine::patient());
    let before = open_descriptors();
    for round in 0..1000u64 {
        let ids = open_both(&a, &b);
        let (from, into) = (filled(5000, round), empty(5000));
        let (id, received) = b.receive(ids.1, into.clone());
        let sent = a.send(ids.0, id, from.clone());
        assert_eq!(sent.wait().unwrap().digest, received.wait().unwrap().digest);
        a.endpoint.close(ids.0);
        b.endpoint.close(ids.1);
    }
    let began = Instant::now();
    // Other tests of this process open and close descriptors meanwhile.
    while open_descriptors() > before + 200 {
        assert!(
            began.elapsed() < PATIENCE,
            "{before} descriptors before, {} after",
            open_descriptors()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(a.status.snapshot().copies.genie == 0);
    a.stop();
    b.stop();
}
