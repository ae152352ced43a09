//! One range on its way between device and peer.
//!
//! ```text
//!   send:     Copying ──▶ Ready ──▶ Wire ──▶ answered
//!   receive:  Wire ──▶ ToCopy ──▶ Copying ──▶ answered
//!   copy:     ToCopy ──▶ Copying ──▶ answered
//! ```
//! A send begins in `ToCopy` too. Nobody waiting any more is told to the
//! engine; the slot stays until engine and device have let it go.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use genie_proto::{SessionId, TransferId};
use tokio::sync::oneshot;

use super::{Slot, StageError, Step, Trace};
use crate::endpoint::{Endpoint, Transfer};
use crate::engine::{FailReason, Full, Partial, Receipt};
use crate::memory::Lease;
use crate::memory::accelerator::{AcceleratorError, CopyOp, DeviceLease, ForeignEvent, Way};

/// Where somebody waits for how it ended.
pub(super) type Answer<T> = oneshot::Sender<Result<T, StageError>>;

/// Something for the thread to do.
pub(super) enum Job {
    Move(Flight),
    /// Copies asked for later wait for the event.
    WaitFor {
        way: Way,
        event: ForeignEvent,
        answer: Answer<()>,
    },
    /// Once the copies asked for earlier are done, the event is signalled.
    Signal {
        way: Way,
        event: ForeignEvent,
        answer: Answer<()>,
    },
}

pub(super) struct Flight {
    /// Given back when the flight ends.
    _slot: Slot,
    host: Lease,
    device: DeviceLease,
    way: Way,
    state: State,
    since: Instant,
    transfer: Option<TransferId>,
    then: Then,
    abandoned: bool,
    /// The engine was asked to give it up.
    cancelled: bool,
}

enum State {
    /// To be begun with the next batch.
    ToCopy,
    /// In the batch of this number.
    Copying(u64),
    /// To be handed to the engine.
    Ready,
    /// With the engine.
    Wire(Transfer),
}

/// What comes after the step that is under way, and who is told.
enum Then {
    Send {
        endpoint: Endpoint,
        session: SessionId,
        /// What the receiver lacks, if another path was interrupted.
        missing: Option<Vec<Range<u64>>>,
        answer: Answer<Receipt>,
    },
    Receive {
        receipt: Option<Receipt>,
        answer: Answer<Receipt>,
    },
    Copy {
        answer: Answer<()>,
    },
}

/// Whether a flight is over.
pub(super) enum Progress {
    /// A copy, the engine, or a batch to be begun.
    Waits,
    /// Nothing: it was answered.
    Over,
}

impl Flight {
    pub(super) fn send(
        slot: Slot,
        host: Lease,
        device: DeviceLease,
        endpoint: Endpoint,
        session: SessionId,
        transfer: TransferId,
        answer: Answer<Receipt>,
    ) -> Self {
        let then = Then::Send {
            endpoint,
            session,
            missing: None,
            answer,
        };
        Self {
            transfer: Some(transfer),
            ..Self::new(slot, host, device, Way::ToHost, State::ToCopy, then)
        }
    }

    /// Sends only what another path did not bring.
    pub(super) fn resuming(mut self, ranges: Vec<Range<u64>>) -> Self {
        if let Then::Send { missing, .. } = &mut self.then {
            *missing = Some(ranges);
        }
        self
    }

    pub(super) fn receive(
        slot: Slot,
        host: Lease,
        device: DeviceLease,
        id: TransferId,
        transfer: Transfer,
        answer: Answer<Receipt>,
    ) -> Self {
        let then = Then::Receive {
            receipt: None,
            answer,
        };
        let state = State::Wire(transfer);
        Self {
            transfer: Some(id),
            ..Self::new(slot, host, device, Way::ToDevice, state, then)
        }
    }

    pub(super) fn copy(
        slot: Slot,
        host: Lease,
        device: DeviceLease,
        way: Way,
        answer: Answer<()>,
    ) -> Self {
        let then = Then::Copy { answer };
        Self::new(slot, host, device, way, State::ToCopy, then)
    }

    fn new(
        slot: Slot,
        host: Lease,
        device: DeviceLease,
        way: Way,
        state: State,
        then: Then,
    ) -> Self {
        Self {
            _slot: slot,
            host,
            device,
            way,
            state,
            since: Instant::now(),
            transfer: None,
            then,
            abandoned: false,
            cancelled: false,
        }
    }

    /// Which way it is copied.
    pub(super) fn way(&self) -> Way {
        self.way
    }

    /// Its copy, which goes into the batch of number `batch`.
    pub(super) fn begin_copy(&mut self, batch: u64) {
        self.state = State::Copying(batch);
        self.since = Instant::now();
    }

    /// Whether its copy is still ahead of it.
    pub(super) fn will_copy(&self) -> bool {
        match self.state {
            State::ToCopy => true,
            State::Wire(_) => matches!(self.then, Then::Receive { .. }),
            State::Copying(_) | State::Ready => false,
        }
    }

    /// Whether its copy is to be begun.
    pub(super) fn wants_copy(&self) -> bool {
        matches!(self.state, State::ToCopy)
    }

    pub(super) fn op(&self) -> CopyOp {
        CopyOp {
            host: self.host.clone(),
            device: self.device.clone(),
            way: self.way,
        }
    }

    /// Whether it is being copied, or waits for its engine to have room: then
    /// nobody wakes the thread.
    pub(super) fn is_to_be_asked(&self) -> bool {
        matches!(self.state, State::Copying(_) | State::Ready)
    }

    /// Goes on as far as it can. `copied` is what the device has finished of
    /// the batches of its way, or why it has not.
    pub(super) fn advance(
        &mut self,
        copied: &Result<u64, AcceleratorError>,
        context: &mut Context<'_>,
        trace: &Trace,
    ) -> Progress {
        loop {
            let abandoned = self.is_abandoned();
            match &mut self.state {
                State::ToCopy if abandoned => return self.answer_cancelled(),
                State::ToCopy => return Progress::Waits,
                State::Copying(batch) => match copied {
                    Ok(done) if done < batch => return Progress::Waits,
                    Ok(_) => {
                        trace.add(self.transfer, Step::Copy(self.way), self.since);
                        if let Some(over) = self.copied() {
                            return over;
                        }
                    }
                    Err(error) => return self.answer(Err(error.clone().into())),
                },
                State::Ready if abandoned => return self.answer_cancelled(),
                State::Ready => match self.hand_over() {
                    Ok(true) => {}
                    Ok(false) => return Progress::Waits,
                    Err(reason) => return self.answer(Err(reason.into())),
                },
                State::Wire(transfer) => {
                    let Poll::Ready(result) = Pin::new(transfer).poll(context) else {
                        self.cancel_if_abandoned();
                        return Progress::Waits;
                    };
                    trace.add(self.transfer, Step::Wire, self.since);
                    match (result, &mut self.then) {
                        (Ok(arrived), Then::Receive { receipt, .. }) => {
                            *receipt = Some(arrived);
                            self.state = State::ToCopy;
                        }
                        (result, _) => return self.answer(result.map_err(StageError::from)),
                    }
                }
            }
        }
    }

    /// The copy is done: the next step, or the end.
    fn copied(&mut self) -> Option<Progress> {
        match &mut self.then {
            Then::Send { .. } => {
                self.state = State::Ready;
                None
            }
            Then::Receive { receipt, .. } => {
                let receipt = receipt.take().expect("it arrived before it was copied");
                Some(self.answer(Ok(receipt)))
            }
            Then::Copy { .. } => Some(self.answer_copied(Ok(()))),
        }
    }

    /// Gives the slot to the engine; `false` if that has no room now.
    fn hand_over(&mut self) -> Result<bool, FailReason> {
        let Then::Send {
            endpoint,
            session,
            missing,
            ..
        } = &self.then
        else {
            unreachable!("only a send is ever ready for the wire");
        };
        let id = self.transfer.expect("a send has a transfer");
        let host = self.host.clone();
        let begun = match missing {
            None => endpoint.try_send(*session, id, host),
            Some(missing) => {
                let mut partial = Partial::rebuild(&host);
                let prepared = partial.prepare(missing);
                prepared.map_err(|error| FailReason::Protocol(error.to_string()))?;
                endpoint.try_resume_send(*session, id, host, Box::new(partial))
            }
        };
        match begun {
            Ok(begun) => {
                self.state = State::Wire(begun?);
                self.since = Instant::now();
                Ok(true)
            }
            Err(Full(_)) => Ok(false),
        }
    }

    /// Nobody is answered any more: the stage ends.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned || self.is_unheard()
    }

    fn is_unheard(&self) -> bool {
        match &self.then {
            Then::Send { answer, .. } | Then::Receive { answer, .. } => answer.is_closed(),
            Then::Copy { answer } => answer.is_closed(),
        }
    }

    /// Asks the engine to give the transfer up. It still holds the slot: only
    /// its answer ends the flight.
    fn cancel_if_abandoned(&mut self) {
        if !self.cancelled && self.is_abandoned() {
            self.cancelled = true;
            if let State::Wire(transfer) = &self.state {
                transfer.cancel();
            }
        }
    }

    fn answer_cancelled(&mut self) -> Progress {
        self.answer(Err(FailReason::Cancelled.into()))
    }

    /// Ends the flight with an error.
    pub(super) fn fail(&mut self, error: StageError) -> Progress {
        self.answer(Err(error))
    }

    fn answer(&mut self, result: Result<Receipt, StageError>) -> Progress {
        match &mut self.then {
            Then::Send { answer, .. } | Then::Receive { answer, .. } => {
                let (unused, _) = oneshot::channel();
                // Whoever does not wait any more does not miss it.
                let _ = std::mem::replace(answer, unused).send(result);
                Progress::Over
            }
            Then::Copy { .. } => self.answer_copied(result.map(|_| ())),
        }
    }

    fn answer_copied(&mut self, result: Result<(), StageError>) -> Progress {
        if let Then::Copy { answer } = &mut self.then {
            let (unused, _) = oneshot::channel();
            let _ = std::mem::replace(answer, unused).send(result);
        }
        Progress::Over
    }
}
