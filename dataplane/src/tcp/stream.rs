//! One connection of a session: its stage, its two halves, and whether the
//! peer's engine still answers on it.

#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::frame::{HELLO_LEN, Header, Hello, Kind, Malformed};
use super::reader::Reader;
use super::socket;
use super::wire::Wire;
use super::writer::Writer;

/// One connection of a session.
#[derive(Debug)]
pub(crate) struct Stream {
    /// The socket, and how what is read and written crosses it.
    pub(crate) wire: Wire,
    /// How far it is.
    pub(crate) stage: Stage,
    /// What is being read.
    pub(crate) reader: Reader,
    /// What is being written.
    pub(crate) writer: Writer,
    /// A frame that can't be judged before the commands are looked at.
    pub(crate) parked: Option<Header>,
    /// Smoothed round trip of PINGs; none before the first.
    pub(crate) round_trip: Option<Duration>,
    key: u64,
    interest: Option<EventFlags>,
    alive_at: Instant,
    acknowledged: u64,
    ping: Option<Ping>,
}

/// How far a connection is.
///
/// ```text
///  dialled:  Connecting ──writable──▶ Greeting ──HELLO──▶ Up
///  accepted: (see `lobby`) ─────────────HELLO───────────▶ Up
/// ```
#[derive(Debug)]
pub(crate) enum Stage {
    /// The kernel is connecting.
    Connecting,
    /// Our HELLO is sent, the peer's is being read.
    Greeting(Greeting),
    /// Frames go both ways.
    Up,
}

/// A HELLO that is being read.
#[derive(Debug)]
pub(crate) struct Greeting {
    bytes: [u8; HELLO_LEN],
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Ping {
    asked_at: Instant,
    /// Where in our stream of frames it ends, and in the socket's, once it is
    /// written. Until the peer's kernel has it, progress
    /// of the stream counts as life: the PING may be queued behind a tensor.
    ends_at: u64,
    sent: Option<u64>,
}

impl Stream {
    /// A connection that is being dialled.
    pub(crate) fn dialling(wire: Wire, key: u64, now: Instant) -> Self {
        Self {
            wire,
            stage: Stage::Connecting,
            reader: Reader::default(),
            writer: Writer::default(),
            parked: None,
            round_trip: None,
            key,
            interest: None,
            alive_at: now,
            acknowledged: 0,
            ping: None,
        }
    }

    /// A connection that was accepted and whose HELLO was read.
    pub(crate) fn accepted(wire: Wire, key: u64, now: Instant) -> Self {
        Self {
            stage: Stage::Up,
            ..Self::dialling(wire, key, now)
        }
    }

    /// Sends our HELLO, the first bytes of the stream, which are never sealed.
    pub(crate) fn greet(&mut self, hello: &Hello) -> io::Result<()> {
        // A new socket has room for it.
        self.wire.socket().write_all(&hello.encode())
    }

    /// Tells epoll what to report: always input, output if `writable` is wanted.
    pub(crate) fn arm(&mut self, epoll: &OwnedFd, writable: bool) -> io::Result<()> {
        let wanted = match (&self.stage, writable) {
            (Stage::Connecting, _) => EventFlags::OUT,
            (_, true) => EventFlags::IN | EventFlags::OUT,
            (_, false) => EventFlags::IN,
        };
        if self.interest == Some(wanted) {
            return Ok(());
        }
        let data = EventData::new_u64(self.key);
        match self.interest {
            None => epoll::add(epoll, self.wire.socket(), data, wanted)?,
            Some(_) => epoll::modify(epoll, self.wire.socket(), data, wanted)?,
        }
        self.interest = Some(wanted);
        Ok(())
    }

    /// Queues a PING that carries `clock`.
    pub(crate) fn ping(&mut self, now: Instant, clock: u64) {
        self.writer.control(Header::plain(Kind::Ping, clock));
        self.ping = Some(Ping {
            asked_at: now,
            ends_at: self.writer.written_with_queue(),
            sent: None,
        });
    }

    /// Notes that the peer's engine wrote something.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.alive_at = now;
        self.ping = None;
    }

    /// Notes a measured round trip (RFC 6298's smoothing).
    pub(crate) fn measured(&mut self, round_trip: Duration) {
        self.round_trip = Some(
            self.round_trip
                .map_or(round_trip, |old| (old * 7 + round_trip) / 8),
        );
    }

    /// Asks the peer for a sign of life if it was silent; `false` once it has
    /// not given one within `liveness`. Called at least eight times within that.
    pub(crate) fn check_alive(&mut self, now: Instant, liveness: Duration, clock: u64) -> bool {
        let written = self.writer.written();
        let sent = self.wire.sealed_sent().unwrap_or(written);
        let acknowledged = sent
            .saturating_sub(socket::unacknowledged(self.wire.socket()))
            .max(self.acknowledged);
        let ping_arrived = self.ping.as_mut().is_some_and(|ping| {
            // Of records it is only known where they end that are written.
            if ping.sent.is_none() && written >= ping.ends_at {
                ping.sent = Some(self.wire.sealed_sent().unwrap_or(ping.ends_at));
            }
            ping.sent.is_some_and(|end| self.acknowledged >= end)
        });
        if acknowledged > self.acknowledged && !ping_arrived {
            self.alive_at = now;
        }
        self.acknowledged = acknowledged;
        match self.ping {
            None if now.duration_since(self.alive_at) >= liveness / 4 => self.ping(now, clock),
            None => {}
            Some(ping) => {
                let silent_since = ping.asked_at.max(self.alive_at);
                return now.duration_since(silent_since) < liveness / 2;
            }
        }
        true
    }
}

impl Greeting {
    /// Nothing is read yet.
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; HELLO_LEN],
            len: 0,
        }
    }

    /// Reads on, never beyond the HELLO; `Ok(None)` while it is not complete.
    pub(crate) fn read(
        &mut self,
        mut socket: &TcpStream,
    ) -> io::Result<Option<Result<Hello, Malformed>>> {
        while self.len < HELLO_LEN {
            match socket.read(&mut self.bytes[self.len..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => self.len += received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // What is certainly no HELLO needs no more bytes to be refused.
            if let Some(malformed) = Hello::refuse_early(&self.bytes[..self.len]) {
                return Ok(Some(Err(malformed)));
            }
        }
        Ok(Some(Hello::parse(&self.bytes)))
    }
}
