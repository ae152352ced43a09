//! The memory that blocks come from and go to, and what is in it.
//!
//! Both ends of a row use buffers in the same turn: block `n` is in buffer
//! `n % count` at either end. So what must have arrived is known without
//! asking: the pattern of the row at that place.

use std::ops::Range;
use std::sync::Arc;

use genie_client::Memory;
use genie_dataplane::memory::{Backing, Lease, Region, View};
use serde::{Deserialize, Serialize};

use super::BenchError;

/// Buffers start on cache lines.
const ALIGN: u64 = 64;

/// Bytes filled or compared at a time.
const PIECE: usize = 1 << 16;

/// Buffers of a hot row together, unless the batch needs more: they stay in a
/// second-level cache.
const HOT_BYTES: u64 = 1 << 20;

/// Receives posted ahead, at the most: half of what an endpoint has outstanding.
const POSTED_MAX: u64 = 1024;

/// Where the blocks of one row lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Bytes of a block.
    pub block_size: u64,
    /// Buffers, used in turn.
    pub count: u64,
    /// Receives posted ahead.
    pub posted: u64,
    /// Tells this row's pattern from any other's.
    pub salt: u64,
}

/// One end's memory for all rows.
#[derive(Clone, Debug)]
pub struct Pool {
    whole: Lease,
}

/// Bytes of a block's number at its beginning; of shorter blocks, their length.
const STAMP: usize = 8;

impl Layout {
    /// Lays out a row: as many buffers as fit `cold_bytes`, or a few.
    pub fn new(block_size: u64, batch_size: usize, cold_bytes: Option<u64>, salt: u64) -> Self {
        let least = 2 * batch_size as u64;
        let stride = block_size.next_multiple_of(ALIGN).max(ALIGN);
        let hot = (HOT_BYTES / stride).min(POSTED_MAX);
        let count = cold_bytes.map_or(hot, |bytes| bytes / stride).max(least);
        Self {
            block_size,
            count,
            posted: count.min(POSTED_MAX).max(least),
            salt,
        }
    }

    /// Bytes the row needs at each end.
    pub fn bytes(&self) -> u64 {
        self.stride() * self.count
    }

    /// Where block number `number` begins.
    pub fn offset(&self, number: u64) -> u64 {
        number % self.count * self.stride()
    }

    /// The blocks to compare when `blocks` were moved and `bytes_max` are to be
    /// compared at either end of them: the first of them, and the last.
    pub fn checked(&self, blocks: u64, bytes_max: u64) -> [Range<u64>; 2] {
        let count = blocks.min(self.count);
        let few = (bytes_max / self.block_size.max(1)).max(1).min(count);
        [0..few, few.max(count - few)..count]
    }

    /// The bytes of these blocks; their buffers are neighbours.
    pub fn range(&self, blocks: &Range<u64>) -> Range<u64> {
        match blocks.end.checked_sub(1) {
            Some(last) if !blocks.is_empty() => {
                self.offset(blocks.start)..self.offset(last) + self.block_size
            }
            _ => 0..0,
        }
    }

    fn stride(&self) -> u64 {
        self.block_size.next_multiple_of(ALIGN).max(ALIGN)
    }
}

impl Pool {
    /// Takes memory, all pages of it present.
    pub fn new(bytes: u64, memory: Memory) -> Result<Self, BenchError> {
        let len = usize::try_from(bytes.max(1)).map_err(|_| BenchError::TooLarge(bytes))?;
        let region: Arc<Region> = match memory {
            Memory::Hugepage => Region::with_backing(len, Backing::HUGE_2M)?,
            Memory::Host => Region::with_backing(len, Backing::Shmem)?,
            // A device's memory is reached through agents; what is beside it is anywhere.
            Memory::Auto | Memory::Cuda(_) | Memory::Sim => Region::allocate(len)?.0,
        };
        Ok(Self {
            whole: Lease::whole(region),
        })
    }

    /// What the pages are, as a row says it.
    pub fn pages(&self) -> &'static str {
        match self.whole.region().backing() {
            Backing::Shmem => "pages",
            Backing::HugeTlb { .. } => "hugepages",
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.whole.len() as u64
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty()
    }

    /// Its first `bytes`.
    pub fn first(&self, bytes: usize) -> Result<Lease, BenchError> {
        let outside = |_| BenchError::TooLarge(bytes as u64);
        self.whole.slice(0..bytes as u64).map_err(outside)
    }

    /// Block number `number` of a row.
    pub fn block(&self, layout: &Layout, number: u64) -> Result<Lease, BenchError> {
        let start = layout.offset(number);
        let outside = |_| BenchError::TooLarge(layout.bytes());
        self.whole
            .slice(start..start + layout.block_size)
            .map_err(outside)
    }

    /// Writes the row's pattern into all its buffers.
    pub fn fill(&self, layout: &Layout) {
        let end = layout.bytes().min(self.len());
        let used = self.whole.slice(0..end).expect("no longer than all of it");
        fill(&used, layout.salt, 0);
    }

    /// Writes its number into a block that is about to be sent, so that one that
    /// lay there before, or comes late, is not taken for it.
    pub fn stamp(&self, layout: &Layout, number: u64) -> Result<Lease, BenchError> {
        let block = self.block(layout, number)?;
        let stamp = number.to_le_bytes();
        block.write_at(0, View::from(&stamp[..STAMP.min(block.len())]));
        Ok(block)
    }

    /// Whether the block that has arrived as this number is it.
    pub fn has_stamp(&self, layout: &Layout, number: u64) -> Result<bool, BenchError> {
        let block = self.block(layout, number)?;
        let (mut stamp, len) = ([0; STAMP], STAMP.min(block.len()));
        block.read_at(0, &mut stamp[..len]);
        Ok(stamp[..len] == number.to_le_bytes()[..len])
    }

    /// [`Pool::check`] of blocks that are stamped: the last in each buffer.
    pub fn check_stamped(
        &self,
        layout: &Layout,
        blocks: u64,
        bytes_max: u64,
    ) -> Result<u64, BenchError> {
        let mut checked = 0;
        for buffer in layout.checked(blocks, bytes_max).into_iter().flatten() {
            let number = buffer + (blocks - 1 - buffer) / layout.count * layout.count;
            let block = self.block(layout, buffer)?;
            let rest = STAMP.min(block.len());
            let unstamped = (block.slice(rest as u64..block.len() as u64)).expect("a part of it");
            let at = layout.offset(buffer) + rest as u64;
            if !self.has_stamp(layout, number)? || !is_pattern(&unstamped, layout.salt, at) {
                return Err(BenchError::Inconsistent { block: number });
            }
            checked += 1;
        }
        Ok(checked)
    }

    /// Compares the first `blocks` of a row with its pattern, up to `bytes_max`
    /// from either end of them; returns how many were looked at, or which is wrong.
    pub fn check(&self, layout: &Layout, blocks: u64, bytes_max: u64) -> Result<u64, BenchError> {
        let mut checked = 0;
        for block in layout.checked(blocks, bytes_max).into_iter().flatten() {
            let bytes = self.block(layout, block)?;
            if !is_pattern(&bytes, layout.salt, layout.offset(block)) {
                return Err(BenchError::Inconsistent { block });
            }
            checked += 1;
        }
        Ok(checked)
    }
}

impl From<Lease> for Pool {
    /// Memory that is there already.
    fn from(whole: Lease) -> Self {
        Self { whole }
    }
}

/// Writes what the pattern of `salt` has from place `from` on, a multiple of 8.
pub fn fill(lease: &Lease, salt: u64, from: u64) {
    let mut piece = vec![0; PIECE.min(lease.len())];
    for start in (0..lease.len()).step_by(PIECE) {
        let len = PIECE.min(lease.len() - start);
        pattern(salt, from + start as u64, &mut piece[..len]);
        lease.write_at(start, View::from(&piece[..len]));
    }
}

/// Whether the bytes are those of the pattern of `salt` from place `from` on.
pub fn is_pattern(lease: &Lease, salt: u64, from: u64) -> bool {
    let (mut is, mut should) = (vec![0; PIECE], vec![0; PIECE]);
    (0..lease.len()).step_by(PIECE).all(|start| {
        let len = PIECE.min(lease.len() - start);
        lease.read_at(start, &mut is[..len]);
        pattern(salt, from + start as u64, &mut should[..len]);
        is[..len] == should[..len]
    })
}

/// The bytes at `offset`, a multiple of 8, of the pattern of `salt`.
fn pattern(salt: u64, offset: u64, into: &mut [u8]) {
    for (index, word) in into.chunks_mut(8).enumerate() {
        // SplitMix64 (Steele, Lea, Flood): each word depends on its place only.
        let mut mixed = (offset / 8 + index as u64).wrapping_add(salt << 40);
        mixed = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^= mixed >> 27;
        word.copy_from_slice(&mixed.to_le_bytes()[..word.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_room_for_twice_its_batch_and_cold_for_more() {
        let hot = Layout::new(64, 1, None, 1);
        assert_eq!((hot.count, hot.posted), (1024, 1024));
        let large = Layout::new(1 << 30, 2, None, 1);
        assert_eq!((large.count, large.posted, large.bytes()), (4, 4, 4 << 30));
        let cold = Layout::new(1 << 20, 4, Some(1 << 30), 1);
        assert_eq!((cold.count, cold.posted), (1024, 1024));
        assert_eq!(cold.offset(1025), 1 << 20);
    }

    #[test]
    fn one_wrong_byte_is_found_and_another_rows_pattern_is_wrong() {
        let layout = Layout::new(1000, 2, None, 1);
        let pool = Pool::new(layout.bytes(), Memory::Host).unwrap();
        pool.fill(&layout);
        assert_eq!(pool.check(&layout, 100, u64::MAX).unwrap(), 100);
        assert!(
            pool.check(&Layout { salt: 2, ..layout }, 1, u64::MAX)
                .is_err()
        );
        let block = pool.block(&layout, 57).unwrap();
        let mut byte = [0];
        block.read_at(999, &mut byte);
        block.write_at(999, View::from(&[byte[0] ^ 1][..]));
        let found = pool.check(&layout, 100, u64::MAX);
        assert!(
            matches!(found, Err(BenchError::Inconsistent { block: 57 })),
            "{found:?}"
        );
        assert_eq!(pool.check(&layout, 57, u64::MAX).unwrap(), 57);
    }

    #[test]
    fn a_block_that_lay_there_before_is_not_taken_for_the_next() {
        for block_size in [3, 8, 1000] {
            let layout = Layout::new(block_size, 2, None, 1);
            let pool = Pool::new(layout.bytes(), Memory::Host).unwrap();
            pool.fill(&layout);
            let blocks = layout.count + 5;
            for number in 0..blocks {
                assert!(!pool.has_stamp(&layout, number).unwrap() || block_size < 8);
                pool.stamp(&layout, number).unwrap();
                assert!(pool.has_stamp(&layout, number).unwrap());
            }
            let checked = pool.check_stamped(&layout, blocks, u64::MAX).unwrap();
            assert_eq!(checked, layout.count);
            // One that never came: its buffer has the one of a lap before.
            let found = pool.check_stamped(&layout, blocks + 1, u64::MAX);
            let missing = blocks;
            assert!(
                matches!(found, Err(BenchError::Inconsistent { block }) if block == missing),
                "{found:?}"
            );
        }
    }
}
