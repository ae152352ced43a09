//! Bare sockets: what kernel TCP carries with the same memory and nothing else.
//!
//! As many connections as Genie has, one thread at each end, as Genie has, and
//! blocking calls of 256 KiB, each on the next connection. The receiver answers
//! each block with one byte, or with the block. With CRC32C, each piece comes
//! with its own, which the receiver compares.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use genie_dataplane::memory::Lease;
use rustix::net::SendFlags;
use serde::{Deserialize, Serialize};

use crate::bench::BenchError;
use crate::bench::channel::wait_readable;
use crate::bench::measure::{Carrier, Slot};
use crate::bench::pool::{Layout, Pool};

/// Bytes of a read or write; what Genie's TCP engine uses.
const PIECE: usize = genie_dataplane::tcp::frame::CHUNK_MAX as usize;

/// How long either end waits for the other.
const LIMIT: Duration = Duration::from_secs(30);

/// What a block is answered with.
const ARRIVED: u8 = 1;
const DAMAGED: u8 = 2;

/// What is done with the blocks of a row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct How {
    /// Whether each piece is followed by its CRC32C.
    pub crc: bool,
    /// Whether each block is sent back.
    pub echo: bool,
    /// Connections.
    pub streams: u16,
    /// The kernel's congestion control, if one was asked for.
    pub congestion: Option<String>,
}

/// The sending end.
#[derive(Debug)]
pub struct BareTcp {
    streams: Streams,
    pool: Pool,
    layout: Layout,
    how: How,
    begun: u64,
    waiting: std::collections::VecDeque<Slot>,
}

/// Connections of one end, in the same order at both.
#[derive(Debug)]
struct Streams(Vec<TcpStream>);

/// Accepts a row's connections in a thread of its own and receives what comes;
/// returns the port.
pub fn serve_once(ip: IpAddr, pool: Pool, layout: Layout, how: How) -> Result<u16, BenchError> {
    let listener = TcpListener::bind((ip, 0)).map_err(BenchError::Channel)?;
    let port = listener.local_addr().map_err(BenchError::Channel)?.port();
    std::thread::spawn(move || {
        // The other end sees the connection end and says so.
        let Ok(mut streams) = Streams::accept(&listener, &how) else {
            return;
        };
        let How { crc, echo, .. } = how;
        let mut number = 0;
        while let Ok(block) = pool.block(&layout, number)
            && let Ok(intact) = streams.read_block(&block, crc)
        {
            let answer = if echo && intact {
                streams.write_block(&block, crc)
            } else {
                streams.0[0].write_all(&[if intact { ARRIVED } else { DAMAGED }])
            };
            if answer.is_err() {
                return;
            }
            number += 1;
        }
    });
    Ok(port)
}

impl How {
    /// Sends at once, under the congestion control that was asked for, or what
    /// Genie takes: over loopback cubic, where that is there.
    fn set_up(&self, stream: &TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let choose = |name| rustix::net::sockopt::set_tcp_congestion(stream, name);
        match &self.congestion {
            Some(name) => choose(name)?,
            None if stream.peer_addr()?.ip().is_loopback() => {
                // Without it, Genie keeps the system's too.
                let _ = choose("cubic");
            }
            None => {}
        }
        Ok(())
    }
}

impl BareTcp {
    /// Connects to a peer that serves the same row.
    pub fn connect(
        to: (IpAddr, u16),
        pool: &Pool,
        layout: Layout,
        how: How,
    ) -> Result<Self, BenchError> {
        let streams = Streams::connect(to, &how).map_err(BenchError::Channel)?;
        Ok(Self {
            streams,
            pool: pool.clone(),
            layout,
            how,
            begun: 0,
            waiting: Default::default(),
        })
    }
}

impl Carrier for BareTcp {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let block = self.pool.block(&self.layout, self.begun)?;
        (self.streams.write_block(&block, self.how.crc)).map_err(BenchError::Channel)?;
        self.begun += 1;
        self.waiting.push_back(slot);
        Ok(())
    }

    fn complete(&mut self, until: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        if let Some(until) = until {
            use std::os::fd::AsFd;
            let left = until.saturating_duration_since(Instant::now());
            wait_readable(&[self.streams.0[0].as_fd()], Some(left));
            if Instant::now() >= until {
                return Ok(());
            }
        }
        if self.how.echo {
            let number = self.begun - self.waiting.len() as u64;
            let block = self.pool.block(&self.layout, number)?;
            if !(self.streams.read_block(&block, self.how.crc)).map_err(BenchError::Channel)? {
                return Err(BenchError::Inconsistent { block: number });
            }
            done.extend(self.waiting.pop_front());
            return Ok(());
        }
        let mut answers = [0; 64];
        let room = self.waiting.len().min(answers.len());
        let len = self.streams.0[0]
            .read(&mut answers[..room])
            .map_err(BenchError::Channel)?;
        if len == 0 {
            return Err(BenchError::PeerGone);
        }
        if answers[..len].contains(&DAMAGED) {
            let block = self.begun - self.waiting.len() as u64;
            return Err(BenchError::Inconsistent { block });
        }
        done.extend(self.waiting.drain(..len));
        Ok(())
    }
}

/// A stream that gives or takes nothing has ended.
fn some(bytes: usize) -> std::io::Result<usize> {
    match bytes {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        some => Ok(some),
    }
}

impl Streams {
    fn connect(to: (IpAddr, u16), how: &How) -> std::io::Result<Self> {
        let connect = |index| {
            let mut stream = TcpStream::connect_timeout(&to.into(), LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_write_timeout(Some(LIMIT))?;
            how.set_up(&stream)?;
            stream.write_all(&[index as u8])?;
            Ok(stream)
        };
        let streams = (0..how.streams).map(connect);
        streams.collect::<Result<_, _>>().map(Self)
    }

    /// Each says first which of them it is.
    fn accept(listener: &TcpListener, how: &How) -> std::io::Result<Self> {
        let accept = |_| {
            let (mut stream, _) = listener.accept()?;
            how.set_up(&stream)?;
            let mut index = [0];
            stream.read_exact(&mut index)?;
            Ok((index, stream))
        };
        let mut streams = (0..how.streams)
            .map(accept)
            .collect::<std::io::Result<Vec<_>>>()?;
        streams.sort_by_key(|(index, _)| *index);
        Ok(Self(
            streams.into_iter().map(|(_, stream)| stream).collect(),
        ))
    }

    fn write_block(&mut self, block: &Lease, crc: bool) -> std::io::Result<()> {
        for (stream, piece) in self.pieces(block) {
            if crc {
                let crc = block.crc32c(piece.clone()).to_ne_bytes();
                // It leaves with what follows it.
                rustix::net::send(stream, &crc, SendFlags::MORE)?;
            }
            let mut at = piece.start;
            while at < piece.end {
                at += some(block.write_file(at..piece.end, stream)?)?;
            }
        }
        Ok(())
    }

    fn read_block(&mut self, block: &Lease, crc: bool) -> std::io::Result<bool> {
        let mut intact = true;
        for (mut stream, piece) in self.pieces(block) {
            let mut expected = [0; 4];
            if crc {
                stream.read_exact(&mut expected)?;
            }
            let mut at = piece.start;
            while at < piece.end {
                at += some(block.read_stream(at..piece.end, stream)?)?;
            }
            intact &= !crc || block.crc32c(piece) == u32::from_ne_bytes(expected);
        }
        Ok(intact)
    }

    /// The pieces of a block, each with the connection that carries it.
    fn pieces(&self, block: &Lease) -> impl Iterator<Item = (&TcpStream, Range<usize>)> {
        let (len, streams) = (block.len(), self.0.iter().cycle());
        let pieces = (0..len).step_by(PIECE);
        streams.zip(pieces.map(move |at| at..(at + PIECE).min(len)))
    }
}
