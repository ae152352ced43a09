//! What one connection has to write: control frames, and a batch of frames
//! whose payload the kernel takes straight from tensors.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use arrayvec::ArrayVec;
use genie_proto::transfer::Piece;
use genie_proto::{Integrity, TransferId};

use super::frame::{HEADER_LEN, Header, Kind};
use super::socket::Gather;
use super::wire::Wire;
use crate::memory::Lease;

/// Frames written with one call; two I/O vectors each.
pub(crate) const FRAMES_MAX: usize = super::socket::VECTORS_MAX / 2;

/// The writing half of a connection.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    /// The SUM of the chunk that was written last. It goes before all else.
    sum: Option<Header>,
    control: VecDeque<Header>,
    batch: ArrayVec<Frame, FRAMES_MAX>,
    /// Frames of the batch that are written.
    frames_done: usize,
    /// Bytes written of the frame after those.
    bytes_done: usize,
    /// Bytes written since the connection's first frame.
    written: u64,
}

/// A part of a tensor on its way out. The lease keeps it until the kernel has it.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// The transfer it belongs to.
    pub(crate) transfer: TransferId,
    /// Which bytes.
    pub(crate) piece: Piece,
    /// The whole tensor.
    source: Lease,
    integrity: Integrity,
    /// CRC32C of its first bytes, which the kernel has, where a SUM follows.
    summed: Option<(u32, usize)>,
}

impl Chunk {
    /// A chunk of `source` of which nothing is written, and whose CRC is not known.
    pub(crate) fn new(
        transfer: TransferId,
        source: Lease,
        piece: Piece,
        integrity: Integrity,
    ) -> Self {
        Self {
            transfer,
            piece,
            source,
            integrity,
            summed: Some((0, 0)),
        }
    }

    /// Reads its CRC now; no SUM follows.
    pub(crate) fn read_crc(&mut self) -> u32 {
        self.summed = None;
        let range = self.range(0);
        self.integrity.checksum(|| self.source.crc32c(range))
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.piece.len as usize
    }

    /// What its SUM says, if one follows. Of a chunk that was not written whole
    /// the rest is read now.
    pub(crate) fn sum(&mut self) -> Option<u32> {
        self.sum_up_to(self.len());
        self.summed.map(|(crc, _)| crc)
    }

    /// Reads on while the bytes that the kernel just copied are in the cache.
    fn sum_up_to(&mut self, written: usize) {
        let begin = self.piece.offset as usize;
        if let Some((crc, done)) = &mut self.summed {
            let source = &self.source;
            *crc = (self.integrity)
                .checksum(|| source.crc32c_append(*crc, begin + *done..begin + written));
            *done = written;
        }
    }

    fn range(&self, skip: usize) -> Range<usize> {
        let begin = self.piece.offset as usize;
        begin + skip..begin + self.len()
    }
}

#[derive(Debug)]
struct Frame {
    header: [u8; HEADER_LEN],
    chunk: Option<Chunk>,
}

impl Writer {
    /// Queues a frame without payload; it goes before chunks that are not begun.
    pub(crate) fn control(&mut self, header: Header) {
        self.control.push_back(header);
    }

    /// Control frames that are queued.
    pub(crate) fn control_len(&self) -> usize {
        self.control.len()
    }

    /// Whether there is nothing to write.
    pub(crate) fn is_idle(&self) -> bool {
        self.sum.is_none() && self.control.is_empty() && self.batch.is_empty()
    }

    /// Whether everything that was begun is written, so that more may be added.
    pub(crate) fn is_drained(&self) -> bool {
        self.batch.is_empty()
    }

    /// Moves the SUM that is due and queued control frames into the empty batch.
    pub(crate) fn take_sum_and_control(&mut self) {
        if let Some(header) = self.sum.take() {
            self.batch.push(Frame {
                header: header.encode(),
                chunk: None,
            });
        }
        while !self.batch.is_full()
            && let Some(header) = self.control.pop_front()
        {
            self.batch.push(Frame {
                header: header.encode(),
                chunk: None,
            });
        }
    }

    /// Whether the batch takes one more frame.
    pub(crate) fn has_room(&self) -> bool {
        !self.batch.is_full()
    }

    /// Adds a chunk to the batch.
    ///
    /// # Panics
    /// If the batch has no room.
    pub(crate) fn chunk(&mut self, header: Header, chunk: Chunk) {
        self.batch.push(Frame {
            header: header.encode(),
            chunk: Some(chunk),
        });
    }

    /// Writes as much of the batch as the socket takes; `Ok(None)` if it takes nothing.
    ///
    /// `finished` is given every chunk that the kernel has whole, and with it its lease.
    pub(crate) fn flush(
        &mut self,
        wire: &mut Wire,
        mut finished: impl FnMut(&mut Chunk),
    ) -> io::Result<Option<usize>> {
        let sent = match wire.send(&self.gather()) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Some(0)),
            Err(error) => return Err(error),
        };
        self.written += sent as u64;
        self.bytes_done += sent;
        while let Some(frame) = self.batch.get_mut(self.frames_done)
            && self.bytes_done >= frame.len()
        {
            self.bytes_done -= frame.len();
            self.frames_done += 1;
            if let Some(mut chunk) = frame.chunk.take() {
                finished(&mut chunk);
                self.sum = chunk.sum().map(|crc| Header {
                    crc,
                    ..Header::about(Kind::Sum, chunk.transfer)
                });
            }
        }
        if let Some(frame) = self.batch.get_mut(self.frames_done)
            && let Some(chunk) = &mut frame.chunk
        {
            chunk.sum_up_to(self.bytes_done.saturating_sub(HEADER_LEN));
        }
        if self.frames_done == self.batch.len() {
            self.batch.clear();
            self.frames_done = 0;
        }
        Ok(Some(sent))
    }

    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// What [`Writer::written`] will be when all that is queued now is written.
    pub(crate) fn written_with_queue(&self) -> u64 {
        let batch: usize = self
            .batch
            .iter()
            .skip(self.frames_done)
            .map(Frame::len)
            .sum();
        let sum = usize::from(self.sum.is_some());
        let control = (sum + self.control.len()) * HEADER_LEN;
        self.written + (batch - self.bytes_done + control) as u64
    }

    /// Takes out the chunks that are not written whole.
    pub(crate) fn take_unfinished(&mut self) -> impl Iterator<Item = Chunk> {
        std::mem::take(&mut self.batch)
            .into_iter()
            .filter_map(|frame| frame.chunk)
    }

    fn gather(&self) -> Gather<'_> {
        let mut gather = Gather::new();
        let mut skip = self.bytes_done;
        for frame in self.batch.iter().skip(self.frames_done) {
            if !gather.has_room() {
                break;
            }
            if skip < HEADER_LEN {
                gather.push(&frame.header[skip..]);
            }
            if let Some(chunk) = &frame.chunk {
                let range = chunk.range(skip.saturating_sub(HEADER_LEN));
                gather.push_lease(&chunk.source, range);
            }
            skip = 0;
        }
        gather
    }
}

impl Frame {
    fn len(&self) -> usize {
        HEADER_LEN + self.chunk.as_ref().map_or(0, Chunk::len)
    }
}
