//! Ping-pong of offers: a block is one there and one back.

use std::collections::VecDeque;
use std::time::Instant;

use genie_dataplane::engine::udp::{InPlace, Offer, OfferRefused, Offers};
use genie_dataplane::engine::{Completion, OperationId};
use genie_dataplane::memory::{Lease, Region};
use genie_dataplane::{Digest, Metadata, OfferError};

use super::{End, PAUSE};
use crate::bench::BenchError;
use crate::bench::carriers::LIVENESS;
use crate::bench::measure::{Carrier, Slot};
use crate::bench::pool;

/// The longest block: header, offer and metadata fit beside it at MTU 9000.
pub const BLOCK_MAX: u64 = 8192;

/// Blocks that a peer may send unasked; in a ping-pong one is under way.
const SLOTS: u16 = 16;

/// Sources used in turn: one must not change before the peer has it.
const SOURCES: u64 = 16;

/// Opens an end for a ping-pong.
pub fn open(device: &str) -> Result<End, BenchError> {
    let offers = Offers {
        slots: SLOTS,
        len_max: BLOCK_MAX as u32,
    };
    End::open(device, offers, InPlace::default())
}

/// An end and what it sends.
#[derive(Debug)]
struct Player {
    end: End,
    memory: Lease,
    block_bytes: u64,
    begun: u64,
}

impl Player {
    fn new(end: End, block_bytes: u64) -> Result<Self, BenchError> {
        let memory = Lease::whole(Region::allocate((SOURCES * block_bytes) as usize)?.0);
        Ok(Self {
            end,
            memory,
            block_bytes,
            begun: 0,
        })
    }

    /// The next source.
    fn source(&mut self) -> Result<Lease, BenchError> {
        let at = self.begun % SOURCES * self.block_bytes;
        self.begun += 1;
        let source = self.memory.slice(at..at + self.block_bytes);
        source.map_err(|error| BenchError::Refused(error.to_string()))
    }

    fn offer(&mut self, mut from: Lease) -> Result<(), BenchError> {
        let mut until = None;
        loop {
            let operation = OperationId(self.begun);
            let End {
                engine, session, ..
            } = &mut self.end;
            match engine.offer(*session, operation, Metadata::new(), from) {
                Ok(_) => return Ok(()),
                Err(OfferRefused {
                    from: back,
                    reason: OfferError::NotGranted,
                }) => from = back,
                Err(refused) => return Err(BenchError::Refused(refused.to_string())),
            }
            // The first grant, or one that was lost, is on its way.
            let until = *until.get_or_insert_with(|| Instant::now() + LIVENESS);
            if Instant::now() > until {
                return Err(BenchError::Silent(LIVENESS));
            }
            self.end.turn();
        }
    }

    fn send_back(&mut self, offer: Offer) -> Result<(), BenchError> {
        let back = self.source()?;
        let view = self.end.engine.offered(&offer);
        let Some(view) = view.filter(|view| view.len() == back.len()) else {
            return Err(BenchError::Garbage);
        };
        back.write_at(0, view);
        self.offer(back)?;
        self.end.turn();
        self.end.engine.release(offer);
        Ok(())
    }
}

/// Sends every block back, until the other end closes. Returns the driver.
pub fn pong(end: End, block_bytes: u64) -> Result<String, BenchError> {
    let mut player = Player::new(end, block_bytes)?;
    let (mut came, mut last) = (true, Instant::now());
    loop {
        player.end.turn();
        while let Some(offer) = player.end.engine.poll_offer() {
            player.send_back(offer)?;
            came = true;
        }
        while let Some(transferred) = player.end.transferred()? {
            if transferred.is_none() {
                return Ok(player.end.local.driver);
            }
        }
        if player.end.is_time_to_look() {
            if std::mem::take(&mut came) {
                last = Instant::now();
            } else if last.elapsed() > LIVENESS + PAUSE {
                return Err(BenchError::Silent(LIVENESS));
            }
        }
    }
}

/// The measuring end.
#[derive(Debug)]
pub struct Ping {
    player: Player,
    waiting: Option<Slot>,
    /// Of blocks that the other end has, and of those that came back: at most
    /// one more here or there.
    sent: VecDeque<Digest>,
    came: VecDeque<Digest>,
    /// Blocks whose digests agreed.
    agreed: u64,
}

impl Ping {
    /// Of an end whose path is open.
    pub fn new(end: End, block_bytes: u64) -> Result<Self, BenchError> {
        let salt = u64::from(end.session.0);
        let player = Player::new(end, block_bytes)?;
        pool::fill(&player.memory, salt, 0);
        Ok(Self {
            player,
            waiting: None,
            sent: VecDeque::new(),
            came: VecDeque::new(),
            agreed: 0,
        })
    }

    /// The driver.
    pub fn driver(&self) -> &str {
        self.player.end.driver()
    }

    /// Ends it, for the other end too, once every block's digests agreed.
    pub fn close(mut self) -> Result<(), BenchError> {
        self.turn_until(|ping| ping.agreed == ping.player.begun)?;
        self.player.end.close();
        Ok(())
    }

    /// Drives the engine until something is true of what it brought.
    fn turn_until(&mut self, what: impl Fn(&Self) -> bool) -> Result<(), BenchError> {
        let mut began = None;
        while !what(self) {
            self.player.end.turn();
            self.collect()?;
            if self.player.end.is_time_to_look()
                && began.get_or_insert_with(Instant::now).elapsed() > LIVENESS
            {
                return Err(BenchError::Silent(LIVENESS));
            }
        }
        Ok(())
    }

    /// Looks for the block's end there and its coming back.
    fn collect(&mut self) -> Result<(), BenchError> {
        while let Some(completion) = self.player.end.engine.poll_completion() {
            match completion {
                Completion::Transferred { result, .. } => self.sent.push_back(result?.digest),
                Completion::Lost { reason, .. } => return Err(reason.into()),
                _ => return Err(BenchError::Garbage),
            }
        }
        while let Some(offer) = self.player.end.engine.poll_offer() {
            if offer.len() != self.player.block_bytes {
                return Err(BenchError::Garbage);
            }
            self.came.push_back(offer.digest());
            self.player.end.engine.release(offer);
        }
        while let (Some(sent), Some(came)) = (self.sent.front(), self.came.front()) {
            // What came back is what was sent.
            if sent != came {
                let block = self.agreed;
                return Err(BenchError::Inconsistent { block });
            }
            self.sent.pop_front();
            self.came.pop_front();
            self.agreed += 1;
        }
        Ok(())
    }
}

impl Carrier for Ping {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let number = self.player.begun.to_ne_bytes();
        let source = self.player.source()?;
        // No two blocks are equal, so that each digest is of its own block.
        let stamp = number.len().min(source.len());
        source.write_at(0, number[..stamp].into());
        self.player.offer(source)?;
        self.waiting = Some(slot);
        Ok(())
    }

    /// A block is done when it is back: the proof that the other end has it, which
    /// comes along, is looked at when nothing waits.
    fn complete(&mut self, _: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        let begun = self.player.begun;
        self.turn_until(|ping| ping.agreed + ping.came.len() as u64 == begun)?;
        done.extend(self.waiting.take());
        Ok(())
    }
}
