//! A session: its connections and its transfers, from opening to its end.
//!
//! Called by the engine's loop. What arrives is handled in [`receive`], what
//! goes out in [`send`]. Any method may say that the session has [`Ended`];
//! the engine then removes it and calls [`Session::end`], which answers
//! everything. Losing one connection ends the session.

#![forbid(unsafe_code)]

mod receive;
mod send;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use genie_proto::{Integrity, SessionId, TransferId};

pub(crate) use receive::{ReadEnd, Turn};

use super::context::Context;
use super::frame::{Header, Hello, Kind, Reason, Verdict};
use super::socket;
use super::stream::{Greeting, Stage, Stream};
use super::transfers::{Incoming, Outgoing};
use super::wire::Wire;
use super::writer::Chunk;
use super::{Remote, Role, STREAMS_MAX};
use crate::engine::{
    Completion, Cost, FailReason, OpenError, OperationId, Partial, Receipt, SessionSnapshot,
};
use crate::memory::Lease;

/// Transfers given up whose reason is remembered.
const GIVEN_UP_MAX: usize = 64;

/// One session and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Session {
    id: SessionId,
    remote: Remote,
    integrity: Integrity,
    streams: Vec<Option<Stream>>,
    opening: Option<Opening>,
    incoming: HashMap<TransferId, Incoming>,
    outgoing: HashMap<TransferId, Outgoing>,
    /// Transfers with chunks that no connection took, each once.
    sendable: VecDeque<TransferId>,
    /// Incoming transfers that we gave up last, and why. A chunk of one that
    /// arrives on another connection is answered with the same reason, which
    /// may overtake the first answer.
    given_up: VecDeque<(TransferId, Reason)>,
    dropped: u64,
    /// When a byte last moved or a transfer last began or ended.
    moved_at: Instant,
}

#[derive(Debug)]
struct Opening {
    operation: OperationId,
    deadline: Instant,
}

/// Why a session is over.
#[derive(Debug)]
pub(crate) struct Ended {
    /// For its transfers, if it was open.
    pub(crate) reason: FailReason,
    /// For whoever was opening it, where that can be said better.
    pub(crate) open: Option<OpenError>,
}

impl Session {
    /// Begins to open a session.
    ///
    /// Connections that the peer already made are handed over by
    /// [`Session::adopt`].
    pub(crate) fn open(
        id: SessionId,
        operation: OperationId,
        remote: Remote,
        integrity: Integrity,
        context: &Context,
    ) -> Result<Self, Ended> {
        let streams = usize::from(remote.streams);
        if streams == 0 || streams > usize::from(STREAMS_MAX) {
            let reason = format!("{streams} connections asked for, 1 to {STREAMS_MAX} allowed");
            return Err(OpenError::Refused(reason).into());
        }
        let deadline = context.now + context.open_limit;
        let mut session = Self {
            id,
            remote,
            integrity,
            streams: std::iter::repeat_with(|| None).take(streams).collect(),
            opening: Some(Opening {
                operation,
                deadline,
            }),
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
            sendable: VecDeque::new(),
            given_up: VecDeque::with_capacity(GIVEN_UP_MAX),
            dropped: 0,
            moved_at: context.now,
        };
        session.dial(context)?;
        Ok(session)
    }

    fn dial(&mut self, context: &Context) -> Result<(), Ended> {
        let Role::Dial(address) = self.remote.role else {
            return Ok(());
        };
        for (index, place) in self.streams.iter_mut().enumerate() {
            let socket =
                socket::connect(address).map_err(|error| refused_connection(address, &error))?;
            let key = context.stream_key(self.id, index);
            let wire = Wire::new(socket, self.remote.secrets.as_ref(), index as u16);
            let stream = place.insert(Stream::dialling(wire, key, context.now));
            stream.arm(&context.epoll, false).map_err(io_error)?;
        }
        Ok(())
    }

    /// Judges a HELLO that a connection of the peer's brought.
    pub(crate) fn judge(&self, hello: &Hello) -> Verdict {
        if !hello.token.matches(&self.remote.token) || self.remote.role != Role::Accept {
            return Verdict::UnknownSession;
        }
        let agreed = u16::from(hello.streams) == self.remote.streams;
        match self.streams.get(usize::from(hello.stream)) {
            Some(None) if agreed => Verdict::Welcome,
            _ => Verdict::WrongStream,
        }
    }

    /// Takes over a connection whose HELLO was judged welcome.
    pub(crate) fn adopt(
        &mut self,
        hello: &Hello,
        socket: TcpStream,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let index = usize::from(hello.stream);
        let key = context.stream_key(self.id, index);
        let wire = Wire::new(socket, self.remote.secrets.as_ref(), hello.stream);
        let mut stream = Stream::accepted(wire, key, context.now);
        stream
            .greet(&self.hello(index))
            .map_err(|error| lost_connection(&error))?;
        stream.ping(context.now, context.clock());
        self.streams[index] = Some(stream);
        self.write(index, context)
    }

    /// Something happened to the connection while it was not up yet.
    pub(crate) fn advance_greeting(
        &mut self,
        index: usize,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let hello = self.hello(index);
        let Role::Dial(address) = self.remote.role else {
            return Ok(());
        };
        let Some(stream) = &mut self.streams[index] else {
            return Ok(());
        };
        match &mut stream.stage {
            Stage::Up => return Ok(()),
            Stage::Connecting => {
                if let Some(error) = stream.wire.socket().take_error().map_err(io_error)? {
                    return Err(refused_connection(address, &error));
                }
                context.configure(stream.wire.socket()).map_err(io_error)?;
                stream
                    .greet(&hello)
                    .map_err(|error| lost_connection(&error))?;
                stream.stage = Stage::Greeting(Greeting::new());
            }
            Stage::Greeting(greeting) => {
                let answer = match greeting.read(stream.wire.socket()) {
                    Ok(None) => return Ok(()),
                    Ok(Some(Ok(answer))) => answer,
                    Ok(Some(Err(malformed))) => {
                        return Err(OpenError::Refused(malformed.to_string()).into());
                    }
                    Err(error) => {
                        let reason = format!("{address} closed the connection: {error}");
                        return Err(OpenError::Refused(reason).into());
                    }
                };
                check_answer(&answer, &hello, self.id)?;
                stream.stage = Stage::Up;
                stream.heard(context.now);
                stream.ping(context.now, context.clock());
            }
        }
        self.write(index, context)
    }

    /// What our HELLO says on connection `index`.
    fn hello(&self, index: usize) -> Hello {
        Hello {
            session: self.remote.session,
            token: self.remote.token,
            stream: index as u16,
            streams: self.remote.streams as u8,
            verdict: Verdict::Welcome,
        }
    }

    /// Whether the connection carries frames.
    pub(crate) fn is_up(&self, index: usize) -> bool {
        self.streams
            .get(index)
            .and_then(Option::as_ref)
            .is_some_and(|stream| matches!(stream.stage, Stage::Up))
    }

    /// Expects a transfer.
    pub(crate) fn receive(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        into: Lease,
        resume: Option<Box<Partial<genie_proto::Incoming>>>,
        context: &mut Context,
    ) {
        self.moved_at = context.now;
        if self.incoming.contains_key(&transfer) {
            drop(into);
            return context.fail(operation, refused("the id is in use"));
        }
        let sealed = self.remote.secrets.is_some();
        match Incoming::new(operation, into, resume, sealed) {
            Ok(incoming) => drop(self.incoming.insert(transfer, incoming)),
            Err(error) => context.fail(operation, refused(&error.to_string())),
        }
    }

    /// Sends a transfer, from the next [`Session::write_all`] on.
    pub(crate) fn send(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        from: Lease,
        resume: Option<Box<Partial<genie_proto::Outgoing>>>,
        context: &mut Context,
    ) {
        self.moved_at = context.now;
        if self.outgoing.contains_key(&transfer) {
            drop(from);
            return context.fail(operation, refused("the id is in use"));
        }
        let sealed = self.remote.secrets.is_some();
        let outgoing = Outgoing::new(operation, from, resume, sealed);
        self.outgoing.insert(transfer, outgoing);
        self.sendable.push_back(transfer);
    }

    /// Gives a transfer up and tells the peer.
    pub(crate) fn cancel(&mut self, transfer: TransferId, outgoing: bool, context: &mut Context) {
        let kind = if outgoing {
            Kind::ResetBySender
        } else {
            Kind::ResetByReceiver
        };
        let known = if outgoing {
            self.outgoing
                .get(&transfer)
                .is_some_and(|out| out.failed.is_none())
        } else {
            self.incoming.contains_key(&transfer)
        };
        if !known {
            return;
        }
        self.tell(Header {
            reason: Reason::Cancelled,
            ..Header::about(kind, transfer)
        });
        if outgoing {
            self.fail_outgoing(transfer, FailReason::Cancelled, context);
        } else {
            self.note_given_up(transfer, Reason::Cancelled);
            self.fail_incoming(transfer, FailReason::Cancelled, context);
        }
    }

    /// Queues a frame on the connection that will write it soonest.
    fn tell(&mut self, header: Header) {
        let up = self
            .streams
            .iter_mut()
            .flatten()
            .filter(|s| matches!(s.stage, Stage::Up));
        if let Some(stream) = up.min_by_key(|stream| stream.writer.control_len()) {
            stream.writer.control(header);
        }
    }

    /// Checks deadlines and signs of life.
    pub(crate) fn tick(&mut self, context: &mut Context) -> Result<(), Ended> {
        if let Some(opening) = &self.opening
            && context.now >= opening.deadline
        {
            return Err(self.why_not_open(context).into());
        }
        for index in 0..self.streams.len() {
            let Some(stream) = &mut self.streams[index] else {
                continue;
            };
            if !matches!(stream.stage, Stage::Up) {
                continue;
            }
            if !stream.check_alive(context.now, context.liveness, context.clock()) {
                return Err(Ended::from(FailReason::PathLost(format!(
                    "the peer has not answered for {:?}",
                    context.liveness
                ))));
            }
            self.write(index, context)?;
        }
        let idle = self.incoming.is_empty() && self.outgoing.is_empty();
        if !idle && context.now.duration_since(self.moved_at) >= context.progress_limit {
            return Err(Ended::from(FailReason::PathLost(format!(
                "the peer answers, but no transfer moved for {:?}",
                context.progress_limit
            ))));
        }
        Ok(())
    }

    fn why_not_open(&self, context: &Context) -> OpenError {
        let connecting = |stream: &Stream| matches!(stream.stage, Stage::Connecting);
        match self.remote.role {
            Role::Dial(address) if self.streams.iter().flatten().any(connecting) => {
                OpenError::NoAnswer(address)
            }
            _ => OpenError::TimedOut(context.open_limit),
        }
    }

    /// Says goodbye as far as the sockets take it; [`Session::end`] follows.
    pub(crate) fn say_goodbye(&mut self) {
        for stream in self.streams.iter_mut().flatten() {
            if !matches!(stream.stage, Stage::Up) {
                continue;
            }
            stream.writer.control(Header::plain(Kind::Close, 0));
            while !stream.writer.is_idle() {
                if stream.writer.is_drained() {
                    stream.writer.take_sum_and_control();
                }
                let outgoing = &mut self.outgoing;
                let flushed = stream.writer.flush(&mut stream.wire, |chunk| {
                    record(outgoing, chunk);
                });
                if !matches!(flushed, Ok(Some(_))) {
                    break;
                }
            }
        }
    }

    /// Ends the session: closes its sockets, then answers everything.
    ///
    /// Says whether it had been open.
    pub(crate) fn end(mut self, ended: Ended, context: &mut Context) -> bool {
        // First the sockets and what they hold of tensors, then the answers.
        for mut stream in self.streams.drain(..).flatten() {
            for mut chunk in stream.writer.take_unfinished() {
                // The digest of what goes on over another path includes it.
                record(&mut self.outgoing, &mut chunk);
            }
        }
        for (_, transfer) in self.incoming.drain() {
            context.interrupt(transfer.operation, &ended.reason, transfer.into_partial());
        }
        for (_, mut transfer) in self.outgoing.drain() {
            match transfer.failed.take() {
                Some(reason) => context.fail(transfer.operation, reason),
                None => {
                    let operation = transfer.operation;
                    context.interrupt(operation, &ended.reason, transfer.into_partial());
                }
            }
        }
        let Some(opening) = self.opening else {
            return true;
        };
        let error = ended.open.unwrap_or_else(|| match ended.reason {
            FailReason::Stopped => OpenError::Stopped,
            reason => OpenError::Refused(reason.to_string()),
        });
        let result = Err(error);
        context.completions.push(Completion::Opened {
            operation: opening.operation,
            result,
        });
        false
    }

    /// Reports the session open once every connection carried a PING and its answer.
    fn note_open(&mut self, context: &mut Context) {
        let measured =
            |stream: &Option<Stream>| stream.as_ref().and_then(|stream| stream.round_trip);
        let trips: Option<Vec<Duration>> = self.streams.iter().map(measured).collect();
        let Some(trips) = trips else { return };
        if let Some(opening) = self.opening.take() {
            let result = Ok(trips.into_iter().min().expect("a session has a connection"));
            context.completions.push(Completion::Opened {
                operation: opening.operation,
                result,
            });
        }
    }

    /// A picture of it.
    pub(crate) fn snapshot(&self) -> SessionSnapshot {
        SessionSnapshot {
            session: self.id,
            round_trip: self
                .streams
                .iter()
                .flatten()
                .filter_map(|s| s.round_trip)
                .min(),
            window_bytes: None,
            in_flight_bytes: None,
            granted: None,
            round_trip_min: None,
            retransmits: 0,
            resent: None,
            dropped: self.dropped,
            // One that is not the peer's ends the session: the engine counts.
            sealed: self.remote.secrets.is_some().then(Default::default),
            transfers: (self.incoming.len() + self.outgoing.len()) as u64,
        }
    }

    fn note_given_up(&mut self, transfer: TransferId, reason: Reason) {
        if self.given_up.len() == GIVEN_UP_MAX {
            self.given_up.pop_front();
        }
        self.given_up.push_back((transfer, reason));
    }

    fn why_given_up(&self, transfer: TransferId) -> Reason {
        let mut given_up = self.given_up.iter();
        given_up
            .find(|(id, _)| *id == transfer)
            .map_or(Reason::Unknown, |(_, reason)| *reason)
    }

    fn fail_incoming(&mut self, transfer: TransferId, reason: FailReason, context: &mut Context) {
        let Some(incoming) = self.incoming.remove(&transfer) else {
            return;
        };
        for stream in self.streams.iter_mut().flatten() {
            if stream
                .reader
                .payload()
                .is_some_and(|p| p.header.transfer == transfer)
            {
                stream.reader.forget_target();
            }
        }
        let operation = incoming.operation;
        drop(incoming);
        context.fail(operation, reason);
    }

    fn fail_outgoing(&mut self, transfer: TransferId, reason: FailReason, context: &mut Context) {
        let Some(outgoing) = self.outgoing.get_mut(&transfer) else {
            return;
        };
        if outgoing.writing > 0 {
            // A frame that was begun must be finished, or the stream is out of
            // step: the lease is given back and the answer given after that.
            outgoing.failed.get_or_insert(reason);
            return;
        }
        let operation = outgoing.operation;
        self.outgoing.remove(&transfer);
        context.fail(operation, reason);
    }
}

impl From<FailReason> for Ended {
    fn from(reason: FailReason) -> Self {
        Self { reason, open: None }
    }
}

impl From<OpenError> for Ended {
    fn from(error: OpenError) -> Self {
        Self {
            reason: FailReason::PathLost(error.to_string()),
            open: Some(error),
        }
    }
}

/// Takes the CRC of a chunk into its transfer's digest, unless that was done
/// when the chunk was cut.
fn record(transfers: &mut HashMap<TransferId, Outgoing>, chunk: &mut Chunk) {
    if let Some(outgoing) = transfers.get_mut(&chunk.transfer)
        && let Some(crc) = chunk.sum()
    {
        outgoing.record(chunk.piece, crc);
    }
}

fn check_answer(answer: &Hello, ours: &Hello, id: SessionId) -> Result<(), Ended> {
    let refused = match answer.verdict {
        Verdict::Welcome if answer.session != id => "it answers for another session",
        Verdict::Welcome if !answer.token.matches(&ours.token) => "its token is another one",
        Verdict::Welcome if (answer.stream, answer.streams) != (ours.stream, ours.streams) => {
            "it answers for another connection"
        }
        Verdict::Welcome => return Ok(()),
        Verdict::UnknownSession => "it does not know the session or its token",
        Verdict::WrongStream => "it expects other connections",
        Verdict::WrongVersion => "it speaks another version of the protocol",
    };
    Err(OpenError::Refused(refused.into()).into())
}

fn refused(reason: &str) -> FailReason {
    FailReason::Refused(reason.into())
}

fn io_error(error: io::Error) -> Ended {
    OpenError::Io(error.to_string()).into()
}

fn refused_connection(address: std::net::SocketAddr, error: &io::Error) -> Ended {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            OpenError::Refused(format!("nothing listens on {address}"))
        }
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable => OpenError::NoAnswer(address),
        _ => OpenError::Io(format!("cannot connect to {address}: {error}")),
    }
    .into()
}

fn lost_connection(error: &io::Error) -> Ended {
    FailReason::PathLost(format!("a connection to the peer failed: {error}")).into()
}

fn receipt(bytes: u64, digest: genie_proto::Digest, cost: Cost) -> Receipt {
    Receipt {
        bytes,
        digest,
        retransmits: cost.retransmits,
        copies: cost.copies,
    }
}
