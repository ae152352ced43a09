//! What one connection reads: headers into a small buffer, payload straight
//! into the tensor, one call for the rest of a payload and the header behind it.

#![forbid(unsafe_code)]

use std::io;
use std::net::TcpStream;

use super::frame::{HEADER_LEN, Header, Malformed};
use super::socket::Scatter;
use crate::memory::Lease;

/// The reading half of a connection.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    head: [u8; HEADER_LEN],
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
        /// Fewer than there was room for: that was all.
        drained: bool,
    },
    /// Nothing is there.
    Blocked,
    /// The peer will send no more.
    EndOfStream,
}

impl Reader {
    /// Reads once. Take [`Reader::next_item`] until it is empty before the next.
    pub(crate) fn read(&mut self, socket: &TcpStream, scratch: &mut [u8]) -> io::Result<Outcome> {
        let head = &mut self.head[self.head_len..];
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
        let received = match scatter.receive(socket) {
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
        let drained = received < room;
        Ok(Outcome::Bytes { received, drained })
    }

    /// What the last read completed, in the order of the stream.
    pub(crate) fn next_item(&mut self) -> Result<Option<Item>, Malformed> {
        if let Some(payload) = self.payload.take_if(|payload| payload.left() == 0) {
            return Ok(Some(Item::Payload(payload)));
        }
        if self.payload.is_none() && self.head_len == HEADER_LEN {
            self.head_len = 0;
            return Header::parse(&self.head).map(|header| Some(Item::Header(header)));
        }
        Ok(None)
    }

    /// Says where the payload behind the last header goes.
    pub(crate) fn expect_payload(&mut self, header: Header, target: Option<Lease>) {
        self.payload = Some(Payload {
            header,
            target,
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
    fn left(&self) -> usize {
        self.header.payload_len as usize - self.done
    }
}
