//! Non-blocking sockets, and reads and writes straight into and out of tensors.
//!
//! The only file of the engine that touches raw memory. Its invariant: an I/O
//! vector over a tensor is bounds-checked against its [`Lease`] and does not
//! outlive the borrow of it.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use arrayvec::ArrayVec;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::memory::Lease;

/// I/O vectors of one call; a batch of [`FRAMES_MAX`](super::writer::FRAMES_MAX)
/// frames with a payload each fits.
pub(crate) const VECTORS_MAX: usize = 64;

/// The most bytes that wait in the kernel without having been sent. Enough to
/// keep the link busy between two wake-ups of the engine, little enough that a
/// control frame is not stuck behind it and that it stays in the cache.
const NOT_SENT_LOW_WATER: libc::c_int = 512 << 10;

/// Pieces of memory to send, in order.
pub(crate) struct Gather<'a> {
    vectors: ArrayVec<libc::iovec, VECTORS_MAX>,
    sources: PhantomData<&'a [u8]>,
}

/// Pieces of memory to fill, in order.
pub(crate) struct Scatter<'a> {
    vectors: ArrayVec<libc::iovec, 2>,
    targets: PhantomData<&'a mut [u8]>,
}

impl<'a> Gather<'a> {
    /// Nothing to send yet.
    pub(crate) fn new() -> Self {
        Self {
            vectors: ArrayVec::new(),
            sources: PhantomData,
        }
    }

    /// Adds bytes of our own.
    pub(crate) fn push(&mut self, bytes: &'a [u8]) {
        self.vectors.push(libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        });
    }

    /// Adds bytes of a tensor.
    ///
    /// # Panics
    /// If the range lies outside the lease: the caller cut it from its transfer.
    pub(crate) fn push_lease(&mut self, lease: &'a Lease, range: Range<usize>) {
        let view = lease.view(range).expect("a chunk lies inside its lease");
        self.vectors.push(libc::iovec {
            iov_base: view.as_ptr().cast_mut().cast(),
            iov_len: view.len(),
        });
    }

    /// Whether one more frame (a header and a payload) fits.
    pub(crate) fn has_room(&self) -> bool {
        self.vectors.remaining_capacity() >= 2
    }

    /// Copies as much as there is room for, from the beginning; returns how much.
    pub(crate) fn copy_to(&self, into: &mut [u8]) -> usize {
        let mut copied = 0;
        for vector in &self.vectors {
            let len = vector.iov_len.min(into.len() - copied);
            let target = into[copied..copied + len].as_mut_ptr();
            // SAFETY: the vector covers memory that is readable while `self`
            // borrows its source, `target` has room for `len` bytes and is private,
            // so the two do not overlap. No reference to the source is made: bytes that
            // another process changes meanwhile make the checksum differ.
            unsafe { std::ptr::copy_nonoverlapping(vector.iov_base.cast(), target, len) };
            copied += len;
        }
        copied
    }

    /// Sends as much as the socket takes.
    pub(crate) fn send(&self, socket: &TcpStream) -> io::Result<usize> {
        // SAFETY: `msghdr` is a C structure for which all zeros is a valid value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_ptr().cast_mut();
        message.msg_iovlen = self.vectors.len();
        // SAFETY: every vector covers memory that is readable while `self`
        // borrows its source; the kernel only reads it. Bytes that another
        // process changes meanwhile make the checksum differ.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

impl<'a> Scatter<'a> {
    /// Nothing to fill yet.
    pub(crate) fn new() -> Self {
        Self {
            vectors: ArrayVec::new(),
            targets: PhantomData,
        }
    }

    /// Adds memory of our own.
    pub(crate) fn push(&mut self, bytes: &'a mut [u8]) {
        self.vectors.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
    }

    /// Adds memory of a tensor.
    ///
    /// # Panics
    /// If the range lies outside the lease: the caller checked it against the grant.
    pub(crate) fn push_lease(&mut self, lease: &'a Lease, range: Range<usize>) {
        let view = lease
            .view(range)
            .expect("a chunk was checked against the grant");
        // A lease is a hold on writable memory (see `Region`), so the pointer
        // of the view may be written through.
        self.vectors.push(libc::iovec {
            iov_base: view.as_ptr().cast_mut().cast(),
            iov_len: view.len(),
        });
    }

    /// Bytes there is room for.
    pub(crate) fn len(&self) -> usize {
        self.vectors.iter().map(|vector| vector.iov_len).sum()
    }

    /// Fills with as many of `bytes` as there is room for; returns how many.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for vector in &self.vectors {
            let len = vector.iov_len.min(bytes.len() - copied);
            let from = bytes[copied..copied + len].as_ptr();
            // SAFETY: the vector covers memory that is writable while `self` borrows
            // its target, to which no reference exists anywhere; `from` is private.
            unsafe { std::ptr::copy_nonoverlapping(from, vector.iov_base.cast(), len) };
            copied += len;
        }
        copied
    }

    /// Receives what is there; zero bytes mean that the peer will send no more.
    pub(crate) fn receive(&mut self, socket: &TcpStream) -> io::Result<usize> {
        let count = self.vectors.len() as libc::c_int;
        // SAFETY: every vector covers memory that is writable while `self`
        // borrows its target, and no reference to tensor memory exists anywhere.
        let received = unsafe { libc::readv(socket.as_raw_fd(), self.vectors.as_ptr(), count) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }
}

/// Begins to connect; the socket becomes writable when that is decided.
pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

/// Sets what every connected data connection has.
///
/// `liveness` bounds how long the kernel waits for acknowledgements; whether
/// the peer's *engine* lives is found out with PINGs, so keepalive stays off.
pub(crate) fn configure(
    socket: &TcpStream,
    liveness: Duration,
    congestion: Option<&str>,
) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    match congestion {
        Some(name) => set_congestion(socket, name)?,
        // Where the kernel has no cubic, the system's own stays.
        None if is_loopback(socket) => drop(set_congestion(socket, "cubic")),
        None => {}
    }
    let limit = u32::try_from(liveness.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, limit)?;
    let value = NOT_SENT_LOW_WATER;
    // SAFETY: the option takes an int, whose address and size are passed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            std::ptr::from_ref(&value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Chooses the kernel's congestion control for a socket.
pub(crate) fn set_congestion(socket: impl AsFd, name: &str) -> io::Result<()> {
    sockopt::set_tcp_congestion(socket, name).map_err(|errno| {
        let error = io::Error::from(errno);
        io::Error::new(
            error.kind(),
            format!(
                "this kernel has no congestion control '{name}' ({error}): \
                 /proc/sys/net/ipv4/tcp_available_congestion_control lists what it has"
            ),
        )
    })
}

fn is_loopback(socket: &TcpStream) -> bool {
    socket
        .peer_addr()
        .is_ok_and(|peer| peer.ip().to_canonical().is_loopback())
}

/// Bytes that were sent and that the peer's kernel has not acknowledged.
pub(crate) fn unacknowledged(socket: &TcpStream) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int to the address passed.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    // It can't fail on a TCP socket that is not listening; nothing is assumed
    // to have been acknowledged if it does.
    if result == 0 { bytes as u64 } else { u64::MAX }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::memory::{Backing, Region};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (a, listener.accept().unwrap().0)
    }

    #[test]
    fn payload_and_header_go_out_and_come_in_with_one_call_each() {
        let (mut a, mut b) = pair();
        let lease = Lease::whole(Region::with_backing(4096, Backing::Shmem).unwrap());
        lease.write_at(10, (&b"tensor"[..]).into());
        let mut gather = Gather::new();
        gather.push(b"head");
        gather.push_lease(&lease, 10..16);
        assert_eq!(gather.send(&a).unwrap(), 10);
        let mut got = [0; 10];
        b.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"headtensor");

        a.write_all(b"TENSORnext").unwrap();
        let mut head = [0; 4];
        let mut scatter = Scatter::new();
        scatter.push_lease(&lease, 100..106);
        scatter.push(&mut head);
        assert_eq!(scatter.receive(&b).unwrap(), 10);
        let mut back = [0; 6];
        lease.read_at(100, &mut back);
        assert_eq!((&back, &head), (b"TENSOR", b"next"));
    }

    #[test]
    #[should_panic(expected = "checked against the grant")]
    fn a_vector_outside_the_lease_is_not_built() {
        let lease = Lease::whole(Region::with_backing(4096, Backing::Shmem).unwrap());
        Scatter::new().push_lease(&lease, 4090..4097);
    }

    #[test]
    fn congestion_control_is_what_was_asked_for_and_cubic_over_loopback() {
        let (a, b) = pair();
        let limit = Duration::from_secs(1);
        configure(&a, limit, Some("reno")).unwrap();
        assert_eq!(sockopt::tcp_congestion(&a).unwrap(), "reno");
        let available =
            std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
        let before = sockopt::tcp_congestion(&b).unwrap();
        configure(&b, limit, None).unwrap();
        let expected = if available.contains("cubic") {
            "cubic"
        } else {
            &before
        };
        assert_eq!(sockopt::tcp_congestion(&b).unwrap(), expected);
        let refused = configure(&a, limit, Some("nonesuch")).unwrap_err();
        assert!(refused.to_string().contains("nonesuch"), "{refused}");
    }

    #[test]
    fn a_closed_peer_is_an_error_and_no_signal() {
        let (a, b) = pair();
        drop(b);
        let mut gather = Gather::new();
        gather.push(b"x");
        let refused = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            gather.send(&a).is_err()
        });
        assert!(refused);
    }
}
