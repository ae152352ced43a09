//! Two engines on one host, and what the tests ask of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use genie_dataplane::endpoint::{Endpoint, Lost, Transfer};
use genie_dataplane::engine::{FailReason, OpenError, Receipt, Remote, Status};
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::shm::{self, Config, Local, Role};
use genie_dataplane::tcp::Token;
use genie_dataplane::{SessionId, TransferId};

pub(crate) const TOKEN: Token = Token(*b"0123456789abcdef");

/// More than any machine needs for what a test asks of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One engine, its dispatcher, and how it is reached.
pub(crate) struct Engine {
    pub(crate) endpoint: Endpoint,
    pub(crate) status: Status,
    pub(crate) local: Local,
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
        let (running, local) = shm::spawn(config).unwrap();
        let dispatcher = running.completions.spawn().unwrap();
        Self {
            endpoint: running.endpoint,
            status: running.status,
            local,
            lost: running.lost,
            threads: vec![running.thread, dispatcher],
        }
    }

    /// On a busy machine nothing is lost by its limits.
    pub(crate) fn patient() -> Self {
        Self::start(Config {
            liveness: PATIENCE,
            open_limit: PATIENCE,
            progress_limit: PATIENCE,
        })
    }

    /// Opens a session as `id` toward a peer that calls it `theirs`.
    pub(crate) fn open(
        &self,
        id: SessionId,
        theirs: SessionId,
        role: Role,
        token: Token,
    ) -> Result<Duration, OpenError> {
        let remote = shm::Remote {
            role,
            session: theirs,
            token,
        };
        block_on(self.endpoint.open(id, Remote::Shm(remote)))
    }

    pub(crate) fn receive(&self, id: SessionId, into: Lease) -> (TransferId, Transfer) {
        block_on(self.endpoint.receive(id, into)).unwrap()
    }

    pub(crate) fn send(&self, id: SessionId, transfer: TransferId, from: Lease) -> Transfer {
        block_on(self.endpoint.send(id, transfer, from)).unwrap()
    }

    /// Waits for a session to be lost.
    pub(crate) fn await_lost(&mut self) -> Lost {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if let Ok(lost) = self.lost.try_recv() {
                return lost;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no session was lost within {PATIENCE:?}");
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
    pub(crate) fn new() -> Self {
        let (a, b) = (Engine::patient(), Engine::patient());
        let ids = open_both(&a, &b);
        Self { a, b, ids }
    }

    /// Moves `from` from `a` to `b` into `into`; the answers of both ends.
    pub(crate) fn try_move(
        &self,
        from: &Lease,
        into: &Lease,
    ) -> (Result<Receipt, FailReason>, Result<Receipt, FailReason>) {
        let (id, received) = self.b.receive(self.ids.1, into.clone());
        let sent = self.a.send(self.ids.0, id, from.clone());
        (sent.wait(), received.wait())
    }

    pub(crate) fn stop(self) {
        self.a.stop();
        self.b.stop();
    }
}

/// Opens a session between two engines; each end's id for it.
pub(crate) fn open_both(a: &Engine, b: &Engine) -> (SessionId, SessionId) {
    let ids = new_ids(a, b);
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| b.open(ids.1, ids.0, Role::Accept, TOKEN));
        let dialled = a.open(ids.0, ids.1, Role::Dial(b.local.clone()), TOKEN);
        assert!(dialled.unwrap() > Duration::ZERO);
        assert!(accepting.join().unwrap().unwrap() > Duration::ZERO);
    });
    ids
}

/// Ids that neither has used.
pub(crate) fn new_ids(a: &Engine, b: &Engine) -> (SessionId, SessionId) {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let random = NEXT.fetch_add(1, Ordering::Relaxed);
    (
        a.endpoint.new_session(random),
        b.endpoint.new_session(random + 1_000_000),
    )
}

/// A lease of `len` bytes that are all zero, at an odd place of its region.
pub(crate) fn empty(len: usize) -> Lease {
    let region = Region::with_backing(len + 4096, Backing::Shmem).unwrap();
    Lease::new(region, 64, len as u64).unwrap()
}

/// A lease of `len` bytes that differ from those of any other seed.
pub(crate) fn filled(len: usize, seed: u64) -> Lease {
    let lease = empty(len);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    lease.write_at(0, bytes[..].into());
    lease
}

pub(crate) fn bytes(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.len()];
    lease.read_at(0, &mut bytes);
    bytes
}

/// Asserts that nobody but the caller holds the lease's region.
pub(crate) fn assert_given_back(lease: &Lease) {
    let holders = Arc::strong_count(lease.region());
    assert_eq!(holders, 1, "a lease was not given back");
}

pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().build().unwrap();
    runtime.block_on(future)
}

/// Descriptors that this process has open.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
