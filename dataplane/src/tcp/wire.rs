//! What the frames of a connection cross: the socket, bare or with every byte sealed.
//!
//! Sealed, the stream behind the HELLOs is a sequence of records of up to
//! [`RECORD_MAX`] bytes of frames, whatever these are (`docs/protocol-tcp.md`).
//! The invariants: nothing of a record is given out before its tag was checked,
//! and then out of private memory; what a writer handed over counts as sent
//! once its whole record is written, so that a writer that is told "not now"
//! asks again with the same bytes, which are not sealed twice.

#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

use genie_proto::seal::{Records, Secrets, TAG_LEN};

use super::socket::{Gather, Scatter};

/// The most bytes of frames in one record, for which [`genie_proto::seal::EPOCH_BITS`] holds.
pub(crate) const RECORD_MAX: usize = 64 << 10;

/// The length before each record.
const LEN: usize = 4;

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: TcpStream,
    sealing: Option<Box<Sealing>>,
}

#[derive(Debug)]
struct Sealing {
    outgoing: Outgoing,
    incoming: Incoming,
}

/// The record that is being written.
#[derive(Debug)]
struct Outgoing {
    keys: Records,
    record: Vec<u8>,
    /// How many bytes of frames it has; zero while there is none.
    frames: usize,
    written: usize,
    /// Bytes of all records that the socket took.
    sent: u64,
}

/// The record that is being read, and the length of the next.
#[derive(Debug)]
struct Incoming {
    keys: Records,
    bytes: Vec<u8>,
    /// How many of them are here.
    read: usize,
    /// Where the record ends that was opened last.
    end: usize,
    /// What of it was not given out yet.
    opened: Range<usize>,
    /// Whether anything came since somebody asked.
    is_fresh: bool,
}

impl Wire {
    /// Connection `index` of a session; sealed if there are secrets.
    pub(crate) fn new(socket: TcpStream, secrets: Option<&Secrets>, index: u16) -> Self {
        let sealing = secrets.map(|secrets| {
            Box::new(Sealing {
                outgoing: Outgoing {
                    keys: Records::new(&secrets.send, index),
                    record: vec![0; LEN + RECORD_MAX + TAG_LEN],
                    frames: 0,
                    written: 0,
                    sent: 0,
                },
                incoming: Incoming {
                    keys: Records::new(&secrets.receive, index),
                    bytes: vec![0; LEN + RECORD_MAX + TAG_LEN + LEN],
                    read: 0,
                    end: 0,
                    opened: 0..0,
                    is_fresh: false,
                },
            })
        });
        Self { socket, sealing }
    }

    /// The socket itself, for what is not frames.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether frames are sealed.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealing.is_some()
    }

    /// Whether there are bytes to be received that the kernel does not know of.
    pub(crate) fn has_opened(&self) -> bool {
        let sealing = self.sealing.as_ref();
        sealing.is_some_and(|sealing| !sealing.incoming.opened.is_empty())
    }

    /// Bytes of records that the socket took, parts of one that is not whole
    /// among them: over a slow link one takes long. `None` where bytes of frames
    /// are those of the socket.
    pub(crate) fn sealed_sent(&self) -> Option<u64> {
        let sealing = self.sealing.as_ref()?;
        Some(sealing.outgoing.sent)
    }

    /// Whether bytes of a record came since this was asked last. They are life,
    /// but not yet proof of whose.
    pub(crate) fn take_fresh(&mut self) -> bool {
        let sealing = self.sealing.as_mut();
        sealing.is_some_and(|sealing| std::mem::take(&mut sealing.incoming.is_fresh))
    }

    /// Sends as much as the socket takes.
    pub(crate) fn send(&mut self, gather: &Gather<'_>) -> io::Result<usize> {
        match &mut self.sealing {
            None => gather.send(&self.socket),
            Some(sealing) => sealing.outgoing.send(&self.socket, gather),
        }
    }

    /// Receives what is there; zero bytes mean that the peer will send no more.
    pub(crate) fn receive(&mut self, scatter: &mut Scatter<'_>) -> io::Result<usize> {
        match &mut self.sealing {
            None => scatter.receive(&self.socket),
            Some(sealing) => sealing.incoming.receive(&self.socket, scatter),
        }
    }
}

impl Outgoing {
    fn send(&mut self, mut socket: &TcpStream, gather: &Gather<'_>) -> io::Result<usize> {
        if self.frames == 0 {
            self.seal(gather);
        }
        let end = LEN + self.frames + TAG_LEN;
        while self.written < end {
            let taken = socket.write(&self.record[self.written..end])?;
            self.written += taken;
            self.sent += taken as u64;
        }
        Ok(std::mem::take(&mut self.frames))
    }

    fn seal(&mut self, gather: &Gather<'_>) {
        self.written = 0;
        self.frames = gather.copy_to(&mut self.record[LEN..LEN + RECORD_MAX]);
        let len = (self.frames as u32).to_be_bytes();
        self.record[..LEN].copy_from_slice(&len);
        let (frames, behind) = self.record[LEN..].split_at_mut(self.frames);
        let tag = self.keys.seal(&len, frames);
        behind[..TAG_LEN].copy_from_slice(&tag);
    }
}

impl Incoming {
    fn receive(&mut self, socket: &TcpStream, scatter: &mut Scatter<'_>) -> io::Result<usize> {
        if self.opened.is_empty() && !self.read_record(socket)? {
            return Ok(0);
        }
        let given = scatter.fill(&self.bytes[self.opened.clone()]);
        self.opened.start += given;
        if self.opened.is_empty() {
            // What was read behind it is the length of the next.
            self.bytes.copy_within(self.end..self.read, 0);
            self.read -= self.end;
        }
        Ok(given)
    }

    /// Reads until a record is whole, and opens it; `false` at the stream's end.
    fn read_record(&mut self, mut socket: &TcpStream) -> io::Result<bool> {
        loop {
            let mut wanted = LEN;
            if self.read >= LEN {
                self.end = LEN + self.len()? + TAG_LEN;
                if self.read >= self.end {
                    return self.open().map(|()| true);
                }
                wanted = self.end + LEN;
            }
            match socket.read(&mut self.bytes[self.read..wanted])? {
                0 => return Ok(false),
                received => {
                    self.read += received;
                    self.is_fresh = true;
                }
            }
        }
    }

    fn len(&self) -> io::Result<usize> {
        let mut len = [0; LEN];
        len.copy_from_slice(&self.bytes[..LEN]);
        match u32::from_be_bytes(len) as usize {
            len @ 1..=RECORD_MAX => Ok(len),
            len => Err(not_the_peers(format!("a sealed record of {len} bytes"))),
        }
    }

    fn open(&mut self) -> io::Result<()> {
        let (len, sealed) = self.bytes[..self.end].split_at_mut(LEN);
        let opened = self.keys.open(len, sealed);
        opened.map_err(|error| not_the_peers(format!("a sealed record: {error}")))?;
        self.opened = LEN..self.end - TAG_LEN;
        Ok(())
    }
}

fn not_the_peers(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use genie_proto::seal::Secret;

    use super::*;

    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let b = listener.accept().unwrap().0;
        a.set_nonblocking(true).unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    fn secrets() -> Secrets {
        Secrets {
            send: Secret([1; 32]),
            receive: Secret([2; 32]),
        }
    }

    fn wires() -> (Wire, Wire) {
        let (a, b) = sockets();
        (
            Wire::new(a, Some(&secrets()), 3),
            Wire::new(b, Some(&secrets().of_the_other_end()), 3),
        )
    }

    fn send(wire: &mut Wire, bytes: &[u8]) -> io::Result<usize> {
        let mut gather = Gather::new();
        gather.push(bytes);
        wire.send(&gather)
    }

    fn receive(wire: &mut Wire, room: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; room];
        let mut scatter = Scatter::new();
        scatter.push(&mut bytes);
        let received = wire.receive(&mut scatter)?;
        bytes.truncate(received);
        Ok(bytes)
    }

    fn would_block<T>(result: &io::Result<T>) -> bool {
        let error = result.as_ref().err();
        error.is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Over a slow link a record takes longer than the liveness limit.
    #[test]
    fn parts_of_a_record_are_counted_at_both_ends() {
        let (a, mut link) = sockets();
        let (mut far, b) = sockets();
        let mut a = Wire::new(a, Some(&secrets()), 3);
        let mut b = Wire::new(b, Some(&secrets().of_the_other_end()), 3);
        let frames = vec![7; 50_000];
        let record = LEN + frames.len() + TAG_LEN;

        let mut whole = 0;
        while send(&mut a, &frames).is_ok() {
            whole += 1;
        }
        let sent = a.sealed_sent().unwrap() as usize;
        let records = whole * record..=(whole + 1) * record;
        assert!(
            !sent.is_multiple_of(record) && records.contains(&sent),
            "{sent}"
        );
        let mut records = vec![0; sent];
        link.set_nonblocking(false).unwrap();
        link.read_exact(&mut records).unwrap();

        assert!(!b.take_fresh(), "nothing came yet");
        far.write_all(&records[..10]).unwrap();
        assert!(would_block(&receive(&mut b, 10)));
        assert!(b.take_fresh());
        assert!(!b.take_fresh(), "nothing came since");
        far.write_all(&records[10..record]).unwrap();
        let mut got = vec![];
        while got.len() < frames.len() {
            got.extend(receive(&mut b, 60_000).unwrap());
        }
        assert!(got == frames);
    }

    /// More than the sockets hold, written and read in pieces of any size.
    #[test]
    fn every_byte_arrives_through_full_sockets() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut a, mut b) = wires();
        let source: Vec<u8> = (0..16 << 20).map(|_| random.u8(..)).collect();
        let (mut sent, mut got, mut full) = (0, Vec::new(), 0);
        while got.len() < source.len() {
            while sent < source.len() {
                let end = source.len().min(sent + random.usize(1..200_000));
                match send(&mut a, &source[sent..end]) {
                    Ok(taken) => sent += taken,
                    result => {
                        assert!(would_block(&result), "{result:?}");
                        full += 1;
                        break;
                    }
                }
            }
            loop {
                let result = receive(&mut b, random.usize(1..200_000));
                let Ok(bytes) = &result else {
                    assert!(would_block(&result), "{result:?}");
                    assert!(!b.has_opened());
                    break;
                };
                assert!(!bytes.is_empty(), "the stream ended");
                got.extend_from_slice(bytes);
            }
        }
        assert!(got == source && full > 0, "{full} times full");
    }

    #[test]
    fn the_end_of_the_stream_is_told_even_within_a_record() {
        let (mut a, b) = wires();
        send(&mut a, b"whole").unwrap();
        let mut b = b;
        assert_eq!(receive(&mut b, 10).unwrap(), b"whole");
        a.socket().write_all(&[0, 0, 0, 9, 1]).unwrap();
        drop(a);
        assert_eq!(receive(&mut b, 10).unwrap(), b"");
    }

    #[test]
    fn what_the_peer_did_not_seal_is_refused() {
        let mut sealed = {
            let (mut a, b) = wires();
            send(&mut a, b"secret").unwrap();
            let mut bytes = [0; 26];
            b.socket().set_nonblocking(false).unwrap();
            b.socket().read_exact(&mut bytes).unwrap();
            bytes
        };
        assert!(!sealed.windows(6).any(|part| part == b"secret"));
        let refused = |bytes: &[u8]| {
            let (a, mut b) = wires();
            a.socket().write_all(bytes).unwrap();
            std::iter::repeat_with(|| receive(&mut b, 100))
                .find(|result| !would_block(result))
                .unwrap()
        };
        assert_eq!(refused(&sealed).unwrap(), b"secret");
        for index in 0..sealed.len() {
            sealed[index] ^= 1;
            // Bits of the length would be a wait for more.
            if !(2..4).contains(&index) {
                let error = refused(&sealed).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData, "byte {index}");
            }
            sealed[index] ^= 1;
        }
        for len in [0u32, RECORD_MAX as u32 + 1, u32::MAX] {
            let error = refused(&len.to_be_bytes()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{len}");
        }
    }
}
