//! What an engine publishes about itself, for `status` and the metrics.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use genie_proto::SessionId;
use serde::{Deserialize, Serialize};

use crate::device::tap::TapSnapshot;
use crate::device::{Counters, Steering};
use crate::ledger::Copies;

/// How often an engine publishes: rarely enough to cost nothing, often enough
/// for a person who watches.
pub const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// A picture of an engine, at most [`PUBLISH_EVERY`] and one sleep old.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// What drives the path: `tcp`, or a device driver's name such as `net_vhost`.
    pub driver: String,
    /// What whoever chose the device should know of it.
    #[serde(default)]
    pub cautions: Vec<String>,
    /// What a good NIC does and the device leaves to the CPU.
    #[serde(default)]
    pub lacks: Vec<String>,
    /// Largest IP packet that the device carries; none for kernel sockets.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// The port's own counters; none for kernel sockets.
    pub port: Option<Counters>,
    /// What was recorded of the port's frames; none where they are not.
    #[serde(default)]
    pub tap: Option<TapSnapshot>,
    /// What CPUs copied so far, at this end.
    pub copies: Copies,
    /// Tensor bytes sent, each counted once.
    pub sent_bytes: u64,
    /// Tensor bytes received, verified, each counted once.
    pub received_bytes: u64,
    /// Packets or frames dropped because they were bad, by nobody's session.
    pub dropped: u64,
    /// Packets or records that were not the peer's, of all sealed sessions so far.
    pub sealed: SealedSnapshot,
    /// Segments sent again by all sessions so far, by cause; none where the
    /// kernel does that.
    #[serde(default)]
    pub resent: Option<ResentSnapshot>,
    /// How the engine's thread spent its time; only of engines that poll.
    #[serde(default)]
    pub idle: Option<IdleSnapshot>,
    /// The device's receive ring; none for kernel sockets.
    #[serde(default)]
    pub ring: Option<RingSnapshot>,
    /// Which of several queues of its device it drives; none where that has one.
    #[serde(default)]
    pub steering: Option<Steering>,
    /// Open sessions.
    pub sessions: Vec<SessionSnapshot>,
}

/// Segments sent again, by what made the engine (RFC 9002).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResentSnapshot {
    /// Three later packets were acknowledged.
    pub packet_threshold: u64,
    /// A later packet was acknowledged more than a round trip ago.
    pub time_threshold: u64,
    /// Nothing was acknowledged until the probe timeout.
    pub probe: u64,
    /// Packets given up for lost whose acknowledgement came after all.
    pub spurious: u64,
}

impl ResentSnapshot {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            packet_threshold: self.packet_threshold + other.packet_threshold,
            time_threshold: self.time_threshold + other.time_threshold,
            probe: self.probe + other.probe,
            spurious: self.spurious + other.spurious,
        }
    }
}

/// How a polling engine's thread spent its time since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleSnapshot {
    /// With work.
    pub busy: Duration,
    /// Looking for work without a pause.
    pub spin: Duration,
    /// With pauses between looks.
    pub pause: Duration,
    /// Asleep.
    pub sleep: Duration,
    /// How often it slept.
    pub sleeps: u64,
}

/// A device's receive ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingSnapshot {
    /// Its length in frames.
    pub frames: u64,
    /// Frames of it that peers may have in flight together.
    pub credit: u64,
    /// Those that sessions were given.
    pub granted: u64,
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
    /// Bytes of packets in flight; none for kernel sockets.
    #[serde(default)]
    pub in_flight_bytes: Option<u64>,
    /// Frames of the receive ring that the peer may have in flight; none for
    /// kernel sockets.
    #[serde(default)]
    pub granted: Option<u64>,
    /// The least round trip seen; none before the first.
    #[serde(default)]
    pub round_trip_min: Option<Duration>,
    /// Segments sent again.
    pub retransmits: u64,
    /// The same by cause; none where the kernel does that.
    #[serde(default)]
    pub resent: Option<ResentSnapshot>,
    /// Packets dropped, all causes.
    pub dropped: u64,
    /// What was found not to be the peer's; none where nothing is sealed. A
    /// record of a connection that is not ends the session.
    pub sealed: Option<SealedSnapshot>,
    /// Transfers under way.
    pub transfers: u64,
}

/// Packets or records of a sealed session that were not the peer's.
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
