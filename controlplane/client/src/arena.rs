//! Memory shared with the agent, and the tensors in it.

use std::sync::{Arc, Mutex, PoisonError};

use genie_dataplane::memory::{self, Backing, Block, Lease, NoRoom, Region, View};

use crate::protocol::{ArenaId, Moved, Placed};
use crate::tensor::{Dtype, Metadata, TensorError, TensorInfo};

/// Memory shared with the agent, in which tensors are allocated without asking it.
///
/// Clones share it; any thread may use it. It is given back when the last clone
/// and the last tensor in it are dropped, with the connection's next request.
#[derive(Clone, Debug)]
pub struct Arena {
    pub(crate) hold: Arc<Hold>,
    memory: memory::Arena,
    reason: Option<Arc<str>>,
}

/// A tensor in memory that the agent can put it from. Clones share the bytes,
/// which are free again when the last one, and the last lease of them, are dropped.
#[derive(Clone, Debug)]
pub struct Tensor {
    info: TensorInfo,
    place: Place,
}

#[derive(Clone, Debug)]
struct Place {
    hold: Arc<Hold>,
    /// None of memory that this process has not mapped.
    block: Option<Block>,
    /// First byte in the arena.
    offset: u64,
    len: u64,
}

/// Tensors one after the other without gaps, as in a file.
#[derive(Debug)]
pub struct Packed {
    /// The tensors, in order.
    pub tensors: Vec<Tensor>,
    /// All of their bytes.
    pub lease: Lease,
}

/// Bytes that were handed to the agent otherwise than through an [`Arena`]: a
/// memory file, or what a file held.
#[derive(Clone, Debug)]
pub struct Imported {
    pub(crate) hold: Arc<Hold>,
    pub(crate) len: u64,
    pub(crate) copied: u64,
}

/// What a get brought: tensors in memory that nobody can change any more.
#[derive(Debug)]
pub struct Fetched {
    /// The tensors; one after the other, without gaps.
    pub tensors: Vec<TensorInfo>,
    /// Their prefix's metadata.
    pub metadata: Option<Metadata>,
    /// How they moved.
    pub moved: Moved,
    pub(crate) region: Arc<Region>,
    pub(crate) _hold: Arc<Hold>,
}

/// Why a tensor is not in an arena.
#[derive(Debug, thiserror::Error)]
pub enum NotOfArena {
    /// Its description is bad.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The arena has no room for it.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It lies outside the memory it should be in.
    #[error("tensor {name:?} of {tensor} bytes at {offset} lies outside memory of {len} bytes")]
    Outside {
        /// Its name.
        name: String,
        /// Its length.
        tensor: u64,
        /// Where it should begin.
        offset: u64,
        /// How much there is.
        len: u64,
    },
}

/// The agent's side of an arena: given back when the last holder is gone.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) connection: u64,
    pub(crate) id: ArenaId,
    pub(crate) unneeded: Unneeded,
}

/// Arenas that nobody holds any more.
pub(crate) type Unneeded = Arc<Mutex<Vec<ArenaId>>>;

impl Drop for Hold {
    fn drop(&mut self) {
        let mut unneeded = self.unneeded.lock().unwrap_or_else(PoisonError::into_inner);
        unneeded.push(self.id);
    }
}

impl Arena {
    pub(crate) fn new(hold: Arc<Hold>, region: Arc<Region>, reason: Option<String>) -> Self {
        Self {
            hold,
            memory: memory::Arena::new(region),
            reason: reason.map(Into::into),
        }
    }

    /// Allocates a tensor that starts at a multiple of
    /// [`ALIGNMENT`](memory::ALIGNMENT). Its bytes are whatever was there before.
    pub fn tensor(
        &self,
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[u64],
    ) -> Result<Tensor, NotOfArena> {
        let info = TensorInfo {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        let len = info.len_bytes()?;
        let block = self.memory.allocate(to_usize(len))?;
        let offset = block.offset() as u64;
        let place = self.place(block, offset, len);
        Ok(Tensor { info, place })
    }

    /// Allocates tensors one after the other without gaps.
    pub fn packed(&self, infos: Vec<TensorInfo>) -> Result<Packed, NotOfArena> {
        let lengths: Vec<u64> = infos
            .iter()
            .map(TensorInfo::len_bytes)
            .collect::<Result<_, _>>()?;
        let total = lengths
            .iter()
            .fold(0u64, |sum, len| sum.saturating_add(*len));
        let block = self.memory.allocate(to_usize(total))?;
        let lease = block.lease();
        let mut offset = block.offset() as u64;
        let tensor = |(info, len): (TensorInfo, u64)| {
            let place = self.place(block.clone(), offset, len);
            offset += len;
            Tensor { info, place }
        };
        let tensors = infos.into_iter().zip(lengths).map(tensor).collect();
        Ok(Packed { tensors, lease })
    }

    /// Length in bytes; whole pages.
    pub fn len_bytes(&self) -> usize {
        self.memory.region().len()
    }

    /// Bytes that are free, in however many pieces.
    pub fn free_bytes(&self) -> usize {
        self.memory.free_bytes()
    }

    /// What the pages are.
    pub fn backing(&self) -> Backing {
        self.memory.region().backing()
    }

    /// Why it is not on huge pages, if it could be but is not.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    fn place(&self, block: Block, offset: u64, len: u64) -> Place {
        Place {
            hold: Arc::clone(&self.hold),
            block: Some(block),
            offset,
            len,
        }
    }
}

impl Tensor {
    /// What it is.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.place.len
    }

    /// Another tensor in its bytes, from `offset` on.
    pub fn part(&self, info: TensorInfo, offset: u64) -> Result<Tensor, NotOfArena> {
        let len = info.len_bytes()?;
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.place.len)
        {
            return Err(NotOfArena::Outside {
                name: info.name,
                tensor: len,
                offset,
                len: self.place.len,
            });
        }
        let mut place = self.place.clone();
        (place.offset, place.len) = (self.place.offset + offset, len);
        Ok(Tensor { info, place })
    }

    /// Its bytes; none of a tensor in imported memory.
    pub fn lease(&self) -> Option<Lease> {
        let block = self.place.block.as_ref()?;
        let start = self.place.offset - block.offset() as u64;
        let lease = block.lease().slice(start..start + self.place.len);
        Some(lease.expect("a tensor lies in its block"))
    }

    /// Writes `bytes` at `offset`, in place: the agent puts it from there.
    ///
    /// # Panics
    /// If they do not fit, or the tensor is in imported memory.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let lease = self.lease().expect("imported memory is not written");
        lease.write_at(offset, View::from(bytes));
    }

    /// Copies the bytes at `offset` into `into`.
    ///
    /// # Panics
    /// If the range lies outside, or the tensor is in imported memory.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let lease = self.lease().expect("imported memory is not read");
        lease.read_at(offset, into);
    }

    pub(crate) fn hold(&self) -> &Hold {
        &self.place.hold
    }

    /// The arena that it lies in, and its first byte there.
    pub(crate) fn position(&self) -> (ArenaId, u64) {
        (self.place.hold.id, self.place.offset)
    }

    pub(crate) fn placed(&self) -> Placed {
        Placed {
            info: self.info.clone(),
            arena: self.place.hold.id,
            offset: self.place.offset,
        }
    }
}

impl Imported {
    /// Bytes there are.
    pub fn len_bytes(&self) -> u64 {
        self.len
    }

    /// Bytes that were copied to have them: none of memory taken as it is.
    pub fn copied_bytes(&self) -> u64 {
        self.copied
    }

    /// The tensor that begins at `offset`.
    pub fn tensor(&self, info: TensorInfo, offset: u64) -> Result<Tensor, NotOfArena> {
        let len = info.len_bytes()?;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(NotOfArena::Outside {
                name: info.name,
                tensor: len,
                offset,
                len: self.len,
            });
        }
        let place = Place {
            hold: Arc::clone(&self.hold),
            block: None,
            offset,
            len,
        };
        Ok(Tensor { info, place })
    }
}

impl Fetched {
    /// All bytes, the first tensor's first.
    pub fn lease(&self) -> Lease {
        let lease = Lease::whole(Arc::clone(&self.region));
        let part = lease.slice(0..self.moved.bytes);
        part.expect("the agent passed memory for all tensors")
    }

    /// The bytes of the tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<Lease> {
        let mut offset = 0;
        for info in &self.tensors {
            let len = info.len_bytes().ok()?;
            if info.name == name {
                return self.lease().slice(offset..offset + len).ok();
            }
            offset += len;
        }
        None
    }

    /// A copy of the bytes of the tensor of this name.
    pub fn to_vec(&self, name: &str) -> Option<Vec<u8>> {
        self.tensor(name).map(|lease| to_vec(&lease))
    }
}

pub(crate) fn to_vec(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.len()];
    lease.read_at(0, &mut bytes);
    bytes
}

fn to_usize(len: u64) -> usize {
    // More than the address space has is more than any arena has.
    usize::try_from(len).unwrap_or(usize::MAX)
}
