//! One direction of a wire, on a clock that is an argument.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Profile;

/// Frames that were delivered keep their buffers here for the next ones.
const SPARE_MAX: usize = 1024;

/// Bytes of an Ethernet header, which does not count toward an MTU and is
/// never corrupted: a switch would have dropped such a frame.
const ETHERNET: usize = 14;

/// One direction of a wire.
///
/// A frame waits for those before it (a queue of [`Profile::buffer_bytes`]),
/// occupies the link for its length over the rate, and arrives a delay later.
/// `now` counts from the link's start and never goes back.
#[derive(Debug)]
pub struct Link {
    profile: Profile,
    random: fastrand::Rng,
    /// When the last byte that was taken will have left.
    free_at: Duration,
    /// Taken and not arrived, the next one first.
    under_way: BinaryHeap<Reverse<Arrival>>,
    sequence: u64,
    counters: Counters,
    spare: VecDeque<Vec<u8>>,
}

/// Frames by what became of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames that came in.
    pub frames_in: u64,
    /// Frames that went out, duplicates included.
    pub frames_out: u64,
    /// Bytes that went out.
    pub bytes_out: u64,
    /// Lost because the buffer was full.
    pub dropped_full: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Lost in the dark.
    pub lost_dark: u64,
    /// Lost because they were longer than the MTU.
    pub lost_mtu: u64,
    /// Delivered late by chance.
    pub reordered: u64,
    /// Delivered twice.
    pub duplicated: u64,
    /// Delivered with one bit changed.
    pub corrupted: u64,
    /// The most bytes that ever waited.
    pub queue_max_bytes: u64,
    /// The longest that a frame waited before its first bit left.
    #[serde(rename = "queue_max_us", with = "micros")]
    pub queue_max: Duration,
    /// The sum over all frames of how long they waited.
    #[serde(rename = "queue_sum_us", with = "micros")]
    pub queue_sum: Duration,
}

#[derive(Debug, PartialEq, Eq)]
struct Arrival {
    at: Duration,
    sequence: u64,
    frame: Vec<u8>,
}

impl Link {
    /// A link that is free. Each direction of a wire has a number of its own.
    pub fn new(profile: Profile, direction: u64) -> Self {
        let seed = profile.seed.wrapping_mul(2).wrapping_add(direction);
        Self {
            profile,
            random: fastrand::Rng::with_seed(seed),
            free_at: Duration::ZERO,
            under_way: BinaryHeap::new(),
            sequence: 0,
            counters: Counters::default(),
            spare: VecDeque::new(),
        }
    }

    /// Takes a frame that came in at `now`.
    pub fn handle_frame(&mut self, now: Duration, frame: &[u8]) {
        self.counters.frames_in += 1;
        // All draws are made for every frame, so that a seed gives the same
        // fates whatever else the profile says.
        let [lost, late, twice, changed] = [(); 4].map(|()| self.random.f64());
        let bit = self.random.u64(..);
        let profile = &self.profile;
        if profile.is_dark(now) {
            self.counters.lost_dark += 1;
            return;
        }
        let packet = frame.len().saturating_sub(ETHERNET);
        if profile.mtu_at(now).is_some_and(|mtu| packet > mtu as usize) {
            self.counters.lost_mtu += 1;
            return;
        }
        let wait = self.free_at.saturating_sub(now);
        let queued = (wait.as_nanos() * u128::from(profile.rate_bits) / 8_000_000_000) as u64;
        let full = profile.buffer_bytes > 0 && queued + frame.len() as u64 > profile.buffer_bytes;
        if full {
            self.counters.dropped_full += 1;
            return;
        }
        self.free_at = now + wait + profile.time_on_wire(frame.len());
        let mut at = self.free_at + profile.delay;
        self.count_wait(wait, queued + frame.len() as u64);
        // A frame that is lost on the wire has occupied it all the same.
        if lost < self.profile.loss {
            self.counters.lost += 1;
            return;
        }
        if late < self.profile.reorder {
            self.counters.reordered += 1;
            at += self.profile.reorder_by;
        }
        if twice < self.profile.duplicate {
            self.counters.duplicated += 1;
            self.put(at, frame, None);
        }
        let changes = changed < self.profile.corrupt && packet > 0;
        self.counters.corrupted += u64::from(changes);
        self.put(at, frame, changes.then_some(bit));
    }

    /// Gives `deliver` every frame that has arrived by `now`, in order, each
    /// with how late that is.
    pub fn poll_frames(&mut self, now: Duration, mut deliver: impl FnMut(&[u8], Duration)) {
        while let Some(Reverse(next)) = self.under_way.peek() {
            if next.at > now {
                return;
            }
            let Some(Reverse(arrival)) = self.under_way.pop() else {
                return;
            };
            deliver(&arrival.frame, now - arrival.at);
            self.counters.frames_out += 1;
            self.counters.bytes_out += arrival.frame.len() as u64;
            if self.spare.len() < SPARE_MAX {
                self.spare.push_back(arrival.frame);
            }
        }
    }

    /// When the next frame arrives.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.under_way.peek().map(|Reverse(next)| next.at)
    }

    /// What became of the frames so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Frames taken and not arrived.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    fn count_wait(&mut self, wait: Duration, queued: u64) {
        let counters = &mut self.counters;
        counters.queue_max = counters.queue_max.max(wait);
        counters.queue_sum += wait;
        counters.queue_max_bytes = counters.queue_max_bytes.max(queued);
    }

    fn put(&mut self, at: Duration, bytes: &[u8], flip: Option<u64>) {
        let mut frame = self.spare.pop_front().unwrap_or_default();
        frame.clear();
        frame.extend_from_slice(bytes);
        if let Some(bit) = flip {
            let body = &mut frame[ETHERNET..];
            let bit = bit % (body.len() as u64 * 8);
            body[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        self.sequence += 1;
        self.under_way.push(Reverse(Arrival {
            at,
            sequence: self.sequence,
            frame,
        }));
    }
}

/// Durations as microseconds, for programs that read the counters.
mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(value.as_secs_f64() * 1e6)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let micros = f64::deserialize(from)?;
        Duration::try_from_secs_f64(micros / 1e6).map_err(serde::de::Error::custom)
    }
}

impl Ord for Arrival {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

impl PartialOrd for Arrival {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(profile: &str) -> Link {
        Link::new(profile.parse().unwrap(), 0)
    }

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn numbered(number: u32) -> Vec<u8> {
        let mut frame = vec![0; 1000];
        frame[14..18].copy_from_slice(&number.to_be_bytes());
        frame
    }

    /// Sends `count` frames of 1000 bytes `every` so often and returns what arrives when.
    fn run(link: &mut Link, count: u32, every: Duration) -> Vec<(Duration, Vec<u8>)> {
        let mut arrived = Vec::new();
        for number in 0..count {
            let now = every * number;
            collect(link, now, &mut arrived);
            link.handle_frame(now, &numbered(number));
        }
        collect(link, every * count + Duration::from_secs(60), &mut arrived);
        assert_eq!(link.under_way(), 0);
        arrived
    }

    fn collect(link: &mut Link, until: Duration, arrived: &mut Vec<(Duration, Vec<u8>)>) {
        while let Some(at) = link.poll_timeout().filter(|at| *at <= until) {
            link.poll_frames(at, |frame, late| {
                assert!(late.is_zero());
                arrived.push((at, frame.to_vec()));
            });
        }
    }

    #[test]
    fn frames_take_their_time_on_the_wire_and_arrive_in_order() {
        // 1000 bytes at 8 Mbit/s take 1 ms; they come every 500 µs.
        let mut link = link("rate=8mbit,delay=3ms");
        let arrived = run(&mut link, 100, us(500));
        for (number, (at, frame)) in arrived.iter().enumerate() {
            assert_eq!(*at, us(4000 + 1000 * number as u64));
            assert_eq!(*frame, numbered(number as u32));
        }
        // The last one found 99 before it, of which half had left.
        assert_eq!(link.counters().queue_max, us(99 * 500));
        assert_eq!(
            link.counters().queue_sum,
            us((0..100).map(|n| n * 500).sum())
        );
    }

    #[test]
    fn a_full_buffer_drops_the_newest() {
        let mut link = link("rate=8mbit,buffer=10000");
        for number in 0..50 {
            link.handle_frame(us(0), &numbered(number));
        }
        assert_eq!(link.counters().dropped_full, 40);
        assert_eq!(link.counters().queue_max_bytes, 10_000);
        let mut arrived = Vec::new();
        collect(&mut link, Duration::from_secs(1), &mut arrived);
        assert!(
            (0..10)
                .map(numbered)
                .eq(arrived.into_iter().map(|(_, frame)| frame))
        );
    }

    #[test]
    fn chances_are_met_and_every_frame_is_accounted_for() {
        let profile = "loss=0.02,reorder=0.03,duplicate=0.04,corrupt=0.05,delay=1ms,seed=3";
        let mut link = link(profile);
        let count = 100_000;
        let arrived = run(&mut link, count, us(10));
        let counters = link.counters().clone();
        for (what, counted, of, chance) in [
            ("loss", counters.lost, count as f64, 0.02),
            ("reorder", counters.reordered, count as f64 * 0.98, 0.03),
            ("duplicate", counters.duplicated, count as f64 * 0.98, 0.04),
            ("corrupt", counters.corrupted, count as f64 * 0.98, 0.05),
        ] {
            // Four standard deviations of a binomial.
            let (mean, deviation) = (of * chance, (of * chance).sqrt());
            assert!(
                (counted as f64 - mean).abs() < 4.0 * deviation,
                "{what}: {counted}"
            );
        }
        let expected = u64::from(count) - counters.lost + counters.duplicated;
        assert_eq!(
            (counters.frames_out, arrived.len() as u64),
            (expected, expected)
        );
        let number = |frame: &[u8]| u32::from_be_bytes(frame[14..18].try_into().unwrap());
        let changed = |frame: &&(Duration, Vec<u8>)| frame.1 != numbered(number(&frame.1));
        let differing = arrived.iter().filter(changed).count() as u64;
        // A bit of the number itself may be the one: then the rest agrees.
        assert!(differing <= counters.corrupted && differing > counters.corrupted * 9 / 10);
        let behind = arrived
            .windows(2)
            .filter(|pair| number(&pair[0].1) > number(&pair[1].1));
        assert!(behind.count() > 1000, "late frames were overtaken");
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let run_with = |seed: u64, direction| {
            let profile = format!("loss=0.1,seed={seed}").parse().unwrap();
            run(&mut Link::new(profile, direction), 1000, us(10))
        };
        assert_eq!(run_with(5, 0), run_with(5, 0));
        assert_ne!(run_with(5, 0), run_with(6, 0));
        assert_ne!(run_with(5, 0), run_with(5, 1));
    }

    #[test]
    fn the_dark_and_the_mtu_swallow_frames() {
        let mut link = link("dark-every=10ms,dark-for=4ms,mtu=986,mtu-after=50ms,mtu-later=985");
        let arrived = run(&mut link, 100, us(1000));
        assert_eq!(link.counters().lost_dark, 40);
        assert_eq!(link.counters().lost_mtu, 30);
        assert_eq!(arrived.len(), 30);
    }

    #[test]
    fn a_frame_of_only_headers_is_never_corrupted() {
        let mut link = link("corrupt=1");
        link.handle_frame(us(0), &[1; 14]);
        link.poll_frames(us(0), |frame, _| assert_eq!(frame, [1; 14]));
        assert_eq!(link.counters().corrupted, 0);
    }
}
