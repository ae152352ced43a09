//! The same with sealed packets: keys change in the middle, and what somebody
//! recorded, changed or made up is worth nothing.

use genie_proto::{Config, DropCause};
use proptest::prelude::*;

use crate::network::{Profile, Random};
use crate::pair::Pair;
use crate::{MINUTE, any_config, any_plan, any_profile, plain};

proptest! {
    /// Epochs hardly longer than what may be in flight, so that keys change many
    /// times, with loss, repetition, corruption and reordering around each change.
    #[test]
    fn every_transfer_arrives_whole_while_keys_change(
        config in any_config(),
        profile in any_profile(),
        plans in proptest::collection::vec(any_plan(), 1..20),
        epoch_bits in 11u32..13,
        seed: u64,
    ) {
        let mut pair = Pair::sealed(&config, profile, seed, epoch_bits);
        let count = plans.len();
        for plan in plans {
            pair.plan(plan);
        }
        pair.run(MINUTE);
        for side in &pair.sides {
            prop_assert_eq!(&side.others, &[]);
            prop_assert!(side.ends.values().all(Result::is_ok), "{:?}", side.ends);
            prop_assert_eq!(side.ends.len(), count);
        }
        for connection in &pair.connections {
            // Corruption is found by the tag, before the protocol looks.
            let stats = connection.stats();
            for cause in [DropCause::HeaderCheck, DropCause::PayloadCheck, DropCause::Body] {
                prop_assert_eq!(stats.drops(cause), 0, "{:?}", cause);
            }
            prop_assert_eq!(stats.drops(DropCause::DuplicatePacket), 0);
        }
    }
}

/// A bad link, for tests that look at its counts.
const ROUGH: Profile = Profile {
    loss: 50,
    duplication: 20,
    corruption: 20,
    reordering: 50,
    ..Profile::CLEAN
};

/// Runs a transfer of many epochs and keeps what was delivered.
fn recorded(seed: u64) -> (Pair, Vec<(usize, Vec<u8>)>) {
    let mut pair = Pair::sealed(&Config::default(), ROUGH, seed, 10);
    pair.record = Some(Vec::new());
    pair.plan(plain(0, 0, 8 << 20));
    pair.plan(plain(1, 1, 1 << 20));
    pair.run(MINUTE);
    let record = pair.record.take().expect("set above");
    assert!(record.len() > 6000, "{} datagrams", record.len());
    (pair, record)
}

fn packets(pair: &Pair) -> [u64; 2] {
    let stats = pair.connections.each_ref().map(|end| end.stats());
    stats.map(|stats| stats.packets_received)
}

fn drops(pair: &Pair, causes: &[DropCause]) -> u64 {
    let stats = pair.connections.each_ref().map(|end| end.stats());
    let drops = |cause: &DropCause| stats.iter().map(|stats| stats.drops(*cause)).sum::<u64>();
    causes.iter().map(drops).sum()
}

#[test]
fn a_recorded_packet_is_never_accepted_again() {
    let seed = 11;
    let (mut pair, record) = recorded(seed);
    let (accepted, duplicates) = (packets(&pair), drops(&pair, &[DropCause::Replayed]));
    assert!(duplicates > 50, "seed {seed}: the link repeats packets");
    let causes = [
        DropCause::Replayed,
        DropCause::OldEpoch,
        DropCause::Forged,
        DropCause::Length,
    ];
    let before = drops(&pair, &causes);
    for (to, datagram) in &record {
        pair.deliver(*to, datagram);
    }
    assert_eq!(packets(&pair), accepted, "seed {seed}");
    assert_eq!(
        drops(&pair, &causes) - before,
        record.len() as u64,
        "seed {seed}: every one is counted"
    );
    // Eight thousand packets, a thousand an epoch: most keys are gone.
    let old = drops(&pair, &[DropCause::OldEpoch]);
    assert!(old > record.len() as u64 / 3, "seed {seed}: {old}");
}

#[test]
fn a_recorded_session_is_worth_nothing_in_the_next() {
    let (_, record) = recorded(12);
    // The same session ids, other keys: what a new handshake gives.
    let mut next = Pair::sealed(&Config::default(), Profile::CLEAN, 13, 10);
    next.plan(plain(0, 0, 8 << 20));
    next.step();
    let accepted = packets(&next);
    for (to, datagram) in &record {
        next.deliver(*to, datagram);
    }
    assert_eq!(packets(&next), accepted);
    let causes = [DropCause::Forged, DropCause::Length];
    assert_eq!(drops(&next, &causes), record.len() as u64);
    next.run(MINUTE);
    assert!(next.sides[1].ends.values().all(Result::is_ok));
}

#[test]
fn plain_packets_are_not_taken_where_sealed_ones_are_agreed_on() {
    let mut plain_pair = Pair::new(&Config::default(), Profile::CLEAN, 14);
    plain_pair.record = Some(Vec::new());
    plain_pair.plan(plain(0, 0, 1 << 20));
    plain_pair.run(MINUTE);
    let record = plain_pair.record.take().expect("set above");
    let mut sealed = Pair::sealed(&Config::default(), Profile::CLEAN, 14, 10);
    for (to, datagram) in &record {
        sealed.deliver(*to, datagram);
    }
    assert_eq!(packets(&sealed), [0, 0]);
    let causes = [DropCause::Forged, DropCause::Length];
    assert_eq!(drops(&sealed, &causes), record.len() as u64);
}

#[test]
fn made_up_packets_cost_a_session_nothing_but_their_count() {
    let mut pair = Pair::sealed(&Config::default(), Profile::CLEAN, 15, 10);
    pair.record = Some(Vec::new());
    pair.plan(plain(0, 0, 1 << 20));
    let mut random = Random(15);
    let mut forged = 0;
    for _ in 0..200 {
        pair.step();
        let Some((to, good)) = pair.record.as_mut().and_then(Vec::pop) else {
            continue;
        };
        let mut bad = good;
        let at = random.below(bad.len() as u64) as usize;
        if (4..8).contains(&at) {
            // Another session id is for somebody else.
            continue;
        }
        bad[at] ^= 1 << random.below(8);
        if at == 0 && bad[0] >> 4 != 1 {
            continue;
        }
        // Numbers far ahead must not make the window forget.
        pair.deliver(to, &bad);
        pair.record = Some(Vec::new());
        forged += 1;
    }
    assert!(forged > 50, "{forged}");
    pair.run(MINUTE);
    assert!(pair.sides[1].ends.values().all(Result::is_ok));
    let causes = [DropCause::Forged, DropCause::Replayed, DropCause::OldEpoch];
    assert_eq!(drops(&pair, &causes), forged);
    assert_eq!(pair.connections[0].stats().retransmits.total(), 0);
}
