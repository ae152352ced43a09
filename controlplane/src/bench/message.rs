//! What the two processes of a benchmark say to each other.

use genie_client::Memory;
use genie_dataplane::engine::udp;
use genie_dataplane::ledger::Copies;
use genie_dataplane::{Integrity, Secrets, SessionId, TransferId};
use serde::{Deserialize, Serialize};

use super::baseline::raw::{Received, Work};
use super::baseline::tcp::How;
use super::carriers::Kind;
use super::pool::Layout;
use crate::transport::Local;

/// What the measuring process asks; answered by one [`Reply`] each, in order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// First of all: the version of this protocol and of Genie.
    Hello(String),
    /// Take memory for all rows to come.
    Memory {
        /// How much.
        bytes: u64,
        /// Of which kind.
        memory: Memory,
    },
    /// Start an engine; [`Reply::Started`].
    Start {
        /// Which.
        kind: Kind,
        /// The device, where the measuring process decides.
        device: Option<String>,
        /// How.
        setup: Setup,
    },
    /// Open a session with the measuring process's engine.
    Open {
        /// Where that is; its TCP port is the one to dial.
        local: Local,
        /// What it calls the session.
        session: SessionId,
        /// What proves data connections.
        token: [u8; 16],
    },
    /// Post receives for a row; [`Reply::Grants`], and more of those unasked
    /// until the row ends.
    Begin {
        /// Where blocks lie.
        layout: Layout,
        /// Blocks in flight at a time.
        batch: usize,
        /// Send each block back.
        echo: bool,
    },
    /// Receives that the measuring process has posted, for an echo. Not answered.
    Grants(Vec<TransferId>),
    /// The row is over after so many blocks: check them, post no more.
    End {
        /// How many blocks were sent.
        blocks: u64,
        /// How much to compare from either end.
        bytes_max: u64,
    },
    /// Stop the engine.
    Stop,
    /// What was used so far; [`Reply::Used`].
    Usage,
    /// Accept bare connections; [`Reply::Port`].
    BareTcp {
        /// Where blocks lie.
        layout: Layout,
        /// What is done with them.
        how: How,
    },
    /// Start `iperf3 --server --one-off`; [`Reply::Port`].
    Iperf3,
    /// Receive bare frames; [`Reply::Ready`], and [`Reply::Frames`] at the end.
    RawDevice {
        /// The pair's socket.
        device: String,
        /// What to do with them.
        work: Work,
    },
    /// Send bare frames back; [`Reply::Ready`], and [`Reply::Driver`] at the end.
    RawPong {
        /// The pair's socket.
        device: String,
    },
    /// Send offers back, with an engine of the peer's own thread;
    /// [`Reply::Polled`], and [`Reply::Driver`] at the end.
    PolledPong {
        /// The pair's socket.
        device: String,
        /// Where the measuring process's engine is.
        local: udp::Local,
        /// What it calls the session.
        session: SessionId,
        /// Bytes of a block.
        block_size: u64,
        /// Whether blocks are under checksums.
        integrity: Integrity,
    },
    /// Read blocks in the frames they come in, with an engine of the peer's own
    /// thread; [`Reply::Polled`], and [`Reply::Read`] at the end.
    PolledRead {
        /// The pair's socket.
        device: String,
        /// Where the measuring process's engine is.
        local: udp::Local,
        /// What it calls the session.
        session: SessionId,
        /// Bytes of a block.
        block_size: u64,
        /// Blocks in flight at a time.
        batch: usize,
        /// Whether blocks are under checksums.
        integrity: Integrity,
    },
    /// The end.
    Bye,
}

/// How an engine is set up at both ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Connections of a TCP session.
    pub streams: u16,
    /// Largest IP packet on a DPDK device.
    pub mtu: u16,
    /// The kernel's congestion control of those connections, if one was asked for.
    pub congestion: Option<String>,
    /// What packets of a device are sealed with at this end, if they are.
    pub secrets: Option<Secrets>,
    /// Whether blocks are under checksums.
    pub integrity: Integrity,
}

/// What the other process answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// As asked.
    Done,
    /// It cannot, and why.
    Failed(String),
    /// An engine runs there.
    Started(Local, SessionId),
    /// Receives are posted under these ids, in this order.
    Grants(Vec<TransferId>),
    /// A row is over: blocks that were compared.
    Checked(u64),
    /// Where to connect.
    Port(u16),
    /// See [`Usage`].
    Used(Usage),
    /// Frames are awaited.
    Ready,
    /// The driver of the end that sent frames back.
    Driver(String),
    /// An engine that its own thread drives, and its name of the session.
    Polled(udp::Local, SessionId),
    /// The driver of the end that read blocks, and the sum of all their words.
    Read(String, u64),
    /// What became of bare frames.
    Frames(Received),
}

/// What one process used since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Which process: both ends may be one.
    pub process: u32,
    /// CPU seconds, user and kernel.
    pub cpu_seconds: f64,
    /// Copies of the transfers that succeeded.
    pub copies: Copies,
    /// Bytes of them.
    pub bytes: u64,
    /// Segments sent again.
    pub retransmits: u64,
}
