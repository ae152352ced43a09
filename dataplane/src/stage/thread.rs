//! The thread that owns a device's streams and everything under way on them.

use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use super::flight::{Answer, Flight, Job, Progress};
use super::{StageError, Trace};
use crate::memory::accelerator::{Accelerator, AcceleratorError, ForeignEvent, Stream, Way};

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
    /// In the order in which they were asked for.
    flights: Vec<Flight>,
    signals: Vec<Signal>,
    trace: Trace,
    /// The first error after which nothing works any more.
    broken: Arc<OnceLock<AcceleratorError>>,
    stopping: bool,
}

/// An event to be signalled.
struct Signal {
    way: Way,
    event: ForeignEvent,
    answer: Answer<()>,
    /// How many of the flights were asked for before it.
    after: usize,
}

/// Starts the thread; the inner error is the device's.
pub(super) fn spawn(
    accelerator: &Arc<dyn Accelerator>,
    jobs: Receiver<Job>,
    trace: Trace,
    broken: Arc<OnceLock<AcceleratorError>>,
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
                        signals: Vec::new(),
                        trace,
                        broken,
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
            self.signal();
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

    /// Takes what there is to do; returns how much that was.
    fn take_jobs(&mut self) -> usize {
        let mut taken = 0;
        loop {
            match self.jobs.try_recv() {
                Ok(Job::Move(flight)) => self.flights.push(flight),
                Ok(Job::WaitFor { way, event, answer }) => {
                    let known = self.stream(way).wait_for(event);
                    // Whoever does not wait any more does not miss it.
                    let _ = answer.send(known.map_err(StageError::from));
                }
                Ok(Job::Signal { way, event, answer }) => self.signals.push(Signal {
                    way,
                    event,
                    answer,
                    after: self.flights.len(),
                }),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    break;
                }
            }
            taken += 1;
        }
        taken
    }

    fn stream(&mut self, way: Way) -> &mut dyn Stream {
        match way {
            Way::ToDevice => &mut *self.to_device,
            Way::ToHost => &mut *self.to_host,
        }
    }

    /// Signals the events before which no copy is to be begun any more.
    fn signal(&mut self) {
        let flights = &self.flights;
        let is_due = |signal: &mut Signal| {
            let mut before = flights[..signal.after].iter();
            !before.any(|flight| flight.way() == signal.way && flight.will_copy())
        };
        let due: Vec<_> = self.signals.extract_if(.., is_due).collect();
        for Signal {
            way, event, answer, ..
        } in due
        {
            let told = self.stream(way).signal(event);
            let _ = answer.send(told.map_err(StageError::from));
        }
    }

    fn note(&self, ended: &Result<u64, AcceleratorError>) {
        if let Err(error) = ended
            && error.is_sticky()
        {
            // Only the first one says why.
            let _ = self.broken.set(error.clone());
        }
    }

    /// Forgets the flights that are over; returns how many those are.
    fn retain(&mut self, mut goes_on: impl FnMut(&mut Flight) -> bool) -> usize {
        let before = self.flights.len();
        let mut at = 0;
        let mut over = Vec::new();
        self.flights.retain_mut(|flight| {
            let stays = goes_on(flight);
            if !stays {
                over.push(at);
            }
            at += 1;
            stays
        });
        for signal in &mut self.signals {
            signal.after -= over.partition_point(|at| *at < signal.after);
        }
        before - self.flights.len()
    }

    /// Moves every flight on; returns how many ended.
    fn advance(&mut self, context: &mut Context<'_>) -> usize {
        let to_device = self.to_device.completed();
        let to_host = self.to_host.completed();
        [&to_device, &to_host]
            .into_iter()
            .for_each(|ended| self.note(ended));
        let trace = self.trace.clone();
        self.retain(|flight| {
            let copied = match flight.way() {
                Way::ToDevice => &to_device,
                Way::ToHost => &to_host,
            };
            !matches!(flight.advance(copied, context, &trace), Progress::Over)
        })
    }

    /// Begins every copy of one way that is wanted, as one batch; returns how
    /// many those are.
    fn begin_copies(&mut self, way: Way) -> usize {
        let wanted = |flight: &&mut Flight| flight.way() == way && flight.wants_copy();
        let batch: Vec<_> = self
            .flights
            .iter_mut()
            .filter(wanted)
            .map(|flight| flight.op())
            .collect();
        if batch.is_empty() {
            return 0;
        }
        let count = batch.len();
        let begun = self.stream(way).copy(batch);
        self.note(&begun);
        match begun {
            Ok(number) => self
                .flights
                .iter_mut()
                .filter(wanted)
                .for_each(|flight| flight.begin_copy(number)),
            Err(error) => {
                self.retain(|flight| {
                    let failed = flight.way() == way && flight.wants_copy();
                    if failed {
                        flight.fail(StageError::Accelerator(error.clone()));
                    }
                    !failed
                });
            }
        }
        count
    }
}
