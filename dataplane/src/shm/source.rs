//! Which of our regions the peer has a descriptor of.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use super::socket;
use crate::memory::Region;

/// Regions that the peer holds open for one session: each costs it a descriptor.
pub(crate) const REGIONS_MAX: usize = 256;

/// Regions that were passed in one session, by the number they were given.
///
/// A region is passed once, however many tensors lie in it. The invariant: *a
/// number is never used for a second region*, also when the first is gone.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// By address, which is only compared: whoever moves in later is another.
    passed: HashMap<usize, (Weak<Region>, u32)>,
    /// Numbers that the peer has not been told to forget yet.
    unneeded: Vec<u32>,
    next: u32,
}

/// What must be said before a region can be offered from.
#[derive(Debug)]
pub(crate) enum Named {
    /// The peer knows this number.
    Known(u32),
    /// It must be passed first.
    New(u32, OwnedFd),
}

impl Sources {
    /// The number of a region.
    pub(crate) fn name(&mut self, region: &Arc<Region>) -> io::Result<Named> {
        let address = Arc::as_ptr(region).addr();
        if let Some((known, number)) = self.passed.get(&address)
            && known
                .upgrade()
                .is_some_and(|known| Arc::ptr_eq(&known, region))
        {
            return Ok(Named::Known(*number));
        }
        let descriptor = socket::read_only(&**region)?;
        let number = self.next;
        self.next = number
            .checked_add(1)
            .ok_or_else(|| io::Error::other("no number is left for another region"))?;
        self.make_room();
        let before = self
            .passed
            .insert(address, (Arc::downgrade(region), number));
        self.unneeded.extend(before.map(|(_, number)| number));
        Ok(Named::New(number, descriptor))
    }

    fn make_room(&mut self) {
        if self.passed.len() < REGIONS_MAX {
            return;
        }
        // Any will do: it is passed again if it is needed again.
        let some = self.passed.keys().next().copied();
        let gone = some.and_then(|address| self.passed.remove(&address));
        self.unneeded.extend(gone.map(|(_, number)| number));
    }

    /// The numbers that the peer may forget, each once.
    pub(crate) fn take_unneeded(&mut self) -> Vec<u32> {
        let dead = self
            .passed
            .extract_if(|_, (region, _)| region.strong_count() == 0);
        self.unneeded.extend(dead.map(|(_, (_, number))| number));
        std::mem::take(&mut self.unneeded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    fn region() -> Arc<Region> {
        Region::with_backing(4096, Backing::Shmem).unwrap()
    }

    fn number(named: Named) -> (u32, bool) {
        match named {
            Named::Known(number) => (number, false),
            Named::New(number, _) => (number, true),
        }
    }

    #[test]
    fn a_region_is_passed_once_and_its_number_never_again() {
        let mut sources = Sources::default();
        let first = region();
        assert_eq!(number(sources.name(&first).unwrap()), (0, true));
        assert_eq!(number(sources.name(&first).unwrap()), (0, false));
        assert!(sources.take_unneeded().is_empty());
        drop(first);
        // Whether or not it comes to lie at the same address.
        let second = region();
        assert_eq!(number(sources.name(&second).unwrap()), (1, true));
        assert_eq!(sources.take_unneeded(), [0]);
        assert!(sources.take_unneeded().is_empty());
    }

    #[test]
    fn the_peer_never_holds_more_than_it_must() {
        let mut sources = Sources::default();
        let regions: Vec<_> = (0..REGIONS_MAX + 10).map(|_| region()).collect();
        for region in &regions {
            assert!(matches!(sources.name(region), Ok(Named::New(..))));
        }
        assert_eq!(sources.take_unneeded().len(), 10);
        assert_eq!(sources.passed.len(), REGIONS_MAX);
    }
}
