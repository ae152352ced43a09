//! Connections to the control address that are no session yet.
//!
//! Used by the agent's accept loop, which must never wait: whoever comes gets a
//! place, if need be the one of a stranger that has waited longest at its
//! address. The invariant: *an address that holds more places than others loses
//! its own, so strangers who stay silent keep nobody out but themselves*.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Strangers at a time; each costs a descriptor and little memory.
pub const STRANGERS_MAX: usize = 256;

/// Of these from one address: many agents may share one behind a translating
/// gateway, and come at the same time after an outage.
pub const STRANGERS_PER_ADDRESS: usize = 64;

/// Of these from one IPv6 prefix of 64 bits.
const STRANGERS_PER_NETWORK: usize = 192;

/// Those who are there. Clones refer to the same ones.
#[derive(Clone, Debug, Default)]
pub struct Strangers(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    /// In order of their arrival.
    strangers: VecDeque<Stranger>,
    next: u64,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    from: IpAddr,
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

impl Strangers {
    /// A place for a stranger from this address; another one may lose its own.
    pub fn place(&self, from: IpAddr) -> Place {
        let from = from.to_canonical();
        let mut waiting = self.lock();
        waiting.make_room(from);
        let number = waiting.next;
        waiting.next += 1;
        let (keep, lost) = oneshot::channel();
        waiting.strangers.push_back(Stranger {
            number,
            from,
            _keep: keep,
        });
        Place {
            strangers: self.clone(),
            number,
            lost,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().strangers.len()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing here panics while it holds the lock half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    }
}

impl Waiting {
    /// Takes the place of the stranger that is to lose it, if one must.
    fn make_room(&mut self, from: IpAddr) {
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
        if let Some(loser) = loser {
            self.strangers.remove(loser);
        }
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

    fn host(number: u8) -> IpAddr {
        [10, 0, 0, number].into()
    }

    fn is_lost(place: &mut Place) -> bool {
        place.lost.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn the_oldest_of_a_crowded_address_makes_room() {
        let strangers = Strangers::default();
        let mut other = strangers.place(host(2));
        let mut crowd: Vec<_> = (0..STRANGERS_PER_ADDRESS)
            .map(|_| strangers.place(host(1)))
            .collect();
        assert!(!crowd.iter_mut().any(is_lost));
        let mut late = strangers.place(host(1));
        assert!(is_lost(&mut crowd[0]), "the first one");
        assert!(!crowd[1..].iter_mut().any(is_lost), "and nobody else");
        assert!(!is_lost(&mut late) && !is_lost(&mut other));
        assert_eq!(strangers.count(), STRANGERS_PER_ADDRESS + 1);
        drop((crowd, late, other));
        assert_eq!(strangers.count(), 0);
    }

    #[test]
    fn where_all_places_are_taken_the_largest_crowd_makes_room() {
        let strangers = Strangers::default();
        let mut single = strangers.place(host(100));
        let mut crowds = Vec::new();
        for number in 1..=3 {
            for _ in 0..STRANGERS_PER_ADDRESS - 1 {
                crowds.push(strangers.place(host(number)));
            }
        }
        let mut largest: Vec<_> = (0..STRANGERS_PER_ADDRESS)
            .map(|_| strangers.place(host(4)))
            .collect();
        while strangers.count() < STRANGERS_MAX {
            crowds.push(strangers.place(host(5)));
        }
        let mut good = strangers.place(host(101));
        assert!(is_lost(&mut largest[0]));
        assert!(!crowds.iter_mut().any(is_lost));
        assert!(!is_lost(&mut good) && !is_lost(&mut single));
        assert_eq!(strangers.count(), STRANGERS_MAX);
    }

    #[test]
    fn hosts_of_one_link_leave_each_other_in_peace_and_others_room() {
        let strangers = Strangers::default();
        let inside = |number: usize| -> IpAddr {
            let text = format!("2001:db8::{number:x}");
            text.parse().unwrap()
        };
        let place = |number| strangers.place(inside(number));
        let mut link: Vec<_> = (0..STRANGERS_PER_NETWORK).map(place).collect();
        assert!(!link.iter_mut().any(is_lost), "hosts that came once each");
        let mut late = place(9999);
        assert!(is_lost(&mut link[0]) && !link[1..].iter_mut().any(is_lost));
        let mut others: Vec<_> = (0..64)
            .map(|number| strangers.place(host(number)))
            .collect();
        assert!(!others.iter_mut().any(is_lost) && !is_lost(&mut late));
        assert_eq!(strangers.count(), STRANGERS_MAX);
        // Where nobody holds more than others, who waits longest goes.
        let mut newest = strangers.place(host(64));
        assert!(is_lost(&mut link[1]) && !link[2..].iter_mut().any(is_lost));
        assert!(!others.iter_mut().any(is_lost) && !is_lost(&mut newest));
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
