//! Raw bindings to DPDK and the C shim over its inline functions.
//!
//! Used by `genie-dpdk-driver` only; nothing here is safe. The bindings are
//! made from the installed headers at build time, from a list that names each
//! function. DPDK's data path is inline C, so `shim/` wraps it a burst at a
//! time. Where the build found no DPDK this crate is empty, and its build
//! script's metadata (`DEP_DPDK_MISSING`) says why.

#![no_std]

// Generated: none of the house's rules about names, documents and blocks hold.
#[cfg(dpdk)]
#[allow(
    missing_docs,
    unreachable_pub,
    non_camel_case_types,
    unnecessary_transmutes
)]
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

#[cfg(dpdk)]
pub use bindings::*;
