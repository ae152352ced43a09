//! Regions: memory made from a sealed memfd, so that it can be shared.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

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
    /// A region of zero bytes, or one too large for the address space.
    #[error("a region of {0} bytes cannot be made")]
    Size(u64),
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
    #[error("the memory file is not sealed against {0}: add the seal before passing it")]
    NotSealed(&'static str),
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
    file: OwnedFd,
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
        Self::map(file, len, backing)
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

    /// Maps a memory file that came from another process.
    ///
    /// It must already be sealed against shrinking and against further
    /// sealing changes; otherwise its owner could make our access fault.
    pub fn from_memfd(file: OwnedFd) -> Result<Arc<Self>, RegionError> {
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(RegionError::NotMemfd)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(RegionError::NotSealed("shrinking"));
        }
        let stat = rustix::fs::fstat(&file).map_err(RegionError::NotMemfd)?;
        let system = rustix::fs::fstatfs(&file).map_err(RegionError::NotMemfd)?;
        let backing = if system.f_type == libc::HUGETLBFS_MAGIC {
            Backing::HugeTlb {
                page_bytes: system.f_bsize as usize,
            }
        } else {
            Backing::Shmem
        };
        let len = usize::try_from(stat.st_size)
            .ok()
            .filter(|len| *len > 0)
            .ok_or(RegionError::Size(stat.st_size as u64))?;
        Self::map(file, len, backing)
    }

    fn map(file: OwnedFd, len: usize, backing: Backing) -> Result<Arc<Self>, RegionError> {
        let mapped = |source| RegionError::Map {
            len_bytes: len,
            backing,
            source,
        };
        // Populated now, so that no page fault falls into a transfer, and so
        // that a pool of huge pages too small is an error here, not a SIGBUS.
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, &file, 0) }
            .map_err(mapped)?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap without MAP_FIXED is not null");
        Ok(Arc::new(Self {
            base,
            len,
            backing,
            file,
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

    /// Seals the file so that nobody who holds its descriptor can change its
    /// size, punch holes into it, make new writable mappings or lift the seals.
    ///
    /// Mappings made before stay writable. Called after an application has
    /// mapped its arena.
    pub fn seal(&self) -> Result<(), rustix::io::Errno> {
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&self.file, seals)
    }
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

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let file = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        assert!(matches!(
            Region::from_memfd(file),
            Err(RegionError::NotSealed("shrinking"))
        ));
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
    fn sealed_files_refuse_new_writable_mappings() {
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        region.seal().unwrap();
        let copy = region.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(
            Region::from_memfd(copy),
            Err(RegionError::Map { .. })
        ));
        assert!(rustix::fs::ftruncate(region.as_fd(), 0).is_err());
    }
}
