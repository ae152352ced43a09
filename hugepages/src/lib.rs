//! Huge pages of this machine: what there is, and reserving more at run time.
//!
//! [`survey`] reads sizes, NUMA nodes, mounts and limits and changes nothing.
//! [`reserve`] adds pages to the kernel's pool and returns a [`Reservation`],
//! which gives back exactly what it added. [`Survey::choose`] says which
//! pages an arena of a given size can stand on, and why not on better ones.
//! The agent, the `genie` binary and the tests call it; nothing here is on a
//! hot path.
//!
//! Everything is read below a [`Root`], so the tests run over a tree of plain
//! files, without privileges. The guide for operators is `docs/hugepages.md`;
//! the kernel's own word is `Documentation/admin-guide/mm/hugetlbpage.rst`.

#![forbid(unsafe_code)]

mod backing;
mod cgroup;
mod limits;
mod mount;
mod page_size;
mod reserve;
mod root;
mod survey;

#[cfg(test)]
mod fake;

pub use backing::{Backing, Choice};
pub use cgroup::CgroupLimit;
pub use limits::{Limit, Transparent};
pub use mount::Mount;
pub use page_size::{PageSize, ParsePageSizeError};
pub use reserve::{Grant, ReleaseError, Released, Reservation, ReserveError, Shortage, reserve};
pub use root::Root;
pub use survey::{NodePool, Pool, Survey, SurveyError, survey};
