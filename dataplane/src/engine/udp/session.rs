//! One session of the UDP engine: protocol state, flow, and the leases it moves.
//!
//! ```text
//!  Resolving ──neighbour answers──▶ Probing ──probe answered──▶ Open
//!      │                              │                          │
//!      └──────── limit is over ───────┴────────┬─────────────────┘ lost or closed
//!                                              ▼
//!                                            Ended
//! ```
//! A session that has ended stays until the device has given every lease back.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use genie_proto::credit::Visit;
use genie_proto::seal::{Opener, Sealer, TAG_LEN};
use genie_proto::wire::{Kind, Metadata};
use genie_proto::{
    Connection, DropCause, Event, Integrity, OfferError, Segment, SessionId, Time, TransferId,
    connection, wire,
};

use super::offer::{INLINE_MAX, Offer, OfferRefused, Offers, Placed, SLOTS_MAX, Sending, Sent};
use super::piece::{InPlaceRefused, Reader};
use super::slots::Slots;
use super::{Remote, Totals};
use crate::device::{AttachError, Attachment, Capabilities, Device, Payload, TxFrame};
use crate::engine::frame::{self, End, Flow, Head};
use crate::engine::link::Link;
use crate::engine::{
    Completion, Cost, FailReason, Interrupted, OpenError, OperationId, Partial, Receipt,
    ResentSnapshot, SealedSnapshot, SessionSnapshot,
};
use crate::ledger::Copies;
use crate::memory::{Lease, RegionError, View};

/// The protocol sees datagrams up to this length whole, of longer ones, which
/// can only be data, the header.
const DATAGRAM_WHOLE: usize = wire::HEADER_LEN + wire::CONTROL_MAX;

/// Of offers it sees what is before the tensor.
const OFFER_BEGIN: usize = wire::HEADER_LEN + wire::OFFER_LEN + wire::METADATA_MAX;

/// How often a neighbour is asked for its address until it answers.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// The application's reason code of a close, of which there is one kind.
const CLOSED_BY_USER: u16 = 0;

/// How long an ended session waits for a device that takes no frames to take
/// the one that tells the peer.
const GOODBYE_LIMIT: Duration = Duration::from_millis(100);

/// A device that works gives a frame's memory back within microseconds of
/// sending it; after this long it never will.
pub(super) const STUCK_LIMIT: Duration = Duration::from_secs(1);

/// After its last transfer a peer keeps its share of the receive ring for so
/// long: the next one often comes soon.
const SHARE_KEPT: Duration = Duration::from_millis(100);

pub(super) struct Session {
    id: SessionId,
    connection: Connection,
    peer: SocketAddr,
    flow: Option<Flow>,
    state: State,
    incoming: HashMap<TransferId, Incoming>,
    outgoing: HashMap<TransferId, Outgoing>,
    /// Small tensors under way to the peer, and the slots for those from it.
    offering: Sending,
    offered: Option<Placed>,
    /// While tensors are read in place.
    reader: Option<Reader>,
    detaching: Vec<Detaching>,
    /// When there last was a transfer.
    busy: Option<Time>,
    /// Seals packets and opens them; none where they are plain.
    security: Option<Box<Security>>,
    integrity: Integrity,
    /// Bytes that Genie copied between packets, its own memory and tensors.
    copied_bytes: u64,
}

struct Security {
    sealer: Sealer,
    opener: Opener,
}

enum State {
    Resolving {
        opening: Opening,
        began: Time,
        ask_next: Time,
    },
    Probing {
        opening: Opening,
        began: Time,
    },
    Open,
    /// `told`: nothing is left to say to the peer.
    Ended {
        since: Time,
        told: bool,
    },
}

/// What opening a session needs to know.
#[derive(Clone, Copy)]
pub(super) struct Opening {
    pub(super) operation: OperationId,
    pub(super) own: SocketAddr,
    pub(super) peer: SocketAddr,
    pub(super) limit: Duration,
}

/// What this engine's device allows.
#[derive(Clone, Copy)]
pub(super) struct Own {
    pub(super) mtu: u16,
    pub(super) credit: u16,
    pub(super) integrity: Integrity,
    pub(super) offers: Offers,
}

struct Incoming {
    operation: OperationId,
    into: Destination,
    /// Bytes copied out of packets, bad ones included.
    placed: u64,
    /// What it took on other paths.
    before: Cost,
}

/// What becomes of a transfer's bytes.
enum Destination {
    Memory(Lease),
    /// They stay in the frames. `unread`: a reader had one for longer than this.
    InPlace {
        unread: Option<Duration>,
    },
}

/// What becomes of a frame that is being looked at.
pub(super) struct Keeping {
    /// Whether the device can keep it.
    pub(super) is_possible: bool,
    /// What it holds, if it is to be kept.
    pub(super) segment: Option<Segment>,
}

struct Outgoing {
    operation: OperationId,
    from: Lease,
    attachment: Attachment,
    /// Bytes handed to the device, repeated ones included.
    handed: u64,
    /// What it took on other paths.
    before: Cost,
}

/// A transfer that ended while frames may still refer to its memory.
struct Detaching {
    attachment: Attachment,
    operation: OperationId,
    result: Result<Receipt, FailReason>,
    /// What had moved, if the session ended.
    partial: Option<Box<Interrupted>>,
}

/// Who copies on this device, per direction.
#[derive(Clone, Copy)]
pub(super) struct Copying {
    genie_tx: bool,
    driver_tx: bool,
    driver_rx: bool,
    sealed: bool,
}

impl Incoming {
    /// What it took so far, on all paths.
    fn cost(&self, copying: Copying) -> Cost {
        let copies = match self.into {
            Destination::Memory(_) => copying.received(self.placed),
            Destination::InPlace { .. } => copying.received_in_place(self.placed),
        };
        self.before.plus(Cost {
            retransmits: 0,
            copies,
        })
    }
}

impl Outgoing {
    /// What it took so far, on all paths; `retransmits` on this one.
    fn cost(&self, copying: Copying, retransmits: u64) -> Cost {
        self.before.plus(Cost {
            retransmits,
            copies: copying.sent(self.handed),
        })
    }
}

impl Copying {
    pub(super) fn of(capabilities: &Capabilities) -> Self {
        Self {
            genie_tx: !capabilities.tx_external,
            driver_tx: capabilities.driver_copies_tx,
            driver_rx: capabilities.driver_copies_rx,
            sealed: false,
        }
    }

    pub(super) fn sent(self, bytes: u64) -> Copies {
        let count = |copies: bool| if copies { bytes } else { 0 };
        Copies {
            genie: count(self.genie_tx) + count(self.sealed),
            driver: count(self.driver_tx),
            kernel: 0,
        }
    }

    fn received(self, bytes: u64) -> Copies {
        Copies {
            genie: bytes + if self.sealed { bytes } else { 0 },
            ..self.received_in_place(bytes)
        }
    }

    fn received_in_place(self, bytes: u64) -> Copies {
        Copies {
            genie: 0,
            driver: if self.driver_rx { bytes } else { 0 },
            kernel: 0,
        }
    }
}

impl Security {
    /// Seals a frame whose datagram begins at `begin` of its head, and whose
    /// payload, if it has one, was loaded into `slots`.
    fn seal(&mut self, frame: &mut TxFrame, begin: usize, slots: &mut Slots) {
        let datagram = &mut frame.head[begin..];
        let (plain, rest) = datagram
            .split_first_chunk_mut::<{ wire::PLAIN_LEN }>()
            .expect("every datagram begins with a header");
        if let Some(payload) = frame.payload {
            let check = rest.first_chunk().expect("the last field of the header");
            let sealed = slots.store(check, payload.len as usize, |sealed| {
                self.sealer.seal(plain, sealed)
            });
            frame.payload = Some(sealed);
            frame.head.truncate(begin + wire::PLAIN_LEN);
        } else {
            let tag = self.sealer.seal(plain, rest);
            frame
                .head
                .try_extend_from_slice(&tag)
                .expect("HEAD_MAX has room for a tag");
        }
    }
}

impl Session {
    pub(super) fn new(
        now: Time,
        id: SessionId,
        remote: &Remote,
        opening: Opening,
        own: Own,
    ) -> Result<Self, RegionError> {
        let mtu = own.mtu.min(remote.local.mtu);
        let security = remote.secrets.as_ref().map(|secrets| {
            Box::new(Security {
                sealer: Sealer::new(&secrets.send),
                opener: Opener::new(&secrets.receive),
            })
        });
        let tag = if security.is_some() {
            TAG_LEN as u16
        } else {
            0
        };
        let datagram_max = frame::udp_payload_max(mtu, opening.peer.ip()).saturating_sub(tag);
        let slots = own.offers.slots.min(SLOTS_MAX);
        let config = connection::Config {
            datagram_max,
            receive_credit: u32::from(own.credit),
            remote_credit: u32::from(remote.local.credit),
            idle_limit: opening.limit,
            idle_probe: Some(opening.limit / 2),
            integrity: own.integrity,
            offers: slots,
            offer_len_max: own.offers.len_max.min(datagram_max.into()),
            seed: fastrand::u64(..),
            ..connection::Config::default()
        };
        let offered = match slots {
            0 => None,
            slots => Some(Placed::new(slots, config.offer_stride())?),
        };
        Ok(Self {
            id,
            offered,
            offering: Sending::default(),
            connection: Connection::new(config, id, remote.session, now),
            peer: opening.peer,
            flow: None,
            state: State::Resolving {
                opening,
                began: now,
                ask_next: now,
            },
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
            reader: None,
            detaching: Vec::new(),
            busy: None,
            security,
            integrity: own.integrity,
            copied_bytes: 0,
        })
    }

    pub(super) fn peer(&self) -> IpAddr {
        self.peer.ip()
    }

    /// Shows the connection, and whether its peer needs more of the receive ring
    /// than a beginner: it sends, or it answers to what we send.
    pub(super) fn show_credit(&mut self, now: Time, visit: &mut Visit) {
        if !self.incoming.is_empty() || !self.outgoing.is_empty() || !self.offering.is_empty() {
            self.busy = Some(now);
        }
        let busy = self.busy.is_some_and(|at| now.since(at) < SHARE_KEPT);
        visit(self.peer.ip(), busy, &mut self.connection);
    }

    pub(super) fn is_from(&self, address: SocketAddr) -> bool {
        address == self.peer
    }

    pub(super) fn receive(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        into: Lease,
        resume: Option<Box<Partial<genie_proto::Incoming>>>,
        completions: &mut VecDeque<Completion>,
    ) {
        let before = resume.as_ref().map(|partial| partial.cost);
        let begun = match resume {
            None => self.connection.receive(transfer, into.len() as u64),
            Some(partial) => self.connection.resume_receive(transfer, partial.moved),
        };
        match begun {
            Ok(()) => {
                self.incoming.insert(
                    transfer,
                    Incoming {
                        operation,
                        into: Destination::Memory(into),
                        placed: 0,
                        before: before.unwrap_or_default(),
                    },
                );
            }
            Err(error) => {
                drop(into);
                refuse(operation, error.to_string(), completions);
            }
        }
    }

    /// Expects a tensor of `len` bytes that stays in the frames: up to `frames` of
    /// them, of which `left` are not set aside for other sessions.
    pub(super) fn receive_in_place(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        len: u64,
        frames: u32,
        left: u32,
    ) -> Result<(), InPlaceRefused> {
        if self.is_ended() || self.connection.is_closed() {
            return Err(InPlaceRefused::NotOpen);
        }
        if self.is_sealed() {
            return Err(InPlaceRefused::Sealed);
        }
        let has_some = self.reader.is_some();
        if frames == 0 || !has_some && left < frames {
            let wanted = frames;
            return Err(InPlaceRefused::NoFrames { wanted, left });
        }
        self.connection.receive(transfer, len)?;
        self.reader
            .get_or_insert_with(|| Reader::new(frames))
            .begin();
        self.tell_room();
        self.incoming.insert(
            transfer,
            Incoming {
                operation,
                into: Destination::InPlace { unread: None },
                placed: 0,
                before: Cost::default(),
            },
        );
        Ok(())
    }

    /// Frames set aside for this session's reader.
    pub(super) fn frames_to_read(&self) -> u32 {
        self.reader.as_ref().map_or(0, Reader::frames)
    }

    /// A frame that was kept for this session's reader is the device's again.
    pub(super) fn frame_given_back(&mut self) {
        if let Some(reader) = &mut self.reader {
            reader.give_back();
            self.tell_room();
        }
    }

    /// A reader had a frame of this transfer for longer than it may.
    pub(super) fn frame_unread(&mut self, transfer: TransferId, limit: Duration) {
        if let Some(incoming) = self.incoming.get_mut(&transfer)
            && let Destination::InPlace { unread } = &mut incoming.into
        {
            *unread = Some(limit);
            self.connection.cancel(transfer, false);
        }
    }

    fn transfer_read(&mut self, incoming: &Incoming) {
        if let Destination::InPlace { .. } = incoming.into
            && let Some(reader) = &mut self.reader
        {
            reader.end();
            self.tell_room();
        }
    }

    /// Bounds what the peer may send by the frames that may still be kept.
    fn tell_room(&mut self) {
        self.reader.take_if(|reader| reader.is_over());
        let room = self.reader.as_ref().map_or(u32::MAX, Reader::room);
        self.connection.set_room(room);
    }

    pub(super) fn send(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        from: Lease,
        resume: Option<Box<Partial<genie_proto::Outgoing>>>,
        device: &mut dyn Device,
        completions: &mut VecDeque<Completion>,
    ) {
        let attachment = match device.attach(from.clone()) {
            Ok(attachment) => attachment,
            Err(error @ (AttachError::Full | AttachError::Unreachable(_))) => {
                drop(from);
                return refuse(operation, error.to_string(), completions);
            }
        };
        let before = resume.as_ref().map(|partial| partial.cost);
        let begun = match resume {
            None => self.connection.send(transfer, from.len() as u64),
            Some(partial) => self.connection.resume_send(transfer, partial.moved),
        };
        match begun {
            Ok(()) => {
                let outgoing = Outgoing {
                    operation,
                    from,
                    attachment,
                    handed: 0,
                    before: before.unwrap_or_default(),
                };
                self.outgoing.insert(transfer, outgoing);
            }
            Err(error) => {
                let result = Err(FailReason::Refused(error.to_string()));
                self.detaching.push(Detaching {
                    attachment,
                    operation,
                    result,
                    partial: None,
                });
            }
        }
    }

    pub(super) fn offer(
        &mut self,
        operation: OperationId,
        metadata: Metadata,
        from: Lease,
        device: &mut dyn Device,
    ) -> Result<TransferId, OfferRefused> {
        let len = from.len();
        let refused = |from, reason| Err(OfferRefused { from, reason });
        let max = INLINE_MAX as u64;
        if self.is_sealed() && len as u64 > max {
            // Longer ones would have to be sealed in a slot of the engine's.
            let len = len as u64;
            return refused(from, OfferError::TooLong { len, max });
        }
        if let Err(reason) = self.connection.check_offer(len as u64, metadata.len()) {
            return refused(from, reason);
        }
        let attachment = if len > INLINE_MAX {
            match device.attach(from.clone()) {
                Ok(attachment) => Some(attachment),
                // The ordinary way says the same of it, in words.
                Err(_) => return refused(from, OfferError::NotGranted),
            }
        } else {
            None
        };
        let id = match self.connection.offer(len as u64, metadata) {
            Ok(id) => id,
            // Checked above.
            Err(reason) => return refused(from, reason),
        };
        self.offering.push(id, operation, from, attachment);
        Ok(id)
    }

    /// The bytes of an offer whose slot was not released.
    pub(super) fn offered(&self, offer: &Offer) -> Option<View<'_>> {
        self.offered.as_ref()?.view(offer)
    }

    pub(super) fn release(&mut self, offer: Offer) {
        if let Some(offered) = &mut self.offered
            && offered.release(&offer)
        {
            self.connection.release(offer.slot());
        }
    }

    pub(super) fn cancel(&mut self, transfer: TransferId, outgoing: bool) {
        self.connection.cancel(transfer, outgoing);
    }

    /// Begins to close: the peer is told once, what is under way fails.
    pub(super) fn close(&mut self) {
        if !self.connection.is_closed() {
            self.connection.close(CLOSED_BY_USER);
        }
    }

    /// Whether this session's packets are sealed.
    pub(super) fn is_sealed(&self) -> bool {
        self.security.is_some()
    }

    /// Takes a datagram in; `private` has room for all of it.
    pub(super) fn handle_datagram(
        &mut self,
        now: Time,
        header: &[u8],
        datagram: View<'_>,
        private: &mut [u8],
        keeping: &mut Keeping,
    ) {
        let Some(security) = &mut self.security else {
            if wire::peek_kind(header) == Some(Kind::Offer) {
                let mut begin = [0; OFFER_BEGIN];
                let have = datagram.copy_to(&mut begin);
                self.handle_opened(now, &begin[..have], datagram, keeping);
            } else if datagram.len() <= DATAGRAM_WHOLE {
                let mut whole = [0; DATAGRAM_WHOLE];
                let have = datagram.copy_to(&mut whole);
                self.handle_opened(now, &whole[..have], datagram, keeping);
            } else {
                self.handle_opened(now, header, datagram, keeping);
            }
            return;
        };
        // Opened in memory that nobody else can change: not in the packet's
        // buffer, and not in the tensor, which never shows what is not authentic.
        let Some(private) = private.get_mut(..datagram.len()) else {
            return self.connection.handle_dropped(DropCause::Length);
        };
        datagram.copy_to(private);
        self.copied_bytes += private.len() as u64;
        match security.opener.open(private) {
            Ok(len) => {
                let opened = &private[..len];
                self.handle_opened(now, opened, View::from(opened), keeping);
            }
            Err(error) => self.connection.handle_dropped(error.into()),
        }
    }

    /// `head`: as much of `datagram` as the connection must see.
    fn handle_opened(&mut self, now: Time, head: &[u8], datagram: View<'_>, keeping: &mut Keeping) {
        let Self {
            connection,
            incoming,
            offered,
            reader,
            integrity,
            copied_bytes,
            ..
        } = self;
        let payload = datagram.slice(wire::HEADER_LEN..datagram.len());
        let payload = payload.unwrap_or_default();
        let place = |segment: Option<Segment>| {
            let Some(segment) = segment else {
                return Some(integrity.checksum(|| payload.crc32c()));
            };
            if segment.transfer.offer_number().is_some() {
                *copied_bytes += u64::from(segment.len);
                let offered = offered.as_ref().expect("slots are granted once made");
                return Some(offered.place(segment, payload, *integrity));
            }
            let transfer = incoming
                .get_mut(&segment.transfer)
                .expect("the connection places only into transfers it was given");
            let Destination::Memory(into) = &transfer.into else {
                let has_room = reader.as_ref().is_some_and(|reader| reader.room() > 0);
                if !keeping.is_possible || !has_room {
                    return None;
                }
                transfer.placed += payload.len() as u64;
                keeping.segment = Some(segment);
                return Some(integrity.checksum(|| payload.crc32c()));
            };
            transfer.placed += payload.len() as u64;
            *copied_bytes += payload.len() as u64;
            let at = segment.offset as usize;
            Some(match integrity {
                Integrity::Digest => into.place(at, payload),
                Integrity::None => {
                    into.write_at(at, payload);
                    0
                }
            })
        };
        let is_taken = connection.handle_datagram(now, head, datagram.len(), place);
        if !is_taken {
            keeping.segment = None;
        } else if keeping.segment.is_some()
            && let Some(reader) = reader
        {
            reader.keep();
            connection.set_room(reader.room());
        }
    }

    /// Acts on what is due; returns whether something was, and a question for
    /// the link, if there is one.
    pub(super) fn handle_timeout(&mut self, now: Time, link: &mut Link) -> (bool, Option<Head>) {
        let (mut due, mut question) = (false, None);
        if let State::Resolving {
            opening,
            began,
            ask_next,
        } = &mut self.state
        {
            let (own, peer) = (opening.own, opening.peer);
            if let Some(mac) = link.neighbour(peer.ip()) {
                let own = End {
                    mac: link.mac(),
                    address: own,
                };
                self.flow = Flow::new(own, End { mac, address: peer });
                self.connection.probe(now);
                due = true;
                self.state = State::Probing {
                    opening: *opening,
                    began: *began,
                };
            } else if *ask_next <= now {
                question = link.request(own.ip(), peer.ip());
                *ask_next = now + ASK_EVERY;
            }
        }
        if self.connection.poll_timeout().is_some_and(|at| at <= now) {
            self.connection.handle_timeout(now);
            due = true;
        }
        (due || question.is_some(), question)
    }

    /// Writes the next frame to send into an empty one, if there is something to
    /// send; `slots` has a free one where packets are sealed.
    pub(super) fn poll_transmit(
        &mut self,
        now: Time,
        slots: Option<&mut Slots>,
        frame: &mut TxFrame,
    ) -> bool {
        let Self {
            connection,
            outgoing,
            offering,
            flow,
            integrity,
            security,
            copied_bytes,
            ..
        } = self;
        let mut sealing = match (security, slots) {
            (None, _) => None,
            (Some(security), Some(slots)) => Some((security, slots)),
            // Nothing of such a session ever leaves as it is.
            (Some(_), None) => return false,
        };
        let Some(flow) = flow else { return false };
        let mut payload = None;
        let crc = |segment: Segment| {
            let (start, len) = (segment.offset as usize, segment.len as usize);
            if let Some(number) = segment.transfer.offer_number() {
                return integrity.checksum(|| offering.crc32c(number));
            }
            let transfer = outgoing
                .get_mut(&segment.transfer)
                .expect("the connection sends only transfers it was given");
            transfer.handed += len as u64;
            payload = Some(Payload {
                attachment: transfer.attachment,
                offset: segment.offset,
                len: segment.len,
            });
            let from = &transfer.from;
            // Sealed payloads are read in any case.
            let loaded = sealing
                .as_mut()
                .map(|(_, slots)| slots.load(from, start, len));
            integrity.checksum(|| loaded.unwrap_or_else(|| from.crc32c(start..start + len)))
        };
        let Some(transmit) = connection.poll_transmit(now, crc) else {
            if let State::Ended { told, .. } = &mut self.state {
                *told = true;
            }
            return false;
        };
        frame.payload = payload;
        let payload_len = transmit.payload.map_or(0, |segment| segment.len as usize);
        let tag = if sealing.is_some() { TAG_LEN } else { 0 };
        flow.write_headers(&mut frame.head, transmit.head.len() + payload_len + tag);
        let begin = frame.head.len();
        frame
            .head
            .try_extend_from_slice(&transmit.head)
            .expect("HEAD_MAX has room for both");
        if let Some(segment) = transmit.payload
            && let Some(number) = segment.transfer.offer_number()
        {
            *copied_bytes += offering.fill(number, frame);
        }
        if let Some((security, slots)) = sealing {
            *copied_bytes += frame.payload.map_or(0, |payload| u64::from(payload.len));
            security.seal(frame, begin, slots);
        }
        true
    }

    /// Turns what the protocol reports into completions.
    pub(super) fn take_events(
        &mut self,
        now: Time,
        copying: Copying,
        totals: &mut Totals,
        completions: &mut VecDeque<Completion>,
        offers: &mut VecDeque<Offer>,
    ) {
        let copying = Copying {
            sealed: self.is_sealed(),
            ..copying
        };
        while let Some(event) = self.connection.poll_event() {
            match event {
                Event::Received {
                    transfer,
                    digest,
                    len,
                } => {
                    totals.received_bytes += len;
                    self.received(transfer, completions, |incoming| {
                        let cost = incoming.cost(copying);
                        Ok(Receipt {
                            bytes: len,
                            digest,
                            retransmits: cost.retransmits,
                            copies: cost.copies,
                        })
                    });
                }
                Event::Offered {
                    transfer,
                    slot,
                    metadata,
                    digest,
                    len,
                } => {
                    totals.received_bytes += len;
                    self.busy = Some(now);
                    if let Some(offered) = &mut self.offered {
                        offered.hold(slot, transfer);
                    }
                    offers.push_back(Offer::new(self.id, transfer, slot, metadata, digest, len));
                }
                Event::Sent {
                    transfer,
                    digest,
                    len,
                    retransmits,
                } => {
                    totals.sent_bytes += len;
                    if let Some(offer) = self.offering.take(transfer) {
                        let receipt = Receipt {
                            bytes: len,
                            digest,
                            retransmits,
                            copies: offer.copies(copying),
                        };
                        self.offer_ended(offer, Ok(receipt), completions);
                        continue;
                    }
                    self.sent(transfer, None, |outgoing| {
                        let cost = outgoing.cost(copying, retransmits);
                        Ok(Receipt {
                            bytes: len,
                            digest,
                            retransmits: cost.retransmits,
                            copies: cost.copies,
                        })
                    });
                }
                Event::Failed {
                    transfer,
                    outgoing: true,
                    reason,
                } => {
                    if let Some(offer) = self.offering.take(transfer) {
                        self.offer_ended(offer, Err(fail_reason(reason)), completions);
                        continue;
                    }
                    let partial = self.partial_outgoing(transfer, copying);
                    self.sent(transfer, partial, |_| Err(fail_reason(reason)));
                }
                Event::Failed {
                    transfer,
                    outgoing: false,
                    reason,
                } => match self.partial_incoming(transfer, copying) {
                    Some(partial) => {
                        self.interrupted(transfer, partial, fail_reason(reason), completions);
                    }
                    None => self.received(transfer, completions, |_| Err(fail_reason(reason))),
                },
                Event::PathValidated { rtt } => self.opened(rtt, completions),
                Event::PathLost { reason } => {
                    self.end(now, FailReason::PathLost(reason.to_string()), completions);
                }
                Event::Closed { reason } => self.end(now, close_reason(reason), completions),
            }
        }
        self.check_opening(now, completions);
    }

    fn received(
        &mut self,
        transfer: TransferId,
        completions: &mut VecDeque<Completion>,
        result: impl FnOnce(&Incoming) -> Result<Receipt, FailReason>,
    ) {
        if let Some(incoming) = self.incoming.remove(&transfer) {
            let result = match (&incoming.into, result(&incoming)) {
                (
                    Destination::InPlace {
                        unread: Some(limit),
                    },
                    Err(FailReason::Cancelled),
                ) => Err(FailReason::Unread(*limit)),
                (_, result) => result,
            };
            self.transfer_read(&incoming);
            let operation = incoming.operation;
            // The lease goes before anybody is told that it has gone.
            drop(incoming);
            completions.push_back(Completion::Transferred { operation, result });
        }
    }

    fn offer_ended(
        &mut self,
        offer: Sent,
        result: Result<Receipt, FailReason>,
        completions: &mut VecDeque<Completion>,
    ) {
        let operation = offer.operation;
        match offer.attachment {
            Some(attachment) => self.detaching.push(Detaching {
                attachment,
                operation,
                result,
                partial: None,
            }),
            None => {
                drop(offer);
                completions.push_back(Completion::Transferred { operation, result });
            }
        }
    }

    /// What had moved of a transfer that failed with the connection.
    fn partial_incoming(
        &mut self,
        transfer: TransferId,
        copying: Copying,
    ) -> Option<Box<Interrupted>> {
        let moved = self.connection.take_incoming(transfer)?;
        let incoming = self.incoming.get(&transfer)?;
        // What was read is nowhere that another path could add to.
        if let Destination::InPlace { .. } = incoming.into {
            return None;
        }
        let cost = incoming.cost(copying);
        Some(Box::new(Interrupted::Incoming(Partial { moved, cost })))
    }

    /// What had moved of a transfer that failed with the connection.
    fn partial_outgoing(
        &mut self,
        transfer: TransferId,
        copying: Copying,
    ) -> Option<Box<Interrupted>> {
        let (moved, retransmits) = self.connection.take_outgoing(transfer)?;
        let cost = self.outgoing.get(&transfer)?.cost(copying, retransmits);
        Some(Box::new(Interrupted::Outgoing(Partial { moved, cost })))
    }

    /// The protocol places nothing any more once the connection has ended, so
    /// when the lease is dropped nothing can reach its memory.
    fn interrupted(
        &mut self,
        transfer: TransferId,
        partial: Box<Interrupted>,
        reason: FailReason,
        completions: &mut VecDeque<Completion>,
    ) {
        if let Some(incoming) = self.incoming.remove(&transfer) {
            let operation = incoming.operation;
            drop(incoming);
            completions.push_back(Completion::Interrupted {
                operation,
                reason,
                partial,
            });
        }
    }

    fn sent(
        &mut self,
        transfer: TransferId,
        partial: Option<Box<Interrupted>>,
        result: impl FnOnce(&Outgoing) -> Result<Receipt, FailReason>,
    ) {
        if let Some(outgoing) = self.outgoing.remove(&transfer) {
            let result = result(&outgoing);
            let Outgoing {
                attachment,
                operation,
                ..
            } = outgoing;
            self.detaching.push(Detaching {
                attachment,
                operation,
                result,
                partial,
            });
        }
    }

    fn opened(&mut self, round_trip: Duration, completions: &mut VecDeque<Completion>) {
        if let State::Probing { opening, .. } = self.state {
            self.state = State::Open;
            let operation = opening.operation;
            completions.push_back(Completion::Opened {
                operation,
                result: Ok(round_trip),
            });
        }
    }

    /// Gives up opening when its limit is over.
    fn check_opening(&mut self, now: Time, completions: &mut VecDeque<Completion>) {
        let (opening, error) = match &self.state {
            State::Resolving { opening, began, .. } if *began + opening.limit <= now => {
                (*opening, OpenError::NoNeighbour(opening.peer.ip()))
            }
            State::Probing { opening, began } if *began + opening.limit <= now => {
                (*opening, OpenError::NoAnswer(opening.peer))
            }
            _ => return,
        };
        let operation = opening.operation;
        completions.push_back(Completion::Opened {
            operation,
            result: Err(error),
        });
        // Without a flow there is nobody to tell; otherwise the peer learns it.
        let told = self.flow.is_none();
        self.state = State::Ended { since: now, told };
        self.connection.close(CLOSED_BY_USER);
        self.fail_transfers(FailReason::Closed, completions);
    }

    /// Ends the session: everything under way fails with `reason`.
    fn end(&mut self, now: Time, reason: FailReason, completions: &mut VecDeque<Completion>) {
        self.fail_transfers(reason.clone(), completions);
        let ended = State::Ended {
            since: now,
            told: self.flow.is_none(),
        };
        match std::mem::replace(&mut self.state, ended) {
            State::Resolving { opening, .. } | State::Probing { opening, .. } => {
                let result = Err(match reason {
                    FailReason::PathLost(_) => OpenError::NoAnswer(opening.peer),
                    other => OpenError::Refused(other.to_string()),
                });
                completions.push_back(Completion::Opened {
                    operation: opening.operation,
                    result,
                });
            }
            // Who closed it knows; anything else is news.
            State::Open if reason != FailReason::Closed => {
                completions.push_back(Completion::Lost {
                    session: self.id,
                    reason,
                });
            }
            State::Open => {}
            State::Ended { told, since } => self.state = State::Ended { told, since },
        }
    }

    fn fail_transfers(&mut self, reason: FailReason, completions: &mut VecDeque<Completion>) {
        while let Some(offer) = self.offering.pop() {
            self.offer_ended(offer, Err(reason.clone()), completions);
        }
        for (
            _,
            Incoming {
                operation, into, ..
            },
        ) in self.incoming.drain()
        {
            drop(into);
            completions.push_back(Completion::Transferred {
                operation,
                result: Err(reason.clone()),
            });
        }
        for (
            _,
            Outgoing {
                attachment,
                operation,
                ..
            },
        ) in self.outgoing.drain()
        {
            self.detaching.push(Detaching {
                attachment,
                operation,
                result: Err(reason.clone()),
                partial: None,
            });
        }
    }

    pub(super) fn is_detaching(&self) -> bool {
        !self.detaching.is_empty()
    }

    /// Completes the transfers whose memory no frame refers to any more.
    pub(super) fn detach(
        &mut self,
        device: &mut dyn Device,
        completions: &mut VecDeque<Completion>,
    ) {
        // The frames of a closed session are reaped like any other's, so this
        // ends unless the device is stuck; then the lease rightly stays.
        self.detaching.retain_mut(
            |Detaching {
                 attachment,
                 operation,
                 result,
                 partial,
             }| {
                let gone = device.detach(*attachment);
                if gone {
                    let operation = *operation;
                    let result = std::mem::replace(result, Err(FailReason::Closed));
                    completions.push_back(match (result, partial.take()) {
                        (Err(reason), Some(partial)) => Completion::Interrupted {
                            operation,
                            reason,
                            partial,
                        },
                        (result, _) => Completion::Transferred { operation, result },
                    });
                }
                !gone
            },
        );
    }

    /// Whether nothing is left to do or to give back.
    pub(super) fn is_finished(&self, now: Time) -> bool {
        let State::Ended { since, told } = self.state else {
            return false;
        };
        let empty =
            self.incoming.is_empty() && self.outgoing.is_empty() && self.offering.is_empty();
        empty && self.detaching.is_empty() && (told || now.since(since) >= GOODBYE_LIMIT)
    }

    /// Whether it is over, but for what must still be given back.
    pub(super) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }

    /// Whether the device has kept the memory of an ended session for so long
    /// that it will not give it back by itself.
    pub(super) fn is_stuck(&self, now: Time) -> bool {
        let State::Ended { since, .. } = self.state else {
            return false;
        };
        self.is_detaching() && now.since(since) >= STUCK_LIMIT
    }

    /// Whether frames may still refer to this memory of an ended transfer.
    pub(super) fn detaches(&self, attachment: Attachment) -> bool {
        self.detaching
            .iter()
            .any(|detaching| detaching.attachment == attachment)
    }

    /// When this session next wants [`Session::handle_timeout`] or
    /// [`Session::take_events`] although nothing arrived.
    pub(super) fn next_timeout(&self) -> Option<Time> {
        let opening = match &self.state {
            State::Resolving {
                opening,
                began,
                ask_next,
            } => Some((*ask_next).min(*began + opening.limit)),
            State::Probing { opening, began } => Some(*began + opening.limit),
            State::Ended { since, told } if !told => Some(*since + GOODBYE_LIMIT),
            State::Ended { since, .. } => Some(*since + STUCK_LIMIT),
            State::Open => None,
        };
        opening
            .into_iter()
            .chain(self.connection.poll_timeout())
            .min()
    }

    pub(super) fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }

    pub(super) fn snapshot(&self) -> SessionSnapshot {
        let stats = self.connection.stats();
        SessionSnapshot {
            session: self.id,
            round_trip: stats.rtt,
            window_bytes: Some(stats.window_bytes),
            in_flight_bytes: Some(stats.in_flight_bytes),
            granted: Some(u64::from(self.connection.receive_credit())),
            round_trip_min: stats.rtt_min,
            retransmits: stats.retransmits.total(),
            resent: Some(ResentSnapshot {
                packet_threshold: stats.retransmits.packet_threshold,
                time_threshold: stats.retransmits.time_threshold,
                probe: stats.retransmits.probe,
                spurious: stats.spurious_losses,
            }),
            dropped: stats.dropped(),
            sealed: self.is_sealed().then(|| SealedSnapshot {
                forged: stats.drops(DropCause::Forged),
                replayed: stats.drops(DropCause::Replayed),
                old_epoch: stats.drops(DropCause::OldEpoch),
            }),
            transfers: (self.incoming.len() + self.outgoing.len() + self.offering.len()) as u64,
        }
    }
}

fn refuse(operation: OperationId, reason: String, completions: &mut VecDeque<Completion>) {
    let result = Err(FailReason::Refused(reason));
    completions.push_back(Completion::Transferred { operation, result });
}

fn fail_reason(reason: connection::FailReason) -> FailReason {
    use connection::FailReason as Proto;
    match reason {
        Proto::DigestMismatch => FailReason::DigestMismatch,
        Proto::Cancelled => FailReason::Cancelled,
        Proto::CancelledByPeer => FailReason::CancelledByPeer,
        Proto::Closed => FailReason::Closed,
        Proto::PathLost => FailReason::PathLost("the peer does not answer".into()),
        Proto::LengthMismatch | Proto::UnknownToPeer => FailReason::Protocol(reason.to_string()),
    }
}

fn close_reason(reason: connection::CloseReason) -> FailReason {
    use connection::CloseReason as Proto;
    match reason {
        Proto::Local(_) => FailReason::Closed,
        Proto::Peer(_) => FailReason::PathLost(reason.to_string()),
        Proto::Violation(_) | Proto::PacketNumbersExhausted => {
            FailReason::Protocol(reason.to_string())
        }
    }
}
