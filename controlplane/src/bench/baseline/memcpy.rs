//! What one core copies from memory to memory.

use std::time::Instant;

use crate::bench::BenchError;
use crate::bench::measure::{Carrier, Slot};
use crate::bench::pool::{Layout, Pool};

/// Copies blocks from one pool to another; each is there when it was begun.
#[derive(Debug)]
pub struct Memcpy<'a> {
    from: &'a Pool,
    into: &'a Pool,
    layout: Layout,
    begun: u64,
    done: Vec<Slot>,
}

impl<'a> Memcpy<'a> {
    /// Of one row.
    pub fn new(from: &'a Pool, into: &'a Pool, layout: Layout) -> Self {
        Self {
            from,
            into,
            layout,
            begun: 0,
            done: Vec::new(),
        }
    }

    /// Compares what was copied.
    pub fn check(&self, bytes_max: u64) -> Result<u64, BenchError> {
        self.into.check(&self.layout, self.begun, bytes_max)
    }
}

impl Carrier for Memcpy<'_> {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let from = self.from.block(&self.layout, self.begun)?;
        let into = self.into.block(&self.layout, self.begun)?;
        let view = from.view(0..from.len()).ok_or(BenchError::Garbage)?;
        into.write_at(0, view);
        self.begun += 1;
        self.done.push(slot);
        Ok(())
    }

    fn complete(
        &mut self,
        _until: Option<Instant>,
        done: &mut Vec<Slot>,
    ) -> Result<(), BenchError> {
        done.append(&mut self.done);
        Ok(())
    }
}
