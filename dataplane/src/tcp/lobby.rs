//! Connections that were accepted and have not shown where they belong.
//!
//! Its invariant: nobody stays for longer than a deadline, and there are at
//! most [`GUESTS_MAX`]; one more makes the oldest leave.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use genie_proto::SessionId;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::Token;
use super::context::{Context, STREAM_KEYS};
use super::frame::{Hello, Malformed, Verdict};
use super::stream::Greeting;

/// Connections that may wait at once; a full session is 16 of them.
pub(crate) const GUESTS_MAX: usize = 128;

/// Waiting connections by their epoll key, oldest first.
#[derive(Debug)]
pub(crate) struct Lobby {
    guests: BTreeMap<u64, Guest>,
    next_key: u64,
}

#[derive(Debug)]
struct Guest {
    socket: TcpStream,
    greeting: Greeting,
    /// What it said. Its session is not known yet, or it would have left.
    hello: Option<Hello>,
    deadline: Instant,
}

impl Lobby {
    /// An empty lobby that uses epoll keys from `first_key` on.
    pub(crate) fn new(first_key: u64) -> Self {
        Self {
            guests: BTreeMap::new(),
            next_key: first_key,
        }
    }

    /// Lets a connection in.
    pub(crate) fn enter(
        &mut self,
        socket: TcpStream,
        limit: Duration,
        context: &mut Context,
    ) -> std::io::Result<()> {
        context.configure(&socket)?;
        let key = self.next_key;
        epoll::add(
            &context.epoll,
            &socket,
            EventData::new_u64(key),
            EventFlags::IN,
        )?;
        self.next_key = (self.next_key + 1) & !STREAM_KEYS;
        let deadline = context.now + limit;
        self.guests.insert(
            key,
            Guest {
                socket,
                greeting: Greeting::new(),
                hello: None,
                deadline,
            },
        );
        if self.guests.len() > GUESTS_MAX {
            self.guests.pop_first();
            context.totals.dropped += 1;
        }
        Ok(())
    }

    /// Reads what a guest says; gives its HELLO once that is complete.
    ///
    /// The guest stays until it is taken out or refused; one that talks
    /// nonsense leaves at once.
    pub(crate) fn listen_to(&mut self, key: u64, context: &mut Context) -> Option<Hello> {
        let guest = self.guests.get_mut(&key)?;
        if guest.hello.is_some() {
            return None;
        }
        match guest.greeting.read(&guest.socket) {
            Ok(None) => None,
            Ok(Some(Ok(hello))) => {
                // Nothing more is read before it belongs to somebody.
                let _ = epoll::delete(&context.epoll, &guest.socket);
                guest.hello = Some(hello);
                Some(hello)
            }
            Ok(Some(Err(Malformed::Version(_)))) => {
                self.refuse(key, Verdict::WrongVersion, context);
                None
            }
            Ok(Some(Err(_))) | Err(_) => {
                self.guests.remove(&key);
                context.totals.dropped += 1;
                None
            }
        }
    }

    /// Guests that wait for a session.
    pub(crate) fn waiting_for(&self, session: SessionId) -> Vec<(u64, Hello)> {
        let for_it = |(key, guest): (&u64, &Guest)| {
            guest
                .hello
                .filter(|hello| hello.session == session)
                .map(|hello| (*key, hello))
        };
        self.guests.iter().filter_map(for_it).collect()
    }

    /// Takes a guest out, to belong to a session.
    pub(crate) fn take(&mut self, key: u64) -> Option<TcpStream> {
        self.guests.remove(&key).map(|guest| guest.socket)
    }

    /// Tells a guest why it must leave, and closes its connection.
    pub(crate) fn refuse(&mut self, key: u64, verdict: Verdict, context: &mut Context) {
        let Some(mut guest) = self.guests.remove(&key) else {
            return;
        };
        context.totals.dropped += 1;
        let nobody = SessionId(0);
        let (session, stream) = guest
            .hello
            .map_or((nobody, 0), |hello| (hello.session, hello.stream));
        let refusal = Hello {
            session,
            token: Token([0; 16]),
            stream,
            streams: 0,
            verdict,
        };
        // If a fresh socket takes no forty bytes, the guest sees it closed.
        let _ = guest.socket.write_all(&refusal.encode());
    }

    /// Sends those away whose time is over.
    pub(crate) fn tick(&mut self, context: &mut Context) {
        let late = |guest: &Guest| context.now >= guest.deadline;
        let keys: Vec<u64> = self
            .guests
            .iter()
            .filter(|(_, g)| late(g))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            self.refuse(key, Verdict::UnknownSession, context);
        }
    }

    /// Whether nobody waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.guests.is_empty()
    }
}
