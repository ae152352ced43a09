//! The engine for hosts and peers without DPDK: kernel TCP.

use std::net::SocketAddr;

use genie_proto::SessionId;
use serde::{Deserialize, Serialize};

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
}

/// Who connects to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// We connect to the peer's data port.
    Dial(SocketAddr),
    /// The peer connects to ours.
    Accept,
}
