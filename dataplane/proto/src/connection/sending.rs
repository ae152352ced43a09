//! The transfers that a connection sends.

use std::collections::{HashMap, VecDeque};

use super::event::{Event, FailReason};
use super::{TransferError, events_of};
use crate::digest::Digest;
use crate::id::{Segment, TransferId};
use crate::transfer::{LEN_MAX, Outgoing, Piece};
use crate::wire::DoneAck;

/// Segments of one transfer in a row before the next transfer gets its turn:
/// long enough to read memory in order, short enough that a tensor of a few
/// kilobytes does not wait behind one of gigabytes.
const TURN: u32 = 32;

/// Transfers that we send, and whose turn it is. Every operation is O(1).
#[derive(Debug, Default)]
pub(super) struct Sending {
    /// By the peer's slot. An entry stays when its transfer is over, so that a
    /// late DONE finds its answer; at most one for each slot the peer ever granted.
    slots: HashMap<u32, Slot>,
    active: Vec<Option<Active>>,
    count: u64,
    /// Places in `active` that are free; one still in `ready` is not.
    vacant: Vec<u32>,
    ready: VecDeque<u32>,
    turn: u32,
    /// What had moved of the transfers that failed with the connection.
    interrupted: HashMap<TransferId, (Outgoing, u64)>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Index into `active`.
    Active(u32),
    /// DONE came, and this was the answer.
    Judged(DoneAck),
    /// Cancelled or reset.
    Abandoned,
}

#[derive(Debug)]
struct Active {
    id: TransferId,
    outgoing: Outgoing,
    retransmits: u64,
    /// In `ready`.
    queued: bool,
    /// The empty segment of a transfer of no bytes is due.
    empty: bool,
}

/// A segment to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    pub(super) segment: Segment,
    pub(super) index: u32,
    pub(super) fin: bool,
    piece: Option<Piece>,
}

/// What a DONE means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// The transfer ended with it.
    Ended(DoneAck, Event),
    /// It had ended already; this was the answer.
    Again(DoneAck),
    /// The transfer was given up, or is one of before.
    Ignore,
    /// No such transfer was begun.
    Unknown,
    /// Not every byte was sent.
    Early,
}

impl Sending {
    pub(super) fn active(&self) -> u64 {
        self.count
    }

    /// Begins a transfer. Returns the event of the transfer it replaces: the peer
    /// used the slot again, so it has given the earlier one up.
    pub(super) fn begin(
        &mut self,
        id: TransferId,
        outgoing: Outgoing,
        slots_max: u32,
    ) -> Result<Option<Event>, TransferError> {
        let len = outgoing.len();
        if id.slot >= slots_max {
            return Err(TransferError::SlotOutOfRange {
                slot: id.slot,
                slots_max,
            });
        }
        if len > LEN_MAX {
            return Err(TransferError::TooLong(len));
        }
        let mut replaced = None;
        if let Some(slot) = self.slots.get(&id.slot) {
            let last = slot.generation;
            if id.generation <= last {
                return Err(TransferError::StaleGeneration { id, last });
            }
            let earlier = TransferId {
                slot: id.slot,
                generation: last,
            };
            replaced = self.abandon(earlier, FailReason::CancelledByPeer);
        }
        let active = Active {
            id,
            outgoing,
            retransmits: 0,
            queued: true,
            empty: len == 0,
        };
        let index = match self.vacant.pop() {
            Some(index) => index,
            None => {
                self.active.push(None);
                self.active.len() as u32 - 1
            }
        };
        self.active[index as usize] = Some(active);
        self.count += 1;
        self.ready.push_back(index);
        let state = State::Active(index);
        self.slots.insert(
            id.slot,
            Slot {
                generation: id.generation,
                state,
            },
        );
        Ok(replaced)
    }

    /// The next segment of at most `max` bytes.
    pub(super) fn next(&mut self, max: u64) -> Option<Next> {
        while let Some(&index) = self.ready.front() {
            if self.turn == TURN {
                self.turn = 0;
                self.ready.rotate_left(1);
                continue;
            }
            match &mut self.active[index as usize] {
                Some(active) => match active.next(index, max) {
                    Some(next) => {
                        self.turn += 1;
                        return Some(next);
                    }
                    None => active.queued = false,
                },
                None => self.vacant.push(index),
            }
            self.turn = 0;
            self.ready.pop_front();
        }
        None
    }

    /// Takes in the CRC32C of a segment about to be sent.
    pub(super) fn record(&mut self, next: Next, crc: u32) {
        if let Some(piece) = next.piece.filter(|piece| piece.first)
            && let Some(active) = self.find(next.index, next.segment.transfer)
        {
            active.outgoing.record(piece, crc);
        }
    }

    pub(super) fn has_next(&self) -> bool {
        // Transfers leave `ready` lazily, when their turn comes; those that ended stay a while.
        !self.ready.is_empty()
    }

    pub(super) fn handle_acked(&mut self, index: u32, segment: Segment) {
        if let Some(active) = self.find(index, segment.transfer) {
            active.outgoing.handle_acked(u64::from(segment.len));
        }
    }

    /// Queues a segment to be sent again, if its transfer is still under way.
    pub(super) fn handle_lost(&mut self, index: u32, segment: Segment) -> bool {
        let Some(active) = self.find(index, segment.transfer) else {
            return false;
        };
        active.retransmits += 1;
        if segment.len == 0 {
            active.empty = true;
        } else {
            active
                .outgoing
                .handle_lost(segment.offset, u64::from(segment.len));
        }
        if !active.queued {
            active.queued = true;
            // Older than anything waiting.
            self.turn = 0;
            self.ready.push_front(index);
        }
        true
    }

    /// Judges a DONE.
    pub(super) fn judge(&mut self, id: TransferId, len: u64, digest: Digest) -> Judgement {
        let index = match self.slots.get(&id.slot) {
            None => return Judgement::Unknown,
            Some(slot) if id.generation > slot.generation => return Judgement::Unknown,
            Some(slot) if id.generation < slot.generation => return Judgement::Ignore,
            Some(slot) => match slot.state {
                State::Active(index) => index,
                State::Judged(answer) => return Judgement::Again(answer),
                State::Abandoned => return Judgement::Ignore,
            },
        };
        let Some(active) = self.find(index, id) else {
            return Judgement::Unknown;
        };
        let Some(ours) = active.outgoing.digest() else {
            return Judgement::Early;
        };
        let (our_len, retransmits) = (active.outgoing.len(), active.retransmits);
        let (answer, event) = if (our_len, ours) == (len, digest) {
            (
                DoneAck::Ok,
                Event::Sent {
                    transfer: id,
                    digest,
                    len,
                    retransmits,
                },
            )
        } else {
            let reason = FailReason::DigestMismatch;
            (
                DoneAck::DigestMismatch,
                Event::Failed {
                    transfer: id,
                    outgoing: true,
                    reason,
                },
            )
        };
        self.remove(index, id, State::Judged(answer));
        Judgement::Ended(answer, event)
    }

    /// Gives a transfer up. None if it is not active.
    pub(super) fn abandon(&mut self, id: TransferId, reason: FailReason) -> Option<Event> {
        let slot = self
            .slots
            .get(&id.slot)
            .filter(|slot| slot.generation == id.generation)?;
        let State::Active(index) = slot.state else {
            return None;
        };
        self.remove(index, id, State::Abandoned);
        Some(events_of(id, true, reason))
    }

    /// Gives every transfer up; [`Sending::take_interrupted`] has what had moved.
    pub(super) fn fail_all(&mut self, reason: FailReason) -> impl Iterator<Item = Event> + '_ {
        self.slots.clear();
        self.ready.clear();
        self.vacant.clear();
        self.count = 0;
        let interrupted = &mut self.interrupted;
        self.active.drain(..).flatten().map(move |active| {
            interrupted.insert(active.id, (active.outgoing, active.retransmits));
            events_of(active.id, true, reason)
        })
    }

    pub(super) fn take_interrupted(&mut self, id: TransferId) -> Option<(Outgoing, u64)> {
        self.interrupted.remove(&id)
    }

    fn remove(&mut self, index: u32, id: TransferId, state: State) {
        self.slots.insert(
            id.slot,
            Slot {
                generation: id.generation,
                state,
            },
        );
        self.count -= 1;
        // A queued index leaves with its turn: looking for it now would be a scan.
        if self.active[index as usize]
            .take()
            .is_some_and(|active| !active.queued)
        {
            self.vacant.push(index);
        }
    }

    fn find(&mut self, index: u32, id: TransferId) -> Option<&mut Active> {
        self.active
            .get_mut(index as usize)?
            .as_mut()
            .filter(|active| active.id == id)
    }
}

impl Active {
    fn next(&mut self, index: u32, max: u64) -> Option<Next> {
        let piece = if self.empty {
            None
        } else {
            Some(self.outgoing.next(max)?)
        };
        self.empty = false;
        let (offset, len) = piece.map_or((0, 0), |piece| (piece.offset, piece.len as u32));
        let segment = Segment {
            transfer: self.id,
            offset,
            len,
        };
        let fin = offset + u64::from(len) == self.outgoing.len();
        Some(Next {
            segment,
            index,
            fin,
            piece,
        })
    }
}
