//! Sessions without checksums, over every engine: bytes arrive, receipts say
//! that nobody computed a digest, and two ends that disagree deliver nothing.

use std::convert::Infallible;
use std::time::Duration;

use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::endpoint::{Endpoint, Running, Transfer};
use genie_dataplane::engine::{FailReason, Receipt, Remote, udp};
use genie_dataplane::memory::{Backing, Lease, Region, View};
use genie_dataplane::tcp::{Role, Token};
use genie_dataplane::{Digest, Integrity, SessionId, shm, tcp};

/// More than any machine needs for what a test asks of it.
const PATIENCE: Duration = Duration::from_secs(60);

const TOKEN: Token = Token([7; 16]);

/// One engine, its session, and how the other one reaches it.
struct End {
    endpoint: Endpoint,
    session: SessionId,
    remote: Remote,
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime starts").block_on(future)
}

/// An engine; `remote` makes of the other end's id what it is called by.
fn end<L>(running: Running, local: L, remote: impl FnOnce(L, SessionId) -> Remote) -> End {
    running.completions.spawn().expect("a thread starts");
    let session = running.endpoint.new_session(fastrand::u32(..));
    End {
        endpoint: running.endpoint,
        session,
        remote: remote(local, session),
    }
}

/// Two ends of every engine; what is under `remote` is how *others* open it.
fn all() -> [(&'static str, End, End); 3] {
    let (one, other) = pair(&Options::default());
    let [a, b] = [one, other].map(|device| {
        let config = udp::Config {
            liveness: PATIENCE,
            ..udp::Config::default()
        };
        let (running, local) = udp::spawn(config, move || Ok::<_, Infallible>(device)).unwrap();
        end(running, local, |local, session| {
            Remote::Udp(udp::Remote {
                local,
                session,
                secrets: None,
            })
        })
    });
    let [c, d] = [true, false].map(|dialled| {
        let (running, address) = tcp::spawn(tcp::Config::default()).unwrap();
        end(running, address, |address, session| {
            Remote::Tcp(tcp::Remote {
                secrets: None,
                role: if dialled {
                    Role::Dial(address)
                } else {
                    Role::Accept
                },
                session,
                token: TOKEN,
                streams: 2,
            })
        })
    });
    let [e, f] = [true, false].map(|dialled| {
        let (running, local) = shm::spawn(shm::Config::default()).unwrap();
        end(running, local, |local, session| {
            Remote::Shm(shm::Remote {
                role: if dialled {
                    shm::Role::Dial(local)
                } else {
                    shm::Role::Accept
                },
                session,
                token: TOKEN,
            })
        })
    });
    [("udp", a, b), ("tcp", c, d), ("shm", e, f)]
}

fn open(a: &End, b: &End, integrity: [Integrity; 2]) {
    let open = |from: &End, to: &End, integrity| {
        block_on((from.endpoint).open_with(from.session, to.remote.clone(), integrity))
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| open(b, a, integrity[1]));
        open(a, b, integrity[0]).expect("a opens");
        other.join().unwrap().expect("b opens");
    });
}

fn begin(a: &End, b: &End, from: &Lease, into: &Lease) -> (Transfer, Transfer) {
    let (id, received) = block_on(b.endpoint.receive(b.session, into.clone())).unwrap();
    let sent = block_on(a.endpoint.send(a.session, id, from.clone())).unwrap();
    (sent, received)
}

fn lease(bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len() + 64, Backing::Shmem).unwrap();
    let lease = Lease::new(region, 64, bytes.len() as u64).unwrap();
    lease.write_at(0, View::from(bytes));
    lease
}

#[test]
fn without_digests_bytes_arrive_and_receipts_have_none() {
    for (name, a, b) in all() {
        open(&a, &b, [Integrity::None; 2]);
        for len in [1, 63, 4096, 65_537, 3_000_001] {
            let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
                .take(len)
                .collect();
            let into = lease(&vec![0; len]);
            let (sent, received) = begin(&a, &b, &lease(&bytes), &into);
            for receipt in [sent.wait(), received.wait()] {
                let Receipt { bytes, digest, .. } = receipt.expect(name);
                assert_eq!((bytes, digest), (len as u64, Digest(0)), "{name}");
            }
            let mut arrived = vec![0; len];
            into.read_at(0, &mut arrived);
            assert!(
                arrived == bytes,
                "{name}: {len} bytes are not what was sent"
            );
        }
        a.endpoint.stop();
        b.endpoint.stop();
    }
}

#[test]
fn ends_that_disagree_deliver_nothing() {
    let one_without = [
        [Integrity::None, Integrity::Digest],
        [Integrity::Digest, Integrity::None],
    ];
    for integrity in one_without {
        for (name, a, b) in all() {
            open(&a, &b, integrity);
            let (sent, received) = begin(&a, &b, &lease(&[3; 100_000]), &lease(&[0; 100_000]));
            if name == "udp" {
                // Every segment fails its check and is sent again, until somebody has enough.
                std::thread::sleep(Duration::from_millis(300));
                a.endpoint.close(a.session);
                b.endpoint.close(b.session);
                assert!(sent.wait().is_err() && received.wait().is_err());
            } else {
                let ends = [sent.wait(), received.wait()];
                assert_eq!(
                    ends,
                    [(); 2].map(|()| Err(FailReason::DigestMismatch)),
                    "{name}"
                );
            }
            a.endpoint.stop();
            b.endpoint.stop();
        }
    }
}
