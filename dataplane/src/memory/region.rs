//! Regions: memory made from a sealed memfd, so that it can be shared.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags};

/// What the pages of a region are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Huge pages of this many bytes from the kernel's reserved pool.
    HugeTlb {
        /// Size of one page in bytes.
        page_bytes: usize,
    },
    /// Ordinary pages of a shared-memory file.
    Shmem,
}

impl Backing {
    /// 2 MiB huge pages.
    pub const HUGE_2M: Backing = Backing::HugeTlb {
        page_bytes: 2 << 20,
    };
    /// 1 GiB huge pages.
    pub const HUGE_1G: Backing = Backing::HugeTlb {
        page_bytes: 1 << 30,
    };

    /// Size of one page in bytes.
    pub fn page_bytes(&self) -> usize {
        match self {
            Backing::HugeTlb { page_bytes } => *page_bytes,
            Backing::Shmem => rustix::param::page_size(),
        }
    }
}

/// Why a region could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A region of zero bytes, of no whole number of pages, or one too large
    /// for the address space.
    #[error("a region of {0} bytes cannot be made: whole pages, and at least one, are needed")]
    Size(u64),
    /// A memory file of a stranger's that is longer than it may be.
    #[error("the memory file has {len} bytes, {len_max} are allowed")]
    TooLong {
        /// Its length.
        len: usize,
        /// The limit.
        len_max: usize,
    },
    /// The kernel refused the memory file.
    #[error("cannot create a memory file of {len_bytes} bytes ({backing:?})")]
    Create {
        /// Length asked for.
        len_bytes: usize,
        /// Pages asked for.
        backing: Backing,
        /// The kernel's answer.
        source: rustix::io::Errno,
    },
    /// The kernel refused to map it; for huge pages usually because too few are free.
    #[error("cannot map {len_bytes} bytes ({backing:?})")]
    Map {
        /// Length asked for.
        len_bytes: usize,
        /// Pages asked for.
        backing: Backing,
        /// The kernel's answer.
        source: rustix::io::Errno,
    },
    /// The file lacks seals without which its owner could pull it away under us.
    #[error("the memory file lacks {0}: add the seals before passing it (fcntl F_ADD_SEALS)")]
    NotSealed(String),
    /// Pages that should be there are not and cannot be had.
    #[error("pages are missing from {len_bytes} bytes ({backing:?}) and cannot be had")]
    Populate {
        /// Length of the region.
        len_bytes: usize,
        /// Its pages.
        backing: Backing,
        /// The kernel's answer.
        source: rustix::io::Errno,
    },
    /// The pages cannot be kept from moving.
    #[error(
        "cannot lock {len_bytes} bytes: raise the limit on locked memory (ulimit -l) or use huge pages"
    )]
    Pin {
        /// Length of the region.
        len_bytes: usize,
        /// The kernel's answer.
        source: rustix::io::Errno,
    },
    /// The descriptor is not a memory file, or cannot be asked about.
    #[error("not a memory file that can be used")]
    NotMemfd(#[source] rustix::io::Errno),
}

/// A mapped memory file that tensors are moved from and to.
///
/// Shared through `Arc`; unmapped when the last [`Lease`](super::Lease) and
/// handle are gone. Any thread may use it.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
    writable: bool,
    file: OwnedFd,
    /// Dropped after the pages were given back.
    guard: OnceLock<Box<dyn Any + Send + Sync>>,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is released
// once, in `Drop`, by whoever holds the last `Arc`.
unsafe impl Send for Region {}
// SAFETY: all access goes through raw-pointer copies (see `Lease`); no reference
// to the bytes is ever made, so concurrent access cannot break Rust's aliasing
// rules. What concurrent writers leave behind is a matter of the digest.
unsafe impl Sync for Region {}

impl Region {
    /// Makes a region of at least `len_bytes` on `backing`, all pages present.
    ///
    /// The length is rounded up to whole pages. Fails rather than using other
    /// pages; see [`Region::allocate`] for that.
    pub fn with_backing(len_bytes: usize, backing: Backing) -> Result<Arc<Self>, RegionError> {
        let page = backing.page_bytes();
        let len = len_bytes
            .checked_next_multiple_of(page)
            .filter(|len| *len > 0 && *len <= isize::MAX as usize)
            .ok_or(RegionError::Size(len_bytes as u64))?;
        let huge = match backing {
            Backing::Shmem => MemfdFlags::empty(),
            Backing::HUGE_1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
            Backing::HugeTlb { .. } => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge;
        let created = |source| RegionError::Create {
            len_bytes,
            backing,
            source,
        };
        let file = rustix::fs::memfd_create("genie", flags).map_err(created)?;
        rustix::fs::ftruncate(&file, len as u64).map_err(created)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(created)?;
        let region = Self::map(file, len, backing, Access::ReadWrite)?;
        if matches!(backing, Backing::HugeTlb { .. }) {
            // A control group may have fewer pages left than the pool: the
            // first access beyond them would be a SIGBUS.
            region.populate()?;
        }
        Ok(region)
    }

    /// Makes a region on 2 MiB huge pages, or on ordinary ones with the reason.
    pub fn allocate(len_bytes: usize) -> Result<(Arc<Self>, Option<RegionError>), RegionError> {
        // Small regions would waste most of a huge page.
        const WORTH_HUGE_PAGES: usize = 1 << 20;
        if len_bytes < WORTH_HUGE_PAGES {
            return Ok((Self::with_backing(len_bytes, Backing::Shmem)?, None));
        }
        match Self::with_backing(len_bytes, Backing::HUGE_2M) {
            Ok(region) => Ok((region, None)),
            Err(reason) => Ok((Self::with_backing(len_bytes, Backing::Shmem)?, Some(reason))),
        }
    }

    /// Maps an arena that came from another process, to write into it.
    ///
    /// It must be sealed against shrinking; otherwise its owner could make our
    /// access fault. Whoever made it may still punch holes, so this is for an
    /// application that trusts its agent, never for the agent.
    pub fn from_memfd(file: OwnedFd) -> Result<Arc<Self>, RegionError> {
        check_seals(&file, SealFlags::SHRINK)?;
        let (len, backing) = extent(&file)?;
        Self::map(file, len, backing, Access::ReadWrite)
    }

    /// Maps a memory file of a stranger's as it is, to read from it.
    ///
    /// It must be sealed against shrinking, growing, holes (`F_SEAL_WRITE` or
    /// `F_SEAL_FUTURE_WRITE`) and further sealing, and all of its pages must be
    /// there: nothing the stranger does later can make our access fault. Nor
    /// may it be longer than `len_max`: pages that are missing are made.
    pub fn import(file: OwnedFd, len_max: usize) -> Result<Arc<Self>, RegionError> {
        let seals = check_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        if !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(RegionError::NotSealed("F_SEAL_FUTURE_WRITE".into()));
        }
        let (len, backing) = extent(&file)?;
        if len > len_max {
            return Err(RegionError::TooLong { len, len_max });
        }
        let region = Self::map(file, len, backing, Access::Read)?;
        region.populate()?;
        Ok(region)
    }

    fn map(
        file: OwnedFd,
        len: usize,
        backing: Backing,
        access: Access,
    ) -> Result<Arc<Self>, RegionError> {
        let mapped = |source| RegionError::Map {
            len_bytes: len,
            backing,
            source,
        };
        // Populated now, so that no page fault falls into a transfer, and so
        // that a pool of huge pages too small is an error here, not a SIGBUS.
        let (prot, populate) = match access {
            Access::ReadWrite => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::POPULATE),
            // `import` does it, and looks whether it worked.
            Access::Read => (ProtFlags::READ, MapFlags::empty()),
        };
        let map = |flags| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, &file, 0) }
        };
        let base = match map(MapFlags::SHARED | populate) {
            // Linux before 6.7 lets nobody share a file sealed against writing;
            // a private mapping that is only read shows the same pages.
            Err(rustix::io::Errno::PERM) if access == Access::Read => map(MapFlags::PRIVATE),
            answer => answer,
        };
        let base = base.map_err(mapped)?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap without MAP_FIXED is not null");
        Ok(Arc::new(Self {
            base,
            len,
            backing,
            writable: access == Access::ReadWrite,
            file,
            guard: OnceLock::new(),
        }))
    }

    /// Length in bytes; whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a region of zero bytes cannot be made.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// What the pages are.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The address of the first byte, for registration with a device.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Whether bytes may be written; false for memory that was imported.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Drops `guard` once the pages were given back, after the last lease.
    ///
    /// Returns it if the region already has one.
    pub fn guard(
        &self,
        guard: Box<dyn Any + Send + Sync>,
    ) -> Result<(), Box<dyn Any + Send + Sync>> {
        self.guard.set(guard)
    }

    /// Seals the file so that nobody who holds its descriptor can change its
    /// size, punch holes into it, make new writable mappings or lift the seals,
    /// and checks that the seals are there.
    ///
    /// Mappings made before stay writable. Called after an application has
    /// mapped its arena, and before anything that it put there is used.
    pub fn seal(&self) -> Result<(), RegionError> {
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        let added = rustix::fs::fcntl_add_seals(&self.file, seals);
        // Somebody else may have added some and locked the set: what counts is
        // what is there now.
        check_seals(&self.file, seals).map_err(|missing| match added {
            Ok(()) => missing,
            Err(source) => RegionError::NotMemfd(source),
        })?;
        Ok(())
    }

    /// Makes every page present, or says that it cannot.
    ///
    /// Whoever held the descriptor before the seals were added may have punched
    /// holes; the next access would take a page from a pool that may be empty,
    /// which is a SIGBUS. After the seals and this, it no longer can be.
    pub fn populate(&self) -> Result<(), RegionError> {
        let advice = if self.writable {
            Advice::LinuxPopulateWrite
        } else {
            Advice::LinuxPopulateRead
        };
        // SAFETY: all of our own mapping; populating changes no byte of it.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, advice) }.map_err(
            |source| RegionError::Populate {
                len_bytes: self.len,
                backing: self.backing,
                source,
            },
        )
    }

    /// Keeps the pages where they are, so that a device may be told their
    /// addresses: huge pages never move, others are locked.
    ///
    /// Undone when the region is unmapped.
    pub fn pin(&self) -> Result<(), RegionError> {
        if matches!(self.backing, Backing::HugeTlb { .. }) {
            return Ok(());
        }
        // SAFETY: all of our own mapping.
        unsafe { rustix::mm::mlock_with(self.base.as_ptr().cast(), self.len, MlockFlags::empty()) }
            .map_err(|source| RegionError::Pin {
                len_bytes: self.len,
                source,
            })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    ReadWrite,
}

/// The file's seals; an error that names those of `wanted` that it lacks.
fn check_seals(file: &OwnedFd, wanted: SealFlags) -> Result<SealFlags, RegionError> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(RegionError::NotMemfd)?;
    let missing = wanted - seals;
    if missing.is_empty() {
        return Ok(seals);
    }
    let names = missing
        .iter_names()
        .map(|(name, _)| format!("F_SEAL_{name}"))
        .collect::<Vec<_>>();
    Err(RegionError::NotSealed(names.join(", ")))
}

/// Length of a memory file in bytes, and what its pages are.
fn extent(file: &OwnedFd) -> Result<(usize, Backing), RegionError> {
    let stat = rustix::fs::fstat(file).map_err(RegionError::NotMemfd)?;
    let system = rustix::fs::fstatfs(file).map_err(RegionError::NotMemfd)?;
    let backing = if system.f_type == libc::HUGETLBFS_MAGIC {
        Backing::HugeTlb {
            page_bytes: system.f_bsize as usize,
        }
    } else {
        Backing::Shmem
    };
    let len = usize::try_from(stat.st_size)
        .ok()
        .filter(|len| *len > 0 && len.is_multiple_of(backing.page_bytes()))
        .ok_or(RegionError::Size(stat.st_size as u64))?;
    Ok((len, backing))
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `map`, and no
        // lease is left: each holds an `Arc` of this region.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "cannot unmap a region");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Lease;

    #[test]
    fn lengths_are_whole_pages_and_never_zero() {
        assert!(matches!(
            Region::with_backing(0, Backing::Shmem),
            Err(RegionError::Size(0))
        ));
        assert!(Region::with_backing(usize::MAX, Backing::Shmem).is_err());
        let region = Region::with_backing(5000, Backing::Shmem).unwrap();
        assert_eq!(region.len(), 8192);
    }

    fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
        let file = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        file
    }

    #[test]
    fn a_file_that_could_change_is_refused_with_the_seals_it_lacks() {
        let lacks = |file, import: bool| {
            let refused = if import {
                Region::import(file, 4096)
            } else {
                Region::from_memfd(file)
            };
            match refused {
                Err(RegionError::NotSealed(missing)) => missing,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(
            lacks(memfd(4096, SealFlags::empty()), false),
            "F_SEAL_SHRINK"
        );
        assert_eq!(
            lacks(memfd(4096, SealFlags::SHRINK), true),
            "F_SEAL_SEAL, F_SEAL_GROW"
        );
        let all_but_holes = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(
            lacks(memfd(4096, all_but_holes), true),
            "F_SEAL_FUTURE_WRITE"
        );
    }

    #[test]
    fn a_sealed_file_is_imported_to_be_read() {
        for last in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let file = memfd(4096, SealFlags::empty());
            rustix::io::pwrite(&file, b"tensor", 0).unwrap();
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL | last;
            rustix::fs::fcntl_add_seals(&file, seals).unwrap();
            let region = Region::import(file, 4096).unwrap();
            assert!(!region.is_writable());
            let mut bytes = [0; 6];
            Lease::whole(region).read_at(0, &mut bytes);
            assert_eq!(&bytes, b"tensor");
        }
    }

    #[test]
    fn a_sealed_file_that_is_too_long_is_refused_before_its_pages_are_made() {
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL | SealFlags::WRITE;
        assert!(matches!(
            Region::import(memfd(1 << 40, seals), 1 << 30),
            Err(RegionError::TooLong { .. })
        ));
    }

    #[test]
    #[should_panic(expected = "may only be read")]
    fn imported_memory_is_not_written() {
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL | SealFlags::FUTURE_WRITE;
        let region = Region::import(memfd(4096, seals), 4096).unwrap();
        Lease::whole(region).write_at(0, (&b"x"[..]).into());
    }

    #[test]
    fn a_file_that_is_no_memfd_is_refused() {
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(
            Region::from_memfd(file),
            Err(RegionError::NotMemfd(_))
        ));
    }

    #[test]
    fn sealed_memory_cannot_be_resized_punched_or_mapped_for_writing_again() {
        let region = Region::with_backing(8192, Backing::Shmem).unwrap();
        let lease = Lease::whole(Arc::clone(&region));
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(region.as_fd(), punch, 0, 4096).unwrap();
        region.seal().unwrap();
        region.seal().expect("a second time changes nothing");
        region.populate().unwrap();
        let copy = region.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(
            Region::from_memfd(copy),
            Err(RegionError::Map { .. })
        ));
        assert!(rustix::fs::ftruncate(region.as_fd(), 0).is_err());
        assert!(rustix::fs::fallocate(region.as_fd(), punch, 0, 4096).is_err());
        // The mapping made before stays writable.
        lease.write_at(0, (&b"x"[..]).into());
    }

    #[test]
    fn a_guard_outlives_the_last_lease() {
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let alive = Arc::new(());
        region.guard(Box::new(Arc::clone(&alive))).unwrap();
        assert!(region.guard(Box::new(())).is_err());
        let lease = Lease::whole(region);
        assert_eq!(Arc::strong_count(&alive), 2);
        drop(lease);
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn pinned_pages_are_locked() {
        let locked = |region: &Region| {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let start = format!("{:x}-", region.as_ptr() as usize);
            let ours = maps.split_once(&format!("\n{start}")).unwrap().1;
            let line = ours
                .lines()
                .find(|line| line.starts_with("Locked:"))
                .unwrap();
            line.split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap()
        };
        let region = Region::with_backing(64 << 10, Backing::Shmem).unwrap();
        assert_eq!(locked(&region), 0);
        region.pin().unwrap();
        assert_eq!(locked(&region), 64);
    }
}
