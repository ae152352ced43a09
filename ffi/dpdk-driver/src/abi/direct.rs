//! The functions of the table that set GPUDirect up; see `genie_dpdk_abi::Api`.

use std::sync::PoisonError;

use genie_dpdk_abi::{DeviceMemory, Port as PortHandle, STATUS_OK, STATUS_PANIC, Text};

use super::{CONTROL, guard, port_mut, refuse};
use crate::direct::{DirectError, Memory};
use crate::port::Port;

/// Runs one step under the lock of everything that is not a burst.
///
/// # Safety
/// `port` is a live handle, by the ABI.
unsafe fn step(
    port: *mut PortHandle,
    text: *mut Text,
    body: impl FnOnce(&mut Port) -> Result<i64, DirectError>,
) -> i64 {
    guard(i64::from(STATUS_PANIC), || {
        let _one_at_a_time = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise.
        let port = unsafe { port_mut(port) };
        match body(port) {
            Ok(value) => value,
            Err(error) => refuse(text, &error, error.status()).into(),
        }
    })
}

fn done(result: Result<(), DirectError>) -> Result<i64, DirectError> {
    result.map(|()| i64::from(STATUS_OK))
}

fn status(value: i64) -> i32 {
    // Statuses are negative `errno`s or zero.
    i32::try_from(value).unwrap_or(STATUS_PANIC)
}

/// # Safety
/// `memory` and its table of addresses are alive during the call.
unsafe fn memory<'a>(memory: *const DeviceMemory) -> Result<Memory<'a>, DirectError> {
    // SAFETY: the caller's promise.
    let raw = unsafe { &*memory };
    let iovas = if raw.iovas.is_null() || raw.iova_count == 0 {
        &[][..]
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(raw.iovas, raw.iova_count as usize) }
    };
    Memory::new(raw.base, raw.len, raw.page_bytes, iovas)
}

pub(super) unsafe extern "C" fn iovas(
    port: *const PortHandle,
    memory_of: *const DeviceMemory,
    iovas: *mut u64,
    text: *mut Text,
) -> i64 {
    let body = |_: &mut Port| {
        // SAFETY: alive during the call, by the ABI.
        let memory = unsafe { memory(memory_of) }?;
        let found = memory.find_iovas()?;
        // SAFETY: room for one a page, of which there are as many as were found
        // at most; neither overlaps the other.
        unsafe { iovas.copy_from_nonoverlapping(found.as_ptr(), found.len()) };
        Ok(found.len() as i64)
    };
    // SAFETY: a live handle, by the ABI; nothing of the port is changed.
    unsafe { step(port.cast_mut(), text, body) }
}

macro_rules! steps_on_memory {
    ($($name:ident => $method:ident;)*) => {$(
        pub(super) unsafe extern "C" fn $name(
            port: *mut PortHandle,
            memory_of: *const DeviceMemory,
            text: *mut Text,
        ) -> i32 {
            let body = |port: &mut Port| {
                // SAFETY: alive during the call, by the ABI.
                let memory = unsafe { memory(memory_of) }?;
                done(port.$method(&memory))
            };
            // SAFETY: a live handle, by the ABI.
            status(unsafe { step(port, text, body) })
        }
    )*};
}

steps_on_memory! {
    register => register_device;
    unregister => unregister_device;
    map => map_device;
    unmap => unmap_device;
}

pub(super) unsafe extern "C" fn pool(
    port: *mut PortHandle,
    memory_of: *const DeviceMemory,
    buffer_bytes: u16,
    text: *mut Text,
) -> i64 {
    let body = |port: &mut Port| {
        // SAFETY: alive during the call, by the ABI.
        let memory = unsafe { memory(memory_of) }?;
        port.make_device_pool(&memory, buffer_bytes).map(i64::from)
    };
    // SAFETY: a live handle, by the ABI.
    unsafe { step(port, text, body) }
}

pub(super) unsafe extern "C" fn pool_free(port: *mut PortHandle, text: *mut Text) -> i32 {
    // SAFETY: a live handle, by the ABI.
    status(unsafe { step(port, text, |port| done(port.free_device_pool())) })
}

pub(super) unsafe extern "C" fn split(port: *mut PortHandle, length: u16, text: *mut Text) -> i32 {
    // SAFETY: a live handle, by the ABI.
    status(unsafe { step(port, text, |port| done(port.split(length))) })
}

pub(super) unsafe extern "C" fn join(port: *mut PortHandle, text: *mut Text) -> i32 {
    // SAFETY: a live handle, by the ABI.
    status(unsafe { step(port, text, |port| done(port.join())) })
}
