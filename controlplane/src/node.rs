//! What all tasks of an agent share: who it is, what it has, whom it knows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use genie_client::Owner;
use genie_dataplane::endpoint::Lost;
use genie_dataplane::engine::FailReason;
use genie_dataplane::memory::accelerator::MemoryKind;

use tokio::sync::{Semaphore, SemaphorePermit, watch};

use crate::budget::{Budget, Room};
use crate::devices::Devices;
use crate::identity::Identity;
use crate::message::{Hello, Instance};
use crate::metrics::Counters;
use crate::notifications::Notifications;
use crate::quota::peer::{Account, PeerLimits, Peers};
use crate::quota::{self, Quotas};
use crate::security::DataSecurity;
use crate::session::route::{Change, Stage};
use crate::session::{Direction, REQUESTS_MAX, Session, SessionError, establish};
use crate::status::{
    AgentStatus, MetricsStatus, PathChange, PeerStatus, SessionStatus, TransportStatus,
};
use crate::store::Store;
use crate::transfer::once::Once;
use crate::transport::{Local, Preference, Seat, Transport, Transports};

/// Batches under way with one peer: other requests find room beside them.
const BATCHES_MAX: usize = REQUESTS_MAX / 2;

/// One agent. Shared by all its tasks.
#[derive(Debug)]
pub struct Node {
    /// Node name.
    pub name: String,
    /// This run.
    pub instance: Instance,
    /// Transports allowed, best first.
    pub preference: Preference,
    /// What paths must be.
    pub data_security: DataSecurity,
    /// After how much silence a peer is given up.
    pub liveness: Duration,
    /// For how long a request may make no progress.
    pub stall: Duration,
    /// Transports that run, and why the others do not.
    pub transports: Transports,
    /// The tensors kept here.
    pub store: Store,
    /// What applications' arenas are allocated from.
    pub arenas: Budget,
    /// What each user of this host has.
    pub quotas: Quotas,
    /// What each peer has.
    pub peer_quotas: Peers,
    /// Peers that can be dialled.
    pub peers: BTreeMap<String, Peer>,
    /// Where peers reach us.
    pub listen: SocketAddr,
    /// The application socket.
    pub socket: PathBuf,
    /// What must be said of security.
    pub warning: Option<String>,
    /// Accelerators, and why some cannot be used.
    pub devices: Devices,
    /// Who this node is, and whom it admits.
    pub identity: Identity,
    /// Where metrics are served.
    pub metrics: MetricsStatus,
    /// What moved to and from peers.
    pub counters: Counters,
    /// Who listens to what.
    pub notifications: Notifications,
    /// Puts that were done for peers.
    pub once: Once,
    /// Room for batches of ranges of this node's own windows.
    batches: Semaphore,
    /// When the agent started.
    pub started: Instant,
    live: Mutex<Vec<Arc<Session>>>,
    /// Peers that were admitted and have no session yet.
    negotiating: Mutex<Vec<String>>,
    busy: AtomicUsize,
    stopping: watch::Sender<bool>,
}

/// A peer that can be dialled.
#[derive(Debug)]
pub struct Peer {
    /// Where it is, `host:port`.
    pub address: String,
    /// Room for batches of ranges: fewer at a time than it takes. Each peer has
    /// its own, so a slow one keeps nobody else's batches waiting.
    batches: Semaphore,
    session: tokio::sync::Mutex<Option<Arc<Session>>>,
}

/// What a node is made of.
#[derive(Debug)]
pub struct Parts {
    /// Node name.
    pub name: String,
    /// Transports allowed, best first.
    pub preference: Preference,
    /// What paths must be.
    pub data_security: DataSecurity,
    /// After how much silence a peer is given up.
    pub liveness: Duration,
    /// For how long a request may make no progress.
    pub stall: Duration,
    /// Transports that run.
    pub transports: Transports,
    /// Limit of the store.
    pub store_bytes: u64,
    /// Limit of all arenas together.
    pub arena_bytes: u64,
    /// What one user of this host may have.
    pub user_limits: quota::Limits,
    /// What one peer may have.
    pub peer_limits: PeerLimits,
    /// What peers with limits of their own may have, by name.
    pub own_limits: BTreeMap<String, PeerLimits>,
    /// Names and addresses of peers.
    pub peers: BTreeMap<String, String>,
    /// Where peers reach us.
    pub listen: SocketAddr,
    /// The application socket.
    pub socket: PathBuf,
    /// What must be said of security.
    pub warning: Option<String>,
    /// Accelerators.
    pub devices: Devices,
    /// Who this node is, and whom it admits.
    pub identity: Identity,
    /// Where metrics are served.
    pub metrics: MetricsStatus,
}

/// A session that a peer was admitted to and that is not up yet; given up on drop.
#[derive(Debug)]
#[must_use = "dropping it gives the session up"]
pub(crate) struct Negotiating<'a> {
    node: &'a Node,
    /// None once it has ended.
    peer: Option<String>,
}

/// Something under way that a stopping agent waits for.
#[derive(Debug)]
pub struct Busy<'a>(&'a AtomicUsize);

impl Node {
    /// Puts a node together.
    pub fn new(parts: Parts) -> Arc<Self> {
        let peer = |(name, address)| {
            (
                name,
                Peer {
                    address,
                    batches: Semaphore::new(BATCHES_MAX),
                    session: Default::default(),
                },
            )
        };
        Arc::new(Self {
            name: parts.name,
            instance: Instance(random()),
            preference: parts.preference,
            data_security: parts.data_security,
            liveness: parts.liveness,
            stall: parts.stall,
            transports: parts.transports,
            store: Store::new(parts.store_bytes),
            arenas: Budget::new("arena memory", "--arena-bytes", parts.arena_bytes),
            quotas: Quotas::new(parts.user_limits),
            peer_quotas: Peers::new(parts.peer_limits, parts.own_limits),
            peers: parts.peers.into_iter().map(peer).collect(),
            listen: parts.listen,
            socket: parts.socket,
            warning: parts.warning,
            devices: parts.devices,
            identity: parts.identity,
            metrics: parts.metrics,
            counters: Counters::default(),
            notifications: Notifications::default(),
            once: Once::default(),
            batches: Semaphore::new(BATCHES_MAX),
            started: Instant::now(),
            live: Mutex::default(),
            negotiating: Mutex::default(),
            busy: AtomicUsize::new(0),
            stopping: watch::Sender::new(false),
        })
    }

    /// Room in the store for what is to be `owner`'s, in this kind of memory.
    pub fn store_room(&self, memory: MemoryKind, owner: &Owner) -> Room {
        Room {
            memory: memory.into(),
            peer: self.account_of(owner),
            devices: self.devices.clone(),
            ..self.store.budget().room()
        }
    }

    /// Whose limits count for what `owner` makes in the store.
    fn account_of(&self, owner: &Owner) -> Option<Arc<Account>> {
        match owner {
            Owner::Peer(name) => Some(self.peer_quotas.account(name)),
            Owner::User(_) => None,
        }
    }

    /// How we introduce ourselves.
    /// To a peer whose session has this seat.
    pub fn hello(&self, seat: &Seat) -> Hello {
        Hello {
            name: self.name.clone(),
            instance: self.instance,
            preference: self.preference.clone(),
            data_security: self.data_security,
            offers: self.transports.offers(seat),
            liveness_ms: self.liveness.as_millis().try_into().unwrap_or(u64::MAX),
            range_bytes: self.devices.range_bytes(),
        }
    }

    /// The session with a peer that we dialled, or a new one.
    pub async fn session(self: &Arc<Self>, name: &str) -> Result<Arc<Session>, SessionError> {
        let Some(peer) = self.peers.get(name) else {
            let names: Vec<_> = self.peers.keys().map(String::as_str).collect();
            let known = match &names[..] {
                [] => "none is known".to_owned(),
                names => format!("known: {}", names.join(", ")),
            };
            return Err(SessionError::UnknownPeer {
                name: name.to_owned(),
                known,
            });
        };
        // Held while dialling: whoever comes second gets the same session.
        let mut session = peer.session.lock().await;
        if let Some(session) = session.as_ref().filter(|session| session.ended().is_none()) {
            return Ok(Arc::clone(session));
        }
        let dialled = establish::dial(self, name, &peer.address).await?;
        *session = Some(Arc::clone(&dialled));
        Ok(dialled)
    }

    /// Waits for room for a batch of ranges, here or with a peer; none is needed
    /// for a peer that does not exist.
    pub async fn batch_room(&self, peer: Option<&str>) -> Option<SemaphorePermit<'_>> {
        let room = match peer {
            None => &self.batches,
            Some(peer) => &self.peers.get(peer)?.batches,
        };
        // An error only once it is closed, which it never is.
        room.acquire().await.ok()
    }

    /// Notes a session that is up, in place of what was negotiated.
    pub(crate) fn adopt(&self, session: &Arc<Session>, begun: Option<Negotiating<'_>>) {
        // Under the lock: whoever counts a peer's sessions counts this one once.
        let mut negotiating = self.negotiating();
        self.live().push(Arc::clone(session));
        if let Some(mut begun) = begun {
            begun.end(&mut negotiating);
        }
    }

    /// Forgets a session that has ended.
    pub(crate) fn forget(&self, session: &Arc<Session>) {
        self.live().retain(|live| !Arc::ptr_eq(live, session));
    }

    /// Tells the session whose path an engine has lost.
    pub fn lose(&self, transport: Transport, queue: u16, lost: &Lost) {
        let session = self.live().iter().find_map(|session| {
            let path = session.path();
            let found =
                (path.transport, path.queue, path.session) == (transport, queue, lost.session);
            found.then(|| (Arc::clone(session), path.number))
        });
        // None: the path was given up already, or was only tried.
        let Some((session, number)) = session else {
            return;
        };
        match &lost.reason {
            // Whoever breaks the protocol does not get another path.
            FailReason::Protocol(_) => {
                session.end(format!("peer '{}': {}", session.peer, lost.reason));
            }
            reason => session.lose_path(number, &reason.to_string()),
        }
    }

    /// Ends all sessions.
    pub fn end_sessions(&self, reason: &str) {
        let sessions: Vec<_> = self.live().clone();
        for session in sessions {
            session.end(reason);
        }
    }

    /// Ends the sessions whose peers would not be admitted any more.
    pub(crate) fn end_unwanted_sessions(&self) {
        let sessions: Vec<_> = self.live().clone();
        for session in sessions {
            self.end_if_unwanted(&session);
        }
    }

    /// Ends a session whose peer would not be admitted any more.
    pub(crate) fn end_if_unwanted(&self, session: &Session) {
        let current = self.identity.current();
        let (name, peer) = (&self.name, &session.peer);
        if session.direction == Direction::Accepted && !current.access.admits(peer) {
            session.end(format!("node '{name}' no longer allows '{peer}' (--allow)"));
        }
        if let (Some(credentials), Some(chain)) = (&current.credentials, &session.chain)
            && let Err(reason) = credentials.verify(chain, peer)
        {
            session.end(format!(
                "node '{name}' no longer believes '{peer}': {reason}"
            ));
        }
    }

    /// Admits one session more of a peer that may have so many.
    pub(crate) fn negotiate(&self, peer: &str, most: u64) -> Option<Negotiating<'_>> {
        let mut negotiating = self.negotiating();
        let begun = negotiating.iter().filter(|one| *one == peer).count();
        if (self.sessions_of(peer) + begun) as u64 >= most {
            return None;
        }
        negotiating.push(peer.to_owned());
        let peer = Some(peer.to_owned());
        Some(Negotiating { node: self, peer })
    }

    /// Sessions that peer has dialled.
    fn sessions_of(&self, peer: &str) -> usize {
        let live = self.live();
        let accepted = live
            .iter()
            .filter(|session| session.direction == Direction::Accepted && session.peer == peer);
        accepted.count()
    }

    /// Marks something as under way; none once the agent is stopping.
    pub fn begin(&self) -> Option<Busy<'_>> {
        // Counted before it is looked: a stopping agent either sees this or is
        // seen, as what is looked at and changed is under a lock.
        self.busy.fetch_add(1, Ordering::SeqCst);
        let busy = Busy(&self.busy);
        (!self.is_stopping()).then_some(busy)
    }

    /// From now on nothing new is begun.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Whether nothing new is begun.
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits until nothing new is begun.
    pub async fn until_stopping(&self) {
        // An error only once the sender is gone, which is this node's own.
        let _ = self
            .stopping
            .subscribe()
            .wait_for(|stopping| *stopping)
            .await;
    }

    /// Whether anything is under way.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst) > 0
    }

    /// A picture of it all; of other users only for root.
    pub fn status(&self, uid: u32) -> AgentStatus {
        let mut users = self.quotas.status();
        users.retain(|user| uid == 0 || user.uid == uid);
        let peer = |(name, peer): (&String, &Peer)| PeerStatus {
            name: name.clone(),
            address: peer.address.clone(),
        };
        let mut sessions: Vec<_> = self.live().iter().map(|s| session_status(s)).collect();
        let staged = self.devices.reasons();
        let over_dpdk = |one: &&mut SessionStatus| one.path.starts_with("dpdk:");
        for one in sessions.iter_mut().filter(over_dpdk) {
            one.reasons.extend_from_slice(&staged);
        }
        sessions.sort_by(|a, b| (&a.peer, a.session).cmp(&(&b.peer, b.session)));
        AgentStatus {
            name: self.name.clone(),
            instance: self.instance.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            up_seconds: self.started.elapsed().as_secs_f64(),
            listen: self.listen,
            socket: self.socket.clone(),
            warning: self.warning.clone(),
            identity: self.identity.status(),
            metrics: self.metrics.clone(),
            preference: self.preference.to_string(),
            transports: self.transport_status(),
            peers: self.peers.iter().map(peer).collect(),
            sessions,
            store: self.store.usage(),
            arenas: self.arenas.usage(),
            users,
            peer_usage: self.peer_quotas.status(),
            accelerators: self.devices.status(),
        }
    }

    fn transport_status(&self) -> Vec<TransportStatus> {
        let running = self
            .transports
            .engines()
            .iter()
            .map(|engine| TransportStatus {
                transport: engine.transport.to_string(),
                path: Some(engine.path()),
                queue: self
                    .transports
                    .has_queues(engine.transport)
                    .then_some(engine.queue),
                data: match &engine.local {
                    Local::Tcp { data, .. } => Some(*data),
                    _ => None,
                },
                reason: None,
                engine: Some(engine.status.snapshot()),
            });
        let refused = self.transports.refused().iter();
        let refused = refused.map(|(transport, reason)| TransportStatus {
            transport: transport.to_string(),
            path: None,
            queue: None,
            data: None,
            reason: Some(reason.clone()),
            engine: None,
        });
        running.chain(refused).collect()
    }

    fn negotiating(&self) -> MutexGuard<'_, Vec<String>> {
        let negotiating = self.negotiating.lock();
        negotiating.unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        // Nothing here panics while it holds the lock half-changed.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Negotiating<'_> {
    fn end(&mut self, negotiating: &mut Vec<String>) {
        let peer = self.peer.take();
        let at = |peer| negotiating.iter().position(|one| *one == peer);
        if let Some(at) = peer.and_then(at) {
            negotiating.swap_remove(at);
        }
    }
}

impl Drop for Negotiating<'_> {
    fn drop(&mut self) {
        let node = self.node;
        // Not again where it has ended: that was under this lock.
        if self.peer.is_some() {
            self.end(&mut node.negotiating());
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn session_status(session: &Session) -> SessionStatus {
    let Stage {
        path,
        refused,
        lost,
    } = session.route.stage();
    let (path_changes, changes) = session.route.changes();
    let change = |change: Change| PathChange {
        number: change.number,
        from: change.from,
        to: change.to,
        reason: change.reason.to_string(),
        seconds_ago: change.at.elapsed().as_secs_f64(),
        gap_ms: change.gap.as_secs_f64() * 1e3,
    };
    SessionStatus {
        peer: session.peer.clone(),
        instance: session.instance.to_string(),
        direction: match session.direction {
            Direction::Dialled => "dialled",
            Direction::Accepted => "accepted",
        }
        .to_owned(),
        path: path.name,
        sealed: path.sealed,
        lost: lost.map(|(reason, _)| reason.to_string()),
        path_changes,
        changes: changes.into_iter().map(change).collect(),
        reasons: refused.iter().map(ToString::to_string).collect(),
        up_seconds: session.since.elapsed().as_secs_f64(),
        opened_in_us: path.round_trip.as_micros().try_into().unwrap_or(u64::MAX),
        session: path.session.0,
        requests: session.requests() as u64,
    }
}

/// Random bytes from the kernel.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        // Blocks only in the first moments after boot; fails only on a signal.
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags).unwrap_or(0);
    }
    bytes
}
