//! The loop: commands in, messages in and out, bytes copied, answers out.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use genie_proto::{Integrity, SessionId};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use super::message::Message;
use super::session::{Connection, Context, Ended, Session, Totals};
use super::socket::{self, Received};
use super::{Config, Remote};
use crate::endpoint::EnginePorts;
use crate::engine::status::PUBLISH_EVERY;
use crate::engine::{
    Command, Completion, FailReason, OpenError, OperationId, Outbox, Receiver, Status,
};
use crate::tcp::Token;

const LISTENER: u64 = 0;
const COMMANDS: u64 = 1;
const FIRST_CONNECTION: u64 = 2;
/// Events taken at once.
const EVENTS_MAX: usize = 64;
/// Messages taken from one connection before the others have their turn.
const MESSAGES_MAX: usize = 64;
/// Connections that have not said who they are.
const GUESTS_MAX: usize = 64;
/// How long the answers of an engine that stops may take to be picked up.
const FAREWELL: Duration = Duration::from_millis(100);

/// The engine; all its state. Belongs to its thread.
pub(crate) struct Engine {
    // Dropped first: commands not taken are then refused.
    commands: Receiver<Command>,
    listener: OwnedFd,
    epoll: OwnedFd,
    sessions: HashMap<SessionId, Session>,
    guests: HashMap<u64, Guest>,
    /// Which session a connection carries.
    carries: HashMap<u64, SessionId>,
    next_key: u64,
    context: Context,
    status: Status,
    next_tick: Instant,
    next_publication: Instant,
    news: bool,
    stopping: bool,
}

/// A connection that was accepted and belongs to no session yet.
struct Guest {
    connection: Connection,
    since: Instant,
    hello: Option<(SessionId, Token, Option<OwnedFd>)>,
}

impl Engine {
    /// Binds the listener and prepares everything that can fail.
    pub(crate) fn new(
        config: &Config,
        name: &str,
        ports: EnginePorts,
        status: Status,
    ) -> io::Result<Self> {
        let listener = socket::listen(name)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (descriptor, key) in [
            (std::os::fd::AsFd::as_fd(&listener), LISTENER),
            (std::os::fd::AsFd::as_fd(&ports.commands), COMMANDS),
        ] {
            epoll::add(&epoll, descriptor, EventData::new_u64(key), EventFlags::IN)?;
        }
        let now = Instant::now();
        Ok(Self {
            commands: ports.commands,
            listener,
            epoll,
            sessions: HashMap::new(),
            guests: HashMap::new(),
            carries: HashMap::new(),
            next_key: FIRST_CONNECTION,
            context: Context {
                now,
                config: config.clone(),
                completions: Outbox::new(ports.completions),
                totals: Totals::default(),
            },
            status,
            next_tick: now,
            next_publication: now,
            news: true,
            stopping: false,
        })
    }

    /// Runs until told to stop, or until nobody is left to tell it.
    pub(crate) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            self.context.now = Instant::now();
            self.take_commands();
            if self.stopping {
                break;
            }
            self.work();
            self.tick();
            self.publish();
            self.context.completions.flush();
            self.watch_for_room();
            self.wait(&mut events);
            self.context.now = Instant::now();
            for event in events.drain(..) {
                self.handle_event(event.data.u64(), event.flags);
            }
        }
        self.finish();
    }

    fn take_commands(&mut self) {
        while let Some(command) = self.commands.try_recv() {
            self.news = true;
            self.handle_command(command);
        }
        self.stopping |= self.commands.is_closed();
    }

    fn handle_command(&mut self, command: Command) {
        let context = &mut self.context;
        match command {
            Command::Open {
                operation,
                session,
                remote,
                integrity,
            } => self.open(operation, session, remote, integrity),
            Command::Receive {
                operation,
                session,
                transfer,
                into,
                resume,
            } => match self.sessions.get_mut(&session) {
                Some(session) => {
                    let spent = resume.map(|partial| partial.cost).unwrap_or_default();
                    session.receive(operation, transfer, into, spent, context);
                }
                None => no_such_session(operation, into, context),
            },
            Command::Send {
                operation,
                session: id,
                transfer,
                from,
                resume,
            } => match self.sessions.get_mut(&id) {
                Some(session) => {
                    let spent = resume.map(|partial| partial.cost).unwrap_or_default();
                    let sent = session.send(operation, transfer, from, spent, context);
                    self.settle(id, sent);
                }
                None => no_such_session(operation, from, context),
            },
            Command::Cancel {
                session: id,
                transfer,
                outgoing,
            } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    let told = session.cancel(transfer, outgoing, context);
                    self.settle(id, told);
                }
            }
            Command::Close { session } => {
                if let Some(mut session) = self.remove(session) {
                    session.say_goodbye();
                    session.end(FailReason::Closed.into(), &mut self.context);
                }
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn open(
        &mut self,
        operation: OperationId,
        id: SessionId,
        remote: crate::engine::Remote,
        integrity: Integrity,
    ) {
        let opened = match remote {
            _ if self.sessions.contains_key(&id) => {
                Err(OpenError::Refused("the session is open already".into()))
            }
            crate::engine::Remote::Shm(remote) => self.begin(operation, id, remote, integrity),
            _ => Err(OpenError::Refused(
                "this engine passes descriptors, the peer was described for another".into(),
            )),
        };
        if let Err(error) = opened {
            let result = Err(error);
            self.context
                .completions
                .push(Completion::Opened { operation, result });
        }
    }

    fn begin(
        &mut self,
        operation: OperationId,
        id: SessionId,
        remote: Remote,
        integrity: Integrity,
    ) -> Result<(), OpenError> {
        let mut session = Session::open(operation, remote, integrity, &self.context)?;
        if let Some(connection) = session.connection() {
            let key = self.next_key;
            watch(&self.epoll, connection, key)
                .map_err(|error| OpenError::Io(error.to_string()))?;
            self.next_key += 1;
            self.carries.insert(key, id);
        }
        self.sessions.insert(id, session);
        // Whoever was there before the command.
        let waiting = |guest: &Guest| matches!(&guest.hello, Some((wanted, ..)) if *wanted == id);
        let keys = self.guests.iter().filter(|(_, guest)| waiting(guest));
        for key in keys.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.introduce(key);
        }
        Ok(())
    }

    /// Brings a guest that said its HELLO to its session, if that is known;
    /// else it waits for it.
    fn introduce(&mut self, key: u64) {
        let Some(Guest {
            hello: Some((id, token, _)),
            ..
        }) = self.guests.get(&key)
        else {
            return;
        };
        let id = *id;
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let welcome = session.welcomes(token);
        let Some(mut guest) = self.guests.remove(&key) else {
            return;
        };
        if !welcome {
            self.context.totals.dropped += 1;
            // Whether it hears that is its own affair.
            let _ = guest.connection.tell(Message::Refused, None);
            return;
        }
        let probe = guest.hello.and_then(|(_, _, probe)| probe);
        self.carries.insert(key, id);
        let adopted = session.adopt(guest.connection, probe.as_ref(), &self.context);
        self.settle(id, adopted);
    }

    fn remove(&mut self, id: SessionId) -> Option<Session> {
        let session = self.sessions.remove(&id)?;
        self.carries.retain(|_, carried| *carried != id);
        Some(session)
    }

    /// Ends a session that says it has ended.
    fn settle(&mut self, id: SessionId, result: Result<(), Ended>) {
        let Err(ended) = result else { return };
        let Some(session) = self.remove(id) else {
            return;
        };
        self.news = true;
        let reason = ended.reason().clone();
        if session.end(ended, &mut self.context) {
            let lost = Completion::Lost {
                session: id,
                reason,
            };
            self.context.completions.push(lost);
        }
    }

    fn handle_event(&mut self, key: u64, flags: EventFlags) {
        match key {
            COMMANDS => {}
            LISTENER => self.accept(),
            key if self.guests.contains_key(&key) => self.hear_guest(key),
            key => {
                self.news = true;
                if let Some(id) = self.carries.get(&key).copied() {
                    let result = self.hear(id, flags);
                    self.settle(id, result);
                }
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match socket::accept(&self.listener) {
                Ok(socket) => self.admit(socket),
                Err(Errno::AGAIN) => return,
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    // Out of descriptors: whoever waits is seen again at the
                    // next turn, and gives up at its own limit.
                    tracing::warn!(%error, "cannot accept a connection of this host");
                    return;
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        let key = self.next_key;
        let connection = Connection::new(socket);
        let refused = socket::refuse_user(&connection.socket).is_some()
            || self.guests.len() >= GUESTS_MAX
            || watch(&self.epoll, &connection, key).is_err();
        if refused {
            self.context.totals.dropped += 1;
            return;
        }
        self.next_key += 1;
        let guest = Guest {
            connection,
            since: self.context.now,
            hello: None,
        };
        self.guests.insert(key, guest);
    }

    fn hear_guest(&mut self, key: u64) {
        let Some(guest) = self.guests.get_mut(&key) else {
            return;
        };
        match (socket::receive(&guest.connection.socket), &guest.hello) {
            (Ok(Received::Nothing), _) => {}
            (Ok(Received::Message(Message::Hello { session, token }, probe)), None) => {
                guest.hello = Some((session, token, probe));
                // The command that expects it was given before the peer knew.
                self.take_commands();
                self.introduce(key);
            }
            _ => {
                self.guests.remove(&key);
                self.context.totals.dropped += 1;
            }
        }
    }

    fn hear(&mut self, id: SessionId, flags: EventFlags) -> Result<(), Ended> {
        if flags.contains(EventFlags::OUT)
            && let Some(connection) = self.sessions.get_mut(&id).and_then(Session::connection)
        {
            connection.flush()?;
        }
        for _ in 0..MESSAGES_MAX {
            let Some(connection) = self.sessions.get_mut(&id).and_then(Session::connection) else {
                return Ok(());
            };
            let received = socket::receive(&connection.socket)?;
            // A grant was given to this engine before the peer heard of it.
            self.take_commands();
            let Some(session) = self.sessions.get_mut(&id) else {
                return Ok(());
            };
            match received {
                Received::Nothing => return Ok(()),
                Received::Message(message, descriptor) => {
                    session.handle(message, descriptor, &mut self.context)?;
                }
                Received::Closed => {
                    let why = "the peer closed the connection".to_owned();
                    return Err(FailReason::PathLost(why).into());
                }
                Received::Garbage => {
                    return Err(FailReason::Protocol("that is no message".into()).into());
                }
            }
        }
        Ok(())
    }

    fn work(&mut self) {
        let busy = self
            .sessions
            .iter()
            .filter(|(_, session)| session.has_work());
        for id in busy.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.news = true;
            if let Some(session) = self.sessions.get_mut(&id) {
                let worked = session.work(&mut self.context);
                self.settle(id, worked);
            }
        }
    }

    fn tick(&mut self) {
        if self.context.now < self.next_tick {
            return;
        }
        self.next_tick = self.context.now + self.tick_every();
        let (now, limit) = (self.context.now, self.context.config.open_limit);
        self.guests
            .retain(|_, guest| now.saturating_duration_since(guest.since) < limit);
        for id in self.sessions.keys().copied().collect::<Vec<_>>() {
            if let Some(session) = self.sessions.get_mut(&id) {
                let ticked = session.tick(&mut self.context);
                self.settle(id, ticked);
            }
        }
    }

    /// An eighth of the shortest limit: a limit is then kept with a quarter to spare.
    fn tick_every(&self) -> Duration {
        let Config {
            liveness,
            open_limit,
            progress_limit,
        } = self.context.config;
        liveness.min(open_limit).min(progress_limit) / 8
    }

    /// A socket that was full is watched until it has room, and no longer.
    fn watch_for_room(&mut self) {
        for (key, id) in &self.carries {
            let connection = self.sessions.get_mut(id).and_then(Session::connection);
            let Some((connection, out)) = connection.and_then(Connection::change_of_watch) else {
                continue;
            };
            let flags = if out {
                EventFlags::IN | EventFlags::OUT
            } else {
                EventFlags::IN
            };
            let data = EventData::new_u64(*key);
            // It was added, so it can be changed.
            let _ = epoll::modify(&self.epoll, &connection.socket, data, flags);
        }
    }

    fn wait(&mut self, events: &mut Vec<epoll::Event>) {
        let busy = self.sessions.values().any(Session::has_work);
        let asleep = !busy && self.commands.prepare_sleep();
        let limit = if asleep {
            self.sleep_limit()
        } else {
            Some(Duration::ZERO)
        };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let space = rustix::buffer::spare_capacity(events);
        // An interruption by a signal only ends the sleep early.
        let _ = epoll::wait(&self.epoll, space, limit.as_ref());
        if asleep {
            self.commands.finish_sleep();
        }
    }

    fn sleep_limit(&self) -> Option<Duration> {
        let until = |at: Instant| at.saturating_duration_since(self.context.now);
        let busy = !self.sessions.is_empty() || !self.guests.is_empty();
        let tick = busy.then(|| until(self.next_tick));
        let publication = self.news.then(|| until(self.next_publication));
        let flush = (!self.context.completions.is_empty()).then_some(Duration::from_millis(1));
        [tick, publication, flush].into_iter().flatten().min()
    }

    fn publish(&mut self) {
        if !self.news || self.context.now < self.next_publication {
            return;
        }
        self.news = false;
        self.next_publication = self.context.now + PUBLISH_EVERY;
        let (totals, sessions) = (self.context.totals, &self.sessions);
        self.status.publish(|snapshot| {
            snapshot.driver.clear();
            snapshot.driver.push_str("shm");
            snapshot.copies = totals.copies;
            snapshot.sent_bytes = totals.sent_bytes;
            snapshot.received_bytes = totals.received_bytes;
            snapshot.dropped = totals.dropped;
            snapshot.sessions.clear();
            let pictures = sessions.iter().map(|(id, session)| session.snapshot(*id));
            snapshot.sessions.extend(pictures);
        });
    }

    fn finish(mut self) {
        for (_, mut session) in self.sessions.drain() {
            session.say_goodbye();
            session.end(FailReason::Stopped.into(), &mut self.context);
        }
        self.news = true;
        self.next_publication = self.context.now;
        self.publish();
        let deadline = Instant::now() + FAREWELL;
        self.context.completions.flush();
        while !self.context.completions.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            self.context.completions.flush();
        }
    }
}

fn watch(epoll: &OwnedFd, connection: &Connection, key: u64) -> rustix::io::Result<()> {
    let flags = EventFlags::IN;
    epoll::add(epoll, &connection.socket, EventData::new_u64(key), flags)
}

fn no_such_session(operation: OperationId, lease: crate::memory::Lease, context: &mut Context) {
    // Given back before the answer says so.
    drop(lease);
    context.fail(operation, FailReason::Refused("no such session".into()));
}
