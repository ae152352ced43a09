//! A ring between two threads whose receiver may sleep.
//!
//! `rtrb` carries the values, `genie_wake` decides whether the other side must
//! be woken, and an eventfd is what it sleeps on. A full ring refuses and gives
//! the value back.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use genie_wake::Handshake;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// The ring is full; the value comes back.
#[derive(Debug, PartialEq, Eq)]
pub struct Full<T>(pub T);

/// The sending end. Belongs to one thread at a time.
#[derive(Debug)]
pub struct Sender<T> {
    // Dropped in this order: the receiver must find the ring abandoned when the
    // farewell wakes it.
    ring: rtrb::Producer<T>,
    bell: Farewell,
}

/// Wakes the receiver when the sender is gone: nothing more will come.
#[derive(Debug)]
struct Farewell(Arc<Bell>);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.ring();
    }
}

/// The receiving end. Belongs to one thread at a time.
#[derive(Debug)]
pub struct Receiver<T> {
    ring: rtrb::Consumer<T>,
    bell: Arc<Bell>,
}

/// What wakes a thread that sleeps, by whoever puts something into its rings.
#[derive(Debug)]
pub(super) struct Bell {
    handshake: Handshake,
    eventfd: OwnedFd,
}

/// Makes a ring for `capacity` values.
pub fn ring<T>(capacity: usize) -> rustix::io::Result<(Sender<T>, Receiver<T>)> {
    let (producer, consumer) = rtrb::RingBuffer::new(capacity);
    let bell = Arc::new(Bell::new()?);
    Ok((
        Sender {
            ring: producer,
            bell: Farewell(Arc::clone(&bell)),
        },
        Receiver {
            ring: consumer,
            bell,
        },
    ))
}

impl<T> Sender<T> {
    /// Puts a value into the ring and wakes the receiver if it sleeps.
    pub fn try_send(&mut self, value: T) -> Result<(), Full<T>> {
        match self.ring.push(value) {
            Ok(()) => {
                self.bell.0.ring_if_asleep();
                Ok(())
            }
            Err(rtrb::PushError::Full(value)) => Err(Full(value)),
        }
    }

    /// Whether the receiver is gone.
    pub fn is_abandoned(&self) -> bool {
        abandoned(self.ring.is_abandoned())
    }
}

impl<T> Receiver<T> {
    /// Takes the oldest value, if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        self.ring.pop().ok()
    }

    /// Whether the sender is gone and nothing is left.
    pub fn is_closed(&self) -> bool {
        abandoned(self.ring.is_abandoned()) && self.ring.is_empty()
    }

    /// Announces sleep on [`AsFd`]; returns `false`, and takes it back, if a
    /// value is there or the sender is gone.
    ///
    /// After `true` the caller blocks until the descriptor is readable (or
    /// something else happens) and then calls [`Receiver::finish_sleep`].
    pub fn prepare_sleep(&mut self) -> bool {
        self.bell.handshake.prepare_sleep();
        if self.ring.is_empty() && !abandoned(self.ring.is_abandoned()) {
            return true;
        }
        self.finish_sleep();
        false
    }

    /// Ends what [`Receiver::prepare_sleep`] began.
    pub fn finish_sleep(&mut self) {
        self.bell.handshake.finish_sleep();
        // Clears the counter; EAGAIN when nobody rang is the usual case.
        let _ = rustix::io::read(&self.bell.eventfd, &mut [0u8; 8]);
    }

    /// Sleeps until a value is there, the sender is gone, or `limit` is over.
    pub fn wait(&mut self, limit: Duration) {
        if self.prepare_sleep() {
            let limit = Timespec::try_from(limit).unwrap_or(Timespec {
                tv_sec: 3600,
                tv_nsec: 0,
            });
            let mut fds = [PollFd::new(&self.bell.eventfd, PollFlags::IN)];
            // EINTR only ends the sleep early; callers look at the ring again.
            let _ = rustix::event::poll(&mut fds, Some(&limit));
            self.finish_sleep();
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl<T> AsFd for Receiver<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.eventfd.as_fd()
    }
}

/// Orders what the other end did before it left before what we look at next;
/// `rtrb` leaves that to its user.
fn abandoned(seen: bool) -> bool {
    if seen {
        fence(Ordering::Acquire);
    }
    seen
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        // What was not taken goes now, not when the sender goes too.
        while self.try_recv().is_some() {}
    }
}

/// A sending end that never refuses: what does not fit waits its turn here.
///
/// For an engine, which must neither block nor lose a completion. The backlog
/// is bounded by the operations that users may have outstanding.
#[derive(Debug)]
pub struct Outbox<T> {
    sender: Sender<T>,
    backlog: VecDeque<T>,
}

impl<T> Outbox<T> {
    /// Wraps a sending end.
    pub fn new(sender: Sender<T>) -> Self {
        Self {
            sender,
            backlog: VecDeque::new(),
        }
    }

    /// Sends a value now, or at a later [`Outbox::flush`].
    pub fn push(&mut self, value: T) {
        self.backlog.push_back(value);
        self.flush();
    }

    /// Sends as much of the backlog as fits.
    pub fn flush(&mut self) {
        while let Some(value) = self.backlog.pop_front() {
            if let Err(Full(value)) = self.sender.try_send(value) {
                self.backlog.push_front(value);
                return;
            }
        }
    }

    /// Whether everything was sent.
    pub fn is_empty(&self) -> bool {
        self.backlog.is_empty()
    }
}

impl Bell {
    pub(super) fn new() -> rustix::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            handshake: Handshake::new(),
            eventfd: rustix::event::eventfd(0, flags)?,
        })
    }

    /// Announces sleep; the rings must be looked at once more after this.
    pub(super) fn prepare_sleep(&self) {
        self.handshake.prepare_sleep();
    }

    /// Ends what [`Bell::prepare_sleep`] began. The descriptor stays readable
    /// once it was: for whoever waits for edges.
    pub(super) fn finish_sleep(&self) {
        self.handshake.finish_sleep();
    }

    /// To be called after something was put into a ring.
    pub(super) fn ring_if_asleep(&self) {
        if self.handshake.must_wake() {
            self.ring();
        }
    }

    fn ring(&self) {
        // The only possible failure is a counter at its maximum, which is readable.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_gives_the_value_back() {
        let (mut sender, mut receiver) = ring(1).unwrap();
        sender.try_send("a").unwrap();
        assert_eq!(sender.try_send("b"), Err(Full("b")));
        assert_eq!(receiver.try_recv(), Some("a"));
        assert_eq!(receiver.try_recv(), None);
    }

    #[test]
    fn a_receiver_that_sleeps_learns_that_the_sender_is_gone() {
        for _ in 0..200 {
            let (sender, mut receiver) = ring::<u8>(1).unwrap();
            let thread = std::thread::spawn(move || {
                while !receiver.is_closed() {
                    // Long enough that a missed farewell fails the test run.
                    receiver.wait(Duration::from_secs(600));
                }
            });
            std::thread::yield_now();
            drop(sender);
            thread.join().unwrap();
        }
    }

    #[test]
    fn every_value_reaches_a_receiver_that_sleeps_between_them() {
        const COUNT: u64 = 20_000;
        let (mut sender, mut receiver) = ring(8).unwrap();
        let thread = std::thread::spawn(move || {
            let mut next = 0;
            while !receiver.is_closed() {
                match receiver.try_recv() {
                    Some(value) => {
                        assert_eq!(value, next);
                        next += 1;
                    }
                    // Long enough that a lost wake-up fails the test below.
                    None => receiver.wait(Duration::from_secs(600)),
                }
            }
            next
        });
        for value in 0..COUNT {
            let mut value = value;
            while let Err(Full(back)) = sender.try_send(value) {
                value = back;
                std::thread::yield_now();
            }
        }
        drop(sender);
        assert_eq!(thread.join().unwrap(), COUNT);
    }
}
