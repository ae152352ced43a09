//! From a connection to a session: introductions, then paths until one opens.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use genie_dataplane::SessionId;
use genie_dataplane::engine::Remote;
use genie_dataplane::tcp::Token;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Agreed, Direction, Path, Session, SessionError, kind, show_refusals};
use crate::devices::agreed_range;
use crate::frame::{self, FrameError};
use crate::identity::Current;
use crate::identity::stream::{ControlStream, HandshakeError, late_refusal, linger};
use crate::message::{Hello, Message};
use crate::negotiation::{Refusal, Side, better_refused, plan};
use crate::node::{Node, random};
use crate::tensor::check_name;
use crate::transport::{Engine, Local, Offer, Transport};

/// Liveness limits within which a stranger must be a peer. Introductions take
/// two at most and each transport that is tried six; the rest is to spare.
const PATIENCE: u32 = 20;

/// Sessions that one peer may have dialled: agents need one each way.
const PEER_SESSIONS_MAX: usize = 64;

/// Talks on a connection that has no session yet.
struct Talk<'a> {
    node: &'a Arc<Node>,
    stream: ControlStream,
    peer: String,
    address: String,
}

/// A path that is open at this end but not agreed on; closed when dropped.
struct Draft {
    path: Option<Path>,
}

/// Dials a peer.
pub async fn dial(
    node: &Arc<Node>,
    peer: &str,
    address: &str,
) -> Result<Arc<Session>, SessionError> {
    let unreachable = |reason: String| SessionError::Unreachable {
        peer: peer.to_owned(),
        address: address.to_owned(),
        reason,
    };
    let stream = timeout(node.liveness, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable(format!("no answer within {:?}", node.liveness)))?
        .map_err(|error| unreachable(error.to_string()))?;
    let control = stream
        .peer_addr()
        .map_err(|error| unreachable(error.to_string()))?;
    let current = node.identity.current();
    let handshake = ControlStream::dial(stream, current.credentials.as_deref(), peer);
    let stream = match timeout(node.liveness, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(failed_handshake(error, peer, address)),
        Err(_) => {
            let limit = node.liveness;
            return Err(unreachable(format!("no TLS handshake within {limit:?}")));
        }
    };
    let mut talk = Talk {
        node,
        stream,
        peer: peer.to_owned(),
        address: address.to_owned(),
    };
    let hello = match talk.introduce().await {
        Ok(hello) => hello,
        Err(error) => return Err(talk.refuse(error).await),
    };
    if hello.name != peer {
        let reason = format!(
            "the agent at {address} calls itself '{0}': say --peer {0}={address} here, \
             or start that agent with --name {peer}",
            hello.name
        );
        talk.bye(&reason).await;
        return Err(SessionError::Refused {
            peer: peer.to_owned(),
            reason,
        });
    }
    let (path, refused) = talk.open_some_path(&hello, control).await?;
    Ok(talk.start(hello, Direction::Dialled, path, refused))
}

/// Serves a connection that a peer dialled, until the session is up.
pub async fn accept(node: &Arc<Node>, stream: TcpStream) -> Result<Arc<Session>, SessionError> {
    let peer = stream
        .peer_addr()
        .map_or_else(|_| "?".to_owned(), |addr| addr.to_string());
    let current = node.identity.current();
    let address = peer.clone();
    let handshake = ControlStream::accept(stream, current.credentials.as_deref());
    let stream = match timeout(node.liveness, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            node.identity.count_refused_peer();
            return Err(turn_away(node, error, &address).await);
        }
        Err(_) => {
            let limit = node.liveness;
            return Err(SessionError::Silent { peer, limit });
        }
    };
    let mut talk = Talk {
        node,
        stream,
        peer,
        address,
    };
    let limit = node.liveness * PATIENCE;
    let agreed = timeout(limit, async {
        let hello = talk.introduce().await?;
        talk.admit(&current, &hello.name).await?;
        talk.peer.clone_from(&hello.name);
        let (path, refused) = talk.answer_paths(&hello).await?;
        Ok((hello, path, refused))
    });
    let agreed = agreed.await;
    let Ok(agreed) = agreed else {
        let peer = talk.peer.clone();
        let slow = SessionError::Slow { peer, limit };
        talk.bye(&slow.to_string()).await;
        return Err(slow);
    };
    let (hello, path, refused) = match agreed {
        Ok(agreed) => agreed,
        Err(error) => return Err(talk.refuse(error).await),
    };
    Ok(talk.start(hello, Direction::Accepted, path, refused))
}

impl Talk<'_> {
    async fn introduce(&mut self) -> Result<Hello, SessionError> {
        let limit = self.node.liveness;
        // Small messages that the other waits for.
        let _ = self.stream.set_nodelay();
        let exchanged = timeout(limit, frame::exchange_preamble(&mut self.stream)).await;
        self.in_time(exchanged, limit)?;
        let hello = Message::Hello(self.node.hello());
        self.send(&hello).await?;
        let hello = match self.recv_up_to(frame::HELLO_MAX, limit).await? {
            Message::Hello(hello) => hello,
            other => return Err(self.unexpected(&other)),
        };
        let refused = if hello.instance == self.node.instance {
            Some("that is this agent itself".to_owned())
        } else if let Err(error) = check_name(&hello.name) {
            Some(format!("its node name is bad: {error}"))
        } else if hello.liveness_ms == 0 {
            Some("its liveness limit is zero".to_owned())
        } else {
            None
        };
        match refused {
            None => Ok(hello),
            Some(reason) => {
                self.bye(&reason).await;
                Err(SessionError::Refused {
                    peer: self.peer.clone(),
                    reason,
                })
            }
        }
    }

    /// Whether the peer that introduced itself so may open a session.
    async fn admit(&mut self, current: &Current, name: &str) -> Result<(), SessionError> {
        let ours = &self.node.name;
        let reason = if let (Some(credentials), Some(chain)) =
            (&current.credentials, self.stream.chain())
            && credentials.verify(&chain, name).is_err()
        {
            format!(
                "it calls itself '{name}', and its certificate is another node's: \
                 start it with the --name in its certificate, or 'genie ca issue {name}'"
            )
        } else if !current.access.admits(name) {
            format!("node '{ours}' does not allow '{name}': it takes --allow {name} there")
        } else if self.node.sessions_of(name) >= PEER_SESSIONS_MAX {
            format!("'{name}' has {PEER_SESSIONS_MAX} sessions with node '{ours}' already")
        } else {
            return Ok(());
        };
        self.node.identity.count_refused_peer();
        self.bye(&reason).await;
        Err(SessionError::Untrusted {
            peer: name.to_owned(),
            address: self.address.clone(),
            reason,
        })
    }

    /// The dialler's part: tries the candidates in order.
    async fn open_some_path(
        &mut self,
        hello: &Hello,
        control: SocketAddr,
    ) -> Result<(Path, Vec<Refusal>), SessionError> {
        let node = self.node;
        let ours = node.transports.offers();
        let dialler = Side {
            name: &node.name,
            preference: &node.preference,
            offers: &ours,
        };
        let acceptor = Side {
            name: &hello.name,
            preference: &hello.preference,
            offers: &hello.offers,
        };
        let plan = plan(dialler, acceptor);
        let mut refused = plan.refused;
        for transport in plan.candidates {
            match self.try_path(transport, hello, control).await? {
                Ok(path) => {
                    let refused =
                        better_refused(transport, refused, &node.preference, &hello.preference);
                    self.send(&Message::Chosen {
                        refused: refused.clone(),
                    })
                    .await?;
                    return Ok((path, refused));
                }
                Err(reason) => refused.push(Refusal { transport, reason }),
            }
        }
        self.send(&Message::NoPath {
            refused: refused.clone(),
        })
        .await?;
        let reasons = show_refusals(&refused, &node.preference);
        Err(SessionError::NoPath {
            peer: self.peer.clone(),
            reasons,
        })
    }

    async fn try_path(
        &mut self,
        transport: Transport,
        hello: &Hello,
        control: SocketAddr,
    ) -> Result<Result<Path, String>, SessionError> {
        let (Some(engine), Some(local)) = (
            self.node.transports.engine(transport),
            find_local(&hello.offers, transport),
        ) else {
            return Ok(Err("it is not there".to_owned()));
        };
        if let Some(reason) = engine.local.refuses(local) {
            return Ok(Err(reason));
        }
        let session = engine.endpoint.new_session(u32::from_ne_bytes(random()));
        let mut draft = Draft::new(engine, session);
        let sent = self.stream.chain().is_none().then(|| Token(random()));
        self.send(&Message::Try {
            transport,
            session,
            token: sent,
        })
        .await?;
        let limit = self.open_limit() + self.node.liveness;
        let theirs = match self.recv(limit).await? {
            Message::Trying { session } => session,
            Message::TryRefused { reason } => {
                return Ok(Err(format!("node '{}': {reason}", hello.name)));
            }
            other => return Err(self.unexpected(&other)),
        };
        let token = self.stream.token(session, theirs).or(sent);
        let token = token.expect("derived under TLS, made otherwise");
        let remote = local.remote(&engine.local, theirs, token, Some(control));
        let opened = self.open(engine, session, remote).await;
        let answer = match self.recv(limit).await? {
            Message::Opened { result } => result,
            other => return Err(self.unexpected(&other)),
        };
        Ok(match (opened, answer) {
            (Ok(round_trip), Ok(())) => Ok(draft.keep(round_trip)),
            (Err(reason), _) => Err(format!("node '{}': {reason}", self.node.name)),
            (Ok(_), Err(reason)) => Err(format!("node '{}': {reason}", hello.name)),
        })
    }

    /// The acceptor's part: opens what it is asked to until one is chosen.
    async fn answer_paths(&mut self, hello: &Hello) -> Result<(Path, Vec<Refusal>), SessionError> {
        let mut opened: Option<(Draft, Duration)> = None;
        loop {
            match self
                .recv(self.open_limit() + 2 * self.node.liveness)
                .await?
            {
                Message::Try {
                    transport,
                    session,
                    token,
                } => {
                    // Closes the one before, if any.
                    drop(opened.take());
                    opened = self.answer_path(hello, transport, session, token).await?;
                }
                Message::Chosen { refused } => match opened.take() {
                    Some((mut draft, round_trip)) => return Ok((draft.keep(round_trip), refused)),
                    None => return Err(self.unexpected(&Message::Chosen { refused })),
                },
                Message::NoPath { refused } => {
                    let reasons = show_refusals(&refused, &self.node.preference);
                    return Err(SessionError::NoPath {
                        peer: self.peer.clone(),
                        reasons,
                    });
                }
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    async fn answer_path(
        &mut self,
        hello: &Hello,
        transport: Transport,
        theirs: SessionId,
        sent: Option<Token>,
    ) -> Result<Option<(Draft, Duration)>, SessionError> {
        let allowed = self.node.preference.allows(transport);
        let engine = self.node.transports.engine(transport).filter(|_| allowed);
        let (Some(engine), Some(local)) = (engine, find_local(&hello.offers, transport)) else {
            let reason = "it is not offered".to_owned();
            self.send(&Message::TryRefused { reason }).await?;
            return Ok(None);
        };
        let session = engine.endpoint.new_session(u32::from_ne_bytes(random()));
        let draft = Draft::new(engine, session);
        // Under TLS what was sent does not count.
        let Some(token) = self.stream.token(theirs, session).or(sent) else {
            let peer = self.peer.clone();
            let what = "Try without a token".to_owned();
            return Err(SessionError::Unexpected { peer, what });
        };
        let remote = local.remote(&engine.local, theirs, token, None);
        let limit = self.open_limit();
        let mut open = pin!(timeout(limit, engine.endpoint.open(session, remote)));
        // The engine must expect the path before the dialler hears that it may open it.
        let early = poll_fn(|context| Poll::Ready(open.as_mut().poll(context))).await;
        self.send(&Message::Trying { session }).await?;
        let opened = match early {
            Poll::Ready(opened) => opened,
            Poll::Pending => open.await,
        };
        let opened = match opened {
            Ok(opened) => opened.map_err(|error| error.to_string()),
            Err(_) => Err(format!("not open after {limit:?}")),
        };
        let result = opened.clone().map(|_| ());
        self.send(&Message::Opened { result }).await?;
        Ok(opened.ok().map(|round_trip| (draft, round_trip)))
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
    fn open_limit(&self) -> Duration {
        // Longer than the liveness limit: an address must be resolved, and
        // several connections must be made, by an engine that may be busy.
        2 * self.node.liveness
    }

    fn start(
        self,
        hello: Hello,
        direction: Direction,
        path: Path,
        refused: Vec<Refusal>,
    ) -> Arc<Session> {
        let theirs = Duration::from_millis(hello.liveness_ms);
        let agreed = Agreed {
            peer: hello.name,
            instance: hello.instance,
            direction,
            path,
            refused,
            chain: self.stream.chain(),
            liveness: self.node.liveness.min(theirs),
            range_bytes: agreed_range(self.node.devices.range_bytes(), hello.range_bytes),
        };
        for refusal in &agreed.refused {
            tracing::info!(peer = %agreed.peer, "a better path was refused: {refusal}");
        }
        tracing::info!(peer = %agreed.peer, path = %agreed.path.name, ?direction, "session up");
        let (reader, writer) = self.stream.split();
        Session::start(self.node, agreed, reader, writer)
    }

    async fn send(&mut self, message: &Message) -> Result<(), SessionError> {
        let limit = self.node.liveness;
        let sent = timeout(limit, frame::write(&mut self.stream, message)).await;
        self.in_time(sent, limit)
    }

    async fn recv(&mut self, limit: Duration) -> Result<Message, SessionError> {
        self.recv_up_to(frame::BODY_MAX, limit).await
    }

    async fn recv_up_to(&mut self, max: usize, limit: Duration) -> Result<Message, SessionError> {
        let received = timeout(limit, frame::read(&mut self.stream, max)).await;
        match self.in_time(received, limit)? {
            Message::Bye { reason } => Err(SessionError::Refused {
                peer: self.peer.clone(),
                reason,
            }),
            message => Ok(message),
        }
    }

    /// Tells a peer that can still listen why it is not understood.
    async fn refuse(&mut self, error: SessionError) -> SessionError {
        let source = match &error {
            SessionError::Frame { source, .. } => Some(source),
            SessionError::Unexpected { .. } => None,
            _ => return error,
        };
        match source {
            Some(FrameError::Malformed(_) | FrameError::TooLong { .. }) | None => {
                let name = &self.node.name;
                let reason = format!("node '{name}' does not understand it: {error}");
                self.bye(&reason).await;
            }
            Some(_) => {}
        }
        error
    }

    async fn bye(&mut self, reason: &str) {
        // A courtesy; the connection is closed in any case.
        let _ = self
            .send(&Message::Bye {
                reason: reason.to_owned(),
            })
            .await;
    }

    fn in_time<T>(
        &self,
        result: Result<Result<T, FrameError>, tokio::time::error::Elapsed>,
        limit: Duration,
    ) -> Result<T, SessionError> {
        match result {
            Ok(result) => result.map_err(|source| match late_refusal(&source) {
                Some(reason) => SessionError::Untrusted {
                    peer: self.peer.clone(),
                    address: self.address.clone(),
                    reason: format!("it refused this node: {reason}"),
                },
                None => SessionError::Frame {
                    peer: self.peer.clone(),
                    source,
                },
            }),
            Err(_) => Err(SessionError::Silent {
                peer: self.peer.clone(),
                limit,
            }),
        }
    }

    fn unexpected(&self, message: &Message) -> SessionError {
        SessionError::Unexpected {
            peer: self.peer.clone(),
            what: kind(message),
        }
    }
}

impl Draft {
    fn new(engine: &Engine, session: SessionId) -> Self {
        let path = Path {
            transport: engine.transport,
            name: engine.path(),
            endpoint: engine.endpoint.clone(),
            session,
            round_trip: Duration::ZERO,
        };
        Self { path: Some(path) }
    }

    fn keep(&mut self, round_trip: Duration) -> Path {
        let path = self.path.take().expect("a draft is kept once");
        Path { round_trip, ..path }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            path.endpoint.close(path.session);
        }
    }
}

fn failed_handshake(error: HandshakeError, peer: &str, address: &str) -> SessionError {
    let (peer, address) = (peer.to_owned(), address.to_owned());
    match error {
        HandshakeError::Io(source) => SessionError::Frame {
            peer,
            source: FrameError::Io(source),
        },
        HandshakeError::Untrusted(_) | HandshakeError::Mixed { .. } => {
            let reason = error.to_string();
            SessionError::Untrusted {
                peer,
                address,
                reason,
            }
        }
    }
}

/// Tells a stranger without TLS why nobody talks to it.
async fn turn_away(node: &Node, mut error: HandshakeError, address: &str) -> SessionError {
    if let HandshakeError::Mixed {
        stranger: stranger @ Some(_),
        ..
    } = &mut error
        && let Some(mut stream) = stranger.take()
    {
        let reason = format!(
            "node '{}' talks to peers with certificates only: start this agent with --ca, --cert \
             and --key ('genie ca issue' makes them)",
            node.name
        );
        let _ = timeout(node.liveness, async {
            let _ = frame::exchange_preamble(&mut stream).await;
            let _ = frame::write(&mut stream, &Message::Bye { reason }).await;
            linger(&mut stream).await;
        })
        .await;
    }
    failed_handshake(error, address, address)
}

fn find_local(offers: &[Offer], transport: Transport) -> Option<&Local> {
    offers
        .iter()
        .find(|offer| offer.transport == transport)?
        .local
        .as_ref()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Instance;
    use crate::session::testing;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_hello_that_is_not_understood_is_answered_with_the_reason() {
        let node = testing::node();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let future = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            frame::exchange_preamble(&mut stream).await.unwrap();
            let hello = serde_json::json!({"Hello": {"preference": ["teleport"]}});
            frame::write(&mut stream, &hello).await.unwrap();
            let hello: Message = frame::read(&mut stream, frame::BODY_MAX).await.unwrap();
            assert!(matches!(hello, Message::Hello(_)));
            frame::read(&mut stream, frame::BODY_MAX).await.unwrap()
        });
        let (stream, _) = listener.accept().await.unwrap();
        accept(&node, stream).await.unwrap_err();
        let Message::Bye { reason } = future.await.unwrap() else {
            panic!("no goodbye");
        };
        assert!(
            reason.contains("node 'a' does not understand it"),
            "{reason}"
        );
        assert!(reason.contains("teleport"), "{reason}");
    }

    #[tokio::test]
    async fn a_stranger_that_never_gets_anywhere_loses_its_place() {
        let node = testing::node();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stranger = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            frame::exchange_preamble(&mut stream).await.unwrap();
            let mut hello = testing::node().hello();
            (hello.name, hello.instance) = ("b".into(), Instance([7; 16]));
            frame::write(&mut stream, &Message::Hello(hello))
                .await
                .unwrap();
            let tried = Message::Try {
                transport: Transport::Dpdk,
                session: SessionId(1),
                token: Some(Token([0; 16])),
            };
            // Always busy, never done.
            loop {
                match frame::read(&mut stream, frame::BODY_MAX).await.unwrap() {
                    Message::Hello(_) | Message::TryRefused { .. } => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        frame::write(&mut stream, &tried).await.unwrap();
                    }
                    Message::Bye { reason } => return reason,
                    other => panic!("{other:?}"),
                }
            }
        });
        let (stream, _) = listener.accept().await.unwrap();
        let refused = accept(&node, stream).await.unwrap_err();
        assert!(matches!(refused, SessionError::Slow { .. }), "{refused}");
        assert!(stranger.await.unwrap().contains("had not agreed on a path"));
    }
}
