//! Two engines on loopback, and what the tests ask of them.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use genie_dataplane::endpoint::{Endpoint, Lost, Transfer};
use genie_dataplane::engine::{FailReason, OpenError, Receipt, Remote, Status};
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::tcp::{self, Config, Role, Token};
use genie_dataplane::{SessionId, TransferId};
use genie_proto::seal::{Secret, Secrets};

pub(crate) const TOKEN: Token = Token(*b"0123456789abcdef");

/// One engine, its dispatcher, and where it listens.
pub(crate) struct Engine {
    pub(crate) endpoint: Endpoint,
    pub(crate) status: Status,
    pub(crate) address: SocketAddr,
    /// What the sessions are sealed with that it opens.
    pub(crate) secrets: Option<Secrets>,
    lost: tokio::sync::mpsc::UnboundedReceiver<Lost>,
    threads: Vec<JoinHandle<()>>,
}

/// Two engines with a session between them.
pub(crate) struct Link {
    pub(crate) a: Engine,
    pub(crate) b: Engine,
    /// The session as `a` calls it, and as `b` does.
    pub(crate) ids: (SessionId, SessionId),
}

impl Engine {
    pub(crate) fn start(config: Config) -> Self {
        let (running, address) = tcp::spawn(config).unwrap();
        let dispatcher = running.completions.spawn().unwrap();
        Self {
            endpoint: running.endpoint,
            status: running.status,
            address,
            secrets: None,
            lost: running.lost,
            threads: vec![running.thread, dispatcher],
        }
    }

    pub(crate) fn quick() -> Self {
        Self::start(quick())
    }

    pub(crate) fn patient() -> Self {
        Self::start(patient())
    }

    /// Opens a session as `id` toward a peer that calls it `theirs`.
    pub(crate) fn open(
        &self,
        id: SessionId,
        theirs: SessionId,
        role: Role,
        streams: u16,
    ) -> Result<Duration, OpenError> {
        let remote = tcp::Remote {
            role,
            session: theirs,
            token: TOKEN,
            streams,
            secrets: self.secrets.clone(),
        };
        block_on(self.endpoint.open(id, Remote::Tcp(remote)))
    }

    pub(crate) fn receive(
        &self,
        id: SessionId,
        into: Lease,
    ) -> Result<(TransferId, Transfer), FailReason> {
        block_on(self.endpoint.receive(id, into))
    }

    pub(crate) fn send(
        &self,
        id: SessionId,
        transfer: TransferId,
        from: Lease,
    ) -> Result<Transfer, FailReason> {
        block_on(self.endpoint.send(id, transfer, from))
    }

    /// Waits for a session to be lost; says which, why, and after how long.
    ///
    /// Less than half of [`PATIENCE`]: what is lost later was not noticed, but
    /// ran into the liveness limit.
    pub(crate) fn await_lost(&mut self) -> (Lost, Duration) {
        let (begin, limit) = (Instant::now(), PATIENCE / 4);
        while begin.elapsed() < limit {
            if let Ok(lost) = self.lost.try_recv() {
                return (lost, begin.elapsed());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no session was lost within {limit:?}");
    }

    /// Ends the engine and waits for its threads.
    pub(crate) fn stop(self) {
        self.endpoint.stop();
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

impl Link {
    pub(crate) fn new(streams: u16) -> Self {
        Self::between(Engine::patient(), Engine::patient(), streams)
    }

    pub(crate) fn between(a: Engine, b: Engine, streams: u16) -> Self {
        let ids = open_both(&a, &b, streams);
        Self { a, b, ids }
    }

    /// Between engines that seal what they send.
    pub(crate) fn sealed(streams: u16) -> Self {
        let [mut a, mut b] = [Engine::patient(), Engine::patient()];
        a.secrets = Some(secrets());
        b.secrets = Some(secrets().of_the_other_end());
        Self::between(a, b, streams)
    }

    /// Moves `from` from `a` to `b` into `into`; the answers of both ends.
    pub(crate) fn try_move(
        &self,
        from: &Lease,
        into: &Lease,
    ) -> (Result<Receipt, FailReason>, Result<Receipt, FailReason>) {
        let (id, received) = self.b.receive(self.ids.1, into.clone()).unwrap();
        let sent = self.a.send(self.ids.0, id, from.clone()).unwrap();
        (sent.wait(), received.wait())
    }

    /// Moves `from` and asserts that it arrived.
    pub(crate) fn move_and_check(&self, from: &Lease) {
        let into = empty(from.len());
        let (sent, received) = self.try_move(from, &into);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_eq!(sent.digest, received.digest);
        assert_eq!(sent.digest.0, from.crc32c(0..from.len()));
        assert_eq!(
            (sent.bytes, received.bytes),
            (from.len() as u64, from.len() as u64)
        );
        // Sealed, it is copied to private memory and out of it.
        let own = self.a.secrets.is_some() as u64 * from.len() as u64;
        assert_eq!((sent.copies.genie, received.copies.genie), (own, own));
        assert_eq!(bytes(from), bytes(&into));
    }

    pub(crate) fn stop(self) {
        self.a.stop();
        self.b.stop();
    }
}

/// What the end that dials seals with.
pub(crate) fn secrets() -> Secrets {
    Secrets {
        send: Secret([1; 32]),
        receive: Secret([2; 32]),
    }
}

/// A configuration for tests that wait for limits.
pub(crate) fn quick() -> Config {
    Config {
        liveness: Duration::from_secs(2),
        open_limit: Duration::from_millis(800),
        ..Config::default()
    }
}

/// A configuration for all others: on a busy machine nothing is lost by it.
pub(crate) fn patient() -> Config {
    Config {
        liveness: PATIENCE,
        open_limit: PATIENCE,
        ..Config::default()
    }
}

/// More than any machine needs for what a test asks of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Opens a session between two engines; each end's id for it.
pub(crate) fn open_both(a: &Engine, b: &Engine, streams: u16) -> (SessionId, SessionId) {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let random = NEXT.fetch_add(1, Ordering::Relaxed);
    let ids = (
        a.endpoint.new_session(random),
        b.endpoint.new_session(random + 1_000_000),
    );
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| b.open(ids.1, ids.0, Role::Accept, streams));
        let trip = a
            .open(ids.0, ids.1, Role::Dial(b.address), streams)
            .unwrap();
        assert!(trip > Duration::ZERO);
        accepting.join().unwrap().unwrap();
    });
    ids
}

/// A lease of `len` bytes that are all zero, at an odd place of its region.
pub(crate) fn empty(len: usize) -> Lease {
    let region = Region::with_backing(len + 4096, Backing::Shmem).unwrap();
    Lease::new(region, 64, len as u64).unwrap()
}

/// A lease of `len` bytes that are no two alike for a long time.
pub(crate) fn filled(len: usize, seed: u64) -> Lease {
    let lease = empty(len);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut block = Vec::with_capacity(4096);
    for offset in (0..len).step_by(4096) {
        block.clear();
        for _ in 0..512 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        block.truncate(len - offset);
        lease.write_at(offset, block[..].into());
    }
    lease
}

pub(crate) fn bytes(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.len()];
    lease.read_at(0, &mut bytes);
    bytes
}

/// Asserts that nobody but the caller holds the lease's region, soon.
pub(crate) fn assert_given_back(lease: &Lease) {
    assert_eq!(
        Arc::strong_count(lease.region()),
        1,
        "a lease was not given back"
    );
}

pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
