//! The simulated device's part of GPUDirect: none, unless it is told to claim one.

#![forbid(unsafe_code)]

use crate::memory::accelerator::DeviceAddress;
use crate::memory::accelerator::direct::{DeviceSide, Ordering};

/// Claims what the configuration says; no card ever writes to its memory.
pub(super) struct SimDirect(pub(super) Result<(), String>);

impl DeviceSide for SimDirect {
    fn supported(&self) -> Result<(), String> {
        self.0.clone()
    }

    fn ordering(&self) -> Result<Ordering, String> {
        Ok(Ordering::Flushed)
    }

    fn sync_memops(&self, _: DeviceAddress) -> Result<(), String> {
        Ok(())
    }

    fn flush(&self) -> Result<(), String> {
        Ok(())
    }
}
