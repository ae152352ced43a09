//! The engine on a thread of its own: commands come over a ring, completions
//! go over another, and the thread sleeps when there is nothing to do.

use std::thread;
use std::time::Duration;

use genie_proto::Time;

use super::{Config, InPlace, Local, Offers, Polled};
use crate::device::{BURST_MAX, Device};
use crate::endpoint::{Endpoint, EnginePorts, Running};
use crate::engine::idle::{Bed, Idle, Rest};
use crate::engine::{Command, Completion, Outbox, Receiver, Status};

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError<E: std::error::Error + 'static> {
    /// The device could not be opened.
    #[error("cannot open the device")]
    Device(#[source] E),
    /// The kernel refused a thread or a descriptor.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// The thread ended before it said anything.
    #[error("the engine's thread ended while it opened the device")]
    Died,
}

/// Starts an engine on a thread of its own, which opens the device with `open`.
pub fn spawn<D, E>(
    config: Config,
    open: impl FnOnce() -> Result<D, E> + Send + 'static,
) -> Result<(Running, Local), SpawnError<E>>
where
    D: Device + 'static,
    E: std::error::Error + Send + 'static,
{
    let (endpoint, completions, ports, lost) =
        Endpoint::new().map_err(|errno| SpawnError::Thread(errno.into()))?;
    let status = Status::default();
    let (opened, answer) = std::sync::mpsc::channel();
    let engine_status = status.clone();
    let body = move || {
        let device = match open() {
            Ok(device) => device,
            Err(error) => return drop(opened.send(Err(error))),
        };
        lower_priority(config.nice);
        for caution in device.cautions() {
            tracing::warn!("{caution}");
        }
        let bed = match Bed::new(device.rx_event(), device.passed_event()) {
            Ok(bed) => bed,
            Err(errno) => {
                tracing::warn!(%errno, "cannot wait for the device's interrupts: sleeping in short steps");
                Bed::default()
            }
        };
        let config = Config {
            offers: Offers::default(),
            in_place: InPlace::default(),
            ..config
        };
        let engine = Polled::with_status(config, device, engine_status);
        let _ = opened.send(Ok(engine.local()));
        Driver::new(engine, bed, ports).run();
    };
    let thread = thread::Builder::new()
        .name("genie-udp".into())
        .spawn(body)
        .map_err(SpawnError::Thread)?;
    match answer.recv() {
        Ok(Ok(local)) => Ok((
            Running {
                endpoint,
                completions,
                lost,
                status,
                thread,
            },
            local,
        )),
        Ok(Err(error)) => Err(SpawnError::Device(error)),
        Err(_) => Err(SpawnError::Died),
    }
}

fn lower_priority(nice: i32) {
    // On Linux the "process" of setpriority is a thread.
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), nice) {
        tracing::warn!(%error, nice, "cannot change the engine's priority");
    }
}

/// What drives an engine on its thread.
struct Driver<D> {
    engine: Polled<D>,
    bed: Bed,
    commands: Receiver<Command>,
    outbox: Outbox<Completion>,
}

impl<D: Device> Driver<D> {
    fn new(engine: Polled<D>, bed: Bed, ports: EnginePorts) -> Self {
        Self {
            engine,
            bed,
            commands: ports.commands,
            outbox: Outbox::new(ports.completions),
        }
    }

    fn run(mut self) {
        let mut idle = Idle::new();
        while !(self.engine.is_finished() && self.outbox.is_empty()) {
            let now = self.engine.now();
            let mut busy = self.take_commands(now);
            busy |= self.engine.turn(now);
            self.answer();
            self.engine.core.idle = Some(idle.spent());
            let deadline = if busy {
                None
            } else {
                self.engine.next_deadline()
            };
            if let Rest::Sleep {
                unreported,
                reported,
            } = idle.next(busy, now, deadline)
                && self.sleep(unreported, reported)
            {
                idle.reset();
            }
        }
    }

    fn take_commands(&mut self, now: Time) -> bool {
        for count in 0..BURST_MAX {
            let Some(command) = self.commands.try_recv() else {
                self.engine.core.stopping |= self.commands.is_closed();
                return count > 0;
            };
            self.engine.handle_command(now, command);
        }
        true
    }

    fn answer(&mut self) {
        while let Some(completion) = self.engine.poll_completion() {
            self.outbox.push(completion);
        }
        self.outbox.flush();
    }

    /// Sleeps until there is a command or a frame, `reported` long where the
    /// device tells of frames, `unreported` long where something has to be
    /// looked for. Returns whether it found frames instead.
    fn sleep(&mut self, unreported: Duration, reported: Duration) -> bool {
        if !self.commands.prepare_sleep() {
            return false;
        }
        let mut found = false;
        let Self {
            engine,
            bed,
            commands,
            outbox,
        } = self;
        let waiting = engine.core.is_waiting_for_device() || !outbox.is_empty();
        if waiting || !bed.has_frames() || !engine.device.arm_rx(true) {
            bed.sleep(&*commands, unreported);
        } else {
            // What came before the interrupts were on is not reported.
            found = engine.receive(engine.now());
            if !found {
                bed.sleep(&*commands, reported);
            }
            engine.device.arm_rx(false);
        }
        self.commands.finish_sleep();
        found
    }
}
