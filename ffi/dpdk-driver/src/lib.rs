//! The safe DPDK layer behind a narrow C ABI, loaded at run time.
//!
//! Compiled to `libgenie_dpdk.so`, the only thing that links DPDK. The engine
//! reaches it through the table of functions in [`genie_dpdk_abi::Api`], which
//! the one exported symbol returns. Reading order: `abi` (what is exported),
//! `eal` (once a process), `port` (a device), `queue` (its bursts), `mbuf` and
//! `mempool` (packet buffers), `external` (tensor memory in frames),
//! `capability` (what each driver can and cannot do).
//!
//! The invariant this crate owns: *every packet buffer has one owner*: the
//! pool, the device, a `mbuf::MbufBurst`, or the caller of `rx_burst`; and
//! none refers to memory after that was detached.
//!
//! Where the build found no DPDK the library is empty, and [`MISSING`] says why.

/// Why the build found no DPDK; empty where it did.
pub const MISSING: &str = env!("GENIE_DPDK_MISSING");

#[cfg(dpdk)]
mod abi;
#[cfg(dpdk)]
mod capability;
#[cfg(dpdk)]
mod direct;
#[cfg(dpdk)]
mod eal;
#[cfg(dpdk)]
mod errno;
#[cfg(dpdk)]
mod external;
#[cfg(dpdk)]
mod mbuf;
#[cfg(dpdk)]
mod mempool;
#[cfg(dpdk)]
mod port;
#[cfg(dpdk)]
mod queue;
mod shared;

#[cfg(dpdk)]
pub use abi::genie_dpdk_api;
