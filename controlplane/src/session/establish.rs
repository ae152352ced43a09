//! From a connection to a session: introductions, then paths until one opens.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::path::{Asked, Draft, Line, Opener};
use super::{Agreed, Direction, Path, Peer, Session, SessionError, kind, show_refusals};
use crate::devices::agreed_range;
use crate::frame::{self, FrameError};
use crate::identity::Current;
use crate::identity::stream::{ControlStream, HandshakeError, late_refusal, linger};
use crate::message::{Hello, Message};
use crate::negotiation::{Refusal, better_refused};
use crate::node::{Negotiating, Node};
use crate::strangers::Place;
use crate::tensor::check_name;
use crate::transport::Seat;

/// The number of the path that a session begins with.
const FIRST: u32 = 1;

/// Liveness limits within which a stranger must be a peer. Introductions take
/// two at most and each transport that is tried six; the rest is to spare.
const PATIENCE: u32 = 20;

/// Talks on a connection that has no session yet.
struct Talk<'a> {
    node: &'a Arc<Node>,
    stream: ControlStream,
    peer: String,
    address: String,
    seat: Arc<Seat>,
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
        seat: Arc::new(node.transports.seat()),
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
            passing: false,
        });
    }
    let peer = facts(&hello, Some(control), &talk);
    let (path, refused) = talk.open_some_path(&peer).await?;
    Ok(talk.start(hello, peer, None, path, refused))
}

/// Serves a connection that a peer dialled, until the session is up. The place
/// among the strangers is given back as soon as it is known whose it is.
pub async fn accept(
    node: &Arc<Node>,
    stream: TcpStream,
    mut place: Place,
) -> Result<Arc<Session>, SessionError> {
    let (mut talk, hello, negotiating) = tokio::select! {
        met = meet(node, stream) => met?,
        () = place.lost() => {
            node.identity.count_dropped_stranger();
            return Err(SessionError::Crowded);
        }
    };
    drop(place);
    let peer = facts(&hello, None, &talk);
    let limit = node.liveness * PATIENCE;
    let Ok(answered) = timeout(limit, talk.answer_paths(&peer)).await else {
        let peer = talk.peer.clone();
        let slow = SessionError::Slow { peer, limit };
        talk.say_bye(&slow.to_string(), true).await;
        return Err(slow);
    };
    let (path, refused) = match answered {
        Ok(path) => path,
        Err(error) => return Err(talk.refuse(error).await),
    };
    Ok(talk.start(hello, peer, Some(negotiating), path, refused))
}

/// Introductions with a stranger, each step of which has its time.
async fn meet(
    node: &Arc<Node>,
    stream: TcpStream,
) -> Result<(Talk<'_>, Hello, Negotiating<'_>), SessionError> {
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
        seat: Arc::new(node.transports.seat()),
    };
    let hello = match talk.introduce().await {
        Ok(hello) => hello,
        Err(error) => return Err(talk.refuse(error).await),
    };
    let negotiating = talk.admit(&current, &hello.name).await?;
    talk.peer.clone_from(&hello.name);
    Ok((talk, hello, negotiating))
}

impl Line for Talk<'_> {
    async fn send(&mut self, message: Message) -> Result<(), SessionError> {
        Talk::send(self, &message).await
    }

    async fn recv(&mut self, limit: Duration) -> Result<Message, SessionError> {
        Talk::recv(self, limit).await
    }
}

/// What opening paths to a peer takes.
fn facts(hello: &Hello, control: Option<SocketAddr>, talk: &Talk<'_>) -> Peer {
    Peer {
        name: hello.name.clone(),
        preference: hello.preference.clone(),
        offers: hello.offers.clone(),
        control,
        keys: talk.stream.path_keys(),
        data_security: hello.data_security,
        seat: Arc::clone(&talk.seat),
    }
}

impl<'a> Talk<'a> {
    async fn introduce(&mut self) -> Result<Hello, SessionError> {
        let limit = self.node.liveness;
        // Small messages that the other waits for.
        let _ = self.stream.set_nodelay();
        let exchanged = timeout(limit, frame::exchange_preamble(&mut self.stream)).await;
        self.in_time(exchanged, limit)?;
        let hello = Message::Hello(self.node.hello(&self.seat));
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
                    passing: false,
                })
            }
        }
    }

    /// Whether the peer that introduced itself so may open a session.
    async fn admit(
        &mut self,
        current: &Current,
        name: &str,
    ) -> Result<Negotiating<'a>, SessionError> {
        let ours = &self.node.name;
        let limits = self.node.peer_quotas.limits(name);
        let (reason, passing) = if let (Some(credentials), Some(chain)) =
            (&current.credentials, self.stream.chain())
            && credentials.verify(&chain, name).is_err()
        {
            let reason = format!(
                "it calls itself '{name}', and its certificate is another node's: \
                 start it with the --name in its certificate, or 'genie ca issue {name}'"
            );
            (reason, false)
        } else if !current.access.admits(name) {
            let reason =
                format!("node '{ours}' does not allow '{name}': it takes --allow {name} there");
            (reason, false)
        } else if let Some(negotiating) = self.node.negotiate(name, limits.sessions) {
            return Ok(negotiating);
        } else {
            let most = limits.sessions;
            let reason = format!(
                "'{name}' has {most} sessions with node '{ours}' already: close some, or start \
                 the agent there with a larger --peer-sessions"
            );
            (reason, true)
        };
        self.node.identity.count_refused_peer();
        self.say_bye(&reason, passing).await;
        Err(SessionError::Untrusted {
            peer: name.to_owned(),
            address: self.address.clone(),
            reason,
        })
    }

    /// The dialler's part: tries the candidates in order.
    async fn open_some_path(&mut self, peer: &Peer) -> Result<(Path, Vec<Refusal>), SessionError> {
        let node = self.node;
        let opener = Opener { node, peer };
        let plan = opener.plan();
        let mut refused = plan.refused;
        for transport in plan.candidates {
            match opener.offer(self, transport).await? {
                Ok(draft) => {
                    let refused =
                        better_refused(transport, refused, &node.preference, &peer.preference);
                    let chosen = Message::Chosen {
                        refused: refused.clone(),
                    };
                    self.send(&chosen).await?;
                    return Ok((draft.keep(FIRST), refused));
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

    /// The acceptor's part: opens what it is asked to until one is chosen.
    async fn answer_paths(&mut self, peer: &Peer) -> Result<(Path, Vec<Refusal>), SessionError> {
        let opener = Opener {
            node: self.node,
            peer,
        };
        let limit = opener.open_limit() + 2 * self.node.liveness;
        let mut opened: Option<Draft> = None;
        loop {
            match self.recv(limit).await? {
                Message::Try {
                    transport,
                    session,
                    token,
                    salt,
                } => {
                    // Closes the one before, if any.
                    drop(opened.take());
                    let asked = Asked {
                        transport,
                        session,
                        token,
                        salt,
                    };
                    opened = opener.answer(self, asked).await?;
                }
                Message::Chosen { refused } => match opened.take() {
                    Some(draft) => return Ok((draft.keep(FIRST), refused)),
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

    /// The session with a peer that was admitted, or dialled if that is none.
    fn start(
        self,
        hello: Hello,
        peer: Peer,
        admitted: Option<Negotiating<'_>>,
        path: Path,
        refused: Vec<Refusal>,
    ) -> Arc<Session> {
        let theirs = Duration::from_millis(hello.liveness_ms);
        let direction = match admitted {
            Some(_) => Direction::Accepted,
            None => Direction::Dialled,
        };
        let agreed = Agreed {
            peer,
            instance: hello.instance,
            direction,
            path,
            refused,
            chain: self.stream.chain(),
            liveness: self.node.liveness.min(theirs),
            range_bytes: agreed_range(self.node.devices.range_bytes(), hello.range_bytes),
        };
        for refusal in &agreed.refused {
            tracing::info!(peer = %agreed.peer.name, "a better path was refused: {refusal}");
        }
        tracing::info!(peer = %agreed.peer.name, path = %agreed.path.name, ?direction, "session up");
        let (reader, writer) = self.stream.split();
        Session::start(self.node, agreed, admitted, reader, writer)
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
            Message::Bye { reason, passing } => Err(SessionError::Refused {
                peer: self.peer.clone(),
                reason,
                passing,
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

    /// Says why there never will be a session, unless somebody changes something.
    async fn bye(&mut self, reason: &str) {
        self.say_bye(reason, false).await;
    }

    async fn say_bye(&mut self, reason: &str, passing: bool) {
        // A courtesy; the connection is closed in any case.
        let reason = reason.to_owned();
        let _ = self.send(&Message::Bye { reason, passing }).await;
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
            let _ = frame::write(
                &mut stream,
                &Message::Bye {
                    reason,
                    passing: false,
                },
            )
            .await;
            linger(&mut stream).await;
        })
        .await;
    }
    failed_handshake(error, address, address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Instance;
    use crate::session::testing;
    use crate::strangers::Strangers;
    use crate::transport::Transport;
    use genie_dataplane::SessionId;
    use genie_dataplane::tcp::Token;
    use tokio::net::TcpListener;

    async fn place() -> Place {
        let newcomer = Strangers::default().enter([127, 0, 0, 1].into());
        newcomer.expect("nobody else is there").place().await
    }

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
        accept(&node, stream, place().await).await.unwrap_err();
        let Message::Bye { reason, .. } = future.await.unwrap() else {
            panic!("no goodbye");
        };
        assert!(
            reason.contains("node 'a' does not understand it"),
            "{reason}"
        );
        assert!(reason.contains("teleport"), "{reason}");
    }

    #[tokio::test]
    async fn a_peer_that_never_gets_anywhere_is_given_up() {
        let node = testing::node();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stranger = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            frame::exchange_preamble(&mut stream).await.unwrap();
            let mut hello = testing::hello();
            (hello.name, hello.instance) = ("b".into(), Instance([7; 16]));
            frame::write(&mut stream, &Message::Hello(hello))
                .await
                .unwrap();
            let tried = Message::Try {
                transport: Transport::Dpdk,
                session: SessionId(1),
                token: Some(Token([0; 16])),
                salt: None,
            };
            // Always busy, never done.
            loop {
                match frame::read(&mut stream, frame::BODY_MAX).await.unwrap() {
                    Message::Hello(_) | Message::TryRefused { .. } => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        frame::write(&mut stream, &tried).await.unwrap();
                    }
                    Message::Bye { reason, .. } => return reason,
                    other => panic!("{other:?}"),
                }
            }
        });
        let (stream, _) = listener.accept().await.unwrap();
        let strangers = Strangers::default();
        let newcomer = strangers.enter([127, 0, 0, 1].into()).unwrap();
        let accepted = tokio::spawn({
            let (node, place) = (Arc::clone(&node), newcomer.place().await);
            async move { accept(&node, stream, place).await }
        });
        // It is no stranger any more, and counts against its own limit, of one.
        while strangers.count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!accepted.is_finished());
        assert!(node.negotiate("b", 1).is_none());
        assert!(node.negotiate("c", 1).is_some());
        let refused = accepted.await.unwrap().unwrap_err();
        assert!(matches!(refused, SessionError::Slow { .. }), "{refused}");
        assert!(node.negotiate("b", 1).is_some());
        assert!(stranger.await.unwrap().contains("had not agreed on a path"));
    }
}
