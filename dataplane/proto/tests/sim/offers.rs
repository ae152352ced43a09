//! Small tensors in one packet each, both ways over a bad network.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use genie_proto::wire::{Body, HEADER_LEN, Header, Kind, Metadata};
use genie_proto::{Config, Connection, Event, FailReason, OfferError, Segment, SessionId, Time};
use genie_proto::{Digest, DropCause, TransferId};
use proptest::prelude::*;

use crate::network::{Network, Profile, Random};
use crate::{MINUTE, any_profile};

const LEN_MAX: u32 = 400;

#[derive(Default)]
struct Side {
    /// What was offered, and what for.
    sources: BTreeMap<TransferId, (Vec<u8>, Metadata)>,
    slots: Vec<u8>,
    held: BTreeSet<u32>,
    /// What was delivered, by id.
    delivered: BTreeMap<TransferId, (Vec<u8>, Metadata)>,
    sent: BTreeMap<TransferId, Digest>,
    failed: BTreeMap<TransferId, FailReason>,
    others: Vec<Event>,
    /// When the last offer of this end was over.
    ended_at: Time,
}

struct Offers {
    now: Time,
    connections: [Connection; 2],
    sides: [Side; 2],
    network: Network,
    random: Random,
    /// Tensors that each end has still to offer.
    left: [usize; 2],
    cancels: bool,
    refused: usize,
}

fn config(slots: u16) -> Config {
    Config {
        offers: slots,
        offer_len_max: LEN_MAX,
        pto_limit: 60,
        idle_limit: Duration::from_secs(10),
        ..Config::default()
    }
}

impl Offers {
    fn new(slots: u16, count: [usize; 2], profile: Profile, seed: u64) -> Self {
        let config = config(slots);
        let connection = |local, remote| {
            Connection::new(config.clone(), SessionId(local), SessionId(remote), Time(0))
        };
        let side = || Side {
            slots: vec![0; usize::from(slots) * config.offer_stride() as usize],
            ..Side::default()
        };
        let mut connections = [connection(0, 1), connection(1, 0)];
        // As an engine does: both then know that the peer is there.
        connections
            .iter_mut()
            .for_each(|one| one.probe(Time(1_000_000)));
        Self {
            now: Time(1_000_000),
            connections,
            sides: [side(), side()],
            network: Network::new(profile, seed),
            random: Random(!seed),
            left: count,
            cancels: false,
            refused: 0,
        }
    }

    fn run(&mut self) {
        loop {
            while let Some((to, datagram)) = self.network.arrived(self.now) {
                self.deliver(to, &datagram);
            }
            for end in 0..2 {
                self.offer(end);
                self.release(end);
                self.connections[end].handle_timeout(self.now);
                self.transmit(end);
                self.collect(end);
            }
            let timers = self.connections.iter().filter_map(Connection::poll_timeout);
            // The application comes by now and then, too.
            let again = (self.left != [0, 0]).then(|| self.now + Duration::from_micros(50));
            let next = timers.chain(self.network.next_arrival()).chain(again).min();
            let Some(next) = next else { break };
            assert!(next < MINUTE, "still {:?} to offer", self.left);
            self.now = next.max(self.now + Duration::from_nanos(100));
        }
    }

    fn offer(&mut self, end: usize) {
        while self.left[end] > 0 {
            let len = self.random.below(u64::from(LEN_MAX) + 1);
            let metadata: Metadata = (0..self.random.below(20) as u8).collect();
            match self.connections[end].offer(len, metadata.clone()) {
                Ok(id) => {
                    let source = self.random.bytes(len as usize);
                    let earlier = self.sides[end].sources.insert(id, (source, metadata));
                    assert!(earlier.is_none(), "an id names one offer");
                    self.left[end] -= 1;
                    if self.cancels && self.random.happens(200) {
                        self.connections[end].cancel(id, true);
                    }
                }
                Err(OfferError::NotGranted) => {
                    self.refused += 1;
                    return;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn release(&mut self, end: usize) {
        let side = &mut self.sides[end];
        let random = &mut self.random;
        let connection = &mut self.connections[end];
        side.held.retain(|slot| {
            let keep = random.happens(300);
            assert!(keep || connection.release(*slot));
            keep
        });
    }

    fn deliver(&mut self, to: usize, datagram: &[u8]) {
        let side = &mut self.sides[to];
        let (slots, held) = (&mut side.slots, &side.held);
        let stride = config(1).offer_stride();
        self.connections[to].handle_datagram(self.now, datagram, datagram.len(), |segment| {
            let segment: Segment = segment.expect("the whole datagram is given");
            assert!(!held.contains(&((segment.offset / stride) as u32)));
            let from = &datagram[datagram.len() - segment.len as usize..];
            let at = segment.offset as usize;
            slots[at..at + from.len()].copy_from_slice(from);
            crc32c::crc32c(from)
        });
        self.collect(to);
    }

    fn transmit(&mut self, end: usize) {
        let sources = &self.sides[end].sources;
        let crc = |segment: Segment| crc32c::crc32c(&sources[&segment.transfer].0);
        while let Some(transmit) = self.connections[end].poll_transmit(self.now, crc) {
            let mut datagram = transmit.head.to_vec();
            if let Some(segment) = transmit.payload {
                datagram.extend_from_slice(&sources[&segment.transfer].0);
            }
            self.network.send(self.now, end, datagram);
        }
    }

    fn collect(&mut self, end: usize) {
        let side = &mut self.sides[end];
        while let Some(event) = self.connections[end].poll_event() {
            match event {
                Event::Offered {
                    transfer,
                    slot,
                    metadata,
                    digest,
                    len,
                } => {
                    let at = u64::from(slot) * config(1).offer_stride();
                    let bytes = side.slots[at as usize..(at + len) as usize].to_vec();
                    assert_eq!(digest.0, crc32c::crc32c(&bytes));
                    assert!(side.held.insert(slot));
                    let earlier = side.delivered.insert(transfer, (bytes, metadata));
                    assert!(earlier.is_none(), "{transfer:?} was delivered twice");
                }
                Event::Sent {
                    transfer, digest, ..
                } => {
                    assert!(side.sent.insert(transfer, digest).is_none());
                    side.ended_at = self.now;
                }
                Event::Failed {
                    transfer,
                    outgoing: true,
                    reason,
                } => assert!(side.failed.insert(transfer, reason).is_none()),
                Event::PathValidated { .. } => {}
                other => side.others.push(other),
            }
        }
    }
}

proptest! {
    #[test]
    fn every_offer_is_delivered_once_and_its_sender_knows(
        profile in any_profile(),
        slots in 1u16..40,
        count in (0usize..150, 0usize..150),
        seed: u64,
    ) {
        let mut offers = Offers::new(slots, [count.0, count.1], profile, seed);
        offers.run();
        for end in 0..2 {
            let (from, to) = (&offers.sides[end], &offers.sides[1 - end]);
            prop_assert_eq!(&from.others, &[]);
            prop_assert_eq!(from.sources.len(), [count.0, count.1][end]);
            prop_assert_eq!(&from.sources, &to.delivered);
            prop_assert!(from.failed.is_empty(), "{:?}", from.failed);
            for (id, (bytes, _)) in &from.sources {
                prop_assert_eq!(from.sent.get(id), Some(&Digest(crc32c::crc32c(bytes))));
            }
        }
    }

    #[test]
    fn an_offer_given_up_ends_once_and_the_others_arrive(
        profile in any_profile(),
        slots in 1u16..40,
        count in 1usize..150,
        seed: u64,
    ) {
        let mut offers = Offers::new(slots, [count, 0], profile, seed);
        offers.cancels = true;
        offers.run();
        let [from, to] = &offers.sides;
        prop_assert_eq!(&from.others, &[]);
        prop_assert_eq!(from.sent.len() + from.failed.len(), count);
        prop_assert!(from.failed.values().all(|reason| *reason == FailReason::Cancelled));
        for (id, source) in &from.sources {
            prop_assert!(from.sent.contains_key(id) != from.failed.contains_key(id));
            // One that was given up may have arrived all the same, and whole.
            prop_assert!(!from.sent.contains_key(id) || to.delivered.contains_key(id));
            prop_assert!(to.delivered.get(id).is_none_or(|delivered| delivered == source));
        }
    }
}

/// One round trip from offer to its end, and many in it.
#[test]
fn a_burst_of_offers_ends_after_one_round_trip() {
    let mut offers = Offers::new(64, [0, 0], Profile::CLEAN, 1);
    offers.run();
    let began = offers.now;
    // As many as the first congestion window has room for.
    offers.left = [32, 0];
    offers.run();
    assert_eq!((offers.sides[0].sent.len(), offers.refused), (32, 0));
    let stats = offers.connections[1].stats();
    assert_eq!(stats.offers_received, 32);
    assert_eq!(offers.connections[0].stats().retransmits.total(), 0);
    // Two delays, and what the link takes for the bytes.
    let took = offers.sides[0].ended_at.since(began);
    assert!(took < 3 * Profile::CLEAN.delay, "{took:?}");
}

#[test]
fn a_source_that_changes_before_it_is_sent_again_fails_and_blocks_nothing() {
    let mut offers = Offers::new(4, [0, 0], Profile::CLEAN, 2);
    offers.run();
    offers.left = [1, 0];
    offers.offer(0);
    let (&id, _) = offers.sides[0].sources.iter().next().unwrap();
    // Sent, and lost.
    let lost = |segment: Segment| crc32c::crc32c(&vec![1; segment.len as usize]);
    assert!(
        offers.connections[0]
            .poll_transmit(offers.now, lost)
            .is_some()
    );
    offers.left = [9, 0];
    offers.run();
    assert_eq!(
        offers.sides[0].failed.get(&id),
        Some(&FailReason::DigestMismatch)
    );
    assert_eq!(offers.sides[0].sent.len(), 9);
    assert_eq!(offers.sides[1].delivered.len(), 9);
    assert_eq!(
        offers.connections[1].stats().drops(DropCause::NotGranted),
        0
    );
}

/// Acknowledgements travel with offers, which have no room for credit and no
/// time of their own: an ACK goes out for those.
#[test]
fn credit_and_round_trips_are_told_while_both_ends_offer_all_the_time() {
    let ids = [SessionId(1), SessionId(2)];
    let config = Config {
        receive_credit: 16,
        ..config(64)
    };
    let end = |own: usize| Connection::new(config.clone(), ids[own], ids[1 - own], Time(0));
    let mut ends = [end(0), end(1)];
    ends.iter_mut().for_each(|end| end.probe(Time(0)));
    let (mut told, mut rounds) = (false, 0);
    while !(told && rounds > 400) {
        rounds += 1;
        assert!(rounds < 2000, "nothing is told");
        let now = Time(rounds * 20_000);
        if rounds == 300 {
            ends[0].set_receive_credit(20);
        }
        let mut acks = [0, 0];
        for from in [0, 1] {
            if rounds > 50 {
                let _ = ends[from].offer(0, Metadata::new());
            }
            while let Some(transmit) = ends[from].poll_transmit(now, |_| 0) {
                let (header, _) = Header::parse(&transmit.head, transmit.head.len()).unwrap();
                if let (Kind::Ack, Ok(Body::Ack(ack))) = (
                    header.kind,
                    Body::parse(header.kind, &transmit.head[HEADER_LEN..]),
                ) {
                    acks[from] += 1;
                    told |= ack.credit == 20;
                }
                let to = &mut ends[1 - from];
                to.handle_datagram(now, &transmit.head, transmit.head.len(), |_| 0);
            }
            ends[from].handle_timeout(now);
            while let Some(event) = ends[1 - from].poll_event() {
                if let Event::Offered { slot, .. } = event {
                    assert!(ends[1 - from].release(slot));
                }
            }
        }
    }
    let [one, other] = ends.map(|end| end.stats());
    assert!(one.offers_received > 300 && other.offers_received > 300);
    // Few: one for 64 offers that take it along, and what credit takes.
    for end in [one, other] {
        assert!((5..200).contains(&end.acks_sent), "{}", end.acks_sent);
    }
}

/// What an offer acknowledges is acted on after the offer itself was delivered, but
/// before anything that it decides: nothing that arrived is reported as failed.
#[test]
fn what_an_offer_acknowledged_has_arrived_whatever_comes_next() {
    let ids = [SessionId(1), SessionId(2)];
    type Step = fn(&mut Connection, TransferId);
    let steps: [(&str, Step); 4] = [
        ("closed", |one, _| one.close(0)),
        ("cancelled", |one, id| one.cancel(id, true)),
        ("timed", |one, _| one.handle_timeout(Time(60_000))),
        ("turned", |one, _| {
            while one.poll_transmit(Time(60_000), |_| 0).is_some() {}
        }),
    ];
    for (what, step) in steps {
        let end = |own: usize| Connection::new(config(64), ids[own], ids[1 - own], Time(0));
        let mut ends = [end(0), end(1)];
        ends.iter_mut().for_each(|end| end.probe(Time(0)));
        let carry = |ends: &mut [Connection; 2], from: usize, now: u64| {
            while let Some(transmit) = ends[from].poll_transmit(Time(now), |_| 0) {
                let len = transmit.head.len();
                ends[1 - from].handle_datagram(Time(now), &transmit.head, len, |_| 0);
            }
        };
        for now in (0..40_000).step_by(5_000) {
            (0..2).for_each(|from| carry(&mut ends, from, now));
            ends.iter_mut()
                .for_each(|end| end.handle_timeout(Time(now)));
        }
        ends.iter_mut()
            .for_each(|end| while end.poll_event().is_some() {});
        let there = ends[0].offer(0, Metadata::new()).expect("granted");
        carry(&mut ends, 0, 50_000);
        ends[1].offer(0, Metadata::new()).expect("granted");
        carry(&mut ends, 1, 51_000);
        let first = ends[0].poll_event();
        assert!(matches!(first, Some(Event::Offered { .. })), "{what}");
        assert_eq!(ends[0].poll_event(), None, "{what}: not yet");
        step(&mut ends[0], there);
        let next = ends[0].poll_event();
        assert!(
            matches!(next, Some(Event::Sent { transfer, .. }) if transfer == there),
            "{what}: {next:?}"
        );
    }
}
