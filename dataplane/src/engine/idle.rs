//! What an engine does when it finds nothing to do: spin, then sleep.
//!
//! A polling engine answers fastest, but an agent is idle most of its life. So
//! an engine spins for as long as an answer is likely, then sleeps on its
//! command ring in steps that grow while nothing happens.

#![forbid(unsafe_code)]

use std::time::Duration;

use genie_proto::Time;

use super::ring::Receiver;

/// Longer than a round trip through two busy machines, so that an engine does
/// not sleep in the middle of a transfer.
const SPIN: Duration = Duration::from_micros(200);

/// First sleep: no longer than what a scheduler adds anyway.
const SLEEP_FIRST: Duration = Duration::from_micros(50);

/// Last sleep. A device without interrupts is looked at this often when idle:
/// one look costs some microseconds, so less than 1 % of a core.
const SLEEP_MOST: Duration = Duration::from_millis(1);

/// How long an engine has been idle, and what follows from it.
#[derive(Debug)]
pub(super) struct Idle {
    since: Option<Time>,
    sleep: Duration,
}

impl Idle {
    /// An engine that has just been busy.
    pub(super) fn new() -> Self {
        Self {
            since: None,
            sleep: SLEEP_FIRST,
        }
    }

    /// Called once an iteration. Sleeps on `commands`, not beyond `deadline`,
    /// if the engine has had nothing to do for long enough.
    pub(super) fn rest<T>(
        &mut self,
        busy: bool,
        now: Time,
        deadline: Option<Time>,
        commands: &mut Receiver<T>,
    ) {
        if busy {
            *self = Self::new();
            return;
        }
        let since = *self.since.get_or_insert(now);
        if now.since(since) < SPIN {
            std::hint::spin_loop();
            return;
        }
        let until_deadline = deadline.map_or(SLEEP_MOST, |at| at.since(now));
        let sleep = self.sleep.min(until_deadline);
        if !sleep.is_zero() {
            commands.wait(sleep);
        }
        self.sleep = (self.sleep * 2).min(SLEEP_MOST);
    }
}

impl Default for Idle {
    fn default() -> Self {
        Self::new()
    }
}
