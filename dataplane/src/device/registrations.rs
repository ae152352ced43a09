//! Which regions a device may reach: each is registered once.
//!
//! Registering memory for DMA takes milliseconds, so it is done for whole
//! regions, when a tensor in one is first attached, and kept until nobody else
//! holds the region: ten thousand tensors cost one. The invariant: *nothing is
//! registered that is not pinned*: [`Registrations::register`] pins it, and
//! refuses what cannot be.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::AttachError;
use crate::memory::Region;

/// The registered regions of one device.
#[derive(Debug, Default)]
pub struct Registrations {
    regions: Vec<Arc<Region>>,
    made: u64,
}

impl Registrations {
    /// Registers a region through `map`, unless it is already.
    pub fn register(
        &mut self,
        region: &Arc<Region>,
        map: impl FnOnce(&Region) -> Result<(), AttachError>,
    ) -> Result<(), AttachError> {
        if self.regions.iter().any(|known| Arc::ptr_eq(known, region)) {
            return Ok(());
        }
        region
            .pin()
            .map_err(|error| AttachError::Unreachable(error.to_string()))?;
        map(region)?;
        self.regions.push(Arc::clone(region));
        self.made += 1;
        Ok(())
    }

    /// How many regions were ever registered.
    pub fn made(&self) -> u64 {
        self.made
    }

    /// How many regions are registered.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether no region is registered.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Gives `unmap` the regions that nobody else holds any more.
    pub fn sweep(&mut self, unmap: impl FnMut(Arc<Region>)) {
        // Ours is the last one, so no lease can come from anywhere.
        let unused = |region: &mut Arc<Region>| Arc::strong_count(region) == 1;
        self.regions.extract_if(.., unused).for_each(unmap);
    }

    /// Gives all regions back, whoever else holds them.
    pub fn take(&mut self) -> Vec<Arc<Region>> {
        std::mem::take(&mut self.regions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Arena, Backing};

    #[test]
    fn ten_thousand_tensors_of_an_arena_cost_one_registration() {
        let region = Region::with_backing(4 << 20, Backing::Shmem).unwrap();
        let arena = Arena::new(region);
        let mut registrations = Registrations::default();
        let (mut mapped, mut unmapped) = (0, 0);
        // Half of them one after the other, half at a time.
        let mut held = Vec::new();
        for index in 0..10_000 {
            let lease = arena.allocate(64).unwrap().lease();
            registrations
                .register(lease.region(), |_| {
                    mapped += 1;
                    Ok(())
                })
                .unwrap();
            registrations.sweep(|_| unmapped += 1);
            if index % 2 == 0 {
                held.push(lease);
            }
        }
        assert_eq!((mapped, unmapped), (1, 0));
        assert_eq!((registrations.made(), registrations.len()), (1, 1));
        drop(arena);
        registrations.sweep(|_| unmapped += 1);
        assert_eq!(unmapped, 0, "leases are left");
        drop(held);
        registrations.sweep(|_| unmapped += 1);
        assert_eq!(unmapped, 1);
        assert_eq!((registrations.made(), registrations.len()), (1, 0));
    }

    #[test]
    fn what_the_device_refuses_is_not_registered() {
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let mut registrations = Registrations::default();
        let refused = registrations.register(&region, |_| Err(AttachError::Full));
        assert!(refused.is_err());
        assert_eq!((registrations.made(), registrations.len()), (0, 0));
        let mut asked = false;
        registrations
            .register(&region, |_| {
                asked = true;
                Ok(())
            })
            .unwrap();
        assert!(asked);
        assert_eq!(registrations.take().len(), 1);
    }
}
