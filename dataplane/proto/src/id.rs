//! Names for sessions, transfers and the pieces of a transfer.

use serde::{Deserialize, Serialize};

/// A session as its receiver calls it: each end chooses the id it wants to see
/// in the packets it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u32);

/// A transfer as its receiver calls it.
///
/// A slot is used again only under a higher generation, so a late packet of an
/// earlier transfer can never land in a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TransferId {
    /// Index chosen by the receiver; small numbers are cheap.
    pub slot: u32,
    /// How many times the slot has been used; strictly rising.
    pub generation: u32,
}

/// Set in the slots of offers, whose ids are no peer's choice.
const OFFER: u32 = 1 << 31;

impl TransferId {
    /// The id of the offer with this number, of those that one end sends.
    pub fn of_offer(number: u64) -> Self {
        Self {
            slot: number as u32 | OFFER,
            generation: (number >> 31) as u32,
        }
    }

    /// The number of an offer; none for a transfer that was granted under an id.
    pub fn offer_number(self) -> Option<u64> {
        let low = u64::from(self.slot & !OFFER);
        (self.slot & OFFER != 0).then_some(u64::from(self.generation) << 31 | low)
    }
}

/// A contiguous piece of a transfer, as one packet carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Which transfer.
    pub transfer: TransferId,
    /// Where it begins, in bytes from the transfer's start.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u32,
}
