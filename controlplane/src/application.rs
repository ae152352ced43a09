//! The application socket: how programs on this host use the agent.
//!
//! A Unix stream with the same frames as between agents. Tensor bytes never
//! pass through it: they lie in arenas, memory files that the agent makes and
//! whose descriptors it passes with a single byte ([`DESCRIPTOR_BYTE`]) between
//! two frames. The invariant: *the agent never uses memory that an application
//! could still shrink or punch holes into*.
//!
//! ```text
//!   put:  Arena → ← Arena + descriptor   Mapped → ← Sealed
//!         Put, Tensors… →                ← Progress…   ← Moved
//!   get:  Get →                          ← Progress…   ← Found, Tensors…, Moved + descriptor
//!   List → ← Listed…      Remove → ← Removed      Status → ← Status
//! ```
//!
//! Any request may be answered by `Failed`; the connection then goes on. While
//! tensors move the application sends nothing: whatever comes, also the end of
//! the connection, gives the move up.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::frame::{self, FrameError};
use crate::node::Node;
use crate::session::SessionError;
use crate::status::AgentStatus;
use crate::store::{Allocation, Listed, Owner};
use crate::tensor::{ListLimit, Metadata, TensorError, TensorInfo};
use crate::transfer::{self, Arrived, Moved, Progress, Source, TransferError};

/// Carries a descriptor between two frames.
pub const DESCRIPTOR_BYTE: u8 = 0xfd;

/// Tensors in one message.
pub const TENSORS_PER_MESSAGE: usize = 2048;

/// How often progress is told: often enough for a bar to move smoothly.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How long an application may leave an answer unread, or a frame unfinished.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an application asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Memory of at least this many bytes to put tensors from.
    Arena {
        /// How many.
        bytes: u64,
    },
    /// The arena was mapped; seal it.
    Mapped,
    /// Put tensors that lie in the arena; their list follows.
    Put {
        /// To which node's store; none for this agent's own.
        node: Option<String>,
        /// Under which prefix.
        prefix: String,
        /// How many tensors.
        count: u64,
        /// Kept with the prefix.
        metadata: Option<Metadata>,
    },
    /// More of the list.
    Tensors(Vec<Placed>),
    /// Fetch tensors.
    Get {
        /// From which node's store; none for this agent's own.
        node: Option<String>,
        /// Under which prefix.
        prefix: String,
    },
    /// List a store.
    List {
        /// Whose; none for this agent's own.
        node: Option<String>,
    },
    /// Remove tensors.
    Remove {
        /// From whose store; none for this agent's own.
        node: Option<String>,
        /// A full name or a prefix.
        name: String,
    },
    /// Describe yourself.
    Status,
}

/// A tensor in an arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// What it is.
    pub info: TensorInfo,
    /// Its first byte in the arena.
    pub offset: u64,
}

/// What the agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The arena's descriptor follows.
    Arena,
    /// The arena can be used.
    Sealed,
    /// Bytes moved so far.
    Progress {
        /// Verified.
        done: u64,
        /// To be moved.
        total: u64,
    },
    /// What was fetched; its list follows.
    Found {
        /// How many tensors.
        count: u64,
        /// The prefix's metadata.
        metadata: Option<Metadata>,
    },
    /// More of the list: one after the other in the memory that follows `Moved`.
    Tensors(Vec<TensorInfo>),
    /// The batch has moved. After a get the memory's descriptor follows.
    Moved(Moved),
    /// More of a listing.
    Listed {
        /// Stored tensors.
        tensors: Vec<Listed>,
        /// Whether this is all.
        last: bool,
    },
    /// So many tensors were removed.
    Removed {
        /// How many.
        tensors: u64,
    },
    /// The agent's picture.
    Status(Box<AgentStatus>),
    /// It could not be done.
    Failed {
        /// What failed, why, and what to do.
        message: String,
    },
}

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
    /// A descriptor could not be passed.
    #[error("cannot pass a descriptor: {0}")]
    Descriptor(std::io::Error),
}

/// Why one request failed; the connection goes on.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error("there is no sealed arena to put from: ask for one first")]
    NoArena,
    #[error("tensor {name:?} lies outside the arena")]
    OutsideArena { name: String },
    #[error("the arena cannot be sealed: {0}")]
    Seal(genie_dataplane::memory::RegionError),
}

/// Serves one application until it leaves.
pub async fn serve(node: Arc<Node>, mut stream: UnixStream) -> Result<(), ApplicationError> {
    let uid = stream.peer_cred().map_err(FrameError::Io)?.uid();
    let exchanged = timeout(PATIENCE, frame::exchange_preamble(&mut stream)).await;
    exchanged.map_err(|_| ApplicationError::Stalled)??;
    let mut application = Application {
        node,
        stream,
        owner: Owner::User(uid),
        arena: None,
    };
    loop {
        // An idle application may keep its connection; a frame once begun must end.
        let mut first = [0];
        if application
            .stream
            .read(&mut first)
            .await
            .map_err(FrameError::Io)?
            == 0
        {
            return Ok(());
        }
        let mut rest = first.chain(&mut application.stream);
        let ask = timeout(PATIENCE, frame::read(&mut rest, frame::BODY_MAX)).await;
        application
            .answer(ask.map_err(|_| ApplicationError::Stalled)??)
            .await?;
    }
}

struct Application {
    node: Arc<Node>,
    stream: UnixStream,
    owner: Owner,
    arena: Option<Arena>,
}

struct Arena {
    allocation: Arc<Allocation>,
    sealed: bool,
}

impl Application {
    async fn answer(&mut self, ask: Ask) -> Result<(), ApplicationError> {
        match ask {
            Ask::Arena { bytes } => self.arena(bytes).await,
            Ask::Mapped => self.seal().await,
            Ask::Put {
                node,
                prefix,
                count,
                metadata,
            } => self.put(node, prefix, count, metadata).await,
            Ask::Get { node, prefix } => self.get(node, prefix).await,
            Ask::List { node } => self.list(node).await,
            Ask::Remove { node, name } => self.remove(node, &name).await,
            Ask::Status => {
                let status = Box::new(self.node.status());
                self.send(&Answer::Status(status)).await
            }
            Ask::Tensors(_) => Err(ApplicationError::Unexpected(
                "a list that nothing asked for",
            )),
        }
    }

    async fn arena(&mut self, bytes: u64) -> Result<(), ApplicationError> {
        // One arena a connection: the one before goes first, to make room.
        self.arena = None;
        if self.node.begin().is_none() {
            return self.fail(TransferError::Stopping).await;
        }
        let budget = self.node.arenas.clone();
        let allocated = tokio::task::spawn_blocking(move || budget.allocate(bytes)).await;
        let allocation = match allocated {
            Ok(Ok(allocation)) => allocation,
            Ok(Err(error)) => return self.fail(TransferError::from(error)).await,
            Err(_) => return self.fail(TransferError::Stopping).await,
        };
        if let Some(reason) = &allocation.fallback {
            tracing::debug!(%reason, bytes, "an arena is not on huge pages");
        }
        self.send(&Answer::Arena).await?;
        pass_descriptor(&self.stream, allocation.region().as_fd()).await?;
        self.arena = Some(Arena {
            allocation,
            sealed: false,
        });
        Ok(())
    }

    async fn seal(&mut self) -> Result<(), ApplicationError> {
        let Some(arena) = &mut self.arena else {
            return self.fail(Refused::NoArena).await;
        };
        match arena.allocation.region().seal() {
            Ok(()) => arena.sealed = true,
            Err(error) => return self.fail(Refused::Seal(error)).await,
        }
        self.send(&Answer::Sealed).await
    }

    async fn put(
        &mut self,
        to: Option<String>,
        prefix: String,
        count: u64,
        metadata: Option<Metadata>,
    ) -> Result<(), ApplicationError> {
        let begun = ListLimit::new(count, metadata.as_ref()).map_err(TransferError::from);
        let begun = begun.and_then(|limit| {
            let charge = self.node.arenas.charge(limit.bytes() as u64)?;
            Ok((limit, charge))
        });
        let (mut limit, mut charge) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.fail(error).await?;
                return Err(ApplicationError::Unexpected("a list that is refused"));
            }
        };
        let mut placed = Vec::new();
        while (placed.len() as u64) < count {
            match self.recv().await? {
                Ask::Tensors(more) if !more.is_empty() => {
                    let checked = more.iter().try_for_each(|one| limit.add(&one.info));
                    let counted = checked.map_err(TransferError::from).and_then(|()| {
                        let bytes = limit.bytes() + more.len() * size_of::<u64>();
                        Ok(charge.grow_to(bytes as u64)?)
                    });
                    if let Err(error) = counted {
                        // What is still to come of the list cannot be told
                        // from the next request: this ends the connection.
                        self.fail(error).await?;
                        return Err(ApplicationError::Unexpected("a list that is refused"));
                    }
                    placed.extend(more);
                }
                _ => {
                    return Err(ApplicationError::Unexpected(
                        "something instead of its list",
                    ));
                }
            }
        }
        let sources = match self.sources(placed) {
            Ok(sources) => sources,
            Err(refused) => return self.fail(refused).await,
        };
        let (node, owner, progress) = (
            Arc::clone(&self.node),
            self.owner.clone(),
            Progress::default(),
        );
        let told = progress.clone();
        let operation = async move {
            let _charge = charge;
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, to) {
                Some(peer) => {
                    let session = node.session(&peer).await?;
                    transfer::put(&session, &prefix, sources, metadata, &told).await
                }
                None => {
                    let _given_up = told.give_up_on_drop();
                    let store = node.store.clone();
                    let keep = move || {
                        transfer::put_local(&store, &prefix, &sources, metadata, &owner, &told)
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

    fn sources(&self, placed: Vec<Placed>) -> Result<Vec<Source>, Refused> {
        let arena = self
            .arena
            .as_ref()
            .filter(|arena| arena.sealed)
            .ok_or(Refused::NoArena)?;
        let region = arena.allocation.region();
        let source = |Placed { info, offset }| {
            let len = TensorInfo::len_bytes(&info).map_err(TransferError::from)?;
            let lease = genie_dataplane::memory::Lease::new(Arc::clone(region), offset, len)
                .map_err(|_| Refused::OutsideArena {
                    name: info.name.clone(),
                })?;
            Ok(Source { info, lease })
        };
        placed.into_iter().map(source).collect()
    }

    async fn get(&mut self, from: Option<String>, prefix: String) -> Result<(), ApplicationError> {
        let (node, progress) = (Arc::clone(&self.node), Progress::default());
        let told = progress.clone();
        let operation = async move {
            let _busy = node.begin().ok_or(TransferError::Stopping)?;
            match remote(&node, from) {
                Some(peer) => {
                    let session = node.session(&peer).await?;
                    transfer::get(&session, &prefix, &node.arenas, &told).await
                }
                None => {
                    let _given_up = told.give_up_on_drop();
                    let (store, arenas) = (node.store.clone(), node.arenas.clone());
                    let fetch = move || transfer::get_local(&store, &prefix, &arenas, &told);
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
        // From here on nobody but us can write it.
        if let Err(error) = allocation.region().seal() {
            return self.fail(Refused::Seal(error)).await;
        }
        self.send(&Answer::Found {
            count: tensors.len() as u64,
            metadata,
        })
        .await?;
        for tensors in tensors.chunks(TENSORS_PER_MESSAGE) {
            self.send(&Answer::Tensors(tensors.to_vec())).await?;
        }
        self.send(&Answer::Moved(moved)).await?;
        pass_descriptor(&self.stream, allocation.region().as_fd()).await?;
        // Counted until the application asks for something else or leaves.
        self.arena = Some(Arena {
            allocation,
            sealed: true,
        });
        Ok(())
    }

    async fn list(&mut self, node: Option<String>) -> Result<(), ApplicationError> {
        let node_here = Arc::clone(&self.node);
        let Some(_busy) = node_here.begin() else {
            return self.fail(TransferError::Stopping).await;
        };
        let listed = match remote(&self.node, node) {
            None => Ok(self.node.store.list()),
            Some(peer) => match self.node.session(&peer).await {
                Ok(session) => transfer::list(&session).await,
                Err(error) => Err(error.into()),
            },
        };
        let listed = match listed {
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
        let node_here = Arc::clone(&self.node);
        let Some(_busy) = node_here.begin() else {
            return self.fail(TransferError::Stopping).await;
        };
        let removed = match remote(&self.node, node) {
            None => self.node.store.remove(name).map_err(TransferError::from),
            Some(peer) => match self.node.session(&peer).await {
                Ok(session) => transfer::remove(&session, name).await,
                Err(error) => Err(error.into()),
            },
        };
        match removed {
            Ok(tensors) => self.send(&Answer::Removed { tensors }).await,
            Err(error) => self.fail(error).await,
        }
    }

    /// Drives an operation, tells its progress, and drops it if the
    /// application leaves.
    async fn attend<T>(
        &mut self,
        operation: impl Future<Output = T>,
        progress: &Progress,
    ) -> Result<T, ApplicationError> {
        let mut operation = std::pin::pin!(operation);
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        let mut told = (0, 0);
        loop {
            tokio::select! {
                biased;
                done = &mut operation => return Ok(done),
                _ = tick.tick() => {
                    let now = progress.get();
                    if now != told {
                        told = now;
                        let (done, total) = now;
                        self.send(&Answer::Progress { done, total }).await?;
                    }
                }
                // Bytes or the end: either way it no longer waits.
                _ = self.stream.read_u8() => return Err(ApplicationError::GaveUp),
            }
        }
    }

    async fn fail(&mut self, error: impl Into<Refused>) -> Result<(), ApplicationError> {
        let message = error.into().to_string();
        self.send(&Answer::Failed { message }).await
    }

    async fn send(&mut self, answer: &Answer) -> Result<(), ApplicationError> {
        let sent = timeout(PATIENCE, frame::write(&mut self.stream, answer)).await;
        Ok(sent.map_err(|_| ApplicationError::Stalled)??)
    }

    async fn recv(&mut self) -> Result<Ask, ApplicationError> {
        let received = timeout(PATIENCE, frame::read(&mut self.stream, frame::BODY_MAX)).await;
        Ok(received.map_err(|_| ApplicationError::Stalled)??)
    }
}

impl From<TensorError> for Refused {
    fn from(error: TensorError) -> Self {
        Self::Transfer(error.into())
    }
}

impl From<SessionError> for Refused {
    fn from(error: SessionError) -> Self {
        Self::Transfer(error.into())
    }
}

/// The peer that is meant, unless it is this node itself.
fn remote(node: &Node, name: Option<String>) -> Option<String> {
    name.filter(|name| *name != node.name)
}

async fn pass_descriptor(stream: &UnixStream, fd: BorrowedFd<'_>) -> Result<(), ApplicationError> {
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = [IoSlice::new(&[DESCRIPTOR_BYTE])];
        rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    };
    timeout(PATIENCE, stream.async_io(Interest::WRITABLE, send))
        .await
        .map_err(|_| ApplicationError::Stalled)?
        .map_err(ApplicationError::Descriptor)
}
