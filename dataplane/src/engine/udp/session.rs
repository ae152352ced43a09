//! One session of the UDP engine: protocol state, flow, and the leases it moves.
//!
//! ```text
//!  Resolving ──neighbour answers──▶ Probing ──probe answered──▶ Open
//!      │                              │                          │
//!      └──────── limit is over ───────┴────────┬─────────────────┘ lost or closed
//!                                              ▼
//!                                            Ended
//! ```
//! A session that has ended stays until the device has given every lease back.

mod begin;
mod end;
mod packets;
mod transfer;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use foldhash::fast::RandomState;
use genie_proto::credit::Visit;
use genie_proto::seal::TAG_LEN;
use genie_proto::{Connection, DropCause, Integrity, SessionId, Time, TransferId, connection};

use super::Remote;
use super::offer::{Offers, Placed, SLOTS_MAX, Sending};
use super::piece::Reader;
use crate::engine::frame::{self, End, Flow, Head};
use crate::engine::link::Link;
use crate::engine::{OperationId, ResentSnapshot, SealedSnapshot, SessionSnapshot};
use crate::memory::RegionError;
use end::Detaching;
use packets::Security;
use transfer::{Incoming, Outgoing};

pub(super) use packets::Keeping;
pub(super) use transfer::Copying;

/// How often a neighbour is asked for its address until it answers.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// The application's reason code of a close, of which there is one kind.
const CLOSED_BY_USER: u16 = 0;

/// How long an ended session waits for a device that takes no frames to take
/// the one that tells the peer.
const GOODBYE_LIMIT: Duration = Duration::from_millis(100);

/// A device that works gives a frame's memory back within microseconds of
/// sending it; after this long it never will.
pub(super) const STUCK_LIMIT: Duration = Duration::from_secs(1);

/// After its last transfer a peer keeps its share of the receive ring for so
/// long: the next one often comes soon.
const SHARE_KEPT: Duration = Duration::from_millis(100);

pub(super) struct Session {
    id: SessionId,
    connection: Connection,
    peer: SocketAddr,
    flow: Option<Flow>,
    state: State,
    /// Looked up for every packet.
    incoming: HashMap<TransferId, Incoming, RandomState>,
    outgoing: HashMap<TransferId, Outgoing, RandomState>,
    /// Small tensors under way to the peer, and the slots for those from it.
    offering: Sending,
    offered: Option<Placed>,
    /// While tensors are read in place.
    reader: Option<Reader>,
    detaching: Vec<Detaching>,
    /// When there last was a transfer.
    busy: Option<Time>,
    /// Seals packets and opens them; none where they are plain.
    security: Option<Box<Security>>,
    integrity: Integrity,
    /// Bytes that Genie copied between packets, its own memory and tensors.
    copied_bytes: u64,
}

enum State {
    Resolving {
        opening: Opening,
        began: Time,
        ask_next: Time,
    },
    Probing {
        opening: Opening,
        began: Time,
    },
    Open,
    /// `told`: nothing is left to say to the peer.
    Ended {
        since: Time,
        told: bool,
    },
}

/// What opening a session needs to know.
#[derive(Clone, Copy)]
pub(super) struct Opening {
    pub(super) operation: OperationId,
    pub(super) own: SocketAddr,
    pub(super) peer: SocketAddr,
    pub(super) limit: Duration,
}

/// What this engine's device allows.
#[derive(Clone, Copy)]
pub(super) struct Own {
    pub(super) mtu: u16,
    pub(super) credit: u16,
    pub(super) integrity: Integrity,
    pub(super) offers: Offers,
}

impl Session {
    pub(super) fn new(
        now: Time,
        id: SessionId,
        remote: &Remote,
        opening: Opening,
        own: Own,
    ) -> Result<Self, RegionError> {
        let mtu = own.mtu.min(remote.local.mtu);
        let security = remote
            .secrets
            .as_ref()
            .map(|secrets| Box::new(Security::new(secrets)));
        let tag = if security.is_some() {
            TAG_LEN as u16
        } else {
            0
        };
        let datagram_max = frame::udp_payload_max(mtu, opening.peer.ip()).saturating_sub(tag);
        let slots = own.offers.slots.min(SLOTS_MAX);
        let config = connection::Config {
            datagram_max,
            receive_credit: u32::from(own.credit),
            remote_credit: u32::from(remote.local.credit),
            idle_limit: opening.limit,
            idle_probe: Some(opening.limit / 2),
            integrity: own.integrity,
            offers: slots,
            offer_len_max: own.offers.len_max.min(datagram_max.into()),
            seed: fastrand::u64(..),
            ..connection::Config::default()
        };
        let offered = match slots {
            0 => None,
            slots => Some(Placed::new(slots, config.offer_stride())?),
        };
        Ok(Self {
            id,
            offered,
            offering: Sending::default(),
            connection: Connection::new(config, id, remote.session, now),
            peer: opening.peer,
            flow: None,
            state: State::Resolving {
                opening,
                began: now,
                ask_next: now,
            },
            incoming: HashMap::default(),
            outgoing: HashMap::default(),
            reader: None,
            detaching: Vec::new(),
            busy: None,
            security,
            integrity: own.integrity,
            copied_bytes: 0,
        })
    }

    pub(super) fn peer(&self) -> IpAddr {
        self.peer.ip()
    }

    /// Shows the connection, and whether its peer needs more of the receive ring
    /// than a beginner: it sends, or it answers to what we send.
    pub(super) fn show_credit(&mut self, now: Time, visit: &mut Visit) {
        if !self.incoming.is_empty() || !self.outgoing.is_empty() || !self.offering.is_empty() {
            self.busy = Some(now);
        }
        let busy = self.busy.is_some_and(|at| now.since(at) < SHARE_KEPT);
        visit(self.peer.ip(), busy, &mut self.connection);
    }

    pub(super) fn is_from(&self, address: SocketAddr) -> bool {
        address == self.peer
    }

    pub(super) fn cancel(&mut self, transfer: TransferId, outgoing: bool) {
        self.connection.cancel(transfer, outgoing);
    }

    /// Begins to close: the peer is told once, what is under way fails.
    pub(super) fn close(&mut self) {
        if !self.connection.is_closed() {
            self.connection.close(CLOSED_BY_USER);
        }
    }

    /// Whether this session's packets are sealed.
    pub(super) fn is_sealed(&self) -> bool {
        self.security.is_some()
    }

    /// Acts on what is due; returns whether something was, and a question for
    /// the link, if there is one.
    pub(super) fn handle_timeout(&mut self, now: Time, link: &mut Link) -> (bool, Option<Head>) {
        let (mut due, mut question) = (false, None);
        if let State::Resolving {
            opening,
            began,
            ask_next,
        } = &mut self.state
        {
            let (own, peer) = (opening.own, opening.peer);
            if let Some(mac) = link.neighbour(peer.ip()) {
                let own = End {
                    mac: link.mac(),
                    address: own,
                };
                self.flow = Flow::new(own, End { mac, address: peer });
                self.connection.probe(now);
                due = true;
                self.state = State::Probing {
                    opening: *opening,
                    began: *began,
                };
            } else if *ask_next <= now {
                question = link.request(own.ip(), peer.ip());
                *ask_next = now + ASK_EVERY;
            }
        }
        if self.connection.poll_timeout().is_some_and(|at| at <= now) {
            self.connection.handle_timeout(now);
            due = true;
        }
        (due || question.is_some(), question)
    }

    /// Whether nothing is left to do or to give back.
    pub(super) fn is_finished(&self, now: Time) -> bool {
        let State::Ended { since, told } = self.state else {
            return false;
        };
        let empty =
            self.incoming.is_empty() && self.outgoing.is_empty() && self.offering.is_empty();
        empty && self.detaching.is_empty() && (told || now.since(since) >= GOODBYE_LIMIT)
    }

    /// Whether it is over, but for what must still be given back.
    pub(super) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }

    /// Whether the device has kept the memory of an ended session for so long
    /// that it will not give it back by itself.
    pub(super) fn is_stuck(&self, now: Time) -> bool {
        let State::Ended { since, .. } = self.state else {
            return false;
        };
        self.is_detaching() && now.since(since) >= STUCK_LIMIT
    }

    /// When this session next wants [`Session::handle_timeout`] or
    /// [`Session::take_events`] although nothing arrived.
    pub(super) fn next_timeout(&self) -> Option<Time> {
        let opening = match &self.state {
            State::Resolving {
                opening,
                began,
                ask_next,
            } => Some((*ask_next).min(*began + opening.limit)),
            State::Probing { opening, began } => Some(*began + opening.limit),
            State::Ended { since, told } if !told => Some(*since + GOODBYE_LIMIT),
            State::Ended { since, .. } => Some(*since + STUCK_LIMIT),
            State::Open => None,
        };
        opening
            .into_iter()
            .chain(self.connection.poll_timeout())
            .min()
    }

    pub(super) fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }

    pub(super) fn snapshot(&self) -> SessionSnapshot {
        let stats = self.connection.stats();
        SessionSnapshot {
            session: self.id,
            round_trip: stats.rtt,
            window_bytes: Some(stats.window_bytes),
            in_flight_bytes: Some(stats.in_flight_bytes),
            granted: Some(u64::from(self.connection.receive_credit())),
            round_trip_min: stats.rtt_min,
            retransmits: stats.retransmits.total(),
            resent: Some(ResentSnapshot {
                packet_threshold: stats.retransmits.packet_threshold,
                time_threshold: stats.retransmits.time_threshold,
                probe: stats.retransmits.probe,
                spurious: stats.spurious_losses,
            }),
            dropped: stats.dropped(),
            sealed: self.is_sealed().then(|| SealedSnapshot {
                forged: stats.drops(DropCause::Forged),
                replayed: stats.drops(DropCause::Replayed),
                old_epoch: stats.drops(DropCause::OldEpoch),
            }),
            transfers: (self.incoming.len() + self.outgoing.len() + self.offering.len()) as u64,
        }
    }
}
