//! Metrics over HTTP: `/metrics` for Prometheus, `/health`, `/status.json`.
//!
//! Called by the agent, which binds the address and goes on without it where
//! that fails. The invariant: *asking costs the data path nothing*; all figures
//! are those that `genie status` shows, and what the control plane counts.

mod counters;
mod engines;
mod exposition;
mod page;
mod server;

use std::net::SocketAddr;
use std::str::FromStr;

pub use counters::{Counters, Direction, Moved, Traffic};
pub use exposition::exposition;
pub use server::serve;

/// Where metrics are served if nothing else was said: loopback, because nobody
/// is asked who they are.
pub const ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9095);

/// What `--metrics` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted(pub Option<SocketAddr>);

/// Neither an address nor `off`.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is no place for metrics: write ADDRESS:PORT, such as 127.0.0.1:9095, or off")]
pub struct WantedError(String);

impl Default for Wanted {
    fn default() -> Self {
        Self(Some(ADDRESS))
    }
}

impl FromStr for Wanted {
    type Err = WantedError;

    fn from_str(text: &str) -> Result<Self, WantedError> {
        match text {
            "off" => Ok(Self(None)),
            _ => {
                let address = text.parse().map_err(|_| WantedError(text.to_owned()))?;
                Ok(Self(Some(address)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_somewhere_or_off() {
        assert_eq!("off".parse(), Ok(Wanted(None)));
        assert_eq!("127.0.0.1:9095".parse(), Ok(Wanted::default()));
        assert!("9095".parse::<Wanted>().is_err());
    }
}
