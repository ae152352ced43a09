//! Staging: tensors in device memory move through pinned slots of host memory.
//!
//! Used by whoever moves tensors, beside the [`Endpoint`] that it hands the
//! slots to. A tensor longer than a slot is moved as several transfers, one for
//! each range of it, so that engines, bitmaps and digests know nothing of
//! devices; the CRC32C of the ranges combine into that of the tensor. While one
//! range is on the wire the next is copied, as many at a time as there are
//! slots:
//!
//! ```text
//!   device ──copy──▶ slot 0 ──wire──▶          sender: copies all that were
//!          ──copy──▶ slot 1 ──wire──▶          asked for at once are one batch
//!          ──copy──▶ slot 2 …
//! ```
//!
//! One thread owns the two streams, to the device and from it. Its invariant:
//! *a slot is used again only after both the engine and the device have let it
//! go*, however the transfer ends. Slots of the two directions are apart: a
//! sender never waits for a slot that a receiver holds, so two nodes that send
//! to each other cannot wait for each other's slots.

#![forbid(unsafe_code)]

mod flight;
mod place;
mod slots;
mod thread;

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

use genie_proto::{DigestBuilder, SessionId, TransferId};
use tokio::sync::oneshot;

use crate::endpoint::Endpoint;
use crate::engine::{FailReason, Full, Receipt};
use crate::memory::accelerator::{
    Accelerator, AcceleratorError, DeviceLease, ForeignEvent, MemoryKind, Way,
};
use crate::memory::{Backing, Lease, RegionError};
use flight::{Answer, Flight, Job};
pub use place::{Moving, Place};
use slots::{Arena, Slot, Slots};

/// How much host memory a stage takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Length of a slot in bytes, and so of the longest transfer. One huge page:
    /// long enough that a copy's fixed cost does not show beside its bytes.
    pub slot_bytes: usize,
    /// Slots for each direction: how many ranges are between device and wire.
    pub slots: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            slot_bytes: 2 << 20,
            slots: 16,
        }
    }
}

/// The memory that a device's slots lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotMemory {
    /// Its length in bytes, all slots of both directions.
    pub bytes: usize,
    /// Its pages.
    pub backing: Backing,
    /// Why it is not on huge pages: there are none, or the device's driver does
    /// not register them.
    pub reason: Option<String>,
}

/// Why a stage could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No host memory for slots.
    #[error("no memory for the slots of {kind}")]
    Memory {
        /// For which device.
        kind: MemoryKind,
        /// Why.
        source: RegionError,
    },
    /// The device refused slots or streams.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
    /// The kernel refused a thread.
    #[error("cannot start the thread of {kind}")]
    Thread {
        /// For which device.
        kind: MemoryKind,
        /// Why.
        source: std::io::Error,
    },
}

/// Why a staged transfer failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum StageError {
    /// Its engine, its session or its peer.
    #[error(transparent)]
    Wire(#[from] FailReason),
    /// The device. The session goes on.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
}

/// Moves tensors of one device. Any thread may use it.
///
/// Its thread ends with it; what is under way then fails.
#[derive(Debug)]
pub struct Stage {
    accelerator: Arc<dyn Accelerator>,
    config: Config,
    memory: SlotMemory,
    outgoing: Slots,
    incoming: Slots,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    unpark: Thread,
    trace: Trace,
    broken: Arc<OnceLock<AcceleratorError>>,
}

/// A staged transfer, or a copy, under way.
///
/// Dropping it asks the engine to give the transfer up.
#[derive(Debug)]
#[must_use = "dropping it cancels the transfer"]
pub struct Staged<T = Receipt> {
    answer: Option<oneshot::Receiver<Result<T, StageError>>>,
    unpark: Thread,
    kind: MemoryKind,
}

/// When a range was copied, or was with the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The transfer of the range; none of a copy without one.
    pub transfer: Option<TransferId>,
    /// What was done.
    pub step: Step,
    /// When it was begun.
    pub begin: Instant,
    /// When it was seen to have ended.
    pub end: Instant,
}

/// What is done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A copy between slot and device.
    Copy(Way),
    /// The transfer between slot and peer.
    Wire,
}

/// A record of what a stage did, where one was asked for.
#[derive(Clone, Debug, Default)]
pub struct Trace(Option<Arc<Mutex<Vec<Span>>>>);

impl Stage {
    /// Takes and pins slots for a device and starts its thread.
    pub fn start(
        accelerator: Arc<dyn Accelerator>,
        config: Config,
        trace: Trace,
    ) -> Result<Self, StartError> {
        let kind = accelerator.properties().kind;
        let arena = Arena::new(&accelerator, config)?;
        let outgoing = Slots::new(&arena, config, 0);
        let incoming = Slots::new(&arena, config, 1);
        let (jobs, queue) = mpsc::channel();
        let broken = Arc::default();
        let thread = thread::spawn(&accelerator, queue, trace.clone(), Arc::clone(&broken))
            .map_err(|source| StartError::Thread { kind, source })??;
        let unpark = thread.thread().clone();
        Ok(Self {
            accelerator,
            config,
            memory: arena.info(),
            outgoing,
            incoming,
            jobs: Some(jobs),
            thread: Some(thread),
            unpark,
            trace,
            broken,
        })
    }

    /// The device.
    pub fn accelerator(&self) -> &Arc<dyn Accelerator> {
        &self.accelerator
    }

    /// The longest transfer that it takes, in bytes.
    pub fn slot_bytes(&self) -> usize {
        self.config.slot_bytes
    }

    /// Where its slots are.
    pub fn slot_memory(&self) -> &SlotMemory {
        &self.memory
    }

    /// Why nothing can be done with the device any more; none while something can.
    pub fn broken(&self) -> Option<&AcceleratorError> {
        self.broken.get()
    }

    /// How many slots are free for what is sent, or received.
    fn free(&self, way: Way) -> usize {
        match way {
            Way::ToHost => self.outgoing.available(),
            Way::ToDevice => self.incoming.available(),
        }
    }

    /// What it did so far, where that is recorded; empties the record.
    pub fn take_trace(&self) -> Vec<Span> {
        self.trace.take()
    }

    /// Expects a transfer into `into`, at most a slot long. Waits for a slot.
    pub async fn receive(
        &self,
        endpoint: &Endpoint,
        session: SessionId,
        into: DeviceLease,
    ) -> Result<(TransferId, Staged), StageError> {
        let slot = self.incoming.acquire().await;
        let host = slot.lease(into.len());
        let (id, transfer) = endpoint.receive(session, host).await?;
        Ok((id, self.expect(slot, id, transfer, into)))
    }

    /// [`Stage::receive`], refused where it would wait.
    pub fn try_receive(
        &self,
        endpoint: &Endpoint,
        session: SessionId,
        into: DeviceLease,
    ) -> Result<Result<(TransferId, Staged), StageError>, Full<DeviceLease>> {
        let Some(slot) = self.incoming.try_acquire() else {
            return Err(Full(into));
        };
        let host = slot.lease(into.len());
        match endpoint.try_receive(session, host) {
            Ok(Ok((id, transfer))) => Ok(Ok((id, self.expect(slot, id, transfer, into)))),
            Ok(Err(reason)) => Ok(Err(reason.into())),
            Err(Full(_)) => Err(Full(into)),
        }
    }

    /// Sends `from`, at most a slot long, as the transfer that the peer granted
    /// under `transfer`. Waits for a slot.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        session: SessionId,
        transfer: TransferId,
        from: DeviceLease,
    ) -> Staged {
        let slot = self.outgoing.acquire().await;
        self.submit(|answer| {
            let host = slot.lease(from.len());
            let endpoint = endpoint.clone();
            Flight::send(slot, host, from, endpoint, session, transfer, answer)
        })
    }

    /// [`Stage::send`] of what the receiver still lacks of it.
    pub async fn resume_send(
        &self,
        endpoint: &Endpoint,
        session: SessionId,
        transfer: TransferId,
        from: DeviceLease,
        missing: Vec<Range<u64>>,
    ) -> Staged {
        let slot = self.outgoing.acquire().await;
        self.submit(|answer| {
            let host = slot.lease(from.len());
            let endpoint = endpoint.clone();
            Flight::send(slot, host, from, endpoint, session, transfer, answer).resuming(missing)
        })
    }

    /// Makes copies one way that are asked for from now on wait for an event of
    /// the program's: those to the host until a tensor to be sent is computed,
    /// those to the device until the memory is no longer read.
    ///
    /// All tensors share the two streams, so it keeps others waiting too. Returns
    /// when the device knows; what was asked for before may wait as well.
    pub async fn wait_for(&self, way: Way, event: ForeignEvent) -> Result<(), StageError> {
        let order = |answer| Job::WaitFor { way, event, answer };
        self.ask(order).await
    }

    /// Signals an event of the program's once all copies one way are done that
    /// were asked for until now: the memory that was sent may be written, or what
    /// was received is there.
    ///
    /// Resolves when the device was told, which is when the last of these copies
    /// was begun, or failed; an event says nothing of errors.
    pub async fn signal(&self, way: Way, event: ForeignEvent) -> Result<(), StageError> {
        let order = |answer| Job::Signal { way, event, answer };
        self.ask(order).await
    }

    /// Copies host memory to the device, through slots. Waits for them.
    ///
    /// Returns the CRC32C of the bytes that went, however the source changed
    /// meanwhile.
    pub async fn upload(&self, from: &Lease, to: &DeviceLease) -> Result<u32, StageError> {
        let len = from.len().min(to.len());
        let mut digest = DigestBuilder::new(len as u64);
        let mut pending = VecDeque::new();
        for range in ranges(len, self.config.slot_bytes) {
            let (slot, bytes) = (self.outgoing.acquire().await, range.end - range.start);
            let host = slot.lease(bytes as usize);
            let view = from.view(range.start as usize..range.end as usize);
            let crc = host.place(0, view.expect("cut from its own length"));
            digest.add(range.start, bytes, crc);
            let device = to.slice(range).expect("cut from its own length");
            let copy = |answer| Flight::copy(slot, host, device, Way::ToDevice, answer);
            pending.push_back(self.submit(copy));
            if pending.len() == self.config.slots {
                pending.pop_front().expect("it is not empty").await?;
            }
        }
        for staged in pending {
            staged.await?;
        }
        Ok(digest.finish().0)
    }

    /// Copies device memory to the host's, through slots. Waits for them.
    ///
    /// Returns the CRC32C of the bytes that came.
    pub async fn download(&self, from: &DeviceLease, to: &Lease) -> Result<u32, StageError> {
        let len = from.len().min(to.len());
        let mut digest = DigestBuilder::new(len as u64);
        let mut pending = VecDeque::new();
        let mut ranges = ranges(len, self.config.slot_bytes).peekable();
        loop {
            // As many as there are slots free, but at least one at a time.
            while ranges.peek().is_some() {
                let slot = match self.incoming.try_acquire() {
                    Some(slot) => slot,
                    None if pending.is_empty() => self.incoming.acquire().await,
                    None => break,
                };
                let range = ranges.next().expect("it was looked at");
                let host = slot.lease((range.end - range.start) as usize);
                let device = from.slice(range.clone()).expect("cut from its own length");
                let (kept, share) = (host.clone(), slot.share());
                let copy = |answer| Flight::copy(slot, host, device, Way::ToHost, answer);
                pending.push_back((range, kept, share, self.submit(copy)));
            }
            let Some((range, host, slot, staged)) = pending.pop_front() else {
                return Ok(digest.finish().0);
            };
            staged.await?;
            let view = host.view(0..host.len()).expect("all of it");
            let crc = to.place(range.start as usize, view);
            digest.add(range.start, range.end - range.start, crc);
            drop((host, slot));
        }
    }

    fn expect(
        &self,
        slot: Slot,
        id: TransferId,
        transfer: crate::endpoint::Transfer,
        into: DeviceLease,
    ) -> Staged {
        self.submit(|answer| {
            let host = slot.lease(into.len());
            Flight::receive(slot, host, into, id, transfer, answer)
        })
    }

    fn submit<T>(&self, flight: impl FnOnce(Answer<T>) -> Flight) -> Staged<T> {
        self.ask(|answer| Job::Move(flight(answer)))
    }

    fn ask<T>(&self, job: impl FnOnce(Answer<T>) -> Job) -> Staged<T> {
        let (answer, answered) = oneshot::channel();
        let jobs = self.jobs.as_ref().expect("it is taken in `drop` only");
        // A thread that has ended has dropped its end: the answer says so.
        let _ = jobs.send(job(answer));
        self.unpark.unpark();
        Staged {
            answer: Some(answered),
            unpark: self.unpark.clone(),
            kind: self.accelerator.properties().kind,
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.jobs = None;
        self.unpark.unpark();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of device copies panicked");
        }
    }
}

impl<T> Future for Staged<T> {
    type Output = Result<T, StageError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let kind = self.kind;
        let Some(answer) = &mut self.answer else {
            return Poll::Pending;
        };
        let answered = std::task::ready!(Pin::new(answer).poll(context));
        self.answer = None;
        Poll::Ready(answered.unwrap_or(Err(AcceleratorError::Stopped(kind).into())))
    }
}

impl<T> Staged<T> {
    /// Blocks until it ended. Not for asynchronous code.
    pub fn wait(mut self) -> Result<T, StageError> {
        let stopped = Err(AcceleratorError::Stopped(self.kind).into());
        match self.answer.take() {
            Some(answer) => answer.blocking_recv().unwrap_or(stopped),
            None => stopped,
        }
    }
}

impl<T> Drop for Staged<T> {
    fn drop(&mut self) {
        if self.answer.take().is_some() {
            // It sees that nobody waits any more.
            self.unpark.unpark();
        }
    }
}

impl Trace {
    /// A record that is kept.
    pub fn kept() -> Self {
        Self(Some(Arc::default()))
    }

    fn add(&self, transfer: Option<TransferId>, step: Step, begin: Instant) {
        if let Some(spans) = &self.0 {
            let span = Span {
                transfer,
                step,
                begin,
                end: Instant::now(),
            };
            spans
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(span);
        }
    }

    fn take(&self) -> Vec<Span> {
        let spans = self.0.as_ref();
        spans.map_or_else(Vec::new, |spans| {
            std::mem::take(&mut *spans.lock().unwrap_or_else(PoisonError::into_inner))
        })
    }
}

/// The ranges of at most `step` bytes that `len` bytes are moved in: one that is
/// empty if there are none at all.
pub fn ranges(len: usize, step: usize) -> Ranges {
    Ranges {
        next: Some(0),
        len: len as u64,
        step: step.max(1) as u64,
    }
}

/// See [`ranges`].
#[derive(Clone, Debug)]
pub struct Ranges {
    next: Option<u64>,
    len: u64,
    step: u64,
}

impl Iterator for Ranges {
    type Item = std::ops::Range<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.next?;
        let end = self.len.min(start + self.step);
        self.next = (end < self.len).then_some(end);
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_everything_once() {
        let all = |len, step| {
            let ends = ranges(len, step).map(|range| (range.start, range.end));
            ends.collect::<Vec<_>>()
        };
        assert_eq!(all(0, 4), [(0, 0)]);
        assert_eq!(all(4, 4), [(0, 4)]);
        assert_eq!(all(9, 4), [(0, 4), (4, 8), (8, 9)]);
    }
}
