//! Tensors that are read where the device put them, frame by frame.
//!
//! A frame whose bytes were verified is kept instead of copied, and its reader
//! is told where in the tensor they belong. The reader is the thread that drives
//! the engine, so a piece can be taken back at any time: whoever asks for its
//! bytes after that gets none. The invariants: *a piece is shown once, and none
//! before its checksum was right*; *a peer never has more packets on their way
//! than frames may still be kept for its session*.

use std::collections::VecDeque;
use std::time::Duration;

use genie_proto::{Segment, SessionId, Time, TransferError, TransferId};

use crate::device::FrameId;

/// How many frames may be read in place, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPlace {
    /// Frames of each session that its reader may have at a time; none by
    /// default. All sessions that read together have no more than the device can
    /// spare ([`Device::keepable`](crate::device::Device::keepable)).
    pub frames: u16,
    /// How long after its arrival the reader may have one. Then it is taken back,
    /// and its transfer fails; one that was over already stays what it is.
    pub deadline: Duration,
}

impl Default for InPlace {
    fn default() -> Self {
        Self {
            frames: 0,
            deadline: Duration::from_secs(1),
        }
    }
}

/// Why a tensor cannot be read in place.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InPlaceRefused {
    /// No such session, or it has ended.
    #[error("the session is not open")]
    NotOpen,
    /// What is opened lies in the engine's own memory, not in a frame.
    #[error("packets of this session are sealed: opening them is a copy")]
    Sealed,
    /// The device, or the engine's configuration, spares too few frames.
    #[error("no frames to keep: {wanted} a session, and {left} are left")]
    NoFrames {
        /// What a session is to have ([`InPlace::frames`]).
        wanted: u32,
        /// What other sessions leave.
        left: u32,
    },
    /// The protocol does not take it.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// Some bytes of a tensor in a received frame, verified unless the session has
/// [`Integrity::None`](genie_proto::Integrity::None). Its frame is kept until
/// the piece is given to [`Polled::release_piece`](super::Polled::release_piece),
/// or its deadline is over.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its frame is kept until it is released"]
pub struct Piece {
    session: SessionId,
    segment: Segment,
    frame: FrameId,
    /// Where in the frame it begins.
    begin: usize,
    number: u64,
}

impl Piece {
    /// Whose peer sent it.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Of which transfer it is.
    pub fn transfer(&self) -> TransferId {
        self.segment.transfer
    }

    /// Where in the tensor it belongs, in bytes.
    pub fn offset(&self) -> u64 {
        self.segment.offset
    }

    /// Its length in bytes; at least one.
    #[expect(clippy::len_without_is_empty, reason = "no piece is empty")]
    pub fn len(&self) -> u32 {
        self.segment.len
    }

    pub(super) fn frame(&self) -> FrameId {
        self.frame
    }

    pub(super) fn range(&self) -> std::ops::Range<usize> {
        self.begin..self.begin + self.segment.len as usize
    }
}

/// The frames that readers have, or are about to be given.
#[derive(Debug)]
pub(super) struct Pieces {
    /// By the frame's number.
    kept: Vec<Option<Kept>>,
    /// Not shown yet, in the order of their arrival.
    ready: VecDeque<Piece>,
    numbers: u64,
    deadline: Duration,
    /// No frame's deadline is over before this.
    due: Option<Time>,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    number: u64,
    /// None once that session is gone: another may have its name.
    session: Option<SessionId>,
    transfer: TransferId,
    until: Time,
}

/// A frame that was kept, and for whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Returned {
    pub(super) frame: FrameId,
    pub(super) session: Option<SessionId>,
    pub(super) transfer: TransferId,
}

impl Pieces {
    /// Of a device that can spare `keepable` frames.
    pub(super) fn new(keepable: u32, deadline: Duration) -> Self {
        Self {
            kept: vec![None; keepable as usize],
            ready: VecDeque::with_capacity(keepable as usize),
            // Another engine's piece is none of ours.
            numbers: fastrand::u64(..1 << 62),
            deadline,
            due: None,
        }
    }

    /// Notes a frame that is kept, whose payload begins at `begin`.
    pub(super) fn keep(
        &mut self,
        now: Time,
        session: SessionId,
        segment: Segment,
        frame: FrameId,
        begin: usize,
    ) {
        self.numbers += 1;
        let until = now + self.deadline;
        self.due.get_or_insert(until);
        self.kept[frame.0 as usize] = Some(Kept {
            number: self.numbers,
            session: Some(session),
            transfer: segment.transfer,
            until,
        });
        self.ready.push_back(Piece {
            session,
            segment,
            frame,
            begin,
            number: self.numbers,
        });
    }

    /// A session is gone; its frames stay with their readers.
    pub(super) fn forget_session(&mut self, session: SessionId) {
        for kept in self.kept.iter_mut().flatten() {
            kept.session.take_if(|one| *one == session);
        }
    }

    /// Frames kept for readers whose session is gone.
    pub(super) fn orphans(&self) -> u32 {
        let kept = self.kept.iter().flatten();
        kept.filter(|kept| kept.session.is_none()).count() as u32
    }

    /// The next piece that arrived and was not taken back since.
    pub(super) fn poll(&mut self) -> Option<Piece> {
        loop {
            let piece = self.ready.pop_front()?;
            if self.has(&piece) {
                return Some(piece);
            }
        }
    }

    /// Whether the piece's frame is still kept for it.
    pub(super) fn has(&self, piece: &Piece) -> bool {
        let kept = self.kept.get(piece.frame.0 as usize).copied().flatten();
        kept.is_some_and(|kept| kept.number == piece.number)
    }

    /// Forgets a piece; none if it was taken back.
    pub(super) fn release(&mut self, piece: &Piece) -> Option<Returned> {
        if !self.has(piece) {
            return None;
        }
        self.take(piece.frame.0 as usize)
    }

    /// Takes one back whose deadline is over, if there is any.
    pub(super) fn expire(&mut self, now: Time) -> Option<Returned> {
        if self.due.is_none_or(|due| now < due) {
            return None;
        }
        let untils = self.kept.iter().flatten().map(|kept| kept.until);
        self.due = untils.min();
        let is_over = |kept: &Option<Kept>| kept.is_some_and(|kept| kept.until <= now);
        let at = self.kept.iter().position(is_over)?;
        self.take(at)
    }

    /// When [`Pieces::expire`] is to be asked again.
    pub(super) fn due(&self) -> Option<Time> {
        self.due
    }

    fn take(&mut self, at: usize) -> Option<Returned> {
        let kept = self.kept[at].take()?;
        Some(Returned {
            frame: FrameId(at as u32),
            session: kept.session,
            transfer: kept.transfer,
        })
    }
}

/// What a session's reader may have, and has.
#[derive(Debug)]
pub(super) struct Reader {
    frames: u32,
    kept: u32,
    /// Transfers of the session that are read in place.
    transfers: u32,
}

impl Reader {
    pub(super) fn new(frames: u32) -> Self {
        Self {
            frames,
            kept: 0,
            transfers: 0,
        }
    }

    /// How many frames are set aside for it.
    pub(super) fn frames(&self) -> u32 {
        self.frames
    }

    pub(super) fn begin(&mut self) {
        self.transfers += 1;
    }

    pub(super) fn end(&mut self) {
        self.transfers -= 1;
    }

    pub(super) fn keep(&mut self) {
        self.kept += 1;
    }

    pub(super) fn give_back(&mut self) {
        self.kept -= 1;
    }

    /// Whether nothing is read any more.
    pub(super) fn is_over(&self) -> bool {
        self.transfers == 0 && self.kept == 0
    }

    /// Frames that may still be kept.
    pub(super) fn room(&self) -> u32 {
        self.frames.saturating_sub(self.kept)
    }
}
