//! DPDK's error numbers.

use std::ffi::CStr;
use std::fmt;

use genie_dpdk_sys as sys;

/// A positive `errno` or `rte_errno`, shown with DPDK's text for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    /// No such device.
    pub(crate) const NODEV: Errno = Errno(19);
    /// Already there.
    pub(crate) const EXIST: Errno = Errno(17);
    /// Still referred to.
    pub(crate) const BUSY: Errno = Errno(16);
    /// Out of range, or not attached.
    pub(crate) const INVAL: Errno = Errno(22);
    /// The driver has no such function.
    pub(crate) const NOTSUP: Errno = Errno(95);

    /// What the thread's last failed call left in `rte_errno`.
    pub(crate) fn last() -> Self {
        // SAFETY: reads a thread-local integer.
        Errno(unsafe { sys::genie_errno() })
    }

    /// Turns a DPDK status, negative on failure, into a result.
    pub(crate) fn check(status: i32) -> Result<i32, Self> {
        // Some functions return -1 and put the cause into rte_errno.
        match status {
            0.. => Ok(status),
            -1 if Self::last().0 != 0 => Err(Self::last()),
            _ => Err(Errno(status.wrapping_neg())),
        }
    }

    /// The status of the ABI for this error.
    pub(crate) fn status(self) -> i32 {
        -self.0.clamp(1, 4095)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: takes any number; returns a static or thread-local string, never null.
        let text = unsafe { sys::rte_strerror(self.0) };
        // SAFETY: NUL-terminated and valid until the thread's next call.
        let text = unsafe { CStr::from_ptr(text) };
        write!(f, "{} (errno {})", text.to_string_lossy(), self.0)
    }
}

impl std::error::Error for Errno {}
