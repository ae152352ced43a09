//! Many senders to one receiver whose ring is smaller than what they would send.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use genie_proto::congestion::Algorithm;
use genie_proto::{Config, Connection, Credit, Event, SessionId, Time, TransferId};
use proptest::prelude::*;

use crate::network::Random;

const SENDERS: usize = 32;

/// Receive descriptors; half of them are given out as credit.
const RING: usize = 256;

/// One way.
const DELAY: Duration = Duration::from_micros(8);

/// What the receiver takes for a packet: slower than they come.
const POLL: Duration = Duration::from_nanos(700);

/// Packets on their way: when they arrive, in which order, whose, and what.
type Way = BinaryHeap<Reverse<(Time, u64, usize, Vec<u8>)>>;

/// A sender, and the receiver's end of it.
struct Flow {
    sender: Connection,
    receiver: Connection,
    begins: Time,
    len: usize,
    begun: bool,
    received: bool,
    sent: bool,
}

struct Incast {
    now: Time,
    flows: Vec<Flow>,
    credit: Credit,
    to_ring: Way,
    to_senders: Way,
    ring: VecDeque<(usize, Vec<u8>)>,
    polled: Time,
    order: u64,
    fullest: usize,
    overrun: u64,
}

impl Incast {
    fn new(seed: u64, together: bool) -> Self {
        let mut random = Random(seed);
        let total = RING as u32 / 2;
        let config = Config {
            // Only credit keeps these from sending all at once.
            congestion: Algorithm::Fixed(64 << 20),
            remote_credit: Credit::first(total),
            receive_credit: Credit::first(total),
            ..Config::default()
        };
        let flow = |index: usize| {
            let ids = [index as u32 + 1, index as u32 + 1001].map(SessionId);
            let late = if together { 0 } else { random.below(3_000_000) };
            Flow {
                sender: Connection::new(config.clone(), ids[0], ids[1], Time(0)),
                receiver: Connection::new(config.clone(), ids[1], ids[0], Time(0)),
                begins: Time(1_000_000 + late),
                len: 1 + random.below(2 << 20) as usize,
                begun: false,
                received: false,
                sent: false,
            }
        };
        Self {
            now: Time(1_000_000),
            flows: (0..SENDERS).map(flow).collect(),
            credit: Credit::new(total),
            to_ring: BinaryHeap::new(),
            to_senders: BinaryHeap::new(),
            ring: VecDeque::new(),
            polled: Time(0),
            order: 0,
            fullest: 0,
            overrun: 0,
        }
    }

    fn run(&mut self) {
        let limit = Time(60_000_000_000);
        while !self.flows.iter().all(|flow| flow.sent && flow.received) {
            assert!(self.now < limit, "it takes for ever");
            self.step();
        }
    }

    fn step(&mut self) {
        let id = TransferId {
            slot: 0,
            generation: 1,
        };
        for flow in &mut self.flows {
            if !flow.begun && flow.begins <= self.now {
                flow.begun = true;
                flow.receiver.receive(id, flow.len as u64).unwrap();
                flow.sender.send(id, flow.len as u64).unwrap();
            }
        }
        let flows = &mut self.flows;
        self.credit.balance(self.now, |visit| {
            for (index, flow) in flows.iter_mut().enumerate() {
                let peer = IpAddr::from((index as u32).to_be_bytes());
                visit(peer, flow.begun && !flow.received, &mut flow.receiver);
            }
        });
        while let Some(Reverse((at, ..))) = self.to_ring.peek()
            && *at <= self.now
            && let Some(Reverse((.., from, datagram))) = self.to_ring.pop()
        {
            if self.ring.len() == RING {
                self.overrun += 1;
            } else {
                self.ring.push_back((from, datagram));
                self.fullest = self.fullest.max(self.ring.len());
            }
        }
        while let Some(Reverse((at, ..))) = self.to_senders.peek()
            && *at <= self.now
            && let Some(Reverse((.., to, datagram))) = self.to_senders.pop()
        {
            take(&mut self.flows[to].sender, self.now, &datagram);
        }
        if self.polled <= self.now
            && let Some((from, datagram)) = self.ring.pop_front()
        {
            take(&mut self.flows[from].receiver, self.now, &datagram);
            self.polled = self.now + POLL;
        }
        self.transmit();
        self.collect();
        self.go_on();
    }

    fn transmit(&mut self) {
        for (index, flow) in self.flows.iter_mut().enumerate() {
            let ends = [
                (&mut flow.sender, &mut self.to_ring),
                (&mut flow.receiver, &mut self.to_senders),
            ];
            for (connection, way) in ends {
                if connection.poll_timeout().is_some_and(|at| at <= self.now) {
                    connection.handle_timeout(self.now);
                }
                let zeros = |len: u32| vec![0; len as usize];
                let crc = |segment: genie_proto::Segment| crc32c::crc32c(&zeros(segment.len));
                while let Some(transmit) = connection.poll_transmit(self.now, crc) {
                    let mut datagram = transmit.head.to_vec();
                    datagram.extend(transmit.payload.map_or(Vec::new(), |one| zeros(one.len)));
                    self.order += 1;
                    way.push(Reverse((self.now + DELAY, self.order, index, datagram)));
                }
            }
        }
    }

    fn collect(&mut self) {
        for flow in &mut self.flows {
            while let Some(event) = flow.receiver.poll_event() {
                assert!(matches!(event, Event::Received { .. }), "{event:?}");
                flow.received = true;
            }
            while let Some(event) = flow.sender.poll_event() {
                assert!(matches!(event, Event::Sent { .. }), "{event:?}");
                flow.sent = true;
            }
        }
    }

    fn go_on(&mut self) {
        let ends = self
            .flows
            .iter()
            .flat_map(|flow| [&flow.sender, &flow.receiver]);
        let timers = ends.filter_map(Connection::poll_timeout);
        let begins = self
            .flows
            .iter()
            .filter(|flow| !flow.begun)
            .map(|flow| flow.begins);
        let ways = [&self.to_ring, &self.to_senders];
        let arrivals = ways.into_iter().filter_map(|way| Some(way.peek()?.0.0));
        let poll = (!self.ring.is_empty()).then_some(self.polled);
        let next = timers.chain(begins).chain(arrivals).chain(poll).min();
        let next = next.expect("something is always to come");
        self.now = next.max(self.now + Duration::from_nanos(1));
    }

    /// Packets that were sent again.
    fn retransmits(&self) -> u64 {
        let lost = self.flows.iter().map(|flow| flow.sender.stats());
        lost.map(|stats| stats.retransmits.total()).sum()
    }
}

fn take(connection: &mut Connection, now: Time, datagram: &[u8]) {
    connection.handle_datagram(now, datagram, datagram.len(), |segment| {
        let segment: genie_proto::Segment = segment.expect("the whole datagram is given");
        crc32c::crc32c(&datagram[datagram.len() - segment.len as usize..])
    });
}

#[test]
fn thirty_two_that_begin_together_lose_nothing() {
    let mut incast = Incast::new(1, true);
    incast.run();
    assert_eq!((incast.overrun, incast.retransmits()), (0, 0));
    assert!(
        incast.fullest > RING / 8,
        "the ring was used: {}",
        incast.fullest
    );
}

#[test]
fn without_credit_they_would() {
    let mut incast = Incast::new(1, true);
    for flow in &mut incast.flows {
        flow.receiver.set_receive_credit(RING as u32);
    }
    incast.credit = Credit::new((SENDERS * RING) as u32);
    incast.run();
    assert!(incast.overrun > 100, "{}", incast.overrun);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn thirty_two_that_come_and_go_lose_nothing(seed: u64) {
        let mut incast = Incast::new(seed, false);
        incast.run();
        prop_assert_eq!(incast.overrun, 0, "{} at the most", incast.fullest);
    }
}
