//! Tensors in an accelerator's memory, shared with the agent by descriptor.
//!
//! The program opens the accelerator itself; agent and program then hold the
//! same device memory, and no byte of it passes through the host but in the
//! agent's slots on its way to or from the wire.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use genie_dataplane::memory::accelerator::{Accelerator, DeviceLease, DeviceRegion, Import};

use crate::arena::{Hold, Imported, NotOfArena, Tensor};
use crate::client::{Client, ClientError};
use crate::protocol::{Ask, IpcHandle, Memory, Moved};
use crate::tensor::{Metadata, TensorInfo};

/// Device memory that the agent can put tensors from. Given back when the last
/// clone and the last tensor in it are dropped, with the connection's next request.
#[derive(Clone, Debug)]
pub struct DeviceArena {
    pub(crate) memory: Imported,
    pub(crate) lease: DeviceLease,
}

/// Memory of an accelerator's that a program holds, by what another process can
/// have it with.
#[derive(Clone, Copy, Debug)]
pub enum DeviceMemory<'a> {
    /// A descriptor of it: from `cuMemExportToShareableHandle`, type
    /// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`, of memory that `cuMemCreate`
    /// made for that; on `sim`, from
    /// [`DeviceRegion::export`].
    Descriptor(BorrowedFd<'a>),
    /// A handle of the whole allocation that `cudaMalloc` made. Taken from root
    /// and from the agent's own user only, see [`Client::import_device`].
    Ipc(IpcHandle),
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

    /// Lets the agent use device memory that this program holds, without a copy:
    /// tensors are put from it, and batches read into it, see
    /// [`Batch`](crate::Batch).
    ///
    /// `bytes` are counted from the start of the allocation, and count as an
    /// arena's; a tensor inside begins at an offset. Whatever fills it must be
    /// finished before it is put (`cuStreamSynchronize`): the agent waits for no
    /// stream of another process. What was read into it is complete when the
    /// batch has ended.
    ///
    /// Memory that was passed by descriptor stays until both have let it go,
    /// also if the program dies. Memory behind a legacy handle must not be
    /// freed before (CUDA says that what happens then is undefined), so the
    /// agent takes those only from whoever could harm it anyway.
    pub fn import_device(
        &mut self,
        memory: Memory,
        from: DeviceMemory<'_>,
        bytes: u64,
    ) -> Result<Imported, ClientError> {
        let (handle, descriptor) = match from {
            DeviceMemory::Descriptor(descriptor) => (None, Some(descriptor)),
            DeviceMemory::Ipc(handle) => (Some(handle), None),
        };
        let ask = Ask::ImportDevice {
            memory,
            bytes,
            handle,
        };
        self.ask_with(&ask, descriptor)?;
        self.recv_imported(|_, _| {})
    }

    /// [`Client::import_device`] of memory that this process allocated through
    /// the data plane.
    pub fn share_device(&mut self, region: &Arc<DeviceRegion>) -> Result<DeviceArena, ClientError> {
        let file = region.export()?;
        let from = DeviceMemory::Descriptor(file.as_fd());
        let memory = self.import_device(region.kind().into(), from, region.len() as u64)?;
        let lease = DeviceLease::whole(Arc::clone(region));
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
