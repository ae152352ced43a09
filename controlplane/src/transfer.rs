//! Batches of tensors on the move: put and get, seen from both ends.
//!
//! The receiver of tensors makes room for all of them, then expects them one by
//! one and tells the sender under which ids (*grants*). Grants are streamed: an
//! endpoint takes a bounded number of operations at a time, so the sender
//! already sends while later tensors still wait. The invariant: *nothing is
//! kept before every tensor of the batch was verified at both ends*.

mod batch;
mod kind;
mod local;
pub mod once;
mod part;
mod pending;
pub mod ranges;
mod serve;
pub mod windows;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use genie_dataplane::engine::FailReason;
use genie_dataplane::memory::accelerator::{AcceleratorError, MemoryKind};
use genie_dataplane::stage::{Place, StageError};

use genie_client::protocol::Failure;
use genie_client::slice::{self, Run, SliceError};
use genie_client::{FailureKind, Listed, Moved};
use tokio::sync::Notify;
use tokio::time::timeout;

pub use kind::kind_of;
pub use local::{fetch as get_local, keep as put_local, part as part_local};
pub use serve::serve;

use crate::budget::{AllocateError, Allocation, Charge, Room};
use crate::message::{Message, Outcome, Request, RequestKey};
use crate::notifications::LongMessage;
use crate::quota::peer::LimitError;
use crate::session::route::Stage;
use crate::session::{Call, Session, SessionError};
use crate::store::{CommitError, NotFound, Removed, SealError, Using};
use crate::tensor::{ListLimit, Metadata, TENSORS_MAX, TensorError, TensorInfo, check_batch};
use batch::{receive_all, send_all, send_list};

/// Why a batch did not move, or a request failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// There is no session, or it ended.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The batch itself is bad.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// No room.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The store does not take it.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// Nothing of that name.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The part that is asked for does not exist.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A range of something that the request does not name.
    #[error("there is no target {0} in the request")]
    NoTarget(u32),
    /// A window went away.
    #[error(transparent)]
    Removed(#[from] Removed),
    /// A window does not become tensors.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A notification says too much.
    #[error(transparent)]
    Message(#[from] LongMessage),
    /// The peer that asks has as much as one peer may have.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A transfer failed.
    #[error("a tensor did not arrive: {0}")]
    Failed(FailReason),
    /// An accelerator failed; the session goes on.
    #[error("a tensor did not arrive: {0}")]
    Accelerator(AcceleratorError),
    /// The peer could not do its part.
    #[error("peer '{peer}': {reason}")]
    Peer {
        /// Its name.
        peer: String,
        /// What kind of failure it was to it.
        kind: FailureKind,
        /// Its words.
        reason: String,
    },
    /// The two ends moved different bytes.
    #[error(
        "peer '{peer}' has digest {theirs:08x} of the batch, this end {ours:08x}: it was given up"
    )]
    Digest {
        /// Its name.
        peer: String,
        /// Its digest.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// Nothing happened for too long.
    #[error(
        "peer '{peer}' made no progress with the request for {limit:?}: \
         it was given up (--stall sets the limit)"
    )]
    Stalled {
        /// Its name.
        peer: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Whoever asked for it no longer waits.
    #[error("it was given up")]
    GivenUp,
    /// Whoever asked for it has cancelled it.
    #[error("it was cancelled")]
    Cancelled,
    /// It took longer than whoever asked for it wants to wait.
    #[error("it was not done within {0:?}, the deadline that was set: it was given up")]
    Deadline(Duration),
    /// A put that was not done, or was long ago.
    #[error("no such put is remembered")]
    NotDone,
    /// Nothing new is begun any more.
    #[error("the agent is stopping: try again once it is back")]
    Stopping,
}

/// A tensor to be sent.
#[derive(Clone, Debug)]
pub struct Source {
    /// What it is.
    pub info: TensorInfo,
    /// Its bytes.
    pub lease: Place,
}

/// Tensors that arrived, one after the other in one allocation.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// What they are, in order, without gaps.
    pub tensors: Vec<TensorInfo>,
    /// Their prefix's metadata.
    pub metadata: Option<Metadata>,
    /// Their bytes, from the start of it.
    pub allocation: Allocation,
}

/// Bytes verified so far, for whoever shows progress.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<ProgressInner>);

#[derive(Debug, Default)]
struct ProgressInner {
    done: AtomicU64,
    total: AtomicU64,
    given_up: AtomicBool,
    /// How much was given up and is not over yet.
    landing: AtomicUsize,
    landed: Notify,
    /// In use until the last transfer is over.
    _held: Vec<Using>,
}

/// Transfers that were given up and are not over yet.
#[derive(Debug)]
pub struct Landing(Progress);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.0.landing.fetch_sub(1, Ordering::AcqRel);
        self.0.0.landed.notify_waiters();
    }
}

impl From<StageError> for TransferError {
    fn from(error: StageError) -> Self {
        match error {
            StageError::Wire(reason) => Self::Failed(reason),
            StageError::Accelerator(error) => Self::Accelerator(error),
        }
    }
}

/// Gives a copy on another thread up when it is dropped.
#[derive(Debug)]
pub struct GiveUpOnDrop(Progress);

impl Progress {
    /// Bytes verified, and bytes in total once that is known.
    pub fn get(&self) -> (u64, u64) {
        (
            self.0.done.load(Ordering::Relaxed),
            self.0.total.load(Ordering::Relaxed),
        )
    }

    /// Progress that holds these until the last transfer is over.
    fn holding(held: Vec<Using>) -> Self {
        Self(Arc::new(ProgressInner {
            _held: held,
            ..ProgressInner::default()
        }))
    }

    /// Makes [`Progress::landed`] wait for as long as this is held.
    pub fn landing(&self) -> Landing {
        self.0.landing.fetch_add(1, Ordering::AcqRel);
        Landing(self.clone())
    }

    /// Waits until no transfer that was given up touches its bytes any more.
    pub async fn landed(&self) {
        loop {
            let mut landed = std::pin::pin!(self.0.landed.notified());
            landed.as_mut().enable();
            if self.0.landing.load(Ordering::Acquire) == 0 {
                return;
            }
            landed.await;
        }
    }

    /// Makes blocking work that reports here end early once this is dropped.
    pub fn give_up_on_drop(&self) -> GiveUpOnDrop {
        GiveUpOnDrop(self.clone())
    }

    /// An error once nobody waits any more.
    pub(crate) fn check(&self) -> Result<(), TransferError> {
        if self.0.given_up.load(Ordering::Relaxed) {
            Err(TransferError::GivenUp)
        } else {
            Ok(())
        }
    }

    pub(crate) fn begin(&self, total: u64) {
        // It may be another attempt.
        self.0.done.store(0, Ordering::Relaxed);
        self.0.total.store(total, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for GiveUpOnDrop {
    fn drop(&mut self) {
        self.0.0.given_up.store(true, Ordering::Relaxed);
    }
}

/// Sends a batch into a peer's store, to be kept in this kind of memory; a `key`
/// names it if it may be made again.
pub async fn put(
    session: &Arc<Session>,
    prefix: &str,
    sources: Vec<Source>,
    metadata: Option<Metadata>,
    memory: MemoryKind,
    key: Option<RequestKey>,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let began = Instant::now();
    let infos: Vec<TensorInfo> = sources.iter().map(|source| source.info.clone()).collect();
    progress.begin(check_batch(prefix, &infos, metadata.as_ref())?);
    let count = infos.len() as u64;
    let request = Request::Put {
        prefix: prefix.to_owned(),
        count,
        metadata,
        memory,
        key,
    };
    let mut call = session.call(request).await?;
    send_list(&call, &infos).await?;
    let leases = sources.into_iter().map(|source| source.lease).collect();
    let (tally, done) = send_all(&mut call, leases, progress, true).await?;
    call.finish();
    let theirs = done.unwrap_or_default();
    finish(session, tally.outcome(&infos), theirs, Way::Out, began)
}

/// How a put under `prefix` ended, if the peer has done it.
pub async fn recall(
    session: &Arc<Session>,
    prefix: &str,
    key: RequestKey,
) -> Result<Option<Moved>, TransferError> {
    let began = Instant::now();
    let prefix = prefix.to_owned();
    match ask(session, Request::Recall { prefix, key }).await {
        Ok(theirs) => finish(session, theirs, theirs, Way::Out, began).map(Some),
        Err(TransferError::Peer {
            kind: FailureKind::NotFound,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Fetches what a peer's store holds under `prefix` into memory from `room`.
pub async fn get(
    session: &Arc<Session>,
    prefix: &str,
    room: &Room,
    progress: &Progress,
) -> Result<(Arrived, Moved), TransferError> {
    let request = Request::Get {
        prefix: prefix.to_owned(),
    };
    receive(session, request, prefix, None, room, progress).await
}

/// Fetches a part of a tensor in a peer's store into memory from `room`.
pub async fn fetch(
    session: &Arc<Session>,
    name: &str,
    runs: Vec<Run>,
    room: &Room,
    progress: &Progress,
) -> Result<(Arrived, Moved), TransferError> {
    let total = slice::check_runs(&runs, u64::MAX)?;
    let request = Request::Fetch {
        name: name.to_owned(),
        runs,
    };
    receive(session, request, part::PREFIX, Some(total), room, progress).await
}

/// Receives what a peer finds; `expected` are its bytes, if that is known.
async fn receive(
    session: &Arc<Session>,
    request: Request,
    prefix: &str,
    expected: Option<u64>,
    room: &Room,
    progress: &Progress,
) -> Result<(Arrived, Moved), TransferError> {
    let began = Instant::now();
    let mut call = session.call(request).await?;
    let (count, metadata) = match recv_or_fail(&mut call).await? {
        Message::Found {
            count, metadata, ..
        } => (count, metadata),
        other => return Err(call.unexpected(&other).into()),
    };
    let (infos, _charge) = recv_list(&mut call, count, metadata.as_ref(), room).await?;
    let bytes = check_batch(prefix, &infos, metadata.as_ref())?;
    if expected.is_some_and(|expected| expected != bytes) {
        return Err(TransferError::Peer {
            peer: session.peer.clone(),
            kind: FailureKind::Peer,
            reason: format!("it has {bytes} bytes of {}", expected.unwrap_or(0)),
        });
    }
    progress.begin(bytes);
    let allocation = allocate(room, bytes).await?;
    let leases = lay_out(&allocation, &infos)?;
    let (tally, done) = receive_all(&mut call, leases, progress, true).await?;
    call.finish();
    let theirs = done.unwrap_or_default();
    let moved = finish(session, tally.outcome(&infos), theirs, Way::In, began)?;
    Ok((
        Arrived {
            tensors: infos,
            metadata,
            allocation,
        },
        moved,
    ))
}

/// Lists a peer's store, or what it has under a name.
pub async fn list(
    session: &Arc<Session>,
    under: Option<String>,
) -> Result<Vec<Listed>, TransferError> {
    let mut call = session.call(Request::List { under }).await?;
    let mut listed = Vec::new();
    let mut limit = ListLimit::new(TENSORS_MAX, None)?;
    loop {
        match recv_or_fail(&mut call).await? {
            Message::Listed { tensors, .. } => {
                for tensor in &tensors {
                    tensor.check()?;
                    limit.count(tensor.held_bytes())?;
                }
                listed.extend(tensors);
            }
            Message::Done { .. } => {
                call.finish();
                return Ok(listed);
            }
            other => return Err(call.unexpected(&other).into()),
        }
    }
}

/// Removes from a peer's store; returns how many tensors that were.
pub async fn remove(session: &Arc<Session>, name: &str) -> Result<u64, TransferError> {
    let name = name.to_owned();
    let outcome = ask(session, Request::Remove { name }).await?;
    Ok(outcome.tensors)
}

/// Makes a window in a peer's store.
pub async fn make_window(
    session: &Arc<Session>,
    name: String,
    bytes: u64,
    memory: MemoryKind,
) -> Result<(), TransferError> {
    let request = Request::Window {
        name,
        bytes,
        memory,
    };
    ask(session, request).await.map(drop)
}

/// Makes tensors of a window in a peer's store.
pub async fn seal(
    session: &Arc<Session>,
    name: String,
    tensors: Vec<(TensorInfo, u64)>,
) -> Result<(), TransferError> {
    ask(session, Request::Seal { name, tensors })
        .await
        .map(drop)
}

/// Notifies those who listen on a peer; returns how many these are.
pub async fn notify(
    session: &Arc<Session>,
    name: String,
    message: Vec<u8>,
) -> Result<u64, TransferError> {
    let outcome = ask(session, Request::Notify { name, message }).await?;
    Ok(outcome.listeners)
}

/// A request that moves nothing.
async fn ask(session: &Arc<Session>, request: Request) -> Result<Outcome, TransferError> {
    let mut call = session.call(request).await?;
    let outcome = done(&mut call).await?;
    call.finish();
    Ok(outcome)
}

/// Waits for the end of a request.
async fn done(call: &mut Call) -> Result<Outcome, TransferError> {
    match recv_or_fail(call).await? {
        Message::Done {
            result: Ok(outcome),
            ..
        } => Ok(outcome),
        other => Err(call.unexpected(&other).into()),
    }
}

/// The next message; the peer's failure is an error, and so is its silence.
async fn recv_or_fail(call: &mut Call) -> Result<Message, TransferError> {
    let limit = call.session().stall;
    let received = timeout(limit, call.recv()).await;
    match received.map_err(|_| stalled(call.session(), limit))?? {
        Message::Done {
            result: Err(failure),
            ..
        } => Err(refused(call, failure)),
        message => Ok(message),
    }
}

/// The peer's own end of the request.
fn refused(call: &mut Call, failure: Failure) -> TransferError {
    call.finish();
    TransferError::Peer {
        peer: call.session().peer.clone(),
        kind: failure.kind,
        reason: failure.message,
    }
}

fn stalled(session: &Session, limit: Duration) -> TransferError {
    TransferError::Stalled {
        peer: session.peer.clone(),
        limit,
    }
}

/// Collects the list of `count` tensors, counting it against `room` as it comes.
async fn recv_list(
    call: &mut Call,
    count: u64,
    metadata: Option<&Metadata>,
    room: &Room,
) -> Result<(Vec<TensorInfo>, Charge), TransferError> {
    let mut limit = ListLimit::new(count, metadata)?;
    let mut charge = room.charge(limit.bytes() as u64)?;
    let mut infos = Vec::new();
    while (infos.len() as u64) < count {
        match recv_or_fail(call).await? {
            Message::Tensors { tensors, .. } if !tensors.is_empty() => {
                tensors.iter().try_for_each(|info| limit.add(info))?;
                charge.grow_to(limit.bytes() as u64)?;
                infos.extend(tensors);
            }
            other => return Err(call.unexpected(&other).into()),
        }
    }
    Ok((infos, charge))
}

async fn allocate(room: &Room, bytes: u64) -> Result<Allocation, TransferError> {
    let room = room.clone();
    let allocated = tokio::task::spawn_blocking(move || room.allocate(bytes)).await;
    Ok(allocated.map_err(|_| TransferError::Stopping)??)
}

/// One lease for each tensor, one after the other.
fn lay_out(allocation: &Allocation, infos: &[TensorInfo]) -> Result<Vec<Place>, TensorError> {
    let mut offset = 0;
    let mut leases = Vec::with_capacity(infos.len());
    for info in infos {
        let len = info.len_bytes()?;
        leases.push(allocation.lease(offset, len));
        offset += len;
    }
    Ok(leases)
}

/// Which end this one is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

fn finish(
    session: &Session,
    ours: Outcome,
    theirs: Outcome,
    way: Way,
    began: Instant,
) -> Result<Moved, TransferError> {
    if (ours.digest, ours.bytes) != (theirs.digest, theirs.bytes) {
        return Err(TransferError::Digest {
            peer: session.peer.clone(),
            theirs: theirs.digest,
            ours: ours.digest,
        });
    }
    let Stage { path, refused, .. } = session.route.stage();
    let reasons = refused.iter().map(ToString::to_string).collect();
    let (sent, received) = match way {
        Way::In => (theirs, ours),
        Way::Out => (ours, theirs),
    };
    Ok(moved(sent, received, path.name, reasons, began))
}

/// Sums up what the two ends say.
fn moved(
    sent: Outcome,
    received: Outcome,
    path: String,
    reasons: Vec<String>,
    began: Instant,
) -> Moved {
    let seconds = began.elapsed().as_secs_f64();
    let mut copies = sent.copies;
    copies.add(received.copies);
    Moved {
        tensors: received.tensors,
        bytes: received.bytes,
        seconds,
        gb_per_s: received.bytes as f64 / 1e9 / seconds.max(1e-9),
        path,
        reasons,
        retransmits: sent.retransmits + received.retransmits,
        copies_per_byte: copies.per_byte(received.bytes),
        copies,
        sent_copies: sent.copies,
        received_copies: received.copies,
        digest: format!("crc32c:{:08x}", received.digest),
        listeners: sent.listeners + received.listeners,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::session::{Direction, testing};
    use crate::tensor::Dtype;
    use genie_client::Owner;

    /// What becomes of a list of `count` that a peer sends as `infos`.
    async fn receive(count: u64, infos: Vec<TensorInfo>, budget: &Budget) -> String {
        let (session, _outgoing) = testing::session(Direction::Dialled);
        let mut call = session.call(Request::List { under: None }).await.unwrap();
        let (id, tensors) = (call.id(), infos);
        session.route(id, Message::Tensors { id, tensors }).unwrap();
        match recv_list(&mut call, count, None, &budget.room()).await {
            Ok((infos, charge)) => format!("{} for {charge:?}", infos.len()),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn a_list_is_checked_and_counted_as_it_comes() {
        let info = |name: &str, shape: &[u64]| TensorInfo {
            name: name.into(),
            dtype: Dtype::U8,
            shape: shape.to_vec(),
        };
        let budget = Budget::new("store", "--store-bytes", 1000);
        let sound = info("a", &[1]);
        let fine = receive(1, vec![sound.clone()], &budget).await;
        assert!(fine.starts_with("1 for"), "{fine}");
        let cases = [
            (1, vec![sound.clone(); 2], "more than the 1 tensors"),
            (u64::MAX, vec![sound.clone()], "too many"),
            (9, vec![info("x\u{1b}", &[])], "control character"),
            (9, vec![info("x", &[1; 65])], "65 dimensions"),
            (9, vec![info(&"x".repeat(900), &[]); 2], "the store is full"),
            // More was announced, and never comes.
            (2, vec![sound], "made no progress"),
        ];
        for (count, infos, reason) in cases {
            let refused = receive(count, infos, &budget).await;
            assert!(refused.contains(reason), "{reason}: {refused}");
            assert_eq!(budget.usage().used_bytes, 0);
        }
    }

    #[tokio::test]
    async fn a_listing_with_names_that_cannot_be_is_refused() {
        let (session, mut outgoing) = testing::session(Direction::Dialled);
        let asked = list(&session, None);
        let answered = async {
            let Some(Message::Begin { id, .. }) = outgoing.recv().await else {
                panic!("no request");
            };
            let listed = Listed {
                name: "m/\u{1b}[2J".into(),
                dtype: "U8".into(),
                shape: vec![],
                bytes: 1,
                owner: Owner::User(0),
                memory: "host".into(),
                window: false,
            };
            let tensors = vec![listed];
            session.route(id, Message::Listed { id, tensors }).unwrap();
        };
        let (refused, ()) = tokio::join!(asked, answered);
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("control character"), "{refused}");
    }
}
