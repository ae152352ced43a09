//! How long the loop looks again before it sleeps.
//!
//! To be woken costs both sides more than most answers take: an interrupt to
//! another core for the one that wakes, a context switch or two for the one
//! that sleeps. So the loop spins for as long as it would probably sleep in
//! vain, and learns that from what happened: a spin that found nothing halves
//! the next one, an event soon after the loop had become idle restores it.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// The longest spin. Longer than a round trip through two busy machines; one
/// heartbeat's worth of it is less than 0.1 % of a core.
const MOST: Duration = Duration::from_micros(200);

/// An event this soon after the loop became idle shows that spinning pays:
/// with twice the spin, the cost of being woken is allowed for.
const SOON: Duration = Duration::from_micros(400);

/// Whether to spin, and for how long.
#[derive(Debug)]
pub(super) struct Spin {
    limit: Duration,
    idle_since: Option<Instant>,
    gave_up: bool,
}

impl Spin {
    /// A loop that has just been busy.
    pub(super) fn new() -> Self {
        Self {
            limit: MOST,
            idle_since: None,
            gave_up: false,
        }
    }

    /// Something was found at `now`.
    pub(super) fn busy(&mut self, now: Instant) {
        if let Some(since) = self.idle_since.take()
            && now.duration_since(since) < SOON
        {
            self.limit = MOST;
        }
        self.gave_up = false;
    }

    /// Nothing was found at `now`: whether to look again, or to sleep.
    pub(super) fn again(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        if now.duration_since(since) < self.limit {
            return true;
        }
        if !self.gave_up {
            self.gave_up = true;
            self.limit /= 2;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_that_find_nothing_get_shorter_and_one_that_does_is_long_again() {
        let mut spin = Spin::new();
        let mut now = Instant::now();
        let mut last = Duration::MAX;
        for _ in 0..8 {
            spin.busy(now);
            let begin = now;
            while spin.again(now) {
                now += Duration::from_nanos(100);
            }
            assert!(!spin.again(now), "it sleeps until something is found");
            let spun = now - begin;
            assert!(spun < last, "{spun:?} after {last:?}");
            last = spun;
            now += Duration::from_millis(1);
        }
        assert!(last < MOST / 64);
        spin.busy(now);
        spin.again(now);
        let begin = now + SOON / 2;
        spin.busy(begin);
        assert!(spin.again(begin) && spin.again(begin + MOST / 2));
        assert!(!spin.again(begin + MOST));
    }
}
