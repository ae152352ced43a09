//! Which bytes of a transfer have been sent, must be sent again, are acknowledged.

use std::collections::VecDeque;
use std::ops::Range;

use super::GRANULE;
use crate::digest::{Digest, DigestBuilder};

/// The sender's side of a transfer.
///
/// Its invariant: what is to be sent again is only ever cut smaller, never
/// joined. Any two segments sent are thus disjoint or nested, and a receiver
/// that drops partial overlaps still gets every byte.
#[derive(Debug)]
pub struct Outgoing {
    len: u64,
    /// Everything below was sent at least once.
    fresh: u64,
    again: VecDeque<Range<u64>>,
    again_bytes: u64,
    acked: u64,
    /// Bytes whose CRC has been recorded.
    digested: u64,
    digest: DigestBuilder,
}

/// The next bytes to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, at least one.
    pub len: u64,
    /// Whether these bytes go out for the first time: then, and only then, their
    /// CRC is due to [`Outgoing::record`].
    pub first: bool,
}

/// A range that cannot be missing from the transfer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {}..{} are not a range of a transfer of {len} bytes", .range.start, .range.end)]
pub struct BadRange {
    /// What was claimed.
    pub range: Range<u64>,
    /// The transfer's length.
    pub len: u64,
}

impl Outgoing {
    /// A transfer of `len` bytes, none sent yet.
    pub fn new(len: u64) -> Self {
        Self {
            len,
            fresh: 0,
            again: VecDeque::new(),
            again_bytes: 0,
            acked: 0,
            digested: 0,
            digest: DigestBuilder::new(len),
        }
    }

    /// A transfer that was sent whole, and whose bytes have this digest. With
    /// [`Outgoing::resume`] it goes on where nothing else is known of it.
    pub fn sent(len: u64, digest: Digest) -> Self {
        let mut sent = Self::new(len);
        sent.fresh = len;
        sent.acked = len;
        sent.digested = len;
        sent.digest.add(0, len, digest.0);
        sent
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes never sent.
    pub fn bytes_unsent(&self) -> u64 {
        self.len - self.fresh
    }

    /// Bytes waiting to be sent again.
    pub fn bytes_again(&self) -> u64 {
        self.again_bytes
    }

    /// Bytes the receiver acknowledged.
    pub fn bytes_acked(&self) -> u64 {
        self.acked
    }

    /// Bytes sent, neither acknowledged nor given up for lost.
    pub fn bytes_in_flight(&self) -> u64 {
        self.fresh - self.again_bytes - self.acked
    }

    /// Whether [`Outgoing::next`] has something.
    pub fn has_next(&self) -> bool {
        self.fresh < self.len || !self.again.is_empty()
    }

    /// The next at most `max` bytes: lost ones first, then fresh ones.
    ///
    /// `max` is rounded down to [`GRANULE`]; it must be at least that.
    pub fn next(&mut self, max: u64) -> Option<Piece> {
        let max = max / GRANULE * GRANULE;
        debug_assert!(max > 0, "a packet holds at least one granule");
        if let Some(range) = self.again.front_mut() {
            let offset = range.start;
            let len = (range.end - offset).min(max);
            range.start += len;
            if range.is_empty() {
                self.again.pop_front();
            }
            self.again_bytes -= len;
            return Some(Piece {
                offset,
                len,
                first: false,
            });
        }
        let offset = self.fresh;
        let len = (self.len - offset).min(max);
        self.fresh += len;
        (len > 0).then_some(Piece {
            offset,
            len,
            first: true,
        })
    }

    /// Takes in the CRC32C of a piece that is sent for the first time.
    pub fn record(&mut self, piece: Piece, crc: u32) {
        debug_assert!(piece.first, "a byte enters the digest once");
        self.digested += piece.len;
        self.digest.add(piece.offset, piece.len, crc);
    }

    /// The receiver acknowledged bytes that were in flight.
    pub fn handle_acked(&mut self, len: u64) {
        self.acked += len;
        debug_assert!(self.acked + self.again_bytes <= self.fresh);
    }

    /// Bytes that were in flight are given up for lost: they will be sent again.
    pub fn handle_lost(&mut self, offset: u64, len: u64) {
        self.again.push_back(offset..offset + len);
        self.again_bytes += len;
        debug_assert!(self.acked + self.again_bytes <= self.fresh);
    }

    /// Starts over on another path: `missing` is what the receiver still lacks,
    /// everything else sent is acknowledged thereby, nothing is in flight.
    ///
    /// Ranges must be ascending, disjoint and begin on a granule. On an error
    /// nothing has changed.
    pub fn resume(
        &mut self,
        missing: impl Iterator<Item = Range<u64>> + Clone,
    ) -> Result<(), BadRange> {
        let mut floor = 0;
        for range in missing.clone() {
            let aligned = range.start.is_multiple_of(GRANULE)
                && (range.end.is_multiple_of(GRANULE) || range.end == self.len);
            if !aligned || range.is_empty() || range.start < floor || range.end > self.len {
                return Err(BadRange {
                    range,
                    len: self.len,
                });
            }
            floor = range.end;
        }
        self.again.clear();
        self.again_bytes = 0;
        for range in missing {
            let sent = range.start..range.end.min(self.fresh);
            if !sent.is_empty() {
                self.again_bytes += sent.end - sent.start;
                self.again.push_back(sent);
            }
        }
        self.acked = self.fresh - self.again_bytes;
        Ok(())
    }

    /// The digest of the whole, once every byte was sent and recorded.
    pub fn digest(&self) -> Option<Digest> {
        (self.digested == self.len).then(|| self.digest.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_bytes_go_first_and_are_only_cut() {
        let mut outgoing = Outgoing::new(1000);
        let first = outgoing.next(500).unwrap();
        assert_eq!(
            first,
            Piece {
                offset: 0,
                len: 448,
                first: true
            }
        );
        let second = outgoing.next(500).unwrap();
        outgoing.handle_lost(first.offset, first.len);
        outgoing.handle_lost(second.offset, second.len);
        assert_eq!(outgoing.bytes_again(), 896);
        assert_eq!(
            outgoing.next(10_000),
            Some(Piece {
                offset: 0,
                len: 448,
                first: false
            })
        );
        assert_eq!(
            outgoing.next(64),
            Some(Piece {
                offset: 448,
                len: 64,
                first: false
            })
        );
        assert_eq!(
            outgoing.next(10_000),
            Some(Piece {
                offset: 512,
                len: 384,
                first: false
            })
        );
        assert_eq!(
            outgoing.next(10_000),
            Some(Piece {
                offset: 896,
                len: 104,
                first: true
            })
        );
        assert_eq!(outgoing.next(10_000), None);
        assert_eq!(outgoing.bytes_in_flight(), 1000);
    }

    #[test]
    fn the_digest_is_there_once_every_byte_was_sent() {
        let data: Vec<u8> = (0..300).map(|i| i as u8).collect();
        let mut outgoing = Outgoing::new(300);
        while let Some(piece) = outgoing.next(128) {
            assert_eq!(outgoing.digest(), None);
            let range = piece.offset as usize..(piece.offset + piece.len) as usize;
            outgoing.record(piece, crc32c::crc32c(&data[range]));
        }
        assert_eq!(outgoing.digest(), Some(Digest(crc32c::crc32c(&data))));
    }

    #[test]
    fn resume_sends_what_is_missing_and_then_the_rest() {
        let mut outgoing = Outgoing::new(1000);
        for _ in 0..4 {
            let piece = outgoing.next(128).unwrap();
            outgoing.record(piece, 0);
        }
        outgoing.resume([128..256, 384..1000].into_iter()).unwrap();
        assert_eq!(
            (outgoing.bytes_acked(), outgoing.bytes_in_flight()),
            (256, 0)
        );
        let mut pieces = Vec::new();
        while let Some(piece) = outgoing.next(10_000) {
            pieces.push((piece.offset, piece.len, piece.first));
        }
        assert_eq!(
            pieces,
            [(128, 128, false), (384, 128, false), (512, 488, true)]
        );
        let mut whole = Outgoing::sent(1000, Digest(7));
        whole.resume(std::iter::once(960..1000)).unwrap();
        let piece = Piece {
            offset: 960,
            len: 40,
            first: false,
        };
        assert_eq!((whole.next(10_000), whole.next(64)), (Some(piece), None));
        assert_eq!(whole.digest(), Some(Digest(7)));
        for bad in [1..64, 0..63, 64..64, 0..1024] {
            assert!(outgoing.resume([bad].into_iter()).is_err());
        }
        assert!(outgoing.resume([64..128, 0..64].into_iter()).is_err());
    }
}
