//! What an engine is given to do, by whoever drives it.

use genie_proto::wire::Metadata;
use genie_proto::{OfferError, SessionId, Time, TransferId};

use super::Polled;
use super::core::Core;
use super::offer::{Offer, OfferRefused};
use super::piece::{InPlaceRefused, Piece, Pieces, Returned};
use super::publish::first_credit;
use super::session::{self, Session};
use crate::device::Device;
use crate::engine::{self, Command, Completion, FailReason, OpenError, OperationId};
use crate::memory::{Lease, View};

impl<D: Device> Polled<D> {
    /// Begins something; what comes of it is told by [`Polled::poll_completion`].
    pub fn handle_command(&mut self, now: Time, command: Command) {
        self.core.quiet = false;
        let Self { device, core, .. } = self;
        match command {
            Command::Open {
                operation,
                session,
                remote: engine::Remote::Udp(remote),
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
    /// They come in any order, and a missing one only while a frame is free: a
    /// reader that keeps all its frames until a certain piece comes may wait for
    /// its deadline. Frames stay set aside for the session as long as such a transfer
    /// is under way; whoever shares a device among peers limits that time.
    ///
    /// Each piece was verified before it is shown, and again with all others
    /// when the transfer ends, unless the session has `Integrity::None`. Where somebody else can write into the device's
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
        let orphans = core.pieces.as_ref().map_or(0, Pieces::orphans);
        let left = device.keepable().saturating_sub(taken + orphans);
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
        if let Some(session) = self.core.reader_of(returned) {
            session.frame_given_back();
        }
    }

    /// Takes frames back that were read for too long.
    pub(super) fn take_unread(&mut self, now: Time) {
        let limit = self.core.config.in_place.deadline;
        let expire = |core: &mut Core| core.pieces.as_mut()?.expire(now);
        while let Some(returned) = expire(&mut self.core) {
            if let Some(session) = self.core.reader_of(returned) {
                session.frame_unread(returned.transfer, limit);
            }
            self.give_back(returned);
        }
    }
}
