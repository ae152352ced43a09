//! What to measure: the command line, and the rows that follow from it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use genie_client::Memory;
use genie_client::protocol::{BATCHES_MAX, ParseMemoryError};
use genie_dataplane::Integrity;
use genie_dataplane::memory::accelerator::MemoryKind;

use super::BenchError;
use super::baseline::{self, Baseline};
use super::carriers::Kind;
use super::polled::pingpong;
use crate::security::DataSecurity;
use crate::units::{parse_bytes, parse_duration};

/// Blocks of the default's reads and writes: what a layer of a model is, about.
const ONE_SIDED_BYTES: u64 = 1 << 20;

/// The largest of the default's ping-pongs that engines without threads carry.
const PAGE_BYTES: u64 = 4 << 10;

/// The size that is read in place by default.
const IN_PLACE_BYTES: u64 = 16 << 20;

/// What is done with blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// From here to the other process; through agents: a put
    Send,
    /// There and back, one at a time
    Pingpong,
    /// One-sided, from a window of the other agent's
    Read,
    /// One-sided, into a window of the other agent's
    Write,
    /// From here to the other process, which reads them in the frames they come
    /// in: engines on the measuring threads, over the local pair
    InPlace,
}

/// Whether tensors are checked end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Digest {
    /// Every byte under CRC32C
    On,
    /// No checksums: contents are compared after each row, and nothing else is
    Off,
}

/// The arguments of `genie bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Where the other end is.
    #[command(flatten)]
    pub place: Place,
    /// What carries blocks, compared: shm, dpdk, tcp, mem (default: dpdk and tcp)
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub transport: Vec<Kind>,
    /// What is done with blocks (default: send, pingpong of the smallest, and
    /// with --spawn write and read of 1 MiB through agents)
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub op: Vec<Op>,
    /// Sizes: 4k,1m or a sweep by factors of four, 64:1g
    #[arg(long, value_name = "SIZES")]
    pub block_size: Option<String>,
    /// Blocks in flight
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batch_size: u16,
    /// Connections of the TCP path
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub streams: u16,
    /// Measuring threads, each with engines of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: u16,
    /// Where blocks lie: auto, host, hugepages, cuda:N or sim, which is simulated
    #[arg(long, value_name = "KIND", default_value_t, value_parser = parse_memory)]
    pub memory: Memory,
    /// Buffers larger than the cache, used in turn
    #[arg(long, conflicts_with = "hot")]
    pub cold: bool,
    /// A few buffers used again and again
    #[arg(long)]
    pub hot: bool,
    /// How long each repeat of a row sends
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub duration: Option<Duration>,
    /// How long each row sends before its repeats
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub warmup: Option<Duration>,
    /// Repeats of each row
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeats: Option<u16>,
    /// Blocks begun each second; latency then counts from when each was due
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// End-to-end check of every byte
    #[arg(long, value_enum, default_value = "on")]
    pub digest: Digest,
    /// Compare every byte that arrived, not 64 MiB of each row
    #[arg(long)]
    pub check_consistency: bool,
    /// What to measure beside Genie (default: all that are there)
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub baseline: Vec<Baseline>,
    /// This end's device, for --peer and --serve: pci:…, vdev:… or pair:…
    #[arg(long, value_name = "SPEC")]
    pub dpdk_device: Option<String>,
    /// Largest IP packet on DPDK devices, in bytes
    #[arg(long, default_value_t = 9000, value_parser = clap::value_parser!(u16).range(576..))]
    pub mtu: u16,
    /// Congestion controls to measure kernel TCP with, Genie's and the baselines'
    /// (default: the kernel's own; over loopback Genie takes cubic)
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub congestion: Vec<String>,
    /// The agent's socket, for --node
    #[arg(long, value_name = "PATH", env = "GENIE_SOCKET")]
    pub socket: Option<PathBuf>,
    /// How packets of devices are measured, one after another: plain, or aead, which seals them
    /// (with random keys, as there is no TLS to make them from)
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "plain"
    )]
    pub data_security: Vec<DataSecurity>,
    /// With --serve: end after one benchmark
    #[arg(long, requires = "serve")]
    pub once: bool,
    /// Less of everything: under a minute
    #[arg(long)]
    pub quick: bool,
    /// Also write the rows to a file, as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
}

/// Where the other end is: one of these.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct Place {
    /// Start the other process on this host
    #[arg(long)]
    pub spawn: bool,
    /// Both ends in this process
    #[arg(long)]
    pub in_process: bool,
    /// A process that runs `genie bench --serve`
    #[arg(long, value_name = "ADDR")]
    pub peer: Option<SocketAddr>,
    /// Be the other process, for one benchmark after another
    #[arg(long, value_name = "ADDR")]
    pub serve: Option<SocketAddr>,
    /// A peer of the agent that runs here, through which programs' requests go
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Two hosts with a bad wire, or `none`, between them, made here (root; see scripts/netns)
    #[arg(long, value_name = "PROFILE")]
    pub lab: Option<String>,
}

/// What follows from the arguments.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What carries blocks, in this order.
    pub kinds: Vec<Kind>,
    /// Whether they were asked for: then one that does not work is a failure.
    pub kinds_asked: bool,
    /// Whether agents that run already carry blocks, as they have agreed.
    pub through_running: bool,
    /// Whether blocks are under checksums.
    pub integrity: Integrity,
    /// The rows of each.
    pub rows: Vec<PlannedRow>,
    /// Rows of engines that the measuring threads drive themselves, over a pair.
    pub polled: Vec<PlannedRow>,
    /// The baselines.
    pub baselines: Vec<Baseline>,
    /// Whether they were asked for.
    pub baselines_asked: bool,
    /// Measuring threads.
    pub threads: u16,
    /// Connections.
    pub streams: u16,
    /// Where blocks lie.
    pub memory: Memory,
    /// How long a repeat sends.
    pub duration: Duration,
    /// How long before the first.
    pub warmup: Duration,
    /// Repeats.
    pub repeats: usize,
    /// Blocks a second.
    pub rate: Option<f64>,
    /// Bytes to compare from either end of a row.
    pub check_bytes: u64,
}

/// One row of each carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedRow {
    /// What is done.
    pub op: Op,
    /// With how large blocks.
    pub block_size: u64,
    /// How many at a time.
    pub batch_size: usize,
    /// Whether with cold buffers.
    pub cold: bool,
}

impl BenchArgs {
    /// Decides what to measure.
    pub fn plan(&self) -> Result<Plan, BenchError> {
        self.refuse()?;
        let sizes = match (&self.block_size, self.quick) {
            (Some(text), _) => parse_sizes(text)?,
            (None, true) => vec![64, 64 << 10, 16 << 20],
            (None, false) => vec![64, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20],
        };
        let in_process = [Kind::Dpdk, Kind::Tcp, Kind::Mem];
        let apart = [Kind::Dpdk, Kind::Tcp];
        let through_running = self.place.node.is_some();
        let kinds = match (self.transport.is_empty(), self.place.in_process) {
            _ if through_running => Vec::new(),
            (false, _) => self.transport.clone(),
            // One process brings one end of a pair up.
            (true, true) => in_process[1..].to_vec(),
            (true, false) => apart.to_vec(),
        };
        let baselines = match self.baseline.as_slice() {
            [] => baseline::ALL.to_vec(),
            some => some
                .iter()
                .copied()
                .filter(|one| *one != Baseline::None)
                .collect(),
        };
        let short =
            |quick: u64, full: u64| Duration::from_millis(if self.quick { quick } else { full });
        Ok(Plan {
            kinds_asked: through_running || !self.transport.is_empty(),
            through_running,
            integrity: match self.digest {
                Digest::On => Integrity::Digest,
                Digest::Off => Integrity::None,
            },
            polled: if kinds.contains(&Kind::Dpdk) {
                self.polled_rows(&sizes)
            } else {
                Vec::new()
            },
            kinds,
            rows: self.rows(&sizes),
            baselines,
            baselines_asked: !self.baseline.is_empty(),
            threads: self.threads,
            streams: self.streams,
            memory: self.memory,
            duration: self.duration.unwrap_or(short(150, 700)),
            warmup: self.warmup.unwrap_or(short(100, 300)),
            repeats: self
                .repeats
                .map_or(if self.quick { 3 } else { 5 }, usize::from),
            rate: self.rate,
            check_bytes: if self.check_consistency {
                u64::MAX / 2
            } else {
                32 << 20
            },
        })
    }

    /// What programs get of agents, beside what engines carry: one size of it,
    /// of the default rows.
    fn one_sided_rows(&self, sizes: &[u64]) -> Vec<PlannedRow> {
        let plain = self.digest == Digest::On
            && self.data_security == [DataSecurity::Plain]
            && !self.transport.contains(&Kind::Mem);
        let by_default = self.op.is_empty() && self.place.spawn && !self.quick;
        if !by_default || self.only_agents() || !plain || !sizes.contains(&ONE_SIDED_BYTES) {
            return Vec::new();
        }
        let row = |op| PlannedRow {
            op,
            block_size: ONE_SIDED_BYTES,
            batch_size: usize::from(self.batch_size).min(BATCHES_MAX),
            cold: !self.hot,
        };
        vec![row(Op::Write), row(Op::Read)]
    }

    fn rows(&self, sizes: &[u64]) -> Vec<PlannedRow> {
        let ops = match (self.op.as_slice(), self.only_agents()) {
            ([], true) => &[Op::Send, Op::Write, Op::Read][..],
            ([], false) => &[Op::Send, Op::Pingpong],
            (asked, _) => asked,
        };
        let memory = self.temperatures();
        let mut rows = Vec::new();
        for op in ops {
            for (index, block_size) in sizes.iter().enumerate() {
                let by_default = self.op.is_empty();
                if *op == Op::InPlace {
                    continue;
                }
                if *op == Op::Pingpong {
                    // A ping-pong of large blocks measures what send does.
                    if !by_default || index == 0 {
                        rows.push(PlannedRow {
                            op: *op,
                            block_size: *block_size,
                            batch_size: 1,
                            cold: false,
                        });
                    }
                    continue;
                }
                for cold in memory {
                    rows.push(PlannedRow {
                        op: *op,
                        block_size: *block_size,
                        batch_size: self.batch_size.into(),
                        cold: *cold,
                    });
                }
            }
        }
        rows.extend(self.one_sided_rows(sizes));
        rows
    }

    /// Rows of engines without threads. Ping-pongs: what fits one packet, and by
    /// default the smallest size and 4 KiB. Read in place: by default one size.
    fn polled_rows(&self, sizes: &[u64]) -> Vec<PlannedRow> {
        let by_default = self.op.is_empty();
        let wanted = |op| by_default || self.op.contains(&op);
        let plain = self.data_security.contains(&DataSecurity::Plain);
        if !self.has_own_pair() || !plain {
            return Vec::new();
        }
        let mut rows = Vec::new();
        for (index, &block_size) in sizes.iter().enumerate() {
            let usual = index == 0 || block_size == PAGE_BYTES;
            let fits = block_size <= pingpong::BLOCK_MAX;
            if wanted(Op::Pingpong) && fits && (!by_default || usual) {
                rows.push(PlannedRow {
                    op: Op::Pingpong,
                    block_size,
                    batch_size: 1,
                    cold: false,
                });
            }
        }
        for &block_size in sizes {
            if wanted(Op::InPlace) && (!by_default || block_size == IN_PLACE_BYTES) {
                rows.extend(self.temperatures().iter().map(|cold| PlannedRow {
                    op: Op::InPlace,
                    block_size,
                    batch_size: self.batch_size.into(),
                    cold: *cold,
                }));
            }
        }
        rows
    }

    /// Whether two engines of the measuring threads can have the local pair.
    fn has_own_pair(&self) -> bool {
        let alone = self.dpdk_device.is_none() && self.threads == 1;
        self.place.spawn && alone && !self.only_agents()
    }

    /// Whether buffers are cold, each that is to be measured.
    fn temperatures(&self) -> &'static [bool] {
        match (self.cold, self.hot) {
            (true, _) => &[true],
            (_, true) => &[false],
            // Cold is what a transfer of a model is; hot is what others quote.
            _ if self.quick => &[true],
            _ => &[true, false],
        }
    }

    /// Whether no row can be carried by engines alone.
    fn only_agents(&self) -> bool {
        self.place.node.is_some() || self.memory.kind() != MemoryKind::Host
    }

    fn refuse(&self) -> Result<(), BenchError> {
        self.refuse_agents()?;
        if self
            .rate
            .is_some_and(|rate| !(rate.is_finite() && rate > 0.0))
        {
            return Err(BenchError::Usage("--rate: write a number above 0".into()));
        }
        let is_sealed = |kind: &Kind| *kind != Kind::Shm;
        let sealable = self.transport.is_empty() || self.transport.iter().any(is_sealed);
        let sealed = self.data_security.contains(&DataSecurity::Aead);
        let one_sided = self.op.contains(&Op::Read) || self.op.contains(&Op::Write);
        if sealed && (!sealable || one_sided || self.only_agents()) {
            return Err(BenchError::Usage(
                "--data-security aead is measured between engines: --transport tcp, dpdk, or \
                 mem with --in-process"
                    .into(),
            ));
        }
        let has_dpdk = self.transport.is_empty() || self.transport.contains(&Kind::Dpdk);
        if self.op.contains(&Op::InPlace) && !(has_dpdk && self.has_own_pair()) {
            return Err(BenchError::Usage(
                "--op in-place is measured over the local pair: --spawn --transport dpdk, with \
                 one thread"
                    .into(),
            ));
        }
        if self.op.contains(&Op::InPlace) && !self.data_security.contains(&DataSecurity::Plain) {
            return Err(BenchError::Usage(
                "--op in-place: packets that are sealed are copied to be opened".into(),
            ));
        }
        if self.transport.contains(&Kind::Mem) && !self.place.in_process {
            return Err(BenchError::Usage(
                "--transport mem needs --in-process".into(),
            ));
        }
        Ok(())
    }

    /// What agents cannot be asked.
    fn refuse_agents(&self) -> Result<(), BenchError> {
        let one_sided = self.op.contains(&Op::Read) || self.op.contains(&Op::Write);
        if !one_sided && !self.only_agents() {
            return Ok(());
        }
        let refused = |reason: &str| Err(BenchError::Usage(reason.into()));
        if !self.place.spawn && self.place.node.is_none() {
            return refused(
                "--op read, --op write and an accelerator's --memory go through agents: \
                 --spawn starts two, --node NAME is a peer of the one that runs here",
            );
        }
        if self.digest == Digest::Off {
            return refused(
                "--digest off: agents check every byte; --op send and pingpong of engines go without",
            );
        }
        if self.place.node.is_some() && !self.transport.is_empty() {
            return refused(
                "--transport: agents that run have agreed on one; restart them with it",
            );
        }
        if self.transport.contains(&Kind::Mem) {
            return refused("--transport mem joins two engines, no agents: leave it out");
        }
        if self.op.contains(&Op::Pingpong) && self.only_agents() {
            return refused("--op pingpong: programs have send, read and write; leave it out");
        }
        let sends = self.op.is_empty() || self.op.contains(&Op::Send);
        if usize::from(self.batch_size) > 1 && sends && self.only_agents() {
            return refused(
                "--batch-size: a program has one put at a time; use --threads, or --op read,write",
            );
        }
        if usize::from(self.batch_size) > BATCHES_MAX {
            return Err(BenchError::Usage(format!(
                "--batch-size: a program has at most {BATCHES_MAX} reads and writes at a time"
            )));
        }
        Ok(())
    }
}

impl Plan {
    /// Whether a row's blocks are moved by agents for programs, not by engines
    /// that this process drives.
    pub fn through_agents(&self, row: &PlannedRow) -> bool {
        self.through_running
            || self.memory.kind() != MemoryKind::Host
            || matches!(row.op, Op::Read | Op::Write)
    }
}

/// Kinds of memory, also as nixlbench's users would write them.
fn parse_memory(text: &str) -> Result<Memory, ParseMemoryError> {
    match text {
        "hugepages" => Ok(Memory::Hugepage),
        "pages" => Ok(Memory::Host),
        _ => text.parse(),
    }
}

/// Sizes with commas between; `FROM:TO` stands for a sweep by factors of four.
fn parse_sizes(text: &str) -> Result<Vec<u64>, BenchError> {
    let one = |word: &str| {
        // A bare k, m or g is the same as its capital.
        let word = word.trim();
        let word = if word.ends_with(['k', 'm', 'g', 't']) {
            word.to_uppercase()
        } else {
            word.into()
        };
        match parse_bytes(&word) {
            Ok(0) => Err(BenchError::Usage(
                "--block-size: a block has at least one byte".into(),
            )),
            Ok(bytes) if bytes > 1 << 36 => Err(BenchError::TooLarge(bytes)),
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(BenchError::Usage(format!("--block-size: {error}"))),
        }
    };
    let mut sizes = Vec::new();
    for word in text.split(',') {
        let Some((from, to)) = word.split_once(':') else {
            sizes.push(one(word)?);
            continue;
        };
        let (mut size, to) = (one(from)?, one(to)?);
        if size > to {
            return Err(BenchError::Usage(format!(
                "--block-size: {word} is the wrong way round"
            )));
        }
        while size < to {
            sizes.push(size);
            size *= 4;
        }
        sizes.push(to);
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn plan(line: &str) -> Result<Plan, String> {
        let line = Line::try_parse_from(["bench"].into_iter().chain(line.split(' ')));
        line.map_err(|error| error.to_string())?
            .bench
            .plan()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_and_sweeps() {
        assert_eq!(parse_sizes("4k,1MiB").unwrap(), [4096, 1 << 20]);
        assert_eq!(parse_sizes("64:1k").unwrap(), [64, 256, 1024]);
        assert_eq!(parse_sizes("64:2k").unwrap(), [64, 256, 1024, 2048]);
        for bad in ["", "0", "1k:64", "x", "1:", "1t"] {
            assert!(parse_sizes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_and_says_why() {
        for (line, word) in [
            ("--in-process --op read", "--spawn starts two"),
            ("--peer 127.0.0.1:1 --memory sim", "--spawn starts two"),
            ("--spawn --memory sim --op pingpong", "send, read and write"),
            ("--spawn --memory sim --batch-size 2", "one put at a time"),
            ("--spawn --op write --batch-size 65", "at most 64"),
            ("--node b --transport tcp", "have agreed"),
            ("--spawn --memory tape", "no kind of memory"),
            ("--spawn --digest off --op read", "agents check every byte"),
            ("--spawn --threads 0", "0 is not in 1..=64"),
            ("--spawn --transport mem", "--in-process"),
            ("--spawn --rate 0", "above 0"),
            (
                "--spawn --op in-place --data-security aead",
                "copied to be opened",
            ),
            (
                "--spawn --transport shm --data-security aead",
                "between engines",
            ),
            ("--node b --data-security aead", "between engines"),
            ("--spawn --data-security tls", "plain or aead"),
            ("--spawn --in-process", "cannot be used with"),
            ("--quick", "required"),
        ] {
            let refused = plan(line).expect_err(line);
            assert!(refused.contains(word), "{line}: {refused}");
        }
    }

    #[test]
    fn what_engines_cannot_do_goes_through_agents() {
        let of = |line: &str| {
            let plan = plan(line).unwrap();
            let rows = plan.rows.iter();
            rows.map(|row| (row.op, plan.through_agents(row)))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            of("--spawn --hot --block-size 4k --op send,read"),
            [(Op::Send, false), (Op::Read, true)]
        );
        let all = [(Op::Send, true), (Op::Write, true), (Op::Read, true)];
        assert_eq!(of("--spawn --hot --block-size 4k --memory sim"), all);
        assert_eq!(of("--node b --hot --block-size 4k"), all);
    }

    #[test]
    fn the_default_is_a_sweep_and_one_pingpong() {
        let plan = plan("--spawn").unwrap();
        assert_eq!(plan.kinds, [Kind::Dpdk, Kind::Tcp]);
        let pingpongs = plan.rows.iter().filter(|row| row.op == Op::Pingpong);
        assert_eq!(
            pingpongs.map(|row| row.block_size).collect::<Vec<_>>(),
            [64]
        );
        assert_eq!(plan.rows.len(), 15);
        let agents = plan.rows.iter().filter(|row| plan.through_agents(row));
        let agents: Vec<_> = agents.map(|row| (row.op, row.block_size)).collect();
        assert_eq!(agents, [(Op::Write, 1 << 20), (Op::Read, 1 << 20)]);
        assert!(plan.rows.iter().any(|row| row.cold) && plan.rows.iter().any(|row| !row.cold));
    }
}
