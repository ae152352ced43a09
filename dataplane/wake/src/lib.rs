//! The sleep and wake-up handshake between two threads that share a ring.
//!
//! The producer of a ring must wake its consumer when that sleeps, and only
//! then: a system call for every push would cost more than the push. This
//! crate owns the one invariant that makes it safe: *a consumer that sleeps
//! with something in its ring is woken*. It is a store and a load on each side
//! of a sequentially consistent fence (Dekker's handshake); the ring and the
//! descriptor that is slept on belong to the caller.
//!
//! ```text
//!   producer                        consumer
//!   push(value)                     handshake.prepare_sleep()
//!   if handshake.must_wake()        if ring.is_empty() { block on descriptor }
//!      { signal the descriptor }    handshake.finish_sleep()
//! ```
//!
//! The model is checked under loom: `RUSTFLAGS="--cfg loom" cargo test -p genie-wake --release`.

#![forbid(unsafe_code)]

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Says whether the consumer of a ring sleeps.
///
/// Shared by one consumer and any number of producers.
#[derive(Debug)]
pub struct Handshake {
    sleeping: AtomicBool,
}

impl Handshake {
    /// Creates a handshake whose consumer is awake.
    pub fn new() -> Self {
        Self {
            sleeping: AtomicBool::new(false),
        }
    }

    /// Consumer: announces that it is about to sleep.
    ///
    /// The ring must be looked at once more after this and before blocking.
    pub fn prepare_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Consumer: says that it is awake, whether it blocked or not.
    pub fn finish_sleep(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Producer, after a push: whether the consumer must be woken.
    ///
    /// Answers `true` to one producer for each sleep.
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        // The plain load keeps the cache line shared while nobody sleeps.
        self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::Relaxed)
    }
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    /// A push is seen before the consumer blocks, or the consumer is woken.
    #[test]
    fn no_push_is_slept_through() {
        loom::model(|| {
            let handshake = Arc::new(Handshake::new());
            let ring = Arc::new(AtomicUsize::new(0));
            let signals = Arc::new(AtomicUsize::new(0));
            let producer = {
                let (handshake, ring, signals) = (
                    Arc::clone(&handshake),
                    Arc::clone(&ring),
                    Arc::clone(&signals),
                );
                thread::spawn(move || {
                    ring.store(1, Ordering::Release);
                    if handshake.must_wake() {
                        signals.fetch_add(1, Ordering::Release);
                    }
                })
            };
            handshake.prepare_sleep();
            let slept_on_empty = ring.load(Ordering::Acquire) == 0;
            producer.join().unwrap();
            if slept_on_empty {
                assert_eq!(signals.load(Ordering::Acquire), 1, "slept through a push");
            }
            handshake.finish_sleep();
        });
    }

    /// Two producers cause one signal for one sleep.
    #[test]
    fn one_sleep_is_woken_once() {
        loom::model(|| {
            let handshake = Arc::new(Handshake::new());
            handshake.prepare_sleep();
            let other = {
                let handshake = Arc::clone(&handshake);
                thread::spawn(move || handshake.must_wake() as usize)
            };
            let mine = handshake.must_wake() as usize;
            assert_eq!(mine + other.join().unwrap(), 1);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wakes_only_a_sleeper_and_only_once() {
        let handshake = Handshake::new();
        assert!(!handshake.must_wake());
        handshake.prepare_sleep();
        assert!(handshake.must_wake());
        assert!(!handshake.must_wake());
        handshake.prepare_sleep();
        handshake.finish_sleep();
        assert!(!handshake.must_wake());
    }
}
