//! What a session sends: any connection that can take a chunk pulls the next one.

#![forbid(unsafe_code)]

use arrayvec::ArrayVec;
use genie_proto::TransferId;

use super::{Context, Ended, Session, Stage, lost_connection, record};
use crate::tcp::frame::{CHUNK_MAX, Header, Kind};
use crate::tcp::writer::{Chunk, FRAMES_MAX};

/// Bytes that one connection writes before the others get their turn.
const WRITE_BUDGET: usize = 1 << 20;

impl Session {
    /// Writes on every connection what it takes.
    pub(crate) fn write_all(&mut self, context: &mut Context) -> Result<(), Ended> {
        (0..self.streams.len()).try_for_each(|index| self.write(index, context))
    }

    /// Writes on one connection until it takes no more, nothing is left, or
    /// its turn is over; then waits for what is needed to go on.
    pub(crate) fn write(&mut self, index: usize, context: &mut Context) -> Result<(), Ended> {
        let mut budget = WRITE_BUDGET;
        while budget > 0 && self.is_up(index) {
            self.fill_batch(index);
            match self.flush_batch(index, context)? {
                Some(sent) => budget = budget.saturating_sub(sent),
                None => break,
            }
        }
        let Some(stream) = &mut self.streams[index] else {
            return Ok(());
        };
        let wants_to_write = matches!(stream.stage, Stage::Up)
            && (!stream.writer.is_idle() || !self.sendable.is_empty());
        stream
            .arm(&context.epoll, wants_to_write)
            .map_err(|error| lost_connection(&error))
    }

    /// Begins a new batch if the last one is written: control frames first,
    /// then chunks, at most about one chunk's worth of bytes.
    fn fill_batch(&mut self, index: usize) {
        let Some(stream) = &mut self.streams[index] else {
            return;
        };
        let writer = &mut stream.writer;
        if !writer.is_drained() {
            return;
        }
        writer.take_sum_and_control();
        let mut bytes = 0;
        while bytes < CHUNK_MAX as usize && writer.has_room() {
            let Some(transfer) = self.sendable.pop_front() else {
                return;
            };
            // It may have ended since it was queued.
            let Some(outgoing) = self.outgoing.get_mut(&transfer) else {
                continue;
            };
            if outgoing.failed.is_some() {
                continue;
            }
            let Some(piece) = outgoing.next_chunk() else {
                continue;
            };
            outgoing.writing += 1;
            let mut chunk = Chunk::new(transfer, outgoing.from.clone(), piece, self.integrity);
            let mut header = Header {
                payload_len: piece.len as u32,
                offset: piece.offset,
                ..Header::about(Kind::Data, transfer)
            };
            if !header.sum_follows() {
                header.crc = chunk.read_crc();
                outgoing.record(piece, header.crc);
            }
            bytes += chunk.len();
            writer.chunk(header, chunk);
            if outgoing.has_more() {
                // To the back: a small tensor does not wait for a large one.
                self.sendable.push_back(transfer);
            }
            if header.sum_follows() {
                // Directly behind it: with the next batch.
                return;
            }
        }
    }

    /// Writes once; `None` if there is nothing to write or the socket is full.
    fn flush_batch(&mut self, index: usize, context: &mut Context) -> Result<Option<usize>, Ended> {
        let Some(stream) = &mut self.streams[index] else {
            return Ok(None);
        };
        if stream.writer.is_drained() {
            return Ok(None);
        }
        let (outgoing, totals) = (&mut self.outgoing, &mut context.totals);
        let (moved_at, now) = (&mut self.moved_at, context.now);
        let mut given_up = ArrayVec::<TransferId, FRAMES_MAX>::new();
        let sealed = stream.wire.is_sealed();
        let flushed = stream.writer.flush(&mut stream.wire, |chunk| {
            totals.copies.kernel += chunk.piece.len;
            totals.copies.genie += if sealed { chunk.piece.len } else { 0 };
            totals.sent_bytes += chunk.piece.len;
            *moved_at = now;
            record(outgoing, chunk);
            if let Some(outgoing) = outgoing.get_mut(&chunk.transfer) {
                outgoing.writing -= 1;
                if outgoing.writing == 0 && outgoing.failed.is_some() {
                    given_up.push(chunk.transfer);
                }
            }
        });
        for transfer in given_up {
            if let Some(outgoing) = self.outgoing.remove(&transfer)
                && let Some(reason) = outgoing.failed
            {
                let operation = outgoing.operation;
                drop(outgoing.from);
                context.fail(operation, reason);
            }
        }
        flushed.map_err(|error| lost_connection(&error))
    }
}
