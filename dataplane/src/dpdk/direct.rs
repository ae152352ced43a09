//! The card's part of GPUDirect, see [`PortSide`].

use genie_dpdk_abi as abi;

use super::port::Port;
use crate::memory::View;
use crate::memory::accelerator::direct::{
    DeviceSide, Direct, Mapped, PAGE_BYTES, PortSide, Refused, Split, device_arguments,
};
use crate::memory::accelerator::{DeviceAddress, DeviceLease};

/// A received frame as the card left it.
pub struct DirectFrame<'a> {
    /// What the CPU may read: all of the frame, or its headers.
    pub head: View<'a>,
    /// Where the payload is in device memory, and its length in bytes.
    pub payload: Option<(DeviceAddress, u32)>,
}

impl Port {
    /// Takes every step of GPUDirect with a piece of device memory and undoes
    /// them, to learn which one fails. The last, which would stop the port, is
    /// not taken: the card is asked whether it could be.
    pub fn try_direct(
        &mut self,
        device: Box<dyn DeviceSide>,
        lease: DeviceLease,
    ) -> Result<(), Refused> {
        let mtu = self.info.mtu;
        Direct::open(device, Box::new(self), lease, mtu, None).map(drop)
    }

    /// Delivers frames of two segments as such, the second untouched, to
    /// [`Port::rx_direct`]; [`Device::rx_burst`](crate::device::Device::rx_burst)
    /// counts them as unusable.
    pub fn keep_segments(&mut self, keep: bool) {
        // SAFETY: an open port, not in a burst function.
        unsafe { (self.library.api().rx_segments)(self.raw.as_ptr(), u32::from(keep)) };
    }

    /// Receives frames whose payloads may be in device memory; as
    /// [`Device::rx_burst`](crate::device::Device::rx_burst) otherwise.
    pub fn rx_direct(&mut self, on_frame: &mut dyn FnMut(DirectFrame<'_>)) -> usize {
        let Some(burst) = self.receive() else {
            return 0;
        };
        for frame in burst.frames() {
            if frame.data_len + frame.payload_len != frame.frame_len {
                self.unusable_frames += 1;
                continue;
            }
            let payload = (!frame.payload.is_null())
                .then_some((DeviceAddress(frame.payload as u64), frame.payload_len));
            // SAFETY: the packet buffer is ours until `burst` is dropped, and
            // the view cannot outlive this call.
            let head = unsafe { View::from_raw(frame.data, frame.data_len as usize) };
            on_frame(DirectFrame { head, payload });
        }
        burst.count as usize
    }

    /// Runs a step that fails with a sentence.
    fn step<T: Into<i64>>(
        &mut self,
        step: impl FnOnce(&abi::Api, *mut abi::Port, *mut abi::Text) -> T,
    ) -> Result<i64, String> {
        let mut text = abi::Text::EMPTY;
        let status = step(self.library.api(), self.raw.as_ptr(), &mut text).into();
        if status >= 0 {
            return Ok(status);
        }
        Err(match text.as_str() {
            "" => format!("the driver library failed with {status}"),
            sentence => sentence.to_owned(),
        })
    }
}

/// The library's description of memory.
fn described(memory: &Mapped) -> abi::DeviceMemory {
    abi::DeviceMemory {
        base: std::ptr::without_provenance_mut(memory.address.0 as usize),
        len: memory.len,
        page_bytes: PAGE_BYTES,
        iovas: memory.iovas.as_ptr(),
        iova_count: memory.iovas.len() as u64,
    }
}

impl PortSide for &mut Port {
    fn no_inlining(&mut self) -> Result<(), String> {
        let driver = self.info.driver_name();
        if device_arguments(driver, &self.arguments) == self.arguments {
            return Ok(());
        }
        Err(format!(
            "open it with {}",
            device_arguments(driver, &self.arguments)
        ))
    }

    fn iovas(&mut self, address: DeviceAddress, len: u64) -> Result<Vec<u64>, String> {
        let memory = Mapped {
            address,
            len,
            iovas: Vec::new(),
        };
        let memory = described(&memory);
        let mut iovas = vec![0; (len / PAGE_BYTES) as usize];
        let count = self.step(|api, port, text| {
            // SAFETY: an open port; the memory is described, not touched, and
            // there is room for an address a page.
            unsafe { (api.direct_iovas)(port, &memory, iovas.as_mut_ptr(), text) }
        })?;
        iovas.truncate(count as usize);
        Ok(iovas)
    }

    fn register(&mut self, memory: &Mapped) -> Result<(), String> {
        let memory = described(memory);
        // SAFETY: an open port; the caller keeps the memory until it is undone.
        self.step(|api, port, text| unsafe { (api.direct_register)(port, &memory, text) })?;
        Ok(())
    }

    fn unregister(&mut self, memory: &Mapped) -> Result<(), String> {
        let memory = described(memory);
        // SAFETY: an open port.
        self.step(|api, port, text| unsafe { (api.direct_unregister)(port, &memory, text) })?;
        Ok(())
    }

    fn dma_map(&mut self, memory: &Mapped) -> Result<(), String> {
        let memory = described(memory);
        // SAFETY: an open port; the caller keeps the memory until it is undone.
        self.step(|api, port, text| unsafe { (api.direct_map)(port, &memory, text) })?;
        Ok(())
    }

    fn dma_unmap(&mut self, memory: &Mapped) -> Result<(), String> {
        let memory = described(memory);
        // SAFETY: an open port.
        self.step(|api, port, text| unsafe { (api.direct_unmap)(port, &memory, text) })?;
        Ok(())
    }

    fn make_pool(&mut self, memory: &Mapped, buffer_bytes: u16) -> Result<(), String> {
        let memory = described(memory);
        // SAFETY: an open port; the caller keeps the memory until it is undone.
        let make = |api: &abi::Api, port, text| unsafe {
            (api.direct_pool)(port, &memory, buffer_bytes, text)
        };
        self.step(make)?;
        Ok(())
    }

    fn free_pool(&mut self) -> Result<(), String> {
        // SAFETY: an open port.
        self.step(|api, port, text| unsafe { (api.direct_pool_free)(port, text) })?;
        Ok(())
    }

    fn can_split(&mut self) -> Result<(), String> {
        if self.info.has(abi::CAP_RX_BUFFER_SPLIT) {
            return Ok(());
        }
        let driver = self.info.driver_name();
        Err(format!(
            "{driver} cannot split headers from payloads (RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT)"
        ))
    }

    fn split(&mut self, split: Split) -> Result<(), String> {
        let length = match split {
            Split::Length(length) => length,
            Split::Udp => 0,
        };
        // SAFETY: an open port, not in a burst function.
        self.step(|api, port, text| unsafe { (api.direct_split)(port, length, text) })?;
        Ok(())
    }

    fn join(&mut self) -> Result<(), String> {
        // SAFETY: an open port, not in a burst function.
        self.step(|api, port, text| unsafe { (api.direct_join)(port, text) })?;
        Ok(())
    }
}
