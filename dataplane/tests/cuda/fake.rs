//! A driver library that records what is called, for tests without a device.
//!
//! Compiled by the tests themselves, as a shared object of its own. Device
//! memory is a memory file: its address faults when touched, copies go through
//! a second mapping and happen only once an event was asked about. Built with
//! `--cfg without_virtual_memory` it lacks those symbols, like an old driver;
//! with `--cfg without_events` it lacks one that nothing works without.

#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_char, c_int, c_long, c_uint, c_void};
use std::sync::Mutex;

type Code = c_uint;

const INVALID_VALUE: Code = 1;
const NOT_READY: Code = 600;

extern "C" {
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    fn ftruncate(fd: c_int, len: c_long) -> c_int;
    fn lseek(fd: c_int, offset: c_long, whence: c_int) -> c_long;
    fn dup(fd: c_int) -> c_int;
    fn close(fd: c_int) -> c_int;
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        off: c_long,
    ) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
}

#[derive(Default)]
struct State {
    log: Vec<String>,
    /// Calls until one fails, and with which code.
    failing: HashMap<String, (u32, Code)>,
    version: c_int,
    devices: c_int,
    attributes: HashMap<c_uint, c_int>,
    handles: HashMap<u64, (c_int, usize)>,
    next: u64,
    /// By public address: private address, length.
    mapped: BTreeMap<u64, (usize, usize)>,
    /// What streams have to do.
    work: HashMap<usize, Vec<(usize, usize, usize)>>,
    /// Recorded on which stream, and how often it is still asked in vain.
    events: HashMap<usize, (usize, u32)>,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
    let mut state = STATE.lock().unwrap();
    f(state.get_or_insert_with(|| State {
        version: 13000,
        devices: 2,
        ..State::default()
    }))
}

fn call(name: &str, f: impl FnOnce(&mut State) -> Code) -> Code {
    with(|state| {
        state.log.push(name.to_owned());
        if let Some((left, code)) = state.failing.get_mut(name) {
            if *left == 0 {
                let code = *code;
                state.failing.remove(name);
                return code;
            }
            *left -= 1;
        }
        f(state)
    })
}

fn ok<T>(at: *mut T, value: T) -> Code {
    unsafe { at.write(value) };
    0
}

impl State {
    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
    /// Device memory's second mapping; host memory as it is.
    fn either(&self, address: u64) -> usize {
        let found = self.mapped.range(..=address).next_back();
        let inside = found.is_some_and(|(base, (_, len))| address - base < *len as u64);
        if inside {
            self.private(address)
        } else {
            address as usize
        }
    }
    fn private(&self, address: u64) -> usize {
        let (base, (private, _)) = self.mapped.range(..=address).next_back().expect("mapped");
        private + (address - base) as usize
    }
    fn run(&mut self, stream: usize) {
        for (from, to, len) in self.work.remove(&stream).unwrap_or_default() {
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
        }
    }
    fn map(&mut self, address: u64, fd: c_int, len: usize) {
        let private = unsafe { mmap(std::ptr::null_mut(), len, 3, 1, fd, 0) };
        self.mapped.insert(address, (private as usize, len));
    }
}

// What the tests call.

#[no_mangle]
pub extern "C" fn fake_set(version: c_int, devices: c_int) {
    with(|state| (state.version, state.devices) = (version, devices));
}

#[no_mangle]
pub extern "C" fn fake_attribute(which: c_uint, value: c_int) {
    with(|state| state.attributes.insert(which, value));
}

#[no_mangle]
pub unsafe extern "C" fn fake_fail(name: *const u8, len: usize, after: u32, code: Code) {
    let name = String::from_utf8(std::slice::from_raw_parts(name, len).to_vec()).unwrap();
    with(|state| state.failing.insert(name, (after, code)));
}

#[no_mangle]
pub unsafe extern "C" fn fake_log(into: *mut u8, room: usize) -> usize {
    let log = with(|state| std::mem::take(&mut state.log)).join(" ");
    let len = log.len().min(room);
    std::ptr::copy_nonoverlapping(log.as_ptr(), into, len);
    len
}

#[no_mangle]
pub extern "C" fn fake_mapped() -> usize {
    with(|state| state.mapped.len())
}

// The driver.

#[no_mangle]
pub extern "C" fn cuInit(_: c_uint) -> Code {
    call("cuInit", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    call("cuDriverGetVersion", |state| ok(version, state.version))
}
#[no_mangle]
pub extern "C" fn cuGetErrorName(code: Code, text: *mut *const c_char) -> Code {
    let name = match code {
        1 => c"CUDA_ERROR_INVALID_VALUE",
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        214 => c"CUDA_ERROR_ECC_UNCORRECTABLE",
        _ => return INVALID_VALUE,
    };
    ok(text, name.as_ptr())
}
#[no_mangle]
pub extern "C" fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code {
    match code {
        214 => ok(text, c"uncorrectable ECC error encountered".as_ptr()),
        _ => INVALID_VALUE,
    }
}
#[no_mangle]
pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    call("cuDeviceGetCount", |state| ok(count, state.devices))
}
#[no_mangle]
pub extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    call("cuDeviceGet", |_| ok(device, ordinal))
}
#[no_mangle]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, _: c_int, _: c_int) -> Code {
    std::ptr::copy_nonoverlapping(c"recorded device".as_ptr(), name, 16);
    call("cuDeviceGetName", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _: c_int) -> Code {
    call("cuDeviceTotalMem", |_| ok(bytes, 1 << 30))
}
#[no_mangle]
pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, which: c_uint, _: c_int) -> Code {
    call("cuDeviceGetAttribute", |state| {
        ok(value, state.attributes.get(&which).copied().unwrap_or(0))
    })
}
#[no_mangle]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _: c_int) -> Code {
    call("cuDevicePrimaryCtxRetain", |_| {
        ok(context, 8 as *mut c_void)
    })
}
#[no_mangle]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> Code {
    call("cuDevicePrimaryCtxRelease", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuCtxPushCurrent_v2(_: *mut c_void) -> Code {
    0
}
#[no_mangle]
pub extern "C" fn cuCtxPopCurrent_v2(context: *mut *mut c_void) -> Code {
    ok(context, 8 as *mut c_void)
}
#[no_mangle]
pub extern "C" fn cuMemAlloc_v2(address: *mut u64, len: usize) -> Code {
    call("cuMemAlloc", |state| unsafe {
        let fd = memfd_create(c"fake".as_ptr(), 0);
        ftruncate(fd, len as c_long);
        let at = mmap(std::ptr::null_mut(), len, 0, 1, fd, 0) as u64;
        state.map(at, fd, len);
        close(fd);
        ok(address, at)
    })
}
#[no_mangle]
pub extern "C" fn cuMemFree_v2(address: u64) -> Code {
    call("cuMemFree", |state| {
        state.mapped.remove(&address);
        0
    })
}
#[no_mangle]
pub extern "C" fn cuMemHostRegister_v2(_: *mut c_void, _: usize, _: c_uint) -> Code {
    call("cuMemHostRegister", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuMemHostUnregister(_: *mut c_void) -> Code {
    call("cuMemHostUnregister", |_| 0)
}
#[no_mangle]
pub unsafe extern "C" fn cuPointerGetAttribute(
    value: *mut c_void,
    which: c_uint,
    address: u64,
) -> Code {
    with(|state| {
        let found = state.mapped.range(..=address).next_back();
        let found = found.filter(|(base, (_, len))| address - **base < *len as u64);
        let Some((base, (_, len))) = found else {
            return INVALID_VALUE;
        };
        match which {
            2 => ok(value.cast::<c_uint>(), 2),
            9 => ok(value.cast::<c_uint>(), 0),
            11 => ok(value.cast::<u64>(), *base),
            12 => ok(value.cast::<u64>(), *len as u64),
            _ => INVALID_VALUE,
        }
    })
}
#[repr(C)]
pub struct IpcHandle([c_char; 64]);
#[no_mangle]
pub extern "C" fn cuIpcOpenMemHandle_v2(address: *mut u64, handle: IpcHandle, _: c_uint) -> Code {
    if handle.0[0] != 1 {
        return call("cuIpcOpenMemHandle", |_| INVALID_VALUE);
    }
    cuMemAlloc_v2(address, 4096);
    call("cuIpcOpenMemHandle", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuIpcCloseMemHandle(address: u64) -> Code {
    cuMemFree_v2(address);
    call("cuIpcCloseMemHandle", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    len: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyHtoDAsync", |state| {
        let to = state.private(to);
        state
            .work
            .entry(stream)
            .or_default()
            .push((from as usize, to, len));
        0
    })
}
#[no_mangle]
pub extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    len: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyDtoHAsync", |state| {
        let from = state.private(from);
        state
            .work
            .entry(stream)
            .or_default()
            .push((from, to as usize, len));
        0
    })
}
#[no_mangle]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) -> Code {
    call("cuMemcpyDtoDAsync", |state| {
        let copy = (state.private(from), state.private(to), len);
        state.work.entry(stream).or_default().push(copy);
        0
    })
}
#[no_mangle]
pub unsafe extern "C" fn cuPointerSetAttribute(value: *const c_uint, which: c_uint, _: u64) -> Code {
    // SYNC_MEMOPS on.
    let code = if (which, *value) == (6, 1) { 0 } else { INVALID_VALUE };
    call("cuPointerSetAttribute", |_| code)
}
#[no_mangle]
pub extern "C" fn cuFlushGPUDirectRDMAWrites(target: c_uint, scope: c_uint) -> Code {
    let code = if (target, scope) == (0, 100) { 0 } else { INVALID_VALUE };
    call("cuFlushGPUDirectRDMAWrites", |_| code)
}

#[cfg(not(without_kernels))]
mod kernels {
    use super::*;

    #[no_mangle]
    pub unsafe extern "C" fn cuModuleLoadData(module: *mut usize, image: *const c_char) -> Code {
        let text = std::ffi::CStr::from_ptr(image).to_string_lossy();
        let known = text.contains(".entry genie_gather(");
        call("cuModuleLoadData", |_| if known { ok(module, 5) } else { 218 })
    }
    #[no_mangle]
    pub extern "C" fn cuModuleUnload(module: usize) -> Code {
        call("cuModuleUnload", |_| if module == 5 { 0 } else { INVALID_VALUE })
    }
    #[no_mangle]
    pub extern "C" fn cuModuleGetFunction(
        function: *mut usize,
        _: usize,
        _: *const c_char,
    ) -> Code {
        call("cuModuleGetFunction", |_| ok(function, 6))
    }
    #[no_mangle]
    pub unsafe extern "C" fn cuLaunchKernel(
        function: usize,
        columns: c_uint,
        blocks: c_uint,
        _: c_uint,
        threads: c_uint,
        _: c_uint,
        _: c_uint,
        _: c_uint,
        stream: usize,
        parameters: *const *const [[u64; 3]; 128],
        _: *const c_void,
    ) -> Code {
        let table = **parameters;
        call("cuLaunchKernel", |state| {
            if function != 6 || columns > 128 || blocks == 0 || threads == 0 {
                return INVALID_VALUE;
            }
            for [from, to, len] in &table[..columns as usize] {
                let copy = (state.either(*from), state.either(*to), *len as usize);
                state.work.entry(stream).or_default().push(copy);
            }
            0
        })
    }
}

#[no_mangle]
pub extern "C" fn cuStreamCreate(stream: *mut usize, _: c_uint) -> Code {
    call("cuStreamCreate", |state| ok(stream, state.fresh() as usize))
}
#[no_mangle]
pub extern "C" fn cuStreamDestroy_v2(_: usize) -> Code {
    call("cuStreamDestroy", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuStreamSynchronize(stream: usize) -> Code {
    call("cuStreamSynchronize", |state| {
        state.run(stream);
        0
    })
}
#[no_mangle]
pub extern "C" fn cuStreamWaitEvent(_: usize, _: usize, _: c_uint) -> Code {
    call("cuStreamWaitEvent", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuEventCreate(event: *mut usize, _: c_uint) -> Code {
    call("cuEventCreate", |state| ok(event, state.fresh() as usize))
}
#[no_mangle]
pub extern "C" fn cuEventRecord(event: usize, stream: usize) -> Code {
    call("cuEventRecord", |state| {
        state.events.insert(event, (stream, 2));
        0
    })
}
#[cfg(not(without_events))]
#[no_mangle]
pub extern "C" fn cuEventQuery(event: usize) -> Code {
    let mut ready = false;
    with(|state| {
        let (stream, left) = state.events.get_mut(&event).expect("recorded");
        ready = *left == 0;
        let stream = *stream;
        *left = left.saturating_sub(1);
        if ready {
            state.run(stream);
        }
    });
    if !ready {
        return NOT_READY;
    }
    call("cuEventQuery", |_| 0)
}
#[no_mangle]
pub extern "C" fn cuEventDestroy_v2(_: usize) -> Code {
    call("cuEventDestroy", |_| 0)
}

#[cfg(not(without_virtual_memory))]
mod virtual_memory {
    use super::*;

    #[no_mangle]
    pub extern "C" fn cuMemGetAllocationGranularity(
        bytes: *mut usize,
        _: *const c_void,
        _: c_uint,
    ) -> Code {
        call("cuMemGetAllocationGranularity", |_| ok(bytes, 2 << 20))
    }
    #[no_mangle]
    pub extern "C" fn cuMemCreate(handle: *mut u64, len: usize, _: *const c_void, _: u64) -> Code {
        call("cuMemCreate", |state| {
            let fd = unsafe { memfd_create(c"fake".as_ptr(), 0) };
            unsafe { ftruncate(fd, len as c_long) };
            let number = state.fresh();
            state.handles.insert(number, (fd, len));
            ok(handle, number)
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemRelease(handle: u64) -> Code {
        call("cuMemRelease", |state| {
            match state.handles.remove(&handle) {
                Some((fd, _)) => unsafe { close(fd) as Code },
                None => INVALID_VALUE,
            }
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemAddressReserve(
        address: *mut u64,
        len: usize,
        _: usize,
        _: u64,
        _: u64,
    ) -> Code {
        call("cuMemAddressReserve", |_| {
            // Private and anonymous, without any permission.
            let at = unsafe { mmap(std::ptr::null_mut(), len, 0, 0x22, -1, 0) };
            ok(address, at as u64)
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemAddressFree(address: u64, len: usize) -> Code {
        call("cuMemAddressFree", |_| unsafe {
            munmap(address as *mut c_void, len) as Code
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemMap(address: u64, len: usize, _: usize, handle: u64, _: u64) -> Code {
        call("cuMemMap", |state| {
            let (fd, there) = state.handles[&handle];
            if len > there {
                return INVALID_VALUE;
            }
            state.map(address, fd, len);
            0
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemUnmap(address: u64, _: usize) -> Code {
        call("cuMemUnmap", |state| match state.mapped.remove(&address) {
            Some((private, len)) => unsafe { munmap(private as *mut c_void, len) as Code },
            None => INVALID_VALUE,
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemSetAccess(_: u64, _: usize, _: *const c_void, _: usize) -> Code {
        call("cuMemSetAccess", |_| 0)
    }
    #[no_mangle]
    pub extern "C" fn cuMemExportToShareableHandle(
        into: *mut c_int,
        handle: u64,
        kind: c_uint,
        _: u64,
    ) -> Code {
        call("cuMemExportToShareableHandle", |state| {
            match (kind, state.handles.get(&handle)) {
                (1, Some((fd, _))) => ok(into, unsafe { dup(*fd) }),
                _ => INVALID_VALUE,
            }
        })
    }
    #[no_mangle]
    pub extern "C" fn cuMemImportFromShareableHandle(
        handle: *mut u64,
        fd: usize,
        kind: c_uint,
    ) -> Code {
        call("cuMemImportFromShareableHandle", |state| {
            let fd = unsafe { dup(fd as c_int) };
            let len = unsafe { lseek(fd, 0, 2) };
            if kind != 1 || len <= 0 {
                return INVALID_VALUE;
            }
            let number = state.fresh();
            state.handles.insert(number, (fd, len as usize));
            ok(handle, number)
        })
    }
}
