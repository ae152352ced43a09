//! Which packets arrived and when to say so.

use std::time::Duration;

use arrayvec::ArrayVec;

use crate::time::Time;
use crate::wire::{ACK_RANGES_MAX, Ack, AckRange};

/// Acknowledgements that other packets take along before an ACK, from which alone
/// the sender learns the round trip.
const ALONG_MAX: u32 = 64;

/// The packet numbers that arrived on a path, and the acknowledgement they are due.
#[derive(Debug)]
pub(super) struct Received {
    /// Descending, neither overlapping nor adjacent. When full the lowest is forgotten.
    ranges: ArrayVec<AckRange, ACK_RANGES_MAX>,
    /// When the highest number arrived, and the timestamp it had.
    largest_at: Time,
    largest_timestamp: u32,
    /// Packets that ask for an acknowledgement and have none yet.
    unacked: u32,
    /// The lowest number among them.
    lowest_unacked: u64,
    at_once: bool,
    /// The peer's credit changed: the next acknowledgement is an ACK, which tells.
    credit_news: bool,
    /// How often another packet took the acknowledgement along since the last ACK.
    along: u32,
    /// When the first of them will have waited long enough.
    deadline: Option<Time>,
    every: u32,
    delay_max: Duration,
}

impl Received {
    pub(super) fn new(every: u32, delay_max: Duration) -> Self {
        Self {
            ranges: ArrayVec::new(),
            largest_at: Time::default(),
            largest_timestamp: 0,
            unacked: 0,
            lowest_unacked: u64::MAX,
            at_once: false,
            credit_news: false,
            along: 0,
            deadline: None,
            every,
            delay_max,
        }
    }

    /// Whether this number was recorded and is still remembered.
    pub(super) fn contains(&self, number: u64) -> bool {
        self.ranges
            .iter()
            .find(|range| range.first <= number)
            .is_some_and(|range| number <= range.last)
    }

    /// Records a packet that was accepted.
    pub(super) fn record(&mut self, now: Time, number: u64, timestamp: u32, eliciting: bool) {
        let expected = self.ranges.first().map_or(number, |range| range.last + 1);
        if number >= expected {
            self.largest_at = now;
            self.largest_timestamp = timestamp;
        }
        self.insert(number);
        if !eliciting {
            return;
        }
        self.unacked += 1;
        self.lowest_unacked = self.lowest_unacked.min(number);
        // RFC 9000 section 13.2.1: out of order, or behind a gap, is news for the sender.
        self.at_once |= number != expected || self.unacked >= self.every;
        self.deadline.get_or_insert(now + self.delay_max);
    }

    fn insert(&mut self, number: u64) {
        // Nearly always at or right above the top.
        let at = self
            .ranges
            .iter()
            .position(|range| range.first <= number + 1);
        let Some(at) = at else {
            let _ = self.ranges.try_push(AckRange {
                first: number,
                last: number,
            });
            return;
        };
        let range = &mut self.ranges[at];
        if number >= range.first && number <= range.last {
            return;
        }
        if number + 1 == range.first {
            range.first = number;
            // The range below, if there is one, may touch now.
            if let Some(below) = self.ranges.get(at + 1).copied()
                && below.last + 1 == number
            {
                self.ranges[at].first = below.first;
                self.ranges.remove(at + 1);
            }
        } else if number == range.last + 1 {
            // The range above does not touch: it would have been found first.
            range.last = number;
        } else {
            if self.ranges.is_full() {
                self.ranges.pop();
            }
            let at = at.min(self.ranges.len());
            if !self.ranges.is_full() {
                self.ranges.insert(
                    at,
                    AckRange {
                        first: number,
                        last: number,
                    },
                );
            }
        }
    }

    /// Takes in that the next ACK has another credit to tell; `at_once` makes it
    /// due now, if there is anything to acknowledge.
    pub(super) fn credit_changed(&mut self, at_once: bool) {
        self.credit_news = true;
        self.at_once |= at_once && !self.ranges.is_empty();
    }

    /// When an acknowledgement is due; at once is [`Time::default`].
    pub(super) fn deadline(&self) -> Option<Time> {
        if self.at_once {
            Some(Time::default())
        } else {
            self.deadline
        }
    }

    /// Whether an acknowledgement is due.
    pub(super) fn is_due(&self, now: Time) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Makes an acknowledgement due as soon as there is nothing else to receive:
    /// the peer waits for it.
    pub(super) fn prompt(&mut self) {
        self.at_once |= self.unacked > 0;
    }

    /// The highest number that arrived and how many did from there downward, if
    /// that acknowledges all that waits for it and no ACK is owed for its own sake.
    pub(super) fn run(&self) -> Option<(u64, u16)> {
        if self.credit_news || self.along >= ALONG_MAX {
            return None;
        }
        let top = self.ranges.first()?;
        if self.unacked == 0 || self.lowest_unacked < top.first {
            return None;
        }
        let count = u16::try_from(top.last - self.lowest_unacked + 1).ok()?;
        Some((top.last, count))
    }

    /// Another packet took [`Received::run`] along: no acknowledgement is due.
    pub(super) fn taken_along(&mut self) {
        self.along += 1;
        self.acknowledged();
    }

    fn acknowledged(&mut self) {
        self.unacked = 0;
        self.lowest_unacked = u64::MAX;
        self.at_once = false;
        self.deadline = None;
    }

    /// The acknowledgement, which is then no longer due.
    pub(super) fn take_ack(&mut self, now: Time, credit: u32) -> Ack {
        self.acknowledged();
        (self.credit_news, self.along) = (false, 0);
        let delay_us = now.since(self.largest_at).as_micros();
        Ack {
            delay_us: u32::try_from(delay_us).unwrap_or(u32::MAX),
            echo: self.largest_timestamp,
            credit,
            ecn_ce: 0,
            ranges: self.ranges.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const DELAY: Duration = Duration::from_nanos(100);

    #[test]
    fn an_ack_waits_for_company_or_for_its_delay() {
        let mut received = Received::new(3, DELAY);
        received.record(Time(10), 0, 7, true);
        assert_eq!(received.deadline(), Some(Time(110)));
        received.record(Time(20), 1, 8, true);
        assert!(!received.is_due(Time(109)));
        assert!(received.is_due(Time(110)));
        received.record(Time(30), 2, 9, true);
        assert!(received.is_due(Time(30)));
        let ack = received.take_ack(Time(5030), 4);
        assert_eq!(
            (ack.largest(), ack.delay_us, ack.echo, ack.credit),
            (2, 5, 9, 4)
        );
        assert_eq!(received.deadline(), None);
    }

    #[test]
    fn a_gap_is_told_at_once_and_an_ack_is_not_acknowledged() {
        let mut received = Received::new(10, DELAY);
        received.record(Time(10), 0, 0, false);
        assert_eq!(received.deadline(), None);
        received.record(Time(10), 2, 0, true);
        assert!(received.is_due(Time(10)));
        received.take_ack(Time(10), 0);
        received.record(Time(11), 1, 0, true);
        assert!(received.is_due(Time(11)), "late is out of order too");
    }

    proptest! {
        #[test]
        fn the_ranges_are_the_highest_of_what_arrived(
            numbers in proptest::collection::vec(0u64..200, 1..150)
        ) {
            let mut received = Received::new(1, DELAY);
            let mut model = BTreeSet::new();
            for number in numbers {
                received.record(Time(0), number, 0, true);
                model.insert(number);
                let ranges = &received.ranges;
                prop_assert!(ranges.windows(2).all(|pair| pair[0].first > pair[1].last + 1));
                prop_assert!(ranges.iter().all(|range| range.first <= range.last));
                let said: BTreeSet<u64> =
                    ranges.iter().flat_map(|range| range.first..=range.last).collect();
                prop_assert!(said.is_subset(&model), "never claims what did not arrive");
                prop_assert_eq!(said.last(), model.last());
                prop_assert_eq!(received.contains(number), said.contains(&number));
                if !ranges.is_full() && model.len() < ACK_RANGES_MAX {
                    prop_assert_eq!(&said, &model);
                }
            }
        }
    }
}
