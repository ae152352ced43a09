//! One-sided reads and writes: ranges of windows and tensors that are elsewhere,
//! and the tensors here that they come from or go to.
//!
//! Nobody at the other end takes part but its agent. Bytes go straight into the
//! program's arena, or come straight out of it. Many batches can be under way
//! on one connection. The invariant: *memory of a batch is not given to anybody
//! else before the agent has said that it ended*, whoever waits for it or not.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::arena::Tensor;
use crate::client::{Client, ClientError, Writer};
use crate::protocol::{
    Ask, BATCHES_MAX, Direction, Failure, MESSAGE_MAX, Moved, Note, Ranged, Ranges,
};
use crate::remote::{RemoteTensor, Selection};
use crate::slice::{self, Run, SliceError};
use crate::window::Window;

/// Ranges to be read or written together, of any number of windows and tensors
/// of one node's, in one request.
#[derive(Clone, Debug)]
pub struct Batch {
    node: Option<String>,
    direction: Direction,
    targets: Vec<String>,
    ranges: Vec<Ranged>,
    /// Whose memory is used, kept until the batch has ended.
    tensors: Vec<Tensor>,
    pieces: u64,
    note: Option<Note>,
}

/// Something elsewhere that has bytes.
#[derive(Clone, Copy, Debug)]
pub struct Remote<'a> {
    node: Option<&'a str>,
    name: &'a str,
    len: u64,
    is_window: bool,
}

/// A batch that was handed to the agent. Dropping it cancels the batch.
#[derive(Debug)]
#[must_use = "dropping a batch cancels it"]
pub struct Posted {
    request: u64,
    connection: u64,
    writer: Writer,
    ended: bool,
    _waiter: Arc<()>,
}

/// Why ranges cannot be in one batch.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BatchError {
    /// A batch goes to one node.
    #[error("{name:?} is on another node than the rest of the batch: use a batch for each")]
    OtherNode {
        /// What is there.
        name: String,
    },
    /// Only the connection that posted it is told of its end.
    #[error("the batch was posted over another connection: wait for it there")]
    OtherConnection,
    /// What was verified does not change.
    #[error("the tensor {name:?} cannot be written: only windows can")]
    Immutable {
        /// Which.
        name: String,
    },
    /// The ranges themselves.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// The bytes do not fit the tensor here.
    #[error("bytes {offset}..{offset}+{bytes} lie outside the tensor {name:?} of {len} bytes")]
    Outside {
        /// Which tensor.
        name: String,
        /// First byte.
        offset: u64,
        /// How many.
        bytes: u64,
        /// The tensor's length.
        len: u64,
    },
    /// Notifications belong to writes.
    #[error("a batch that reads notifies nobody")]
    NoteOfRead,
    /// Too much was said.
    #[error("a notification of {0} bytes is too long: at most {MESSAGE_MAX}")]
    LongMessage(usize),
}

impl Batch {
    /// Nothing yet, to be read.
    pub fn read() -> Self {
        Self::new(Direction::Read)
    }

    /// Nothing yet, to be written.
    pub fn write() -> Self {
        Self::new(Direction::Write)
    }

    fn new(direction: Direction) -> Self {
        Self {
            node: None,
            direction,
            targets: Vec::new(),
            ranges: Vec::new(),
            tensors: Vec::new(),
            pieces: 0,
            note: None,
        }
    }

    /// Adds the bytes `range` of `remote`, and those from `offset` of `local`.
    pub fn range<'a>(
        &mut self,
        remote: impl Into<Remote<'a>>,
        range: Range<u64>,
        local: &Tensor,
        offset: u64,
    ) -> Result<&mut Self, BatchError> {
        let len = range.end.saturating_sub(range.start);
        self.run(remote, Run::bytes(range.start, len), local, offset)
    }

    /// Adds bytes at regular distances of `remote`; they lie one after the
    /// other from `offset` of `local`.
    pub fn run<'a>(
        &mut self,
        remote: impl Into<Remote<'a>>,
        run: Run,
        local: &Tensor,
        offset: u64,
    ) -> Result<&mut Self, BatchError> {
        let remote = remote.into();
        let target = self.target(&remote)?;
        if !run.is_inside(remote.len) {
            return Err(SliceError::Outside { len: remote.len }.into());
        }
        let bytes = run.total().unwrap_or(u64::MAX);
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > local.len_bytes()) {
            return Err(BatchError::Outside {
                name: local.info().name.clone(),
                offset,
                bytes,
                len: local.len_bytes(),
            });
        }
        if self.ranges.len() >= slice::RUNS_MAX {
            return Err(SliceError::TooMany.into());
        }
        let pieces = self.pieces.saturating_add(run.count);
        if pieces > slice::PIECES_MAX {
            return Err(SliceError::TooManyPieces.into());
        }
        let (arena, first) = local.position();
        self.pieces = pieces;
        self.ranges.push(Ranged {
            target,
            run,
            arena,
            offset: first + offset,
        });
        self.tensors.push(local.clone());
        Ok(self)
    }

    /// Adds a part of a tensor; its bytes lie one after the other from `offset` of `local`.
    pub fn slice(
        &mut self,
        remote: &RemoteTensor,
        part: &Selection,
        local: &Tensor,
        offset: u64,
    ) -> Result<&mut Self, BatchError> {
        let mut at = offset;
        for run in &part.runs {
            self.run(remote, *run, local, at)?;
            at += run.total().unwrap_or(0);
        }
        Ok(self)
    }

    /// Tells those who listen to `window` once all bytes of the batch were
    /// written and verified.
    pub fn notify(&mut self, window: &Window, message: &[u8]) -> Result<&mut Self, BatchError> {
        if self.direction == Direction::Read {
            return Err(BatchError::NoteOfRead);
        }
        if message.len() > MESSAGE_MAX {
            return Err(BatchError::LongMessage(message.len()));
        }
        let target = self.target(&window.into())?;
        self.note = Some(Note {
            target,
            message: message.to_owned(),
        });
        Ok(self)
    }

    /// Bytes in it.
    pub fn len_bytes(&self) -> u64 {
        let bytes = self.ranges.iter().filter_map(|range| range.run.total());
        bytes.sum()
    }

    fn target(&mut self, remote: &Remote<'_>) -> Result<u32, BatchError> {
        if self.direction == Direction::Write && !remote.is_window {
            let name = remote.name.to_owned();
            return Err(BatchError::Immutable { name });
        }
        if self.targets.is_empty() {
            self.node = remote.node.map(str::to_owned);
        } else if self.node.as_deref() != remote.node {
            let name = remote.name.to_owned();
            return Err(BatchError::OtherNode { name });
        }
        // Most often it is the one of before.
        let found = self.targets.iter().rposition(|name| name == remote.name);
        let index = found.unwrap_or_else(|| {
            self.targets.push(remote.name.to_owned());
            self.targets.len() - 1
        });
        Ok(index as u32)
    }
}

impl<'a> From<&'a Window> for Remote<'a> {
    fn from(window: &'a Window) -> Self {
        Self {
            node: window.node.as_deref(),
            name: &window.name,
            len: window.len_bytes,
            is_window: true,
        }
    }
}

impl<'a> From<&'a RemoteTensor> for Remote<'a> {
    fn from(tensor: &'a RemoteTensor) -> Self {
        Self {
            node: tensor.node.as_deref(),
            name: &tensor.info.name,
            len: tensor.len_bytes(),
            is_window: false,
        }
    }
}

impl Client {
    /// Hands a batch to the agent and returns at once, unless [`BATCHES_MAX`]
    /// are under way: then one of them has to end first.
    pub fn post(&mut self, batch: &Batch) -> Result<Posted, ClientError> {
        let is_other = |tensor: &&Tensor| tensor.hold().connection != self.connection;
        if let Some(other) = batch.tensors.iter().find(is_other) {
            return Err(ClientError::OtherConnection(other.info().name.clone()));
        }
        while self.batches.under_way() >= BATCHES_MAX {
            self.recv_batch()?;
        }
        let request = self.ask(&Ask::Batch(Ranges {
            node: batch.node.clone(),
            direction: batch.direction,
            targets: batch.targets.clone(),
            ranges: batch.ranges.clone(),
            note: batch.note.clone(),
        }))?;
        let waiter = self.batches.begin(request, batch.tensors.clone());
        Ok(Posted {
            request,
            connection: self.connection,
            writer: self.canceller().0,
            ended: false,
            _waiter: waiter,
        })
    }

    /// Waits for the end of a batch.
    pub fn wait(&mut self, mut posted: Posted) -> Result<Moved, ClientError> {
        if posted.connection != self.connection {
            return Err(BatchError::OtherConnection.into());
        }
        let result = loop {
            if let Some(result) = self.batches.take(posted.request) {
                break result;
            }
            self.recv_batch()?;
        };
        posted.ended = true;
        result.map_err(|Failure { kind, message }| ClientError::Failed { kind, message })
    }

    /// Waits until some batch of this connection has ended, `limit` at the most.
    pub fn wait_any(&mut self, limit: Duration) -> Result<(), ClientError> {
        let mut left = limit;
        // All that is there already, after the first.
        while self.batches.under_way() > 0 && self.is_readable(left) {
            self.recv_batch()?;
            left = Duration::ZERO;
        }
        Ok(())
    }

    /// Whether [`Client::wait`] for this batch returns at once.
    pub fn has_ended(&self, posted: &Posted) -> bool {
        self.batches.ended.contains_key(&posted.request)
    }

    /// [`Client::post`] and [`Client::wait`].
    pub fn run(&mut self, batch: &Batch) -> Result<Moved, ClientError> {
        let posted = self.post(batch)?;
        self.wait(posted)
    }
}

impl Posted {
    /// Cancels the batch: it then fails as
    /// [`FailureKind::Cancelled`](crate::FailureKind::Cancelled), unless it has just ended. What it has written by then stays.
    pub fn cancel(&self) {
        self.writer.cancel(self.request);
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}

/// Batches that the agent has, and results that nobody has asked for yet.
#[derive(Debug, Default)]
pub(crate) struct Batches {
    under_way: HashMap<u64, UnderWay>,
    ended: HashMap<u64, (Arc<()>, Result<Moved, Failure>)>,
}

#[derive(Debug)]
struct UnderWay {
    /// Shared with whoever may still ask for the result.
    waiter: Arc<()>,
    _tensors: Vec<Tensor>,
}

impl Batches {
    fn under_way(&self) -> usize {
        self.under_way.len()
    }

    fn begin(&mut self, request: u64, tensors: Vec<Tensor>) -> Arc<()> {
        self.ended.retain(|_, (waiter, _)| is_awaited(waiter));
        let waiter = Arc::new(());
        let under_way = UnderWay {
            waiter: Arc::clone(&waiter),
            _tensors: tensors,
        };
        self.under_way.insert(request, under_way);
        waiter
    }

    pub(crate) fn end(&mut self, request: u64, result: Result<Moved, Failure>) {
        if let Some(UnderWay { waiter, .. }) = self.under_way.remove(&request)
            && is_awaited(&waiter)
        {
            self.ended.insert(request, (waiter, result));
        }
    }

    fn take(&mut self, request: u64) -> Option<Result<Moved, Failure>> {
        self.ended.remove(&request).map(|(_, result)| result)
    }
}

fn is_awaited(waiter: &Arc<()>) -> bool {
    Arc::strong_count(waiter) > 1
}
