//! The engine for two agents on one host: tensors by passing descriptors.
//!
//! One thread, `genie-shm`, owns a listener and one Unix socket for each
//! session. The sender passes a descriptor of the memory file that its tensor
//! lies in, once for each region and only for reading; the receiver lets the
//! kernel copy from that file straight into its own tensor. That one copy is
//! what makes the result the receiver's own: whatever happens to the source
//! afterwards, what was verified stays as it is.
//!
//! Where it works is found out, not guessed: opening a session passes a
//! descriptor each way and reads from it. Two containers may share a boot id
//! and nothing else. A region holds more than the tensor that moves, so both
//! agents must belong to one user: that user's processes can read each other's
//! memory anyway.
//!
//! ```text
//!   dialler                             acceptor
//!   HELLO session, token + descriptor →
//!                                       ← WELCOME + descriptor
//!   PING                              →            both ends are open
//!   REGION + descriptor, OFFER        →            copies and checks
//!                                       ← DONE digest
//!   VERDICT                           →            both ends are done
//! ```
//!
//! In reading order: `engine` (the loop), `session` (transfers), `copy` (bytes),
//! `source` (what was passed), `message` and `socket` (one connection).

use std::io;
use std::time::Duration;

use genie_proto::SessionId;
use serde::{Deserialize, Serialize};

use crate::endpoint::{Endpoint, Running};
use crate::engine::Status;
use crate::tcp::Token;

mod copy;
mod engine;
pub mod message;
mod session;
mod socket;
mod source;

/// How the engine is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long a peer may be silent before its session is lost.
    pub liveness: Duration,
    /// How long opening a session may take, and how long a connection that
    /// was accepted may take to say which session it belongs to.
    pub open_limit: Duration,
    /// How long transfers may be under way without one byte of them moving, or
    /// one of them ending, before the session is lost.
    pub progress_limit: Duration,
}

/// How an engine is reached from its own host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// Name of its socket, in the abstract namespace: no file, nothing to clean up.
    pub name: String,
    /// The kernel's boot id. Another one means another host; the same one
    /// promises nothing.
    pub boot: String,
}

/// A peer's engine and its name for the session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Remote {
    /// Who connects to whom.
    pub role: Role,
    /// The session id the peer chose.
    pub session: SessionId,
    /// Shown by the one that dials, checked by the one that accepts.
    pub token: Token,
}

/// Who connects to whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// We connect to the peer's socket.
    Dial(Local),
    /// The peer connects to ours.
    Accept,
}

impl Local {
    /// Why a peer that is `other` cannot be reached, where that shows at once:
    /// knocks at its socket. That it opens proves nothing yet.
    pub fn refuses(&self, other: &Local) -> Option<String> {
        if self.boot != other.boot {
            return Some("the peer runs on another host".into());
        }
        match socket::connect(&other.name) {
            Ok(socket) => socket::refuse_user(&socket),
            Err(error) => Some(format!("its socket is not reached from here: {error}")),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            liveness: Duration::from_secs(2),
            open_limit: Duration::from_secs(2),
            progress_limit: Duration::from_secs(30),
        }
    }
}

/// Starts an engine; also says how it is reached.
pub fn spawn(config: Config) -> io::Result<(Running, Local)> {
    let (endpoint, completions, ports, lost) = Endpoint::new()?;
    let status = Status::default();
    let local = Local {
        name: socket::new_name(),
        boot: socket::boot_id()?,
    };
    let engine = engine::Engine::new(&config, &local.name, ports, status.clone())?;
    let thread = std::thread::Builder::new()
        .name("genie-shm".into())
        .spawn(move || engine.run())?;
    let running = Running {
        endpoint,
        completions,
        lost,
        status,
        thread,
    };
    Ok((running, local))
}
