//! The small tensors that a connection sends in one packet each.

use std::collections::VecDeque;

use super::event::{Event, FailReason};
use crate::digest::Digest;
use crate::id::TransferId;
use crate::wire::Metadata;

/// Offers that are kept at a time: no peer grants more at once.
pub(super) const OFFERS_MAX: u64 = 1024;

/// Why a tensor cannot be offered now. The ordinary way, a transfer that the
/// peer was asked for, is open still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum OfferError {
    /// The session is over.
    #[error("the session is over")]
    Closed,
    /// Every slot that the peer granted is used, or whoever sends the packets
    /// has no room for another one. Both pass.
    #[error("no slot is granted")]
    NotGranted,
    /// Whoever sends the packets cannot reach its memory.
    #[error("its memory cannot be reached")]
    Unreachable,
    /// Longer than the peer's slots, or than a packet has room for.
    #[error("{len} bytes are more than one packet carries or a slot holds ({max})")]
    TooLong {
        /// The tensor's length.
        len: u64,
        /// The most that can be offered.
        max: u64,
    },
}

/// Offers in the order of their numbers, each kept until it is acknowledged.
///
/// ```text
/// Begun ─sent─→ Sent ─acknowledged─→ Over
///   └─given up────┴─→ Void ─acknowledged─→ Over
/// ```
/// One that is given up is still sent, without its bytes: the receiver counts
/// numbers. Its invariant: *every offer ends in one event*.
#[derive(Debug, Default)]
pub(super) struct Offering {
    /// Number of the first in `kept`.
    first: u64,
    kept: VecDeque<Kept>,
    /// Every offer below this has been sent once.
    next: u64,
    /// Lost, to be sent again.
    again: VecDeque<u64>,
    granted: u64,
    /// None until the first GRANT came.
    len_max: Option<u32>,
    /// Begun, and neither ended nor given up.
    active: u64,
}

#[derive(Debug)]
struct Kept {
    len: u32,
    digest: Digest,
    metadata: Metadata,
    retransmits: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Begun,
    Sent,
    Void,
    Over,
}

/// An offer to send.
pub(super) struct Next<'a> {
    pub(super) number: u64,
    pub(super) len: u32,
    pub(super) void: bool,
    pub(super) metadata: &'a Metadata,
    /// What it had when it was sent before.
    pub(super) digest: Option<Digest>,
}

impl Offering {
    pub(super) fn active(&self) -> u64 {
        self.active
    }

    /// Takes in what the peer grants, and how much each slot holds if it says so.
    pub(super) fn handle_granted(&mut self, total: u32, len_max: Option<u32>) {
        // The peer's count only rises, and wraps; a lower one is late.
        let more = total.wrapping_sub(self.granted as u32);
        if more <= i32::MAX as u32 {
            self.granted += u64::from(more);
        }
        self.len_max = len_max.or(self.len_max);
    }

    /// Whether another one may be begun, of a tensor of so many bytes.
    pub(super) fn check(&self, len: u64, room: u64) -> Result<(), OfferError> {
        let number = self.first + self.kept.len() as u64;
        let full = number >= self.granted || self.kept.len() as u64 >= OFFERS_MAX;
        let Some(len_max) = self.len_max.filter(|_| !full) else {
            return Err(OfferError::NotGranted);
        };
        let max = room.min(len_max.into());
        if len > max {
            return Err(OfferError::TooLong { len, max });
        }
        Ok(())
    }

    /// Begins one that was checked.
    pub(super) fn begin(&mut self, len: u32, metadata: Metadata) -> TransferId {
        self.kept.push_back(Kept {
            len,
            digest: Digest(0),
            metadata,
            retransmits: 0,
            state: State::Begun,
        });
        self.active += 1;
        TransferId::of_offer(self.first + self.kept.len() as u64 - 1)
    }

    pub(super) fn has_next(&self) -> bool {
        // What was lost may have arrived after all.
        let mut lost = self.again.iter();
        lost.any(|number| self.place(*number).is_some())
            || self.next < self.first + self.kept.len() as u64
    }

    /// The next one to send: what was lost first.
    pub(super) fn next(&mut self) -> Option<Next<'_>> {
        let number = loop {
            match self.again.pop_front() {
                Some(number) if self.find(number).is_none() => {}
                Some(number) => break number,
                None if self.has_next() => {
                    self.next += 1;
                    break self.next - 1;
                }
                None => return None,
            }
        };
        let kept = self.find(number)?;
        let digest = (kept.state == State::Sent).then_some(kept.digest);
        let void = kept.state == State::Void;
        Some(Next {
            number,
            len: if void { 0 } else { kept.len },
            void,
            metadata: &kept.metadata,
            digest,
        })
    }

    /// Records that one is sent for the first time.
    pub(super) fn record(&mut self, number: u64, digest: Digest) {
        if let Some(kept) = self.find(number)
            && kept.state == State::Begun
        {
            (kept.digest, kept.state) = (digest, State::Sent);
        }
    }

    /// One arrived: its bytes are applied and verified.
    pub(super) fn handle_acked(&mut self, number: u64) -> Option<Event> {
        let kept = self.find(number)?;
        let sent = kept.state == State::Sent;
        kept.state = State::Over;
        let event = Event::Sent {
            transfer: TransferId::of_offer(number),
            digest: kept.digest,
            len: kept.len.into(),
            retransmits: kept.retransmits,
        };
        self.active -= u64::from(sent);
        while let Some(front) = self.kept.front()
            && front.state == State::Over
        {
            self.kept.pop_front();
            self.first += 1;
        }
        sent.then_some(event)
    }

    /// Queues one to be sent again, unless it arrived after all.
    pub(super) fn handle_lost(&mut self, number: u64) -> bool {
        let Some(kept) = self.find(number) else {
            return false;
        };
        kept.retransmits += 1;
        self.again.push_back(number);
        true
    }

    /// Gives one up. None if it is not under way.
    pub(super) fn abandon(&mut self, number: u64, reason: FailReason) -> Option<Event> {
        let kept = self.find(number)?;
        if kept.state == State::Void {
            return None;
        }
        kept.state = State::Void;
        kept.metadata.clear();
        self.active -= 1;
        Some(failed(number, reason))
    }

    /// Gives every one up.
    pub(super) fn fail_all(&mut self, reason: FailReason) -> impl Iterator<Item = Event> + '_ {
        let first = self.first;
        (self.active, self.granted) = (0, 0);
        self.again.clear();
        (self.first, self.next) = (0, 0);
        let under_way = |kept: &Kept| matches!(kept.state, State::Begun | State::Sent);
        self.kept
            .drain(..)
            .zip(first..)
            .filter_map(move |(kept, number)| under_way(&kept).then(|| failed(number, reason)))
    }

    /// Where one is kept that did not arrive.
    fn place(&self, number: u64) -> Option<usize> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        (self.kept.get(at)?.state != State::Over).then_some(at)
    }

    /// One that did not arrive.
    fn find(&mut self, number: u64) -> Option<&mut Kept> {
        let at = self.place(number)?;
        self.kept.get_mut(at)
    }
}

fn failed(number: u64, reason: FailReason) -> Event {
    Event::Failed {
        transfer: TransferId::of_offer(number),
        outgoing: true,
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_and_arrived_after_all_is_not_to_be_sent() {
        let mut offering = Offering::default();
        offering.handle_granted(2, Some(64));
        for number in 0..2 {
            offering.begin(8, Metadata::new());
            assert_eq!(offering.next().expect("it was begun").number, number);
            offering.record(number, Digest(7));
        }
        assert!(!offering.has_next());
        // The second, which stays among those kept, and the first, which does not.
        for number in [1, 0] {
            assert!(offering.handle_lost(number));
            assert!(offering.has_next());
            assert!(offering.handle_acked(number).is_some());
            assert!(!offering.has_next(), "{number}");
        }
        assert!(offering.next().is_none());
    }
}
