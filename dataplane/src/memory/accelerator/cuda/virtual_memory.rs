//! Device memory with a descriptor: created, mapped, exported and imported.
//!
//! Every step that fails undoes those before it, in the opposite order.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use cudarc::driver::sys;

use super::Device;
use super::library::VirtualMemory;
use crate::memory::accelerator::{AcceleratorError, Allocation, DeviceAddress, MemoryKind, Source};

/// A descriptor, as opposed to other systems' handles.
const DESCRIPTOR: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType_enum::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

impl Device {
    /// What allocations are multiples of; none where the driver has no such memory.
    pub(super) fn granularity(&self) -> Result<Option<usize>, AcceleratorError> {
        let Some(memory) = &self.library.virtual_memory else {
            return Ok(None);
        };
        use sys::CUmemAllocationGranularity_flags_enum as Flags;
        let least = Flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM as c_uint;
        let mut granularity = 0;
        // SAFETY: `granularity` is written, the properties are read.
        let code = unsafe {
            (memory.cuMemGetAllocationGranularity)(&mut granularity, &self.allocation(), least)
        };
        self.check("cuMemGetAllocationGranularity", code)?;
        Ok(Some(granularity.max(1)))
    }

    /// What kind of memory is asked for.
    fn allocation(&self) -> sys::CUmemAllocationProp {
        sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: DESCRIPTOR,
            location: self.location(),
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: u8::from(self.properties.gpudirect.is_ok()),
                usage: 0,
                reserved: [0; 4],
            },
        }
    }

    fn location(&self) -> sys::CUmemLocation {
        let MemoryKind::Cuda(ordinal) = self.kind() else {
            unreachable!("a CUDA device is of that kind");
        };
        sys::CUmemLocation {
            type_: sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE,
            id: ordinal as c_int,
        }
    }

    fn round(&self, len: usize) -> Result<usize, AcceleratorError> {
        let rounded = len.checked_next_multiple_of(self.properties.granularity);
        rounded.ok_or_else(|| AcceleratorError::Import {
            kind: self.kind(),
            what: format!("{len} bytes are more than an address space"),
        })
    }

    /// New memory that can be exported.
    pub(super) fn create(
        &self,
        memory: &VirtualMemory,
        len: usize,
    ) -> Result<Allocation, AcceleratorError> {
        let len = self.round(len)?;
        let mut handle = 0;
        // SAFETY: `handle` is written, the properties are read.
        let code = unsafe { (memory.cuMemCreate)(&mut handle, len, &self.allocation(), 0) };
        self.check_memory("cuMemCreate", code, len)?;
        self.map(memory, handle, len, Source::Allocated)
    }

    /// Memory of another process.
    pub(super) fn import(
        &self,
        file: &OwnedFd,
        len: usize,
    ) -> Result<Allocation, AcceleratorError> {
        let Some(memory) = &self.library.virtual_memory else {
            return Err(self.too_old("cuMemImportFromShareableHandle"));
        };
        let len = self.round(len.max(1))?;
        let mut handle = 0;
        // The driver takes the number itself where it wants a pointer.
        let number = file.as_raw_fd() as usize as *mut c_void;
        // SAFETY: `handle` is written; a descriptor of something else is refused.
        let code =
            unsafe { (memory.cuMemImportFromShareableHandle)(&mut handle, number, DESCRIPTOR.0) };
        self.check("cuMemImportFromShareableHandle", code)?;
        self.map(memory, handle, len, Source::Imported)
    }

    /// Gives memory an address that this device may use. Takes the handle.
    fn map(
        &self,
        memory: &VirtualMemory,
        handle: u64,
        len: usize,
        source: Source,
    ) -> Result<Allocation, AcceleratorError> {
        let undo = |call, code| self.library.log(self.kind(), call, code);
        let release = || {
            // SAFETY: the handle is ours, and not mapped.
            undo("cuMemRelease", unsafe { (memory.cuMemRelease)(handle) });
        };
        let mut address = 0;
        // SAFETY: `address` is written; the driver chooses where.
        let code = unsafe { (memory.cuMemAddressReserve)(&mut address, len, 0, 0, 0) };
        self.check_memory("cuMemAddressReserve", code, len)
            .inspect_err(|_| release())?;
        let unreserve = || {
            // SAFETY: just reserved, and nothing is mapped there.
            undo("cuMemAddressFree", unsafe {
                (memory.cuMemAddressFree)(address, len)
            });
            release();
        };
        // SAFETY: the range is reserved; a handle of fewer bytes is refused.
        let code = unsafe { (memory.cuMemMap)(address, len, 0, handle, 0) };
        self.check("cuMemMap", code).inspect_err(|_| unreserve())?;
        let access = sys::CUmemAccessDesc {
            location: self.location(),
            flags: sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range is mapped; one description is read.
        let code = unsafe { (memory.cuMemSetAccess)(address, len, &access, 1) };
        self.check("cuMemSetAccess", code).inspect_err(|_| {
            // SAFETY: just mapped, and nobody knows of it.
            undo("cuMemUnmap", unsafe { (memory.cuMemUnmap)(address, len) });
            unreserve();
        })?;
        Ok(Allocation {
            address: DeviceAddress(address),
            len,
            handle,
            source,
        })
    }

    /// Undoes [`Device::create`] or [`Device::import`].
    pub(super) fn unmap(&self, allocation: &Allocation) {
        let Some(memory) = &self.library.virtual_memory else {
            return;
        };
        let undo = |call, code| self.library.log(self.kind(), call, code);
        let (address, len) = (allocation.address.0, allocation.len);
        // SAFETY: mapped in `map`; nothing uses it any more (see `free`).
        undo("cuMemUnmap", unsafe { (memory.cuMemUnmap)(address, len) });
        // SAFETY: reserved in `map`, and no longer mapped.
        undo("cuMemAddressFree", unsafe {
            (memory.cuMemAddressFree)(address, len)
        });
        // SAFETY: the handle is ours; the memory lives on where else it is mapped.
        undo("cuMemRelease", unsafe {
            (memory.cuMemRelease)(allocation.handle)
        });
    }

    /// A descriptor of memory that was allocated here.
    pub(super) fn export(&self, allocation: &Allocation) -> Result<OwnedFd, AcceleratorError> {
        let memory = match (&self.library.virtual_memory, allocation.source) {
            (Some(memory), Source::Allocated | Source::Imported) => memory,
            _ => return Err(self.too_old("cuMemExportToShareableHandle")),
        };
        let mut descriptor: c_int = -1;
        // SAFETY: for this type of handle a descriptor is written.
        let code = unsafe {
            (memory.cuMemExportToShareableHandle)(
                (&raw mut descriptor).cast::<c_void>(),
                allocation.handle,
                DESCRIPTOR.0,
                0,
            )
        };
        self.check("cuMemExportToShareableHandle", code)?;
        // SAFETY: the call succeeded: the descriptor is new, and ours.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
