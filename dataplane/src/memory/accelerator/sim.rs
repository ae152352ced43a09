//! The simulated accelerator: an accelerator's rules without an accelerator.
//!
//! Device memory is a memory file mapped twice. The address that everybody is
//! given is the mapping without any permission, so that a stray access by the
//! CPU faults as it would on a real device. Copies go through the other mapping,
//! on a thread of their own: later, in another order than they were begun in on
//! another stream, and failing when asked to. Host memory that is not pinned is
//! refused. It is slower than any real one, and what it does is no measurement.

mod config;
mod direct;
mod worker;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::{
    Accelerator, AcceleratorError, Allocation, CopyOp, DeviceAddress, ForeignEvent, Import,
    MemoryKind, Piece, Properties, Source, Stream, is_scattered,
};
pub use config::{Config, Fault};

/// `CUDA_ERROR_INVALID_VALUE`: errors have the numbers that CUDA would give.
const INVALID_VALUE: u32 = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;
/// `CUDA_ERROR_ECC_UNCORRECTABLE`, which is sticky.
const ECC_UNCORRECTABLE: u32 = 214;
/// `CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED`.
const ALREADY_REGISTERED: u32 = 712;
/// `CUDA_ERROR_NOT_SUPPORTED`.
const NOT_SUPPORTED: u32 = 801;
/// `CUDA_ERROR_UNKNOWN`.
const UNKNOWN: u32 = 999;

/// What a memory file of a simulated device is called, by which it is known
/// from one of the host's.
const FILE_NAME: &str = "genie-sim";

/// A device that is simulated.
#[derive(Debug)]
pub struct Sim {
    properties: Properties,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    state: Mutex<State>,
    /// Something was queued, finished or ended.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By the address that everybody is given.
    allocations: BTreeMap<u64, Mapping>,
    /// Pinned host memory: address and length.
    pinned: BTreeMap<usize, usize>,
    used: u64,
    streams: HashMap<u64, Queue>,
    next_stream: u64,
    signalled: HashSet<u64>,
    /// Copies until one fails, and how.
    failing: Option<(u64, Fault)>,
    /// Pins that are still to be refused.
    refusing_pins: u32,
    /// What a real device would have answered with undefined behaviour.
    violations: Vec<String>,
    sticky: Option<AcceleratorError>,
    copies_done: u64,
    held: bool,
    stopping: bool,
}

/// What a stream has to do.
#[derive(Debug, Default)]
struct Queue {
    work: VecDeque<Work>,
    begun: u64,
    completed: u64,
    error: Option<AcceleratorError>,
    /// The worker is at its head.
    busy: bool,
}

#[derive(Debug)]
enum Work {
    /// One operation: a copy, or many that were gathered.
    Copy(Vec<CopyOp>),
    Gather(Vec<Piece>),
    /// Everything of the batch of this number is before it.
    Batch(u64),
    Wait(u64),
    Signal(u64),
}

/// A memory file mapped twice.
#[derive(Debug)]
struct Mapping {
    public: NonNull<u8>,
    private: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

// SAFETY: the mappings belong to the process; they are undone once, in `Drop`,
// and their bytes are touched by the worker's raw copies only.
unsafe impl Send for Mapping {}

impl Sim {
    /// A device set up by `config`, with a thread of its own.
    pub fn new(config: Config) -> Result<Self, AcceleratorError> {
        let properties = Properties {
            kind: MemoryKind::Sim,
            name: "simulated accelerator (no device)".into(),
            memory_bytes: config.memory_bytes,
            granularity: rustix::param::page_size(),
            driver: "simulated".into(),
            exports: true,
            gpudirect: if config.gpudirect {
                Ok(())
            } else {
                Err("no network card reaches simulated memory".into())
            },
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                failing: config.fail_copy,
                refusing_pins: config.refuse_pins,
                ..State::default()
            }),
            config,
            changed: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("genie-sim".into())
            .spawn(move || worker.run())
            .map_err(|error| call("thread", UNKNOWN, error.to_string(), false))?;
        Ok(Self { properties, shared })
    }

    /// Makes the copy after `copies` more fail, in the way of `fault`.
    pub fn fail_copy(&self, copies: u64, fault: Fault) {
        self.shared.lock().failing = Some((copies, fault));
    }

    /// Stops copying until [`Sim::release`].
    pub fn hold(&self) {
        self.shared.lock().held = true;
    }

    /// Goes on copying.
    pub fn release(&self) {
        self.shared.lock().held = false;
        self.shared.changed.notify_all();
    }

    /// Copies done since the start.
    pub fn copies_done(&self) -> u64 {
        self.shared.lock().copies_done
    }

    /// Bytes allocated or imported and not yet freed.
    pub fn used_bytes(&self) -> u64 {
        self.shared.lock().used
    }

    /// Pieces of host memory that are pinned.
    pub fn pinned(&self) -> usize {
        self.shared.lock().pinned.len()
    }

    /// Refuses the next `count` pins, as a driver does that cannot register the
    /// pages.
    pub fn refuse_pins(&self, count: u32) {
        self.shared.lock().refusing_pins = count;
    }

    /// What was done in an order that a real device does not forgive: memory
    /// unpinned that was not pinned, that copies still wait for, or that was
    /// unmapped before.
    pub fn violations(&self) -> Vec<String> {
        self.shared.lock().violations.clone()
    }

    /// A new event, for [`Stream::wait_for`] and [`Stream::signal`].
    pub fn event(&self) -> ForeignEvent {
        let mut state = self.shared.lock();
        state.next_stream += 1;
        ForeignEvent(state.next_stream)
    }

    /// Signals an event, as an application's own stream would.
    pub fn set(&self, event: ForeignEvent) {
        self.shared.lock().signalled.insert(event.0);
        self.shared.changed.notify_all();
    }

    /// Whether an event was signalled.
    pub fn is_set(&self, event: ForeignEvent) -> bool {
        self.shared.lock().signalled.contains(&event.0)
    }

    fn add(&self, mapping: Mapping, source: Source) -> Result<Allocation, AcceleratorError> {
        let mut state = self.shared.lock();
        state.alive()?;
        let len = mapping.len;
        let used = state.used + len as u64;
        if used > self.shared.config.memory_bytes {
            return Err(out_of_memory(len, "the simulated device is full"));
        }
        state.used = used;
        let address = DeviceAddress(mapping.public.as_ptr() as u64);
        state.allocations.insert(address.0, mapping);
        Ok(Allocation {
            address,
            len,
            handle: 0,
            source,
        })
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // Not joined: the worker itself may drop the last lease, and with it this.
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
    }
}

impl Accelerator for Sim {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, len: usize) -> Result<Allocation, AcceleratorError> {
        let limit = self.shared.config.memory_bytes;
        let rounded = len
            .checked_next_multiple_of(self.properties.granularity)
            .filter(|rounded| *rounded as u64 <= limit)
            .ok_or_else(|| out_of_memory(len, "more than the simulated device has"))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let failed =
            |errno: rustix::io::Errno| call("allocate", OUT_OF_MEMORY, errno.to_string(), false);
        let file = rustix::fs::memfd_create(FILE_NAME, flags).map_err(failed)?;
        rustix::fs::ftruncate(&file, rounded as u64).map_err(failed)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(failed)?;
        self.add(Mapping::new(file, rounded)?, Source::Allocated)
    }

    fn import(&self, from: Import) -> Result<Allocation, AcceleratorError> {
        let refused = |what: &str| AcceleratorError::Import {
            kind: MemoryKind::Sim,
            what: what.to_owned(),
        };
        let (file, len) = match from {
            Import::Descriptor { file, len } => (file, len),
            Import::Ipc { .. } => return Err(refused("it has no legacy handles")),
        };
        let seals = rustix::fs::fcntl_get_seals(&file)
            .map_err(|_| refused("the descriptor is no memory of a simulated device"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(refused("its owner could pull it away (F_SEAL_SHRINK)"));
        }
        if !is_of_a_device(&file) {
            return Err(refused("the descriptor is the host's memory"));
        }
        let there = rustix::fs::fstat(&file).map_or(0, |stat| stat.st_size as usize);
        let whole = len.checked_next_multiple_of(self.properties.granularity);
        // All of it: who imports it keeps all of it.
        match whole.filter(|whole| *whole > 0 && *whole == there) {
            Some(whole) => self.add(Mapping::new(file, whole)?, Source::Imported),
            None => Err(refused(&format!("{len} bytes of {there} were claimed"))),
        }
    }

    fn export(&self, allocation: &Allocation) -> Result<OwnedFd, AcceleratorError> {
        let state = self.shared.lock();
        state.alive()?;
        let mapping = state.allocations.get(&allocation.address.0);
        let copy = mapping.map(|mapping| mapping.file.try_clone());
        match copy {
            Some(Ok(file)) => Ok(file),
            Some(Err(error)) => Err(call("export", UNKNOWN, error.to_string(), false)),
            None => Err(not_mine(allocation.address, allocation.len)),
        }
    }

    fn check(&self, address: DeviceAddress, len: usize) -> Result<(), AcceleratorError> {
        let state = self.shared.lock();
        match state.private(address, len) {
            Some(_) => Ok(()),
            None => Err(not_mine(address, len)),
        }
    }

    unsafe fn free(&self, allocation: &Allocation) {
        let mut state = self.shared.lock();
        let mapping = state.allocations.remove(&allocation.address.0);
        if let Some(mapping) = &mapping {
            state.used -= mapping.len as u64;
        }
        drop(state);
        // Unmapping takes a while; not under the lock.
        drop(mapping);
    }

    unsafe fn pin(&self, host: *mut u8, len: usize) -> Result<(), AcceleratorError> {
        let mut state = self.shared.lock();
        state.alive()?;
        if let Some(left) = state.refusing_pins.checked_sub(1) {
            state.refusing_pins = left;
            return Err(call("pin", NOT_SUPPORTED, "asked to refuse".into(), false));
        }
        let (at, end) = (host as usize, host as usize + len);
        let before = state.pinned.range(..end).next_back();
        if before.is_some_and(|(other, len)| other + len > at) {
            let text = format!("some of {len} bytes at {at:#x} are pinned already");
            return Err(call("pin", ALREADY_REGISTERED, text, false));
        }
        state.pinned.insert(at, len);
        Ok(())
    }

    unsafe fn unpin(&self, host: *mut u8) {
        let mut state = self.shared.lock();
        let at = host as usize;
        let Some(len) = state.pinned.remove(&at) else {
            state
                .violations
                .push(format!("unpinned {at:#x}, which is not pinned"));
            return;
        };
        if state.is_awaited(at..at + len) {
            state
                .violations
                .push(format!("unpinned {at:#x} while copies wait for it"));
        }
        if !is_mapped(host, len) {
            state
                .violations
                .push(format!("unpinned {at:#x} after it was unmapped"));
        }
    }

    fn stream(&self) -> Result<Box<dyn Stream>, AcceleratorError> {
        let mut state = self.shared.lock();
        state.alive()?;
        state.next_stream += 1;
        let id = state.next_stream;
        state.streams.insert(id, Queue::default());
        Ok(Box::new(SimStream {
            id,
            shared: Arc::clone(&self.shared),
        }))
    }

    fn direct(&self) -> Box<dyn super::direct::DeviceSide> {
        Box::new(direct::SimDirect(self.properties.gpudirect.clone()))
    }
}

struct SimStream {
    id: u64,
    shared: Arc<Shared>,
}

impl SimStream {
    fn queue<R>(
        &self,
        change: impl FnOnce(&mut Queue) -> R,
        state: &mut State,
    ) -> Result<R, AcceleratorError> {
        state.alive()?;
        let queue = state.streams.get_mut(&self.id);
        let queue = queue.ok_or(AcceleratorError::Stopped(MemoryKind::Sim))?;
        Ok(change(queue))
    }
}

impl SimStream {
    /// Queues a batch.
    fn begin(&self, work: Vec<Work>, state: &mut State) -> Result<u64, AcceleratorError> {
        let begin = |queue: &mut Queue| {
            // An error ends what was begun before it is told, and only that.
            if let Some(error) = &queue.error {
                return Err(error.clone());
            }
            queue.begun += 1;
            queue.work.extend(work);
            queue.work.push_back(Work::Batch(queue.begun));
            Ok(queue.begun)
        };
        let number = self.queue(begin, state)??;
        self.shared.changed.notify_all();
        Ok(number)
    }
}

impl Stream for SimStream {
    fn copy(&mut self, batch: Vec<CopyOp>) -> Result<u64, AcceleratorError> {
        let mut state = self.shared.lock();
        batch.iter().try_for_each(|op| state.check_copy(op))?;
        let work = if is_scattered(&batch) {
            vec![Work::Copy(batch)]
        } else {
            batch.into_iter().map(|op| Work::Copy(vec![op])).collect()
        };
        self.begin(work, &mut state)
    }

    fn gather(&mut self, pieces: Vec<Piece>) -> Result<u64, AcceleratorError> {
        let mut state = self.shared.lock();
        pieces
            .iter()
            .try_for_each(|piece| state.check_piece(piece))?;
        self.begin(vec![Work::Gather(pieces)], &mut state)
    }

    fn completed(&mut self) -> Result<u64, AcceleratorError> {
        let mut state = self.shared.lock();
        self.queue(
            |queue| match queue.error.take() {
                Some(error) => Err(error),
                None => Ok(queue.completed),
            },
            &mut state,
        )?
    }

    fn wait_for(&mut self, event: ForeignEvent) -> Result<(), AcceleratorError> {
        let mut state = self.shared.lock();
        self.queue(
            |queue| queue.work.push_back(Work::Wait(event.0)),
            &mut state,
        )
    }

    fn signal(&mut self, event: ForeignEvent) -> Result<(), AcceleratorError> {
        let mut state = self.shared.lock();
        self.queue(
            |queue| queue.work.push_back(Work::Signal(event.0)),
            &mut state,
        )?;
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        // A copy that is under way ends first.
        while state.streams.get(&self.id).is_some_and(|queue| queue.busy) {
            state = self.shared.wait(state);
        }
        let queue = state.streams.remove(&self.id);
        drop(state);
        // With the leases may go memory, which takes the lock.
        drop(queue);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here panics while it holds the lock half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn alive(&self) -> Result<(), AcceleratorError> {
        self.sticky.clone().map_or(Ok(()), Err)
    }

    /// Where the bytes of a device address really are, if all `len` are there.
    fn private(&self, address: DeviceAddress, len: usize) -> Option<*mut u8> {
        let (base, mapping) = self.allocations.range(..=address.0).next_back()?;
        let offset = usize::try_from(address.0 - base).ok()?;
        let end = offset.checked_add(len)?;
        (end <= mapping.len).then(|| mapping.private.as_ptr().wrapping_add(offset))
    }

    fn check_copy(&self, op: &CopyOp) -> Result<(), AcceleratorError> {
        let (host, len) = (op.host.as_ptr() as usize, op.host.len());
        let pinned = self.pinned.range(..=host).next_back();
        if pinned.is_none_or(|(at, pinned)| host + len > at + pinned) {
            let text = format!("{len} bytes of host memory at {host:#x} are not pinned");
            return Err(call("copy", INVALID_VALUE, text, false));
        }
        if op.device.len() != len {
            let text = format!("{len} bytes to or from {}", op.device.len());
            return Err(call("copy", INVALID_VALUE, text, false));
        }
        match self.private(op.device.address(), len) {
            Some(_) => Ok(()),
            None => Err(not_mine(op.device.address(), len)),
        }
    }
}

impl State {
    /// Whether a copy that was not begun has its host's end in `range`.
    fn is_awaited(&self, range: std::ops::Range<usize>) -> bool {
        let works = self.streams.values().flat_map(|queue| &queue.work);
        let copies = works.filter_map(|work| match work {
            Work::Copy(ops) => Some(ops),
            _ => None,
        });
        let mut hosts = copies.flatten().map(|op| op.host.as_ptr() as usize);
        hosts.any(|host| range.contains(&host))
    }

    fn check_piece(&self, piece: &Piece) -> Result<(), AcceleratorError> {
        let len = piece.from.len();
        if piece.to.len() != len {
            let text = format!("{len} bytes to {}", piece.to.len());
            return Err(call("gather", INVALID_VALUE, text, false));
        }
        let ends = [piece.from.address(), piece.to.address()];
        let stray = ends.into_iter().find(|at| self.private(*at, len).is_none());
        stray.map_or(Ok(()), |at| Err(not_mine(at, len)))
    }
}

impl Mapping {
    fn new(file: OwnedFd, len: usize) -> Result<Self, AcceleratorError> {
        let map = |prot| {
            let fd = file.as_fd();
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0) }
                .map(|at| NonNull::new(at.cast::<u8>()).expect("without MAP_FIXED it is not null"))
                .map_err(|errno| call("map", OUT_OF_MEMORY, errno.to_string(), false))
        };
        let public = map(ProtFlags::empty())?;
        let private =
            map(ProtFlags::READ | ProtFlags::WRITE).inspect_err(|_| unmap(public, len))?;
        Ok(Self {
            public,
            private,
            len,
            file,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.public, self.len);
        unmap(self.private, self.len);
    }
}

/// Whether a memory file was made by a simulated device. A driver knows its own
/// memory; here the file's name has to do.
fn is_of_a_device(file: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let name = format!("/memfd:{FILE_NAME}");
    link.is_ok_and(|link| link.to_string_lossy().starts_with(&name))
}

/// Whether all of `len` bytes are mapped.
fn is_mapped(at: *mut u8, len: usize) -> bool {
    // SAFETY: it writes nothing back that was not written anyway, and says
    // where there is no mapping.
    unsafe { rustix::mm::msync(at.cast(), len, rustix::mm::MsyncFlags::ASYNC) }.is_ok()
}

fn unmap(at: NonNull<u8>, len: usize) {
    // SAFETY: a mapping of this length that was made in `Mapping::new` and
    // that nothing uses any more.
    if let Err(error) = unsafe { rustix::mm::munmap(at.as_ptr().cast(), len) } {
        tracing::error!(%error, "cannot unmap simulated device memory");
    }
}

fn call(what: &'static str, code: u32, text: String, sticky: bool) -> AcceleratorError {
    AcceleratorError::Call {
        kind: MemoryKind::Sim,
        call: what,
        code,
        text,
        sticky,
    }
}

fn out_of_memory(wanted: usize, text: &str) -> AcceleratorError {
    AcceleratorError::OutOfMemory {
        kind: MemoryKind::Sim,
        wanted,
        call: "allocate",
        code: OUT_OF_MEMORY,
        text: text.to_owned(),
    }
}

fn not_mine(address: DeviceAddress, len: usize) -> AcceleratorError {
    AcceleratorError::NotItsMemory {
        kind: MemoryKind::Sim,
        address,
        len,
        what: "no allocation of the simulated device holds them".into(),
    }
}

#[cfg(test)]
mod tests;
