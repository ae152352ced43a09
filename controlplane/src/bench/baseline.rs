//! What others do on the same machine in the same run, with the same memory.

pub mod iperf3;
pub mod memcpy;
pub mod raw;
pub mod tcp;

use serde::{Deserialize, Serialize};

/// A family of baselines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Baseline {
    /// Copies by one core, memory to memory.
    Memcpy,
    /// Bare frames over the same device: untouched, copied, copied and checked.
    Raw,
    /// Bare sockets: blocks with and without CRC32C, and a ping-pong.
    Tcp,
    /// iperf3 with 1, 2 and 4 streams, and with sendfile.
    Iperf3,
    /// None.
    None,
}

/// All there are.
pub const ALL: [Baseline; 4] = [
    Baseline::Memcpy,
    Baseline::Raw,
    Baseline::Tcp,
    Baseline::Iperf3,
];
