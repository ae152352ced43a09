//! The table behind [`Attachment`]: leases that a device holds.

#![forbid(unsafe_code)]

use super::{AttachError, Attachment, Payload};
use crate::memory::{Lease, View};

/// The most memory attached at once: one for each transfer that sends, and
/// room for those whose frames are not reaped yet.
pub const ATTACHMENTS_MAX: usize = 2 * crate::endpoint::OPERATIONS_MAX;

/// Leases by number; `T` is what the device keeps beside each.
#[derive(Debug)]
pub struct Attachments<T> {
    entries: Vec<Option<(Lease, T)>>,
    free: Vec<u32>,
}

impl<T> Attachments<T> {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Adds a lease.
    pub fn insert(&mut self, lease: Lease, beside: T) -> Result<Attachment, AttachError> {
        if let Some(index) = self.free.pop() {
            self.entries[index as usize] = Some((lease, beside));
            return Ok(Attachment(index));
        }
        if self.entries.len() == ATTACHMENTS_MAX {
            return Err(AttachError::Full);
        }
        self.entries.push(Some((lease, beside)));
        Ok(Attachment(self.entries.len() as u32 - 1))
    }

    /// Removes a lease; it is dropped with what is returned.
    pub fn remove(&mut self, attachment: Attachment) -> Option<(Lease, T)> {
        let removed = self.entries.get_mut(attachment.0 as usize)?.take();
        if removed.is_some() {
            self.free.push(attachment.0);
        }
        removed
    }

    /// What the device keeps beside a lease.
    pub fn beside_mut(&mut self, attachment: Attachment) -> Option<&mut T> {
        let entry = self.entries.get_mut(attachment.0 as usize)?.as_mut()?;
        Some(&mut entry.1)
    }

    /// Shows what the device keeps beside every lease.
    pub fn beside_all(&mut self, mut change: impl FnMut(&mut T)) {
        for (_, beside) in self.entries.iter_mut().flatten() {
            change(beside);
        }
    }

    /// The bytes a payload names and what is kept beside their lease; `None`
    /// if it is not attached or lies outside.
    pub fn resolve(&self, payload: Payload) -> Option<(View<'_>, &T)> {
        let (lease, beside) = self.entries.get(payload.attachment.0 as usize)?.as_ref()?;
        let start = usize::try_from(payload.offset).ok()?;
        let end = start.checked_add(payload.len as usize)?;
        Some((lease.view(start..end)?, beside))
    }

    /// How many leases are held.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Whether no lease is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Default for Attachments<T> {
    fn default() -> Self {
        Self::new()
    }
}
