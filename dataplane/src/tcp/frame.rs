//! What the TCP engine puts on the wire: a HELLO, then frames.
//!
//! Parsing is total: any bytes give a value or a [`Malformed`], never a panic.
//! The layouts are drawn in `docs/protocol-tcp.md`, and the golden vectors in
//! `docs/protocol-tcp.golden` are checked by this module's tests.

#![forbid(unsafe_code)]

use genie_proto::{SessionId, TransferId};

use super::Token;

/// Bytes of a [`Hello`] on the wire.
pub const HELLO_LEN: usize = 40;
/// Bytes of a [`Header`] on the wire.
pub const HEADER_LEN: usize = 32;
/// Version of this protocol; a peer of another one is refused.
pub const VERSION: u16 = 3;
/// The most payload a DATA frame carries. A chunk stays in a core's second-level
/// cache between checksum and copy, and is the most that a control frame waits for.
pub const CHUNK_MAX: u32 = 256 << 10;

/// A DATA frame with more payload than this says nothing of its CRC; a SUM frame
/// behind it does. The sender then reads bytes for the CRC that the kernel's
/// copy has just brought into the cache; for less the second call costs more.
pub const SUM_ABOVE: u32 = 64 << 10;

const MAGIC: [u8; 8] = *b"GENIEtcp";

/// The first bytes of a connection, in each direction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// How the one who reads this calls the session.
    pub session: SessionId,
    /// The session's token; zero in a refusal.
    pub token: Token,
    /// Which of the session's connections this is.
    pub stream: u16,
    /// How many connections the session has.
    pub streams: u8,
    /// What the one that accepts says to it.
    pub verdict: Verdict,
}

/// What the accepting end says to a HELLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// The connection carries the session from here on. Also what the dialling end says.
    Welcome = 0,
    /// No such session, or not its token: which of them is nobody's business.
    UnknownSession = 1,
    /// The stream's index or the number of streams is not what was agreed.
    WrongStream = 2,
    /// The accepting end speaks another version.
    WrongVersion = 3,
}

/// What precedes each payload, or stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it says.
    pub kind: Kind,
    /// Why, in a RESET; else zero.
    pub reason: Reason,
    /// Payload bytes behind this header; zero for all but DATA.
    pub payload_len: u32,
    /// The transfer it is about; zero for PING and PONG.
    pub transfer: TransferId,
    /// DATA: offset in the tensor. DONE: its length. PING, PONG: the sender's clock.
    pub offset: u64,
    /// DATA: CRC32C of the payload, zero above [`SUM_ABOVE`]. SUM: CRC32C of the
    /// payload before it. DONE: digest of the tensor. Else zero.
    pub crc: u32,
}

/// Types of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A chunk of a transfer.
    Data = 1,
    /// Receiver to sender: all applied, and this is the digest.
    Done = 2,
    /// Sender to receiver: the digests are equal.
    DoneOk = 3,
    /// Sender to receiver: the digests differ.
    DoneMismatch = 4,
    /// From the transfer's sender: it is given up.
    ResetBySender = 5,
    /// From the transfer's receiver: it is given up.
    ResetByReceiver = 6,
    /// The session ends in good order.
    Close = 7,
    /// Asks for a PONG.
    Ping = 8,
    /// Answers a PING with its clock value.
    Pong = 9,
    /// The CRC of the payload that this directly follows.
    Sum = 10,
}

/// Why a transfer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// None given; in every frame but the RESETs.
    None = 0,
    /// Its owner gave it up.
    Cancelled = 1,
    /// It is not known here: never granted, or over.
    Unknown = 2,
    /// A chunk's checksum is not that of its bytes: they changed while they moved.
    Digest = 3,
}

/// Bytes that are no frame of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The connection did not begin with the magic number.
    #[error("it does not speak Genie's TCP protocol")]
    Magic,
    /// It speaks another version.
    #[error("it speaks version {0} of the protocol, we speak {VERSION}")]
    Version(u16),
    /// The header's own check is wrong.
    #[error("a header's checksum is wrong")]
    Check,
    /// An unknown type of frame.
    #[error("unknown frame type {0}")]
    Kind(u8),
    /// An unknown reason.
    #[error("unknown reason {0}")]
    Reason(u8),
    /// An unknown verdict.
    #[error("unknown verdict {0}")]
    Verdict(u8),
    /// A chunk above [`CHUNK_MAX`], or a payload where none may be.
    #[error("a payload of {0} bytes is not allowed")]
    PayloadLen(u32),
    /// No SUM where one must be, or one where none may be.
    #[error("a checksum is missing or stands alone")]
    Sum,
    /// A reserved field is not zero.
    #[error("a reserved field is not zero")]
    Reserved,
}

impl Hello {
    /// The HELLO's bytes.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_be_bytes());
        bytes[10..12].copy_from_slice(&self.stream.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.session.0.to_be_bytes());
        bytes[16..32].copy_from_slice(&self.token.0);
        bytes[32] = self.streams;
        bytes[33] = self.verdict as u8;
        let check = genie_crc::crc32c(&bytes[..36]);
        bytes[36..].copy_from_slice(&check.to_be_bytes());
        bytes
    }

    /// Whether the first bytes of a connection can't become a HELLO.
    pub fn refuse_early(bytes: &[u8]) -> Option<Malformed> {
        let len = bytes.len().min(MAGIC.len());
        (bytes[..len] != MAGIC[..len]).then_some(Malformed::Magic)
    }

    /// Reads a HELLO.
    pub fn parse(bytes: &[u8; HELLO_LEN]) -> Result<Self, Malformed> {
        if bytes[..8] != MAGIC {
            return Err(Malformed::Magic);
        }
        let version = be16(bytes, 8);
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        if genie_crc::crc32c(&bytes[..36]) != be32(bytes, 36) {
            return Err(Malformed::Check);
        }
        if bytes[34..36] != [0; 2] {
            return Err(Malformed::Reserved);
        }
        let mut token = Token([0; 16]);
        token.0.copy_from_slice(&bytes[16..32]);
        Ok(Self {
            session: SessionId(be32(bytes, 12)),
            token,
            stream: be16(bytes, 10),
            streams: bytes[32],
            verdict: Verdict::parse(bytes[33])?,
        })
    }
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is a secret.
        f.debug_struct("Hello")
            .field("session", &self.session)
            .field("stream", &self.stream)
            .field("streams", &self.streams)
            .field("verdict", &self.verdict)
            .finish_non_exhaustive()
    }
}

impl Header {
    /// A frame without payload about `transfer`.
    pub fn about(kind: Kind, transfer: TransferId) -> Self {
        Self {
            kind,
            reason: Reason::None,
            payload_len: 0,
            transfer,
            offset: 0,
            crc: 0,
        }
    }

    /// A frame without payload about the connection or the session.
    pub fn plain(kind: Kind, offset: u64) -> Self {
        Self {
            offset,
            ..Self::about(
                kind,
                TransferId {
                    slot: 0,
                    generation: 0,
                },
            )
        }
    }

    /// Whether a SUM frame must directly follow this frame's payload.
    pub fn sum_follows(&self) -> bool {
        self.kind == Kind::Data && self.payload_len > SUM_ABOVE
    }

    /// Whether this DATA frame carries all of a tensor of `len` bytes. Its CRC
    /// is then the tensor's digest, and the receiver needs no DONE_OK.
    pub fn is_whole(&self, len: u64) -> bool {
        self.kind == Kind::Data && self.offset == 0 && u64::from(self.payload_len) == len
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.kind as u8;
        bytes[1] = self.reason as u8;
        bytes[4..8].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.transfer.slot.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.transfer.generation.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        let header_check = genie_crc::crc32c(&bytes[..24]);
        bytes[24..28].copy_from_slice(&header_check.to_be_bytes());
        bytes[28..].copy_from_slice(&(self.crc ^ header_check).to_be_bytes());
        bytes
    }

    /// Reads a header; its check is verified before anything in it is used.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, Malformed> {
        let header_check = be32(bytes, 24);
        if genie_crc::crc32c(&bytes[..24]) != header_check {
            return Err(Malformed::Check);
        }
        if bytes[2..4] != [0; 2] {
            return Err(Malformed::Reserved);
        }
        let kind = Kind::parse(bytes[0])?;
        let payload_len = be32(bytes, 4);
        let payload_max = if kind == Kind::Data { CHUNK_MAX } else { 0 };
        if payload_len > payload_max {
            return Err(Malformed::PayloadLen(payload_len));
        }
        Ok(Self {
            kind,
            reason: Reason::parse(bytes[1])?,
            payload_len,
            transfer: TransferId {
                slot: be32(bytes, 8),
                generation: be32(bytes, 12),
            },
            offset: u64::from(be32(bytes, 16)) << 32 | u64::from(be32(bytes, 20)),
            crc: be32(bytes, 28) ^ header_check,
        })
    }
}

impl Verdict {
    fn parse(byte: u8) -> Result<Self, Malformed> {
        Ok(match byte {
            0 => Self::Welcome,
            1 => Self::UnknownSession,
            2 => Self::WrongStream,
            3 => Self::WrongVersion,
            _ => return Err(Malformed::Verdict(byte)),
        })
    }
}

impl Kind {
    fn parse(byte: u8) -> Result<Self, Malformed> {
        Ok(match byte {
            1 => Self::Data,
            2 => Self::Done,
            3 => Self::DoneOk,
            4 => Self::DoneMismatch,
            5 => Self::ResetBySender,
            6 => Self::ResetByReceiver,
            7 => Self::Close,
            8 => Self::Ping,
            9 => Self::Pong,
            10 => Self::Sum,
            _ => return Err(Malformed::Kind(byte)),
        })
    }
}

impl Reason {
    fn parse(byte: u8) -> Result<Self, Malformed> {
        Ok(match byte {
            0 => Self::None,
            1 => Self::Cancelled,
            2 => Self::Unknown,
            3 => Self::Digest,
            _ => return Err(Malformed::Reason(byte)),
        })
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from(bytes[at]) << 8 | u16::from(bytes[at + 1])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        (1..=10u8).prop_map(|byte| Kind::parse(byte).unwrap())
    }

    fn headers() -> impl Strategy<Value = Header> {
        let ids = (any::<u32>(), any::<u32>());
        (
            kinds(),
            0..=3u8,
            0..=CHUNK_MAX,
            ids,
            any::<u64>(),
            any::<u32>(),
        )
            .prop_map(
                |(kind, reason, len, (slot, generation), offset, crc)| Header {
                    kind,
                    reason: Reason::parse(reason).unwrap(),
                    payload_len: if kind == Kind::Data { len } else { 0 },
                    transfer: TransferId { slot, generation },
                    offset,
                    crc,
                },
            )
    }

    fn hellos() -> impl Strategy<Value = Hello> {
        (
            any::<u32>(),
            any::<[u8; 16]>(),
            any::<u16>(),
            any::<u8>(),
            0..=3u8,
        )
            .prop_map(|(session, token, stream, streams, verdict)| Hello {
                session: SessionId(session),
                token: Token(token),
                stream,
                streams,
                verdict: Verdict::parse(verdict).unwrap(),
            })
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(header in headers()) {
            prop_assert_eq!(Header::parse(&header.encode()), Ok(header));
        }

        #[test]
        fn hellos_come_back_as_they_were(hello in hellos()) {
            prop_assert_eq!(Hello::parse(&hello.encode()), Ok(hello));
        }

        #[test]
        fn one_wrong_bit_in_a_header_is_noticed(header in headers(), bit in 0..28 * 8usize) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Header::parse(&bytes), Err(Malformed::Check));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(
            header in any::<[u8; HEADER_LEN]>(),
            hello in any::<[u8; 32]>(),
            tail in any::<[u8; 8]>(),
        ) {
            // With a good check the rest of the parser is reached too.
            let mut checked = header;
            checked[24..28].copy_from_slice(&crc32c::crc32c(&header[..24]).to_be_bytes());
            for bytes in [header, checked] {
                if let Ok(parsed) = Header::parse(&bytes) {
                    prop_assert_eq!(parsed.encode(), bytes);
                }
            }
            let mut bytes = [0; HELLO_LEN];
            bytes[..32].copy_from_slice(&hello);
            bytes[32..].copy_from_slice(&tail);
            if let Ok(parsed) = Hello::parse(&bytes) {
                prop_assert_eq!(parsed.encode(), bytes);
            }
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..10].copy_from_slice(&VERSION.to_be_bytes());
            let check = crc32c::crc32c(&bytes[..36]);
            bytes[36..].copy_from_slice(&check.to_be_bytes());
            if let Ok(parsed) = Hello::parse(&bytes) {
                prop_assert_eq!(parsed.encode(), bytes);
            }
        }
    }

    /// The vectors of the documentation's page, each with what it means.
    fn golden() -> [(&'static str, Vec<u8>); 6] {
        let transfer = TransferId {
            slot: 3,
            generation: 9,
        };
        let hello = Hello {
            session: SessionId(0x0102_0304),
            token: Token(*b"0123456789abcdef"),
            stream: 1,
            streams: 2,
            verdict: Verdict::Welcome,
        };
        let data = Header {
            payload_len: 6,
            offset: 1 << 40,
            crc: crc32c::crc32c(b"tensor"),
            ..Header::about(Kind::Data, transfer)
        };
        let done = Header {
            offset: 6,
            crc: crc32c::crc32c(b"tensor"),
            ..Header::about(Kind::Done, transfer)
        };
        let reset = Header {
            reason: Reason::Unknown,
            ..Header::about(Kind::ResetByReceiver, transfer)
        };
        let ping = Header::plain(Kind::Ping, 0x0a0b_0c0d);
        let sum = Header {
            crc: crc32c::crc32c(b"tensor"),
            ..Header::about(Kind::Sum, transfer)
        };
        [
            ("hello", hello.encode().to_vec()),
            ("data", data.encode().to_vec()),
            ("done", done.encode().to_vec()),
            ("reset", reset.encode().to_vec()),
            ("ping", ping.encode().to_vec()),
            ("sum", sum.encode().to_vec()),
        ]
    }

    #[test]
    fn the_documentations_vectors_are_what_is_written() {
        let page = include_str!("../../../docs/protocol-tcp.golden");
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let mut written = Vec::new();
        for (name, bytes) in golden() {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            written.push(format!("{name} {hex}"));
        }
        assert_eq!(lines.collect::<Vec<_>>(), written);
    }

    #[test]
    fn what_may_not_be_is_refused() {
        let transfer = TransferId {
            slot: 1,
            generation: 2,
        };
        let with = |kind, payload_len| {
            Header::parse(
                &Header {
                    payload_len,
                    ..Header::about(kind, transfer)
                }
                .encode(),
            )
        };
        assert_eq!(
            with(Kind::Data, u32::MAX),
            Err(Malformed::PayloadLen(u32::MAX))
        );
        assert_eq!(
            with(Kind::Data, CHUNK_MAX + 1),
            Err(Malformed::PayloadLen(CHUNK_MAX + 1))
        );
        assert_eq!(with(Kind::Ping, 1), Err(Malformed::PayloadLen(1)));
        assert!(with(Kind::Data, CHUNK_MAX).is_ok());
    }
}
