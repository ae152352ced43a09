//! The TCP engine: two of them on loopback, and peers that lie, die or keep silent.

mod faults;
mod harness;
mod lies;
mod sealed;
mod transfer;
