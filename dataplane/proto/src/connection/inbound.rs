//! Datagrams that arrive.

use super::event::{CloseReason, Event, FailReason, Violation, code};
use super::offered::Verdict;
use super::receiving::{self, Claim};
use super::sending::Judgement;
use super::sent::Content;
use super::{Connection, Control, DropCause, State};
use crate::id::{Segment, TransferId};
use crate::time::Time;
use crate::wire::{
    self, Ack, AckRange, Body, Done, DoneAck, FLAG_FIN, FLAG_VOID, HEADER_LEN, Header, Kind, Offer,
    ParseError, Reset, Scope,
};

use std::time::Duration;

impl Connection {
    /// Takes a datagram in whose UDP payload is `datagram_len` bytes long and
    /// begins with `head`: at least its header for DATA, all of it else.
    ///
    /// For data that is expected and not there yet, `place` is called once; it
    /// copies the datagram's bytes after the header to where the segment belongs
    /// and returns the CRC32C of what it *wrote*. Only if that is the sender's
    /// are the bytes taken for delivered. For data that is there already and
    /// whose payload is not in `head`, it is called with `None`, writes nothing
    /// and returns the CRC32C of the payload, which vouches for the header too.
    /// Of an OFFER, `head` has the payload up to the end of the metadata, and
    /// `place` is given the slot's beginning as the segment's offset
    /// ([`Config::offer_stride`](super::Config::offer_stride)); it writes the *last* bytes of the datagram there.
    /// Whatever is wrong with a datagram, it is dropped and counted; so is one for
    /// whose bytes `place` has no room, which then returns none.
    ///
    /// Returns whether bytes that `place` wrote were taken for delivered.
    pub fn handle_datagram<C: Into<Option<u32>>>(
        &mut self,
        now: Time,
        head: &[u8],
        datagram_len: usize,
        place: impl FnOnce(Option<Segment>) -> C,
    ) -> bool {
        self.take_run();
        let before = self.stats.bytes_received;
        let place = |segment| place(segment).into();
        if let Err(cause) = self.try_handle(now, head, datagram_len, place) {
            self.count_drop(cause);
        }
        self.stats.bytes_received > before
    }

    fn try_handle(
        &mut self,
        now: Time,
        head: &[u8],
        datagram_len: usize,
        place: impl FnOnce(Option<Segment>) -> Option<u32>,
    ) -> Result<(), DropCause> {
        let (header, payload_crc) = Header::parse(head, datagram_len)?;
        if header.session != self.local {
            return Err(DropCause::Session);
        }
        if header.path != self.config.path {
            return Err(DropCause::Path);
        }
        if self.state != State::Open {
            self.handle_when_closed(header.kind);
            return Err(DropCause::Closed);
        }
        if self.received.contains(header.packet_number) {
            return Err(DropCause::DuplicatePacket);
        }
        let before = self.movement();
        if header.kind == Kind::Data {
            self.handle_data(header, payload_crc, head, datagram_len, place)?;
        } else if header.kind == Kind::Offer {
            self.handle_offer(now, header, payload_crc, head, place)?;
        } else {
            let payload = head
                .get(HEADER_LEN..datagram_len)
                .ok_or(DropCause::Length)?;
            if wire::crc(payload) != payload_crc {
                return Err(DropCause::PayloadCheck);
            }
            let body = Body::parse(header.kind, payload)?;
            self.handle_control(now, header, body)?;
        }
        if self.movement() != before {
            self.moved = Some(now);
        }
        self.stats.packets_received += 1;
        self.heard = Some(now);
        if let Some(alive) = &mut self.alive {
            *alive = now;
        }
        let eliciting = header.kind != Kind::Ack;
        self.received
            .record(now, header.packet_number, header.timestamp, eliciting);
        if header.kind == Kind::Offer {
            self.received.prompt();
        }
        // The peer is there: it may know of its slots.
        self.tell_offers();
        Ok(())
    }

    /// Changes when a byte is applied or a transfer ends.
    fn movement(&self) -> (u64, u64) {
        let active = self.receiving.active() + self.sending.active() + self.offering.active();
        (self.stats.bytes_received, active)
    }

    fn handle_data(
        &mut self,
        header: Header,
        payload_crc: u32,
        head: &[u8],
        datagram_len: usize,
        place: impl FnOnce(Option<Segment>) -> Option<u32>,
    ) -> Result<(), DropCause> {
        let (transfer, offset, len) = (header.transfer, header.offset, header.payload_len);
        let fin = header.flags & FLAG_FIN != 0;
        let claim = Claim {
            transfer,
            offset,
            len: u64::from(len),
            fin,
        };
        match self.receiving.check(claim) {
            receiving::Verdict::Place => {
                let crc = place(Some(Segment {
                    transfer,
                    offset,
                    len: u32::from(len),
                }));
                let crc = crc.ok_or(DropCause::NoRoom)?;
                if crc != payload_crc {
                    return Err(DropCause::PayloadCheck);
                }
                self.receiving.apply(claim, crc);
                self.stats.bytes_received += u64::from(len);
            }
            receiving::Verdict::AckOnly => {
                // Nothing is written, but a packet number that was corrupted
                // must not be acknowledged: the sender would never send again
                // what that packet carried.
                let crc = match head.get(HEADER_LEN..datagram_len) {
                    Some(payload) => self.config.integrity.checksum(|| wire::crc(payload)),
                    None => place(None).ok_or(DropCause::NoRoom)?,
                };
                if crc != payload_crc {
                    return Err(DropCause::PayloadCheck);
                }
                self.stats.duplicate_segments += u64::from(len > 0);
            }
            receiving::Verdict::Drop(cause) => {
                if matches!(cause, DropCause::LengthMismatch | DropCause::OutOfBounds)
                    && self.receiving.strike(transfer)
                {
                    let reason = FailReason::LengthMismatch;
                    self.abandon(transfer, false, reason, Some(code::LENGTH_MISMATCH));
                }
                return Err(cause);
            }
        }
        if self.receiving.take_complete(transfer) {
            self.controls.push_back(Control::Done(transfer));
        }
        Ok(())
    }

    /// `head` has at least the beginning of the payload, before the tensor.
    fn handle_offer(
        &mut self,
        now: Time,
        header: Header,
        payload_crc: u32,
        head: &[u8],
        place: impl FnOnce(Option<Segment>) -> Option<u32>,
    ) -> Result<(), DropCause> {
        let payload = head.get(HEADER_LEN..).ok_or(DropCause::Length)?;
        let payload = &payload[..payload.len().min(header.payload_len.into())];
        let offer = Offer::parse(payload)?;
        let prefix = offer.len_bytes();
        if wire::crc(&payload[..prefix]) != payload_crc {
            return Err(DropCause::PayloadCheck);
        }
        let transfer = header.transfer;
        let number = transfer.offer_number().ok_or(DropCause::NotGranted)?;
        // `parse` found the prefix inside the payload.
        let len = usize::from(header.payload_len) - prefix;
        let void = header.flags & FLAG_VOID != 0;
        match self.offered.check(number, len as u64) {
            Verdict::Place(_) if void => self.offered.skip(number),
            Verdict::Place(slot) => {
                let crc = match len {
                    0 => Some(0),
                    _ => place(Some(Segment {
                        transfer,
                        offset: u64::from(slot) * self.config.offer_stride(),
                        len: len as u32,
                    })),
                };
                let crc = crc.ok_or(DropCause::NoRoom)?;
                if crc != offer.digest.0 {
                    return Err(DropCause::PayloadCheck);
                }
                self.offered.apply(number);
                self.stats.bytes_received += len as u64;
                self.stats.offers_received += 1;
                self.moved = Some(now);
                self.events.push_back(Event::Offered {
                    transfer,
                    slot,
                    metadata: offer.metadata,
                    digest: offer.digest,
                    len: len as u64,
                });
            }
            Verdict::Duplicate => self.stats.duplicate_segments += 1,
            Verdict::NotGranted => return Err(DropCause::NotGranted),
            Verdict::TooLong => return Err(DropCause::OutOfBounds),
        }
        self.offering.handle_granted(offer.granted, None);
        self.handle_run(now, header.offset, offer.acked);
        Ok(())
    }

    /// Takes in what an offer acknowledges: `count` packets up to `largest`. Acted
    /// on later, so that whoever waits for the offer has it first.
    fn handle_run(&mut self, now: Time, largest: u64, count: u16) {
        let Some(below) = u64::from(count).checked_sub(1) else {
            return;
        };
        if largest >= self.sent.next_number() || below > largest {
            return self.violate(Violation::AckOfUnsent);
        }
        let first = largest - below;
        let range = AckRange {
            first,
            last: largest,
        };
        self.run = Some((now, range));
    }

    /// Acts on what the last offer acknowledged.
    pub(super) fn take_run(&mut self) {
        if let Some((at, range)) = self.run.take() {
            self.stats.spurious_losses += self.sent.ack(range, &mut self.acked);
            // How long it waited for the offer is not said: no round trip.
            self.take_acked(at, None);
        }
    }

    /// Has the peer told of its limit if need be.
    pub(super) fn tell_offers(&mut self) {
        if self.offered.take_due() && self.state == State::Open {
            self.controls.push_back(Control::Grant);
        }
    }

    fn handle_control(&mut self, now: Time, header: Header, body: Body) -> Result<(), DropCause> {
        match body {
            Body::Ack(ack) => self.handle_ack(now, header.packet_number, &ack),
            Body::Done(done) => self.handle_done(header.transfer, done)?,
            Body::DoneAck(answer) => self.handle_done_ack(header.transfer, answer),
            Body::Probe(probe) => self.reply(Control::ProbeAck(probe.token))?,
            Body::ProbeAck(answer) => self.handle_probe_ack(now, answer.token),
            Body::Reset(reset) => self.handle_reset(header.transfer, reset),
            Body::Grant(grant) => {
                self.offering
                    .handle_granted(grant.total, Some(grant.len_max));
            }
        }
        Ok(())
    }

    fn handle_ack(&mut self, now: Time, number: u64, ack: &Ack) {
        let largest = ack.largest();
        if largest >= self.sent.next_number() {
            return self.violate(Violation::AckOfUnsent);
        }
        if number >= self.credit_from {
            self.credit_from = number;
            self.credit = ack.credit;
        }
        for range in &ack.ranges {
            if !self.sent.concerns(*range) {
                break;
            }
            self.stats.spurious_losses += self.sent.ack(*range, &mut self.acked);
        }
        let delay = Duration::from_micros(u64::from(ack.delay_us));
        self.take_acked(now, Some((largest, delay)));
    }

    /// Acts on packets that were found acknowledged; `waited`: how long the
    /// packet with this number waited at the peer.
    fn take_acked(&mut self, now: Time, waited: Option<(u64, Duration)>) {
        let limited = std::mem::take(&mut self.limited);
        let (mut latest, mut bytes) = (None::<(u64, Time)>, 0);
        for packet in &self.acked {
            bytes += u64::from(packet.bytes);
            if latest.is_none_or(|(number, _)| number < packet.number) {
                latest = Some((packet.number, packet.at));
            }
            if let Content::Data { segment, index } = packet.content {
                self.moved = Some(now);
                self.sending.handle_acked(index, segment);
            } else if let Content::Offer(number) = packet.content {
                self.moved = Some(now);
                if let Some(event) = self.offering.handle_acked(number) {
                    self.events.push_back(event);
                }
            }
        }
        self.acked.clear();
        if let Some((number, sent_at)) = latest {
            if let Some((largest, delay)) = waited
                && number == largest
            {
                self.rtt.sample(now.since(sent_at), delay);
            }
            self.controller.handle_ack(now, sent_at, bytes, limited);
            self.pto_count = 0;
        }
        self.detect_lost(now);
    }

    fn handle_done(&mut self, id: TransferId, done: Done) -> Result<(), DropCause> {
        match self.sending.judge(id, done.len, done.digest) {
            Judgement::Ended(answer, event) => {
                self.events.push_back(event);
                self.controls.push_back(Control::DoneAck(id, answer));
            }
            Judgement::Again(answer) => self.reply(Control::DoneAck(id, answer))?,
            Judgement::Ignore => {}
            Judgement::Unknown => {
                self.reply(Control::Reset(id, Scope::FromMe, code::UNKNOWN_TRANSFER))?;
            }
            Judgement::Early => self.violate(Violation::EarlyDone),
        }
        Ok(())
    }

    fn handle_done_ack(&mut self, id: TransferId, answer: DoneAck) {
        if self.receiving.is_incomplete(id) {
            return self.violate(Violation::EarlyDoneAck);
        }
        let how = match answer {
            DoneAck::Ok => Ok(()),
            DoneAck::DigestMismatch => Err(FailReason::DigestMismatch),
        };
        self.events.extend(self.receiving.end(id, how));
    }

    fn handle_probe_ack(&mut self, now: Time, token: u64) {
        let Some(&(_, sent_at)) = self.probes.iter().find(|(sent, _)| *sent == token) else {
            return;
        };
        self.probes.clear();
        if std::mem::take(&mut self.probe_wanted) {
            self.events.push_back(Event::PathValidated {
                rtt: now.since(sent_at),
            });
        }
    }

    fn handle_reset(&mut self, id: TransferId, reset: Reset) {
        let reason = match reset.reason {
            code::UNKNOWN_TRANSFER => FailReason::UnknownToPeer,
            code::LENGTH_MISMATCH => FailReason::LengthMismatch,
            _ => FailReason::CancelledByPeer,
        };
        match reset.scope {
            Scope::Session => {
                let reason = CloseReason::Peer(reset.reason);
                self.shut(FailReason::Closed, Event::Closed { reason });
            }
            Scope::ToMe => self.abandon(id, true, reason, None),
            Scope::FromMe => self.abandon(id, false, reason, None),
        }
    }

    /// Queues an answer, unless a peer asks faster than it lets us answer: then
    /// its packet is dropped, and comes again.
    fn reply(&mut self, control: Control) -> Result<(), DropCause> {
        if self.controls.len() >= self.config.slots_max as usize {
            return Err(DropCause::Overload);
        }
        self.controls.push_back(control);
        Ok(())
    }

    /// RFC 9000 section 10.2.1: say again that it is over, ever more rarely.
    fn handle_when_closed(&mut self, kind: Kind) {
        if let State::Closed { due, heard, .. } = &mut self.state
            && kind != Kind::Reset
        {
            *heard += 1;
            *due |= heard.is_power_of_two();
        }
    }
}

impl From<ParseError> for DropCause {
    fn from(error: ParseError) -> Self {
        match error {
            ParseError::Length => Self::Length,
            ParseError::Version(_) => Self::Version,
            ParseError::HeaderCheck => Self::HeaderCheck,
            ParseError::Kind(_) => Self::Kind,
            ParseError::Body => Self::Body,
            ParseError::PayloadCheck => Self::PayloadCheck,
        }
    }
}
