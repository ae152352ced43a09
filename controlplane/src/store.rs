//! The tensor store: what this agent keeps, by name, within a budget of bytes.
//!
//! Batches of tensors come in through [`Store::commit`], all or none, and only
//! once every byte was verified. The invariant: *memory is counted from before
//! it is allocated until the last transfer that uses it has let go*, so that
//! the budget cannot be overrun by more than the rest of a page, and a reader
//! never sees half a batch.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use genie_dataplane::memory::{Lease, Region, RegionError};
use serde::{Deserialize, Serialize};

use crate::tensor::{
    Metadata, TensorError, TensorInfo, check_name, deserialize_shape, metadata_bytes,
};

/// Bytes that may be allocated, shared by all who allocate from it.
#[derive(Clone, Debug)]
pub struct Budget(Arc<BudgetInner>);

#[derive(Debug)]
struct BudgetInner {
    name: &'static str,
    flag: &'static str,
    limit: u64,
    used: AtomicU64,
}

/// A region that counts against a budget for as long as anybody holds it.
#[derive(Debug)]
pub struct Allocation {
    region: Arc<Region>,
    /// Why it is not on huge pages, if it is not.
    pub fallback: Option<RegionError>,
    _charge: Charge,
}

/// Bytes that count against a budget for as long as this is held.
#[derive(Debug)]
pub struct Charge {
    budget: Budget,
    bytes: u64,
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
    /// The machine has not that much.
    #[error("the machine has no memory for {wanted} bytes: {source}")]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Why.
        source: RegionError,
    },
}

/// Who put a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// A program on this host, by user id.
    User(u32),
    /// A peer's agent, by node name.
    Peer(String),
}

/// A tensor that is kept. Cloning it holds its memory.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What it is; the name is the one within its prefix.
    pub info: TensorInfo,
    /// Where its bytes are.
    pub lease: Lease,
    /// Keeps the bytes counted.
    pub allocation: Arc<Allocation>,
    /// Who put it.
    pub owner: Owner,
}

/// A stored tensor, as shown by `ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Full name, `PREFIX/NAME`.
    pub name: String,
    /// Type of the elements, as safetensors spells it.
    pub dtype: String,
    /// Dimensions.
    #[serde(deserialize_with = "deserialize_shape")]
    pub shape: Vec<u64>,
    /// Length in bytes.
    pub bytes: u64,
    /// Who put it.
    pub owner: Owner,
}

/// Why a batch was not taken.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommitError {
    /// Another prefix already has a tensor of this full name.
    #[error(
        "{name:?} already exists under the prefix {prefix:?}; \
         put under another prefix or remove it with 'genie rm {name}'"
    )]
    Taken {
        /// Full name.
        name: String,
        /// Whose it is.
        prefix: String,
    },
}

/// Nothing of that name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("nothing is stored under {name:?}; 'genie ls' shows what is")]
pub struct NotFound {
    /// What was asked for.
    pub name: String,
}

/// How full the store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tensors kept.
    pub tensors: u64,
    /// Bytes of memory allocated for them, their descriptions, and those on
    /// their way in.
    pub used_bytes: u64,
    /// The limit.
    pub limit_bytes: u64,
}

/// The tensors of this agent. Clones refer to the same store.
#[derive(Clone, Debug)]
pub struct Store {
    budget: Budget,
    contents: Arc<Mutex<Contents>>,
}

#[derive(Debug, Default)]
struct Contents {
    /// By prefix as it was put.
    sets: BTreeMap<String, Set>,
    /// Full name to prefix.
    names: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Set {
    /// In the order they were put.
    tensors: Vec<Stored>,
    metadata: Option<Metadata>,
    /// For names, shapes and metadata.
    charge: Charge,
}

impl Budget {
    /// A budget of `limit` bytes, called `name` in errors and set by `flag`.
    pub fn new(name: &'static str, flag: &'static str, limit: u64) -> Self {
        Self(Arc::new(BudgetInner {
            name,
            flag,
            limit,
            used: AtomicU64::new(0),
        }))
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.0.limit
    }

    /// Allocates a region of at least `bytes`, all pages present. Blocks while
    /// the kernel clears pages: not for asynchronous code.
    pub fn allocate(&self, bytes: u64) -> Result<Arc<Allocation>, AllocateError> {
        let wanted = bytes.max(1);
        let mut charge = self.charge(wanted)?;
        let memory = |source| AllocateError::Memory { wanted, source };
        let len = usize::try_from(wanted).map_err(|_| memory(RegionError::Size(wanted)))?;
        let (region, fallback) = Region::allocate(len).map_err(memory)?;
        // Whole pages were taken; count them too, without refusing over a rest.
        let rest = (region.len() as u64).saturating_sub(wanted);
        self.0.used.fetch_add(rest, Ordering::Relaxed);
        charge.bytes += rest;
        Ok(Arc::new(Allocation {
            region,
            fallback,
            _charge: charge,
        }))
    }

    /// Counts memory that is allocated elsewhere.
    pub fn charge(&self, bytes: u64) -> Result<Charge, AllocateError> {
        let BudgetInner {
            name,
            flag,
            limit,
            used,
        } = &*self.0;
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| used <= limit)
        })
        .map(|_| Charge {
            budget: self.clone(),
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
        let mut more = self.budget.charge(bytes.saturating_sub(self.bytes))?;
        self.bytes += more.bytes;
        more.bytes = 0;
        Ok(())
    }

    /// Parts with up to `bytes`.
    fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self {
            budget: self.budget.clone(),
            bytes,
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.0.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Allocation {
    /// The memory.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// A hold on `len` bytes at `offset`.
    ///
    /// # Panics
    /// If that lies outside: the caller laid the tensors out in it.
    pub fn lease(&self, offset: u64, len: u64) -> Lease {
        Lease::new(Arc::clone(&self.region), offset, len).expect("laid out within the region")
    }
}

impl Store {
    /// An empty store.
    pub fn new(limit_bytes: u64) -> Self {
        let budget = Budget::new("store", "--store-bytes", limit_bytes);
        Self {
            budget,
            contents: Arc::default(),
        }
    }

    /// What memory for new tensors is allocated from.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Refuses early what [`Store::commit`] would refuse.
    pub fn check(&self, prefix: &str, tensors: &[TensorInfo]) -> Result<(), CommitError> {
        self.lock().check(prefix, tensors.iter())
    }

    /// Keeps a batch under `prefix`, in place of what was put there before.
    ///
    /// `charge` is for its [`description_bytes`].
    pub fn commit(
        &self,
        prefix: &str,
        tensors: Vec<Stored>,
        metadata: Option<Metadata>,
        charge: Charge,
    ) -> Result<(), CommitError> {
        let mut contents = self.lock();
        contents.check(prefix, tensors.iter().map(|tensor| &tensor.info))?;
        let replaced = contents.take_set(prefix);
        for tensor in &tensors {
            contents
                .names
                .insert(full_name(prefix, &tensor.info.name), prefix.to_owned());
        }
        let set = Set {
            tensors,
            metadata,
            charge,
        };
        contents.sets.insert(prefix.to_owned(), set);
        drop(contents);
        // Unmapping a large region takes a while; not under the lock.
        drop(replaced);
        Ok(())
    }

    /// The tensors under `prefix`, with names relative to it, and its metadata.
    ///
    /// A prefix that was put comes back exactly; one above several prefixes
    /// gives all of their tensors and no metadata.
    pub fn fetch(&self, prefix: &str) -> Result<(Vec<Stored>, Option<Metadata>), NotFound> {
        let contents = self.lock();
        if let Some(set) = contents.sets.get(prefix) {
            return Ok((set.tensors.clone(), set.metadata.clone()));
        }
        let below = format!("{prefix}/");
        let mut tensors = Vec::new();
        for (set_prefix, set) in contents.sets.range(below.clone()..) {
            let Some(rest) = set_prefix.strip_prefix(&below) else {
                break;
            };
            tensors.extend(set.tensors.iter().cloned().map(|mut tensor| {
                tensor.info.name = full_name(rest, &tensor.info.name);
                tensor
            }));
        }
        if tensors.is_empty() {
            return Err(NotFound {
                name: prefix.to_owned(),
            });
        }
        Ok((tensors, None))
    }

    /// All tensors, by full name.
    pub fn list(&self) -> Vec<Listed> {
        let contents = self.lock();
        let mut listed: Vec<Listed> = contents
            .sets
            .iter()
            .flat_map(|(prefix, set)| set.tensors.iter().map(move |tensor| tensor.listed(prefix)))
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// Removes the tensor of this full name, or everything under it as a
    /// prefix; returns how many tensors that were.
    pub fn remove(&self, name: &str) -> Result<u64, NotFound> {
        let mut contents = self.lock();
        let removed = match contents.names.get(name).cloned() {
            Some(prefix) => contents.take_tensor(&prefix, name),
            None => contents.take_below(name),
        };
        drop(contents);
        if removed.is_empty() {
            return Err(NotFound {
                name: name.to_owned(),
            });
        }
        Ok(removed.iter().map(|set| set.tensors.len() as u64).sum())
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        Usage {
            tensors: self.lock().names.len() as u64,
            used_bytes: self.budget.used(),
            limit_bytes: self.budget.limit(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Nothing here panics while it holds the lock half-changed.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listed {
    /// Roughly the memory that it takes.
    pub fn held_bytes(&self) -> usize {
        let owner = match &self.owner {
            Owner::User(_) => 0,
            Owner::Peer(name) => name.len(),
        };
        let text = self.name.len() + self.dtype.len() + owner;
        size_of::<Self>() + text + size_of_val(&self.shape[..])
    }

    /// Checks what a peer says it has: that these are names.
    pub fn check(&self) -> Result<(), TensorError> {
        check_name(&self.name)?;
        check_name(&self.dtype)?;
        match &self.owner {
            Owner::User(_) => Ok(()),
            Owner::Peer(name) => check_name(name),
        }
    }
}

impl Stored {
    fn listed(&self, prefix: &str) -> Listed {
        Listed {
            name: full_name(prefix, &self.info.name),
            dtype: self.info.dtype.to_string(),
            shape: self.info.shape.clone(),
            bytes: self.lease.len() as u64,
            owner: self.owner.clone(),
        }
    }
}

impl Contents {
    fn check<'a>(
        &self,
        prefix: &str,
        tensors: impl Iterator<Item = &'a TensorInfo>,
    ) -> Result<(), CommitError> {
        for tensor in tensors {
            let name = full_name(prefix, &tensor.name);
            match self.names.get(&name) {
                Some(other) if other != prefix => {
                    return Err(CommitError::Taken {
                        name,
                        prefix: other.clone(),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn take_set(&mut self, prefix: &str) -> Option<Set> {
        let set = self.sets.remove(prefix)?;
        for tensor in &set.tensors {
            self.names.remove(&full_name(prefix, &tensor.info.name));
        }
        Some(set)
    }

    fn take_tensor(&mut self, prefix: &str, name: &str) -> Vec<Set> {
        self.names.remove(name);
        let Some(set) = self.sets.get_mut(prefix) else {
            return Vec::new();
        };
        let is_it = |tensor: &mut Stored| full_name(prefix, &tensor.info.name) == name;
        let tensors: Vec<Stored> = set.tensors.extract_if(.., is_it).collect();
        let bytes = tensors
            .iter()
            .map(|t| entry_bytes(prefix, &t.info, &t.owner));
        let charge = set.charge.split(bytes.sum());
        if set.tensors.is_empty() {
            self.sets.remove(prefix);
        }
        vec![Set {
            tensors,
            metadata: None,
            charge,
        }]
    }

    fn take_below(&mut self, prefix: &str) -> Vec<Set> {
        let below = format!("{prefix}/");
        let mut prefixes: Vec<String> = self
            .sets
            .range(below.clone()..)
            .map(|(prefix, _)| prefix.clone())
            .take_while(|prefix| prefix.starts_with(&below))
            .collect();
        prefixes.push(prefix.to_owned());
        prefixes
            .iter()
            .filter_map(|prefix| self.take_set(prefix))
            .collect()
    }
}

/// Roughly the memory for all about a batch but its tensors' bytes.
pub fn description_bytes<'a>(
    prefix: &str,
    tensors: impl IntoIterator<Item = &'a TensorInfo>,
    metadata: Option<&Metadata>,
    owner: &Owner,
) -> u64 {
    let tensors = tensors.into_iter();
    let entries: u64 = tensors.map(|info| entry_bytes(prefix, info, owner)).sum();
    let pairs = metadata.map_or(0, Vec::len) * size_of::<(String, String)>();
    entries + (metadata_bytes(metadata) + pairs + prefix.len()) as u64
}

/// One tensor's part of that.
fn entry_bytes(prefix: &str, info: &TensorInfo, owner: &Owner) -> u64 {
    let owner = match owner {
        Owner::User(_) => 0,
        Owner::Peer(name) => name.len(),
    };
    // A full name as key and a prefix as value in `Contents::names`.
    let entry = size_of::<(String, String)>() + 2 * prefix.len() + 1 + info.name.len();
    (size_of::<Stored>() + info.held_bytes() + owner + entry) as u64
}

/// `PREFIX/NAME`.
pub fn full_name(prefix: &str, name: &str) -> String {
    format!("{prefix}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;

    fn stored(store: &Store, names: &[&str]) -> Vec<Stored> {
        let allocation = store.budget().allocate(names.len() as u64).unwrap();
        let one = |(index, name): (usize, &&str)| Stored {
            info: TensorInfo {
                name: (*name).into(),
                dtype: Dtype::U8,
                shape: vec![1],
            },
            lease: allocation.lease(index as u64, 1),
            allocation: Arc::clone(&allocation),
            owner: Owner::User(0),
        };
        names.iter().enumerate().map(one).collect()
    }

    /// Keeps tensors of one byte each.
    fn commit(
        store: &Store,
        prefix: &str,
        names: &[&str],
        metadata: Option<Metadata>,
    ) -> Result<(), CommitError> {
        let tensors = stored(store, names);
        let infos = tensors.iter().map(|tensor| &tensor.info);
        let bytes = description_bytes(prefix, infos, metadata.as_ref(), &Owner::User(0));
        let charge = store.budget().charge(bytes).unwrap();
        store.commit(prefix, tensors, metadata, charge)
    }

    /// What is counted beyond the tensors' pages.
    fn described(store: &Store, pages: u64) -> u64 {
        store.usage().used_bytes - pages * 4096
    }

    fn names(store: &Store) -> Vec<String> {
        store.list().into_iter().map(|listed| listed.name).collect()
    }

    #[test]
    fn a_batch_replaces_what_its_prefix_held() {
        let store = Store::new(1 << 20);
        commit(&store, "m", &["b", "a"], Some(vec![])).unwrap();
        let two = described(&store, 1);
        assert_eq!(names(&store), ["m/a", "m/b"]);
        commit(&store, "m", &["c"], None).unwrap();
        assert_eq!(names(&store), ["m/c"]);
        assert_eq!(store.usage().tensors, 1);
        let one = described(&store, 1);
        assert!(0 < one && one < two, "the first batch was given back");
    }

    #[test]
    fn a_batch_comes_back_in_its_order_with_its_metadata() {
        let store = Store::new(1 << 20);
        let metadata = Some(vec![("k".to_owned(), "v".to_owned())]);
        commit(&store, "m", &["b", "a"], metadata.clone()).unwrap();
        let (tensors, back) = store.fetch("m").unwrap();
        let names: Vec<_> = tensors.iter().map(|tensor| &tensor.info.name[..]).collect();
        assert_eq!((names, back), (vec!["b", "a"], metadata));
    }

    #[test]
    fn a_prefix_above_others_gives_all_of_them() {
        let store = Store::new(1 << 20);
        for prefix in ["m/x", "m/y", "m2"] {
            commit(&store, prefix, &["a"], None).unwrap();
        }
        let (tensors, _) = store.fetch("m").unwrap();
        let names: Vec<_> = tensors.iter().map(|tensor| &tensor.info.name[..]).collect();
        assert_eq!(names, ["x/a", "y/a"]);
        assert!(store.fetch("m/z").is_err());
    }

    #[test]
    fn one_prefix_cannot_take_anothers_name() {
        let store = Store::new(1 << 20);
        commit(&store, "m", &["x/a"], None).unwrap();
        let refused = commit(&store, "m/x", &["a", "b"], None);
        assert!(matches!(refused, Err(CommitError::Taken { .. })));
        assert_eq!(names(&store), ["m/x/a"]);
    }

    #[test]
    fn removal_by_name_and_by_prefix() {
        let store = Store::new(1 << 20);
        commit(&store, "m", &["a", "b"], None).unwrap();
        let two = described(&store, 1);
        commit(&store, "m/sub", &["c"], None).unwrap();
        let three = described(&store, 2);
        assert_eq!(store.remove("m/a"), Ok(1));
        assert_eq!(three - described(&store, 2), (two - 1) / 2);
        assert_eq!(names(&store), ["m/b", "m/sub/c"]);
        assert_eq!(store.remove("m"), Ok(2));
        assert!(store.remove("m").is_err());
        assert_eq!(store.usage().used_bytes, 0);
    }

    #[test]
    fn a_full_store_refuses_and_loses_nothing() {
        let store = Store::new(8192);
        commit(&store, "m", &["a"], None).unwrap();
        let refused = store.budget().allocate(8192).unwrap_err().to_string();
        assert!(refused.contains("--store-bytes"), "{refused}");
        assert_eq!(names(&store), ["m/a"]);
        assert!(store.budget().allocate(u64::MAX).is_err());
    }

    #[test]
    fn names_and_metadata_count_too() {
        let store = Store::new(1 << 20);
        let value = "v".repeat(100_000);
        commit(&store, "m", &["a"], Some(vec![("k".into(), value)])).unwrap();
        assert!(described(&store, 1) > 100_000);
        let mut charge = store.budget().charge(10).unwrap();
        let before = store.usage().used_bytes;
        charge.grow_to(15).unwrap();
        charge.grow_to(12).unwrap();
        assert_eq!(store.usage().used_bytes, before + 5);
        assert!(charge.grow_to(1 << 20).is_err());
        drop(charge);
        store.remove("m").unwrap();
        assert_eq!(store.usage().used_bytes, 0);
    }

    #[test]
    fn memory_is_counted_while_a_reader_holds_it() {
        let store = Store::new(1 << 20);
        commit(&store, "m", &["a"], None).unwrap();
        let (held, _) = store.fetch("m").unwrap();
        store.remove("m").unwrap();
        assert_eq!(store.usage().used_bytes, 4096);
        drop(held);
        assert_eq!(store.usage().used_bytes, 0);
    }
}
