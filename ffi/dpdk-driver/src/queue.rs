//! A queue pair of a port: bursts in, bursts out.

use genie_dpdk_abi::{RxFrame, TxFrame};
use genie_dpdk_sys as sys;

use crate::errno::Errno;
use crate::mbuf::MbufBurst;

/// A receive and a transmit queue of a started port.
///
/// May only be used from one thread at a time; an lcore id makes it fast.
pub(crate) struct QueuePair {
    port: u16,
    queue: u16,
    mode: sys::genie_tx_mode,
    /// Frames taken from the caller that the ring had no room for.
    pending: MbufBurst,
    /// Whether the driver can be asked for sent packet buffers.
    has_done_cleanup: bool,
    /// Whether frames in two segments are left so.
    pub(crate) keeps_segments: bool,
    pub(crate) copied_bytes: u64,
    pub(crate) bad_frames: u64,
    /// What went through it, where the port's own counters are several queues'.
    pub(crate) counts: Option<Counts>,
}

/// Frames and bytes of one queue pair.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) rx_frames: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_frames: u64,
    pub(crate) tx_bytes: u64,
}

impl QueuePair {
    /// # Safety
    /// The port is started and stays so while bursts are moved; what `mode`
    /// points to outlives this; nothing else uses these queues of the port.
    pub(crate) unsafe fn new(port: u16, queue: u16, mode: sys::genie_tx_mode) -> Self {
        let pending = MbufBurst::new();
        Self {
            port,
            queue,
            mode,
            pending,
            has_done_cleanup: true,
            keeps_segments: false,
            copied_bytes: 0,
            bad_frames: 0,
            counts: None,
        }
    }

    /// Receives frames; each is the caller's until [`QueuePair::rx_free`].
    pub(crate) fn rx_burst(&mut self, frames: &mut [RxFrame]) -> usize {
        self.offer_pending();
        let room = frames.len().min(genie_dpdk_abi::BURST_MAX) as u16;
        let first = frames.as_mut_ptr().cast::<sys::genie_rx_frame>();
        let keeps = self.keeps_segments;
        // SAFETY: the port is started (see `new`); the two frame types have one
        // layout, asserted below; at most `room` are written.
        let count = unsafe { sys::genie_rx_burst(self.port, self.queue, first, room, keeps) };
        let count = usize::from(count);
        if let Some(counts) = &mut self.counts {
            let bytes = frames[..count].iter().map(|frame| frame.frame_len);
            counts.rx_frames += count as u64;
            counts.rx_bytes += bytes.map(u64::from).sum::<u64>();
        }
        count
    }

    /// Frees received frames.
    ///
    /// # Safety
    /// Each came from `rx_burst` and was not freed since.
    pub(crate) unsafe fn rx_free(&mut self, frames: &[RxFrame]) {
        for frames in frames.chunks(genie_dpdk_abi::BURST_MAX) {
            let (first, count) = (frames.as_ptr().cast::<sys::genie_rx_frame>(), frames.len());
            // SAFETY: the caller's promise; one layout, as above.
            unsafe { sys::genie_rx_free(first, count as u32) };
        }
    }

    /// Takes frames for sending; returns how many of the first ones.
    ///
    /// What the ring has no room for is kept, so that the work of describing
    /// (or copying) it is done once. While frames are kept none are taken.
    ///
    /// # Safety
    /// Every frame's head is readable, and all attached memory is.
    pub(crate) unsafe fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        if !self.offer_pending() {
            return 0;
        }
        let first = frames.as_ptr().cast::<sys::genie_tx_frame>();
        // SAFETY: one layout, asserted below; same length and lifetime.
        let described = unsafe { std::slice::from_raw_parts(first, frames.len()) };
        // SAFETY: `mode` outlives this (see `new`); heads and attached memory
        // are readable by the caller's promise.
        let built = unsafe { self.pending.build(&self.mode, described) };
        if let Some(counts) = &mut self.counts {
            let taken = &frames[..built.taken as usize];
            let bytes = taken.iter().map(|one| one.head_len + one.payload_len);
            counts.tx_frames += u64::from(built.taken - built.bad);
            counts.tx_bytes += bytes.map(u64::from).sum::<u64>();
        }
        self.copied_bytes += built.copied_bytes;
        self.bad_frames += u64::from(built.bad);
        self.offer_pending();
        built.taken as usize
    }

    /// Offers kept frames and collects sent packet buffers.
    pub(crate) fn reap(&mut self) {
        self.offer_pending();
        if self.has_done_cleanup {
            // SAFETY: the port is started (see `new`).
            let status = unsafe { sys::rte_eth_tx_done_cleanup(self.port, self.queue, 0) };
            self.has_done_cleanup = Errno::check(status) != Err(Errno::NOTSUP);
        } else {
            // An empty burst makes most drivers look for what was sent.
            // SAFETY: the port is started; no packet buffer is passed.
            unsafe { sys::genie_tx_send(self.port, self.queue, std::ptr::null_mut(), 0) };
        }
    }

    /// The descriptor that tells of frames while interrupts are on, if the port
    /// was configured for that.
    pub(crate) fn rx_wait_fd(&self) -> Option<i32> {
        // SAFETY: a valid port; a queue without interrupts has none.
        let fd = unsafe { sys::rte_eth_dev_rx_intr_ctl_q_get_fd(self.port, self.queue) };
        (fd >= 0).then_some(fd)
    }

    /// Turns receive interrupts on or off.
    pub(crate) fn set_rx_interrupt(&mut self, on: bool) -> Result<(), Errno> {
        let status = if on {
            // SAFETY: the port is started (see `new`).
            unsafe { sys::rte_eth_dev_rx_intr_enable(self.port, self.queue) }
        } else {
            // SAFETY: as above.
            unsafe { sys::rte_eth_dev_rx_intr_disable(self.port, self.queue) }
        };
        Errno::check(status).map(drop)
    }

    /// Its number in the port.
    pub(crate) fn index(&self) -> u16 {
        self.queue
    }

    /// Frames kept for want of room in the ring.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Frees kept frames, for a port that is stopped.
    pub(crate) fn drop_pending(&mut self) {
        self.bad_frames += self.pending.len() as u64;
        self.pending.free();
    }

    /// Whether nothing is kept any more.
    fn offer_pending(&mut self) -> bool {
        if !self.pending.is_empty() {
            // SAFETY: the port is started and its queue ours (see `new`).
            unsafe { self.pending.send(self.port, self.queue) };
        }
        self.pending.is_empty()
    }
}

const _: () = {
    assert!(sys::GENIE_BURST_MAX as usize == genie_dpdk_abi::BURST_MAX);
    assert!(size_of::<sys::genie_rx_frame>() == size_of::<RxFrame>());
    assert!(align_of::<sys::genie_rx_frame>() == align_of::<RxFrame>());
    assert!(size_of::<sys::genie_tx_frame>() == size_of::<TxFrame>());
    assert!(align_of::<sys::genie_tx_frame>() == align_of::<TxFrame>());
};

macro_rules! assert_offsets {
    ($($raw:ident = $abi:ident { $($field:ident),* })*) => {
        $($(const _: () = assert!(
            std::mem::offset_of!(sys::$raw, $field) == std::mem::offset_of!($abi, $field)
        );)*)*
    };
}

assert_offsets! {
    genie_rx_frame = RxFrame { mbuf, data, data_len, frame_len, payload, payload_len }
    genie_tx_frame = TxFrame { head, payload, head_len, payload_len, attachment }
}
