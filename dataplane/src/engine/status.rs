//! What an engine publishes about itself, for `status` and the metrics.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use genie_proto::SessionId;
use serde::{Deserialize, Serialize};

use crate::device::Counters;
use crate::ledger::Copies;

/// How often an engine publishes: rarely enough to cost nothing, often enough
/// for a person who watches.
pub const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// A picture of an engine, at most [`PUBLISH_EVERY`] and one sleep old.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// What drives the path: `tcp`, or a device driver's name such as `net_vhost`.
    pub driver: String,
    /// The port's own counters; none for kernel sockets.
    pub port: Option<Counters>,
    /// What CPUs copied so far, at this end.
    pub copies: Copies,
    /// Tensor bytes sent, each counted once.
    pub sent_bytes: u64,
    /// Tensor bytes received, verified, each counted once.
    pub received_bytes: u64,
    /// Packets or frames dropped because they were bad, by nobody's session.
    pub dropped: u64,
    /// Packets that were not the peer's, of all sealed sessions so far.
    pub sealed: SealedSnapshot,
    /// Open sessions.
    pub sessions: Vec<SessionSnapshot>,
}

/// A picture of one session of an engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionSnapshot {
    /// Its local id.
    pub session: SessionId,
    /// Smoothed round trip; none before the first.
    pub round_trip: Option<Duration>,
    /// Congestion window in bytes; none for kernel sockets.
    pub window_bytes: Option<u64>,
    /// Segments sent again.
    pub retransmits: u64,
    /// Packets dropped, all causes.
    pub dropped: u64,
    /// What was found not to be the peer's; none where packets are not sealed.
    pub sealed: Option<SealedSnapshot>,
    /// Transfers under way.
    pub transfers: u64,
}

/// Packets of a sealed session that were dropped because they were not the peer's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedSnapshot {
    /// Made by somebody without the keys, or changed on the way.
    pub forged: u64,
    /// Seen before, or too old to tell.
    pub replayed: u64,
    /// Of an epoch whose key was dropped.
    pub old_epoch: u64,
}

impl SealedSnapshot {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            forged: self.forged + other.forged,
            replayed: self.replayed + other.replayed,
            old_epoch: self.old_epoch + other.old_epoch,
        }
    }
}

/// Where an engine leaves its latest [`Snapshot`].
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Snapshot>>);

impl Status {
    /// The latest snapshot.
    pub fn snapshot(&self) -> Snapshot {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Leaves a snapshot, unless somebody reads right now: the engine never waits.
    pub fn publish(&self, snapshot: impl FnOnce(&mut Snapshot)) {
        if let Ok(mut place) = self.0.try_lock() {
            snapshot(&mut place);
        }
    }
}
