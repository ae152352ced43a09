//! Arenas: a region that tensors are allocated in, in any order.
//!
//! Used by applications, which allocate in memory that they share with their
//! agent without asking it, and by whoever else cuts a region into tensors.
//! The invariant: *two blocks never overlap, bytes that a lease holds are not
//! free, and what is freed joins its neighbours*, so that nobody writes into a
//! transfer that has not ended, and an arena whose blocks are all gone is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Lease, Region};

/// Every block starts at a multiple of this: a cache line, and the widest
/// vector that today's processors load at once.
pub const ALIGNMENT: usize = 64;

/// A region from which blocks are allocated. Clones share it; any thread may
/// use it. The region lives as long as a clone, a block or a lease of one.
#[derive(Clone, Debug)]
pub struct Arena {
    inner: Arc<Inner>,
}

/// Some bytes of an arena. Clones share them; they are free again when the last
/// clone and the last lease of them are gone.
#[derive(Clone, Debug)]
pub struct Block {
    used: Arc<Used>,
}

/// Bytes that are not free, for as long as a block or a lease holds this.
#[derive(Debug)]
pub(super) struct Used {
    arena: Arena,
    offset: usize,
    len: usize,
}

/// There is no gap that is long enough.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "no {wanted} bytes in a row are free in the arena (longest {longest}, in total {free}): \
     drop tensors or ask for a larger arena"
)]
pub struct NoRoom {
    /// Bytes asked for.
    pub wanted: usize,
    /// Bytes of the longest gap.
    pub longest: usize,
    /// Bytes of all gaps.
    pub free: usize,
}

#[derive(Debug)]
struct Inner {
    region: Arc<Region>,
    gaps: Mutex<Gaps>,
}

/// What is free: the same gaps by place, to join them, and by length, to find
/// the shortest that will do.
#[derive(Debug, Default)]
struct Gaps {
    by_offset: BTreeMap<usize, usize>,
    by_len: BTreeSet<(usize, usize)>,
    free: usize,
}

impl Arena {
    /// An arena over all of `region`.
    pub fn new(region: Arc<Region>) -> Self {
        let mut gaps = Gaps::default();
        gaps.insert(0, region.len());
        let gaps = Mutex::new(gaps);
        Self {
            inner: Arc::new(Inner { region, gaps }),
        }
    }

    /// The region underneath.
    pub fn region(&self) -> &Arc<Region> {
        &self.inner.region
    }

    /// Bytes that are free, in however many pieces.
    pub fn free_bytes(&self) -> usize {
        self.lock().free
    }

    /// Allocates `len` bytes that start at a multiple of [`ALIGNMENT`].
    ///
    /// They hold whatever was there before. None at all is a block too.
    pub fn allocate(&self, len: usize) -> Result<Block, NoRoom> {
        let block = |offset| {
            let arena = self.clone();
            let used = Arc::new(Used { arena, offset, len });
            Block { used }
        };
        if len == 0 {
            return Ok(block(0));
        }
        let mut gaps = self.lock();
        match room(len).and_then(|room| gaps.take(room)) {
            Some(offset) => Ok(block(offset)),
            None => Err(NoRoom {
                wanted: len,
                longest: gaps.by_len.last().map_or(0, |(len, _)| *len),
                free: gaps.free,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Gaps> {
        // Nothing here panics while it holds the lock half-changed.
        self.inner
            .gaps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// Offset of the first byte in the region.
    pub fn offset(&self) -> usize {
        self.used.offset
    }

    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.used.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A hold on the bytes, which keeps them from being allocated again.
    pub fn lease(&self) -> Lease {
        let region = Arc::clone(self.used.arena.region());
        Lease::new(region, self.offset() as u64, self.len() as u64)
            .expect("a block lies inside its region")
            .keeping(Arc::clone(&self.used))
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        if let Some(room) = room(self.len).filter(|room| *room > 0) {
            self.arena.lock().give_back(self.offset, room);
        }
    }
}

/// What a block of `len` bytes takes.
fn room(len: usize) -> Option<usize> {
    len.checked_next_multiple_of(ALIGNMENT)
}

impl Gaps {
    /// Cuts `room` bytes off the shortest gap that has them.
    fn take(&mut self, room: usize) -> Option<usize> {
        let (len, offset) = *self.by_len.range((room, 0)..).next()?;
        self.remove(offset, len);
        if len > room {
            self.insert(offset + room, len - room);
        }
        Some(offset)
    }

    fn give_back(&mut self, offset: usize, room: usize) {
        let (mut start, mut end) = (offset, offset + room);
        let before = self.by_offset.range(..offset).next_back();
        if let Some((at, len)) = before.map(|(at, len)| (*at, *len))
            && at + len == start
        {
            self.remove(at, len);
            start = at;
        }
        if let Some(len) = self.by_offset.get(&end).copied() {
            self.remove(end, len);
            end += len;
        }
        self.insert(start, end - start);
    }

    fn insert(&mut self, offset: usize, len: usize) {
        self.by_offset.insert(offset, len);
        self.by_len.insert((len, offset));
        self.free += len;
    }

    fn remove(&mut self, offset: usize, len: usize) {
        self.by_offset.remove(&offset);
        self.by_len.remove(&(len, offset));
        self.free -= len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use proptest::prelude::*;

    fn arena(len: usize) -> Arena {
        Arena::new(Region::with_backing(len, Backing::Shmem).unwrap())
    }

    #[test]
    fn a_full_arena_says_what_is_left() {
        let arena = arena(4096);
        let _first = arena.allocate(1).unwrap();
        let second = arena.allocate(1000).unwrap();
        let _third = arena.allocate(2000).unwrap();
        drop(second);
        let refused = arena.allocate(1985).unwrap_err();
        assert_eq!(refused.longest, 1024);
        assert_eq!(refused.free, 4096 - 64 - 2048);
        assert!(arena.allocate(usize::MAX).is_err());
        assert!(arena.allocate(0).unwrap().is_empty());
    }

    #[test]
    fn what_a_lease_holds_is_not_allocated_again() {
        let arena = arena(4096);
        let block = arena.allocate(4096).unwrap();
        let (lease, clone) = (block.lease(), block.clone());
        let part = lease.slice(100..101).unwrap();
        drop(block);
        drop(clone);
        assert_eq!(arena.free_bytes(), 0, "a transfer may still read it");
        drop(lease);
        assert!(arena.allocate(1).is_err(), "one byte of it is held");
        drop(part);
        assert_eq!(arena.allocate(4096).unwrap().len(), 4096);
    }

    #[test]
    fn blocks_may_be_freed_by_other_threads() {
        let arena = arena(1 << 20);
        std::thread::scope(|scope| {
            for len in [40, 4000, 77] {
                let arena = arena.clone();
                scope.spawn(move || {
                    for _ in 0..1000 {
                        let block = arena.allocate(len).unwrap();
                        block.lease().write_at(0, (&b"x"[..]).into());
                    }
                });
            }
        });
        assert_eq!(arena.free_bytes(), 1 << 20);
    }

    proptest! {
        #[test]
        fn blocks_are_aligned_apart_and_all_come_back(
            steps in proptest::collection::vec((0usize..5000, any::<prop::sample::Index>(), any::<bool>()), 1..300),
        ) {
            let arena = arena(64 << 10);
            let mut blocks: Vec<Block> = Vec::new();
            for (len, which, free) in steps {
                if free && !blocks.is_empty() {
                    blocks.swap_remove(which.index(blocks.len()));
                } else if let Ok(block) = arena.allocate(len) {
                    prop_assert!(block.offset().is_multiple_of(ALIGNMENT));
                    prop_assert!(block.offset() + len <= arena.region().len());
                    let end = block.offset() + len;
                    for other in &blocks {
                        let apart = other.is_empty() || len == 0
                            || other.offset() >= end
                            || block.offset() >= other.offset() + other.len();
                        prop_assert!(apart, "{block:?} {other:?}");
                    }
                    blocks.push(block);
                }
                let used: usize = blocks.iter().filter_map(|block| room(block.len())).sum();
                prop_assert_eq!(arena.free_bytes(), arena.region().len() - used);
            }
            blocks.clear();
            let whole = arena.lock();
            prop_assert_eq!(whole.by_offset.iter().collect::<Vec<_>>(), [(&0, &(64 << 10))]);
            prop_assert_eq!(whole.by_len.len(), 1);
        }
    }
}
