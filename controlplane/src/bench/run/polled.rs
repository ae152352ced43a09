//! The rows whose engines are driven by the measuring threads themselves.

use genie_dataplane::Integrity;

use super::baselines::pair_of;
use super::{Bench, op_name, temperature};
use crate::bench::BenchError;
use crate::bench::genie::{ask, unexpected};
use crate::bench::measure::{self, Carrier, Workload};
use crate::bench::message::{Reply, Request};
use crate::bench::other::Other;
use crate::bench::plan::{Op, PlannedRow};
use crate::bench::polled::pingpong::{self, Ping};
use crate::bench::polled::{End, in_place};
use crate::bench::pool::Pool;
use crate::bench::report::Row;

impl Bench<'_> {
    /// Measures every one; two processes of this host, joined by a pair.
    pub(super) fn measure_polled(&mut self) {
        for row in self.plan.polled.clone() {
            let digest = match self.plan.integrity {
                Integrity::Digest => "",
                Integrity::None => "no-digest ",
            };
            let (op, temperature) = (op_name(row.op), temperature(row.cold));
            let described = Row {
                name: format!("dpdk(polled) {op} {temperature} {digest}{}", row.block_size),
                op: op.into(),
                transport: "dpdk".into(),
                cold: row.cold,
                block_size: row.block_size,
                batch_size: row.batch_size,
                threads: Some(1),
                digest: Some(self.plan.integrity == Integrity::Digest),
                reasons: vec!["dpdk: each engine on the thread that waits for it".into()],
                ..Row::default()
            };
            self.progress.set_message(described.name.clone());
            let measured = match row.op {
                Op::InPlace => self.measure_in_place(described.clone(), &row),
                _ => self.measure_pingpong(described.clone(), &row),
            };
            match measured {
                Ok(measured) => self.report.rows.push(measured),
                Err(error) => {
                    let asked = self.plan.kinds_asked;
                    self.miss(&described.name, asked, "dpdk", &error);
                }
            }
            self.progress.inc(1);
        }
    }

    fn measure_pingpong(&self, described: Row, row: &PlannedRow) -> Result<Row, BenchError> {
        let mut other = self.connect()?;
        let device = pair_of(&other)?;
        let integrity = self.plan.integrity;
        let mut end = pingpong::open(&device)?;
        let (local, session) = end.local();
        let request = Request::PolledPong {
            device,
            local,
            session,
            block_size: row.block_size,
            integrity,
        };
        let theirs = self.join(&mut other, &request, &mut end)?;
        let mut ping = Ping::new(end, row.block_size)?;
        let mut measured = self.measure_alone(&mut ping, described, row)?;
        measured.device = Some(format!("{} → {theirs}", ping.driver()));
        // Every block's digest was compared with that of what came back.
        measured.verified = integrity == Integrity::Digest;
        ping.close()?;
        match other.channel.receive(std::time::Duration::from_secs(10))? {
            Reply::Driver(_) => Ok(measured),
            reply => Err(unexpected(reply)),
        }
    }

    fn measure_in_place(&mut self, described: Row, row: &PlannedRow) -> Result<Row, BenchError> {
        let layout = self.next_layout(row);
        let pool = Pool::new(layout.bytes(), self.plan.memory)?;
        pool.fill(&layout);
        let mut other = self.connect()?;
        let device = pair_of(&other)?;
        let integrity = self.plan.integrity;
        let mut end = in_place::open(&device)?;
        let (local, session) = end.local();
        let request = Request::PolledRead {
            device,
            local,
            session,
            block_size: row.block_size,
            batch: row.batch_size,
            integrity,
        };
        let theirs = self.join(&mut other, &request, &mut end)?;
        let memory = pool.pages();
        let mut sender = in_place::Sender::new(end, pool, layout, row.batch_size);
        let mut measured = self.measure_alone(&mut sender, described, row)?;
        measured.device = Some(format!("{} → {theirs}", sender.driver()));
        measured.memory = Some(memory.into());
        let sent = sender.close()?;
        match other.channel.receive(std::time::Duration::from_secs(10))? {
            Reply::Read(_, read) => {
                measured.verified = read == sent;
                Ok(measured)
            }
            reply => Err(unexpected(reply)),
        }
    }

    /// Has the other process open its end and opens the path; returns its driver.
    fn join(
        &self,
        other: &mut Other,
        request: &Request,
        end: &mut End,
    ) -> Result<String, BenchError> {
        let (local, session) = match ask(&mut other.channel, request)? {
            Reply::Polled(local, session) => (local, session),
            reply => return Err(unexpected(reply)),
        };
        let theirs = local.driver.clone();
        end.connect(local, session, self.plan.integrity)?;
        Ok(theirs)
    }

    /// Measures a carrier that polls on this thread.
    fn measure_alone(
        &self,
        carrier: &mut dyn Carrier,
        described: Row,
        row: &PlannedRow,
    ) -> Result<Row, BenchError> {
        let work = Workload {
            rate: None,
            ..self.workload(row)
        };
        let warmup = Workload {
            duration: self.plan.warmup,
            ..work.clone()
        };
        measure::run(carrier, &warmup)?;
        let mut measured = self.measure_carrier(carrier, described, &work)?;
        // Of the other end, which polls as well, nobody is asked meanwhile.
        measured.cpu_s_per_gb = None;
        Ok(measured)
    }
}
