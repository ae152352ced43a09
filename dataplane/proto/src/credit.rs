//! How many packets all peers of one receive ring may have in flight together.
//!
//! A ring that overflows drops packets of whichever peer comes last. So its
//! packets are given out: those that send share them in equal parts, the others
//! keep a few to begin with (the incast problem, and receiver-driven grants as
//! in Homa, SIGCOMM '18, with shares instead of schedules).
//!
//! The invariant: *settled shares never add up to more than was given to share*.
//! While they change they may for as long as a peer has not heard of its smaller
//! one; others get theirs only [`SETTLE`] later.

use std::time::Duration;

use crate::{Connection, Time};

/// What a peer may have in flight that has not sent lately, at the most.
pub const IDLE: u32 = 16;

/// As many peers as this can begin at the same moment.
pub const BEGINNERS: u32 = 32;

/// After this a peer that sends has heard that it may have fewer in flight: an
/// acknowledgement is at most a hundred microseconds away, and so is the peer.
pub const SETTLE: Duration = Duration::from_millis(1);

/// The packets of one receive ring.
#[derive(Debug)]
pub struct Credit {
    total: u32,
    given: Given,
    lowered: Option<Time>,
    /// Whether shares wait to be raised.
    waiting: bool,
}

/// How many peers have a share of which kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Given {
    sending: u32,
    idle: u32,
}

impl Credit {
    /// Gives out `total` packets.
    pub fn new(total: u32) -> Self {
        Self {
            total,
            given: Given::default(),
            lowered: None,
            waiting: false,
        }
    }

    /// What a peer begins with; at least one, or it could never send.
    pub fn first(total: u32) -> u32 {
        (total / BEGINNERS).clamp(1, IDLE)
    }

    /// Gives out shares anew if need be. `each` shows all connections, and
    /// whether their peers send, as often as it is called.
    pub fn balance(
        &mut self,
        now: Time,
        mut each: impl FnMut(&mut dyn FnMut(bool, &mut Connection)),
    ) {
        let mut given = Given::default();
        each(&mut |sends, _| {
            *if sends {
                &mut given.sending
            } else {
                &mut given.idle
            } += 1
        });
        if given == self.given && !(self.waiting && self.is_settled(now)) {
            return;
        }
        self.given = given;
        let (idle, sending) = self.shares();
        let share = |sends| if sends { sending } else { idle };
        each(&mut |sends, connection| {
            if share(sends) < connection.receive_credit() {
                connection.set_receive_credit(share(sends));
                self.lowered = Some(now);
            }
        });
        let settled = self.is_settled(now);
        self.waiting = false;
        each(&mut |sends, connection| {
            if share(sends) > connection.receive_credit() {
                if settled {
                    connection.set_receive_credit(share(sends));
                }
                self.waiting |= !settled;
            }
        });
    }

    fn is_settled(&self, now: Time) -> bool {
        self.lowered.is_none_or(|at| now.since(at) >= SETTLE)
    }

    /// An idle peer's share, and that of one that sends.
    fn shares(&self) -> (u32, u32) {
        let Given { sending, idle } = self.given;
        let peers = (sending + idle).max(1);
        let least = Self::first(self.total).min(self.total / (2 * peers)).max(1);
        let rest = self.total.saturating_sub(least * idle);
        (least, rest.checked_div(sending).unwrap_or(0).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, SessionId};

    fn peers(count: u32, total: u32) -> Vec<(bool, Connection)> {
        let config = Config {
            receive_credit: Credit::first(total),
            ..Config::default()
        };
        let ids = (1..=count).map(SessionId);
        ids.map(|id| (false, Connection::new(config.clone(), id, id, Time(0))))
            .collect()
    }

    fn balance(credit: &mut Credit, now: Time, peers: &mut [(bool, Connection)]) -> Vec<u32> {
        credit.balance(now, |visit| {
            peers.iter_mut().for_each(|(sends, one)| visit(*sends, one));
        });
        peers.iter().map(|(_, one)| one.receive_credit()).collect()
    }

    #[test]
    fn one_that_sends_alone_has_what_the_idle_ones_leave() {
        let mut credit = Credit::new(512);
        let mut all = peers(2, 512);
        assert_eq!(balance(&mut credit, Time(0), &mut all), [16, 16]);
        all[0].0 = true;
        assert_eq!(balance(&mut credit, Time(1), &mut all), [496, 16]);
    }

    #[test]
    fn another_gets_its_part_once_the_first_has_heard() {
        let mut credit = Credit::new(512);
        let mut all = peers(2, 512);
        all[0].0 = true;
        balance(&mut credit, Time(0), &mut all);
        all[1].0 = true;
        assert_eq!(balance(&mut credit, Time(10), &mut all), [256, 16]);
        assert_eq!(balance(&mut credit, Time(20), &mut all), [256, 16]);
        let later = Time(10) + SETTLE;
        assert_eq!(balance(&mut credit, later, &mut all), [256, 256]);
        all[0].0 = false;
        let shares = balance(&mut credit, later + SETTLE, &mut all);
        assert_eq!(shares, [16, 256]);
        let shares = balance(&mut credit, later + SETTLE * 2, &mut all);
        assert_eq!(shares, [16, 496]);
    }

    #[test]
    fn however_many_there_are_they_share_no_more_than_there_is() {
        for total in [8, 64, 512] {
            for count in [1, 3, 32, 200] {
                let mut credit = Credit::new(total);
                let mut all = peers(count, total);
                for peer in 0..count as usize {
                    all[peer].0 = true;
                    balance(&mut credit, Time(peer as u64), &mut all);
                }
                let end = Time(1000) + SETTLE;
                let shares = balance(&mut credit, end, &mut all);
                let sum: u32 = shares.iter().sum();
                assert!(shares.iter().all(|share| *share > 0));
                assert!(sum <= total.max(count), "{count} share {sum} of {total}");
                assert!(sum * 2 > total, "{count} share only {sum} of {total}");
            }
        }
    }
}
