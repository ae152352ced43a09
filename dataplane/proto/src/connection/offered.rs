//! The small tensors that a connection receives in one packet each.

use super::offering::OFFERS_MAX;

/// Words of the bitmap of numbers that arrived: as many as a peer keeps.
const WORDS: usize = (OFFERS_MAX / 64) as usize;

/// The slots that a peer's offers are placed into, and which offers arrived.
///
/// The peer numbers its offers, and may send those below the limit: as many as
/// there are slots, and one more for each that was released. The invariant: *an
/// offer below the limit finds a free slot, and is delivered once*.
#[derive(Debug)]
pub(super) struct Offered {
    len_max: u32,
    slots: u64,
    /// The one released last first: it is the likeliest to be in a cache.
    free: Vec<u32>,
    held: Vec<bool>,
    /// Slots released, and numbers that came void.
    released: u64,
    /// Every offer below this arrived.
    first: u64,
    /// Which of those from `first` on did, by number modulo their count.
    arrived: [u64; WORDS],
    arrived_count: u64,
    /// The limit that the peer was told last.
    told: u64,
    /// A GRANT waits to be sent.
    queued: bool,
}

/// What to do with an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Place it into this slot.
    Place(u32),
    /// Delivered before: acknowledge it again.
    Duplicate,
    /// Its number was not granted.
    NotGranted,
    /// Longer than a slot.
    TooLong,
}

impl Offered {
    pub(super) fn new(slots: u16, len_max: u32) -> Self {
        let slots = u64::from(slots).min(OFFERS_MAX);
        Self {
            len_max,
            slots,
            free: (0..slots as u32).rev().collect(),
            held: vec![false; slots as usize],
            released: 0,
            first: 0,
            arrived: [0; WORDS],
            arrived_count: 0,
            told: 0,
            queued: false,
        }
    }

    /// How many the peer may have sent in all.
    fn limit(&self) -> u64 {
        (self.slots + self.released).min(self.first + OFFERS_MAX)
    }

    pub(super) fn check(&self, number: u64, len: u64) -> Verdict {
        if number < self.first || (number < self.first + OFFERS_MAX && self.has(number)) {
            return Verdict::Duplicate;
        }
        if number >= self.limit() {
            return Verdict::NotGranted;
        }
        if len > u64::from(self.len_max) {
            return Verdict::TooLong;
        }
        // One is free: so many are granted and not there.
        self.free
            .last()
            .map_or(Verdict::NotGranted, |slot| Verdict::Place(*slot))
    }

    /// Takes in one that was placed into the slot that `check` gave, and verified.
    pub(super) fn apply(&mut self, number: u64) {
        if let Some(slot) = self.free.pop() {
            self.held[slot as usize] = true;
        }
        self.mark(number);
    }

    /// Takes in one that was given up: it used a number and needs no slot.
    pub(super) fn skip(&mut self, number: u64) {
        self.released += 1;
        self.mark(number);
    }

    /// Gives a slot back; false if nothing is in it.
    pub(super) fn release(&mut self, slot: u32) -> bool {
        let Some(held) = self.held.get_mut(slot as usize).filter(|held| **held) else {
            return false;
        };
        *held = false;
        self.free.push(slot);
        self.released += 1;
        true
    }

    /// Whether the peer is to be told of its limit in a packet of its own: it
    /// has no slot left, or half of them wait to be told. True once until
    /// [`Offered::tell`].
    pub(super) fn take_due(&mut self) -> bool {
        let news = self.limit() - self.told;
        let blocked = self.told <= self.arrived_count;
        let due = !self.queued && news > 0 && (blocked || news * 2 >= self.slots);
        self.queued |= due;
        due
    }

    /// A GRANT was lost: whether one must be queued, as none is.
    pub(super) fn requeue(&mut self) -> bool {
        !std::mem::replace(&mut self.queued, true)
    }

    /// What a packet that goes out now tells the peer: its limit, and the
    /// longest tensor.
    pub(super) fn tell(&mut self, own_packet: bool) -> (u64, u32) {
        self.queued &= !own_packet;
        self.told = self.limit();
        (self.told, self.len_max)
    }

    fn has(&self, number: u64) -> bool {
        let at = (number % OFFERS_MAX) as usize;
        self.arrived[at / 64] >> (at % 64) & 1 == 1
    }

    fn mark(&mut self, number: u64) {
        let at = (number % OFFERS_MAX) as usize;
        self.arrived[at / 64] |= 1 << (at % 64);
        self.arrived_count += 1;
        while self.has(self.first) {
            let at = (self.first % OFFERS_MAX) as usize;
            self.arrived[at / 64] &= !(1 << (at % 64));
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_peer_may_send_as_many_as_there_are_slots_and_one_for_each_released() {
        let mut offered = Offered::new(2, 100);
        assert!(offered.take_due());
        assert!(!offered.take_due(), "once");
        assert_eq!(offered.tell(true), (2, 100));
        assert_eq!(offered.check(0, 101), Verdict::TooLong);
        let Verdict::Place(slot) = offered.check(1, 100) else {
            panic!("granted");
        };
        offered.apply(1);
        assert_eq!(offered.check(1, 100), Verdict::Duplicate);
        assert_eq!(offered.check(2, 1), Verdict::NotGranted);
        assert!(matches!(offered.check(0, 1), Verdict::Place(other) if other != slot));
        offered.apply(0);
        assert!(!offered.take_due(), "nothing was released");
        assert!(offered.release(slot));
        assert!(!offered.release(slot), "it holds nothing any more");
        assert!(!offered.release(7));
        assert!(offered.take_due());
        assert_eq!(offered.check(2, 1), Verdict::Place(slot));
        offered.skip(2);
        assert_eq!(offered.check(2, 1), Verdict::Duplicate);
        assert_eq!(offered.tell(true), (4, 100));
    }

    proptest! {
        /// In whatever order they come and are released, each is delivered once,
        /// and what is granted finds a slot.
        #[test]
        fn each_is_delivered_once_and_finds_a_slot(
            slots in 1u16..40,
            steps in prop::collection::vec((any::<bool>(), 0u64..60), 1..600),
        ) {
            let mut offered = Offered::new(slots, 1);
            let mut arrived = BTreeSet::new();
            let mut held = Vec::new();
            for (arrives, pick) in steps {
                let limit = offered.limit();
                prop_assert!(limit >= arrived.len() as u64);
                if arrives {
                    let number = limit.saturating_sub(pick);
                    match offered.check(number, 1) {
                        Verdict::Place(slot) => {
                            prop_assert!(number < limit && arrived.insert(number));
                            prop_assert!(!held.contains(&slot));
                            held.push(slot);
                            offered.apply(number);
                        }
                        Verdict::Duplicate => prop_assert!(arrived.contains(&number)),
                        Verdict::NotGranted => prop_assert!(number >= limit),
                        Verdict::TooLong => prop_assert!(false, "one byte fits"),
                    }
                } else if !held.is_empty() {
                    let slot = held.swap_remove(pick as usize % held.len());
                    prop_assert!(offered.release(slot));
                }
                prop_assert!(held.len() <= usize::from(slots));
            }
        }
    }
}
