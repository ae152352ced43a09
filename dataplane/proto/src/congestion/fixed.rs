//! A window that never changes: for tests, and for links with credit alone.

use super::Controller;
use crate::time::Time;

/// A window that never changes.
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    window: u64,
}

impl Fixed {
    /// A window of so many bytes.
    pub fn new(window_bytes: u64) -> Self {
        Self {
            window: window_bytes,
        }
    }
}

impl Controller for Fixed {
    fn window_bytes(&self) -> u64 {
        self.window
    }

    fn handle_ack(&mut self, _now: Time, _sent_at: Time, _bytes: u64, _limited: bool) {}

    fn handle_loss(&mut self, _now: Time, _sent_at: Time, _bytes: u64) {}
}
