//! Where tensor bytes live: regions, leases on them, and views of foreign bytes.
//!
//! Called by the engines, which read and write tensors only through a
//! [`Lease`], and by the control plane, which makes regions for its store and
//! for applications. The invariant this module owns: *memory that an engine, a
//! NIC or another process may touch is never freed before the last lease on it
//! is dropped, and never seen through a Rust reference*, since another process
//! may write it at any time. Bytes are copied in and out through raw pointers.

#![allow(unsafe_code)]

mod lease;
mod region;
mod view;

pub use lease::{Lease, OutOfBounds};
pub use region::{Backing, Region, RegionError};
pub use view::View;
