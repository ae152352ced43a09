//! What an engine does when it finds nothing to do: spin, pause, then sleep.
//!
//! A polling engine answers fastest, but an agent is idle most of its life. So
//! an engine spins for as long as an answer is likely, then pauses between
//! polls and yields its core now and then, then sleeps: on its commands and its
//! device's receive interrupt where there is one, in short timed steps where
//! there is none.
//!
//! ```text
//! Spin ─20 µs─→ Pause ─200 µs─→ Sleep ─work─→ Spin
//! ```

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::IdleSnapshot;
use genie_proto::Time;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};

/// A round trip through the fastest devices several times over.
const SPIN: Duration = Duration::from_micros(20);

/// Longer than a round trip through two busy machines, so that an engine does
/// not sleep in the middle of a transfer.
const PAUSE: Duration = Duration::from_micros(200);

/// Pauses between two polls: some hundred nanoseconds, in which a sibling
/// hyper-thread has the core to itself.
const PAUSES: u32 = 8;

/// How often an engine that pauses lets others have its core: whoever it woke
/// last may wait on that very core, and would until it sleeps (a scheduler looks
/// for an idle core only where the caches are shared). A call costs less than a
/// microsecond, and none is made while there is work.
const YIELD_EVERY: Duration = Duration::from_micros(20);

/// First sleep on a device without interrupts: no longer than what a scheduler
/// adds anyway.
const STEP_FIRST: Duration = Duration::from_micros(50);

/// Last sleep on a device without interrupts. A look and a wake-up were measured
/// to cost some 25 µs together: 3 % of a core.
const STEP_MOST: Duration = Duration::from_micros(800);

/// The longest sleep on a receive interrupt. Nothing is waited for but what is
/// reported; this bounds what a report that a restarting peer swallowed costs.
const SLEEP_MOST: Duration = Duration::from_millis(100);

/// What is left to do in an iteration that found no work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Poll again.
    Poll,
    /// Sleep for at most so long without an interrupt, or so long with one.
    Sleep {
        /// Where nothing reports frames.
        unreported: Duration,
        /// Where the device does.
        reported: Duration,
    },
}

/// How long an engine has been idle, and what follows from it.
#[derive(Debug)]
pub(super) struct Idle {
    since: Option<Time>,
    step: Duration,
    /// When it yields its core next, if it pauses then.
    yield_at: Time,
    phase: Phase,
    /// Since when it is in this phase; none before the first call.
    entered: Option<Time>,
    spent: IdleSnapshot,
}

/// What an engine does until it asks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Busy,
    Spin,
    Pause,
    Sleep,
}

impl Idle {
    /// An engine that has just been busy.
    pub(super) fn new() -> Self {
        Self {
            since: None,
            step: STEP_FIRST,
            yield_at: Time::default(),
            phase: Phase::Busy,
            entered: None,
            spent: IdleSnapshot::default(),
        }
    }

    /// Work was found outside of an iteration.
    pub(super) fn reset(&mut self) {
        self.since = None;
        self.step = STEP_FIRST;
    }

    /// How the time was spent until the last iteration.
    pub(super) fn spent(&self) -> IdleSnapshot {
        self.spent
    }

    fn enter(&mut self, phase: Phase, now: Time) {
        let past = self.entered.map_or(Duration::ZERO, |at| now.since(at));
        *match self.phase {
            Phase::Busy => &mut self.spent.busy,
            Phase::Spin => &mut self.spent.spin,
            Phase::Pause => &mut self.spent.pause,
            Phase::Sleep => &mut self.spent.sleep,
        } += past;
        self.entered = Some(now);
        self.phase = phase;
        self.spent.sleeps += u64::from(phase == Phase::Sleep);
    }

    /// Called once an iteration: what an engine may do now whose next timer is
    /// at `deadline`.
    pub(super) fn next(&mut self, busy: bool, now: Time, deadline: Option<Time>) -> Rest {
        if busy {
            self.reset();
            self.enter(Phase::Busy, now);
            return Rest::Poll;
        }
        let since = *self.since.get_or_insert(now);
        let idle = now.since(since);
        if idle < PAUSE {
            let (phase, pauses) = if idle < SPIN {
                (Phase::Spin, 1)
            } else {
                (Phase::Pause, PAUSES)
            };
            self.enter(phase, now);
            (0..pauses).for_each(|_| std::hint::spin_loop());
            if phase == Phase::Pause && self.yield_at <= now {
                self.yield_at = now + YIELD_EVERY;
                std::thread::yield_now();
            }
            return Rest::Poll;
        }
        let until = deadline.map_or(SLEEP_MOST, |at| at.since(now));
        let step = self.step;
        self.step = (step * 2).min(STEP_MOST);
        if until.is_zero() {
            self.enter(Phase::Busy, now);
            return Rest::Poll;
        }
        self.enter(Phase::Sleep, now);
        Rest::Sleep {
            unreported: step.min(until),
            reported: SLEEP_MOST.min(until),
        }
    }
}

/// What a thread sleeps on: the bell of its commands, and frames.
#[derive(Debug, Default)]
pub(super) struct Bed {
    /// Holds the device's descriptor, edge-triggered: drivers do not clear it.
    frames: Option<OwnedFd>,
}

impl Bed {
    /// For a device that reports frames on `rx_event`, if it does, and those
    /// that other queues pass on, on `passed`.
    pub(super) fn new(
        rx_event: Option<BorrowedFd<'_>>,
        passed: Option<BorrowedFd<'_>>,
    ) -> rustix::io::Result<Self> {
        let Some(event) = rx_event else {
            return Ok(Self { frames: None });
        };
        let frames = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::ET;
        for event in std::iter::once(event).chain(passed) {
            epoll::add(&frames, event, EventData::new_u64(0), flags)?;
        }
        Ok(Self {
            frames: Some(frames),
        })
    }

    /// Whether frames are reported at all.
    pub(super) fn has_frames(&self) -> bool {
        self.frames.is_some()
    }

    /// Sleeps until `bell` is readable, a frame is reported, or `limit` is over.
    pub(super) fn sleep(&self, bell: impl AsFd, limit: Duration) {
        let limit = Timespec::try_from(limit).ok();
        let bell = PollFd::new(&bell, PollFlags::IN);
        // EINTR only ends the sleep early; callers look for work again.
        match &self.frames {
            None => drop(rustix::event::poll(&mut [bell], limit.as_ref())),
            Some(frames) => {
                let frames_fd = PollFd::new(frames, PollFlags::IN);
                let _ = rustix::event::poll(&mut [bell, frames_fd], limit.as_ref());
                self.clear();
            }
        }
    }

    /// Takes a report, so that the next one is news.
    fn clear(&self) {
        if let Some(frames) = &self.frames {
            let mut events = [Event {
                flags: EventFlags::empty(),
                data: EventData::new_u64(0),
            }; 2];
            let _ = epoll::wait(frames, &mut events, Some(&Timespec::default()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const MS: u64 = 1_000_000;

    #[test]
    fn an_engine_spins_then_sleeps_longer_and_work_wakes_it() {
        let mut idle = Idle::new();
        assert_eq!(idle.next(false, Time(MS), None), Rest::Poll);
        assert_eq!(idle.next(false, Time(MS + 199_999), None), Rest::Poll);
        let sleep = |unreported| Rest::Sleep {
            unreported,
            reported: SLEEP_MOST,
        };
        assert_eq!(idle.next(false, Time(2 * MS), None), sleep(STEP_FIRST));
        assert_eq!(idle.next(false, Time(3 * MS), None), sleep(STEP_FIRST * 2));
        for _ in 0..9 {
            idle.next(false, Time(3 * MS), None);
        }
        assert_eq!(idle.next(false, Time(4 * MS), None), sleep(STEP_MOST));
        assert_eq!(idle.next(true, Time(5 * MS), None), Rest::Poll);
        assert_eq!(idle.next(false, Time(6 * MS), None), Rest::Poll);
    }

    #[test]
    fn all_time_is_in_one_of_four_phases() {
        let mut idle = Idle::new();
        idle.next(true, Time(MS), None);
        // Work until 2 ms, then 10 µs of looking, 190 of pauses, and a sleep.
        idle.next(false, Time(2 * MS), None);
        idle.next(false, Time(2 * MS + 20_000), None);
        idle.next(false, Time(2 * MS + 200_000), None);
        idle.next(true, Time(3 * MS), None);
        idle.next(true, Time(3 * MS + 1), None);
        let us = Duration::from_micros;
        let expected = IdleSnapshot {
            busy: us(1000) + Duration::from_nanos(1),
            spin: us(20),
            pause: us(180),
            sleep: us(800),
            sleeps: 1,
        };
        assert_eq!(idle.spent(), expected);
    }

    #[test]
    fn no_sleep_goes_beyond_the_deadline() {
        let mut idle = Idle::new();
        idle.next(false, Time(0), None);
        let at = Time(MS + 10_000);
        let limit = Duration::from_micros(10);
        assert_eq!(
            idle.next(false, Time(MS), Some(at)),
            Rest::Sleep {
                unreported: limit,
                reported: limit
            }
        );
        assert_eq!(idle.next(false, Time(2 * MS), Some(at)), Rest::Poll);
    }

    #[test]
    fn every_report_ends_a_sleep_though_nobody_reads_the_descriptor() {
        use rustix::event::EventfdFlags;
        let eventfd = || rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (bell, frames) = (eventfd(), eventfd());
        let passed = eventfd();
        let bed = Bed::new(Some(frames.as_fd()), Some(passed.as_fd())).unwrap();
        let limit = Duration::from_secs(60);
        for event in [&frames, &passed, &frames, &frames, &passed] {
            rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
            let start = Instant::now();
            bed.sleep(&bell, limit);
            assert!(start.elapsed() < limit / 2, "the report was missed");
            // Level-triggered it would be reported for ever.
            let start = Instant::now();
            bed.sleep(&bell, Duration::from_millis(20));
            assert!(start.elapsed() >= Duration::from_millis(20));
        }
    }
}
