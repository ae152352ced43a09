//! Which path carries a session, and which did before.
//!
//! Read by whoever moves tensors, written by the session's steward. The
//! invariant: *a path that is lost is closed at this end before anybody can
//! learn of the next one*.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::path::Path;
use crate::negotiation::Refusal;

/// Changes that are remembered.
const CHANGES: usize = 16;

/// The path of a session over time.
#[derive(Debug)]
pub struct Route {
    stage: watch::Sender<Stage>,
    past: Mutex<Past>,
}

/// The path as it is now.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The one that carries the session, or the last one that did.
    pub path: Path,
    /// Better paths and why they are not taken.
    pub refused: Arc<[Refusal]>,
    /// Why and when it was lost, if none carries the session now.
    pub lost: Option<(Arc<str>, Instant)>,
}

/// A change of path.
#[derive(Clone, Debug)]
pub struct Change {
    /// The number of the new path.
    pub number: u32,
    /// The path before.
    pub from: String,
    /// The path since.
    pub to: String,
    /// Why.
    pub reason: Arc<str>,
    /// When.
    pub at: Instant,
    /// For how long no path carried the session, from when the loss was
    /// noticed at this end.
    pub gap: Duration,
}

#[derive(Debug, Default)]
struct Past {
    count: u64,
    changes: VecDeque<Change>,
}

impl Route {
    /// Begins with a path that was just opened.
    pub fn new(path: Path, refused: Vec<Refusal>) -> Self {
        Self {
            stage: watch::Sender::new(Stage {
                path,
                refused: refused.into(),
                lost: None,
            }),
            past: Mutex::default(),
        }
    }

    /// The path as it is now.
    pub fn stage(&self) -> Stage {
        self.stage.borrow().clone()
    }

    /// Sees every change.
    pub fn watch(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Gives path `number` up, once: closes it, so that what moves over it is
    /// interrupted. Says whether this was the first to notice.
    pub fn lose(&self, number: u32, reason: &str) -> bool {
        let mut lost = None;
        self.stage.send_if_modified(|stage| {
            let news = stage.path.number == number && stage.lost.is_none();
            if news {
                stage.lost = Some((reason.into(), Instant::now()));
                lost = Some(stage.path.clone());
                // Before anybody can see that it is lost.
                stage.path.endpoint.close(stage.path.session);
            }
            news
        });
        lost.is_some()
    }

    /// Takes `path` from now on; `why` counts if the one before was not lost,
    /// and is closed by this.
    pub fn change(&self, path: Path, refused: Vec<Refusal>, why: &str) -> Change {
        let mut change = None;
        self.stage.send_modify(|stage| {
            let before = std::mem::replace(
                stage,
                Stage {
                    path,
                    refused: refused.into(),
                    lost: None,
                },
            );
            let at = Instant::now();
            let (reason, since) = before.lost.unwrap_or_else(|| {
                before.path.endpoint.close(before.path.session);
                (why.into(), at)
            });
            change = Some(Change {
                number: stage.path.number,
                from: before.path.name,
                to: stage.path.name.clone(),
                reason,
                at,
                gap: at - since,
            });
        });
        let change = change.expect("send_modify calls once");
        let mut past = self.past();
        past.count += 1;
        if past.changes.len() == CHANGES {
            past.changes.pop_front();
        }
        past.changes.push_back(change.clone());
        change
    }

    /// How many changes there were, and the last of them.
    pub fn changes(&self) -> (u64, Vec<Change>) {
        let past = self.past();
        (past.count, past.changes.iter().cloned().collect())
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        // Nothing here panics while it holds the lock half-changed.
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
