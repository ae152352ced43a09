//! `genie doctor`: what of this machine Genie can use, and what mends the rest.
//!
//! Called by the `genie` command; needs no privileges and changes nothing. A
//! check looks at a [`System`], real or made up, and leaves one [`Finding`] or
//! more. The invariant: *whatever is not well says why, and what to type where
//! a command can mend it*.

#[cfg(test)]
mod fake;
mod host;
mod network;
mod peer;
mod system;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Serialize;

pub use system::{AgentReply, Bind, PeerReply, Real, System};

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It can be used.
    Ok,
    /// Genie works without it, or less well with it.
    Warn,
    /// What it is for does not work.
    Broken,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub what: String,
    /// How it is.
    pub state: State,
    /// What was seen.
    pub why: String,
    /// The command that mends it; none where nothing is wrong, or no command can.
    pub mend: Option<String>,
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of the checks.
    pub findings: Vec<Finding>,
    /// Whether anything at all can work: tensors can move over TCP on this host.
    pub usable: bool,
}

/// What an agent would be told, as far as it can collide with what is there.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The application socket; none where there is no default place.
    pub socket: Option<PathBuf>,
    /// Addresses that an agent listens on, with the flags that choose others.
    pub addresses: Vec<(&'static str, SocketAddr)>,
    /// A peer to look at.
    pub node: Option<String>,
}

type Check = fn(&dyn System, &Wanted) -> Vec<Finding>;

/// All checks, in the order of the report.
const CHECKS: [Check; 16] = [
    network::loopback,
    host::agent,
    host::socket,
    network::ports,
    host::huge_pages,
    host::dpdk,
    network::cards,
    network::iommu,
    network::mtu,
    network::offloads,
    network::device_offloads,
    host::capabilities,
    host::limits,
    host::clock,
    host::synchronisation,
    host::cuda,
];

/// Looks at everything.
pub fn examine(system: &dyn System, wanted: &Wanted) -> Report {
    let mut findings: Vec<Finding> = CHECKS
        .iter()
        .flat_map(|check| check(system, wanted))
        .collect();
    if let Some(node) = &wanted.node {
        findings.extend(peer::peer(system, wanted, node));
    }
    let usable = system.loopback().is_ok();
    Report { findings, usable }
}

impl Finding {
    fn ok(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            state: State::Ok,
            why: why.into(),
            mend: None,
        }
    }

    fn warn(what: impl Into<String>, why: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            state: State::Warn,
            mend: Some(mend.into()),
            ..Self::ok(what, why)
        }
    }

    fn broken(what: impl Into<String>, why: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            state: State::Broken,
            ..Self::warn(what, why, mend)
        }
    }
}

impl State {
    /// As text shows it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Broken => "broken",
        }
    }
}

/// A command as this user has to type it.
fn as_root(system: &dyn System, command: &str) -> String {
    if system.uid() == 0 {
        command.to_owned()
    } else {
        format!("sudo {command}")
    }
}
