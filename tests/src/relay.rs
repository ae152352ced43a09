//! A port that passes connections on to another, and may look and meddle.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Passes connections on; its threads end with them, and with the process.
#[derive(Clone, Debug)]
pub struct Relay {
    address: SocketAddr,
    meddling: Arc<Meddling>,
}

/// What it does beside passing on.
#[derive(Debug, Default)]
struct Meddling {
    passed: AtomicU64,
    cut: Countdown,
    /// Whether connections made after a cut wait, and whether they do now.
    waits: AtomicBool,
    shut: AtomicBool,
    flip: Countdown,
    marker: OnceLock<Vec<u8>>,
    seen: AtomicBool,
}

/// Bytes until something is done, once. Zero is never; to become zero is now.
#[derive(Debug, Default)]
struct Countdown(AtomicU64);

impl Countdown {
    fn is_over(&self, passing: usize) -> bool {
        let passing = passing as u64;
        let take = |left: u64| left.checked_sub(passing).or((left > 0).then_some(0));
        let before = (self.0).fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        before.is_ok_and(|before| 0 < before && before <= passing)
    }
}

impl Relay {
    /// Listens on loopback for what `target` is to get.
    ///
    /// # Panics
    /// If the kernel refuses a socket.
    pub fn toward(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let relay = Self {
            address: listener.local_addr().expect("it is bound"),
            meddling: Arc::default(),
        };
        let meddling = Arc::clone(&relay.meddling);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                while meddling.shut.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let ends = near.and_then(|near| Ok((near, TcpStream::connect(target)?)));
                let Ok((near, far)) = ends else { continue };
                let ways = [(&near, &far), (&far, &near)];
                for (from, to) in ways {
                    let ends = from
                        .try_clone()
                        .and_then(|from| Ok((from, to.try_clone()?)));
                    let meddling = Arc::clone(&meddling);
                    if let Ok((from, to)) = ends {
                        std::thread::spawn(move || meddling.pass(from, to));
                    }
                }
            }
        });
        relay
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts one connection, whichever it is, once this many more bytes went
    /// over all of them.
    pub fn cut_one_after(&self, bytes: u64) {
        self.meddling.cut.0.store(bytes, Ordering::SeqCst);
    }

    /// [`Relay::cut_one_after`], and lets nobody connect after that until
    /// [`Relay::open`].
    pub fn cut_and_shut_after(&self, bytes: u64) {
        self.meddling.waits.store(true, Ordering::SeqCst);
        self.cut_one_after(bytes);
    }

    /// Whether it was cut, and nobody gets through since.
    pub fn is_shut(&self) -> bool {
        self.meddling.shut.load(Ordering::SeqCst)
    }

    /// Lets everybody through again, and cuts nothing any more.
    pub fn open(&self) {
        self.cut_one_after(0);
        self.meddling.shut.store(false, Ordering::SeqCst);
    }

    /// How many bytes it took in so far.
    pub fn passed(&self) -> u64 {
        self.meddling.passed.load(Ordering::SeqCst)
    }

    /// Changes one bit once this many more bytes went over all connections.
    pub fn flip_one_after(&self, bytes: u64) {
        self.meddling.flip.0.store(bytes, Ordering::SeqCst);
    }

    /// Looks for these bytes in all that passes. They are found if they lie
    /// within what one read brings, so send them often.
    pub fn look_for(&self, marker: &[u8]) {
        let _ = self.meddling.marker.set(marker.to_vec());
    }

    /// Whether they passed.
    pub fn has_seen(&self) -> bool {
        self.meddling.seen.load(Ordering::SeqCst)
    }
}

impl Meddling {
    /// Passes bytes on until either end closes, or it is this connection's turn
    /// to be cut.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            let passing = &mut bytes[..len];
            self.passed.fetch_add(len as u64, Ordering::SeqCst);
            if self.cut.is_over(len) {
                let waits = self.waits.load(Ordering::SeqCst);
                self.shut.store(waits, Ordering::SeqCst);
                break;
            }
            if self.flip.is_over(len) {
                passing[len / 2] ^= 1;
            }
            if let Some(marker) = self.marker.get()
                && passing.windows(marker.len()).any(|part| part == marker)
            {
                self.seen.store(true, Ordering::SeqCst);
            }
            if to.write_all(passing).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
