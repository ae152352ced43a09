//! Transfers under way, in order; what is given up is seen to its end.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use genie_dataplane::memory::accelerator::Way;
use genie_dataplane::stage::{Moving, Place};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Progress;
use crate::quota::peer::Share;

/// Transfers of a batch, each with its tensor's place in that. Dropping it cancels them, and keeps what their
/// [`Progress`] holds until the engine has let go of the last one.
#[derive(Debug)]
pub(super) struct Pending {
    moving: VecDeque<(usize, Moving)>,
    progress: Progress,
    /// What the peer that asked may move of it.
    share: Option<Share>,
    /// Held once it is in staging slots.
    staging: Option<OwnedSemaphorePermit>,
}

impl Pending {
    pub(super) fn new(progress: &Progress, share: Option<Share>) -> Self {
        Self {
            moving: VecDeque::new(),
            progress: progress.clone(),
            share,
            staging: None,
        }
    }

    /// Whether one more may begin, where the endpoint takes so many `free` ones
    /// of anybody: the first one always, and never all of them.
    pub(super) fn may_add(&self, free: usize) -> bool {
        let shared = |share: &Share| share.may_add(free);
        self.moving.is_empty() || self.moving.len() < free && self.share.as_ref().is_none_or(shared)
    }

    /// What has to be acquired, and given to [`Pending::hold`], before a transfer
    /// of this place begins: where it goes through a slot and none of a peer's
    /// request did yet, its part of them, or many requests would have them all.
    pub(super) fn staging(&self, place: &Place, way: Way) -> Option<Arc<Semaphore>> {
        let share = self.share.as_ref().filter(|_| self.staging.is_none())?;
        matches!(place, Place::Device(..)).then(|| share.staging(way))
    }

    /// Keeps what [`Pending::staging`] asked for.
    pub(super) fn hold(&mut self, staging: Option<OwnedSemaphorePermit>) {
        self.staging = staging.or(self.staging.take());
    }

    pub(super) fn push_back(&mut self, one: (usize, Moving)) {
        self.moving.push_back(one);
        self.count();
    }

    pub(super) fn pop_front(&mut self) -> Option<(usize, Moving)> {
        let first = self.moving.pop_front();
        self.count();
        first
    }

    fn count(&mut self) {
        if let Some(share) = &mut self.share {
            share.set(self.moving.len());
        }
    }
}

/// Acquires what [`Pending::staging`] asks for.
pub(super) async fn acquire(staging: Option<Arc<Semaphore>>) -> Option<OwnedSemaphorePermit> {
    let permit = staging?.acquire_owned().await;
    Some(permit.expect("the semaphore is never closed"))
}

impl Deref for Pending {
    type Target = VecDeque<(usize, Moving)>;

    fn deref(&self) -> &Self::Target {
        &self.moving
    }
}

impl DerefMut for Pending {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.moving
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.moving.is_empty() {
            return;
        }
        let moving = std::mem::take(&mut self.moving);
        let charged = (self.share.take(), self.staging.take());
        let landing = self.progress.landing();
        moving.iter().for_each(|(_, transfer)| transfer.cancel());
        // Without a runtime the agent is ending, and the engine with it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            for (_, transfer) in moving {
                transfer.end().await;
            }
            drop((landing, charged));
        });
    }
}
