//! The engines that can be measured, and how to start each.

use std::fmt;
use std::time::{Duration, Instant};

use genie_dataplane::device::pair::PairDevice;
use genie_dataplane::dpdk::{self, DeviceSpec};
use genie_dataplane::endpoint::{Completions, Endpoint, Running};
use genie_dataplane::engine::{Receipt, udp};
use genie_dataplane::{Integrity, Secrets, SessionId, shm, tcp};
use serde::{Deserialize, Serialize};

use super::BenchError;
use super::channel::{Channel, wait_readable};
use super::message::{Setup, Usage};
use crate::transport::Local;

/// How long a path or a transfer may take to show a sign of life.
pub const LIVENESS: Duration = Duration::from_secs(10);

/// Which engine carries blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The UDP protocol over a DPDK device.
    Dpdk,
    /// Kernel TCP.
    Tcp,
    /// Descriptors passed between two processes of one host.
    Shm,
    /// The UDP protocol over two devices joined in memory, both ends in one process.
    Mem,
}

/// An engine, its answers, and what it has used.
#[derive(Debug)]
pub struct Node {
    /// To give it work.
    pub endpoint: Endpoint,
    /// This end's name of the session.
    pub session: SessionId,
    /// How the other end reaches it.
    pub local: Local,
    /// What packets are sealed with at this end, if they are.
    pub secrets: Option<Secrets>,
    /// Whether blocks are under checksums.
    pub integrity: Integrity,
    completions: Completions,
    thread: Option<std::thread::JoinHandle<()>>,
    used: Usage,
}

impl Node {
    /// Starts the engine of `kind`.
    ///
    /// `device` is a specification for [`Kind::Dpdk`], `end` a device for [`Kind::Mem`].
    pub fn start(
        kind: Kind,
        device: Option<&str>,
        end: Option<PairDevice>,
        listen: std::net::IpAddr,
        setup: &Setup,
    ) -> Result<Self, BenchError> {
        let (streams, mtu) = (setup.streams, setup.mtu);
        let config = udp::Config {
            liveness: LIVENESS,
            ..udp::Config::default()
        };
        let refused = |error: &dyn fmt::Display| BenchError::Engine(kind, error.to_string());
        let (running, local) = match kind {
            Kind::Tcp => {
                let config = tcp::Config {
                    listen: (listen, 0).into(),
                    streams,
                    liveness: LIVENESS,
                    congestion: setup.congestion.clone(),
                    ..tcp::Config::default()
                };
                let (running, data) = tcp::spawn(config).map_err(|error| refused(&error))?;
                (running, Local::Tcp { data, streams })
            }
            Kind::Shm => {
                let config = shm::Config {
                    liveness: LIVENESS,
                    open_limit: LIVENESS,
                    ..shm::Config::default()
                };
                let (running, local) = shm::spawn(config).map_err(|error| refused(&error))?;
                (running, Local::Shm(local))
            }
            Kind::Dpdk => {
                let device = device.ok_or_else(|| refused(&"no device: give --dpdk-device"))?;
                let spec: DeviceSpec = device.parse().map_err(|error| refused(&error))?;
                let open = move || dpdk::Port::open(&spec, &dpdk_options(mtu));
                let (running, local) =
                    udp::spawn(config, open).map_err(|error| refused(&chain(&error)))?;
                (running, Local::Dpdk(local))
            }
            Kind::Mem => {
                let end = end.ok_or_else(|| refused(&"both ends must be in one process"))?;
                let open = move || Ok::<_, std::convert::Infallible>(end);
                let (running, local) = udp::spawn(config, open).map_err(|error| refused(&error))?;
                (running, Local::Dpdk(local))
            }
        };
        let Running {
            endpoint,
            completions,
            thread,
            ..
        } = running;
        let session = endpoint.new_session(u32::from_ne_bytes(crate::node::random()));
        let used = Usage {
            process: std::process::id(),
            ..Usage::default()
        };
        Ok(Self {
            endpoint,
            session,
            local,
            secrets: setup.secrets.clone(),
            integrity: setup.integrity,
            completions,
            thread: Some(thread),
            used,
        })
    }

    /// The device's driver, or `tcp`.
    pub fn driver(&self) -> &str {
        match &self.local {
            Local::Dpdk(local) => &local.driver,
            Local::Tcp { .. } => "tcp",
            Local::Shm(_) => "shm",
        }
    }

    /// Takes in what the engine has answered.
    pub fn dispatch(&mut self) -> Result<(), BenchError> {
        if self.completions.dispatch() {
            Ok(())
        } else {
            Err(BenchError::EngineEnded)
        }
    }

    /// Sleeps until the engine answers, the channel has something, or `limit` is over.
    pub fn rest(&mut self, channel: Option<&Channel>, limit: Option<Duration>) {
        use std::os::fd::AsFd;
        if self.completions.prepare_sleep() {
            let engine = self.completions.as_fd();
            match channel {
                Some(channel) => wait_readable(&[engine, channel.as_fd()], limit),
                None => wait_readable(&[engine], limit),
            }
            self.completions.finish_sleep();
        }
    }

    /// Waits for something of the engine's, dispatching meanwhile.
    pub fn wait<F: Future + Unpin>(&mut self, mut future: F) -> Result<F::Output, BenchError> {
        let until = Instant::now() + LIVENESS + Duration::from_secs(2);
        loop {
            if let Some(output) = poll(&mut future) {
                return Ok(output);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BenchError::Silent(LIVENESS));
            }
            self.rest(None, Some(left));
            self.dispatch()?;
        }
    }

    /// Counts a transfer that succeeded.
    pub fn count(&mut self, receipt: &Receipt) {
        self.used.copies.add(receipt.copies);
        self.used.bytes += receipt.bytes;
        self.used.retransmits += receipt.retransmits;
    }

    /// What was used so far, by this engine and by the whole process.
    pub fn usage(&self) -> Usage {
        let cpu_seconds = super::environment::cpu_time().as_secs_f64();
        Usage {
            cpu_seconds,
            ..self.used
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.endpoint.close(self.session);
        self.endpoint.stop();
        // Closed transfers are answered before the thread ends.
        while self.completions.dispatch() {
            self.rest(None, Some(Duration::from_millis(20)));
        }
        if let Some(thread) = self.thread.take() {
            // A panic of the engine's was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Looks whether a future has its output, without being woken for it later.
pub fn poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::Pin::new(future).poll(&mut context) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}

/// How DPDK is brought up: on huge pages if there are enough for two processes.
pub fn dpdk_options(mtu: u16) -> dpdk::Options {
    let options = dpdk::Options::sized(1, mtu);
    let free = super::environment::free_hugepages() << 21;
    let wanted = 2 * (u64::from(options.memory_mib) << 20);
    dpdk::Options {
        no_huge: free < wanted,
        ..options
    }
}

/// An error and all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Shm => "shm",
            Kind::Dpdk => "dpdk",
            Kind::Tcp => "tcp",
            Kind::Mem => "mem",
        })
    }
}
