//! An engine: one thread that drives paths. Commands come in over one ring,
//! completions go out over another.
//!
//! [`udp`] drives a [`Device`](crate::device::Device); [`crate::tcp`] drives
//! kernel sockets. Both understand [`Command`] and answer with [`Completion`];
//! neither shares anything else with the threads that use it.

#![forbid(unsafe_code)]

pub mod command;
pub mod frame;
mod idle;
pub mod link;
pub mod partial;
pub mod ring;
pub mod status;
pub mod steer;
pub mod udp;

pub use command::{Command, Completion, FailReason, OpenError, OperationId, Receipt, Remote};
pub use partial::{Cost, Interrupted, Partial};
pub use ring::{Full, Outbox, Receiver, Sender};
pub use status::{
    IdleSnapshot, ResentSnapshot, RingSnapshot, SealedSnapshot, SessionSnapshot, Snapshot, Status,
};
