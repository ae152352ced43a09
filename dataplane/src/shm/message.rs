//! What two engines of one host say to each other: 32 bytes a message.
//!
//! Sockets keep messages whole (SOCK_SEQPACKET), so there is no framing; some
//! messages carry a descriptor. Numbers are little-endian. Whatever arrives is
//! either a message or `None`.

#![forbid(unsafe_code)]

use genie_proto::{Digest, SessionId, TransferId};

use crate::tcp::Token;

/// Bytes of every message.
pub const LEN: usize = 32;

/// Told in HELLO; another number is another language.
const VERSION: u8 = 1;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The dialler wants this session; with a descriptor of a file that
    /// contains the token.
    Hello {
        /// As the acceptor calls it.
        session: SessionId,
        /// Of that session.
        token: Token,
    },
    /// It may have it; with such a descriptor, too.
    Welcome,
    /// It may not.
    Refused,
    /// The descriptor with it is what OFFERs call by this number.
    Region {
        /// Chosen by the sender.
        region: u32,
    },
    /// No more OFFERs from that region.
    Forget {
        /// As in REGION.
        region: u32,
    },
    /// A tensor lies there: take it as the transfer that was granted.
    Offer {
        /// Chosen by the receiver.
        transfer: TransferId,
        /// As in REGION.
        region: u32,
        /// Where in it.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The receiver has all of it.
    Done {
        /// As in OFFER.
        transfer: TransferId,
        /// Of what it has.
        digest: Digest,
    },
    /// The sender compared that with its own.
    Verdict {
        /// As in DONE.
        transfer: TransferId,
        /// Whether they are equal.
        equal: bool,
    },
    /// A transfer is given up.
    Reset {
        /// Which.
        transfer: TransferId,
        /// By its sender, or by its receiver.
        by_sender: bool,
        /// Why.
        reason: Reason,
    },
    /// A sign of life, to be answered.
    Ping,
    /// The answer.
    Pong,
    /// The session was closed.
    Bye,
}

/// Why a transfer was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Whoever wanted it no longer does.
    Cancelled,
    /// The receiver expects no such transfer.
    Unknown,
    /// It has another length than was granted.
    Length,
    /// Its bytes cannot be read where they should be.
    Memory,
}

impl Message {
    /// The bytes of it.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut fields = Fields(&mut bytes);
        match *self {
            Self::Hello { session, token } => {
                fields.kind(1, VERSION);
                fields.u32(12, session.0);
                fields.0[16..32].copy_from_slice(&token.0);
            }
            Self::Welcome => fields.kind(2, 0),
            Self::Refused => fields.kind(3, 0),
            Self::Region { region } => {
                fields.kind(4, 0);
                fields.u32(12, region);
            }
            Self::Forget { region } => {
                fields.kind(5, 0);
                fields.u32(12, region);
            }
            Self::Offer {
                transfer,
                region,
                offset,
                len,
            } => {
                fields.kind(6, 0);
                fields.transfer(transfer);
                fields.u32(12, region);
                fields.u64(16, offset);
                fields.u64(24, len);
            }
            Self::Done { transfer, digest } => {
                fields.kind(7, 0);
                fields.transfer(transfer);
                fields.u32(12, digest.0);
            }
            Self::Verdict { transfer, equal } => {
                fields.kind(8, u8::from(equal));
                fields.transfer(transfer);
            }
            Self::Reset {
                transfer,
                by_sender,
                reason,
            } => {
                fields.kind(9, u8::from(by_sender));
                fields.transfer(transfer);
                fields.u32(12, reason.number());
            }
            Self::Ping => fields.kind(10, 0),
            Self::Pong => fields.kind(11, 0),
            Self::Bye => fields.kind(12, 0),
        }
        bytes
    }

    /// The message that these bytes are; none if they are not one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LEN] = bytes.try_into().ok()?;
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let (flag, number) = (bytes[1], u32_at(12)?);
        let transfer = TransferId {
            slot: u32_at(4)?,
            generation: u32_at(8)?,
        };
        Some(match bytes[0] {
            1 if flag == VERSION => Self::Hello {
                session: SessionId(number),
                token: Token(bytes.get(16..32)?.try_into().ok()?),
            },
            2 => Self::Welcome,
            3 => Self::Refused,
            4 => Self::Region { region: number },
            5 => Self::Forget { region: number },
            6 => Self::Offer {
                transfer,
                region: number,
                offset: u64_at(16)?,
                len: u64_at(24)?,
            },
            7 => Self::Done {
                transfer,
                digest: Digest(number),
            },
            8 => Self::Verdict {
                transfer,
                equal: flag == 1,
            },
            9 => Self::Reset {
                transfer,
                by_sender: flag == 1,
                reason: Reason::of(number)?,
            },
            10 => Self::Ping,
            11 => Self::Pong,
            12 => Self::Bye,
            _ => return None,
        })
    }
}

/// Where the fields of a message are.
struct Fields<'a>(&'a mut [u8; LEN]);

impl Fields<'_> {
    fn kind(&mut self, kind: u8, flag: u8) {
        (self.0[0], self.0[1]) = (kind, flag);
    }

    fn transfer(&mut self, transfer: TransferId) {
        self.u32(4, transfer.slot);
        self.u32(8, transfer.generation);
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

impl Reason {
    fn number(self) -> u32 {
        match self {
            Self::Cancelled => 0,
            Self::Unknown => 1,
            Self::Length => 2,
            Self::Memory => 3,
        }
    }

    fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Cancelled,
            1 => Self::Unknown,
            2 => Self::Length,
            3 => Self::Memory,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_is_decoded_is_encoded_to_the_same_message(bytes: [u8; LEN], kind in 0u8..14) {
            let mut bytes = bytes;
            bytes[0] = kind;
            if let Some(message) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&message.encode()), Some(message));
            }
        }

        #[test]
        fn an_offer_keeps_its_numbers(slot: u32, generation: u32, region: u32, offset: u64, len: u64) {
            let transfer = TransferId { slot, generation };
            let offer = Message::Offer { transfer, region, offset, len };
            prop_assert_eq!(Message::decode(&offer.encode()), Some(offer));
        }

        #[test]
        fn other_lengths_are_no_message(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            prop_assume!(bytes.len() != LEN);
            prop_assert_eq!(Message::decode(&bytes), None);
        }
    }

    #[test]
    fn a_hello_of_another_version_is_no_message() {
        let hello = Message::Hello {
            session: SessionId(7),
            token: Token([9; 16]),
        };
        let mut bytes = hello.encode();
        assert_eq!(Message::decode(&bytes), Some(hello));
        bytes[1] += 1;
        assert_eq!(Message::decode(&bytes), None);
    }
}
