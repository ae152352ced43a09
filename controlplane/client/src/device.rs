//! Tensors in an accelerator's memory, shared with the agent by descriptor.
//!
//! The program opens the accelerator itself; agent and program then hold the
//! same device memory, and no byte of it passes through the host but in the
//! agent's slots on its way to or from the wire.

use std::sync::Arc;

use genie_dataplane::memory::accelerator::{Accelerator, DeviceLease, DeviceRegion, Import};

use crate::arena::{Hold, Imported, NotOfArena, Tensor};
use crate::client::{Client, ClientError};
use crate::protocol::Moved;
use crate::tensor::{Metadata, TensorInfo};

/// Device memory that the agent can put tensors from. Given back when the last
/// clone and the last tensor in it are dropped, with the connection's next request.
#[derive(Clone, Debug)]
pub struct DeviceArena {
    pub(crate) memory: Imported,
    pub(crate) lease: DeviceLease,
}

/// What a get brought into device memory.
#[derive(Debug)]
pub struct FetchedOnDevice {
    /// The tensors; one after the other, without gaps.
    pub tensors: Vec<TensorInfo>,
    /// Their prefix's metadata.
    pub metadata: Option<Metadata>,
    /// How they moved.
    pub moved: Moved,
    pub(crate) lease: DeviceLease,
    pub(crate) _hold: Arc<Hold>,
}

impl DeviceArena {
    /// All of it: for copies by a stage, or by the program's own calls of the
    /// driver, which must be done before the tensor is put.
    pub fn lease(&self) -> &DeviceLease {
        &self.lease
    }

    /// The tensor that begins at `offset`.
    pub fn tensor(&self, info: TensorInfo, offset: u64) -> Result<Tensor, NotOfArena> {
        self.memory.tensor(info, offset)
    }

    /// Tensors one after the other without gaps, from the start.
    pub fn packed(&self, infos: Vec<TensorInfo>) -> Result<Vec<Tensor>, NotOfArena> {
        let mut offset = 0;
        let mut tensors = Vec::with_capacity(infos.len());
        for info in infos {
            let len = info.len_bytes()?;
            tensors.push(self.tensor(info, offset)?);
            offset += len;
        }
        Ok(tensors)
    }
}

impl FetchedOnDevice {
    /// All bytes, the first tensor's first.
    pub fn lease(&self) -> &DeviceLease {
        &self.lease
    }
}

impl Client {
    /// Asks for at least `bytes` of this accelerator's memory, shared with the agent.
    pub fn device_arena(
        &mut self,
        accelerator: &Arc<dyn Accelerator>,
        bytes: u64,
    ) -> Result<DeviceArena, ClientError> {
        let kind = accelerator.properties().kind;
        let (hold, file) = self.ask_arena(bytes, kind.into())?;
        let len = usize::try_from(bytes.max(1)).map_err(|_| ClientError::Unexpected)?;
        let region = DeviceRegion::import(accelerator, Import::Descriptor { file, len })?;
        let lease = DeviceLease::new(region, 0, bytes).map_err(|_| ClientError::Unexpected)?;
        let memory = Imported {
            hold,
            len: bytes,
            copied: 0,
        };
        Ok(DeviceArena { memory, lease })
    }

    /// [`Client::get_with`], into this accelerator's memory.
    pub fn get_on(
        &mut self,
        accelerator: &Arc<dyn Accelerator>,
        node: Option<&str>,
        prefix: &str,
        progress: impl FnMut(u64, u64),
    ) -> Result<FetchedOnDevice, ClientError> {
        let kind = accelerator.properties().kind;
        let (tensors, metadata) = self.ask_get(node, prefix, kind.into(), progress)?;
        let (moved, file, hold) = self.recv_moved()?;
        let len = usize::try_from(moved.bytes.max(1)).map_err(|_| ClientError::Unexpected)?;
        let region = DeviceRegion::import(accelerator, Import::Descriptor { file, len })?;
        let lease = DeviceLease::new(region, 0, moved.bytes);
        Ok(FetchedOnDevice {
            tensors,
            metadata,
            moved,
            lease: lease.map_err(|_| ClientError::Unexpected)?,
            _hold: hold,
        })
    }
}
