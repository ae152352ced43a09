//! Packets in flight, and which of them are lost (RFC 9002 section 6.1).

use std::collections::VecDeque;
use std::time::Duration;

use super::Control;
use crate::id::Segment;
use crate::time::Time;
use crate::wire::AckRange;

/// Packets reordered by less than this are not lost (RFC 9002 section 6.1.1).
const PACKET_THRESHOLD: u64 = 3;

/// A packet that asks for an acknowledgement.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentPacket {
    pub(super) number: u64,
    pub(super) at: Time,
    pub(super) bytes: u32,
    pub(super) content: Content,
    fate: Fate,
}

/// What must be sent again if the packet is lost.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content {
    /// A segment; `index` is where the sending side keeps its transfer.
    Data { segment: Segment, index: u32 },
    /// An offer, by its number.
    Offer(u64),
    /// A control message.
    Control(Control),
    /// Nothing: it has gone out again in a later packet already.
    Moved,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    InFlight,
    Acked,
    Lost,
}

/// Which rule called a packet lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LossCause {
    PacketThreshold,
    TimeThreshold,
}

/// The packets in flight on a path, in the order of their numbers.
#[derive(Debug, Default)]
pub(super) struct SentPackets {
    /// Begins with one in flight; among the rest are some whose fate is known.
    ring: VecDeque<SentPacket>,
    next_number: u64,
    in_flight: u64,
    in_flight_bytes: u64,
    last_eliciting: Time,
    largest_acked: Option<u64>,
    loss_deadline: Option<Time>,
}

impl SentPackets {
    /// The number the next packet gets.
    pub(super) fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Uses a number for a packet that asks for no acknowledgement.
    pub(super) fn skip(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number - 1
    }

    /// Records a packet that asks for an acknowledgement; its number is the next.
    pub(super) fn push(&mut self, now: Time, bytes: u32, content: Content) {
        let number = self.skip();
        self.ring.push_back(SentPacket {
            number,
            at: now,
            bytes,
            content,
            fate: Fate::InFlight,
        });
        self.in_flight += 1;
        self.in_flight_bytes += u64::from(bytes);
        self.last_eliciting = now;
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// When the last packet in flight was sent.
    pub(super) fn last_eliciting(&self) -> Time {
        self.last_eliciting
    }

    /// Counts the probe timeout from `now` on, whether or not something can be sent.
    pub(super) fn restart_timer(&mut self, now: Time) {
        self.last_eliciting = now;
    }

    /// When the oldest packet behind an acknowledged one is to be called lost.
    pub(super) fn loss_deadline(&self) -> Option<Time> {
        self.loss_deadline
    }

    /// Takes the packets of `range` that are in flight into `acked`; returns how
    /// many there had been given up for lost.
    pub(super) fn ack(&mut self, range: AckRange, acked: &mut Vec<SentPacket>) -> u64 {
        if self
            .largest_acked
            .is_none_or(|largest| largest < range.last)
        {
            self.largest_acked = Some(range.last);
        }
        let mut spurious = 0;
        // Nearly always the oldest is the first of them.
        let from = match self.ring.front() {
            Some(front) if front.number >= range.first => 0,
            _ => self
                .ring
                .partition_point(|packet| packet.number < range.first),
        };
        for packet in self.ring.range_mut(from..) {
            if packet.number > range.last {
                break;
            }
            match packet.fate {
                Fate::InFlight => {
                    self.in_flight -= 1;
                    self.in_flight_bytes -= u64::from(packet.bytes);
                    acked.push(*packet);
                }
                Fate::Lost => spurious += 1,
                Fate::Acked => {}
            }
            packet.fate = Fate::Acked;
        }
        self.trim();
        spurious
    }

    /// Whether a range could still concern a packet here; lower ones then cannot either.
    pub(super) fn concerns(&self, range: AckRange) -> bool {
        self.ring
            .front()
            .is_some_and(|front| front.number <= range.last)
    }

    /// Whether anything is in flight below an acknowledged packet; if not, no
    /// deadline is left either.
    pub(super) fn may_be_lost(&mut self) -> bool {
        let front = self.ring.front().map(|front| front.number);
        let below = front.is_some() && front < self.largest_acked;
        if !below {
            self.loss_deadline = None;
        }
        below
    }

    /// Takes the packets that are lost by now into `lost`.
    pub(super) fn detect_lost(
        &mut self,
        now: Time,
        delay: Duration,
        lost: &mut Vec<(SentPacket, LossCause)>,
    ) {
        self.loss_deadline = None;
        let Some(largest) = self.largest_acked else {
            return;
        };
        for packet in &mut self.ring {
            if packet.number > largest {
                break;
            }
            if packet.fate != Fate::InFlight {
                continue;
            }
            let cause = if packet.number + PACKET_THRESHOLD <= largest {
                LossCause::PacketThreshold
            } else if packet.at + delay <= now {
                LossCause::TimeThreshold
            } else {
                // The oldest comes first, so this is the earliest deadline.
                self.loss_deadline.get_or_insert(packet.at + delay);
                continue;
            };
            packet.fate = Fate::Lost;
            self.in_flight -= 1;
            self.in_flight_bytes -= u64::from(packet.bytes);
            lost.push((*packet, cause));
        }
        self.trim();
    }

    /// Takes the content of the oldest packet in flight that still has some: it
    /// is to be sent again, though the packet is not called lost yet.
    pub(super) fn move_oldest(&mut self) -> Option<Content> {
        let oldest = self.ring.iter_mut().find(|packet| {
            packet.fate == Fate::InFlight && !matches!(packet.content, Content::Moved)
        })?;
        Some(std::mem::replace(&mut oldest.content, Content::Moved))
    }

    fn trim(&mut self) {
        while self
            .ring
            .front()
            .is_some_and(|front| front.fate != Fate::InFlight)
        {
            self.ring.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_nanos(1_000);

    fn sent(count: u64) -> SentPackets {
        let mut sent = SentPackets::default();
        for number in 0..count {
            sent.push(Time(number * 10), 100, Content::Moved);
        }
        sent
    }

    fn lost_at(sent: &mut SentPackets, now: u64) -> Vec<(u64, LossCause)> {
        let mut lost = Vec::new();
        sent.detect_lost(Time(now), DELAY, &mut lost);
        lost.into_iter()
            .map(|(packet, cause)| (packet.number, cause))
            .collect()
    }

    #[test]
    fn three_packets_behind_is_lost_and_two_is_not() {
        let mut sent = sent(6);
        let mut acked = Vec::new();
        assert_eq!(sent.ack(AckRange { first: 4, last: 4 }, &mut acked), 0);
        assert_eq!(acked.len(), 1);
        assert_eq!(
            lost_at(&mut sent, 100),
            [
                (0, LossCause::PacketThreshold),
                (1, LossCause::PacketThreshold)
            ]
        );
        assert_eq!((sent.in_flight(), sent.in_flight_bytes()), (3, 300));
        assert_eq!(sent.loss_deadline(), Some(Time(20) + DELAY));
    }

    #[test]
    fn after_the_delay_one_packet_behind_is_lost_too() {
        let mut sent = sent(2);
        sent.ack(AckRange { first: 1, last: 1 }, &mut Vec::new());
        assert_eq!(lost_at(&mut sent, 999), []);
        assert_eq!(sent.loss_deadline(), Some(Time(1_000)));
        assert_eq!(lost_at(&mut sent, 1_000), [(0, LossCause::TimeThreshold)]);
        assert_eq!(sent.loss_deadline(), None);
        assert!(sent.ring.is_empty());
    }

    #[test]
    fn nothing_is_lost_before_something_later_is_acknowledged() {
        let mut sent = sent(5);
        assert_eq!(lost_at(&mut sent, 1_000_000), []);
        sent.ack(AckRange { first: 0, last: 0 }, &mut Vec::new());
        assert_eq!(lost_at(&mut sent, 1_000_000), []);
    }

    #[test]
    fn an_ack_of_a_lost_packet_is_spurious_and_counts_once() {
        let mut sent = sent(6);
        let mut acked = Vec::new();
        sent.ack(AckRange { first: 5, last: 5 }, &mut acked);
        sent.ack(AckRange { first: 0, last: 0 }, &mut acked);
        assert_eq!(lost_at(&mut sent, 60).len(), 2);
        // Packets 1 and 2 left with the front; nothing of them is remembered.
        assert_eq!(sent.ack(AckRange { first: 1, last: 5 }, &mut acked), 0);
        assert_eq!(acked.len(), 4);
        assert_eq!(sent.in_flight(), 0);
    }
}
