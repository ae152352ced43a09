//! What programs and their host's agent say to each other.
//!
//! A Unix stream with the same frames as between agents. Tensor bytes never
//! pass through it: they lie in arenas, memory files whose descriptors are
//! passed with a single byte ([`DESCRIPTOR_BYTE`]) between two frames. An arena
//! belongs to the connection that asked for it and ends with it.
//!
//! ```text
//!   new arena:    Arena →                    ← Arena + descriptor
//!                 Mapped →                   ← Sealed
//!   own memory:   Import + descriptor →      ← Imported
//!                 ImportDevice + descriptor →   ← Imported   (a legacy handle: no descriptor)
//!   a file:       Read + descriptor →        ← Progress…   ← Imported
//!   put:          Put, Tensors… →            ← Progress…   ← Moved
//!   get:          Get →                      ← Progress…   ← Found, Tensors…, Arrived + descriptor
//!   a part:       Fetch →                    ← Progress…   ← Arrived + descriptor
//!   Free → ← Freed   List → ← Listed…   Remove → ← Removed   Status → ← Status
//!   Window, Register, Seal, Listen, Notify →   ← Done
//!   Await →           ← Notified
//!   ranges:       Batch →   (other requests, and their answers)   ← Completed
//!   Cancel →          (no answer of its own)
//! ```
//!
//! Any request may be answered by `Failed`; the connection then goes on.
//! Requests are answered one after the other, except batches: many of them can
//! be under way, and each is answered when it ends, between two other answers.
//! Requests are numbered as they are asked, from 0 on; lists and `Cancel` are
//! not counted. `Cancel` names the request that it is about, and is of no
//! effect if that has ended. While anything but batches is under way nothing
//! else may be sent: whatever comes, also the end of the connection, gives it up.

use std::fmt;
use std::str::FromStr;

use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::accelerator::MemoryKind;
use serde::{Deserialize, Serialize};

use crate::slice::Run;
use crate::status::AgentStatus;
use crate::tensor::{Metadata, TensorError, TensorInfo, check_name, deserialize_shape};

/// Carries a descriptor between two frames.
pub const DESCRIPTOR_BYTE: u8 = 0xfd;

/// Tensors in one message.
pub const TENSORS_PER_MESSAGE: usize = 2048;

/// Names an arena on its connection; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ArenaId(pub u32);

/// Which pages memory shall have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// Huge pages where they can be had and are worth it, else ordinary ones.
    #[default]
    Auto,
    /// Ordinary pages.
    Host,
    /// Huge pages, or an error that says why not.
    Hugepage,
    /// The memory of this CUDA device.
    Cuda(u32),
    /// The memory of the simulated accelerator.
    Sim,
}

/// A legacy handle of a whole allocation on a CUDA device, from
/// `cuIpcGetMemHandle` or `cudaIpcGetMemHandle` (CUDA driver API, "CUipcMemHandle").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Vec<u8>", try_from = "Vec<u8>")]
pub struct IpcHandle(pub [u8; 64]);

/// Not a legacy handle.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("a legacy handle has 64 bytes, not {0}")]
pub struct HandleLength(usize);

impl From<IpcHandle> for Vec<u8> {
    fn from(handle: IpcHandle) -> Self {
        handle.0.to_vec()
    }
}

impl TryFrom<Vec<u8>> for IpcHandle {
    type Error = HandleLength;

    fn try_from(bytes: Vec<u8>) -> Result<Self, HandleLength> {
        let len = bytes.len();
        bytes.try_into().map(Self).map_err(|_| HandleLength(len))
    }
}

/// What an application asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Memory to put tensors from.
    Arena {
        /// At least this many bytes.
        bytes: u64,
        /// On which pages.
        memory: Memory,
    },
    /// The arena was mapped; seal it.
    Mapped {
        /// Which.
        arena: ArenaId,
    },
    /// An arena is not needed any more.
    Free {
        /// Which.
        arena: ArenaId,
    },
    /// How patient to be with all requests of this connection from now on.
    Patience {
        /// One that takes longer than so many milliseconds fails.
        deadline_ms: Option<u64>,
        /// A put, get or fetch whose session is lost, or cannot be opened, is
        /// tried again for so many milliseconds.
        retry_ms: Option<u64>,
    },
    /// Use a memory file of mine as an arena; its descriptor follows.
    Import,
    /// Use memory of mine on an accelerator as an arena.
    ImportDevice {
        /// On which one.
        memory: Memory,
        /// How many bytes, from the start of the allocation.
        bytes: u64,
        /// What names it; without one a descriptor follows.
        handle: Option<IpcHandle>,
    },
    /// Read a file into a new arena; its descriptor follows.
    Read {
        /// First byte.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// Into which pages.
        memory: Memory,
    },
    /// Put tensors that lie in arenas; their list follows.
    Put {
        /// To which node's store; none for this agent's own.
        node: Option<String>,
        /// Under which prefix.
        prefix: String,
        /// How many tensors.
        count: u64,
        /// Kept with the prefix.
        metadata: Option<Metadata>,
        /// What the store that takes them shall keep them in.
        memory: Memory,
    },
    /// More of the list.
    Tensors(Vec<Placed>),
    /// Fetch tensors.
    Get {
        /// From which node's store; none for this agent's own.
        node: Option<String>,
        /// Under which prefix.
        prefix: String,
        /// Into which pages.
        memory: Memory,
    },
    /// Fetch a part of one tensor.
    Fetch {
        /// From which node's store; none for this agent's own.
        node: Option<String>,
        /// Full name.
        name: String,
        /// Which bytes; they arrive one after the other.
        runs: Vec<Run>,
        /// Into which pages.
        memory: Memory,
    },
    /// List a store.
    List {
        /// Whose; none for this agent's own.
        node: Option<String>,
        /// Only this tensor, or those under this prefix.
        under: Option<String>,
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
    /// Make a window.
    Window {
        /// In whose store; none for this agent's own.
        node: Option<String>,
        /// Its full name.
        name: String,
        /// Its length.
        bytes: u64,
        /// In this kind of memory.
        memory: Memory,
    },
    /// Let others use memory of mine as a window of this agent's.
    Register {
        /// Its full name.
        name: String,
        /// In which arena.
        arena: ArenaId,
        /// Its first byte there.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// Make tensors of a window, which nobody can change from then on.
    Seal {
        /// In whose store; none for this agent's own.
        node: Option<String>,
        /// The window's full name: the prefix of the tensors.
        name: String,
        /// The tensors, and where each begins.
        tensors: Vec<(TensorInfo, u64)>,
    },
    /// Read or write ranges, beside other requests.
    Batch(Ranges),
    /// Never mind this request.
    Cancel {
        /// Its number on this connection.
        request: u64,
    },
    /// Collect notifications about names under this prefix, from now on.
    Listen {
        /// Of windows, tensors and whatever else is notified of.
        prefix: String,
    },
    /// The next notification.
    Await {
        /// For how long to wait, in milliseconds.
        limit_ms: u64,
    },
    /// Notify those who listen.
    Notify {
        /// On which node; none for this one.
        node: Option<String>,
        /// About which name.
        name: String,
        /// What to say.
        message: Vec<u8>,
    },
}

/// Whether bytes come or go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// From windows and tensors into arenas.
    Read,
    /// From arenas into windows.
    Write,
}

/// Ranges to be read or written in one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranges {
    /// In whose store; none for this agent's own.
    pub node: Option<String>,
    /// Which way.
    pub direction: Direction,
    /// Names of windows, and of tensors if they are read.
    pub targets: Vec<String>,
    /// Which bytes of them, and where these are here.
    pub ranges: Vec<Ranged>,
    /// Told to those who listen once all bytes were written and verified.
    pub note: Option<Note>,
}

/// Bytes of a window or tensor, and bytes of an arena, one after the other there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranged {
    /// Which of the targets.
    pub target: u32,
    /// Which bytes of it.
    pub run: Run,
    /// In which arena.
    pub arena: ArenaId,
    /// Their first byte there.
    pub offset: u64,
}

/// What is told about a write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// About which of the targets.
    pub target: u32,
    /// What to say.
    pub message: Vec<u8>,
}

/// Something that those who listen are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notification {
    /// The name that it is about.
    pub name: String,
    /// What is said.
    pub message: Vec<u8>,
    /// Who says it.
    pub from: Owner,
    /// How many before it were lost because too many waited.
    pub lost: u64,
}

/// Most bytes that a notification can say: a line or two, not a tensor.
pub const MESSAGE_MAX: usize = 4096;

/// Batches that may be under way on one connection.
pub const BATCHES_MAX: usize = 64;

/// A tensor in an arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// What it is.
    pub info: TensorInfo,
    /// In which arena.
    pub arena: ArenaId,
    /// Its first byte there.
    pub offset: u64,
}

/// What the agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// A new arena; its descriptor follows.
    Arena {
        /// Its name.
        arena: ArenaId,
        /// Why it is not on huge pages, if it is not though it could be.
        reason: Option<String>,
    },
    /// The arena can be used.
    Sealed,
    /// It is no longer there.
    Freed,
    /// Bytes that the application passed can be put from.
    Imported {
        /// The name of the arena that they are.
        arena: ArenaId,
        /// How many there are.
        bytes: u64,
        /// How many of them were copied: none of memory that was taken as it is.
        copied: u64,
    },
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
    /// More of the list: one after the other in the memory that comes with `Arrived`.
    Tensors(Vec<TensorInfo>),
    /// A put has moved.
    Moved(Moved),
    /// A get or a fetch has moved; the memory's descriptor follows.
    Arrived {
        /// The name of the arena that it is.
        arena: ArenaId,
        /// How it moved.
        moved: Moved,
    },
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
    /// It was done.
    Done {
        /// How many listeners were told, if that was asked for.
        listeners: u64,
    },
    /// A batch has ended.
    Completed {
        /// Its number on this connection.
        request: u64,
        /// How.
        result: Result<Moved, Failure>,
    },
    /// A notification, if one came in time.
    Notified(Option<Notification>),
    /// It could not be done.
    Failed {
        /// What kind of failure, for programs.
        kind: FailureKind,
        /// What failed, why, and what to do, for people.
        message: String,
    },
}

/// Why something could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure, for programs.
    pub kind: FailureKind,
    /// What failed, why, and what to do, for people.
    pub message: String,
}

/// What kind of failure a request ended in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureKind {
    /// Nothing of that name, or nothing that this user may know of.
    NotFound,
    /// The name is another's.
    Taken,
    /// The user has as much as one user may have.
    Quota,
    /// Agent or machine have no memory left, or none of the kind asked for.
    NoMemory,
    /// The request makes no sense: a bad name, shape, range or arena.
    Invalid,
    /// The descriptor cannot be used.
    Descriptor,
    /// The peer cannot be reached, left, or refused.
    Peer,
    /// The bytes changed on the way: somebody wrote while they moved.
    Corrupt,
    /// An accelerator failed, or is not there.
    Accelerator,
    /// The agent is stopping.
    Stopping,
    /// It was cancelled.
    Cancelled,
    /// The window was removed or sealed meanwhile.
    Removed,
    /// A window is being written or read: try again.
    Busy,
    /// It was not done within the deadline that was set.
    Deadline,
    /// One end of it made no progress for too long.
    Stalled,
    /// The peer gives one node no more than this.
    Limited {
        /// Of what.
        limit: PeerLimit,
        /// How much: bytes, transfers, or requests a second.
        figure: u64,
    },
}

/// What a peer limits for each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PeerLimit {
    /// Bytes in its store (`peer-memory`).
    Memory,
    /// Transfers under way (`peer-transfers`).
    Transfers,
    /// Requests a second (`peer-rate`).
    Rate,
}

impl FailureKind {
    /// Whether the same request may well succeed a moment later, as after a
    /// `WouldBlock`: nothing of it was done, and nothing is broken.
    ///
    /// What a session was lost for ([`Self::Peer`], [`Self::Stalled`]) may pass,
    /// too, but a put may have been done: an agent tries those again, each done
    /// once, for whoever asked it to (`Client::set_patience`).
    pub fn is_retryable(self) -> bool {
        match self {
            Self::Busy | Self::Stopping => true,
            Self::Limited { limit, .. } => limit != PeerLimit::Memory,
            _ => false,
        }
    }
}

impl fmt::Display for PeerLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Transfers => "transfers",
            Self::Rate => "rate",
        })
    }
}

/// Who put a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// A program on this host, by user id.
    User(u32),
    /// A peer's agent, by node name.
    Peer(String),
}

/// A stored tensor, as shown by `ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Full name, `PREFIX/NAME`.
    pub name: String,
    /// Type of the elements, as safetensors spells it.
    pub dtype: String,
    /// Dimensions.
    #[serde(deserialize_with = "deserialize_shape")]
    pub shape: Vec<u64>,
    /// Length in bytes.
    pub bytes: u64,
    /// Who put it.
    pub owner: Owner,
    /// Where it lives: `host`, `hugepage`, `cuda:N` or `sim`.
    pub memory: String,
    /// Whether it is a window, whose bytes can be written.
    pub window: bool,
}

/// How a batch moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// Tensors.
    pub tensors: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// From the request until both ends had verified everything, room made included.
    pub seconds: f64,
    /// Decimal gigabytes a second.
    pub gb_per_s: f64,
    /// The path taken: `tcp`, `dpdk:net_vhost`, `local` …
    pub path: String,
    /// Why better paths were refused.
    pub reasons: Vec<String>,
    /// Segments sent more than once, both ends together.
    pub retransmits: u64,
    /// Genie's own CPU copies, both ends together, per byte delivered.
    pub copies_per_byte: f64,
    /// Bytes copied by CPUs at both ends, by who copied them.
    pub copies: Copies,
    /// Of these, what was copied at the sending end.
    pub sent_copies: Copies,
    /// Of these, what was copied at the receiving end.
    pub received_copies: Copies,
    /// CRC32C of all tensors' bytes in the order of their names, or of ranges
    /// in their own.
    pub digest: String,
    /// How many listeners were notified.
    pub listeners: u64,
}

impl Listed {
    /// Roughly the memory that it takes.
    pub fn held_bytes(&self) -> usize {
        let owner = match &self.owner {
            Owner::User(_) => 0,
            Owner::Peer(name) => name.len(),
        };
        let text = self.name.len() + self.dtype.len() + self.memory.len() + owner;
        size_of::<Self>() + text + size_of_val(&self.shape[..])
    }

    /// Checks what a peer says it has: that these are names.
    pub fn check(&self) -> Result<(), TensorError> {
        check_name(&self.name)?;
        check_name(&self.dtype)?;
        check_name(&self.memory)?;
        match &self.owner {
            Owner::User(_) => Ok(()),
            Owner::Peer(name) => check_name(name),
        }
    }
}

impl Memory {
    /// Whose memory it is.
    pub fn kind(&self) -> MemoryKind {
        match self {
            Self::Auto | Self::Host | Self::Hugepage => MemoryKind::Host,
            Self::Cuda(ordinal) => MemoryKind::Cuda(*ordinal),
            Self::Sim => MemoryKind::Sim,
        }
    }
}

impl From<MemoryKind> for Memory {
    /// Host memory is on whichever pages.
    fn from(kind: MemoryKind) -> Self {
        match kind {
            MemoryKind::Host => Self::Auto,
            MemoryKind::Cuda(ordinal) => Self::Cuda(ordinal),
            MemoryKind::Sim => Self::Sim,
        }
    }
}

/// Not a kind of memory.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is no kind of memory: auto, host, hugepage, cuda:N or sim")]
pub struct ParseMemoryError(String);

impl FromStr for Memory {
    type Err = ParseMemoryError;

    fn from_str(text: &str) -> Result<Self, ParseMemoryError> {
        match text {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            "hugepage" => Ok(Self::Hugepage),
            _ => match text.parse() {
                Ok(MemoryKind::Cuda(ordinal)) => Ok(Self::Cuda(ordinal)),
                Ok(MemoryKind::Sim) => Ok(Self::Sim),
                _ => Err(ParseMemoryError(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Host => f.write_str("host"),
            Self::Hugepage => f.write_str("hugepage"),
            Self::Cuda(_) | Self::Sim => self.kind().fmt(f),
        }
    }
}
