//! Ping-pong between two engines that are driven by whoever waits for them.
//!
//! No thread, no ring and no wake-up is between an application and the device:
//! what is left is the protocol. A block is an offer there and an offer back.

use std::time::{Duration, Instant};

use genie_dataplane::dpdk::{DeviceSpec, Port};
use genie_dataplane::engine::udp::{self, Local, Offer, OfferRefused, Offers, Polled};
use genie_dataplane::engine::{Command, Completion, FailReason, OperationId, Remote};
use genie_dataplane::memory::{Lease, Region};
use genie_dataplane::{Digest, Integrity, Metadata, OfferError, SessionId, Time};

use super::BenchError;
use super::carriers::{Kind, LIVENESS, dpdk_options};
use super::measure::{Carrier, Slot};
use super::pool;

/// The longest block: header, offer and metadata fit beside it at MTU 9000.
pub const BLOCK_MAX: u64 = 8192;

/// Blocks that a peer may send unasked; in a ping-pong one is under way.
const SLOTS: u16 = 16;

/// Sources used in turn: one must not change before the peer has it.
const SOURCES: u64 = 16;

/// After the last block there is never so long a pause but at the end.
const PAUSE: Duration = Duration::from_secs(2);

/// Turns between two looks at the clock.
const LOOK: u64 = 1 << 16;

/// One end.
#[derive(Debug)]
pub struct End {
    engine: Polled<Port>,
    local: Local,
    session: SessionId,
    memory: Lease,
    block_bytes: u64,
    begun: u64,
    /// The engine's clock, read every few turns.
    now: Time,
    turns: u64,
}

impl End {
    /// Opens the device; of a pair the first is vhost.
    pub fn open(device: &str, block_bytes: u64) -> Result<Self, BenchError> {
        let refused =
            |error: &dyn std::fmt::Display| BenchError::Engine(Kind::Dpdk, error.to_string());
        let spec: DeviceSpec = device.parse().map_err(|error| refused(&error))?;
        let port = Port::open(&spec, &dpdk_options(9000)).map_err(|error| refused(&error))?;
        let config = udp::Config {
            liveness: LIVENESS,
            offers: Offers {
                slots: SLOTS,
                len_max: BLOCK_MAX as u32,
            },
            ..udp::Config::default()
        };
        let engine = Polled::new(config, port);
        Ok(Self {
            local: engine.local(),
            engine,
            session: SessionId(u32::from_ne_bytes(crate::node::random())),
            memory: Lease::whole(Region::allocate((SOURCES * block_bytes) as usize)?.0),
            block_bytes,
            begun: 0,
            now: Time::default(),
            turns: 0,
        })
    }

    /// How the other end reaches it, and what it calls the session.
    pub fn local(&self) -> (Local, SessionId) {
        (self.local.clone(), self.session)
    }

    /// Opens the path to the other end, which does the same meanwhile.
    pub fn connect(
        &mut self,
        local: Local,
        session: SessionId,
        integrity: Integrity,
    ) -> Result<(), BenchError> {
        let remote = udp::Remote {
            local,
            session,
            secrets: None,
        };
        let open = Command::Open {
            operation: OperationId(0),
            session: self.session,
            remote: Remote::Udp(remote),
            integrity,
        };
        self.engine.handle_command(self.engine.now(), open);
        let until = Instant::now() + LIVENESS;
        loop {
            self.engine.turn(self.engine.now());
            match self.engine.poll_completion() {
                Some(Completion::Opened { result, .. }) => {
                    result?;
                    return Ok(());
                }
                _ if Instant::now() > until => return Err(BenchError::Silent(LIVENESS)),
                _ => {}
            }
        }
    }

    /// One pass of the engine. The clock is read every fourth time: that costs as
    /// much as a look at the device, and no timer is so short.
    fn turn(&mut self) {
        if self.turns.is_multiple_of(4) {
            self.now = self.engine.now();
        }
        self.turns += 1;
        self.engine.turn(self.now);
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
            let engine = &mut self.engine;
            match engine.offer(self.session, operation, Metadata::new(), from) {
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
            self.turn();
        }
    }

    /// Closes the session and has the other end hear of it.
    fn close(&mut self) {
        self.engine.handle_command(self.engine.now(), Command::Stop);
        let until = Instant::now() + LIVENESS;
        while !self.engine.is_finished() && Instant::now() < until {
            self.engine.turn(self.engine.now());
            while self.engine.poll_completion().is_some() {}
        }
    }

    /// Sends every block back, until the other end closes. Returns the driver.
    pub fn pong(mut self) -> Result<String, BenchError> {
        let (mut came, mut last) = (true, Instant::now());
        loop {
            self.turn();
            while let Some(offer) = self.engine.poll_offer() {
                self.send_back(offer)?;
                came = true;
            }
            while let Some(completion) = self.engine.poll_completion() {
                match completion {
                    Completion::Transferred { result: Ok(_), .. } => {}
                    // The last one's proof may be lost with the session.
                    Completion::Transferred {
                        result: Err(FailReason::Closed),
                        ..
                    }
                    | Completion::Lost { .. } => return Ok(self.local.driver),
                    Completion::Transferred {
                        result: Err(reason),
                        ..
                    } => return Err(reason.into()),
                    _ => return Err(BenchError::Garbage),
                }
            }
            if self.turns.is_multiple_of(LOOK) {
                if std::mem::take(&mut came) {
                    last = Instant::now();
                } else if last.elapsed() > LIVENESS + PAUSE {
                    return Err(BenchError::Silent(LIVENESS));
                }
            }
        }
    }

    fn send_back(&mut self, offer: Offer) -> Result<(), BenchError> {
        let back = self.source()?;
        let view = self.engine.offered(&offer);
        let Some(view) = view.filter(|view| view.len() == back.len()) else {
            return Err(BenchError::Garbage);
        };
        back.write_at(0, view);
        self.engine.release(offer);
        self.offer(back)
    }
}

/// The measuring end.
#[derive(Debug)]
pub struct Ping {
    end: End,
    waiting: Option<Slot>,
    sent: Option<Digest>,
    came: Option<Digest>,
}

impl Ping {
    /// Of an end whose path is open.
    pub fn new(end: End) -> Self {
        pool::fill(&end.memory, u64::from(end.session.0), 0);
        Self {
            end,
            waiting: None,
            sent: None,
            came: None,
        }
    }

    /// The driver.
    pub fn driver(&self) -> &str {
        &self.end.local.driver
    }

    /// Ends it, for the other end too.
    pub fn close(mut self) {
        self.end.close();
    }

    /// Looks for the block's end there and its coming back.
    fn collect(&mut self) -> Result<(), BenchError> {
        while let Some(completion) = self.end.engine.poll_completion() {
            match completion {
                Completion::Transferred { result, .. } => self.sent = Some(result?.digest),
                Completion::Lost { reason, .. } => return Err(reason.into()),
                _ => return Err(BenchError::Garbage),
            }
        }
        while let Some(offer) = self.end.engine.poll_offer() {
            if offer.len() != self.end.block_bytes {
                return Err(BenchError::Garbage);
            }
            self.came = Some(offer.digest());
            self.end.engine.release(offer);
        }
        Ok(())
    }
}

impl Carrier for Ping {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let number = self.end.begun.to_ne_bytes();
        let source = self.end.source()?;
        // No two blocks are equal, so that each digest is of its own block.
        let stamp = number.len().min(source.len());
        source.write_at(0, number[..stamp].into());
        self.end.offer(source)?;
        self.waiting = Some(slot);
        Ok(())
    }

    fn complete(&mut self, _: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        let mut began = None;
        while self.sent.is_none() || self.came.is_none() {
            self.end.turn();
            self.collect()?;
            if self.end.turns.is_multiple_of(LOOK)
                && began.get_or_insert_with(Instant::now).elapsed() > LIVENESS
            {
                return Err(BenchError::Silent(LIVENESS));
            }
        }
        // What came back is what was sent.
        if self.sent.take() != self.came.take() {
            let block = self.end.begun - 1;
            return Err(BenchError::Inconsistent { block });
        }
        done.extend(self.waiting.take());
        Ok(())
    }
}
