//! Notifications: small messages for the programs of this host that listen.
//!
//! Sent with a write, after its bytes were verified, or by themselves. A
//! listener hears of names under its prefix that its user may read, in the
//! order in which they came in. The invariant: *nobody who sends waits for a
//! listener*: a queue that is full loses what comes, and its listener is told
//! how much.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use genie_client::Owner;
use genie_client::protocol::{MESSAGE_MAX, Notification};
use tokio::sync::Notify;

use crate::store::may;

/// Notifications that wait for one listener: some megabytes at the most.
const QUEUE: usize = 1024;

/// Who listens on this node. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Notifications(Arc<Mutex<Vec<Weak<Queue>>>>);

/// Hears what comes in until it is dropped.
#[derive(Debug)]
pub struct Listener(Arc<Queue>);

#[derive(Debug)]
struct Queue {
    prefix: String,
    listener: Owner,
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    notifications: VecDeque<Notification>,
    lost: u64,
}

/// Too much was said.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("a notification of {0} bytes is too long: at most {MESSAGE_MAX}")]
pub struct LongMessage(pub usize);

/// Refuses a message that is too long.
pub fn check_message(message: &[u8]) -> Result<(), LongMessage> {
    if message.len() > MESSAGE_MAX {
        return Err(LongMessage(message.len()));
    }
    Ok(())
}

impl Notifications {
    /// From now on, what is told of names at or under `prefix`.
    pub fn listen(&self, prefix: String, listener: Owner) -> Listener {
        let queue = Arc::new(Queue {
            prefix,
            listener,
            waiting: Mutex::default(),
            wake: Notify::new(),
        });
        lock(&self.0).push(Arc::downgrade(&queue));
        Listener(queue)
    }

    /// Tells those who listen and may read what is `owner`'s; returns how many.
    pub fn tell(&self, name: &str, message: &[u8], from: &Owner, owner: &Owner) -> u64 {
        let mut told = 0;
        lock(&self.0).retain(|queue| {
            let Some(queue) = queue.upgrade() else {
                return false;
            };
            if queue.hears(name) && may(&queue.listener, owner) {
                told += u64::from(queue.push(name, message, from));
            }
            true
        });
        told
    }
}

impl Queue {
    fn hears(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&self.prefix);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    fn push(&self, name: &str, message: &[u8], from: &Owner) -> bool {
        let mut waiting = lock(&self.waiting);
        if waiting.notifications.len() >= QUEUE {
            waiting.lost += 1;
            return false;
        }
        let lost = std::mem::take(&mut waiting.lost);
        waiting.notifications.push_back(Notification {
            name: name.to_owned(),
            message: message.to_owned(),
            from: from.clone(),
            lost,
        });
        drop(waiting);
        self.wake.notify_one();
        true
    }
}

impl Listener {
    /// The next one, when it comes.
    pub async fn next(&self) -> Notification {
        loop {
            let next = lock(&self.0.waiting).notifications.pop_front();
            match next {
                Some(notification) => return notification,
                // A permit is kept for whoever looks after it was given.
                None => self.0.wake.notified().await,
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics while it holds a lock half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Owner = Owner::User(0);
    const ONE: Owner = Owner::User(1);
    const OTHER: Owner = Owner::User(2);

    #[tokio::test]
    async fn listeners_hear_their_names_in_order_and_only_what_they_may() {
        let all = Notifications::default();
        let listener = all.listen("a/b".into(), ONE);
        for (name, owner, told) in [
            ("a/b", &ONE, 1),
            ("a/b/c", &Owner::Peer("b".into()), 1),
            ("a/bc", &ONE, 0),
            ("a", &ONE, 0),
            ("a/b", &OTHER, 0),
        ] {
            assert_eq!(
                all.tell(name, name.as_bytes(), &ROOT, owner),
                told,
                "{name}"
            );
        }
        assert_eq!(listener.next().await.message, b"a/b");
        assert_eq!(listener.next().await.name, "a/b/c");
        drop(listener);
        assert_eq!(all.tell("a/b", b"", &ROOT, &ONE), 0);
        assert!(lock(&all.0).is_empty(), "who left is forgotten");
    }

    #[tokio::test]
    async fn a_full_queue_loses_what_comes_and_says_so() {
        let all = Notifications::default();
        let listener = all.listen("a".into(), ONE);
        for index in 0..QUEUE + 3 {
            let told = all.tell("a", &index.to_le_bytes(), &ONE, &ONE);
            assert_eq!(told, u64::from(index < QUEUE));
        }
        for index in 0..QUEUE {
            let next = listener.next().await;
            assert_eq!((next.message, next.lost), (index.to_le_bytes().to_vec(), 0));
        }
        all.tell("a", b"later", &ONE, &ONE);
        assert_eq!(listener.next().await.lost, 3);
    }
}
