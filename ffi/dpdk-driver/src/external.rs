//! Tensor memory that frames refer to.

use genie_dpdk_sys as sys;

use crate::errno::Errno;

/// The memory attached to a port, by handle.
///
/// The table never moves: packet buffers in flight point into it.
#[derive(Debug)]
pub(crate) struct External {
    slots: Box<[sys::genie_attachment]>,
    /// Handles of the free slots; the next one to give is the last.
    free: Vec<u32>,
}

impl External {
    /// A table for `capacity` attachments.
    pub(crate) fn new(capacity: u32) -> Self {
        let slot = sys::genie_attachment::default;
        let slots = std::iter::repeat_with(slot)
            .take(capacity as usize)
            .collect();
        Self {
            slots,
            free: (0..capacity).rev().collect(),
        }
    }

    /// What the transmit queue needs of the table.
    pub(crate) fn as_raw(&mut self) -> (*mut sys::genie_attachment, u32) {
        (self.slots.as_mut_ptr(), self.slots.len() as u32)
    }

    /// Takes a free slot for this memory; `None` where all are taken.
    pub(crate) fn attach(&mut self, base: *const u8, len: u64) -> Option<u32> {
        let handle = self.free.pop()?;
        // SAFETY: the slot is ours and no packet buffer refers to a free one.
        unsafe { sys::genie_attachment_init(&mut self.slots[handle as usize], base, len) };
        Some(handle)
    }

    /// References to an attachment, its owner's included; 0 if there is none.
    pub(crate) fn refs(&self, handle: u32) -> u32 {
        match self.slots.get(handle as usize) {
            Some(slot) if slot.len > 0 => {
                // SAFETY: an attached slot is initialised; the read is atomic.
                u32::from(unsafe { sys::genie_attachment_refs(slot) })
            }
            _ => 0,
        }
    }

    /// Frees a slot, unless a packet buffer refers to it.
    pub(crate) fn detach(&mut self, handle: u32) -> Result<(), Errno> {
        match self.refs(handle) {
            0 => Err(Errno::INVAL),
            1 => {
                self.slots[handle as usize].len = 0;
                self.free.push(handle);
                Ok(())
            }
            _ => Err(Errno::BUSY),
        }
    }

    /// Packet buffers that refer to attachments.
    pub(crate) fn references(&self) -> u32 {
        let handles = 0..self.slots.len() as u32;
        let others = |handle| self.refs(handle).saturating_sub(1);
        handles.map(others).sum()
    }

    /// Whether a packet buffer refers to any attachment.
    pub(crate) fn in_flight(&self) -> bool {
        self.references() > 0
    }
}
