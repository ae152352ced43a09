//! What `genie status` shows.

use std::net::SocketAddr;
use std::path::PathBuf;

use genie_dataplane::engine::Snapshot;
use genie_dataplane::memory::accelerator::MemoryKind;
use serde::{Deserialize, Serialize};

/// A picture of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Node name.
    pub name: String,
    /// This run of it.
    pub instance: String,
    /// Version of the program.
    pub version: String,
    /// Seconds since it was ready.
    pub up_seconds: f64,
    /// Where peers reach it.
    pub listen: SocketAddr,
    /// The application socket.
    pub socket: PathBuf,
    /// What it says of security; none when there is nothing to say.
    pub warning: Option<String>,
    /// Who it is, and whom it admits.
    pub identity: IdentityStatus,
    /// Where its metrics are.
    #[serde(default)]
    pub metrics: MetricsStatus,
    /// What it allows, best first.
    pub preference: String,
    /// Transports and why some cannot be used.
    pub transports: Vec<TransportStatus>,
    /// Peers that can be dialled.
    pub peers: Vec<PeerStatus>,
    /// Sessions that are up.
    pub sessions: Vec<SessionStatus>,
    /// What the store holds.
    pub store: Usage,
    /// Applications' arenas.
    pub arenas: Usage,
    /// Users of this host that are connected: all of them for root, else only
    /// whoever asks.
    pub users: Vec<UserStatus>,
    /// What peers' requests hold here, and may.
    #[serde(default)]
    pub peer_usage: Vec<PeerUsage>,
    /// Accelerators that it was started with.
    pub accelerators: Vec<AcceleratorStatus>,
}

/// Where an agent's metrics are served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsStatus {
    /// The address; none if they are off, or cannot be served.
    pub address: Option<SocketAddr>,
    /// Why they cannot.
    pub reason: Option<String>,
}

/// An accelerator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceleratorStatus {
    /// How it is called in options.
    pub kind: MemoryKind,
    /// What it calls itself; a simulated one says so.
    pub name: Option<String>,
    /// The driver's version.
    pub driver: Option<String>,
    /// All of its memory, in bytes.
    pub memory_bytes: u64,
    /// Why it cannot be used.
    pub reason: Option<String>,
    /// Bytes of pinned host memory that its tensors are staged through.
    pub slots_bytes: u64,
    /// Why that memory is not on huge pages.
    pub slots_reason: Option<String>,
    /// Why network cards do not reach its memory, so that tensors are staged.
    pub gpudirect: Option<String>,
}

/// Who an agent is, and whom it admits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityStatus {
    /// Whether peers must prove their names.
    pub authenticated: bool,
    /// In one line.
    pub summary: String,
    /// Why newer files are not used, if they are not.
    pub reload_error: Option<String>,
    /// Connections of peers that were turned away.
    pub refused_peers: u64,
    /// Requests that were refused for want of a right.
    pub refused_requests: u64,
    /// Connections that lost their places before they were sessions.
    #[serde(default)]
    pub dropped_strangers: u64,
}

/// How full the store, or the room for arenas, is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tensors kept; none in arenas, of whose tensors only programs know.
    pub tensors: u64,
    /// Pieces of memory allocated, also those that only a transfer still holds.
    pub regions: u64,
    /// Bytes of them.
    pub used_bytes: u64,
    /// The limit.
    pub limit_bytes: u64,
}

/// What one user has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserStatus {
    /// User id.
    pub uid: u32,
    /// Connections; each has at most one request under way.
    pub connections: u64,
    /// Arenas.
    pub arenas: u64,
    /// Bytes of the arenas.
    pub bytes: u64,
}

/// What one peer's requests hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerUsage {
    /// Its name.
    pub peer: String,
    /// Bytes in the store.
    pub memory_bytes: u64,
    /// Most of these.
    pub memory_limit_bytes: u64,
    /// Transfers under way; a request that moves tensors counts as one at least.
    pub transfers: u64,
    /// Most of these.
    pub transfers_limit: u64,
    /// Most requests a second.
    pub rate_limit: u64,
    /// Most sessions.
    pub sessions_limit: u64,
    /// Requests that were refused, by the limit they met.
    pub refused: PeerRefused,
}

/// Requests of one peer that met a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRefused {
    /// Of memory.
    pub memory: u64,
    /// Of transfers.
    pub transfers: u64,
    /// Of requests a second.
    pub rate: u64,
}

/// A picture of one transport, or of one of its queues.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransportStatus {
    /// `dpdk` or `tcp`.
    pub transport: String,
    /// How a path over it is called; none if it cannot be used.
    pub path: Option<String>,
    /// Which queue of its device; none where that has one.
    #[serde(default)]
    pub queue: Option<u16>,
    /// Where its data port is, where it has one.
    pub data: Option<SocketAddr>,
    /// Why it cannot be used; none if it can.
    pub reason: Option<String>,
    /// The engine's own picture.
    pub engine: Option<Snapshot>,
}

/// A peer that can be dialled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub address: String,
}

/// A change of a session's path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PathChange {
    /// The new path's number in the session; the first path has 1.
    pub number: u32,
    /// The path before.
    pub from: String,
    /// The path since.
    pub to: String,
    /// Why.
    pub reason: String,
    /// When.
    pub seconds_ago: f64,
    /// For how many milliseconds no path carried the session, from when the
    /// loss was noticed at this end.
    pub gap_ms: f64,
}

/// A picture of one session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The peer's name.
    pub peer: String,
    /// The peer's run.
    pub instance: String,
    /// Who dialled: `dialled` or `accepted`.
    pub direction: String,
    /// The path it takes.
    pub path: String,
    /// Whether its packets are encrypted and authenticated.
    pub sealed: bool,
    /// Why that one is lost, while another is being opened.
    pub lost: Option<String>,
    /// How often the path changed.
    pub path_changes: u64,
    /// The last of these changes, the latest one last.
    pub changes: Vec<PathChange>,
    /// Why better paths were refused, and why device memory is staged on this one.
    pub reasons: Vec<String>,
    /// Seconds since it is up.
    pub up_seconds: f64,
    /// Round trip measured when the path was opened, in microseconds.
    pub opened_in_us: u64,
    /// The engine's id of it.
    pub session: u32,
    /// Requests under way.
    pub requests: u64,
}
