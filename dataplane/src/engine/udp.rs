//! The engine that speaks Genie's UDP protocol over a [`Device`](crate::device::Device).

#![forbid(unsafe_code)]

use std::net::IpAddr;

use genie_proto::SessionId;
use serde::{Deserialize, Serialize};

/// What a peer must know to reach this engine; travels in the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// The driver's name, such as `net_vhost`.
    pub driver: String,
    /// Addresses on the device's link, most preferred first.
    pub addresses: Vec<IpAddr>,
    /// UDP port.
    pub port: u16,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Packets the peer may have in flight toward us.
    pub credit: u16,
}

/// A peer's engine and its name for the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// Where it is.
    pub local: Local,
    /// The session id it chose.
    pub session: SessionId,
}
