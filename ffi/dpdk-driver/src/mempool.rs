//! Pools of packet buffers.

use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use genie_dpdk_sys as sys;

use crate::errno::Errno;

/// A pool of packet buffers in DPDK's memory; freed on drop if all are back.
#[derive(Debug)]
pub(crate) struct Mempool {
    raw: NonNull<sys::rte_mempool>,
    count: u32,
}

impl Mempool {
    /// Makes a pool of `count` buffers that hold `frame_bytes` each.
    pub(crate) fn new(count: u32, frame_bytes: u32, numa_node: i32) -> Result<Self, Errno> {
        let name = next_name();
        let room = (frame_bytes + sys::GENIE_PKTMBUF_HEADROOM).next_multiple_of(64);
        let room = u16::try_from(room).map_err(|_| Errno::INVAL)?;
        let cache = sys::GENIE_MBUF_CACHE.min(count / 2);
        // SAFETY: the EAL is up, as every caller holds a token for that; the
        // name is copied.
        let raw = unsafe {
            sys::rte_pktmbuf_pool_create(name.as_ptr(), count, cache, 0, room, numa_node)
        };
        NonNull::new(raw)
            .map(|raw| Self { raw, count })
            .ok_or_else(Errno::last)
    }

    /// Makes a pool of as many buffers as `pieces` have room for: addresses, the
    /// card's addresses and lengths. Only the buffers' heads are DPDK's memory;
    /// no byte of the pieces is touched.
    pub(crate) fn in_memory(
        pieces: &[(*mut u8, u64, u64)],
        element: Element,
        numa_node: i32,
    ) -> Result<Self, Errno> {
        let name = next_name();
        let fit = |len: u64| u32::try_from(len / element.bytes()).unwrap_or(u32::MAX);
        let count = pieces
            .iter()
            .fold(0u32, |count, (_, _, len)| count.saturating_add(fit(*len)));
        let one = |(at, iova, len): &(*mut u8, u64, u64)| sys::rte_pktmbuf_extmem {
            buf_ptr: at.cast(),
            buf_iova: *iova,
            buf_len: *len as usize,
            elt_size: element.0,
        };
        let memory: Vec<_> = pieces.iter().map(one).collect();
        let cache = sys::GENIE_MBUF_CACHE.min(count / 2);
        // SAFETY: the EAL is up; name and pieces are copied.
        let raw = unsafe {
            sys::rte_pktmbuf_pool_create_extbuf(
                name.as_ptr(),
                count,
                cache,
                0,
                element.0,
                numa_node,
                memory.as_ptr(),
                memory.len() as u32,
            )
        };
        NonNull::new(raw)
            .map(|raw| Self { raw, count })
            .ok_or_else(Errno::last)
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::rte_mempool {
        self.raw.as_ptr()
    }

    /// Buffers in the pool, in use or not.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Buffers not in use at this moment.
    pub(crate) fn available(&self) -> u32 {
        // SAFETY: the pool is alive; the count is read without a lock.
        unsafe { sys::rte_mempool_avail_count(self.as_ptr()) }
    }

    /// Buffers in use at this moment.
    pub(crate) fn in_use(&self) -> u32 {
        self.count.saturating_sub(self.available())
    }
}

impl Drop for Mempool {
    fn drop(&mut self) {
        // A buffer that somebody still holds must stay memory: then the pool
        // is leaked, and `port_close` has reported it.
        if self.in_use() == 0 {
            // SAFETY: no buffer is out, the device that used it is closed.
            unsafe { sys::rte_mempool_free(self.as_ptr()) };
        }
    }
}

/// The length of a buffer that lies in other memory, with its headroom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Element(u16);

impl Element {
    /// Room for so many bytes; `None` where that is none, or too many.
    pub(crate) fn holding(bytes: u16) -> Option<Self> {
        let room = u32::from(bytes) + sys::GENIE_PKTMBUF_HEADROOM;
        let room = u16::try_from(room.next_multiple_of(64)).ok()?;
        (bytes > 0).then_some(Self(room))
    }

    pub(crate) fn bytes(self) -> u64 {
        u64::from(self.0)
    }
}

fn next_name() -> CString {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("genie{}", NEXT.fetch_add(1, Ordering::Relaxed));
    CString::new(name).expect("no NUL in it")
}
