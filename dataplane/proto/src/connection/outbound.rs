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

impl Connection {
    /// The next datagram to send now, if there is one. `crc` returns the CRC32C
    /// of a segment of the source; it is called once for a datagram with payload.
    ///
    /// A datagram given counts as sent: one that the device refuses is to be
    /// kept and offered again, or is lost like any other.
    pub fn poll_transmit(
        &mut self,
        now: Time,
        mut crc: impl FnMut(Segment) -> u32,
    ) -> Option<Transmit> {
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
            return Some(self.bare(now, Body::Reset(reset)));
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
        // An offer takes the acknowledgement along.
        let taken_along =
            || self.offering.has_next() && self.may_send() && self.received.run().is_some();
        if self.received.is_due(now) && !taken_along() {
            let credit = self.told_credit();
            let ack = self.received.take_ack(now, credit);
            self.stats.acks_sent += 1;
            return Some(self.bare(now, Body::Ack(ack)));
        }
        if !self.may_send() {
            // Credit is no reason for the window to grow.
            let full = self.sent.in_flight_bytes() >= self.controller.window_bytes();
            self.limited |= full && self.has_data();
            return None;
        }
        let message = self
            .next_control(now)
            .or_else(|| self.next_offer(now, &mut crc));
        if message.is_some() {
            self.extra = self.extra.saturating_sub(1);
            return message;
        }
        let (header, payload) = self.next_data(now, crc)?;
        self.extra = self.extra.saturating_sub(1);
        // Made where it is returned from: to move it is to copy all its room.
        let mut head = ArrayVec::new();
        head.try_extend_from_slice(&header)
            .expect("a header fits a head");
        Some(Transmit { head, payload })
    }

    pub(super) fn has_data(&self) -> bool {
        self.sending.has_next() || self.offering.has_next()
    }

    fn may_send(&self) -> bool {
        self.extra > 0
            || (self.sent.in_flight_bytes() < self.controller.window_bytes()
                && self.sent.in_flight() < u64::from(self.credit))
    }

    fn next_control(&mut self, now: Time) -> Option<Transmit> {
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
            let transmit = self.encode(now, number, transfer, &body);
            self.sent
                .push(now, transmit.head.len() as u32, Content::Control(control));
            return Some(transmit);
        }
        None
    }

    fn pop_control(&mut self) -> Option<Control> {
        if std::mem::take(&mut self.probe_due) {
            return Some(Control::Probe);
        }
        self.controls.pop_front()
    }

    /// The header of the next data packet, and what follows it.
    fn next_data(
        &mut self,
        now: Time,
        mut crc: impl FnMut(Segment) -> u32,
    ) -> Option<([u8; HEADER_LEN], Option<Segment>)> {
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
        let payload = (segment.len > 0).then_some(segment);
        Some((header.encode(payload_crc), payload))
    }

    fn next_offer(&mut self, now: Time, crc: &mut impl FnMut(Segment) -> u32) -> Option<Transmit> {
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
        let mut head = ArrayVec::new();
        for part in [&header.encode(wire::crc(&bytes))[..], &bytes] {
            head.try_extend_from_slice(part)
                .expect("a header and an offer's beginning fit a head");
        }
        Some(Transmit { head, payload })
    }

    /// A packet that nobody acknowledges.
    fn bare(&mut self, now: Time, body: Body) -> Transmit {
        let number = self.sent.skip();
        self.encode(now, number, NO_TRANSFER, &body)
    }

    fn encode(&mut self, now: Time, number: u64, transfer: TransferId, body: &Body) -> Transmit {
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
        let mut head = ArrayVec::new();
        head.try_extend_from_slice(&header.encode(wire::crc(&payload)))
            .expect("a header fits a head");
        head.try_extend_from_slice(&payload)
            .expect("a control payload fits after a header");
        Transmit {
            head,
            payload: None,
        }
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
