//! A wire between two network interfaces, as bad as its profile says.
//!
//! [`profile`] is what was asked for, [`link`] one direction of it on a clock
//! that is an argument, [`interface`] a real device's frames. [`wire`] drives
//! two links between two interfaces; `genie-wire` is its program, started by
//! `scripts/netns` between the two hosts of the lab.
//!
//! The invariant: *every frame that came in goes out, or is in a counter that
//! says why not.*

pub mod interface;
pub mod link;
pub mod profile;
pub mod wire;

pub use link::{Counters, Link};
pub use profile::{Profile, ProfileError};
