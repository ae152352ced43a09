//! The engine that passes descriptors: two of them, and peers that lie.

mod harness;
mod lies;
mod transfers;
