//! One row after another, and the baselines beside them.

use std::io::Write;

use genie_client::Memory;
use genie_dataplane::Integrity;
use genie_dataplane::memory::accelerator::MemoryKind;
use indicatif::{ProgressBar, ProgressStyle};

use super::carriers::Kind;
use super::environment::{self, Watch, cpu_time};
use super::figures::{account, figures};
use super::genie::{ask, expect_done, unexpected};
use super::measure::{Sample, Workload};
use super::message::{Reply, Request, Usage};
use super::other::Other;
use super::peer::{self, VERSION};
use super::plan::{BenchArgs, Op, Plan, PlannedRow};
use super::pool::{Layout, Pool};
use super::report::{NotMeasured, Report, Row, SCHEMA};
use super::{BenchError, lab, table};
use crate::security::DataSecurity;

mod agents;
mod baselines;
mod polled;
mod workers;

/// Above this share of all processors' time, others were in the way.
const BUSY_OTHERS_MAX: f64 = 0.05;

/// A rate of which less was reached was not kept.
const RATE_KEPT: f64 = 0.95;

/// Above this half width of the interval over the median, a figure is noisy.
const INTERVAL_MAX: f64 = 0.1;

/// Runs the command.
pub fn run(args: BenchArgs, json: bool) -> Result<(), BenchError> {
    if let Some(listen) = args.place.serve {
        return peer::serve(listen, args.dpdk_device, args.once);
    }
    let plan = args.plan()?;
    if let Some(profile) = &args.place.lab {
        return lab::run(profile, &args, json);
    }
    let report = Bench::new(&args, plan).measure();
    print(&report, json, args.csv.as_deref())?;
    let rows = || report.rows.iter().chain(&report.baselines);
    match report.first_failure() {
        None => Ok(()),
        Some(row) => Err(BenchError::Rows {
            failed: rows().filter(|row| row.error.is_some()).count(),
            all: rows().count(),
            first: format!("{}: {}", row.name, row.error.as_deref().unwrap_or_default()),
        }),
    }
}

/// Prints a report and writes its values to a file, if one is named.
pub fn print(report: &Report, json: bool, csv: Option<&std::path::Path>) -> Result<(), BenchError> {
    if let Some(path) = csv {
        std::fs::write(path, table::csv(report)).map_err(BenchError::Write)?;
    }
    let text = if json {
        serde_json::to_string_pretty(report).map_err(|error| BenchError::Write(error.into()))?
            + "\n"
    } else {
        table::show(report)
    };
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(BenchError::Write)
}

/// What carries some of the rows.
struct Way {
    /// The transport; none if agents that run have agreed on one.
    kind: Option<Kind>,
    /// The kernel's congestion control, if one was asked for.
    control: Option<String>,
    /// Whether packets are sealed.
    security: DataSecurity,
    /// Whether programs ask agents, or engines are driven by themselves.
    agents: bool,
}

/// Ends that are up, for one row after another.
trait Rig {
    /// Says in a row what carries it.
    fn describe(&self, row: &mut Row);

    /// Begins a row.
    fn begin(
        &mut self,
        layout: Layout,
        row: &PlannedRow,
    ) -> Result<Box<dyn Begun + '_>, BenchError>;
}

/// A row under way.
trait Begun {
    /// Runs the workload once on every thread, at the same time.
    fn run(&mut self, work: &Workload) -> Result<Sample, BenchError>;

    /// What both ends of every session have used so far.
    fn usage(&mut self) -> Result<Vec<Usage>, BenchError>;

    /// Ends the row; returns how many blocks were compared with what was sent,
    /// none if one thread's were not looked at.
    fn end(self: Box<Self>, bytes_max: u64) -> Result<u64, BenchError>;
}

struct Bench<'a> {
    args: &'a BenchArgs,
    plan: Plan,
    /// Bytes of a cold row's buffers at each end.
    cold_bytes: u64,
    /// Counts rows: each has a pattern of its own.
    salt: u64,
    report: Report,
    progress: ProgressBar,
}

impl<'a> Bench<'a> {
    fn new(args: &'a BenchArgs, plan: Plan) -> Self {
        let environment = environment::survey();
        // Twice the cache, and both ends' memory and the baselines' within a quarter.
        let cache = environment.cache_bytes.unwrap_or(32 << 20);
        let cold_bytes = (2 * cache)
            .max(64 << 20)
            .min((environment.memory_bytes / 16).max(64 << 20));
        let style = ProgressStyle::with_template("{elapsed:>4} {bar:30} {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let rows = plan.rows.len() * plan.kinds.len().max(1);
        let rows = (rows + plan.polled.len() + plan.baselines.len()) as u64;
        let report = Report {
            schema: SCHEMA,
            command: std::env::args().collect::<Vec<_>>().join(" "),
            date: environment::date(),
            environment,
            rows: Vec::new(),
            baselines: Vec::new(),
            not_measured: Vec::new(),
            notes: Vec::new(),
            wire: None,
        };
        let progress = ProgressBar::new(rows).with_style(style);
        Self {
            args,
            plan,
            cold_bytes,
            salt: 0,
            report,
            progress,
        }
    }

    fn measure(mut self) -> Report {
        let watch = Watch::start();
        for way in self.ways() {
            self.measure_way(&way);
            let plain = way.security == DataSecurity::Plain;
            if way.kind == Some(Kind::Dpdk) && way.agents && plain {
                self.measure_polled();
            }
        }
        for baseline in self.plan.baselines.clone() {
            self.progress
                .set_message(format!("{baseline:?}").to_lowercase());
            if let Err(error) = self.measure_baseline(baseline) {
                let name = format!("{baseline:?}").to_lowercase();
                self.miss(&name, self.plan.baselines_asked, "none", &error);
            }
            self.progress.inc(1);
        }
        self.progress.finish_and_clear();
        watch.finish(&mut self.report.environment);
        let place = &self.args.place;
        if place.peer.is_some() || place.node.is_some() {
            // The other end may be on this host, and is no child of this process.
            self.report.environment.busy_others = None;
        }
        let planned = self.plan.rows.len() + self.plan.polled.len();
        if self.report.rows.is_empty() && planned > 0 {
            let missing = self.report.not_measured.first();
            let reason = missing.map_or("nothing to measure with", |one| &one.reason);
            let row = Row {
                name: "Genie".into(),
                error: Some(format!("no transport could be measured: {reason}")),
                ..Row::default()
            };
            self.report.rows.push(row);
        }
        self.add_notes();
        self.report
    }

    /// Something that was asked for and failed is a row; what was only usual is a reason.
    fn miss(&mut self, name: &str, asked: bool, transport: &str, error: &BenchError) {
        let (name, reason) = (name.to_owned(), error.to_string());
        if asked {
            let transport = transport.to_owned();
            let row = Row {
                name,
                transport,
                error: Some(reason),
                ..Row::default()
            };
            self.report.rows.push(row);
        } else {
            self.report.not_measured.push(NotMeasured { name, reason });
        }
    }

    /// The congestion controls to measure a carrier with; none for its own choice.
    fn controls(&self, kind: Kind) -> Vec<Option<String>> {
        let asked = self.args.congestion.iter().cloned().map(Some);
        match kind {
            Kind::Tcp if asked.len() > 0 => asked.collect(),
            _ => vec![None],
        }
    }

    /// All that carries rows, in turn.
    fn ways(&self) -> Vec<Way> {
        let plan = &self.plan;
        if plan.through_running {
            let way = Way {
                kind: None,
                control: None,
                security: DataSecurity::Plain,
                agents: true,
            };
            return vec![way];
        }
        let mut ways = Vec::new();
        for kind in &plan.kinds {
            for control in self.controls(*kind) {
                for security in self.securities(*kind) {
                    for agents in [false, true] {
                        ways.push(Way {
                            kind: Some(*kind),
                            control: control.clone(),
                            security: *security,
                            agents,
                        });
                    }
                }
            }
        }
        ways
    }

    /// What a carrier is measured with.
    fn securities(&self, kind: Kind) -> &[DataSecurity] {
        match kind {
            Kind::Dpdk | Kind::Mem | Kind::Tcp => &self.args.data_security,
            Kind::Shm => &[DataSecurity::Plain],
        }
    }

    fn open(&self, way: &Way, rows: &[PlannedRow]) -> Result<Box<dyn Rig>, BenchError> {
        Ok(match way.kind {
            Some(kind) if !way.agents => {
                Box::new(self.open_workers(kind, rows, way.control.as_deref(), way.security)?)
            }
            _ => Box::new(self.open_programs(way, rows)?),
        })
    }

    fn measure_way(&mut self, way: &Way) {
        let rows = self.plan.rows.iter().copied();
        let rows: Vec<_> = rows
            .filter(|row| self.plan.through_agents(row) == way.agents)
            .collect();
        let mut open: Option<Box<dyn Rig>> = None;
        let mut failures = 0;
        for (index, row) in rows.iter().enumerate() {
            self.progress.set_message(self.name_of(way, row));
            self.progress.inc(1);
            let ready = match open.take() {
                Some(ready) => Ok(ready),
                None => self.open(way, &rows),
            };
            let mut rig = match ready {
                Ok(ready) => ready,
                Err(error) => {
                    let label = self.label(way);
                    let through = if way.agents { " through agents" } else { "" };
                    self.miss(
                        &format!("{label}{through}"),
                        self.plan.kinds_asked,
                        &label,
                        &error,
                    );
                    self.progress.inc((rows.len() - index - 1) as u64);
                    return;
                }
            };
            let mut described = self.describe(way, row);
            rig.describe(&mut described);
            match self.measure_row(&mut *rig, described.clone(), row) {
                Ok(measured) => {
                    self.report.rows.push(measured);
                    failures = 0;
                    open = Some(rig);
                }
                Err(error) => {
                    described.error = Some(error.to_string());
                    self.report.rows.push(described);
                    // The next row begins with engines of its own.
                    failures += 1;
                }
            }
            if failures == 2 {
                let name = format!("the rows after {}", self.name_of(way, row));
                let reason = "two rows in a row failed".into();
                self.report.not_measured.push(NotMeasured { name, reason });
                return;
            }
        }
    }

    /// How much memory the largest row needs at each end, for one thread.
    fn bytes_needed(&self, rows: &[PlannedRow]) -> Result<u64, BenchError> {
        let needed = rows.iter().map(|row| self.layout(row, 0).bytes()).max();
        let needed = needed.unwrap_or(0);
        if needed * u64::from(self.plan.threads) > self.report.environment.memory_bytes / 4 {
            return Err(BenchError::TooLarge(needed));
        }
        Ok(needed)
    }

    /// As much memory as the largest row needs, at both ends.
    fn take_memory(&self, other: &mut Other, rows: &[PlannedRow]) -> Result<Pool, BenchError> {
        let needed = self.bytes_needed(rows)?;
        let memory = self.plan.memory;
        expect_done(ask(
            &mut other.channel,
            &Request::Memory {
                bytes: needed,
                memory,
            },
        )?)?;
        Pool::new(needed, memory)
    }

    fn layout(&self, row: &PlannedRow, salt: u64) -> Layout {
        // What the threads use together is what one alone would.
        let share = self.cold_bytes / u64::from(self.plan.threads);
        let cold = row.cold.then_some(share);
        Layout::new(row.block_size, row.batch_size, cold, salt)
    }

    fn next_layout(&mut self, row: &PlannedRow) -> Layout {
        self.salt += 1;
        self.layout(row, self.salt)
    }

    fn workload(&self, row: &PlannedRow) -> Workload {
        Workload {
            block_size: row.block_size,
            batch_size: row.batch_size,
            duration: self.plan.duration,
            blocks_min: 1,
            rate: self.plan.rate,
        }
    }

    fn describe(&self, way: &Way, row: &PlannedRow) -> Row {
        let chosen = match (way.kind, self.plan.kinds_asked) {
            (None, _) => "as the running agents agreed".to_owned(),
            (Some(kind), true) => format!("{kind}: asked for"),
            (Some(kind), false) => format!("{kind}: by default"),
        };
        Row {
            name: self.name_of(way, row),
            op: op_name(row.op).into(),
            transport: self.label(way),
            cold: row.cold,
            block_size: row.block_size,
            batch_size: row.batch_size,
            threads: Some(self.plan.threads),
            streams: (way.kind == Some(Kind::Tcp)).then_some(self.plan.streams),
            digest: Some(self.plan.integrity == Integrity::Digest),
            reasons: vec![chosen],
            ..Row::default()
        }
    }

    /// What a way is called in names.
    fn label(&self, way: &Way) -> String {
        let kind = way.kind.map(|kind| kind.to_string());
        kind.unwrap_or_else(|| self.args.place.node.clone().unwrap_or_default())
    }

    fn name_of(&self, way: &Way, row: &PlannedRow) -> String {
        let control = way.control.as_ref();
        let mut control = control.map_or(String::new(), |control| format!("({control})"));
        if way.security == DataSecurity::Aead {
            control.push_str("(aead)");
        }
        let memory = match self.plan.memory.kind() {
            MemoryKind::Host => String::new(),
            kind => format!("{kind} "),
        };
        let digest = match self.plan.integrity {
            Integrity::Digest => "",
            Integrity::None => "no-digest ",
        };
        format!(
            "{}{control} {} {memory}{} {digest}{}",
            self.label(way),
            op_name(row.op),
            temperature(row.cold),
            row.block_size
        )
    }

    fn measure_row(
        &mut self,
        rig: &mut dyn Rig,
        described: Row,
        row: &PlannedRow,
    ) -> Result<Row, BenchError> {
        let layout = self.next_layout(row);
        let work = self.workload(row);
        let warmup = Workload {
            duration: self.plan.warmup,
            ..work.clone()
        };
        let mut begun = rig.begin(layout, row)?;
        begun.run(&warmup)?;
        let before = begun.usage()?;
        let mut samples = Vec::new();
        for _ in 0..self.plan.repeats {
            samples.push(begun.run(&work)?);
        }
        let after = begun.usage()?;
        let checked = begun.end(self.plan.check_bytes)?;
        let mut measured = figures(described, &samples, &work);
        measured.rate = work.rate;
        let blocks = measured.blocks.unwrap_or_default();
        account(&mut measured, blocks * work.block_size, &before, &after);
        measured.verified = checked > 0;
        Ok(measured)
    }

    fn usage(&self, other: &mut Other) -> Result<[Usage; 2], BenchError> {
        let ours = Usage {
            process: std::process::id(),
            cpu_seconds: cpu_time().as_secs_f64(),
            ..Usage::default()
        };
        match ask(&mut other.channel, &Request::Usage)? {
            Reply::Used(theirs) => Ok([ours, theirs]),
            reply => Err(unexpected(reply)),
        }
    }

    fn connect(&self) -> Result<Other, BenchError> {
        let mut other = match (self.args.place.peer, self.args.place.in_process) {
            (Some(address), _) => Other::reach(address)?,
            (None, true) => Other::thread()?,
            (None, false) => Other::spawn()?,
        };
        expect_done(ask(&mut other.channel, &Request::Hello(VERSION.into()))?)?;
        Ok(other)
    }

    fn add_notes(&mut self) {
        let notes = &mut self.report.notes;
        let environment = &self.report.environment;
        let busy = environment.busy_others.unwrap_or(0.0) + environment.stolen.unwrap_or(0.0);
        if busy > BUSY_OTHERS_MAX {
            notes.push(format!(
                "other programs and other machines used {:.0} % of the processors meanwhile: \
                 compare only figures of this run",
                busy * 100.0
            ));
        }
        if !environment.optimised {
            notes.push("this build has no optimisations: build with --release".into());
        }
        let noisy = self
            .report
            .rows
            .iter()
            .chain(&self.report.baselines)
            .filter(|row| {
                let interval = row.gb_per_s.zip(row.gb_per_s_ci95);
                interval.is_some_and(|(rate, [low, high])| (high - low) / 2.0 > INTERVAL_MAX * rate)
            });
        let names: Vec<&str> = noisy.map(|row| row.name.as_str()).collect();
        if !names.is_empty() {
            notes.push(format!(
                "the repeats differ by more than 10 %: {}",
                names.join(", ")
            ));
        }
        let behind = self.report.rows.iter().filter(|row| {
            let reached = row.blocks_per_s.zip(row.rate);
            reached.is_some_and(|(reached, rate)| reached < RATE_KEPT * rate)
        });
        let names: Vec<&str> = behind.map(|row| row.name.as_str()).collect();
        if !names.is_empty() {
            notes.push(format!("--rate was not kept: {}", names.join(", ")));
        }
        if self.plan.integrity == Integrity::None {
            notes.push(
                "no digests: Genie's bytes were under no checksum, and are verified by comparison only"
                    .into(),
            );
        }
        if self.plan.memory == Memory::Sim {
            notes.push(
                "sim is a simulated accelerator: a CPU makes its copies, and its rows say nothing of any device"
                    .into(),
            );
        }
        if self.report.rows.iter().any(|row| row.cold) {
            notes.push(format!(
                "cold rows use {} at each end in turn; the largest cache is said to be {}",
                crate::units::show_bytes(self.cold_bytes),
                environment
                    .cache_bytes
                    .map_or("unknown".into(), crate::units::show_bytes)
            ));
        }
    }
}

fn op_name(op: Op) -> &'static str {
    match op {
        Op::Send => "send",
        Op::Pingpong => "pingpong",
        Op::Read => "read",
        Op::Write => "write",
        Op::InPlace => "in-place",
    }
}

fn temperature(cold: bool) -> &'static str {
    if cold { "cold" } else { "hot" }
}
