//! The API: hand tensors to an engine and await proof that they arrived.
//!
//! Used by the control plane, the tests and the benchmarks; any thread may use
//! an [`Endpoint`]. One endpoint stands before one engine. Its invariant: *every
//! operation it accepts is answered exactly once*, also when the engine ends,
//! and a [`Transfer`] that is dropped frees nothing the engine still uses: the
//! lease went to the engine with the command.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use genie_proto::{Incoming, Integrity, Outgoing, SessionId, TransferId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::engine::ring::{self, Full, Receiver, Sender};
use crate::engine::{
    Command, Completion, FailReason, Interrupted, OpenError, OperationId, Partial, Receipt, Remote,
    Status,
};
use crate::memory::Lease;

/// The most operations an endpoint has outstanding; one more waits or is refused.
pub const OPERATIONS_MAX: usize = 4096;

/// A handle on one engine. Clones refer to the same one.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

/// The answers of one engine; dispatched by whoever holds this.
#[derive(Debug)]
pub struct Completions {
    ring: Receiver<Completion>,
    shared: Arc<Shared>,
    lost: mpsc::UnboundedSender<Lost>,
}

/// An engine that was started, and all that belongs to it.
#[derive(Debug)]
pub struct Running {
    /// What to talk to.
    pub endpoint: Endpoint,
    /// Its answers; somebody must dispatch them.
    pub completions: Completions,
    /// Sessions that ended without being closed.
    pub lost: mpsc::UnboundedReceiver<Lost>,
    /// What it publishes about itself.
    pub status: Status,
    /// Its thread; ends after [`Endpoint::stop`].
    pub thread: std::thread::JoinHandle<()>,
}

/// A session that ended without being closed.
#[derive(Clone, Debug)]
pub struct Lost {
    /// Its local id.
    pub session: SessionId,
    /// Why it ended.
    pub reason: FailReason,
}

/// What an engine's thread is given. Dropped in this order when the thread
/// ends: a command that was not taken is then refused, not left unanswered.
#[derive(Debug)]
pub struct EnginePorts {
    /// What to do.
    pub commands: Receiver<Command>,
    /// Where to answer.
    pub completions: Sender<Completion>,
}

/// A transfer under way; resolves to proof that both ends verified it.
///
/// Dropping it asks the engine to give the transfer up.
#[derive(Debug)]
#[must_use = "dropping a transfer cancels it"]
pub struct Transfer {
    answer: oneshot::Receiver<Answer>,
    endpoint: Endpoint,
    session: SessionId,
    transfer: TransferId,
    outgoing: bool,
    done: bool,
    interrupted: Option<Box<Interrupted>>,
}

/// How a transfer ended, and what had moved if its session ended.
type Answer = (Result<Receipt, FailReason>, Option<Box<Interrupted>>);

#[derive(Debug)]
struct Shared {
    /// None once the engine has ended, so that nothing stays in the ring.
    commands: Mutex<Option<Sender<Command>>>,
    waiting: Mutex<HashMap<OperationId, Waiting>>,
    sessions: Mutex<HashMap<SessionId, Slots>>,
    permits: Arc<Semaphore>,
    next_operation: AtomicU64,
}

#[derive(Debug)]
enum Waiting {
    Open(oneshot::Sender<Result<Duration, OpenError>>),
    Transfer {
        answer: oneshot::Sender<Answer>,
        /// The slot to give back, for a transfer we receive.
        slot: Option<(SessionId, TransferId)>,
        _permit: OwnedSemaphorePermit,
    },
}

impl Endpoint {
    /// Makes an endpoint, what its engine needs, and the answers' end.
    ///
    /// `Lost` sessions arrive on the channel returned last.
    pub fn new() -> rustix::io::Result<(
        Self,
        Completions,
        EnginePorts,
        mpsc::UnboundedReceiver<Lost>,
    )> {
        // Each operation may be followed by one cancellation; closes and opens
        // are few. A full ring makes the caller try again, so this only has to
        // be ample, not exact.
        let (commands, engine_commands) = ring::ring(2 * OPERATIONS_MAX + 64)?;
        let (engine_completions, completions) = ring::ring(OPERATIONS_MAX + 64)?;
        let shared = Arc::new(Shared {
            commands: Mutex::new(Some(commands)),
            waiting: Mutex::default(),
            sessions: Mutex::default(),
            permits: Arc::new(Semaphore::new(OPERATIONS_MAX)),
            next_operation: AtomicU64::new(1),
        });
        let (lost, lost_receiver) = mpsc::unbounded_channel();
        let completions = Completions {
            ring: completions,
            shared: Arc::clone(&shared),
            lost,
        };
        let ports = EnginePorts {
            commands: engine_commands,
            completions: engine_completions,
        };
        Ok((Self { shared }, completions, ports, lost_receiver))
    }

    /// Chooses an id for a new session: what the peer will put into its packets.
    pub fn new_session(&self, random: u32) -> SessionId {
        let mut sessions = lock(&self.shared.sessions);
        let mut id = random.max(1);
        while sessions.contains_key(&SessionId(id)) {
            id = id.wrapping_add(1).max(1);
        }
        sessions.insert(SessionId(id), Slots::default());
        SessionId(id)
    }

    /// Opens a path to the peer; resolves once a packet went there and back.
    pub async fn open(&self, session: SessionId, remote: Remote) -> Result<Duration, OpenError> {
        self.open_with(session, remote, Integrity::Digest).await
    }

    /// [`Endpoint::open`], for a session whose transfers are under checksums or
    /// not: the other end must open it with the same. Without, a transfer that
    /// succeeded was applied, and nobody compared its bytes; no other session
    /// can go on with one that was interrupted.
    pub async fn open_with(
        &self,
        session: SessionId,
        remote: Remote,
        integrity: Integrity,
    ) -> Result<Duration, OpenError> {
        let (answer, answered) = oneshot::channel();
        let operation = self.expect_answer(Waiting::Open(answer));
        if self
            .command(Command::Open {
                operation,
                session,
                remote,
                integrity,
            })
            .is_err()
        {
            lock(&self.shared.waiting).remove(&operation);
            return Err(OpenError::Stopped);
        }
        answered.await.unwrap_or(Err(OpenError::Stopped))
    }

    /// Expects a transfer into `into`; its length is what the peer is granted.
    ///
    /// The id is for the peer to quote. Waits while [`OPERATIONS_MAX`] are outstanding.
    pub async fn receive(
        &self,
        session: SessionId,
        into: Lease,
    ) -> Result<(TransferId, Transfer), FailReason> {
        let permit = self.permit().await;
        self.start_receive(session, into, None, permit)
    }

    /// [`Endpoint::receive`], going on from what another path brought:
    /// [`Partial::prepare`] has said what the sender is to be asked for.
    pub async fn resume_receive(
        &self,
        session: SessionId,
        into: Lease,
        partial: Box<Partial<Incoming>>,
    ) -> Result<(TransferId, Transfer), FailReason> {
        let permit = self.permit().await;
        self.start_receive(session, into, Some(partial), permit)
    }

    /// Sends `from` as the transfer the peer granted under `transfer`.
    ///
    /// Waits while [`OPERATIONS_MAX`] are outstanding.
    pub async fn send(
        &self,
        session: SessionId,
        transfer: TransferId,
        from: Lease,
    ) -> Result<Transfer, FailReason> {
        let permit = self.permit().await;
        self.start_send(session, transfer, from, None, permit)
    }

    /// [`Endpoint::send`], going on from what another path carried:
    /// [`Partial::prepare`] was told what the receiver lacks.
    pub async fn resume_send(
        &self,
        session: SessionId,
        transfer: TransferId,
        from: Lease,
        partial: Box<Partial<Outgoing>>,
    ) -> Result<Transfer, FailReason> {
        let permit = self.permit().await;
        self.start_send(session, transfer, from, Some(partial), permit)
    }

    /// [`Endpoint::receive`], refused where it would wait.
    pub fn try_receive(
        &self,
        session: SessionId,
        into: Lease,
    ) -> Result<Result<(TransferId, Transfer), FailReason>, Full<Lease>> {
        match Arc::clone(&self.shared.permits).try_acquire_owned() {
            Ok(permit) => Ok(self.start_receive(session, into, None, permit)),
            Err(_) => Err(Full(into)),
        }
    }

    /// [`Endpoint::send`], refused where it would wait.
    pub fn try_send(
        &self,
        session: SessionId,
        transfer: TransferId,
        from: Lease,
    ) -> Result<Result<Transfer, FailReason>, Full<Lease>> {
        match Arc::clone(&self.shared.permits).try_acquire_owned() {
            Ok(permit) => Ok(self.start_send(session, transfer, from, None, permit)),
            Err(_) => Err(Full(from)),
        }
    }

    /// [`Endpoint::resume_send`], refused where it would wait.
    pub fn try_resume_send(
        &self,
        session: SessionId,
        transfer: TransferId,
        from: Lease,
        partial: Box<Partial<Outgoing>>,
    ) -> Result<Result<Transfer, FailReason>, Full<Lease>> {
        match Arc::clone(&self.shared.permits).try_acquire_owned() {
            Ok(permit) => Ok(self.start_send(session, transfer, from, Some(partial), permit)),
            Err(_) => Err(Full(from)),
        }
    }

    /// How many operations it would still take.
    pub fn free(&self) -> usize {
        self.shared.permits.available_permits()
    }

    /// Closes a session; what is under way in it fails.
    pub fn close(&self, session: SessionId) {
        lock(&self.shared.sessions).remove(&session);
        // An engine that has ended has closed everything.
        let _ = self.command(Command::Close { session });
    }

    /// Asks the engine to end; its thread is joined by whoever spawned it.
    pub fn stop(&self) {
        let _ = self.command(Command::Stop);
    }

    fn start_receive(
        &self,
        session: SessionId,
        into: Lease,
        resume: Option<Box<Partial<Incoming>>>,
        permit: OwnedSemaphorePermit,
    ) -> Result<(TransferId, Transfer), FailReason> {
        if !into.region().is_writable() {
            return Err(FailReason::Refused(
                "the destination may only be read".into(),
            ));
        }
        let transfer = match lock(&self.shared.sessions).get_mut(&session) {
            Some(slots) => slots.take(),
            None => return Err(FailReason::Closed),
        };
        let (answer, answered) = oneshot::channel();
        let slot = Some((session, transfer));
        let operation = self.expect_answer(Waiting::Transfer {
            answer,
            slot,
            _permit: permit,
        });
        let command = Command::Receive {
            operation,
            session,
            transfer,
            into,
            resume,
        };
        self.begin(operation, command)?;
        Ok((transfer, self.transfer(answered, session, transfer, false)))
    }

    fn start_send(
        &self,
        session: SessionId,
        transfer: TransferId,
        from: Lease,
        resume: Option<Box<Partial<Outgoing>>>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Transfer, FailReason> {
        let (answer, answered) = oneshot::channel();
        let operation = self.expect_answer(Waiting::Transfer {
            answer,
            slot: None,
            _permit: permit,
        });
        self.begin(
            operation,
            Command::Send {
                operation,
                session,
                transfer,
                from,
                resume,
            },
        )?;
        Ok(self.transfer(answered, session, transfer, true))
    }

    fn transfer(
        &self,
        answer: oneshot::Receiver<Answer>,
        session: SessionId,
        transfer: TransferId,
        outgoing: bool,
    ) -> Transfer {
        Transfer {
            answer,
            endpoint: self.clone(),
            session,
            transfer,
            outgoing,
            done: false,
            interrupted: None,
        }
    }

    async fn permit(&self) -> OwnedSemaphorePermit {
        let permits = Arc::clone(&self.shared.permits);
        permits
            .acquire_owned()
            .await
            .expect("the semaphore is never closed")
    }

    fn expect_answer(&self, waiting: Waiting) -> OperationId {
        let operation = OperationId(self.shared.next_operation.fetch_add(1, Ordering::Relaxed));
        lock(&self.shared.waiting).insert(operation, waiting);
        operation
    }

    fn begin(&self, operation: OperationId, command: Command) -> Result<(), FailReason> {
        if self.command(command).is_ok() {
            return Ok(());
        }
        if let Some(waiting) = lock(&self.shared.waiting).remove(&operation) {
            self.shared.give_back_slot(&waiting);
        }
        Err(FailReason::Stopped)
    }

    /// Sends a command; fails only if the engine has ended.
    fn command(&self, command: Command) -> Result<(), Stopped> {
        let mut sender = lock(&self.shared.commands);
        let mut command = Some(command);
        while let Some(ring) = sender.as_mut() {
            if let Some(now) = command.take() {
                // Full: more cancellations than the ring was sized for; the
                // engine empties it every iteration.
                command = ring.try_send(now).err().map(|Full(back)| back);
            }
            if ring.is_abandoned() {
                // With the sender goes what the engine did not take, and the
                // leases in it. Whoever waits is told by `fail_everything`.
                *sender = None;
                break;
            }
            if command.is_none() {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(Stopped)
    }
}

struct Stopped;

impl Completions {
    /// Hands every answer that is there to whoever waits for it.
    ///
    /// Returns `false` when the engine has ended; everybody still waiting has
    /// then been told.
    pub fn dispatch(&mut self) -> bool {
        while let Some(completion) = self.ring.try_recv() {
            self.dispatch_one(completion);
        }
        if self.ring.is_closed() {
            self.shared.fail_everything();
            return false;
        }
        true
    }

    /// Announces that the caller will sleep on this descriptor; `false` if
    /// there is something to dispatch first.
    pub fn prepare_sleep(&mut self) -> bool {
        self.ring.prepare_sleep()
    }

    /// Ends what [`Completions::prepare_sleep`] began.
    pub fn finish_sleep(&mut self) {
        self.ring.finish_sleep();
    }

    /// Dispatches on a thread of its own until the engine ends.
    pub fn spawn(mut self) -> std::io::Result<std::thread::JoinHandle<()>> {
        std::thread::Builder::new()
            .name("genie-dispatch".into())
            .spawn(move || {
                while self.dispatch() {
                    self.ring.wait(Duration::from_secs(3600));
                }
            })
    }

    fn dispatch_one(&mut self, completion: Completion) {
        match completion {
            Completion::Opened { operation, result } => {
                if let Some(Waiting::Open(answer)) = lock(&self.shared.waiting).remove(&operation) {
                    let _ = answer.send(result);
                }
            }
            Completion::Transferred { operation, result } => {
                self.answer(operation, (result, None));
            }
            Completion::Interrupted {
                operation,
                reason,
                partial,
            } => self.answer(operation, (Err(reason), Some(partial))),
            Completion::Lost { session, reason } => {
                lock(&self.shared.sessions).remove(&session);
                let _ = self.lost.send(Lost { session, reason });
            }
        }
    }
}

impl Completions {
    fn answer(&self, operation: OperationId, with: Answer) {
        let waiting = lock(&self.shared.waiting).remove(&operation);
        if let Some(waiting) = waiting {
            self.shared.give_back_slot(&waiting);
            if let Waiting::Transfer { answer, .. } = waiting {
                let _ = answer.send(with);
            }
        }
    }
}

impl AsFd for Completions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl Shared {
    fn give_back_slot(&self, waiting: &Waiting) {
        if let Waiting::Transfer {
            slot: Some((session, transfer)),
            ..
        } = waiting
            && let Some(slots) = lock(&self.sessions).get_mut(session)
        {
            slots.give_back(*transfer);
        }
    }

    fn fail_everything(&self) {
        lock(&self.commands).take();
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        for (_, waiting) in waiting {
            match waiting {
                Waiting::Open(answer) => drop(answer.send(Err(OpenError::Stopped))),
                Waiting::Transfer { answer, .. } => {
                    drop(answer.send((Err(FailReason::Stopped), None)));
                }
            }
        }
    }
}

impl Transfer {
    /// The id the receiver chose.
    pub fn id(&self) -> TransferId {
        self.transfer
    }

    /// Asks the engine to give the transfer up, whose end is still to be awaited:
    /// until then the engine holds the lease.
    pub fn cancel(&self) {
        let _ = self.endpoint.command(Command::Cancel {
            session: self.session,
            transfer: self.transfer,
            outgoing: self.outgoing,
        });
    }

    /// Blocks until the transfer ended. Not for asynchronous code.
    pub fn wait(mut self) -> Result<Receipt, FailReason> {
        self.done = true;
        let (_, unused) = oneshot::channel();
        let answer = std::mem::replace(&mut self.answer, unused);
        answer
            .blocking_recv()
            .map_or(Err(FailReason::Stopped), |(result, _)| result)
    }

    /// What had moved, of a transfer that has resolved to a failure because its
    /// session ended; once. The engine holds its lease no more.
    pub fn take_interrupted(&mut self) -> Option<Interrupted> {
        self.interrupted.take().map(|interrupted| *interrupted)
    }
}

impl Future for Transfer {
    type Output = Result<Receipt, FailReason>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = std::task::ready!(Pin::new(&mut self.answer).poll(context));
        self.done = true;
        let (result, interrupted) = answer.unwrap_or((Err(FailReason::Stopped), None));
        self.interrupted = interrupted;
        Poll::Ready(result)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if !self.done {
            self.cancel();
        }
    }
}

/// The transfer ids of one session. A slot is used again under the next
/// generation, so that a late packet never lands in the next tensor.
#[derive(Debug, Default)]
struct Slots {
    free: Vec<TransferId>,
    used: u32,
}

impl Slots {
    fn take(&mut self) -> TransferId {
        self.free.pop().unwrap_or_else(|| {
            let slot = self.used;
            self.used += 1;
            TransferId {
                slot,
                generation: 1,
            }
        })
    }

    fn give_back(&mut self, id: TransferId) {
        // After four thousand million uses a slot retires.
        if let Some(generation) = id.generation.checked_add(1) {
            self.free.push(TransferId {
                slot: id.slot,
                generation,
            });
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
    use crate::memory::{Backing, Region};

    fn lease() -> Lease {
        Lease::whole(Region::with_backing(4096, Backing::Shmem).unwrap())
    }

    #[test]
    fn a_slot_comes_back_under_the_next_generation() {
        let mut slots = Slots::default();
        let first = slots.take();
        assert_ne!(slots.take().slot, first.slot);
        slots.give_back(first);
        assert_eq!(
            slots.take(),
            TransferId {
                slot: first.slot,
                generation: first.generation + 1
            }
        );
    }

    #[test]
    fn everybody_is_told_when_the_engine_ends() {
        let (endpoint, completions, ports, _lost) = Endpoint::new().unwrap();
        let dispatcher = completions.spawn().unwrap();
        let session = endpoint.new_session(7);
        let (_, transfer) = endpoint.try_receive(session, lease()).unwrap().unwrap();
        drop(ports);
        assert_eq!(transfer.wait(), Err(FailReason::Stopped));
        dispatcher.join().unwrap();
        let after = endpoint.try_receive(session, lease()).unwrap();
        assert_eq!(after.map(|_| ()), Err(FailReason::Stopped));
    }

    #[test]
    fn one_operation_too_many_is_refused_with_its_lease() {
        let (endpoint, _completions, _ports, _lost) = Endpoint::new().unwrap();
        let session = endpoint.new_session(7);
        let lease = lease();
        let mut transfers = Vec::new();
        for _ in 0..OPERATIONS_MAX {
            transfers.push(
                endpoint
                    .try_receive(session, lease.clone())
                    .unwrap()
                    .unwrap(),
            );
        }
        assert!(endpoint.try_receive(session, lease).is_err());
        // Each drop cancels; the command ring has room for all of them.
        drop(transfers);
    }

    #[test]
    fn a_dropped_transfer_is_cancelled_and_its_lease_stays_with_the_engine() {
        let (endpoint, _completions, mut ports, _lost) = Endpoint::new().unwrap();
        let session = endpoint.new_session(7);
        let lease = lease();
        let weak = Arc::downgrade(lease.region());
        let (id, transfer) = endpoint.try_receive(session, lease).unwrap().unwrap();
        drop(transfer);
        let first = ports.commands.try_recv();
        assert!(matches!(&first, Some(Command::Receive { transfer, .. }) if *transfer == id));
        assert!(matches!(
            ports.commands.try_recv(),
            Some(Command::Cancel { transfer, outgoing: false, .. }) if transfer == id
        ));
        assert!(
            weak.upgrade().is_some(),
            "the engine's lease keeps the region"
        );
        drop(first);
        assert!(weak.upgrade().is_none());
    }
}
