//! What one peer may have of this node, and has.
//!
//! Charged for what its requests make: memory in the store for as long as
//! anybody holds it, transfers until the engine has let go of them, requests as
//! they come. The invariant: *a peer that takes all it may get leaves room for
//! the others*. Names are as true as the sessions they come from.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use genie_client::PeerLimit;
use genie_client::status::{PeerRefused, PeerUsage};
use genie_dataplane::memory::accelerator::Way;
use tokio::sync::Semaphore;

use crate::units::show_bytes;

/// Peers of which refusals are counted one by one; those of later ones are
/// counted as `other`'s.
const PEERS_MAX: usize = 1024;

/// Requests of one peer that have a first transfer in staging slots: as many as
/// half the slots of a device, each way.
const STAGING_MAX: usize = 8;

/// What one peer may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerLimits {
    /// Bytes in the store that its requests made.
    pub memory: u64,
    /// Transfers under way of its requests.
    pub transfers: u64,
    /// Requests in a second, and at once after a second of silence.
    pub rate: u64,
    /// Sessions.
    pub sessions: u64,
}

/// The peers of an agent. Clones refer to the same ones.
#[derive(Clone, Debug)]
pub struct Peers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: PeerLimits,
    /// Of peers with limits of their own.
    own: BTreeMap<String, PeerLimits>,
    accounts: Mutex<HashMap<String, Arc<Account>>>,
    refused: Mutex<BTreeMap<String, PeerRefused>>,
}

/// One peer, to charge things to.
#[derive(Debug)]
pub struct Account {
    peer: String,
    limits: PeerLimits,
    has: Mutex<Has>,
    /// Requests that may be in staging slots, by the way these go.
    staging: [Arc<Semaphore>; 2],
    peers: std::sync::Weak<Inner>,
}

#[derive(Debug)]
struct Has {
    bytes: u64,
    transfers: u64,
    /// A token bucket: requests that it may make at once, as of `filled`.
    tokens: f64,
    filled: Instant,
}

/// A request's part in a peer's transfers: one for as long as it is under way,
/// and more while there is room. Given back on drop.
#[derive(Debug)]
#[must_use = "dropping a share gives it back"]
pub struct Share {
    account: Arc<Account>,
    held: u64,
}

/// A peer would have too much.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LimitError {
    /// Of memory.
    #[error(
        "{} are wanted and peer '{peer}' has {} of the {} that one peer may have here \
         (peer-memory): remove what it has put, or start the agent with a larger --peer-memory",
        show_bytes(*wanted), show_bytes(*used), show_bytes(*limit)
    )]
    Memory {
        /// Who.
        peer: String,
        /// Bytes asked for.
        wanted: u64,
        /// Bytes that it has.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// Of transfers.
    #[error(
        "peer '{peer}' has {limit} transfers under way, as many as one peer may have here \
         (peer-transfers): try again when some are over, or start the agent with a larger \
         --peer-transfers"
    )]
    Transfers {
        /// Who.
        peer: String,
        /// The limit.
        limit: u64,
    },
    /// Of requests.
    #[error(
        "peer '{peer}' made more than {limit} requests in a second, as many as one peer may make \
         here (peer-rate): try again later, or start the agent with a larger --peer-rate"
    )]
    Rate {
        /// Who.
        peer: String,
        /// The limit.
        limit: u64,
    },
}

impl LimitError {
    /// Which limit, and its figure.
    pub fn limit(&self) -> (PeerLimit, u64) {
        match self {
            Self::Memory { limit, .. } => (PeerLimit::Memory, *limit),
            Self::Transfers { limit, .. } => (PeerLimit::Transfers, *limit),
            Self::Rate { limit, .. } => (PeerLimit::Rate, *limit),
        }
    }
}

impl Peers {
    /// Peers that may have `limits` each, or their `own` ones.
    pub fn new(limits: PeerLimits, own: BTreeMap<String, PeerLimits>) -> Self {
        Self(Arc::new(Inner {
            limits,
            own,
            accounts: Mutex::default(),
            refused: Mutex::default(),
        }))
    }

    /// What the peer of this name may have.
    pub fn limits(&self, peer: &str) -> PeerLimits {
        *self.0.own.get(peer).unwrap_or(&self.0.limits)
    }

    /// The peer of this name.
    pub fn account(&self, peer: &str) -> Arc<Account> {
        let mut accounts = lock(&self.0.accounts);
        if let Some(account) = accounts.get(peer) {
            return Arc::clone(account);
        }
        let now = Instant::now();
        // Those who have nothing are known by name only.
        accounts.retain(|_, account| Arc::strong_count(account) > 1 || !account.is_idle(now));
        let account = Arc::new(Account::new(peer, self.limits(peer), now, &self.0));
        accounts.insert(peer.to_owned(), Arc::clone(&account));
        account
    }

    /// Everybody who has anything or was refused something, by name.
    pub fn status(&self) -> Vec<PeerUsage> {
        let mut all: BTreeMap<String, PeerUsage> = BTreeMap::new();
        for (peer, account) in lock(&self.0.accounts).iter() {
            all.insert(peer.clone(), account.usage());
        }
        for (peer, refused) in lock(&self.0.refused).iter() {
            let usage = || usage(peer, &self.limits(peer), 0, 0);
            all.entry(peer.clone()).or_insert_with(usage).refused = *refused;
        }
        all.into_values().collect()
    }
}

impl Inner {
    fn count_refusal(&self, error: &LimitError, peer: &str) {
        let mut refused = lock(&self.refused);
        let known = refused.contains_key(peer) || refused.len() < PEERS_MAX;
        let refused = refused.entry(if known { peer } else { "other" }.to_owned());
        let refused = refused.or_default();
        let count = match error {
            LimitError::Memory { .. } => &mut refused.memory,
            LimitError::Transfers { .. } => &mut refused.transfers,
            LimitError::Rate { .. } => &mut refused.rate,
        };
        *count += 1;
        // Whoever floods us shall not fill the log too.
        if count.is_power_of_two() {
            let (limit, figure) = error.limit();
            tracing::warn!(peer, %limit, figure, refused = *count, "a peer met a limit: {error}");
        }
    }
}

impl Account {
    fn new(peer: &str, limits: PeerLimits, now: Instant, peers: &Arc<Inner>) -> Self {
        Self {
            peer: peer.to_owned(),
            limits,
            has: Mutex::new(Has {
                bytes: 0,
                transfers: 0,
                tokens: limits.rate as f64,
                filled: now,
            }),
            staging: [(); 2].map(|()| Arc::new(Semaphore::new(STAGING_MAX))),
            peers: Arc::downgrade(peers),
        }
    }

    /// Charges bytes; given back with [`Account::give_back`].
    pub fn take(&self, wanted: u64) -> Result<(), LimitError> {
        let limit = self.limits.memory;
        let mut has = lock(&self.has);
        let used = has.bytes;
        match used.checked_add(wanted).filter(|then| *then <= limit) {
            Some(then) => {
                has.bytes = then;
                Ok(())
            }
            None => {
                drop(has);
                let peer = self.peer.clone();
                Err(self.refuse(LimitError::Memory {
                    peer,
                    wanted,
                    used,
                    limit,
                }))
            }
        }
    }

    /// Charges the rest of a page: nothing is refused for that.
    pub fn take_rest(&self, bytes: u64) {
        let mut has = lock(&self.has);
        has.bytes = has.bytes.saturating_add(bytes);
    }

    /// Gives bytes back that were taken.
    pub fn give_back(&self, bytes: u64) {
        let mut has = lock(&self.has);
        has.bytes = has.bytes.saturating_sub(bytes);
    }

    /// Charges a request that comes at this time.
    pub fn request(&self, now: Instant) -> Result<(), LimitError> {
        let limit = self.limits.rate;
        let mut has = lock(&self.has);
        has.fill(limit, now);
        if has.tokens < 1.0 {
            drop(has);
            let peer = self.peer.clone();
            return Err(self.refuse(LimitError::Rate { peer, limit }));
        }
        has.tokens -= 1.0;
        Ok(())
    }

    /// Charges the transfers of a request: one from now on.
    pub fn share(self: &Arc<Self>) -> Result<Share, LimitError> {
        let limit = self.limits.transfers;
        let mut has = lock(&self.has);
        if has.transfers >= limit {
            drop(has);
            let peer = self.peer.clone();
            return Err(self.refuse(LimitError::Transfers { peer, limit }));
        }
        has.transfers += 1;
        Ok(Share {
            account: Arc::clone(self),
            held: 1,
        })
    }

    fn refuse(&self, error: LimitError) -> LimitError {
        if let Some(peers) = self.peers.upgrade() {
            peers.count_refusal(&error, &self.peer);
        }
        error
    }

    fn is_idle(&self, now: Instant) -> bool {
        let mut has = lock(&self.has);
        has.fill(self.limits.rate, now);
        (has.bytes, has.transfers) == (0, 0) && has.tokens >= self.limits.rate as f64
    }

    fn usage(&self) -> PeerUsage {
        let has = lock(&self.has);
        usage(&self.peer, &self.limits, has.bytes, has.transfers)
    }
}

impl Has {
    fn fill(&mut self, rate: u64, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * rate as f64).min(rate as f64);
        self.filled = self.filled.max(now);
    }
}

impl Share {
    /// Whether one more may begin, where an engine takes `free` more of anybody:
    /// half of the limit is for requests that have only one, and half of what is
    /// free is for other peers, so that some is always left (Choudhury and Hahne,
    /// dynamic queue length thresholds).
    pub fn may_add(&self, free: usize) -> bool {
        let most = (self.account.limits.transfers / 2).min(free as u64);
        lock(&self.account.has).transfers < most
    }

    /// What lets one more request of this peer into staging slots that go this
    /// way: others of it may be in half of them, however many it has.
    pub fn staging(&self, way: Way) -> Arc<Semaphore> {
        let [outgoing, incoming] = &self.account.staging;
        Arc::clone(match way {
            Way::ToHost => outgoing,
            Way::ToDevice => incoming,
        })
    }

    /// Charges as many as there are now, and one where there are none.
    pub fn set(&mut self, transfers: usize) {
        let now = (transfers as u64).max(1);
        let mut has = lock(&self.account.has);
        has.transfers = has.transfers + now - self.held;
        self.held = now;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        lock(&self.account.has).transfers -= self.held;
    }
}

fn usage(peer: &str, limits: &PeerLimits, memory: u64, transfers: u64) -> PeerUsage {
    PeerUsage {
        peer: peer.to_owned(),
        memory_bytes: memory,
        memory_limit_bytes: limits.memory,
        transfers,
        transfers_limit: limits.transfers,
        rate_limit: limits.rate,
        sessions_limit: limits.sessions,
        refused: PeerRefused::default(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics while it holds a lock half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIMITS: PeerLimits = PeerLimits {
        memory: 100,
        transfers: 8,
        rate: 10,
        sessions: 1,
    };

    fn peers() -> Peers {
        let own = PeerLimits {
            memory: 1000,
            ..LIMITS
        };
        Peers::new(LIMITS, [("big".to_owned(), own)].into())
    }

    #[test]
    fn one_peer_cannot_have_more_memory_but_another_can() {
        let peers = peers();
        let (one, other, big) = (
            peers.account("one"),
            peers.account("other"),
            peers.account("big"),
        );
        one.take(60).unwrap();
        let refused = one.take(41).unwrap_err();
        assert_eq!(refused.limit(), (PeerLimit::Memory, 100));
        assert!(refused.to_string().contains("--peer-memory"), "{refused}");
        assert!(one.take(u64::MAX).is_err());
        other.take(100).unwrap();
        big.take(1000).unwrap();
        one.give_back(60);
        one.take(100).unwrap();
        assert_eq!(peers.status()[1].refused.memory, 2);
    }

    #[test]
    fn requests_come_at_their_rate_after_a_burst() {
        let account = peers().account("one");
        let now = Instant::now();
        let made = |at| (0..100).filter(|_| account.request(at).is_ok()).count();
        assert_eq!(made(now), 10);
        assert_eq!(made(now + Duration::from_millis(250)), 2);
        assert_eq!(made(now + Duration::from_secs(60)), 10);
        // A clock does not go back; if it did, nothing would come of it.
        assert_eq!(made(now), 0);
    }

    #[test]
    fn a_batch_takes_half_and_leaves_every_request_one() {
        let account = peers().account("one");
        let mut batch = account.share().unwrap();
        let mut moving = 1;
        while batch.may_add(1000) {
            moving += 1;
            batch.set(moving);
        }
        assert_eq!(moving, 4);
        let others: Vec<_> = (0..4).map(|_| account.share().unwrap()).collect();
        assert!(others.iter().all(|other| !other.may_add(1000)));
        let refused = account.share().unwrap_err();
        assert_eq!(refused.limit(), (PeerLimit::Transfers, 8));
        let staged = |way| {
            batch
                .staging(way)
                .try_acquire_many_owned(STAGING_MAX as u32)
        };
        let half = staged(Way::ToDevice).unwrap();
        assert!(others[0].staging(Way::ToDevice).try_acquire().is_err());
        assert!(others[0].staging(Way::ToHost).try_acquire().is_ok());
        drop(half);
        assert_eq!(
            2 * STAGING_MAX,
            genie_dataplane::stage::Config::default().slots
        );
        batch.set(0);
        drop(others);
        assert!(batch.may_add(1000) && !batch.may_add(1));
        drop(batch);
        assert_eq!(account.usage().transfers, 0);
    }

    #[test]
    fn names_that_have_nothing_are_forgotten_and_their_refusals_counted() {
        let peers = peers();
        for number in 0..2 * PEERS_MAX {
            let account = peers.account(&number.to_string());
            assert!(account.take(101).is_err());
        }
        assert!(lock(&peers.0.accounts).len() <= 2);
        let status = peers.status();
        assert!(status.len() <= PEERS_MAX + 3, "{}", status.len());
        let refused: u64 = status.iter().map(|one| one.refused.memory).sum();
        assert_eq!(refused, 2 * PEERS_MAX as u64);
    }
}
