//! The device's part of GPUDirect, see [`DeviceSide`].

use std::ffi::{c_int, c_uint, c_void};

use cudarc::driver::sys;

use super::Cuda;
use crate::memory::accelerator::direct::{DeviceSide, Ordering};
use crate::memory::accelerator::{Accelerator, AcceleratorError, DeviceAddress};

use sys::CUdevice_attribute_enum as Attribute;

impl DeviceSide for Cuda {
    fn supported(&self) -> Result<(), String> {
        self.properties().gpudirect.clone()
    }

    fn ordering(&self) -> Result<Ordering, String> {
        let ask = |which| self.device.attribute(which).map_err(|e| e.to_string());
        let ordered = ask(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)?;
        let owner =
            sys::CUGPUDirectRDMAWritesOrdering_enum::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER;
        if ordered >= owner as c_int {
            return Ok(Ordering::Ordered);
        }
        let options = ask(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS)?;
        use sys::CUflushGPUDirectRDMAWritesOptions_enum as Options;
        let host = Options::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST as c_int;
        let flushes = options & host != 0 && self.device.library.rdma.is_some();
        Ok(if flushes {
            Ordering::Flushed
        } else {
            Ordering::Unknown
        })
    }

    fn sync_memops(&self, address: DeviceAddress) -> Result<(), String> {
        let set = || {
            let device = &*self.device;
            let Some(rdma) = &device.library.rdma else {
                return Err(device.too_old("cuPointerSetAttribute"));
            };
            let _current = device.enter()?;
            let yes: c_uint = 1;
            let which = sys::CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS;
            // SAFETY: a number is read; the address is of this device's memory.
            device.check("cuPointerSetAttribute", unsafe {
                let value = (&raw const yes).cast::<c_void>();
                (rdma.cuPointerSetAttribute)(value, which as c_uint, address.0)
            })
        };
        set().map_err(|error: AcceleratorError| error.to_string())
    }

    fn flush(&self) -> Result<(), String> {
        let flush = || {
            let device = &*self.device;
            let Some(rdma) = &device.library.rdma else {
                return Err(device.too_old("cuFlushGPUDirectRDMAWrites"));
            };
            let _current = device.enter()?;
            use sys::CUflushGPUDirectRDMAWritesScope_enum as Scope;
            use sys::CUflushGPUDirectRDMAWritesTarget_enum as Target;
            let here = Target::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX as c_uint;
            let owner = Scope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER as c_uint;
            // SAFETY: two numbers.
            device.check("cuFlushGPUDirectRDMAWrites", unsafe {
                (rdma.cuFlushGPUDirectRDMAWrites)(here, owner)
            })
        };
        flush().map_err(|error: AcceleratorError| error.to_string())
    }
}
