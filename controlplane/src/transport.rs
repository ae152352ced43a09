//! The transports of this agent: which there are, and why not the others.
//!
//! One engine stands behind each transport that could be started, or one for
//! each queue of its device: a [`Seat`] says which of them carries a session.
//! Adding a transport means one more variant here and one more way to start it;
//! the rest of the control plane only sees endpoints.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use genie_dataplane::endpoint::{Completions, Endpoint, Lost, Running};
use genie_dataplane::engine::{Remote, Status, udp};
use genie_dataplane::shm;
use genie_dataplane::tcp::{self, Token};
use genie_dataplane::{Secrets, SessionId};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// A way to carry bytes between two agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Descriptors passed between two agents on one host.
    Shm,
    /// Genie's UDP protocol over a DPDK port.
    Dpdk,
    /// Kernel TCP.
    Tcp,
}

/// What `auto` stands for, best first.
pub const AUTO: [Transport; 3] = [Transport::Shm, Transport::Dpdk, Transport::Tcp];

/// An ordered list of transports, best first; never empty, none twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Preference(Vec<Transport>);

/// Why a list of transports was not understood.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PreferenceError {
    /// Not a transport of this build.
    #[error("'{0}' is not a transport: write auto, or one or more of shm,dpdk,tcp")]
    Unknown(String),
    /// The same one twice.
    #[error("'{0}' is listed twice")]
    Twice(Transport),
}

/// What a peer must know to reach one of our engines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Local {
    /// A socket of this host.
    Shm(shm::Local),
    /// A device.
    Dpdk(udp::Local),
    /// A data port for TCP connections.
    Tcp {
        /// Where it listens; an unspecified address means that of the control connection.
        data: SocketAddr,
        /// How many connections to use.
        streams: u16,
    },
}

/// What binds a path to the session that it is opened for.
#[derive(Clone, Debug)]
pub struct Keys {
    /// What connections begin with.
    pub token: Token,
    /// What packets are sealed with, if they are.
    pub secrets: Option<Secrets>,
}

/// One transport as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Which.
    pub transport: Transport,
    /// How to reach it, or why it cannot be used.
    pub local: Result<Local, String>,
}

/// An engine that runs.
#[derive(Debug)]
pub struct Engine {
    /// Which transport it carries.
    pub transport: Transport,
    /// Which queue of its device it drives; 0 where there is but one.
    pub queue: u16,
    /// What moves tensors.
    pub endpoint: Endpoint,
    /// What it publishes about itself.
    pub status: Status,
    /// How a peer reaches it.
    pub local: Local,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The parts of an engine that somebody must attend to.
#[derive(Debug)]
pub struct Attended {
    /// Which transport.
    pub transport: Transport,
    /// Which of its engines.
    pub queue: u16,
    /// To be dispatched.
    pub completions: Completions,
    /// To be told to their sessions.
    pub lost: mpsc::UnboundedReceiver<Lost>,
}

/// All transports of this agent.
#[derive(Debug, Default)]
pub struct Transports {
    engines: Vec<Engine>,
    refused: Vec<(Transport, String)>,
    /// One for each queue of the device with the most; every seat on it has another.
    seats: Mutex<Vec<Arc<()>>>,
}

/// The queue that carries a session, wherever a transport has several: each
/// session belongs to one engine. Given up on drop.
#[derive(Debug)]
pub struct Seat {
    queue: u16,
    _taken: Arc<()>,
}

impl Seat {
    /// Which queue.
    pub fn queue(&self) -> u16 {
        self.queue
    }
}

impl Transports {
    /// Takes in an engine that was started; the next queue's, where the
    /// transport has one already.
    pub fn add(&mut self, transport: Transport, local: Local, running: Running) -> Attended {
        let Running {
            endpoint,
            completions,
            lost,
            status,
            thread,
        } = running;
        let thread = Mutex::new(Some(thread));
        let queue = self.engines_of(transport).count() as u16;
        let mut seats = self.seats();
        if seats.len() <= usize::from(queue) {
            seats.push(Arc::default());
        }
        drop(seats);
        self.engines.push(Engine {
            transport,
            queue,
            endpoint,
            status,
            local,
            thread,
        });
        Attended {
            transport,
            queue,
            completions,
            lost,
        }
    }

    /// Notes why a transport cannot be used.
    pub fn refuse(&mut self, transport: Transport, reason: String) {
        self.refused.push((transport, reason));
    }

    /// The engine of a transport, if it runs; the first queue's.
    pub fn engine(&self, transport: Transport) -> Option<&Engine> {
        self.engines_of(transport).next()
    }

    /// Whether a transport has several engines.
    pub fn has_queues(&self, transport: Transport) -> bool {
        self.engines_of(transport).count() > 1
    }

    /// The engine of a transport that carries the sessions of this seat.
    pub fn engine_at(&self, transport: Transport, seat: &Seat) -> Option<&Engine> {
        let mut engines = self.engines_of(transport);
        let count = engines.clone().count().max(1);
        engines.nth(usize::from(seat.queue) % count)
    }

    /// A seat on the queue that carries the fewest sessions.
    pub fn seat(&self) -> Seat {
        let mut seats = self.seats();
        if seats.is_empty() {
            seats.push(Arc::default());
        }
        let least = seats
            .iter()
            .enumerate()
            .min_by_key(|(_, taken)| Arc::strong_count(taken));
        let (queue, taken) = least.expect("there is one at least");
        Seat {
            queue: queue as u16,
            _taken: Arc::clone(taken),
        }
    }

    fn engines_of(&self, transport: Transport) -> impl Iterator<Item = &Engine> + Clone {
        let engines = self.engines.iter();
        engines.filter(move |engine| engine.transport == transport)
    }

    fn seats(&self) -> MutexGuard<'_, Vec<Arc<()>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All engines that run.
    pub fn engines(&self) -> &[Engine] {
        &self.engines
    }

    /// Why transports cannot be used.
    pub fn refused(&self) -> &[(Transport, String)] {
        &self.refused
    }

    /// What a peer is told whose session has this seat.
    pub fn offers(&self, seat: &Seat) -> Vec<Offer> {
        let mine = |engine: &&Engine| {
            let one = self.engine_at(engine.transport, seat);
            one.is_some_and(|one| one.queue == engine.queue)
        };
        let there = self.engines.iter().filter(mine).map(|engine| Offer {
            transport: engine.transport,
            local: Ok(engine.local.clone()),
        });
        let refused = self.refused.iter().map(|(transport, reason)| Offer {
            transport: *transport,
            local: Err(reason.clone()),
        });
        there.chain(refused).collect()
    }

    /// Stops every engine and waits for its thread. Blocks.
    pub fn stop(&self) {
        for engine in &self.engines {
            engine.endpoint.stop();
        }
        for engine in &self.engines {
            let thread = engine
                .thread
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .take();
            if thread.is_some_and(|thread| thread.join().is_err()) {
                tracing::error!(transport = %engine.transport, "the engine's thread panicked");
            }
        }
    }
}

impl Engine {
    /// How a path over this engine is called: `tcp`, `dpdk:net_vhost` …
    pub fn path(&self) -> String {
        match &self.local {
            Local::Shm(_) => "shm".to_owned(),
            Local::Dpdk(local) => format!("dpdk:{}", local.driver),
            Local::Tcp { .. } => "tcp".to_owned(),
        }
    }
}

impl Local {
    /// Why it cannot lead to a peer that is `theirs`, where that shows before
    /// both ends try.
    pub fn refuses(&self, theirs: &Local) -> Option<String> {
        match (self, theirs) {
            (Local::Shm(ours), Local::Shm(theirs)) => ours.refuses(theirs),
            _ => None,
        }
    }

    /// What the engine behind `ours` must know of a peer that is `self` and
    /// calls the session `session`. `dialled` is where the control connection
    /// reached the peer, if we dialled it.
    pub fn remote(
        &self,
        ours: &Local,
        session: SessionId,
        keys: Keys,
        dialled: Option<SocketAddr>,
    ) -> Remote {
        let Keys { token, secrets } = keys;
        match self {
            Local::Shm(local) => Remote::Shm(shm::Remote {
                role: match dialled {
                    None => shm::Role::Accept,
                    Some(_) => shm::Role::Dial(local.clone()),
                },
                session,
                token,
            }),
            Local::Dpdk(local) => Remote::Udp(udp::Remote {
                local: local.clone(),
                session,
                secrets,
            }),
            Local::Tcp { data, streams } => {
                let role = match dialled {
                    None => tcp::Role::Accept,
                    Some(control) if data.ip().is_unspecified() => {
                        tcp::Role::Dial(SocketAddr::new(control.ip(), data.port()))
                    }
                    Some(_) => tcp::Role::Dial(*data),
                };
                // Both ends come to the same number.
                let streams = match ours {
                    Local::Tcp { streams: ours, .. } => *streams.min(ours),
                    Local::Dpdk(_) | Local::Shm(_) => *streams,
                };
                Remote::Tcp(tcp::Remote {
                    role,
                    session,
                    token,
                    streams: streams.max(1),
                    secrets,
                })
            }
        }
    }
}

impl Preference {
    /// The transports, best first.
    pub fn as_slice(&self) -> &[Transport] {
        &self.0
    }

    /// Whether a transport is allowed.
    pub fn allows(&self, transport: Transport) -> bool {
        self.0.contains(&transport)
    }
}

impl Default for Preference {
    fn default() -> Self {
        Self(AUTO.to_vec())
    }
}

impl FromStr for Preference {
    type Err = PreferenceError;

    fn from_str(text: &str) -> Result<Self, PreferenceError> {
        let mut list = Vec::new();
        for word in text.split(',').map(str::trim) {
            let more = match word {
                "auto" => AUTO.to_vec(),
                "shm" => vec![Transport::Shm],
                "dpdk" => vec![Transport::Dpdk],
                "tcp" => vec![Transport::Tcp],
                other => return Err(PreferenceError::Unknown(other.to_owned())),
            };
            for transport in more {
                if list.contains(&transport) {
                    return Err(PreferenceError::Twice(transport));
                }
                list.push(transport);
            }
        }
        Ok(Self(list))
    }
}

impl fmt::Display for Preference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, transport) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{transport}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Shm => "shm",
            Transport::Dpdk => "dpdk",
            Transport::Tcp => "tcp",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_transports() {
        assert_eq!("auto".parse(), Ok(Preference::default()));
        assert_eq!(
            "tcp, dpdk".parse(),
            Ok(Preference(vec![Transport::Tcp, Transport::Dpdk]))
        );
        assert_eq!("tcp".parse::<Preference>().unwrap().to_string(), "tcp");
        let unknown = "rdma".parse::<Preference>();
        assert_eq!(unknown, Err(PreferenceError::Unknown("rdma".into())));
        assert_eq!(
            "auto,tcp".parse::<Preference>(),
            Err(PreferenceError::Twice(Transport::Tcp))
        );
        assert!("".parse::<Preference>().is_err());
    }

    #[test]
    fn sessions_are_spread_over_the_queues_and_leave_them_again() {
        let mut transports = Transports::default();
        assert_eq!(transports.seat().queue(), 0);
        let mut add = |transport| {
            let config = tcp::Config {
                listen: ([127, 0, 0, 1], 0).into(),
                ..tcp::Config::default()
            };
            let (running, data) = tcp::spawn(config).unwrap();
            let local = Local::Tcp { data, streams: 1 };
            transports.add(transport, local, running).queue
        };
        // What stands for the two queues of a device, and a transport without.
        let queues = [Transport::Dpdk, Transport::Dpdk, Transport::Tcp].map(&mut add);
        assert_eq!(queues, [0, 1, 0]);
        let queues = |seats: &[Seat]| seats.iter().map(Seat::queue).collect::<Vec<_>>();
        let mut seats: Vec<_> = (0..5).map(|_| transports.seat()).collect();
        assert_eq!(queues(&seats), [0, 1, 0, 1, 0]);
        for seat in &seats {
            let queue = |transport| transports.engine_at(transport, seat).unwrap().queue;
            assert_eq!(queue(Transport::Dpdk), seat.queue());
            assert_eq!(queue(Transport::Tcp), 0);
            assert_eq!(transports.offers(seat).len(), 2);
        }
        // Two of three leave the first queue.
        seats.retain(|seat| seat.queue() == 1);
        seats.extend((0..2).map(|_| transports.seat()));
        assert_eq!(queues(&seats), [1, 1, 0, 0]);
        transports.stop();
    }

    #[test]
    fn an_unspecified_data_address_becomes_that_of_the_control_connection() {
        let tcp = |data: &str, streams| Local::Tcp {
            data: data.parse().unwrap(),
            streams,
        };
        let (theirs, ours) = (tcp("0.0.0.0:5556", 8), tcp("127.0.0.1:1", 2));
        let control = "10.1.2.3:5555".parse().unwrap();
        let keys = Keys {
            token: Token([0; 16]),
            secrets: None,
        };
        let remote = theirs.remote(&ours, SessionId(1), keys, Some(control));
        let Remote::Tcp(remote) = remote else {
            panic!("not TCP")
        };
        assert_eq!(
            remote.role,
            tcp::Role::Dial("10.1.2.3:5556".parse().unwrap())
        );
        assert_eq!(remote.streams, 2, "the smaller number");
    }
}
