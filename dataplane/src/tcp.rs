//! The engine for hosts and peers without DPDK: kernel TCP.
//!
//! One thread, `genie-tcp`, owns a listener and every data connection, waits
//! on epoll and shares nothing: commands come in over one ring, completions go
//! out over another. Several connections carry a session; whichever can take a
//! chunk pulls the next one, and the kernel reads and writes tensors in place.
//! The bytes on the wire are described in `docs/protocol-tcp.md`.
//!
//! In reading order: `engine` (the loop), `lobby` (connections that have not
//! said who they are), `session` (transfers over connections), `stream`,
//! `reader` and `writer` (one connection), `wire` (bare or sealed), `frame` (bytes), `socket` (calls).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use genie_proto::SessionId;
use genie_proto::seal::Secrets;
use serde::{Deserialize, Serialize};

use crate::endpoint::{Endpoint, Running};
use crate::engine::Status;

mod context;
mod engine;
pub mod frame;
mod lobby;
mod reader;
mod session;
mod socket;
mod spin;
mod stream;
mod transfers;
mod wire;
mod writer;

/// The most connections one session may have.
pub const STREAMS_MAX: u16 = 16;

/// How the engine is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where peers connect to; port 0 takes a free one.
    pub listen: SocketAddr,
    /// How many connections to propose for a session: 1 to [`STREAMS_MAX`].
    /// Two keep both ends busy where one is held up by a full buffer.
    pub streams: u16,
    /// How long a peer may be silent before its session is lost.
    pub liveness: Duration,
    /// How long opening a session may take, and how long a connection that
    /// was accepted may take to say which session it belongs to.
    pub open_limit: Duration,
    /// How long transfers may be under way without one byte of them moving, or
    /// one of them ending, before the session is lost. For peers that answer
    /// but do nothing.
    pub progress_limit: Duration,
    /// The kernel's congestion control of data connections, `cubic` or `bbr`
    /// say. `None` is the system's own, but over loopback, where there is no
    /// congestion and pacing costs a third of the sender's time, `cubic`.
    pub congestion: Option<String>,
}

/// Proves that a data connection belongs to a session; known to its two agents only.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token(pub [u8; 16]);

/// A peer's engine and its name for the session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Remote {
    /// Who connects to whom.
    pub role: Role,
    /// The session id the peer chose.
    pub session: SessionId,
    /// Shown by the one that dials, checked by the one that accepts.
    pub token: Token,
    /// How many connections carry the session.
    pub streams: u16,
    /// What the connections' bytes are sealed with, both ways; none: they are plain.
    pub secrets: Option<Secrets>,
}

/// Who connects to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// We connect to the peer's data port.
    Dial(SocketAddr),
    /// The peer connects to ours.
    Accept,
}

/// Starts an engine; also says the address it really listens on.
///
/// Fails if the address is taken, or the kernel lacks the congestion control.
pub fn spawn(config: Config) -> io::Result<(Running, SocketAddr)> {
    let (endpoint, completions, ports, lost) = Endpoint::new()?;
    let status = Status::default();
    let engine = engine::Engine::new(&config, ports, status.clone())?;
    let address = engine.local_addr()?;
    let thread = std::thread::Builder::new()
        .name("genie-tcp".into())
        .spawn(move || engine.run())?;
    Ok((
        Running {
            endpoint,
            completions,
            lost,
            status,
            thread,
        },
        address,
    ))
}

impl Default for Config {
    /// Any free port of the loopback interface.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            streams: 2,
            liveness: Duration::from_secs(2),
            open_limit: Duration::from_secs(2),
            progress_limit: Duration::from_secs(30),
            congestion: None,
        }
    }
}

impl Token {
    /// Compares in a time that does not depend on where they differ.
    pub(crate) fn matches(&self, other: &Token) -> bool {
        self.0
            .iter()
            .zip(other.0)
            .fold(0, |acc, (a, b)| acc | (a ^ b))
            == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}
