//! The control plane: who talks to whom, over which path, and about which tensors.
//!
//! The `genie` binary is a thin shell around this crate. In reading order:
//! [`agent`] (one process a host), [`application`] (the socket that programs on
//! the host use; [`genie_client`] is its other end), [`session`] (one connection to a
//! peer's agent), [`identity`] (who that is, and [`rights`]: what it may do),
//! [`negotiation`] (which path and why not a better one), [`security`] (whether
//! it is sealed),
//! [`transfer`] (a batch of tensors moving), [`store`] (where they live).
//! Bytes of tensors never pass through here: the engines of
//! [`genie_dataplane`] move them.

#![forbid(unsafe_code)]

pub mod agent;
pub mod application;
pub mod bench;
pub mod budget;
pub mod cli;
pub mod config;
pub mod devices;
pub mod doctor;
pub mod frame;
#[cfg(any(test, fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
pub mod identity;
pub mod message;
pub mod metrics;
pub mod negotiation;
pub mod node;
pub mod notifications;
pub mod policy;
pub mod quota;
pub mod rights;
pub mod safetensors;
pub mod security;
pub mod session;
pub mod store;
pub mod strangers;
pub mod transfer;
pub mod transport;
pub mod units;

pub use genie_client::{status, tensor};
