//! The bytes of a packet: a header of 40 bytes, then a payload.
//!
//! The one definition in code of what `docs/protocol.md` describes. Parsing
//! never panics and nothing of a header is believed before its check matched.
//! Network byte order throughout.

mod body;
mod header;
mod offer;

pub use body::{Ack, AckRange, Body, Done, DoneAck, Grant, Probe, ProbeAck, Reset, Scope};
pub use header::{
    FLAG_FIN, HEADER_LEN, Header, Kind, PLAIN_LEN, ParseError, VERSION, header_crc, peek_kind,
    peek_number, peek_session,
};
pub use offer::{FLAG_VOID, METADATA_MAX, Metadata, OFFER_LEN, Offer};

/// The largest payload of a control packet: any link carries it beside the headers.
pub const CONTROL_MAX: usize = 472;

/// The most ranges an ACK carries; a receiver remembers no more. With an ACK
/// for every gap and thirty-two gaps in each, an acknowledgement is lost only
/// if thirty ACKs in a row are.
pub const ACK_RANGES_MAX: usize = 32;

/// Packet numbers and offsets are below this: they have 48 bits.
pub const U48_LIMIT: u64 = 1 << 48;

/// CRC32C, as in RFC 3720: what header and payload checks are made of.
pub fn crc(bytes: &[u8]) -> u32 {
    genie_crc::crc32c(bytes)
}
