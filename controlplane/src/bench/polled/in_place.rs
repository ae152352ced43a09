//! Tensors that the other end reads in the frames they arrive in.

use std::time::{Duration, Instant};

use genie_dataplane::TransferId;
use genie_dataplane::engine::udp::{InPlace, InPlaceRefused, Offers};
use genie_dataplane::engine::{Command, OperationId};
use genie_dataplane::memory::View;

use super::{End, PAUSE};
use crate::bench::BenchError;
use crate::bench::carriers::LIVENESS;
use crate::bench::measure::{Carrier, Slot};
use crate::bench::pool::{Layout, Pool};

/// Frames that the reader may have at a time. It reads them at once.
const FRAMES: u16 = 512;

/// Opens an end that sends what is read in place, or reads it.
pub fn open(device: &str) -> Result<End, BenchError> {
    let in_place = InPlace {
        frames: FRAMES,
        deadline: Duration::from_secs(10),
    };
    End::open(device, Offers::default(), in_place)
}

/// What a block in `slot` is called that is the `turn`th there. Both ends count.
fn transfer(slot: Slot, turn: u32) -> TransferId {
    TransferId {
        slot: slot as u32,
        generation: turn,
    }
}

/// All words of some bytes added up: the least that reading them takes.
fn sum(bytes: View<'_>) -> u64 {
    bytes.fold_words(0, u64::wrapping_add)
}

/// Reads every block, until the other end closes. Returns the driver and the sum
/// of all that was read.
pub fn read(mut end: End, block_bytes: u64, batch: usize) -> Result<(String, u64), BenchError> {
    let mut turns = vec![0; batch];
    for slot in 0..batch {
        expect(&mut end, slot, &mut turns, block_bytes)?;
    }
    let mut total = 0u64;
    let (mut came, mut last) = (true, Instant::now());
    loop {
        end.turn();
        while let Some(piece) = end.engine.poll_piece() {
            let bytes = end.engine.piece(&piece).ok_or(BenchError::Garbage)?;
            total = total.wrapping_add(sum(bytes));
            end.engine.release_piece(piece);
            came = true;
        }
        while let Some(transferred) = end.transferred()? {
            let Some((operation, _)) = transferred else {
                return Ok((end.local.driver, total));
            };
            expect(&mut end, operation.0 as Slot, &mut turns, block_bytes)?;
        }
        if end.is_time_to_look() {
            if std::mem::take(&mut came) {
                last = Instant::now();
            } else if last.elapsed() > LIVENESS + PAUSE {
                return Err(BenchError::Silent(LIVENESS));
            }
        }
    }
}

fn expect(end: &mut End, slot: Slot, turns: &mut [u32], len: u64) -> Result<(), BenchError> {
    turns[slot] += 1;
    let (id, operation) = (transfer(slot, turns[slot]), OperationId(slot as u64));
    let expected = end.engine.receive_in_place(end.session, operation, id, len);
    match expected {
        // It closed after the last block, which is told next.
        Ok(()) | Err(InPlaceRefused::NotOpen) => Ok(()),
        Err(error) => Err(BenchError::Refused(error.to_string())),
    }
}

/// The measuring end.
#[derive(Debug)]
pub struct Sender {
    end: End,
    pool: Pool,
    layout: Layout,
    turns: Vec<u32>,
    begun: u64,
}

impl Sender {
    /// Of an end whose path is open, and memory that holds the row's pattern.
    pub fn new(end: End, pool: Pool, layout: Layout, batch: usize) -> Self {
        Self {
            end,
            pool,
            layout,
            turns: vec![0; batch],
            begun: 0,
        }
    }

    /// The driver.
    pub fn driver(&self) -> &str {
        self.end.driver()
    }

    /// Ends it, for the other end too. Returns the sum of all that was sent.
    pub fn close(mut self) -> Result<u64, BenchError> {
        self.end.close();
        let mut total = 0u64;
        for buffer in 0..self.layout.count.min(self.begun) {
            let times = (self.begun - 1 - buffer) / self.layout.count + 1;
            let block = self.pool.block(&self.layout, buffer)?;
            let bytes = block.view(0..block.len()).ok_or(BenchError::Garbage)?;
            total = total.wrapping_add(sum(bytes).wrapping_mul(times));
        }
        Ok(total)
    }
}

impl Carrier for Sender {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let from = self.pool.block(&self.layout, self.begun)?;
        self.begun += 1;
        self.turns[slot] += 1;
        let send = Command::Send {
            operation: OperationId(slot as u64),
            session: self.end.session,
            transfer: transfer(slot, self.turns[slot]),
            from,
            resume: None,
        };
        self.end.engine.handle_command(self.end.engine.now(), send);
        Ok(())
    }

    fn complete(&mut self, _: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        let mut began = None;
        while done.is_empty() {
            self.end.turn();
            while let Some(transferred) = self.end.transferred()? {
                let (operation, _) = transferred.ok_or(BenchError::PeerGone)?;
                done.push(operation.0 as Slot);
            }
            if self.end.is_time_to_look()
                && began.get_or_insert_with(Instant::now).elapsed() > LIVENESS + PAUSE
            {
                return Err(BenchError::Silent(LIVENESS));
            }
        }
        Ok(())
    }
}
