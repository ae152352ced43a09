//! A port that passes connections on to another, and can cut one of them.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Passes connections on; its threads end with them, and with the process.
#[derive(Clone, Debug)]
pub struct Relay {
    address: SocketAddr,
    left: Arc<AtomicU64>,
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
            left: Arc::default(),
        };
        let left = Arc::clone(&relay.left);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let ends = near.and_then(|near| Ok((near, TcpStream::connect(target)?)));
                let Ok((near, far)) = ends else { continue };
                let ways = [(&near, &far), (&far, &near)];
                for (from, to) in ways {
                    let ends = from
                        .try_clone()
                        .and_then(|from| Ok((from, to.try_clone()?)));
                    let left = Arc::clone(&left);
                    if let Ok((from, to)) = ends {
                        std::thread::spawn(move || pass(from, to, &left));
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
        self.left.store(bytes, Ordering::SeqCst);
    }
}

/// Passes bytes on until either end closes, or it is this connection's turn
/// to be cut.
fn pass(mut from: TcpStream, mut to: TcpStream, left: &AtomicU64) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        // Zero is never; to become zero is now.
        let take = |left: u64| left.checked_sub(len as u64).or((left > 0).then_some(0));
        let before = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        if before.is_ok_and(|before| 0 < before && before <= len as u64) {
            break;
        }
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
