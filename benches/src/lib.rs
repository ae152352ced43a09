//! What measures Genie, and what it is measured on.
//!
//! [`emulator`] is the wire of the lab: two virtual Ethernet devices joined by
//! a link that is slow, lossy or worse, as asked. The harness itself is the
//! command `genie bench`; the micro-benchmarks are under `benches/`.

#![forbid(unsafe_code)]

pub mod emulator;
pub mod null_pair;
pub mod polled_pair;
