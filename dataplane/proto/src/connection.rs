//! The state machine of one session on one path.
//!
//! An engine owns it and drives it: datagrams and time go in, datagrams and
//! events come out. Its invariants: every transfer accepted ends in exactly one
//! event; a destination is written only inside its grant, only where nothing
//! verified is yet; nothing waits for ever on a peer that is silent.
//!
//! Everything but DATA's bytes is small and reliable: DATA, OFFER, GRANT, DONE,
//! DONE_ACK, PROBE, PROBE_ACK and the RESET of a transfer ask for an acknowledgement, and
//! what a lost packet carried is sent again under a new number. So there is one
//! timer for all of it, and no message needs one of its own.

use std::collections::VecDeque;

use arrayvec::ArrayVec;

use crate::congestion::Controller;
use crate::id::{Segment, SessionId, TransferId};
use crate::time::Time;
use crate::transfer::{Incoming, LEN_MAX, Outgoing};
use crate::wire::{AckRange, CONTROL_MAX, DoneAck, HEADER_LEN, Metadata, OFFER_LEN, Scope};

mod config;
mod event;
mod inbound;
mod offered;
mod offering;
mod outbound;
mod received;
mod receiving;
mod rtt;
mod sending;
mod sent;
mod stats;
mod timeout;

pub use config::Config;
pub use event::{CloseReason, Event, FailReason, PathLostReason, Violation};
pub use offering::OfferError;
pub use stats::{DropCause, Retransmits, Stats};

use event::code;
use offered::Offered;
use offering::Offering;
use received::Received;
use receiving::Receiving;
use rtt::Rtt;
use sending::Sending;
use sent::{LossCause, SentPacket, SentPackets};

/// Probes outstanding at a time that an answer is matched to.
const PROBES_MAX: usize = 4;

/// One end of a session on one path.
///
/// May be moved between threads, and is used by one at a time.
#[derive(Debug)]
pub struct Connection {
    config: Config,
    local: SessionId,
    remote: SessionId,
    state: State,
    receiving: Receiving,
    sending: Sending,
    /// Small tensors in one packet each, to the peer and from it.
    offering: Offering,
    offered: Offered,
    received: Received,
    sent: SentPackets,
    rtt: Rtt,
    controller: Box<dyn Controller>,
    /// Packets the peer lets us have in flight, and the number of the ACK that said so.
    credit: u32,
    credit_from: u64,
    /// Packets that there is room for, where that bounds what the peer may send.
    room: u32,
    /// What the last offer acknowledged, and when it came; not acted on yet.
    run: Option<(Time, AckRange)>,
    /// The window or the credit kept us from sending since the last ACK.
    limited: bool,
    controls: VecDeque<Control>,
    /// A probe goes before them.
    probe_due: bool,
    /// Packets that may be sent beyond the window: probe timeouts and liveness.
    extra: u32,
    pto_count: u32,
    probes: ArrayVec<(u64, Time), PROBES_MAX>,
    /// The application waits for a probe's answer.
    probe_wanted: bool,
    tokens: u64,
    /// When the peer was last heard, or something began to be under way. None
    /// while nothing is.
    alive: Option<Time>,
    /// When the peer was last heard, if ever.
    heard: Option<Time>,
    /// When a transfer last moved, or one began. None while none is under way.
    moved: Option<Time>,
    events: VecDeque<Event>,
    stats: Stats,
    /// Kept for their capacity.
    acked: Vec<SentPacket>,
    lost: Vec<(SentPacket, LossCause)>,
}

/// ```text
/// Open ─close, violation─→ Closed (tells the peer, again when it goes on)
///   ├──RESET of the session──────→ Quiet
///   └──path lost─────────────────→ Quiet
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// `due`: a RESET is to be sent; `heard`: datagrams that came since.
    Closed {
        code: u16,
        due: bool,
        heard: u64,
    },
    Quiet,
}

/// A message that is sent until it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Control {
    Done(TransferId),
    DoneAck(TransferId, DoneAck),
    Reset(TransferId, Scope, u16),
    Probe,
    ProbeAck(u64),
    Grant,
}

/// A datagram to send: the bytes of `head`, then those of `payload`.
#[derive(Clone, Debug)]
pub struct Transmit {
    /// A header, and the whole payload of a control packet.
    pub head: ArrayVec<u8, { HEADER_LEN + CONTROL_MAX }>,
    /// The part of the source that follows, to be sent from where it lies.
    pub payload: Option<Segment>,
}

/// Why a transfer cannot be begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The session is over.
    #[error("the session is over")]
    Closed,
    /// The slot number is too large for [`Config::slots_max`].
    #[error("slot {slot} is not below {slots_max}")]
    SlotOutOfRange {
        /// The slot.
        slot: u32,
        /// The limit.
        slots_max: u32,
    },
    /// The slot's transfer is not over.
    #[error("slot {} is in use", .0.slot)]
    SlotBusy(TransferId),
    /// The slot was used under this generation or a later one.
    #[error("slot {} was used under generation {last}, {} is not later", .id.slot, .id.generation)]
    StaleGeneration {
        /// What was asked for.
        id: TransferId,
        /// The generation used last.
        last: u32,
    },
    /// Longer than [`LEN_MAX`] or than memory for its bitmap.
    #[error("a transfer of {0} bytes is too long (limit {LEN_MAX}, or memory)")]
    TooLong(u64),
}

impl Connection {
    /// A connection whose peer calls the session `remote` and is to call it `local`.
    pub fn new(config: Config, local: SessionId, remote: SessionId, _now: Time) -> Self {
        let packet_bytes = u64::from(config.datagram_max.max(Config::DATAGRAM_MIN));
        Self {
            local,
            remote,
            state: State::Open,
            receiving: Receiving::default(),
            sending: Sending::default(),
            offering: Offering::default(),
            offered: Offered::new(config.offers, config.offer_len_max),
            received: Received::new(config.ack_every, config.ack_delay_max),
            sent: SentPackets::default(),
            rtt: Rtt::new(&config),
            controller: config.congestion.build(packet_bytes),
            credit: config.remote_credit,
            credit_from: 0,
            room: u32::MAX,
            run: None,
            limited: false,
            controls: VecDeque::new(),
            probe_due: false,
            extra: 0,
            pto_count: 0,
            probes: ArrayVec::new(),
            probe_wanted: false,
            tokens: config.seed,
            alive: None,
            heard: None,
            moved: None,
            events: VecDeque::new(),
            stats: Stats::default(),
            acked: Vec::new(),
            lost: Vec::new(),
            config,
        }
    }

    /// The id that the peer puts into its packets.
    pub fn local(&self) -> SessionId {
        self.local
    }

    /// Expects a transfer of exactly `len` bytes, before the peer learns of `id`:
    /// data that comes earlier is dropped and has to be sent again.
    pub fn receive(&mut self, id: TransferId, len: u64) -> Result<(), TransferError> {
        let incoming = Incoming::new(len).map_err(|_| TransferError::TooLong(len))?;
        self.resume_receive(id, incoming)
    }

    /// [`Connection::receive`], going on from what another path brought. Of a
    /// transfer with bytes at least one must be missing, or its end is never said.
    pub fn resume_receive(
        &mut self,
        id: TransferId,
        incoming: Incoming,
    ) -> Result<(), TransferError> {
        self.check_open()?;
        self.receiving.grant(id, incoming, self.config.slots_max)
    }

    /// Sends a transfer of exactly `len` bytes that the peer granted as `id`.
    pub fn send(&mut self, id: TransferId, len: u64) -> Result<(), TransferError> {
        self.resume_send(id, Outgoing::new(len))
    }

    /// [`Connection::send`], going on from what another path carried:
    /// [`Outgoing::resume`] has been told what the receiver lacks.
    pub fn resume_send(&mut self, id: TransferId, outgoing: Outgoing) -> Result<(), TransferError> {
        self.check_open()?;
        let replaced = self.sending.begin(id, outgoing, self.config.slots_max)?;
        self.events.extend(replaced);
        Ok(())
    }

    /// Sends a tensor of `len` bytes in one packet, into a slot that the peer
    /// granted beforehand. It ends as [`Event::Sent`] once it is applied and
    /// verified there, under the id returned.
    pub fn offer(&mut self, len: u64, metadata: Metadata) -> Result<TransferId, OfferError> {
        self.check_offer(len, metadata.len())?;
        Ok(self.offering.begin(len as u32, metadata))
    }

    /// Whether [`Connection::offer`] would be taken now, with so many bytes of
    /// metadata.
    pub fn check_offer(&self, len: u64, metadata_len: usize) -> Result<(), OfferError> {
        if self.state != State::Open {
            return Err(OfferError::Closed);
        }
        let datagram = u64::from(self.config.datagram_max.max(Config::DATAGRAM_MIN));
        let before = (HEADER_LEN + OFFER_LEN + metadata_len) as u64;
        self.offering.check(len, datagram.saturating_sub(before))
    }

    /// Gives the slot of an [`Event::Offered`] back, for the peer to use; false
    /// if nothing is in it.
    pub fn release(&mut self, slot: u32) -> bool {
        let released = self.offered.release(slot);
        self.tell_offers();
        released
    }

    /// What had moved of an incoming transfer that failed because the whole
    /// connection ended; once.
    pub fn take_incoming(&mut self, id: TransferId) -> Option<Incoming> {
        self.receiving.take_interrupted(id)
    }

    /// What had moved of an outgoing transfer that failed because the whole
    /// connection ended, and how many segments were sent more than once; once.
    pub fn take_outgoing(&mut self, id: TransferId) -> Option<(Outgoing, u64)> {
        self.sending.take_interrupted(id)
    }

    /// Gives a transfer up, if it is under way: it fails as
    /// [`FailReason::Cancelled`], and the peer is told. `outgoing`: one that we send.
    ///
    /// After this the engine may free its memory: nothing is placed there any more.
    pub fn cancel(&mut self, id: TransferId, outgoing: bool) {
        self.take_run();
        self.abandon(id, outgoing, FailReason::Cancelled, Some(code::CANCELLED));
    }

    /// Ends the session: its transfers fail as [`FailReason::Closed`], and the
    /// peer is told, once, and again when it goes on. `reason` is the
    /// application's and reaches the peer as [`CloseReason::Peer`].
    pub fn close(&mut self, reason: u16) {
        self.shut(
            FailReason::Closed,
            Event::Closed {
                reason: CloseReason::Local(reason),
            },
        );
        self.tell_closed(reason);
    }

    /// Asks the peer for a sign of life; its answer is [`Event::PathValidated`].
    pub fn probe(&mut self, now: Time) {
        if self.state == State::Open {
            self.probe_wanted = true;
            self.alive.get_or_insert(now);
            self.queue_probe();
        }
    }

    /// Changes how many packets the peer may have in flight toward us; it learns
    /// of it with the next ACK. Zero stops it; a share at least twice as large, or
    /// at most half as large, is told at once.
    pub fn set_receive_credit(&mut self, packets: u32) {
        let before = self.told_credit();
        self.config.receive_credit = packets;
        self.tell_credit(before);
    }

    /// Bounds the credit by what there is room for besides: zero stops the peer
    /// until there is some. [`Connection::receive_credit`] stays what it is.
    pub fn set_room(&mut self, packets: u32) {
        let before = self.told_credit();
        self.room = packets;
        self.tell_credit(before);
    }

    /// What acknowledgements tell.
    fn told_credit(&self) -> u32 {
        self.config.receive_credit.min(self.room)
    }

    fn tell_credit(&mut self, before: u32) {
        let packets = self.told_credit();
        if packets != before {
            let much_more = packets > 0 && packets / 2 >= before;
            self.received
                .credit_changed(much_more || packets <= before / 2);
        }
    }

    /// How many packets the peer may have in flight toward us.
    pub fn receive_credit(&self) -> u32 {
        self.config.receive_credit
    }

    /// Counts a datagram that the engine dropped before it got here.
    pub fn handle_dropped(&mut self, cause: DropCause) {
        self.count_drop(cause);
    }

    /// The next event; drain it after each call that takes something in.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether the connection is over: no transfer is, or can be, under way.
    /// What [`Connection::poll_transmit`] still gives tells the peer.
    pub fn is_closed(&self) -> bool {
        self.state != State::Open
    }

    /// Whether nothing is under way: no transfer, no unacknowledged packet.
    pub fn is_idle(&self) -> bool {
        !self.is_busy()
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        Stats {
            rtt: self.rtt.smoothed(),
            rtt_min: self.rtt.min(),
            window_bytes: self.controller.window_bytes(),
            in_flight_bytes: self.sent.in_flight_bytes(),
            transfers: self.receiving.active() + self.sending.active() + self.offering.active(),
            ..self.stats.clone()
        }
    }

    fn check_open(&self) -> Result<(), TransferError> {
        if self.state == State::Open {
            Ok(())
        } else {
            Err(TransferError::Closed)
        }
    }

    /// Whether an answer of the peer's is awaited.
    fn is_busy(&self) -> bool {
        self.state == State::Open
            && (self.receiving.active() > 0
                || self.sending.active() > 0
                || self.offering.has_next()
                || self.sent.in_flight() > 0
                || self.probe_wanted
                || self.probe_due
                || !self.controls.is_empty())
    }

    fn queue_probe(&mut self) {
        self.probe_due = true;
        self.extra = self.extra.max(1);
    }

    /// Fails a transfer that is under way, telling the peer with code `tell`.
    fn abandon(&mut self, id: TransferId, outgoing: bool, reason: FailReason, tell: Option<u16>) {
        if let Some(number) = id.offer_number() {
            // The peer learns of it by its number; it cannot end one of ours.
            if outgoing && tell.is_some() {
                self.events.extend(self.offering.abandon(number, reason));
            }
            return;
        }
        let (event, scope) = if outgoing {
            (self.sending.abandon(id, reason), Scope::FromMe)
        } else {
            (self.receiving.end(id, Err(reason)), Scope::ToMe)
        };
        let Some(event) = event else { return };
        self.events.push_back(event);
        if let Some(code) = tell {
            self.controls.push_back(Control::Reset(id, scope, code));
        }
    }

    /// Ends the connection with `last` as its last event.
    fn shut(&mut self, reason: FailReason, last: Event) {
        if self.state != State::Open {
            return;
        }
        self.take_run();
        self.state = State::Quiet;
        self.events.extend(self.sending.fail_all(reason));
        self.events.extend(self.offering.fail_all(reason));
        self.events.extend(self.receiving.fail_all(reason));
        self.events.push_back(last);
        self.controls.clear();
        self.alive = None;
    }

    /// Has the peer told of an end that it does not know of.
    fn tell_closed(&mut self, code: u16) {
        self.state = State::Closed {
            code,
            due: true,
            heard: 0,
        };
    }

    fn violate(&mut self, violation: Violation) {
        let reason = CloseReason::Violation(violation);
        self.shut(FailReason::Closed, Event::Closed { reason });
        self.tell_closed(code::VIOLATION);
    }

    fn count_drop(&mut self, cause: DropCause) {
        self.stats.drops[cause as usize] += 1;
    }
}

fn events_of(transfer: TransferId, outgoing: bool, reason: FailReason) -> Event {
    Event::Failed {
        transfer,
        outgoing,
        reason,
    }
}
