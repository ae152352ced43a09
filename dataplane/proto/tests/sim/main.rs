//! Two peers over a simulated network that loses, repeats, reorders, corrupts
//! and delays. A failure prints its case: the seed reproduces it exactly.

mod incast;
mod network;
mod offers;
mod pair;
mod sealed;

use std::time::Duration;

use genie_proto::congestion::Algorithm;
use genie_proto::{
    CloseReason, Config, Digest, Event, FailReason, PathLostReason, Time, TransferId,
};
use network::{Profile, Random};
use pair::{Pair, Plan};
use proptest::prelude::*;

pub(crate) const MINUTE: Time = Time(60_000_000_000);

pub(crate) fn any_profile() -> impl Strategy<Value = Profile> {
    let wrong = (0u64..200, 0u64..100, 0u64..50, 0u64..300);
    (
        wrong,
        1u64..3_000,
        0u64..2_000,
        0.1f64..20.0,
        8_000u64..1_000_000,
    )
        .prop_map(
            |(
                (loss, duplication, corruption, reordering),
                delay,
                jitter,
                nanos_per_byte,
                queue,
            )| {
                Profile {
                    loss,
                    duplication,
                    corruption,
                    reordering,
                    delay: Duration::from_micros(delay),
                    jitter: Duration::from_micros(jitter),
                    nanos_per_byte,
                    queue_bytes: queue,
                }
            },
        )
}

fn any_len() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0usize),
        1usize..200,
        (1usize..60).prop_map(|granules| granules * 64),
        1usize..20_000,
        1usize..300_000,
    ]
}

pub(crate) fn any_plan() -> impl Strategy<Value = Plan> {
    let late = prop_oneof![3 => Just(0u64), 1 => 0u64..30_000];
    (0usize..2, 0u32..4, any_len(), late).prop_map(|(from, slot, len, late)| Plan {
        from,
        slot,
        len,
        grant_late: Duration::from_micros(late),
        cancel: None,
    })
}

pub(crate) fn any_config() -> impl Strategy<Value = Config> {
    let congestion = prop_oneof![
        Just(Algorithm::Tolerant),
        (20_000u64..1_000_000).prop_map(Algorithm::Fixed)
    ];
    (congestion, 512u16..9_000, 4u32..1_000, 1u32..20).prop_map(
        |(congestion, datagram_max, credit, ack_every)| Config {
            congestion,
            datagram_max,
            receive_credit: credit,
            remote_credit: credit,
            ack_every,
            // Four losses in five must not make a path lost here.
            pto_limit: 60,
            idle_limit: Duration::from_secs(10),
            ..Config::default()
        },
    )
}

proptest! {
    #[test]
    fn every_transfer_arrives_whole_and_both_ends_know(
        config in any_config(),
        profile in any_profile(),
        plans in proptest::collection::vec(any_plan(), 1..30),
        seed: u64,
    ) {
        let mut pair = Pair::new(&config, profile, seed);
        let count = plans.len();
        for plan in plans {
            pair.plan(plan);
        }
        pair.run(MINUTE);
        for side in &pair.sides {
            prop_assert_eq!(&side.others, &[]);
            prop_assert!(side.ends.values().all(Result::is_ok), "{:?}", side.ends);
        }
        prop_assert_eq!(pair.sides[0].ends.len(), count);
        prop_assert_eq!(pair.sides[1].ends.len(), count);
        for ((id, outgoing), digest) in &pair.sides[0].ends {
            prop_assert_eq!(pair.sides[1].ends.get(&(*id, !outgoing)), Some(digest));
        }
    }

    #[test]
    fn a_transfer_given_up_ends_once_at_both_ends(
        profile in any_profile(),
        plans in proptest::collection::vec((any_plan(), 0u64..20_000, 0usize..2), 1..20),
        seed: u64,
    ) {
        let config = Config { pto_limit: 60, idle_limit: Duration::from_secs(10), ..Config::default() };
        let mut pair = Pair::new(&config, profile, seed);
        let count = plans.len();
        for (plan, after, end) in plans {
            pair.plan(Plan { cancel: Some((Duration::from_micros(after), end)), ..plan });
        }
        pair.run(MINUTE);
        for end in 0..2 {
            prop_assert_eq!(pair.sides[end].ends.len(), count);
            for ((id, outgoing), result) in &pair.sides[end].ends {
                let there = pair.sides[1 - end].ends[&(*id, !outgoing)];
                let given_up = [FailReason::Cancelled, FailReason::CancelledByPeer];
                prop_assert!(result.is_ok() || given_up.contains(&result.unwrap_err()));
                // Received is proof that it was sent; sent is proof that all was
                // applied, though the receiver may have given it up since.
                if !outgoing && result.is_ok() {
                    prop_assert_eq!(there, *result);
                }
            }
        }
    }
}

pub(crate) fn plain(from: usize, slot: u32, len: usize) -> Plan {
    Plan {
        from,
        slot,
        len,
        grant_late: Duration::ZERO,
        cancel: None,
    }
}

#[test]
fn ten_thousand_small_transfers_at_once() {
    let mut pair = Pair::new(&Config::default(), Profile::CLEAN, 1);
    for slot in 0..10_000 {
        pair.plan(plain((slot % 2) as usize, slot, 100));
    }
    pair.run(MINUTE);
    assert!(pair.sides.iter().all(|side| side.ends.len() == 10_000));
    assert!(
        pair.sides
            .iter()
            .flat_map(|side| side.ends.values())
            .all(Result::is_ok)
    );
}

#[test]
fn a_clean_link_sees_nothing_twice_and_no_probe_timeout() {
    let mut pair = Pair::new(&Config::default(), Profile::CLEAN, 2);
    pair.plan(plain(0, 0, 4 << 20));
    let begin = pair.now;
    pair.run(MINUTE);
    let stats = pair.connections[0].stats();
    assert_eq!(
        (stats.retransmits.total(), stats.ptos, stats.dropped()),
        (0, 0, 0)
    );
    assert_eq!(stats.bytes_sent, 4 << 20);
    let acks = pair.connections[1].stats().acks_sent;
    assert!((290..320).contains(&acks), "{acks} for 2979 segments");
    // 10 GB/s: 0.42 ms on the wire, and the start-up.
    assert!(
        pair.now.since(begin) < Duration::from_millis(2),
        "{:?}",
        pair.now.since(begin)
    );
}

#[test]
fn the_sender_knows_one_round_trip_after_the_last_byte() {
    let delay = Duration::from_millis(1);
    let mut pair = Pair::new(
        &Config::default(),
        Profile {
            delay,
            ..Profile::CLEAN
        },
        3,
    );
    let begin = pair.now;
    pair.plan(plain(0, 0, 1000));
    while pair.sides[0].ends.is_empty() {
        assert!(pair.step());
    }
    let took = pair.sides[0].ended_at.since(begin);
    assert!(took < delay * 2 + Duration::from_micros(10), "{took:?}");
}

#[test]
fn a_dead_link_fails_what_is_under_way_at_both_ends() {
    let dead = Profile {
        loss: 1000,
        ..Profile::CLEAN
    };
    let mut pair = Pair::new(&Config::default(), dead, 4);
    pair.plan(plain(0, 0, 100_000));
    pair.plan(plain(1, 0, 0));
    while pair.step() {}
    let lost = Event::PathLost {
        reason: PathLostReason::Silent(Duration::from_secs(2)),
    };
    for side in &pair.sides {
        assert_eq!(side.others, std::slice::from_ref(&lost));
        assert_eq!(side.ends.len(), 2);
        assert!(
            side.ends
                .values()
                .all(|end| *end == Err(FailReason::PathLost))
        );
    }
}

#[test]
fn probes_measure_the_round_trip_through_loss() {
    for seed in 0..20 {
        let profile = Profile {
            loss: 400,
            delay: Duration::from_millis(2),
            ..Profile::CLEAN
        };
        let mut pair = Pair::new(&Config::default(), profile, seed);
        let now = pair.now;
        pair.connections[0].probe(now);
        while pair.step() {}
        let [Event::PathValidated { rtt }] = pair.sides[0].others[..] else {
            panic!("seed {seed}: {:?}", pair.sides[0].others);
        };
        // The answer may have been sent again, so it can come late, never early.
        assert!(rtt >= Duration::from_millis(4), "seed {seed}: {rtt:?}");
        assert_eq!(
            pair.connections.each_ref().map(|end| end.is_idle()),
            [true; 2]
        );
    }
}

#[test]
fn close_reaches_the_peer_and_fails_its_transfers() {
    let mut pair = Pair::new(&Config::default(), Profile::CLEAN, 5);
    pair.plan(plain(0, 0, 10 << 20));
    for _ in 0..50 {
        pair.step();
    }
    pair.connections[1].close(9);
    while pair.step() {}
    let reasons = [CloseReason::Peer(9), CloseReason::Local(9)];
    for (side, reason) in pair.sides.iter().zip(reasons) {
        assert_eq!(side.others, [Event::Closed { reason }]);
        assert_eq!(
            side.ends.values().collect::<Vec<_>>(),
            [&Err(FailReason::Closed)]
        );
    }
}

#[test]
fn ends_that_disagree_on_the_length_both_fail() {
    for (sent, granted) in [
        (1000, 5000),
        (5000, 1000),
        (0, 5000),
        (6400, 64),
        (64, 6400),
    ] {
        let mut pair = Pair::new(&Config::default(), Profile::CLEAN, 6);
        let id = TransferId {
            slot: 0,
            generation: 1,
        };
        pair.disagree(id, sent, granted);
        while pair.sides.iter().any(|side| side.ends.is_empty()) {
            assert!(pair.step() && pair.now < MINUTE, "{sent} against {granted}");
        }
        for side in &pair.sides {
            assert!(
                side.ends
                    .values()
                    .all(|end| *end == Err(FailReason::LengthMismatch)),
                "{sent} against {granted}: {:?}",
                side.ends
            );
        }
    }
}

#[test]
fn one_percent_of_loss_costs_little() {
    let profile = Profile {
        loss: 10,
        ..Profile::CLEAN
    };
    let mut pair = Pair::new(&Config::default(), profile, 7);
    pair.plan(plain(0, 0, 4 << 20));
    pair.run(MINUTE);
    let stats = pair.connections[0].stats();
    let segments = (4 << 20) / 1408;
    assert!(stats.retransmits.total() >= segments / 200, "{stats:?}");
    assert!(
        stats.retransmits.total() < segments / 40,
        "no more than what was lost: {stats:?}"
    );
    assert_eq!(
        pair.connections[1].stats().duplicate_segments,
        0,
        "{stats:?}"
    );
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let profile = Profile {
            loss: 50,
            reordering: 100,
            jitter: Duration::from_micros(50),
            ..Profile::CLEAN
        };
        let mut pair = Pair::new(&Config::default(), profile, 8);
        pair.plan(plain(0, 0, 1 << 20));
        pair.run(MINUTE);
        (pair.now, pair.connections[0].stats())
    };
    assert_eq!(run(), run());
}

#[test]
fn a_source_that_changes_while_it_is_sent_is_found_out() {
    let mut found = 0;
    for seed in 0..8 {
        let profile = Profile {
            loss: 100,
            ..Profile::CLEAN
        };
        let mut pair = Pair::new(&Config::default(), profile, seed);
        let id = TransferId {
            slot: 0,
            generation: 1,
        };
        pair.plan(plain(0, 0, 1 << 20));
        let mut random = Random(seed);
        while pair.sides.iter().any(|side| side.ends.is_empty()) {
            pair.scribble(id, random.next());
            assert!(pair.step() && pair.now < MINUTE);
        }
        let ends = pair
            .sides
            .each_ref()
            .map(|side| *side.ends.values().next().unwrap());
        assert_eq!(
            ends,
            [Err::<Digest, _>(FailReason::DigestMismatch); 2],
            "seed {seed}"
        );
        found += 1;
    }
    assert_eq!(found, 8);
}

/// Which share of a link's capacity a transfer of 16 MiB gets.
fn share(profile: Profile) -> (f64, String) {
    let mut pair = Pair::new(&Config::default(), profile, 9);
    let len = 16 << 20;
    pair.plan(plain(0, 0, len));
    let begin = pair.now;
    pair.run(MINUTE);
    let took = pair.sides[0].ended_at.since(begin).as_nanos() as f64;
    let share = len as f64 * profile.nanos_per_byte / took;
    (
        share,
        format!("{share:.2} {:?}", pair.connections[0].stats()),
    )
}

#[test]
fn a_bottleneck_is_filled_and_its_queue_survived() {
    // 1 GB/s; the window that fills it is 100 kB without a queue.
    let link = Profile {
        nanos_per_byte: 1.0,
        delay: Duration::from_micros(50),
        ..Profile::CLEAN
    };
    for queue_bytes in [20_000, 50_000, 200_000, 1 << 20] {
        let (share, stats) = share(Profile {
            queue_bytes,
            ..link
        });
        println!("queue {queue_bytes}: {stats}");
        assert!(share > 0.7, "queue {queue_bytes}: {stats}");
    }
    let (share, stats) = share(Profile { loss: 10, ..link });
    println!("1 % loss: {stats}");
    assert!(share > 0.7, "1 % loss: {stats}");
}
