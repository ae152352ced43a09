//! What a session knows of the transfers under way, and what they cost.

use std::time::Duration;

use crate::device::{Attachment, Capabilities};
use crate::engine::{Cost, OperationId};
use crate::ledger::Copies;
use crate::memory::Lease;

pub(super) struct Incoming {
    pub(super) operation: OperationId,
    pub(super) into: Destination,
    /// Bytes copied out of packets, bad ones included.
    pub(super) placed: u64,
    /// What it took on other paths.
    pub(super) before: Cost,
}

/// What becomes of a transfer's bytes.
pub(super) enum Destination {
    Memory(Lease),
    /// They stay in the frames. `unread`: a reader had one for longer than this.
    InPlace {
        unread: Option<Duration>,
    },
}

pub(super) struct Outgoing {
    pub(super) operation: OperationId,
    pub(super) from: Lease,
    pub(super) attachment: Attachment,
    /// Bytes handed to the device, repeated ones included.
    pub(super) handed: u64,
    /// What it took on other paths.
    pub(super) before: Cost,
}

/// Who copies on this device, per direction.
#[derive(Clone, Copy)]
pub(in crate::engine::udp) struct Copying {
    pub(super) genie_tx: bool,
    pub(super) driver_tx: bool,
    pub(super) driver_rx: bool,
    pub(super) sealed: bool,
}

impl Incoming {
    /// What it took so far, on all paths.
    pub(super) fn cost(&self, copying: Copying) -> Cost {
        let copies = match self.into {
            Destination::Memory(_) => copying.received(self.placed),
            Destination::InPlace { .. } => copying.received_in_place(self.placed),
        };
        self.before.plus(Cost {
            retransmits: 0,
            copies,
        })
    }
}

impl Outgoing {
    /// What it took so far, on all paths; `retransmits` on this one.
    pub(super) fn cost(&self, copying: Copying, retransmits: u64) -> Cost {
        self.before.plus(Cost {
            retransmits,
            copies: copying.sent(self.handed),
        })
    }
}

impl Copying {
    pub(in crate::engine::udp) fn of(capabilities: &Capabilities) -> Self {
        Self {
            genie_tx: !capabilities.tx_external,
            driver_tx: capabilities.driver_copies_tx,
            driver_rx: capabilities.driver_copies_rx,
            sealed: false,
        }
    }

    pub(in crate::engine::udp) fn sent(self, bytes: u64) -> Copies {
        let count = |copies: bool| if copies { bytes } else { 0 };
        Copies {
            genie: count(self.genie_tx) + count(self.sealed),
            driver: count(self.driver_tx),
            kernel: 0,
        }
    }

    pub(super) fn received(self, bytes: u64) -> Copies {
        Copies {
            genie: bytes + if self.sealed { bytes } else { 0 },
            ..self.received_in_place(bytes)
        }
    }

    pub(super) fn received_in_place(self, bytes: u64) -> Copies {
        Copies {
            genie: 0,
            driver: if self.driver_rx { bytes } else { 0 },
            kernel: 0,
        }
    }
}
