//! Timers: acknowledgements, losses, probe timeouts (RFC 9002 section 6.2), liveness.

use std::time::Duration;

use super::event::{Event, FailReason, PathLostReason};
use super::sent::{Content, LossCause};
use super::{Connection, Control, State};
use crate::time::Time;

/// Packets sent again at a probe timeout (RFC 9002 section 6.2.4).
const PROBE_PACKETS: u32 = 2;

/// How long a sender that has nothing in flight and no room at its peer waits for
/// news before it asks.
const ROOM_PROBE: Duration = Duration::from_millis(20);

impl Connection {
    /// When [`Connection::handle_timeout`] wants to be called, at the latest;
    /// a time that has passed means now.
    pub fn poll_timeout(&self) -> Option<Time> {
        if self.state != State::Open {
            return None;
        }
        let deadlines = [
            self.received.deadline(),
            self.sent.loss_deadline(),
            self.pto_deadline(),
            self.keepalive_deadline(),
            self.silence_deadline(),
            self.progress_deadline(),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Acts on whatever is due; harmless when nothing is. What there is to send
    /// then comes from [`Connection::poll_transmit`], acknowledgements too.
    ///
    /// Datagrams that have arrived come first: an engine that slept through the
    /// idle limit would otherwise take its own silence for the peer's.
    pub fn handle_timeout(&mut self, now: Time) {
        self.take_run();
        if self.state != State::Open {
            return;
        }
        self.watch(now);
        if self
            .silence_deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            return self.lose_path(PathLostReason::Silent(self.config.idle_limit));
        }
        if self
            .progress_deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            return self.lose_path(PathLostReason::Stalled(self.config.progress_limit));
        }
        if self
            .sent
            .loss_deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            self.detect_lost(now);
        } else if self.pto_deadline().is_some_and(|deadline| deadline <= now) {
            self.handle_pto(now);
        }
        if self
            .keepalive_deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            self.queue_probe();
        }
    }

    /// Starts and stops counting the peer's silence and the transfers' standstill.
    pub(super) fn watch(&mut self, now: Time) {
        if self.is_busy() {
            self.alive.get_or_insert(now);
        } else {
            self.alive = None;
        }
        if self.receiving.active() + self.sending.active() + self.offering.active() > 0 {
            self.moved.get_or_insert(now);
        } else {
            self.moved = None;
        }
    }

    /// Sends again what is lost by now.
    pub(super) fn detect_lost(&mut self, now: Time) {
        if !self.sent.may_be_lost() {
            return;
        }
        let mut lost = std::mem::take(&mut self.lost);
        self.sent.detect_lost(now, self.rtt.loss_delay(), &mut lost);
        if let Some((last, _)) = lost.last() {
            let bytes = lost.iter().map(|(packet, _)| u64::from(packet.bytes)).sum();
            self.controller.handle_loss(now, last.at, bytes);
        }
        for (packet, cause) in lost.drain(..) {
            if self.send_again(packet.content) {
                match cause {
                    LossCause::PacketThreshold => self.stats.retransmits.packet_threshold += 1,
                    LossCause::TimeThreshold => self.stats.retransmits.time_threshold += 1,
                }
            }
        }
        self.lost = lost;
    }

    fn handle_pto(&mut self, now: Time) {
        self.pto_count += 1;
        self.stats.ptos += 1;
        self.sent.restart_timer(now);
        if self.pto_count > self.config.pto_limit {
            return self.lose_path(PathLostReason::ProbeTimeouts(self.config.pto_limit));
        }
        // What is oldest has waited longest; it goes out under a new number,
        // and the packet it was in stays in flight for the window's account.
        let mut moved = 0;
        while moved < PROBE_PACKETS
            && let Some(content) = self.sent.move_oldest()
        {
            if self.send_again(content) {
                self.stats.retransmits.probe += 1;
            }
            moved += 1;
        }
        if moved == 0 || (self.controls.is_empty() && !self.has_data()) {
            self.queue_probe();
        }
        self.extra = PROBE_PACKETS;
    }

    /// Queues what a packet carried; true for a segment.
    fn send_again(&mut self, content: Content) -> bool {
        match content {
            Content::Data { segment, index } => self.sending.handle_lost(index, segment),
            Content::Offer(number) => self.offering.handle_lost(number),
            Content::Control(Control::Probe) => {
                self.queue_probe();
                false
            }
            Content::Control(Control::Grant) => {
                if self.offered.requeue() {
                    self.controls.push_back(Control::Grant);
                }
                false
            }
            Content::Control(control) => {
                self.controls.push_back(control);
                false
            }
            Content::Moved => false,
        }
    }

    fn lose_path(&mut self, reason: PathLostReason) {
        self.shut(FailReason::PathLost, Event::PathLost { reason });
    }

    fn pto_deadline(&self) -> Option<Time> {
        if self.sent.in_flight() == 0 || self.sent.loss_deadline().is_some() {
            return None;
        }
        let backoff = 1u32.checked_shl(self.pto_count).unwrap_or(u32::MAX);
        let limit = self.config.pto_max.max(self.rtt.pto());
        let pto = self.rtt.pto().saturating_mul(backoff).min(limit);
        Some(self.sent.last_eliciting() + pto)
    }

    fn silence_deadline(&self) -> Option<Time> {
        Some(self.alive? + self.config.idle_limit)
    }

    fn progress_deadline(&self) -> Option<Time> {
        Some(self.moved? + self.config.progress_limit)
    }

    /// With something in flight the probe timeout sees to it.
    fn keepalive_deadline(&self) -> Option<Time> {
        if self.sent.in_flight() > 0 || self.probe_due {
            return None;
        }
        match self.alive {
            // The ACK that tells of room may be lost, and is not repeated.
            Some(at) if self.has_data() => Some(at + self.keepalive().min(ROOM_PROBE)),
            Some(at) => Some(at + self.keepalive()),
            None => Some(self.heard? + self.config.idle_probe?),
        }
    }

    fn keepalive(&self) -> Duration {
        self.config.idle_limit / 4
    }
}
