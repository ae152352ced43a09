//! GPUDirect: a network card that puts payloads straight into device memory.
//!
//! Setting it up is a list of steps, some asked of the device's driver
//! ([`DeviceSide`]) and some of the card's ([`PortSide`]):
//!
//! ```text
//!   Support        the device lets cards reach its memory
//!   WriteOrdering  who sees what a card wrote, and when: by itself, or after a flush
//!   Alignment      whole pages of the device, 64 KiB
//!   SyncMemops     copies on this memory are synchronous to what a card does
//!   Inlining       the card's driver must not read payloads with the CPU
//!   Addresses      one for each page, where the card's are physical
//!   Register       DPDK knows the memory (rte_extmem_register)
//!   DmaMap         the card may reach it (rte_dev_dma_map)
//!   Pool           packet buffers in it (rte_pktmbuf_pool_create_extbuf)
//!   BufferSplit    headers go to the host's buffers, payloads to these
//! ```
//!
//! Each may fail on its own, on most machines one does, and then tensors are
//! staged: [`Refused`] names the step and the reason. The invariant: *whatever
//! was done before a step that fails is undone in the opposite order, and memory
//! that a card may still write is never given back*: where undoing fails, what
//! lies beneath stays as it is, for ever.
//!
//! Compiles; the order of calls is tested against sides that record them.
//! Sources: "GPUDirect RDMA" (NVIDIA), "CUDA Driver API", DPDK 22.11's guides
//! for the mbuf library, the mlx5 driver and the ethdev library.

#![forbid(unsafe_code)]

use std::fmt;

use super::{DeviceAddress, DeviceLease, MemoryKind};

/// The device pins its memory for others in pages of this size ("GPUDirect
/// RDMA", Design Considerations).
pub const PAGE_BYTES: u64 = 64 << 10;

/// One of the things that GPUDirect needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// The device lets network cards reach its memory.
    Support,
    /// It is known how a card's writes become visible.
    WriteOrdering,
    /// The memory is whole pages of the device.
    Alignment,
    /// Copies on it are synchronous to what a card does.
    SyncMemops,
    /// The card's driver does not read payloads with the CPU.
    Inlining,
    /// The card's addresses of its pages are known.
    Addresses,
    /// DPDK knows it.
    Register,
    /// The card may reach it.
    DmaMap,
    /// There are packet buffers in it.
    Pool,
    /// The card splits headers from payloads.
    BufferSplit,
}

/// How a card's writes become visible to the device's own work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordering {
    /// In order, without further ado.
    Ordered,
    /// After [`DeviceSide::flush`].
    Flushed,
    /// Not in any way that the host could wait for.
    Unknown,
}

/// Where a card splits a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Behind so many bytes: mlx5.
    Length(u16),
    /// Behind the UDP header: ice. What of Genie's own header is in the payload
    /// then is known from its length.
    Udp,
}

/// Memory as a card sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its first byte, on a page's start.
    pub address: DeviceAddress,
    /// Its length, whole pages.
    pub len: u64,
    /// The card's address of each page; empty where it is the memory's own.
    pub iovas: Vec<u64>,
}

/// The device's part. Its errors are sentences for people, with the driver's code.
pub trait DeviceSide: Send {
    /// Whether cards may reach its memory.
    fn supported(&self) -> Result<(), String>;
    /// How their writes become visible.
    fn ordering(&self) -> Result<Ordering, String>;
    /// Makes copies on this memory synchronous.
    fn sync_memops(&self, address: DeviceAddress) -> Result<(), String>;
    /// Makes visible what a card wrote before; between the packets' arrival and
    /// whoever reads them on the device.
    fn flush(&self) -> Result<(), String>;
}

/// The card's part, on the thread that owns the port.
pub trait PortSide {
    /// Turns off that the driver copies payloads into descriptors. The caller
    /// opened the port with [`device_arguments`].
    fn no_inlining(&mut self) -> Result<(), String>;
    /// The card's address of each page; none where it is the memory's own.
    fn iovas(&mut self, address: DeviceAddress, len: u64) -> Result<Vec<u64>, String>;
    /// Tells DPDK of the memory.
    fn register(&mut self, memory: &Mapped) -> Result<(), String>;
    /// Undoes [`PortSide::register`].
    fn unregister(&mut self, memory: &Mapped) -> Result<(), String>;
    /// Lets the card reach the memory. Where it fails the card may reach a part.
    fn dma_map(&mut self, memory: &Mapped) -> Result<(), String>;
    /// Undoes [`PortSide::dma_map`], also one that failed.
    fn dma_unmap(&mut self, memory: &Mapped) -> Result<(), String>;
    /// Makes packet buffers in the memory.
    fn make_pool(&mut self, memory: &Mapped, buffer_bytes: u16) -> Result<(), String>;
    /// Undoes [`PortSide::make_pool`]; fails while a buffer is out.
    fn free_pool(&mut self) -> Result<(), String>;
    /// Whether the card splits headers from payloads, without touching its queue.
    fn can_split(&mut self) -> Result<(), String>;
    /// Receives payloads into the pool. The port stops for a moment, and is
    /// given up where its first queue cannot be had back.
    fn split(&mut self, split: Split) -> Result<(), String>;
    /// Undoes [`PortSide::split`].
    fn join(&mut self) -> Result<(), String>;
}

/// Why tensors are staged instead.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{step} {reason}")]
pub struct Refused {
    /// What could not be done.
    pub step: Step,
    /// Why.
    pub reason: String,
}

/// Device memory that a card's payloads go to. Undone when dropped.
pub struct Direct<'a> {
    device: Box<dyn DeviceSide>,
    port: Box<dyn PortSide + 'a>,
    memory: Mapped,
    flushes: bool,
    /// What is to be undone, the last first.
    done: Vec<Step>,
    /// Taken if the card may still write it.
    lease: Option<DeviceLease>,
}

impl<'a> Direct<'a> {
    /// Takes every step, or none. Without a `split` the card is only asked
    /// whether it could.
    ///
    /// `lease` is kept until the card cannot reach it any more; of it, whole
    /// pages of the device are used.
    pub fn open(
        device: Box<dyn DeviceSide>,
        port: Box<dyn PortSide + 'a>,
        lease: DeviceLease,
        buffer_bytes: u16,
        split: Option<Split>,
    ) -> Result<Self, Refused> {
        let mut direct = Self {
            device,
            port,
            memory: Mapped {
                address: lease.address(),
                len: 0,
                iovas: Vec::new(),
            },
            flushes: false,
            done: Vec::new(),
            lease: Some(lease),
        };
        // Dropping it undoes what was done before the step that fails.
        direct.set_up(buffer_bytes, split)?;
        Ok(direct)
    }

    fn set_up(&mut self, buffer_bytes: u16, split: Option<Split>) -> Result<(), Refused> {
        let at = |step: Step| move |reason: String| Refused { step, reason };
        self.device.supported().map_err(at(Step::Support))?;
        self.flushes = match self.device.ordering().map_err(at(Step::WriteOrdering))? {
            Ordering::Ordered => false,
            Ordering::Flushed => true,
            Ordering::Unknown => {
                let reason = "the device neither orders a card's writes nor can flush them";
                return Err(at(Step::WriteOrdering)(reason.into()));
            }
        };
        (self.memory.address, self.memory.len) = self.whole_pages().map_err(at(Step::Alignment))?;
        let (address, len) = (self.memory.address, self.memory.len);
        let synchronous = self.device.sync_memops(address);
        synchronous.map_err(at(Step::SyncMemops))?;
        self.port.no_inlining().map_err(at(Step::Inlining))?;
        let iovas = self.port.iovas(address, len);
        self.memory.iovas = iovas
            .and_then(|iovas| self.check(iovas))
            .map_err(at(Step::Addresses))?;
        let (port, memory, done) = (&mut self.port, &self.memory, &mut self.done);
        port.register(memory).map_err(at(Step::Register))?;
        done.push(Step::Register);
        // Before the call: one that fails may have mapped a part.
        done.push(Step::DmaMap);
        port.dma_map(memory).map_err(at(Step::DmaMap))?;
        port.make_pool(memory, buffer_bytes)
            .map_err(at(Step::Pool))?;
        done.push(Step::Pool);
        port.can_split().map_err(at(Step::BufferSplit))?;
        if let Some(split) = split {
            port.split(split).map_err(at(Step::BufferSplit))?;
            done.push(Step::BufferSplit);
        }
        Ok(())
    }

    fn whole_pages(&self) -> Result<(DeviceAddress, u64), String> {
        let lease = self.lease.as_ref().expect("it is taken when dropped");
        let (start, len) = (lease.address().0, lease.len() as u64);
        let first = start.next_multiple_of(PAGE_BYTES);
        let end = (start + len) / PAGE_BYTES * PAGE_BYTES;
        if first >= end {
            return Err(format!(
                "{len} bytes at {:?} hold no whole page of {PAGE_BYTES} bytes",
                lease.address()
            ));
        }
        Ok((DeviceAddress(first), end - first))
    }

    fn check(&self, iovas: Vec<u64>) -> Result<Vec<u64>, String> {
        let pages = self.memory.len / PAGE_BYTES;
        if !iovas.is_empty() && iovas.len() as u64 != pages {
            let count = iovas.len();
            return Err(format!("{count} addresses for {pages} pages"));
        }
        Ok(iovas)
    }

    /// The memory that payloads go to.
    pub fn memory(&self) -> &Mapped {
        &self.memory
    }

    /// To be called after packets have arrived and before the device reads them.
    pub fn before_consumer(&self) -> Result<(), String> {
        if self.flushes {
            self.device.flush()?;
        }
        Ok(())
    }

    fn undo(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::BufferSplit => self.port.join(),
            Step::Pool => self.port.free_pool(),
            Step::DmaMap => self.port.dma_unmap(&self.memory),
            Step::Register => self.port.unregister(&self.memory),
            _ => Ok(()),
        }
    }
}

impl Drop for Direct<'_> {
    fn drop(&mut self) {
        while let Some(step) = self.done.pop() {
            if let Err(reason) = self.undo(step) {
                // The card may still write there: it is nobody else's any more.
                let kind = self.lease.as_ref().map(DeviceLease::kind);
                tracing::error!(?kind, ?step, reason, "cannot be undone: the memory is kept");
                std::mem::forget(self.lease.take());
                return;
            }
        }
    }
}

impl fmt::Debug for Direct<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Direct");
        shown
            .field("memory", &self.memory)
            .field("done", &self.done);
        shown.finish_non_exhaustive()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Support => "cards cannot reach the device's memory:",
            Self::WriteOrdering => "a card's writes cannot be waited for:",
            Self::Alignment => "the memory is not whole pages of the device:",
            Self::SyncMemops => "copies cannot be made synchronous (SYNC_MEMOPS):",
            Self::Inlining => "the card's driver would read payloads with the CPU:",
            Self::Addresses => "the pages have no address for the card:",
            Self::Register => "DPDK does not take the memory (rte_extmem_register):",
            Self::DmaMap => "the card cannot reach the memory (rte_dev_dma_map):",
            Self::Pool => "no packet buffers in the memory (rte_pktmbuf_pool_create_extbuf):",
            Self::BufferSplit => "the card does not split headers from payloads:",
        })
    }
}

/// What is shown for memory whose tensors are staged.
pub fn why_staged(kind: MemoryKind, refused: &Refused) -> String {
    format!("{kind} is staged through host memory: {refused}")
}

/// The arguments with which a port must be opened for GPUDirect.
///
/// mlx5 copies short payloads into descriptors with the CPU, which cannot read
/// device memory (DPDK's mlx5 guide, `txq_inline_max`); others do no such thing.
pub fn device_arguments(driver: &str, arguments: &str) -> String {
    let is_set = arguments
        .split(',')
        .any(|one| one.starts_with("txq_inline_max="));
    if driver != "mlx5_pci" || is_set {
        return arguments.to_owned();
    }
    format!("{arguments},txq_inline_max=0")
}

/// Where cards of this driver can split; none where it is not known.
///
/// mlx5 splits behind a length that is fixed for the queue, ice behind a
/// protocol's header (DPDK 22.11, NIC features "Buffer Split on Rx").
pub fn split_of(driver: &str, header_bytes: u16) -> Option<Split> {
    match driver {
        "mlx5_pci" => Some(Split::Length(header_bytes)),
        "net_ice" => Some(Split::Udp),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
