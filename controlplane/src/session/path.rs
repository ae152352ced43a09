//! Opening a path from both ends: `Try`, `Trying`, `Opened`.
//!
//! Used before a session is up, on the connection itself, and in mid-session
//! when its path is replaced, beside the requests; [`Line`] hides which. The
//! invariant: *a path that was opened at this end and not agreed on is closed*.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use genie_dataplane::endpoint::Endpoint;
use genie_dataplane::engine::Remote;
use genie_dataplane::tcp::Token;
use genie_dataplane::{Secrets, SessionId};
use tokio::time::timeout;

use super::{SessionError, kind};
use crate::identity::stream::PathKeys;
use crate::message::Message;
use crate::negotiation::{Plan, Refusal, Side, plan};
use crate::node::{Node, random};
use crate::security::{self, DataSecurity, Demand, Salt, Salts};
use crate::transport::{Engine, Keys, Local, Offer, Preference, Seat, Transport};

/// A path of a session.
#[derive(Clone, Debug)]
pub struct Path {
    /// Its place among the paths of the session, from 1; both ends count alike.
    pub number: u32,
    /// Which transport.
    pub transport: Transport,
    /// Which queue of its device.
    pub queue: u16,
    /// How it is called.
    pub name: String,
    /// The engine that moves its tensors.
    pub endpoint: Endpoint,
    /// The engine's name for the session.
    pub session: SessionId,
    /// Round trip when it was opened.
    pub round_trip: Duration,
    /// Whether its packets are encrypted and authenticated.
    pub sealed: bool,
}

/// What must be known of a peer to open a path to it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// What it allows, best first.
    pub preference: Preference,
    /// What it has.
    pub offers: Vec<Offer>,
    /// Where its control connection is, if we dialled it.
    pub control: Option<SocketAddr>,
    /// What both ends make tokens from, under TLS.
    pub keys: Option<PathKeys>,
    /// What it demands of paths.
    pub data_security: DataSecurity,
    /// Which of our engines carry the session: those that it was told of.
    pub seat: Arc<Seat>,
}

/// What a dialler asks for with a `Try`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) transport: Transport,
    pub(super) session: SessionId,
    pub(super) token: Option<Token>,
    pub(super) salt: Option<Salt>,
}

impl Peer {
    fn token(&self, dialler: SessionId, acceptor: SessionId) -> Option<Token> {
        let keys = self.keys.as_ref()?;
        Some(keys.token(dialler, acceptor))
    }

    /// What packets are sealed with at the dialler's end, if both ends have a
    /// part in it.
    fn secrets(
        &self,
        dialler: (SessionId, Option<Salt>),
        acceptor: (SessionId, Option<Salt>),
    ) -> Option<Secrets> {
        let salts = Salts {
            dialler: dialler.1?,
            acceptor: acceptor.1?,
        };
        let keys = self.keys.as_ref()?;
        let [send, receive] = keys.secrets(dialler.0, acceptor.0, salts);
        Some(Secrets { send, receive })
    }
}

/// The way to the peer's negotiator.
pub(super) trait Line {
    /// Sends a message.
    fn send(&mut self, message: Message) -> impl Future<Output = Result<(), SessionError>> + Send;

    /// The next message of a negotiation.
    fn recv(
        &mut self,
        limit: Duration,
    ) -> impl Future<Output = Result<Message, SessionError>> + Send;
}

/// A path that is open at this end but not agreed on; closed when dropped.
#[derive(Debug)]
pub(super) struct Draft {
    path: Option<Path>,
}

/// What both ends need to open paths.
#[derive(Clone, Copy)]
pub(super) struct Opener<'a> {
    pub(super) node: &'a Arc<Node>,
    pub(super) peer: &'a Peer,
}

impl Opener<'_> {
    /// What this end, which dialled, tries in which order.
    pub(super) fn plan(&self) -> Plan {
        let ours = self.node.transports.offers(&self.peer.seat);
        let dialler = Side {
            name: &self.node.name,
            preference: &self.node.preference,
            offers: &ours,
        };
        let acceptor = Side {
            name: &self.peer.name,
            preference: &self.peer.preference,
            offers: &self.peer.offers,
        };
        let mut plan = plan(dialler, acceptor);
        plan.candidates.retain(|transport| {
            let refused = self.seals(*transport).err();
            let transport = *transport;
            let admitted = refused.is_none();
            plan.refused
                .extend(refused.map(|reason| Refusal { transport, reason }));
            admitted
        });
        plan
    }

    /// Whether packets over this transport are sealed, or why it is out of the question.
    fn seals(&self, transport: Transport) -> Result<bool, String> {
        let ours = Demand {
            name: &self.node.name,
            security: self.node.data_security,
        };
        let theirs = Demand {
            name: &self.peer.name,
            security: self.peer.data_security,
        };
        security::agree([ours, theirs], self.peer.keys.is_some(), transport)
    }

    /// This end's part in the keys of a path that is to be sealed.
    fn salt(&self, sealed: bool) -> Option<Salt> {
        sealed.then(|| Salt(random()))
    }

    /// The dialler's part; the inner error says why there is no such path.
    pub(super) async fn offer(
        &self,
        line: &mut impl Line,
        transport: Transport,
    ) -> Result<Result<Draft, String>, SessionError> {
        let (Some(engine), Some(local)) = (
            self.node.transports.engine_at(transport, &self.peer.seat),
            find_local(&self.peer.offers, transport),
        ) else {
            return Ok(Err("it is not there".to_owned()));
        };
        if let Some(reason) = engine.local.refuses(local) {
            return Ok(Err(reason));
        }
        let sealed = match self.seals(transport) {
            Ok(sealed) => sealed,
            Err(reason) => return Ok(Err(reason)),
        };
        let session = engine.endpoint.new_session(u32::from_ne_bytes(random()));
        let mut draft = Draft::new(engine, session, sealed);
        let salt = self.salt(sealed);
        let sent = self.peer.keys.is_none().then(|| Token(random()));
        line.send(Message::Try {
            transport,
            session,
            token: sent,
            salt,
        })
        .await?;
        let limit = self.open_limit() + self.node.liveness;
        let (theirs, their_salt) = match line.recv(limit).await? {
            Message::Trying { session, salt } => (session, salt),
            Message::TryRefused { reason } => {
                return Ok(Err(format!("node '{}': {reason}", self.peer.name)));
            }
            other => return Err(self.unexpected(&other)),
        };
        let token = self.peer.token(session, theirs).or(sent);
        let token = token.expect("derived under TLS, made otherwise");
        let secrets = self.peer.secrets((session, salt), (theirs, their_salt));
        if secrets.is_some() != sealed {
            // A build that does not know of sealed packets, or means to send plain ones.
            return Err(SessionError::Unexpected {
                peer: self.peer.name.clone(),
                what: "Trying without a salt".to_owned(),
            });
        }
        let keys = Keys { token, secrets };
        let remote = local.remote(&engine.local, theirs, keys, self.peer.control);
        let opened = self.open(engine, session, remote).await;
        let answer = match line.recv(limit).await? {
            Message::Opened { result } => result,
            other => return Err(self.unexpected(&other)),
        };
        Ok(match (opened, answer) {
            (Ok(round_trip), Ok(())) => {
                draft.measured(round_trip);
                Ok(draft)
            }
            (Err(reason), _) => Err(format!("node '{}': {reason}", self.node.name)),
            (Ok(_), Err(reason)) => Err(format!("node '{}': {reason}", self.peer.name)),
        })
    }

    /// The acceptor's part of one `Try`; none if it did not open.
    pub(super) async fn answer(
        &self,
        line: &mut impl Line,
        asked: Asked,
    ) -> Result<Option<Draft>, SessionError> {
        let (transport, theirs) = (asked.transport, asked.session);
        let allowed = self.node.preference.allows(transport);
        let engine = self.node.transports.engine_at(transport, &self.peer.seat);
        let engine = engine.filter(|_| allowed);
        let (Some(engine), Some(local)) = (engine, find_local(&self.peer.offers, transport)) else {
            let reason = "it is not offered".to_owned();
            line.send(Message::TryRefused { reason }).await?;
            return Ok(None);
        };
        let sealed = match self.seals(transport) {
            Ok(true) if asked.salt.is_none() => Err(format!(
                "packets would not be sealed, which node '{}' demands",
                self.node.name
            )),
            sealed => sealed,
        };
        let sealed = match sealed {
            Ok(sealed) => sealed,
            Err(reason) => {
                line.send(Message::TryRefused { reason }).await?;
                return Ok(None);
            }
        };
        let session = engine.endpoint.new_session(u32::from_ne_bytes(random()));
        let mut draft = Draft::new(engine, session, sealed);
        let salt = self.salt(sealed);
        // Under TLS what was sent does not count.
        let Some(token) = self.peer.token(theirs, session).or(asked.token) else {
            return Err(SessionError::Unexpected {
                peer: self.peer.name.clone(),
                what: "Try without a token".to_owned(),
            });
        };
        let secrets = self.peer.secrets((theirs, asked.salt), (session, salt));
        let secrets = secrets.map(Secrets::of_the_other_end);
        let keys = Keys { token, secrets };
        let remote = local.remote(&engine.local, theirs, keys, None);
        let mut open = pin!(self.open(engine, session, remote));
        // The engine must expect the path before the dialler hears that it may open it.
        let early = poll_fn(|context| Poll::Ready(open.as_mut().poll(context))).await;
        line.send(Message::Trying { session, salt }).await?;
        let opened = match early {
            Poll::Ready(opened) => opened,
            Poll::Pending => open.await,
        };
        let result = opened.clone().map(|_| ());
        line.send(Message::Opened { result }).await?;
        Ok(opened.ok().map(|round_trip| {
            draft.measured(round_trip);
            draft
        }))
    }

    async fn open(
        &self,
        engine: &Engine,
        session: SessionId,
        remote: Remote,
    ) -> Result<Duration, String> {
        let limit = self.open_limit();
        match timeout(limit, engine.endpoint.open(session, remote)).await {
            Ok(opened) => opened.map_err(|error| error.to_string()),
            Err(_) => Err(format!("not open after {limit:?}")),
        }
    }

    /// How long opening one path may take.
    pub(super) fn open_limit(&self) -> Duration {
        // Longer than the liveness limit: an address must be resolved, and
        // several connections must be made, by an engine that may be busy.
        2 * self.node.liveness
    }

    pub(super) fn unexpected(&self, message: &Message) -> SessionError {
        SessionError::Unexpected {
            peer: self.peer.name.clone(),
            what: kind(message),
        }
    }
}

impl Draft {
    fn new(engine: &Engine, session: SessionId, sealed: bool) -> Self {
        let path = Path {
            number: 1,
            transport: engine.transport,
            queue: engine.queue,
            name: engine.path(),
            endpoint: engine.endpoint.clone(),
            session,
            round_trip: Duration::ZERO,
            sealed,
        };
        Self { path: Some(path) }
    }

    fn measured(&mut self, round_trip: Duration) {
        if let Some(path) = &mut self.path {
            path.round_trip = round_trip;
        }
    }

    /// The path, which was agreed on as the session's `number`th.
    pub(super) fn keep(mut self, number: u32) -> Path {
        let path = self.path.take().expect("a draft is kept once");
        Path { number, ..path }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            path.endpoint.close(path.session);
        }
    }
}

fn find_local(offers: &[Offer], transport: Transport) -> Option<&Local> {
    offers
        .iter()
        .find(|offer| offer.transport == transport)?
        .local
        .as_ref()
        .ok()
}
