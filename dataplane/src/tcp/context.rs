//! What the engine's loop lends to its sessions.

#![forbid(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use genie_proto::SessionId;

use super::{Config, socket};
use crate::engine::{Completion, FailReason, Interrupted, OperationId, Outbox};
use crate::ledger::Copies;

/// The clock, the answers' way out and the counters; one for an engine.
pub(crate) struct Context {
    /// When this iteration of the loop began.
    pub(crate) now: Instant,
    /// What every socket is registered with.
    pub(crate) epoll: OwnedFd,
    /// Where answers go.
    pub(crate) completions: Outbox<Completion>,
    /// What is counted over all sessions.
    pub(crate) totals: Totals,
    /// Where payload goes that nobody wants.
    pub(crate) scratch: Vec<u8>,
    /// How long a peer may be silent.
    pub(crate) liveness: Duration,
    /// How long opening may take.
    pub(crate) open_limit: Duration,
    /// How long transfers may stand still.
    pub(crate) progress_limit: Duration,
    /// The congestion control that was asked for.
    pub(crate) congestion: Option<String>,
    epoch: Instant,
}

/// Counters over all sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// What CPUs copied.
    pub(crate) copies: Copies,
    /// Tensor bytes that the kernel took from us.
    pub(crate) sent_bytes: u64,
    /// Tensor bytes received and verified.
    pub(crate) received_bytes: u64,
    /// Frames and connections that were refused or forgotten.
    pub(crate) dropped: u64,
    /// Sealed records that were not the peer's; each ended its session.
    pub(crate) forged: u64,
}

/// Bytes of payload that can be read and forgotten with one call.
const SCRATCH_LEN: usize = 64 << 10;

impl Context {
    /// A context whose clock begins now.
    pub(crate) fn new(epoll: OwnedFd, completions: Outbox<Completion>, config: &Config) -> Self {
        let epoch = Instant::now();
        Self {
            now: epoch,
            epoll,
            completions,
            totals: Totals::default(),
            scratch: vec![0; SCRATCH_LEN],
            liveness: config.liveness,
            open_limit: config.open_limit,
            progress_limit: config.progress_limit,
            congestion: config.congestion.clone(),
            epoch,
        }
    }

    /// Sets what every data connection has.
    pub(crate) fn configure(&self, socket: &TcpStream) -> io::Result<()> {
        socket::configure(socket, self.liveness, self.congestion.as_deref())
    }

    /// Answers an operation with a failure.
    pub(crate) fn fail(&mut self, operation: OperationId, reason: FailReason) {
        self.completions.push(Completion::Transferred {
            operation,
            result: Err(reason),
        });
    }

    /// Answers an operation whose session ended, with what has moved.
    pub(crate) fn interrupt(
        &mut self,
        operation: OperationId,
        reason: &FailReason,
        partial: Interrupted,
    ) {
        self.completions.push(Completion::Interrupted {
            operation,
            reason: reason.clone(),
            partial: Box::new(partial),
        });
    }

    /// Nanoseconds since the engine began, for PINGs.
    pub(crate) fn clock(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// What epoll reports for a connection of a session.
    pub(crate) fn stream_key(&self, session: SessionId, index: usize) -> u64 {
        STREAM_KEYS | u64::from(session.0) << 16 | index as u64
    }
}

/// Set in the keys of sessions' connections, clear in all others.
pub(crate) const STREAM_KEYS: u64 = 1 << 63;

/// The session and the index that a key of a session's connection names.
pub(crate) fn stream_of_key(key: u64) -> (SessionId, usize) {
    (SessionId((key >> 16) as u32), usize::from(key as u16))
}
