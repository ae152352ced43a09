//! What a session receives. Everything is judged before a byte is written.

#![forbid(unsafe_code)]

use std::io;
use std::time::Duration;

use genie_proto::transfer::{Check, Refusal};
use genie_proto::{Digest, TransferId};

use super::{Context, Ended, Session, lost_connection, receipt, refused};
use crate::engine::{Completion, FailReason};
use crate::memory::Lease;
use crate::tcp::frame::{Header, Kind, Reason};
use crate::tcp::reader::{Item, Outcome, Payload};

/// Bytes that one connection reads before the others get their turn.
const READ_BUDGET: usize = 1 << 20;
/// Calls that one connection makes for that, however little each brings.
const READ_CALLS: usize = 256;
/// Control frames that may wait for a peer that makes us answer and does not
/// read: more than all operations there can be need.
const CONTROL_MAX: usize = 4 * crate::endpoint::OPERATIONS_MAX;

/// What is left of a connection's turn to read.
#[derive(Debug)]
pub(crate) struct Turn {
    bytes: usize,
    calls: usize,
}

/// How a turn of reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadEnd {
    /// Nothing is left, or the turn is over; epoll will say.
    Done,
    /// A frame is about a transfer that may be in the command ring: look there
    /// and read again.
    CommandsFirst,
}

impl Default for Turn {
    fn default() -> Self {
        Self {
            bytes: READ_BUDGET,
            calls: READ_CALLS,
        }
    }
}

impl Session {
    /// Reads from one connection what is there, within bounds.
    pub(crate) fn read(
        &mut self,
        index: usize,
        turn: &mut Turn,
        context: &mut Context,
    ) -> Result<ReadEnd, Ended> {
        if !self.is_up(index) {
            return Ok(ReadEnd::Done);
        }
        let parked = self.streams[index]
            .as_mut()
            .and_then(|stream| stream.parked.take());
        if let Some(header) = parked {
            self.handle_frame(index, header, context)?;
        }
        loop {
            while let Some(item) = self.next_item(index)? {
                match item {
                    Item::Payload(payload) => self.handle_payload(index, payload, context)?,
                    Item::Header(header) if self.may_be_granted_yet(&header) => {
                        let Some(stream) = &mut self.streams[index] else {
                            break;
                        };
                        stream.parked = Some(header);
                        return Ok(ReadEnd::CommandsFirst);
                    }
                    Item::Header(header) => self.handle_frame(index, header, context)?,
                }
            }
            let Some(stream) = &mut self.streams[index] else {
                break;
            };
            // Of what was opened already epoll would not tell.
            if (turn.bytes == 0 || turn.calls == 0) && !stream.wire.has_opened() {
                break;
            }
            let read = stream.reader.read(&mut stream.wire, &mut context.scratch);
            let outcome = read.map_err(|error| {
                context.totals.forged += u64::from(error.kind() == io::ErrorKind::InvalidData);
                lost_connection(&error)
            })?;
            match outcome {
                Outcome::Blocked => {
                    if stream.wire.take_fresh() {
                        stream.heard(context.now);
                    }
                    break;
                }
                Outcome::EndOfStream => {
                    let reason = "the peer closed the connection".to_owned();
                    return Err(FailReason::PathLost(reason).into());
                }
                Outcome::Bytes { received, drained } => {
                    stream.heard(context.now);
                    stream.reader.sum_up(self.integrity);
                    turn.bytes = turn.bytes.saturating_sub(received);
                    turn.calls = turn.calls.saturating_sub(1);
                    if drained {
                        // Asking again would only be told so; epoll tells
                        // when there is more.
                        turn.calls = 0;
                    }
                }
            }
        }
        self.write(index, context)?;
        Ok(ReadEnd::Done)
    }

    fn next_item(&mut self, index: usize) -> Result<Option<Item>, Ended> {
        let Some(stream) = &mut self.streams[index] else {
            return Ok(None);
        };
        if stream.writer.control_len() > CONTROL_MAX {
            return Err(protocol("it does not read our answers").into());
        }
        stream
            .reader
            .next_item()
            .map_err(|malformed| protocol(&malformed.to_string()).into())
    }

    /// Whether a frame is about a grant that we do not know, but may find among
    /// the commands.
    fn may_be_granted_yet(&self, header: &Header) -> bool {
        matches!(header.kind, Kind::Data | Kind::ResetBySender)
            && !self.incoming.contains_key(&header.transfer)
    }

    fn handle_frame(
        &mut self,
        index: usize,
        header: Header,
        context: &mut Context,
    ) -> Result<(), Ended> {
        match header.kind {
            Kind::Data => self.handle_data(index, header, context)?,
            Kind::Done => self.handle_done(index, header, context)?,
            Kind::DoneOk => self.handle_verdict(header, true, context)?,
            Kind::DoneMismatch => self.handle_verdict(header, false, context)?,
            Kind::ResetBySender => {
                self.fail_incoming(header.transfer, why_reset(header.reason), context);
            }
            Kind::ResetByReceiver => {
                self.fail_outgoing(header.transfer, why_reset(header.reason), context);
            }
            Kind::Close => return Err(FailReason::Closed.into()),
            Kind::Ping => self.answer(index, Header::plain(Kind::Pong, header.offset)),
            Kind::Pong => self.handle_pong(index, header.offset, context),
            // The reader takes it together with its payload.
            Kind::Sum => return Err(protocol("a checksum stands alone").into()),
        }
        Ok(())
    }

    /// Decides where the payload behind `header` goes.
    fn handle_data(
        &mut self,
        index: usize,
        header: Header,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let target = self.judge_data(index, &header)?;
        if target.is_none() {
            self.dropped += 1;
            context.totals.dropped += 1;
        }
        if let Some(stream) = &mut self.streams[index] {
            stream.reader.expect_payload(header, target);
        }
        Ok(())
    }

    fn judge_data(&mut self, index: usize, header: &Header) -> Result<Option<Lease>, Ended> {
        let transfer = header.transfer;
        let Some(incoming) = self.incoming.get(&transfer) else {
            let reset = Header::about(Kind::ResetByReceiver, transfer);
            let reason = self.why_given_up(transfer);
            self.answer(index, Header { reason, ..reset });
            return Ok(None);
        };
        let (len, granted) = (u64::from(header.payload_len), incoming.into.len() as u64);
        let end = header.offset.checked_add(len).filter(|end| *end <= granted);
        if end.is_none() || (len == 0 && granted != 0) {
            let offset = header.offset;
            return Err(protocol(&format!(
                "it sent {len} bytes at {offset} of a transfer of {granted}"
            ))
            .into());
        }
        // A chunk that another connection is reading counts as applied: what
        // is verified must not be overwritten by what is not.
        let begun = self
            .streams
            .iter()
            .flatten()
            .filter_map(|stream| stream.reader.payload());
        let overlaps = begun
            .filter(|payload| payload.target.is_some())
            .any(|payload| {
                let other = &payload.header;
                other.transfer == transfer
                    && header.offset < other.offset + u64::from(other.payload_len)
                    && other.offset < header.offset + len
            });
        if overlaps || incoming.done.is_some() {
            return Ok(None);
        }
        match incoming.applied.check(header.offset, len) {
            Check::Fresh => Ok(Some(incoming.into.clone())),
            // The one chunk of a tensor of zero bytes.
            Check::Refused(Refusal::Empty) => Ok(Some(incoming.into.clone())),
            Check::Duplicate | Check::Refused(Refusal::Overlap) => Ok(None),
            Check::Refused(refusal) => Err(protocol(&refusal.to_string()).into()),
        }
    }

    /// Verifies a chunk that has arrived whole.
    fn handle_payload(
        &mut self,
        index: usize,
        mut payload: Payload,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let header = payload.header;
        let len = header.payload_len as usize;
        context.totals.copies.kernel += len as u64;
        let (crc, expected) = (payload.sum(), payload.crc);
        // Its lease is given back before anybody is answered.
        if payload.target.take().is_none() {
            return Ok(());
        }
        let Some(incoming) = self.incoming.get_mut(&header.transfer) else {
            return Ok(());
        };
        if expected != Some(crc) {
            let reset = Header::about(Kind::ResetByReceiver, header.transfer);
            self.answer(
                index,
                Header {
                    reason: Reason::Digest,
                    ..reset
                },
            );
            self.dropped += 1;
            self.note_given_up(header.transfer, Reason::Digest);
            self.fail_incoming(header.transfer, FailReason::DigestMismatch, context);
            return Ok(());
        }
        if len > 0 {
            incoming.applied.apply(header.offset, len as u64, crc);
        }
        context.totals.received_bytes += len as u64;
        self.moved_at = context.now;
        if incoming.applied.is_complete() {
            let digest = incoming.applied.digest();
            incoming.done = Some(digest);
            let bytes = incoming.into.len() as u64;
            let done = Header {
                offset: bytes,
                crc: digest.0,
                ..Header::about(Kind::Done, header.transfer)
            };
            self.answer(index, done);
            if header.is_whole(bytes) {
                // The frame's CRC was the sender's digest: nothing is left to
                // be compared, and a round trip is saved.
                self.finish_incoming(header.transfer, digest, context);
            }
        }
        Ok(())
    }

    /// The receiver has it all: compares, answers, and is done.
    fn handle_done(
        &mut self,
        index: usize,
        header: Header,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let transfer = header.transfer;
        let Some(outgoing) = self.outgoing.get(&transfer) else {
            self.dropped += 1;
            let reset = Header::about(Kind::ResetBySender, transfer);
            self.answer(
                index,
                Header {
                    reason: Reason::Unknown,
                    ..reset
                },
            );
            return Ok(());
        };
        if outgoing.failed.is_some() {
            return Ok(());
        }
        if !outgoing.is_written() {
            return Err(protocol("it claims to have what was not sent").into());
        }
        let (digest, bytes) = (outgoing.digest(), outgoing.from.len() as u64);
        let cost = outgoing.cost();
        if header.crc != digest.0 || header.offset != bytes {
            self.answer(index, Header::about(Kind::DoneMismatch, transfer));
            self.fail_outgoing(transfer, FailReason::DigestMismatch, context);
            return Ok(());
        }
        if !outgoing.is_whole() {
            self.answer(index, Header::about(Kind::DoneOk, transfer));
        }
        if let Some(outgoing) = self.outgoing.remove(&transfer) {
            self.moved_at = context.now;
            let operation = outgoing.operation;
            drop(outgoing);
            let result = Ok(receipt(bytes, digest, cost));
            context
                .completions
                .push(Completion::Transferred { operation, result });
        }
        Ok(())
    }

    /// The sender has compared the digests.
    fn handle_verdict(
        &mut self,
        header: Header,
        equal: bool,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let Some(incoming) = self.incoming.get(&header.transfer) else {
            return Ok(());
        };
        let Some(digest) = incoming.done else {
            return Err(protocol("it confirms what we have not received").into());
        };
        if !equal {
            self.fail_incoming(header.transfer, FailReason::DigestMismatch, context);
            return Ok(());
        }
        self.finish_incoming(header.transfer, digest, context);
        Ok(())
    }

    fn finish_incoming(&mut self, transfer: TransferId, digest: Digest, context: &mut Context) {
        if let Some(incoming) = self.incoming.remove(&transfer) {
            self.moved_at = context.now;
            let (operation, bytes) = (incoming.operation, incoming.into.len() as u64);
            let cost = incoming.cost();
            drop(incoming);
            let result = Ok(receipt(bytes, digest, cost));
            context
                .completions
                .push(Completion::Transferred { operation, result });
        }
    }

    fn handle_pong(&mut self, index: usize, asked_at: u64, context: &mut Context) {
        let now = context.clock();
        if let Some(stream) = &mut self.streams[index] {
            // A clock value that we never sent makes no sense, but no harm.
            stream.measured(Duration::from_nanos(now.saturating_sub(asked_at)));
        }
        self.note_open(context);
    }

    /// Queues a frame on the connection that asked for it.
    fn answer(&mut self, index: usize, header: Header) {
        if let Some(stream) = &mut self.streams[index] {
            stream.writer.control(header);
        }
    }
}

fn protocol(what: &str) -> FailReason {
    FailReason::Protocol(what.to_owned())
}

fn why_reset(reason: Reason) -> FailReason {
    match reason {
        Reason::None | Reason::Cancelled => FailReason::CancelledByPeer,
        Reason::Unknown => refused("the peer does not know the transfer"),
        Reason::Digest => FailReason::DigestMismatch,
    }
}
