//! Engines that move tensor bytes between machines.
//!
//! The way a tensor takes, in reading order: [`endpoint`] (the API),
//! [`engine`] (one thread that owns one queue pair), `genie_proto::connection`
//! and `genie_proto::wire` (the protocol), [`device`] and [`dpdk`] (the queue).
//! [`tcp`] is the engine for hosts and peers without DPDK, [`shm`] the one for two
//! agents on one host. [`memory`] says
//! where bytes live and keeps them there while anyone may touch them; [`stage`]
//! moves those that live in a device's memory.

#![deny(unsafe_code)]

pub mod device;
pub mod dpdk;
pub mod endpoint;
pub mod engine;
pub mod ledger;
pub mod memory;
pub mod shm;
pub mod stage;
pub mod tcp;

pub use genie_proto::seal::{Secret, Secrets};
pub use genie_proto::wire::{METADATA_MAX, Metadata};
pub use genie_proto::{Digest, Integrity, OfferError, SessionId, Time, TransferError, TransferId};
