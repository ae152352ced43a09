//! Device memory that tensors live in, and holds on slices of it.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use super::{Accelerator, AcceleratorError, Allocation, DeviceAddress, Import, MemoryKind};
use crate::memory::OutOfBounds;

/// A piece of device memory.
///
/// Shared through `Arc`; given back to the driver when the last lease and
/// handle are gone. There is no way to its bytes but a [`Stream`](super::Stream).
pub struct DeviceRegion {
    accelerator: Arc<dyn Accelerator>,
    memory: Memory,
    /// Dropped after the memory was given back.
    guard: OnceLock<Box<dyn Any + Send + Sync>>,
}

enum Memory {
    Own(Allocation),
    /// Of the application's own, kept by `_owner`.
    Adopted {
        address: DeviceAddress,
        len: usize,
        _owner: Box<dyn Any + Send + Sync>,
    },
}

/// A hold on a slice of device memory, which cannot be freed before it is dropped.
///
/// Has no host pointer; what host code could do with one is not there:
///
/// ```compile_fail
/// fn checksum(lease: &genie_dataplane::memory::accelerator::DeviceLease) -> u32 {
///     lease.crc32c(0..4)
/// }
/// ```
#[derive(Clone, Debug)]
pub struct DeviceLease {
    region: Arc<DeviceRegion>,
    offset: usize,
    len: usize,
}

impl DeviceRegion {
    /// Allocates at least `len` bytes on a device; none at all count as one.
    pub fn allocate(
        accelerator: &Arc<dyn Accelerator>,
        len: usize,
    ) -> Result<Arc<Self>, AcceleratorError> {
        let allocation = accelerator.allocate(len.max(1))?;
        Ok(Self::new(accelerator, Memory::Own(allocation)))
    }

    /// Maps memory of another process; it stays even if that process dies.
    pub fn import(
        accelerator: &Arc<dyn Accelerator>,
        from: Import,
    ) -> Result<Arc<Self>, AcceleratorError> {
        let allocation = accelerator.import(from)?;
        Ok(Self::new(accelerator, Memory::Own(allocation)))
    }

    /// Takes `len` bytes at `address` that this process already has, such as a
    /// `torch` or `cupy` tensor's; `owner` keeps them, and is dropped after the
    /// last lease.
    ///
    /// The driver is asked whether they are this device's.
    ///
    /// # Safety
    /// The memory must stay allocated until `owner` is dropped.
    pub unsafe fn adopt(
        accelerator: &Arc<dyn Accelerator>,
        address: DeviceAddress,
        len: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>, AcceleratorError> {
        accelerator.check(address, len)?;
        let _owner = owner;
        Ok(Self::new(
            accelerator,
            Memory::Adopted {
                address,
                len,
                _owner,
            },
        ))
    }

    fn new(accelerator: &Arc<dyn Accelerator>, memory: Memory) -> Arc<Self> {
        Arc::new(Self {
            accelerator: Arc::clone(accelerator),
            memory,
            guard: OnceLock::new(),
        })
    }

    /// A descriptor with which another process can import it.
    pub fn export(&self) -> Result<OwnedFd, AcceleratorError> {
        match &self.memory {
            Memory::Own(allocation) => self.accelerator.export(allocation),
            Memory::Adopted { .. } => Err(AcceleratorError::Import {
                kind: self.kind(),
                what: "memory that was adopted can only be exported by whoever allocated it".into(),
            }),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        match &self.memory {
            Memory::Own(allocation) => allocation.len,
            Memory::Adopted { len, .. } => *len,
        }
    }

    /// Whether there are no bytes; only adopted memory can have none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it is.
    pub fn kind(&self) -> MemoryKind {
        self.accelerator.properties().kind
    }

    /// Whose it is.
    pub fn accelerator(&self) -> &Arc<dyn Accelerator> {
        &self.accelerator
    }

    fn address(&self) -> DeviceAddress {
        match &self.memory {
            Memory::Own(allocation) => allocation.address,
            Memory::Adopted { address, .. } => *address,
        }
    }

    /// Drops `guard` once the memory was given back, after the last lease.
    ///
    /// Returns it if the region already has one.
    pub fn guard(
        &self,
        guard: Box<dyn Any + Send + Sync>,
    ) -> Result<(), Box<dyn Any + Send + Sync>> {
        self.guard.set(guard)
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        if let Memory::Own(allocation) = &self.memory {
            // SAFETY: no lease is left, and a stream holds leases for as long
            // as it copies; what the allocation's exporter or importer does
            // with it elsewhere keeps it alive there.
            unsafe { self.accelerator.free(allocation) };
        }
    }
}

impl fmt::Debug for DeviceRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}+{}", self.kind(), self.address(), self.len())
    }
}

impl DeviceLease {
    /// Takes a hold on `len` bytes at `offset` of `region`.
    pub fn new(region: Arc<DeviceRegion>, offset: u64, len: u64) -> Result<Self, OutOfBounds> {
        let region_len = region.len() as u64;
        match offset.checked_add(len) {
            Some(end) if end <= region_len => Ok(Self {
                region,
                offset: offset as usize,
                len: len as usize,
            }),
            _ => Err(OutOfBounds {
                offset,
                len,
                region_len,
            }),
        }
    }

    /// Takes a hold on all of `region`.
    pub fn whole(region: Arc<DeviceRegion>) -> Self {
        let len = region.len();
        Self {
            region,
            offset: 0,
            len,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice has no bytes, as a zero-element tensor has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The region the slice lies in.
    pub fn region(&self) -> &Arc<DeviceRegion> {
        &self.region
    }

    /// Where it is.
    pub fn kind(&self) -> MemoryKind {
        self.region.kind()
    }

    /// Offset of the slice in its region, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// A hold on a part of this slice.
    pub fn slice(&self, range: Range<u64>) -> Result<Self, OutOfBounds> {
        let inside = range.start <= range.end && range.end <= self.len as u64;
        if !inside {
            return Err(OutOfBounds {
                offset: range.start,
                len: range.end.saturating_sub(range.start),
                region_len: self.len as u64,
            });
        }
        Ok(Self {
            region: Arc::clone(&self.region),
            offset: self.offset + range.start as usize,
            len: (range.end - range.start) as usize,
        })
    }

    /// The address of the first byte, for calls of the device's driver.
    pub fn address(&self) -> DeviceAddress {
        DeviceAddress(self.region.address().0 + self.offset as u64)
    }
}
