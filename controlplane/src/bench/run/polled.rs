//! The rows whose engines are driven by the measuring threads themselves.

use genie_dataplane::Integrity;

use super::baselines::pair_of;
use super::{Bench, op_name};
use crate::bench::BenchError;
use crate::bench::genie::{ask, unexpected};
use crate::bench::measure::{self, Workload};
use crate::bench::message::{Reply, Request};
use crate::bench::plan::PlannedRow;
use crate::bench::polled::{End, Ping};
use crate::bench::report::Row;

impl Bench<'_> {
    /// Measures every one; two processes of this host, joined by a pair.
    pub(super) fn measure_polled(&mut self) {
        for row in self.plan.polled.clone() {
            let digest = match self.plan.integrity {
                Integrity::Digest => "",
                Integrity::None => "no-digest ",
            };
            let described = Row {
                name: format!("dpdk(polled) pingpong hot {digest}{}", row.block_size),
                op: op_name(row.op).into(),
                transport: "dpdk".into(),
                block_size: row.block_size,
                batch_size: 1,
                threads: Some(1),
                digest: Some(self.plan.integrity == Integrity::Digest),
                reasons: vec!["dpdk: each engine on the thread that waits for it".into()],
                ..Row::default()
            };
            self.progress.set_message(described.name.clone());
            match self.measure_polled_row(described.clone(), &row) {
                Ok(measured) => self.report.rows.push(measured),
                Err(error) => {
                    let asked = self.plan.kinds_asked;
                    self.miss(&described.name, asked, "dpdk", &error);
                }
            }
            self.progress.inc(1);
        }
    }

    fn measure_polled_row(&self, described: Row, row: &PlannedRow) -> Result<Row, BenchError> {
        let mut other = self.connect()?;
        let device = pair_of(&other)?;
        let integrity = self.plan.integrity;
        let mut end = End::open(&device, row.block_size)?;
        let (local, session) = end.local();
        let request = Request::PolledPong {
            device,
            local,
            session,
            block_size: row.block_size,
            integrity,
        };
        let (local, session) = match ask(&mut other.channel, &request)? {
            Reply::Polled(local, session) => (local, session),
            reply => return Err(unexpected(reply)),
        };
        let theirs = local.driver.clone();
        end.connect(local, session, integrity)?;
        let mut ping = Ping::new(end);
        let work = Workload {
            rate: None,
            ..self.workload(row)
        };
        let warmup = Workload {
            duration: self.plan.warmup,
            ..work.clone()
        };
        measure::run(&mut ping, &warmup)?;
        let mut measured = self.measure_carrier(&mut ping, described, &work)?;
        // Of the other end, which polls as well, nobody is asked meanwhile.
        measured.cpu_s_per_gb = None;
        measured.device = Some(format!("{} → {theirs}", ping.driver()));
        // Every block's digest was compared with that of what came back.
        measured.verified = integrity == Integrity::Digest;
        ping.close();
        match other.channel.receive(std::time::Duration::from_secs(10))? {
            Reply::Driver(_) => Ok(measured),
            reply => Err(unexpected(reply)),
        }
    }
}
