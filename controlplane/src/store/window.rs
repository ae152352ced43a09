//! Windows: named memory that peers and programs write ranges into.
//!
//! A window is made in the store, or is memory that a program has registered.
//! It shares the names and the rights of tensors. The invariant: *a window
//! becomes tensors only when nothing can write into it any more*; whoever uses
//! one is told when it was removed.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use genie_client::Owner;
use genie_dataplane::stage::Place;
use tokio::sync::watch;

use super::{CommitError, Contents, NotFound, Set, Store, Stored, full_name, may};
use crate::budget::{Allocation, Charge};
use crate::tensor::TensorInfo;

/// A window in the store.
#[derive(Debug)]
pub struct Window {
    place: Place,
    /// None of memory that a program has registered.
    allocation: Option<Allocation>,
    owner: Owner,
    /// How many read or write it.
    users: AtomicUsize,
    removed: AtomicBool,
    /// For its name.
    _charge: Charge,
}

/// What ranges are read from or written to, for as long as that takes.
#[derive(Debug)]
pub struct Target {
    /// Its bytes.
    pub place: Place,
    /// Whose it is.
    pub owner: Owner,
    /// None of a tensor, which doesn't change.
    using: Option<Using>,
}

/// Keeps a window from being sealed.
#[derive(Clone, Debug)]
pub struct Using(Arc<InUse>);

#[derive(Debug)]
struct InUse {
    name: String,
    window: Arc<Window>,
    removals: watch::Receiver<()>,
}

/// Somebody removed or sealed a window that is being used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the window {name:?} was removed while it was used")]
pub struct Removed {
    /// Which.
    pub name: String,
}

/// Why a window did not become tensors.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SealError {
    /// Nothing of that name.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// Somebody uses it.
    #[error("the window {name:?} is being written or read: seal it when that has ended")]
    Busy {
        /// Which.
        name: String,
    },
    /// A program's own memory.
    #[error("the window {name:?} is memory of a program, which can go on changing it: put it")]
    Registered {
        /// Which.
        name: String,
    },
    /// A tensor outside of it, or two of the same bytes.
    #[error("tensor {name:?} lies outside the window of {len} bytes, or on another tensor")]
    Outside {
        /// Which tensor.
        name: String,
        /// The window's length.
        len: u64,
    },
    /// The names are others'.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl Window {
    pub(super) fn is_for(&self, actor: &Owner) -> bool {
        may(actor, &self.owner)
    }

    pub(super) fn listed(&self, name: &str) -> genie_client::Listed {
        genie_client::Listed {
            name: name.to_owned(),
            dtype: "U8".to_owned(),
            shape: vec![self.place.len() as u64],
            bytes: self.place.len() as u64,
            owner: self.owner.clone(),
            memory: super::memory_of(&self.place),
            window: true,
        }
    }
}

impl Store {
    /// Makes a window of the first `bytes` of new memory, which is all zeros.
    ///
    /// `charge` is for its [`window_bytes`].
    pub fn make_window(
        &self,
        name: &str,
        allocation: Allocation,
        bytes: u64,
        owner: &Owner,
        charge: Charge,
    ) -> Result<(), CommitError> {
        let place = allocation.lease(0, bytes);
        self.add_window(name, place, Some(allocation), owner, charge)
    }

    /// Makes a window of memory that a program goes on using.
    pub fn register(
        &self,
        name: &str,
        place: Place,
        owner: &Owner,
        charge: Charge,
    ) -> Result<Weak<Window>, CommitError> {
        self.add_window(name, place, None, owner, charge)?;
        let window = self.lock().windows.get(name).map(Arc::downgrade);
        let taken = || CommitError::Window { name: name.into() };
        window.ok_or_else(taken)
    }

    fn add_window(
        &self,
        name: &str,
        place: Place,
        allocation: Option<Allocation>,
        owner: &Owner,
        charge: Charge,
    ) -> Result<(), CommitError> {
        let mut contents = self.lock();
        contents.check_window(name, owner)?;
        let window = Window {
            place,
            allocation,
            owner: owner.clone(),
            users: AtomicUsize::new(0),
            removed: AtomicBool::new(false),
            _charge: charge,
        };
        contents.windows.insert(name.to_owned(), Arc::new(window));
        Ok(())
    }

    /// Refuses early what making a window of this name would refuse.
    pub fn check_window(&self, name: &str, owner: &Owner) -> Result<(), CommitError> {
        self.lock().check_window(name, owner)
    }

    /// The window of this name, to be written or read.
    pub fn window(&self, name: &str, actor: &Owner) -> Result<Target, NotFound> {
        let contents = self.lock();
        let window = contents.windows.get(name);
        let window = window.filter(|window| window.is_for(actor));
        let window = window.ok_or_else(|| NotFound { name: name.into() })?;
        // Counted under the lock, under which `seal` looks.
        window.users.fetch_add(1, Ordering::Relaxed);
        let in_use = InUse {
            name: name.to_owned(),
            window: Arc::clone(window),
            removals: self.removals.subscribe(),
        };
        Ok(Target {
            place: window.place.clone(),
            owner: window.owner.clone(),
            using: Some(Using(Arc::new(in_use))),
        })
    }

    /// The window or tensor of this name, to be read.
    pub fn readable(&self, name: &str, reader: &Owner) -> Result<Target, NotFound> {
        self.window(name, reader).or_else(|_| {
            let stored = self.tensor(name, reader)?;
            Ok(Target {
                place: stored.lease,
                owner: stored.owner,
                using: None,
            })
        })
    }

    /// Keeps `tensors`, each at its place in the window, instead of the window.
    ///
    /// Refused while anybody uses it. `charge` is for their
    /// [`description_bytes`](super::description_bytes).
    pub fn seal(
        &self,
        name: &str,
        tensors: &[(TensorInfo, u64)],
        owner: &Owner,
        charge: Charge,
    ) -> Result<u64, SealError> {
        let mut contents = self.lock();
        let found = contents.windows.get(name);
        let found = found.filter(|window| window.is_for(owner));
        let window = Arc::clone(found.ok_or_else(|| NotFound { name: name.into() })?);
        if window.users.load(Ordering::Acquire) > 0 {
            return Err(SealError::Busy { name: name.into() });
        }
        if window.allocation.is_none() {
            return Err(SealError::Registered { name: name.into() });
        }
        let tensors = window.cut(tensors)?;
        contents.windows.remove(name);
        if let Err(error) = contents.check(name, tensors.iter().map(|t| &t.info), owner) {
            contents.windows.insert(name.to_owned(), window);
            return Err(error.into());
        }
        for tensor in &tensors {
            let full = full_name(name, &tensor.info.name);
            contents.names.insert(full, name.to_owned());
        }
        let count = tensors.len() as u64;
        let set = Set {
            tensors,
            metadata: None,
            owner: window.owner.clone(),
            charge,
        };
        contents.sets.insert(name.to_owned(), set);
        Ok(count)
    }

    /// Takes a window of a program's away if it still is that one.
    pub fn unregister(&self, name: &str, window: &Weak<Window>) {
        let mut contents = self.lock();
        let is_it = |found: &Arc<Window>| Arc::as_ptr(found) == window.as_ptr();
        if contents.windows.get(name).is_some_and(is_it) {
            let removed = contents.windows.remove(name);
            drop(contents);
            self.tell(removed.as_slice());
        }
    }

    /// Tells whoever uses these windows that they were removed.
    pub(super) fn tell(&self, removed: &[Arc<Window>]) {
        if removed.is_empty() {
            return;
        }
        for window in removed {
            window.removed.store(true, Ordering::Release);
        }
        self.removals.send_replace(());
    }
}

impl Contents {
    fn check_window(&self, name: &str, owner: &Owner) -> Result<(), CommitError> {
        if self.is_near_anothers(name, owner) {
            return Err(CommitError::Foreign {
                prefix: name.to_owned(),
            });
        }
        if self.windows.contains_key(name) {
            return Err(CommitError::Window { name: name.into() });
        }
        let prefix = match self.names.get(name) {
            Some(prefix) => Some(prefix.clone()),
            None => self.sets.contains_key(name).then(|| name.to_owned()),
        };
        match prefix {
            Some(prefix) => Err(CommitError::Taken {
                name: name.to_owned(),
                prefix,
            }),
            None => Ok(()),
        }
    }

    /// Takes the windows of this name and below it that `remover` may remove.
    pub(super) fn take_windows(&mut self, name: &str, remover: &Owner) -> Vec<Arc<Window>> {
        let below = format!("{name}/");
        let names = self.windows.range(below.clone()..);
        let names = names
            .map(|(found, _)| found)
            .take_while(|found| found.starts_with(&below))
            .cloned();
        let mut names: Vec<String> = names.collect();
        names.push(name.to_owned());
        names.retain(|name| {
            let window = self.windows.get(name);
            window.is_some_and(|window| window.is_for(remover))
        });
        let windows = names.iter().filter_map(|name| self.windows.remove(name));
        windows.collect()
    }
}

impl Window {
    /// The tensors at their places.
    fn cut(&self, tensors: &[(TensorInfo, u64)]) -> Result<Vec<Stored>, SealError> {
        let len = self.place.len() as u64;
        let mut end = 0;
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|index| tensors[*index].1);
        let outside = |info: &TensorInfo| SealError::Outside {
            name: info.name.clone(),
            len,
        };
        for index in order {
            let (info, offset) = &tensors[index];
            let bytes = info.len_bytes().map_err(|_| outside(info))?;
            let after = offset.checked_add(bytes).filter(|after| *after <= len);
            if *offset < end || after.is_none() {
                return Err(outside(info));
            }
            end = after.unwrap_or(end);
        }
        let stored = |(info, offset): &(TensorInfo, u64)| {
            let bytes = info.len_bytes().map_err(|_| outside(info))?;
            let place = self.place.slice(*offset..*offset + bytes);
            Ok(Stored {
                info: info.clone(),
                lease: place.map_err(|_| outside(info))?,
                owner: self.owner.clone(),
            })
        };
        tensors.iter().map(stored).collect()
    }
}

impl Target {
    /// What keeps it in use, to be held until nothing refers to its bytes.
    pub fn using(&self) -> Option<Using> {
        self.using.clone()
    }
}

impl Using {
    /// An error if the window is no longer there.
    pub fn check(&self) -> Result<(), Removed> {
        if self.0.window.removed.load(Ordering::Acquire) {
            let name = self.0.name.clone();
            return Err(Removed { name });
        }
        Ok(())
    }
}

/// Waits until any of these is removed; for ever if none is.
pub async fn removed(using: &[Using]) -> Removed {
    let Some(first) = using.first() else {
        return std::future::pending().await;
    };
    // One channel for all windows: a removal is rare.
    let mut removals = first.0.removals.clone();
    loop {
        let gone = using.iter().find_map(|using| using.check().err());
        if let Some(removed) = gone {
            return removed;
        }
        if removals.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.window.users.fetch_sub(1, Ordering::Release);
    }
}

/// Roughly the memory for all about a window but its bytes.
pub fn window_bytes(name: &str) -> u64 {
    (size_of::<Window>() + size_of::<String>() + name.len()) as u64
}
