//! Small tensors that are sent and received in one packet each.
//!
//! The protocol decides what is sent, placed and delivered; here is the memory:
//! the leases of those under way, and the slots for those that arrive.

use std::collections::VecDeque;

use genie_proto::wire::{HEADER_LEN, METADATA_MAX, Metadata, OFFER_LEN};
use genie_proto::{Digest, Integrity, OfferError, Segment, SessionId, TransferId};

use super::session::Copying;
use crate::device::{Attachment, HEAD_MAX, Payload, TxFrame};
use crate::engine::OperationId;
use crate::engine::frame::HEADERS_MAX;
use crate::ledger::Copies;
use crate::memory::{Lease, Region, RegionError, View};

/// Tensors up to this length travel behind the headers, in the same piece of
/// memory: copying them is cheaper than referring to them.
pub(super) const INLINE_MAX: usize = 384;

// Also where the packet is sealed.
const _: () = assert!(
    HEADERS_MAX + HEADER_LEN + OFFER_LEN + METADATA_MAX + INLINE_MAX + genie_proto::seal::TAG_LEN
        <= HEAD_MAX
);

/// The most slots that the protocol can grant.
pub(super) const SLOTS_MAX: u16 = 1024;

/// What a session's peer may send unasked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// How many tensors at a time, at most 1024; none by default.
    pub slots: u16,
    /// The longest, in bytes; what one packet has room for is the limit in any case.
    pub len_max: u32,
}

/// A small tensor could not be sent in one packet now; its lease comes back.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct OfferRefused {
    /// What was to be sent.
    pub from: Lease,
    /// Why not.
    #[source]
    pub reason: OfferError,
}

/// A small tensor that arrived, was verified, and lies in a slot until it is
/// given to [`Polled::release`](super::Polled::release). One that is dropped
/// takes its slot along until the session ends.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its slot is taken until it is released"]
pub struct Offer {
    session: SessionId,
    transfer: TransferId,
    slot: u32,
    metadata: Metadata,
    digest: Digest,
    len: u64,
}

impl Offer {
    pub(super) fn new(
        session: SessionId,
        transfer: TransferId,
        slot: u32,
        metadata: Metadata,
        digest: Digest,
        len: u64,
    ) -> Self {
        Self {
            session,
            transfer,
            slot,
            metadata,
            digest,
            len,
        }
    }

    /// Whose peer sent it.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// What the sender calls it.
    pub fn transfer(&self) -> TransferId {
        self.transfer
    }

    /// What the peer's application says of it.
    pub fn metadata(&self) -> &[u8] {
        &self.metadata
    }

    /// CRC32C of its bytes; zero where the session has [`Integrity::None`].
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn slot(&self) -> u32 {
        self.slot
    }
}

/// The slots that a peer's tensors are placed into.
#[derive(Debug)]
pub(super) struct Placed {
    memory: Lease,
    stride: u64,
    /// What is in each slot.
    held: Vec<Option<TransferId>>,
}

impl Placed {
    pub(super) fn new(slots: u16, stride: u64) -> Result<Self, RegionError> {
        let len = u64::from(slots) * stride;
        let (region, _) = Region::allocate(len.max(1) as usize)?;
        Ok(Self {
            memory: Lease::whole(region),
            stride,
            held: vec![None; slots.into()],
        })
    }

    /// Writes the last bytes of `payload` into the slot at the segment's offset;
    /// returns the CRC32C of what was written.
    pub(super) fn place(&self, segment: Segment, payload: View<'_>, integrity: Integrity) -> u32 {
        let (at, len) = (segment.offset as usize, segment.len as usize);
        let tensor = payload.slice(payload.len() - len..payload.len());
        let tensor = tensor.expect("the connection found the tensor inside the payload");
        match integrity {
            Integrity::Digest => self.memory.place(at, tensor),
            Integrity::None => {
                self.memory.write_at(at, tensor);
                0
            }
        }
    }

    pub(super) fn hold(&mut self, slot: u32, transfer: TransferId) {
        self.held[slot as usize] = Some(transfer);
    }

    /// Whether the slot had just this in it, and now has nothing.
    pub(super) fn release(&mut self, offer: &Offer) -> bool {
        let held = self.held.get_mut(offer.slot as usize);
        held.is_some_and(|held| held.take_if(|held| *held == offer.transfer).is_some())
    }

    pub(super) fn view(&self, offer: &Offer) -> Option<View<'_>> {
        let held = *self.held.get(offer.slot as usize)?;
        if held != Some(offer.transfer) {
            return None;
        }
        let at = u64::from(offer.slot) * self.stride;
        self.memory.view(at as usize..(at + offer.len) as usize)
    }
}

/// The small tensors of a session that are under way, in the order of their numbers.
#[derive(Debug, Default)]
pub(super) struct Sending {
    first: u64,
    under_way: VecDeque<Option<Sent>>,
    len: usize,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) operation: OperationId,
    from: Lease,
    /// What frames refer to; none where they carry the bytes themselves.
    pub(super) attachment: Option<Attachment>,
    /// Bytes handed to the device, repeated ones included.
    handed: u64,
}

impl Sending {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(
        &mut self,
        id: TransferId,
        operation: OperationId,
        from: Lease,
        attachment: Option<Attachment>,
    ) {
        debug_assert_eq!(
            id.offer_number(),
            Some(self.first + self.under_way.len() as u64)
        );
        self.under_way.push_back(Some(Sent {
            operation,
            from,
            attachment,
            handed: 0,
        }));
        self.len += 1;
    }

    /// Takes one out that has ended; none if `id` is no offer's.
    pub(super) fn take(&mut self, id: TransferId) -> Option<Sent> {
        let sent = self.find(id.offer_number()?)?.take()?;
        self.len -= 1;
        while let Some(None) = self.under_way.front() {
            self.under_way.pop_front();
            self.first += 1;
        }
        Some(sent)
    }

    /// Takes any one out.
    pub(super) fn pop(&mut self) -> Option<Sent> {
        let id = TransferId::of_offer(self.first);
        self.take(id)
    }

    pub(super) fn crc32c(&mut self, number: u64) -> u32 {
        let sent = self.find(number).and_then(|sent| sent.as_ref());
        let sent = sent.expect("the connection sends only offers that are under way");
        sent.from.crc32c(0..sent.from.len())
    }

    /// Puts the bytes, or a reference to them, behind the head of `frame`;
    /// returns how many were copied.
    pub(super) fn fill(&mut self, number: u64, frame: &mut TxFrame) -> u64 {
        let sent = self.find(number).and_then(|sent| sent.as_mut());
        let sent = sent.expect("the connection sends only offers that are under way");
        let len = sent.from.len();
        sent.handed += len as u64;
        if let Some(attachment) = sent.attachment {
            frame.payload = Some(Payload {
                attachment,
                offset: 0,
                len: len as u32,
            });
            return 0;
        }
        let at = frame.head.len();
        frame
            .head
            .try_extend_from_slice(&[0; INLINE_MAX][..len])
            .expect("HEAD_MAX has room, as asserted above");
        sent.from.read_at(0, &mut frame.head[at..]);
        len as u64
    }

    fn find(&mut self, number: u64) -> Option<&mut Option<Sent>> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.under_way.get_mut(at)
    }
}

impl Sent {
    /// What CPUs copied of it so far.
    pub(super) fn copies(&self, copying: Copying) -> Copies {
        let copies = copying.sent(self.handed);
        match self.attachment {
            Some(_) => copies,
            None => Copies {
                genie: self.handed,
                ..copies
            },
        }
    }
}
