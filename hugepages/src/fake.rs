//! A tree of plain files that stands for `/`, with a small model of the
//! kernel's pools behind it. Tests only.

use std::fs;
use std::io;
use std::path::Path;

use crate::root::read_count;
use crate::survey::{NODES, POOLS};
use crate::{PageSize, Root};

/// A temporary tree; it goes when this is dropped.
pub(crate) struct Fake {
    dir: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        Self { dir }
    }

    /// The root whose pools behave like the kernel's: see [`set`].
    pub(crate) fn root(&self) -> Root {
        Root {
            set,
            ..Root::at(self.dir.path())
        }
    }

    pub(crate) fn write(&self, absolute: &str, text: &str) {
        let path = self.root().path(absolute);
        let parent = path.parent().expect("an absolute path has a parent");
        fs::create_dir_all(parent).expect("the tree can be extended");
        fs::write(path, text).expect("the tree can be written");
    }

    pub(crate) fn count(&self, absolute: &str) -> u64 {
        read_count(&self.root().path(absolute)).expect("the count is there")
    }

    /// A pool with that many free pages on each node, 64 GiB of memory on
    /// each, and no bound on further pages.
    pub(crate) fn pool(&self, size: PageSize, nodes: &[(u32, u64)]) {
        let total: u64 = nodes.iter().map(|(_, pages)| pages).sum();
        let global = format!("{POOLS}/{}", size.directory());
        self.counts(&global, total);
        self.write(&format!("{global}/resv_hugepages"), "0\n");
        self.write(&format!("{global}/nr_overcommit_hugepages"), "0\n");
        self.write("/proc/meminfo", "MemAvailable:   67108864 kB\n");
        for (node, pages) in nodes {
            self.counts(&node_pool(size, *node), *pages);
            self.write(
                &format!("{NODES}/node{node}/meminfo"),
                &format!("Node {node} MemFree:   67108864 kB\n"),
            );
        }
    }

    /// At most this many pages can be had on each node: fragmentation.
    pub(crate) fn bound(&self, size: PageSize, node: u32, pages: u64) {
        self.write(
            &format!("{}/bound", node_pool(size, node)),
            &pages.to_string(),
        );
    }

    /// Marks pages of a node as in use.
    pub(crate) fn touch(&self, size: PageSize, node: u32, pages: u64) {
        let dir = node_pool(size, node);
        let free = self.count(&format!("{dir}/free_hugepages"));
        self.write(
            &format!("{dir}/free_hugepages"),
            &(free - pages).to_string(),
        );
        total_up(&self.root().path(format!("{POOLS}/{}", size.directory())));
    }

    fn counts(&self, dir: &str, pages: u64) {
        for (file, count) in [
            ("nr_hugepages", pages),
            ("free_hugepages", pages),
            ("surplus_hugepages", 0),
        ] {
            self.write(&format!("{dir}/{file}"), &format!("{count}\n"));
        }
    }
}

pub(crate) fn node_pool(size: PageSize, node: u32) -> String {
    format!("{NODES}/node{node}/hugepages/{}", size.directory())
}

/// What the kernel does when a count is written (`set_max_huge_pages` in
/// mm/hugetlb.c): it moves towards the count one page at a time, over all
/// nodes or on the one named, stops silently where memory gives out, and
/// turns pages that are in use into surplus ones instead of taking them.
fn set(path: &Path, target: u64) -> io::Result<()> {
    if !path.exists() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let dir = path.parent().expect("the file is in a pool's directory");
    let name = dir.file_name().expect("a pool's directory has a name");
    let of_node = dir
        .parent()
        .and_then(Path::parent)
        .is_some_and(|node| node.join("meminfo").exists());
    let top = dir
        .ancestors()
        .find(|a| a.ends_with("sys"))
        .expect("pools are below /sys");
    let global = top.join("kernel/mm/hugepages").join(name);
    if of_node {
        move_node(dir, target);
    } else {
        let mut nodes: Vec<_> = crate::root::entries(&top.join("devices/system/node"), "node")?
            .into_iter()
            .map(|(_, node)| node.join("hugepages").join(name))
            .collect();
        nodes.sort_by_key(|node| persistent(node));
        let mut left = target as i64 - nodes.iter().map(|n| persistent(n)).sum::<i64>();
        // Even shares, then whatever is left wherever it fits.
        let share = left / nodes.len() as i64;
        for wanted in [share, i64::MAX] {
            for node in &nodes {
                let before = persistent(node);
                let step = if wanted == i64::MAX { left } else { wanted };
                move_node(node, (before + step).max(0) as u64);
                left -= persistent(node) - before;
            }
        }
    }
    total_up(&global);
    Ok(())
}

fn read(dir: &Path, file: &str) -> i64 {
    read_count(&dir.join(file)).expect("the count is there") as i64
}

fn persistent(dir: &Path) -> i64 {
    read(dir, "nr_hugepages") - read(dir, "surplus_hugepages")
}

fn move_node(dir: &Path, target: u64) {
    let (nr, free) = (read(dir, "nr_hugepages"), read(dir, "free_hugepages"));
    let bound = read_count(&dir.join("bound")).map_or(i64::MAX, |bound| bound as i64);
    let target = (target as i64).min(bound.max(persistent(dir)));
    let in_use = nr - free;
    let new_nr = target.max(in_use);
    for (file, count) in [
        ("nr_hugepages", new_nr),
        ("free_hugepages", new_nr - in_use),
        ("surplus_hugepages", new_nr - target),
    ] {
        fs::write(dir.join(file), format!("{count}\n")).expect("the tree can be written");
    }
}

fn total_up(global: &Path) {
    let name = global.file_name().expect("a pool's directory has a name");
    let top = global.ancestors().nth(4).expect("pools are below /sys");
    let nodes = crate::root::entries(&top.join("devices/system/node"), "node")
        .expect("the nodes can be listed");
    for file in ["nr_hugepages", "free_hugepages", "surplus_hugepages"] {
        let sum: i64 = nodes
            .iter()
            .map(|(_, node)| read(&node.join("hugepages").join(name), file))
            .sum();
        fs::write(global.join(file), format!("{sum}\n")).expect("the tree can be written");
    }
}
