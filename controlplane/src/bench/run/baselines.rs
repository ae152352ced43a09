//! The baselines of a run.

use super::{Bench, op_name, temperature};
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

/// The pair of devices between this process and the other.
pub(super) fn pair_of(other: &Other) -> Result<String, BenchError> {
    let folder = other.folder.as_ref().ok_or_else(|| {
        let reason = "the raw loop needs both processes on this host: --spawn";
        BenchError::Refused(reason.into())
    })?;
    Ok(format!("pair:{}", folder.path().join("pair").display()))
}

/// The bare device goes through as much memory as rows of such blocks do.
const RAW_BLOCK: u64 = 16 << 20;

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
        let read = self.plan.polled.iter().filter(|row| row.op == Op::InPlace);
        for row in self.plan.rows.iter().chain(read) {
            // Beside what moves one way, whoever asked for it, is a bare send.
            let op = match row.op {
                Op::Pingpong => Op::Pingpong,
                Op::Send | Op::Read | Op::Write | Op::InPlace => Op::Send,
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
                for crc in [false, true] {
                    let how = How {
                        crc,
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
            memory: Some(pool.pages().into()),
            cold: row.cold,
            block_size: row.block_size,
            batch_size: row.batch_size,
            threads: Some(1),
            streams: Some(self.plan.streams),
            // A piece whose checksum differs ends the row.
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
        if self.args.mtu != raw::MTU {
            let reason = format!("frames of the raw loop are those of an MTU of {}", raw::MTU);
            return Err(BenchError::Refused(reason));
        }
        self.measure_raw_device(raw::Use::Untouched, false)?;
        for what in [raw::Use::Copy, raw::Use::CopyCrc] {
            for cold in [true, false] {
                self.measure_raw_device(what, cold)?;
            }
        }
        self.measure_raw_pingpong()
    }

    fn measure_raw_pingpong(&mut self) -> Result<(), BenchError> {
        let rows = self.plan.rows.iter().chain(&self.plan.polled);
        let pingpongs = rows
            .filter(|row| row.op == Op::Pingpong && row.block_size <= raw::PAYLOAD_BYTES as u64);
        let mut pingpongs: Vec<_> = pingpongs.copied().collect();
        pingpongs.sort_by_key(|row| row.block_size);
        pingpongs.dedup();
        for row in pingpongs {
            let mut other = self.connect()?;
            let device = pair_of(&other)?;
            let opened = || match ask(
                &mut other.channel,
                &Request::RawPong {
                    device: device.clone(),
                },
            )? {
                Reply::Ready => Ok(()),
                reply => Err(unexpected(reply)),
            };
            let mut ping = raw::Ping::open(&device, row.block_size as usize, opened)?;
            let work = Workload {
                rate: None,
                ..self.workload(&row)
            };
            let warmup = Workload {
                duration: self.plan.warmup,
                ..work.clone()
            };
            measure::run(&mut ping, &warmup)?;
            let described = Row {
                name: format!("raw device pingpong {}", row.block_size),
                op: op_name(row.op).into(),
                transport: "dpdk".into(),
                block_size: row.block_size,
                batch_size: 1,
                ..Row::default()
            };
            let mut measured = self.measure_carrier(&mut ping, described, &work)?;
            // Of the other end, which polls as well, nobody is asked meanwhile.
            measured.cpu_s_per_gb = None;
            let theirs = match other.channel.receive(std::time::Duration::from_secs(10))? {
                Reply::Driver(theirs) => theirs,
                reply => return Err(unexpected(reply)),
            };
            measured.device = Some(format!("{} → {theirs}", ping.driver()));
            self.report.baselines.push(measured);
        }
        Ok(())
    }

    fn measure_raw_device(&mut self, what: raw::Use, cold: bool) -> Result<(), BenchError> {
        let row = PlannedRow {
            op: Op::Send,
            block_size: RAW_BLOCK,
            batch_size: self.args.batch_size.into(),
            cold,
        };
        let layout = self.next_layout(&row);
        let work = raw::Work {
            what,
            region_bytes: layout.bytes() as usize,
            salt: layout.salt,
            seconds: self.plan.duration.as_secs_f64(),
            repeats: self.plan.repeats,
        };
        let mut other = self.connect()?;
        // What the rows have, as the kind of pages follows from how much it is.
        let rows: Vec<PlannedRow> = self.plan.rows.iter().copied().chain([row]).collect();
        let pool = self.take_memory(&mut other, &rows)?;
        let device = pair_of(&other)?;
        let channel = std::cell::RefCell::new(&mut other.channel);
        let opened = || {
            let (device, work) = (device.clone(), work.clone());
            match ask(*channel.borrow_mut(), &Request::RawDevice { device, work })? {
                Reply::Ready => Ok(()),
                reply => Err(unexpected(reply)),
            }
        };
        let mut received = None;
        let stop = || match channel.borrow_mut().try_receive()? {
            None => Ok(false),
            Some(Reply::Frames(frames)) => {
                received = Some(frames);
                Ok(true)
            }
            Some(reply) => Err(unexpected(reply)),
        };
        let sent = raw::send(&device, &work, &pool, opened, stop)?;
        let received = received.ok_or(BenchError::PeerGone)?;
        let gigabytes = |frames: u64| (frames * raw::PAYLOAD_BYTES as u64) as f64 / 1e9;
        let rates = received.repeats.iter();
        let rates: Vec<f64> = rates
            .map(|(frames, seconds)| gigabytes(*frames) / seconds)
            .collect();
        let frames: u64 = received.repeats.iter().map(|(frames, _)| frames).sum();
        let cpu = received.cpu_seconds / gigabytes(frames.max(1))
            + sent.cpu_seconds / gigabytes(sent.frames.max(1));
        let untouched = what == raw::Use::Untouched;
        self.report.baselines.push(Row {
            name: match untouched {
                true => "raw device untouched".into(),
                false => format!("raw device {} {}", what.name(), temperature(cold)),
            },
            op: "frames".into(),
            transport: "dpdk".into(),
            device: Some(format!("{} → {}", sent.driver, received.driver)),
            memory: Some(pool.pages().into()),
            cold,
            block_size: raw::PAYLOAD_BYTES as u64,
            batch_size: 32,
            repeats: rates.len(),
            gb_per_s: median(&rates),
            gb_per_s_ci95: confidence_95(&rates),
            cpu_s_per_gb: Some(cpu),
            verified: !untouched && received.bad == 0,
            error: (received.bad > 0)
                .then(|| format!("{} frames were not what was sent", received.bad)),
            ..Row::default()
        });
        Ok(())
    }

    pub(super) fn measure_carrier(
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
