//! The beginning of an OFFER's payload: what is said of the tensor behind it.

use arrayvec::ArrayVec;
use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ParseError;
use crate::digest::Digest;

/// Bytes of an OFFER's payload before the metadata.
pub const OFFER_LEN: usize = 12;

/// The most metadata of an OFFER: a tensor's type and shape in eight dimensions
/// take as much, and header, metadata and a few hundred bytes of a tensor still
/// lie in one piece of memory.
pub const METADATA_MAX: usize = 72;

/// On OFFER: it was given up. Its number is used, nothing is delivered.
pub const FLAG_VOID: u8 = 1;

/// What the application says of a tensor that comes in one packet; its meaning
/// is the application's.
pub type Metadata = ArrayVec<u8, METADATA_MAX>;

/// What an OFFER's payload begins with; the tensor's bytes are the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// CRC32C of the tensor.
    pub digest: Digest,
    /// The low 32 bits of how many OFFERs the peer may have sent in all.
    pub granted: u32,
    /// So many packets arrived, from the one numbered in the header's offset
    /// downward; zero says nothing.
    pub acked: u16,
    /// What the application says.
    pub metadata: Metadata,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawOffer {
    digest: U32,
    granted: U32,
    acked: U16,
    metadata_len: U16,
}

const _: () = assert!(size_of::<RawOffer>() == OFFER_LEN);

impl Offer {
    /// Reads the first bytes of a payload: at least [`OFFER_LEN`] and the
    /// metadata must be there.
    pub fn parse(payload: &[u8]) -> Result<Self, ParseError> {
        let (raw, rest) = RawOffer::ref_from_prefix(payload).map_err(|_| ParseError::Body)?;
        let metadata = rest.get(..usize::from(raw.metadata_len.get()));
        let metadata = metadata.and_then(|bytes| Metadata::try_from(bytes).ok());
        Ok(Self {
            digest: Digest(raw.digest.get()),
            granted: raw.granted.get(),
            acked: raw.acked.get(),
            metadata: metadata.ok_or(ParseError::Body)?,
        })
    }

    /// How many bytes it takes before the tensor's.
    pub fn len_bytes(&self) -> usize {
        OFFER_LEN + self.metadata.len()
    }

    /// Its bytes.
    pub fn encode(&self) -> ArrayVec<u8, { OFFER_LEN + METADATA_MAX }> {
        let raw = RawOffer {
            digest: self.digest.0.into(),
            granted: self.granted.into(),
            acked: self.acked.into(),
            metadata_len: (self.metadata.len() as u16).into(),
        };
        let mut bytes = ArrayVec::new();
        for part in [raw.as_bytes(), &self.metadata] {
            bytes
                .try_extend_from_slice(part)
                .expect("room for both at their longest");
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_offer_comes_back_as_it_went(
            numbers: (u32, u32, u16),
            metadata in prop::collection::vec(any::<u8>(), 0..=METADATA_MAX),
            tensor in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let offer = Offer {
                digest: Digest(numbers.0),
                granted: numbers.1,
                acked: numbers.2,
                metadata: metadata[..].try_into().unwrap(),
            };
            let mut payload = offer.encode().to_vec();
            prop_assert_eq!(payload.len(), offer.len_bytes());
            prop_assert_eq!(Offer::parse(&payload[..payload.len()]), Ok(offer.clone()));
            prop_assert_eq!(Offer::parse(&payload[..payload.len() - 1]), Err(ParseError::Body));
            payload.extend(tensor);
            prop_assert_eq!(Offer::parse(&payload), Ok(offer));
        }
    }

    #[test]
    fn metadata_beyond_its_limit_is_malformed() {
        let mut payload = vec![0; OFFER_LEN + METADATA_MAX + 1];
        payload[11] = METADATA_MAX as u8;
        assert!(Offer::parse(&payload).is_ok());
        payload[11] += 1;
        assert_eq!(Offer::parse(&payload), Err(ParseError::Body));
    }
}
