//! hugetlbfs mounts.

use std::path::PathBuf;

use serde::Serialize;

use crate::PageSize;

/// A mounted hugetlbfs. Genie needs none (its arenas are memfds); DPDK
/// without `--in-memory`, and other programs, do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where it is mounted.
    pub path: PathBuf,
    /// The page size it serves; `None` is the kernel's default size.
    pub size: Option<PageSize>,
}

impl Mount {
    /// Finds the hugetlbfs lines of `/proc/self/mounts`.
    pub(crate) fn parse_all(mounts: &str) -> Vec<Self> {
        mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                let (_source, path) = (fields.next()?, fields.next()?);
                let (kind, options) = (fields.next()?, fields.next()?);
                (kind == "hugetlbfs").then(|| Self {
                    path: PathBuf::from(unescape(path)),
                    size: options
                        .split(',')
                        .find_map(|option| option.strip_prefix("pagesize=")?.parse().ok()),
                })
            })
            .collect()
    }
}

/// Undoes the octal escapes for space, tab, newline and backslash in
/// `/proc/self/mounts` (proc_pid_mounts(5)).
pub(crate) fn unescape(text: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"]
        .iter()
        .fold(text.to_owned(), |text, escape| {
            text.replace(&escape[..4], &escape[4..])
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_hugetlbfs_among_other_mounts() {
        let mounts = "proc /proc proc rw 0 0\n\
             none /mnt/huge\\0401g hugetlbfs rw,relatime,pagesize=1024M 0 0\n\
             hugetlbfs /dev/hugepages hugetlbfs rw,relatime 0 0\n\
             hugetlbfs\n";
        let found = Mount::parse_all(mounts);
        assert_eq!(
            found,
            [
                Mount {
                    path: "/mnt/huge 1g".into(),
                    size: Some(PageSize::GB_1)
                },
                Mount {
                    path: "/dev/hugepages".into(),
                    size: None
                }
            ]
        );
    }
}
