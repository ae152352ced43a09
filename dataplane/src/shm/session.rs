//! A session: one connection and its transfers, from opening to the end.
//!
//! Called by the engine's loop. Any method may say that the session has
//! [`Ended`]; the engine then removes it and calls [`Session::end`], which
//! answers everything.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use genie_proto::{Digest, Integrity, SessionId, TransferId};

use super::copy::{Copying, Incoming, Outgoing, Stage};
use super::message::{Message, Reason};
use super::socket;
use super::source::{Named, REGIONS_MAX, Sources};
use super::{Config, Remote, Role};
use crate::engine::{
    Completion, Cost, FailReason, Interrupted, OpenError, OperationId, Outbox, Receipt,
    SessionSnapshot,
};
use crate::ledger::Copies;
use crate::memory::Lease;

/// Bytes copied or checked in one turn of a session: a fraction of a
/// millisecond, so that messages wait no longer than that.
const TURN: usize = 1 << 20;

/// Messages that may wait for room: a peer that asks and never reads is not
/// worth more. Each operation needs a few.
const WAITING_MAX: usize = 4 * crate::endpoint::OPERATIONS_MAX;

/// Heartbeats in the time after which a silent peer is given up.
const HEARTBEATS: u32 = 4;

/// One session and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Session {
    remote: Remote,
    integrity: Integrity,
    connection: Option<Connection>,
    opening: Option<Opening>,
    incoming: HashMap<TransferId, Incoming>,
    outgoing: HashMap<TransferId, Outgoing>,
    /// Transfers with bytes to copy or check, in turn.
    work: VecDeque<(TransferId, Way)>,
    sources: Sources,
    /// What the peer passed; none where no descriptor arrived.
    memories: HashMap<u32, Option<(Arc<OwnedFd>, u64)>>,
    round_trip: Option<Duration>,
    dropped: u64,
    heard_at: Instant,
    pinged_at: Instant,
    /// When a byte last moved or a transfer last began or ended.
    moved_at: Instant,
}

/// A socket and what waits to go out of it.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The socket.
    pub(crate) socket: OwnedFd,
    waiting: VecDeque<(Message, Option<OwnedFd>)>,
    /// Whether the loop waits for room in the socket.
    awaits_room: bool,
}

/// What an engine counts over all its sessions.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    /// What CPUs copied.
    pub(crate) copies: Copies,
    /// Tensor bytes that a peer has verified.
    pub(crate) sent_bytes: u64,
    /// Tensor bytes received and verified.
    pub(crate) received_bytes: u64,
    /// Messages and connections that were refused.
    pub(crate) dropped: u64,
}

/// What the loop lends to its sessions.
#[derive(Debug)]
pub(crate) struct Context {
    /// When this iteration of the loop began.
    pub(crate) now: Instant,
    /// The limits.
    pub(crate) config: Config,
    /// Where answers go.
    pub(crate) completions: Outbox<Completion>,
    /// The counters.
    pub(crate) totals: Totals,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

#[derive(Debug)]
struct Opening {
    operation: OperationId,
    began: Instant,
}

/// Why a session is over.
#[derive(Debug)]
pub(crate) struct Ended {
    reason: FailReason,
    open: Option<OpenError>,
}

impl Session {
    /// Begins to open a session; a connection to the peer, if we dial it.
    pub(crate) fn open(
        operation: OperationId,
        remote: Remote,
        integrity: Integrity,
        context: &Context,
    ) -> Result<Self, OpenError> {
        let connection = match &remote.role {
            Role::Accept => None,
            Role::Dial(peer) => {
                let refused = |why: &dyn std::fmt::Display| {
                    OpenError::Refused(format!("its socket is not reached from here: {why}"))
                };
                let socket = socket::connect(&peer.name).map_err(|error| refused(&error))?;
                match socket::refuse_user(&socket) {
                    Some(why) => return Err(OpenError::Refused(why)),
                    None => Some(Connection::new(socket)),
                }
            }
        };
        let mut session = Self {
            remote,
            integrity,
            connection,
            opening: Some(Opening {
                operation,
                began: context.now,
            }),
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
            work: VecDeque::new(),
            sources: Sources::default(),
            memories: HashMap::new(),
            round_trip: None,
            dropped: 0,
            heard_at: context.now,
            pinged_at: context.now,
            moved_at: context.now,
        };
        if session.connection.is_some() {
            let hello = Message::Hello {
                session: session.remote.session,
                token: session.remote.token,
            };
            session.greet(hello).map_err(Ended::into_open)?;
        }
        Ok(session)
    }

    /// Whether a connection that shows this token may carry the session.
    pub(crate) fn welcomes(&self, token: &crate::tcp::Token) -> bool {
        self.remote.role == Role::Accept
            && self.connection.is_none()
            && token.matches(&self.remote.token)
    }

    /// Takes over a connection whose HELLO was welcome.
    pub(crate) fn adopt(
        &mut self,
        connection: Connection,
        probe: Option<&OwnedFd>,
        context: &Context,
    ) -> Result<(), Ended> {
        self.connection = Some(connection);
        socket::check_probe(probe, &self.remote.token).map_err(OpenError::Refused)?;
        (self.heard_at, self.pinged_at) = (context.now, context.now);
        self.greet(Message::Welcome)
    }

    fn greet(&mut self, greeting: Message) -> Result<(), Ended> {
        let probe = socket::probe(&self.remote.token)
            .map_err(|error| OpenError::Io(format!("cannot make a memory file: {error}")))?;
        self.tell_with(greeting, Some(probe))
    }

    /// The connection, if there is one.
    pub(crate) fn connection(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
    }

    /// Whether it has bytes to copy or to check.
    pub(crate) fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// Expects a transfer, whose other paths have cost this much.
    ///
    /// What they brought is copied again: that is cheaper than to ask for it
    /// piece by piece, and the digest is then of one reading.
    pub(crate) fn receive(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        into: Lease,
        spent: Cost,
        context: &mut Context,
    ) {
        if self.incoming.contains_key(&transfer) {
            drop(into);
            return context.fail(operation, refused("the id is in use"));
        }
        self.moved_at = context.now;
        let incoming = Incoming {
            operation,
            into,
            spent,
            stage: Stage::Granted,
        };
        self.incoming.insert(transfer, incoming);
    }

    /// Offers a transfer, whose other paths have cost this much, to the peer.
    pub(crate) fn send(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        from: Lease,
        spent: Cost,
        context: &mut Context,
    ) -> Result<(), Ended> {
        if self.outgoing.contains_key(&transfer) {
            drop(from);
            context.fail(operation, refused("the id is in use"));
            return Ok(());
        }
        let region = match self.sources.name(from.region()) {
            Ok(Named::Known(region)) => region,
            Ok(Named::New(region, descriptor)) => {
                self.tell_with(Message::Region { region }, Some(descriptor))?;
                region
            }
            Err(error) => {
                drop(from);
                let why = format!("the region cannot be passed: {error}");
                context.fail(operation, FailReason::Refused(why));
                return Ok(());
            }
        };
        let offer = Message::Offer {
            transfer,
            region,
            offset: from.offset() as u64,
            len: from.len() as u64,
        };
        self.moved_at = context.now;
        self.outgoing.insert(
            transfer,
            Outgoing::new(operation, from, spent, self.integrity),
        );
        self.work.push_back((transfer, Way::Out));
        self.tell(offer)
    }

    /// Gives a transfer up and tells the peer.
    pub(crate) fn cancel(
        &mut self,
        transfer: TransferId,
        outgoing: bool,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let known = if outgoing {
            self.fail_outgoing(transfer, FailReason::Cancelled, context)
        } else {
            self.fail_incoming(transfer, FailReason::Cancelled, context)
        };
        if !known {
            return Ok(());
        }
        self.tell(Message::Reset {
            transfer,
            by_sender: outgoing,
            reason: Reason::Cancelled,
        })
    }

    /// Takes in what the peer said.
    pub(crate) fn handle(
        &mut self,
        message: Message,
        descriptor: Option<OwnedFd>,
        context: &mut Context,
    ) -> Result<(), Ended> {
        self.heard_at = context.now;
        match message {
            Message::Welcome => self.handle_welcome(descriptor.as_ref(), context),
            Message::Refused => {
                Err(OpenError::Refused("it does not know the session".into()).into())
            }
            Message::Ping => {
                // The first one says that our WELCOME arrived.
                self.finish_opening(context);
                self.tell(Message::Pong)
            }
            Message::Pong => Ok(()),
            Message::Bye => Err(FailReason::Closed.into()),
            Message::Hello { .. } => Err(protocol("a second HELLO")),
            _ if self.opening.is_some() => Err(protocol("a transfer before the session is open")),
            Message::Region { region } => self.handle_region(region, descriptor),
            Message::Forget { region } => {
                self.memories.remove(&region);
                Ok(())
            }
            Message::Offer {
                transfer,
                region,
                offset,
                len,
            } => self.handle_offer(transfer, region, offset, len, context),
            Message::Done { transfer, digest } => {
                if let Some(outgoing) = self.outgoing.get_mut(&transfer) {
                    outgoing.theirs = Some(digest);
                }
                self.compare(transfer, context)
            }
            Message::Verdict { transfer, equal } => {
                self.handle_verdict(transfer, equal, context);
                Ok(())
            }
            Message::Reset {
                transfer,
                by_sender,
                reason,
            } => {
                self.handle_reset(transfer, by_sender, reason, context);
                Ok(())
            }
        }
    }

    fn handle_welcome(
        &mut self,
        probe: Option<&OwnedFd>,
        context: &mut Context,
    ) -> Result<(), Ended> {
        if self.opening.is_none() || self.remote.role == Role::Accept {
            return Err(protocol("a WELCOME that was not asked for"));
        }
        socket::check_probe(probe, &self.remote.token).map_err(OpenError::Refused)?;
        self.finish_opening(context);
        self.pinged_at = context.now;
        self.tell(Message::Ping)
    }

    fn finish_opening(&mut self, context: &mut Context) {
        if let Some(opening) = self.opening.take() {
            let round_trip = opening.began.elapsed();
            self.round_trip = Some(round_trip);
            context.completions.push(Completion::Opened {
                operation: opening.operation,
                result: Ok(round_trip),
            });
        }
    }

    fn handle_region(&mut self, region: u32, descriptor: Option<OwnedFd>) -> Result<(), Ended> {
        if self.memories.len() >= REGIONS_MAX + HEARTBEATS as usize {
            return Err(protocol("more regions than may be passed"));
        }
        // None if this process may hold no more descriptors: then what lies
        // there is refused, and the session goes on.
        let memory = match descriptor {
            None => None,
            Some(file) => {
                let len = socket::check_memory(&file).map_err(|why| protocol(&why))?;
                Some((Arc::new(file), len))
            }
        };
        match self.memories.insert(region, memory) {
            None => Ok(()),
            Some(_) => Err(protocol("a region's number twice")),
        }
    }

    fn handle_offer(
        &mut self,
        transfer: TransferId,
        region: u32,
        offset: u64,
        len: u64,
        context: &mut Context,
    ) -> Result<(), Ended> {
        let reason = match self.incoming.get_mut(&transfer) {
            None => Reason::Unknown,
            Some(incoming) if !matches!(incoming.stage, Stage::Granted) => {
                return Err(protocol("a transfer offered twice"));
            }
            Some(incoming) if incoming.into.len() as u64 != len => Reason::Length,
            Some(incoming) => {
                let end = offset.checked_add(len);
                match self.memories.get(&region) {
                    None => return Err(protocol("a region that was not passed")),
                    Some(Some((memory, whole))) if end.is_some_and(|end| end <= *whole) => {
                        let copying = Copying::new(
                            Arc::clone(memory),
                            offset,
                            &incoming.into,
                            self.integrity,
                        );
                        incoming.stage = Stage::Copying(copying);
                        self.moved_at = context.now;
                        self.work.push_back((transfer, Way::In));
                        return Ok(());
                    }
                    Some(_) => Reason::Memory,
                }
            }
        };
        self.dropped += 1;
        context.totals.dropped += 1;
        match reason {
            Reason::Length => {
                let why = format!("{len} bytes offered, another length granted");
                self.fail_incoming(transfer, FailReason::Protocol(why), context);
            }
            Reason::Memory => {
                let why = "the memory it lies in cannot be read here".to_owned();
                self.fail_incoming(transfer, FailReason::Refused(why), context);
            }
            Reason::Unknown | Reason::Cancelled => {}
        }
        self.tell(Message::Reset {
            transfer,
            by_sender: false,
            reason,
        })
    }

    fn handle_verdict(&mut self, transfer: TransferId, equal: bool, context: &mut Context) {
        let Some(Stage::Verifying(digest)) = self.incoming.get(&transfer).map(|one| &one.stage)
        else {
            self.dropped += 1;
            return;
        };
        let digest = *digest;
        if !equal {
            self.fail_incoming(transfer, FailReason::DigestMismatch, context);
            return;
        }
        if let Some(incoming) = self.incoming.remove(&transfer) {
            let bytes = incoming.into.len() as u64;
            let copies = Copies {
                kernel: bytes,
                ..Copies::default()
            };
            context.totals.copies.add(copies);
            context.totals.received_bytes += bytes;
            self.moved_at = context.now;
            let cost = incoming.spent.plus(Cost {
                copies,
                ..Cost::default()
            });
            let operation = incoming.operation;
            // Given back before the answer says so.
            drop(incoming);
            context.succeed(operation, bytes, digest, cost);
        }
    }

    fn handle_reset(
        &mut self,
        transfer: TransferId,
        by_sender: bool,
        reason: Reason,
        context: &mut Context,
    ) {
        let failed = match reason {
            Reason::Cancelled => FailReason::CancelledByPeer,
            Reason::Unknown => refused("the peer expects no such transfer"),
            Reason::Length => refused("the peer granted another length"),
            Reason::Memory => refused("the peer cannot read the region that was passed"),
        };
        if by_sender {
            self.fail_incoming(transfer, failed, context);
        } else {
            self.fail_outgoing(transfer, failed, context);
        }
    }

    /// Does a turn's work.
    pub(crate) fn work(&mut self, context: &mut Context) -> Result<(), Ended> {
        let mut left = TURN;
        while left > 0
            && let Some((transfer, way)) = self.work.pop_front()
        {
            let done = match way {
                Way::In => self.copy(transfer, left, context)?,
                Way::Out => self.check(transfer, left, context)?,
            };
            // What is gone or at its end does not come back.
            if let Some(done) = done {
                left = left.saturating_sub(done.max(1));
            }
        }
        Ok(())
    }

    fn copy(
        &mut self,
        transfer: TransferId,
        limit: usize,
        context: &mut Context,
    ) -> Result<Option<usize>, Ended> {
        let Some(incoming) = self.incoming.get_mut(&transfer) else {
            return Ok(None);
        };
        let Stage::Copying(copying) = &mut incoming.stage else {
            return Ok(None);
        };
        match copying.step(&incoming.into, limit) {
            Ok((done, None)) => {
                self.moved_at = context.now;
                self.work.push_back((transfer, Way::In));
                Ok(Some(done))
            }
            Ok((done, Some(digest))) => {
                self.moved_at = context.now;
                incoming.stage = Stage::Verifying(digest);
                self.tell(Message::Done { transfer, digest })?;
                Ok(Some(done))
            }
            Err(error) => {
                let why = format!("the memory it lies in cannot be read: {error}");
                self.fail_incoming(transfer, FailReason::Refused(why), context);
                self.tell(Message::Reset {
                    transfer,
                    by_sender: false,
                    reason: Reason::Memory,
                })?;
                Ok(None)
            }
        }
    }

    fn check(
        &mut self,
        transfer: TransferId,
        limit: usize,
        context: &mut Context,
    ) -> Result<Option<usize>, Ended> {
        let Some(outgoing) = self.outgoing.get_mut(&transfer) else {
            return Ok(None);
        };
        let done = outgoing.step(limit);
        if outgoing.is_checked() {
            self.compare(transfer, context)?;
        } else {
            self.work.push_back((transfer, Way::Out));
        }
        self.moved_at = context.now;
        Ok(Some(done))
    }

    /// Ends a transfer of ours once both digests are known.
    fn compare(&mut self, transfer: TransferId, context: &mut Context) -> Result<(), Ended> {
        let Some((ours, theirs)) = self.outgoing.get(&transfer).and_then(Outgoing::digests) else {
            return Ok(());
        };
        let equal = ours == theirs;
        self.tell(Message::Verdict { transfer, equal })?;
        if !equal {
            self.fail_outgoing(transfer, FailReason::DigestMismatch, context);
            return Ok(());
        }
        if let Some(outgoing) = self.outgoing.remove(&transfer) {
            let bytes = outgoing.from.len() as u64;
            context.totals.sent_bytes += bytes;
            self.moved_at = context.now;
            let (operation, spent) = (outgoing.operation, outgoing.spent);
            drop(outgoing);
            context.succeed(operation, bytes, ours, spent);
        }
        Ok(())
    }

    /// Checks deadlines and signs of life; lets the peer forget what is gone.
    pub(crate) fn tick(&mut self, context: &mut Context) -> Result<(), Ended> {
        let since = |at: Instant| context.now.saturating_duration_since(at);
        let config = &context.config;
        if let Some(opening) = &self.opening {
            if since(opening.began) >= config.open_limit {
                return Err(OpenError::TimedOut(config.open_limit).into());
            }
            return Ok(());
        }
        if since(self.heard_at) >= config.liveness {
            let limit = config.liveness;
            let why = format!("the peer has not answered for {limit:?}");
            return Err(FailReason::PathLost(why).into());
        }
        let idle = self.incoming.is_empty() && self.outgoing.is_empty();
        if !idle && since(self.moved_at) >= config.progress_limit {
            let limit = config.progress_limit;
            let why = format!("the peer answers, but no transfer moved for {limit:?}");
            return Err(FailReason::PathLost(why).into());
        }
        if since(self.pinged_at) >= config.liveness / HEARTBEATS {
            self.pinged_at = context.now;
            self.tell(Message::Ping)?;
        }
        for region in self.sources.take_unneeded() {
            self.tell(Message::Forget { region })?;
        }
        Ok(())
    }

    fn tell(&mut self, message: Message) -> Result<(), Ended> {
        self.tell_with(message, None)
    }

    fn tell_with(&mut self, message: Message, descriptor: Option<OwnedFd>) -> Result<(), Ended> {
        match &mut self.connection {
            Some(connection) => connection.tell(message, descriptor).map_err(Ended::from),
            // Only in a session that nobody has connected to yet.
            None => Ok(()),
        }
    }

    fn fail_incoming(
        &mut self,
        transfer: TransferId,
        reason: FailReason,
        context: &mut Context,
    ) -> bool {
        let failed = self.incoming.remove(&transfer).map(|one| one.operation);
        self.moved_at = context.now;
        failed
            .map(|operation| context.fail(operation, reason))
            .is_some()
    }

    fn fail_outgoing(
        &mut self,
        transfer: TransferId,
        reason: FailReason,
        context: &mut Context,
    ) -> bool {
        let failed = self.outgoing.remove(&transfer).map(|one| one.operation);
        self.moved_at = context.now;
        failed
            .map(|operation| context.fail(operation, reason))
            .is_some()
    }

    /// Says goodbye, where that is still heard.
    pub(crate) fn say_goodbye(&mut self) {
        // A courtesy: the socket's end says it, too.
        let _ = self.tell(Message::Bye);
    }

    /// Answers everything; `true` if the session had been open.
    pub(crate) fn end(self, ended: Ended, context: &mut Context) -> bool {
        let Self {
            opening,
            incoming,
            outgoing,
            ..
        } = self;
        for one in incoming.into_values() {
            let operation = one.operation;
            context.interrupt(operation, &ended.reason, one.into_partial());
        }
        for one in outgoing.into_values() {
            let operation = one.operation;
            context.interrupt(operation, &ended.reason, Some(one.into_partial()));
        }
        let was_open = opening.is_none();
        if let Some(Opening { operation, .. }) = opening {
            context.completions.push(Completion::Opened {
                operation,
                result: Err(ended.into_open()),
            });
        }
        was_open
    }

    /// A picture of it.
    pub(crate) fn snapshot(&self, id: SessionId) -> SessionSnapshot {
        SessionSnapshot {
            session: id,
            round_trip: self.round_trip,
            window_bytes: None,
            in_flight_bytes: None,
            granted: None,
            round_trip_min: None,
            retransmits: 0,
            resent: None,
            dropped: self.dropped,
            sealed: None,
            transfers: (self.incoming.len() + self.outgoing.len()) as u64,
        }
    }
}

impl Connection {
    /// Nothing was said on it yet.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: VecDeque::new(),
            awaits_room: false,
        }
    }

    /// Itself and whether the loop shall now wait for room, if that changes.
    pub(crate) fn change_of_watch(&mut self) -> Option<(&Self, bool)> {
        let wanted = !self.waiting.is_empty();
        if wanted == std::mem::replace(&mut self.awaits_room, wanted) {
            return None;
        }
        Some((self, wanted))
    }

    /// Says something now, or once the socket has room.
    pub(crate) fn tell(
        &mut self,
        message: Message,
        descriptor: Option<OwnedFd>,
    ) -> rustix::io::Result<()> {
        if self.waiting.len() >= WAITING_MAX {
            return Err(rustix::io::Errno::NOBUFS);
        }
        self.waiting.push_back((message, descriptor));
        self.flush()
    }

    /// Says what waits, as far as there is room.
    pub(crate) fn flush(&mut self) -> rustix::io::Result<()> {
        while let Some((message, descriptor)) = self.waiting.front() {
            let descriptor = descriptor.as_ref().map(AsFd::as_fd);
            if !socket::send(&self.socket, message, descriptor)? {
                break;
            }
            self.waiting.pop_front();
        }
        Ok(())
    }
}

impl Context {
    /// Answers an operation with a failure.
    pub(crate) fn fail(&mut self, operation: OperationId, reason: FailReason) {
        self.completions.push(Completion::Transferred {
            operation,
            result: Err(reason),
        });
    }

    /// Answers an operation whose session ended, so that another path goes on.
    fn interrupt(
        &mut self,
        operation: OperationId,
        reason: &FailReason,
        partial: Option<Interrupted>,
    ) {
        let reason = reason.clone();
        match partial {
            None => self.fail(operation, reason),
            Some(partial) => self.completions.push(Completion::Interrupted {
                operation,
                reason,
                partial: Box::new(partial),
            }),
        }
    }

    fn succeed(&mut self, operation: OperationId, bytes: u64, digest: Digest, cost: Cost) {
        let receipt = Receipt {
            bytes,
            digest,
            retransmits: cost.retransmits,
            copies: cost.copies,
        };
        self.completions.push(Completion::Transferred {
            operation,
            result: Ok(receipt),
        });
    }
}

impl Ended {
    /// For its transfers.
    pub(crate) fn reason(&self) -> &FailReason {
        &self.reason
    }

    /// For whoever was opening it.
    pub(crate) fn into_open(self) -> OpenError {
        let reason = self.reason;
        self.open
            .unwrap_or_else(|| OpenError::Refused(reason.to_string()))
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

impl From<rustix::io::Errno> for Ended {
    fn from(error: rustix::io::Errno) -> Self {
        FailReason::PathLost(format!("the connection to the peer broke: {error}")).into()
    }
}

fn protocol(what: &str) -> Ended {
    FailReason::Protocol(what.to_owned()).into()
}

fn refused(why: &str) -> FailReason {
    FailReason::Refused(why.to_owned())
}
