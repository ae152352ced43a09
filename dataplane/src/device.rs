//! A device: one queue pair that carries Ethernet frames.
//!
//! The UDP engine drives it from one thread. Implemented by [`crate::dpdk`]
//! over the driver library, by [`pair`] and [`queues`] in memory, and by [`fault`]
//! and [`tap`] around any other. The invariant: *a device holds a lease on the memory of every frame
//! that it has not finished sending*.

#![forbid(unsafe_code)]

pub mod attachments;
pub mod fault;
pub mod kept;
pub mod pair;
pub mod queues;
pub mod registrations;
pub mod tap;

use std::os::fd::BorrowedFd;

use arrayvec::ArrayVec;
use serde::{Deserialize, Serialize};

use crate::ledger::Copies;
use crate::memory::{Lease, View};

/// Room for all headers of a frame, or for a whole frame of the protocol that
/// carries no tensor bytes: Ethernet, IPv6, UDP and 512 bytes of Genie's own.
pub const HEAD_MAX: usize = 640;

/// The most frames moved by one call.
pub const BURST_MAX: usize = 32;

/// Tensor memory that frames may refer to; valid on the device that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attachment(pub u32);

/// A received frame that is kept; the number of no other frame that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameId(pub u32);

/// A frame to be sent: bytes of its own, then optionally bytes of a tensor.
#[derive(Clone, Debug, Default)]
pub struct TxFrame {
    /// Everything from the Ethernet header to the end of Genie's own bytes.
    pub head: ArrayVec<u8, HEAD_MAX>,
    /// Tensor bytes that follow the head.
    pub payload: Option<Payload>,
}

/// A slice of attached memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Which memory.
    pub attachment: Attachment,
    /// Offset in the attached lease, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

impl TxFrame {
    /// Length on the wire in bytes, without the frame check sequence.
    pub fn len(&self) -> usize {
        self.head.len() + self.payload.map_or(0, |payload| payload.len as usize)
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a device can do; read at start and obeyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The driver's name, such as `net_vhost`; ends up in `path`.
    pub driver: String,
    /// The port's own Ethernet address.
    pub mac: [u8; 6],
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Whether frames can refer to attached memory; where not, the device
    /// copies the payload behind the head and counts it.
    pub tx_external: bool,
    /// Whether the device fills in UDP checksums when asked to.
    pub tx_udp_checksum: bool,
    /// Whether an idle engine can sleep until a frame arrives.
    pub rx_interrupt: bool,
    /// Whether the driver copies frames with the CPU on transmission.
    pub driver_copies_tx: bool,
    /// Whether the driver copies frames with the CPU on reception.
    pub driver_copies_rx: bool,
    /// Length of the receive ring in frames: what a sender may have in flight.
    pub rx_descriptors: u16,
    /// Length of the transmit ring in frames.
    pub tx_descriptors: u16,
}

/// The port's own counters, not the engine's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames lost because no buffer or descriptor was free.
    pub rx_missed: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames the port refused or failed to send.
    pub tx_errors: u64,
    /// Regions registered with the device since it was opened: arenas, not tensors.
    pub registrations: u64,
    /// Regions that are registered now.
    pub registered: u64,
}

/// A queue among the queues of its device, and the frames that came to one and
/// belonged to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steering {
    /// Its number.
    pub queue: u16,
    /// How many there are.
    pub queues: u16,
    /// Frames passed on to other queues.
    pub forwarded: u64,
    /// Frames that other queues passed on to this one.
    pub received: u64,
    /// Frames not passed on, as their owner's ring was full: lost, as on a wire.
    pub dropped: u64,
}

/// Why memory could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The table of attachments is full; detach one first.
    #[error("no room for another attachment")]
    Full,
    /// The device cannot reach this memory.
    #[error("the device cannot reach this memory: {0}")]
    Unreachable(String),
}

/// One queue pair. May only be used from one thread, which owns it.
pub trait Device {
    /// What the device can do; does not change while it is open.
    fn capabilities(&self) -> &Capabilities;

    /// Receives up to [`BURST_MAX`] frames and shows each to `on_frame`.
    ///
    /// A frame is given back to the device when `on_frame` returns. Returns the
    /// number of frames.
    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize;

    /// How many received frames may be kept at a time with
    /// [`Device::rx_burst_keeping`], beyond those of a burst; none by default.
    fn keepable(&self) -> u32 {
        0
    }

    /// [`Device::rx_burst`] whose frames need not all be given back when
    /// `on_frame` returns: one for which it says `true` is kept under the number
    /// it was shown with. A frame without a number cannot be kept.
    fn rx_burst_keeping(
        &mut self,
        on_frame: &mut dyn FnMut(View<'_>, Option<FrameId>) -> bool,
    ) -> usize {
        self.rx_burst(&mut |frame| {
            on_frame(frame, None);
        })
    }

    /// The bytes of a kept frame; of one that is not kept, none.
    fn kept(&self, frame: FrameId) -> View<'_> {
        let _ = frame;
        View::default()
    }

    /// Gives a kept frame back to the device.
    fn give_back(&mut self, frame: FrameId) {
        let _ = frame;
    }

    /// Queues frames for sending; returns how many of the first ones were taken.
    ///
    /// The rest stays the caller's. A frame whose payload names memory that is
    /// not attached, or that lies outside it, is a bug of the caller's: it is
    /// taken, dropped and counted in `tx_errors`.
    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize;

    /// Lets frames refer to `lease`; the device holds it until [`Device::detach`].
    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError>;

    /// Gives up the device's lease once no unsent frame refers to it.
    ///
    /// Returns `false` while one does; call again after [`Device::reap`].
    fn detach(&mut self, attachment: Attachment) -> bool;

    /// Collects frames that were sent, also on a queue that is otherwise idle.
    fn reap(&mut self);

    /// Gives back memory that is registered with the device and that nobody else
    /// holds any more. Called some times a second, busy or idle.
    fn sweep(&mut self) {}

    /// Stops the queue for good and gives up the frames in it, so that memory
    /// can be detached though the device never finished with it. Nothing is
    /// sent or received after that, by any queue of the device.
    fn stop(&mut self);

    /// Whether the device was stopped, by the owner of whichever of its queues.
    fn is_stopped(&self) -> bool {
        false
    }

    /// The port's own counters.
    fn counters(&self) -> Counters;

    /// What whoever chose this device should know, one sentence each.
    fn cautions(&self) -> Vec<String> {
        Vec::new()
    }

    /// What a good NIC does and this device leaves to the CPU.
    fn lacks(&self) -> Vec<String> {
        Vec::new()
    }

    /// Which queue of how many it is, where it has siblings that pass frames on.
    fn steering(&self) -> Option<Steering> {
        None
    }

    /// What CPUs copied on behalf of this device so far.
    fn copies(&self) -> Copies;

    /// What was recorded of its frames, where they are.
    fn tap(&self) -> Option<tap::TapSnapshot> {
        None
    }

    /// Whether the other end of the link is there, as far as the device knows.
    fn link_up(&self) -> bool;

    /// A descriptor that an epoll set reports, edge-triggered, when frames
    /// arrive while [`Device::arm_rx`] is on; `None` without
    /// [`Capabilities::rx_interrupt`]. The same one for as long as the device is open.
    fn rx_event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// A descriptor like [`Device::rx_event`] that tells of frames which other
    /// queues of the device pass on.
    fn passed_event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Turns the reports of [`Device::rx_event`] on or off; returns whether
    /// they are on. Frames that are there already are not reported: look once
    /// more before sleeping. Off while an engine polls, as reports cost the
    /// sender a system call.
    fn arm_rx(&mut self, on: bool) -> bool {
        let _ = on;
        false
    }
}
