//! How a session's opening, its transfers and itself end, and who is told.

use std::collections::VecDeque;
use std::time::Duration;

use genie_proto::{Event, Time, TransferId, connection};

use super::transfer::{Copying, Destination, Incoming, Outgoing};
use super::{CLOSED_BY_USER, Session, State};
use crate::device::{Attachment, Device};
use crate::engine::udp::Totals;
use crate::engine::udp::offer::{Offer, Sent};
use crate::engine::{
    Completion, FailReason, Interrupted, OpenError, OperationId, Partial, Receipt,
};

/// A transfer that ended while frames may still refer to its memory.
pub(super) struct Detaching {
    pub(super) attachment: Attachment,
    pub(super) operation: OperationId,
    pub(super) result: Result<Receipt, FailReason>,
    /// What had moved, if the session ended.
    pub(super) partial: Option<Box<Interrupted>>,
}

impl Session {
    /// Turns what the protocol reports into completions; returns whether it had
    /// anything to report.
    pub(in crate::engine::udp) fn take_events(
        &mut self,
        now: Time,
        copying: Copying,
        totals: &mut Totals,
        completions: &mut VecDeque<Completion>,
        offers: &mut VecDeque<Offer>,
    ) -> bool {
        let copying = Copying {
            sealed: self.is_sealed(),
            ..copying
        };
        let mut any = false;
        while let Some(event) = self.connection.poll_event() {
            any = true;
            match event {
                Event::Received {
                    transfer,
                    digest,
                    len,
                } => {
                    totals.received_bytes += len;
                    self.received(transfer, completions, |incoming| {
                        let cost = incoming.cost(copying);
                        Ok(Receipt {
                            bytes: len,
                            digest,
                            retransmits: cost.retransmits,
                            copies: cost.copies,
                        })
                    });
                }
                Event::Offered {
                    transfer,
                    slot,
                    metadata,
                    digest,
                    len,
                } => {
                    totals.received_bytes += len;
                    self.busy = Some(now);
                    if let Some(offered) = &mut self.offered {
                        offered.hold(slot, transfer);
                    }
                    offers.push_back(Offer::new(self.id, transfer, slot, metadata, digest, len));
                }
                Event::Sent {
                    transfer,
                    digest,
                    len,
                    retransmits,
                } => {
                    totals.sent_bytes += len;
                    if let Some(offer) = self.offering.take(transfer) {
                        let receipt = Receipt {
                            bytes: len,
                            digest,
                            retransmits,
                            copies: offer.copies(copying),
                        };
                        self.offer_ended(offer, Ok(receipt), completions);
                        continue;
                    }
                    self.sent(transfer, None, |outgoing| {
                        let cost = outgoing.cost(copying, retransmits);
                        Ok(Receipt {
                            bytes: len,
                            digest,
                            retransmits: cost.retransmits,
                            copies: cost.copies,
                        })
                    });
                }
                Event::Failed {
                    transfer,
                    outgoing: true,
                    reason,
                } => {
                    if let Some(offer) = self.offering.take(transfer) {
                        self.offer_ended(offer, Err(fail_reason(reason)), completions);
                        continue;
                    }
                    let partial = self.partial_outgoing(transfer, copying);
                    self.sent(transfer, partial, |_| Err(fail_reason(reason)));
                }
                Event::Failed {
                    transfer,
                    outgoing: false,
                    reason,
                } => match self.partial_incoming(transfer, copying) {
                    Some(partial) => {
                        self.interrupted(transfer, partial, fail_reason(reason), completions);
                    }
                    None => self.received(transfer, completions, |_| Err(fail_reason(reason))),
                },
                Event::PathValidated { rtt } => self.opened(rtt, completions),
                Event::PathLost { reason } => {
                    self.end(now, FailReason::PathLost(reason.to_string()), completions);
                }
                Event::Closed { reason } => self.end(now, close_reason(reason), completions),
            }
        }
        self.check_opening(now, completions);
        any
    }

    fn received(
        &mut self,
        transfer: TransferId,
        completions: &mut VecDeque<Completion>,
        result: impl FnOnce(&Incoming) -> Result<Receipt, FailReason>,
    ) {
        if let Some(incoming) = self.incoming.remove(&transfer) {
            let result = match (&incoming.into, result(&incoming)) {
                (
                    Destination::InPlace {
                        unread: Some(limit),
                    },
                    Err(FailReason::Cancelled),
                ) => Err(FailReason::Unread(*limit)),
                (_, result) => result,
            };
            self.transfer_read(&incoming);
            let operation = incoming.operation;
            // The lease goes before anybody is told that it has gone.
            drop(incoming);
            completions.push_back(Completion::Transferred { operation, result });
        }
    }

    fn offer_ended(
        &mut self,
        offer: Sent,
        result: Result<Receipt, FailReason>,
        completions: &mut VecDeque<Completion>,
    ) {
        let operation = offer.operation;
        match offer.attachment {
            Some(attachment) => self.detaching.push(Detaching {
                attachment,
                operation,
                result,
                partial: None,
            }),
            None => {
                drop(offer);
                completions.push_back(Completion::Transferred { operation, result });
            }
        }
    }

    /// What had moved of a transfer that failed with the connection.
    fn partial_incoming(
        &mut self,
        transfer: TransferId,
        copying: Copying,
    ) -> Option<Box<Interrupted>> {
        let moved = self.connection.take_incoming(transfer)?;
        let incoming = self.incoming.get(&transfer)?;
        // What was read is nowhere that another path could add to.
        if let Destination::InPlace { .. } = incoming.into {
            return None;
        }
        let cost = incoming.cost(copying);
        Some(Box::new(Interrupted::Incoming(Partial { moved, cost })))
    }

    /// What had moved of a transfer that failed with the connection.
    fn partial_outgoing(
        &mut self,
        transfer: TransferId,
        copying: Copying,
    ) -> Option<Box<Interrupted>> {
        let (moved, retransmits) = self.connection.take_outgoing(transfer)?;
        let cost = self.outgoing.get(&transfer)?.cost(copying, retransmits);
        Some(Box::new(Interrupted::Outgoing(Partial { moved, cost })))
    }

    /// The protocol places nothing any more once the connection has ended, so
    /// when the lease is dropped nothing can reach its memory.
    fn interrupted(
        &mut self,
        transfer: TransferId,
        partial: Box<Interrupted>,
        reason: FailReason,
        completions: &mut VecDeque<Completion>,
    ) {
        if let Some(incoming) = self.incoming.remove(&transfer) {
            let operation = incoming.operation;
            drop(incoming);
            completions.push_back(Completion::Interrupted {
                operation,
                reason,
                partial,
            });
        }
    }

    fn sent(
        &mut self,
        transfer: TransferId,
        partial: Option<Box<Interrupted>>,
        result: impl FnOnce(&Outgoing) -> Result<Receipt, FailReason>,
    ) {
        if let Some(outgoing) = self.outgoing.remove(&transfer) {
            let result = result(&outgoing);
            let Outgoing {
                attachment,
                operation,
                ..
            } = outgoing;
            self.detaching.push(Detaching {
                attachment,
                operation,
                result,
                partial,
            });
        }
    }

    pub(super) fn opened(&mut self, round_trip: Duration, completions: &mut VecDeque<Completion>) {
        if let State::Probing { opening, .. } = self.state {
            self.state = State::Open;
            let operation = opening.operation;
            completions.push_back(Completion::Opened {
                operation,
                result: Ok(round_trip),
            });
        }
    }

    /// Gives up opening when its limit is over.
    pub(super) fn check_opening(&mut self, now: Time, completions: &mut VecDeque<Completion>) {
        let (opening, error) = match &self.state {
            State::Resolving { opening, began, .. } if *began + opening.limit <= now => {
                (*opening, OpenError::NoNeighbour(opening.peer.ip()))
            }
            State::Probing { opening, began } if *began + opening.limit <= now => {
                (*opening, OpenError::NoAnswer(opening.peer))
            }
            _ => return,
        };
        let operation = opening.operation;
        completions.push_back(Completion::Opened {
            operation,
            result: Err(error),
        });
        // Without a flow there is nobody to tell; otherwise the peer learns it.
        let told = self.flow.is_none();
        self.state = State::Ended { since: now, told };
        self.connection.close(CLOSED_BY_USER);
        self.fail_transfers(FailReason::Closed, completions);
    }

    /// Ends the session: everything under way fails with `reason`.
    pub(super) fn end(
        &mut self,
        now: Time,
        reason: FailReason,
        completions: &mut VecDeque<Completion>,
    ) {
        self.fail_transfers(reason.clone(), completions);
        let ended = State::Ended {
            since: now,
            told: self.flow.is_none(),
        };
        match std::mem::replace(&mut self.state, ended) {
            State::Resolving { opening, .. } | State::Probing { opening, .. } => {
                let result = Err(match reason {
                    FailReason::PathLost(_) => OpenError::NoAnswer(opening.peer),
                    other => OpenError::Refused(other.to_string()),
                });
                completions.push_back(Completion::Opened {
                    operation: opening.operation,
                    result,
                });
            }
            // Who closed it knows; anything else is news.
            State::Open if reason != FailReason::Closed => {
                completions.push_back(Completion::Lost {
                    session: self.id,
                    reason,
                });
            }
            State::Open => {}
            State::Ended { told, since } => self.state = State::Ended { told, since },
        }
    }

    fn fail_transfers(&mut self, reason: FailReason, completions: &mut VecDeque<Completion>) {
        while let Some(offer) = self.offering.pop() {
            self.offer_ended(offer, Err(reason.clone()), completions);
        }
        for (
            _,
            Incoming {
                operation, into, ..
            },
        ) in self.incoming.drain()
        {
            drop(into);
            completions.push_back(Completion::Transferred {
                operation,
                result: Err(reason.clone()),
            });
        }
        for (
            _,
            Outgoing {
                attachment,
                operation,
                ..
            },
        ) in self.outgoing.drain()
        {
            self.detaching.push(Detaching {
                attachment,
                operation,
                result: Err(reason.clone()),
                partial: None,
            });
        }
    }

    pub(in crate::engine::udp) fn is_detaching(&self) -> bool {
        !self.detaching.is_empty()
    }

    /// Completes the transfers whose memory no frame refers to any more.
    pub(in crate::engine::udp) fn detach(
        &mut self,
        device: &mut dyn Device,
        completions: &mut VecDeque<Completion>,
    ) {
        // The frames of a closed session are reaped like any other's, so this
        // ends unless the device is stuck; then the lease rightly stays.
        self.detaching.retain_mut(
            |Detaching {
                 attachment,
                 operation,
                 result,
                 partial,
             }| {
                let gone = device.detach(*attachment);
                if gone {
                    let operation = *operation;
                    let result = std::mem::replace(result, Err(FailReason::Closed));
                    completions.push_back(match (result, partial.take()) {
                        (Err(reason), Some(partial)) => Completion::Interrupted {
                            operation,
                            reason,
                            partial,
                        },
                        (result, _) => Completion::Transferred { operation, result },
                    });
                }
                !gone
            },
        );
    }

    /// Whether frames may still refer to this memory of an ended transfer.
    pub(in crate::engine::udp) fn detaches(&self, attachment: Attachment) -> bool {
        self.detaching
            .iter()
            .any(|detaching| detaching.attachment == attachment)
    }
}

pub(super) fn refuse(
    operation: OperationId,
    reason: String,
    completions: &mut VecDeque<Completion>,
) {
    let result = Err(FailReason::Refused(reason));
    completions.push_back(Completion::Transferred { operation, result });
}

fn fail_reason(reason: connection::FailReason) -> FailReason {
    use connection::FailReason as Proto;
    match reason {
        Proto::DigestMismatch => FailReason::DigestMismatch,
        Proto::Cancelled => FailReason::Cancelled,
        Proto::CancelledByPeer => FailReason::CancelledByPeer,
        Proto::Closed => FailReason::Closed,
        Proto::PathLost => FailReason::PathLost("the peer does not answer".into()),
        Proto::LengthMismatch | Proto::UnknownToPeer => FailReason::Protocol(reason.to_string()),
    }
}

fn close_reason(reason: connection::CloseReason) -> FailReason {
    use connection::CloseReason as Proto;
    match reason {
        Proto::Local(_) => FailReason::Closed,
        Proto::Peer(_) => FailReason::PathLost(reason.to_string()),
        Proto::Violation(_) | Proto::PacketNumbersExhausted => {
            FailReason::Protocol(reason.to_string())
        }
    }
}
