//! Entry points for the fuzz targets in `fuzz/`, and for the tests that run
//! their corpus. Any input is fine; a panic is a finding.

mod sealed;

pub use sealed::unseal;

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use crate::transfer::GRANULE;
use crate::wire::{self, Body, HEADER_LEN, Header, Kind, Metadata, Offer};
use crate::{Config, Connection, Event, Segment, SessionId, Time, TransferId};

const KINDS: [Kind; 9] = [
    Kind::Data,
    Kind::Ack,
    Kind::Done,
    Kind::DoneAck,
    Kind::Probe,
    Kind::ProbeAck,
    Kind::Reset,
    Kind::Offer,
    Kind::Grant,
];
/// Small, so that a script of bytes reaches its corners.
const LEN_MAX: u64 = 4096;
const SLOTS: u32 = 4;
/// Slots for offers, and what each holds.
const OFFERS: u16 = 4;
const OFFER_LEN_MAX: u32 = 200;
/// Datagrams on the way between the two ends.
const FLYING_MAX: usize = 64;
/// What an end can have to say at one instant: its window, its replies, an ACK.
const TRANSMITS_MAX: usize = 64 + SLOTS as usize * 4;

/// Reads `bytes` as a header, and as the payload of each type of packet. What is
/// accepted must come back as it went after it is written again.
pub fn parse(bytes: &[u8]) {
    if let Ok((header, payload_crc)) = Header::parse(bytes, bytes.len()) {
        let again = header.encode(payload_crc);
        assert_eq!(
            Header::parse(&again, bytes.len()),
            Ok((header, payload_crc))
        );
    }
    if let Ok(offer) = Offer::parse(bytes) {
        assert_eq!(Offer::parse(&offer.encode()), Ok(offer));
    }
    for kind in KINDS {
        if let Ok(body) = Body::parse(kind, bytes) {
            assert_eq!(body.kind(), kind);
            assert_eq!(Body::parse(kind, &body.encode()), Ok(body));
        }
    }
}

/// Lets two connections talk as `script` says: it begins and cancels transfers,
/// moves the clock, and delivers, drops, repeats and forges datagrams, with
/// checks that match where it says so.
///
/// Asserts that nothing is placed outside a grant, over verified bytes or into a
/// slot that is taken, that no transfer ends twice and no offer comes twice, and that what an end has to say stays bounded.
/// Returns how many transfers and offers were received.
pub fn converse(script: &[u8]) -> usize {
    let mut talk = Talk {
        script: script.iter().copied().collect(),
        ends: [End::new(0), End::new(1)],
        flying: VecDeque::new(),
        now: Time(0),
    };
    while let Some(op) = talk.script.pop_front() {
        talk.act(op);
    }
    talk.ends.iter().map(|end| end.received).sum()
}

struct Talk {
    script: VecDeque<u8>,
    ends: [End; 2],
    flying: VecDeque<(usize, Vec<u8>)>,
    now: Time,
}

struct End {
    connection: Connection,
    grants: HashMap<TransferId, Grant>,
    sends: HashSet<TransferId>,
    /// Slots with an offer in them, and the offers that ever came.
    held: HashSet<u32>,
    offered: HashSet<TransferId>,
    received: usize,
}

struct Grant {
    len: u64,
    verified: HashSet<u64>,
}

impl Talk {
    fn act(&mut self, op: u8) {
        let who = usize::from(op >> 7);
        match op & 0x0f {
            1 if op & 0x70 == 0x70 => self.offer(who),
            0 | 1 => self.begin(who),
            2..=4 => self.transmit(who),
            5..=7 => self.deliver(false, false),
            8 => self.deliver(true, false),
            9 => self.deliver(true, true),
            10 => drop(self.flying.pop_front()),
            11 => {
                let again = self.flying.front().cloned();
                self.flying.extend(again);
            }
            12 => {
                self.now = self.now + Duration::from_nanos(1 << (self.byte() % 32));
                self.ends[who].connection.handle_timeout(self.now);
                self.ends[who].collect();
            }
            13 => self.forge(who),
            14 => {
                let (id, outgoing) = (self.id(), self.byte() & 1 == 0);
                self.ends[who].connection.cancel(id, outgoing);
                self.ends[who].collect();
            }
            _ => match self.byte() {
                0 => {
                    self.ends[who].connection.close(1);
                    self.ends[who].collect();
                }
                slot @ 0xf0.. => self.ends[who].release(u32::from(slot & 0x7)),
                _ => self.ends[who].connection.probe(self.now),
            },
        }
        self.flying.truncate(FLYING_MAX);
    }

    fn byte(&mut self) -> u8 {
        self.script.pop_front().unwrap_or(0)
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    fn id(&mut self) -> TransferId {
        let byte = u32::from(self.byte());
        TransferId {
            slot: byte % SLOTS,
            generation: byte / SLOTS,
        }
    }

    fn begin(&mut self, from: usize) {
        let (id, len) = (self.id(), self.number(2) % LEN_MAX);
        if self.ends[1 - from].connection.receive(id, len).is_ok() {
            let grant = Grant {
                len,
                verified: HashSet::new(),
            };
            let earlier = self.ends[1 - from].grants.insert(id, grant);
            assert!(earlier.is_none(), "an id is granted once");
        }
        if self.ends[from].connection.send(id, len).is_ok() {
            assert!(self.ends[from].sends.insert(id), "an id is sent once");
        }
        self.ends[from].collect();
    }

    fn offer(&mut self, from: usize) {
        let (len, metadata_len) = (u64::from(self.byte()), self.byte() % 8);
        let metadata: Metadata = (0..metadata_len).collect();
        if let Ok(id) = self.ends[from].connection.offer(len, metadata) {
            assert!(self.ends[from].sends.insert(id), "an offer has an id");
        }
    }

    fn transmit(&mut self, who: usize) {
        let mut count = 0;
        let crc = |segment: Segment| wire::crc(&vec![0; segment.len as usize]);
        while let Some(transmit) = self.ends[who].connection.poll_transmit(self.now, crc) {
            let mut datagram = transmit.head.to_vec();
            let payload = transmit.payload.map_or(0, |segment| segment.len as usize);
            datagram.resize(datagram.len() + payload, 0);
            self.flying.push_back((1 - who, datagram));
            count += 1;
            assert!(count <= TRANSMITS_MAX, "what there is to say is bounded");
        }
    }

    fn deliver(&mut self, changed: bool, sealed: bool) {
        let Some((to, mut datagram)) = self.flying.pop_front() else {
            return;
        };
        if changed {
            let at = usize::from(self.byte()) % datagram.len();
            datagram[at] ^= self.byte();
        }
        if sealed && let Ok(head) = <[u8; HEADER_LEN]>::try_from(&datagram[..HEADER_LEN]) {
            seal(head, &mut datagram);
        }
        self.ends[to].handle(self.now, &datagram);
    }

    /// A packet of the script's own making, with checks that match.
    fn forge(&mut self, to: usize) {
        let kind = KINDS[usize::from(self.byte()) % KINDS.len()];
        let mut transfer = self.id();
        if kind == Kind::Offer {
            transfer = TransferId::of_offer(transfer.slot.into());
        }
        let len = usize::from(self.byte());
        let header = Header {
            kind,
            flags: self.byte(),
            payload_len: len as u16,
            session: SessionId(to as u32),
            transfer,
            timestamp: 0,
            path: 0,
            packet_number: self.number(2),
            offset: self.number(2),
        };
        let payload: Vec<u8> = (0..len).map(|_| self.byte()).collect();
        let checked = checked_len(kind as u8, &payload);
        let mut datagram = header.encode(wire::crc(&payload[..checked])).to_vec();
        datagram.extend_from_slice(&payload);
        self.ends[to].handle(self.now, &datagram);
    }
}

impl End {
    fn new(which: u32) -> Self {
        let config = Config {
            datagram_max: 600,
            remote_credit: 16,
            receive_credit: 16,
            slots_max: SLOTS,
            offers: OFFERS,
            offer_len_max: OFFER_LEN_MAX,
            ..Config::default()
        };
        let (local, remote) = (SessionId(which), SessionId(1 - which));
        Self {
            connection: Connection::new(config, local, remote, Time(0)),
            grants: HashMap::new(),
            sends: HashSet::new(),
            held: HashSet::new(),
            offered: HashSet::new(),
            received: 0,
        }
    }

    fn handle(&mut self, now: Time, datagram: &[u8]) {
        let before = self.connection.stats().bytes_received;
        let mut placed = None;
        let (grants, held) = (&self.grants, &self.held);
        let stride = u64::from(OFFER_LEN_MAX).next_multiple_of(GRANULE);
        self.connection
            .handle_datagram(now, datagram, datagram.len(), |segment| {
                let segment: Segment = segment.expect("the whole datagram is given");
                if segment.transfer.offer_number().is_some() {
                    assert!(segment.len <= OFFER_LEN_MAX, "inside the slot");
                    let slot = (segment.offset / stride) as u32;
                    assert!(segment.offset.is_multiple_of(stride) && slot < OFFERS.into());
                    assert!(!held.contains(&slot), "nothing is in the slot");
                    return wire::crc(&datagram[datagram.len() - segment.len as usize..]);
                }
                let grant = grants
                    .get(&segment.transfer)
                    .expect("placed only under a grant");
                assert!(
                    segment.offset + u64::from(segment.len) <= grant.len,
                    "inside the grant"
                );
                assert!(granules(segment).all(|granule| !grant.verified.contains(&granule)));
                placed = Some(segment);
                wire::crc(&datagram[HEADER_LEN..])
            });
        if let Some(segment) = placed
            && self.connection.stats().bytes_received > before
            && let Some(grant) = self.grants.get_mut(&segment.transfer)
        {
            grant.verified.extend(granules(segment));
        }
        self.collect();
    }

    fn release(&mut self, slot: u32) {
        let held = self.held.remove(&slot);
        assert_eq!(self.connection.release(slot), held);
    }

    fn collect(&mut self) {
        while let Some(event) = self.connection.poll_event() {
            let received = matches!(event, Event::Received { .. } | Event::Offered { .. });
            self.received += usize::from(received);
            let known = match event {
                Event::Received { transfer, .. }
                | Event::Failed {
                    transfer,
                    outgoing: false,
                    ..
                } => self.grants.remove(&transfer).is_some(),
                Event::Sent { transfer, .. }
                | Event::Failed {
                    transfer,
                    outgoing: true,
                    ..
                } => self.sends.remove(&transfer),
                Event::Offered { transfer, slot, .. } => {
                    assert!(self.held.insert(slot), "the slot was free");
                    self.offered.insert(transfer)
                }
                _ => true,
            };
            assert!(known, "{event:?} for a transfer that is not under way");
        }
    }
}

fn granules(segment: Segment) -> impl Iterator<Item = u64> {
    segment.offset / GRANULE..(segment.offset + u64::from(segment.len)).div_ceil(GRANULE)
}

/// How much of a payload its check covers.
fn checked_len(kind: u8, payload: &[u8]) -> usize {
    let offer = (kind == Kind::Offer as u8).then(|| Offer::parse(payload).ok());
    offer
        .flatten()
        .map_or(payload.len(), |offer| offer.len_bytes())
}

/// Makes both checks of a changed datagram match again.
fn seal(mut head: [u8; HEADER_LEN], datagram: &mut [u8]) {
    let check = wire::crc(&head[..34]) as u16;
    head[34..36].copy_from_slice(&check.to_be_bytes());
    let payload = &datagram[HEADER_LEN..];
    let checked = checked_len(head[0] & 0xf, payload);
    let check = wire::crc(&payload[..checked]) ^ wire::header_crc(&head);
    head[36..].copy_from_slice(&check.to_be_bytes());
    datagram[..HEADER_LEN].copy_from_slice(&head);
}
