//! A transfer whose path is lost in the middle goes on over another one.

use std::sync::atomic::Ordering;
use std::time::Duration;

use genie_dataplane::SessionId;
use genie_dataplane::device::pair::Options;
use genie_dataplane::endpoint::Endpoint;
use genie_dataplane::engine::{FailReason, Interrupted, Partial, Receipt, Remote};
use genie_dataplane::memory::Lease;
use genie_dataplane::tcp::{self, Role, Token};
use genie_proto::{Incoming, Outgoing};

use crate::harness::{
    Node, PATIENCE, Rig, block_on, connect, contents, eventually, random_bytes, region, rigs, short,
};

const LEN: usize = (64 << 20) + 13;

/// Two endpoints with an open session between them.
struct Ends {
    from: (Endpoint, SessionId),
    to: (Endpoint, SessionId),
}

struct Halves {
    sent: Box<Partial<Outgoing>>,
    received: Box<Partial<Incoming>>,
}

impl Ends {
    fn of(from: &Node, to: &Node) -> Self {
        Self {
            from: (from.endpoint.clone(), from.session),
            to: (to.endpoint.clone(), to.session),
        }
    }

    /// A session over kernel sockets; its engines end with the process.
    fn over_tcp() -> Self {
        let start = || {
            let config = tcp::Config {
                listen: ([127, 0, 0, 1], 0).into(),
                streams: 2,
                liveness: PATIENCE,
                open_limit: PATIENCE,
                progress_limit: PATIENCE,
                congestion: None,
            };
            let (running, address) = tcp::spawn(config).unwrap();
            running.completions.spawn().unwrap();
            (running.endpoint, address)
        };
        let ((from, _), (to, address)) = (start(), start());
        let ids = (from.new_session(1), to.new_session(2));
        let remote = |role, session| {
            Remote::Tcp(tcp::Remote {
                secrets: None,
                role,
                session,
                token: Token([7; 16]),
                streams: 2,
            })
        };
        std::thread::scope(|scope| {
            let accept = scope.spawn(|| block_on(to.open(ids.1, remote(Role::Accept, ids.0))));
            block_on(from.open(ids.0, remote(Role::Dial(address), ids.1))).unwrap();
            accept.join().unwrap().unwrap();
        });
        Self {
            from: (from, ids.0),
            to: (to, ids.1),
        }
    }

    /// Begins a transfer, has `meanwhile` interrupt it, returns both halves.
    fn interrupt(&self, from: &Lease, into: &Lease, meanwhile: impl FnOnce()) -> Halves {
        let (to, from_) = (&self.to, &self.from);
        let (id, mut incoming) = block_on(to.0.receive(to.1, into.clone())).unwrap();
        let mut outgoing = block_on(from_.0.send(from_.1, id, from.clone())).unwrap();
        meanwhile();
        let ended = |transfer| block_on(transfer);
        let received: Result<Receipt, FailReason> = ended(&mut incoming);
        let sent: Result<Receipt, FailReason> = ended(&mut outgoing);
        assert!(received.is_err() && sent.is_err(), "{received:?} {sent:?}");
        let Some(Interrupted::Incoming(received)) = incoming.take_interrupted() else {
            panic!("the receiver has lost count: {received:?}");
        };
        let Some(Interrupted::Outgoing(sent)) = outgoing.take_interrupted() else {
            panic!("the sender has lost count: {sent:?}");
        };
        Halves {
            sent: Box::new(sent),
            received: Box::new(received),
        }
    }

    /// Begins what was interrupted elsewhere; returns both transfers' answers.
    fn resume(&self, mut halves: Halves, from: &Lease, into: &Lease) -> (Receipt, Receipt) {
        let missing = halves.received.prepare(into, 1024);
        halves.sent.prepare(&missing).unwrap();
        let (to, from_) = (&self.to, &self.from);
        let receive = to.0.resume_receive(to.1, into.clone(), halves.received);
        let (id, incoming) = block_on(receive).unwrap();
        let send = from_.0.resume_send(from_.1, id, from.clone(), halves.sent);
        let outgoing = block_on(send).unwrap();
        let sent = outgoing.wait().expect("the sender is told of success");
        let received = incoming.wait().expect("the receiver is told of success");
        (sent, received)
    }
}

/// Waits until a byte in the first part of the destination is there.
fn begun(into: &Lease) {
    eventually("bytes flow", || {
        let mut byte = [0];
        into.read_at(1 << 20, &mut byte);
        byte[0] != 0
    });
}

fn source() -> (Vec<u8>, Lease, Lease) {
    let mut random = fastrand::Rng::with_seed(11);
    let mut bytes = random_bytes(&mut random, LEN);
    bytes[1 << 20] = 1;
    let from = region(&bytes);
    (bytes, from, region(&vec![0; LEN]))
}

fn check(receipts: (Receipt, Receipt), bytes: &[u8], into: &Lease) {
    let crc = crc32c::crc32c(bytes);
    assert_eq!((receipts.0.digest.0, receipts.1.digest.0), (crc, crc));
    assert_eq!(receipts.1.bytes, bytes.len() as u64);
    assert!(contents(into) == bytes, "the bytes differ");
}

fn lossy_devices() -> (Rig, Rig) {
    rigs(&Options {
        mtu: 1500,
        ..Options::default()
    })
}

#[test]
fn a_lost_device_path_goes_on_over_tcp_and_its_late_packets_land_nowhere() {
    let (a, b) = lossy_devices();
    let switches = b.switches.clone();
    let (a, b) = connect(a, b, short());
    let (bytes, from, into) = source();
    let halves = Ends::of(&a, &b).interrupt(&from, &into, || {
        begun(&into);
        switches.records.store(true, Ordering::Relaxed);
        switches.dead.store(true, Ordering::Relaxed);
    });
    let applied = halves.received.moved.bytes_applied();
    assert!(0 < applied && applied < LEN as u64, "{applied}");

    // The lease is back: what the old path still delivers must not reach it.
    let before = contents(&into);
    let late = std::mem::take(&mut *switches.seen.lock().unwrap());
    let data = late.into_iter().filter(|frame| frame.len() > 1000);
    let data: Vec<_> = data.collect();
    assert!(!data.is_empty(), "frames were on their way");
    switches.records.store(false, Ordering::Relaxed);
    switches.dead.store(false, Ordering::Relaxed);
    let (count, dropped) = (data.len() as u64, b.status.snapshot().dropped);
    switches.injected.lock().unwrap().extend(data);
    eventually("the late packets have been looked at", || {
        let snapshot = b.status.snapshot();
        switches.injected.lock().unwrap().is_empty()
            && (snapshot.dropped >= dropped + count || snapshot.sessions.is_empty())
    });
    assert!(contents(&into) == before, "a late packet landed");

    let receipts = Ends::over_tcp().resume(halves, &from, &into);
    check(receipts, &bytes, &into);
    let kernel = receipts.1.copies.kernel;
    assert_eq!(kernel, LEN as u64 - applied, "only what was missing moved");
}

#[test]
fn a_tcp_path_that_is_closed_goes_on_over_a_device() {
    let tcp = Ends::over_tcp();
    let (bytes, from, into) = source();
    let halves = tcp.interrupt(&from, &into, || {
        begun(&into);
        tcp.to.0.close(tcp.to.1);
    });
    let applied = halves.received.moved.bytes_applied();
    assert!(0 < applied && applied < LEN as u64, "{applied}");
    let (a, b) = lossy_devices();
    let (a, b) = connect(a, b, short());
    check(Ends::of(&a, &b).resume(halves, &from, &into), &bytes, &into);
}

#[test]
fn a_transfer_that_was_complete_and_not_confirmed_is_confirmed_elsewhere() {
    let bytes = vec![9; 300_000];
    let (from, into) = (region(&bytes), region(&bytes));
    let mut moved = Incoming::new(bytes.len() as u64).unwrap();
    moved.apply(0, bytes.len() as u64, crc32c::crc32c(&bytes));
    let received = Box::new(Partial {
        moved,
        cost: Default::default(),
    });
    // The sender had its receipt already.
    let sent = Box::new(Partial::rebuild(&from));
    let tcp = Ends::over_tcp();
    check(
        tcp.resume(Halves { sent, received }, &from, &into),
        &bytes,
        &into,
    );
}

#[test]
fn a_path_that_goes_silent_is_noticed_within_its_limit() {
    let (a, b) = lossy_devices();
    let switches = b.switches.clone();
    let (a, b) = connect(a, b, short());
    let (_, from, into) = source();
    let mut began = std::time::Instant::now();
    Ends::of(&a, &b).interrupt(&from, &into, || {
        begun(&into);
        switches.dead.store(true, Ordering::Relaxed);
        began = std::time::Instant::now();
    });
    // The limit is 0.8 s; the rest is for a loaded machine.
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
}
