//! Many transfers at once over one session: grants, sends, and their receipts.
//!
//! When the session changes its path, what was under way is interrupted at both
//! ends. The receiver then grants it again on the new path with the ranges that
//! are missing (`Resumed`), and the sender goes on with those. Grants say for
//! which path they are, so that ids of one are never used on another. What the
//! receiver does not grant again it has; the two ends may disagree on that for
//! the moment between the last byte and its confirmation:
//!
//! | sender | receiver | then |
//! |---|---|---|
//! | has the receipt | has every byte, unconfirmed | it asks for the last bytes again, to be confirmed; the end of the request confirms it too |
//! | interrupted | has the receipt | the sender takes its own digest; those of the batch are compared at its end |

mod receiving;
mod sending;

use std::time::Duration;

use genie_dataplane::engine::{FailReason, Receipt};
use genie_dataplane::stage::{Place, StageError, ranges};
use genie_proto::DigestBuilder;
use tokio::sync::watch;
use tokio::time::timeout;

pub(super) use receiving::receive_all;
pub(super) use sending::send_all;

use super::pending::Pending;
use super::{Progress, TransferError, refused, stalled};
use crate::message::{Message, Outcome};
use crate::session::route::Stage;
use crate::session::{Call, Path, Session, SessionError};
use crate::tensor::TensorInfo;

/// Bytes of descriptions in one message, roughly: it should not hold up heartbeats.
const LIST_BYTES: usize = 512 << 10;

/// A peer that moves fewer bytes a second than this has stalled, however large
/// a tensor: far below what any link carries that is worth a transport.
const SLOWEST: u64 = 1_000_000;

/// How fast a peer clears the memory that it receives into, at least.
const CLEARED: u64 = 256_000_000;

/// Within this a peer that gives up says why: it goes by another connection
/// than the transfer's end.
const EXPLAINED: Duration = Duration::from_secs(1);

/// For how long a batch may make no progress: no grant, receipt or message.
#[derive(Debug)]
struct Patience {
    stall: Duration,
    /// Bytes of transfers that have begun.
    moving: u64,
    /// Bytes of those that have not.
    waiting: u64,
}

impl Patience {
    fn new(session: &Session, leases: &[Place]) -> Self {
        Self {
            stall: session.stall,
            moving: 0,
            waiting: leases.iter().map(|lease| lease.len() as u64).sum(),
        }
    }

    fn begin(&mut self, bytes: u64) {
        self.waiting = self.waiting.saturating_sub(bytes);
        self.moving += bytes;
    }

    fn end(&mut self, bytes: u64) {
        self.moving = self.moving.saturating_sub(bytes);
    }

    fn limit(&self) -> Duration {
        self.stall + Duration::from_secs(self.moving / SLOWEST + self.waiting / CLEARED)
    }

    fn stalled(&self, session: &Session) -> TransferError {
        stalled(session, self.limit())
    }
}

/// The receipts of a batch, in the order of its tensors and of their ranges.
#[derive(Debug, Default)]
pub(super) struct Tally {
    receipts: Vec<Receipt>,
    /// How many receipts each tensor has.
    ranges: Vec<usize>,
}

impl Tally {
    /// Sums up; `infos` are the tensors in the same order.
    pub(super) fn outcome(&self, infos: &[TensorInfo]) -> Outcome {
        let mut outcome = Outcome {
            tensors: infos.len() as u64,
            ..Outcome::default()
        };
        for receipt in &self.receipts {
            outcome.bytes += receipt.bytes;
            outcome.retransmits += receipt.retransmits;
            outcome.copies.add(receipt.copies);
        }
        let mut rest = &self.receipts[..];
        let digest = |count: &usize| {
            let (receipts, later) = rest.split_at(*count);
            rest = later;
            joined(receipts)
        };
        let digests: Vec<(u64, u32)> = self.ranges.iter().map(digest).collect();
        outcome.digest = batch_digest(infos, &digests);
        outcome
    }
}

/// Length and CRC32C of a tensor from those of its ranges.
fn joined(receipts: &[Receipt]) -> (u64, u32) {
    let len = receipts.iter().map(|receipt| receipt.bytes).sum();
    let mut digest = DigestBuilder::new(len);
    let mut offset = 0;
    for receipt in receipts {
        digest.add(offset, receipt.bytes, receipt.digest.0);
        offset += receipt.bytes;
    }
    (len, digest.finish().0)
}

/// The transfers that tensors are moved as: each one, or its ranges in a session
/// that limits their length. Both ends cut alike.
fn cut(session: &Session, leases: Vec<Place>) -> (Vec<Place>, Tally) {
    let limit = session.range_bytes.unwrap_or(u64::MAX);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut tally = Tally::default();
    let mut transfers = Vec::with_capacity(leases.len());
    for lease in leases {
        let before = transfers.len();
        if lease.len() <= limit {
            transfers.push(lease);
        } else {
            let part = |range| lease.slice(range).expect("cut from its own length");
            transfers.extend(ranges(lease.len(), limit).map(part));
        }
        tally.ranges.push(transfers.len() - before);
    }
    (transfers, tally)
}

/// CRC32C over all tensors in the order of their names, from each one's length and CRC32C.
pub(super) fn batch_digest(infos: &[TensorInfo], digests: &[(u64, u32)]) -> u32 {
    let mut order: Vec<usize> = (0..digests.len()).collect();
    order.sort_by(|a, b| infos[*a].name.cmp(&infos[*b].name));
    let mut builder = DigestBuilder::new(digests.iter().map(|(len, _)| len).sum());
    let mut offset = 0;
    for index in order {
        let (len, crc) = digests[index];
        builder.add(offset, len, crc);
        offset += len;
    }
    builder.finish().0
}

/// Sends the list of a batch in messages of a bearable size.
pub(super) async fn send_list(call: &Call, infos: &[TensorInfo]) -> Result<(), SessionError> {
    let mut rest = infos;
    while !rest.is_empty() {
        let mut size = 0;
        let fits = |info: &&TensorInfo| {
            size += info.name.len() + 10 * info.shape.len() + 32;
            size <= LIST_BYTES
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (now, later) = rest.split_at(count);
        call.send(Message::Tensors {
            id: call.id(),
            tensors: now.to_vec(),
        })
        .await?;
        rest = later;
    }
    Ok(())
}

/// The first of what is under way.
async fn front(pending: &mut Pending) -> Result<Receipt, StageError> {
    let (_, transfer) = pending.front_mut().expect("polled only if there is one");
    transfer.await
}

/// The end of the request; anything else has no place while tensors move, nor
/// has success before it was `expected`.
fn ended(call: &mut Call, message: Message, expected: bool) -> Result<Outcome, TransferError> {
    match message {
        Message::Done {
            result: Ok(outcome),
            ..
        } if expected => Ok(outcome),
        Message::Done {
            result: Err(failure),
            ..
        } => Err(refused(call, failure)),
        other => Err(call.unexpected(&other).into()),
    }
}

/// What an error means to the batch: what the peer says, if it was the peer
/// that gave up.
async fn explained(call: &mut Call, error: TransferError) -> TransferError {
    if !matches!(error, TransferError::Failed(FailReason::CancelledByPeer)) {
        return error;
    }
    let said = async {
        loop {
            if let Message::Done {
                result: Err(failure),
                ..
            } = call.recv().await.ok()?
            {
                return Some(failure);
            }
        }
    };
    match timeout(EXPLAINED, said).await {
        Ok(Some(failure)) => refused(call, failure),
        _ => error,
    }
}

/// What the failure of one transfer on path `number` means: an error is one of
/// the batch, else the transfer was interrupted and goes on over another path.
fn interrupted(session: &Session, number: u32, error: StageError) -> Result<(), TransferError> {
    let reason = match error {
        StageError::Wire(reason) => reason,
        StageError::Accelerator(error) => return Err(TransferError::Accelerator(error)),
    };
    match reason {
        // The path is of no use any more, whether the engine has said so or
        // did before the session was there to be told.
        FailReason::PathLost(_)
        | FailReason::Closed
        | FailReason::Refused(_)
        | FailReason::Stopped => {
            session.lose_path(number, &reason.to_string());
            match session.ended() {
                Some(ended) => Err(SessionError::Ended(ended).into()),
                None => Ok(()),
            }
        }
        FailReason::DigestMismatch
        | FailReason::Cancelled
        | FailReason::CancelledByPeer
        | FailReason::Unread(_)
        | FailReason::Protocol(_) => Err(match session.ended() {
            // The session's end explains more than what it did to one transfer.
            Some(ended) => SessionError::Ended(ended).into(),
            None => TransferError::Failed(reason),
        }),
    }
}

/// The path that one end of a batch uses, which follows the session's.
///
/// ```text
///  usable ──lost, or the session has another──▶ draining ──nothing is under way
///    ▲                                                       any more, and there
///    └────────────────── adopted ◀──────────────────────── is a new path──┘
/// ```
#[derive(Debug)]
struct Track {
    path: Path,
    usable: bool,
    stage: watch::Receiver<Stage>,
}

impl Track {
    fn new(session: &Session) -> Self {
        let stage = session.route.watch();
        let path = stage.borrow().path.clone();
        Self {
            path,
            usable: true,
            stage,
        }
    }

    /// Looks whether the path is still to be used.
    fn check(&mut self) {
        let stage = self.stage.borrow_and_update();
        self.usable &= stage.path.number == self.path.number && stage.lost.is_none();
    }

    /// Takes the session's next path, if there is one; nothing may be under way.
    fn adopt(&mut self) -> bool {
        let stage = self.stage.borrow_and_update();
        if stage.lost.is_some() || stage.path.number <= self.path.number {
            return false;
        }
        self.path = stage.path.clone();
        self.usable = true;
        true
    }

    /// Waits for news of the session's path.
    async fn changed(&mut self) {
        if self.stage.changed().await.is_err() {
            // The session is gone; whoever waits here is told by its inbox.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use genie_dataplane::memory::{Backing, Lease, Region};

    use super::*;
    use crate::message::Request;
    use crate::session::{Direction, testing};
    use crate::tensor::Dtype;

    /// Tensors to be moved, and a request whose peer says what the test wants.
    async fn begin() -> (Call, Vec<Place>, tokio::sync::mpsc::Receiver<Message>) {
        let (session, outgoing) = testing::session(Direction::Dialled);
        let call = session.call(Request::List { under: None }).await.unwrap();
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let lease = |at| Place::from(Lease::new(Arc::clone(&region), at, 100).unwrap());
        (call, vec![lease(0), lease(100)], outgoing)
    }

    fn done(call: &Call) -> Message {
        Message::Done {
            id: call.id(),
            result: Ok(Outcome::default()),
        }
    }

    #[tokio::test]
    async fn success_before_everything_was_granted_is_an_error() {
        let (mut call, leases, _outgoing) = begin().await;
        call.session().route(call.id(), done(&call)).unwrap();
        let sent = send_all(&mut call, leases, &Progress::default(), true).await;
        let error = sent.unwrap_err();
        assert!(
            matches!(
                error,
                TransferError::Session(SessionError::Unexpected { .. })
            ),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_grant_of_nothing_is_no_progress() {
        let (mut call, leases, _outgoing) = begin().await;
        let (id, transfers) = (call.id(), Vec::new());
        let path = call.session().path().number;
        let granted = Message::Granted {
            id,
            path,
            transfers,
        };
        call.session().route(id, granted).unwrap();
        let sent = send_all(&mut call, leases, &Progress::default(), true).await;
        let error = sent.unwrap_err().to_string();
        assert!(error.contains("sent Granted"), "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_grants_nothing_is_given_up() {
        let (mut call, leases, _outgoing) = begin().await;
        let sent = send_all(&mut call, leases, &Progress::default(), true).await;
        let error = sent.unwrap_err();
        assert!(
            matches!(error, TransferError::Stalled { limit, .. } if limit == testing::STALL),
            "{error}"
        );
        let listed = crate::transfer::list(call.session(), None).await;
        assert!(matches!(listed, Err(TransferError::Stalled { .. })));
    }

    #[tokio::test]
    async fn tensors_are_cut_where_the_session_limits_transfers() {
        let (mut session, _outgoing) = testing::session(Direction::Dialled);
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let place = |len| Place::from(Lease::new(Arc::clone(&region), 0, len).unwrap());
        let leases = || vec![place(0), place(100), place(250)];
        let (whole, tally) = cut(&session, leases());
        assert_eq!((whole.len(), &tally.ranges[..]), (3, &[1, 1, 1][..]));
        Arc::get_mut(&mut session).unwrap().range_bytes = Some(100);
        let (parts, tally) = cut(&session, leases());
        let lengths: Vec<_> = parts.iter().map(Place::len).collect();
        assert_eq!(lengths, [0, 100, 100, 100, 50]);
        assert_eq!(tally.ranges, [1, 1, 3]);
    }

    #[test]
    fn the_digests_of_ranges_join_into_the_tensors() {
        let part = |bytes: &[u8]| Receipt {
            bytes: bytes.len() as u64,
            digest: genie_dataplane::Digest(crc32c::crc32c(bytes)),
            retransmits: 0,
            copies: Default::default(),
        };
        let tally = Tally {
            receipts: [&b"89"[..], b"12", b"34", b"", b"567"].map(part).to_vec(),
            ranges: vec![1, 2, 1, 1],
        };
        let infos = [info("c"), info("a"), info("aa"), info("b")];
        let outcome = tally.outcome(&infos);
        assert_eq!((outcome.bytes, outcome.digest), (9, CHECK));
    }

    #[test]
    fn large_tensors_get_the_time_they_need() {
        let stall = Duration::from_secs(30);
        let mut patience = Patience {
            stall,
            moving: 0,
            waiting: 512_000_000,
        };
        assert_eq!(patience.limit(), stall + Duration::from_secs(2));
        patience.begin(512_000_000);
        assert_eq!(patience.limit(), stall + Duration::from_secs(512));
        patience.end(512_000_000);
        assert_eq!(patience.limit(), stall);
    }

    fn info(name: &str) -> TensorInfo {
        TensorInfo {
            name: name.into(),
            dtype: Dtype::U8,
            shape: vec![0],
        }
    }

    /// CRC32C of "123456789", the check value of every CRC catalogue.
    const CHECK: u32 = 0xe306_9283;

    #[test]
    fn the_digest_of_a_batch_is_that_of_its_bytes_by_name() {
        let region = genie_dataplane::memory::Region::with_backing(
            4096,
            genie_dataplane::memory::Backing::Shmem,
        )
        .unwrap();
        let lease = Lease::whole(region);
        let crc = |bytes: &[u8]| lease.place(0, bytes.into());
        let (c, a, b) = (crc(b"89"), crc(b"1234"), crc(b"567"));
        let infos = [info("c"), info("a"), info("b"), info("aa")];
        let digest = batch_digest(&infos, &[(2, c), (4, a), (3, b), (0, 0)]);
        assert_eq!(digest, CHECK);
        assert_eq!(batch_digest(&[], &[]), 0);
    }
}
