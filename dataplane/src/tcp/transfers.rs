//! The transfers of one session, as the TCP engine keeps them.

#![forbid(unsafe_code)]

use std::ops::Range;

use genie_proto::Digest;

use super::frame::CHUNK_MAX;
use crate::engine::{FailReason, OperationId};
use crate::memory::Lease;

/// A transfer that we receive.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Whom to answer.
    pub(crate) operation: OperationId,
    /// Destination; its length is the grant.
    pub(crate) into: Lease,
    /// What has been applied.
    pub(crate) applied: genie_proto::transfer::Incoming,
    /// What we said in DONE; from then on the sender's verdict is awaited.
    pub(crate) done: Option<Digest>,
}

/// A transfer that we send.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// Whom to answer.
    pub(crate) operation: OperationId,
    /// Source.
    pub(crate) from: Lease,
    /// Chunks that a connection is writing. The lease is held until it is zero.
    pub(crate) writing: u32,
    /// Why it failed, while chunks are still being written.
    pub(crate) failed: Option<FailReason>,
    sent: genie_proto::transfer::Outgoing,
    /// The one chunk of a tensor of zero bytes is still to be sent.
    empty: bool,
}

/// What to send next of a transfer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NextChunk {
    /// Which bytes.
    pub(crate) range: Range<usize>,
    /// CRC32C of them.
    pub(crate) crc: u32,
}

impl Outgoing {
    /// A transfer of which nothing is sent.
    pub(crate) fn new(operation: OperationId, from: Lease) -> Self {
        let sent = genie_proto::transfer::Outgoing::new(from.len() as u64);
        let empty = from.is_empty();
        Self {
            operation,
            from,
            writing: 0,
            failed: None,
            sent,
            empty,
        }
    }

    /// The next chunk; a tensor of zero bytes has one, of zero bytes.
    pub(crate) fn next_chunk(&mut self) -> Option<NextChunk> {
        if std::mem::take(&mut self.empty) {
            return Some(NextChunk {
                range: 0..0,
                crc: 0,
            });
        }
        let piece = self.sent.next(u64::from(CHUNK_MAX))?;
        let range = piece.offset as usize..(piece.offset + piece.len) as usize;
        let crc = self.from.crc32c(range.clone());
        self.sent.record(piece, crc);
        Some(NextChunk { range, crc })
    }

    /// Whether chunks are left that no connection took.
    pub(crate) fn has_more(&self) -> bool {
        self.empty || self.sent.has_next()
    }

    /// Whether the kernel has every byte.
    pub(crate) fn is_written(&self) -> bool {
        !self.has_more() && self.writing == 0
    }

    /// CRC32C of the tensor, once [`Outgoing::is_written`].
    pub(crate) fn digest(&self) -> Digest {
        self.sent.digest().unwrap_or_default()
    }
}
