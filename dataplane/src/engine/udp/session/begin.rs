//! What a session is asked to move, and what it holds for whoever reads it.

use std::collections::VecDeque;
use std::time::Duration;

use genie_proto::wire::Metadata;
use genie_proto::{OfferError, TransferId};

use super::Session;
use super::end::{Detaching, refuse};
use super::transfer::{Destination, Incoming, Outgoing};
use crate::device::{AttachError, Device};
use crate::engine::udp::offer::{INLINE_MAX, Offer, OfferRefused};
use crate::engine::udp::piece::{InPlaceRefused, Reader};
use crate::engine::{Completion, Cost, FailReason, OperationId, Partial};
use crate::memory::{Lease, View};

impl Session {
    pub(in crate::engine::udp) fn receive(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        into: Lease,
        resume: Option<Box<Partial<genie_proto::Incoming>>>,
        completions: &mut VecDeque<Completion>,
    ) {
        let before = resume.as_ref().map(|partial| partial.cost);
        let begun = match resume {
            None => self.connection.receive(transfer, into.len() as u64),
            Some(partial) => self.connection.resume_receive(transfer, partial.moved),
        };
        match begun {
            Ok(()) => {
                self.incoming.insert(
                    transfer,
                    Incoming {
                        operation,
                        into: Destination::Memory(into),
                        placed: 0,
                        before: before.unwrap_or_default(),
                    },
                );
            }
            Err(error) => {
                drop(into);
                refuse(operation, error.to_string(), completions);
            }
        }
    }

    /// Expects a tensor of `len` bytes that stays in the frames: up to `frames` of
    /// them, of which `left` are not set aside for other sessions.
    pub(in crate::engine::udp) fn receive_in_place(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        len: u64,
        frames: u32,
        left: u32,
    ) -> Result<(), InPlaceRefused> {
        if self.is_ended() || self.connection.is_closed() {
            return Err(InPlaceRefused::NotOpen);
        }
        if self.is_sealed() {
            return Err(InPlaceRefused::Sealed);
        }
        let has_some = self.reader.is_some();
        if frames == 0 || !has_some && left < frames {
            let wanted = frames;
            return Err(InPlaceRefused::NoFrames { wanted, left });
        }
        self.connection.receive(transfer, len)?;
        self.reader
            .get_or_insert_with(|| Reader::new(frames))
            .begin();
        self.tell_room();
        self.incoming.insert(
            transfer,
            Incoming {
                operation,
                into: Destination::InPlace { unread: None },
                placed: 0,
                before: Cost::default(),
            },
        );
        Ok(())
    }

    pub(in crate::engine::udp) fn send(
        &mut self,
        operation: OperationId,
        transfer: TransferId,
        from: Lease,
        resume: Option<Box<Partial<genie_proto::Outgoing>>>,
        device: &mut dyn Device,
        completions: &mut VecDeque<Completion>,
    ) {
        let attachment = match device.attach(from.clone()) {
            Ok(attachment) => attachment,
            Err(error @ (AttachError::Full | AttachError::Unreachable(_))) => {
                drop(from);
                return refuse(operation, error.to_string(), completions);
            }
        };
        let before = resume.as_ref().map(|partial| partial.cost);
        let begun = match resume {
            None => self.connection.send(transfer, from.len() as u64),
            Some(partial) => self.connection.resume_send(transfer, partial.moved),
        };
        match begun {
            Ok(()) => {
                let outgoing = Outgoing {
                    operation,
                    from,
                    attachment,
                    handed: 0,
                    before: before.unwrap_or_default(),
                };
                self.outgoing.insert(transfer, outgoing);
            }
            Err(error) => {
                let result = Err(FailReason::Refused(error.to_string()));
                self.detaching.push(Detaching {
                    attachment,
                    operation,
                    result,
                    partial: None,
                });
            }
        }
    }

    pub(in crate::engine::udp) fn offer(
        &mut self,
        operation: OperationId,
        metadata: Metadata,
        from: Lease,
        device: &mut dyn Device,
    ) -> Result<TransferId, OfferRefused> {
        let len = from.len();
        let refused = |from, reason| Err(OfferRefused { from, reason });
        let max = INLINE_MAX as u64;
        if self.is_sealed() && len as u64 > max {
            // Longer ones would have to be sealed in a slot of the engine's.
            let len = len as u64;
            return refused(from, OfferError::TooLong { len, max });
        }
        if let Err(reason) = self.connection.check_offer(len as u64, metadata.len()) {
            return refused(from, reason);
        }
        let attachment = if len > INLINE_MAX {
            match device.attach(from.clone()) {
                Ok(attachment) => Some(attachment),
                Err(AttachError::Full) => return refused(from, OfferError::NotGranted),
                // The ordinary way says why, in words.
                Err(AttachError::Unreachable(_)) => return refused(from, OfferError::Unreachable),
            }
        } else {
            None
        };
        let id = match self.connection.offer(len as u64, metadata) {
            Ok(id) => id,
            // Checked above.
            Err(reason) => return refused(from, reason),
        };
        self.offering.push(id, operation, from, attachment);
        Ok(id)
    }

    /// The bytes of an offer whose slot was not released.
    pub(in crate::engine::udp) fn offered(&self, offer: &Offer) -> Option<View<'_>> {
        self.offered.as_ref()?.view(offer)
    }

    pub(in crate::engine::udp) fn release(&mut self, offer: Offer) {
        if let Some(offered) = &mut self.offered
            && offered.release(&offer)
        {
            self.connection.release(offer.slot());
        }
    }

    /// Frames set aside for this session's reader.
    pub(in crate::engine::udp) fn frames_to_read(&self) -> u32 {
        self.reader.as_ref().map_or(0, Reader::frames)
    }

    /// A frame that was kept for this session's reader is the device's again.
    pub(in crate::engine::udp) fn frame_given_back(&mut self) {
        if let Some(reader) = &mut self.reader {
            reader.give_back();
            self.tell_room();
        }
    }

    /// A reader had a frame of this transfer for longer than it may.
    pub(in crate::engine::udp) fn frame_unread(&mut self, transfer: TransferId, limit: Duration) {
        if let Some(incoming) = self.incoming.get_mut(&transfer)
            && let Destination::InPlace { unread } = &mut incoming.into
        {
            *unread = Some(limit);
            self.connection.cancel(transfer, false);
        }
    }

    pub(super) fn transfer_read(&mut self, incoming: &Incoming) {
        if let Destination::InPlace { .. } = incoming.into
            && let Some(reader) = &mut self.reader
        {
            reader.end();
            self.tell_room();
        }
    }

    /// Bounds what the peer may send by the frames that may still be kept.
    fn tell_room(&mut self) {
        self.reader.take_if(|reader| reader.is_over());
        let room = self.reader.as_ref().map_or(u32::MAX, Reader::room);
        self.connection.set_room(room);
    }
}
