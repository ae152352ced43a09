//! hugetlb limits that control groups put on this process.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::mount::unescape;
use crate::root::read_count;
use crate::{PageSize, Root};

/// The limit of one control group on one page size. The kernel charges a
/// page when it is first touched and kills with SIGBUS beyond the limit, so
/// it is looked at beforehand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CgroupLimit {
    /// The page size it bounds.
    pub size: PageSize,
    /// What may be used in bytes.
    pub max_bytes: u64,
    /// What is used now in bytes.
    pub used_bytes: u64,
    /// The file that holds the limit: where to raise it.
    pub file: PathBuf,
}

impl CgroupLimit {
    /// What may still be used, in bytes.
    pub fn left_bytes(&self) -> u64 {
        self.max_bytes.saturating_sub(self.used_bytes)
    }

    /// The tightest limit of this process's group and its ancestors for each
    /// of `sizes`; none where no group sets one.
    pub(crate) fn find_all(root: &Root, sizes: &[PageSize], mounts: &str) -> Vec<Self> {
        let groups = fs::read_to_string(root.path("/proc/self/cgroup")).unwrap_or_default();
        let Some((version, mount, group)) = hierarchy(mounts, &groups) else {
            return Vec::new();
        };
        let top = root.path(mount);
        let mut found = Vec::new();
        for &size in sizes {
            // In a container the path may be the host's: what is not there
            // is stepped over, up to the mount point.
            let tightest = Path::new(&group)
                .ancestors()
                .filter_map(|group| {
                    let group = group.strip_prefix("/").unwrap_or(group);
                    version.limit(&top.join(group), size)
                })
                .min_by_key(Self::left_bytes);
            found.extend(tightest);
        }
        found
    }
}

#[derive(Clone, Copy)]
enum Version {
    One,
    Two,
}

impl Version {
    fn limit(self, group: &Path, size: PageSize) -> Option<CgroupLimit> {
        let (max, used) = match self {
            Self::One => ("limit_in_bytes", "usage_in_bytes"),
            Self::Two => ("max", "current"),
        };
        let file = group.join(format!("hugetlb.{size}.{max}"));
        // "max" (version 2) and a number near 2^63 (version 1) mean no limit.
        let max_bytes = read_count(&file).ok().filter(|&max| max < 1 << 62)?;
        Some(CgroupLimit {
            size,
            max_bytes,
            used_bytes: read_count(&group.join(format!("hugetlb.{size}.{used}"))).unwrap_or(0),
            file,
        })
    }
}

/// The hierarchy that carries the hugetlb controller: its version, its mount
/// point, and this process's group in it. Version 1 is asked first: a
/// controller mounted there is not in the unified hierarchy.
fn hierarchy(mounts: &str, groups: &str) -> Option<(Version, String, String)> {
    let mount = |kind: &str, option: &str| {
        mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let &[_, path, found, options, ..] = fields.as_slice() else {
                return None;
            };
            let matches =
                found == kind && (option.is_empty() || options.split(',').any(|o| o == option));
            matches.then(|| unescape(path))
        })
    };
    let group = |controller: &str| {
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            controllers
                .split(',')
                .any(|c| c == controller)
                .then(|| path.to_owned())
        })
    };
    if let (Some(path), Some(group)) = (mount("cgroup", "hugetlb"), group("hugetlb")) {
        return Some((Version::One, path, group));
    }
    Some((Version::Two, mount("cgroup2", "")?, group("")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    #[test]
    fn takes_the_tightest_of_the_ancestors() {
        let fake = Fake::new();
        fake.write("/proc/self/cgroup", "0::/a/b/c\n");
        fake.write("/sys/fs/cgroup/a/hugetlb.2MB.max", "4194304\n");
        fake.write("/sys/fs/cgroup/a/hugetlb.2MB.current", "2097152\n");
        fake.write("/sys/fs/cgroup/a/b/hugetlb.2MB.max", "max\n");
        fake.write("/sys/fs/cgroup/a/b/c/hugetlb.2MB.max", "8388608\n");
        let mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let sizes = [PageSize::MB_2, PageSize::GB_1];
        let found = CgroupLimit::find_all(&fake.root(), &sizes, mounts);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].left_bytes(), 2 << 20);
        assert!(found[0].file.ends_with("a/hugetlb.2MB.max"));
    }

    #[test]
    fn reads_version_one() {
        let fake = Fake::new();
        fake.write("/proc/self/cgroup", "5:hugetlb:/jobs\n0::/\n");
        fake.write("/cg/hugetlb/jobs/hugetlb.1GB.limit_in_bytes", "1073741824");
        fake.write(
            "/cg/hugetlb/hugetlb.1GB.limit_in_bytes",
            "9223372036854771712",
        );
        let mounts = "cgroup /cg/hugetlb cgroup rw,hugetlb 0 0\nc /u cgroup2 rw 0 0\n";
        let found = CgroupLimit::find_all(&fake.root(), &[PageSize::GB_1], mounts);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].max_bytes, 1 << 30);
    }

    #[test]
    fn finds_nothing_where_nothing_is_mounted() {
        let fake = Fake::new();
        assert_eq!(
            CgroupLimit::find_all(&fake.root(), &[PageSize::MB_2], ""),
            []
        );
    }
}
