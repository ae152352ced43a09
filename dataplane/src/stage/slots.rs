//! Pinned host memory in pieces of one length.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Config, StartError};
use crate::memory::accelerator::{Accelerator, Pinned};
use crate::memory::{Lease, Region};

/// The slots of one direction. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    shared: Arc<Shared>,
    free: Arc<Semaphore>,
}

#[derive(Debug)]
struct Shared {
    memory: Pinned,
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

impl Slots {
    pub(super) fn new(
        accelerator: &Arc<dyn Accelerator>,
        config: Config,
    ) -> Result<Self, StartError> {
        let kind = accelerator.properties().kind;
        let memory = |source| StartError::Memory { kind, source };
        let bytes = config.slot_bytes * config.slots;
        let (region, ordinary) = Region::allocate(bytes).map_err(memory)?;
        if let Some(reason) = ordinary {
            tracing::debug!(%kind, %reason, "slots are not on huge pages");
        }
        // Devices of network cards reach them too.
        region.pin().map_err(memory)?;
        let shared = Shared {
            memory: Pinned::new(&region, accelerator)?,
            slot_bytes: config.slot_bytes,
            free: Mutex::new((0..config.slots).collect()),
        };
        Ok(Self {
            shared: Arc::new(shared),
            free: Arc::new(Semaphore::new(config.slots)),
        })
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
