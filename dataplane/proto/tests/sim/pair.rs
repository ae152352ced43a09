//! Two connections over a [`Network`], with memory at both ends, on a simulated clock.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use genie_proto::seal::{Opener, Sealer, Secret};
use genie_proto::transfer::GRANULE;
use genie_proto::wire::{HEADER_LEN, PLAIN_LEN, peek_session};
use genie_proto::{
    Config, Connection, Digest, Event, FailReason, Segment, SessionId, Time, TransferId,
};

use crate::network::{Network, Profile, Random};

const SESSIONS: [SessionId; 2] = [SessionId(0x1111), SessionId(0x2222)];

/// A transfer to be made.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The end that sends.
    pub(crate) from: usize,
    pub(crate) slot: u32,
    pub(crate) len: usize,
    /// How long after `send` the other end calls `receive`: too late for the first packets.
    pub(crate) grant_late: Duration,
    /// After how long which end gives it up.
    pub(crate) cancel: Option<(Duration, usize)>,
}

/// Memory that a transfer is received into.
struct Destination {
    bytes: Vec<u8>,
    verified: HashSet<u64>,
}

#[derive(Default)]
pub(crate) struct Side {
    sources: HashMap<TransferId, Vec<u8>>,
    destinations: HashMap<TransferId, Destination>,
    /// How each transfer ended, by id and direction.
    pub(crate) ends: HashMap<(TransferId, bool), Result<Digest, FailReason>>,
    pub(crate) others: Vec<Event>,
    /// When the last of them ended.
    pub(crate) ended_at: Time,
}

enum Act {
    Send(TransferId, usize, usize),
    Receive(TransferId, usize, usize),
    Cancel(TransferId, usize, usize),
}

/// What one end seals and opens packets with.
pub(crate) struct Security {
    sealer: Sealer,
    opener: Opener,
}

pub(crate) struct Pair {
    pub(crate) now: Time,
    pub(crate) connections: [Connection; 2],
    pub(crate) sides: [Side; 2],
    /// None where packets are plain.
    security: Option<[Security; 2]>,
    /// Every datagram that was delivered, and where to, if it shall be kept.
    pub(crate) record: Option<Vec<(usize, Vec<u8>)>>,
    network: Network,
    data: Random,
    /// Waiting for their slot, by sender and slot.
    plans: HashMap<(usize, u32), (u32, VecDeque<Plan>)>,
    acts: Vec<(Time, Act)>,
    unfinished: usize,
}

impl Pair {
    pub(crate) fn new(config: &Config, profile: Profile, seed: u64) -> Self {
        let connection = |local: usize| {
            Connection::new(
                config.clone(),
                SESSIONS[local],
                SESSIONS[1 - local],
                Time(0),
            )
        };
        Self {
            now: Time(1_000_000),
            connections: [connection(0), connection(1)],
            sides: Default::default(),
            security: None,
            record: None,
            network: Network::new(profile, seed),
            data: Random(!seed),
            plans: HashMap::new(),
            acts: Vec::new(),
            unfinished: 0,
        }
    }

    /// A pair that seals its packets, in epochs of `2^epoch_bits`.
    pub(crate) fn sealed(config: &Config, profile: Profile, seed: u64, epoch_bits: u32) -> Self {
        let secret = |end: usize| {
            let mut random = Random(seed ^ (0x5ec2e7 + end as u64));
            let bytes = random.bytes(32);
            Secret(bytes.try_into().expect("thirty-two were asked for"))
        };
        let security = |end: usize| Security {
            sealer: Sealer::with_epochs(&secret(end), epoch_bits),
            opener: Opener::with_epochs(&secret(1 - end), epoch_bits),
        };
        Self {
            security: Some([security(0), security(1)]),
            ..Self::new(config, profile, seed)
        }
    }

    /// Makes the transfer once its slot is free.
    pub(crate) fn plan(&mut self, plan: Plan) {
        self.unfinished += 2;
        let key = (plan.from, plan.slot);
        let (_, waiting) = self.plans.entry(key).or_default();
        waiting.push_back(plan);
        if waiting.len() == 1 {
            self.begin(key);
        }
    }

    /// Sends one length where another was granted.
    pub(crate) fn disagree(&mut self, id: TransferId, sent: usize, granted: usize) {
        self.unfinished += 2;
        self.plans.entry((0, id.slot)).or_default();
        self.acts.push((self.now, Act::Receive(id, 1, granted)));
        self.acts.push((self.now, Act::Send(id, 0, sent)));
        self.sides[0].sources.insert(id, vec![7; sent]);
    }

    /// Changes every byte of a source of end 0.
    pub(crate) fn scribble(&mut self, id: TransferId, with: u64) {
        if let Some(source) = self.sides[0].sources.get_mut(&id) {
            source.fill(with as u8);
        }
    }

    /// Runs until every planned transfer has ended at both ends and both are
    /// idle, or panics at `limit`. Then lets late packets arrive.
    pub(crate) fn run(&mut self, limit: Time) {
        while self.unfinished > 0 || !self.connections.iter().all(Connection::is_idle) {
            assert!(
                self.now < limit,
                "{} ends missing at {:?}",
                self.unfinished,
                self.now
            );
            let moves = self.step();
            assert!(
                moves || self.unfinished == 0,
                "stuck with {} missing",
                self.unfinished
            );
        }
        let ends = self.sides.each_ref().map(|side| side.ends.len());
        while self.step() && self.now < limit {}
        assert_eq!(self.sides.each_ref().map(|side| side.ends.len()), ends);
    }

    /// Does everything that is due, then goes on to when something will be.
    pub(crate) fn step(&mut self) -> bool {
        self.act();
        while let Some((to, datagram)) = self.network.arrived(self.now) {
            self.deliver(to, &datagram);
        }
        for end in 0..2 {
            if self.connections[end]
                .poll_timeout()
                .is_some_and(|at| at <= self.now)
            {
                self.connections[end].handle_timeout(self.now);
            }
            self.transmit(end);
            self.collect(end);
        }
        let timers = self.connections.iter().filter_map(Connection::poll_timeout);
        let acts = self.acts.iter().map(|(at, _)| *at);
        let next = timers.chain(acts).chain(self.network.next_arrival()).min();
        if let Some(next) = next {
            self.now = next.max(self.now + Duration::from_nanos(1));
        }
        next.is_some()
    }

    fn begin(&mut self, key: (usize, u32)) {
        let (generation, waiting) = self.plans.get_mut(&key).expect("planned before");
        let Some(plan) = waiting.front() else { return };
        *generation += 1;
        let id = TransferId {
            slot: key.1,
            generation: *generation,
        };
        let (from, len) = (plan.from, plan.len);
        self.acts.push((self.now, Act::Send(id, from, len)));
        self.acts
            .push((self.now + plan.grant_late, Act::Receive(id, 1 - from, len)));
        if let Some((after, end)) = plan.cancel {
            let at = self.now + after.max(plan.grant_late);
            self.acts.push((at, Act::Cancel(id, from, end)));
        }
        let source = self.data.bytes(len);
        self.sides[from].sources.insert(id, source);
    }

    fn act(&mut self) {
        let mut at = 0;
        while at < self.acts.len() {
            if self.acts[at].0 > self.now {
                at += 1;
                continue;
            }
            match self.acts.remove(at).1 {
                Act::Send(id, end, len) => self.connections[end].send(id, len as u64).unwrap(),
                Act::Receive(id, end, len) => {
                    let destination = Destination {
                        bytes: vec![0; len],
                        verified: HashSet::new(),
                    };
                    self.sides[end].destinations.insert(id, destination);
                    self.connections[end].receive(id, len as u64).unwrap();
                }
                Act::Cancel(id, from, end) => self.connections[end].cancel(id, end == from),
            }
        }
    }

    pub(crate) fn deliver(&mut self, to: usize, datagram: &[u8]) {
        if peek_session(datagram) != Some(SESSIONS[to]) {
            return;
        }
        if let Some(record) = &mut self.record {
            record.push((to, datagram.to_vec()));
        }
        let mut opened = datagram.to_vec();
        if let Some(security) = &mut self.security {
            match security[to].opener.open(&mut opened) {
                Ok(len) => opened.truncate(len),
                Err(error) => return self.connections[to].handle_dropped(error.into()),
            }
        }
        let datagram = &opened[..];
        let side = &mut self.sides[to];
        let before = self.connections[to].stats().bytes_received;
        let mut placed = None;
        self.connections[to].handle_datagram(self.now, datagram, datagram.len(), |segment| {
            let segment: genie_proto::Segment = segment.expect("the whole datagram is given");
            let payload = &datagram[HEADER_LEN..];
            let destination = side
                .destinations
                .get_mut(&segment.transfer)
                .expect("granted");
            let begin = segment.offset as usize;
            for granule in granules(&segment) {
                assert!(
                    !destination.verified.contains(&granule),
                    "verified bytes are final"
                );
            }
            destination.bytes[begin..begin + segment.len as usize].copy_from_slice(payload);
            placed = Some(segment);
            crc32c::crc32c(payload)
        });
        if let Some(segment) = placed
            && self.connections[to].stats().bytes_received > before
            && let Some(destination) = side.destinations.get_mut(&segment.transfer)
        {
            destination.verified.extend(granules(&segment));
        }
        self.collect(to);
    }

    fn transmit(&mut self, end: usize) {
        let side = &self.sides[end];
        let bytes = |segment: Segment| {
            let begin = segment.offset as usize;
            &side.sources[&segment.transfer][begin..begin + segment.len as usize]
        };
        let crc = |segment| crc32c::crc32c(bytes(segment));
        while let Some(transmit) = self.connections[end].poll_transmit(self.now, crc) {
            let mut datagram = transmit.head.to_vec();
            datagram.extend_from_slice(transmit.payload.map_or(&[], bytes));
            if let Some(security) = &mut self.security {
                let (plain, rest) = datagram
                    .split_first_chunk_mut::<PLAIN_LEN>()
                    .expect("a header is longer");
                let tag = security[end].sealer.seal(plain, rest);
                datagram.extend_from_slice(&tag);
            }
            self.network.send(self.now, end, datagram);
        }
    }

    fn collect(&mut self, end: usize) {
        while let Some(event) = self.connections[end].poll_event() {
            let (id, outgoing, result) = match event {
                Event::Received {
                    transfer,
                    digest,
                    len,
                } => {
                    let here = self.sides[end]
                        .destinations
                        .remove(&transfer)
                        .expect("granted");
                    let there = &self.sides[1 - end].sources[&transfer];
                    assert!(here.bytes == *there, "{transfer:?} differs");
                    assert_eq!(len, there.len() as u64);
                    (transfer, false, Ok(digest))
                }
                Event::Sent {
                    transfer,
                    digest,
                    len,
                    ..
                } => {
                    let source = &self.sides[end].sources[&transfer];
                    assert_eq!(
                        (digest, len),
                        (Digest(crc32c::crc32c(source)), source.len() as u64)
                    );
                    (transfer, true, Ok(digest))
                }
                Event::Failed {
                    transfer,
                    outgoing,
                    reason,
                } => {
                    self.sides[end]
                        .destinations
                        .retain(|id, _| outgoing || *id != transfer);
                    (transfer, outgoing, Err(reason))
                }
                other => {
                    self.sides[end].others.push(other);
                    continue;
                }
            };
            let earlier = self.sides[end].ends.insert((id, outgoing), result);
            assert_eq!(earlier, None, "{id:?} ended twice");
            self.unfinished -= 1;
            self.sides[end].ended_at = self.now;
            if !outgoing {
                let key = (1 - end, id.slot);
                self.plans.get_mut(&key).expect("planned").1.pop_front();
                self.begin(key);
            }
        }
    }
}

fn granules(segment: &Segment) -> std::ops::Range<u64> {
    segment.offset / GRANULE..(segment.offset + u64::from(segment.len)).div_ceil(GRANULE)
}
