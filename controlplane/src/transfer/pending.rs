//! Transfers under way, in order; what is given up is seen to its end.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

use genie_dataplane::stage::Moving;

use super::Progress;

/// Transfers of a batch, each with its tensor's place in that. Dropping it cancels them, and keeps what their
/// [`Progress`] holds until the engine has let go of the last one.
#[derive(Debug)]
pub(super) struct Pending {
    moving: VecDeque<(usize, Moving)>,
    progress: Progress,
}

impl Pending {
    pub(super) fn new(progress: &Progress) -> Self {
        Self {
            moving: VecDeque::new(),
            progress: progress.clone(),
        }
    }
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
            drop(landing);
        });
    }
}
