//! The application socket: how programs on this host use the agent.
//!
//! What is said on it is in [`genie_client::protocol`]. One task serves one
//! connection, one request after the other, and batches beside them; the kernel says whose connection
//! it is, and everything it has is charged to that user. The invariant: *what
//! an application sends, passes, writes into its memory or leaves undone ends
//! at worst its own connection*.

mod batch;
mod memory;
#[cfg(test)]
mod tests;
mod window;

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use genie_client::protocol::{
    Answer, ArenaId, Ask, FailureKind, IpcHandle, Memory, Placed, TENSORS_PER_MESSAGE,
};
use genie_client::slice::Run;
use genie_client::{Metadata, Moved, Owner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::budget::{AllocateError, Allocation, Charge, Room};
use crate::frame::{self, FrameError};
use crate::message::RequestKey;
use crate::metrics::Direction;
use crate::node::{self, Node};
use crate::notifications::Listener;
use crate::policy::Policy;
use crate::quota::{self, QuotaError, User};
use crate::session::SessionError;
use crate::tensor::{ListLimit, TensorError};
use crate::transfer::{self, Arrived, Progress, TransferError};
use batch::Batches;
use memory::{Arenas, MemoryError, Passed, pass_descriptor, take_descriptor};
use window::Windows;

/// How often progress is told: often enough for a bar to move smoothly.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How long an application may leave an answer unread, or a frame unfinished.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why an application's connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ApplicationError {
    /// The connection.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It did not read or finish in time.
    #[error("it stalled for {PATIENCE:?}")]
    Stalled,
    /// It sent something out of order.
    #[error("it sent {0}")]
    Unexpected(&'static str),
    /// It went away, or spoke, while its tensors moved.
    #[error("it gave up while its tensors moved")]
    GaveUp,
    /// It has as much as one user may have.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// A descriptor could not be passed.
    #[error("cannot pass a descriptor: {0}")]
    Descriptor(std::io::Error),
}

/// Turns away whoever has too many connections, without waiting for anything.
pub fn refuse(stream: UnixStream, error: &QuotaError) {
    let answer = Answer::Failed {
        kind: FailureKind::Quota,
        message: error.to_string(),
    };
    let mut bytes = frame::preamble().to_vec();
    bytes.extend(frame::encode(&answer).unwrap_or_default());
    // There is room for it in a new socket; nobody waits if there is not.
    let _ = stream.try_write(&bytes);
}

/// Serves one application until it leaves.
pub async fn serve(
    node: Arc<Node>,
    mut stream: UnixStream,
    user: User,
) -> Result<(), ApplicationError> {
    let exchanged = timeout(PATIENCE, frame::exchange_preamble(&mut stream)).await;
    exchanged.map_err(|_| ApplicationError::Stalled)??;
    let mut application = Application::new(node, stream, user);
    loop {
        // An idle application may keep its connection; a frame once begun must end.
        let mut first = [0];
        let read = tokio::select! {
            read = application.stream.read(&mut first) => read.map_err(FrameError::Io)?,
            ended = application.batches.next() => {
                application.send(&ended).await?;
                continue;
            }
        };
        if read == 0 {
            return Ok(());
        }
        let ask = application.rest(first).await?;
        application.begin(ask).await?;
    }
}

struct Application {
    node: Arc<Node>,
    stream: UnixStream,
    user: User,
    arenas: Arenas,
    batches: Batches,
    windows: Windows,
    policy: Policy,
    listener: Option<Listener>,
    /// How many were asked.
    requests: u64,
    /// Whether the one that is being answered was cancelled.
    cancelled: bool,
}

impl Application {
    fn new(node: Arc<Node>, stream: UnixStream, user: User) -> Self {
        Self {
            node,
            stream,
            user,
            arenas: Arenas::default(),
            batches: Batches::default(),
            windows: Windows::default(),
            policy: Policy::default(),
            listener: None,
            requests: 0,
            cancelled: false,
        }
    }

    /// Counts a request and answers it.
    async fn begin(&mut self, ask: Ask) -> Result<(), ApplicationError> {
        if let Ask::Cancel { request } = ask {
            self.batches.cancel(request);
            return Ok(());
        }
        let request = self.requests;
        self.requests += 1;
        self.cancelled = false;
        match ask {
            Ask::Batch(ranges) => {
                let (batches, arenas) = (&mut self.batches, &self.arenas);
                let limit = self.policy.deadline;
                match batches.begin(&self.node, &self.user, arenas, request, ranges, limit) {
                    Ok(()) => Ok(()),
                    Err(error) => self.send(&batch::refused(request, &error)).await,
                }
            }
            ask => self.answer(ask).await,
        }
    }

    /// Takes note of a cancellation that comes while something else is under way.
    fn cancel(&mut self, request: u64) {
        if request + 1 == self.requests {
            self.cancelled = true;
        }
        self.batches.cancel(request);
    }

    /// The frame whose first byte this is.
    async fn rest(&mut self, first: [u8; 1]) -> Result<Ask, ApplicationError> {
        let mut rest = first.chain(&mut self.stream);
        let ask = timeout(PATIENCE, frame::read(&mut rest, frame::BODY_MAX)).await;
        Ok(ask.map_err(|_| ApplicationError::Stalled)??)
    }

    async fn answer(&mut self, ask: Ask) -> Result<(), ApplicationError> {
        match ask {
            Ask::Arena { bytes, memory } => self.arena(bytes, memory).await,
            Ask::Mapped { arena } => match self.arenas.seal(arena).await {
                Ok(()) => self.send(&Answer::Sealed).await,
                Err(error) => self.fail(error).await,
            },
            Ask::Free { arena } => match self.arenas.free(arena) {
                Ok(()) => self.send(&Answer::Freed).await,
                Err(error) => self.fail(error).await,
            },
            Ask::Patience {
                deadline_ms,
                retry_ms,
            } => {
                self.policy = Policy {
                    deadline: deadline_ms.map(Duration::from_millis),
                    retry: retry_ms.map(Duration::from_millis),
                };
                self.send(&Answer::Done { listeners: 0 }).await
            }
            Ask::Import => self.import().await,
            Ask::ImportDevice {
                memory,
                bytes,
                handle,
            } => self.import_device(memory, bytes, handle).await,
            Ask::Read {
                offset,
                bytes,
                memory,
            } => self.read(offset, bytes, memory).await,
            Ask::Put {
                node,
                prefix,
                count,
                metadata,
                memory,
            } => self.put(node, prefix, count, metadata, memory).await,
            Ask::Get {
                node,
                prefix,
                memory,
            } => self.get(node, prefix, memory).await,
            Ask::Fetch {
                node,
                name,
                runs,
                memory,
            } => self.fetch(node, name, runs, memory).await,
            Ask::List { node, under } => self.list(node, under).await,
            Ask::Remove { node, name } => self.remove(node, &name).await,
            Ask::Status => {
                let status = Box::new(self.node.status(self.user.uid()));
                self.send(&Answer::Status(status)).await
            }
            Ask::Window {
                node,
                name,
                bytes,
                memory,
            } => self.make_window(node, &name, bytes, memory).await,
            Ask::Register {
                name,
                arena,
                offset,
                bytes,
            } => self.register(&name, arena, offset, bytes).await,
            Ask::Seal {
                node,
                name,
                tensors,
            } => self.seal(node, &name, tensors).await,
            Ask::Listen { prefix } => self.listen(prefix).await,
            Ask::Await { limit_ms } => self.notification(limit_ms).await,
            Ask::Notify {
                node,
                name,
                message,
            } => self.notify(node, &name, message).await,
            Ask::Tensors(_) | Ask::Batch(_) | Ask::Cancel { .. } => Err(
                ApplicationError::Unexpected("a list that nothing asked for"),
            ),
        }
    }

    /// Room for an arena, charged to the user.
    fn room(&self, memory: Memory) -> Room {
        Room {
            budget: self.node.arenas.clone(),
            peer: None,
            user: Some(self.user.clone()),
            memory,
            devices: self.node.devices.clone(),
        }
    }

    fn owner(&self) -> Owner {
        Owner::User(self.user.uid())
    }

    async fn arena(&mut self, bytes: u64, memory: Memory) -> Result<(), ApplicationError> {
        if self.node.begin().is_none() {
            return self.fail(TransferError::Stopping).await;
        }
        let room = self.room(memory);
        let allocated = tokio::task::spawn_blocking(move || room.allocate(bytes)).await;
        let allocation = match allocated {
            Ok(Ok(allocation)) => allocation,
            Ok(Err(error)) => return self.fail(TransferError::from(error)).await,
            Err(_) => return self.fail(TransferError::Stopping).await,
        };
        if let Some(reason) = &allocation.fallback {
            tracing::debug!(%reason, bytes, "an arena is not on huge pages");
        }
        let descriptor = match allocation.descriptor() {
            Ok(descriptor) => descriptor,
            Err(error) => return self.fail(TransferError::from(error)).await,
        };
        let reason = allocation.fallback.clone();
        // A device's memory has nothing to seal.
        let sealed = allocation.host().is_none();
        let arena = self.arenas.add_writable(allocation, sealed);
        self.send(&Answer::Arena { arena, reason }).await?;
        pass_descriptor(&self.stream, descriptor).await
    }

    async fn import(&mut self) -> Result<(), ApplicationError> {
        let file = match take_descriptor(&mut self.stream, &self.user).await? {
            Ok(file) => file,
            Err(error) => return self.fail(error).await,
        };
        let room = self.room(Memory::Auto);
        let import = async move {
            let import = tokio::task::spawn_blocking(move || memory::import(file, &room));
            import.await.unwrap_or(Err(TransferError::Stopping.into()))
        };
        match self.attend(import, &Progress::default()).await? {
            Ok(allocation) => self.imported(allocation, None, 0).await,
            Err(error) => self.fail(error).await,
        }
    }

    async fn import_device(
        &mut self,
        memory: Memory,
        bytes: u64,
        handle: Option<IpcHandle>,
    ) -> Result<(), ApplicationError> {
        let passed = match handle {
            Some(handle) => Passed::Handle(handle),
            None => match take_descriptor(&mut self.stream, &self.user).await? {
                Ok(file) => Passed::File(file),
                Err(error) => return self.fail(error).await,
            },
        };
        let (room, uid) = (self.room(memory), self.user.uid());
        let import = async move {
            let import = move || memory::import_device(passed, bytes, uid, &room);
            let import = tokio::task::spawn_blocking(import);
            import.await.unwrap_or(Err(TransferError::Stopping.into()))
        };
        let allocation = match self.attend(import, &Progress::default()).await? {
            Ok(allocation) => allocation,
            Err(error) => return self.fail(error).await,
        };
        // The program goes on using it; it has nothing to seal.
        let arena = self.arenas.add_writable(allocation, true);
        self.send(&Answer::Imported {
            arena,
            bytes,
            copied: 0,
        })
        .await
    }

    async fn read(
        &mut self,
        offset: u64,
        bytes: u64,
        memory: Memory,
    ) -> Result<(), ApplicationError> {
        let file = match take_descriptor(&mut self.stream, &self.user).await? {
            Ok(file) => file,
            Err(error) => return self.fail(error).await,
        };
        let (node, room, progress) = (
            Arc::clone(&self.node),
            self.room(memory),
            Progress::default(),
        );
        let (told, shown) = (progress.clone(), progress.clone());
        let read = async move {
            // The thread cannot be stopped: it is told when nobody waits any more.
            let _given_up = told.give_up_on_drop();
            let busy = node.begin();
            let stopping = busy.is_none();
            let read = move || {
                if stopping {
                    return Err(TransferError::Stopping.into());
                }
                memory::read(file, offset, bytes, &room, &progress)
            };
            let read = tokio::task::spawn_blocking(read).await;
            read.unwrap_or(Err(TransferError::Stopping.into()))
        };
        match self.attend(read, &shown).await? {
            Ok(allocation) => self.imported(allocation, Some(bytes), bytes).await,
            Err(error) => self.fail(error).await,
        }
    }

    async fn imported(
        &mut self,
        allocation: Allocation,
        bytes: Option<u64>,
        copied: u64,
    ) -> Result<(), ApplicationError> {
        let bytes = bytes.unwrap_or(allocation.len() as u64);
        // Nobody else can write what was read; what came sealed was checked.
        let arena = self.arenas.add(allocation, true);
        self.send(&Answer::Imported {
            arena,
            bytes,
            copied,
        })
        .await
    }

    async fn put(
        &mut self,
        to: Option<String>,
        prefix: String,
        count: u64,
        metadata: Option<Metadata>,
        memory: Memory,
    ) -> Result<(), ApplicationError> {
        let (placed, charge) = self.recv_placed(count, metadata.as_ref()).await?;
        let sources = match self.arenas.sources(placed) {
            Ok(sources) => sources,
            Err(error) => return self.fail(error).await,
        };
        let (node, owner) = (Arc::clone(&self.node), self.owner());
        let (progress, policy) = (Progress::default(), self.policy);
        let told = progress.clone();
        let operation = async move {
            let _charge = charge;
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, to) {
                Some(peer) => {
                    let key = policy.retry.map(|_| RequestKey(node::random()));
                    let mut attempts = policy.attempts();
                    let moved = loop {
                        let attempt = async {
                            let session = node.session(&peer).await?;
                            // It may be only the word of its end that was lost.
                            if attempts.are_repeated()
                                && let Some(key) = key
                                && let Some(moved) =
                                    transfer::recall(&session, &prefix, key).await?
                            {
                                return Ok(moved);
                            }
                            let (sources, metadata) = (sources.clone(), metadata.clone());
                            let kind = memory.kind();
                            transfer::put(&session, &prefix, sources, metadata, kind, key, &told)
                                .await
                        };
                        match attempt.await {
                            Ok(moved) => break moved,
                            Err(error) => attempts.again(&node, error).await?,
                        }
                    };
                    node.counters.dialled(&peer, Direction::Sent, &moved);
                    Ok(moved)
                }
                None => {
                    let _given_up = told.give_up_on_drop();
                    let (store, room) =
                        (node.store.clone(), node.store_room(memory.kind(), &owner));
                    let keep = move || {
                        let (sources, owner) = (&sources, &owner);
                        transfer::put_local(&store, &prefix, sources, metadata, owner, &room, &told)
                    };
                    tokio::task::spawn_blocking(keep)
                        .await
                        .unwrap_or(Err(TransferError::Stopping))
                }
            }
        };
        match self.attend(operation, &progress).await? {
            Ok(moved) => self.send(&Answer::Moved(moved)).await,
            Err(error) => self.fail(error).await,
        }
    }

    /// Collects the list of a put, checking and counting it as it comes.
    ///
    /// What is still to come of a list that is refused cannot be told from the
    /// next request: that ends the connection.
    async fn recv_placed(
        &mut self,
        count: u64,
        metadata: Option<&Metadata>,
    ) -> Result<(Vec<Placed>, (Charge, quota::Charge)), ApplicationError> {
        const REFUSED: ApplicationError = ApplicationError::Unexpected("a list that is refused");
        let begun = ListLimit::new(count, metadata).map_err(TransferError::from);
        let begun = begun.and_then(|limit| {
            let bytes = limit.bytes() as u64;
            let user = self.user.bytes(bytes).map_err(AllocateError::from)?;
            Ok((limit, self.node.arenas.charge(bytes)?, user))
        });
        let (mut limit, mut charge, mut user) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.fail(error).await?;
                return Err(REFUSED);
            }
        };
        let mut placed = Vec::new();
        while (placed.len() as u64) < count {
            let more = match self.recv().await? {
                Ask::Tensors(more) if !more.is_empty() => more,
                _ => {
                    return Err(ApplicationError::Unexpected(
                        "something instead of its list",
                    ));
                }
            };
            let checked = more.iter().try_for_each(|one| limit.add(&one.info));
            let counted = checked.map_err(TransferError::from).and_then(|()| {
                let bytes = (limit.bytes() + placed.len() * size_of::<Placed>()) as u64;
                user.grow_to(bytes).map_err(AllocateError::from)?;
                Ok(charge.grow_to(bytes)?)
            });
            if let Err(error) = counted {
                self.fail(error).await?;
                return Err(REFUSED);
            }
            placed.extend(more);
        }
        Ok((placed, (charge, user)))
    }

    async fn get(
        &mut self,
        from: Option<String>,
        prefix: String,
        memory: Memory,
    ) -> Result<(), ApplicationError> {
        let (node, progress) = (Arc::clone(&self.node), Progress::default());
        let (room, owner, told) = (self.room(memory), self.owner(), progress.clone());
        let policy = self.policy;
        let operation = async move {
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, from) {
                Some(peer) => {
                    let mut attempts = policy.attempts();
                    let got = loop {
                        let attempt = async {
                            let session = node.session(&peer).await?;
                            transfer::get(&session, &prefix, &room, &told).await
                        };
                        match attempt.await {
                            Ok(got) => break got,
                            Err(error) => attempts.again(&node, error).await?,
                        }
                    };
                    node.counters.dialled(&peer, Direction::Received, &got.1);
                    Ok(got)
                }
                None => {
                    let _given_up = told.give_up_on_drop();
                    let store = node.store.clone();
                    let fetch = move || transfer::get_local(&store, &prefix, &owner, &room, &told);
                    tokio::task::spawn_blocking(fetch)
                        .await
                        .unwrap_or(Err(TransferError::Stopping))
                }
            }
        };
        let (arrived, moved) = match self.attend(operation, &progress).await? {
            Ok(arrived) => arrived,
            Err(error) => return self.fail(error).await,
        };
        let Arrived {
            tensors,
            metadata,
            allocation,
        } = arrived;
        self.send(&Answer::Found {
            count: tensors.len() as u64,
            metadata,
        })
        .await?;
        for tensors in tensors.chunks(TENSORS_PER_MESSAGE) {
            self.send(&Answer::Tensors(tensors.to_vec())).await?;
        }
        self.hand_over(allocation, moved).await
    }

    async fn fetch(
        &mut self,
        from: Option<String>,
        name: String,
        runs: Vec<Run>,
        memory: Memory,
    ) -> Result<(), ApplicationError> {
        let (node, progress) = (Arc::clone(&self.node), Progress::default());
        let (room, owner, told) = (self.room(memory), self.owner(), progress.clone());
        let policy = self.policy;
        let operation = async move {
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, from) {
                Some(peer) => {
                    let mut attempts = policy.attempts();
                    let got = loop {
                        let attempt = async {
                            let session = node.session(&peer).await?;
                            transfer::fetch(&session, &name, runs.clone(), &room, &told).await
                        };
                        match attempt.await {
                            Ok(got) => break got,
                            Err(error) => attempts.again(&node, error).await?,
                        }
                    };
                    node.counters.dialled(&peer, Direction::Received, &got.1);
                    Ok(got)
                }
                None => {
                    let _given_up = told.give_up_on_drop();
                    let store = node.store.clone();
                    let part =
                        move || transfer::part_local(&store, &name, &runs, &owner, &room, &told);
                    tokio::task::spawn_blocking(part)
                        .await
                        .unwrap_or(Err(TransferError::Stopping))
                }
            }
        };
        match self.attend(operation, &progress).await? {
            Ok((arrived, moved)) => self.hand_over(arrived.allocation, moved).await,
            Err(error) => self.fail(error).await,
        }
    }

    /// Passes memory that was filled, and that nobody can change from here on.
    async fn hand_over(
        &mut self,
        allocation: Allocation,
        moved: Moved,
    ) -> Result<(), ApplicationError> {
        if let Some(Err(error)) = allocation.host().map(|region| region.seal()) {
            return self.fail(MemoryError::Seal(error)).await;
        }
        let descriptor = match allocation.descriptor() {
            Ok(descriptor) => descriptor,
            Err(error) => return self.fail(TransferError::from(error)).await,
        };
        // Counted until the application frees it or leaves.
        let arena: ArenaId = self.arenas.add(allocation, true);
        self.send(&Answer::Arrived { arena, moved }).await?;
        pass_descriptor(&self.stream, descriptor).await
    }

    async fn list(
        &mut self,
        node: Option<String>,
        under: Option<String>,
    ) -> Result<(), ApplicationError> {
        let (here, owner) = (Arc::clone(&self.node), self.owner());
        let operation = async move {
            let _busy = here.begin().ok_or(TransferError::Stopping)?;
            match remote(&here, node) {
                None => Ok(here.store.list(under.as_deref(), &owner)),
                Some(peer) => transfer::list(&here.session(&peer).await?, under).await,
            }
        };
        let listed = match self.attend(operation, &Progress::default()).await? {
            Ok(listed) => listed,
            Err(error) => return self.fail(error).await,
        };
        for tensors in listed.chunks(TENSORS_PER_MESSAGE) {
            self.send(&Answer::Listed {
                tensors: tensors.to_vec(),
                last: false,
            })
            .await?;
        }
        self.send(&Answer::Listed {
            tensors: Vec::new(),
            last: true,
        })
        .await
    }

    async fn remove(&mut self, node: Option<String>, name: &str) -> Result<(), ApplicationError> {
        let (here, owner) = (Arc::clone(&self.node), self.owner());
        let operation = async move {
            let _busy = here.begin().ok_or(TransferError::Stopping)?;
            match remote(&here, node) {
                None => Ok(here.store.remove(name, &owner)?),
                Some(peer) => transfer::remove(&here.session(&peer).await?, name).await,
            }
        };
        match self.attend(operation, &Progress::default()).await? {
            Ok(tensors) => self.send(&Answer::Removed { tensors }).await,
            Err(error) => self.fail(error).await,
        }
    }

    /// Drives an operation, tells its progress, and drops it if the
    /// application cancels it or leaves.
    async fn attend<T, E: From<TransferError>>(
        &mut self,
        operation: impl Future<Output = Result<T, E>>,
        progress: &Progress,
    ) -> Result<Result<T, E>, ApplicationError> {
        let mut operation = std::pin::pin!(operation);
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        let mut late = std::pin::pin!(late(self.policy.deadline));
        let mut told = (0, 0);
        while !self.cancelled {
            tokio::select! {
                biased;
                done = &mut operation => return Ok(done),
                limit = &mut late => return Ok(Err(TransferError::Deadline(limit).into())),
                _ = tick.tick() => {
                    let now = progress.get();
                    if now != told && self.tell(now).await? {
                        told = now;
                    }
                }
                first = self.stream.read_u8() => {
                    let first = first.map_err(|_| ApplicationError::GaveUp)?;
                    // Anything else: it no longer waits.
                    match self.rest([first]).await? {
                        Ask::Cancel { request } => self.cancel(request),
                        _ => return Err(ApplicationError::GaveUp),
                    }
                }
            }
        }
        Ok(Err(TransferError::Cancelled.into()))
    }

    /// Tells bytes done and in total, if the application took what it was told
    /// before: nothing waits for one that does not look.
    async fn tell(&mut self, (done, total): (u64, u64)) -> Result<bool, ApplicationError> {
        let frame = frame::encode(&Answer::Progress { done, total })?;
        let written = match self.stream.try_write(&frame) {
            Ok(written) => written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(FrameError::Io(error).into()),
        };
        let rest = timeout(PATIENCE, self.stream.write_all(&frame[written..])).await;
        rest.map_err(|_| ApplicationError::Stalled)?
            .map_err(FrameError::Io)?;
        Ok(true)
    }

    async fn fail(&mut self, error: impl Into<MemoryError>) -> Result<(), ApplicationError> {
        let error = error.into();
        let (kind, message) = (error.kind(), error.to_string());
        self.send(&Answer::Failed { kind, message }).await
    }

    async fn send(&mut self, answer: &Answer) -> Result<(), ApplicationError> {
        let sent = timeout(PATIENCE, frame::write(&mut self.stream, answer)).await;
        Ok(sent.map_err(|_| ApplicationError::Stalled)??)
    }

    /// The next part of a request; cancellations may come in between.
    async fn recv(&mut self) -> Result<Ask, ApplicationError> {
        loop {
            let received = timeout(PATIENCE, frame::read(&mut self.stream, frame::BODY_MAX)).await;
            match received.map_err(|_| ApplicationError::Stalled)?? {
                Ask::Cancel { request } => self.cancel(request),
                ask => return Ok(ask),
            }
        }
    }
}

/// Ends when a deadline is over, if there is one.
async fn late(deadline: Option<Duration>) -> Duration {
    match deadline {
        Some(limit) => {
            tokio::time::sleep(limit).await;
            limit
        }
        None => std::future::pending().await,
    }
}

impl From<TensorError> for MemoryError {
    fn from(error: TensorError) -> Self {
        Self::Transfer(error.into())
    }
}

impl From<SessionError> for MemoryError {
    fn from(error: SessionError) -> Self {
        Self::Transfer(error.into())
    }
}

/// The peer that is meant, unless it is this node itself.
fn remote(node: &Node, name: Option<String>) -> Option<String> {
    name.filter(|name| *name != node.name)
}
