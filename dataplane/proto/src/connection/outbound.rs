//! Datagrams to send.

use arrayvec::ArrayVec;

use super::event::{CloseReason, Event, FailReason, code};
use super::sent::Content;
use super::{Connection, Control, PROBES_MAX, State, Transmit};
use crate::digest::Digest;
use crate::id::{Segment, TransferId};
use crate::time::Time;
use crate::wire::{
    self, Body, FLAG_FIN, FLAG_VOID, Grant, HEADER_LEN, Header, Kind, Metadata, Offer, Probe,
    ProbeAck, Reset, Scope, U48_LIMIT,
};

const NO_TRANSFER: TransferId = TransferId {
    slot: 0,
    generation: 0,
};

/// Control packets that may be in flight whatever the peer's credit, for nobody
/// keeps their frames: a verdict that waited for a reader would come too late.
const CONTROL_CREDIT: u32 = 2;

impl Connection {
    /// The next datagram to send now, if there is one: see
    /// [`Connection::poll_transmit_into`].
    pub fn poll_transmit(
        &mut self,
        now: Time,
        crc: impl FnMut(Segment) -> u32,
    ) -> Option<Transmit> {
        let mut head = ArrayVec::new();
        let payload = self.poll_transmit_into(now, &mut head, crc)?;
        Some(Transmit { head, payload })
    }

    /// Writes the head of the next datagram to send now behind what is in `head`,
    /// and returns the part of the source that follows it, if any; none if there
    /// is nothing to send. `crc` returns the CRC32C of a segment of the source; it
    /// is called once for a datagram with payload.
    ///
    /// A datagram given counts as sent: one that the device refuses is to be
    /// kept and offered again, or is lost like any other.
    ///
    /// # Panics
    /// If `head` has no room for a header and a control packet's payload.
    pub fn poll_transmit_into<const N: usize>(
        &mut self,
        now: Time,
        head: &mut ArrayVec<u8, N>,
        mut crc: impl FnMut(Segment) -> u32,
    ) -> Option<Option<Segment>> {
        let payload = self.next_transmit(now, head, &mut crc);
        if payload.is_some() || self.run.is_none() {
            return payload;
        }
        // What was acknowledged may make room.
        self.take_run();
        if !self.may_transmit(now) {
            return None;
        }
        self.next_transmit(now, head, &mut crc)
    }

    /// Whether [`Connection::poll_transmit`] may have something to send, without
    /// looking at windows.
    pub fn may_transmit(&self, now: Time) -> bool {
        self.state != State::Open
            || self.received.is_due(now)
            || self.probe_due
            || !self.controls.is_empty()
            || self.has_data()
    }

    fn next_transmit<const N: usize>(
        &mut self,
        now: Time,
        head: &mut ArrayVec<u8, N>,
        crc: &mut impl FnMut(Segment) -> u32,
    ) -> Option<Option<Segment>> {
        if let State::Closed {
            code,
            due: due @ true,
            ..
        } = &mut self.state
        {
            *due = false;
            // No number is left that was not used.
            if self.sent.next_number() >= U48_LIMIT {
                return None;
            }
            let reset = Reset {
                scope: Scope::Session,
                reason: *code,
            };
            self.write_bare(now, &Body::Reset(reset), head);
            return Some(None);
        }
        if self.state != State::Open {
            return None;
        }
        if self.sent.next_number() >= U48_LIMIT - 1 {
            let reason = CloseReason::PacketNumbersExhausted;
            self.shut(FailReason::Closed, Event::Closed { reason });
            self.tell_closed(code::EXHAUSTED);
            return None;
        }
        self.watch(now);
        if !self.may_transmit(now) {
            return None;
        }
        // An offer takes the acknowledgement along.
        let taken_along =
            || self.offering.has_next() && self.may_send() && self.received.run().is_some();
        if self.received.is_due(now) && !taken_along() {
            let credit = self.told_credit();
            let ack = self.received.take_ack(now, credit);
            self.stats.acks_sent += 1;
            self.write_bare(now, &Body::Ack(ack), head);
            return Some(None);
        }
        if !self.may_send() {
            // A peer whose reader has all frames has room for what nobody reads.
            if self.has_window(CONTROL_CREDIT) && self.next_control(now, head) {
                return Some(None);
            }
            // Credit is no reason for the window to grow.
            let full = self.sent.in_flight_bytes() >= self.controller.window_bytes();
            self.limited |= full && self.has_data();
            return None;
        }
        let payload = if self.next_control(now, head) {
            None
        } else if self.offering.has_next() {
            self.next_offer(now, head, crc)?
        } else {
            Some(self.next_data(now, head, crc)?)
        };
        self.extra = self.extra.saturating_sub(1);
        Some(payload.filter(|segment| segment.len > 0))
    }

    pub(super) fn has_data(&self) -> bool {
        self.sending.has_next() || self.offering.has_next()
    }

    fn may_send(&self) -> bool {
        self.has_window(self.credit)
    }

    fn has_window(&self, credit: u32) -> bool {
        self.extra > 0
            || (self.sent.in_flight_bytes() < self.controller.window_bytes()
                && self.sent.in_flight() < u64::from(credit))
    }

    /// Writes the next control message; false if there is none.
    fn next_control<const N: usize>(&mut self, now: Time, head: &mut ArrayVec<u8, N>) -> bool {
        while let Some(control) = self.pop_control() {
            let (transfer, body) = match control {
                Control::Done(id) => match self.receiving.done(id) {
                    Some(done) => (id, Body::Done(done)),
                    // Over since it was queued.
                    None => continue,
                },
                Control::DoneAck(id, answer) => (id, Body::DoneAck(answer)),
                Control::Reset(id, scope, reason) => (id, Body::Reset(Reset { scope, reason })),
                Control::Grant => {
                    let (total, len_max) = self.offered.tell(true);
                    let total = total as u32;
                    (NO_TRANSFER, Body::Grant(Grant { total, len_max }))
                }
                Control::Probe => (
                    NO_TRANSFER,
                    Body::Probe(Probe {
                        token: self.new_token(now),
                    }),
                ),
                Control::ProbeAck(token) => (NO_TRANSFER, Body::ProbeAck(ProbeAck { token })),
            };
            let number = self.sent.next_number();
            let len = self.write(now, number, transfer, &body, head);
            self.sent.push(now, len, Content::Control(control));
            return true;
        }
        false
    }

    fn pop_control(&mut self) -> Option<Control> {
        if std::mem::take(&mut self.probe_due) {
            return Some(Control::Probe);
        }
        self.controls.pop_front()
    }

    /// Writes the header of the next data packet; returns what follows it.
    fn next_data<const N: usize>(
        &mut self,
        now: Time,
        head: &mut ArrayVec<u8, N>,
        crc: &mut impl FnMut(Segment) -> u32,
    ) -> Option<Segment> {
        let next = self.sending.next(self.config.segment_max())?;
        let segment = next.segment;
        let payload_crc = if segment.len == 0 { 0 } else { crc(segment) };
        self.sending.record(next, payload_crc);
        let header = Header {
            kind: Kind::Data,
            flags: if next.fin { FLAG_FIN } else { 0 },
            payload_len: segment.len as u16,
            session: self.remote,
            transfer: segment.transfer,
            timestamp: now.as_wire_micros(),
            path: self.config.path,
            packet_number: self.sent.next_number(),
            offset: segment.offset,
        };
        let content = Content::Data {
            segment,
            index: next.index,
        };
        self.sent
            .push(now, HEADER_LEN as u32 + segment.len, content);
        self.stats.packets_sent += 1;
        self.stats.bytes_sent += u64::from(segment.len);
        append(head, &header.encode(payload_crc));
        Some(segment)
    }

    /// Writes the next offer up to its tensor; returns what follows, none if nothing
    /// does. None if there was none after all.
    fn next_offer<const N: usize>(
        &mut self,
        now: Time,
        head: &mut ArrayVec<u8, N>,
        crc: &mut impl FnMut(Segment) -> u32,
    ) -> Option<Option<Segment>> {
        let next = self.offering.next()?;
        let (number, transfer) = (next.number, TransferId::of_offer(next.number));
        let segment = Segment {
            transfer,
            offset: 0,
            len: next.len,
        };
        let digest = Digest(if next.len == 0 { 0 } else { crc(segment) });
        let changed = next.digest.is_some_and(|before| before != digest);
        let void = next.void || changed;
        let (largest, acked) = self.received.run().unwrap_or_default();
        let prefix = Offer {
            digest: if void { Digest(0) } else { digest },
            granted: self.offered.tell(false).0 as u32,
            acked,
            metadata: if void {
                Metadata::new()
            } else {
                next.metadata.clone()
            },
        };
        if changed {
            let reason = FailReason::DigestMismatch;
            self.events.extend(self.offering.abandon(number, reason));
        } else {
            self.offering.record(number, digest);
        }
        if acked > 0 {
            self.received.taken_along();
        }
        let payload = (!void && segment.len > 0).then_some(segment);
        let bytes = prefix.encode();
        let tensor_len = payload.map_or(0, |segment| segment.len);
        let header = Header {
            kind: Kind::Offer,
            flags: if void { FLAG_VOID } else { 0 },
            payload_len: (bytes.len() as u32 + tensor_len) as u16,
            session: self.remote,
            transfer,
            timestamp: now.as_wire_micros(),
            path: self.config.path,
            packet_number: self.sent.next_number(),
            offset: largest,
        };
        let len = HEADER_LEN as u32 + u32::from(header.payload_len);
        self.sent.push(now, len, Content::Offer(number));
        self.stats.packets_sent += 1;
        self.stats.bytes_sent += u64::from(tensor_len);
        append(head, &header.encode(wire::crc(&bytes)));
        append(head, &bytes);
        Some(payload)
    }

    /// Writes a packet that nobody acknowledges.
    fn write_bare<const N: usize>(&mut self, now: Time, body: &Body, head: &mut ArrayVec<u8, N>) {
        let number = self.sent.skip();
        self.write(now, number, NO_TRANSFER, body, head);
    }

    /// Writes a control packet; returns its length.
    fn write<const N: usize>(
        &mut self,
        now: Time,
        number: u64,
        transfer: TransferId,
        body: &Body,
        head: &mut ArrayVec<u8, N>,
    ) -> u32 {
        let payload = body.encode();
        let header = Header {
            kind: body.kind(),
            flags: 0,
            payload_len: payload.len() as u16,
            session: self.remote,
            transfer,
            timestamp: now.as_wire_micros(),
            path: self.config.path,
            packet_number: number,
            offset: 0,
        };
        self.stats.packets_sent += 1;
        append(head, &header.encode(wire::crc(&payload)));
        append(head, &payload);
        (HEADER_LEN + payload.len()) as u32
    }

    /// A token for a probe sent now (SplitMix64 over the seed).
    fn new_token(&mut self, now: Time) -> u64 {
        self.tokens = self.tokens.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut token = self.tokens;
        token = (token ^ token >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        token = (token ^ token >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        token ^= token >> 31;
        if self.probes.len() == PROBES_MAX {
            self.probes.remove(0);
        }
        self.probes.push((token, now));
        token
    }
}

fn append<const N: usize>(head: &mut ArrayVec<u8, N>, bytes: &[u8]) {
    head.try_extend_from_slice(bytes)
        .expect("room for a header and a control packet's payload");
}
