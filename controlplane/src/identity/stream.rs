//! A control connection: plain on loopback, TLS where there are credentials.
//!
//! The two never mix: the first byte tells which one a stranger speaks, and
//! the wrong one is told so in the words it understands.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use genie_dataplane::tcp::Token;
use genie_dataplane::{Secret, SessionId};
use ring::hkdf;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::credentials::{Chain, Credentials, explain, explain_io};
use crate::frame::{FrameError, preamble};
use crate::security::Salts;

/// Type of TLS records that carry a handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Of the exporter (RFC 8446, section 7.5); RFC 5705 keeps labels that begin
/// so for private use.
const TOKEN_LABEL: &[u8] = b"EXPERIMENTAL genie data token";

/// Of the secrets of sealed packets, by direction.
const TO_ACCEPTOR: &[u8] = b"genie dpdk d->a";
const TO_DIALLER: &[u8] = b"genie dpdk a->d";

/// What is read of somebody who was turned away, so that the kernel does not
/// throw our last words after its.
const LINGER_BYTES: u64 = 64 << 10;

/// A control connection.
#[derive(Debug)]
pub enum ControlStream {
    /// Of an agent without credentials.
    Plain(TcpStream),
    /// Of one with.
    Tls(Box<TlsStream<TcpStream>>),
}

/// What both ends of a TLS connection, and nobody else, make tokens from: for
/// the path that a session begins with and for those that replace it.
#[derive(Clone)]
pub struct PathKeys([u8; 32]);

impl PathKeys {
    /// The token of a path between these two sessions: HMAC-SHA256, its first half.
    pub fn token(&self, dialler: SessionId, acceptor: SessionId) -> Token {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &self.0);
        let mut sessions = [0; 8];
        sessions[..4].copy_from_slice(&dialler.0.to_be_bytes());
        sessions[4..].copy_from_slice(&acceptor.0.to_be_bytes());
        let tag = ring::hmac::sign(&key, &sessions);
        let mut token = [0; 16];
        token.copy_from_slice(&tag.as_ref()[..16]);
        Token(token)
    }

    /// What packets from the dialler, and to it, are sealed with on a path
    /// between these two sessions: HKDF-Expand (RFC 5869) with SHA-256.
    pub fn secrets(&self, dialler: SessionId, acceptor: SessionId, salts: Salts) -> [Secret; 2] {
        let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &self.0);
        let (ours, theirs) = (dialler.0.to_be_bytes(), acceptor.0.to_be_bytes());
        [TO_ACCEPTOR, TO_DIALLER].map(|label| {
            let info = [
                label,
                &ours[..],
                &theirs[..],
                &salts.dialler.0[..],
                &salts.acceptor.0[..],
            ];
            let mut secret = Secret([0; 32]);
            prk.expand(&info, hkdf::HKDF_SHA256)
                .and_then(|expanded| expanded.fill(&mut secret.0))
                .expect("HKDF gives as many bytes as its hash has");
            secret
        })
    }
}

impl std::fmt::Debug for PathKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PathKeys(…)")
    }
}

/// Its half that reads.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// Its half that writes.
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Why a stranger did not get as far as to introduce itself.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
    /// The two ends do not believe each other.
    #[error("{0}")]
    Untrusted(String),
    /// One speaks TLS, the other does not.
    #[error("{ours}")]
    Mixed {
        /// What we say of it.
        ours: &'static str,
        /// The stranger, if there are words that it would understand.
        stranger: Option<TcpStream>,
    },
}

impl ControlStream {
    /// Takes a connection that was accepted.
    pub async fn accept(
        stream: TcpStream,
        credentials: Option<&Credentials>,
    ) -> Result<Self, HandshakeError> {
        let mut first = [0];
        let peeked = stream.peek(&mut first).await.map_err(HandshakeError::Io)?;
        let is_tls = peeked == 1 && first[0] == TLS_HANDSHAKE;
        match credentials {
            None if is_tls => {
                refuse_tls(stream).await;
                Err(HandshakeError::Mixed {
                    ours: "it speaks TLS, for which this agent has no credentials: \
                           start this one with --ca, --cert and --key",
                    stranger: None,
                })
            }
            None => Ok(Self::Plain(stream)),
            Some(_) if peeked == 1 && !is_tls => Err(HandshakeError::Mixed {
                ours: "it does not speak TLS: start that agent with --ca, --cert and --key \
                       ('genie ca issue' makes them)",
                stranger: Some(stream),
            }),
            Some(credentials) => {
                let accepted = credentials.acceptor().accept(stream).into_fallible().await;
                match accepted {
                    Ok(stream) => Ok(Self::Tls(Box::new(stream.into()))),
                    Err((error, mut stream)) => {
                        // The alert is written; it must also arrive.
                        linger(&mut stream).await;
                        Err(refused(error))
                    }
                }
            }
        }
    }

    /// Takes a connection that was dialled, to the peer of that name.
    pub async fn dial(
        stream: TcpStream,
        credentials: Option<&Credentials>,
        peer: &str,
    ) -> Result<Self, HandshakeError> {
        let Some(credentials) = credentials else {
            return Ok(Self::Plain(stream));
        };
        let name = ServerName::try_from(peer.to_owned()).map_err(|_| {
            HandshakeError::Untrusted(format!("'{peer}' cannot be the name in a certificate"))
        })?;
        let dialled = credentials.connector().connect(name, stream).await;
        let stream = dialled.map_err(refused)?;
        Ok(Self::Tls(Box::new(stream.into())))
    }

    /// Sends small messages at once.
    pub fn set_nodelay(&self) -> io::Result<()> {
        self.socket().set_nodelay(true)
    }

    /// The certificates that the peer has shown; none on a plain connection.
    pub fn chain(&self) -> Option<Chain> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => {
                let certificates = stream.get_ref().1.peer_certificates()?;
                Some(certificates.to_vec())
            }
        }
    }

    /// What tokens of paths are made from; none on a plain connection.
    pub fn path_keys(&self) -> Option<PathKeys> {
        let Self::Tls(stream) = self else {
            return None;
        };
        let exported = match stream.as_ref() {
            TlsStream::Client(stream) => {
                let connection = stream.get_ref().1;
                connection.export_keying_material([0; 32], TOKEN_LABEL, None)
            }
            TlsStream::Server(stream) => {
                let connection = stream.get_ref().1;
                connection.export_keying_material([0; 32], TOKEN_LABEL, None)
            }
        };
        Some(PathKeys(exported.expect(
            "the handshake is done, and thirty-two bytes can be exported",
        )))
    }

    /// The two halves, for two tasks.
    pub fn split(self) -> (Reader, Writer) {
        match self {
            Self::Plain(stream) => {
                let (reader, writer) = stream.into_split();
                (Box::new(reader), Box::new(writer))
            }
            Self::Tls(stream) => {
                let (reader, writer) = tokio::io::split(stream);
                (Box::new(reader), Box::new(writer))
            }
        }
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    fn inner(self: Pin<&mut Self>) -> Pin<&mut (dyn Duplex + Unpin)> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream),
            Self::Tls(stream) => Pin::new(stream.as_mut()),
        }
    }
}

trait Duplex: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite> Duplex for T {}

impl AsyncRead for ControlStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inner().poll_read(context, buffer)
    }
}

impl AsyncWrite for ControlStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(context)
    }
}

/// Lets what was written last arrive: closing a connection of which something
/// is unread makes the kernel throw it away. The caller owns the deadline.
pub async fn linger<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    let _ = stream.shutdown().await;
    let mut rest = tokio::io::sink();
    let _ = tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut rest).await;
}

/// A TLS client that reads this sees that nobody here speaks TLS.
async fn refuse_tls(mut stream: TcpStream) {
    if stream.write_all(&preamble()).await.is_ok() {
        linger(&mut stream).await;
    }
}

fn refused(error: io::Error) -> HandshakeError {
    match explain_io(&error) {
        Some(reason) => HandshakeError::Untrusted(reason),
        None => HandshakeError::Io(error),
    }
}

/// What broke a connection after its handshake, if it was the handshake: in
/// TLS 1.3 the dialler hears only then that its certificate was refused.
pub fn late_refusal(error: &FrameError) -> Option<String> {
    let FrameError::Io(error) = error else {
        return None;
    };
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        alert @ rustls::Error::AlertReceived(_) => Some(explain(alert)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::Salt;
    use std::collections::HashSet;

    #[test]
    fn every_direction_of_every_attempt_has_a_secret_of_its_own() {
        let (one, other) = (PathKeys([1; 32]), PathKeys([2; 32]));
        let salts = |dialler, acceptor| Salts {
            dialler: Salt([dialler; 16]),
            acceptor: Salt([acceptor; 16]),
        };
        let (a, b) = (SessionId(1), SessionId(2));
        let attempts = [
            one.secrets(a, b, salts(1, 2)),
            one.secrets(b, a, salts(1, 2)),
            one.secrets(a, b, salts(2, 1)),
            one.secrets(a, b, salts(1, 3)),
            other.secrets(a, b, salts(1, 2)),
        ];
        let secrets: HashSet<_> = attempts.iter().flatten().map(|secret| secret.0).collect();
        assert_eq!(secrets.len(), 10);
        assert_eq!(one.secrets(a, b, salts(1, 2)), attempts[0]);
    }
}
