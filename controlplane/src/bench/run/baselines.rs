//! The baselines of a run.

use super::{Bench, FRAME_BYTES, op_name, temperature};
use crate::bench::BenchError;
use crate::bench::baseline::tcp::{BareTcp, How};
use crate::bench::baseline::{Baseline, iperf3, memcpy::Memcpy, raw};
use crate::bench::carriers::Kind;
use crate::bench::environment::{self, cpu_time};
use crate::bench::figures::{account_cpu, figures};
use crate::bench::genie::{ask, unexpected};
use crate::bench::measure::{self, Carrier, Workload};
use crate::bench::message::{Reply, Request};
use crate::bench::other::Other;
use crate::bench::plan::{Op, PlannedRow};
use crate::bench::pool::{Layout, Pool};
use crate::bench::report::{NotMeasured, Row};
use crate::bench::statistics::{confidence_95, median};

impl Bench<'_> {
    /// Measures one family.
    pub(super) fn measure_baseline(&mut self, baseline: Baseline) -> Result<(), BenchError> {
        match baseline {
            Baseline::Memcpy => self.measure_memcpy(),
            Baseline::Tcp => self.measure_tcp(),
            Baseline::Iperf3 => self.measure_iperf3(),
            Baseline::Raw => self.measure_raw(),
            Baseline::None => Ok(()),
        }
    }

    fn measure_memcpy(&mut self) -> Result<(), BenchError> {
        for cold in [true, false] {
            let row = PlannedRow {
                op: Op::Send,
                block_size: 64 << 10,
                batch_size: 1,
                cold,
            };
            let layout = self.next_layout(&row);
            let from = Pool::new(layout.bytes(), self.plan.memory)?;
            let into = Pool::new(layout.bytes(), self.plan.memory)?;
            from.fill(&layout);
            into.fill(&Layout { salt: 0, ..layout });
            let described = Row {
                name: format!("memcpy {}", temperature(cold)),
                op: "memcpy".into(),
                transport: "none".into(),
                memory: Some(from.pages().into()),
                cold,
                block_size: row.block_size,
                batch_size: 1,
                copies_per_byte: Some(1.0),
                ..Row::default()
            };
            let mut copies = Memcpy::new(&from, &into, layout);
            let work = Workload {
                rate: None,
                ..self.workload(&row)
            };
            let mut measured = self.measure_carrier(&mut copies, described, &work)?;
            measured.verified = copies.check(self.plan.check_bytes)? > 0;
            self.report.baselines.push(measured);
        }
        Ok(())
    }

    fn measure_tcp(&mut self) -> Result<(), BenchError> {
        let mut other = self.connect()?;
        let mut rows: Vec<PlannedRow> = Vec::new();
        for row in &self.plan.rows {
            // Beside what moves one way, whoever asked for it, is a bare send.
            let op = match row.op {
                Op::Pingpong => Op::Pingpong,
                Op::Send | Op::Read | Op::Write => Op::Send,
            };
            let row = PlannedRow { op, ..*row };
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        let pool = self.take_memory(&mut other, &rows)?;
        for control in self.controls(Kind::Tcp) {
            for row in &rows {
                let echo = row.op == Op::Pingpong;
                for crc in if echo { &[false][..] } else { &[false, true] } {
                    let how = How {
                        crc: *crc,
                        echo,
                        streams: self.plan.streams,
                        congestion: control.clone(),
                    };
                    let measured = self.measure_bare_tcp(&mut other, &pool, row, how)?;
                    self.report.baselines.push(measured);
                }
            }
        }
        Ok(())
    }

    fn measure_bare_tcp(
        &mut self,
        other: &mut Other,
        pool: &Pool,
        row: &PlannedRow,
        how: How,
    ) -> Result<Row, BenchError> {
        let to = other.channel.peer().map_err(BenchError::Channel)?.ip();
        let layout = self.next_layout(row);
        pool.fill(&layout);
        let request = Request::BareTcp {
            layout,
            how: how.clone(),
        };
        let port = match ask(&mut other.channel, &request)? {
            Reply::Port(port) => port,
            reply => return Err(unexpected(reply)),
        };
        let control = how.congestion.as_deref();
        let described = Row {
            name: format!(
                "bare tcp{} {} {}{} {}",
                control.map_or(String::new(), |control| format!("({control})")),
                op_name(row.op),
                temperature(row.cold),
                if how.crc { " crc" } else { "" },
                row.block_size
            ),
            op: op_name(row.op).into(),
            transport: "tcp".into(),
            memory: Some("pages".into()),
            cold: row.cold,
            block_size: row.block_size,
            batch_size: row.batch_size,
            streams: Some(self.plan.streams),
            verified: how.crc,
            ..Row::default()
        };
        let mut bare = BareTcp::connect((to, port), pool, layout, how)?;
        let work = self.workload(row);
        let warmup = Workload {
            duration: self.plan.warmup,
            ..work.clone()
        };
        measure::run(&mut bare, &warmup)?;
        let before = self.usage(other)?;
        let mut measured = self.measure_carrier(&mut bare, described, &work)?;
        let after = self.usage(other)?;
        account_cpu(&mut measured, &before, &after);
        Ok(measured)
    }

    fn measure_iperf3(&mut self) -> Result<(), BenchError> {
        let mut other = self.connect()?;
        let to = other.channel.peer().map_err(BenchError::Channel)?.ip();
        let mut controls = self.controls(Kind::Tcp);
        // What Genie takes over loopback must not look better for it.
        if controls == [None] && to.is_loopback() {
            if environment::may_choose("cubic") {
                controls.push(Some("cubic".into()));
            } else {
                self.report.not_measured.push(NotMeasured {
                    name: "iperf3 cubic".into(),
                    reason:
                        "tcp_allowed_congestion_control does not have it: only root may choose it"
                            .into(),
                });
            }
        }
        let mut runs: Vec<(String, Vec<String>)> = Vec::new();
        for (streams, zero) in [(1, false), (2, false), (4, false), (1, true)] {
            let mut more = vec!["--parallel".to_owned(), streams.to_string()];
            let mut name = format!("iperf3 {streams}");
            if zero {
                more.push("--zerocopy".into());
                name += " sendfile";
            }
            for control in &controls {
                let mut more = more.clone();
                let mut name = name.clone();
                if let Some(control) = control {
                    more.extend(["--congestion".to_owned(), control.clone()]);
                    name += &format!(" {control}");
                }
                runs.push((name, more));
            }
        }
        let seconds = self.plan.duration.as_secs_f64().max(1.0);
        let repeats = if self.args.quick { 1 } else { 3 };
        for (name, more) in runs {
            let streams = more[1].parse().ok();
            let mut outcomes = Vec::new();
            for _ in 0..repeats {
                let port = match ask(&mut other.channel, &Request::Iperf3)? {
                    Reply::Port(port) => port,
                    reply => return Err(unexpected(reply)),
                };
                let more: Vec<&str> = more.iter().map(String::as_str).collect();
                outcomes.push(iperf3::run((to, port), seconds, &more)?);
            }
            let rates: Vec<f64> = outcomes.iter().map(|outcome| outcome.gb_per_s).collect();
            let cpu: Vec<f64> = outcomes
                .iter()
                .filter_map(|outcome| outcome.cpu_s_per_gb)
                .collect();
            self.report.baselines.push(Row {
                name,
                op: "stream".into(),
                transport: "tcp".into(),
                block_size: 1 << 20,
                batch_size: 1,
                streams,
                repeats,
                gb_per_s: median(&rates),
                gb_per_s_ci95: confidence_95(&rates),
                cpu_s_per_gb: median(&cpu),
                retransmits: outcomes
                    .iter()
                    .filter_map(|outcome| outcome.retransmits)
                    .reduce(|a, b| a + b),
                ..Row::default()
            });
        }
        Ok(())
    }

    fn measure_raw(&mut self) -> Result<(), BenchError> {
        for what in raw::Use::ALL {
            let mut received: Vec<raw::Received> = Vec::new();
            let mut sent: Vec<raw::Sent> = Vec::new();
            for _ in 0..self.plan.repeats {
                let mut other = self.connect()?;
                let Some(folder) = &other.folder else {
                    let reason = "the raw loop needs both processes on this host: --spawn";
                    return Err(BenchError::Refused(reason.into()));
                };
                let device = format!("pair:{}", folder.path().join("pair").display());
                let channel = std::cell::RefCell::new(&mut other.channel);
                let seconds = self.plan.duration.as_secs_f64();
                let opened = || {
                    let request = Request::RawDevice {
                        device: device.clone(),
                        frame_bytes: FRAME_BYTES,
                        what,
                        seconds,
                    };
                    match ask(*channel.borrow_mut(), &request)? {
                        Reply::Ready => Ok(()),
                        reply => Err(unexpected(reply)),
                    }
                };
                let stop = || match channel.borrow_mut().try_receive()? {
                    None => Ok(false),
                    Some(Reply::Frames(frames)) => {
                        received.push(frames);
                        Ok(true)
                    }
                    Some(reply) => Err(unexpected(reply)),
                };
                sent.push(raw::send(&device, FRAME_BYTES, what, opened, stop)?);
            }
            let rate = |received: &raw::Received| {
                (received.frames * FRAME_BYTES as u64) as f64 / received.seconds / 1e9
            };
            let rates: Vec<f64> = received.iter().map(rate).collect();
            let bad: u64 = received.iter().map(|received| received.bad).sum();
            let theirs = received.first().map_or("", |received| &received.driver);
            let ours = sent.first().map_or("", |sent| &sent.driver);
            let gigabytes = |frames: u64| (frames.max(1) * FRAME_BYTES as u64) as f64 / 1e9;
            let cpu = received.iter().zip(&sent).map(|(received, sent)| {
                received.cpu_seconds / gigabytes(received.frames)
                    + sent.cpu_seconds / gigabytes(sent.frames)
            });
            self.report.baselines.push(Row {
                name: format!("raw device {}", what.name()),
                op: "frames".into(),
                transport: "dpdk".into(),
                device: Some(format!("{ours} → {theirs}")),
                cold: true,
                block_size: FRAME_BYTES as u64,
                batch_size: 32,
                repeats: rates.len(),
                gb_per_s: median(&rates),
                gb_per_s_ci95: confidence_95(&rates),
                cpu_s_per_gb: median(&cpu.collect::<Vec<_>>()),
                verified: what != raw::Use::Untouched && bad == 0,
                error: (bad > 0).then(|| format!("{bad} frames were not what was sent")),
                ..Row::default()
            });
        }
        Ok(())
    }

    fn measure_carrier(
        &self,
        carrier: &mut dyn Carrier,
        described: Row,
        work: &Workload,
    ) -> Result<Row, BenchError> {
        let before = cpu_time();
        let samples = (0..self.plan.repeats).map(|_| measure::run(carrier, work));
        let samples = samples.collect::<Result<Vec<_>, _>>()?;
        let mut row = figures(described, &samples, work);
        let bytes = samples.iter().map(|sample| sample.blocks).sum::<u64>() * work.block_size;
        row.cpu_s_per_gb = Some((cpu_time() - before).as_secs_f64() / (bytes.max(1) as f64 / 1e9));
        Ok(row)
    }
}
