//! The programs that measure: each drives a connection to the agent.

use super::{Begun, Bench, Rig, Way};
use crate::bench::BenchError;
use crate::bench::agents::Agents;
use crate::bench::agents::blocks::{Program, Requests};
use crate::bench::agents::process::Start;
use crate::bench::carriers::Kind;
use crate::bench::measure::{self, Sample, Workload};
use crate::bench::message::Usage;
use crate::bench::plan::{Op, PlannedRow};
use crate::bench::pool::Layout;
use crate::bench::report::Row;
use crate::config::{ConfigError, default_socket};

/// Memory beyond that of the blocks: puts that replace others, and what
/// requests themselves take.
const SPARE_BYTES: u64 = 1 << 30;

/// The agents, and one program for each thread.
pub(super) struct Programs {
    // Before the agents, which they leave something in.
    programs: Vec<Program>,
    agents: Agents,
    path: String,
    reasons: Vec<String>,
}

struct UnderWay<'a> {
    requests: Vec<Requests<'a>>,
    agents: &'a Agents,
}

impl Bench<'_> {
    /// Starts or finds the agents, and connects as many programs as threads are asked for.
    pub(super) fn open_programs(
        &self,
        way: &Way,
        rows: &[PlannedRow],
    ) -> Result<Programs, BenchError> {
        let bytes = self.bytes_needed(rows)?;
        let agents = match &self.args.place.node {
            Some(node) => {
                let socket = self.args.socket.clone().or_else(default_socket);
                let socket = socket.ok_or_else(|| ConfigError::NoSocket.to_string());
                Agents::running(socket.map_err(BenchError::Usage)?, node.clone())?
            }
            None => Agents::start(&Start {
                kind: way.kind.unwrap_or(Kind::Tcp),
                streams: self.plan.streams,
                congestion: way.control.clone(),
                memory: self.plan.memory,
                bytes: bytes * u64::from(self.plan.threads) + SPARE_BYTES,
            })?,
        };
        let with_window = rows.iter().any(|row| row.op != Op::Send);
        let memory = self.plan.memory;
        let programs = (0..usize::from(self.plan.threads))
            .map(|number| Program::new(&agents, number, bytes, memory, with_window))
            .collect::<Result<Vec<_>, _>>()?;
        let (path, reasons) = agents.paths()?;
        Ok(Programs {
            programs,
            agents,
            path,
            reasons,
        })
    }
}

impl Rig for Programs {
    fn describe(&self, row: &mut Row) {
        let blocks = self.programs[0].blocks();
        let word = self.path.split([' ', ':', '(']).next();
        row.transport = word.unwrap_or_default().to_owned();
        row.device = Some(self.path.clone());
        row.memory = Some(blocks.kind());
        row.reasons.push("through agents".into());
        row.reasons.extend(self.reasons.iter().cloned());
        row.reasons.push(self.agents.cpu_reason().into());
        row.reasons
            .extend(blocks.device().map(|name| format!("memory: {name}")));
    }

    fn begin(
        &mut self,
        layout: Layout,
        row: &PlannedRow,
    ) -> Result<Box<dyn Begun + '_>, BenchError> {
        let begun = self
            .programs
            .iter_mut()
            .map(|program| program.begin(layout, row));
        Ok(Box::new(UnderWay {
            requests: begun.collect::<Result<_, _>>()?,
            agents: &self.agents,
        }))
    }
}

impl Begun for UnderWay<'_> {
    fn run(&mut self, work: &Workload) -> Result<Sample, BenchError> {
        measure::run_together(&mut self.requests, work)
    }

    fn usage(&mut self) -> Result<Vec<Usage>, BenchError> {
        let mut all = self.agents.usage();
        all.extend(self.requests.iter().map(Requests::usage));
        Ok(all)
    }

    fn end(self: Box<Self>, bytes_max: u64) -> Result<u64, BenchError> {
        let share = bytes_max / self.requests.len() as u64;
        let checked = self
            .requests
            .into_iter()
            .map(|requests| requests.end(share));
        let checked = checked.collect::<Result<Vec<_>, _>>()?;
        Ok(checked.into_iter().min().unwrap_or(0))
    }
}
