//! The copy ledger: CPU bytes copied over bytes delivered.
//!
//! Engines write it, benchmarks and `status` read it. Its invariant: a byte
//! that a CPU moved is in one of the columns, whoever moved it.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Bytes that a CPU copied, by who copied them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copies {
    /// Copied by Genie: into a packet that could not refer to the tensor, or
    /// out of a packet into the tensor.
    pub genie: u64,
    /// Copied by the device's driver (a virtual device copies between the two
    /// processes; a NIC's DMA is not a CPU copy).
    pub driver: u64,
    /// Copied by the kernel between user memory and socket buffers.
    pub kernel: u64,
}

impl Copies {
    /// Adds the counts of `other`.
    pub fn add(&mut self, other: Copies) {
        self.genie += other.genie;
        self.driver += other.driver;
        self.kernel += other.kernel;
    }

    /// Genie's own copies per byte of `delivered`; 0 if nothing was delivered.
    pub fn per_byte(&self, delivered: u64) -> f64 {
        if delivered == 0 {
            0.0
        } else {
            self.genie as f64 / delivered as f64
        }
    }
}
