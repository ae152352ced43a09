//! What a run prints with `--json`; `docs/benchmarks.md` describes every field.

use serde::{Deserialize, Serialize};

/// The version of the schema; raised when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The command line.
    pub command: String,
    /// When it began, UTC, RFC 3339.
    pub date: String,
    /// Where it ran.
    pub environment: Environment,
    /// What Genie did.
    pub rows: Vec<Row>,
    /// What others did in the same run.
    pub baselines: Vec<Row>,
    /// What was asked for or is usual, and could not be measured.
    pub not_measured: Vec<NotMeasured>,
    /// What a reader should know before believing the figures.
    pub notes: Vec<String>,
    /// The wire of the lab, if there was one: what `genie-wire` printed.
    pub wire: Option<serde_json::Value>,
}

/// The machine and how busy it was.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Environment {
    /// Version of Genie.
    pub genie: String,
    /// Commit of the source, if it is known.
    pub commit: Option<String>,
    /// Whether the build has optimisations.
    pub optimised: bool,
    /// Kernel release.
    pub kernel: String,
    /// Processor model.
    pub cpu: String,
    /// Processors this process may run on.
    pub cpus: usize,
    /// Last-level cache in bytes, as the kernel says.
    pub cache_bytes: Option<u64>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Free huge pages of 2 MiB.
    pub free_hugepages: u64,
    /// Whether it ran as root.
    pub root: bool,
    /// The kernel's default congestion control for TCP.
    pub tcp_congestion: Option<String>,
    /// The driver library: DPDK's version, or why there is none.
    pub dpdk: String,
    /// Share of all processors' time that other programs used meanwhile.
    pub busy_others: Option<f64>,
    /// Share of it that the hypervisor gave to others.
    pub stolen: Option<f64>,
}

/// One line: what moved blocks of one size over one carrier.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// What it is: unique among the rows and baselines of a run.
    pub name: String,
    /// `send`, `pingpong`, `read`, `write`, `memcpy`, `frames` or `stream`.
    pub op: String,
    /// `shm`, `tcp`, `dpdk`, `mem` or `none`.
    pub transport: String,
    /// The drivers of both ends, such as `net_vhost → net_virtio_user`, or the
    /// paths of both agents.
    pub device: Option<String>,
    /// `hugepages`, `pages`, or the accelerator whose memory it is.
    pub memory: Option<String>,
    /// Whether buffers were larger than the cache and used in turn.
    pub cold: bool,
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks in flight.
    pub batch_size: usize,
    /// Measuring threads, each with a session of its own.
    #[serde(default)]
    pub threads: Option<u16>,
    /// Connections of each session.
    pub streams: Option<u16>,
    /// How often it was measured; rates are medians over that.
    pub repeats: usize,
    /// Blocks that arrived in all repeats.
    #[serde(default)]
    pub blocks: Option<u64>,
    /// Blocks to be begun each second, if that was asked for.
    #[serde(default)]
    pub rate: Option<f64>,
    /// Decimal gigabytes a second that arrived and were verified.
    pub gb_per_s: Option<f64>,
    /// The 95 % confidence interval of the mean.
    pub gb_per_s_ci95: Option<[f64; 2]>,
    /// Blocks a second.
    pub blocks_per_s: Option<f64>,
    /// Latency: from the begin to proof of arrival; of a ping-pong there and back.
    pub avg_us: Option<f64>,
    /// Its median.
    pub p50_us: Option<f64>,
    /// Its 99th percentile, of at least 100 blocks.
    pub p99_us: Option<f64>,
    /// Its 99.9th percentile, of at least 1000 blocks.
    pub p999_us: Option<f64>,
    /// CPU seconds of both ends, kernel included, for each gigabyte.
    pub cpu_s_per_gb: Option<f64>,
    /// Bytes that Genie's own code copied for each delivered, both ends.
    pub copies_per_byte: Option<f64>,
    /// Bytes that drivers copied for each delivered.
    pub driver_copies_per_byte: Option<f64>,
    /// Bytes that the kernel copied for each delivered.
    pub kernel_copies_per_byte: Option<f64>,
    /// Segments sent again; none where only the kernel knows.
    pub retransmits: Option<u64>,
    /// Whether every byte was under a checksum, and both ends' digests were
    /// equal; of Genie's rows only.
    #[serde(default)]
    pub digest: Option<bool>,
    /// Whether every byte that was looked at is the one that was sent, and
    /// both ends' digests were equal where there are digests. A baseline without a checksum is `false`.
    pub verified: bool,
    /// Why this carrier and not a better one.
    pub reasons: Vec<String>,
    /// Why there are no figures.
    pub error: Option<String>,
}

/// Something that was not measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NotMeasured {
    /// What.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl Report {
    /// The lowest of the rows' names that failed: then the run has failed.
    pub fn first_failure(&self) -> Option<&Row> {
        self.rows
            .iter()
            .chain(&self.baselines)
            .find(|row| row.error.is_some())
    }
}
