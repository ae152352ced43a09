//! Adding pages to the kernel's pools, and giving exactly those back.
//!
//! The kernel takes a wish (`nr_hugepages`), fulfils what it can and reports
//! success either way, so every change is read back. There is no atomic "add":
//! changes by Genie are serialised with a lock on the pool's own file, and
//! other writers are not expected.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::root::{entries, read_count};
use crate::survey::{NODES, POOLS};
use crate::{PageSize, Root};

/// How long another process may hold a pool's lock. Reserving tens of
/// gigabytes takes the kernel a few seconds.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// Pages that were added to the pools, given back by [`Reservation::release`]
/// or, as far as that works, on drop.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its pages back"]
pub struct Reservation {
    root: Root,
    grant: Grant,
}

/// What a reservation added, to be written down where it must outlive the
/// process that made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The size of each page.
    pub size: PageSize,
    /// How many pages were added on each node; `None` is a kernel without
    /// NUMA nodes.
    pub shares: Vec<(Option<u32>, u64)>,
}

impl Grant {
    /// How many pages were added in all.
    pub fn pages(&self) -> u64 {
        self.shares.iter().map(|(_, pages)| pages).sum()
    }
}

/// What giving pages back did. Counts are of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Pages that are ordinary memory again.
    pub freed: u64,
    /// Pages that some process still uses; each becomes ordinary memory when
    /// its last user lets go.
    pub in_use: u64,
    /// Pages that someone else had taken out of the pool already.
    pub missing: u64,
}

/// Adds `pages` pages of `size` to the kernel's pool, on `node` or wherever
/// the kernel puts them, and returns them as a [`Reservation`]. All or
/// nothing: a short reservation is undone and is an error. Needs root.
pub fn reserve(
    root: &Root,
    size: PageSize,
    pages: u64,
    node: Option<u32>,
) -> Result<Reservation, ReserveError> {
    let file = pool_file(root, size, node)?;
    let lock = lock(&pool_file(root, size, None)?)?;
    let wanted_bytes = pages
        .checked_mul(size.bytes())
        .ok_or(ReserveError::Overflow { size, pages })?;
    let short = |possible, cause| ReserveError::Short {
        size,
        wanted: pages,
        possible,
        node,
        cause,
    };

    // Asking for more than there is would make the kernel reclaim everyone's
    // memory before it gives up, so that is refused first.
    let available_bytes = available_bytes(root, node)?;
    if wanted_bytes > available_bytes {
        let possible = available_bytes / size.bytes();
        return Err(short(possible, Shortage::Memory { available_bytes }));
    }

    let before = persistent(&file)?;
    let before_by_node = by_node(root, size)?;
    let target = before + pages;
    (root.set)(&file, target).map_err(|source| ReserveError::set(&file, target, source))?;
    let gained = persistent(&file)?.saturating_sub(before);
    let grant = Grant {
        size,
        shares: shares(&before_by_node, &by_node(root, size)?, node, gained),
    };
    drop(lock);

    let reservation = Reservation {
        root: root.clone(),
        grant,
    };
    if gained < pages {
        reservation.release().map_err(|error| match error {
            ReleaseError::Pool(error) => error,
        })?;
        return Err(short(gained, Shortage::Fragmented));
    }
    Ok(reservation)
}

impl Reservation {
    /// How many pages were added, of which size and where.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// How many pages were added.
    pub fn pages(&self) -> u64 {
        self.grant.pages()
    }

    /// Leaves the pages in the pool and returns what [`Reservation::adopt`]
    /// needs to give them back later, perhaps in another process.
    pub fn keep(mut self) -> Grant {
        let kept = self.grant.clone();
        self.grant.shares.clear();
        kept
    }

    /// Takes over pages that an earlier reservation left in the pool.
    pub fn adopt(root: &Root, grant: Grant) -> Self {
        Self {
            root: root.clone(),
            grant,
        }
    }

    /// Takes out of the pools exactly the pages that were added. Pages in
    /// use are not taken from their users: they go when the users do. On an
    /// error, the shares not yet given back are tried again on drop.
    pub fn release(mut self) -> Result<Released, ReleaseError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<Released, ReleaseError> {
        let size = self.grant.size;
        let mut released = Released::default();
        if self.grant.shares.is_empty() {
            return Ok(released);
        }
        let _lock = lock(&pool_file(&self.root, size, None)?)?;
        while let Some(&(node, pages)) = self.grant.shares.last() {
            let file = pool_file(&self.root, size, node)?;
            let (total, persistent_before) = (count(&file)?, persistent(&file)?);
            let target = persistent_before.saturating_sub(pages);
            (self.root.set)(&file, target)
                .map_err(|source| ReserveError::set(&file, target, source))?;
            let taken = persistent_before - target;
            let freed = total.saturating_sub(count(&file)?).min(taken);
            released.freed += freed;
            released.in_use += taken - freed;
            released.missing += pages - taken;
            self.grant.shares.pop();
        }
        Ok(released)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // A drop has nobody to tell; who cares calls `release`.
        let _ = self.give_back();
    }
}

/// Why the kernel's pool came out short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// There is not that much memory. Nothing was changed.
    Memory {
        /// What could be had without swapping, in bytes.
        available_bytes: u64,
    },
    /// There is enough memory, but not in free pieces of this size.
    Fragmented,
}

/// Why pages could not be reserved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// The kernel serves no pages of this size.
    #[error(
        "this kernel has no huge pages of {size}, only of: {}",
        list(supported)
    )]
    UnsupportedSize {
        /// What was asked for.
        size: PageSize,
        /// What there is.
        supported: Vec<PageSize>,
    },
    /// There is no such NUMA node.
    #[error("there is no NUMA node {node} here, only: {}", list(nodes))]
    NoSuchNode {
        /// What was asked for.
        node: u32,
        /// What there is.
        nodes: Vec<u32>,
    },
    /// The count in bytes does not fit 64 bits.
    #[error("{pages} pages of {size} are more than any machine has; ask for fewer")]
    Overflow {
        /// The size of each page.
        size: PageSize,
        /// How many were asked for.
        pages: u64,
    },
    /// Fewer pages could be had; those were given back.
    #[error(
        "only {possible} of {wanted} pages of {size} could be reserved{}: {}",
        node.map(|node| format!(" on NUMA node {node}")).unwrap_or_default(),
        remedy(*cause, *size, *wanted, *possible)
    )]
    Short {
        /// The size of each page.
        size: PageSize,
        /// How many were asked for.
        wanted: u64,
        /// How many could be had.
        possible: u64,
        /// The node they were to be on.
        node: Option<u32>,
        /// Why no more.
        cause: Shortage,
    },
    /// This process may not change the pool.
    #[error("not allowed to change {}: run as root: echo {target} > {}", path.display(), path.display())]
    NotPermitted {
        /// The pool's file.
        path: PathBuf,
        /// The count that would be right.
        target: u64,
        /// The kernel's word.
        source: io::Error,
    },
    /// `/sys` is mounted read-only, as in most containers.
    #[error("{} is read-only here: run on the host, as root: echo {target} > {}", path.display(), path.display())]
    ReadOnly {
        /// The pool's file.
        path: PathBuf,
        /// The count that would be right.
        target: u64,
        /// The kernel's word.
        source: io::Error,
    },
    /// Another process is changing the same pool for long.
    #[error("another process holds the lock on {} (see: fuser {}); try again when it is done", path.display(), path.display())]
    Busy {
        /// The pool's file.
        path: PathBuf,
    },
    /// A file of the kernel could not be read or written.
    #[error("{}: {source} (is /sys mounted and readable here?)", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

impl ReserveError {
    fn set(path: &Path, target: u64, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted {
                path,
                target,
                source,
            },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly {
                path,
                target,
                source,
            },
            _ => Self::Io { path, source },
        }
    }
}

/// Why pages could not be given back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// The pool could not be changed.
    #[error("huge pages were not given back: {0}")]
    Pool(#[from] ReserveError),
}

fn remedy(cause: Shortage, size: PageSize, wanted: u64, possible: u64) -> String {
    match cause {
        Shortage::Memory { available_bytes } => format!(
            "{} MB of memory are available; ask for at most {possible} pages, or free some memory",
            available_bytes / 1_000_000
        ),
        Shortage::Fragmented if size >= PageSize::GB_1 => format!(
            "memory is in too small pieces; reserve at boot, with \
             hugepagesz={}G hugepages={wanted} on the kernel's command line",
            size.bytes() >> 30
        ),
        Shortage::Fragmented => "memory is in too small pieces; as root: \
             echo 1 > /proc/sys/vm/compact_memory, then try again"
            .to_owned(),
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    if items.is_empty() {
        return "none".to_owned();
    }
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(", ")
}

/// The file that sets the pool of `size`, of the whole machine or of `node`.
fn pool_file(root: &Root, size: PageSize, node: Option<u32>) -> Result<PathBuf, ReserveError> {
    let global = root.path(POOLS).join(size.directory());
    if !global.is_dir() {
        let mut supported: Vec<PageSize> = names(&root.path(POOLS), "hugepages-")?
            .iter()
            .filter_map(|name| PageSize::from_kib(name.strip_suffix("kB")?.parse().ok()?))
            .collect();
        supported.sort();
        return Err(ReserveError::UnsupportedSize { size, supported });
    }
    let Some(node) = node else {
        return Ok(global.join("nr_hugepages"));
    };
    let of_node = node_dir(root, node, size);
    if !of_node.is_dir() {
        let nodes = node_numbers(root)?;
        return Err(ReserveError::NoSuchNode { node, nodes });
    }
    Ok(of_node.join("nr_hugepages"))
}

fn node_dir(root: &Root, node: u32, size: PageSize) -> PathBuf {
    root.path(format!("{NODES}/node{node}/hugepages"))
        .join(size.directory())
}

fn names(dir: &Path, prefix: &str) -> Result<Vec<String>, ReserveError> {
    let found = entries(dir, prefix).map_err(|source| io_error(dir, source))?;
    Ok(found.into_iter().map(|(name, _)| name).collect())
}

fn node_numbers(root: &Root) -> Result<Vec<u32>, ReserveError> {
    let mut nodes: Vec<u32> = names(&root.path(NODES), "node")?
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    nodes.sort_unstable();
    Ok(nodes)
}

/// The set size of every node's pool: what is there without surplus pages.
fn by_node(root: &Root, size: PageSize) -> Result<Vec<(u32, u64)>, ReserveError> {
    node_numbers(root)?
        .into_iter()
        .map(|node| (node, node_dir(root, node, size)))
        .filter(|(_, dir)| dir.is_dir())
        .map(|(node, dir)| Ok((node, persistent(&dir.join("nr_hugepages"))?)))
        .collect()
}

/// Splits `gained` pages over the nodes that grew between two readings.
fn shares(
    before: &[(u32, u64)],
    after: &[(u32, u64)],
    node: Option<u32>,
    gained: u64,
) -> Vec<(Option<u32>, u64)> {
    let mut left = gained;
    let mut shares = Vec::new();
    for &(number, now) in after {
        let then = before
            .iter()
            .find(|(before, _)| *before == number)
            .map_or(0, |(_, count)| *count);
        let grown = now.saturating_sub(then).min(left);
        if grown > 0 && node.is_none_or(|node| node == number) {
            shares.push((Some(number), grown));
            left -= grown;
        }
    }
    if left > 0 {
        shares.push((node, left));
    }
    shares
}

/// What may be had without swapping: of the whole machine, or an estimate of
/// the same for one node, whose file has no `MemAvailable`.
fn available_bytes(root: &Root, node: Option<u32>) -> Result<u64, ReserveError> {
    let (path, fields): (_, &[&str]) = match node {
        None => (root.path("/proc/meminfo"), &["MemAvailable:"]),
        Some(node) => (
            root.path(format!("{NODES}/node{node}/meminfo")),
            &[
                "MemFree:",
                "Active(file):",
                "Inactive(file):",
                "SReclaimable:",
            ],
        ),
    };
    let text = fs::read_to_string(&path).map_err(|source| io_error(&path, source))?;
    let kib: u64 = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            words.find(|word| fields.contains(word))?;
            words.next()?.parse::<u64>().ok()
        })
        .sum();
    Ok(kib.saturating_mul(1024))
}

fn count(nr_file: &Path) -> Result<u64, ReserveError> {
    read_count(nr_file).map_err(|source| io_error(nr_file, source))
}

fn persistent(nr_file: &Path) -> Result<u64, ReserveError> {
    let surplus = count(&nr_file.with_file_name("surplus_hugepages"))?;
    Ok(count(nr_file)?.saturating_sub(surplus))
}

fn io_error(path: &Path, source: io::Error) -> ReserveError {
    ReserveError::Io {
        path: path.to_owned(),
        source,
    }
}

fn lock(path: &Path) -> Result<File, ReserveError> {
    let file = File::open(path).map_err(|source| io_error(path, source))?;
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(io_error(path, source)),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                return Err(ReserveError::Busy {
                    path: path.to_owned(),
                });
            }
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, node_pool};

    const GLOBAL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    const SIZE: PageSize = PageSize::MB_2;

    fn total(fake: &Fake) -> u64 {
        fake.count(&format!("{GLOBAL}/nr_hugepages"))
    }

    #[test]
    fn adds_to_what_is_there_and_gives_exactly_that_back() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 5), (1, 3)]);
        let ours = reserve(&fake.root(), SIZE, 10, None).expect("there is room");
        assert_eq!(ours.pages(), 10);
        assert_eq!(total(&fake), 18);
        // Someone else reserves meanwhile, on one node.
        let theirs = reserve(&fake.root(), SIZE, 7, Some(1)).expect("there is room");
        assert_eq!(theirs.grant().shares, [(Some(1), 7)]);
        let released = ours.release().expect("the pool can be set");
        assert_eq!(
            (released.freed, released.in_use, released.missing),
            (10, 0, 0)
        );
        let of_node = |node| fake.count(&format!("{}/nr_hugepages", node_pool(SIZE, node)));
        assert_eq!((of_node(0), of_node(1)), (5, 10));
        drop(theirs);
        assert_eq!((of_node(0), of_node(1), total(&fake)), (5, 3, 8));
    }

    #[test]
    fn a_short_reservation_says_how_many_and_is_undone() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 2), (1, 0)]);
        fake.bound(SIZE, 0, 4);
        fake.bound(SIZE, 1, 3);
        let error = reserve(&fake.root(), SIZE, 10, None).expect_err("5 can be had");
        assert!(
            matches!(
                error,
                ReserveError::Short {
                    possible: 5,
                    wanted: 10,
                    cause: Shortage::Fragmented,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("compact_memory"), "{error}");
        assert_eq!(total(&fake), 2);
    }

    #[test]
    fn more_than_the_memory_is_refused_before_anything_is_changed() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 1)]);
        fake.write(
            "/proc/meminfo",
            "MemFree: 1 kB\nMemAvailable:    20480 kB\n",
        );
        let error = reserve(&fake.root(), SIZE, 11, None).expect_err("20 MiB hold 10");
        assert!(
            matches!(error, ReserveError::Short { possible: 10, .. }),
            "{error:?}"
        );
        assert_eq!(total(&fake), 1);
        let error = reserve(&fake.root(), SIZE, u64::MAX, None).expect_err("too many");
        assert!(matches!(error, ReserveError::Overflow { .. }), "{error:?}");
    }

    #[test]
    fn pages_in_use_are_left_to_their_users_and_leave_with_them() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 0)]);
        let ours = reserve(&fake.root(), SIZE, 8, Some(0)).expect("there is room");
        fake.touch(SIZE, 0, 3);
        let released = ours.release().expect("the pool can be set");
        assert_eq!(
            (released.freed, released.in_use, released.missing),
            (5, 3, 0)
        );
        assert_eq!(fake.count(&format!("{GLOBAL}/surplus_hugepages")), 3);

        // The surplus is not ours a second time.
        let again = reserve(&fake.root(), SIZE, 4, Some(0)).expect("there is room");
        assert_eq!(again.pages(), 4);
        let released = again.release().expect("the pool can be set");
        assert_eq!(released.missing, 0);
        assert_eq!(fake.count(&format!("{GLOBAL}/surplus_hugepages")), 3);
    }

    #[test]
    fn what_others_took_out_is_reported_missing() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 0)]);
        let ours = reserve(&fake.root(), SIZE, 8, None).expect("there is room");
        let file = fake.root().path(format!("{GLOBAL}/nr_hugepages"));
        (fake.root().set)(&file, 2).expect("the tree can be written");
        let released = ours.release().expect("the pool can be set");
        assert_eq!(
            (released.freed, released.in_use, released.missing),
            (2, 0, 6)
        );
    }

    #[test]
    fn a_kept_grant_is_given_back_by_who_adopts_it() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 1)]);
        let grant = reserve(&fake.root(), SIZE, 4, None)
            .expect("there is room")
            .keep();
        assert_eq!(total(&fake), 5);
        let released = Reservation::adopt(&fake.root(), grant).release();
        assert_eq!(released.expect("the pool can be set").freed, 4);
        assert_eq!(total(&fake), 1);
    }

    #[test]
    fn what_is_not_there_is_named_with_what_is() {
        let fake = Fake::new();
        fake.pool(SIZE, &[(0, 1), (3, 0)]);
        let error = reserve(&fake.root(), PageSize::GB_1, 1, None).expect_err("no 1GB pool");
        assert!(error.to_string().ends_with("only of: 2MB"), "{error}");
        let error = reserve(&fake.root(), SIZE, 1, Some(2)).expect_err("no node 2");
        assert!(error.to_string().ends_with("only: 0, 3"), "{error}");
    }

    #[test]
    fn refused_writes_say_what_to_type() {
        for (kind, expected) in [
            (io::ErrorKind::PermissionDenied, "run as root: echo 9 > "),
            (
                io::ErrorKind::ReadOnlyFilesystem,
                "run on the host, as root: echo 9 > ",
            ),
        ] {
            let error = ReserveError::set(Path::new("/x/nr_hugepages"), 9, kind.into());
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_kernel_without_numa_has_one_share() {
        assert_eq!(shares(&[], &[], None, 4), [(None, 4)]);
    }
}
