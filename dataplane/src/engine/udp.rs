//! The engine that speaks Genie's UDP protocol over a [`Device`].
//!
//! One thread owns the device, the link and every session's protocol state;
//! nothing in it is shared. [`Polled::turn`] is the whole of what it does: a
//! caller drives it on a thread of its own choice, or [`spawn`] on one that
//! sleeps when there is nothing to do, behind an [`Endpoint`](crate::endpoint::Endpoint).

#![forbid(unsafe_code)]

mod offer;
mod piece;
mod queues;
mod session;
mod slots;
mod thread;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use genie_proto::seal::Secrets;
use genie_proto::wire::Metadata;
use genie_proto::{Credit, OfferError, SessionId, Time, TransferId, wire};
use serde::{Deserialize, Serialize};

use super::frame::{self, Head, Parsed};
use super::link::Link;
use super::{
    Command, Completion, FailReason, IdleSnapshot, OpenError, OperationId, ResentSnapshot,
    RingSnapshot, SealedSnapshot, Status,
};
use crate::device::{BURST_MAX, Device, FrameId, HEAD_MAX, TxFrame};
use crate::memory::{Lease, View};
use piece::{Pieces, Returned};
use session::{Keeping, Session};
use slots::{Slots, SlotsError};

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

/// All of an engine but its device.
struct Core {
    config: Config,
    link: Link,
    sessions: HashMap<SessionId, Session, BuildHasherDefault<IdHasher>>,
    /// What their peers may have in flight.
    credit: Credit,
    /// Frames the device has not taken yet: the first `sent` of them it has.
    frames: Vec<TxFrame>,
    sent: usize,
    /// Answers to ARP and neighbour discovery, and our own questions; bounded by
    /// [`ANSWERS_MAX`].
    answers: VecDeque<Head>,
    /// How many sessions the next burst passes over before it begins, so that
    /// each has its turn however many there are.
    turn: usize,
    /// Where sealed payloads are sent from; made for the first session that
    /// seals its packets.
    slots: Option<Slots>,
    /// No slot was free: the device has to give some back.
    starved: bool,
    /// Since when no session needs the slots that the device still has.
    releasing: Option<Time>,
    /// Where packets are opened: as long as the longest, or empty.
    private: Vec<u8>,
    /// What was done and is not taken yet. Bounded by the operations that the
    /// caller has under way.
    completions: VecDeque<Completion>,
    /// Small tensors that arrived and are not taken yet; no more than slots.
    offers: VecDeque<Offer>,
    /// Frames that are read in place; none where nothing can be.
    pieces: Option<Pieces>,
    /// Frames that belong to no session or are not understood.
    dropped: u64,
    totals: Totals,
    status: Status,
    /// How the thread spent its time, where the engine has one.
    idle: Option<IdleSnapshot>,
    published: Time,
    started: Instant,
    stopping: bool,
    /// Nothing was to be done in the last turn, and nothing came since: there
    /// is nothing to send before something is received or falls due.
    quiet: bool,
    /// When time is looked at next.
    upkeep_at: Time,
}

/// How often timers, shares and what is published are looked at: far less than
/// the shortest timer, and so seldom that a turn that finds nothing costs little
/// more than the poll.
const UPKEEP_EVERY: Duration = Duration::from_micros(5);

/// Hashes session ids: this end chooses them, at random, so no peer can have
/// them collide, and they are looked up for every packet.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        // Fibonacci hashing (Knuth, volume 3, section 6.4): the table uses the
        // highest bits and the lowest, so both halves of the product.
        let product = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Counts over all sessions, ended ones included.
#[derive(Debug, Default)]
struct Totals {
    /// Tensor bytes sent and verified, each once.
    sent_bytes: u64,
    /// Tensor bytes received and verified, each once.
    received_bytes: u64,
    /// Bytes that sessions copied which have ended.
    copied_bytes: u64,
    /// Packets of sealed sessions which have ended that were not their peers'.
    sealed: SealedSnapshot,
    /// Segments that sessions which have ended sent again.
    resent: ResentSnapshot,
}

/// More unanswered questions than this at once are somebody's flood.
const ANSWERS_MAX: usize = 64;

/// Answers in one burst: a flood of questions must not stop the tensors.
const ANSWERS_BURST: usize = 8;

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
        self.settle(now);
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

    /// Sends a small tensor into a slot that the peer granted beforehand: one
    /// packet, one round trip, no transfer to be asked for. Answered by
    /// [`Completion::Transferred`] once the peer has it, verified.
    ///
    /// Refused, with its lease, where no slot is left or the tensor is too long:
    /// the ordinary way is open then. `operation` is to be unique in its session.
    pub fn offer(
        &mut self,
        session: SessionId,
        operation: OperationId,
        metadata: Metadata,
        from: Lease,
    ) -> Result<TransferId, OfferRefused> {
        let Self { device, core } = self;
        core.quiet = false;
        match core.sessions.get_mut(&session) {
            Some(session) => session.offer(operation, metadata, from, device),
            None => Err(OfferRefused {
                from,
                reason: OfferError::Closed,
            }),
        }
    }

    /// The next small tensor that arrived unasked and was verified.
    pub fn poll_offer(&mut self) -> Option<Offer> {
        self.core.offers.pop_front()
    }

    /// The bytes of a small tensor; none once its session has ended.
    pub fn offered(&self, offer: &Offer) -> Option<View<'_>> {
        self.core.sessions.get(&offer.session())?.offered(offer)
    }

    /// Gives the slot of a small tensor back, for its peer to use again.
    pub fn release(&mut self, offer: Offer) {
        self.core.quiet = false;
        if let Some(session) = self.core.sessions.get_mut(&offer.session()) {
            session.release(offer);
        }
    }

    /// Expects a tensor of `len` bytes that is read where the device put it: no
    /// copy is made at this end. Answered by [`Completion::Transferred`] like any
    /// other transfer, by when all its pieces are there to be polled.
    ///
    /// Each piece was verified before it is shown, and again with all others
    /// when the transfer ends. Where somebody else can write into the device's
    /// buffers (the process behind a vhost-user or memif socket) what was
    /// verified can change while it is read; copies do not have that.
    pub fn receive_in_place(
        &mut self,
        session: SessionId,
        operation: OperationId,
        transfer: TransferId,
        len: u64,
    ) -> Result<(), InPlaceRefused> {
        let Self { device, core } = self;
        let wanted = u32::from(core.config.in_place.frames);
        let taken: u32 = core.sessions.values().map(Session::frames_to_read).sum();
        let left = device.keepable().saturating_sub(taken);
        let session = core.sessions.get_mut(&session);
        let session = session.ok_or(InPlaceRefused::NotOpen)?;
        core.quiet = false;
        session.receive_in_place(operation, transfer, len, wanted, left)
    }

    /// The next piece that arrived of a tensor that is read in place, in any order.
    pub fn poll_piece(&mut self) -> Option<Piece> {
        self.core.pieces.as_mut()?.poll()
    }

    /// The bytes of a piece; none once its deadline is over.
    pub fn piece(&self, piece: &Piece) -> Option<View<'_>> {
        let pieces = self.core.pieces.as_ref()?;
        if !pieces.has(piece) {
            return None;
        }
        self.device.kept(piece.frame()).slice(piece.range())
    }

    /// Gives the frame of a piece back to the device.
    pub fn release_piece(&mut self, piece: Piece) {
        let pieces = self.core.pieces.as_mut();
        if let Some(returned) = pieces.and_then(|pieces| pieces.release(&piece)) {
            self.give_back(returned);
        }
    }

    fn give_back(&mut self, returned: Returned) {
        self.core.quiet = false;
        self.device.give_back(returned.frame);
        if let Some(session) = self.core.sessions.get_mut(&returned.session) {
            session.frame_given_back();
        }
    }

    /// Takes frames back that were read for too long.
    fn take_unread(&mut self, now: Time) {
        let limit = self.core.config.in_place.deadline;
        let expire = |core: &mut Core| core.pieces.as_mut()?.expire(now);
        while let Some(returned) = expire(&mut self.core) {
            if let Some(session) = self.core.sessions.get_mut(&returned.session) {
                session.frame_unread(returned.transfer, limit);
            }
            self.give_back(returned);
        }
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

    /// Whether [`Command::Stop`] was obeyed: no session is left, every lease was
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

    /// Begins something; what comes of it is told by [`Polled::poll_completion`].
    pub fn handle_command(&mut self, now: Time, command: Command) {
        self.core.quiet = false;
        let Self { device, core, .. } = self;
        match command {
            Command::Open {
                operation,
                session,
                remote: super::Remote::Udp(remote),
                integrity,
            } => {
                let capabilities = device.capabilities();
                let own = session::Own {
                    mtu: capabilities.mtu,
                    credit: first_credit(capabilities.rx_descriptors),
                    integrity,
                    offers: core.config.offers,
                };
                let sealing = match remote.secrets {
                    Some(_) => core.prepare_sealing(device),
                    None => Ok(()),
                };
                match sealing {
                    Ok(()) => core.open(now, operation, session, remote, own),
                    Err(error) => {
                        let reason = format!("sealed packets cannot be sent: {error}");
                        let result = Err(OpenError::Refused(reason));
                        core.completions
                            .push_back(Completion::Opened { operation, result });
                    }
                }
            }
            Command::Open { operation, .. } => {
                let result = Err(OpenError::NoCommonAddress);
                core.completions
                    .push_back(Completion::Opened { operation, result });
            }
            Command::Receive {
                operation,
                session,
                transfer,
                into,
                resume,
            } => match core.sessions.get_mut(&session) {
                Some(session) => {
                    session.receive(operation, transfer, into, resume, &mut core.completions);
                }
                None => core.refuse(operation, FailReason::Closed),
            },
            Command::Send {
                operation,
                session,
                transfer,
                from,
                resume,
            } => match core.sessions.get_mut(&session) {
                Some(session) => {
                    session.send(
                        operation,
                        transfer,
                        from,
                        resume,
                        device,
                        &mut core.completions,
                    );
                }
                None => core.refuse(operation, FailReason::Closed),
            },
            Command::Cancel {
                session,
                transfer,
                outgoing,
            } => {
                if let Some(session) = core.sessions.get_mut(&session) {
                    session.cancel(transfer, outgoing);
                }
            }
            Command::Close { session } => {
                if let Some(session) = core.sessions.get_mut(&session) {
                    session.close();
                }
            }
            Command::Stop => core.stopping = true,
        }
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

    /// Completes what ended and gives memory back that nothing refers to any more.
    fn settle(&mut self, now: Time) {
        let Self { device, core, .. } = self;
        let copying = session::Copying::of(device.capabilities());
        let mut detaching = false;
        for session in core.sessions.values_mut() {
            session.take_events(
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

    fn publish(&mut self, now: Time) {
        let Self { device, core, .. } = self;
        if now.since(core.published) < super::status::PUBLISH_EVERY {
            return;
        }
        core.published = now;
        device.sweep();
        // By another queue's owner: sessions are lost as on a link that is down.
        core.stopping |= device.is_stopped() && core.sessions.is_empty();
        core.status.publish(|snapshot| {
            snapshot.driver.clone_from(&device.capabilities().driver);
            if snapshot.mtu.is_none() {
                snapshot.cautions = device.cautions();
                snapshot.lacks = device.lacks();
                snapshot.mtu = Some(device.capabilities().mtu);
            }
            snapshot.port = Some(device.counters());
            snapshot.tap = device.tap();
            snapshot.dropped = core.dropped;
            snapshot.sent_bytes = core.totals.sent_bytes;
            snapshot.received_bytes = core.totals.received_bytes;
            snapshot.copies = device.copies();
            snapshot.copies.genie += core.totals.copied_bytes;
            snapshot.sealed = core.totals.sealed;
            snapshot.idle = core.idle;
            snapshot.steering = device.steering();
            let mut resent = core.totals.resent;
            let mut ring = ring(device.capabilities().rx_descriptors);
            snapshot.sessions.clear();
            for session in core.sessions.values() {
                snapshot.copies.genie += session.copied_bytes();
                let session = session.snapshot();
                let sealed = session.sealed.unwrap_or_default();
                snapshot.sealed = snapshot.sealed.plus(sealed);
                resent = resent.plus(session.resent.unwrap_or_default());
                ring.granted += session.granted.unwrap_or(0);
                snapshot.sessions.push(session);
            }
            snapshot.resent = Some(resent);
            snapshot.ring = Some(ring);
        });
    }
}

/// Packets that all peers may have in flight: half the receive ring, so that
/// our own late polling loses nothing, nor peers whose shares just change.
fn credit(rx_descriptors: u16) -> u32 {
    u32::from(rx_descriptors / 2).max(1)
}

/// An empty receive ring of this length.
fn ring(rx_descriptors: u16) -> RingSnapshot {
    RingSnapshot {
        frames: rx_descriptors.into(),
        credit: credit(rx_descriptors).into(),
        granted: 0,
    }
}

/// What a peer begins with.
fn first_credit(rx_descriptors: u16) -> u16 {
    let first = Credit::first(credit(rx_descriptors));
    first.try_into().unwrap_or(u16::MAX)
}

impl Core {
    /// Whether there is something to send or to reap, of which no interrupt tells.
    fn is_waiting_for_device(&self) -> bool {
        self.sent < self.frames.len()
            || self.starved
            || !self.answers.is_empty()
            || self.releasing.is_some()
            || self.sessions.values().any(Session::is_detaching)
    }

    /// Takes the slots back once no session needs them; returns whether the
    /// device has kept some for so long that it will not give them back.
    fn release_slots(&mut self, now: Time, device: &mut dyn Device) -> bool {
        let Some(slots) = &mut self.slots else {
            return false;
        };
        let needs = |session: &Session| session.is_sealed() && !session.is_ended();
        if slots.are_released() || self.sessions.values().any(needs) {
            self.releasing = None;
            return false;
        }
        // What still waits belongs to sessions that have ended.
        self.frames.drain(..self.sent);
        self.sent = 0;
        let holds = |frame: &TxFrame| frame.payload.map(|payload| slots.holds(payload.attachment));
        self.frames.retain(|frame| holds(frame) != Some(true));
        device.reap();
        if slots.release(device) {
            self.releasing = None;
            return false;
        }
        let since = *self.releasing.get_or_insert(now);
        now.since(since) >= session::STUCK_LIMIT
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed().as_nanos() as u64)
    }

    fn open(
        &mut self,
        now: Time,
        operation: OperationId,
        id: SessionId,
        remote: Remote,
        own: session::Own,
    ) {
        let Some((address, peer)) = self.link.choose(&remote.local.addresses) else {
            let result = Err(OpenError::NoCommonAddress);
            return self
                .completions
                .push_back(Completion::Opened { operation, result });
        };
        let address = SocketAddr::new(address, self.config.port);
        let peer = SocketAddr::new(peer, remote.local.port);
        if self.sessions.contains_key(&id) {
            let result = Err(OpenError::Refused("the session is open already".into()));
            return self
                .completions
                .push_back(Completion::Opened { operation, result });
        }
        let opening = session::Opening {
            operation,
            own: address,
            peer,
            limit: self.config.liveness,
        };
        match Session::new(now, id, &remote, opening, own) {
            Ok(session) => drop(self.sessions.insert(id, session)),
            Err(error) => {
                let reason = format!("no memory for small tensors: {error}");
                let result = Err(OpenError::Refused(reason));
                self.completions
                    .push_back(Completion::Opened { operation, result });
            }
        }
    }

    /// Makes all that sealing takes, so that no packet has to.
    fn prepare_sealing(&mut self, device: &mut dyn Device) -> Result<(), SlotsError> {
        if self.slots.is_none() {
            self.slots = Some(Slots::new(device)?);
            self.private = vec![0; usize::from(u16::MAX)];
        }
        Ok(())
    }

    fn refuse(&mut self, operation: OperationId, reason: FailReason) {
        self.completions.push_back(Completion::Transferred {
            operation,
            result: Err(reason),
        });
    }

    /// Returns whether the frame is to be kept under `id`.
    fn handle_frame(&mut self, now: Time, frame: View<'_>, id: Option<FrameId>) -> bool {
        let mut head = [0; frame::HEADERS_MAX];
        let have = frame.copy_to(&mut head);
        match frame::parse(&head[..have], frame.len()) {
            Parsed::Datagram(datagram) if self.is_mine(datagram.to) => {
                let payload = datagram.payload_at..datagram.payload_at + datagram.payload_len;
                let begin = datagram.payload_at + wire::HEADER_LEN;
                match frame.slice(payload) {
                    Some(payload) => {
                        return self.handle_datagram(now, datagram.from, payload, (id, begin));
                    }
                    None => self.dropped += 1,
                }
            }
            Parsed::Other => self.handle_other(frame),
            Parsed::Datagram(_) | Parsed::Bad => self.dropped += 1,
        }
        false
    }

    fn is_mine(&self, address: SocketAddr) -> bool {
        address.port() == self.config.port && self.link.addresses().contains(&address.ip())
    }

    /// Returns whether the frame is to be kept under `id`; its tensor bytes
    /// begin at `begin` then.
    fn handle_datagram(
        &mut self,
        now: Time,
        from: SocketAddr,
        datagram: View<'_>,
        (id, begin): (Option<FrameId>, usize),
    ) -> bool {
        let mut header = [0; wire::HEADER_LEN];
        let have = datagram.copy_to(&mut header);
        let session = wire::peek_session(&header[..have]);
        let mut keeping = Keeping {
            is_possible: id.is_some(),
            segment: None,
        };
        let found = session.and_then(|id| Some((id, self.sessions.get_mut(&id)?)));
        let Some((session, found)) = found.filter(|(_, found)| found.is_from(from)) else {
            self.dropped += 1;
            return false;
        };
        let private = &mut self.private;
        found.handle_datagram(now, &header[..have], datagram, private, &mut keeping);
        let (Some(segment), Some(id), Some(pieces)) = (keeping.segment, id, &mut self.pieces)
        else {
            return false;
        };
        pieces.keep(now, session, segment, id, begin);
        true
    }

    fn handle_other(&mut self, frame: View<'_>) {
        let mut bytes = [0; HEAD_MAX];
        if frame.len() > bytes.len() || self.answers.len() >= ANSWERS_MAX {
            self.dropped += 1;
            return;
        }
        let have = frame.copy_to(&mut bytes);
        self.answers.extend(self.link.handle(&bytes[..have]));
    }

    /// Fills the transmit burst: answers on the link first, then each session's share.
    fn fill_frames(&mut self, now: Time, device: &mut dyn Device) {
        self.frames.clear();
        self.sent = 0;
        self.starved = false;
        let answers = self.answers.len().min(ANSWERS_BURST);
        let heads = self.answers.drain(..answers);
        self.frames.extend(heads.map(|head| TxFrame {
            head,
            payload: None,
        }));
        let count = self.sessions.len();
        if count == 0 {
            return;
        }
        let share = ((BURST_MAX - self.frames.len()) / count).max(1);
        let first = self.turn % count;
        // Twice round the same order: from `first` to the end, then to `first`.
        for (pass, skip) in [first, 0].into_iter().enumerate() {
            let take = if pass == 0 { count - first } else { first };
            if take == 0 {
                continue;
            }
            for session in self.sessions.values_mut().skip(skip).take(take) {
                let most = BURST_MAX.min(self.frames.len() + share);
                if self.frames.len() == BURST_MAX {
                    return;
                }
                self.turn += 1;
                let mut slots = self.slots.as_mut().filter(|_| session.is_sealed());
                while self.frames.len() < most {
                    if let Some(slots) = &mut slots
                        && !slots.prepare(device)
                    {
                        self.starved = true;
                        break;
                    }
                    // Written where it stays: a frame has room for a whole packet.
                    self.frames.push(TxFrame::default());
                    let frame = self.frames.last_mut().expect("pushed just now");
                    if !session.poll_transmit(now, slots.as_deref_mut(), frame) {
                        self.frames.pop();
                        break;
                    }
                }
            }
        }
    }

    /// Drops frames that wait for the device and belong to transfers that have
    /// ended: their attachment may soon stand for other memory. To the protocol
    /// they are lost.
    fn forget_frames_of_ended(&mut self) {
        let Self {
            frames,
            sent,
            sessions,
            ..
        } = self;
        frames.drain(..*sent);
        *sent = 0;
        frames.retain(|frame| {
            let ended = |attachment| {
                sessions
                    .values()
                    .any(|session| session.detaches(attachment))
            };
            frame
                .payload
                .is_none_or(|payload| !ended(payload.attachment))
        });
    }

    /// Gives the receive ring out anew among those who send.
    fn balance(&mut self, now: Time) {
        let sessions = &mut self.sessions;
        self.credit.balance(now, |visit| {
            for session in sessions.values_mut() {
                session.show_credit(now, visit);
            }
        });
    }

    /// Forgets sessions that have ended and hold nothing any more.
    fn remove_ended(&mut self, now: Time) {
        let Self {
            sessions,
            link,
            totals,
            ..
        } = self;
        sessions.retain(|_, session| {
            let keep = !session.is_finished(now);
            if !keep {
                totals.copied_bytes += session.copied_bytes();
                let last = session.snapshot();
                totals.sealed = totals.sealed.plus(last.sealed.unwrap_or_default());
                totals.resent = totals.resent.plus(last.resent.unwrap_or_default());
                link.forget(session.peer());
            }
            keep
        });
        // A neighbour that another session still uses is asked for again only
        // when that one is opened anew: its flow has the address already.
    }
}
