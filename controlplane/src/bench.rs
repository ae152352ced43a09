//! `genie bench`: what Genie carries, beside what the machine can carry.
//!
//! Two processes (or two threads of one) talk over a control connection while
//! engines move blocks between them. In reading order: [`plan`] (what was
//! asked for), `run` (one row after another), [`measure`] (the loop and the
//! clock; knows nothing of what it measures), [`genie`], [`agents`] and
//! [`baseline`] (what carries blocks: engines, programs and their agents, what
//! others use), [`peer`] (the other process), [`report`] (the figures).
//! Its rules: a figure is of verified bytes, stands beside a baseline of the
//! same run, and where there is none there is a reason.

use std::time::Duration;

use genie_client::{BatchError, ClientError, NotOfArena};
use genie_dataplane::engine::{FailReason, OpenError};
use genie_dataplane::memory::RegionError;
use genie_dataplane::memory::accelerator::AcceleratorError;

pub mod agents;
pub mod baseline;
pub mod carriers;
pub mod channel;
pub mod environment;
pub mod figures;
pub mod genie;
pub mod lab;
pub mod measure;
pub mod message;
pub mod other;
pub mod peer;
pub mod plan;
pub mod polled;
pub mod pool;
pub mod report;
pub mod run;
pub mod statistics;
pub mod table;
pub mod window;

pub use plan::BenchArgs;
pub use run::run;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Not built yet.
    #[error("{0}")]
    NotBuilt(&'static str),
    /// The engine could not be started.
    #[error("{0}: {1}")]
    Engine(carriers::Kind, String),
    /// The engine's thread has ended.
    #[error("the engine has ended")]
    EngineEnded,
    /// No path between the engines.
    #[error("no path: {0}")]
    Open(#[from] OpenError),
    /// A transfer failed.
    #[error("a transfer failed: {0}")]
    Transfer(#[from] FailReason),
    /// More operations than an endpoint takes.
    #[error("more operations at a time than an endpoint takes: lower --batch-size")]
    TooManyOperations,
    /// No memory for the blocks.
    #[error("no memory for the blocks: {0}")]
    Memory(#[from] RegionError),
    /// More memory than there is.
    #[error("{0} bytes are more than the blocks' memory: lower --block-size or --batch-size")]
    TooLarge(u64),
    /// Bytes arrived that were not sent.
    #[error("block {block} is not what was sent")]
    Inconsistent {
        /// The first such block.
        block: u64,
    },
    /// An agent could not be started.
    #[error("an agent could not be started: {0}")]
    Agent(String),
    /// An agent does not do what a program asks.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A block is not where it should be.
    #[error(transparent)]
    Arena(#[from] NotOfArena),
    /// Blocks do not fit a window.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A device's memory cannot be used.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
    /// The connection between the two processes.
    #[error("between the two processes: {0}")]
    Channel(#[source] std::io::Error),
    /// The other process is gone.
    #[error("the other process is gone")]
    PeerGone,
    /// The other process does not answer.
    #[error("the other end has been silent for {0:?}")]
    Silent(Duration),
    /// Not what is spoken here.
    #[error("the other process says what is not understood here")]
    Garbage,
    /// Of another version.
    #[error("the other process speaks '{0}': use the same genie at both ends")]
    Version(String),
    /// The other process cannot.
    #[error("{0}")]
    Refused(String),
    /// The lab could not be built.
    #[error("the lab: {0}")]
    Lab(String),
    /// The result could not be written.
    #[error("cannot write the result: {0}")]
    Write(#[source] std::io::Error),
    /// Rows without figures.
    #[error("{failed} of {all} rows have no figures; the first: {first}")]
    Rows {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
        /// Name and reason of one.
        first: String,
    },
}

impl BenchError {
    /// Whether the command line is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Usage(_) | Self::NotBuilt(_))
    }
}
