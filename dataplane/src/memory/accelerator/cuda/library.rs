//! The driver's library: what is looked up in it, and what its codes mean.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;

use cudarc::driver::sys;
use libloading::Library as SharedObject;

use crate::memory::accelerator::{AcceleratorError, MemoryKind};

/// A `CUresult`, as a number: a newer driver may return one that the enum lacks.
pub(super) type Code = c_uint;

pub(super) const SUCCESS: Code = 0;
pub(super) const OUT_OF_MEMORY: Code = 2;
pub(super) const NOT_READY: Code = 600;
/// How a symbol that is not there is written.
pub(super) const NOT_FOUND: &str = "CUDA 10.2 or later, on Linux";

/// After these every call fails until the process ends: uncorrectable memory
/// and NVLink errors, and faults of a kernel (driver API, `CUresult`).
const STICKY: [Code; 11] = [214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719];

/// Names tried in turn; the second is only there with a development package.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// The driver's library, with the functions found in it.
#[derive(Debug)]
pub struct Library {
    pub(super) required: Required,
    /// Memory that can be passed by descriptor: newer than the rest.
    pub(super) virtual_memory: Option<VirtualMemory>,
    /// Kernels of our own.
    pub(super) kernels: Option<Kernels>,
    /// Memory that other devices reach.
    pub(super) rdma: Option<Rdma>,
    /// Kept for as long as its functions are called.
    _object: SharedObject,
}

macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($function:ident($($argument:ty),*);)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        pub(super) struct $name {
            $(pub(super) $function: unsafe extern "C" fn($($argument),*) -> Code,)*
        }

        impl $name {
            /// Looks every function up; the name of the first that is missing.
            fn find(object: &SharedObject) -> Result<Self, &'static str> {
                Ok(Self {
                    $($function: {
                        let name = stringify!($function);
                        // SAFETY: the type is that of the driver API's header
                        // for this name; the library stays loaded beside it.
                        let found = unsafe { object.get(name) };
                        *found.map_err(|_| name)?
                    },)*
                })
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    };
}

functions! {
    /// What nothing works without; all of it is in CUDA 11.
    Required {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuGetErrorName(Code, *mut *const c_char);
        cuGetErrorString(Code, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut sys::CUdevice, c_int);
        cuDeviceGetName(*mut c_char, c_int, sys::CUdevice);
        cuDeviceTotalMem_v2(*mut usize, sys::CUdevice);
        cuDeviceGetAttribute(*mut c_int, c_uint, sys::CUdevice);
        cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
        cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
        cuCtxPushCurrent_v2(sys::CUcontext);
        cuCtxPopCurrent_v2(*mut sys::CUcontext);
        cuMemAlloc_v2(*mut sys::CUdeviceptr, usize);
        cuMemFree_v2(sys::CUdeviceptr);
        cuMemHostRegister_v2(*mut c_void, usize, c_uint);
        cuMemHostUnregister(*mut c_void);
        cuPointerGetAttribute(*mut c_void, c_uint, sys::CUdeviceptr);
        cuIpcOpenMemHandle_v2(*mut sys::CUdeviceptr, sys::CUipcMemHandle, c_uint);
        cuIpcCloseMemHandle(sys::CUdeviceptr);
        cuMemcpyHtoDAsync_v2(sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
        cuMemcpyDtoHAsync_v2(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
        cuMemcpyDtoDAsync_v2(sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream);
        cuStreamCreate(*mut sys::CUstream, c_uint);
        cuStreamDestroy_v2(sys::CUstream);
        cuStreamSynchronize(sys::CUstream);
        cuStreamWaitEvent(sys::CUstream, sys::CUevent, c_uint);
        cuEventCreate(*mut sys::CUevent, c_uint);
        cuEventRecord(sys::CUevent, sys::CUstream);
        cuEventQuery(sys::CUevent);
        cuEventDestroy_v2(sys::CUevent);
    }
}

functions! {
    /// Virtual memory management: physical memory with a descriptor, mapped apart.
    VirtualMemory {
        cuMemGetAllocationGranularity(*mut usize, *const sys::CUmemAllocationProp, c_uint);
        cuMemCreate(*mut u64, usize, *const sys::CUmemAllocationProp, u64);
        cuMemRelease(u64);
        cuMemAddressReserve(*mut sys::CUdeviceptr, usize, usize, sys::CUdeviceptr, u64);
        cuMemAddressFree(sys::CUdeviceptr, usize);
        cuMemMap(sys::CUdeviceptr, usize, usize, u64, u64);
        cuMemUnmap(sys::CUdeviceptr, usize);
        cuMemSetAccess(sys::CUdeviceptr, usize, *const sys::CUmemAccessDesc, usize);
        cuMemExportToShareableHandle(*mut c_void, u64, c_uint, u64);
        cuMemImportFromShareableHandle(*mut u64, *mut c_void, c_uint);
    }
}

functions! {
    /// Modules of kernels.
    Kernels {
        cuModuleLoadData(*mut sys::CUmodule, *const c_void);
        cuModuleUnload(sys::CUmodule);
        cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
        cuLaunchKernel(
            sys::CUfunction,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            sys::CUstream,
            *mut *mut c_void,
            *mut *mut c_void
        );
    }
}

functions! {
    /// What GPUDirect RDMA needs; all of it is in CUDA 11.3.
    Rdma {
        cuPointerSetAttribute(*const c_void, c_uint, sys::CUdeviceptr);
        cuFlushGPUDirectRDMAWrites(c_uint, c_uint);
    }
}

impl Library {
    /// The library of this machine's driver.
    pub fn load() -> Result<Self, AcceleratorError> {
        let mut reasons = Vec::new();
        for name in NAMES {
            match Self::load_from(Path::new(name)) {
                Err(AcceleratorError::NoDriver(reason)) => reasons.push(reason),
                found => return found,
            }
        }
        Err(AcceleratorError::NoDriver(reasons.join("; ")))
    }

    /// The library at `path`.
    pub fn load_from(path: &Path) -> Result<Self, AcceleratorError> {
        // SAFETY: the driver's library, or a test's: its initialisers do nothing
        // that this process must prepare for.
        let object = unsafe { SharedObject::new(path) };
        let object = object.map_err(|error| {
            // The loader's own words are in the source.
            let words = std::error::Error::source(&error).map(ToString::to_string);
            AcceleratorError::NoDriver(words.unwrap_or_else(|| error.to_string()))
        })?;
        let required = Required::find(&object);
        let required = required.map_err(|symbol| AcceleratorError::DriverTooOld {
            found: format!("at {}", path.display()),
            needed: format!("one with {symbol}"),
        })?;
        let virtual_memory = VirtualMemory::find(&object)
            .inspect_err(|symbol| {
                tracing::info!(symbol, "device memory cannot be shared by descriptor");
            })
            .ok();
        Ok(Self {
            required,
            virtual_memory,
            kernels: Kernels::find(&object).ok(),
            rdma: Rdma::find(&object).ok(),
            _object: object,
        })
    }

    pub(super) fn version(&self, kind: MemoryKind) -> Result<c_int, AcceleratorError> {
        let mut version = 0;
        // SAFETY: `version` is written.
        let code = unsafe { (self.required.cuDriverGetVersion)(&mut version) };
        self.check(kind, "cuDriverGetVersion", code)?;
        Ok(version)
    }

    /// An error with the driver's own words, unless `code` is success.
    pub(super) fn check(
        &self,
        kind: MemoryKind,
        call: &'static str,
        code: Code,
    ) -> Result<(), AcceleratorError> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(AcceleratorError::Call {
            kind,
            call,
            code,
            text: self.text(code),
            sticky: STICKY.contains(&code),
        })
    }

    /// Logs what failed where nobody can be told.
    pub(super) fn log(&self, kind: MemoryKind, call: &'static str, code: Code) {
        if let Err(error) = self.check(kind, call, code) {
            tracing::warn!(%error, "while giving back");
        }
    }

    /// What the driver calls a code: `CUDA_ERROR_…: …`.
    pub(super) fn text(&self, code: Code) -> String {
        let ask = |function: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: `text` is written; any number may be asked about.
            let answer = unsafe { function(code, &mut text) };
            if answer != SUCCESS || text.is_null() {
                return None;
            }
            // SAFETY: a constant string of the driver's, ended by a zero.
            let text = unsafe { CStr::from_ptr(text) };
            Some(text.to_string_lossy().into_owned())
        };
        let name = ask(self.required.cuGetErrorName);
        let what = ask(self.required.cuGetErrorString);
        match (name, what) {
            (Some(name), Some(what)) => format!("{name}: {what}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => "a code that this driver has no words for".into(),
        }
    }
}
