//! Which bytes of an expected transfer have been applied and verified.

use std::ops::Range;

use super::{GRANULE, LEN_MAX};
use crate::digest::{Digest, DigestBuilder};

const WORD_BITS: u64 = u64::BITS as u64;

/// The bitmap and digest of a transfer that is being received.
///
/// Its invariant: a bit is set only by [`Incoming::apply`], once, and bytes
/// under a set bit are never offered for writing again.
#[derive(Debug)]
pub struct Incoming {
    len: u64,
    /// Has room for the whole from the start, and words up to the highest one
    /// used: clearing it all at once would hold up the engine for a huge tensor.
    bitmap: Vec<u64>,
    applied: u64,
    digest: DigestBuilder,
}

/// What to do with a segment that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Not here yet: write it, verify it, then [`Incoming::apply`] it.
    Fresh,
    /// Here already, all of it: acknowledge, do not write.
    Duplicate,
    /// Drop it.
    Refused(Refusal),
}

/// Why a segment is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It reaches beyond the length that was granted.
    #[error("beyond the granted length")]
    OutOfBounds,
    /// Its offset, or its length before the end, is no multiple of [`GRANULE`].
    #[error("not aligned to a granule")]
    Misaligned,
    /// Part of it has been applied. Writing it would overwrite verified bytes
    /// with bytes not yet verified, so it is dropped; a sender only ever splits
    /// what it sends again, so the missing part comes by itself.
    #[error("overlaps bytes already verified")]
    Overlap,
    /// It has no bytes.
    #[error("empty")]
    Empty,
}

/// There is no memory for the bitmap of so long a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for the bitmap of a transfer of {0} bytes")]
pub struct OutOfMemory(pub u64);

impl Incoming {
    /// Grants a transfer of `len` bytes; the only allocation of its life.
    pub fn new(len: u64) -> Result<Self, OutOfMemory> {
        if len > LEN_MAX {
            return Err(OutOfMemory(len));
        }
        let words = len.div_ceil(GRANULE).div_ceil(WORD_BITS);
        let words = usize::try_from(words).map_err(|_| OutOfMemory(len))?;
        let mut bitmap = Vec::new();
        bitmap
            .try_reserve_exact(words)
            .map_err(|_| OutOfMemory(len))?;
        Ok(Self {
            len,
            bitmap,
            applied: 0,
            digest: DigestBuilder::new(len),
        })
    }

    /// The granted length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the transfer has no bytes at all; it is then complete from the start.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes applied and verified.
    pub fn bytes_applied(&self) -> u64 {
        self.applied
    }

    /// Whether every byte is applied.
    pub fn is_complete(&self) -> bool {
        self.applied == self.len
    }

    /// The digest of the bytes applied; of the whole once complete.
    pub fn digest(&self) -> Digest {
        self.digest.finish()
    }

    /// Judges a segment before anything of it is written.
    pub fn check(&self, offset: u64, len: u64) -> Check {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.len) else {
            return Check::Refused(Refusal::OutOfBounds);
        };
        if len == 0 {
            return Check::Refused(Refusal::Empty);
        }
        if !offset.is_multiple_of(GRANULE) || (!end.is_multiple_of(GRANULE) && end != self.len) {
            return Check::Refused(Refusal::Misaligned);
        }
        let (mut none, mut all) = (true, true);
        for (word, mask) in words(offset, end) {
            let set = self.word(word) & mask;
            none &= set == 0;
            all &= set == mask;
        }
        match (none, all) {
            (true, _) => Check::Fresh,
            (_, true) => Check::Duplicate,
            _ => Check::Refused(Refusal::Overlap),
        }
    }

    /// Marks a segment that [`Incoming::check`] called fresh as written and
    /// verified; `crc` is the CRC32C of its bytes.
    pub fn apply(&mut self, offset: u64, len: u64, crc: u32) {
        debug_assert_eq!(self.check(offset, len), Check::Fresh);
        for (word, mask) in words(offset, offset + len) {
            if word >= self.bitmap.len() {
                self.bitmap.resize(word + 1, 0);
            }
            self.bitmap[word] |= mask;
        }
        self.applied += len;
        self.digest.add(offset, len, crc);
    }

    /// Takes back a range of which every byte is applied: it is missing again.
    /// `crc` is the CRC32C of its bytes as they were applied.
    ///
    /// For transfers that another path goes on with: one that is complete but
    /// not confirmed needs something to be sent again, and one with too many
    /// gaps to list needs fewer.
    pub fn retract(&mut self, range: Range<u64>, crc: u32) {
        let len = range.end - range.start;
        debug_assert_eq!(self.check(range.start, len), Check::Duplicate);
        for (word, mask) in words(range.start, range.end) {
            self.bitmap[word] &= !mask;
        }
        self.applied -= len;
        // A CRC is linear: what is added twice cancels out.
        self.digest.add(range.start, len, crc);
    }

    /// The byte ranges applied, ascending and not adjacent.
    pub fn applied(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let granules = self.len.div_ceil(GRANULE);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.find(at, granules, true)?;
            let end = self.find(start, granules, false).unwrap_or(granules);
            at = end;
            Some(start * GRANULE..(end * GRANULE).min(self.len))
        })
    }

    /// The byte ranges not applied yet, ascending and not adjacent.
    pub fn missing(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let granules = self.len.div_ceil(GRANULE);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.find(at, granules, false)?;
            let end = self.find(start, granules, true).unwrap_or(granules);
            at = end;
            Some(start * GRANULE..(end * GRANULE).min(self.len))
        })
    }

    fn word(&self, at: usize) -> u64 {
        self.bitmap.get(at).copied().unwrap_or(0)
    }

    /// The first granule at or after `from` whose bit is `set`.
    fn find(&self, from: u64, granules: u64, set: bool) -> Option<u64> {
        let mut at = from;
        while at < granules {
            let word = self.word((at / WORD_BITS) as usize);
            let wanted = if set { word } else { !word } >> (at % WORD_BITS);
            if wanted != 0 {
                let found = at + u64::from(wanted.trailing_zeros());
                return (found < granules).then_some(found);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }
}

/// The bitmap words that hold the granules of `[offset, end)`, with their bits.
fn words(offset: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (offset / GRANULE, end.div_ceil(GRANULE));
    (first / WORD_BITS..last.div_ceil(WORD_BITS)).map(move |word| {
        let base = word * WORD_BITS;
        let low = first.saturating_sub(base);
        let high = (last - base).min(WORD_BITS);
        let mask = (u64::MAX >> (WORD_BITS - (high - low))) << low;
        (word as usize, mask)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_transfer_is_complete_at_once() {
        let incoming = Incoming::new(0).unwrap();
        assert!(incoming.is_complete());
        assert_eq!(incoming.digest(), Digest(0));
        assert_eq!(incoming.missing().count(), 0);
    }

    #[test]
    fn bounds_alignment_and_overlap_are_refused() {
        let mut incoming = Incoming::new(1000).unwrap();
        assert_eq!(
            incoming.check(960, 41),
            Check::Refused(Refusal::OutOfBounds)
        );
        assert_eq!(
            incoming.check(u64::MAX, 2),
            Check::Refused(Refusal::OutOfBounds)
        );
        assert_eq!(incoming.check(1, 64), Check::Refused(Refusal::Misaligned));
        assert_eq!(incoming.check(0, 63), Check::Refused(Refusal::Misaligned));
        assert_eq!(incoming.check(0, 0), Check::Refused(Refusal::Empty));
        assert_eq!(incoming.check(960, 40), Check::Fresh);
        incoming.apply(64, 64, 1);
        assert_eq!(incoming.check(64, 64), Check::Duplicate);
        assert_eq!(incoming.check(0, 128), Check::Refused(Refusal::Overlap));
        assert_eq!(incoming.missing().collect::<Vec<_>>(), [0..64, 128..1000]);
    }

    #[test]
    fn what_is_taken_back_is_missing_and_no_longer_in_the_digest() {
        let data: Vec<u8> = (0..1000).map(|i| (i * 7) as u8).collect();
        let crc =
            |range: Range<u64>| crc32c::crc32c(&data[range.start as usize..range.end as usize]);
        let mut incoming = Incoming::new(1000).unwrap();
        for range in [0..256, 512..1000, 256..512] {
            incoming.apply(range.start, range.end - range.start, crc(range));
        }
        assert!(incoming.is_complete());
        for range in [960..1000, 128..320] {
            incoming.retract(range.clone(), crc(range));
        }
        assert_eq!(
            incoming.missing().collect::<Vec<_>>(),
            [128..320, 960..1000]
        );
        assert_eq!(incoming.applied().collect::<Vec<_>>(), [0..128, 320..960]);
        assert_eq!(incoming.bytes_applied(), 1000 - 192 - 40);
        for range in [960..1000, 128..320] {
            assert_eq!(
                incoming.check(range.start, range.end - range.start),
                Check::Fresh
            );
            incoming.apply(range.start, range.end - range.start, crc(range));
        }
        assert_eq!(incoming.digest(), Digest(crc32c::crc32c(&data)));
    }

    #[test]
    fn a_length_beyond_48_bits_is_refused_and_one_beyond_32_is_not() {
        assert_eq!(
            Incoming::new(LEN_MAX + 1).unwrap_err(),
            OutOfMemory(LEN_MAX + 1)
        );
        let len = (1 << 32) + 128;
        let mut incoming = Incoming::new(len).unwrap();
        incoming.apply(1 << 32, 64, 7);
        assert_eq!(incoming.check(0, 64), Check::Fresh);
        assert_eq!(incoming.check(1 << 32, 64), Check::Duplicate);
        assert_eq!(
            incoming.missing().collect::<Vec<_>>(),
            [0..1 << 32, (1 << 32) + 64..(1 << 32) + 128]
        );
    }

    proptest! {
        #[test]
        fn the_bitmap_agrees_with_a_list_of_bytes(
            len in 1u64..20_000,
            segments in proptest::collection::vec((0u64..320, 1u64..200), 1..60),
        ) {
            let mut incoming = Incoming::new(len).unwrap();
            let mut model = vec![false; len as usize];
            for (at, granules) in segments {
                let offset = at * GRANULE;
                if offset >= len {
                    continue;
                }
                let size = (granules * GRANULE).min(len - offset);
                let bytes = &mut model[offset as usize..(offset + size) as usize];
                let expected = if bytes.iter().all(|set| !set) {
                    Check::Fresh
                } else if bytes.iter().all(|set| *set) {
                    Check::Duplicate
                } else {
                    Check::Refused(Refusal::Overlap)
                };
                prop_assert_eq!(incoming.check(offset, size), expected);
                if expected == Check::Fresh {
                    incoming.apply(offset, size, 0);
                    bytes.fill(true);
                }
            }
            let mut missing = vec![false; len as usize];
            for range in incoming.missing() {
                missing[range.start as usize..range.end as usize].fill(true);
            }
            prop_assert!(missing.iter().zip(&model).all(|(missing, set)| missing != set));
            prop_assert_eq!(
                incoming.bytes_applied(),
                model.iter().filter(|set| **set).count() as u64
            );
        }
    }
}
