//! Two interfaces joined by two links, until somebody asks to stop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::interface::Interface;
use super::{Counters, Link, Profile};

/// Frames taken from one interface before the other has its turn.
const BATCH: usize = 64;

/// Room for the longest frame a veth carries.
const FRAME_MAX: usize = 65_536 + 64;

/// Two interfaces and the links between them. Used by one thread.
#[derive(Debug)]
pub struct Wire {
    interfaces: [Interface; 2],
    /// `links[0]` leads from the first interface to the second.
    links: [Link; 2],
    lateness: Lateness,
    started: Instant,
}

/// What a wire did, and how well.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What was asked for.
    pub profile: Profile,
    /// From the first interface to the second, and back.
    pub directions: [Counters; 2],
    /// Frames that came in and were never seen: this machine was too slow.
    pub missed: u64,
    /// Frames that the kernel refused to send.
    pub refused: u64,
    /// How long after its time a frame went out: the mean.
    pub late_mean_us: f64,
    /// And the worst.
    pub late_max_us: f64,
}

#[derive(Debug, Default)]
struct Lateness {
    frames: u64,
    sum: Duration,
    max: Duration,
}

impl Wire {
    /// Joins the interfaces of these names.
    pub fn open(first: &str, second: &str, profile: &Profile) -> io::Result<Self> {
        Ok(Self {
            interfaces: [Interface::open(first)?, Interface::open(second)?],
            links: [0, 1].map(|direction| Link::new(profile.clone(), direction)),
            lateness: Lateness::default(),
            started: Instant::now(),
        })
    }

    /// Carries frames until `stop` is readable.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let mut buffer = vec![0; FRAME_MAX];
        loop {
            let busy = self.take_frames(&mut buffer)?;
            self.deliver_frames()?;
            let until = if busy {
                Some(Duration::ZERO)
            } else {
                self.next_arrival()
            };
            if self.rest(until, stop)? {
                return Ok(());
            }
        }
    }

    /// What happened so far.
    pub fn report(&self, profile: Profile) -> io::Result<Report> {
        let [first, second] = &self.interfaces;
        let mean = self.lateness.sum.as_secs_f64() * 1e6 / self.lateness.frames.max(1) as f64;
        Ok(Report {
            profile,
            directions: [0, 1].map(|direction: usize| self.links[direction].counters().clone()),
            missed: first.missed()? + second.missed()?,
            refused: first.refused() + second.refused(),
            late_mean_us: mean,
            late_max_us: self.lateness.max.as_secs_f64() * 1e6,
        })
    }

    fn take_frames(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let mut busy = false;
        for (interface, link) in self.interfaces.iter_mut().zip(&mut self.links) {
            for count in 1..=BATCH {
                let Some(len) = interface.receive(buffer)? else {
                    break;
                };
                link.handle_frame(self.started.elapsed(), &buffer[..len]);
                busy |= count == BATCH;
            }
        }
        Ok(busy)
    }

    fn deliver_frames(&mut self) -> io::Result<()> {
        let [first, second] = &mut self.interfaces;
        let mut result = Ok(());
        for (interface, link) in [second, first].into_iter().zip(&mut self.links) {
            link.poll_frames(self.started.elapsed(), |frame, late| {
                self.lateness.count(late);
                if let Err(error) = interface.send(frame) {
                    result = Err(error);
                }
            });
        }
        result
    }

    fn next_arrival(&self) -> Option<Duration> {
        let next = self.links.iter().filter_map(Link::poll_timeout).min()?;
        Some(next.saturating_sub(self.started.elapsed()))
    }

    /// Sleeps until there is something to do; whether that is to stop.
    fn rest(&self, limit: Option<Duration>, stop: BorrowedFd<'_>) -> io::Result<bool> {
        let [first, second] = &self.interfaces;
        let mut waits = [first.as_fd(), second.as_fd(), stop]
            .map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
        match ppoll(&mut waits, limit.map(TimeSpec::from_duration), None) {
            Ok(_) => Ok(waits[2].any().unwrap_or(false)),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Lateness {
    fn count(&mut self, late: Duration) {
        self.frames += 1;
        self.sum += late;
        self.max = self.max.max(late);
    }
}
