//! The engine's thread allocates for a transfer, and nothing for its packets;
//! for tensors that travel in one packet it allocates nothing at all.
//!
//! A program of its own, as the allocator counts for all of it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::endpoint::{Endpoint, Running};
use genie_dataplane::engine::udp::{self, Config, Local, Offers, Polled};
use genie_dataplane::engine::{Command, Completion, OperationId, Remote};
use genie_dataplane::memory::{Backing, Lease, Region, View};
use genie_dataplane::{Integrity, Metadata, Secret, Secrets, SessionId};

/// Counts what threads that said so allocate.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // Not there any more while a thread ends.
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, new_len) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Node {
    endpoint: Endpoint,
    local: Local,
    session: SessionId,
}

impl Node {
    fn start(device: PairDevice) -> (Self, Running) {
        // Whatever else the machine does, silence is not death.
        let config = Config {
            liveness: Duration::from_secs(60),
            nice: 0,
            ..Config::default()
        };
        let open = move || {
            // The engine's own thread opens its device.
            COUNTED.set(true);
            Ok::<_, Infallible>(device)
        };
        let (running, local) = udp::spawn(config, open).unwrap();
        let endpoint = running.endpoint.clone();
        let session = endpoint.new_session(fastrand::u32(..));
        let node = Self {
            endpoint,
            local,
            session,
        };
        (node, running)
    }

    fn remote(&self, secrets: Option<Secrets>) -> Remote {
        Remote::Udp(udp::Remote {
            local: self.local.clone(),
            session: self.session,
            secrets,
        })
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

/// Moves `from` into `into`; returns what both engines' threads allocated.
fn transfer(a: &Node, b: &Node, from: &Lease, into: &Lease) -> u64 {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let (sent, received) = block_on(async {
        let granted = b.endpoint.receive(b.session, into.clone()).await;
        let (id, receiving) = granted.unwrap();
        let sending = a.endpoint.send(a.session, id, from.clone()).await;
        (sending.unwrap().await, receiving.await)
    });
    assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn packets_cost_no_allocation() {
    measure(None);
    measure_offers(64);
    measure_offers(4096);
    // One secret for both directions is good enough to count allocations.
    let secret = || Secret([1; 32]);
    measure(Some(Secrets {
        send: secret(),
        receive: secret(),
    }));
}

fn measure(secrets: Option<Secrets>) {
    const LEN: usize = 64 << 20;
    let (a, b) = pair(&Options::default());
    let ((a, first), (b, second)) = (Node::start(a), Node::start(b));
    let threads =
        [first, second].map(|running| (running.completions.spawn().unwrap(), running.thread));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| block_on(b.endpoint.open(b.session, a.remote(secrets.clone()))));
        block_on(a.endpoint.open(a.session, b.remote(secrets.clone()))).unwrap();
        other.join().unwrap().unwrap();
    });
    let lease = || Lease::whole(Region::with_backing(LEN, Backing::Shmem).unwrap());
    let (from, into) = (lease(), lease());
    let pattern: Vec<u8> = (0..LEN).map(|at| (at / 63) as u8).collect();
    from.write_at(0, View::from(&pattern[..]));

    // Rings and tables grow to what the path needs, once. How much of them one
    // transfer uses is chance, so some of the later ones may still add to them:
    // the least that a transfer takes is what a transfer costs.
    for _ in 0..3 {
        transfer(&a, &b, &from, &into);
    }
    let least = (0..8).map(|_| transfer(&a, &b, &from, &into)).min();
    let packets = LEN / 9000;
    let least = least.expect("there were eight");
    println!("{least} allocations at both ends for {packets} packets");
    assert!(least <= 16, "{least} allocations for {packets} packets");

    a.endpoint.stop();
    b.endpoint.stop();
    for (dispatcher, engine) in threads {
        engine.join().unwrap();
        dispatcher.join().unwrap();
    }
}

/// Sends tensors of `len` bytes in one packet each, on this thread.
fn measure_offers(len: usize) {
    const COUNT: u64 = 20_000;
    let config = Config {
        liveness: Duration::from_secs(60),
        offers: Offers {
            slots: 64,
            len_max: 4096,
        },
        ..Config::default()
    };
    let (a, b) = pair(&Options::default());
    let mut ends = [a, b].map(|device| Polled::new(config.clone(), device));
    for end in [0, 1] {
        let remote = udp::Remote {
            local: ends[1 - end].local(),
            session: SessionId(2 - end as u32),
            secrets: None,
        };
        let open = Command::Open {
            operation: OperationId(0),
            session: SessionId(1 + end as u32),
            remote: Remote::Udp(remote),
            integrity: Integrity::Digest,
        };
        let now = ends[end].now();
        ends[end].handle_command(now, open);
    }
    let from = Lease::whole(Region::with_backing(4096, Backing::Shmem).unwrap());
    let from = from.slice(0..len as u64).unwrap();
    let (mut began, mut ended, mut came) = (0, 0, 0);
    let limit = Instant::now() + Duration::from_secs(60);
    let mut before = 0;
    COUNTED.set(true);
    while ended < COUNT || came < COUNT {
        // The first quarter is what rings and tables grow with.
        if ended <= COUNT / 4 {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        while began < COUNT {
            let (session, operation) = (SessionId(1), OperationId(began));
            let offered = ends[0].offer(session, operation, Metadata::new(), from.clone());
            if offered.is_err() {
                break;
            }
            began += 1;
        }
        for end in &mut ends {
            end.turn(end.now());
        }
        while let Some(completion) = ends[0].poll_completion() {
            if let Completion::Transferred { result, .. } = completion {
                assert_eq!(result.unwrap().bytes, len as u64);
                ended += 1;
            }
        }
        while ends[1].poll_completion().is_some() {}
        while let Some(offer) = ends[1].poll_offer() {
            ends[1].release(offer);
            came += 1;
        }
        assert!(Instant::now() < limit, "{ended} ended and {came} came");
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    COUNTED.set(false);
    println!("{allocations} allocations for {} tensors", COUNT * 3 / 4);
    assert!(allocations <= 16, "{allocations} for {COUNT} tensors");
}
