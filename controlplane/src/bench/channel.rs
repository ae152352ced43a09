//! The connection between the two processes of a benchmark.
//!
//! Carries requests, replies and grants, none of them while a block is on its
//! critical path. A frame is a length and a MessagePack body.

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::BenchError;

/// The longest frame: a thousand grants and room to spare.
const FRAME_MAX: usize = 1 << 20;

/// One end of the connection. Used by one thread.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    received: Vec<u8>,
    closed: bool,
}

impl Channel {
    /// Takes a connection over.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            received: Vec::new(),
            closed: false,
        })
    }

    /// The other end's address.
    pub fn peer(&self) -> io::Result<std::net::SocketAddr> {
        self.stream.peer_addr()
    }

    /// This end's address.
    pub fn local(&self) -> io::Result<std::net::SocketAddr> {
        self.stream.local_addr()
    }

    /// Sends a value.
    pub fn send<T: Serialize>(&mut self, value: &T) -> Result<(), BenchError> {
        let body = rmp_serde::to_vec(value).map_err(|_| BenchError::Garbage)?;
        let mut frame = (body.len() as u32).to_be_bytes().to_vec();
        frame.extend_from_slice(&body);
        self.stream.write_all(&frame).map_err(BenchError::Channel)
    }

    /// The next value, if all of it is here.
    pub fn try_receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, BenchError> {
        loop {
            if let Some(value) = self.decode()? {
                return Ok(Some(value));
            }
            if self.closed {
                return Err(BenchError::PeerGone);
            }
            let mut buffer = [0; 1 << 14];
            match rustix::net::recv(&self.stream, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.closed = true,
                Ok((len, _)) => self.received.extend_from_slice(&buffer[..len]),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => self.closed = true,
                Err(errno) => return Err(BenchError::Channel(errno.into())),
            }
        }
    }

    /// Waits for the next value.
    pub fn receive<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<T, BenchError> {
        let until = Instant::now() + limit;
        loop {
            if let Some(value) = self.try_receive()? {
                return Ok(value);
            }
            let now = Instant::now();
            if now >= until {
                return Err(BenchError::Silent(limit));
            }
            wait_readable(&[self.as_fd()], Some(until - now));
        }
    }

    fn decode<T: DeserializeOwned>(&mut self) -> Result<Option<T>, BenchError> {
        let Some((head, body)) = self.received.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*head) as usize;
        if len > FRAME_MAX {
            return Err(BenchError::Garbage);
        }
        let Some(body) = body.get(..len) else {
            return Ok(None);
        };
        let value = rmp_serde::from_slice(body).map_err(|_| BenchError::Garbage)?;
        self.received.drain(..4 + len);
        Ok(Some(value))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Sleeps until one of the descriptors is readable or the limit is over.
pub fn wait_readable(descriptors: &[BorrowedFd<'_>], limit: Option<Duration>) {
    let mut waits: Vec<PollFd<'_>> = descriptors
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    // EINTR only ends the sleep early; callers look again.
    let _ = rustix::event::poll(&mut waits, limit.as_ref());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn connected() -> (Channel, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Channel::new(listener.accept().unwrap().0).unwrap(), other)
    }

    #[test]
    fn values_arrive_whole_whatever_the_pieces() {
        let (mut channel, mut other) = connected();
        let body = rmp_serde::to_vec(&vec![7u64; 3000]).unwrap();
        let frame = [&(body.len() as u32).to_be_bytes()[..], &body].concat();
        let (first, second) = frame.split_at(2000);
        other.write_all(first).unwrap();
        assert!(channel.try_receive::<Vec<u64>>().unwrap().is_none());
        other.write_all(second).unwrap();
        other.write_all(&frame).unwrap();
        for _ in 0..2 {
            let value: Vec<u64> = channel.receive(Duration::from_secs(5)).unwrap();
            assert_eq!(value, vec![7; 3000]);
        }
    }

    #[test]
    fn silence_garbage_and_an_end_are_errors() {
        let (mut channel, mut other) = connected();
        let silent = channel.receive::<u8>(Duration::from_millis(10));
        assert!(matches!(silent, Err(BenchError::Silent(_))));
        other.write_all(&[0xff; 8]).unwrap();
        let garbage = channel.receive::<u8>(Duration::from_secs(5));
        assert!(matches!(garbage, Err(BenchError::Garbage)));
        let (mut channel, other) = connected();
        drop(other);
        let gone = channel.receive::<u8>(Duration::from_secs(5));
        assert!(matches!(gone, Err(BenchError::PeerGone)));
    }
}
