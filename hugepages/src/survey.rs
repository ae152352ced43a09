//! What huge pages this machine has.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::root::{entries, read_count};
use crate::{CgroupLimit, Limit, Mount, PageSize, Root, Transparent};

/// The huge pages of this machine and what bounds their use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// One pool for each page size the kernel serves, smallest first; empty
    /// where it has no hugetlb.
    pub pools: Vec<Pool>,
    /// NUMA nodes that are online.
    pub nodes: Vec<u32>,
    /// Where hugetlbfs is mounted.
    pub mounts: Vec<Mount>,
    /// RLIMIT_MEMLOCK: what VFIO and io_uring may pin. Pages of the pools are
    /// not charged to it until they are pinned or locked.
    pub memlock: Option<Limit>,
    /// The tightest control-group limit on each size; none where there is none.
    pub cgroups: Vec<CgroupLimit>,
    /// The mode of transparent huge pages.
    pub transparent: Transparent,
}

/// All pages of one size. Counts are of pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// The size of each page.
    pub size: PageSize,
    /// Pages in the pool, surplus ones included.
    pub total: u64,
    /// Pages in the pool that no one has touched.
    pub free: u64,
    /// Free pages already promised to a mapping.
    pub promised: u64,
    /// Pages beyond the pool's set size, which go when their user does.
    pub surplus: u64,
    /// How many surplus pages the kernel may make when asked.
    pub overcommit: u64,
    /// The same by NUMA node.
    pub nodes: Vec<NodePool>,
}

/// The pages of one size on one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodePool {
    /// The node's number.
    pub node: u32,
    /// Pages in the pool, surplus ones included.
    pub total: u64,
    /// Pages no one has touched.
    pub free: u64,
    /// Pages beyond the pool's set size.
    pub surplus: u64,
}

impl Survey {
    /// The pool of pages of `size`.
    pub fn pool(&self, size: PageSize) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.size == size)
    }
}

impl Pool {
    /// Pages that a new mapping can have.
    pub fn usable(&self) -> u64 {
        self.free.saturating_sub(self.promised)
    }
}

/// Why the machine could not be surveyed.
#[derive(Debug, thiserror::Error)]
#[error("can't read {}: {source} (is /sys mounted and readable here?)", path.display())]
pub struct SurveyError {
    path: PathBuf,
    source: io::Error,
}

/// Reads what huge pages there are below `root`, and changes nothing. Needs
/// no privileges. What the kernel lacks is reported as absent.
pub fn survey(root: &Root) -> Result<Survey, SurveyError> {
    let nodes_dir = root.path(NODES);
    let node_dirs = list(&nodes_dir, "node")?
        .into_iter()
        .filter_map(|(number, path)| Some((number.parse().ok()?, path)))
        .collect::<Vec<(u32, PathBuf)>>();

    let mut pools = Vec::new();
    for (name, path) in list(&root.path(POOLS), "hugepages-")? {
        if let Some(size) = size_of(&name) {
            pools.push(pool(size, &path, &node_dirs)?);
        }
    }
    pools.sort_by_key(|pool| pool.size);

    let mut nodes: Vec<u32> = node_dirs.into_iter().map(|(node, _)| node).collect();
    nodes.sort_unstable();
    // These may be hidden in a sandbox; the pools are still worth reporting.
    let text = |path: &str| fs::read_to_string(root.path(path)).unwrap_or_default();
    let mounts = text("/proc/self/mounts");
    let sizes: Vec<PageSize> = pools.iter().map(|pool| pool.size).collect();
    Ok(Survey {
        mounts: Mount::parse_all(&mounts),
        memlock: Limit::memlock(&text("/proc/self/limits")),
        cgroups: CgroupLimit::find_all(root, &sizes, &mounts),
        transparent: Transparent::parse(&text("/sys/kernel/mm/transparent_hugepage/enabled"))
            .unwrap_or(Transparent::Absent),
        nodes,
        pools,
    })
}

/// Where the kernel keeps its pools.
pub(crate) const POOLS: &str = "/sys/kernel/mm/hugepages";
/// Where the kernel keeps its NUMA nodes.
pub(crate) const NODES: &str = "/sys/devices/system/node";

fn pool(size: PageSize, path: &Path, node_dirs: &[(u32, PathBuf)]) -> Result<Pool, SurveyError> {
    let mut nodes = Vec::new();
    for (node, node_dir) in node_dirs {
        let path = node_dir.join("hugepages").join(size.directory());
        if path.is_dir() {
            nodes.push(NodePool {
                node: *node,
                total: count(&path, "nr_hugepages")?,
                free: count(&path, "free_hugepages")?,
                surplus: count(&path, "surplus_hugepages")?,
            });
        }
    }
    nodes.sort_by_key(|pool| pool.node);
    Ok(Pool {
        size,
        total: count(path, "nr_hugepages")?,
        free: count(path, "free_hugepages")?,
        promised: count(path, "resv_hugepages")?,
        surplus: count(path, "surplus_hugepages")?,
        overcommit: count(path, "nr_overcommit_hugepages")?,
        nodes,
    })
}

fn size_of(directory_rest: &str) -> Option<PageSize> {
    PageSize::from_kib(directory_rest.strip_suffix("kB")?.parse().ok()?)
}

fn list(dir: &Path, prefix: &str) -> Result<Vec<(String, PathBuf)>, SurveyError> {
    entries(dir, prefix).map_err(|source| SurveyError {
        path: dir.to_owned(),
        source,
    })
}

fn count(dir: &Path, file: &str) -> Result<u64, SurveyError> {
    let path = dir.join(file);
    read_count(&path).map_err(|source| SurveyError { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    #[test]
    fn reports_pools_nodes_and_limits() {
        let fake = Fake::new();
        fake.pool(PageSize::MB_2, &[(0, 8), (1, 4)]);
        fake.pool(PageSize::GB_1, &[(0, 0), (1, 1)]);
        fake.write(
            "/proc/self/limits",
            "Max locked memory  65536  65536  bytes\n",
        );
        fake.write("/proc/self/mounts", "h /dev/hugepages hugetlbfs rw 0 0\n");
        fake.write(
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "[always] madvise never",
        );
        let survey = survey(&fake.root()).expect("the tree is whole");
        assert_eq!(survey.nodes, [0, 1]);
        assert_eq!(survey.pools.len(), 2);
        let small = survey.pool(PageSize::MB_2).expect("2MB is there");
        assert_eq!((small.total, small.free), (12, 12));
        assert_eq!(small.nodes[1].total, 4);
        assert_eq!(survey.pools[1].nodes[1].free, 1);
        assert_eq!(survey.mounts.len(), 1);
        assert_eq!(survey.memlock.and_then(|m| m.soft_bytes), Some(65536));
        assert_eq!(survey.transparent, Transparent::Always);
    }

    #[test]
    fn a_kernel_without_hugetlb_has_no_pools() {
        let survey = survey(&Fake::new().root()).expect("absence is no error");
        assert_eq!(survey.pools, []);
        assert_eq!(survey.transparent, Transparent::Absent);
    }

    #[test]
    fn a_broken_count_is_an_error_that_names_the_file() {
        let fake = Fake::new();
        fake.pool(PageSize::MB_2, &[(0, 8)]);
        fake.write(
            "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
            "plenty\n",
        );
        let error = survey(&fake.root()).expect_err("plenty is no count");
        assert!(error.to_string().contains("free_hugepages"), "{error}");
        assert!(error.to_string().contains("plenty"), "{error}");
    }
}
