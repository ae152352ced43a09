//! Puts that were done, so that one which is made again is not done twice.
//!
//! A session may be lost between a put's last step here and the message that
//! says so. Whoever tries again under the same key is told how the first one
//! ended, for as long as anybody may sensibly try again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::message::{Outcome, RequestKey};

/// How long a put is remembered at the least, while there is room.
const KEPT_FOR: Duration = Duration::from_secs(600);

/// Puts remembered of each peer, some hundred bytes each. Of a peer that makes
/// more in that time the oldest go first.
const KEPT_MAX: usize = 4096;

/// Peers whose puts are remembered; the one that was silent longest goes first.
const PEERS_MAX: usize = 256;

/// What was done for peers.
#[derive(Debug, Default)]
pub struct Once(Mutex<HashMap<String, Done>>);

/// What was done for one.
#[derive(Debug, Default)]
struct Done {
    outcomes: HashMap<RequestKey, Outcome>,
    /// The oldest first.
    order: VecDeque<(Instant, RequestKey)>,
}

impl Done {
    fn remember(&mut self, now: Instant, key: RequestKey, outcome: Outcome) {
        while let Some((since, oldest)) = self.order.front()
            && (now - *since > KEPT_FOR || self.order.len() >= KEPT_MAX)
        {
            self.outcomes.remove(oldest);
            self.order.pop_front();
        }
        self.outcomes.insert(key, outcome);
        self.order.push_back((now, key));
    }

    fn last(&self) -> Option<Instant> {
        self.order.back().map(|(since, _)| *since)
    }
}

impl Once {
    /// How `peer`'s put under `key` ended, if it was done.
    pub fn recall(&self, peer: &str, key: RequestKey) -> Option<Outcome> {
        let done = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        done.get(peer)?.outcomes.get(&key).copied()
    }

    /// Does the last step of a put, unless one under the same key was done.
    /// Returns what `commit` did beside the outcome, if it was called.
    pub fn commit<T, E>(
        &self,
        peer: &str,
        key: Option<RequestKey>,
        outcome: Outcome,
        commit: impl FnOnce() -> Result<T, E>,
    ) -> Result<(Outcome, Option<T>), E> {
        let Some(key) = key else {
            return commit().map(|committed| (outcome, Some(committed)));
        };
        // Held meanwhile: of two attempts that end at the same time one commits.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = all.get(peer).and_then(|done| done.outcomes.get(&key)) {
            return Ok((*first, None));
        }
        let committed = commit()?;
        if all.len() >= PEERS_MAX && !all.contains_key(peer) {
            let silent = all.iter().min_by_key(|(_, done)| done.last());
            if let Some(silent) = silent.map(|(peer, _)| peer.clone()) {
                all.remove(&silent);
            }
        }
        let done = all.entry(peer.to_owned()).or_default();
        done.remember(Instant::now(), key, outcome);
        Ok((outcome, Some(committed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(tensors: u64) -> Outcome {
        Outcome {
            tensors,
            ..Outcome::default()
        }
    }

    #[test]
    fn what_was_done_is_not_done_again_and_what_failed_is() {
        let once = Once::default();
        let key = RequestKey([7; 16]);
        let failed = once.commit("a", Some(key), outcome(1), || Err::<(), _>("full"));
        assert_eq!(failed.unwrap_err(), "full");
        assert!(once.recall("a", key).is_none());
        let first = once.commit("a", Some(key), outcome(2), || Ok::<_, ()>(()));
        assert_eq!(first.unwrap().0.tensors, 2);
        let again = once.commit("a", Some(key), outcome(3), || -> Result<(), ()> {
            panic!("it was done already")
        });
        assert_eq!(again.unwrap().0.tensors, 2);
        assert_eq!(once.recall("a", key).unwrap().tensors, 2);
        assert!(once.recall("b", key).is_none(), "another peer's");
    }

    #[test]
    fn what_is_old_goes_when_something_new_comes() {
        let (mut done, now) = (Done::default(), Instant::now());
        let key = |byte| RequestKey([byte; 16]);
        done.remember(now, key(1), outcome(1));
        done.remember(now + KEPT_FOR, key(2), outcome(2));
        assert!(done.outcomes.contains_key(&key(1)));
        let later = now + KEPT_FOR + Duration::from_secs(1);
        done.remember(later, key(3), outcome(3));
        assert!(!done.outcomes.contains_key(&key(1)));
        assert_eq!(done.outcomes.len(), 2);
    }

    #[test]
    fn a_bounded_number_is_kept_of_a_bounded_number_of_peers() {
        let once = Once::default();
        let key = |number: u64| {
            let mut key = [0; 16];
            key[..8].copy_from_slice(&number.to_ne_bytes());
            RequestKey(key)
        };
        for number in 0..KEPT_MAX as u64 + 1 {
            let done = once.commit("a", Some(key(number)), outcome(number), || Ok::<_, ()>(()));
            done.unwrap();
        }
        assert!(once.recall("a", key(0)).is_none());
        assert!(once.recall("a", key(1)).is_some());
        for number in 0..PEERS_MAX {
            let peer = number.to_string();
            let done = once.commit(&peer, Some(key(0)), outcome(0), || Ok::<_, ()>(()));
            done.unwrap();
        }
        assert!(once.recall("a", key(1)).is_none(), "silent longest");
        assert!(
            once.recall(&(PEERS_MAX - 1).to_string(), key(0)).is_some(),
            "the newest is remembered"
        );
        assert_eq!(once.0.lock().unwrap().len(), PEERS_MAX);
    }
}
