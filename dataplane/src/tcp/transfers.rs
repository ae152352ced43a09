//! The transfers of one session, as the TCP engine keeps them.

#![forbid(unsafe_code)]

use genie_proto::Digest;
use genie_proto::transfer::{OutOfMemory, Piece};

use super::frame::CHUNK_MAX;
use crate::engine::{Cost, FailReason, Interrupted, OperationId, Partial};
use crate::ledger::Copies;
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
    before: Before,
}

/// What was so when this path took a transfer over.
#[derive(Clone, Copy, Debug, Default)]
struct Before {
    /// Bytes that had moved.
    bytes: u64,
    /// What that had taken.
    cost: Cost,
    /// Whether this path seals what it carries.
    sealed: bool,
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
    before: Before,
    /// Nothing of it moved before, and one chunk is all of it.
    whole: bool,
    /// The one chunk of a tensor of zero bytes is still to be sent.
    empty: bool,
}

impl Before {
    /// What `bytes` that moved in all have taken: here the kernel copied each
    /// once at this end, between the tensor and its buffers, or, where records
    /// are sealed, between these and private memory, which we copy to or from.
    fn cost(self, bytes: u64) -> Cost {
        let moved = bytes.saturating_sub(self.bytes);
        let copies = Copies {
            kernel: moved,
            genie: if self.sealed { moved } else { 0 },
            ..Copies::default()
        };
        self.cost.plus(Cost {
            retransmits: 0,
            copies,
        })
    }
}

impl Incoming {
    /// A transfer of which nothing has arrived, or what another path brought.
    pub(crate) fn new(
        operation: OperationId,
        into: Lease,
        resume: Option<Box<Partial<genie_proto::Incoming>>>,
        sealed: bool,
    ) -> Result<Self, OutOfMemory> {
        let (applied, cost) = match resume {
            None => (
                genie_proto::Incoming::new(into.len() as u64)?,
                Cost::default(),
            ),
            Some(partial) => (partial.moved, partial.cost),
        };
        let bytes = applied.bytes_applied();
        Ok(Self {
            operation,
            into,
            applied,
            done: None,
            before: Before {
                bytes,
                cost,
                sealed,
            },
        })
    }

    /// What it took so far, on all paths.
    pub(crate) fn cost(&self) -> Cost {
        self.before.cost(self.applied.bytes_applied())
    }

    /// What has moved; gives the lease back.
    pub(crate) fn into_partial(self) -> Interrupted {
        let cost = self.cost();
        let moved = self.applied;
        Interrupted::Incoming(Partial { moved, cost })
    }
}

impl Outgoing {
    /// A transfer of which nothing is sent, or what another path carried.
    pub(crate) fn new(
        operation: OperationId,
        from: Lease,
        resume: Option<Box<Partial<genie_proto::Outgoing>>>,
        sealed: bool,
    ) -> Self {
        let whole = resume.is_none() && from.len() <= CHUNK_MAX as usize;
        let (sent, cost) = match resume {
            None => (
                genie_proto::Outgoing::new(from.len() as u64),
                Cost::default(),
            ),
            Some(partial) => (partial.moved, partial.cost),
        };
        let empty = from.is_empty();
        let bytes = sent.bytes_acked();
        Self {
            operation,
            from,
            writing: 0,
            failed: None,
            sent,
            before: Before {
                bytes,
                cost,
                sealed,
            },
            whole,
            empty,
        }
    }

    /// What it took so far, on all paths. Chunks that a connection has begun
    /// to write count whole.
    pub(crate) fn cost(&self) -> Cost {
        let unsent = self.sent.bytes_unsent() + self.sent.bytes_again();
        self.before.cost(self.sent.len() - unsent)
    }

    /// What has moved; gives the lease back.
    pub(crate) fn into_partial(self) -> Interrupted {
        let cost = self.cost();
        let moved = self.sent;
        Interrupted::Outgoing(Partial { moved, cost })
    }

    /// The next chunk; a tensor of zero bytes has one, of zero bytes.
    pub(crate) fn next_chunk(&mut self) -> Option<Piece> {
        if std::mem::take(&mut self.empty) {
            return Some(Piece {
                offset: 0,
                len: 0,
                first: false,
            });
        }
        self.sent.next(u64::from(CHUNK_MAX))
    }

    /// Takes in the CRC32C of a chunk.
    pub(crate) fn record(&mut self, piece: Piece, crc: u32) {
        if piece.first {
            self.sent.record(piece, crc);
        }
    }

    /// Whether one frame carries all of it, so that the receiver, which has
    /// compared that frame's CRC, awaits no DONE_OK.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
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
