//! A program that measures: its requests to the agent, and what came of them.

use std::time::{Duration, Instant};

use genie_client::{Batch, Client, Memory, Moved, Posted, Window};

use super::Agents;
use super::memory::{self, Blocks};
use crate::bench::BenchError;
use crate::bench::carriers::LIVENESS;
use crate::bench::environment::cpu_time;
use crate::bench::measure::{Carrier, Slot};
use crate::bench::message::Usage;
use crate::bench::plan::{Op, PlannedRow};
use crate::bench::pool::{self, Layout};

/// Longest piece of one request that prepares or reads back a window.
const PIECE_BYTES: u64 = 64 << 20;

/// Puts that are kept at the other end, to be compared after a row.
const KEPT: u64 = 4;

/// Bytes of them at the most, unless that is less than one.
const KEPT_BYTES: u64 = 256 << 20;

/// A connection to the agent, memory here, and memory there.
pub struct Program {
    client: Client,
    node: String,
    /// Begins the names of all that it leaves in the other agent's store.
    prefix: String,
    memory: Memory,
    blocks: Blocks,
    /// None where rows only put.
    window: Option<Window>,
    used: Usage,
}

/// One row of a program's.
pub struct Requests<'a> {
    program: &'a mut Program,
    op: Op,
    layout: Layout,
    in_flight: Vec<(Slot, Posted)>,
    /// Puts that have ended.
    ended: Vec<Slot>,
    begun: u64,
    kept: u64,
}

impl Program {
    /// Connects to the agent and takes as much memory as rows need, at both ends.
    pub fn new(
        agents: &Agents,
        number: usize,
        bytes: u64,
        memory: Memory,
        with_window: bool,
    ) -> Result<Self, BenchError> {
        let mut client = Client::connect(&agents.socket)?;
        let prefix = format!("bench-{}-{number}", std::process::id());
        let node = agents.node.clone();
        let blocks = Blocks::new(&mut client, bytes, memory)?;
        let mut program = Self {
            client,
            node,
            prefix,
            memory,
            blocks,
            window: None,
            used: Usage::default(),
        };
        if with_window {
            let (node, name) = (&program.node, format!("{}/window", program.prefix));
            let window = (program.client).create_window(Some(node), &name, bytes, memory)?;
            program.window = Some(window);
        } else {
            // Opens the session, so that what carries blocks is known.
            program.client.list(Some(&program.node))?;
        }
        Ok(program)
    }

    /// This end's memory.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// What its requests moved so far, and this process's time.
    pub fn usage(&self) -> Usage {
        Usage {
            process: std::process::id(),
            cpu_seconds: cpu_time().as_secs_f64(),
            ..self.used
        }
    }

    /// Begins a row: what is to arrive is where it comes from, and nowhere else.
    pub fn begin(&mut self, layout: Layout, row: &PlannedRow) -> Result<Requests<'_>, BenchError> {
        let other = Layout { salt: 0, ..layout };
        let (source, place) = match row.op {
            Op::Read => (layout, other),
            _ => (other, layout),
        };
        if self.window.is_some() {
            self.blocks.fill(&source)?;
            self.move_range(Batch::write, 0..layout.bytes())?;
        }
        self.blocks.fill(&place)?;
        Ok(Requests {
            op: row.op,
            kept: (KEPT_BYTES / layout.block_size).clamp(1, KEPT),
            in_flight: Vec::with_capacity(row.batch_size),
            ended: Vec::new(),
            begun: 0,
            layout,
            program: self,
        })
    }

    /// Moves bytes between the same places of this end's memory and the window.
    fn move_range(
        &mut self,
        direction: fn() -> Batch,
        range: std::ops::Range<u64>,
    ) -> Result<(), BenchError> {
        let window = self.window.as_ref().ok_or(BenchError::Garbage)?;
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + PIECE_BYTES);
            let mut batch = direction();
            batch.range(window, start..end, self.blocks.tensor(), start)?;
            self.client.run(&batch)?;
            start = end;
        }
        Ok(())
    }

    fn count(&mut self, moved: &Moved) {
        self.used.copies.add(moved.copies);
        // As if each end had counted them.
        self.used.bytes += 2 * moved.bytes;
        self.used.retransmits += moved.retransmits;
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // If the agents are gone, so is what was left there.
        let _ = self.client.remove(Some(&self.node), &self.prefix);
    }
}

impl Requests<'_> {
    /// What the program has used.
    pub fn usage(&self) -> Usage {
        self.program.usage()
    }

    /// Ends the row; returns how many blocks were compared with what was to arrive.
    pub fn end(mut self, bytes_max: u64) -> Result<u64, BenchError> {
        let (layout, moved) = (self.layout, self.begun);
        match self.op {
            Op::Read => {}
            Op::Write => {
                // What is found here then can only have come from there.
                let other = Layout { salt: 0, ..layout };
                self.program.blocks.fill(&other)?;
                for blocks in layout.checked(moved, bytes_max) {
                    (self.program).move_range(Batch::read, layout.range(&blocks))?;
                }
            }
            _ => return self.check_puts(),
        }
        self.program.blocks.check(&layout, moved, bytes_max)
    }

    /// Fetches the last blocks and compares them.
    fn check_puts(&mut self) -> Result<u64, BenchError> {
        let (program, layout) = (&mut *self.program, &self.layout);
        let first = self.begun.saturating_sub(self.kept);
        for block in first..self.begun {
            let prefix = format!("{}/{}", program.prefix, block % self.kept);
            let fetched = (program.client).get(Some(&program.node), &prefix, Memory::Auto)?;
            let is_block = fetched.moved.bytes == layout.block_size
                && pool::is_pattern(&fetched.lease(), layout.salt, layout.offset(block));
            if !is_block {
                return Err(BenchError::Inconsistent { block });
            }
        }
        Ok(self.begun - first)
    }

    fn put(&mut self) -> Result<(), BenchError> {
        let program = &mut *self.program;
        let info = memory::bytes("block", self.layout.block_size);
        let all = program.blocks.tensor();
        let block = all.part(info, self.layout.offset(self.begun))?;
        let prefix = format!("{}/{}", program.prefix, self.begun % self.kept);
        let (node, memory) = (Some(program.node.as_str()), program.memory);
        let client = &mut program.client;
        let moved = client.put_into(node, &prefix, &[block], None, memory, |_, _| {})?;
        program.count(&moved);
        Ok(())
    }

    fn post(&mut self) -> Result<Posted, BenchError> {
        let program = &mut *self.program;
        let window = program.window.as_ref().ok_or(BenchError::Garbage)?;
        let start = self.layout.offset(self.begun);
        let range = start..start + self.layout.block_size;
        let mut batch = match self.op {
            Op::Read => Batch::read(),
            _ => Batch::write(),
        };
        batch.range(window, range, program.blocks.tensor(), start)?;
        Ok(program.client.post(&batch)?)
    }

    fn collect(&mut self, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        done.append(&mut self.ended);
        let mut index = 0;
        while let Some((_, posted)) = self.in_flight.get(index) {
            if !self.program.client.has_ended(posted) {
                index += 1;
                continue;
            }
            let (slot, posted) = self.in_flight.swap_remove(index);
            let moved = self.program.client.wait(posted)?;
            self.program.count(&moved);
            done.push(slot);
        }
        Ok(())
    }
}

impl Carrier for Requests<'_> {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        if self.op == Op::Send {
            self.put()?;
            self.ended.push(slot);
        } else {
            let posted = self.post()?;
            self.in_flight.push((slot, posted));
        }
        self.begun += 1;
        Ok(())
    }

    fn complete(&mut self, until: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        // The agents' own limits end a request; this ends a wait for nothing.
        let stalled = Instant::now() + 6 * LIVENESS;
        loop {
            self.collect(done)?;
            let now = Instant::now();
            if !done.is_empty() || until.is_some_and(|until| until <= now) {
                return Ok(());
            }
            if now >= stalled {
                return Err(BenchError::Silent(6 * LIVENESS));
            }
            let left = until.unwrap_or(stalled).saturating_duration_since(now);
            if self.in_flight.is_empty() {
                std::thread::sleep(left.min(Duration::from_millis(100)));
            } else {
                self.program.client.wait_any(left)?;
            }
        }
    }
}
