//! Packet buffers that this library owns.

use genie_dpdk_abi::BURST_MAX;
use genie_dpdk_sys as sys;

/// Up to a burst of packet buffers (heads of chains), freed on drop.
///
/// Neither `Clone` nor `Copy`: a packet buffer has one owner.
#[derive(Debug)]
pub(crate) struct MbufBurst {
    mbufs: [*mut sys::rte_mbuf; BURST_MAX],
    /// Those owned are `mbufs[start..end]`.
    start: usize,
    end: usize,
}

impl MbufBurst {
    /// No packet buffers.
    pub(crate) fn new() -> Self {
        Self {
            mbufs: [std::ptr::null_mut(); BURST_MAX],
            start: 0,
            end: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Describes frames in new packet buffers, which this burst then owns.
    ///
    /// # Panics
    /// If it owns some already.
    ///
    /// # Safety
    /// `mode` points to a live pool and as many attachments as it says; every
    /// frame's head is readable, and so is every attached memory.
    pub(crate) unsafe fn build(
        &mut self,
        mode: &sys::genie_tx_mode,
        frames: &[sys::genie_tx_frame],
    ) -> sys::genie_tx_built {
        assert!(self.is_empty(), "packet buffers have one owner");
        let count = frames.len().min(BURST_MAX) as u32;
        // SAFETY: the caller's promise; the output has room for a burst.
        let built =
            unsafe { sys::genie_tx_build(mode, frames.as_ptr(), count, self.mbufs.as_mut_ptr()) };
        self.start = 0;
        self.end = built.built as usize;
        built
    }

    /// Offers all to a transmit ring; keeps what that has no room for.
    ///
    /// # Safety
    /// The port is started and no other thread uses its transmit queue.
    pub(crate) unsafe fn send(&mut self, port: u16, queue: u16) {
        let waiting = &mut self.mbufs[self.start..self.end];
        let count = waiting.len() as u16;
        // SAFETY: the caller's promise; the buffers are ours, and those that
        // the ring took are forgotten below.
        let sent = unsafe { sys::genie_tx_send(port, queue, waiting.as_mut_ptr(), count) };
        self.start += usize::from(sent.min(count));
    }

    /// Frees all.
    pub(crate) fn free(&mut self) {
        let waiting = &mut self.mbufs[self.start..self.end];
        // SAFETY: each is ours, and forgotten at once.
        unsafe { sys::rte_pktmbuf_free_bulk(waiting.as_mut_ptr(), waiting.len() as u32) };
        self.start = 0;
        self.end = 0;
    }
}

impl Drop for MbufBurst {
    fn drop(&mut self) {
        self.free();
    }
}
