//! What two agents say to each other on the control connection.
//!
//! ```text
//!   dialler                              acceptor
//!   preamble, Hello               →      ← preamble, Hello (or Bye)
//!   Try                           →      ← Trying (or TryRefused)
//!        … both open the path …          ← Opened
//!   Chosen (or the next Try, or NoPath) →
//!   ── the session is up; Ping both ways; PathLost both ways, then ──
//!   Try, Chosen, NoPath           →      ← Trying, TryRefused, Opened
//!   Begin Put, Tensors…           →      ← Granted…            ← Done
//!   Begin Get, Begin Fetch        →      ← Found, Tensors…
//!   Granted…                      →                            ← Done
//!   Resumed, after a change of path: whichever end sends Granted
//!   Begin List                    →      ← Listed…             ← Done
//!   Begin Remove, Recall          →                            ← Done
//!                                        (or Denied to any of these)
//!   Cancel (of any of these)      →
//!   Bye, either way, at the end
//! ```

use std::fmt;
use std::ops::Range;

use genie_client::Listed;
use genie_client::protocol::{Failure, Note};
use genie_client::slice::Run;
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::accelerator::MemoryKind;
use genie_dataplane::tcp::Token;
use genie_dataplane::{SessionId, TransferId};
use serde::{Deserialize, Serialize};

use crate::negotiation::Refusal;
use crate::rights::Right;
use crate::security::{DataSecurity, Salt};
use crate::tensor::{Metadata, TensorInfo, metadata_bytes};
use crate::transport::{Offer, Preference, Transport};

/// Names one run of an agent; a restarted agent has another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Instance(pub [u8; 16]);

/// Names one put in all attempts to make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestKey(pub [u8; 16]);

/// How an agent introduces itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Node name.
    pub name: String,
    /// This run of it.
    pub instance: Instance,
    /// What it allows, best first.
    pub preference: Preference,
    /// What it has.
    pub offers: Vec<Offer>,
    /// After how many milliseconds of silence it gives a peer up; the peer
    /// sends heartbeats several times as often.
    pub liveness_ms: u64,
    /// The longest transfer that it takes, where that is limited: tensors are
    /// moved in ranges of the smaller of both ends' limits.
    pub range_bytes: Option<u64>,
    /// What it demands of paths.
    #[serde(default)]
    pub data_security: DataSecurity,
}

/// A message between agents.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// The first message each way.
    Hello(Hello),
    /// Dialler: let us open a path.
    Try {
        /// Over this transport.
        transport: Transport,
        /// What the acceptor shall put into what it sends.
        session: SessionId,
        /// Proves that data connections are the dialler's; none under TLS,
        /// where both ends derive it.
        token: Option<Token>,
        /// The dialler's part in the keys, where packets are to be sealed.
        #[serde(default)]
        salt: Option<Salt>,
    },
    /// Acceptor: ready, open yours.
    Trying {
        /// What the dialler shall put into what it sends.
        session: SessionId,
        /// The acceptor's part in the keys, where packets are to be sealed.
        #[serde(default)]
        salt: Option<Salt>,
    },
    /// Acceptor: it cannot be tried.
    TryRefused {
        /// Why.
        reason: String,
    },
    /// Acceptor: how opening ended on its side.
    Opened {
        /// Nothing, or why not.
        result: Result<(), String>,
    },
    /// Dialler: the path just opened carries the session.
    Chosen {
        /// Better paths, and why they were refused.
        refused: Vec<Refusal>,
    },
    /// Either end: a path of the session that is up is of no use any more, and
    /// is closed at this end. The dialler then tries others.
    PathLost {
        /// Which: 1 is the first one.
        number: u32,
        /// Why.
        reason: String,
    },
    /// Dialler: there is none; in a session that is up, the one just opened
    /// was only to see whether it opens.
    NoPath {
        /// Why.
        refused: Vec<Refusal>,
    },
    /// Heartbeat.
    Ping,
    /// The sender ends the session.
    Bye {
        /// Why.
        reason: String,
        /// Whether it may be gone a moment later: trying again is of use.
        passing: bool,
    },
    /// Dialler: a request begins.
    Begin {
        /// Names it in what follows.
        id: u64,
        /// What is wanted.
        request: Request,
    },
    /// More of the list of tensors of a put or get.
    Tensors {
        /// Which request.
        id: u64,
        /// Descriptions, in order.
        tensors: Vec<TensorInfo>,
    },
    /// What a get will bring.
    Found {
        /// Which request.
        id: u64,
        /// How many tensors.
        count: u64,
        /// The prefix's metadata.
        metadata: Option<Metadata>,
    },
    /// The receiver of tensors expects the next ones, under these ids.
    Granted {
        /// Which request.
        id: u64,
        /// Over which path of the session.
        path: u32,
        /// In the order of the tensors.
        transfers: Vec<TransferId>,
    },
    /// The receiver of tensors goes on over another path.
    Resumed {
        /// Which request.
        id: u64,
        /// Over which path of the session.
        path: u32,
        /// What was granted before and is not received.
        grants: Vec<Resume>,
        /// Everything else that was granted before is received.
        last: bool,
    },
    /// More of a listing.
    Listed {
        /// Which request.
        id: u64,
        /// Stored tensors.
        tensors: Vec<Listed>,
    },
    /// Acceptor: the request has ended.
    Done {
        /// Which request.
        id: u64,
        /// What was done, or why not.
        result: Result<Outcome, Failure>,
    },
    /// Acceptor: the dialler lacks the right to what it asked for.
    Denied {
        /// Which request.
        id: u64,
        /// What it must be allowed to do.
        right: Right,
        /// Under which name; empty for all of the store.
        name: String,
    },
    /// Dialler: never mind.
    Cancel {
        /// Which request.
        id: u64,
    },
}

/// What a dialler can ask for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Take tensors into the store; their list follows.
    Put {
        /// Where to.
        prefix: String,
        /// How many.
        count: u64,
        /// Kept with the prefix.
        metadata: Option<Metadata>,
        /// Whose memory they shall be kept in.
        memory: MemoryKind,
        /// Names it, if it may be made again.
        #[serde(default)]
        key: Option<RequestKey>,
    },
    /// Say how a put ended, if it was done.
    Recall {
        /// Where to.
        prefix: String,
        /// Its name.
        key: RequestKey,
    },
    /// Send the tensors under a prefix.
    Get {
        /// Which.
        prefix: String,
    },
    /// Send a part of a tensor, one piece after the other as tensors of bytes.
    Fetch {
        /// Its full name.
        name: String,
        /// Which bytes, in this order.
        runs: Vec<Run>,
    },
    /// List the store.
    List {
        /// Only this tensor, or those under this prefix.
        under: Option<String>,
    },
    /// Remove tensors.
    Remove {
        /// A full name or a prefix.
        name: String,
    },
    /// Make a window.
    Window {
        /// Its full name.
        name: String,
        /// Its length.
        bytes: u64,
        /// In this kind of memory.
        memory: MemoryKind,
    },
    /// Make tensors of a window.
    Seal {
        /// Its full name.
        name: String,
        /// The tensors, and where each begins.
        tensors: Vec<(TensorInfo, u64)>,
    },
    /// Send ranges; the dialler grants their pieces at once.
    Read(Runs),
    /// Take ranges; the acceptor grants their pieces.
    Write {
        /// Which.
        runs: Runs,
        /// Told to those who listen once they were written.
        note: Option<Note>,
    },
    /// Notify those who listen.
    Notify {
        /// About which name.
        name: String,
        /// What to say.
        message: Vec<u8>,
    },
}

/// Bytes of windows and tensors: every piece is a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    /// Names of windows, and of tensors if they are read.
    pub targets: Vec<String>,
    /// Which bytes, each of which target.
    pub runs: Vec<(u32, Run)>,
}

/// A tensor that goes on over another path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Which of the batch, from 0.
    pub index: u64,
    /// The id on the new path.
    pub transfer: TransferId,
    /// The bytes that are missing, ascending.
    pub missing: Vec<Range<u64>>,
}

/// How a request ended at one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Tensors moved, or removed.
    pub tensors: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Segments this end sent more than once.
    pub retransmits: u64,
    /// What CPUs copied at this end.
    pub copies: Copies,
    /// CRC32C of all tensors' bytes in the order of their names.
    pub digest: u32,
    /// How many listeners were notified.
    pub listeners: u64,
}

impl Message {
    /// Roughly the memory that a message of a request takes beyond its own size.
    pub fn held_bytes(&self) -> usize {
        match self {
            Self::Tensors { tensors, .. } => tensors.iter().map(TensorInfo::held_bytes).sum(),
            Self::Listed { tensors, .. } => tensors.iter().map(Listed::held_bytes).sum(),
            Self::Granted { transfers, .. } => size_of_val(&transfers[..]),
            Self::Resumed { grants, .. } => grants.iter().map(Resume::held_bytes).sum(),
            Self::Found { metadata, .. } => metadata_bytes(metadata.as_ref()),
            Self::Done {
                result: Err(reason),
                ..
            } => reason.message.len(),
            Self::Denied { name, .. } => name.len(),
            _ => 0,
        }
    }
}

impl Resume {
    fn held_bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&self.missing[..])
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Instance({self})")
    }
}
