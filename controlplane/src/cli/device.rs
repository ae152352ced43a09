//! The accelerator of a `put` or `get`, in this process.

use std::sync::Arc;

use genie_client::Memory;
use genie_dataplane::memory::accelerator::{self, Accelerator, DeviceLease};
use genie_dataplane::memory::{Lease, Region};
use genie_dataplane::stage::{Config, Stage, StageError, Trace};

use super::CommandError;

/// An accelerator, and what copies to and from it.
pub(super) struct Device {
    stage: Stage,
    runtime: tokio::runtime::Runtime,
}

impl Device {
    /// Opens the accelerator that `memory` names, if it names one.
    pub(super) fn open(memory: Memory) -> Result<Option<Self>, CommandError> {
        let Some(accelerator) = accelerator::open(memory.kind())? else {
            return Ok(None);
        };
        let stage = Stage::start(accelerator, Config::default(), Trace::default())?;
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.map_err(CommandError::Watch)?;
        Ok(Some(Self { stage, runtime }))
    }

    pub(super) fn accelerator(&self) -> &Arc<dyn Accelerator> {
        self.stage.accelerator()
    }

    /// Copies host memory to the device.
    pub(super) fn upload(&self, from: &Lease, to: &DeviceLease) -> Result<(), CommandError> {
        self.runtime.block_on(self.stage.upload(from, to))?;
        Ok(())
    }

    /// A copy of device memory in host memory.
    pub(super) fn download(&self, from: &DeviceLease) -> Result<Lease, CommandError> {
        let host = host(from.len() as u64)?;
        self.runtime.block_on(self.stage.download(from, &host))?;
        Ok(host)
    }
}

/// Host memory of `bytes`.
pub(super) fn host(bytes: u64) -> Result<Lease, CommandError> {
    let len = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
    let (region, _) = Region::allocate(len)?;
    Ok(Lease::new(region, 0, bytes).expect("it was made as long"))
}

impl From<StageError> for CommandError {
    fn from(error: StageError) -> Self {
        match error {
            StageError::Accelerator(error) => Self::Accelerator(error),
            StageError::Wire(reason) => Self::Copy(reason.to_string()),
        }
    }
}
