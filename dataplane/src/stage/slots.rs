//! Pinned host memory in pieces of one length.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Config, SlotMemory, StartError};
use crate::memory::accelerator::{Accelerator, Pinned};
use crate::memory::{Backing, Lease, Region};

/// The slots of one direction. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    shared: Arc<Shared>,
    free: Arc<Semaphore>,
}

#[derive(Debug)]
struct Shared {
    memory: Arc<Pinned>,
    slot_bytes: usize,
    /// Numbers of slots that nobody uses.
    free: Mutex<Vec<usize>>,
}

/// A slot in use. Given back when the last share of it is dropped.
#[derive(Clone, Debug)]
pub(super) struct Slot(Arc<Used>);

#[derive(Debug)]
struct Used {
    index: usize,
    slots: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
}

/// The memory of all slots of a device: one piece, on huge pages where those can
/// be had.
///
/// Registered once with the device (`cuMemHostRegister`) and once with every
/// port that reaches memory by itself, whose packet buffers refer to it: what
/// the device copied there goes out without another copy, and a tensor's slot
/// costs no registration.
#[derive(Clone, Debug)]
pub(super) struct Arena {
    memory: Arc<Pinned>,
    /// Why it is not on huge pages.
    reason: Option<String>,
}

impl Arena {
    pub(super) fn new(
        accelerator: &Arc<dyn Accelerator>,
        config: Config,
    ) -> Result<Self, StartError> {
        // Small ones would waste most of a huge page.
        const WORTH_HUGE_PAGES: usize = 1 << 20;
        let bytes = 2 * config.slot_bytes * config.slots;
        let backings: &[Backing] = if bytes < WORTH_HUGE_PAGES {
            &[Backing::Shmem]
        } else {
            &[Backing::HUGE_2M, Backing::Shmem]
        };
        Self::on(accelerator, bytes, backings)
    }

    /// On the first of `backings` that there is and that the device takes.
    fn on(
        accelerator: &Arc<dyn Accelerator>,
        bytes: usize,
        backings: &[Backing],
    ) -> Result<Self, StartError> {
        let kind = accelerator.properties().kind;
        let mut reasons = Vec::new();
        let mut last = None;
        for backing in backings {
            match Self::pinned(accelerator, bytes, *backing) {
                Ok(memory) => {
                    let reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                    return Ok(Self {
                        memory: Arc::new(memory),
                        reason,
                    });
                }
                Err(error) => {
                    let reason = with_causes(&error);
                    tracing::warn!(%kind, ?backing, reason, "slots are not on these pages");
                    reasons.push(reason);
                    last = Some(error);
                }
            }
        }
        Err(last.expect("there is a backing to try"))
    }

    fn pinned(
        accelerator: &Arc<dyn Accelerator>,
        bytes: usize,
        backing: Backing,
    ) -> Result<Pinned, StartError> {
        let kind = accelerator.properties().kind;
        let memory = |source| StartError::Memory { kind, source };
        let region = Region::with_backing(bytes, backing).map_err(memory)?;
        // Devices of network cards reach it too.
        region.pin().map_err(memory)?;
        Ok(Pinned::new(&region, accelerator)?)
    }

    pub(super) fn info(&self) -> SlotMemory {
        let region = self.memory.region();
        SlotMemory {
            bytes: region.len(),
            backing: region.backing(),
            reason: self.reason.clone(),
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(with_causes);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

impl Slots {
    /// The slots of one direction: the first half of the arena, or the second.
    pub(super) fn new(arena: &Arena, config: Config, half: usize) -> Self {
        let first = half * config.slots;
        let shared = Shared {
            memory: Arc::clone(&arena.memory),
            slot_bytes: config.slot_bytes,
            free: Mutex::new((first..first + config.slots).collect()),
        };
        Self {
            shared: Arc::new(shared),
            free: Arc::new(Semaphore::new(config.slots)),
        }
    }

    pub(super) fn available(&self) -> usize {
        self.free.available_permits()
    }

    pub(super) async fn acquire(&self) -> Slot {
        let permit = Arc::clone(&self.free).acquire_owned().await;
        self.take(permit.expect("the semaphore is never closed"))
    }

    pub(super) fn try_acquire(&self) -> Option<Slot> {
        let permit = Arc::clone(&self.free).try_acquire_owned().ok()?;
        Some(self.take(permit))
    }

    fn take(&self, permit: OwnedSemaphorePermit) -> Slot {
        let index = self.shared.lock().pop();
        Slot(Arc::new(Used {
            index: index.expect("there are as many permits as slots"),
            slots: Arc::clone(&self.shared),
            _permit: permit,
        }))
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// The first `len` bytes of it.
    ///
    /// # Panics
    /// If it is not that long: tensors are cut into ranges of a slot's length.
    pub(super) fn lease(&self, len: usize) -> Lease {
        let Used { index, slots, .. } = &*self.0;
        assert!(
            len <= slots.slot_bytes,
            "{len} bytes in a slot of {}",
            slots.slot_bytes
        );
        let offset = (index * slots.slot_bytes) as u64;
        Lease::new(Arc::clone(slots.memory.region()), offset, len as u64)
            .expect("it lies in the region")
    }

    /// Another share of the same slot.
    pub(super) fn share(&self) -> Self {
        self.clone()
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        // Before the permit, which is dropped after this.
        self.slots.lock().push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::accelerator::sim;

    #[test]
    fn pages_that_a_device_refuses_are_replaced_by_others_with_the_reason() {
        let sim = Arc::new(sim::Sim::new(sim::Config::default()).unwrap());
        let accelerator: Arc<dyn Accelerator> = Arc::clone(&sim) as _;
        sim.refuse_pins(1);
        let arena = Arena::on(&accelerator, 4096, &[Backing::Shmem; 2]).unwrap();
        let info = arena.info();
        assert_eq!((info.bytes, info.backing), (4096, Backing::Shmem));
        assert_eq!(
            info.reason.unwrap(),
            "sim: pin failed with 801 (asked to refuse)"
        );
        assert_eq!(sim.pinned(), 1);
        drop(arena);
        assert_eq!((sim.pinned(), sim.violations()), (0, vec![]));
        sim.refuse_pins(2);
        let refused = Arena::on(&accelerator, 4096, &[Backing::Shmem; 2]).unwrap_err();
        assert!(matches!(refused, StartError::Accelerator(error) if error.code() == Some(801)));
        assert_eq!(sim.pinned(), 0);
    }

    #[test]
    fn both_directions_lie_in_one_registered_piece_and_never_in_each_other() {
        let sim = Arc::new(sim::Sim::new(sim::Config::default()).unwrap());
        let accelerator: Arc<dyn Accelerator> = Arc::clone(&sim) as _;
        let config = Config {
            slot_bytes: 4096,
            slots: 3,
        };
        let arena = Arena::new(&accelerator, config).unwrap();
        assert_eq!((arena.info().bytes, sim.pinned()), (6 * 4096, 1));
        let halves = [0, 1].map(|half| Slots::new(&arena, config, half));
        let slots: Vec<_> = halves
            .iter()
            .flat_map(|slots| std::iter::from_fn(|| slots.try_acquire()))
            .collect();
        let mut offsets: Vec<_> = slots.iter().map(|slot| slot.lease(4096).offset()).collect();
        offsets.sort_unstable();
        assert_eq!(offsets, (0..6).map(|slot| slot * 4096).collect::<Vec<_>>());
        // Memory is unregistered when the last slot is back, not before.
        drop((arena, halves));
        assert_eq!(sim.pinned(), 1);
        drop(slots);
        assert_eq!((sim.pinned(), sim.violations()), (0, vec![]));
    }
}
