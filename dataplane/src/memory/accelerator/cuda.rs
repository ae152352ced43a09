//! CUDA devices, through the driver API, which is looked for at run time.
//!
//! All of CUDA is in this module and below. The types and numbers are those of
//! `cudarc::driver::sys`; the functions are looked up here, one by one
//! ([`Library`]): that crate's own loader panics if the library or any symbol is
//! missing, and its result type cannot hold a code that a newer driver made up.
//! So a machine without the driver, one with a driver too old, and one without
//! the device each get an [`AcceleratorError`] with the reason.
//!
//! Compiles without any toolkit; order of calls and errors are tested against a
//! recording library, the rest was never run on a device.

mod direct;
mod gather;
mod library;
mod stream;
mod virtual_memory;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;

use super::{
    Accelerator, AcceleratorError, Allocation, DeviceAddress, Import, MemoryKind, Properties,
    Source, Stream,
};
pub use library::Library;
use library::{Code, NOT_FOUND, OUT_OF_MEMORY, SUCCESS};

/// The oldest driver that has all required symbols: CUDA 11.4, as `cuDriverGetVersion` writes it.
const OLDEST: c_int = 11040;

/// A CUDA device in this process, with its primary context.
#[derive(Clone, Debug)]
pub struct Cuda {
    device: Arc<Device>,
}

/// What a device's streams share with it.
#[derive(Debug)]
struct Device {
    library: Library,
    device: sys::CUdevice,
    context: Context,
    properties: Properties,
    /// Loaded when it is first needed; or why copies are made one by one.
    gather: OnceLock<Result<gather::Kernel, AcceleratorError>>,
}

/// The primary context, released with the device.
#[derive(Debug)]
struct Context(sys::CUcontext);

// SAFETY: a context may be made current on any thread; the driver API is
// thread-safe ("CUDA Driver API", Context Management).
unsafe impl Send for Context {}
// SAFETY: as above; the pointer itself is only passed on.
unsafe impl Sync for Context {}

/// Makes the device's context current on this thread for as long as it lives.
struct Current<'a> {
    device: &'a Device,
    /// To be dropped on the thread that made it.
    _here: PhantomData<*const ()>,
}

impl Cuda {
    /// Opens a device with the driver of this machine.
    pub fn open(ordinal: u32) -> Result<Self, AcceleratorError> {
        Self::with(Library::load()?, ordinal)
    }

    /// Opens a device with the driver library at `path`.
    pub fn open_with(path: &Path, ordinal: u32) -> Result<Self, AcceleratorError> {
        Self::with(Library::load_from(path)?, ordinal)
    }

    fn with(library: Library, ordinal: u32) -> Result<Self, AcceleratorError> {
        let kind = MemoryKind::Cuda(ordinal);
        let check = |call, code| library.check(kind, call, code);
        // SAFETY: no arguments but a flag that must be zero.
        check("cuInit", unsafe { (library.required.cuInit)(0) })?;
        let driver = library.version(kind)?;
        if driver < OLDEST {
            return Err(AcceleratorError::DriverTooOld {
                found: version(driver),
                needed: version(OLDEST),
            });
        }
        let mut count = 0;
        // SAFETY: `count` is written.
        check("cuDeviceGetCount", unsafe {
            (library.required.cuDeviceGetCount)(&mut count)
        })?;
        let count = u32::try_from(count).unwrap_or(0);
        if ordinal >= count {
            return Err(AcceleratorError::NoDevice { kind, count });
        }
        let mut device = 0;
        // SAFETY: `device` is written; the ordinal was checked.
        check("cuDeviceGet", unsafe {
            (library.required.cuDeviceGet)(&mut device, ordinal as c_int)
        })?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is written; the device is one.
        check("cuDevicePrimaryCtxRetain", unsafe {
            (library.required.cuDevicePrimaryCtxRetain)(&mut context, device)
        })?;
        // From here on dropping it releases the context.
        let mut device = Device {
            properties: Properties {
                kind,
                name: String::new(),
                memory_bytes: 0,
                granularity: 1,
                driver: version(driver),
                exports: false,
                gpudirect: Err(String::new()),
            },
            context: Context(context),
            device,
            library,
            gather: OnceLock::new(),
        };
        device.describe()?;
        Ok(Self {
            device: Arc::new(device),
        })
    }
}

/// `13020` as people write it.
fn version(number: c_int) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

impl Device {
    fn kind(&self) -> MemoryKind {
        self.properties.kind
    }

    fn check(&self, call: &'static str, code: Code) -> Result<(), AcceleratorError> {
        self.library.check(self.kind(), call, code)
    }

    /// An error for `len` bytes that could not be had.
    fn check_memory(
        &self,
        call: &'static str,
        code: Code,
        wanted: usize,
    ) -> Result<(), AcceleratorError> {
        self.check(call, code).map_err(|error| match error {
            AcceleratorError::Call {
                kind, code, text, ..
            } if code == OUT_OF_MEMORY => AcceleratorError::OutOfMemory {
                kind,
                wanted,
                call,
                code,
                text,
            },
            other => other,
        })
    }

    fn describe(&mut self) -> Result<(), AcceleratorError> {
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: `name` has the length that is passed; the call ends it with a zero.
        self.check("cuDeviceGetName", unsafe {
            (self.library.required.cuDeviceGetName)(name.as_mut_ptr(), 256, self.device)
        })?;
        let mut total = 0;
        // SAFETY: `total` is written.
        self.check("cuDeviceTotalMem", unsafe {
            (self.library.required.cuDeviceTotalMem_v2)(&mut total, self.device)
        })?;
        let bytes = name.iter().take_while(|byte| **byte != 0);
        let bytes: Vec<u8> = bytes.map(|byte| *byte as u8).collect();
        self.properties.name = String::from_utf8_lossy(&bytes).into_owned();
        self.properties.memory_bytes = total as u64;
        self.properties.gpudirect = self.gpudirect();
        if let Some(granularity) = self.granularity()? {
            self.properties.granularity = granularity;
            self.properties.exports = true;
        }
        Ok(())
    }

    /// Whether other devices of the machine may reach this one's memory.
    fn gpudirect(&self) -> Result<(), String> {
        use sys::CUdevice_attribute_enum as Attribute;
        let supported = Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED;
        match self.attribute(supported) {
            Ok(0) => Err("the device or its driver does not support it".into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> Result<c_int, AcceleratorError> {
        let mut value = 0;
        // SAFETY: `value` is written.
        self.check("cuDeviceGetAttribute", unsafe {
            (self.library.required.cuDeviceGetAttribute)(&mut value, which as c_uint, self.device)
        })?;
        Ok(value)
    }

    fn enter(&self) -> Result<Current<'_>, AcceleratorError> {
        // SAFETY: the context is retained for as long as `self`.
        self.check("cuCtxPushCurrent", unsafe {
            (self.library.required.cuCtxPushCurrent_v2)(self.context.0)
        })?;
        Ok(Current {
            device: self,
            _here: PhantomData,
        })
    }

    fn pointer_attribute<T: Default>(
        &self,
        which: sys::CUpointer_attribute,
        address: DeviceAddress,
    ) -> Result<T, Code> {
        let mut value = T::default();
        // SAFETY: `value` has the type of the attribute; the address may be anything.
        let code = unsafe {
            (self.library.required.cuPointerGetAttribute)(
                (&raw mut value).cast::<c_void>(),
                which as c_uint,
                address.0,
            )
        };
        if code == SUCCESS {
            Ok(value)
        } else {
            Err(code)
        }
    }

    /// Why memory is not this device's, if it is not.
    fn whose_instead(&self, address: DeviceAddress) -> Option<String> {
        use sys::CUpointer_attribute_enum as Attribute;
        let ask = |which| self.pointer_attribute::<c_uint>(which, address);
        let device = sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as c_uint;
        match ask(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
            Ok(kind) if kind == device => {}
            Ok(_) => return Some("it is the host's".into()),
            Err(code) => return Some(self.library.text(code)),
        }
        let ordinal = match ask(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
            Ok(ordinal) => MemoryKind::Cuda(ordinal),
            Err(code) => return Some(self.library.text(code)),
        };
        (ordinal != self.kind()).then(|| format!("it is memory of {ordinal}"))
    }

    /// What is wrong with `len` bytes at `address`, if anything is.
    fn why_not_mine(&self, address: DeviceAddress, len: usize) -> Option<String> {
        use sys::CUpointer_attribute_enum as Attribute;
        if let Some(other) = self.whose_instead(address) {
            return Some(other);
        }
        let ask = |which| self.pointer_attribute::<u64>(which, address);
        let start = ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
        let there = ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE);
        let (Ok(start), Ok(there)) = (start, there) else {
            return Some("its allocation cannot be found out".into());
        };
        let end = address.0.checked_add(len as u64);
        let inside = address.0 >= start
            && end.is_some_and(|end| start.checked_add(there).is_some_and(|last| end <= last));
        (!inside).then(|| format!("its allocation has {there} bytes at {start:#x}"))
    }

    fn open_ipc(&self, handle: [u8; 64]) -> Result<DeviceAddress, AcceleratorError> {
        let handle = sys::CUipcMemHandle {
            reserved: handle.map(|byte| byte as c_char),
        };
        let lazy = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        let mut address = 0;
        // SAFETY: `address` is written; a handle that is none is refused.
        self.check("cuIpcOpenMemHandle", unsafe {
            (self.library.required.cuIpcOpenMemHandle_v2)(&mut address, handle, lazy)
        })?;
        Ok(DeviceAddress(address))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(Ok(kernel)) = self.gather.take() {
            self.unload(kernel);
        }
        // SAFETY: retained once, in `Cuda::with`; no stream is left, each holds this.
        let code = unsafe { (self.library.required.cuDevicePrimaryCtxRelease_v2)(self.device) };
        self.library
            .log(self.kind(), "cuDevicePrimaryCtxRelease", code);
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let Device { library, .. } = self.device;
        let mut popped = std::ptr::null_mut();
        // SAFETY: pushed in `enter`, on this thread: the guard cannot be sent.
        let code = unsafe { (library.required.cuCtxPopCurrent_v2)(&mut popped) };
        library.log(self.device.kind(), "cuCtxPopCurrent", code);
    }
}

impl Accelerator for Cuda {
    fn properties(&self) -> &Properties {
        &self.device.properties
    }

    fn allocate(&self, len: usize) -> Result<Allocation, AcceleratorError> {
        let device = &*self.device;
        let _current = device.enter()?;
        if let Some(memory) = &device.library.virtual_memory {
            return device.create(memory, len);
        }
        let mut address = 0;
        // SAFETY: `address` is written.
        let code = unsafe { (device.library.required.cuMemAlloc_v2)(&mut address, len) };
        device.check_memory("cuMemAlloc", code, len)?;
        Ok(Allocation {
            address: DeviceAddress(address),
            len,
            handle: 0,
            source: Source::Plain,
        })
    }

    fn import(&self, from: Import) -> Result<Allocation, AcceleratorError> {
        let device = &*self.device;
        let _current = device.enter()?;
        match from {
            Import::Descriptor { file, len } => {
                let allocation = device.import(&file, len)?;
                if let Some(what) = device.whose_instead(allocation.address) {
                    device.release(&allocation);
                    let kind = device.kind();
                    return Err(AcceleratorError::Import { kind, what });
                }
                Ok(allocation)
            }
            Import::Ipc { handle, len } => {
                let address = device.open_ipc(handle)?;
                let allocation = Allocation {
                    address,
                    len,
                    handle: 0,
                    source: Source::Ipc,
                };
                if let Some(what) = device.why_not_mine(address, len) {
                    device.release(&allocation);
                    let kind = device.kind();
                    return Err(AcceleratorError::Import { kind, what });
                }
                Ok(allocation)
            }
        }
    }

    fn export(&self, allocation: &Allocation) -> Result<OwnedFd, AcceleratorError> {
        let _current = self.device.enter()?;
        self.device.export(allocation)
    }

    fn check(&self, address: DeviceAddress, len: usize) -> Result<(), AcceleratorError> {
        let _current = self.device.enter()?;
        match self.device.why_not_mine(address, len) {
            None => Ok(()),
            Some(what) => Err(AcceleratorError::NotItsMemory {
                kind: self.device.kind(),
                address,
                len,
                what,
            }),
        }
    }

    unsafe fn free(&self, allocation: &Allocation) {
        match self.device.enter() {
            Ok(_current) => self.device.release(allocation),
            // A dead context has freed it already.
            Err(error) => tracing::warn!(%error, "device memory is not given back"),
        }
    }

    unsafe fn pin(&self, host: *mut u8, len: usize) -> Result<(), AcceleratorError> {
        let device = &*self.device;
        let _current = device.enter()?;
        // Portable: every context of this process may use it.
        let portable = sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: the caller keeps the range mapped.
        device.check("cuMemHostRegister", unsafe {
            (device.library.required.cuMemHostRegister_v2)(host.cast(), len, portable)
        })
    }

    unsafe fn unpin(&self, host: *mut u8) {
        let device = &*self.device;
        let Ok(_current) = device.enter() else {
            return;
        };
        // SAFETY: the caller pinned it and begins no more copies.
        let code = unsafe { (device.library.required.cuMemHostUnregister)(host.cast()) };
        device
            .library
            .log(device.kind(), "cuMemHostUnregister", code);
    }

    fn stream(&self) -> Result<Box<dyn Stream>, AcceleratorError> {
        Ok(Box::new(stream::CudaStream::new(&self.device)?))
    }

    fn direct(&self) -> Box<dyn super::direct::DeviceSide> {
        Box::new(Self {
            device: Arc::clone(&self.device),
        })
    }
}

impl Device {
    /// Gives memory back in the way it was come by.
    fn release(&self, allocation: &Allocation) {
        let required = &self.library.required;
        let address = allocation.address.0;
        let (call, code) = match allocation.source {
            Source::Allocated | Source::Imported => return self.unmap(allocation),
            // SAFETY: made by `cuMemAlloc`; nothing uses it (see `free`).
            Source::Plain => ("cuMemFree", unsafe { (required.cuMemFree_v2)(address) }),
            // SAFETY: opened by `cuIpcOpenMemHandle`; nothing uses it.
            Source::Ipc => ("cuIpcCloseMemHandle", unsafe {
                (required.cuIpcCloseMemHandle)(address)
            }),
        };
        self.library.log(self.kind(), call, code);
    }

    fn too_old(&self, what: &str) -> AcceleratorError {
        AcceleratorError::DriverTooOld {
            found: self.properties.driver.clone(),
            needed: format!("one with {what} ({NOT_FOUND})"),
        }
    }
}
