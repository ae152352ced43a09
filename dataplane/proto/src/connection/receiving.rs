//! The transfers that a connection receives.

use std::collections::HashMap;

use super::event::{Event, FailReason};
use super::stats::DropCause;
use super::{TransferError, events_of};
use crate::id::TransferId;
use crate::transfer::{Check, Incoming, Refusal};
use crate::wire::Done;

/// Packets that may contradict the granted length before the transfer fails. One
/// can be a corrupted header that passed its 16-bit check; so many are a peer
/// that means another length.
const STRIKES_MAX: u8 = 8;

/// Slots of transfers that the peer sends to us.
///
/// ```text
/// vacant ─grant→ active ─complete, DONE_ACK→ over ─grant, higher generation→ active
///                  └─cancel, RESET──────────→ over
/// ```
#[derive(Debug, Default)]
pub(super) struct Receiving {
    slots: Vec<Slot>,
    active: u64,
    /// What had moved of the transfers that failed with the connection.
    interrupted: HashMap<TransferId, Incoming>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Of the active transfer, or of the last one.
    generation: u32,
    used: bool,
    active: Option<Box<Active>>,
}

#[derive(Debug)]
struct Active {
    incoming: Incoming,
    strikes: u8,
    /// DONE has been queued.
    done: bool,
}

/// What to do with a DATA packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Write and verify it.
    Place,
    /// Nothing to write: acknowledge it, so that the sender stops.
    AckOnly,
    /// Drop it unacknowledged.
    Drop(DropCause),
}

/// What a DATA packet says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) transfer: TransferId,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) fin: bool,
}

impl Receiving {
    pub(super) fn active(&self) -> u64 {
        self.active
    }

    pub(super) fn grant(
        &mut self,
        id: TransferId,
        incoming: Incoming,
        slots_max: u32,
    ) -> Result<(), TransferError> {
        if id.slot >= slots_max {
            return Err(TransferError::SlotOutOfRange {
                slot: id.slot,
                slots_max,
            });
        }
        let at = id.slot as usize;
        if at >= self.slots.len() {
            self.slots.resize_with(at + 1, Slot::default);
        }
        let slot = &mut self.slots[at];
        if slot.active.is_some() {
            return Err(TransferError::SlotBusy(id));
        }
        if slot.used && id.generation <= slot.generation {
            return Err(TransferError::StaleGeneration {
                id,
                last: slot.generation,
            });
        }
        slot.generation = id.generation;
        slot.used = true;
        slot.active = Some(Box::new(Active {
            incoming,
            strikes: 0,
            done: false,
        }));
        self.active += 1;
        Ok(())
    }

    pub(super) fn check(&self, claim: Claim) -> Verdict {
        let Some(slot) = self
            .slots
            .get(claim.transfer.slot as usize)
            .filter(|slot| slot.used)
        else {
            return Verdict::Drop(DropCause::NotGranted);
        };
        if claim.transfer.generation > slot.generation {
            return Verdict::Drop(DropCause::NotGranted);
        }
        let active = match &slot.active {
            Some(active) if claim.transfer.generation == slot.generation => active,
            // Over, or of an older generation, which is over too.
            _ => return Verdict::AckOnly,
        };
        let granted = active.incoming.len();
        let reaches_end = claim.offset + claim.len >= granted;
        if claim.fin != reaches_end {
            return Verdict::Drop(DropCause::LengthMismatch);
        }
        match active.incoming.check(claim.offset, claim.len) {
            Check::Fresh => Verdict::Place,
            Check::Duplicate => Verdict::AckOnly,
            Check::Refused(Refusal::Empty) if granted == 0 => Verdict::AckOnly,
            Check::Refused(Refusal::Empty) => Verdict::Drop(DropCause::LengthMismatch),
            Check::Refused(Refusal::OutOfBounds) => Verdict::Drop(DropCause::OutOfBounds),
            Check::Refused(Refusal::Misaligned) => Verdict::Drop(DropCause::Misaligned),
            Check::Refused(Refusal::Overlap) => Verdict::Drop(DropCause::Overlap),
        }
    }

    /// Takes in a segment that was written and verified.
    pub(super) fn apply(&mut self, claim: Claim, crc: u32) {
        if let Some(active) = self.find(claim.transfer) {
            active.incoming.apply(claim.offset, claim.len, crc);
        }
    }

    /// Whether DONE is due for a transfer that data just came for; true once.
    pub(super) fn take_complete(&mut self, id: TransferId) -> bool {
        self.find(id).is_some_and(|active| {
            let complete = active.incoming.is_complete() && !active.done;
            active.done |= complete;
            complete
        })
    }

    /// Counts a packet that contradicts the grant; true when it is one too many.
    pub(super) fn strike(&mut self, id: TransferId) -> bool {
        self.find(id).is_some_and(|active| {
            active.strikes = active.strikes.saturating_add(1);
            active.strikes == STRIKES_MAX
        })
    }

    /// What DONE says, unless the transfer is over meanwhile.
    pub(super) fn done(&mut self, id: TransferId) -> Option<Done> {
        let active = self.find(id)?;
        active.done.then(|| Done {
            len: active.incoming.len(),
            digest: active.incoming.digest(),
        })
    }

    /// Whether the transfer is active and was not reported complete.
    pub(super) fn is_incomplete(&mut self, id: TransferId) -> bool {
        self.find(id).is_some_and(|active| !active.done)
    }

    /// Ends a transfer: `Ok` as received, else as failed. None if it is not active.
    pub(super) fn end(&mut self, id: TransferId, how: Result<(), FailReason>) -> Option<Event> {
        self.find(id)?;
        let active = self.slots[id.slot as usize].active.take()?;
        self.active -= 1;
        Some(match how {
            Ok(()) => Event::Received {
                transfer: id,
                digest: active.incoming.digest(),
                len: active.incoming.len(),
            },
            Err(reason) => Event::Failed {
                transfer: id,
                outgoing: false,
                reason,
            },
        })
    }

    /// Ends every transfer; [`Receiving::take_interrupted`] has what had moved.
    pub(super) fn fail_all(&mut self, reason: FailReason) -> impl Iterator<Item = Event> + '_ {
        self.active = 0;
        let interrupted = &mut self.interrupted;
        self.slots
            .iter_mut()
            .enumerate()
            .filter_map(move |(at, slot)| {
                let active = slot.active.take()?;
                let id = TransferId {
                    slot: at as u32,
                    generation: slot.generation,
                };
                interrupted.insert(id, active.incoming);
                Some(events_of(id, false, reason))
            })
    }

    pub(super) fn take_interrupted(&mut self, id: TransferId) -> Option<Incoming> {
        self.interrupted.remove(&id)
    }

    fn find(&mut self, id: TransferId) -> Option<&mut Active> {
        self.slots
            .get_mut(id.slot as usize)
            .filter(|slot| slot.generation == id.generation)?
            .active
            .as_deref_mut()
    }
}
