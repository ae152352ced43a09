//! The exported table of functions; see `genie_dpdk_abi::Api` for what each does.
//!
//! Called by `genie-dataplane`. Turns C arguments into Rust ones and errors
//! into statuses and sentences. The invariant: nothing unwinds out of here.

use std::ffi::{CStr, CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

use genie_dpdk_abi::{
    ABI_VERSION, Api, BUILD_ID, CAP_NEEDS_REGISTRATION, EalConfig, Port as PortHandle, PortConfig,
    PortInfo, PortStats, RxFrame, STATUS_OK, STATUS_PANIC, Text, TxFrame,
};
use genie_dpdk_sys as sys;

mod direct;

use crate::eal::{self, EalOptions};
use crate::errno::Errno;
use crate::port::{OpenError, Port, PortOptions};

/// Ports are attached and detached one at a time: DPDK's lists are global.
static CONTROL: Mutex<()> = Mutex::new(());

struct Table(Api);

// SAFETY: constants and functions, never written after they were made.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// The one exported symbol: returns the table, valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn genie_dpdk_api() -> *const Api {
    static TABLE: OnceLock<Table> = OnceLock::new();
    let make = || {
        let build_id = CString::new(BUILD_ID).unwrap_or_default();
        Table(Api {
            abi_version: ABI_VERSION,
            api_bytes: size_of::<Api>() as u32,
            build_id: build_id.into_raw(),
            dpdk_version,
            eal_init,
            thread_register,
            port_open,
            port_close,
            port_info,
            port_link,
            port_stats,
            port_stopped,
            rx_burst,
            rx_free,
            tx_burst,
            tx_reap,
            port_stop,
            ext_attach,
            ext_refs,
            ext_detach,
            mem_register,
            mem_unregister,
            rx_wait_fd,
            rx_interrupt,
            rx_segments,
            direct_iovas: direct::iovas,
            direct_register: direct::register,
            direct_unregister: direct::unregister,
            direct_map: direct::map,
            direct_unmap: direct::unmap,
            direct_pool: direct::pool,
            direct_pool_free: direct::pool_free,
            direct_split: direct::split,
            direct_join: direct::join,
        })
    };
    guard(std::ptr::null(), || &raw const TABLE.get_or_init(make).0)
}

/// Runs `body`; what it panics with becomes `otherwise`.
fn guard<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    // The state behind a handle after a panic is the caller's to give up: every
    // panic here is a bug, and `STATUS_PANIC` says so.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

/// Says why, and returns the status.
fn refuse(text: *mut Text, why: &dyn Display, status: i32) -> i32 {
    // SAFETY: null or a text of the caller's, by the ABI.
    if let Some(text) = unsafe { text.as_mut() } {
        text.set(&why.to_string());
    }
    status
}

/// # Safety
/// Null, or NUL-terminated and alive during the call.
unsafe fn string(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// # Safety
/// The handle came from `port_open`, was not closed, and is not in use elsewhere.
unsafe fn port_mut<'a>(port: *mut PortHandle) -> &'a mut Port {
    // SAFETY: the caller's promise; `port_open` made the handle from a `Port`.
    unsafe { &mut *port.cast::<Port>() }
}

/// # Safety
/// As [`port_mut`].
unsafe fn port_ref<'a>(port: *const PortHandle) -> &'a Port {
    // SAFETY: the caller's promise; `port_open` made the handle from a `Port`.
    unsafe { &*port.cast::<Port>() }
}

unsafe extern "C" fn dpdk_version() -> *const c_char {
    // SAFETY: returns a static string.
    unsafe { sys::rte_version() }
}

unsafe extern "C" fn eal_init(config: *const EalConfig, text: *mut Text) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a configuration of the caller's, by the ABI.
        let config = unsafe { &*config };
        // SAFETY: a string of the caller's, by the ABI.
        let file_prefix = unsafe { string(config.file_prefix) };
        // SAFETY: as above.
        let pci_allow = unsafe { string(config.pci_allow) };
        let pci_allow = pci_allow
            .split(';')
            .filter(|one| !one.is_empty())
            .map(str::to_owned);
        let options = EalOptions {
            file_prefix,
            pci_allow: pci_allow.collect(),
            memory_mib: config.memory_mib,
            no_huge: config.no_huge != 0,
        };
        match eal::init(options) {
            Ok(_) => STATUS_OK,
            Err(error) => refuse(text, &error, Errno::INVAL.status()),
        }
    })
}

unsafe extern "C" fn thread_register(text: *mut Text) -> i32 {
    guard(STATUS_PANIC, || match eal::get() {
        Err(error) => refuse(text, &error, Errno::INVAL.status()),
        Ok(up) => match eal::register_thread(up) {
            Ok(()) => STATUS_OK,
            Err(errno) => refuse(text, &errno, errno.status()),
        },
    })
}

unsafe extern "C" fn port_open(
    config: *const PortConfig,
    port: *mut *mut PortHandle,
    text: *mut Text,
) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a configuration of the caller's, by the ABI.
        let config = unsafe { &*config };
        let options = PortOptions {
            // SAFETY: a string of the caller's, by the ABI.
            devargs: unsafe { string(config.devargs) },
            rx_descriptors: config.rx_descriptors,
            tx_descriptors: config.tx_descriptors,
            mtu: config.mtu,
            queues: config.queues.max(1),
            first_udp_port: config.first_udp_port,
            spare_mbufs: config.spare_mbufs,
            attachments: config.attachments,
        };
        let _one_at_a_time = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = eal::get()
            .map_err(OpenError::from)
            .and_then(|up| Port::open(up, &options));
        match opened {
            Ok(opened) => {
                for (index, queue) in opened.into_iter().enumerate() {
                    let handle = Box::into_raw(Box::new(queue)).cast::<PortHandle>();
                    // SAFETY: an array of the caller's, by the ABI, with a place
                    // for each of `config.queues`.
                    let place = unsafe { port.add(index) };
                    // SAFETY: as above.
                    unsafe { place.write(handle) };
                }
                STATUS_OK
            }
            Err(error) => refuse(text, &error, error.status()),
        }
    })
}

unsafe extern "C" fn port_close(port: *mut PortHandle) -> i64 {
    guard(i64::from(STATUS_PANIC), || {
        let _one_at_a_time = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: made by `port_open` from a box, and given up by the caller.
        let port = unsafe { Box::from_raw(port.cast::<Port>()) };
        i64::from(port.close())
    })
}

unsafe extern "C" fn port_info(port: *const PortHandle, info: *mut PortInfo) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        // SAFETY: a place of the caller's, by the ABI.
        unsafe { info.write(*port.info()) };
        STATUS_OK
    })
}

unsafe extern "C" fn port_link(port: *const PortHandle) -> i32 {
    guard(0, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        i32::from(port.link_up())
    })
}

unsafe extern "C" fn port_stats(port: *const PortHandle, stats: *mut PortStats) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        // SAFETY: a place of the caller's, by the ABI.
        unsafe { stats.write(port.stats()) };
        STATUS_OK
    })
}

unsafe extern "C" fn rx_burst(port: *mut PortHandle, frames: *mut RxFrame, max: u32) -> u32 {
    guard(0, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        // SAFETY: an array of that length of the caller's; any bytes are a
        // frame description, as all fields are integers and raw pointers.
        let frames = unsafe { std::slice::from_raw_parts_mut(frames, max as usize) };
        if port.is_running() {
            port.queues.rx_burst(frames) as u32
        } else {
            0
        }
    })
}

unsafe extern "C" fn rx_free(port: *mut PortHandle, frames: *const RxFrame, count: u32) {
    guard((), || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        // SAFETY: an array of that length of the caller's.
        let frames = unsafe { std::slice::from_raw_parts(frames, count as usize) };
        // SAFETY: received and not freed since, by the ABI.
        unsafe { port.queues.rx_free(frames) };
    });
}

unsafe extern "C" fn tx_burst(port: *mut PortHandle, frames: *const TxFrame, count: u32) -> u32 {
    guard(0, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        // SAFETY: an array of that length of the caller's.
        let frames = unsafe { std::slice::from_raw_parts(frames, count as usize) };
        if !port.is_running() {
            return 0;
        }
        // SAFETY: heads are readable during the call, attached memory until it
        // is detached, by the ABI.
        unsafe { port.queues.tx_burst(frames) as u32 }
    })
}

unsafe extern "C" fn tx_reap(port: *mut PortHandle) {
    guard((), || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        if port.is_running() {
            port.queues.reap();
            // Frames kept for a peer that is gone are lost, as on a wire;
            // otherwise the memory they refer to would never come back.
            if port.queues.pending() > 0 && !port.link_up() {
                port.queues.drop_pending();
            }
        }
    });
}

unsafe extern "C" fn port_stop(port: *mut PortHandle) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        port.stop().map_or_else(Errno::status, |()| STATUS_OK)
    })
}

unsafe extern "C" fn port_stopped(port: *const PortHandle) -> i32 {
    guard(1, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        i32::from(port.was_stopped())
    })
}

unsafe extern "C" fn ext_attach(
    port: *mut PortHandle,
    base: *const u8,
    len: u64,
    text: *mut Text,
) -> i64 {
    guard(i64::from(STATUS_PANIC), || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        if base.is_null() || len == 0 {
            let why = "there is nothing to attach at a null address or of no bytes";
            return refuse(text, &why, Errno::INVAL.status()).into();
        }
        match port.external_mut().attach(base, len) {
            Some(handle) => handle.into(),
            None => refuse(
                text,
                &"no room for another attachment",
                Errno::BUSY.status(),
            )
            .into(),
        }
    })
}

unsafe extern "C" fn ext_refs(port: *const PortHandle, handle: u32) -> u32 {
    guard(0, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        port.external().refs(handle)
    })
}

unsafe extern "C" fn ext_detach(port: *mut PortHandle, handle: u32) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        port.external_mut()
            .detach(handle)
            .map_or_else(Errno::status, |()| STATUS_OK)
    })
}

unsafe extern "C" fn mem_register(
    port: *mut PortHandle,
    base: *mut u8,
    len: u64,
    page_bytes: u64,
    text: *mut Text,
) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        if !port.info().has(CAP_NEEDS_REGISTRATION) {
            return STATUS_OK;
        }
        let _one_at_a_time = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: mapped until it is unregistered, whole pages, by the ABI.
        match unsafe { port.register(base, len, page_bytes) } {
            Ok(()) => STATUS_OK,
            Err(errno) => refuse(text, &errno, errno.status()),
        }
    })
}

unsafe extern "C" fn mem_unregister(
    port: *mut PortHandle,
    base: *mut u8,
    len: u64,
    text: *mut Text,
) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        if !port.info().has(CAP_NEEDS_REGISTRATION) {
            return STATUS_OK;
        }
        let _one_at_a_time = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        match port.unregister(base, len) {
            Ok(()) => STATUS_OK,
            Err(errno) => refuse(text, &errno, errno.status()),
        }
    })
}

unsafe extern "C" fn rx_wait_fd(port: *const PortHandle) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_ref(port) };
        port.queues
            .rx_wait_fd()
            .unwrap_or_else(|| Errno::NOTSUP.status())
    })
}

unsafe extern "C" fn rx_interrupt(port: *mut PortHandle, on: u32) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        if !port.is_running() {
            return Errno::NODEV.status();
        }
        port.queues
            .set_rx_interrupt(on != 0)
            .map_or_else(Errno::status, |()| STATUS_OK)
    })
}

unsafe extern "C" fn rx_segments(port: *mut PortHandle, keep: u32) -> i32 {
    guard(STATUS_PANIC, || {
        // SAFETY: a live handle, by the ABI.
        let port = unsafe { port_mut(port) };
        port.queues.keeps_segments = keep != 0;
        STATUS_OK
    })
}
