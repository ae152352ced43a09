//! Memory for tensors, within a budget of bytes.
//!
//! The store and all applications' arenas allocate here. The invariant: *memory
//! is counted from before it is allocated until the last lease on it is gone*,
//! so that a budget cannot be overrun, by whatever a transfer still holds.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use genie_client::Memory;
use genie_client::status::Usage;
use genie_dataplane::memory::accelerator::{DeviceLease, DeviceRegion, Import};
use genie_dataplane::memory::{Backing, Lease, OutOfBounds, Region, RegionError};
use genie_dataplane::stage::{Place, Stage};
use genie_hugepages::{PageSize, Root};

use crate::devices::{DeviceError, Devices};
use crate::quota::peer::{Account, LimitError};
use crate::quota::{self, QuotaError, User};

/// Bytes that may be allocated, shared by all who allocate from it.
#[derive(Clone, Debug)]
pub struct Budget(Arc<BudgetInner>);

#[derive(Debug)]
struct BudgetInner {
    name: &'static str,
    flag: &'static str,
    limit: u64,
    used: AtomicU64,
    regions: AtomicU64,
}

/// Who pays, and with what: the places in which memory is made.
#[derive(Clone, Debug)]
pub struct Room {
    /// Counted here,
    pub budget: Budget,
    /// and charged to this user, if to anybody,
    pub user: Option<User>,
    /// or to this peer,
    pub peer: Option<Arc<Account>>,
    /// on these pages or this device,
    pub memory: Memory,
    /// of these.
    pub devices: Devices,
}

/// A region that counts against a budget for as long as anybody holds it.
#[derive(Clone, Debug)]
pub struct Allocation {
    held: Held,
    /// Why it is not on huge pages, if it could be but is not.
    pub fallback: Option<String>,
}

#[derive(Clone, Debug)]
enum Held {
    Host(Arc<Region>),
    Device(Arc<Stage>, Arc<DeviceRegion>),
}

/// Bytes that count against a budget for as long as this is held.
#[derive(Debug)]
pub struct Charge {
    budget: Budget,
    /// Whose limit it counts against too.
    peer: Option<Arc<Account>>,
    bytes: u64,
}

/// What a region costs; dropped when it is unmapped.
#[derive(Debug)]
struct Cost {
    charge: Charge,
    _user: Option<quota::Charge>,
}

/// Why memory was not given.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// It would exceed the budget.
    #[error(
        "the {name} is full: {wanted} bytes are wanted, {used} of {limit} are used; \
         remove tensors with 'genie rm' or start the agent with a larger {flag}"
    )]
    Full {
        /// Which budget.
        name: &'static str,
        /// What sets it.
        flag: &'static str,
        /// Bytes asked for.
        wanted: u64,
        /// Bytes in use.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// It would exceed what one user may have.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// It would exceed what one peer may have.
    #[error(transparent)]
    Peer(#[from] LimitError),
    /// The machine has not that much.
    #[error("the machine has no memory for {wanted} bytes: {source}")]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Why.
        source: RegionError,
    },
    /// Huge pages were demanded.
    #[error("no huge pages for {wanted} bytes: {reason}")]
    HugePages {
        /// Bytes asked for.
        wanted: u64,
        /// Why, and what to type.
        reason: String,
    },
    /// There is no descriptor left for it.
    #[error("cannot make a descriptor for the memory: {0}")]
    Descriptor(std::io::Error),
    /// A device's memory was demanded.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Memory that somebody passed cannot be used.
    #[error("memory that was passed cannot be used: {0}")]
    Import(RegionError),
}

impl Budget {
    /// A budget of `limit` bytes, called `name` in errors and set by `flag`.
    pub fn new(name: &'static str, flag: &'static str, limit: u64) -> Self {
        Self(Arc::new(BudgetInner {
            name,
            flag,
            limit,
            used: AtomicU64::new(0),
            regions: AtomicU64::new(0),
        }))
    }

    /// How full it is; of tensors it knows nothing.
    pub fn usage(&self) -> Usage {
        Usage {
            tensors: 0,
            regions: self.0.regions.load(Ordering::Relaxed),
            used_bytes: self.0.used.load(Ordering::Relaxed),
            limit_bytes: self.0.limit,
        }
    }

    /// Room in it that nobody in particular pays for, on whichever pages.
    pub fn room(&self) -> Room {
        Room {
            budget: self.clone(),
            user: None,
            peer: None,
            memory: Memory::Auto,
            devices: Devices::default(),
        }
    }

    fn charge_to(&self, bytes: u64, peer: Option<&Arc<Account>>) -> Result<Charge, AllocateError> {
        let mut charge = self.charge(bytes)?;
        if let Some(peer) = peer {
            peer.take(bytes)?;
            charge.peer = Some(Arc::clone(peer));
        }
        Ok(charge)
    }

    /// Counts memory that is allocated elsewhere.
    pub fn charge(&self, bytes: u64) -> Result<Charge, AllocateError> {
        let BudgetInner {
            name,
            flag,
            limit,
            used,
            ..
        } = &*self.0;
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| used <= limit)
        })
        .map(|_| Charge {
            budget: self.clone(),
            peer: None,
            bytes,
        })
        .map_err(|used| AllocateError::Full {
            name,
            flag,
            wanted: bytes,
            used,
            limit: *limit,
        })
    }
}

impl Charge {
    /// Counts `bytes` instead, if that is more.
    pub fn grow_to(&mut self, bytes: u64) -> Result<(), AllocateError> {
        let more = bytes.saturating_sub(self.bytes);
        let mut more = self.budget.charge_to(more, self.peer.as_ref())?;
        self.bytes += more.bytes;
        more.bytes = 0;
        Ok(())
    }

    /// Parts with up to `bytes`.
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self {
            budget: self.budget.clone(),
            peer: self.peer.clone(),
            bytes,
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(peer) = &self.peer {
            peer.give_back(self.bytes);
        }
        self.budget.0.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Cost {
    /// Whole pages were taken: counts them too, without refusing over a rest.
    fn count_whole_pages(&mut self, len: usize) {
        let rest = (len as u64).saturating_sub(self.charge.bytes);
        let used = &self.charge.budget.0.used;
        used.fetch_add(rest, Ordering::Relaxed);
        if let Some(peer) = &self.charge.peer {
            peer.take_rest(rest);
        }
        self.charge.bytes += rest;
    }
}

impl Drop for Cost {
    fn drop(&mut self) {
        let regions = &self.charge.budget.0.regions;
        regions.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Room {
    /// Counts memory that is allocated elsewhere.
    pub fn charge(&self, bytes: u64) -> Result<Charge, AllocateError> {
        self.budget.charge_to(bytes, self.peer.as_ref())
    }

    /// Allocates a region of at least `bytes`, all pages present. Blocks while
    /// the kernel clears pages: not for asynchronous code.
    pub fn allocate(&self, bytes: u64) -> Result<Allocation, AllocateError> {
        let wanted = bytes.max(1);
        let mut cost = self.cost(wanted)?;
        let (held, fallback) = self.held(wanted)?;
        cost.count_whole_pages(held.len());
        Ok(Allocation::new(held, cost, fallback))
    }

    /// Takes a stranger's device memory as it is. Blocks.
    pub fn import_device(&self, from: Import) -> Result<Allocation, AllocateError> {
        let mut cost = self.cost(from.len_bytes() as u64)?;
        let (stage, region) = self.devices.import(self.memory.kind(), from)?;
        cost.count_whole_pages(region.len());
        Ok(Allocation::new(Held::Device(stage, region), cost, None))
    }

    /// Takes a stranger's memory file of `bytes` as it is. Blocks.
    pub fn import(&self, file: OwnedFd, bytes: u64) -> Result<Allocation, AllocateError> {
        let cost = self.cost(bytes.max(1))?;
        // Before it was sealed it may have grown beyond what was charged.
        let len_max = usize::try_from(bytes).unwrap_or(usize::MAX);
        let region = Region::import(file, len_max).map_err(AllocateError::Import)?;
        Ok(Allocation::new(Held::Host(region), cost, None))
    }

    fn cost(&self, bytes: u64) -> Result<Cost, AllocateError> {
        let user = self.user.as_ref().map(|user| user.arena(bytes));
        let user = user.transpose()?;
        let charge = self.charge(bytes)?;
        self.budget.0.regions.fetch_add(1, Ordering::Relaxed);
        Ok(Cost {
            charge,
            _user: user,
        })
    }

    /// The same, in host memory on whichever pages.
    pub fn on_host(&self) -> Self {
        Self {
            memory: Memory::Auto,
            ..self.clone()
        }
    }

    fn held(&self, wanted: u64) -> Result<(Held, Option<String>), AllocateError> {
        let memory = |source| AllocateError::Memory { wanted, source };
        let len = usize::try_from(wanted).map_err(|_| memory(RegionError::Size(wanted)))?;
        match self.memory {
            Memory::Auto => {
                let (region, reason) = Region::allocate(len).map_err(memory)?;
                Ok((Held::Host(region), reason.map(|reason| reason.to_string())))
            }
            Memory::Host => {
                let region = Region::with_backing(len, Backing::Shmem).map_err(memory)?;
                Ok((Held::Host(region), None))
            }
            Memory::Hugepage => {
                let region = Region::with_backing(len, Backing::HUGE_2M);
                let refused = |error| AllocateError::HugePages {
                    wanted,
                    reason: why_no_huge_pages(wanted, &error),
                };
                Ok((Held::Host(region.map_err(refused)?), None))
            }
            Memory::Cuda(_) | Memory::Sim => {
                let (stage, region) = self.devices.allocate(self.memory.kind(), len)?;
                Ok((Held::Device(stage, region), None))
            }
        }
    }
}

impl Allocation {
    fn new(held: Held, cost: Cost, fallback: Option<String>) -> Self {
        let cost = Box::new(cost);
        match &held {
            Held::Host(region) => region.guard(cost),
            Held::Device(_, region) => region.guard(cost),
        }
        .expect("a new region has no guard yet");
        Self { held, fallback }
    }

    /// The memory, if it is the host's.
    pub fn host(&self) -> Option<&Arc<Region>> {
        match &self.held {
            Held::Host(region) => Some(region),
            Held::Device(..) => None,
        }
    }

    /// A descriptor for whoever shall have it too.
    pub fn descriptor(&self) -> Result<OwnedFd, AllocateError> {
        match &self.held {
            Held::Host(region) => region
                .as_fd()
                .try_clone_to_owned()
                .map_err(AllocateError::Descriptor),
            Held::Device(_, region) => Ok(region.export().map_err(DeviceError::from)?),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Never true: memory of no bytes cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A hold on `len` bytes at `offset`.
    ///
    /// # Panics
    /// If that lies outside: the caller laid the tensors out in it.
    pub fn lease(&self, offset: u64, len: u64) -> Place {
        self.try_lease(offset, len)
            .expect("laid out within the region")
    }

    /// A hold on `len` bytes at `offset`, if they are there.
    pub fn try_lease(&self, offset: u64, len: u64) -> Result<Place, OutOfBounds> {
        Ok(match &self.held {
            Held::Host(region) => Place::Host(Lease::new(Arc::clone(region), offset, len)?),
            Held::Device(stage, region) => {
                let lease = DeviceLease::new(Arc::clone(region), offset, len)?;
                Place::Device(Arc::clone(stage), lease)
            }
        })
    }
}

impl Held {
    fn len(&self) -> usize {
        match self {
            Self::Host(region) => region.len(),
            Self::Device(_, region) => region.len(),
        }
    }
}

/// The kernel's word for a lack of huge pages does not say what to do.
fn why_no_huge_pages(bytes: u64, error: &RegionError) -> String {
    let survey = genie_hugepages::survey(&Root::default()).ok();
    let choice = survey.map(|survey| survey.choose(PageSize::MB_2, bytes));
    choice
        .and_then(|choice| choice.reasons.into_iter().next())
        .unwrap_or_else(|| error.to_string())
}
