//! Receiving payloads into memory that is a GPU's.
//!
//! The steps that GPUDirect asks of a port; who takes them, in which order, and
//! undoes them, is the caller (`genie_dataplane`'s `memory::accelerator::direct`).
//! The invariant: *a step that fails leaves the port as it was*, except that what
//! it mapped for the card is known, and stays until it is unmapped. No byte of
//! the memory is ever read or written here.

use genie_dpdk_abi as abi;
use genie_dpdk_sys as sys;

use crate::errno::Errno;
use crate::mempool::{Element, Mempool};
use crate::port::Port;

/// Memory of a GPU's, whole pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory<'a> {
    pub(crate) base: *mut u8,
    pub(crate) len: u64,
    pub(crate) page_bytes: u64,
    /// One a page, or none where they are the memory's own addresses.
    pub(crate) iovas: &'a [u64],
}

/// Why a step cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectError {
    #[error("{len} bytes at {base:#x} with {iovas} addresses are not whole pages of {page_bytes}")]
    Pages {
        base: usize,
        len: u64,
        page_bytes: u64,
        iovas: usize,
    },
    #[error("the port's addresses are physical, and page {page} has none that is known")]
    NoIova { page: u64 },
    #[error("{driver}: {call} fails: {errno}")]
    Call {
        driver: String,
        call: &'static str,
        errno: Errno,
    },
    #[error("buffers of {buffer_bytes} bytes do not fit into pages of {page_bytes}")]
    BufferSize { buffer_bytes: u16, page_bytes: u64 },
    #[error("the card can reach device memory already")]
    MappedAlready,
    #[error("there is a pool in device memory already")]
    PoolThere,
    #[error("there is no pool in device memory")]
    NoPool,
    #[error("{out} packet buffers in device memory are in use")]
    Out { out: u32 },
    #[error("{driver} cannot split headers from payloads (RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT)")]
    NoSplit { driver: String },
    #[error("headers are split from payloads already")]
    SplitAlready,
    #[error("the port has {queues} queues, of which none can be set up anew by itself")]
    Queues { queues: u16 },
    #[error("the port is stopped")]
    Stopped,
}

impl DirectError {
    pub(crate) fn status(&self) -> i32 {
        match self {
            Self::Call { errno, .. } => errno.status(),
            Self::NoSplit { .. } | Self::Queues { .. } => Errno::NOTSUP.status(),
            Self::Out { .. } | Self::MappedAlready | Self::PoolThere | Self::SplitAlready => {
                Errno::BUSY.status()
            }
            Self::Stopped => Errno::NODEV.status(),
            _ => Errno::INVAL.status(),
        }
    }
}

impl<'a> Memory<'a> {
    /// Whole pages, and an address for each or none at all.
    pub(crate) fn new(
        base: *mut u8,
        len: u64,
        page_bytes: u64,
        iovas: &'a [u64],
    ) -> Result<Self, DirectError> {
        let whole = page_bytes.is_power_of_two()
            && len > 0
            && len.is_multiple_of(page_bytes)
            && (base as u64).is_multiple_of(page_bytes)
            && (base as u64).checked_add(len).is_some();
        if !whole || !(iovas.is_empty() || iovas.len() as u64 == len / page_bytes) {
            return Err(DirectError::Pages {
                base: base as usize,
                len,
                page_bytes,
                iovas: iovas.len(),
            });
        }
        Ok(Self {
            base,
            len,
            page_bytes,
            iovas,
        })
    }

    /// The card's address of each page; none where they are the memory's own.
    pub(crate) fn find_iovas(&self) -> Result<Vec<u64>, DirectError> {
        // SAFETY: reads how the EAL was brought up.
        if unsafe { sys::rte_eal_iova_mode() } == sys::RTE_IOVA_VA {
            return Ok(Vec::new());
        }
        self.translate(|page| {
            // SAFETY: asks the kernel's page map; the memory is not touched.
            unsafe { sys::rte_mem_virt2iova(page.cast()) }
        })
    }

    fn translate(&self, iova_of: impl Fn(*const u8) -> u64) -> Result<Vec<u64>, DirectError> {
        let one = |page: u64| {
            let at = self.base.wrapping_add((page * self.page_bytes) as usize);
            match iova_of(at) {
                // `RTE_BAD_IOVA`; a GPU's pages are in no page map of the CPU's.
                u64::MAX => Err(DirectError::NoIova { page }),
                iova => Ok(iova),
            }
        };
        (0..self.len / self.page_bytes).map(one).collect()
    }

    /// Pieces that are contiguous to the card: all of it, or its pages.
    fn pieces(&self) -> Vec<(*mut u8, u64, u64)> {
        if self.iovas.is_empty() {
            return vec![(self.base, self.base as u64, self.len)];
        }
        let piece = |(page, iova): (usize, &u64)| {
            let at = self.base.wrapping_add(page * self.page_bytes as usize);
            (at, *iova, self.page_bytes)
        };
        self.iovas.iter().enumerate().map(piece).collect()
    }
}

impl Port {
    fn called(&self, call: &'static str) -> impl Fn(Errno) -> DirectError {
        let driver = self.info().driver_name().to_owned();
        move |errno| DirectError::Call {
            driver: driver.clone(),
            call,
            errno,
        }
    }

    /// Tells DPDK of the memory, with the address of each page.
    pub(crate) fn register_device(&mut self, memory: &Memory<'_>) -> Result<(), DirectError> {
        let (iovas, count) = match memory.iovas {
            [] => (std::ptr::null_mut(), 0),
            iovas => (iovas.as_ptr().cast_mut(), iovas.len() as u32),
        };
        let (len, page) = (memory.len as usize, memory.page_bytes as usize);
        // SAFETY: whole pages, kept by the caller until they are unregistered;
        // the table is only read.
        let status =
            unsafe { sys::rte_extmem_register(memory.base.cast(), len, iovas, count, page) };
        Errno::check(status).map_err(self.called("rte_extmem_register"))?;
        Ok(())
    }

    /// Undoes [`Port::register_device`].
    pub(crate) fn unregister_device(&mut self, memory: &Memory<'_>) -> Result<(), DirectError> {
        // SAFETY: DPDK looks the range up and refuses one it does not know.
        let status = unsafe { sys::rte_extmem_unregister(memory.base.cast(), memory.len as usize) };
        Errno::check(status).map_err(self.called("rte_extmem_unregister"))?;
        Ok(())
    }

    /// Lets the card reach the memory, piece by piece. Where one is refused those
    /// before it stay, until [`Port::unmap_device`].
    pub(crate) fn map_device(&mut self, memory: &Memory<'_>) -> Result<(), DirectError> {
        if self.device_pieces > 0 {
            return Err(DirectError::MappedAlready);
        }
        let device = self.raw_device();
        for (at, iova, len) in memory.pieces() {
            // SAFETY: registered memory and the device of an open port.
            let status = unsafe { sys::rte_dev_dma_map(device, at.cast(), iova, len as usize) };
            Errno::check(status).map_err(self.called("rte_dev_dma_map"))?;
            self.device_pieces += 1;
        }
        Ok(())
    }

    /// Undoes what [`Port::map_device`] did of this memory, the last piece first;
    /// what cannot be undone stays mapped, and is undone by another call.
    pub(crate) fn unmap_device(&mut self, memory: &Memory<'_>) -> Result<(), DirectError> {
        let device = self.raw_device();
        let mapped = memory.pieces().into_iter().take(self.device_pieces);
        for (at, iova, len) in mapped.rev() {
            // SAFETY: DPDK refuses a range that it does not know.
            let status = unsafe { sys::rte_dev_dma_unmap(device, at.cast(), iova, len as usize) };
            Errno::check(status).map_err(self.called("rte_dev_dma_unmap"))?;
            self.device_pieces -= 1;
        }
        Ok(())
    }

    /// Makes packet buffers in the memory; returns how many.
    pub(crate) fn make_device_pool(
        &mut self,
        memory: &Memory<'_>,
        buffer_bytes: u16,
    ) -> Result<u32, DirectError> {
        if self.device_pool.is_some() {
            return Err(DirectError::PoolThere);
        }
        let wrong = DirectError::BufferSize {
            buffer_bytes,
            page_bytes: memory.page_bytes,
        };
        let Some(element) = Element::holding(buffer_bytes) else {
            return Err(wrong);
        };
        let pieces = memory.pieces();
        if pieces.iter().any(|(_, _, len)| *len < element.bytes()) {
            return Err(wrong);
        }
        let numa_node = self.info().numa_node;
        let pool = Mempool::in_memory(&pieces, element, numa_node)
            .map_err(self.called("rte_pktmbuf_pool_create_extbuf"))?;
        let count = pool.count();
        self.device_pool = Some(pool);
        Ok(count)
    }

    /// Undoes [`Port::make_device_pool`], unless a buffer is out.
    pub(crate) fn free_device_pool(&mut self) -> Result<(), DirectError> {
        let pool = self.device_pool.as_ref().ok_or(DirectError::NoPool)?;
        match pool.in_use() {
            0 => {
                self.device_pool = None;
                Ok(())
            }
            out => Err(DirectError::Out { out }),
        }
    }

    /// Receives what is behind `length` bytes, or behind the UDP header for 0,
    /// into the pool in device memory.
    pub(crate) fn split(&mut self, length: u16) -> Result<(), DirectError> {
        let Some(pool) = &self.device_pool else {
            return Err(DirectError::NoPool);
        };
        if !self.info().has(abi::CAP_RX_BUFFER_SPLIT) {
            return Err(DirectError::NoSplit {
                driver: self.info().driver_name().to_owned(),
            });
        }
        if self.queues.keeps_segments {
            return Err(DirectError::SplitAlready);
        }
        let proto_hdr = if length == 0 { sys::GENIE_PTYPE_UDP } else { 0 };
        let segment = |mp, length, proto_hdr| sys::rte_eth_rxseg {
            split: sys::rte_eth_rxseg_split {
                mp,
                length,
                offset: 0,
                proto_hdr,
            },
        };
        let mut segments = [
            segment(self.rx_pool().as_ptr(), length, proto_hdr),
            segment(pool.as_ptr(), 0, 0),
        ];
        self.set_rx_queue(Some(&mut segments))?;
        self.queues.keeps_segments = true;
        Ok(())
    }

    /// Undoes [`Port::split`].
    pub(crate) fn join(&mut self) -> Result<(), DirectError> {
        self.set_rx_queue(None)?;
        self.queues.keeps_segments = false;
        Ok(())
    }

    /// Sets the receive queue up anew, between a stop and a start. What is
    /// refused is replaced by an ordinary queue; without one the port is stopped.
    fn set_rx_queue(
        &mut self,
        segments: Option<&mut [sys::rte_eth_rxseg; 2]>,
    ) -> Result<(), DirectError> {
        if !self.is_running() {
            return Err(DirectError::Stopped);
        }
        let queues = self.queue_count();
        if queues > 1 {
            return Err(DirectError::Queues { queues });
        }
        let port = self.number();
        // SAFETY: a started port; this thread is not in a burst function.
        Errno::check(unsafe { sys::rte_eth_dev_stop(port) })
            .map_err(self.called("rte_eth_dev_stop"))?;
        let split = segments.map(|segments| self.set_up_queue(Some(segments)));
        let set_up = match split {
            Some(Ok(())) => Ok(()),
            _ => self.set_up_queue(None),
        };
        let refused = split.and_then(Result::err);
        // SAFETY: configured, and its queues are set up.
        let start = |()| Errno::check(unsafe { sys::rte_eth_dev_start(port) }).map(drop);
        if let Err(errno) = set_up.and_then(start) {
            self.give_up();
            return Err(self.called("setting its receive queue up again")(errno));
        }
        refused.map_or(Ok(()), |errno| {
            Err(self.called("rte_eth_rx_queue_setup")(errno))
        })
    }

    /// Gives the stopped port its receive queue, with these segments or with the
    /// one pool it had at first.
    fn set_up_queue(&self, segments: Option<&mut [sys::rte_eth_rxseg; 2]>) -> Result<(), Errno> {
        let (port, count) = (self.number(), self.info().rx_descriptors);
        let node = self.info().numa_node as u32;
        let status = match segments {
            None => {
                let pool = self.rx_pool().as_ptr();
                // SAFETY: a stopped port; the pool outlives it; null means defaults.
                unsafe { sys::rte_eth_rx_queue_setup(port, 0, count, node, std::ptr::null(), pool) }
            }
            Some(segments) => {
                // SAFETY: returns constants.
                let bits = unsafe { sys::genie_offloads() };
                let config = sys::rte_eth_rxconf {
                    rx_nseg: segments.len() as u16,
                    rx_seg: segments.as_mut_ptr(),
                    offloads: bits.rx_buffer_split | bits.rx_scatter,
                    ..Default::default()
                };
                // SAFETY: as above; the segments live through the call, which
                // copies what it needs, and both pools outlive the port.
                unsafe {
                    let none = std::ptr::null_mut();
                    sys::rte_eth_rx_queue_setup(port, 0, count, node, &config, none)
                }
            }
        };
        Errno::check(status).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 64 << 10;

    fn memory(pages: u64, iovas: &[u64]) -> Memory<'_> {
        let base = std::ptr::without_provenance_mut(16 * PAGE as usize);
        Memory::new(base, pages * PAGE, PAGE, iovas).unwrap()
    }

    #[test]
    fn only_whole_pages_with_an_address_each_are_memory() {
        let base = |at: u64| std::ptr::without_provenance_mut(at as usize);
        for (at, len, page, iovas) in [
            (PAGE, 0, PAGE, 0),
            (PAGE + 1, PAGE, PAGE, 0),
            (PAGE, PAGE + 1, PAGE, 0),
            (PAGE, PAGE, 3, 0),
            (PAGE, PAGE, 0, 0),
            (PAGE, 2 * PAGE, PAGE, 1),
            (u64::MAX - PAGE + 1, PAGE, PAGE, 0),
        ] {
            let iovas = vec![0; iovas];
            let refused = Memory::new(base(at), len, page, &iovas).unwrap_err();
            assert_eq!(refused.status(), Errno::INVAL.status(), "{refused}");
        }
    }

    #[test]
    fn physical_addresses_are_one_a_page_or_a_reason() {
        let found = memory(3, &[]).translate(|at| at.addr() as u64 ^ (1 << 40));
        let first = (16 * PAGE) ^ (1 << 40);
        assert_eq!(found.unwrap(), [first, first + PAGE, first + 2 * PAGE]);
        let lacking = memory(3, &[]).translate(|at| match at.addr() as u64 / PAGE {
            17 => u64::MAX,
            _ => 0,
        });
        assert_eq!(
            lacking.unwrap_err().to_string(),
            "the port's addresses are physical, and page 1 has none that is known"
        );
    }

    #[test]
    fn pieces_are_what_the_card_sees_in_one() {
        let whole = memory(2, &[]).pieces();
        assert_eq!(
            (whole.len(), whole[0].1, whole[0].2),
            (1, 16 * PAGE, 2 * PAGE)
        );
        let iovas = [7 * PAGE, 3 * PAGE];
        let pages: Vec<_> = memory(2, &iovas)
            .pieces()
            .into_iter()
            .map(|(at, iova, len)| (at.addr() as u64, iova, len))
            .collect();
        assert_eq!(
            pages,
            [(16 * PAGE, 7 * PAGE, PAGE), (17 * PAGE, 3 * PAGE, PAGE)]
        );
    }
}
