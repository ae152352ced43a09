//! Whether tensors are sealed on their way, and with which keys.
//!
//! Each agent says in its Hello what it wants; what one of them demands counts
//! for both. Sealing takes keys that only the two have, so a TLS control
//! connection. The invariant: *an end that demands sealed data opens no path
//! whose bytes others could read or change*.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::transport::Transport;

/// What an agent demands of the paths that tensors take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataSecurity {
    /// Nothing: checksums find accidents.
    #[default]
    Plain,
    /// Authenticated encryption of every packet, or record of a connection (AES-128-GCM).
    Aead,
}

/// Not a [`DataSecurity`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not known: write plain or aead")]
pub struct UnknownSecurity(String);

/// Random bytes that make the keys of every attempt to open a path others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Salt(pub [u8; 16]);

/// Both ends' salts of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salts {
    /// The dialler's.
    pub dialler: Salt,
    /// The acceptor's.
    pub acceptor: Salt,
}

/// What one end of a session demands.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it wants.
    pub security: DataSecurity,
}

/// Whether what `transport` carries is sealed between two ends that demand
/// this, or why there can be no such path. `keyed`: they have keys in common.
pub fn agree(demands: [Demand<'_>; 2], keyed: bool, transport: Transport) -> Result<bool, String> {
    let demanding = demands
        .iter()
        .find(|demand| demand.security == DataSecurity::Aead);
    let Some(Demand { name, .. }) = demanding else {
        return Ok(false);
    };
    match transport {
        // Nothing leaves the host, and the kernel says who is at the other end.
        Transport::Shm => Ok(false),
        Transport::Dpdk | Transport::Tcp if keyed => Ok(true),
        Transport::Dpdk | Transport::Tcp => Err(format!(
            "node '{name}' demands sealed data (--data-security aead), for which both ends \
             need --ca, --cert and --key"
        )),
    }
}

impl FromStr for DataSecurity {
    type Err = UnknownSecurity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "plain" => Ok(Self::Plain),
            "aead" => Ok(Self::Aead),
            other => Err(UnknownSecurity(other.to_owned())),
        }
    }
}

impl fmt::Display for DataSecurity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Aead => "aead",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_demands_counts_for_both() {
        use DataSecurity::{Aead, Plain};
        let demands = |ours, theirs| {
            [("a", ours), ("b", theirs)].map(|(name, security)| Demand { name, security })
        };
        for transport in [Transport::Shm, Transport::Dpdk, Transport::Tcp] {
            assert_eq!(agree(demands(Plain, Plain), true, transport), Ok(false));
        }
        for both in [demands(Aead, Plain), demands(Plain, Aead)] {
            assert_eq!(agree(both, true, Transport::Dpdk), Ok(true));
            assert_eq!(agree(both, true, Transport::Tcp), Ok(true));
            assert_eq!(agree(both, true, Transport::Shm), Ok(false));
            let name = if both[0].security == Aead {
                "'a'"
            } else {
                "'b'"
            };
            for transport in [Transport::Dpdk, Transport::Tcp] {
                let reason = agree(both, false, transport).unwrap_err();
                assert!(reason.contains(name), "{reason}");
            }
        }
    }
}
