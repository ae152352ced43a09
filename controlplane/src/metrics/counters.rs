//! What the control plane counts for as long as an agent runs.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use genie_dataplane::ledger::Copies;

use crate::message::Outcome;
use crate::session::Session;

/// Peers that are told apart. Whoever comes later is counted as `other`: a
/// stranger with many names must not fill the memory of whoever scrapes.
const PEERS_MAX: usize = 1024;

/// Which way tensors moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// To a peer.
    Sent,
    /// From a peer.
    Received,
}

/// Tensors that moved in one request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// Bytes of them.
    pub bytes: u64,
    /// How many.
    pub tensors: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// What CPUs copied at this end.
    pub copies: Copies,
}

/// What moved over a path, to or from a peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Traffic {
    /// How the path is called.
    pub path: String,
    /// The peer's node name.
    pub peer: String,
    /// Which way.
    pub direction: Direction,
}

/// Counters of one agent.
#[derive(Debug, Default)]
pub struct Counters {
    moved: Mutex<BTreeMap<Traffic, Moved>>,
}

impl Counters {
    /// Counts what a request moved.
    pub fn add(&self, path: &str, peer: &str, direction: Direction, moved: Moved) {
        let mut all = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = Traffic {
            path: path.to_owned(),
            peer: peer.to_owned(),
            direction,
        };
        if !all.contains_key(&key) && all.len() >= PEERS_MAX {
            key.peer = "other".to_owned();
        }
        let total = all.entry(key).or_default();
        total.bytes += moved.bytes;
        total.tensors += moved.tensors;
        total.retransmits += moved.retransmits;
        total.copies.add(moved.copies);
    }

    /// Counts what a request of ours moved.
    pub fn dialled(&self, peer: &str, direction: Direction, moved: &genie_client::Moved) {
        let copies = match direction {
            Direction::Sent => moved.sent_copies,
            Direction::Received => moved.received_copies,
        };
        let counted = Moved {
            bytes: moved.bytes,
            tensors: moved.tensors,
            retransmits: moved.retransmits,
            copies,
        };
        self.add(&moved.path, peer, direction, counted);
    }

    /// Counts what a peer's request moved.
    pub fn served(&self, session: &Session, direction: Direction, outcome: &Outcome) {
        let counted = Moved {
            bytes: outcome.bytes,
            tensors: outcome.tensors,
            retransmits: outcome.retransmits,
            copies: outcome.copies,
        };
        self.add(&session.path_name(), &session.peer, direction, counted);
    }

    /// All of them.
    pub fn moved(&self) -> Vec<(Traffic, Moved)> {
        let all = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter()
            .map(|(key, moved)| (key.clone(), *moved))
            .collect()
    }
}

impl Direction {
    /// The label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Received => "received",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_adds_up_and_the_number_of_peers_is_bounded() {
        let counters = Counters::default();
        let moved = Moved {
            bytes: 10,
            tensors: 1,
            ..Moved::default()
        };
        for _ in 0..2 {
            counters.add("tcp", "b", Direction::Sent, moved);
        }
        let (traffic, total) = counters.moved().remove(0);
        assert_eq!(
            (traffic.peer.as_str(), total.bytes, total.tensors),
            ("b", 20, 2)
        );
        for stranger in 0..2 * PEERS_MAX {
            counters.add("tcp", &stranger.to_string(), Direction::Sent, moved);
        }
        let all = counters.moved();
        assert_eq!(all.len(), PEERS_MAX + 1);
        let bytes: u64 = all.iter().map(|(_, moved)| moved.bytes).sum();
        assert_eq!(bytes, 20 + 20 * PEERS_MAX as u64);
    }
}
