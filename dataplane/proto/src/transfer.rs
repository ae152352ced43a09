//! What has moved of one tensor: bookkeeping that both engines share.
//!
//! Nothing here knows packets, paths or sockets. [`Incoming`] belongs to the end
//! that receives, [`Outgoing`] to the end that sends; a session that changes its
//! path carries [`Incoming::missing`] over to [`Outgoing::resume`].

mod incoming;
mod outgoing;

pub use incoming::{Check, Incoming, OutOfMemory, Refusal};
pub use outgoing::{BadRange, Outgoing, Piece};

/// Bytes of one bit of the bitmap. Segments begin at multiples of it and, but
/// for the last of a transfer, are multiples of it long.
///
/// 64 is a cache line: a copy never shares one between two segments, and the
/// bitmap is 1/512 of the tensor.
pub const GRANULE: u64 = 64;

/// The longest transfer: offsets have 48 bits on the wire.
pub const LEN_MAX: u64 = (1 << 48) - 1;
