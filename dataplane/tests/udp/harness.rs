//! Two engines over two devices joined in memory, and a device that fails on demand.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use genie_dataplane::Secrets;
use genie_dataplane::SessionId;
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::device::{AttachError, Attachment, Capabilities, Counters, Device, TxFrame};
use genie_dataplane::endpoint::{Endpoint, Lost, Running, Transfer};
use genie_dataplane::engine::udp::{self, Config, Local};
use genie_dataplane::engine::{FailReason, OpenError, Receipt, Remote, Status};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Backing, Lease, Region, View};
use tokio::sync::mpsc::UnboundedReceiver;

/// More than any machine needs for what a test asks of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One engine and its end of an open session.
pub(crate) struct Node {
    pub(crate) endpoint: Endpoint,
    pub(crate) status: Status,
    pub(crate) session: SessionId,
    pub(crate) local: Local,
    pub(crate) lost: UnboundedReceiver<Lost>,
    pub(crate) engine: Option<JoinHandle<()>>,
    pub(crate) dispatcher: Option<JoinHandle<()>>,
}

impl Node {
    pub(crate) fn start<D: Device + Send + 'static>(device: D, config: Config) -> Self {
        Self::of(udp::spawn(config, move || Ok::<_, Infallible>(device)).unwrap())
    }

    pub(crate) fn of((running, local): (Running, Local)) -> Self {
        let Running {
            endpoint,
            completions,
            lost,
            status,
            thread,
        } = running;
        let dispatcher = Some(completions.spawn().unwrap());
        let session = endpoint.new_session(fastrand::u32(..));
        Self {
            endpoint,
            status,
            session,
            local,
            lost,
            engine: Some(thread),
            dispatcher,
        }
    }

    pub(crate) fn open(&self, peer: &Node) -> Result<Duration, OpenError> {
        self.open_with(peer, None)
    }

    pub(crate) fn open_with(
        &self,
        peer: &Node,
        secrets: Option<Secrets>,
    ) -> Result<Duration, OpenError> {
        let remote = Remote::Udp(udp::Remote {
            local: peer.local.clone(),
            session: peer.session,
            secrets,
        });
        block_on(self.endpoint.open(self.session, remote))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.endpoint.stop();
        for thread in [self.engine.take(), self.dispatcher.take()]
            .into_iter()
            .flatten()
        {
            thread.join().expect("a thread of the engine panicked");
        }
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(future)
}

pub(crate) fn config() -> Config {
    // Generous: the machine may run other tests on the same two cores.
    Config {
        liveness: PATIENCE,
        ..Config::default()
    }
}

pub(crate) fn connect<D: Device + Send + 'static>(a: D, b: D, config: Config) -> (Node, Node) {
    let a = Node::start(a, config.clone());
    let b = Node::start(b, config);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.open(&a));
        a.open(&b).expect("a opens");
        other.join().unwrap().expect("b opens");
    });
    (a, b)
}

pub(crate) fn region(bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len().max(1), Backing::Shmem).unwrap();
    let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
    lease.write_at(0, View::from(bytes));
    lease
}

pub(crate) fn contents(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.len()];
    lease.read_at(0, &mut bytes);
    bytes
}

pub(crate) fn random_bytes(random: &mut fastrand::Rng, len: usize) -> Vec<u8> {
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

/// Moves `bytes`; returns both ends' receipts after checking what arrived.
pub(crate) fn transfer(from: &Node, to: &Node, bytes: &[u8]) -> (Receipt, Receipt) {
    let destination = region(&vec![0; bytes.len()]);
    let (id, incoming) = block_on(to.endpoint.receive(to.session, destination.clone())).unwrap();
    let outgoing = block_on(from.endpoint.send(from.session, id, region(bytes))).unwrap();
    let sent = outgoing.wait().expect("the sender is told of success");
    let received = incoming.wait().expect("the receiver is told of success");
    assert_eq!(contents(&destination), bytes);
    assert_eq!(sent.digest, received.digest);
    assert_eq!(
        sent.digest.0,
        crc32c::crc32c(bytes),
        "the digest is the bytes' CRC32C"
    );
    assert_eq!(
        (sent.bytes, received.bytes),
        (bytes.len() as u64, bytes.len() as u64)
    );
    (sent, received)
}

/// A configuration for tests that wait for the limit.
pub(crate) fn short() -> Config {
    Config {
        liveness: Duration::from_millis(800),
        ..Config::default()
    }
}

/// How a transfer ended; none if it did not within [`PATIENCE`].
pub(crate) fn outcome(transfer: Transfer) -> Option<Result<Receipt, FailReason>> {
    block_on(async { tokio::time::timeout(PATIENCE, transfer).await.ok() })
}

/// Waits until `holds`; panics with `what` if it never does.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < limit, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How a [`Rig`] misbehaves.
#[derive(Debug, Default)]
pub(crate) struct Switches {
    /// Takes no frame.
    pub(crate) jammed: AtomicBool,
    /// Takes every frame and sends none.
    pub(crate) swallows: AtomicBool,
    /// Neither delivers frames nor finishes those it took.
    pub(crate) dead: AtomicBool,
    /// Keeps a copy of what it receives in `seen`.
    pub(crate) records: AtomicBool,
    /// What was received.
    pub(crate) seen: Mutex<Vec<Vec<u8>>>,
    /// Frames that somebody else puts on the link.
    pub(crate) injected: Mutex<Vec<Vec<u8>>>,
    /// Frames that went out.
    sent: AtomicU64,
    /// Frames that came in.
    received: AtomicU64,
    /// The most frames that waited to be received.
    pub(crate) fullest: AtomicU64,
}

/// A device that fails on demand.
pub(crate) struct Rig {
    inner: PairDevice,
    capabilities: Capabilities,
    pub(crate) switches: Arc<Switches>,
    peer: Arc<Switches>,
}

/// Two joined rigs.
pub(crate) fn rigs(options: &Options) -> (Rig, Rig) {
    let (a, b) = pair(options);
    let switches: [Arc<Switches>; 2] = Default::default();
    let rig = |inner: PairDevice, end: usize| Rig {
        capabilities: inner.capabilities().clone(),
        inner,
        switches: Arc::clone(&switches[end]),
        peer: Arc::clone(&switches[1 - end]),
    };
    (rig(a, 0), rig(b, 1))
}

impl Rig {
    /// The same, saying that it has so many receive descriptors.
    pub(crate) fn claiming(mut self, rx_descriptors: u16) -> Self {
        self.capabilities.rx_descriptors = rx_descriptors;
        self
    }
}

impl Device for Rig {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        let switches = &self.switches;
        let received = switches.received.load(Ordering::Relaxed);
        let waiting = self.peer.sent.load(Ordering::Acquire) - received;
        switches.fullest.fetch_max(waiting, Ordering::Relaxed);
        for frame in switches.injected.lock().unwrap().drain(..) {
            on_frame(View::from(&frame[..]));
        }
        let count = self.inner.rx_burst(&mut |view| {
            if switches.records.load(Ordering::Relaxed) {
                let mut bytes = vec![0; view.len()];
                view.copy_to(&mut bytes);
                switches.seen.lock().unwrap().push(bytes);
            }
            if !switches.dead.load(Ordering::Relaxed) {
                on_frame(view);
            }
        });
        switches.received.fetch_add(count as u64, Ordering::Relaxed);
        count
    }
    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        if self.switches.jammed.load(Ordering::Relaxed) {
            0
        } else if self.switches.swallows.load(Ordering::Relaxed) {
            frames.len()
        } else {
            // Counted before they can be received.
            let sent = &self.switches.sent;
            sent.fetch_add(frames.len() as u64, Ordering::Release);
            let count = self.inner.tx_burst(frames);
            sent.fetch_sub((frames.len() - count) as u64, Ordering::Release);
            count
        }
    }
    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        self.inner.attach(lease)
    }
    fn detach(&mut self, attachment: Attachment) -> bool {
        self.inner.detach(attachment)
    }
    fn reap(&mut self) {
        if !self.switches.dead.load(Ordering::Relaxed) {
            self.inner.reap();
        }
    }
    fn sweep(&mut self) {
        self.inner.sweep();
    }
    fn stop(&mut self) {
        self.inner.stop();
    }
    fn counters(&self) -> Counters {
        self.inner.counters()
    }
    fn copies(&self) -> Copies {
        self.inner.copies()
    }
    fn link_up(&self) -> bool {
        true
    }
}
