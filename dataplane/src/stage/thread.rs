//! The thread that owns a device's streams and everything under way on them.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::task::{Context, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use super::flight::{Flight, Job, Progress};
use super::{StageError, Trace};
use crate::memory::accelerator::{Accelerator, AcceleratorError, Stream, Way};

/// How often a device is asked whether a copy is done: a few times in what a
/// slot takes over PCIe.
const ASK_EVERY: Duration = Duration::from_micros(20);

/// How often when nothing was done for [`PATIENT_AFTER`] asks.
const ASK_RARELY: Duration = Duration::from_micros(200);

const PATIENT_AFTER: u32 = 100;

struct Stager {
    jobs: Receiver<Job>,
    to_device: Box<dyn Stream>,
    to_host: Box<dyn Stream>,
    flights: Vec<Flight>,
    trace: Trace,
    stopping: bool,
}

/// Starts the thread; the inner error is the device's.
pub(super) fn spawn(
    accelerator: &Arc<dyn Accelerator>,
    jobs: Receiver<Job>,
    trace: Trace,
) -> io::Result<Result<JoinHandle<()>, AcceleratorError>> {
    let accelerator = Arc::clone(accelerator);
    let kind = accelerator.properties().kind;
    let (started, answer): (Sender<Result<(), AcceleratorError>>, _) = channel();
    let thread = thread::Builder::new()
        .name("genie-stage".into())
        .spawn(move || {
            let streams = accelerator
                .stream()
                .and_then(|to_device| Ok((to_device, accelerator.stream()?)));
            match streams {
                Ok((to_device, to_host)) => {
                    let _ = started.send(Ok(()));
                    let stager = Stager {
                        jobs,
                        to_device,
                        to_host,
                        flights: Vec::new(),
                        trace,
                        stopping: false,
                    };
                    stager.run();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
    let stopped = Err(AcceleratorError::Stopped(kind));
    Ok(answer.recv().unwrap_or(stopped).map(|()| thread))
}

impl Stager {
    fn run(mut self) {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        let mut quiet = 0;
        loop {
            let taken = self.take_jobs();
            if self.stopping {
                self.flights.iter_mut().for_each(Flight::abandon);
            }
            let over = self.advance(&mut context);
            let begun = self.begin_copies(Way::ToDevice) + self.begin_copies(Way::ToHost);
            if self.stopping && self.flights.is_empty() {
                return;
            }
            let busy = taken + over + begun > 0;
            quiet = if busy { 0 } else { quiet + 1 };
            if !self.flights.iter().any(Flight::is_to_be_asked) {
                if !busy {
                    thread::park();
                }
            } else if quiet < PATIENT_AFTER {
                thread::park_timeout(ASK_EVERY);
            } else {
                thread::park_timeout(ASK_RARELY);
            }
        }
    }

    fn take_jobs(&mut self) -> usize {
        let before = self.flights.len();
        loop {
            match self.jobs.try_recv() {
                Ok(Job(flight)) => self.flights.push(flight),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    break;
                }
            }
        }
        self.flights.len() - before
    }

    /// Moves every flight on; returns how many ended.
    fn advance(&mut self, context: &mut Context<'_>) -> usize {
        let to_device = self.to_device.completed();
        let to_host = self.to_host.completed();
        let before = self.flights.len();
        let trace = &self.trace;
        self.flights.retain_mut(|flight| {
            let copied = match flight.way() {
                Way::ToDevice => &to_device,
                Way::ToHost => &to_host,
            };
            !matches!(flight.advance(copied, context, trace), Progress::Over)
        });
        before - self.flights.len()
    }

    /// Begins every copy of one way that is wanted, as one batch; returns how
    /// many those are.
    fn begin_copies(&mut self, way: Way) -> usize {
        let Self {
            flights,
            to_device,
            to_host,
            ..
        } = self;
        let wanted = |flight: &&mut Flight| flight.way() == way && flight.wants_copy();
        let batch: Vec<_> = flights
            .iter_mut()
            .filter(wanted)
            .map(|flight| flight.op())
            .collect();
        if batch.is_empty() {
            return 0;
        }
        let stream = match way {
            Way::ToDevice => to_device,
            Way::ToHost => to_host,
        };
        let count = batch.len();
        match stream.copy(batch) {
            Ok(number) => flights
                .iter_mut()
                .filter(wanted)
                .for_each(|flight| flight.begin_copy(number)),
            Err(error) => flights.retain_mut(|flight| {
                let failed = flight.way() == way && flight.wants_copy();
                if failed {
                    flight.fail(StageError::Accelerator(error.clone()));
                }
                !failed
            }),
        }
        count
    }
}
