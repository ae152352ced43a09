//! Whether the kernel takes this host's clock for right.
//!
//! Called by `genie doctor`, as certificates and logs depend on it.

use std::mem::MaybeUninit;
use std::time::Duration;

/// What the kernel says of its clock (adjtimex(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Whether somebody keeps it in step with the world.
    pub synchronised: bool,
    /// How wrong it may be, by the estimate of whoever does.
    pub error_most: Duration,
}

/// Asks the kernel; changes nothing and needs no privileges.
pub fn clock() -> std::io::Result<Clock> {
    let mut timex = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: all zeroes are a `timex` that asks for no change; it is written.
    let state = unsafe { libc::adjtimex(timex.as_mut_ptr()) };
    if state < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: integers only, zeroed above and then filled in by the kernel.
    let timex = unsafe { timex.assume_init() };
    let micros = u64::try_from(timex.maxerror).unwrap_or(u64::MAX);
    Ok(Clock {
        synchronised: state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0,
        error_most: Duration::from_micros(micros),
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_answers() {
        let clock = super::clock().expect("no privileges are needed");
        // It gives up an estimate beyond 16 s, and grows it otherwise.
        assert!(clock.error_most.as_secs() < 60, "{clock:?}");
    }
}
