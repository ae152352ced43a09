//! Two engines on one thread, over two devices joined in memory.

use std::time::Duration;

use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::engine::udp::{Config, Offers, Polled, Remote};
use genie_dataplane::engine::{self, Command, Completion, OperationId};
use genie_dataplane::memory::{Lease, Region};
use genie_dataplane::{Integrity, Metadata, SessionId, Time};

const SESSIONS: [SessionId; 2] = [SessionId(1), SessionId(2)];

/// Two ends of an open session, each of which grants slots.
#[derive(Debug)]
pub struct PolledPair {
    ends: [Polled<PairDevice>; 2],
    memory: Lease,
    operation: u64,
    clock: Clock,
}

#[derive(Debug)]
enum Clock {
    Machine,
    /// Every look at it takes a step, so that each run does the same.
    Steps(Time),
}

impl PolledPair {
    /// Opens the session.
    ///
    /// # Panics
    /// If that fails: nothing is lost here.
    pub fn new(slots: u16) -> Self {
        Self::with_clock(slots, Clock::Machine)
    }

    /// [`PolledPair::new`] by a clock that only the number of turns moves.
    ///
    /// # Panics
    /// As that does.
    pub fn in_steps(slots: u16) -> Self {
        Self::with_clock(slots, Clock::Steps(Time::default()))
    }

    fn with_clock(slots: u16, clock: Clock) -> Self {
        let config = Config {
            offers: Offers {
                slots,
                len_max: 8192,
            },
            ..Config::default()
        };
        let (a, b) = pair(&Options::default());
        let mut ends = [a, b].map(|device| Polled::new(config.clone(), device));
        for end in [0, 1] {
            let remote = Remote {
                local: ends[1 - end].local(),
                session: SESSIONS[1 - end],
                secrets: None,
            };
            let open = Command::Open {
                operation: OperationId(0),
                session: SESSIONS[end],
                remote: engine::Remote::Udp(remote),
                integrity: Integrity::Digest,
            };
            let now = match clock {
                Clock::Machine => ends[end].now(),
                Clock::Steps(now) => now,
            };
            ends[end].handle_command(now, open);
        }
        let (region, _) = Region::allocate(8192).expect("memory");
        let mut pair = Self {
            ends,
            memory: Lease::whole(region),
            operation: 0,
            clock,
        };
        let mut opened = 0;
        while opened < 2 {
            pair.turn();
            for end in &mut pair.ends {
                while let Some(completion) = end.poll_completion() {
                    let Completion::Opened { result, .. } = completion else {
                        panic!("{completion:?}");
                    };
                    result.expect("the other end is there");
                    opened += 1;
                }
            }
        }
        // Both have heard of their slots after one each way.
        while !(pair.try_offer(0, 0) && pair.try_offer(1, 0)) {
            pair.turn();
        }
        for _ in 0..100 {
            pair.turn();
            pair.take(0);
            pair.take(1);
        }
        pair
    }

    fn turn(&mut self) {
        (0..2).for_each(|end| self.turn_of(end));
    }

    fn turn_of(&mut self, end: usize) {
        let end = &mut self.ends[end];
        let now = match &mut self.clock {
            Clock::Machine => end.now(),
            Clock::Steps(now) => {
                *now = *now + Duration::from_nanos(200);
                *now
            }
        };
        end.turn(now);
    }

    fn try_offer(&mut self, end: usize, len: u64) -> bool {
        let from = self.memory.slice(0..len).expect("short enough");
        let operation = OperationId(self.operation);
        let offered = self.ends[end].offer(SESSIONS[end], operation, Metadata::new(), from);
        self.operation += 1;
        offered.is_ok()
    }

    /// Takes what ended and what came at an end.
    fn take(&mut self, end: usize) -> (u64, u64) {
        let (mut ended, mut came) = (0, 0);
        while let Some(completion) = self.ends[end].poll_completion() {
            let Completion::Transferred { result, .. } = completion else {
                panic!("{completion:?}");
            };
            result.expect("nothing is lost here");
            ended += 1;
        }
        while let Some(offer) = self.ends[end].poll_offer() {
            self.ends[end].release(offer);
            came += 1;
        }
        (ended, came)
    }

    /// Sends `count` tensors of `len` bytes one way, as fast as slots allow, and
    /// returns when the sender has heard of all.
    pub fn burst(&mut self, count: u64, len: u64) {
        let (mut began, mut ended) = (0, 0);
        while ended < count {
            while began < count && self.try_offer(0, len) {
                began += 1;
            }
            self.turn();
            ended += self.take(0).0;
            self.take(1);
        }
    }

    /// Sends a tensor there and one back, `count` times.
    pub fn pingpong(&mut self, count: u64, len: u64) {
        for _ in 0..count {
            for end in [0, 1] {
                while !self.try_offer(end, len) {
                    self.turn();
                }
                self.turn_of(end);
                let mut came = 0;
                while came == 0 {
                    self.turn_of(1 - end);
                    came = self.take(1 - end).1;
                }
            }
        }
    }
}
