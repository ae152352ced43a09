//! Packets of a session, in and out: opened and sealed, placed and read.

use genie_proto::seal::{Opener, Sealer, Secrets, TAG_LEN};
use genie_proto::wire::Kind;
use genie_proto::{DropCause, Integrity, Segment, Time, wire};

use super::transfer::Destination;
use super::{Session, State};
use crate::device::{Payload, TxFrame};
use crate::engine::udp::slots::Slots;
use crate::memory::View;

/// The protocol sees datagrams up to this length whole, of longer ones, which
/// can only be data, the header.
const DATAGRAM_WHOLE: usize = wire::HEADER_LEN + wire::CONTROL_MAX;

/// Of offers it sees what is before the tensor.
const OFFER_BEGIN: usize = wire::HEADER_LEN + wire::OFFER_LEN + wire::METADATA_MAX;

pub(super) struct Security {
    sealer: Sealer,
    opener: Opener,
}

/// What becomes of a frame that is being looked at.
pub(in crate::engine::udp) struct Keeping {
    /// Whether the device can keep it.
    pub(in crate::engine::udp) is_possible: bool,
    /// What it holds, if it is to be kept.
    pub(in crate::engine::udp) segment: Option<Segment>,
}

impl Security {
    pub(super) fn new(secrets: &Secrets) -> Self {
        Self {
            sealer: Sealer::new(&secrets.send),
            opener: Opener::new(&secrets.receive),
        }
    }

    /// Seals a frame whose datagram begins at `begin` of its head, and whose
    /// payload, if it has one, was loaded into `slots`.
    fn seal(&mut self, frame: &mut TxFrame, begin: usize, slots: &mut Slots) {
        let datagram = &mut frame.head[begin..];
        let (plain, rest) = datagram
            .split_first_chunk_mut::<{ wire::PLAIN_LEN }>()
            .expect("every datagram begins with a header");
        if let Some(payload) = frame.payload {
            let check = rest.first_chunk().expect("the last field of the header");
            let sealed = slots.store(check, payload.len as usize, |sealed| {
                self.sealer.seal(plain, sealed)
            });
            frame.payload = Some(sealed);
            frame.head.truncate(begin + wire::PLAIN_LEN);
        } else {
            let tag = self.sealer.seal(plain, rest);
            frame
                .head
                .try_extend_from_slice(&tag)
                .expect("HEAD_MAX has room for a tag");
        }
    }
}

impl Session {
    /// Takes a datagram in; `private` has room for all of it.
    pub(in crate::engine::udp) fn handle_datagram(
        &mut self,
        now: Time,
        header: &[u8],
        datagram: View<'_>,
        private: &mut [u8],
        keeping: &mut Keeping,
    ) {
        let Some(security) = &mut self.security else {
            if wire::peek_kind(header) == Some(Kind::Offer) {
                let mut begin = [0; OFFER_BEGIN];
                let have = datagram.copy_to(&mut begin);
                self.handle_opened(now, &begin[..have], datagram, keeping);
            } else if datagram.len() <= DATAGRAM_WHOLE {
                let mut whole = [0; DATAGRAM_WHOLE];
                let have = datagram.copy_to(&mut whole);
                self.handle_opened(now, &whole[..have], datagram, keeping);
            } else {
                self.handle_opened(now, header, datagram, keeping);
            }
            return;
        };
        // Opened in memory that nobody else can change: not in the packet's
        // buffer, and not in the tensor, which never shows what is not authentic.
        let Some(private) = private.get_mut(..datagram.len()) else {
            return self.connection.handle_dropped(DropCause::Length);
        };
        datagram.copy_to(private);
        self.copied_bytes += private.len() as u64;
        match security.opener.open(private) {
            Ok(len) => {
                let opened = &private[..len];
                self.handle_opened(now, opened, View::from(opened), keeping);
            }
            Err(error) => self.connection.handle_dropped(error.into()),
        }
    }

    /// `head`: as much of `datagram` as the connection must see.
    fn handle_opened(&mut self, now: Time, head: &[u8], datagram: View<'_>, keeping: &mut Keeping) {
        let Self {
            connection,
            incoming,
            offered,
            reader,
            integrity,
            copied_bytes,
            ..
        } = self;
        let payload = datagram.slice(wire::HEADER_LEN..datagram.len());
        let payload = payload.unwrap_or_default();
        let place = |segment: Option<Segment>| {
            let Some(segment) = segment else {
                return Some(integrity.checksum(|| payload.crc32c()));
            };
            if segment.transfer.offer_number().is_some() {
                *copied_bytes += u64::from(segment.len);
                let offered = offered.as_ref().expect("slots are granted once made");
                return Some(offered.place(segment, payload, *integrity));
            }
            let transfer = incoming
                .get_mut(&segment.transfer)
                .expect("the connection places only into transfers it was given");
            let Destination::Memory(into) = &transfer.into else {
                let has_room = reader.as_ref().is_some_and(|reader| reader.room() > 0);
                if !keeping.is_possible || !has_room {
                    return None;
                }
                transfer.placed += payload.len() as u64;
                keeping.segment = Some(segment);
                return Some(integrity.checksum(|| payload.crc32c()));
            };
            transfer.placed += payload.len() as u64;
            *copied_bytes += payload.len() as u64;
            let at = segment.offset as usize;
            Some(match integrity {
                Integrity::Digest => into.place(at, payload),
                Integrity::None => {
                    into.write_at(at, payload);
                    0
                }
            })
        };
        let is_taken = connection.handle_datagram(now, head, datagram.len(), place);
        if !is_taken {
            keeping.segment = None;
        } else if keeping.segment.is_some()
            && let Some(reader) = reader
        {
            reader.keep();
            connection.set_room(reader.room());
        }
    }

    /// Whether [`Session::poll_transmit`] may have something to send.
    pub(in crate::engine::udp) fn may_transmit(&self, now: Time) -> bool {
        self.connection.may_transmit(now)
    }

    /// Writes the next frame to send into an empty one, if there is something to
    /// send; `slots` has a free one where packets are sealed.
    pub(in crate::engine::udp) fn poll_transmit(
        &mut self,
        now: Time,
        slots: Option<&mut Slots>,
        frame: &mut TxFrame,
    ) -> bool {
        let Self {
            connection,
            outgoing,
            offering,
            flow,
            integrity,
            security,
            copied_bytes,
            ..
        } = self;
        let mut sealing = match (security, slots) {
            (None, _) => None,
            (Some(security), Some(slots)) => Some((security, slots)),
            // Nothing of such a session ever leaves as it is.
            (Some(_), None) => return false,
        };
        let Some(flow) = flow else { return false };
        let mut payload = None;
        let crc = |segment: Segment| {
            let (start, len) = (segment.offset as usize, segment.len as usize);
            if let Some(number) = segment.transfer.offer_number() {
                return integrity.checksum(|| offering.crc32c(number));
            }
            let transfer = outgoing
                .get_mut(&segment.transfer)
                .expect("the connection sends only transfers it was given");
            transfer.handed += len as u64;
            payload = Some(Payload {
                attachment: transfer.attachment,
                offset: segment.offset,
                len: segment.len,
            });
            let from = &transfer.from;
            // Sealed payloads are read in any case.
            let loaded = sealing
                .as_mut()
                .map(|(_, slots)| slots.load(from, start, len));
            integrity.checksum(|| loaded.unwrap_or_else(|| from.stream_crc32c(start..start + len)))
        };
        flow.begin_headers(&mut frame.head);
        let begin = frame.head.len();
        let Some(segment) = connection.poll_transmit_into(now, &mut frame.head, crc) else {
            if let State::Ended { told, .. } = &mut self.state {
                *told = true;
            }
            return false;
        };
        frame.payload = payload;
        let payload_len = segment.map_or(0, |segment| segment.len as usize);
        let tag = if sealing.is_some() { TAG_LEN } else { 0 };
        let len = frame.head.len() - begin + payload_len + tag;
        flow.finish_headers(&mut frame.head, len);
        if let Some(segment) = segment
            && let Some(number) = segment.transfer.offer_number()
        {
            *copied_bytes += offering.fill(number, frame);
        }
        if let Some((security, slots)) = sealing {
            *copied_bytes += frame.payload.map_or(0, |payload| u64::from(payload.len));
            security.seal(frame, begin, slots);
        }
        true
    }
}
