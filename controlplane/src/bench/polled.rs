//! Engines that are driven by whoever waits for them.
//!
//! No thread, no ring and no wake-up is between an application and the device:
//! what is left is the protocol.

pub mod in_place;
pub mod pingpong;

use std::time::{Duration, Instant};

use genie_dataplane::dpdk::{DeviceSpec, Port};
use genie_dataplane::engine::udp::{self, InPlace, Local, Offers, Polled};
use genie_dataplane::engine::{Command, Completion, FailReason, OperationId, Receipt, Remote};
use genie_dataplane::{Integrity, SessionId, Time};

use super::BenchError;
use super::carriers::{Kind, LIVENESS, dpdk_options};

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
    /// The engine's clock, read every few turns.
    now: Time,
    turns: u64,
}

impl End {
    /// Opens the device; of a pair the first is vhost.
    pub fn open(device: &str, offers: Offers, in_place: InPlace) -> Result<Self, BenchError> {
        let refused =
            |error: &dyn std::fmt::Display| BenchError::Engine(Kind::Dpdk, error.to_string());
        let spec: DeviceSpec = device.parse().map_err(|error| refused(&error))?;
        let port = Port::open(&spec, &dpdk_options(9000)).map_err(|error| refused(&error))?;
        let config = udp::Config {
            liveness: LIVENESS,
            offers,
            in_place,
            ..udp::Config::default()
        };
        let engine = Polled::new(config, port);
        Ok(Self {
            local: engine.local(),
            engine,
            session: SessionId(u32::from_ne_bytes(crate::node::random())),
            now: Time::default(),
            turns: 0,
        })
    }

    /// The driver.
    pub fn driver(&self) -> &str {
        &self.local.driver
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

    /// One pass of the engine. The clock is read every sixteenth time: that costs as
    /// much as a look at the device, and no timer is so short.
    fn turn(&mut self) {
        if self.turns.is_multiple_of(16) {
            self.now = self.engine.now();
        }
        self.turns += 1;
        self.engine.turn(self.now);
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

    /// The next completion of a transfer, if there is one; `None` in it once the
    /// other end has closed.
    fn transferred(&mut self) -> Result<Option<Option<(OperationId, Receipt)>>, BenchError> {
        match self.engine.poll_completion() {
            None => Ok(None),
            Some(Completion::Transferred {
                operation,
                result: Ok(receipt),
            }) => Ok(Some(Some((operation, receipt)))),
            // The last one's proof may be lost with the session.
            Some(
                Completion::Transferred {
                    result: Err(FailReason::Closed),
                    ..
                }
                | Completion::Lost { .. },
            ) => Ok(Some(None)),
            Some(Completion::Transferred {
                result: Err(reason),
                ..
            }) => Err(reason.into()),
            Some(_) => Err(BenchError::Garbage),
        }
    }

    /// Whether it is time to look at the clock.
    fn is_time_to_look(&self) -> bool {
        self.turns.is_multiple_of(LOOK)
    }
}
