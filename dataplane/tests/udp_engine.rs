//! Two UDP engines, each on its own thread, over two devices joined in memory.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use genie_dataplane::SessionId;
use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::device::{AttachError, Attachment, Capabilities, Counters, Device, TxFrame};
use genie_dataplane::endpoint::{Endpoint, Lost, Running};
use genie_dataplane::engine::udp::{self, Config, Local};
use genie_dataplane::engine::{FailReason, OpenError, Receipt, Remote, Status};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Backing, Lease, Region, View};
use tokio::sync::mpsc::UnboundedReceiver;

/// One engine and its end of an open session.
struct Node {
    endpoint: Endpoint,
    status: Status,
    session: SessionId,
    local: Local,
    lost: UnboundedReceiver<Lost>,
    engine: Option<JoinHandle<()>>,
    dispatcher: Option<JoinHandle<()>>,
}

impl Node {
    fn start<D: Device + Send + 'static>(device: D, config: Config) -> Self {
        let (running, local) = udp::spawn(config, move || Ok::<_, Infallible>(device)).unwrap();
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

    fn open(&self, peer: &Node) -> Result<Duration, OpenError> {
        let remote = Remote::Udp(udp::Remote {
            local: peer.local.clone(),
            session: peer.session,
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

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

fn config() -> Config {
    // Generous: the machine may run other tests on the same two cores.
    Config {
        liveness: Duration::from_secs(20),
        ..Config::default()
    }
}

fn connect<D: Device + Send + 'static>(a: D, b: D, config: Config) -> (Node, Node) {
    let a = Node::start(a, config.clone());
    let b = Node::start(b, config);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.open(&a));
        a.open(&b).expect("a opens");
        other.join().unwrap().expect("b opens");
    });
    (a, b)
}

fn region(bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len().max(1), Backing::Shmem).unwrap();
    let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
    lease.write_at(0, View::from(bytes));
    lease
}

fn contents(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.len()];
    lease.read_at(0, &mut bytes);
    bytes
}

fn random_bytes(random: &mut fastrand::Rng, len: usize) -> Vec<u8> {
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

/// Moves `bytes`; returns both ends' receipts after checking what arrived.
fn transfer(from: &Node, to: &Node, bytes: &[u8]) -> (Receipt, Receipt) {
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

#[test]
fn tensors_of_all_sizes_arrive_in_both_directions() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let mut random = fastrand::Rng::with_seed(1);
    for len in [0, 1, 63, 64, 65, 8000, 9000, 9001, 100_000, 5_000_000] {
        let bytes = random_bytes(&mut random, len);
        transfer(&a, &b, &bytes);
        transfer(&b, &a, &bytes);
    }
}

#[test]
fn ipv4_and_arp_work_as_ipv6_does() {
    let (a, b) = pair(&Options::default());
    let addressed = |address: &str| Config {
        addresses: vec![address.parse().unwrap()],
        ..config()
    };
    let a = Node::start(a, addressed("10.7.0.1"));
    let b = Node::start(b, addressed("10.7.0.2"));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.open(&a));
        a.open(&b).unwrap();
        other.join().unwrap().unwrap();
    });
    transfer(
        &a,
        &b,
        &random_bytes(&mut fastrand::Rng::with_seed(2), 300_000),
    );
}

#[test]
fn many_small_tensors_at_once() {
    const COUNT: usize = 10_000;
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let bytes: Vec<u8> = (0..COUNT * 8).map(|i| (i / 8 + i) as u8).collect();
    let (from, to) = (region(&bytes), region(&vec![0; bytes.len()]));
    let mut transfers = std::collections::VecDeque::new();
    let finish = |pair: (genie_dataplane::endpoint::Transfer, _)| {
        let (incoming, outgoing): (_, genie_dataplane::endpoint::Transfer) = pair;
        assert_eq!(
            outgoing.wait().unwrap().digest,
            incoming.wait().unwrap().digest
        );
    };
    for index in 0..COUNT as u64 {
        let slice = index * 8..index * 8 + 8;
        let into = to.slice(slice.clone()).unwrap();
        let (id, incoming) = block_on(b.endpoint.receive(b.session, into)).unwrap();
        let source = from.slice(slice).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
        transfers.push_back((incoming, outgoing));
        if transfers.len() > 3000 {
            finish(transfers.pop_front().unwrap());
        }
    }
    transfers.into_iter().for_each(finish);
    assert_eq!(contents(&to), bytes);
}

/// Defect: the prototype's checksum was never verified, and it had no recovery
/// that could be relied on.
#[test]
fn bytes_arrive_exactly_through_loss_duplication_reordering_and_corruption() {
    for seed in 0..6 {
        println!("seed {seed}");
        let faults = Faults {
            seed,
            loss: 20,
            duplication: 20,
            corruption: 20,
            reordering: 30,
        };
        let (a, b) = pair(&Options {
            mtu: 1500,
            ..Options::default()
        });
        let a = FaultyDevice::new(a, faults);
        let b = FaultyDevice::new(
            b,
            Faults {
                seed: seed + 1000,
                ..faults
            },
        );
        let (a, b) = connect(a, b, config());
        let bytes = random_bytes(&mut fastrand::Rng::with_seed(seed), 2_000_000);
        let (sent, _) = transfer(&a, &b, &bytes);
        assert!(
            sent.retransmits > 0,
            "frames were lost, so some were sent again"
        );
        transfer(&b, &a, &bytes[..70_001]);
    }
}

#[test]
fn the_ledger_counts_the_copies_that_the_device_forces() {
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(3), 1_000_000);
    for (tx_external, genie, driver) in [(true, 0, 1), (false, 1, 0)] {
        let (a, b) = pair(&Options {
            tx_external,
            ..Options::default()
        });
        let (a, b) = connect(a, b, config());
        let (sent, received) = transfer(&a, &b, &bytes);
        let whole = |copies: u64| copies * (bytes.len() as u64 + sent.retransmits * 9000);
        let least = |copies: u64| copies * bytes.len() as u64;
        assert!(
            (least(genie)..=whole(genie)).contains(&sent.copies.genie),
            "{sent:?}"
        );
        assert!(
            (least(driver)..=whole(driver)).contains(&sent.copies.driver),
            "{sent:?}"
        );
        let once = Copies {
            genie: bytes.len() as u64,
            ..Copies::default()
        };
        assert_eq!(received.copies, once);
    }
}

#[test]
fn the_ports_own_counters_show_the_bytes() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(4), 3_000_000);
    transfer(&a, &b, &bytes);
    let wait_until = Instant::now() + Duration::from_secs(20);
    loop {
        let (a, b) = (a.status.snapshot(), b.status.snapshot());
        let port = |snapshot: &genie_dataplane::engine::Snapshot| snapshot.port.unwrap();
        if a.sent_bytes == bytes.len() as u64 && b.received_bytes == a.sent_bytes {
            assert!(port(&a).tx_bytes > a.sent_bytes);
            assert!(port(&b).rx_bytes > a.sent_bytes);
            assert_eq!(a.sessions.len(), 1);
            break;
        }
        assert!(
            Instant::now() < wait_until,
            "the status never showed the transfer: {a:?} {b:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A device that takes every frame and delivers none once it is told to.
struct BlackHole {
    inner: PairDevice,
    closed: Arc<AtomicBool>,
}

impl Device for BlackHole {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }
    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        self.inner.rx_burst(on_frame)
    }
    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        if self.closed.load(Ordering::Relaxed) {
            return frames.len();
        }
        self.inner.tx_burst(frames)
    }
    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        self.inner.attach(lease)
    }
    fn detach(&mut self, attachment: Attachment) -> bool {
        self.inner.detach(attachment)
    }
    fn reap(&mut self) {
        self.inner.reap();
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

/// Defects: simulated success, and a sender that hung when retries ran out.
#[test]
fn a_link_that_swallows_everything_fails_both_ends_within_the_limit() {
    let closed = Arc::new(AtomicBool::new(false));
    let (a, b) = pair(&Options::default());
    let hole = |inner| BlackHole {
        inner,
        closed: Arc::clone(&closed),
    };
    let config = Config {
        liveness: Duration::from_millis(800),
        ..Config::default()
    };
    let (mut a, b) = connect(hole(a), hole(b), config);
    let destination = region(&[0; 100_000]);
    let (id, incoming) = block_on(b.endpoint.receive(b.session, destination)).unwrap();
    closed.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let source = region(&[7; 100_000]);
    let memory = Arc::downgrade(source.region());
    let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
    let failed = outgoing.wait();
    assert!(matches!(failed, Err(FailReason::PathLost(_))), "{failed:?}");
    assert!(memory.upgrade().is_none(), "the lease was given back");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "took {:?}",
        began.elapsed()
    );
    let lost = a
        .lost
        .blocking_recv()
        .expect("the session is reported as lost");
    assert_eq!(lost.session, a.session);
    let failed = incoming.wait();
    assert!(matches!(failed, Err(FailReason::PathLost(_))), "{failed:?}");
}

#[test]
fn opening_toward_nobody_fails_with_the_reason() {
    let (a, b) = pair(&Options::default());
    let config = Config {
        liveness: Duration::from_millis(300),
        ..Config::default()
    };
    let a = Node::start(a, config.clone());
    let b = Node::start(b, config);
    let mut elsewhere = b.local.clone();
    elsewhere.addresses = vec!["fe80::1234".parse().unwrap()];
    let open = |local| {
        let session = a.endpoint.new_session(fastrand::u32(..));
        block_on(
            a.endpoint
                .open(session, Remote::Udp(udp::Remote { local, session })),
        )
    };
    let nobody = open(elsewhere.clone());
    assert_eq!(nobody, Err(OpenError::NoNeighbour(elsewhere.addresses[0])));
    elsewhere.addresses = vec!["10.0.0.1".parse().unwrap()];
    assert_eq!(open(elsewhere), Err(OpenError::NoCommonAddress));
    // A neighbour that answers, whose engine knows no such session.
    let refused = open(b.local.clone());
    assert!(
        matches!(refused, Err(OpenError::NoAnswer(_))),
        "{refused:?}"
    );
}

#[test]
fn cancelling_either_end_fails_the_other_and_frees_both_leases() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    for sender_cancels in [true, false] {
        let (source, destination) = (region(&vec![1; 50_000_000]), region(&vec![0; 50_000_000]));
        let memory = [
            Arc::downgrade(source.region()),
            Arc::downgrade(destination.region()),
        ];
        let (id, incoming) = block_on(b.endpoint.receive(b.session, destination)).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
        let survivor = if sender_cancels {
            drop(outgoing);
            incoming
        } else {
            drop(incoming);
            outgoing
        };
        let result = survivor.wait();
        assert!(
            matches!(result, Err(FailReason::CancelledByPeer)),
            "{result:?}"
        );
        let limit = Instant::now() + Duration::from_secs(20);
        while memory.iter().any(|memory| memory.upgrade().is_some()) {
            assert!(
                Instant::now() < limit,
                "a cancelled transfer keeps its memory"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    transfer(&a, &b, &[9; 1000]);
}

#[test]
fn memory_that_changes_while_it_moves_is_a_digest_mismatch_or_arrives_as_one_state() {
    // Frames are lost so that segments are read twice, at different times.
    let faults = Faults {
        seed: 5,
        loss: 100,
        ..Faults::default()
    };
    let (a, b) = pair(&Options {
        mtu: 1500,
        ..Options::default()
    });
    let (a, b) = connect(
        FaultyDevice::new(a, faults),
        FaultyDevice::new(b, faults),
        config(),
    );
    let source = region(&vec![0; 3_000_000]);
    let destination = region(&vec![0; 3_000_000]);
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let (sent, received) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let at = fastrand::usize(0..3_000_000);
                source.write_at(at, View::from(&[fastrand::u8(..)][..]));
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        let (id, incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, source.clone())).unwrap();
        let results = (outgoing.wait(), incoming.wait());
        stop.store(true, Ordering::Relaxed);
        results
    });
    assert!(
        writes.load(Ordering::Relaxed) > 1000,
        "the writer ran meanwhile"
    );
    match (sent, received) {
        (Ok(sent), Ok(received)) => {
            assert_eq!(sent.digest, received.digest);
            let arrived = crc32c::crc32c(&contents(&destination));
            assert_eq!(
                received.digest.0, arrived,
                "what arrived is what was verified"
            );
        }
        (sent, received) => {
            assert_eq!(sent, Err(FailReason::DigestMismatch));
            assert_eq!(received, Err(FailReason::DigestMismatch));
        }
    }
    transfer(&a, &b, &[3; 5000]);
}

#[test]
fn sessions_come_and_go_and_leave_nothing() {
    let (a, b) = pair(&Options::default());
    let mut a = Node::start(a, config());
    let mut b = Node::start(b, config());
    for round in 0..50 {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(&a));
            a.open(&b)
                .unwrap_or_else(|error| panic!("round {round}: {error}"));
            other.join().unwrap().unwrap();
        });
        transfer(&a, &b, &[round as u8; 20_000]);
        a.endpoint.close(a.session);
        b.endpoint.close(b.session);
        a.session = a.endpoint.new_session(fastrand::u32(..));
        b.session = b.endpoint.new_session(fastrand::u32(..));
    }
    let limit = Instant::now() + Duration::from_secs(20);
    while a.status.snapshot().sessions.len() + b.status.snapshot().sessions.len() > 0 {
        assert!(Instant::now() < limit, "closed sessions stay");
        std::thread::sleep(Duration::from_millis(10));
    }
}
