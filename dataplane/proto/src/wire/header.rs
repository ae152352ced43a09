//! The header that every packet starts with.

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{U48_LIMIT, crc};
use crate::id::{SessionId, TransferId};

/// The version spoken here.
pub const VERSION: u8 = 2;
/// Bytes of a header.
pub const HEADER_LEN: usize = 40;
/// Bytes of a header that can be read in a sealed packet: all but the check.
pub const PLAIN_LEN: usize = 36;
/// On DATA: the segment ends where the sender's transfer ends, so that two ends
/// that disagree about the length find out.
pub const FLAG_FIN: u8 = 1;

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A segment of a transfer.
    Data = 1,
    /// Which packets arrived.
    Ack = 2,
    /// Receiver to sender: every byte is applied; length and digest.
    Done = 3,
    /// Sender to receiver: whether the digests agree.
    DoneAck = 4,
    /// Is the path there?
    Probe = 5,
    /// It is.
    ProbeAck = 6,
    /// A transfer, or the session, is over.
    Reset = 7,
    /// A small tensor and its metadata.
    Offer = 8,
    /// How many OFFERs the peer may send.
    Grant = 9,
}

/// A header's fields, in the host's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the packet is.
    pub kind: Kind,
    /// [`FLAG_FIN`] on DATA, [`FLAG_VOID`](super::FLAG_VOID) on OFFER; other bits are sent as zero and ignored.
    pub flags: u8,
    /// Bytes after the header.
    pub payload_len: u16,
    /// The session, as the receiver of the packet calls it.
    pub session: SessionId,
    /// The transfer, as the receiver of its bytes calls it; zero where the packet is of none.
    pub transfer: TransferId,
    /// The sender's clock in microseconds, for the receiver to echo.
    pub timestamp: u32,
    /// Which path of the session; packet numbers count per path.
    pub path: u16,
    /// 48 bits, rising, never used twice on a path.
    pub packet_number: u64,
    /// On DATA: where the payload belongs in the transfer; on OFFER: the highest
    /// packet number that arrived. 48 bits.
    pub offset: u64,
}

/// Why bytes are not a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Fewer than [`HEADER_LEN`] bytes, or the datagram is not as long as the header says.
    #[error("length does not agree with the header")]
    Length,
    /// Of a version not spoken here.
    #[error("version {0} is not spoken here")]
    Version(u8),
    /// The header check does not match.
    #[error("header check does not match")]
    HeaderCheck,
    /// A type not spoken here.
    #[error("packet type {0} is not spoken here")]
    Kind(u8),
    /// A control packet's payload is malformed.
    #[error("malformed control packet")]
    Body,
    /// The payload check does not match.
    #[error("payload check does not match")]
    PayloadCheck,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    version_kind: u8,
    flags: u8,
    payload_len: U16,
    session: U32,
    slot: U32,
    generation: U32,
    timestamp: U32,
    path: U16,
    packet_number: [u8; 6],
    offset: [u8; 6],
    header_check: U16,
    check: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_LEN);
/// What the header check covers.
const CHECKED: usize = 34;
/// What the CRC that binds a payload to its header covers.
const BOUND: usize = PLAIN_LEN;

impl Header {
    /// Reads the header at the start of `head`, the first bytes of a datagram
    /// whose UDP payload is `datagram_len` bytes long.
    ///
    /// Also returns the CRC32C that the payload must have.
    pub fn parse(head: &[u8], datagram_len: usize) -> Result<(Self, u32), ParseError> {
        let (raw, _) = Raw::read_from_prefix(head).map_err(|_| ParseError::Length)?;
        // The version tells what the rest means, so it is looked at first; it is
        // under the check like everything else.
        let version = raw.version_kind >> 4;
        if version != VERSION {
            return Err(ParseError::Version(version));
        }
        let check = crc(&head[..CHECKED]);
        if raw.header_check.get() != check as u16 {
            return Err(ParseError::HeaderCheck);
        }
        let payload_len = raw.payload_len.get();
        if datagram_len != HEADER_LEN + usize::from(payload_len) {
            return Err(ParseError::Length);
        }
        let kind = raw.version_kind & 0xf;
        let header = Self {
            kind: Kind::parse(kind).ok_or(ParseError::Kind(kind))?,
            flags: raw.flags,
            payload_len,
            session: SessionId(raw.session.get()),
            transfer: TransferId {
                slot: raw.slot.get(),
                generation: raw.generation.get(),
            },
            timestamp: raw.timestamp.get(),
            path: raw.path.get(),
            packet_number: read_u48(raw.packet_number),
            offset: read_u48(raw.offset),
        };
        let bound = genie_crc::crc32c_append(check, &head[CHECKED..BOUND]);
        Ok((header, raw.check.get() ^ bound))
    }

    /// The header's bytes, for a payload whose CRC32C is `payload_crc`.
    pub fn encode(&self, payload_crc: u32) -> [u8; HEADER_LEN] {
        debug_assert!(self.packet_number < U48_LIMIT && self.offset < U48_LIMIT);
        let raw = Raw {
            version_kind: VERSION << 4 | self.kind as u8,
            flags: self.flags,
            payload_len: self.payload_len.into(),
            session: self.session.0.into(),
            slot: self.transfer.slot.into(),
            generation: self.transfer.generation.into(),
            timestamp: self.timestamp.into(),
            path: self.path.into(),
            packet_number: write_u48(self.packet_number),
            offset: write_u48(self.offset),
            header_check: U16::ZERO,
            check: U32::ZERO,
        };
        let mut bytes: [u8; HEADER_LEN] = zerocopy::transmute!(raw);
        let check = crc(&bytes[..CHECKED]);
        bytes[CHECKED..BOUND].copy_from_slice(&(check as u16).to_be_bytes());
        let bound = genie_crc::crc32c_append(check, &bytes[CHECKED..BOUND]);
        bytes[BOUND..].copy_from_slice(&(payload_crc ^ bound).to_be_bytes());
        bytes
    }
}

impl Kind {
    fn parse(kind: u8) -> Option<Self> {
        Some(match kind {
            1 => Self::Data,
            2 => Self::Ack,
            3 => Self::Done,
            4 => Self::DoneAck,
            5 => Self::Probe,
            6 => Self::ProbeAck,
            7 => Self::Reset,
            8 => Self::Offer,
            9 => Self::Grant,
            _ => return None,
        })
    }
}

/// The session a datagram says it is for, to find the connection by; the
/// connection then checks the header.
pub fn peek_session(head: &[u8]) -> Option<SessionId> {
    let (raw, _) = Raw::ref_from_prefix(head).ok()?;
    (raw.version_kind >> 4 == VERSION).then(|| SessionId(raw.session.get()))
}

/// The type a datagram says it is of, to see how much of it the connection must
/// be shown; the connection then checks the header.
pub fn peek_kind(head: &[u8]) -> Option<Kind> {
    Kind::parse(head.first()? & 0xf)
}

/// The packet number that a header gives, whether it is sealed or not.
pub fn peek_number(plain: &[u8; PLAIN_LEN]) -> u64 {
    const AT: usize = std::mem::offset_of!(Raw, packet_number);
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&plain[AT..AT + 6]);
    read_u48(bytes)
}

/// CRC32C of the header bytes that a payload is bound to; for tests that build packets.
pub fn header_crc(head: &[u8; HEADER_LEN]) -> u32 {
    crc(&head[..BOUND])
}

fn read_u48(bytes: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = bytes;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

fn write_u48(value: u64) -> [u8; 6] {
    let [_, _, a, b, c, d, e, f] = value.to_be_bytes();
    [a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_header() -> impl Strategy<Value = Header> {
        let ids = (any::<u32>(), any::<u32>(), any::<u32>());
        let rest = (
            1u8..10,
            any::<u8>(),
            any::<u16>(),
            any::<u32>(),
            any::<u16>(),
        );
        (rest, ids, 0..U48_LIMIT, 0..U48_LIMIT).prop_map(
            |((kind, flags, payload_len, timestamp, path), ids, packet_number, offset)| Header {
                kind: Kind::parse(kind).unwrap(),
                flags,
                payload_len,
                session: SessionId(ids.0),
                transfer: TransferId {
                    slot: ids.1,
                    generation: ids.2,
                },
                timestamp,
                path,
                packet_number,
                offset,
            },
        )
    }

    proptest! {
        #[test]
        fn a_header_comes_back_as_it_went(header in any_header(), crc: u32) {
            let bytes = header.encode(crc);
            let len = HEADER_LEN + usize::from(header.payload_len);
            prop_assert_eq!(Header::parse(&bytes, len), Ok((header, crc)));
            prop_assert_eq!(peek_session(&bytes), Some(header.session));
            let plain = bytes.first_chunk().unwrap();
            prop_assert_eq!(peek_number(plain), header.packet_number);
            prop_assert_eq!(Header::parse(&bytes, len + 1), Err(ParseError::Length));
            prop_assert_eq!(Header::parse(&bytes[..39], len), Err(ParseError::Length));
        }

        #[test]
        fn one_flipped_bit_never_passes_as_the_same_packet(
            header in any_header(), crc: u32, bit in 0usize..HEADER_LEN * 8,
        ) {
            let mut bytes = header.encode(crc);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let len = HEADER_LEN + usize::from(header.payload_len);
            match Header::parse(&bytes, len) {
                // Only the last four bytes are not under the header check, and
                // then the payload's CRC does not match.
                Ok((_, expected)) => prop_assert!(bit >= BOUND * 8 && expected != crc),
                Err(error) => prop_assert!(matches!(
                    error, ParseError::HeaderCheck | ParseError::Version(_)
                )),
            }
        }
    }
}
