//! The memory of one application's connection: its arenas and what it passes.
//!
//! The invariant: *nothing is used that the application could still shrink or
//! punch holes into*. An arena is sealed, the seals are looked at and missing
//! pages are made before the first tensor is put from it; a stranger's memory
//! file must come with its seals; any other file is read, never mapped.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use genie_client::protocol::{ArenaId, BATCHES_MAX, DESCRIPTOR_BYTE, Direction, IpcHandle, Placed};
use genie_client::{FailureKind, TensorInfo};
use genie_dataplane::memory::RegionError;
use genie_dataplane::memory::accelerator::{Import, MemoryKind};
use genie_dataplane::stage::Place;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{ApplicationError, PATIENCE};
use crate::budget::{AllocateError, Allocation, Room};
use crate::quota::{self, User};
use crate::transfer::{Progress, Source, TransferError, kind_of};

/// Read at a time: often enough to notice that nobody waits any more.
const CHUNK: usize = 8 << 20;

/// The arenas of one connection, by name.
#[derive(Debug, Default)]
pub(super) struct Arenas {
    arenas: HashMap<ArenaId, Arena>,
    next: u32,
}

#[derive(Debug)]
struct Arena {
    allocation: Allocation,
    sealed: bool,
    /// Whether the program may have bytes brought into it: not into what was
    /// promised to change no more.
    writable: bool,
}

/// Why memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("there is no arena {}: it was freed or never made", .0.0)]
    NoArena(ArenaId),
    #[error("arena {} is not sealed yet: say that it is mapped first", .0.0)]
    NotSealed(ArenaId),
    #[error("tensor {name:?} lies outside its arena")]
    Outside { name: String },
    #[error("a range lies outside arena {}", .0.0)]
    OutsideArena(ArenaId),
    #[error("arena {} can only be read: it was passed by the program or fetched", .0.0)]
    ReadOnly(ArenaId),
    #[error(
        "this connection has {BATCHES_MAX} batches under way, as many as it may have: \
         wait for one, or use another connection"
    )]
    Batches,
    #[error("this connection listens to nothing: say to which prefix first")]
    NotListening,
    #[error("the arena cannot be sealed: {0}")]
    Seal(RegionError),
    #[error("no descriptor came with the request, or more than one: pass one with SCM_RIGHTS")]
    NoDescriptor,
    #[error(
        "the descriptor is no memory file with seals: pass a memfd made with MFD_ALLOW_SEALING, \
         or have the file read instead"
    )]
    NotMemory,
    #[error("{0} is no accelerator: pass host memory as a sealed memory file")]
    NotDevice(MemoryKind),
    #[error(
        "legacy handles are taken from root and from the agent's own user only, as a program \
         that frees its memory too early could harm the whole device: pass a descriptor \
         (cuMemExportToShareableHandle)"
    )]
    LegacyHandle,
    #[error("only regular files are read, this is a {0}")]
    NotRegular(&'static str),
    #[error("the file ends at {end} bytes, before {wanted}")]
    Short { end: u64, wanted: u64 },
    #[error("files are read into host memory: put them into an accelerator's store instead")]
    OnDevice,
    #[error("the file cannot be read: {0}")]
    Read(io::Error),
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

impl MemoryError {
    pub(super) fn kind(&self) -> FailureKind {
        match self {
            Self::NoArena(_)
            | Self::NotSealed(_)
            | Self::Outside { .. }
            | Self::OutsideArena(_)
            | Self::ReadOnly(_)
            | Self::NotListening
            | Self::NotDevice(_)
            | Self::OnDevice => FailureKind::Invalid,
            Self::Batches => FailureKind::Quota,
            Self::Seal(_)
            | Self::NoDescriptor
            | Self::NotMemory
            | Self::LegacyHandle
            | Self::NotRegular(_)
            | Self::Short { .. }
            | Self::Read(_) => FailureKind::Descriptor,
            Self::Transfer(error) => kind_of(error),
        }
    }
}

impl Arenas {
    /// Keeps memory under a new name.
    pub(super) fn add(&mut self, allocation: Allocation, sealed: bool) -> ArenaId {
        self.insert(allocation, sealed, false)
    }

    /// Keeps memory that the program goes on using.
    pub(super) fn add_writable(&mut self, allocation: Allocation, sealed: bool) -> ArenaId {
        self.insert(allocation, sealed, true)
    }

    fn insert(&mut self, allocation: Allocation, sealed: bool, writable: bool) -> ArenaId {
        let id = ArenaId(self.next);
        // One after the other, four thousand million times; then old ones go.
        self.next = self.next.wrapping_add(1);
        let arena = Arena {
            allocation,
            sealed,
            writable,
        };
        self.arenas.insert(id, arena);
        id
    }

    /// Seals an arena that the application has mapped. Blocks for as long as
    /// looking at all of its pages takes.
    pub(super) async fn seal(&mut self, id: ArenaId) -> Result<(), MemoryError> {
        let arena = self.arenas.get(&id).ok_or(MemoryError::NoArena(id))?;
        let Some(region) = arena.allocation.host().map(Arc::clone) else {
            // A device's memory has nothing to seal.
            return Ok(());
        };
        let sealed = tokio::task::spawn_blocking(move || {
            region.seal()?;
            // Holes that were punched before the seals were added.
            region.populate()
        });
        let sealed = sealed.await.map_err(|_| TransferError::Stopping)?;
        sealed.map_err(MemoryError::Seal)?;
        if let Some(arena) = self.arenas.get_mut(&id) {
            arena.sealed = true;
        }
        Ok(())
    }

    /// Lets go of an arena; transfers from it keep it until they end.
    pub(super) fn free(&mut self, id: ArenaId) -> Result<(), MemoryError> {
        let freed = self.arenas.remove(&id);
        freed.map(drop).ok_or(MemoryError::NoArena(id))
    }

    /// Holds on the tensors of a list.
    pub(super) fn sources(&self, placed: Vec<Placed>) -> Result<Vec<Source>, MemoryError> {
        placed.into_iter().map(|one| self.source(one)).collect()
    }

    /// A hold on bytes that are read from, or written to.
    pub(super) fn place(
        &self,
        id: ArenaId,
        offset: u64,
        len: u64,
        direction: Direction,
    ) -> Result<Place, MemoryError> {
        let arena = self.arenas.get(&id).ok_or(MemoryError::NoArena(id))?;
        if !arena.sealed {
            return Err(MemoryError::NotSealed(id));
        }
        if direction == Direction::Read && !arena.writable {
            return Err(MemoryError::ReadOnly(id));
        }
        let place = arena.allocation.try_lease(offset, len);
        place.map_err(|_| MemoryError::OutsideArena(id))
    }

    fn source(&self, placed: Placed) -> Result<Source, MemoryError> {
        let Placed {
            info,
            arena: id,
            offset,
        } = placed;
        let arena = self.arenas.get(&id).ok_or(MemoryError::NoArena(id))?;
        if !arena.sealed {
            return Err(MemoryError::NotSealed(id));
        }
        let len = TensorInfo::len_bytes(&info).map_err(TransferError::from)?;
        match arena.allocation.try_lease(offset, len) {
            Ok(lease) => Ok(Source { info, lease }),
            Err(_) => Err(MemoryError::Outside { name: info.name }),
        }
    }
}

/// A stranger's descriptor. Reading it, asking about it and closing it may each
/// take as long as its file system likes: only on a thread of its own, which
/// counts as one of the user's connections until the descriptor is closed.
#[derive(Debug)]
pub(super) struct Foreign {
    // Closed first: fields are dropped in this order.
    file: OwnedFd,
    _thread: quota::Charge,
}

/// Takes a stranger's sealed memory file as it is. Blocks.
pub(super) fn import(foreign: Foreign, room: &Room) -> Result<Allocation, MemoryError> {
    let file = &foreign.file;
    // The file of anything else could hang or change under the mapping.
    if rustix::fs::fcntl_get_seals(file).is_err() {
        return Err(MemoryError::NotMemory);
    }
    let stat = rustix::fs::fstat(file).map_err(|error| MemoryError::Read(error.into()))?;
    let bytes = u64::try_from(stat.st_size).unwrap_or(0);
    // A memory file: no file system of a stranger's sees it closed.
    let Foreign { file, _thread } = foreign;
    Ok(room.import(file, bytes).map_err(TransferError::from)?)
}

/// Device memory of a stranger's, as it came.
#[derive(Debug)]
pub(super) enum Passed {
    File(Foreign),
    Handle(IpcHandle),
}

/// Takes device memory of a program of user `uid` as it is. Blocks.
pub(super) fn import_device(
    passed: Passed,
    bytes: u64,
    uid: u32,
    room: &Room,
) -> Result<Allocation, MemoryError> {
    let kind = room.memory.kind();
    if !kind.is_device() {
        return Err(MemoryError::NotDevice(kind));
    }
    // More than the address space has is more than any device has.
    let len = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
    // Until the driver has closed it: it may be of any file system.
    let (from, _thread) = match passed {
        Passed::File(Foreign { file, _thread }) => {
            (Import::Descriptor { file, len }, Some(_thread))
        }
        Passed::Handle(IpcHandle(handle)) => {
            let own = rustix::process::geteuid().as_raw();
            if uid != 0 && uid != own {
                return Err(MemoryError::LegacyHandle);
            }
            (Import::Ipc { handle, len }, None)
        }
    };
    Ok(room.import_device(from).map_err(TransferError::from)?)
}

/// Reads a part of a file into new memory, until nobody waits. Blocks, for as
/// long as the file's own file system likes.
pub(super) fn read(
    foreign: Foreign,
    offset: u64,
    bytes: u64,
    room: &Room,
    progress: &Progress,
) -> Result<Allocation, MemoryError> {
    let file = &foreign.file;
    let stat = rustix::fs::fstat(file).map_err(|error| MemoryError::Read(error.into()))?;
    match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::RegularFile => {}
        rustix::fs::FileType::Directory => return Err(MemoryError::NotRegular("folder")),
        rustix::fs::FileType::Socket => return Err(MemoryError::NotRegular("socket")),
        _ => return Err(MemoryError::NotRegular("device or pipe")),
    }
    // Before room is made for it: a file's end may be far from what is asked for.
    let (end, wanted) = (
        u64::try_from(stat.st_size).unwrap_or(0),
        offset.saturating_add(bytes),
    );
    if wanted > end {
        return Err(MemoryError::Short { end, wanted });
    }
    let allocation = room.allocate(bytes).map_err(TransferError::from)?;
    let place = allocation.lease(0, bytes);
    let into = place.host().ok_or(MemoryError::OnDevice)?;
    progress.begin(bytes);
    let mut done = 0;
    while done < into.len() {
        progress.check()?;
        let part = done..into.len().min(done + CHUNK);
        let read = into.read_file(part, file, offset + done as u64);
        match read.map_err(MemoryError::Read)? {
            0 => {
                let end = offset + done as u64;
                return Err(MemoryError::Short { end, wanted });
            }
            read => {
                done += read;
                progress.add(read as u64);
            }
        }
    }
    Ok(allocation)
}

/// Passes a descriptor with its byte.
pub(super) async fn pass_descriptor(
    stream: &UnixStream,
    fd: impl AsFd,
) -> Result<(), ApplicationError> {
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = [io::IoSlice::new(&[DESCRIPTOR_BYTE])];
        rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    };
    timeout(PATIENCE, stream.async_io(Interest::WRITABLE, send))
        .await
        .map_err(|_| ApplicationError::Stalled)?
        .map_err(ApplicationError::Descriptor)
}

/// Takes the byte that should carry a descriptor, and the descriptor if it does.
///
/// Whatever else comes with it is closed, elsewhere.
pub(super) async fn take_descriptor(
    stream: &mut UnixStream,
    user: &User,
) -> Result<Result<Foreign, MemoryError>, ApplicationError> {
    let thread = match user.connection() {
        Ok(charge) => charge,
        Err(error) => {
            // Read without room for a descriptor: the kernel lets go of it,
            // and no file system is waited for.
            let byte = timeout(PATIENCE, stream.read_u8()).await;
            byte.map_err(|_| ApplicationError::Stalled)?
                .map_err(ApplicationError::Descriptor)?;
            let error = TransferError::from(AllocateError::from(error));
            return Ok(Err(error.into()));
        }
    };
    let received = timeout(
        PATIENCE,
        stream.async_io(Interest::READABLE, || recv_descriptors(stream)),
    );
    let (mut fds, is_ours) = received
        .await
        .map_err(|_| ApplicationError::Stalled)?
        .map_err(ApplicationError::Descriptor)?;
    // Two are one too many to know which is meant.
    if is_ours && fds.len() == 1 {
        let file = fds.remove(0);
        let _thread = thread;
        return Ok(Ok(Foreign { file, _thread }));
    }
    tokio::task::spawn_blocking(move || drop((fds, thread)));
    if is_ours {
        Ok(Err(MemoryError::NoDescriptor))
    } else {
        Err(ApplicationError::Unexpected(
            "something instead of a descriptor",
        ))
    }
}

/// Descriptors that came with one byte, and whether the byte was the right one.
fn recv_descriptors(stream: &UnixStream) -> io::Result<(Vec<OwnedFd>, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::net::recvmsg(stream, &mut bytes, &mut control, flags)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    Ok((fds, received.bytes == 1 && byte == [DESCRIPTOR_BYTE]))
}
