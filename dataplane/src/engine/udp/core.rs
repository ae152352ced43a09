//! All of an engine but its device: its sessions, and what they have in common.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::SocketAddr;
use std::time::Instant;

use genie_proto::{Credit, SessionId, Time, wire};

use super::offer::Offer;
use super::piece::{Pieces, Returned};
use super::session::{self, Keeping, Session};
use super::slots::{Slots, SlotsError};
use super::{Config, Remote};
use crate::device::{BURST_MAX, Device, FrameId, HEAD_MAX, TxFrame};
use crate::engine::frame::{self, Head, Parsed};
use crate::engine::link::Link;
use crate::engine::{
    Completion, FailReason, IdleSnapshot, OpenError, OperationId, ResentSnapshot, SealedSnapshot,
    Status,
};
use crate::memory::View;

/// All of an engine but its device.
pub(super) struct Core {
    pub(super) config: Config,
    pub(super) link: Link,
    pub(super) sessions: HashMap<SessionId, Session, BuildHasherDefault<IdHasher>>,
    /// What their peers may have in flight.
    pub(super) credit: Credit,
    /// Frames the device has not taken yet: the first `sent` of them it has.
    pub(super) frames: Vec<TxFrame>,
    pub(super) sent: usize,
    /// Answers to ARP and neighbour discovery, and our own questions; bounded by
    /// [`ANSWERS_MAX`].
    pub(super) answers: VecDeque<Head>,
    /// How many sessions the next burst passes over before it begins, so that
    /// each has its turn however many there are.
    pub(super) turn: usize,
    /// Where sealed payloads are sent from; made for the first session that
    /// seals its packets.
    pub(super) slots: Option<Slots>,
    /// No slot was free: the device has to give some back.
    pub(super) starved: bool,
    /// Since when no session needs the slots that the device still has.
    pub(super) releasing: Option<Time>,
    /// Where packets are opened: as long as the longest, or empty.
    pub(super) private: Vec<u8>,
    /// What was done and is not taken yet. Bounded by the operations that the
    /// caller has under way.
    pub(super) completions: VecDeque<Completion>,
    /// Small tensors that arrived and are not taken yet; no more than slots.
    pub(super) offers: VecDeque<Offer>,
    /// Frames that are read in place; none where nothing can be.
    pub(super) pieces: Option<Pieces>,
    /// Frames that belong to no session or are not understood.
    pub(super) dropped: u64,
    pub(super) totals: Totals,
    pub(super) status: Status,
    /// How the thread spent its time, where the engine has one.
    pub(super) idle: Option<IdleSnapshot>,
    pub(super) published: Time,
    pub(super) started: Instant,
    pub(super) stopping: bool,
    /// Nothing was to be done in the last turn, and nothing came since: there
    /// is nothing to send before something is received or falls due.
    pub(super) quiet: bool,
    /// When time is looked at next.
    pub(super) upkeep_at: Time,
}

/// Hashes session ids: this end chooses them, at random, so no peer can have
/// them collide, and they are looked up for every packet.
#[derive(Debug, Default)]
pub(super) struct IdHasher(u64);

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
pub(super) struct Totals {
    /// Tensor bytes sent and verified, each once.
    pub(super) sent_bytes: u64,
    /// Tensor bytes received and verified, each once.
    pub(super) received_bytes: u64,
    /// Bytes that sessions copied which have ended.
    pub(super) copied_bytes: u64,
    /// Packets of sealed sessions which have ended that were not their peers'.
    pub(super) sealed: SealedSnapshot,
    /// Segments that sessions which have ended sent again.
    pub(super) resent: ResentSnapshot,
}

/// More unanswered questions than this at once are somebody's flood.
pub(super) const ANSWERS_MAX: usize = 64;

/// Answers in one burst: a flood of questions must not stop the tensors.
const ANSWERS_BURST: usize = 8;

impl Core {
    /// Whether there is something to send or to reap, of which no interrupt tells.
    pub(super) fn is_waiting_for_device(&self) -> bool {
        self.sent < self.frames.len()
            || self.starved
            || !self.answers.is_empty()
            || self.releasing.is_some()
            || self.sessions.values().any(Session::is_detaching)
    }

    /// Takes the slots back once no session needs them; returns whether the
    /// device has kept some for so long that it will not give them back.
    pub(super) fn release_slots(&mut self, now: Time, device: &mut dyn Device) -> bool {
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

    pub(super) fn now(&self) -> Time {
        Time(self.started.elapsed().as_nanos() as u64)
    }

    pub(super) fn open(
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
    pub(super) fn prepare_sealing(&mut self, device: &mut dyn Device) -> Result<(), SlotsError> {
        if self.slots.is_none() {
            self.slots = Some(Slots::new(device)?);
            self.private = vec![0; usize::from(u16::MAX)];
        }
        Ok(())
    }

    pub(super) fn refuse(&mut self, operation: OperationId, reason: FailReason) {
        self.completions.push_back(Completion::Transferred {
            operation,
            result: Err(reason),
        });
    }

    /// Returns whether the frame is to be kept under `id`.
    pub(super) fn handle_frame(&mut self, now: Time, frame: View<'_>, id: Option<FrameId>) -> bool {
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

    pub(super) fn is_mine(&self, address: SocketAddr) -> bool {
        address.port() == self.config.port && self.link.addresses().contains(&address.ip())
    }

    /// Returns whether the frame is to be kept under `id`; its tensor bytes
    /// begin at `begin` then.
    pub(super) fn handle_datagram(
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

    pub(super) fn handle_other(&mut self, frame: View<'_>) {
        let mut bytes = [0; HEAD_MAX];
        if frame.len() > bytes.len() || self.answers.len() >= ANSWERS_MAX {
            self.dropped += 1;
            return;
        }
        let have = frame.copy_to(&mut bytes);
        self.answers.extend(self.link.handle(&bytes[..have]));
    }

    /// Fills the transmit burst: answers on the link first, then each session's share.
    pub(super) fn fill_frames(&mut self, now: Time, device: &mut dyn Device) {
        self.frames.clear();
        self.sent = 0;
        self.starved = false;
        if !self.answers.is_empty() {
            let answers = self.answers.len().min(ANSWERS_BURST);
            let heads = self.answers.drain(..answers);
            self.frames.extend(heads.map(|head| TxFrame {
                head,
                payload: None,
            }));
        }
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
                    if !session.may_transmit(now) {
                        break;
                    }
                }
            }
        }
    }

    /// Drops frames that wait for the device and belong to transfers that have
    /// ended: their attachment may soon stand for other memory. To the protocol
    /// they are lost.
    pub(super) fn forget_frames_of_ended(&mut self) {
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

    /// The session whose reader had a frame, while there is one.
    pub(super) fn reader_of(&mut self, returned: Returned) -> Option<&mut Session> {
        self.sessions.get_mut(&returned.session?)
    }

    /// Gives the receive ring out anew among those who send.
    pub(super) fn balance(&mut self, now: Time) {
        let sessions = &mut self.sessions;
        self.credit.balance(now, |visit| {
            for session in sessions.values_mut() {
                session.show_credit(now, visit);
            }
        });
    }

    /// Forgets sessions that have ended and hold nothing any more.
    pub(super) fn remove_ended(&mut self, now: Time) {
        let Self {
            sessions,
            link,
            totals,
            pieces,
            ..
        } = self;
        sessions.retain(|id, session| {
            let keep = !session.is_finished(now);
            if !keep {
                totals.copied_bytes += session.copied_bytes();
                let last = session.snapshot();
                totals.sealed = totals.sealed.plus(last.sealed.unwrap_or_default());
                totals.resent = totals.resent.plus(last.resent.unwrap_or_default());
                link.forget(session.peer());
                if let Some(pieces) = pieces {
                    pieces.forget_session(*id);
                }
            }
            keep
        });
        // A neighbour that another session still uses is asked for again only
        // when that one is opened anew: its flow has the address already.
    }
}
