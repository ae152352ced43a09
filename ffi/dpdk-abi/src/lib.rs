//! The C ABI between Genie and its DPDK driver library, `libgenie_dpdk.so`.
//!
//! Included by both sides: `genie-dpdk-driver` fills in an [`Api`], the
//! `dpdk` module of `genie-dataplane` finds it through [`SYMBOL`]. The
//! invariant: *no type of DPDK's crosses, and both sides were compiled from
//! this very text*, which [`BUILD_ID`] proves at run time.
//!
//! Every function is safe against panics on the library's side (they become
//! [`STATUS_PANIC`]) and none unwinds. A function that fails returns a negative
//! number, an `-errno` where there is one, and writes a sentence into the
//! [`Text`] it was given. Burst functions allocate nothing, take no lock, make
//! no system call and log nothing.

#![no_std]
#![forbid(unsafe_code)]

use core::ffi::{c_char, c_void};

/// Name of the one symbol the library exports: an `extern "C"` function that
/// takes nothing and returns a `*const Api` that is valid for ever.
pub const SYMBOL: &str = "genie_dpdk_api";

/// Version of the layout; checked before anything behind it is touched.
pub const ABI_VERSION: u32 = 4;

/// Version of the workspace and a hash of this file.
pub const BUILD_ID: &str = env!("GENIE_DPDK_BUILD_ID");

/// The most frames one call of a burst function takes or gives.
pub const BURST_MAX: usize = 32;

/// The status of a call that did what was asked.
pub const STATUS_OK: i32 = 0;

/// The status of a call that panicked inside the library; a bug.
pub const STATUS_PANIC: i32 = i32::MIN;

/// Room for a sentence that says why a call failed, NUL-terminated.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Text {
    /// The sentence; bytes behind the NUL mean nothing.
    pub bytes: [u8; 512],
}

/// How the environment abstraction layer (EAL) is brought up, once a process.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct EalConfig {
    /// Distinguishes this process's run-time files; NUL-terminated, not null.
    pub file_prefix: *const c_char,
    /// PCI devices to use, separated by semicolons, each an address with its
    /// arguments behind commas; null or empty keeps the PCI bus off.
    pub pci_allow: *const c_char,
    /// Memory for the DPDK heap, in MiB.
    pub memory_mib: u32,
    /// 1 uses ordinary pages where 0 uses huge pages. A NIC cannot work so.
    pub no_huge: u32,
}

/// Which device to open, and how large its rings and buffers are.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PortConfig {
    /// PCI address, or virtual device with its arguments, as DPDK writes them:
    /// `0000:3b:00.0`, `net_memif0,role=client`. NUL-terminated, not null.
    pub devargs: *const c_char,
    /// Receive descriptors wanted; the device may round or limit them.
    pub rx_descriptors: u16,
    /// Transmit descriptors wanted; the device may round or limit them.
    pub tx_descriptors: u16,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Queue pairs wanted, each of which becomes a handle; 0 is one.
    pub queues: u16,
    /// UDP port of the first queue's owner; those of the others follow.
    pub first_udp_port: u16,
    /// Must be zero.
    pub reserved: u16,
    /// Packet buffers in each pool beyond those that the rings hold.
    pub spare_mbufs: u32,
    /// The most slices of external memory attached at once, to each queue.
    pub attachments: u32,
}

/// What an open port is and can do.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PortInfo {
    /// The driver's name, such as `net_vhost`, NUL-terminated.
    pub driver: [u8; 32],
    /// Ethernet address.
    pub mac: [u8; 6],
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Largest Ethernet frame in bytes, without the frame check sequence.
    pub max_frame: u32,
    /// Length of the receive ring.
    pub rx_descriptors: u16,
    /// Length of the transmit ring.
    pub tx_descriptors: u16,
    /// Packet buffers in the pool.
    pub mbufs: u32,
    /// NUMA node of the device, or -1.
    pub numa_node: i32,
    /// A set of `CAP_*`.
    pub caps: u64,
}

/// A frame may be a chain of segments on transmission.
pub const CAP_TX_MULTI_SEG: u64 = 1 << 0;
/// A frame may refer to attached memory; otherwise the library copies it.
pub const CAP_TX_EXTERNAL: u64 = 1 << 1;
/// Attached memory must be registered first: the device reaches it by DMA.
pub const CAP_NEEDS_REGISTRATION: u64 = 1 << 2;
/// The device can wake a thread when a frame arrives; see [`Api::rx_wait_fd`].
pub const CAP_RX_INTERRUPT: u64 = 1 << 3;
/// The device can fill in IPv4 header checksums.
pub const CAP_TX_IPV4_CHECKSUM: u64 = 1 << 4;
/// The device can fill in UDP checksums.
pub const CAP_TX_UDP_CHECKSUM: u64 = 1 << 5;
/// The device can verify UDP checksums.
pub const CAP_RX_UDP_CHECKSUM: u64 = 1 << 6;
/// The device can put headers and payload into buffers of different pools.
pub const CAP_RX_BUFFER_SPLIT: u64 = 1 << 7;
/// The driver copies every frame with the CPU on transmission.
pub const CAP_DRIVER_COPIES_TX: u64 = 1 << 8;
/// The driver copies every frame with the CPU on reception.
pub const CAP_DRIVER_COPIES_RX: u64 = 1 << 9;
/// The port carries traffic again after its peer process died and came back.
pub const CAP_SURVIVES_PEER: u64 = 1 << 10;
/// The death of the peer process may crash this one: benchmarks only.
pub const CAP_FRAGILE: u64 = 1 << 11;

/// [`Api::tx_reap`] collects everything that was sent. Where it is missing, a
/// driver collects when it needs room, and attached memory may stay referred to
/// until more frames were sent or the port is closed.
pub const CAP_TX_REAP: u64 = 1 << 12;

/// The device sorts datagrams by their UDP port to the queue of whoever owns it;
/// otherwise they come to any queue.
pub const CAP_RX_SORTS: u64 = 1 << 13;

/// A received frame. The caller owns the packet buffer until it hands the
/// frame to [`Api::rx_free`], once, on the thread and port it came from.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RxFrame {
    /// The packet buffer; means nothing to the caller.
    pub mbuf: *mut c_void,
    /// First byte of the Ethernet header.
    pub data: *const u8,
    /// Bytes at `data`.
    pub data_len: u32,
    /// Bytes of the whole frame; more than `data_len` and `payload_len` only
    /// where a frame came in segments that did not fit into one buffer. Such a
    /// frame is unusable.
    pub frame_len: u32,
    /// Where the payload is if it is apart, in memory that the CPU may be unable
    /// to read; null if it is behind the header. See [`Api::rx_segments`].
    pub payload: *const u8,
    /// Bytes at `payload`.
    pub payload_len: u32,
    /// Zero.
    pub reserved: u32,
}

/// A frame to send: bytes that are copied, then optionally bytes that are not.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TxFrame {
    /// First byte of the Ethernet header.
    pub head: *const u8,
    /// First byte of the payload, inside the attached memory; null without one.
    pub payload: *const u8,
    /// Bytes at `head`.
    pub head_len: u32,
    /// Bytes at `payload`.
    pub payload_len: u32,
    /// The handle that [`Api::ext_attach`] gave for the memory at `payload`.
    pub attachment: u32,
    /// Must be zero.
    pub reserved: u32,
}

/// Memory that is no memory of the CPU's, such as a GPU's, as whole pages.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DeviceMemory {
    /// Its first byte. Never read or written by the library.
    pub base: *mut u8,
    /// Its length in bytes.
    pub len: u64,
    /// Size of its pages in bytes.
    pub page_bytes: u64,
    /// The port's address of each page; null where it is the memory's own.
    pub iovas: *const u64,
    /// How many addresses there are.
    pub iova_count: u64,
}

/// Counters of an open port, since it was opened. Where it has several queues,
/// frames and bytes are those of one, and what the port lost the first one's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PortStats {
    /// Frames received, as the port counts them.
    pub rx_frames: u64,
    /// Bytes received, as the port counts them.
    pub rx_bytes: u64,
    /// Frames lost for want of descriptors or buffers, as the port counts them.
    pub rx_missed: u64,
    /// Frames received in error, as the port counts them.
    pub rx_errors: u64,
    /// Frames sent, as the port counts them.
    pub tx_frames: u64,
    /// Bytes sent, as the port counts them.
    pub tx_bytes: u64,
    /// Frames not sent because of an error: the port's count, and the frames
    /// that `tx_burst` took but could not describe to the port.
    pub tx_errors: u64,
    /// Payload bytes the library copied because the device cannot refer to them.
    pub tx_copied_bytes: u64,
    /// Packet buffers free in the pool at this moment.
    pub mbufs_free: u64,
    /// Frames that `tx_burst` took and the port has not, at this moment.
    pub tx_pending: u64,
}

/// One receive and one transmit queue of an open port. Opaque.
///
/// Everything that takes one may only be called from one thread at a time, and
/// the burst functions from one thread that called [`Api::thread_register`].
/// The handles of one port may be used from one thread each.
#[repr(C)]
pub struct Port {
    _opaque: [u8; 0],
}

/// The table of functions. The first three fields never move, so that a
/// library of any build can be asked which one it is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Api {
    /// [`ABI_VERSION`] of the library.
    pub abi_version: u32,
    /// `size_of::<Api>()` of the library.
    pub api_bytes: u32,
    /// [`BUILD_ID`] of the library, NUL-terminated.
    pub build_id: *const c_char,
    /// DPDK's version string, NUL-terminated.
    pub dpdk_version: unsafe extern "C" fn() -> *const c_char,
    /// Brings the EAL up. A second call succeeds without effect.
    pub eal_init: unsafe extern "C" fn(*const EalConfig, *mut Text) -> i32,
    /// Gives the calling thread an lcore id and so caches of its own. Idempotent;
    /// undone when the thread ends.
    pub thread_register: unsafe extern "C" fn(*mut Text) -> i32,
    /// Opens and starts a port, and writes a handle for each queue pair into an
    /// array of that many.
    pub port_open: unsafe extern "C" fn(*const PortConfig, *mut *mut Port, *mut Text) -> i32,
    /// Gives a queue up, and the handle itself; attached memory is released.
    /// The last queue's stops the port and frees what it holds. Returns how many
    /// packet buffers never came back: 0, unless received frames were not freed,
    /// or a driver leaks. While other queues are open, how many still refer to
    /// memory attached to this one.
    pub port_close: unsafe extern "C" fn(*mut Port) -> i64,
    /// What the port is and can do; does not change.
    pub port_info: unsafe extern "C" fn(*const Port, *mut PortInfo) -> i32,
    /// 1 if the link is up, 0 if not.
    pub port_link: unsafe extern "C" fn(*const Port) -> i32,
    /// The port's own counters.
    pub port_stats: unsafe extern "C" fn(*const Port, *mut PortStats) -> i32,
    /// 1 if the port was stopped, by whichever of its queues.
    pub port_stopped: unsafe extern "C" fn(*const Port) -> i32,
    /// Receives up to [`BURST_MAX`] frames into an array of that many.
    pub rx_burst: unsafe extern "C" fn(*mut Port, *mut RxFrame, u32) -> u32,
    /// Gives frames back; those whose packet buffer is null are passed over.
    pub rx_free: unsafe extern "C" fn(*mut Port, *const RxFrame, u32),
    /// Queues up to [`BURST_MAX`] frames; returns how many of the first ones
    /// were taken. A taken frame is sent, or counted in `tx_errors`: what the
    /// ring has no room for is kept and offered again by every burst function.
    pub tx_burst: unsafe extern "C" fn(*mut Port, *const TxFrame, u32) -> u32,
    /// Offers kept frames to the ring and collects those that were sent.
    pub tx_reap: unsafe extern "C" fn(*mut Port),
    /// Stops the port, all queues of it, and frees every frame in them, sent or
    /// not. The port carries nothing after. With several queues it happens when
    /// the last of their threads has called a burst function. A driver may keep
    /// packet buffers until `port_close`: ask [`Api::ext_refs`] before releasing
    /// memory.
    pub port_stop: unsafe extern "C" fn(*mut Port) -> i32,
    /// Lets frames refer to this memory; returns a handle, or a negative status.
    pub ext_attach: unsafe extern "C" fn(*mut Port, *const u8, u64, *mut Text) -> i64,
    /// Packet buffers that refer to attached memory, plus one; 0 if not attached.
    pub ext_refs: unsafe extern "C" fn(*const Port, u32) -> u32,
    /// Gives a handle back; `-EBUSY` while a packet buffer refers to it.
    pub ext_detach: unsafe extern "C" fn(*mut Port, u32) -> i32,
    /// Registers memory with DPDK and maps it for the port's DMA. Address and
    /// length are whole pages of the given size.
    pub mem_register: unsafe extern "C" fn(*mut Port, *mut u8, u64, u64, *mut Text) -> i32,
    /// Undoes [`Api::mem_register`].
    pub mem_unregister: unsafe extern "C" fn(*mut Port, *mut u8, u64, *mut Text) -> i32,
    /// A descriptor for an epoll set, edge-triggered: it is reported when
    /// frames arrive while interrupts are on. The port's own, valid until it is
    /// closed, never read or closed by the caller. Negative without
    /// [`CAP_RX_INTERRUPT`].
    pub rx_wait_fd: unsafe extern "C" fn(*const Port) -> i32,
    /// Turns receive interrupts on (1) or off (0). On means that frames which
    /// arrive from now on are reported; those that are there already are not,
    /// so a burst must find none before a thread sleeps. Fails while there is
    /// nobody at the other end.
    pub rx_interrupt: unsafe extern "C" fn(*mut Port, u32) -> i32,
    /// Delivers frames of two segments as such (1), the second untouched by the
    /// CPU, or made one (0), as it is at first.
    pub rx_segments: unsafe extern "C" fn(*mut Port, u32) -> i32,
    /// The port's addresses of a memory's pages, into an array of one for each.
    /// Returns how many: none where the memory's own addresses are the port's.
    pub direct_iovas:
        unsafe extern "C" fn(*const Port, *const DeviceMemory, *mut u64, *mut Text) -> i64,
    /// Tells DPDK of the memory (`rte_extmem_register`).
    pub direct_register: unsafe extern "C" fn(*mut Port, *const DeviceMemory, *mut Text) -> i32,
    /// Undoes [`Api::direct_register`].
    pub direct_unregister: unsafe extern "C" fn(*mut Port, *const DeviceMemory, *mut Text) -> i32,
    /// Lets the port reach the memory (`rte_dev_dma_map`). Where it fails the
    /// port may reach a part of it, until [`Api::direct_unmap`] succeeds.
    pub direct_map: unsafe extern "C" fn(*mut Port, *const DeviceMemory, *mut Text) -> i32,
    /// Undoes [`Api::direct_map`], also one that failed in the middle.
    pub direct_unmap: unsafe extern "C" fn(*mut Port, *const DeviceMemory, *mut Text) -> i32,
    /// Makes packet buffers for so many payload bytes each in the memory
    /// (`rte_pktmbuf_pool_create_extbuf`), one pool a port; returns how many.
    pub direct_pool: unsafe extern "C" fn(*mut Port, *const DeviceMemory, u16, *mut Text) -> i64,
    /// Undoes [`Api::direct_pool`]; `-EBUSY` while a buffer is out.
    pub direct_pool_free: unsafe extern "C" fn(*mut Port, *mut Text) -> i32,
    /// Receives what is behind so many bytes, or behind the UDP header where
    /// that is 0, into the buffers of [`Api::direct_pool`]. Stops the queue for
    /// a moment; frames in it are lost. Where it fails the port receives as
    /// before, or, if not even that can be had, is stopped.
    pub direct_split: unsafe extern "C" fn(*mut Port, u16, *mut Text) -> i32,
    /// Undoes [`Api::direct_split`] in the same way.
    pub direct_join: unsafe extern "C" fn(*mut Port, *mut Text) -> i32,
}

impl Text {
    /// No sentence.
    pub const EMPTY: Text = Text { bytes: [0; 512] };

    /// Keeps as much of `sentence` as there is room for.
    pub fn set(&mut self, sentence: &str) {
        let mut len = sentence.len().min(self.bytes.len() - 1);
        while !sentence.is_char_boundary(len) {
            len -= 1;
        }
        self.bytes[..len].copy_from_slice(&sentence.as_bytes()[..len]);
        self.bytes[len] = 0;
    }

    /// The sentence.
    pub fn as_str(&self) -> &str {
        until_nul(&self.bytes)
    }
}

impl PortInfo {
    /// The driver's name.
    pub fn driver_name(&self) -> &str {
        until_nul(&self.driver)
    }

    /// Whether all bits of `cap` are set.
    pub fn has(&self, cap: u64) -> bool {
        self.caps & cap == cap
    }
}

fn until_nul(bytes: &[u8]) -> &str {
    let len = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    let bytes = &bytes[..len];
    match core::str::from_utf8(bytes) {
        Ok(text) => text,
        // Cut by somebody who does not know UTF-8: keep what is whole.
        Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
    }
}

macro_rules! assert_layout {
    ($($type:ty: $size:expr, $align:expr;)*) => {
        $(const _: () = assert!(size_of::<$type>() == $size && align_of::<$type>() == $align);)*
    };
}

// Written out for 64-bit targets, the only ones that DPDK's poll-mode drivers
// and this library are for; the shim asserts the same numbers in C.
#[cfg(target_pointer_width = "64")]
assert_layout! {
    Text: 512, 1;
    EalConfig: 24, 8;
    PortConfig: 32, 8;
    PortInfo: 64, 8;
    RxFrame: 40, 8;
    TxFrame: 32, 8;
    PortStats: 80, 8;
    DeviceMemory: 40, 8;
    Api: 264, 8;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_keeps_whole_characters() {
        let mut text = Text::EMPTY;
        text.set("no huge pages");
        assert_eq!(text.as_str(), "no huge pages");
        let long = ["é"; 400].concat();
        text.set(&long);
        assert_eq!(text.as_str().len(), 510);
        assert!(text.as_str().chars().all(|c| c == 'é'));
    }

    #[test]
    fn text_without_a_nul_ends_at_its_end() {
        let text = Text { bytes: [b'x'; 512] };
        assert_eq!(text.as_str().len(), 512);
    }

    #[test]
    fn build_id_names_version_and_text() {
        assert!(BUILD_ID.starts_with(concat!(env!("CARGO_PKG_VERSION"), "+abi.")));
        assert_eq!(BUILD_ID.len(), env!("CARGO_PKG_VERSION").len() + 5 + 16);
    }
}
