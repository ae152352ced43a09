//! The loop of the TCP engine: commands, sockets, clocks, then sleep.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use genie_proto::{Integrity, SessionId};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::Config;
use super::context::{Context, STREAM_KEYS, stream_of_key};
use super::frame::{Hello, Verdict};
use super::lobby::Lobby;
use super::session::{Ended, ReadEnd, Session, Turn};
use super::socket;
use super::spin::Spin;
use crate::endpoint::EnginePorts;
use crate::engine::status::PUBLISH_EVERY;
use crate::engine::{
    Command, Completion, FailReason, OpenError, OperationId, Outbox, Receiver, Status,
};

const LISTENER: u64 = 0;
const COMMANDS: u64 = 1;
const FIRST_GUEST: u64 = 2;
/// Events taken at once.
const EVENTS_MAX: usize = 64;
/// Connections accepted in one iteration.
const ACCEPTS_MAX: usize = 16;
/// How long accepting pauses when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the answers of an engine that stops may take to be picked up.
const FAREWELL: Duration = Duration::from_millis(100);

/// The engine; all its state. Belongs to its thread.
pub(crate) struct Engine {
    // Dropped first: commands not taken are then refused.
    commands: Receiver<Command>,
    listener: TcpListener,
    sessions: HashMap<SessionId, Session>,
    lobby: Lobby,
    context: Context,
    status: Status,
    /// Sessions that commands gave something to send.
    touched: Vec<SessionId>,
    accept_again: Option<Instant>,
    next_tick: Instant,
    next_publication: Instant,
    /// Something happened since the last publication.
    news: bool,
    spin: Spin,
    stopping: bool,
}

impl Engine {
    /// Binds the listener and prepares everything that can fail.
    pub(crate) fn new(config: &Config, ports: EnginePorts, status: Status) -> io::Result<Self> {
        let listener = TcpListener::bind(config.listen)?;
        listener.set_nonblocking(true)?;
        if let Some(name) = &config.congestion {
            // Connections inherit it; a name that is wrong is found here.
            socket::set_congestion(&listener, name)?;
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &listener,
            EventData::new_u64(LISTENER),
            EventFlags::IN,
        )?;
        epoll::add(
            &epoll,
            &ports.commands,
            EventData::new_u64(COMMANDS),
            EventFlags::IN,
        )?;
        let completions = Outbox::new(ports.completions);
        let context = Context::new(epoll, completions, config);
        Ok(Self {
            commands: ports.commands,
            listener,
            sessions: HashMap::new(),
            lobby: Lobby::new(FIRST_GUEST),
            next_tick: context.now,
            next_publication: context.now,
            context,
            status,
            touched: Vec::new(),
            accept_again: None,
            news: true,
            spin: Spin::new(),
            stopping: false,
        })
    }

    /// Where it listens.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
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
            self.write_touched();
            self.tick();
            self.publish();
            self.context.completions.flush();
            self.wait(&mut events);
            self.context.now = Instant::now();
            if !events.is_empty() {
                self.spin.busy(self.context.now);
            }
            for event in events.drain(..) {
                self.handle_event(event.data.u64(), event.flags);
            }
        }
        self.finish();
    }

    fn take_commands(&mut self) {
        while let Some(command) = self.commands.try_recv() {
            self.news = true;
            self.spin.busy(self.context.now);
            self.handle_command(command);
        }
        self.stopping |= self.commands.is_closed();
    }

    fn handle_command(&mut self, command: Command) {
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
                    session.receive(operation, transfer, into, resume, &mut self.context);
                }
                None => self.no_such_session(operation, into),
            },
            Command::Send {
                operation,
                session,
                transfer,
                from,
                resume,
            } => {
                match self.sessions.get_mut(&session) {
                    Some(session) => {
                        session.send(operation, transfer, from, resume, &mut self.context);
                    }
                    None => self.no_such_session(operation, from),
                }
                self.touch(session);
            }
            Command::Cancel {
                session,
                transfer,
                outgoing,
            } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.cancel(transfer, outgoing, &mut self.context);
                }
                self.touch(session);
            }
            Command::Close { session } => {
                if let Some(mut session) = self.sessions.remove(&session) {
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
        let refused = |reason: &str| OpenError::Refused(reason.to_owned());
        let opened = match remote {
            _ if self.sessions.contains_key(&id) => {
                Err(refused("the session is open already").into())
            }
            crate::engine::Remote::Udp(_) | crate::engine::Remote::Shm(_) => {
                Err(refused("this engine speaks TCP, the peer was described for another").into())
            }
            crate::engine::Remote::Tcp(remote) => {
                Session::open(id, operation, remote, integrity, &self.context)
            }
        };
        match opened {
            Ok(session) => {
                self.sessions.insert(id, session);
                for (key, hello) in self.lobby.waiting_for(id) {
                    self.introduce(key, &hello);
                }
            }
            Err(Ended { reason, open }) => {
                let error = open.unwrap_or_else(|| OpenError::Refused(reason.to_string()));
                let completion = Completion::Opened {
                    operation,
                    result: Err(error),
                };
                self.context.completions.push(completion);
            }
        }
    }

    fn no_such_session(&mut self, operation: OperationId, lease: crate::memory::Lease) {
        // Given back before the answer says so.
        drop(lease);
        self.context
            .fail(operation, FailReason::Refused("no such session".into()));
    }

    fn touch(&mut self, session: SessionId) {
        if self.touched.last() != Some(&session) {
            self.touched.push(session);
        }
    }

    fn write_touched(&mut self) {
        while let Some(id) = self.touched.pop() {
            if let Some(session) = self.sessions.get_mut(&id) {
                let result = session.write_all(&mut self.context);
                self.settle(id, result);
            }
        }
    }

    /// Ends a session that says it has ended.
    fn settle(&mut self, id: SessionId, result: Result<(), Ended>) {
        let Err(ended) = result else { return };
        let Some(session) = self.sessions.remove(&id) else {
            return;
        };
        let reason = ended.reason.clone();
        self.news = true;
        if session.end(ended, &mut self.context) {
            self.context.completions.push(Completion::Lost {
                session: id,
                reason,
            });
        }
    }

    fn handle_event(&mut self, key: u64, flags: EventFlags) {
        match key {
            COMMANDS => {}
            LISTENER => self.accept(),
            key if key & STREAM_KEYS == 0 => {
                self.news = true;
                if let Some(hello) = self.lobby.listen_to(key, &mut self.context) {
                    self.introduce(key, &hello);
                }
            }
            key => {
                self.news = true;
                let (id, index) = stream_of_key(key);
                let result = self.handle_stream(id, index, flags);
                self.settle(id, result);
            }
        }
    }

    fn handle_stream(
        &mut self,
        id: SessionId,
        index: usize,
        flags: EventFlags,
    ) -> Result<(), Ended> {
        let Some(session) = self.sessions.get_mut(&id) else {
            return Ok(());
        };
        if !session.is_up(index) {
            return session.advance_greeting(index, &mut self.context);
        }
        if flags == EventFlags::OUT {
            return session.write(index, &mut self.context);
        }
        let mut turn = Turn::default();
        // The commands looked at in between may close the session.
        while let Some(session) = self.sessions.get_mut(&id) {
            match session.read(index, &mut turn, &mut self.context)? {
                ReadEnd::Done => break,
                ReadEnd::CommandsFirst => self.take_commands(),
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_MAX {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    let limit = self.context.open_limit;
                    if self.lobby.enter(socket, limit, &mut self.context).is_err() {
                        self.context.totals.dropped += 1;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The peer is gone again before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept data connections for a moment");
                    let _ = epoll::delete(&self.context.epoll, &self.listener);
                    self.accept_again = Some(self.context.now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    /// Brings a guest that said its HELLO to its session, if that is known;
    /// else it waits for it.
    fn introduce(&mut self, key: u64, hello: &Hello) {
        let Some(session) = self.sessions.get_mut(&hello.session) else {
            return;
        };
        match session.judge(hello) {
            Verdict::Welcome => {
                if let Some(socket) = self.lobby.take(key) {
                    let result = session.adopt(hello, socket, &mut self.context);
                    self.settle(hello.session, result);
                }
            }
            refusal => self.lobby.refuse(key, refusal, &mut self.context),
        }
    }

    fn tick(&mut self) {
        if self.accept_again.is_some_and(|at| self.context.now >= at) {
            let data = EventData::new_u64(LISTENER);
            let added = epoll::add(&self.context.epoll, &self.listener, data, EventFlags::IN);
            self.accept_again = added.is_err().then_some(self.context.now + ACCEPT_PAUSE);
        }
        if self.context.now < self.next_tick {
            return;
        }
        self.next_tick = self.context.now + self.tick_every();
        self.lobby.tick(&mut self.context);
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            if let Some(session) = self.sessions.get_mut(&id) {
                let result = session.tick(&mut self.context);
                self.settle(id, result);
            }
        }
    }

    /// An eighth of the shortest limit: a limit is then kept with a quarter to spare.
    fn tick_every(&self) -> Duration {
        let Context {
            liveness,
            open_limit,
            progress_limit,
            ..
        } = self.context;
        liveness.min(open_limit).min(progress_limit) / 8
    }

    fn wait(&mut self, events: &mut Vec<epoll::Event>) {
        let asleep = !self.spin.again(self.context.now) && self.commands.prepare_sleep();
        let limit = if asleep {
            self.sleep_limit()
        } else {
            // Whoever shares the core goes first: it may be what we wait for.
            std::thread::yield_now();
            Some(Duration::ZERO)
        };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let space = rustix::buffer::spare_capacity(events);
        // An interruption by a signal only ends the sleep early.
        let _ = epoll::wait(&self.context.epoll, space, limit.as_ref());
        if asleep {
            self.commands.finish_sleep();
        }
    }

    fn sleep_limit(&self) -> Option<Duration> {
        let until = |at: Instant| at.saturating_duration_since(self.context.now);
        let busy = !self.sessions.is_empty() || !self.lobby.is_empty();
        let tick = busy.then(|| until(self.next_tick));
        let publication = self.news.then(|| until(self.next_publication));
        let accept = self.accept_again.map(until);
        let flush = (!self.context.completions.is_empty()).then_some(Duration::from_millis(1));
        [tick, publication, accept, flush]
            .into_iter()
            .flatten()
            .min()
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
            snapshot.driver.push_str("tcp");
            snapshot.copies = totals.copies;
            snapshot.sent_bytes = totals.sent_bytes;
            snapshot.received_bytes = totals.received_bytes;
            snapshot.dropped = totals.dropped;
            snapshot.sealed.forged = totals.forged;
            snapshot.sessions.clear();
            snapshot
                .sessions
                .extend(sessions.values().map(Session::snapshot));
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
