//! A connection to this host's agent, for blocking code.
//!
//! One request at a time, and batches of ranges beside it. Tensor bytes go through arenas, never through the
//! socket. The invariant: *after a failure that leaves it unclear what the
//! agent will say next, nothing more is said*: every later request is refused
//! as [`ClientError::Lost`], and whether to connect again is the caller's choice.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use genie_dataplane::memory::accelerator::{AcceleratorError, MemoryKind};
use genie_dataplane::memory::{Region, RegionError};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::arena::{Arena, Fetched, Hold, Imported, Tensor, Unneeded};
use crate::batch::{BatchError, Batches};
use crate::descriptor;
use crate::frame::{self, FrameError};
use crate::protocol::{
    Answer, ArenaId, Ask, FailureKind, Listed, Memory, Moved, TENSORS_PER_MESSAGE,
};
use crate::remote::{Part, RemoteTensor, Selection};
use crate::status::AgentStatus;
use crate::tensor::{Dtype, Metadata, TensorInfo};

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No agent there.
    #[error(
        "no agent listens on {}: start one with 'genie agent', or name its socket with --socket",
        .0.display()
    )]
    NoAgent(PathBuf),
    /// The socket's permissions.
    #[error(
        "no permission to use {}: run as root, or as a member of the group that 'ls -l {}' shows",
        .0.display(), .0.display()
    )]
    Permission(PathBuf),
    /// Anything else about connecting.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The agent went away or was not understood; connect again to go on.
    #[error(
        "the agent: {}; 'genie status' shows whether it still runs",
        .0.as_ref().map_or("the connection was lost".to_owned(), FrameError::to_string)
    )]
    Lost(#[source] Option<FrameError>),
    /// The agent's answer has no place here.
    #[error("the agent answered something unexpected: is it of the same version as this program?")]
    Unexpected,
    /// No descriptor came where one should.
    #[error("the agent passed no memory")]
    NoDescriptor,
    /// The memory could not be mapped.
    #[error("cannot map the arena: {0}")]
    Map(#[from] RegionError),
    /// The accelerator that the memory is of.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
    /// An accelerator's memory cannot be mapped.
    #[error("the host cannot look into memory of {0}: use the calls for accelerators")]
    OnDevice(MemoryKind),
    /// A tensor that lies in an arena of another connection.
    #[error("tensor {0:?} lies in an arena of another connection: put it through that one")]
    OtherConnection(String),
    /// A batch that cannot be.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The agent says why.
    #[error("{message}")]
    Failed {
        /// What kind of failure.
        kind: FailureKind,
        /// What failed, why, and what to do.
        message: String,
    },
}

/// A connection to the local agent. One request at a time, and batches beside it.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    writer: Writer,
    pub(crate) connection: u64,
    unneeded: Unneeded,
    pub(crate) batches: Batches,
    lost: bool,
}

/// Cancels requests of a connection, from whichever thread. Clones are the same.
#[derive(Clone, Debug)]
pub struct Canceller(pub(crate) Writer);

/// The writing end of a connection, and how many requests went through it.
#[derive(Clone, Debug)]
pub(crate) struct Writer(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    stream: UnixStream,
    requests: u64,
    /// The first request of several that are stopped together.
    first: u64,
    /// Whether these are not wanted any more.
    stopped: bool,
}

impl Canceller {
    /// Asks the agent to end the request that is under way, if one is: it then
    /// fails as [`FailureKind::Cancelled`], at both ends. The connection goes on.
    pub fn cancel(&self) {
        let mut written = self.0.lock();
        if let Some(request) = written.requests.checked_sub(1) {
            // An agent that is gone has ended it already.
            let _ = frame::write_blocking(&mut written.stream, &Ask::Cancel { request });
        }
    }
}

impl Writer {
    fn lock(&self) -> MutexGuard<'_, Written> {
        // A panic within a frame ends in an error of the agent's.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cancel(&self, request: u64) {
        let mut written = self.lock();
        let _ = frame::write_blocking(&mut written.stream, &Ask::Cancel { request });
    }

    /// From here on requests belong together.
    pub(crate) fn begin_call(&self) {
        let mut written = self.lock();
        written.first = written.requests;
        written.stopped = false;
    }

    /// Cancels the requests that belong together, those still to be written too.
    pub(crate) fn stop_call(&self) {
        let mut written = self.lock();
        written.stopped = true;
        for request in written.first..written.requests {
            let _ = frame::write_blocking(&mut written.stream, &Ask::Cancel { request });
        }
    }

    /// Writes a part of a request, or a request and its descriptor.
    fn write(&self, ask: &Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<u64, FrameError> {
        let mut written = self.lock();
        let number = written.requests;
        if !matches!(ask, Ask::Tensors(_)) {
            written.requests += 1;
        }
        frame::write_blocking(&mut written.stream, ask)?;
        if let Some(descriptor) = descriptor {
            descriptor::pass(&written.stream, descriptor).map_err(FrameError::Io)?;
        }
        if written.stopped && written.requests > number {
            let request = number;
            frame::write_blocking(&mut written.stream, &Ask::Cancel { request })?;
        }
        Ok(number)
    }
}

impl Client {
    /// Connects to the agent's socket.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
        let path = path.as_ref();
        let mut stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoAgent(path.to_owned())
            }
            io::ErrorKind::PermissionDenied => ClientError::Permission(path.to_owned()),
            _ => ClientError::Connect {
                path: path.to_owned(),
                source,
            },
        })?;
        frame::exchange_preamble_blocking(&mut stream)
            .map_err(|error| turned_away(&mut stream, error))?;
        let writing = stream.try_clone().map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let writer = Writer(Arc::new(Mutex::new(Written {
            stream: writing,
            requests: 0,
            first: 0,
            stopped: false,
        })));
        Ok(Self {
            stream,
            writer,
            batches: Batches::default(),
            connection: CONNECTIONS.fetch_add(1, Ordering::Relaxed),
            unneeded: Unneeded::default(),
            lost: false,
        })
    }

    /// How patient the agent shall be with this connection's requests from now on.
    ///
    /// One that takes longer than `deadline` fails as [`FailureKind::Deadline`].
    /// A put, get or fetch whose session is lost, or cannot be opened, is tried
    /// again for `retry`, after pauses that grow to 2 s at most; a put is then
    /// done once, even if only the word that it was done is lost, unless the
    /// peer is another run than before: that one's store is empty. Without
    /// either, which is how a connection begins, a request ends with its session.
    pub fn set_patience(
        &mut self,
        deadline: Option<Duration>,
        retry: Option<Duration>,
    ) -> Result<(), ClientError> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.ask(&Ask::Patience {
            deadline_ms: deadline.map(ms),
            retry_ms: retry.map(ms),
        })?;
        match self.recv()? {
            Answer::Done { .. } => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    /// Asks for memory of at least `bytes`, shared with the agent.
    pub fn arena(&mut self, bytes: u64, memory: Memory) -> Result<Arena, ClientError> {
        host_only(memory)?;
        let (hold, file, reason) = self.ask_memory(bytes, memory)?;
        let arena = hold.id;
        let region = Region::from_memfd(file)?;
        self.ask(&Ask::Mapped { arena })?;
        let Answer::Sealed = self.recv()? else {
            return Err(self.unexpected());
        };
        Ok(Arena::new(hold, region, reason))
    }

    /// Memory of a device's.
    pub(crate) fn ask_arena(
        &mut self,
        bytes: u64,
        memory: Memory,
    ) -> Result<(Arc<Hold>, OwnedFd), ClientError> {
        let (hold, file, _) = self.ask_memory(bytes, memory)?;
        Ok((hold, file))
    }

    fn ask_memory(
        &mut self,
        bytes: u64,
        memory: Memory,
    ) -> Result<(Arc<Hold>, OwnedFd, Option<String>), ClientError> {
        self.ask(&Ask::Arena { bytes, memory })?;
        let Answer::Arena { arena, reason } = self.recv()? else {
            return Err(self.unexpected());
        };
        let hold = self.hold(arena);
        Ok((hold, self.recv_descriptor()?, reason))
    }

    /// Lets the agent use a memory file as it is, without a copy.
    ///
    /// It must have the seals SHRINK, GROW, SEAL and WRITE or FUTURE_WRITE;
    /// the agent names those that are missing.
    pub fn import(&mut self, memory: impl AsFd) -> Result<Imported, ClientError> {
        self.ask_with(&Ask::Import, Some(memory.as_fd()))?;
        self.recv_imported(|_, _| {})
    }

    /// Lets the agent read `bytes` at `offset` of a file into memory of its
    /// own: one copy, the kernel's.
    pub fn read_file(
        &mut self,
        file: impl AsFd,
        offset: u64,
        bytes: u64,
        memory: Memory,
    ) -> Result<Imported, ClientError> {
        host_only(memory)?;
        let read = Ask::Read {
            offset,
            bytes,
            memory,
        };
        self.ask_with(&read, Some(file.as_fd()))?;
        self.recv_imported(|_, _| {})
    }

    /// Puts tensors under `prefix`, on `node` or locally.
    pub fn put(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        tensors: &[Tensor],
        metadata: Option<Metadata>,
    ) -> Result<Moved, ClientError> {
        self.put_with(node, prefix, tensors, metadata, |_, _| {})
    }

    /// [`Client::put`], telling bytes done and in total.
    pub fn put_with(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        tensors: &[Tensor],
        metadata: Option<Metadata>,
        progress: impl FnMut(u64, u64),
    ) -> Result<Moved, ClientError> {
        self.put_into(node, prefix, tensors, metadata, Memory::Auto, progress)
    }

    /// [`Client::put_with`], to be kept in an accelerator's memory if `memory`
    /// names one; which pages host memory has is the store's own choice.
    pub fn put_into(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        tensors: &[Tensor],
        metadata: Option<Metadata>,
        memory: Memory,
        progress: impl FnMut(u64, u64),
    ) -> Result<Moved, ClientError> {
        let is_other = |tensor: &&Tensor| tensor.hold().connection != self.connection;
        if let Some(other) = tensors.iter().find(is_other) {
            return Err(ClientError::OtherConnection(other.info().name.clone()));
        }
        let (node, prefix) = (node.map(str::to_owned), prefix.to_owned());
        let count = tensors.len() as u64;
        self.ask(&Ask::Put {
            node,
            prefix,
            count,
            metadata,
            memory,
        })?;
        for tensors in tensors.chunks(TENSORS_PER_MESSAGE) {
            let placed = tensors.iter().map(Tensor::placed).collect();
            self.say(&Ask::Tensors(placed), None)?;
        }
        match self.recv_after(progress)? {
            Answer::Moved(moved) => Ok(moved),
            _ => Err(self.unexpected()),
        }
    }

    /// Fetches the tensors under `prefix`, from `node` or locally.
    pub fn get(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        memory: Memory,
    ) -> Result<Fetched, ClientError> {
        self.get_with(node, prefix, memory, |_, _| {})
    }

    /// [`Client::get`], telling bytes done and in total.
    pub fn get_with(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        memory: Memory,
        progress: impl FnMut(u64, u64),
    ) -> Result<Fetched, ClientError> {
        host_only(memory)?;
        let (tensors, metadata) = self.ask_get(node, prefix, memory, progress)?;
        let answer = self.recv()?;
        let (moved, region, hold) = self.recv_arrived(answer)?;
        Ok(Fetched {
            tensors,
            metadata,
            moved,
            region,
            _hold: hold,
        })
    }

    /// Asks for tensors; returns what was found, before it is passed.
    pub(crate) fn ask_get(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        memory: Memory,
        progress: impl FnMut(u64, u64),
    ) -> Result<(Vec<TensorInfo>, Option<Metadata>), ClientError> {
        let (node, prefix) = (node.map(str::to_owned), prefix.to_owned());
        self.ask(&Ask::Get {
            node,
            prefix,
            memory,
        })?;
        let Answer::Found { count, metadata } = self.recv_after(progress)? else {
            return Err(self.unexpected());
        };
        let mut tensors = Vec::new();
        while (tensors.len() as u64) < count {
            match self.recv()? {
                Answer::Tensors(more) => tensors.extend(more),
                _ => return Err(self.unexpected()),
            }
        }
        Ok((tensors, metadata))
    }

    /// A handle on the tensor of this full name, on `node` or locally.
    pub fn open(&mut self, node: Option<&str>, name: &str) -> Result<RemoteTensor, ClientError> {
        let found = self.find(node, name)?;
        let exact = found.into_iter().find(|tensor| tensor.info.name == name);
        exact.ok_or_else(|| ClientError::Failed {
            kind: FailureKind::NotFound,
            message: format!("no tensor is called {name:?}; 'genie ls' shows what there is"),
        })
    }

    /// Handles on the tensors under `prefix`, on `node` or locally.
    pub fn find(
        &mut self,
        node: Option<&str>,
        prefix: &str,
    ) -> Result<Vec<RemoteTensor>, ClientError> {
        let mut listed = self.list_under(node, Some(prefix))?;
        listed.retain(|listed| !listed.window);
        let handle = |listed: Listed| {
            let dtype = parse_dtype(&listed.dtype).ok_or(ClientError::Unexpected)?;
            Ok(RemoteTensor {
                node: node.map(str::to_owned),
                info: TensorInfo {
                    name: listed.name,
                    dtype,
                    shape: listed.shape,
                },
                owner: listed.owner,
            })
        };
        listed.into_iter().map(handle).collect()
    }

    /// Fetches a part of a tensor; only that part travels.
    pub fn fetch(
        &mut self,
        tensor: &RemoteTensor,
        part: Selection,
        memory: Memory,
    ) -> Result<Part, ClientError> {
        host_only(memory)?;
        let Selection { runs, shape, dtype } = part;
        self.ask(&Ask::Fetch {
            node: tensor.node.clone(),
            name: tensor.info.name.clone(),
            runs,
            memory,
        })?;
        let answer = self.recv_after(|_, _| {})?;
        let (moved, region, hold) = self.recv_arrived(answer)?;
        Ok(Part {
            dtype,
            shape,
            moved,
            region,
            _hold: hold,
        })
    }

    /// Lists the store of `node`, or the local one: what this user may see of it.
    pub fn list(&mut self, node: Option<&str>) -> Result<Vec<Listed>, ClientError> {
        self.list_under(node, None)
    }

    pub(crate) fn list_under(
        &mut self,
        node: Option<&str>,
        under: Option<&str>,
    ) -> Result<Vec<Listed>, ClientError> {
        self.ask(&Ask::List {
            node: node.map(str::to_owned),
            under: under.map(str::to_owned),
        })?;
        let mut listed = Vec::new();
        loop {
            match self.recv()? {
                Answer::Listed { tensors, last } => {
                    listed.extend(tensors);
                    if last {
                        return Ok(listed);
                    }
                }
                _ => return Err(self.unexpected()),
            }
        }
    }

    /// Removes a tensor, or all under a prefix; returns how many.
    pub fn remove(&mut self, node: Option<&str>, name: &str) -> Result<u64, ClientError> {
        self.ask(&Ask::Remove {
            node: node.map(str::to_owned),
            name: name.to_owned(),
        })?;
        match self.recv()? {
            Answer::Removed { tensors } => Ok(tensors),
            _ => Err(self.unexpected()),
        }
    }

    /// The agent's picture of itself.
    pub fn status(&mut self) -> Result<AgentStatus, ClientError> {
        self.ask(&Ask::Status)?;
        match self.recv()? {
            Answer::Status(status) => Ok(*status),
            _ => Err(self.unexpected()),
        }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The agent's process, if it is in this process's namespace.
    pub fn agent_process(&self) -> Option<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    /// Whether the agent has said something, or does within `limit`.
    pub(crate) fn is_readable(&self, limit: Duration) -> bool {
        let mut waits = [PollFd::new(&self.stream, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        // EINTR only ends the wait early.
        rustix::event::poll(&mut waits, limit.as_ref()).is_ok_and(|ready| ready > 0)
    }

    /// What cancels this connection's requests from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.writer.clone())
    }

    /// Begins a request, after giving back what is not needed any more.
    pub(crate) fn ask(&mut self, ask: &Ask) -> Result<u64, ClientError> {
        self.ask_with(ask, None)
    }

    pub(crate) fn ask_with(
        &mut self,
        ask: &Ask,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<u64, ClientError> {
        let unneeded = {
            let mut unneeded = self.unneeded.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *unneeded)
        };
        for arena in unneeded {
            self.say(&Ask::Free { arena }, None)?;
            let Answer::Freed = self.recv()? else {
                return Err(self.unexpected());
            };
        }
        self.say(ask, descriptor)
    }

    fn say(&mut self, ask: &Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<u64, ClientError> {
        if self.lost {
            return Err(ClientError::Lost(None));
        }
        self.writer.write(ask, descriptor).map_err(|error| {
            self.lost = true;
            turned_away(&mut self.stream, error)
        })
    }

    /// The next answer that is not a batch's.
    pub(crate) fn recv(&mut self) -> Result<Answer, ClientError> {
        loop {
            match self.recv_any()? {
                Answer::Completed { request, result } => self.batches.end(request, result),
                Answer::Failed { kind, message } => {
                    return Err(ClientError::Failed { kind, message });
                }
                answer => return Ok(answer),
            }
        }
    }

    /// Waits until another batch has ended.
    pub(crate) fn recv_batch(&mut self) -> Result<(), ClientError> {
        match self.recv_any()? {
            Answer::Completed { request, result } => {
                self.batches.end(request, result);
                Ok(())
            }
            _ => Err(self.unexpected()),
        }
    }

    fn recv_any(&mut self) -> Result<Answer, ClientError> {
        if self.lost {
            return Err(ClientError::Lost(None));
        }
        let read = frame::read_blocking(&mut self.stream, frame::BODY_MAX);
        read.map_err(|error| self.lost(error))
    }

    /// The next answer that is not about progress.
    fn recv_after(&mut self, mut progress: impl FnMut(u64, u64)) -> Result<Answer, ClientError> {
        loop {
            match self.recv()? {
                Answer::Progress { done, total } => progress(done, total),
                answer => return Ok(answer),
            }
        }
    }

    pub(crate) fn recv_imported(
        &mut self,
        progress: impl FnMut(u64, u64),
    ) -> Result<Imported, ClientError> {
        let Answer::Imported {
            arena,
            bytes,
            copied,
        } = self.recv_after(progress)?
        else {
            return Err(self.unexpected());
        };
        Ok(Imported {
            hold: self.hold(arena),
            len: bytes,
            copied,
        })
    }

    fn recv_arrived(
        &mut self,
        answer: Answer,
    ) -> Result<(Moved, Arc<Region>, Arc<Hold>), ClientError> {
        let (moved, file, hold) = self.recv_descriptor_of(answer)?;
        let region = Region::import(file, usize::MAX)?;
        if (region.len() as u64) < moved.bytes {
            return Err(self.unexpected());
        }
        Ok((moved, region, hold))
    }

    /// How tensors moved, and a descriptor of the memory they are in.
    pub(crate) fn recv_moved(&mut self) -> Result<(Moved, OwnedFd, Arc<Hold>), ClientError> {
        let answer = self.recv()?;
        self.recv_descriptor_of(answer)
    }

    fn recv_descriptor_of(
        &mut self,
        answer: Answer,
    ) -> Result<(Moved, OwnedFd, Arc<Hold>), ClientError> {
        let Answer::Arrived { arena, moved } = answer else {
            return Err(self.unexpected());
        };
        let hold = self.hold(arena);
        Ok((moved, self.recv_descriptor()?, hold))
    }

    fn recv_descriptor(&mut self) -> Result<OwnedFd, ClientError> {
        match descriptor::take(&self.stream) {
            Ok(Some(descriptor)) => Ok(descriptor),
            Ok(None) => {
                self.lost = true;
                Err(ClientError::NoDescriptor)
            }
            Err(error) => Err(self.lost(FrameError::Io(error))),
        }
    }

    fn hold(&self, id: ArenaId) -> Arc<Hold> {
        Arc::new(Hold {
            connection: self.connection,
            id,
            unneeded: Arc::clone(&self.unneeded),
        })
    }

    fn lost(&mut self, error: FrameError) -> ClientError {
        self.lost = true;
        ClientError::Lost(Some(error))
    }

    pub(crate) fn unexpected(&mut self) -> ClientError {
        self.lost = true;
        ClientError::Unexpected
    }
}

/// Refuses what only the calls for accelerators can take.
fn host_only(memory: Memory) -> Result<(), ClientError> {
    match memory.kind() {
        MemoryKind::Host => Ok(()),
        kind => Err(ClientError::OnDevice(kind)),
    }
}

/// Why nothing can be written: an agent that closes says so before.
fn turned_away(stream: &mut UnixStream, error: FrameError) -> ClientError {
    match frame::read_blocking(stream, frame::BODY_MAX) {
        Ok(Answer::Failed { kind, message }) => ClientError::Failed { kind, message },
        _ => ClientError::Lost(Some(error)),
    }
}

/// A type by the name that safetensors gives it.
fn parse_dtype(name: &str) -> Option<Dtype> {
    use serde::Deserialize;
    use serde::de::IntoDeserializer;
    let name: serde::de::value::StrDeserializer<'_, serde::de::value::Error> =
        name.into_deserializer();
    Dtype::deserialize(name).ok()
}
