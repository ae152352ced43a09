//! What a connection counts.

use std::time::Duration;

/// Counters of a connection since its start, and where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Packets given to the engine to send.
    pub packets_sent: u64,
    /// Tensor bytes in them, retransmissions included.
    pub bytes_sent: u64,
    /// Packets accepted, duplicates included.
    pub packets_received: u64,
    /// Tensor bytes applied and verified.
    pub bytes_received: u64,
    /// Offers delivered.
    pub offers_received: u64,
    /// Segments that had been applied already: acknowledged, not written.
    pub duplicate_segments: u64,
    /// Segments and offers sent again.
    pub retransmits: Retransmits,
    /// Packets given up for lost whose acknowledgement came after all.
    pub spurious_losses: u64,
    /// Probe timeouts.
    pub ptos: u64,
    /// ACKs sent.
    pub acks_sent: u64,
    /// Packets dropped, by [`DropCause`].
    pub drops: [u64; DropCause::COUNT],
    /// Smoothed round trip; none before the first sample.
    pub rtt: Option<Duration>,
    /// The least round trip seen.
    pub rtt_min: Option<Duration>,
    /// Congestion window in bytes.
    pub window_bytes: u64,
    /// Bytes of packets in flight.
    pub in_flight_bytes: u64,
    /// Transfers under way, both directions.
    pub transfers: u64,
}

impl Stats {
    /// Packets dropped for one cause.
    pub fn drops(&self, cause: DropCause) -> u64 {
        self.drops[cause as usize]
    }

    /// Packets dropped for any cause.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().sum()
    }
}

/// Segments sent again, by what made us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retransmits {
    /// Three later packets were acknowledged.
    pub packet_threshold: u64,
    /// A later packet was acknowledged 9/8 of a round trip ago.
    pub time_threshold: u64,
    /// Nothing was acknowledged until the probe timeout.
    pub probe: u64,
}

impl Retransmits {
    /// All causes together.
    pub fn total(&self) -> u64 {
        self.packet_threshold + self.time_threshold + self.probe
    }
}

/// Why a datagram was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropCause {
    /// Too short, or not as long as its header says.
    Length,
    /// Another version.
    Version,
    /// The header check does not match.
    HeaderCheck,
    /// A type not spoken here.
    Kind,
    /// A malformed control packet.
    Body,
    /// The payload check does not match.
    PayloadCheck,
    /// For another session.
    Session,
    /// For another path.
    Path,
    /// This packet number was seen.
    DuplicatePacket,
    /// Data for a transfer that nobody expects (yet).
    NotGranted,
    /// Data beyond the length granted.
    OutOfBounds,
    /// Data off the granule.
    Misaligned,
    /// Data over verified bytes and others.
    Overlap,
    /// Data that shows another length than was granted.
    LengthMismatch,
    /// Sealed by nobody who has the path's keys, or changed since.
    Forged,
    /// A sealed packet whose number was accepted, or is too old to tell.
    Replayed,
    /// A sealed packet whose key was dropped.
    OldEpoch,
    /// More answers owed than we keep.
    Overload,
    /// Data that there is nowhere to keep just now.
    NoRoom,
    /// The connection is closed.
    Closed,
}

impl DropCause {
    /// How many there are.
    pub const COUNT: usize = Self::Closed as usize + 1;
}
