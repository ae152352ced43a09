//! What a connection is told at its start.

use std::time::Duration;

use crate::congestion::Algorithm;
use crate::digest::Integrity;
use crate::transfer::GRANULE;
use crate::wire::{CONTROL_MAX, HEADER_LEN};

/// A connection's settings. Both ends may differ.
#[derive(Clone, Debug)]
pub struct Config {
    /// Largest UDP payload to send, in bytes; at least [`Config::DATAGRAM_MIN`].
    pub datagram_max: u16,
    /// The path's number; packets of other paths are dropped.
    pub path: u16,
    /// Packets that the peer may have in flight toward us: never more than there
    /// are free receive descriptors and buffers.
    pub receive_credit: u32,
    /// What the peer said of that, until its first ACK says it again.
    pub remote_credit: u32,
    /// Packets to acknowledge at once without waiting for [`Config::ack_delay_max`].
    pub ack_every: u32,
    /// The longest an acknowledgement waits for company; both ends must agree on
    /// a bound, as it is part of the probe timeout.
    pub ack_delay_max: Duration,
    /// What the round trip is taken for until there is a sample.
    pub initial_rtt: Duration,
    /// The least that a loss or probe timer waits beyond the round trip: the
    /// engine's own jitter (`kGranularity` of RFC 9002, there 1 ms for kernels' timers).
    pub granularity: Duration,
    /// The longest a probe timeout grows by backing off.
    pub pto_max: Duration,
    /// Probe timeouts in a row after which the path is lost.
    pub pto_limit: u32,
    /// Silence after which the path is lost, counted while something is under way.
    /// A probe is sent after a quarter of it.
    pub idle_limit: Duration,
    /// How long the peer may stay unheard while nothing is under way before it is
    /// probed, so that a dead path is found before it is needed. None: never.
    pub idle_probe: Option<Duration>,
    /// How long transfers may be under way without one byte of them being
    /// applied or acknowledged. A path that carries small packets only, or a
    /// peer that answers but does nothing, is lost after that.
    pub progress_limit: Duration,
    /// Whether payloads are under checksums; both ends must say the same.
    pub integrity: Integrity,
    /// The congestion controller.
    pub congestion: Algorithm,
    /// Slots for small tensors that the peer may send unasked; none if zero, at
    /// most 1024.
    pub offers: u16,
    /// The longest tensor that such a slot holds, in bytes.
    pub offer_len_max: u32,
    /// Transfer slots that each direction may use: `0..slots_max`.
    pub slots_max: u32,
    /// Random; makes probe tokens unguessable to who does not see the path.
    pub seed: u64,
}

impl Config {
    /// The least [`Config::datagram_max`]: a full control packet.
    pub const DATAGRAM_MIN: u16 = (HEADER_LEN + CONTROL_MAX) as u16;

    /// How far the slots for offers lie apart: their length in whole granules.
    pub fn offer_stride(&self) -> u64 {
        u64::from(self.offer_len_max).next_multiple_of(GRANULE)
    }

    /// Bytes of the largest segment: granules that fit a datagram after the header.
    pub fn segment_max(&self) -> u64 {
        let room = u64::from(self.datagram_max.max(Self::DATAGRAM_MIN)) - HEADER_LEN as u64;
        room / GRANULE * GRANULE
    }
}

impl Default for Config {
    /// For a 1500-byte link inside a data centre.
    fn default() -> Self {
        Self {
            // 1500 less 40 of IPv6 and 8 of UDP.
            datagram_max: 1452,
            path: 0,
            receive_credit: 512,
            remote_credit: 512,
            ack_every: 10,
            ack_delay_max: Duration::from_micros(100),
            initial_rtt: Duration::from_millis(10),
            granularity: Duration::from_micros(200),
            pto_max: Duration::from_millis(250),
            pto_limit: 20,
            idle_limit: Duration::from_secs(2),
            idle_probe: None,
            progress_limit: Duration::from_secs(30),
            integrity: Integrity::Digest,
            congestion: Algorithm::Tolerant,
            offers: 0,
            offer_len_max: 0,
            slots_max: 1 << 16,
            seed: 0,
        }
    }
}
