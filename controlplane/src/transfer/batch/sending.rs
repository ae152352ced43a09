//! The end of a batch that sends.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;

use genie_dataplane::TransferId;
use genie_dataplane::engine::{Cost, FailReason, Interrupted, Partial, Receipt};
use genie_dataplane::memory::accelerator::Way;
use genie_dataplane::stage::{Moving, Place, StageError};
use genie_proto::Outgoing;
use tokio::time::{sleep, timeout};

use super::super::pending::{Pending, acquire};
use super::{
    Patience, Progress, Tally, Track, TransferError, cut, ended, explained, front, interrupted,
};
use crate::message::{Message, Outcome, Resume};
use crate::session::{Call, SessionError};

/// Messages about a path that this end does not know yet. It does within
/// moments, or never.
const AHEAD_MAX: usize = 1024;

/// One tensor.
///
/// ```text
///  Waiting ──granted──▶ Moving ──receipt──▶ Done
///                       ▲    │ path lost
///             resumed ──┴─ Interrupted ──the receiver has it──▶ Done
/// ```
/// A tensor that is done may be sent once more, if the receiver never learned
/// that it was confirmed; it stays done whatever becomes of that.
#[derive(Debug)]
enum State {
    Waiting,
    Moving,
    Interrupted(Option<Box<Partial<Outgoing>>>),
    Done(Receipt),
}

/// A tensor that the receiver expects on some path.
#[derive(Debug)]
struct Grant {
    index: usize,
    transfer: TransferId,
    /// None the first time: all of it.
    missing: Option<Vec<Range<u64>>>,
}

/// What one message about another path says.
#[derive(Debug)]
struct Ahead {
    path: u32,
    grants: Vec<Grant>,
    last: bool,
}

struct Sending<'a> {
    call: &'a mut Call,
    progress: &'a Progress,
    patience: Patience,
    leases: Vec<Place>,
    tensors: Vec<State>,
    done: usize,
    /// How many were granted; they are in order.
    granted: usize,
    ready: VecDeque<Grant>,
    pending: Pending,
    /// Resumed on this path.
    resumed: HashSet<usize>,
    track: Track,
    ahead: VecDeque<Ahead>,
    early: Option<Outcome>,
}

/// Sends all `leases` as the peer grants them; `until_done`: and waits for the
/// end of the request, which is returned.
pub(in crate::transfer) async fn send_all(
    call: &mut Call,
    leases: Vec<Place>,
    progress: &Progress,
    until_done: bool,
) -> Result<(Tally, Option<Outcome>), TransferError> {
    let (leases, tally) = cut(call.session(), leases);
    let mut sending = Sending {
        patience: Patience::new(call.session(), &leases),
        track: Track::new(call.session()),
        tensors: leases.iter().map(|_| State::Waiting).collect(),
        pending: Pending::new(progress, call.take_share()),
        call,
        progress,
        leases,
        done: 0,
        granted: 0,
        ready: VecDeque::new(),
        resumed: HashSet::new(),
        ahead: VecDeque::new(),
        early: None,
    };
    while !sending.is_finished(until_done) {
        sending.follow().await?;
        sending.begin_resumed().await?;
        sending.step().await?;
    }
    Ok(sending.finish(tally))
}

impl Sending<'_> {
    fn is_finished(&self, until_done: bool) -> bool {
        self.done == self.tensors.len()
            && self.ready.is_empty()
            && self.pending.is_empty()
            && (self.early.is_some() || !until_done)
    }

    fn finish(self, mut tally: Tally) -> (Tally, Option<Outcome>) {
        let receipt = |state| match state {
            State::Done(receipt) => Some(receipt),
            _ => None,
        };
        tally.receipts = self.tensors.into_iter().filter_map(receipt).collect();
        (tally, self.early)
    }

    /// Leaves a path that is lost, and takes the next one once nothing is under way.
    async fn follow(&mut self) -> Result<(), TransferError> {
        self.track.check();
        if self.track.usable {
            return Ok(());
        }
        for grant in self.ready.drain(..) {
            if let state @ (State::Waiting | State::Moving) = &mut self.tensors[grant.index] {
                *state = State::Interrupted(None);
            }
        }
        if !self.pending.is_empty() || !self.track.adopt() {
            return Ok(());
        }
        self.resumed.clear();
        for ahead in std::mem::take(&mut self.ahead) {
            self.take(ahead).await?;
        }
        Ok(())
    }

    /// Begins what goes on over this path.
    async fn begin_resumed(&mut self) -> Result<(), TransferError> {
        while self.track.usable
            && let Some(Grant {
                missing: Some(_), ..
            }) = self.ready.front()
            && let Some(grant) = self.ready.pop_front()
        {
            self.begin_one(grant).await?;
        }
        Ok(())
    }

    async fn begin_one(&mut self, grant: Grant) -> Result<(), TransferError> {
        let Grant {
            index,
            transfer,
            missing,
        } = grant;
        let place = self.leases[index].clone();
        let missing = missing.unwrap_or_default();
        let (endpoint, session) = (self.track.path.endpoint.clone(), self.track.path.session);
        let limit = self.patience.limit();
        let begun = match place {
            place if place.is_empty() => {
                timeout(limit, place.send(&endpoint, session, transfer)).await
            }
            Place::Host(lease) => {
                let mut partial = self.partial(index).await?;
                partial
                    .prepare(&missing)
                    .map_err(|error| self.peer_failed(&error.to_string()))?;
                let resumed = endpoint.resume_send(session, transfer, lease, partial);
                let direct = |begun: Result<_, FailReason>| begun.map(Moving::Direct);
                let resumed = timeout(limit, resumed).await;
                resumed.map(|begun| direct(begun).map_err(StageError::from))
            }
            Place::Device(stage, lease) => {
                let resumed = stage.resume_send(&endpoint, session, transfer, lease, missing);
                let resumed = timeout(limit, resumed).await;
                resumed.map(|staged| Ok(Moving::Staged(staged)))
            }
        };
        match begun {
            Err(_) => Err(self.patience.stalled(self.call.session())),
            Ok(Ok(transfer)) => {
                if !matches!(self.tensors[index], State::Done(_)) {
                    self.tensors[index] = State::Moving;
                }
                self.pending.push_back((index, transfer));
                Ok(())
            }
            Ok(Err(reason)) => self.interrupt(index, None, reason),
        }
    }

    /// What is known of a tensor that goes on.
    async fn partial(&mut self, index: usize) -> Result<Box<Partial<Outgoing>>, TransferError> {
        if let State::Done(receipt) = &self.tensors[index] {
            return Ok(Box::new(Partial {
                moved: Outgoing::sent(receipt.bytes, receipt.digest),
                cost: Cost {
                    retransmits: receipt.retransmits,
                    copies: receipt.copies,
                },
            }));
        }
        if let State::Interrupted(partial) = &mut self.tensors[index]
            && let Some(partial) = partial.take()
        {
            return Ok(partial);
        }
        let Place::Host(lease) = self.leases[index].clone() else {
            // Only the slot knew, which is in use for others by now.
            let reason = "it was confirmed on a path that was lost before this end knew";
            let reason = FailReason::PathLost(reason.to_owned());
            return Err(TransferError::Failed(reason));
        };
        let read = tokio::task::spawn_blocking(move || Partial::rebuild(&lease)).await;
        read.map(Box::new).map_err(|_| TransferError::Stopping)
    }

    async fn step(&mut self) -> Result<(), TransferError> {
        let Self {
            call,
            patience,
            leases,
            ready,
            pending,
            track,
            ..
        } = self;
        let path = track.path.clone();
        let staging = ready
            .front()
            .and_then(|grant| pending.staging(&leases[grant.index], Way::ToHost));
        tokio::select! {
            biased;
            message = call.recv() => self.handle(message?).await,
            () = track.changed() => Ok(()),
            (permit, begun) = async {
                let permit = acquire(staging).await;
                let grant = &ready[0];
                let lease = leases[grant.index].clone();
                (permit, lease.send(&path.endpoint, path.session, grant.transfer).await)
            }, if ready.front().is_some_and(|grant| {
                pending.may_add(leases[grant.index].free_to_send(&path.endpoint))
            }) => {
                self.pending.hold(permit);
                let grant = self.ready.pop_front().expect("it was just begun");
                match begun {
                    Ok(transfer) => {
                        self.patience.begin(self.leases[grant.index].len() as u64);
                        self.tensors[grant.index] = State::Moving;
                        self.pending.push_back((grant.index, transfer));
                        Ok(())
                    }
                    Err(reason) => self.interrupt(grant.index, None, reason),
                }
            }
            result = front(pending), if !pending.is_empty() => {
                let (index, mut transfer) = self.pending.pop_front().expect("it just ended");
                match result {
                    Ok(receipt) => {
                        self.confirm(index, receipt);
                        Ok(())
                    }
                    Err(reason) => {
                        let partial = match transfer.take_interrupted() {
                            Some(Interrupted::Outgoing(partial)) => Some(Box::new(partial)),
                            _ => None,
                        };
                        match self.interrupt(index, partial, reason) {
                            Ok(()) => self.settle_if_done().await,
                            Err(error) => Err(explained(self.call, error).await),
                        }
                    }
                }
            }
            // With a grant and nothing moving it is our own engine that we wait for.
            () = sleep(patience.limit()), if ready.is_empty() || !pending.is_empty() => {
                Err(self.patience.stalled(self.call.session()))
            }
        }
    }

    fn confirm(&mut self, index: usize, receipt: Receipt) {
        if !matches!(self.tensors[index], State::Done(_)) {
            self.patience.end(receipt.bytes);
            self.progress.add(receipt.bytes);
            self.done += 1;
        }
        self.tensors[index] = State::Done(receipt);
    }

    /// A transfer failed: it goes on over another path, unless that cannot be.
    fn interrupt(
        &mut self,
        index: usize,
        partial: Option<Box<Partial<Outgoing>>>,
        reason: StageError,
    ) -> Result<(), TransferError> {
        let done = matches!(self.tensors[index], State::Done(_));
        let outcome = interrupted(self.call.session(), self.track.path.number, reason);
        if done {
            // The receiver has it in any case; if it has ended meanwhile it
            // may have given this up.
            return Ok(());
        }
        outcome?;
        self.track.usable = false;
        self.tensors[index] = State::Interrupted(partial);
        Ok(())
    }

    async fn handle(&mut self, message: Message) -> Result<(), TransferError> {
        match message {
            Message::Granted {
                path, transfers, ..
            } if !transfers.is_empty() && self.granted + transfers.len() <= self.tensors.len() => {
                let first = self.granted;
                self.granted += transfers.len();
                let grant = |(at, transfer)| Grant {
                    index: first + at,
                    transfer,
                    missing: None,
                };
                let grants = transfers.into_iter().enumerate().map(grant).collect();
                let last = false;
                self.take(Ahead { path, grants, last }).await
            }
            Message::Resumed {
                path, grants, last, ..
            } => {
                let grant = |resume: Resume| Grant {
                    index: usize::try_from(resume.index).unwrap_or(usize::MAX),
                    transfer: resume.transfer,
                    missing: Some(resume.missing),
                };
                let grants = grants.into_iter().map(grant).collect();
                self.take(Ahead { path, grants, last }).await
            }
            other => {
                let expected = self.granted == self.tensors.len() && self.early.is_none();
                self.early = Some(ended(self.call, other, expected)?);
                self.settle_if_done().await
            }
        }
    }

    /// Takes grants in: for this path now, for a later one later, and what was
    /// for an earlier one is granted again.
    async fn take(&mut self, ahead: Ahead) -> Result<(), TransferError> {
        let Ahead { path, grants, last } = ahead;
        let number = self.track.path.number;
        if path > number {
            if self.ahead.len() == AHEAD_MAX {
                return Err(self.peer_failed("it speaks of a path that there is not"));
            }
            self.ahead.push_back(Ahead { path, grants, last });
            return Ok(());
        }
        let now = path == number && self.track.usable;
        for grant in grants {
            match &grant.missing {
                None if now => self.ready.push_back(grant),
                None => self.tensors[grant.index] = State::Interrupted(None),
                Some(_) if now => {
                    let allowed = grant.index < self.granted
                        && matches!(
                            self.tensors[grant.index],
                            State::Interrupted(_) | State::Done(_)
                        )
                        && self.resumed.insert(grant.index);
                    if !allowed {
                        return Err(self.peer_failed("it resumes what was not interrupted"));
                    }
                    self.ready.push_back(grant);
                }
                Some(_) => {}
            }
        }
        if now && last {
            self.settle().await?;
        }
        Ok(())
    }

    /// Once the receiver has said that it has everything, what was interrupted
    /// is not granted again.
    async fn settle_if_done(&mut self) -> Result<(), TransferError> {
        if self.early.is_some() {
            self.settle().await?;
        }
        Ok(())
    }

    /// The receiver has what was interrupted and is not resumed.
    async fn settle(&mut self) -> Result<(), TransferError> {
        let granted = self.granted;
        for index in 0..granted {
            if !matches!(self.tensors[index], State::Interrupted(_))
                || self.resumed.contains(&index) && self.early.is_none()
            {
                continue;
            }
            let partial = self.partial(index).await?;
            let digest = match partial.moved.digest() {
                Some(digest) => digest,
                None => {
                    self.tensors[index] = State::Interrupted(None);
                    let whole = self.partial(index).await?;
                    whole.moved.digest().expect("it was read whole")
                }
            };
            self.confirm(
                index,
                Receipt {
                    bytes: self.leases[index].len() as u64,
                    digest,
                    retransmits: partial.cost.retransmits,
                    copies: partial.cost.copies,
                },
            );
        }
        Ok(())
    }

    fn peer_failed(&self, what: &str) -> TransferError {
        TransferError::Session(SessionError::Unexpected {
            peer: self.call.session().peer.clone(),
            what: format!("a grant ({what})"),
        })
    }
}
