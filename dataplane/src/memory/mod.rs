//! Where tensor bytes live: regions, leases on them, and views of foreign bytes.
//!
//! Called by the engines, which read and write tensors only through a
//! [`Lease`], and by the control plane, which makes regions for its store and
//! for applications; applications allocate tensors in theirs with an [`Arena`].
//! Device memory is another type, in [`accelerator`].
//! The invariant this module owns: *memory that an engine, a
//! NIC or another process may touch is never freed before the last lease on it
//! is dropped, and never seen through a Rust reference*, since another process
//! may write it at any time (but for a [`Slab`], which is nobody else's). Bytes are
//! copied in and out through raw pointers.

#![allow(unsafe_code)]

pub mod accelerator;
use crc_fast::{CrcAlgorithm, Digest};

mod arena;
mod lease;
mod region;
mod slab;
mod view;

pub use arena::{ALIGNMENT, Arena, Block, NoRoom};
pub use lease::{Lease, OutOfBounds};
pub use region::{Backing, Region, RegionError};
pub use slab::Slab;
pub use view::View;

/// Continues `crc` over raw memory.
///
/// # Safety
/// `len` bytes at `at` must be mapped and readable during the call.
unsafe fn crc_of(crc: u32, at: *const u8, len: usize) -> u32 {
    // SAFETY: readable by the caller's promise. The slice exists only inside
    // this call; both libraries read each byte with loads that have no other use,
    // so bytes that another process changes meanwhile can only make the
    // checksum differ, which the protocol treats as a lost segment.
    let bytes = unsafe { std::slice::from_raw_parts(at, len) };
    if len <= genie_crc::SHORT_MAX {
        return genie_crc::crc32c_append(crc, bytes);
    }
    // A digest's state is the CRC without its final inversion. Where a CPU has
    // VPCLMULQDQ this folds 100 GB/s out of the cache, four times what the
    // CRC32 instruction gives.
    let state = u64::from(!crc);
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, state);
    digest.update(bytes);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_castagnolis_whole_or_continued() {
        let bytes: Vec<u8> = (0..5000u32).map(|i| ((i * 7) >> 2) as u8).collect();
        for len in [0, 1, 7, 8, 15, 16, 63, 64, 255, 256, 1024, 4987] {
            for begin in [0, 1, 13] {
                let (head, tail) = bytes[begin..][..len].split_at(len / 3);
                // SAFETY: both are slices of our own.
                let crc = unsafe { crc_of(0, head.as_ptr(), head.len()) };
                assert_eq!(crc, crc32c::crc32c(head));
                // SAFETY: as above.
                let crc = unsafe { crc_of(crc, tail.as_ptr(), tail.len()) };
                assert_eq!(crc, crc32c::crc32c_append(crc32c::crc32c(head), tail));
            }
        }
    }
}
