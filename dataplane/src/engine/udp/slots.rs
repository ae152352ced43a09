//! Memory that sealed payloads are sent from.
//!
//! A tensor's own bytes can't be sent when packets are sealed, so a payload is
//! copied into a slot and sealed there, and the frame refers to the slot. Slots
//! come in blocks of a burst: one attachment each, looked after once a burst
//! instead of once a packet. The invariant: *a slot is written only while no
//! frame refers to its block*.

use genie_proto::seal::TAG_LEN;
use genie_proto::wire::{HEADER_LEN, PLAIN_LEN};

use crate::device::{AttachError, Attachment, BURST_MAX, Device, Payload};
use crate::memory::{Lease, RegionError, Slab, View};

/// What a slot begins with, so that payloads are aligned like tensors.
const ALIGN: usize = 64;

/// Bytes of a header that are sealed with the payload.
const CHECK_LEN: usize = HEADER_LEN - PLAIN_LEN;

/// Where in a slot what is sealed begins.
const BEGIN: usize = ALIGN - CHECK_LEN;

/// Blocks needed besides those whose frames the device has: one that is being
/// filled, and the one before, frames of which may be in the same burst.
const SPARE_BLOCKS: usize = 2;

/// The most memory of an engine's slots; small beside any arena, and at the
/// largest MTU still enough for four blocks.
const BYTES_MAX: usize = 16 << 20;

/// Why sealed packets cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum SlotsError {
    /// There is no memory for them.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// The device does not take it.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// The slots of an engine. Belongs to its thread.
#[derive(Debug)]
pub(super) struct Slots {
    slab: Slab,
    /// What frames of each block refer to; none while no frame does.
    blocks: Vec<Option<Attachment>>,
    slot_bytes: usize,
    /// The block that is being filled, the one before, and its slots in use.
    current: usize,
    previous: usize,
    used: usize,
}

impl Slots {
    /// Enough slots for all frames that the device may hold at a time, the
    /// first of which it can send.
    pub(super) fn new(device: &mut dyn Device) -> Result<Self, SlotsError> {
        let capabilities = device.capabilities();
        let slot_bytes = (BEGIN + usize::from(capabilities.mtu) + TAG_LEN).next_multiple_of(ALIGN);
        let block_bytes = slot_bytes * BURST_MAX;
        let wanted = usize::from(capabilities.tx_descriptors).div_ceil(BURST_MAX) + SPARE_BLOCKS;
        let count = wanted.min(BYTES_MAX / block_bytes).max(SPARE_BLOCKS + 2);
        let slab = Slab::new(count * block_bytes)?;
        let mut blocks = vec![None; count];
        // Later ones may have to wait; a device that takes none never will.
        blocks[0] = Some(slab.attach(0..block_bytes, device)?);
        Ok(Self {
            slab,
            blocks,
            slot_bytes,
            current: 0,
            previous: 0,
            used: 0,
        })
    }

    /// Whether no frame can refer to any slot.
    pub(super) fn are_released(&self) -> bool {
        self.blocks.iter().all(Option::is_none)
    }

    /// Whether these are slots of a block that frames may refer to.
    pub(super) fn holds(&self, attachment: Attachment) -> bool {
        self.blocks.contains(&Some(attachment))
    }

    /// Takes every block back that the device has done with; returns whether
    /// these were all.
    pub(super) fn release(&mut self, device: &mut dyn Device) -> bool {
        for block in &mut self.blocks {
            if block.is_some_and(|attachment| device.detach(attachment)) {
                *block = None;
            }
        }
        // Whoever seals next takes a block first.
        self.used = BURST_MAX;
        self.are_released()
    }

    /// Makes sure that there is a free slot; false while the device has all.
    pub(super) fn prepare(&mut self, device: &mut dyn Device) -> bool {
        if self.used < BURST_MAX {
            return true;
        }
        // Always from the front: as few as possible, as they are in a cache then.
        for at in 0..self.blocks.len() {
            let is_filled = self.blocks[at].is_some();
            if is_filled && (at == self.current || at == self.previous) {
                continue;
            }
            if self.take(at, device) {
                (self.previous, self.current, self.used) = (self.current, at, 0);
                return true;
            }
        }
        false
    }

    fn take(&mut self, at: usize, device: &mut dyn Device) -> bool {
        if let Some(attachment) = self.blocks[at] {
            if !device.detach(attachment) {
                return false;
            }
            self.blocks[at] = None;
        }
        let bytes = self.slot_bytes * BURST_MAX;
        let block = at * bytes..(at + 1) * bytes;
        self.blocks[at] = self.slab.attach(block, device).ok();
        self.blocks[at].is_some()
    }

    /// Copies a part of a tensor into the slot that [`Slots::prepare`] made sure
    /// of; returns the CRC32C of the copy.
    pub(super) fn load(&mut self, from: &Lease, offset: usize, len: usize) -> u32 {
        let payload = &mut self.slot()[ALIGN..ALIGN + len];
        from.read_at(offset, payload);
        View::from(&*payload).crc32c()
    }

    /// Seals what was loaded, with `check` before it, and gives the slot away.
    pub(super) fn store(
        &mut self,
        check: &[u8; CHECK_LEN],
        len: usize,
        seal: impl FnOnce(&mut [u8]) -> [u8; TAG_LEN],
    ) -> Payload {
        let offset = self.used * self.slot_bytes + BEGIN;
        let attachment = self.blocks[self.current].expect("attached when it was taken");
        let slot = self.slot();
        slot[BEGIN..ALIGN].copy_from_slice(check);
        let end = ALIGN + len;
        let tag = seal(&mut slot[BEGIN..end]);
        slot[end..end + TAG_LEN].copy_from_slice(&tag);
        self.used += 1;
        Payload {
            attachment,
            offset: offset as u64,
            len: (CHECK_LEN + len + TAG_LEN) as u32,
        }
    }

    fn slot(&mut self) -> &mut [u8] {
        let start = (self.current * BURST_MAX + self.used) * self.slot_bytes;
        self.slab.bytes_mut(start..start + self.slot_bytes)
    }
}
