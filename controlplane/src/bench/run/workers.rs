//! The threads that measure: each drives a session of its own.
//!
//! With `--threads N` there are N engines at each end and N threads here, each
//! with its share of the memory. A row is what they do together: blocks add up,
//! the slowest ends the time, and latencies lie in one histogram.

use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::{Secret, Secrets};

use super::{Begun, Bench, Rig};
use crate::bench::BenchError;
use crate::bench::carriers::{Kind, Node};
use crate::bench::genie::{Blocks, Session};
use crate::bench::measure::{self, Sample, Workload};
use crate::bench::message::{Setup, Usage};
use crate::bench::other::Other;
use crate::bench::plan::{Op, PlannedRow};
use crate::bench::pool::{Layout, Pool};
use crate::bench::report::Row;
use crate::node::random;
use crate::security::DataSecurity;

/// All threads' ends; at least one.
pub(super) struct Workers(Vec<Worker>);

/// What one thread drives. The session goes first: its end reaches the other
/// process while that is there.
struct Worker {
    session: Session,
    other: Other,
    pool: Pool,
}

/// A row under way, in every session.
struct UnderWay<'a>(Vec<Blocks<'a>>);

impl Bench<'_> {
    /// Opens as many sessions as threads are asked for.
    pub(super) fn open_workers(
        &self,
        kind: Kind,
        rows: &[PlannedRow],
        congestion: Option<&str>,
        security: DataSecurity,
    ) -> Result<Workers, BenchError> {
        let count = self.plan.threads;
        if kind == Kind::Dpdk && count > 1 {
            return Err(BenchError::NotBuilt(
                "one process drives one device with one queue: --threads 1, or --transport tcp",
            ));
        }
        let workers = (0..count).map(|_| self.open_worker(kind, rows, congestion, security));
        workers.collect::<Result<_, _>>().map(Workers)
    }

    fn open_worker(
        &self,
        kind: Kind,
        rows: &[PlannedRow],
        congestion: Option<&str>,
        security: DataSecurity,
    ) -> Result<Worker, BenchError> {
        let mut other = self.connect()?;
        let pool = self.take_memory(&mut other, rows)?;
        let setup = Setup {
            streams: self.plan.streams,
            mtu: self.args.mtu,
            congestion: congestion.map(str::to_owned),
            secrets: secrets(security),
            integrity: self.plan.integrity,
        };
        let folder = other
            .folder
            .as_ref()
            .map(|folder| folder.path().join("pair"));
        let (ours, theirs) = match (&self.args.dpdk_device, folder) {
            (Some(device), _) => (Some(device.clone()), None),
            (None, folder) => {
                let pair = folder.map(|path| format!("pair:{}", path.display()));
                (pair.clone(), pair)
            }
        };
        let end = match &other.pairs {
            Some(pairs) if kind == Kind::Mem => {
                let (ours, theirs) = pair(&Options::default());
                pairs.send(theirs).map_err(|_| BenchError::PeerGone)?;
                Some(ours)
            }
            _ => None,
        };
        let listen = other.channel.local().map_err(BenchError::Channel)?.ip();
        let start = || Node::start(kind, ours.as_deref(), end, listen, &setup);
        let session = Session::open(&mut other.channel, kind, start, theirs, setup.clone())?;
        Ok(Worker {
            session,
            other,
            pool,
        })
    }
}

/// Random ones: sessions of benchmarks have no TLS to make them from, so the other
/// process hears them on its control connection.
fn secrets(security: DataSecurity) -> Option<Secrets> {
    (security == DataSecurity::Aead).then(|| Secrets {
        send: Secret(random()),
        receive: Secret(random()),
    })
}

impl Rig for Workers {
    fn describe(&self, row: &mut Row) {
        row.device = Some(self.0[0].session.device());
        row.memory = Some(self.0[0].pool.pages().into());
    }

    fn begin(
        &mut self,
        layout: Layout,
        row: &PlannedRow,
    ) -> Result<Box<dyn Begun + '_>, BenchError> {
        let echo = row.op == Op::Pingpong;
        let mut begun = Vec::with_capacity(self.0.len());
        for worker in &mut self.0 {
            let (channel, pool) = (&mut worker.other.channel, &worker.pool);
            pool.fill(&layout);
            let session = &mut worker.session;
            begun.push(session.blocks(channel, pool, layout, row.batch_size, echo)?);
        }
        Ok(Box::new(UnderWay(begun)))
    }
}

impl Begun for UnderWay<'_> {
    fn run(&mut self, work: &Workload) -> Result<Sample, BenchError> {
        measure::run_together(&mut self.0, work)
    }

    fn usage(&mut self) -> Result<Vec<Usage>, BenchError> {
        let mut all = Vec::with_capacity(2 * self.0.len());
        for blocks in &mut self.0 {
            all.extend(blocks.usage()?);
        }
        Ok(all)
    }

    fn end(self: Box<Self>, bytes_max: u64) -> Result<u64, BenchError> {
        let share = bytes_max / self.0.len() as u64;
        let mut least = u64::MAX;
        for blocks in self.0 {
            least = least.min(blocks.end(share)?);
        }
        Ok(least)
    }
}
