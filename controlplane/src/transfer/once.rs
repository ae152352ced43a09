//! Puts that were done, so that one which is made again is not done twice.
//!
//! A session may be lost between a put's last step here and the message that
//! says so. Whoever tries again under the same key is told how the first one
//! ended. Kept are the last few hundred of each peer: a peer that tries again
//! does so within seconds.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use crate::message::{Outcome, RequestKey};

/// Puts remembered of each peer.
const KEPT: usize = 256;

/// Peers whose puts are remembered; of others nothing is.
const PEERS_MAX: usize = 1024;

/// What was done for peers.
#[derive(Debug, Default)]
pub struct Once(Mutex<HashMap<String, VecDeque<(RequestKey, Outcome)>>>);

impl Once {
    /// How `peer`'s put under `key` ended, if it was done.
    pub fn recall(&self, peer: &str, key: RequestKey) -> Option<Outcome> {
        let done = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        find(done.get(peer)?, key)
    }

    /// Does the last step of a put, unless one under the same key was done.
    pub fn commit<E>(
        &self,
        peer: &str,
        key: Option<RequestKey>,
        outcome: Outcome,
        commit: impl FnOnce() -> Result<(), E>,
    ) -> Result<Outcome, E> {
        let Some(key) = key else {
            return commit().map(|()| outcome);
        };
        // Held meanwhile: of two attempts that end at the same time one commits.
        let mut done = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = done.get(peer).and_then(|done| find(done, key)) {
            return Ok(first);
        }
        commit()?;
        if done.len() < PEERS_MAX || done.contains_key(peer) {
            let done = done.entry(peer.to_owned()).or_default();
            done.truncate(KEPT - 1);
            done.push_front((key, outcome));
        }
        Ok(outcome)
    }
}

fn find(done: &VecDeque<(RequestKey, Outcome)>, key: RequestKey) -> Option<Outcome> {
    let found = done.iter().find(|(one, _)| *one == key);
    found.map(|(_, outcome)| *outcome)
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
        let failed = once.commit("a", Some(key), outcome(1), || Err("full"));
        assert_eq!(failed.unwrap_err(), "full");
        assert!(once.recall("a", key).is_none());
        let first = once.commit("a", Some(key), outcome(2), || Ok::<_, ()>(()));
        assert_eq!(first.unwrap().tensors, 2);
        let again = once.commit("a", Some(key), outcome(3), || -> Result<(), ()> {
            panic!("it was done already")
        });
        assert_eq!(again.unwrap().tensors, 2);
        assert_eq!(once.recall("a", key).unwrap().tensors, 2);
        assert!(once.recall("b", key).is_none(), "another peer's");
    }

    #[test]
    fn a_bounded_number_is_kept_of_a_bounded_number_of_peers() {
        let once = Once::default();
        let key = |number: u64| {
            let mut key = [0; 16];
            key[..8].copy_from_slice(&number.to_ne_bytes());
            RequestKey(key)
        };
        for number in 0..KEPT as u64 + 1 {
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
        assert_eq!(once.0.lock().unwrap().len(), PEERS_MAX);
    }
}
