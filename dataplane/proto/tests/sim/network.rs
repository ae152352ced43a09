//! A seeded network between two ends: what goes in comes out late, twice,
//! changed, in another order, or not at all.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use genie_proto::Time;

/// SplitMix64: enough for choosing what goes wrong, and the same everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True so many times in a thousand.
    pub(crate) fn happens(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// What a link does; probabilities in packets of a thousand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Profile {
    pub(crate) loss: u64,
    pub(crate) duplication: u64,
    pub(crate) corruption: u64,
    pub(crate) reordering: u64,
    pub(crate) delay: Duration,
    /// A reordered packet is late by up to this.
    pub(crate) jitter: Duration,
    pub(crate) nanos_per_byte: f64,
    /// What waits beyond this is dropped.
    pub(crate) queue_bytes: u64,
}

impl Profile {
    pub(crate) const CLEAN: Self = Self {
        loss: 0,
        duplication: 0,
        corruption: 0,
        reordering: 0,
        delay: Duration::from_micros(10),
        jitter: Duration::ZERO,
        nanos_per_byte: 0.1,
        queue_bytes: 1 << 20,
    };
}

/// A datagram on its way; ordered by arrival, then by sending.
type InFlight = Reverse<(Time, u64, usize, Vec<u8>)>;

/// Both directions.
pub(crate) struct Network {
    profile: Profile,
    pub(crate) random: Random,
    flying: BinaryHeap<InFlight>,
    free_at: [f64; 2],
    sent: u64,
}

impl Network {
    pub(crate) fn new(profile: Profile, seed: u64) -> Self {
        Self {
            profile,
            random: Random(seed),
            flying: BinaryHeap::new(),
            free_at: [0.0; 2],
            sent: 0,
        }
    }

    /// Takes a datagram of end `from`.
    pub(crate) fn send(&mut self, now: Time, from: usize, mut datagram: Vec<u8>) {
        let profile = self.profile;
        let begin = self.free_at[from].max(now.0 as f64);
        let waiting = (begin - now.0 as f64) / profile.nanos_per_byte;
        if waiting > profile.queue_bytes as f64 {
            return;
        }
        // 28 bytes of IPv4 and UDP.
        self.free_at[from] = begin + (datagram.len() + 28) as f64 * profile.nanos_per_byte;
        let arrival = Time(self.free_at[from] as u64) + profile.delay;
        if self.random.happens(profile.loss) {
            return;
        }
        if self.random.happens(profile.corruption) {
            let flips = 1 + self.random.below(3);
            for _ in 0..flips {
                let at = self.random.below(datagram.len() as u64) as usize;
                datagram[at] ^= 1 << self.random.below(8);
            }
            if self.random.happens(100) {
                let len = self.random.below(datagram.len() as u64) as usize;
                datagram.truncate(len);
            }
        }
        if self.random.happens(profile.duplication) {
            let late = self.late();
            self.fly(arrival + late, from, datagram.clone());
        }
        let late = if self.random.happens(profile.reordering) {
            self.late()
        } else {
            Duration::ZERO
        };
        self.fly(arrival + late, from, datagram);
    }

    pub(crate) fn next_arrival(&self) -> Option<Time> {
        self.flying.peek().map(|Reverse((at, ..))| *at)
    }

    /// The next datagram that has arrived by now, and at which end.
    pub(crate) fn arrived(&mut self, now: Time) -> Option<(usize, Vec<u8>)> {
        if self.next_arrival()? > now {
            return None;
        }
        let Reverse((_, _, from, datagram)) = self.flying.pop()?;
        Some((1 - from, datagram))
    }

    fn late(&mut self) -> Duration {
        let span = self.profile.jitter.as_nanos() as u64;
        Duration::from_nanos(self.random.below(span + 1))
    }

    fn fly(&mut self, at: Time, from: usize, datagram: Vec<u8>) {
        self.sent += 1;
        self.flying.push(Reverse((at, self.sent, from, datagram)));
    }
}
