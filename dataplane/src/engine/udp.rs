//! The engine that speaks Genie's UDP protocol over a [`Device`].
//!
//! One thread owns the device, the link and every session's protocol state;
//! nothing in it is shared. [`Polled::turn`] is the whole of what it does: a
//! caller drives it on a thread of its own choice, or [`spawn`] on one that
//! sleeps when there is nothing to do, behind an [`Endpoint`](crate::endpoint::Endpoint).

#![forbid(unsafe_code)]

mod core;
mod offer;
mod piece;
mod publish;
mod queues;
mod session;
mod slots;
mod thread;
mod work;

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use genie_proto::seal::Secrets;
use genie_proto::{Credit, SessionId, Time};
use serde::{Deserialize, Serialize};

use self::core::{ANSWERS_MAX, Core, Totals};
use super::link::Link;
use super::{Completion, Status};
use crate::device::{BURST_MAX, Device};
use piece::Pieces;
use publish::{credit, first_credit};
use session::Session;

pub use offer::{Offer, OfferRefused, Offers};
pub use piece::{InPlace, InPlaceRefused, Piece};
pub use queues::{QueuesError, spawn_queues};
pub use thread::{SpawnError, spawn};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses it answers for on the device's link; none: the link-local one.
    pub addresses: Vec<IpAddr>,
    /// UDP port it listens on and sends from.
    pub port: u16,
    /// How long a path may stay unanswered before it counts as lost, and how
    /// long opening one may take.
    pub liveness: Duration,
    /// Scheduling priority of its thread: positive gives way to the control
    /// plane, which otherwise waits for milliseconds on a machine of two cores.
    pub nice: i32,
    /// Slots that each session's peer may send small tensors into. For engines
    /// that a caller drives: an [`Endpoint`](crate::endpoint::Endpoint) has
    /// nowhere to put them, and [`spawn`] grants none.
    pub offers: Offers,
    /// Frames that tensors may be read in. For engines that a caller drives, like
    /// the slots: [`spawn`] keeps none.
    pub in_place: InPlace,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            port: 5556,
            liveness: Duration::from_secs(2),
            nice: 10,
            offers: Offers::default(),
            in_place: InPlace::default(),
        }
    }
}

/// What a peer must know to reach this engine; travels in the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// The driver's name, such as `net_vhost`.
    pub driver: String,
    /// Addresses on the device's link, most preferred first.
    pub addresses: Vec<IpAddr>,
    /// UDP port.
    pub port: u16,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Packets the peer may have in flight toward us.
    pub credit: u16,
}

/// A peer's engine and its name for the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// Where it is.
    pub local: Local,
    /// The session id it chose.
    pub session: SessionId,
    /// What packets are sealed with, both ways; none: they are plain.
    pub secrets: Option<Secrets>,
}

/// An engine without a thread: its caller's is the one that drives it.
///
/// Work is given with [`Polled::handle_command`], done in [`Polled::turn`] and
/// answered by [`Polled::poll_completion`]; no ring is crossed and nobody is
/// woken. The caller chooses the ids of operations, sessions and of transfers
/// it receives, which [`Endpoint`](crate::endpoint::Endpoint) does for threads.
///
/// ```
/// use genie_dataplane::SessionId;
/// use genie_dataplane::device::pair::{Options, pair};
/// use genie_dataplane::engine::udp::{Config, Polled, Remote};
/// use genie_dataplane::engine::{Command, Completion, OperationId};
///
/// let (a, b) = pair(&Options::default());
/// let mut a = Polled::new(Config::default(), a);
/// let mut b = Polled::new(Config::default(), b);
/// let open = |engine: &mut Polled<_>, own, local, remote| {
///     let remote = Remote { local, session: SessionId(remote), secrets: None };
///     engine.handle_command(engine.now(), Command::Open {
///         operation: OperationId(1),
///         session: SessionId(own),
///         remote: genie_dataplane::engine::Remote::Udp(remote),
///         integrity: genie_dataplane::Integrity::Digest,
///     });
/// };
/// let (to_a, to_b) = (a.local(), b.local());
/// open(&mut a, 7, to_b, 8);
/// open(&mut b, 8, to_a, 7);
/// let completion = loop {
///     a.turn(a.now());
///     b.turn(b.now());
///     if let Some(completion) = a.poll_completion() {
///         break completion;
///     }
/// };
/// assert!(matches!(completion, Completion::Opened { result: Ok(_), .. }));
/// ```
pub struct Polled<D> {
    device: D,
    core: Core,
}

impl<D> std::fmt::Debug for Polled<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Polled").finish_non_exhaustive()
    }
}

/// How often timers, shares and what is published are looked at: far less than
/// the shortest timer, and so seldom that a turn that finds nothing costs little
/// more than the poll.
const UPKEEP_EVERY: Duration = Duration::from_micros(5);

impl<D: Device> Polled<D> {
    /// An engine over `device`; of `config` the scheduling priority is for
    /// engines with a thread.
    pub fn new(config: Config, device: D) -> Self {
        Self::with_status(config, device, Status::default())
    }

    fn with_status(config: Config, device: D, status: Status) -> Self {
        let link = Link::new(device.capabilities().mac, config.addresses.clone());
        let InPlace { frames, deadline } = config.in_place;
        let pieces = (frames > 0).then(|| Pieces::new(device.keepable(), deadline));
        let core = Core {
            pieces,
            credit: Credit::new(credit(device.capabilities().rx_descriptors)),
            config,
            link,
            sessions: HashMap::default(),
            frames: Vec::with_capacity(BURST_MAX),
            sent: 0,
            answers: VecDeque::with_capacity(ANSWERS_MAX),
            turn: 0,
            slots: None,
            starved: false,
            releasing: None,
            private: Vec::new(),
            completions: VecDeque::new(),
            offers: VecDeque::new(),
            dropped: 0,
            totals: Totals::default(),
            status,
            idle: None,
            published: Time::default(),
            started: Instant::now(),
            stopping: false,
            quiet: false,
            upkeep_at: Time::default(),
        };
        Self { device, core }
    }

    /// What peers must know to reach it.
    pub fn local(&self) -> Local {
        let capabilities = self.device.capabilities();
        Local {
            driver: capabilities.driver.clone(),
            addresses: self.core.link.addresses().to_vec(),
            port: self.core.config.port,
            mtu: capabilities.mtu,
            credit: first_credit(capabilities.rx_descriptors),
        }
    }

    /// What it publishes about itself, some times a second.
    pub fn status(&self) -> &Status {
        &self.core.status
    }

    /// The engine's clock, to be read once for a [`Polled::turn`].
    pub fn now(&self) -> Time {
        self.core.now()
    }

    /// One pass over the device and every session: sends what is due, receives
    /// a bounded number of frames, acts on timers. Returns whether it found
    /// work; when not, [`Polled::next_deadline`] says how long nothing but a
    /// frame or a command can change that.
    pub fn turn(&mut self, now: Time) -> bool {
        let upkeep = self.core.upkeep_at <= now;
        let quiet = self.core.quiet && !upkeep;
        // Before receiving, so that what the caller has answered leaves first.
        let mut busy = !quiet && self.transmit(now);
        busy |= self.receive(now);
        if quiet && !busy {
            return false;
        }
        if upkeep {
            busy |= self.keep_up(now);
        }
        busy |= self.settle(now);
        self.core.quiet = !busy && !self.core.is_waiting_for_device();
        busy
    }

    /// What time alone makes due.
    fn keep_up(&mut self, now: Time) -> bool {
        self.core.upkeep_at = now + UPKEEP_EVERY;
        if self.core.stopping {
            self.close_all();
        }
        let due = self.handle_timeouts(now);
        self.take_unread(now);
        self.core.remove_ended(now);
        self.core.balance(now);
        self.publish(now);
        due
    }

    /// The next thing that was done, or could not be.
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.core.completions.pop_front()
    }

    /// When a timer wants the next [`Polled::turn`], if one runs.
    pub fn next_deadline(&self) -> Option<Time> {
        self.core
            .sessions
            .values()
            .filter_map(Session::next_timeout)
            .chain(self.core.releasing.map(|at| at + session::STUCK_LIMIT))
            .chain(self.core.pieces.as_ref().and_then(Pieces::due))
            .min()
    }

    /// Whether [`Command::Stop`](super::Command::Stop) was obeyed: no session is left, every lease was
    /// given back, every completion taken.
    pub fn is_finished(&self) -> bool {
        self.core.stopping && self.core.sessions.is_empty() && self.core.completions.is_empty()
    }

    fn close_all(&mut self) {
        self.core
            .sessions
            .values_mut()
            .for_each(|session| session.close());
    }

    fn receive(&mut self, now: Time) -> bool {
        let Self { device, core, .. } = self;
        let mut any = false;
        // Two bursts, so that acknowledgements are made for more packets at
        // once, but commands and transmission are not kept waiting.
        for _ in 0..2 {
            let count = if core.pieces.is_some() {
                device.rx_burst_keeping(&mut |frame, id| core.handle_frame(now, frame, id))
            } else {
                device.rx_burst(&mut |frame| {
                    core.handle_frame(now, frame, None);
                })
            };
            any |= count > 0;
            if count < BURST_MAX {
                break;
            }
        }
        core.quiet &= !any;
        any
    }

    /// Returns whether anything was due, so that there may be something to send.
    fn handle_timeouts(&mut self, now: Time) -> bool {
        let Core {
            sessions,
            link,
            answers,
            ..
        } = &mut self.core;
        let mut any = false;
        for session in sessions.values_mut() {
            let (due, question) = session.handle_timeout(now, link);
            any |= due;
            if let Some(question) = question
                && answers.len() < ANSWERS_MAX
            {
                answers.push_back(question);
            }
        }
        any
    }

    fn transmit(&mut self, now: Time) -> bool {
        let Self { device, core, .. } = self;
        if core.sent == core.frames.len() {
            core.fill_frames(now, device);
            if core.starved {
                device.reap();
            }
        }
        if core.frames.is_empty() {
            return false;
        }
        let taken = device.tx_burst(&core.frames[core.sent..]);
        core.sent += taken;
        taken > 0
    }

    /// Completes what ended and gives memory back that nothing refers to any more;
    /// returns whether anything ended, or came.
    fn settle(&mut self, now: Time) -> bool {
        let Self { device, core, .. } = self;
        let copying = session::Copying::of(device.capabilities());
        let (mut any, mut detaching) = (false, false);
        for session in core.sessions.values_mut() {
            any |= session.take_events(
                now,
                copying,
                &mut core.totals,
                &mut core.completions,
                &mut core.offers,
            );
            detaching |= session.is_detaching();
        }
        if detaching {
            core.forget_frames_of_ended();
            device.reap();
            for session in core.sessions.values_mut() {
                session.detach(device, &mut core.completions);
            }
        }
        if core.release_slots(now, device)
            || detaching && core.sessions.values().any(|session| session.is_stuck(now))
        {
            self.fail(now);
        }
        any
    }

    /// Ends an engine whose device does not give memory back: the queue is
    /// stopped, which makes it, and every session with it.
    fn fail(&mut self, now: Time) {
        let Self { device, core, .. } = self;
        // Of several queues the others may not have left yet.
        if !device.is_stopped() {
            tracing::error!(
                driver = device.capabilities().driver,
                "the transmit queue is stuck: the device is stopped, and its engine with it"
            );
            device.stop();
        }
        core.stopping = true;
        let copying = session::Copying::of(device.capabilities());
        for session in core.sessions.values_mut() {
            session.close();
            session.take_events(
                now,
                copying,
                &mut core.totals,
                &mut core.completions,
                &mut core.offers,
            );
            session.detach(device, &mut core.completions);
        }
    }
}
