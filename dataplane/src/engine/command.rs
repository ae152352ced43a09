//! What an engine is asked, and what it answers.

#![forbid(unsafe_code)]

use std::time::Duration;

use genie_proto::{Digest, Incoming, Integrity, Outgoing, SessionId, TransferId};
use serde::{Deserialize, Serialize};

use super::{Interrupted, Partial};
use crate::ledger::Copies;
use crate::memory::Lease;

/// Names an operation between its command and its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OperationId(pub u64);

/// Something for an engine to do. Every one with an operation is answered once.
#[derive(Debug)]
pub enum Command {
    /// Open a path to a peer in session `session` (the local id).
    Open {
        /// Answered by [`Completion::Opened`].
        operation: OperationId,
        /// The id the peer puts into what it sends us.
        session: SessionId,
        /// Where the peer is and how it calls the session.
        remote: Remote,
        /// Whether its transfers are under checksums.
        integrity: Integrity,
    },
    /// Expect a transfer into `into`, whose length is the grant.
    Receive {
        /// Answered by [`Completion::Transferred`].
        operation: OperationId,
        /// The local session id.
        session: SessionId,
        /// The id the peer will quote; chosen here.
        transfer: TransferId,
        /// Destination.
        into: Lease,
        /// What another path brought of it, prepared to go on.
        resume: Option<Box<Partial<Incoming>>>,
    },
    /// Send `from` as the transfer the peer granted.
    Send {
        /// Answered by [`Completion::Transferred`].
        operation: OperationId,
        /// The local session id.
        session: SessionId,
        /// The id the peer chose.
        transfer: TransferId,
        /// Source.
        from: Lease,
        /// What another path carried of it, prepared to go on.
        resume: Option<Box<Partial<Outgoing>>>,
    },
    /// Give a transfer up; it completes with [`FailReason::Cancelled`] unless it was done.
    Cancel {
        /// The local session id.
        session: SessionId,
        /// The transfer.
        transfer: TransferId,
        /// Whether it is one that we send.
        outgoing: bool,
    },
    /// Close a session; its transfers complete with [`FailReason::Closed`].
    Close {
        /// The local session id.
        session: SessionId,
    },
    /// Finish: close every session, give every lease back, end the thread.
    Stop,
}

/// Where a peer's data plane is and how it calls the session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Remote {
    /// Over a device.
    Udp(super::udp::Remote),
    /// Over kernel TCP.
    Tcp(crate::tcp::Remote),
    /// On this host, by passing descriptors.
    Shm(crate::shm::Remote),
}

/// What an engine answers.
#[derive(Debug)]
pub enum Completion {
    /// A path was opened and carried a packet each way, or could not be.
    Opened {
        /// Which command.
        operation: OperationId,
        /// The round trip measured, or why there is no path.
        result: Result<Duration, OpenError>,
    },
    /// A transfer ended. After this the engine holds no lease for it.
    Transferred {
        /// Which command.
        operation: OperationId,
        /// What was moved and verified, or why not.
        result: Result<Receipt, FailReason>,
    },
    /// A transfer ended because its session did, and may go on in another.
    /// After this the engine holds no lease for it, and no frame that is still
    /// on its way can reach its memory.
    Interrupted {
        /// Which command.
        operation: OperationId,
        /// Why the session ended.
        reason: FailReason,
        /// What has moved.
        partial: Box<Interrupted>,
    },
    /// A session ended that nobody asked to close; its transfers have failed.
    Lost {
        /// The local session id.
        session: SessionId,
        /// Why.
        reason: FailReason,
    },
}

/// Proof that a transfer's bytes were applied at the receiver and verified by both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Bytes delivered.
    pub bytes: u64,
    /// CRC32C of all of them, equal at both ends; zero where the session has
    /// [`Integrity::None`].
    pub digest: Digest,
    /// Segments this end sent more than once.
    pub retransmits: u64,
    /// Bytes that CPUs copied for it at this end.
    pub copies: Copies,
}

/// Why a path could not be opened.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum OpenError {
    /// No address of the peer's is of a family or on a link that we have.
    #[error("no address in common with the peer")]
    NoCommonAddress,
    /// ARP or neighbour discovery was not answered.
    #[error("{0} does not answer on the link")]
    NoNeighbour(std::net::IpAddr),
    /// The neighbour is there, the peer's engine did not answer a probe.
    #[error("the peer's data port {0} does not answer")]
    NoAnswer(std::net::SocketAddr),
    /// The peer refused the connection or its token.
    #[error("the peer refused: {0}")]
    Refused(String),
    /// The kernel refused.
    #[error("{0}")]
    Io(String),
    /// The engine has ended.
    #[error("the engine has stopped")]
    Stopped,
    /// The limit given for opening is over.
    #[error("not open after {0:?}")]
    TimedOut(Duration),
}

/// Why a transfer failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailReason {
    /// All bytes arrived and the two ends' digests differ: memory changed under way.
    #[error("the digests of the two ends differ: the tensor was changed while it moved")]
    DigestMismatch,
    /// Given up by this end.
    #[error("cancelled")]
    Cancelled,
    /// Given up by the peer.
    #[error("cancelled by the peer")]
    CancelledByPeer,
    /// The session was closed.
    #[error("the session was closed")]
    Closed,
    /// A tensor that is read in place was not: its reader had a piece for longer
    /// than it may.
    #[error("a piece was read for longer than {0:?}")]
    Unread(Duration),
    /// The peer stopped answering on this path.
    #[error("the path was lost: {0}")]
    PathLost(String),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// No such session, or the transfer cannot be begun in it.
    #[error("cannot begin: {0}")]
    Refused(String),
    /// The engine has ended.
    #[error("the engine has stopped")]
    Stopped,
}
