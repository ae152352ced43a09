//! When a session returns to a better path that it lost.
//!
//! Pure decisions on a clock that the caller reads; the steward opens and
//! closes the paths. The invariant: *a session returns only to a path that
//! opened promptly every time for as long as the proof takes*, so an outage of
//! a moment costs nothing, and one that comes again and again ever less.

use std::time::Duration;

/// ```text
///            lost                     wait is over
///  Content ────────▶ Waiting{until} ───────────────▶ Proving{since, next}
///     ▲                   ▲                             │        │
///     │                   └── wait doubled ── not opened, or     │
///     │                                       not promptly       │
///     └──────────── opened promptly, for the whole proof ────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No better path is known of, or it is taken.
    Content,
    /// It is left alone for a while.
    Waiting { until: Duration },
    /// It is opened and closed again, and again.
    Proving { since: Duration, next: Duration },
}

/// Decides when a better path is tried, and when it is trusted.
#[derive(Clone, Copy, Debug)]
pub struct Comeback {
    state: State,
    liveness: Duration,
    wait: Duration,
    returned: Option<Duration>,
}

/// What to do with a better path that was opened to see whether it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has proved itself: take it.
    Return,
    /// Close it again.
    NotYet,
}

impl Comeback {
    /// All times are multiples of `liveness`: what takes longer than that is an
    /// outage, so a path is trusted that did without one for twice as long.
    pub fn new(liveness: Duration) -> Self {
        Self {
            state: State::Content,
            liveness,
            wait: liveness / 2,
            returned: None,
        }
    }

    /// How long it must open promptly.
    pub fn proof(&self) -> Duration {
        2 * self.liveness
    }

    /// What is prompt; also how often it is tried.
    pub fn prompt(&self) -> Duration {
        self.liveness / 4
    }

    /// The longest it is left alone.
    pub fn wait_max(&self) -> Duration {
        32 * self.liveness
    }

    /// The session goes on over a worse path since `now`. `random` spreads what
    /// many sessions do that lost their paths at the same time.
    pub fn fell_back(&mut self, now: Duration, random: u8) {
        let lasted = self.returned.take().map(|at| now.saturating_sub(at));
        match lasted {
            Some(lasted) if lasted < 8 * self.liveness => self.back_off(),
            _ => self.wait = self.liveness / 2,
        }
        self.leave_alone(now, random);
    }

    /// No better path is there to return to.
    pub fn is_content(&mut self) {
        self.state = State::Content;
    }

    /// When the better path is to be tried next.
    pub fn due(&self) -> Option<Duration> {
        match self.state {
            State::Content => None,
            State::Waiting { until } => Some(until),
            State::Proving { next, .. } => Some(next),
        }
    }

    /// It opened, having taken `took` for it.
    pub fn opened(&mut self, now: Duration, took: Duration, random: u8) -> Verdict {
        if took > self.prompt() {
            self.failed(now, random);
            return Verdict::NotYet;
        }
        let since = match self.state {
            State::Proving { since, .. } => since,
            State::Content | State::Waiting { .. } => now,
        };
        if now.saturating_sub(since) >= self.proof() {
            self.state = State::Content;
            self.returned = Some(now);
            return Verdict::Return;
        }
        let next = now + self.prompt();
        self.state = State::Proving { since, next };
        Verdict::NotYet
    }

    /// It did not open.
    pub fn failed(&mut self, now: Duration, random: u8) {
        self.back_off();
        self.leave_alone(now, random);
    }

    fn back_off(&mut self) {
        self.wait = (self.wait * 2).min(self.wait_max());
    }

    fn leave_alone(&mut self, now: Duration, random: u8) {
        // Three quarters to five quarters of it.
        let spread = self.wait / 2 * u32::from(random) / 255;
        let until = now + self.wait * 3 / 4 + spread;
        self.state = State::Waiting { until };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVENESS: Duration = Duration::from_secs(2);

    /// Runs until `end` on a simulated clock over a path that is up where `up`
    /// says so. Returns when the session returned to it and when it left.
    fn run(end: u64, random: u8, up: impl Fn(Duration) -> bool) -> Vec<(Duration, bool)> {
        let mut comeback = Comeback::new(LIVENESS);
        let mut events = Vec::new();
        let (mut now, mut on_it, mut down_since) = (Duration::ZERO, true, None);
        let step = Duration::from_millis(10);
        while now < Duration::from_secs(end) {
            now += step;
            if on_it {
                down_since = if up(now) {
                    None
                } else {
                    Some(down_since.unwrap_or(now))
                };
                // The engine notices silence after the liveness limit.
                if down_since.is_some_and(|since| now - since >= LIVENESS) {
                    (on_it, down_since) = (false, None);
                    comeback.fell_back(now, random);
                    events.push((now, false));
                }
            } else if comeback.due().is_some_and(|due| due <= now) {
                // Opening waits for an outage to end, up to the limit.
                let opens = (0..200).map(|i| now + i * step).find(|at| up(*at));
                match opens {
                    Some(at) => {
                        let took = at - now;
                        now = at;
                        if comeback.opened(now, took, random) == Verdict::Return {
                            on_it = true;
                            events.push((now, true));
                        }
                    }
                    None => {
                        now += LIVENESS;
                        comeback.failed(now, random);
                    }
                }
            }
        }
        events
    }

    fn secs(events: &[(Duration, bool)]) -> Vec<(u64, bool)> {
        events.iter().map(|(at, up)| (at.as_secs(), *up)).collect()
    }

    #[test]
    fn an_outage_of_a_moment_changes_nothing() {
        for random in [0, 128, 255] {
            let blink = |now: Duration| now.as_millis() % 20_000 >= 1500;
            assert_eq!(run(600, random, blink), []);
        }
    }

    #[test]
    fn the_session_returns_once_the_path_was_healthy_for_a_while() {
        for random in [0, 128, 255] {
            let up = |now: Duration| !(10..20).contains(&now.as_secs());
            let events = run(120, random, up);
            assert_eq!(events.len(), 2, "{events:?}");
            assert_eq!(events[0], (Duration::from_secs(12), false));
            let back = events[1].0;
            let earliest = Duration::from_secs(20) + 2 * LIVENESS;
            // At most the last wait, and the proof.
            let latest = earliest + Duration::from_secs(12);
            assert!(earliest <= back && back <= latest, "{back:?}");
        }
    }

    #[test]
    fn short_outages_do_not_count_as_health() {
        // On a worse path, the better one down for 1.5 s of every 4: never
        // healthy for the length of the proof.
        let up = |now: Duration| now.as_secs() < 10 || now.as_millis() % 4000 >= 1500;
        let lost = |now: Duration| up(now) && !(10..14).contains(&now.as_secs());
        let events = run(600, 128, lost);
        assert_eq!(secs(&events), [(12, false)], "it never proves itself");
    }

    #[test]
    fn a_path_that_fails_again_and_again_is_tried_ever_less() {
        // 3 s down in every 12: each time lost, each time healthy for 9 s.
        let up = |now: Duration| now.as_millis() % 12_000 >= 3000;
        let returns = |events: &[(Duration, bool)]| events.iter().filter(|(_, up)| *up).count();
        let events = run(1200, 128, up);
        let (first, last) = events.split_at(events.partition_point(|(at, _)| at.as_secs() < 600));
        assert!(returns(&events) >= 1, "{events:?}");
        assert!(
            returns(last) < 600 / 24 && returns(first) < 600 / 24,
            "fewer than every second time: {} {}",
            returns(first),
            returns(last)
        );
    }
}
