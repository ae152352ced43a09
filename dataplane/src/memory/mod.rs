//! Where tensor bytes live: regions, leases on them, and views of foreign bytes.
//!
//! Called by the engines, which read and write tensors only through a
//! [`Lease`], and by the control plane, which makes regions for its store and
//! for applications; applications allocate tensors in theirs with an [`Arena`].
//! Device memory is another type, in [`accelerator`].
//! The invariant this module owns: *memory that an engine, a
//! NIC or another process may touch is never freed before the last lease on it
//! is dropped, and never seen through a Rust reference*, since another process
//! may write it at any time. Bytes are copied in and out through raw pointers.

#![allow(unsafe_code)]

pub mod accelerator;
mod arena;
mod lease;
mod region;
mod view;

pub use arena::{ALIGNMENT, Arena, Block, NoRoom};
pub use lease::{Lease, OutOfBounds};
pub use region::{Backing, Region, RegionError};
pub use view::View;

/// Continues `crc` over raw memory.
///
/// # Safety
/// `len` bytes at `at` must be mapped and readable during the call.
unsafe fn crc_of(crc: u32, at: *const u8, len: usize) -> u32 {
    // SAFETY: readable by the caller's promise. The slice exists only inside
    // this call; `crc32c` reads each byte with loads that have no other use,
    // so bytes that another process changes meanwhile can only make the
    // checksum differ, which the protocol treats as a lost segment.
    let bytes = unsafe { std::slice::from_raw_parts(at, len) };
    crc32c::crc32c_append(crc, bytes)
}
