//! What the queues of one port share: the device, and who still uses it.
//!
//! Each queue belongs to a thread of its own, so none may stop the device while
//! another could be in a burst function. The invariant: *the device is stopped
//! by whichever queue is the last to leave, and closed with the last handle*.
//! Nothing in here is touched per packet but one flag, which is only read.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use genie_dpdk_sys as sys;

use crate::errno::Errno;
use crate::external::External;
use crate::mempool::Mempool;

/// An attached device; closed and detached on drop.
pub(crate) struct Device {
    pub(crate) port: u16,
    pub(crate) device: *mut sys::rte_device,
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the port is ours and no thread is in a burst function.
        unsafe { sys::rte_eth_dev_close(self.port) };
        // A PCI device attached at start is detached likewise; another open
        // probes it anew.
        // SAFETY: the bus owns the device and it is still attached.
        unsafe { sys::rte_dev_remove(self.device) };
    }
}

/// What all handles of one port refer to.
///
/// Fields are in the order in which they must go: the device with the frames in
/// its rings, then what closed queues left.
pub(crate) struct Shared {
    pub(crate) device: Device,
    pub(crate) queues: u16,
    stopping: AtomicBool,
    state: Mutex<State>,
}

struct State {
    /// Queues that may be in a burst function.
    running: u16,
    /// Memory mapped for the device's DMA, by address and length, with how many
    /// queues asked for it.
    mapped: HashMap<(usize, u64), u32>,
    retired: Vec<Retired>,
}

/// What a closed queue leaves until the device is closed: frames in its rings
/// are of these pools and refer to this table.
pub(crate) struct Retired {
    pub(crate) external: External,
    pub(crate) pools: Vec<Mempool>,
}

// SAFETY: the device is only named to DPDK, whose control functions are called
// one at a time (see `abi::CONTROL` and `State`); pools may be used from any
// thread, and what retired belongs to nobody.
unsafe impl Send for Shared {}
// SAFETY: as above; what changes is behind a lock or atomic.
unsafe impl Sync for Shared {}

impl Shared {
    /// For a device that was started with so many queues.
    pub(crate) fn new(device: Device, queues: u16) -> Self {
        Self {
            device,
            queues,
            stopping: AtomicBool::new(false),
            state: Mutex::new(State {
                running: queues,
                mapped: HashMap::new(),
                retired: Vec::new(),
            }),
        }
    }

    /// Asks every queue to leave.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Whether every queue was asked to leave.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// A queue moves no more bursts; the last one stops the device.
    pub(crate) fn leave(&self) -> Result<(), Errno> {
        if self.leave_stopped() {
            // SAFETY: a started port; no thread is in a burst function.
            Errno::check(unsafe { sys::rte_eth_dev_stop(self.device.port) })?;
        }
        Ok(())
    }

    /// [`Shared::leave`] without stopping the device; whether it was the last.
    pub(crate) fn leave_stopped(&self) -> bool {
        let mut state = self.state();
        state.running -= 1;
        state.running == 0
    }

    /// Keeps what a closed queue leaves behind.
    pub(crate) fn retire(&self, left: Retired) {
        self.state().retired.push(left);
    }

    /// Counts a queue that wants this memory mapped, and maps it for the first.
    pub(crate) fn map(
        &self,
        base: *mut u8,
        len: u64,
        map: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut state = self.state();
        if let Some(count) = state.mapped.get_mut(&(base as usize, len)) {
            *count += 1;
            return Ok(());
        }
        map()?;
        state.mapped.insert((base as usize, len), 1);
        Ok(())
    }

    /// Undoes [`Shared::map`]: unmaps the memory when no queue wants it any more.
    pub(crate) fn unmap(
        &self,
        base: *mut u8,
        len: u64,
        unmap: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut state = self.state();
        match state.mapped.get_mut(&(base as usize, len)) {
            Some(count) if *count > 1 => {
                *count -= 1;
                Ok(())
            }
            Some(_) => {
                unmap()?;
                state.mapped.remove(&(base as usize, len));
                Ok(())
            }
            None => Err(Errno::INVAL),
        }
    }

    /// Closes the device; returns how many packet buffers did not come back.
    pub(crate) fn close(self) -> u32 {
        let Self { device, state, .. } = self;
        drop(device);
        let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut missing = 0;
        for Retired { external, pools } in state.retired {
            missing += pools.iter().map(Mempool::in_use).sum::<u32>();
            if external.in_flight() {
                // A packet buffer that never came back points into the table.
                std::mem::forget(external);
            }
        }
        missing
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing here panics while it holds the lock half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
