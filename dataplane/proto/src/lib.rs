//! The wire protocol of the DPDK path as a sans-IO state machine.
//!
//! Whoever owns a socket or a queue drives it: [`Connection::handle_datagram`]
//! and [`Connection::handle_timeout`] take events in,
//! [`Connection::poll_transmit`], [`Connection::poll_timeout`] and
//! [`Connection::poll_event`] give work out. There is no clock, socket or
//! thread here; time is an argument.
//!
//! The invariant of the crate: *a transfer is reported as [`Event::Received`] or
//! [`Event::Sent`] only after every byte was applied at the receiver under a
//! segment checksum that matched, and the digests of both ends were equal.* (Not
//! where both asked for [`Integrity::None`].)
//!
//! Reading order: [`wire`] (the bytes), [`transfer`] and [`digest`] (what is
//! moved; also used by the TCP engine), [`connection`] (the state machine),
//! [`congestion`] and [`credit`], [`seal`] (what an engine wraps around it where packets are
//! encrypted). The page `docs/protocol.md` describes the same bytes in prose.

#![forbid(unsafe_code)]

pub mod congestion;
pub mod connection;
pub mod credit;
pub mod digest;
#[cfg(any(feature = "fuzzing", fuzzing))]
pub mod fuzzing;
pub mod id;
pub mod replay;
pub mod seal;
pub mod time;
pub mod transfer;
pub mod wire;

pub use connection::{
    CloseReason, Config, Connection, DropCause, Event, FailReason, OfferError, PathLostReason,
    Retransmits, Stats, TransferError, Transmit,
};
pub use credit::Credit;
pub use digest::{Digest, DigestBuilder, Integrity};
pub use id::{Segment, SessionId, TransferId};
pub use time::Time;
pub use transfer::{Incoming, Outgoing};
