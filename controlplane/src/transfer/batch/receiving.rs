//! The end of a batch that receives.

use std::collections::HashMap;
use std::ops::Range;
use std::pin::pin;

use genie_dataplane::TransferId;
use genie_dataplane::engine::{Full, Interrupted, Partial, Receipt};
use genie_dataplane::memory::Lease;
use genie_dataplane::memory::accelerator::Way;
use genie_dataplane::stage::{Moving, Place, StageError};
use genie_proto::Incoming;
use tokio::time::sleep;

use super::super::pending::{Pending, acquire};
use super::{
    Patience, Progress, Tally, Track, TransferError, cut, ended, explained, front, interrupted,
};
use crate::message::{Message, Outcome, Resume};
use crate::session::Call;

/// Transfer ids in one message: some tens of kilobytes.
const GRANTS: usize = 512;

/// Ranges that are asked for of one tensor after a change of path: a path has
/// no more than some hundred packets in flight.
const RANGES_MAX: usize = 1024;

/// Ranges in one message, roughly: some hundred kilobytes.
const RANGES: usize = 8 * RANGES_MAX;

/// One tensor.
///
/// ```text
///  Waiting ──granted──▶ Moving ──receipt──▶ Done
///                       ▲    │ path lost
///             resumed ──┴─ Interrupted
/// ```
#[derive(Debug)]
enum State {
    Waiting,
    Moving,
    Interrupted(Option<Box<Partial<Incoming>>>),
    Done(Receipt),
}

struct Receiving<'a> {
    call: &'a mut Call,
    progress: &'a Progress,
    patience: Patience,
    leases: Vec<Place>,
    tensors: Vec<State>,
    done: usize,
    /// The first that was not granted yet.
    next: usize,
    pending: Pending,
    /// Those of which every byte was verified before they were confirmed; the
    /// end of the request confirms them too.
    unconfirmed: HashMap<usize, Receipt>,
    /// More is granted once no more than this many are pending, so that the
    /// grants of a long batch travel in few messages.
    low_water: usize,
    track: Track,
    early: Option<Outcome>,
}

/// Receives into all `leases`, granting them as the endpoint takes them;
/// `until_done`: and waits for the end of the request, which is returned.
pub(in crate::transfer) async fn receive_all(
    call: &mut Call,
    leases: Vec<Place>,
    progress: &Progress,
    until_done: bool,
) -> Result<(Tally, Option<Outcome>), TransferError> {
    let (leases, tally) = cut(call.session(), leases);
    let mut receiving = Receiving {
        patience: Patience::new(call.session(), &leases),
        track: Track::new(call.session()),
        tensors: leases.iter().map(|_| State::Waiting).collect(),
        pending: Pending::new(progress, call.take_share()),
        call,
        progress,
        leases,
        done: 0,
        next: 0,
        unconfirmed: HashMap::new(),
        low_water: usize::MAX,
        early: None,
    };
    while !receiving.is_finished(until_done) {
        receiving.follow().await?;
        if !receiving.grant().await? {
            receiving.step().await?;
        }
    }
    Ok(receiving.finish(tally))
}

impl Receiving<'_> {
    fn is_finished(&self, until_done: bool) -> bool {
        self.done == self.tensors.len() && (self.early.is_some() || !until_done)
    }

    fn finish(self, mut tally: Tally) -> (Tally, Option<Outcome>) {
        let receipt = |state| match state {
            State::Done(receipt) => Some(receipt),
            _ => None,
        };
        tally.receipts = self.tensors.into_iter().filter_map(receipt).collect();
        (tally, self.early)
    }

    fn has_waiting(&self) -> bool {
        self.next < self.tensors.len()
    }

    /// Leaves a path that is lost, and takes the next one once nothing is under way.
    async fn follow(&mut self) -> Result<(), TransferError> {
        self.track.check();
        if self.track.usable || !self.pending.is_empty() || !self.track.adopt() {
            return Ok(());
        }
        self.low_water = usize::MAX;
        self.resume().await
    }

    /// Grants what was interrupted again, and says what is missing of it.
    async fn resume(&mut self) -> Result<(), TransferError> {
        let mut grants = Vec::new();
        let mut ranges = 0;
        for index in 0..self.next {
            let State::Interrupted(partial) = &mut self.tensors[index] else {
                continue;
            };
            let partial = partial.take();
            match self.resume_one(index, partial, &mut grants).await? {
                Ok((transfer, missing)) => {
                    ranges += missing.len();
                    grants.push(Resume {
                        index: index as u64,
                        transfer,
                        missing,
                    });
                }
                // Lost again already.
                Err(reason) => {
                    self.interrupt(index, None, reason)?;
                    break;
                }
            }
            if grants.len() >= GRANTS || ranges >= RANGES {
                ranges = 0;
                self.say_resumed(&mut grants, false).await?;
            }
        }
        let all = self.track.usable;
        self.say_resumed(&mut grants, all).await
    }

    async fn resume_one(
        &mut self,
        index: usize,
        partial: Option<Box<Partial<Incoming>>>,
        grants: &mut Vec<Resume>,
    ) -> Result<Result<(TransferId, Vec<Range<u64>>), StageError>, TransferError> {
        let place = self.leases[index].clone();
        let whole = 0..place.len() as u64;
        let (endpoint, session) = (self.track.path.endpoint.clone(), self.track.path.session);
        let (resumed, missing) = match (partial, place.host()) {
            (Some(partial), Some(lease)) if !lease.is_empty() => {
                let (partial, missing) = prepare(partial, lease.clone()).await?;
                (Some((partial, lease.clone())), missing)
            }
            _ if whole.is_empty() => (None, Vec::new()),
            _ => (None, vec![whole]),
        };
        let mut begun = pin!(async {
            match resumed {
                Some((partial, lease)) => {
                    let begun = endpoint.resume_receive(session, lease, partial).await;
                    let (id, transfer) = begun?;
                    Ok((id, Moving::Direct(transfer)))
                }
                None => place.receive(&endpoint, session).await,
            }
        });
        let begun = tokio::select! {
            biased;
            begun = &mut begun => begun,
            // Others use the endpoint up: what we have of it must not wait for us.
            () = std::future::ready(()) => {
                self.say_resumed(grants, false).await?;
                begun.await
            }
        };
        Ok(begun.map(|(id, transfer)| {
            self.tensors[index] = State::Moving;
            self.pending.push_back((index, transfer));
            (id, missing)
        }))
    }

    async fn say_resumed(&self, grants: &mut Vec<Resume>, last: bool) -> Result<(), TransferError> {
        let grants = std::mem::take(grants);
        if grants.is_empty() && !last {
            return Ok(());
        }
        let (id, path) = (self.call.id(), self.track.path.number);
        let resumed = Message::Resumed {
            id,
            path,
            grants,
            last,
        };
        Ok(self.call.send(resumed).await?)
    }

    /// Grants tensors for the first time, as many as the endpoint takes without
    /// waiting, up to [`GRANTS`]. Says whether more may be granted at once.
    async fn grant(&mut self) -> Result<bool, TransferError> {
        let due = self.track.usable && self.has_waiting() && self.pending.len() <= self.low_water;
        if !due {
            return Ok(false);
        }
        let mut transfers = Vec::new();
        while transfers.len() < GRANTS && self.has_waiting() {
            let path = &self.track.path;
            let lease = self.leases[self.next].clone();
            if !self.pending.may_add(lease.free_to_receive(&path.endpoint)) {
                break;
            }
            if let Some(staging) = self.pending.staging(&lease, Way::ToDevice) {
                let Ok(permit) = staging.try_acquire_owned() else {
                    break;
                };
                self.pending.hold(Some(permit));
            }
            match lease.try_receive(&path.endpoint, path.session) {
                Ok(Ok((id, transfer))) => {
                    self.begun(transfer);
                    transfers.push(id);
                }
                Ok(Err(reason)) => {
                    self.lose(reason)?;
                    break;
                }
                Err(Full(_)) => break,
            }
        }
        let all_taken = transfers.len() == GRANTS;
        self.low_water = if all_taken {
            usize::MAX
        } else {
            self.pending.len() / 2
        };
        self.say_granted(transfers).await?;
        Ok(all_taken)
    }

    fn begun(&mut self, transfer: Moving) {
        self.patience.begin(self.leases[self.next].len() as u64);
        self.tensors[self.next] = State::Moving;
        self.pending.push_back((self.next, transfer));
        self.next += 1;
    }

    async fn say_granted(&self, transfers: Vec<TransferId>) -> Result<(), TransferError> {
        if transfers.is_empty() {
            return Ok(());
        }
        let (id, path) = (self.call.id(), self.track.path.number);
        let granted = Message::Granted {
            id,
            path,
            transfers,
        };
        Ok(self.call.send(granted).await?)
    }

    async fn step(&mut self) -> Result<(), TransferError> {
        let waits_for_endpoint = self.track.usable && self.has_waiting() && self.pending.is_empty();
        let Self {
            call,
            patience,
            leases,
            next,
            pending,
            track,
            ..
        } = self;
        let path = track.path.clone();
        let staging = leases
            .get(*next)
            .and_then(|lease| pending.staging(lease, Way::ToDevice));
        tokio::select! {
            biased;
            message = call.recv() => {
                let expected = self.next == self.tensors.len() && self.early.is_none();
                self.early = Some(ended(self.call, message?, expected)?);
                self.settle()
            }
            () = track.changed() => Ok(()),
            result = front(pending), if !pending.is_empty() => {
                let (index, mut transfer) = self.pending.pop_front().expect("it just ended");
                match result {
                    Ok(receipt) => {
                        self.confirm(index, receipt);
                        Ok(())
                    }
                    Err(reason) => {
                        let partial = match transfer.take_interrupted() {
                            Some(Interrupted::Incoming(partial)) => Some(Box::new(partial)),
                            _ => None,
                        };
                        match self.interrupt(index, partial, reason) {
                            Ok(()) => Ok(()),
                            Err(error) => Err(explained(self.call, error).await),
                        }
                    }
                }
            }
            // Others use the endpoint up: wait until it takes one of ours.
            (permit, begun) = async {
                let permit = acquire(staging).await;
                let lease = leases[*next].clone();
                (permit, lease.receive(&path.endpoint, path.session).await)
            }, if waits_for_endpoint => {
                self.pending.hold(permit);
                match begun {
                    Ok((id, transfer)) => {
                        self.begun(transfer);
                        self.say_granted(vec![id]).await
                    }
                    Err(reason) => self.lose(reason),
                }
            }
            // Without any of ours pending it is not the peer that we wait for.
            () = sleep(patience.limit()), if !waits_for_endpoint => {
                Err(self.patience.stalled(self.call.session()))
            }
        }
    }

    fn confirm(&mut self, index: usize, receipt: Receipt) {
        if !matches!(self.tensors[index], State::Done(_)) {
            self.patience.end(receipt.bytes);
            self.progress.add(receipt.bytes);
            self.done += 1;
            self.tensors[index] = State::Done(receipt);
        }
    }

    fn lose(&mut self, reason: StageError) -> Result<(), TransferError> {
        interrupted(self.call.session(), self.track.path.number, reason)?;
        self.track.usable = false;
        Ok(())
    }

    /// A transfer failed: it goes on over another path, unless that cannot be.
    fn interrupt(
        &mut self,
        index: usize,
        partial: Option<Box<Partial<Incoming>>>,
        reason: StageError,
    ) -> Result<(), TransferError> {
        // Settled meanwhile.
        if matches!(self.tensors[index], State::Done(_)) {
            return Ok(());
        }
        let unconfirmed = self.unconfirmed.contains_key(&index);
        let lost = self.lose(reason);
        if !(unconfirmed && self.early.is_some()) {
            lost?;
        }
        if let Some(partial) = partial
            .as_ref()
            .filter(|partial| partial.moved.is_complete())
        {
            let receipt = Receipt {
                bytes: partial.moved.len(),
                digest: partial.moved.digest(),
                retransmits: partial.cost.retransmits,
                copies: partial.cost.copies,
            };
            self.unconfirmed.insert(index, receipt);
        }
        self.tensors[index] = State::Interrupted(partial);
        self.settle()
    }

    /// Once the sender has said that everything was confirmed, so is what was
    /// verified here and not confirmed on a path.
    fn settle(&mut self) -> Result<(), TransferError> {
        if self.early.is_some() {
            for (index, receipt) in std::mem::take(&mut self.unconfirmed) {
                self.confirm(index, receipt);
            }
        }
        Ok(())
    }
}

/// [`Partial::prepare`], which may have to read much of the tensor again.
async fn prepare(
    mut partial: Box<Partial<Incoming>>,
    lease: Lease,
) -> Result<(Box<Partial<Incoming>>, Vec<Range<u64>>), TransferError> {
    let prepared = tokio::task::spawn_blocking(move || {
        let missing = partial.prepare(&lease, RANGES_MAX);
        (partial, missing)
    });
    prepared.await.map_err(|_| TransferError::Stopping)
}
