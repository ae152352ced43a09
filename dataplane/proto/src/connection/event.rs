//! What a connection reports.

use std::time::Duration;

use crate::digest::Digest;
use crate::id::TransferId;
use crate::wire::Metadata;

/// Something the application should know. Every transfer that was accepted ends
/// in exactly one of the first two or [`Event::Failed`]; [`Event::PathLost`] or [`Event::Closed`]
/// is the last event of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A transfer is applied, and both ends agree on its digest.
    Received {
        /// Which.
        transfer: TransferId,
        /// CRC32C of its bytes.
        digest: Digest,
        /// Its length in bytes.
        len: u64,
    },
    /// The peer applied a transfer, and both ends agree on its digest.
    Sent {
        /// Which.
        transfer: TransferId,
        /// CRC32C of its bytes.
        digest: Digest,
        /// Its length in bytes.
        len: u64,
        /// Segments sent more than once.
        retransmits: u64,
    },
    /// The peer sent a small tensor unasked, and it is placed and verified. Its
    /// slot is taken until [`Connection::release`](super::Connection::release).
    Offered {
        /// Its id, which the two ends share.
        transfer: TransferId,
        /// The slot it is in.
        slot: u32,
        /// What the peer's application says of it.
        metadata: Metadata,
        /// CRC32C of its bytes.
        digest: Digest,
        /// Its length in bytes.
        len: u64,
    },
    /// A transfer is over without that.
    Failed {
        /// Which.
        transfer: TransferId,
        /// Whether it is one that this end sends.
        outgoing: bool,
        /// Why.
        reason: FailReason,
    },
    /// A probe that the application asked for was answered.
    PathValidated {
        /// From the probe to its answer.
        rtt: Duration,
    },
    /// The peer is silent; nothing more will happen here.
    PathLost {
        /// How that was found.
        reason: PathLostReason,
    },
    /// The session is over.
    Closed {
        /// By whom and why.
        reason: CloseReason,
    },
}

/// Why a transfer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FailReason {
    /// Every byte arrived, and the two ends' digests differ: the source was
    /// changed while it was sent.
    #[error("the digests of the two ends differ")]
    DigestMismatch,
    /// The two ends disagree on the length.
    #[error("the two ends disagree on the length")]
    LengthMismatch,
    /// Given up by this end.
    #[error("cancelled")]
    Cancelled,
    /// Given up by the peer.
    #[error("cancelled by the peer")]
    CancelledByPeer,
    /// The peer knows of no such transfer.
    #[error("unknown to the peer")]
    UnknownToPeer,
    /// The session was closed.
    #[error("the session was closed")]
    Closed,
    /// The path was lost.
    #[error("the path was lost")]
    PathLost,
}

/// How a path was found to be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PathLostReason {
    /// So many probe timeouts in a row.
    #[error("{0} probe timeouts in a row")]
    ProbeTimeouts(u32),
    /// The peer answers, but no transfer moved for the progress limit.
    #[error("no transfer moved for {0:?}")]
    Stalled(Duration),
    /// Nothing was heard for the idle limit.
    #[error("nothing heard for {0:?}")]
    Silent(Duration),
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CloseReason {
    /// This end closed it.
    #[error("closed by this end (code {0})")]
    Local(u16),
    /// The peer closed it.
    #[error("closed by the peer (code {0})")]
    Peer(u16),
    /// The peer broke the protocol, and was told.
    #[error("the peer broke the protocol: {0}")]
    Violation(Violation),
    /// Every packet number was used.
    #[error("the path's packet numbers are used up")]
    PacketNumbersExhausted,
}

/// How a peer broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// An ACK of a packet number never sent.
    #[error("it acknowledged a packet that was never sent")]
    AckOfUnsent,
    /// A DONE for a transfer of which not every byte was sent.
    #[error("it confirmed a transfer that was not sent whole")]
    EarlyDone,
    /// A DONE_ACK for a transfer that is not complete.
    #[error("it judged a transfer that is not complete")]
    EarlyDoneAck,
}

/// Reason codes of RESET.
pub(super) mod code {
    /// The application gave it up, or closes.
    pub(crate) const CANCELLED: u16 = 1;
    /// DONE for a transfer never begun.
    pub(crate) const UNKNOWN_TRANSFER: u16 = 2;
    /// The lengths of the two ends differ.
    pub(crate) const LENGTH_MISMATCH: u16 = 3;
    /// The peer broke the protocol.
    pub(crate) const VIOLATION: u16 = 4;
    /// Packet numbers are used up.
    pub(crate) const EXHAUSTED: u16 = 5;
}
