//! The tensor store: what this agent keeps, by name, within a budget of bytes.
//!
//! Batches of tensors come in through [`Store::commit`], all or none, and only
//! once every byte was verified. The invariant: *memory is counted from before
//! it is allocated until the last transfer that uses it has let go*, so that
//! the budget cannot be overrun by more than the rest of a page, and a reader
//! never sees half a batch.

mod window;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use genie_client::status::Usage;
use genie_client::{Listed, Owner};
use genie_dataplane::memory::Backing;
use genie_dataplane::stage::Place;

use tokio::sync::watch;

use crate::budget::{Budget, Charge};
use crate::tensor::{Metadata, TensorInfo, metadata_bytes};

pub use window::{Removed, SealError, Target, Using, Window, removed, window_bytes};

/// A tensor that is kept. Cloning it holds its memory.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What it is; the name is the one within its prefix.
    pub info: TensorInfo,
    /// Where its bytes are.
    pub lease: Place,
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
    /// Another user has tensors there.
    #[error("the prefix {prefix:?} is another user's: put under another one")]
    Foreign {
        /// What was asked for.
        prefix: String,
    },
    /// A window has that name.
    #[error("{name:?} is a window: seal it, or remove it with 'genie rm {name}'")]
    Window {
        /// Full name.
        name: String,
    },
}

/// Nothing of that name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("nothing is stored under {name:?}; 'genie ls' shows what is")]
pub struct NotFound {
    /// What was asked for.
    pub name: String,
}

/// The tensors of this agent. Clones refer to the same store.
#[derive(Clone, Debug)]
pub struct Store {
    budget: Budget,
    contents: Arc<Mutex<Contents>>,
    /// Changes whenever a window was removed.
    removals: Arc<watch::Sender<()>>,
}

#[derive(Debug, Default)]
struct Contents {
    /// By prefix as it was put.
    sets: BTreeMap<String, Set>,
    /// Full name to prefix.
    names: BTreeMap<String, String>,
    /// By full name.
    windows: BTreeMap<String, Arc<Window>>,
}

#[derive(Debug)]
struct Set {
    /// In the order they were put.
    tensors: Vec<Stored>,
    metadata: Option<Metadata>,
    owner: Owner,
    /// For names, shapes and metadata.
    charge: Charge,
}

/// Whether `actor` may do anything with what is `owner`'s.
pub fn may(actor: &Owner, owner: &Owner) -> bool {
    match (actor, owner) {
        (Owner::User(uid), Owner::User(owner)) => uid == owner || *uid == ROOT,
        // Peers are not told apart from their users; see docs/applications.md.
        (Owner::Peer(_), _) | (_, Owner::Peer(_)) => true,
    }
}

const ROOT: u32 = 0;

/// What a commit replaced. Dropping it may unmap large regions, which takes a
/// while: under no lock, and not where others wait for the thread.
#[derive(Debug)]
#[must_use = "it is unmapped where it is dropped"]
pub struct Replaced(#[expect(dead_code, reason = "held to be dropped")] Option<Set>);

impl Store {
    /// An empty store.
    pub fn new(limit_bytes: u64) -> Self {
        let budget = Budget::new("store", "--store-bytes", limit_bytes);
        Self {
            budget,
            contents: Arc::default(),
            removals: Arc::new(watch::Sender::new(())),
        }
    }

    /// What memory for new tensors is allocated from.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Refuses early what [`Store::commit`] would refuse.
    pub fn check(
        &self,
        prefix: &str,
        tensors: &[TensorInfo],
        owner: &Owner,
    ) -> Result<(), CommitError> {
        self.lock().check(prefix, tensors.iter(), owner)
    }

    /// Keeps a batch of `owner`'s under `prefix`, in place of what was put there before.
    ///
    /// `charge` is for its [`description_bytes`].
    pub fn commit(
        &self,
        prefix: &str,
        tensors: Vec<(TensorInfo, Place)>,
        metadata: Option<Metadata>,
        owner: &Owner,
        charge: Charge,
    ) -> Result<Replaced, CommitError> {
        let mut contents = self.lock();
        contents.check(prefix, tensors.iter().map(|(info, _)| info), owner)?;
        let stored = |(info, lease)| Stored {
            info,
            lease,
            owner: owner.clone(),
        };
        let tensors: Vec<Stored> = tensors.into_iter().map(stored).collect();
        let replaced = contents.take_set(prefix);
        for tensor in &tensors {
            contents
                .names
                .insert(full_name(prefix, &tensor.info.name), prefix.to_owned());
        }
        let set = Set {
            tensors,
            metadata,
            owner: owner.clone(),
            charge,
        };
        contents.sets.insert(prefix.to_owned(), set);
        Ok(Replaced(replaced))
    }

    /// The tensors under `prefix`, with names relative to it, and its metadata.
    ///
    /// A prefix that was put comes back exactly; one above several prefixes
    /// gives all of their tensors that `reader` may read, and no metadata.
    pub fn fetch(
        &self,
        prefix: &str,
        reader: &Owner,
    ) -> Result<(Vec<Stored>, Option<Metadata>), NotFound> {
        let contents = self.lock();
        if let Some(set) = contents.sets.get(prefix)
            && may(reader, &set.owner)
        {
            return Ok((set.tensors.clone(), set.metadata.clone()));
        }
        let below = format!("{prefix}/");
        let mut tensors = Vec::new();
        for (set_prefix, set) in contents.sets.range(below.clone()..) {
            let Some(rest) = set_prefix.strip_prefix(&below) else {
                break;
            };
            if !may(reader, &set.owner) {
                continue;
            }
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

    /// The tensor of this full name.
    pub fn tensor(&self, name: &str, reader: &Owner) -> Result<Stored, NotFound> {
        let contents = self.lock();
        let set = contents.names.get(name).and_then(|prefix| {
            let set = contents.sets.get_key_value(prefix);
            set.filter(|(_, set)| may(reader, &set.owner))
        });
        let found = set.and_then(|(prefix, set)| {
            let is_it = |tensor: &&Stored| full_name(prefix, &tensor.info.name) == name;
            set.tensors.iter().find(is_it)
        });
        found.cloned().ok_or_else(|| NotFound {
            name: name.to_owned(),
        })
    }

    /// All tensors that `reader` may read, by full name; only the one called
    /// `under` and those below it, if that is given.
    pub fn list(&self, under: Option<&str>, reader: &Owner) -> Vec<Listed> {
        let below = under.map(|name| format!("{name}/"));
        let wanted = |name: &str| match (under, &below) {
            (Some(exact), Some(below)) => name == exact || name.starts_with(&below[..]),
            _ => true,
        };
        let contents = self.lock();
        let mut listed: Vec<Listed> = contents
            .sets
            .iter()
            .filter(|(_, set)| may(reader, &set.owner))
            .flat_map(|(prefix, set)| set.tensors.iter().map(move |tensor| tensor.listed(prefix)))
            .filter(|tensor| wanted(&tensor.name))
            .collect();
        let windows = contents.windows.iter();
        let windows = windows.filter(|(name, window)| window.is_for(reader) && wanted(name));
        listed.extend(windows.map(|(name, window)| window.listed(name)));
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// Removes the tensor of this full name, or everything under it as a
    /// prefix that `remover` may remove; returns how many tensors that were.
    pub fn remove(&self, name: &str, remover: &Owner) -> Result<u64, NotFound> {
        let mut contents = self.lock();
        let windows = contents.take_windows(name, remover);
        let removed = match contents.names.get(name).cloned() {
            Some(prefix) => contents.take_tensor(&prefix, name, remover),
            None => contents.take_below(name, remover),
        };
        drop(contents);
        self.tell(&windows);
        if removed.is_empty() && windows.is_empty() {
            return Err(NotFound {
                name: name.to_owned(),
            });
        }
        let tensors: u64 = removed.iter().map(|set| set.tensors.len() as u64).sum();
        Ok(tensors + windows.len() as u64)
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        Usage {
            tensors: self.lock().names.len() as u64,
            ..self.budget.usage()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Nothing here panics while it holds the lock half-changed.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
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
            memory: memory_of(&self.lease),
            window: false,
        }
    }
}

/// Where bytes live, as shown to people.
fn memory_of(place: &Place) -> String {
    match place {
        Place::Host(lease) => match lease.region().backing() {
            Backing::HugeTlb { .. } => "hugepage".to_owned(),
            Backing::Shmem => "host".to_owned(),
        },
        Place::Device(..) => place.kind().to_string(),
    }
}

impl Contents {
    fn check<'a>(
        &self,
        prefix: &str,
        tensors: impl Iterator<Item = &'a TensorInfo>,
        owner: &Owner,
    ) -> Result<(), CommitError> {
        if self.is_near_anothers(prefix, owner) {
            let prefix = prefix.to_owned();
            return Err(CommitError::Foreign { prefix });
        }
        if self.windows.contains_key(prefix) {
            return Err(CommitError::Window {
                name: prefix.to_owned(),
            });
        }
        for tensor in tensors {
            let name = full_name(prefix, &tensor.name);
            if self.windows.contains_key(&name) {
                return Err(CommitError::Window { name });
            }
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

    /// Whether another user has put, or has a window, under this prefix, one above or one below.
    fn is_near_anothers(&self, prefix: &str, owner: &Owner) -> bool {
        self.has_anothers_set_near(prefix, owner) || self.has_anothers_window_near(prefix, owner)
    }

    fn has_anothers_window_near(&self, name: &str, owner: &Owner) -> bool {
        let above = name.match_indices('/').map(|(at, _)| &name[..at]);
        let at_or_above = above
            .chain([name])
            .filter_map(|name| self.windows.get(name));
        let below = format!("{name}/");
        let windows_below = self.windows.range(below.clone()..);
        let windows_below = windows_below
            .take_while(|(name, _)| name.starts_with(&below))
            .map(|(_, window)| window);
        let mut near = at_or_above.chain(windows_below);
        near.any(|window| !window.is_for(owner))
    }

    fn has_anothers_set_near(&self, prefix: &str, owner: &Owner) -> bool {
        let above = prefix.match_indices('/').map(|(at, _)| &prefix[..at]);
        let at_or_above = above
            .chain([prefix])
            .filter_map(|prefix| self.sets.get(prefix));
        let below = format!("{prefix}/");
        let sets_below = self
            .sets
            .range(below.clone()..)
            .take_while(|(prefix, _)| prefix.starts_with(&below))
            .map(|(_, set)| set);
        at_or_above
            .chain(sets_below)
            .any(|set| !may(owner, &set.owner))
    }

    fn take_set(&mut self, prefix: &str) -> Option<Set> {
        let set = self.sets.remove(prefix)?;
        for tensor in &set.tensors {
            self.names.remove(&full_name(prefix, &tensor.info.name));
        }
        Some(set)
    }

    fn take_tensor(&mut self, prefix: &str, name: &str, remover: &Owner) -> Vec<Set> {
        let set = self.sets.get_mut(prefix);
        let Some(set) = set.filter(|set| may(remover, &set.owner)) else {
            return Vec::new();
        };
        let is_it = |tensor: &mut Stored| full_name(prefix, &tensor.info.name) == name;
        let tensors: Vec<Stored> = set.tensors.extract_if(.., is_it).collect();
        let bytes = tensors
            .iter()
            .map(|t| entry_bytes(prefix, &t.info, &t.owner));
        let taken = Set {
            charge: set.charge.split(bytes.sum()),
            tensors,
            metadata: None,
            owner: set.owner.clone(),
        };
        if set.tensors.is_empty() {
            self.sets.remove(prefix);
        }
        self.names.remove(name);
        vec![taken]
    }

    fn take_below(&mut self, prefix: &str, remover: &Owner) -> Vec<Set> {
        let below = format!("{prefix}/");
        let mut prefixes: Vec<String> = self
            .sets
            .range(below.clone()..)
            .map(|(prefix, _)| prefix.clone())
            .take_while(|prefix| prefix.starts_with(&below))
            .collect();
        prefixes.push(prefix.to_owned());
        prefixes.retain(|prefix| {
            let set = self.sets.get(prefix);
            set.is_some_and(|set| may(remover, &set.owner))
        });
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

    const ROOT: Owner = Owner::User(0);
    const ONE: Owner = Owner::User(1);
    const OTHER: Owner = Owner::User(2);

    fn batch(store: &Store, names: &[&str]) -> Vec<(TensorInfo, Place)> {
        let allocation = store.budget().room().allocate(names.len() as u64).unwrap();
        let one = |(index, name): (usize, &&str)| {
            let info = TensorInfo {
                name: (*name).into(),
                dtype: Dtype::U8,
                shape: vec![1],
            };
            (info, allocation.lease(index as u64, 1))
        };
        names.iter().enumerate().map(one).collect()
    }

    fn put(store: &Store, prefix: &str, names: &[&str], owner: &Owner) -> Result<(), CommitError> {
        put_with(store, prefix, names, None, owner)
    }

    fn put_with(
        store: &Store,
        prefix: &str,
        names: &[&str],
        metadata: Option<Metadata>,
        owner: &Owner,
    ) -> Result<(), CommitError> {
        let tensors = batch(store, names);
        let infos = tensors.iter().map(|(info, _)| info);
        let bytes = description_bytes(prefix, infos, metadata.as_ref(), owner);
        let charge = store.budget().charge(bytes).unwrap();
        store
            .commit(prefix, tensors, metadata, owner, charge)
            .map(drop)
    }

    /// What is counted beyond the tensors' pages.
    fn described(store: &Store, pages: u64) -> u64 {
        store.usage().used_bytes - pages * 4096
    }

    fn names(store: &Store) -> Vec<String> {
        store
            .list(None, &ROOT)
            .into_iter()
            .map(|listed| listed.name)
            .collect()
    }

    #[test]
    fn a_batch_replaces_what_its_prefix_held() {
        let store = Store::new(1 << 20);
        put_with(&store, "m", &["b", "a"], Some(vec![]), &ROOT).unwrap();
        let two = described(&store, 1);
        assert_eq!(names(&store), ["m/a", "m/b"]);
        put(&store, "m", &["c"], &ROOT).unwrap();
        assert_eq!(names(&store), ["m/c"]);
        assert_eq!(store.usage().tensors, 1);
        let one = described(&store, 1);
        assert!(0 < one && one < two, "the first batch was given back");
    }

    #[test]
    fn a_batch_comes_back_in_its_order_with_its_metadata() {
        let store = Store::new(1 << 20);
        let metadata = Some(vec![("k".to_owned(), "v".to_owned())]);
        put_with(&store, "m", &["b", "a"], metadata.clone(), &ROOT).unwrap();
        let (tensors, back) = store.fetch("m", &ROOT).unwrap();
        let names: Vec<_> = tensors.iter().map(|tensor| &tensor.info.name[..]).collect();
        assert_eq!((names, back), (vec!["b", "a"], metadata));
    }

    #[test]
    fn a_prefix_above_others_gives_all_of_them() {
        let store = Store::new(1 << 20);
        for prefix in ["m/x", "m/y", "m2"] {
            put(&store, prefix, &["a"], &ROOT).unwrap();
        }
        let (tensors, _) = store.fetch("m", &ROOT).unwrap();
        let names: Vec<_> = tensors.iter().map(|tensor| &tensor.info.name[..]).collect();
        assert_eq!(names, ["x/a", "y/a"]);
        assert!(store.fetch("m/z", &ROOT).is_err());
    }

    #[test]
    fn one_prefix_cannot_take_anothers_name() {
        let store = Store::new(1 << 20);
        put(&store, "m", &["x/a"], &ROOT).unwrap();
        let refused = put(&store, "m/x", &["a", "b"], &ROOT);
        assert!(matches!(refused, Err(CommitError::Taken { .. })));
        assert_eq!(names(&store), ["m/x/a"]);
    }

    #[test]
    fn removal_by_name_and_by_prefix() {
        let store = Store::new(1 << 20);
        put(&store, "m", &["a", "b"], &ROOT).unwrap();
        let two = described(&store, 1);
        put(&store, "m/sub", &["c"], &ROOT).unwrap();
        let three = described(&store, 2);
        assert_eq!(store.remove("m/a", &ROOT), Ok(1));
        assert_eq!(three - described(&store, 2), (two - 1) / 2);
        assert_eq!(names(&store), ["m/b", "m/sub/c"]);
        assert_eq!(store.remove("m", &ROOT), Ok(2));
        assert!(store.remove("m", &ROOT).is_err());
        assert_eq!(store.usage().used_bytes, 0);
    }

    #[test]
    fn a_full_store_refuses_and_loses_nothing() {
        let store = Store::new(8192);
        put(&store, "m", &["a"], &ROOT).unwrap();
        let refused = store
            .budget()
            .room()
            .allocate(8192)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("--store-bytes"), "{refused}");
        assert_eq!(names(&store), ["m/a"]);
        assert!(store.budget().room().allocate(u64::MAX).is_err());
    }

    #[test]
    fn memory_is_counted_while_a_reader_holds_it() {
        let store = Store::new(1 << 20);
        put(&store, "m", &["a"], &ROOT).unwrap();
        let (held, _) = store.fetch("m", &ROOT).unwrap();
        store.remove("m", &ROOT).unwrap();
        assert_eq!(store.usage().used_bytes, 4096);
        drop(held);
        assert_eq!(store.usage().used_bytes, 0);
    }

    #[test]
    fn a_user_neither_sees_nor_touches_anothers() {
        let store = Store::new(1 << 20);
        put(&store, "m/x", &["a", "b/c"], &ONE).unwrap();
        for prefix in ["m/x", "m", "m/x/b", "m/x/y/z"] {
            let refused = put(&store, prefix, &["t"], &OTHER);
            assert!(
                matches!(refused, Err(CommitError::Foreign { .. })),
                "{prefix}"
            );
        }
        assert!(store.fetch("m/x", &OTHER).is_err());
        assert!(store.fetch("m", &OTHER).is_err());
        assert!(store.tensor("m/x/a", &OTHER).is_err());
        assert_eq!(store.list(None, &OTHER), []);
        assert_eq!(store.list(Some("m/x/a"), &OTHER), []);
        for name in ["m/x/a", "m/x", "m"] {
            assert!(store.remove(name, &OTHER).is_err(), "{name}");
        }
        assert_eq!(names(&store), ["m/x/a", "m/x/b/c"]);
        put(&store, "m2", &["t"], &OTHER).expect("a name that only looks alike");
        assert_eq!(store.remove("m", &ONE), Ok(2));
    }

    #[test]
    fn root_and_peers_may_do_everything_and_peers_tensors_are_everybodys() {
        let store = Store::new(1 << 20);
        let peer = Owner::Peer("b".into());
        put(&store, "m", &["a"], &ONE).unwrap();
        assert!(store.tensor("m/a", &ROOT).is_ok());
        assert_eq!(store.fetch("m", &peer).unwrap().0.len(), 1);
        put(&store, "m", &["c"], &peer).unwrap();
        assert!(store.tensor("m/c", &OTHER).is_ok());
        assert_eq!(store.remove("m/c", &OTHER), Ok(1));
    }

    #[test]
    fn one_tensor_or_all_below_a_prefix_are_listed() {
        let store = Store::new(1 << 20);
        put(&store, "m", &["a", "b", "bc"], &ONE).unwrap();
        let listed = |under| {
            let listed = store.list(Some(under), &ONE);
            listed.into_iter().map(|one| one.name).collect::<Vec<_>>()
        };
        assert_eq!(listed("m/b"), ["m/b"]);
        assert_eq!(listed("m"), ["m/a", "m/b", "m/bc"]);
        assert_eq!(listed("x"), [""; 0]);
    }

    #[test]
    fn names_and_metadata_count_too() {
        let store = Store::new(1 << 20);
        let value = "v".repeat(100_000);
        put_with(&store, "m", &["a"], Some(vec![("k".into(), value)]), &ROOT).unwrap();
        assert!(described(&store, 1) > 100_000);
        let mut charge = store.budget().charge(10).unwrap();
        let before = store.usage().used_bytes;
        charge.grow_to(15).unwrap();
        charge.grow_to(12).unwrap();
        assert_eq!(store.usage().used_bytes, before + 5);
        assert!(charge.grow_to(1 << 20).is_err());
        drop(charge);
        store.remove("m", &ROOT).unwrap();
        assert_eq!(store.usage().used_bytes, 0);
    }
}
