//! Transfers, and the bytes of them: copied by the receiver, checked by both.
//!
//! Work is done in steps, so that one large tensor delays nobody's heartbeat.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use genie_proto::{Digest, DigestBuilder, Integrity};

use crate::engine::{Cost, Interrupted, OperationId, Partial};
use crate::ledger::Copies;
use crate::memory::Lease;

/// Bytes copied, and then checked while they are in the cache: half of a small
/// second-level cache, and enough that a system call costs nothing beside it.
const BLOCK: usize = 128 << 10;

/// A transfer that this end receives.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// To be answered.
    pub(crate) operation: OperationId,
    /// Destination.
    pub(crate) into: Lease,
    /// What other paths cost.
    pub(crate) spent: Cost,
    /// How far it is.
    pub(crate) stage: Stage,
}

/// How far a transfer is that this end receives.
///
/// ```text
///   Granted ──OFFER──▶ Copying ──all there, DONE sent──▶ Verifying ──VERDICT──▶ answered
/// ```
#[derive(Debug)]
pub(crate) enum Stage {
    /// The sender may offer it.
    Granted,
    /// Bytes are being copied.
    Copying(Copying),
    /// The sender was told this digest.
    Verifying(Digest),
}

/// A copy under way.
#[derive(Debug)]
pub(crate) struct Copying {
    memory: Arc<OwnedFd>,
    /// Where the tensor begins in that.
    at: u64,
    done: usize,
    integrity: Integrity,
    digest: DigestBuilder,
}

/// A transfer that this end sends.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// To be answered.
    pub(crate) operation: OperationId,
    /// Source.
    pub(crate) from: Lease,
    /// What other paths cost.
    pub(crate) spent: Cost,
    /// What the receiver says it has.
    pub(crate) theirs: Option<Digest>,
    done: usize,
    integrity: Integrity,
    digest: DigestBuilder,
}

impl Incoming {
    /// What another path goes on from: nothing but what it cost so far. None
    /// for a length that other paths do not carry.
    pub(crate) fn into_partial(self) -> Option<Interrupted> {
        let copied = match &self.stage {
            Stage::Granted => 0,
            Stage::Copying(copying) => copying.done,
            Stage::Verifying(_) => self.into.len(),
        };
        let copies = Copies {
            kernel: copied as u64,
            ..Copies::default()
        };
        let cost = self.spent.plus(Cost {
            copies,
            ..Cost::default()
        });
        let moved = genie_proto::Incoming::new(self.into.len() as u64).ok()?;
        Some(Interrupted::Incoming(Partial { moved, cost }))
    }
}

impl Copying {
    /// Begins to copy what lies `at` in `memory`.
    pub(crate) fn new(memory: Arc<OwnedFd>, at: u64, into: &Lease, integrity: Integrity) -> Self {
        Self {
            memory,
            at,
            done: 0,
            integrity,
            digest: DigestBuilder::new(into.len() as u64),
        }
    }

    /// Copies about `limit` bytes; returns how many, and the digest once it has all.
    pub(crate) fn step(
        &mut self,
        into: &Lease,
        limit: usize,
    ) -> io::Result<(usize, Option<Digest>)> {
        let before = self.done;
        while self.done < into.len() && self.done - before < limit {
            let end = into.len().min(self.done + BLOCK);
            let at = self.at + self.done as u64;
            let read = into.read_file(self.done..end, &*self.memory, at)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let copied = self.done..self.done + read;
            let crc = self.integrity.checksum(|| into.crc32c(copied));
            self.digest.add(self.done as u64, read as u64, crc);
            self.done += read;
        }
        let whole = (self.done == into.len()).then(|| self.digest.finish());
        Ok((self.done - before, whole))
    }
}

impl Outgoing {
    /// Nothing is checked yet.
    pub(crate) fn new(
        operation: OperationId,
        from: Lease,
        spent: Cost,
        integrity: Integrity,
    ) -> Self {
        Self {
            operation,
            spent,
            theirs: None,
            done: 0,
            integrity,
            digest: DigestBuilder::new(from.len() as u64),
            from,
        }
    }

    /// What another path goes on from: the receiver asks for all of it.
    pub(crate) fn into_partial(self) -> Interrupted {
        let moved = genie_proto::Outgoing::new(self.from.len() as u64);
        let cost = self.spent;
        Interrupted::Outgoing(Partial { moved, cost })
    }

    /// Checks about `limit` bytes; returns how many.
    pub(crate) fn step(&mut self, limit: usize) -> usize {
        let before = self.done;
        while self.done < self.from.len() && self.done - before < limit {
            let end = self.from.len().min(self.done + BLOCK);
            let crc = (self.integrity).checksum(|| self.from.crc32c(self.done..end));
            self.digest
                .add(self.done as u64, (end - self.done) as u64, crc);
            self.done = end;
        }
        self.done - before
    }

    /// Whether every byte is checked.
    pub(crate) fn is_checked(&self) -> bool {
        self.done == self.from.len()
    }

    /// Both ends' digests, this one's first, once both are known.
    pub(crate) fn digests(&self) -> Option<(Digest, Digest)> {
        let theirs = self.theirs?;
        self.is_checked().then(|| (self.digest.finish(), theirs))
    }
}
