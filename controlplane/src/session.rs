//! One connection to a peer's agent, and the path it was given.
//!
//! [`establish`] dials or accepts and negotiates; from then on these tasks
//! serve a session: a reader, a writer (which also sends heartbeats), a steward
//! that keeps a path under it, and one for each request. The invariant: *a session ends once, with one reason, and
//! at that moment everything that waits for it is told*: calls, requests, and
//! through the engine every transfer.
//!
//! Requests go from the dialler to the acceptor; an agent that wants something
//! of a peer that dialled it dials a session of its own.

pub mod comeback;
pub mod establish;
mod path;
pub mod route;
mod steward;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use genie_client::protocol::Failure;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::frame::{self, FrameError};
use crate::identity::credentials::Chain;
use crate::identity::stream::{Reader, Writer};
use crate::message::{Instance, Message, Request};
use crate::negotiation::Refusal;
use crate::node::{Negotiating, Node};
use crate::quota::peer::Share;
use crate::rights::Right;
use crate::tensor::LIST_MAX;
use crate::transfer;
use crate::transport::Preference;

use path::Draft;
pub use path::{Path, Peer};
use route::Route;
use steward::Steward;

/// Messages that may wait to be written; more make their senders wait.
const OUTBOX: usize = 64;

/// Messages that may wait for one request. Grants are bounded by the operations
/// an endpoint may have outstanding, so a peer that exceeds this floods us.
const INBOX: usize = 2 * genie_dataplane::endpoint::OPERATIONS_MAX;

/// Memory that they may take: one list of the longest, and another message.
const INBOX_BYTES: usize = LIST_MAX + frame::BODY_MAX;

/// Requests a peer may have under way in one session.
pub const REQUESTS_MAX: usize = 1024;

/// Within this the end of a connection is read, once writing to it failed.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Heartbeats in the time after which a silent peer is given up.
const HEARTBEATS: u32 = 4;

/// Why there is no session, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No such peer in the configuration.
    #[error("no peer is called '{name}' ({known}): start the agent with --peer {name}=ADDRESS")]
    UnknownPeer {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Nobody there.
    #[error("cannot reach peer '{peer}' at {address}: {reason}; is 'genie agent' running there?")]
    Unreachable {
        /// Its name.
        peer: String,
        /// Where it should be.
        address: String,
        /// The system's answer.
        reason: String,
    },
    /// The connection broke, or what came was not understood.
    #[error("peer '{peer}': {source}")]
    Frame {
        /// Its name.
        peer: String,
        /// What happened.
        source: FrameError,
    },
    /// It kept talking without getting anywhere.
    #[error("peer '{peer}' had not agreed on a path after {limit:?}")]
    Slow {
        /// Its name.
        peer: String,
        /// How long.
        limit: Duration,
    },
    /// Nothing came in time.
    #[error("peer '{peer}' did not answer for {limit:?}")]
    Silent {
        /// Its name.
        peer: String,
        /// How long.
        limit: Duration,
    },
    /// One of the two does not believe that the other is who it says.
    #[error("peer '{peer}' at {address}: {reason}")]
    Untrusted {
        /// Its name, if it has proven one.
        peer: String,
        /// Where the connection goes.
        address: String,
        /// What was wrong, and what mends it.
        reason: String,
    },
    /// It does not let us do this.
    #[error(
        "peer '{peer}' does not let this node {right} {}: \
         its configuration must allow it under [rights]",
        show_name(name)
    )]
    Denied {
        /// Its name.
        peer: String,
        /// What we must be allowed to do.
        right: Right,
        /// Under which name; empty for all of the store.
        name: String,
    },
    /// It does not want us.
    #[error("peer '{peer}' refused: {reason}")]
    Refused {
        /// Its name.
        peer: String,
        /// Its words.
        reason: String,
        /// Whether it may let us in a moment later.
        passing: bool,
    },
    /// Something else than the protocol asks for.
    #[error("peer '{peer}' sent {what} where the protocol has no place for it")]
    Unexpected {
        /// Its name.
        peer: String,
        /// What kind of message.
        what: String,
    },
    /// No transport that both allow works.
    #[error("no path to peer '{peer}': {reasons}")]
    NoPath {
        /// Its name.
        peer: String,
        /// Each transport's reason.
        reasons: String,
    },
    /// It lost its place to others, before it was known who it is.
    #[error("others came before it had introduced itself")]
    Crowded,
    /// The session has ended.
    #[error("{0}")]
    Ended(Arc<str>),
}

/// Who dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// We did.
    Dialled,
    /// The peer did.
    Accepted,
}

/// A session with a peer. Any task may use it.
#[derive(Debug)]
pub struct Session {
    /// The peer's name.
    pub peer: String,
    /// The peer's run.
    pub instance: Instance,
    /// Who dialled.
    pub direction: Direction,
    /// The paths it takes.
    pub route: Route,
    /// The certificates it has shown, if it had to.
    pub chain: Option<Chain>,
    /// Since when it is up.
    pub since: Instant,
    /// For how long a request may make no progress.
    pub stall: Duration,
    /// The longest transfer that both ends take, where that is limited.
    pub range_bytes: Option<u64>,
    outbox: mpsc::Sender<Message>,
    /// Messages of a negotiation, for the steward.
    negotiation: mpsc::Sender<Message>,
    calls: Mutex<HashMap<u64, Entry>>,
    next_call: AtomicU64,
    end: watch::Sender<Option<Arc<str>>>,
}

/// What was agreed before a session is up.
#[derive(Debug)]
pub struct Agreed {
    /// The peer, and how paths to it are opened.
    pub peer: Peer,
    /// The peer's run.
    pub instance: Instance,
    /// Who dialled.
    pub direction: Direction,
    /// The path.
    pub path: Path,
    /// Better paths and why they were refused.
    pub refused: Vec<Refusal>,
    /// The certificates it has shown, if it had to.
    pub chain: Option<Chain>,
    /// After how much silence the more impatient of the two gives up.
    pub liveness: Duration,
    /// The longest transfer that both ends take, where that is limited.
    pub range_bytes: Option<u64>,
}

/// A request under way, as seen by one end. Dropping it gives the request up.
#[derive(Debug)]
pub struct Call {
    session: Arc<Session>,
    id: u64,
    inbox: mpsc::Receiver<Message>,
    queued: Arc<AtomicUsize>,
    /// Its part in the peer's transfers, if it is the peer's request.
    share: Option<Share>,
    /// Whether the other end must be told when this is dropped.
    cancels: bool,
}

#[derive(Debug)]
struct Entry {
    inbox: mpsc::Sender<Message>,
    /// Memory for what waits in the inbox.
    queued: Arc<AtomicUsize>,
    task: Option<AbortHandle>,
}

impl Session {
    /// Starts serving a connection on which everything was agreed.
    pub(crate) fn start(
        node: &Arc<Node>,
        agreed: Agreed,
        admitted: Option<Negotiating<'_>>,
        reader: Reader,
        writer: Writer,
    ) -> Arc<Self> {
        let Agreed {
            peer,
            instance,
            direction,
            path,
            refused,
            chain,
            liveness,
            range_bytes,
        } = agreed;
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let (negotiation, negotiating) = mpsc::channel(steward::INBOX);
        let session = Arc::new(Self {
            peer: peer.name.clone(),
            instance,
            direction,
            route: Route::new(path, refused),
            chain,
            since: Instant::now(),
            stall: node.stall,
            range_bytes,
            outbox,
            negotiation,
            calls: Mutex::default(),
            next_call: AtomicU64::new(1),
            end: watch::Sender::new(None),
        });
        node.adopt(&session, admitted);
        let steward = Steward::new(Arc::clone(node), Arc::clone(&session), peer, negotiating);
        tokio::spawn(steward.run());
        tokio::spawn(write_loop(Arc::clone(&session), writer, outgoing, liveness));
        tokio::spawn(read_loop(
            Arc::clone(node),
            Arc::clone(&session),
            reader,
            liveness,
        ));
        // Who may be here can have changed since it was admitted.
        node.end_if_unwanted(&session);
        session
    }

    /// Why it ended; none while it is up.
    pub fn ended(&self) -> Option<Arc<str>> {
        self.end.borrow().clone()
    }

    /// Waits until it ends.
    pub async fn until_ended(&self) -> Arc<str> {
        let mut end = self.end.subscribe();
        let ended = end.wait_for(Option::is_some).await;
        ended
            .ok()
            .and_then(|reason| reason.clone())
            .unwrap_or_else(|| "the session ended".into())
    }

    /// Ends it; only the first reason counts.
    pub fn end(&self, reason: impl Into<Arc<str>>) {
        let reason = reason.into();
        let first = self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert_with(|| Arc::clone(&reason));
            first
        });
        if !first {
            return;
        }
        // A change that comes now looks for the end once it is made.
        let path = self.path();
        tracing::info!(peer = %self.peer, path = %path.name, %reason, "session ended");
        path.endpoint.close(path.session);
        for (_, entry) in self.lock().drain() {
            if let Some(task) = entry.task {
                task.abort();
            }
        }
    }

    /// The path that carries it, or the last one that did.
    pub fn path(&self) -> Path {
        self.route.stage().path
    }

    /// Gives a path up that is of no use any more: another one is opened, or
    /// the session ends. Only the first reason counts.
    pub fn lose_path(&self, number: u32, reason: &str) {
        if self.route.lose(number, reason) {
            let path = self.path();
            tracing::warn!(peer = %self.peer, path = %path.name, number, reason, "path lost");
        }
    }

    /// The peer says that a path is lost.
    fn hear_lost(&self, number: u32, reason: &str) {
        self.lose_path(number, &format!("peer '{}' says: {reason}", self.peer));
    }

    /// Takes a path that both ends have agreed on.
    fn change_path(&self, draft: Draft, refused: Vec<Refusal>, why: &str) {
        let path = draft.keep(self.path().number + 1);
        let (endpoint, id) = (path.endpoint.clone(), path.session);
        let change = self.route.change(path, refused, why);
        let route::Change {
            number,
            from,
            to,
            reason,
            gap,
            ..
        } = change;
        tracing::warn!(peer = %self.peer, number, from, to, %reason, ?gap, "path changed");
        if self.ended().is_some() {
            endpoint.close(id);
        }
    }

    /// Sends a message; fails once the session has ended.
    async fn say(&self, message: Message) -> Result<(), SessionError> {
        let sent = self.outbox.send(message).await;
        sent.map_err(|_| self.error())
    }

    /// Begins a request.
    pub async fn call(self: &Arc<Self>, request: Request) -> Result<Call, SessionError> {
        let id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let call = {
            let mut calls = self.lock();
            if self.ended().is_some() {
                return Err(self.error());
            }
            let (entry, call) = self.begin(id, true);
            calls.insert(id, entry);
            call
        };
        call.send(Message::Begin { id, request }).await?;
        Ok(call)
    }

    /// Both ends of a request's inbox. [`Session::end`] drains the map after
    /// it has noted the end, so whoever inserts looks for that under the lock.
    fn begin(self: &Arc<Self>, id: u64, cancels: bool) -> (Entry, Call) {
        let (inbox, incoming) = mpsc::channel(INBOX);
        let queued = Arc::<AtomicUsize>::default();
        let entry = Entry {
            inbox,
            queued: Arc::clone(&queued),
            task: None,
        };
        let call = Call {
            session: Arc::clone(self),
            id,
            inbox: incoming,
            queued,
            share: None,
            cancels,
        };
        (entry, call)
    }

    /// How the path is called.
    pub fn path_name(&self) -> String {
        self.path().name
    }

    /// Requests under way, either way.
    pub fn requests(&self) -> usize {
        self.lock().len()
    }

    fn error(&self) -> SessionError {
        SessionError::Ended(
            self.ended().unwrap_or_else(|| {
                format!("the session with peer '{}' is ending", self.peer).into()
            }),
        )
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        // Nothing here panics while it holds the lock half-changed.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a message of a request to whoever serves it.
    pub(crate) fn route(&self, id: u64, message: Message) -> Result<(), String> {
        let calls = self.lock();
        // Not there: it ended or was given up while this was on its way.
        let Some(entry) = calls.get(&id) else {
            return Ok(());
        };
        let bytes = message.held_bytes();
        if entry.queued.fetch_add(bytes, Ordering::Relaxed) + bytes > INBOX_BYTES {
            return Err(format!("it sent more than {INBOX_BYTES} bytes ahead"));
        }
        match entry.inbox.try_send(message) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(format!("it sent more than {INBOX} messages ahead"))
            }
        }
    }

    /// Serves a request of the peer's.
    fn serve(self: &Arc<Self>, node: &Arc<Node>, id: u64, request: Request) -> Result<(), String> {
        if self.direction == Direction::Dialled {
            return Err("it sent a request to the node that dialled".to_owned());
        }
        let mut call = {
            let mut calls = self.lock();
            if self.ended().is_some() {
                return Ok(());
            }
            if calls.len() >= REQUESTS_MAX {
                return Err(format!(
                    "it has more than {REQUESTS_MAX} requests under way"
                ));
            }
            if calls.contains_key(&id) {
                return Err(format!("it used request number {id} twice"));
            }
            let (entry, call) = self.begin(id, false);
            calls.insert(id, entry);
            call
        };
        let node = Arc::clone(node);
        let task = tokio::spawn(async move {
            let account = node.peer_quotas.account(&call.session.peer);
            let allowed = account.request(Instant::now());
            let mut needs = request.needs().into_iter();
            let is_denied = |(right, name): &(Right, &str)| {
                !node.identity.check(&call.session.peer, *right, name)
            };
            if let Some((right, name)) = needs.find(is_denied) {
                let name = name.to_owned();
                let _ = call.send(Message::Denied { id, right, name }).await;
                return;
            }
            let result = match allowed {
                Ok(()) => transfer::serve(&node, &mut call, request).await,
                Err(limit) => Err(limit.into()),
            };
            if let Err(reason) = &result {
                tracing::debug!(peer = %call.session.peer, %reason, "a request failed");
            }
            let result = result.map_err(|error| Failure {
                kind: transfer::kind_of(&error),
                message: error.to_string(),
            });
            // If the session has ended, the peer has been told that instead.
            let _ = call.send(Message::Done { id, result }).await;
        });
        match self.lock().get_mut(&id) {
            Some(entry) => entry.task = Some(task.abort_handle()),
            // It is done already, or the session ended meanwhile.
            None => task.abort(),
        }
        Ok(())
    }

    fn dispatch(self: &Arc<Self>, node: &Arc<Node>, message: Message) -> Result<(), String> {
        match message {
            Message::Ping => Ok(()),
            Message::Bye { reason, .. } => {
                self.end(format!("peer '{}' ended the session: {reason}", self.peer));
                Ok(())
            }
            Message::Begin { id, request } => self.serve(node, id, request),
            Message::Cancel { id } => {
                if let Some(Entry {
                    task: Some(task), ..
                }) = self.lock().remove(&id)
                {
                    task.abort();
                }
                Ok(())
            }
            Message::Tensors { id, .. }
            | Message::Found { id, .. }
            | Message::Granted { id, .. }
            | Message::Resumed { id, .. }
            | Message::Listed { id, .. }
            | Message::Done { id, .. }
            | Message::Denied { id, .. } => self.route(id, message),
            Message::Try { .. } | Message::Chosen { .. } | Message::NoPath { .. } => {
                self.negotiate(Direction::Accepted, message)
            }
            Message::Trying { .. } | Message::TryRefused { .. } | Message::Opened { .. } => {
                self.negotiate(Direction::Dialled, message)
            }
            Message::PathLost { .. } => self.negotiate(self.direction, message),
            Message::Hello(_) => Err("it introduces itself again".to_owned()),
        }
    }

    /// Hands a message, which the end that `receives` it may get, to the steward.
    fn negotiate(&self, receives: Direction, message: Message) -> Result<(), String> {
        if receives != self.direction {
            return Err("it negotiates as if it were the other end".to_owned());
        }
        match self.negotiation.try_send(message) {
            // Closed: the session is ending.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(format!(
                "it sent more than {} messages of a negotiation ahead",
                steward::INBOX
            )),
        }
    }
}

impl Call {
    /// The session it belongs to.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Its number in the session.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Sends a message; fails once the session has ended.
    pub async fn send(&self, message: Message) -> Result<(), SessionError> {
        self.session.say(message).await
    }

    /// The next message of this request.
    pub async fn recv(&mut self) -> Result<Message, SessionError> {
        let message = self
            .inbox
            .recv()
            .await
            .ok_or_else(|| self.session.error())?;
        self.queued
            .fetch_sub(message.held_bytes(), Ordering::Relaxed);
        match message {
            Message::Denied { right, name, .. } => Err(SessionError::Denied {
                peer: self.session.peer.clone(),
                right,
                name,
            }),
            message => Ok(message),
        }
    }

    /// Lets it move tensors as a part of what its peer may move.
    pub fn share(&mut self, share: Share) {
        self.share = Some(share);
    }

    /// Its part in the peer's transfers, for whoever moves its tensors.
    pub fn take_share(&mut self) -> Option<Share> {
        self.share.take()
    }

    /// Says that nothing more is to come: dropping it cancels nothing.
    pub fn finish(&mut self) {
        self.cancels = false;
    }

    /// A message that has no place here.
    pub fn unexpected(&self, message: &Message) -> SessionError {
        SessionError::Unexpected {
            peer: self.session.peer.clone(),
            what: kind(message),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.session.lock().remove(&self.id);
        if self.cancels && self.session.ended().is_none() {
            let (outbox, id) = (self.session.outbox.clone(), self.id);
            if let Err(mpsc::error::TrySendError::Full(message)) =
                outbox.try_send(Message::Cancel { id })
            {
                tokio::spawn(async move { outbox.send(message).await });
            }
        }
    }
}

/// The first word of a message, for errors.
fn kind(message: &Message) -> String {
    let text = format!("{message:?}");
    text.split([' ', '(']).next().unwrap_or_default().to_owned()
}

async fn read_loop(node: Arc<Node>, session: Arc<Session>, mut reader: Reader, liveness: Duration) {
    let peer = &session.peer;
    let reason = loop {
        let next = timeout(
            liveness,
            frame::read::<Message, _>(&mut reader, frame::BODY_MAX),
        );
        let next = tokio::select! {
            next = next => next,
            reason = session.until_ended() => break reason.to_string(),
        };
        match next {
            Ok(Ok(message)) => {
                if let Err(why) = session.dispatch(&node, message) {
                    break format!("peer '{peer}' broke the protocol: {why}");
                }
            }
            Ok(Err(FrameError::Closed)) => {
                break format!("peer '{peer}' closed the connection: it died or was stopped");
            }
            Ok(Err(error)) => break format!("peer '{peer}': {error}"),
            Err(_) => break format!("peer '{peer}' did not answer for {liveness:?}"),
        }
    };
    session.end(reason);
    node.forget(&session);
}

async fn write_loop(
    session: Arc<Session>,
    mut writer: Writer,
    mut outgoing: mpsc::Receiver<Message>,
    liveness: Duration,
) {
    let mut heartbeat = tokio::time::interval(liveness / HEARTBEATS);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            biased;
            reason = session.until_ended() => {
                // Whether there may be another session is said to whoever asks for it.
                let bye = Message::Bye { reason: reason.to_string(), passing: true };
                // The peer may be gone, which is why the session ended.
                let _ = timeout(liveness, frame::write(&mut writer, &bye)).await;
                let _ = writer.shutdown().await;
                return;
            }
            message = outgoing.recv() => message.unwrap_or(Message::Ping),
            _ = heartbeat.tick() => Message::Ping,
        };
        let peer = &session.peer;
        match timeout(liveness, frame::write(&mut writer, &message)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                // A peer that closed the connection said why before: let the
                // reader come to it.
                let _ = timeout(LAST_WORDS, session.until_ended()).await;
                session.end(format!("peer '{peer}': {error}"));
            }
            Err(_) => session.end(format!("peer '{peer}' took nothing for {liveness:?}")),
        }
    }
}

/// A name of the store as it is said in errors.
fn show_name(name: &str) -> String {
    match name {
        "" => "all names".to_owned(),
        name => format!("under '{name}'"),
    }
}

/// What two nodes that prefer `ours` and `theirs` cannot do without.
pub(crate) fn show_refusals(refused: &[Refusal], ours: &Preference) -> String {
    if refused.is_empty() {
        return format!("no transport in common (--transport {ours})");
    }
    refused
        .iter()
        .map(Refusal::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::testing::{node, session};
    use super::*;

    #[tokio::test]
    async fn a_request_that_comes_after_the_end_is_refused_and_not_kept() {
        let (session, _outgoing) = session(Direction::Dialled);
        session.end("over");
        let refused = session
            .call(Request::List { under: None })
            .await
            .unwrap_err();
        assert_eq!(refused.to_string(), "over");
        assert_eq!(session.requests(), 0);

        let (session, _outgoing) = super::testing::session(Direction::Accepted);
        session.end("over");
        let get = Request::Put {
            prefix: "m".into(),
            count: 1,
            metadata: None,
            memory: Default::default(),
            key: None,
        };
        let node = node();
        assert_eq!(session.serve(&node, 1, get), Ok(()));
        tokio::task::yield_now().await;
        assert_eq!(session.requests(), 0);
        assert!(!node.is_busy(), "nothing may be left to wait for");
    }

    #[tokio::test]
    async fn a_stopping_node_begins_no_request() {
        let (session, mut outgoing) = session(Direction::Accepted);
        let node = node();
        node.stop();
        assert_eq!(
            session.serve(&node, 7, Request::List { under: None }),
            Ok(())
        );
        let Some(Message::Done {
            id: 7,
            result: Err(reason),
        }) = outgoing.recv().await
        else {
            panic!("no answer");
        };
        assert!(reason.message.contains("is stopping"), "{reason}");
    }

    #[tokio::test]
    async fn lists_that_nobody_reads_do_not_pile_up() {
        let (session, _outgoing) = session(Direction::Dialled);
        let mut call = session.call(Request::List { under: None }).await.unwrap();
        let long = crate::tensor::TensorInfo {
            name: "x".repeat(1 << 20),
            dtype: crate::tensor::Dtype::U8,
            shape: Vec::new(),
        };
        let list = || Message::Tensors {
            id: call.id(),
            tensors: vec![long.clone()],
        };
        let fit = INBOX_BYTES / long.held_bytes();
        let all = (0..fit).try_for_each(|_| session.route(call.id(), list()));
        assert_eq!(all, Ok(()));
        let refused = session.route(call.id(), list()).unwrap_err();
        assert!(refused.contains("bytes ahead"), "{refused}");
        let list = list();
        for _ in 0..2 {
            call.recv().await.unwrap();
        }
        assert_eq!(session.route(call.id(), list), Ok(()));
    }
}
