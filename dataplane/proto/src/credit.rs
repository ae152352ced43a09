//! How many packets all peers of one receive ring may have in flight together.
//!
//! A ring that overflows drops packets of whichever peer comes last. So its
//! packets are given out: peers that send share them in equal parts, the others
//! keep a few to begin with, and each peer's sessions share its part alike (the
//! incast problem, and receiver-driven grants as in Homa, SIGCOMM '18, with
//! shares instead of schedules). A peer gains nothing by more sessions.
//!
//! The invariant: *settled shares never add up to more than was given to share*,
//! but that each session has at least one. While they change they may for as
//! long as a peer has not heard of its smaller one; others get theirs only
//! [`SETTLE`] later.

use std::collections::HashMap;
use std::net::IpAddr;
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
    /// Each peer's sessions, while shares change.
    peers: HashMap<IpAddr, Kinds>,
    lowered: Option<Time>,
    /// Whether shares wait to be raised.
    waiting: bool,
}

/// Shown a session: whose it is, whether its peer sends on it, and its connection.
pub type Visit<'a> = dyn FnMut(IpAddr, bool, &mut Connection) + 'a;

/// To whom shares are given, as far as can be told without looking at peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Given {
    kinds: Kinds,
    /// Which sessions these are, added up.
    which: u64,
}

/// How many have a share of which kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kinds {
    sending: u32,
    idle: u32,
}

impl Credit {
    /// Gives out `total` packets.
    pub fn new(total: u32) -> Self {
        Self {
            total,
            given: Given::default(),
            peers: HashMap::new(),
            lowered: None,
            waiting: false,
        }
    }

    /// What a peer begins with; at least one, or it could never send.
    pub fn first(total: u32) -> u32 {
        (total / BEGINNERS).clamp(1, IDLE)
    }

    /// Gives out shares anew if need be. `each` shows all sessions, as often as
    /// it is called.
    pub fn balance(&mut self, now: Time, mut each: impl FnMut(&mut Visit)) {
        let mut given = Given::default();
        each(&mut |_, sends, connection| given.add(sends, connection));
        if given == self.given && !(self.waiting && self.is_settled(now)) {
            return;
        }
        self.given = given;
        self.peers.clear();
        each(&mut |peer, sends, _| self.peers.entry(peer).or_default().add(sends));
        let mut all = Kinds::default();
        self.peers.values().for_each(|one| all.add(one.sending > 0));
        let (total, peers) = (self.total, &self.peers);
        let share = |peer, sends| share(total, all, peers[&peer], sends);
        each(&mut |peer, sends, connection| {
            let share = share(peer, sends);
            if share < connection.receive_credit() {
                connection.set_receive_credit(share);
                self.lowered = Some(now);
            }
        });
        let settled = self.is_settled(now);
        self.waiting = false;
        each(&mut |peer, sends, connection| {
            let share = share(peer, sends);
            if share > connection.receive_credit() {
                if settled {
                    connection.set_receive_credit(share);
                }
                self.waiting |= !settled;
            }
        });
    }

    fn is_settled(&self, now: Time) -> bool {
        self.lowered.is_none_or(|at| now.since(at) >= SETTLE)
    }
}

impl Given {
    fn add(&mut self, sends: bool, connection: &Connection) {
        self.kinds.add(sends);
        // An odd factor, so that neighbours do not make up for each other.
        let id = u64::from(connection.local().0) << 1 | u64::from(sends);
        let mixed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.which = self.which.wrapping_add(mixed ^ (mixed >> 32));
    }
}

impl Kinds {
    fn add(&mut self, sends: bool) {
        if sends {
            self.sending += 1;
        } else {
            self.idle += 1;
        }
    }

    /// The shares in `total`: of one that is idle, and of one that sends.
    fn shares(self, total: u32, first: u32) -> (u32, u32) {
        let Self { sending, idle } = self;
        let least = first.min(total / (2 * (sending + idle)).max(1)).max(1);
        let rest = total.saturating_sub(least * idle);
        (least, rest.checked_div(sending).unwrap_or(0).max(1))
    }
}

/// What a session may have, of `own`'s peer: a part of what `all` peers have.
fn share(total: u32, all: Kinds, own: Kinds, sends: bool) -> u32 {
    let first = Credit::first(total);
    let (idle, sending) = all.shares(total, first);
    if own.sending == 0 {
        return (idle / own.idle.max(1)).max(1);
    }
    let (idle, sending) = own.shares(sending, first);
    if sends { sending } else { idle }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, SessionId};

    struct Session(bool, IpAddr, Connection);

    fn session(id: u32, peer: u32, total: u32) -> Session {
        let config = Config {
            receive_credit: Credit::first(total),
            ..Config::default()
        };
        let id = SessionId(id);
        let peer = IpAddr::from(peer.to_be_bytes());
        Session(false, peer, Connection::new(config, id, id, Time(0)))
    }

    /// As many peers, each with a session.
    fn peers(count: u32, total: u32) -> Vec<Session> {
        let ids = 1..=count;
        ids.map(|id| session(id, id, total)).collect()
    }

    fn balance(credit: &mut Credit, now: Time, all: &mut [Session]) -> Vec<u32> {
        credit.balance(now, |visit| {
            let each = all.iter_mut();
            each.for_each(|Session(sends, peer, one)| visit(*peer, *sends, one));
        });
        all.iter().map(|one| one.2.receive_credit()).collect()
    }

    /// What everybody has once they have heard.
    fn settle(credit: &mut Credit, now: &mut Time, all: &mut [Session]) -> Vec<u32> {
        for _ in 0..2 {
            *now = *now + SETTLE;
            balance(credit, *now, all);
        }
        balance(credit, *now, all)
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
            for (count, of_a_peer) in [(1, 1), (3, 1), (32, 1), (32, 5), (200, 1), (200, 7)] {
                let mut credit = Credit::new(total);
                let ids = 1..=count;
                let all = ids.map(|id| session(id, id / of_a_peer, total));
                let mut all: Vec<_> = all.collect();
                for peer in 0..count as usize {
                    all[peer].0 = true;
                    balance(&mut credit, Time(peer as u64), &mut all);
                }
                let end = Time(1000) + SETTLE;
                let shares = balance(&mut credit, end, &mut all);
                let sum: u32 = shares.iter().sum();
                assert!(shares.iter().all(|share| *share > 0));
                assert!(sum <= total.max(count), "{count} share {sum} of {total}");
                assert!(sum * 2 >= total, "{count} share only {sum} of {total}");
            }
        }
    }

    #[test]
    fn a_peer_with_many_sessions_has_no_more_than_one_with_a_single_one() {
        let mut credit = Credit::new(512);
        let mut all = peers(1, 512);
        all.extend((2..10).map(|id| session(id, 7, 512)));
        let mut now = Time(0);
        // Each peer's beginning, in parts.
        let idle = settle(&mut credit, &mut now, &mut all);
        assert_eq!(idle, [[16].as_slice(), &[2; 8]].concat());
        all.iter_mut().for_each(|one| one.0 = true);
        let all_send = settle(&mut credit, &mut now, &mut all);
        assert_eq!(all_send, [[256].as_slice(), &[32; 8]].concat());
        // What some of its sessions do not need is for its others.
        all[2..].iter_mut().for_each(|one| one.0 = false);
        let one_each = settle(&mut credit, &mut now, &mut all);
        assert_eq!(
            one_each,
            [[256, 256 - 7 * 16].as_slice(), &[16; 7]].concat()
        );
        // Nothing of a peer's that is idle as a whole is lost.
        all[1].0 = false;
        let one = settle(&mut credit, &mut now, &mut all);
        assert_eq!(one, [[496].as_slice(), &[2; 8]].concat());
    }

    #[test]
    fn one_that_begins_as_another_ends_gets_its_share() {
        let mut credit = Credit::new(512);
        let mut all = peers(2, 512);
        all[0].0 = true;
        let mut now = Time(0);
        assert_eq!(settle(&mut credit, &mut now, &mut all), [496, 16]);
        (all[0].0, all[1].0) = (false, true);
        assert_eq!(settle(&mut credit, &mut now, &mut all), [16, 496]);
    }
}
