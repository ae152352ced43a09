//! Slow start and additive increase as NewReno's, that shrugs at a little loss.

use super::Controller;
use crate::time::Time;

/// RFC 9002 section 7.2: ten packets to begin with, two at the least.
const INITIAL_PACKETS: u64 = 10;
const MINIMUM_PACKETS: u64 = 2;
/// Loss up to one part in fifty is the link's, not congestion's: bit errors and
/// a full receive ring lose single packets, a full queue loses a part of the window.
const TOLERATED: u64 = 50;
/// Packets that the loss rate is taken over: at one part in fifty some twenty
/// are lost among them, so that chance alone seldom looks like congestion.
const MEMORY_PACKETS: u64 = 1024;
/// Losses that are always tolerated: a rate over fewer says nothing.
const ALLOWED_PACKETS: u64 = 2;
/// On congestion the window shrinks to 7/10, as Cubic's (RFC 9438 section 4.6).
const BETA: (u64, u64) = (7, 10);

/// NewReno (RFC 9002 section 7) with two changes: losses below 2 % of the packets
/// since it shrank last do not shrink the window, and when it shrinks, it is to 7/10.
#[derive(Clone, Debug)]
pub struct Tolerant {
    packet: u64,
    window: u64,
    threshold: u64,
    /// Losses of packets sent before this have had their effect.
    recovery_start: Option<Time>,
    /// Growth in congestion avoidance not yet worth a packet.
    credit: u64,
    /// Bytes judged since the window shrank, the older ones halved away.
    acked: u64,
    lost: u64,
}

impl Tolerant {
    /// For packets of at most `packet_bytes`.
    pub fn new(packet_bytes: u64) -> Self {
        Self {
            packet: packet_bytes,
            window: INITIAL_PACKETS * packet_bytes,
            threshold: u64::MAX,
            recovery_start: None,
            credit: 0,
            acked: 0,
            lost: 0,
        }
    }

    fn judge(&mut self, acked: u64, lost: u64) {
        self.acked += acked;
        self.lost += lost;
        if self.acked + self.lost > MEMORY_PACKETS * self.packet {
            self.acked /= 2;
            self.lost /= 2;
        }
    }

    fn in_recovery(&self, sent_at: Time) -> bool {
        self.recovery_start.is_some_and(|start| sent_at <= start)
    }
}

impl Controller for Tolerant {
    fn window_bytes(&self) -> u64 {
        self.window
    }

    fn handle_ack(&mut self, _now: Time, sent_at: Time, bytes: u64, limited: bool) {
        if self.in_recovery(sent_at) {
            return;
        }
        self.judge(bytes, 0);
        if !limited {
            return;
        }
        if self.window < self.threshold {
            self.window += bytes;
            return;
        }
        self.credit += bytes;
        if self.credit >= self.window {
            self.credit -= self.window;
            self.window += self.packet;
        }
    }

    fn handle_loss(&mut self, now: Time, sent_at: Time, bytes: u64) {
        if self.in_recovery(sent_at) {
            return;
        }
        self.judge(0, bytes);
        let rate = (self.acked + self.lost) / TOLERATED;
        if self.lost <= rate + ALLOWED_PACKETS * self.packet {
            return;
        }
        self.recovery_start = Some(now);
        self.window = (self.window * BETA.0 / BETA.1).max(MINIMUM_PACKETS * self.packet);
        self.threshold = self.window;
        self.credit = 0;
        self.acked = 0;
        self.lost = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_start_doubles_until_congestion_and_then_adds() {
        let mut controller = Tolerant::new(1000);
        controller.handle_ack(Time(20), Time(10), 10_000, true);
        assert_eq!(controller.window_bytes(), 20_000);
        controller.handle_loss(Time(30), Time(25), 10_000);
        assert_eq!(controller.window_bytes(), 14_000);
        controller.handle_loss(Time(31), Time(29), 10_000);
        assert_eq!(controller.window_bytes(), 14_000, "once a round trip");
        controller.handle_ack(Time(50), Time(40), 14_000, true);
        assert_eq!(controller.window_bytes(), 15_000);
    }

    #[test]
    fn a_little_loss_is_tolerated_and_an_idle_window_does_not_grow() {
        let mut controller = Tolerant::new(1000);
        controller.handle_ack(Time(20), Time(10), 90_000, true);
        assert_eq!(controller.window_bytes(), 100_000);
        controller.handle_loss(Time(30), Time(25), 2_000);
        assert_eq!(controller.window_bytes(), 100_000);
        controller.handle_ack(Time(40), Time(35), 50_000, false);
        assert_eq!(controller.window_bytes(), 100_000);
    }

    #[test]
    fn the_window_keeps_two_packets() {
        let mut controller = Tolerant::new(1000);
        for round in 1..50 {
            controller.handle_loss(Time(round * 10), Time(round * 10 - 1), 1_000_000);
        }
        assert_eq!(controller.window_bytes(), 2_000);
    }
}
