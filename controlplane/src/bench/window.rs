//! Receives posted ahead, so that no block waits for a grant.

use std::collections::VecDeque;

use genie_dataplane::TransferId;
use genie_dataplane::endpoint::Transfer;

use super::BenchError;
use super::carriers::{Node, poll};
use super::pool::{Layout, Pool};

/// The receives of one row at one end.
#[derive(Debug)]
pub struct Window {
    layout: Layout,
    pool: Pool,
    /// The oldest first; `None` once it has arrived and was counted.
    posted: VecDeque<Option<Transfer>>,
    /// Blocks for which a receive was posted.
    next: u64,
    arrived: u64,
    /// Blocks that may arrive before an older one: those in flight.
    batch: usize,
}

impl Window {
    /// Posts nothing yet.
    pub fn new(layout: Layout, pool: Pool, batch: usize) -> Self {
        Self {
            layout,
            pool,
            posted: VecDeque::new(),
            next: 0,
            arrived: 0,
            batch,
        }
    }

    /// Posts receives if half of them are used up; their ids are for the other end.
    pub fn post(&mut self, node: &Node) -> Result<Vec<TransferId>, BenchError> {
        let room = self.layout.posted.saturating_sub(self.posted.len() as u64);
        if room * 2 < self.layout.posted {
            return Ok(Vec::new());
        }
        let mut ids = Vec::with_capacity(room as usize);
        for _ in 0..room {
            let into = self.pool.block(&self.layout, self.next)?;
            let posted = node.endpoint.try_receive(node.session, into);
            let (id, transfer) = posted.map_err(|_| BenchError::TooManyOperations)??;
            ids.push(id);
            self.posted.push_back(Some(transfer));
            self.next += 1;
        }
        Ok(ids)
    }

    /// Counts the blocks that have arrived, each of which must be the one that
    /// was due there, out of order as they may; returns how many.
    pub fn collect(&mut self, node: &mut Node) -> Result<u64, BenchError> {
        let before = self.arrived;
        let oldest = self.next - self.posted.len() as u64;
        let posted = self.posted.iter_mut().take(self.batch);
        for (place, number) in posted.zip(oldest..) {
            let Some(transfer) = place else { continue };
            if let Some(result) = poll(transfer) {
                node.count(&result?);
                if !self.pool.has_stamp(&self.layout, number)? {
                    return Err(BenchError::Inconsistent { block: number });
                }
                *place = None;
                self.arrived += 1;
            }
        }
        while let Some(None) = self.posted.front() {
            self.posted.pop_front();
        }
        Ok(self.arrived - before)
    }

    /// Blocks that have arrived.
    pub fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Compares what arrived with the row's pattern.
    pub fn check(&self, bytes_max: u64) -> Result<u64, BenchError> {
        self.pool
            .check_stamped(&self.layout, self.arrived, bytes_max)
    }
}
