//! What one connection reads: headers into a small buffer, payload straight
//! into the tensor, one call for the rest of a payload and the headers behind it.

#![forbid(unsafe_code)]

use std::io;

use genie_proto::Integrity;

use super::frame::{HEADER_LEN, Header, Kind, Malformed};
use super::socket::Scatter;
use super::wire::Wire;
use crate::memory::Lease;

/// The reading half of a connection.
#[derive(Debug)]
pub(crate) struct Reader {
    /// The next header, and behind a SUM the one after it.
    head: [u8; 2 * HEADER_LEN],
    head_len: usize,
    payload: Option<Payload>,
}

/// The payload that is being read.
#[derive(Debug)]
pub(crate) struct Payload {
    /// The DATA header before it.
    pub(crate) header: Header,
    /// Where it goes; `None` if it is read and forgotten.
    pub(crate) target: Option<Lease>,
    /// What its CRC must be, once that is known.
    pub(crate) crc: Option<u32>,
    /// CRC32C of the first `summed` bytes, if it has a target.
    sum: u32,
    summed: usize,
    done: usize,
}

/// What reading brought.
#[derive(Debug)]
pub(crate) enum Item {
    /// A frame's header. For DATA, [`Reader::expect_payload`] must follow.
    Header(Header),
    /// A payload that is complete.
    Payload(Payload),
}

/// How one read went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Some bytes came.
    Bytes {
        /// How many.
        received: usize,
        /// Fewer than there was room for: that was all. Of a sealed
        /// connection it may only have been the end of a record.
        drained: bool,
    },
    /// Nothing is there.
    Blocked,
    /// The peer will send no more.
    EndOfStream,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            head: [0; 2 * HEADER_LEN],
            head_len: 0,
            payload: None,
        }
    }
}

impl Reader {
    /// Reads once. Take [`Reader::next_item`] until it is empty before the next.
    pub(crate) fn read(&mut self, wire: &mut Wire, scratch: &mut [u8]) -> io::Result<Outcome> {
        let two = self.payload.as_ref().is_some_and(Payload::awaits_sum);
        let head_max = if two { 2 * HEADER_LEN } else { HEADER_LEN };
        let head = &mut self.head[self.head_len..head_max];
        let mut scatter = Scatter::new();
        let mut payload_left = 0;
        match &mut self.payload {
            Some(payload) => {
                payload_left = payload.left();
                let begin = payload.header.offset as usize + payload.done;
                if let Some(target) = &payload.target {
                    scatter.push_lease(target, begin..begin + payload_left);
                    scatter.push(head);
                } else if payload_left <= scratch.len() {
                    scatter.push(&mut scratch[..payload_left]);
                    scatter.push(head);
                } else {
                    scatter.push(scratch);
                }
            }
            None => scatter.push(head),
        }
        let room = scatter.len();
        let received = match wire.receive(&mut scatter) {
            Ok(0) => return Ok(Outcome::EndOfStream),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Outcome::Blocked);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Outcome::Bytes {
                    received: 0,
                    drained: false,
                });
            }
            Err(error) => return Err(error),
        };
        let of_payload = received.min(payload_left);
        if let Some(payload) = &mut self.payload {
            payload.done += of_payload;
        }
        self.head_len += received - of_payload;
        let drained = received < room && !wire.is_sealed();
        Ok(Outcome::Bytes { received, drained })
    }

    /// Takes what the last read brought into the CRC of its payload, while the
    /// kernel's copy has it in the nearest cache, and more may be arriving.
    pub(crate) fn sum_up(&mut self, integrity: Integrity) {
        let Some(payload) = &mut self.payload else {
            return;
        };
        if let Some(target) = &payload.target {
            let begin = payload.header.offset as usize;
            let (sum, range) = (payload.sum, begin + payload.summed..begin + payload.done);
            payload.sum = integrity.checksum(|| target.crc32c_append(sum, range));
            payload.summed = payload.done;
        }
    }

    /// What the last read completed, in the order of the stream.
    pub(crate) fn next_item(&mut self) -> Result<Option<Item>, Malformed> {
        if self
            .payload
            .as_ref()
            .is_some_and(|payload| payload.left() > 0)
        {
            return Ok(None);
        }
        if self.payload.as_ref().is_some_and(Payload::awaits_sum) {
            let Some(sum) = self.take_header()? else {
                return Ok(None);
            };
            if sum.kind != Kind::Sum {
                return Err(Malformed::Sum);
            }
            if let Some(payload) = &mut self.payload {
                payload.crc = Some(sum.crc);
            }
        }
        if let Some(payload) = self.payload.take() {
            return Ok(Some(Item::Payload(payload)));
        }
        match self.take_header()? {
            Some(header) if header.kind == Kind::Sum => Err(Malformed::Sum),
            header => Ok(header.map(Item::Header)),
        }
    }

    fn take_header(&mut self) -> Result<Option<Header>, Malformed> {
        let Some((first, rest)) = self.head[..self.head_len].split_first_chunk() else {
            return Ok(None);
        };
        let header = Header::parse(first)?;
        self.head_len = rest.len();
        self.head.copy_within(HEADER_LEN.., 0);
        Ok(Some(header))
    }

    /// Says where the payload behind the last header goes.
    pub(crate) fn expect_payload(&mut self, header: Header, target: Option<Lease>) {
        self.payload = Some(Payload {
            crc: (!header.sum_follows()).then_some(header.crc),
            header,
            target,
            sum: 0,
            summed: 0,
            done: 0,
        });
    }

    /// The payload that is being read.
    pub(crate) fn payload(&self) -> Option<&Payload> {
        self.payload.as_ref()
    }

    /// Gives the tensor up that is being read into; the rest is forgotten.
    pub(crate) fn forget_target(&mut self) {
        if let Some(payload) = &mut self.payload {
            payload.target = None;
        }
    }
}

impl Payload {
    /// CRC32C of what is in its target, up to the last [`Reader::sum_up`].
    pub(crate) fn sum(&self) -> u32 {
        self.sum
    }

    fn awaits_sum(&self) -> bool {
        self.crc.is_none()
    }

    fn left(&self) -> usize {
        self.header.payload_len as usize - self.done
    }
}
