//! Accelerators: devices with memory of their own that tensors live in.
//!
//! Called by [`crate::stage`], which moves tensors between device memory and
//! engines, and by the control plane, which keeps tensors in device memory.
//! The invariant: *device memory is never behind a host pointer*. A
//! [`DeviceLease`] has an address that only the device's own calls take; it is
//! another type than [`Lease`], so that no engine, checksum or
//! file can be handed one by mistake. A stream keeps the memory of its copies
//! until the device has finished them.
//!
//! Two drivers: [`cuda`], and [`sim`], which is simulated, for machines without
//! any, and calls itself `sim` wherever it appears.

pub mod cuda;
pub mod direct;
mod region;
pub mod sim;

use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Lease, Region};
pub use region::{DeviceLease, DeviceRegion};

/// Where the bytes of a tensor are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum MemoryKind {
    /// Ordinary memory, on whichever pages.
    #[default]
    Host,
    /// The CUDA device of this ordinal.
    Cuda(u32),
    /// The simulated accelerator: no device at all.
    Sim,
}

/// A device with memory of its own. Any thread may use it.
///
/// What it cannot do it says with an error that carries the driver's own code
/// and words; nothing here panics because of what a device answers.
pub trait Accelerator: Send + Sync + fmt::Debug {
    /// What it is.
    fn properties(&self) -> &Properties;

    /// Allocates at least `len` bytes, whatever they hold.
    fn allocate(&self, len: usize) -> Result<Allocation, AcceleratorError>;

    /// Maps memory that another process allocated and exported.
    fn import(&self, from: Import) -> Result<Allocation, AcceleratorError>;

    /// A descriptor with which another process can import the memory.
    fn export(&self, allocation: &Allocation) -> Result<OwnedFd, AcceleratorError>;

    /// Checks that `len` bytes at `address` are this device's, in this process.
    fn check(&self, address: DeviceAddress, len: usize) -> Result<(), AcceleratorError>;

    /// Gives back what [`Accelerator::allocate`] or [`Accelerator::import`] gave.
    ///
    /// # Safety
    /// Nothing may use the memory any more: no copy under way, no kernel.
    unsafe fn free(&self, allocation: &Allocation);

    /// Lets the device reach host memory by itself, so that copies to and from
    /// it are asynchronous.
    ///
    /// # Safety
    /// `len` bytes at `host` must stay mapped until [`Accelerator::unpin`].
    unsafe fn pin(&self, host: *mut u8, len: usize) -> Result<(), AcceleratorError>;

    /// Undoes [`Accelerator::pin`].
    ///
    /// # Safety
    /// No copy from or to this memory may be under way.
    unsafe fn unpin(&self, host: *mut u8);

    /// A new stream: copies of one stream are done in order, those of two are not.
    fn stream(&self) -> Result<Box<dyn Stream>, AcceleratorError>;

    /// Its part of GPUDirect.
    fn direct(&self) -> Box<dyn direct::DeviceSide>;
}

/// An ordered queue of copies. May be used by one thread at a time.
pub trait Stream: Send {
    /// Begins a batch of copies, after all that were begun before.
    ///
    /// Each needs pinned host memory. The stream holds the leases until the
    /// copies are finished. Returns the batch's number, ascending from 1.
    /// Where the device can, many small ones are gathered: one operation.
    fn copy(&mut self, batch: Vec<CopyOp>) -> Result<u64, AcceleratorError>;

    /// Begins copies within the device as one batch, and one operation however
    /// many pieces there are: such as payloads that a network card put into
    /// buffers of the device's.
    ///
    /// Pieces must not overlap others' destinations. As [`Stream::copy`] otherwise.
    fn gather(&mut self, pieces: Vec<Piece>) -> Result<u64, AcceleratorError>;

    /// The number of the last batch that is finished, and all before it.
    ///
    /// An error is told once, and means that every batch begun so far has
    /// ended and left its destinations in no known state. The stream goes on,
    /// unless the error is [sticky](AcceleratorError::is_sticky).
    fn completed(&mut self) -> Result<u64, AcceleratorError>;

    /// Makes copies begun from now on wait for an event of the application's.
    fn wait_for(&mut self, event: ForeignEvent) -> Result<(), AcceleratorError>;

    /// Signals an event of the application's once all copies begun so far are done.
    fn signal(&mut self, event: ForeignEvent) -> Result<(), AcceleratorError>;
}

/// What an accelerator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// How it is called in options and listings.
    pub kind: MemoryKind,
    /// What it calls itself; a simulated one says so.
    pub name: String,
    /// All of its memory, in bytes.
    pub memory_bytes: u64,
    /// Allocations are multiples of this.
    pub granularity: usize,
    /// The driver's version, such as `13.0`.
    pub driver: String,
    /// Whether its memory can be passed to other processes by descriptor.
    pub exports: bool,
    /// Whether network cards may reach its memory (GPUDirect RDMA).
    pub gpudirect: Result<(), String>,
}

/// An address that only the device understands, never to be dereferenced.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceAddress(pub u64);

/// An event of an application's: a `CUevent` in this process, or one of `sim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ForeignEvent(u64);

impl ForeignEvent {
    /// The event behind a driver's handle, such as a `CUevent`.
    ///
    /// # Safety
    /// It must be a valid event of the device that this is given to, and stay
    /// one until that device has done what was asked with it.
    pub unsafe fn from_raw(handle: u64) -> Self {
        Self(handle)
    }
}

/// Device memory as a driver gave it.
#[derive(Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Its first byte.
    pub address: DeviceAddress,
    /// Its length in bytes.
    pub len: usize,
    /// The driver's own name for it, where it has one.
    pub handle: u64,
    /// How it was come by, which decides how it is given back.
    pub source: Source,
}

/// How device memory was come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Allocated here, can be exported.
    Allocated,
    /// Allocated here, by a driver that cannot export it.
    Plain,
    /// Imported by descriptor.
    Imported,
    /// Opened by a legacy IPC handle.
    Ipc,
}

/// Memory of another process.
#[derive(Debug)]
pub enum Import {
    /// A descriptor of what [`Accelerator::export`] or the vendor's own call gave.
    Descriptor {
        /// The descriptor.
        file: OwnedFd,
        /// Length of the memory behind it, in bytes.
        len: usize,
    },
    /// A legacy handle (`cuIpcGetMemHandle`).
    Ipc {
        /// The handle's bytes.
        handle: [u8; 64],
        /// Length of the allocation, in bytes.
        len: usize,
    },
}

impl Import {
    /// How many bytes are to be mapped.
    pub fn len_bytes(&self) -> usize {
        match self {
            Self::Descriptor { len, .. } | Self::Ipc { len, .. } => *len,
        }
    }
}

/// One copy between pinned host memory and device memory of the same length.
#[derive(Debug)]
pub struct CopyOp {
    /// The host's end, pinned.
    pub host: Lease,
    /// The device's end.
    pub device: DeviceLease,
    /// Which way.
    pub way: Way,
}

/// One piece of a copy within a device; both ends have the same length.
#[derive(Debug)]
pub struct Piece {
    /// What is read.
    pub from: DeviceLease,
    /// What is written.
    pub to: DeviceLease,
}

/// From how many copies on one operation is cheaper: each costs a call of a few
/// microseconds, a kernel's launch about as much as two.
const GATHER_LEAST: usize = 8;

/// Up to which length copies are gathered: a copy engine needs longer for its
/// own start than for as many bytes.
const GATHER_BYTES: usize = 16 << 10;

/// Whether a batch is many small copies.
fn is_scattered(batch: &[CopyOp]) -> bool {
    batch.len() >= GATHER_LEAST && batch.iter().all(|op| op.host.len() <= GATHER_BYTES)
}

/// The direction of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From host memory to the device.
    ToDevice,
    /// From the device to host memory.
    ToHost,
}

/// What an accelerator could not do.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcceleratorError {
    /// The driver's library is not on this machine.
    #[error("no CUDA driver on this machine ({0}): install NVIDIA's driver, or use host memory")]
    NoDriver(String),
    /// The driver cannot do what is needed.
    #[error("the CUDA driver {found} is too old, {needed} or later is needed: update the driver")]
    DriverTooOld {
        /// Its version.
        found: String,
        /// What it lacks, and the version that has it.
        needed: String,
    },
    /// There is no device of this number.
    #[error("there is no {kind}: this machine has {count} CUDA devices")]
    NoDevice {
        /// What was asked for.
        kind: MemoryKind,
        /// How many there are.
        count: u32,
    },
    /// The device is full.
    #[error("{kind} has no room for {wanted} bytes: {call} failed with {code} ({text})")]
    OutOfMemory {
        /// Which device.
        kind: MemoryKind,
        /// Bytes asked for.
        wanted: usize,
        /// What was called.
        call: &'static str,
        /// The driver's code.
        code: u32,
        /// The driver's words.
        text: String,
    },
    /// A call failed.
    #[error("{kind}: {call} failed with {code} ({text})")]
    Call {
        /// Which device.
        kind: MemoryKind,
        /// What was called.
        call: &'static str,
        /// The driver's code.
        code: u32,
        /// The driver's words.
        text: String,
        /// Whether everything that is called from now on will fail too.
        sticky: bool,
    },
    /// A pointer of the host, of another device, or of nobody.
    #[error("{len} bytes at {address:?} are not memory of {kind}: {what}")]
    NotItsMemory {
        /// Which device.
        kind: MemoryKind,
        /// The pointer.
        address: DeviceAddress,
        /// Bytes that should be there.
        len: usize,
        /// What it is instead.
        what: String,
    },
    /// A descriptor or handle that cannot be used.
    #[error("{kind}: memory that was passed cannot be used: {what}")]
    Import {
        /// Which device.
        kind: MemoryKind,
        /// Why.
        what: String,
    },
    /// The device's thread has ended.
    #[error("{0} has been stopped")]
    Stopped(MemoryKind),
}

impl AcceleratorError {
    /// Whether the device will fail everything from now on, as after an
    /// uncorrectable memory error: only a new process can use it again.
    pub fn is_sticky(&self) -> bool {
        matches!(self, Self::Call { sticky: true, .. })
    }

    /// The driver's code, where a call failed.
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Call { code, .. } | Self::OutOfMemory { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// Opens the accelerator of this kind; `None` for host memory.
///
/// The simulated one is set up by the environment, see [`sim::Config::from_env`].
pub fn open(kind: MemoryKind) -> Result<Option<Arc<dyn Accelerator>>, AcceleratorError> {
    Ok(match kind {
        MemoryKind::Host => None,
        MemoryKind::Cuda(ordinal) => Some(Arc::new(cuda::Cuda::open(ordinal)?)),
        MemoryKind::Sim => Some(Arc::new(sim::Sim::new(sim::Config::from_env()?)?)),
    })
}

/// Host memory that a device may reach by itself, for as long as this lives.
#[derive(Debug)]
pub struct Pinned {
    region: Arc<Region>,
    accelerator: Arc<dyn Accelerator>,
}

impl Pinned {
    /// Pins all of `region` for a device.
    ///
    /// Streams hold leases of it while they copy, so that it must only outlive
    /// whoever begins copies: a copy begun later is refused or not asynchronous.
    pub fn new(
        region: &Arc<Region>,
        accelerator: &Arc<dyn Accelerator>,
    ) -> Result<Self, AcceleratorError> {
        // SAFETY: the mapping lives as long as the region, which is held until
        // it was unpinned in `drop`.
        unsafe { accelerator.pin(region.as_ptr(), region.len()) }?;
        Ok(Self {
            region: Arc::clone(region),
            accelerator: Arc::clone(accelerator),
        })
    }

    /// The memory.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: pinned in `new`. The owner drops its streams first (see
        // `new`), and a stream's end waits for its copies.
        unsafe { self.accelerator.unpin(self.region.as_ptr()) };
    }
}

impl MemoryKind {
    /// Whether the bytes are not the host's.
    pub fn is_device(&self) -> bool {
        *self != Self::Host
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Sim => f.write_str("sim"),
        }
    }
}

/// A kind of memory that was not understood.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is no kind of memory: write host, cuda:N or sim")]
pub struct UnknownMemory(pub String);

impl From<MemoryKind> for String {
    fn from(kind: MemoryKind) -> Self {
        kind.to_string()
    }
}

impl TryFrom<String> for MemoryKind {
    type Error = UnknownMemory;

    fn try_from(text: String) -> Result<Self, UnknownMemory> {
        text.parse()
    }
}

impl FromStr for MemoryKind {
    type Err = UnknownMemory;

    fn from_str(text: &str) -> Result<Self, UnknownMemory> {
        let ordinal = text.strip_prefix("cuda:").map(str::parse);
        match (text, ordinal) {
            ("host", _) => Ok(Self::Host),
            ("sim", _) => Ok(Self::Sim),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(UnknownMemory(text.to_owned())),
        }
    }
}

impl fmt::Debug for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_written_as_they_are_read() {
        for text in ["host", "cuda:0", "cuda:7", "sim"] {
            assert_eq!(text.parse::<MemoryKind>().unwrap().to_string(), text);
        }
        for bad in ["cuda", "cuda:", "cuda:-1", "cuda:x", "gpu", ""] {
            assert_eq!(bad.parse::<MemoryKind>(), Err(UnknownMemory(bad.into())));
        }
    }
}
