//! DPDK devices, through the driver library that is looked for at run time.
//!
//! The engine opens a [`Port`] from a [`DeviceSpec`] and drives it as a
//! [`Device`](crate::device::Device). Nothing here links DPDK: [`load`] finds
//! `libgenie_dpdk.so`, checks that it is of this very build, and every way in
//! which that can fail is a reason the operator sees, not an error of Genie's.
//! [`pair`] is the local stand-in for a NIC between two processes.
//!
//! The invariant this module owns: *memory that a port may read is leased until
//! the port says that it is done with it*, and where a port never says so, for
//! ever.

#![allow(unsafe_code)]

mod direct;
mod library;
mod open;
pub mod pair;
mod port;
mod spec;
mod vdev;

pub use direct::DirectFrame;
pub use library::{Library, LoadError, load};
pub use open::{OpenError, Options};
pub use port::{Port, Queue, open_queues};
pub use spec::{DeviceSpec, SpecError};
