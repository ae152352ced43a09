//! Connections to the control address that are no session yet.
//!
//! Used by the agent's accept loop, which must never wait: whoever comes gets a
//! place, if need be the one of a stranger that has waited longest at its
//! address, or waits for one elsewhere. The invariants: *an address that holds
//! more places than others loses its own, so strangers who stay silent keep
//! nobody out but themselves*, and *of a crowd that comes all at once those who
//! are there have the time to introduce themselves*.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};

/// Strangers at a time; each costs a descriptor and little memory.
pub const STRANGERS_MAX: usize = 256;

/// Of these from one address: many agents may share one behind a translating
/// gateway, and come at the same time after an outage.
pub const STRANGERS_PER_ADDRESS: usize = 64;

/// Of these from one IPv6 prefix of 64 bits.
const STRANGERS_PER_NETWORK: usize = 192;

/// For so long a place is safe from others of the same crowd, or of one as
/// large: introductions take a few round trips and two signatures, so some
/// milliseconds, also where 64 are made at a time.
pub const GRACE: Duration = Duration::from_millis(500);

/// Strangers that wait for a place; each costs a descriptor.
pub const QUEUE_MAX: usize = 128;

/// Of these from one address, and from one IPv6 prefix of 64 bits.
pub const QUEUE_PER_NETWORK: usize = 64;

/// Introductions take milliseconds. Where crowds are as large as each other, each
/// of one stranger perhaps, a place is safe for so long.
const GRACE_AMONG_EQUALS: Duration = Duration::from_millis(60);

/// Those who are there. Clones refer to the same ones.
#[derive(Clone, Debug, Default)]
pub struct Strangers(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: Mutex<Waiting>,
    /// A place was given back.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In order of their arrival.
    strangers: VecDeque<Stranger>,
    next: u64,
    /// Who has no place yet.
    queue: Vec<IpAddr>,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    from: IpAddr,
    since: Instant,
    /// Dropped to tell that the place is lost.
    _keep: oneshot::Sender<()>,
}

/// A stranger's place; given back on drop.
#[derive(Debug)]
#[must_use = "dropping a place gives it back"]
pub struct Place {
    strangers: Strangers,
    number: u64,
    lost: oneshot::Receiver<()>,
}

/// A stranger that has just come. Dropping it turns it away.
#[derive(Debug)]
#[must_use = "dropping it turns the stranger away"]
pub enum Newcomer {
    /// It has a place.
    Placed(Place),
    /// It waits for one.
    Queued(Queued),
}

/// One of those in the queue; leaves it on drop.
#[derive(Debug)]
pub struct Queued {
    strangers: Strangers,
    from: IpAddr,
}

impl Strangers {
    /// Gives a stranger from this address a place, or lets it wait for one;
    /// none where too many wait. Another stranger may lose its place.
    pub fn enter(&self, from: IpAddr) -> Option<Newcomer> {
        let from = from.to_canonical();
        if let Ok(place) = self.try_place(from) {
            return Some(Newcomer::Placed(place));
        }
        let queue = &mut self.lock().queue;
        let near = |one: &&IpAddr| network(**one) == network(from);
        let here = queue.iter().filter(near).count();
        if queue.len() >= QUEUE_MAX || here >= QUEUE_PER_NETWORK {
            return None;
        }
        queue.push(from);
        Some(Newcomer::Queued(Queued {
            strangers: self.clone(),
            from,
        }))
    }

    /// How many have a place.
    pub fn count(&self) -> usize {
        self.lock().strangers.len()
    }

    /// A place, or when there may be one although nobody gives one back.
    fn try_place(&self, from: IpAddr) -> Result<Place, Instant> {
        let now = Instant::now();
        let mut waiting = self.lock();
        waiting.make_room(from, now)?;
        let number = waiting.next;
        waiting.next += 1;
        let (keep, lost) = oneshot::channel();
        waiting.strangers.push_back(Stranger {
            number,
            from,
            since: now,
            _keep: keep,
        });
        Ok(Place {
            strangers: self.clone(),
            number,
            lost,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing here panics while it holds the lock half-changed.
        let waiting = self.0.waiting.lock();
        waiting.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newcomer {
    /// Waits for the place.
    pub async fn place(self) -> Place {
        match self {
            Self::Placed(place) => place,
            Self::Queued(queued) => queued.place().await,
        }
    }
}

impl Queued {
    async fn place(self) -> Place {
        loop {
            let mut freed = std::pin::pin!(self.strangers.0.freed.notified());
            // From here on nothing is missed.
            freed.as_mut().enable();
            match self.strangers.try_place(self.from) {
                Ok(place) => return place,
                Err(until) => tokio::select! {
                    () = freed => {}
                    () = sleep_until(until) => {}
                },
            }
        }
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let queue = &mut self.strangers.lock().queue;
        if let Some(at) = queue.iter().position(|one| *one == self.from) {
            queue.swap_remove(at);
        }
    }
}

impl Place {
    /// Waits until the place is lost to somebody else.
    pub async fn lost(&mut self) {
        // An error either way: nothing is ever sent.
        let _ = (&mut self.lost).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.strangers.lock();
        waiting.strangers.retain(|one| one.number != self.number);
        drop(waiting);
        self.strangers.0.freed.notify_waiters();
    }
}

impl Waiting {
    /// Takes the place of the stranger that is to lose it, if one must; or says
    /// when that one may be asked to.
    fn make_room(&mut self, from: IpAddr, now: Instant) -> Result<(), Instant> {
        let all = self.strangers.iter();
        let loser = if all.clone().filter(|one| one.from == from).count() >= STRANGERS_PER_ADDRESS {
            self.oldest_of_largest(|one| (one.from == from).then_some(from))
        } else if all.filter(|one| one.is_near(from)).count() >= STRANGERS_PER_NETWORK {
            self.oldest_of_largest(|one| one.is_near(from).then_some(one.from))
        } else if self.strangers.len() >= STRANGERS_MAX {
            let network = self.oldest_of_largest(|one| Some(network(one.from)));
            let crowd = network.map(|at| self.strangers[at].from);
            crowd.and_then(|crowd| {
                self.oldest_of_largest(|one| one.is_near(crowd).then_some(one.from))
            })
        } else {
            None
        };
        let Some(loser) = loser else {
            return Ok(());
        };
        let (since, there) = (self.strangers[loser].since, self.strangers[loser].from);
        let until = match self.crowds(from, there) {
            (here, there) if here < there => now,
            (here, there) if here == there => since + GRACE_AMONG_EQUALS,
            _ => since + GRACE,
        };
        if until > now {
            return Err(until);
        }
        self.strangers.remove(loser);
        Ok(())
    }

    /// How many are from here, with one more, and from there: from one network if
    /// these are two, else from one address.
    fn crowds(&self, here: IpAddr, there: IpAddr) -> (usize, usize) {
        let is_one = network(here) == network(there);
        let crowd = |of: IpAddr| {
            let in_crowd = |one: &&Stranger| {
                if is_one {
                    one.from == of
                } else {
                    one.is_near(of)
                }
            };
            self.strangers.iter().filter(in_crowd).count()
        };
        (crowd(here) + 1, crowd(there))
    }

    /// Where the oldest stranger of the largest group is; of equal groups, of
    /// the one whose oldest waits longest.
    fn oldest_of_largest(&self, group: impl Fn(&Stranger) -> Option<IpAddr>) -> Option<usize> {
        let mut groups = HashMap::<IpAddr, (usize, usize)>::new();
        for (at, stranger) in self.strangers.iter().enumerate() {
            if let Some(group) = group(stranger) {
                groups.entry(group).or_insert((0, at)).0 += 1;
            }
        }
        let largest = groups
            .into_values()
            .max_by_key(|(count, oldest)| (*count, Reverse(*oldest)));
        largest.map(|(_, oldest)| oldest)
    }
}

impl Stranger {
    fn is_near(&self, address: IpAddr) -> bool {
        network(self.from) == network(address)
    }
}

/// What one owner may have many addresses of: an IPv6 prefix of 64 bits. Many
/// owners may share one as well: it is also what a link of a network has.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let prefix = address.to_bits() & (u128::MAX << 64);
            IpAddr::V6(Ipv6Addr::from_bits(prefix))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn host(number: u8) -> IpAddr {
        [10, 0, 0, number].into()
    }

    /// A place that is there at once.
    fn place(strangers: &Strangers, from: IpAddr) -> Place {
        match strangers.enter(from) {
            Some(Newcomer::Placed(place)) => place,
            other => panic!("{other:?}"),
        }
    }

    fn is_lost(place: &mut Place) -> bool {
        place.lost.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_a_crowded_address_makes_room() {
        let strangers = Strangers::default();
        let mut other = place(&strangers, host(2));
        let mut crowd: Vec<_> = (0..STRANGERS_PER_ADDRESS)
            .map(|_| place(&strangers, host(1)))
            .collect();
        assert!(!crowd.iter_mut().any(is_lost));
        advance(GRACE).await;
        let mut late = place(&strangers, host(1));
        assert!(is_lost(&mut crowd[0]), "the first one");
        assert!(!crowd[1..].iter_mut().any(is_lost), "and nobody else");
        assert!(!is_lost(&mut late) && !is_lost(&mut other));
        assert_eq!(strangers.count(), STRANGERS_PER_ADDRESS + 1);
        drop((crowd, late, other));
        assert_eq!(strangers.count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn where_all_places_are_taken_the_largest_crowd_makes_room() {
        let strangers = Strangers::default();
        let mut single = place(&strangers, host(100));
        let mut crowds = Vec::new();
        for number in 1..=3 {
            for _ in 0..STRANGERS_PER_ADDRESS - 1 {
                crowds.push(place(&strangers, host(number)));
            }
        }
        let mut largest: Vec<_> = (0..STRANGERS_PER_ADDRESS)
            .map(|_| place(&strangers, host(4)))
            .collect();
        while strangers.count() < STRANGERS_MAX {
            crowds.push(place(&strangers, host(5)));
        }
        let mut good = place(&strangers, host(101));
        assert!(is_lost(&mut largest[0]));
        assert!(!crowds.iter_mut().any(is_lost));
        assert!(!is_lost(&mut good) && !is_lost(&mut single));
        assert_eq!(strangers.count(), STRANGERS_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn hosts_of_one_link_leave_each_other_in_peace_and_others_room() {
        let strangers = Strangers::default();
        let inside = |number: usize| -> IpAddr {
            let text = format!("2001:db8::{number:x}");
            text.parse().unwrap()
        };
        let arrive = |number| place(&strangers, inside(number));
        let mut link: Vec<_> = (0..STRANGERS_PER_NETWORK).map(arrive).collect();
        assert!(!link.iter_mut().any(is_lost), "hosts that came once each");
        advance(GRACE).await;
        let mut late = arrive(9999);
        assert!(is_lost(&mut link[0]) && !link[1..].iter_mut().any(is_lost));
        let mut others: Vec<_> = (0..64)
            .map(|number| place(&strangers, host(number)))
            .collect();
        assert!(!others.iter_mut().any(is_lost) && !is_lost(&mut late));
        assert_eq!(strangers.count(), STRANGERS_MAX);
        // Where nobody holds more than others, who waits longest goes.
        let mut newest = place(&strangers, host(64));
        assert!(is_lost(&mut link[1]) && !link[2..].iter_mut().any(is_lost));
        assert!(!others.iter_mut().any(is_lost) && !is_lost(&mut newest));
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_that_comes_at_once_is_served_in_turn() {
        let strangers = Strangers::default();
        let enter = || strangers.enter(host(1));
        let mut first: Vec<_> = (0..STRANGERS_PER_ADDRESS)
            .map(|_| place(&strangers, host(1)))
            .collect();
        let mut queue: Vec<_> = (0..QUEUE_PER_NETWORK)
            .map(|_| match enter() {
                Some(Newcomer::Queued(queued)) => queued,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(enter().is_none(), "one more is turned away");
        assert!(!first.iter_mut().any(is_lost), "nobody was disturbed");
        let others = place(&strangers, host(2));

        // Whoever has introduced itself makes room at once.
        let began = Instant::now();
        drop(first.pop());
        let second = queue.pop().expect("there are more").place().await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert!(enter().is_some(), "and so does whoever leaves the queue");
        assert!(!first.iter_mut().any(is_lost));

        // Silent ones do once they have had their time.
        let mut third = queue.pop().expect("there are more").place().await;
        assert_eq!(began.elapsed().as_millis(), GRACE.as_millis());
        assert!(is_lost(&mut first[0]) && !first[1..].iter_mut().any(is_lost));
        assert!(!is_lost(&mut third));
        drop((second, queue, others));
        assert_eq!(strangers.count(), STRANGERS_PER_ADDRESS - 1);
        assert!(strangers.lock().queue.is_empty());
    }

    #[test]
    fn addresses_of_one_owner_are_one() {
        let parse = |text: &str| network(text.parse().unwrap());
        assert_eq!(parse("2001:db8::1"), parse("2001:db8::ffff:1"));
        assert_ne!(parse("2001:db8::1"), parse("2001:db8:0:1::1"));
        assert_eq!(parse("::ffff:10.0.0.1"), parse("10.0.0.1"));
        assert_ne!(parse("10.0.0.1"), parse("10.0.0.2"));
    }
}
