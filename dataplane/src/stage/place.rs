//! A tensor's bytes wherever they are, and how they are handed to an engine.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use genie_proto::{SessionId, TransferId};

use super::{Stage, StageError, Staged};
use crate::endpoint::{Endpoint, Transfer};
use crate::engine::{Full, Interrupted, Receipt};
use crate::memory::accelerator::{DeviceLease, MemoryKind, Way};
use crate::memory::{Lease, OutOfBounds};

/// A hold on bytes of the host's or of a device's.
#[derive(Clone, Debug)]
pub enum Place {
    /// Host memory, which engines reach by themselves.
    Host(Lease),
    /// Device memory, and what moves it.
    Device(Arc<Stage>, DeviceLease),
}

/// A transfer under way; resolves to proof that both ends verified it, and that
/// the bytes are where they belong.
#[derive(Debug)]
#[must_use = "dropping a transfer cancels it"]
pub enum Moving {
    /// Straight between memory and engine.
    Direct(Transfer),
    /// Through a slot.
    Staged(Staged),
}

impl Place {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(lease) => lease.len(),
            Self::Device(_, lease) => lease.len(),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whose memory it is.
    pub fn kind(&self) -> MemoryKind {
        match self {
            Self::Host(_) => MemoryKind::Host,
            Self::Device(_, lease) => lease.kind(),
        }
    }

    /// The lease, of host memory.
    pub fn host(&self) -> Option<&Lease> {
        match self {
            Self::Host(lease) => Some(lease),
            Self::Device(..) => None,
        }
    }

    /// How many transfers into it would begin now without waiting, were there
    /// nobody else's.
    pub fn free_to_receive(&self, endpoint: &Endpoint) -> usize {
        self.free(endpoint, Way::ToDevice)
    }

    /// How many transfers from it would begin now without waiting, were there
    /// nobody else's.
    pub fn free_to_send(&self, endpoint: &Endpoint) -> usize {
        self.free(endpoint, Way::ToHost)
    }

    fn free(&self, endpoint: &Endpoint, way: Way) -> usize {
        match self {
            Self::Host(_) => endpoint.free(),
            Self::Device(stage, _) => endpoint.free().min(stage.free(way)),
        }
    }

    /// A hold on a part of it.
    pub fn slice(&self, range: Range<u64>) -> Result<Self, OutOfBounds> {
        Ok(match self {
            Self::Host(lease) => Self::Host(lease.slice(range)?),
            Self::Device(stage, lease) => Self::Device(Arc::clone(stage), lease.slice(range)?),
        })
    }

    /// Expects a transfer into it; waits where it must.
    pub async fn receive(
        self,
        endpoint: &Endpoint,
        session: SessionId,
    ) -> Result<(TransferId, Moving), StageError> {
        match self {
            Self::Host(into) => {
                let (id, transfer) = endpoint.receive(session, into).await?;
                Ok((id, Moving::Direct(transfer)))
            }
            Self::Device(stage, into) => {
                let (id, staged) = stage.receive(endpoint, session, into).await?;
                Ok((id, Moving::Staged(staged)))
            }
        }
    }

    /// [`Place::receive`], refused where it would wait.
    pub fn try_receive(
        self,
        endpoint: &Endpoint,
        session: SessionId,
    ) -> Result<Result<(TransferId, Moving), StageError>, Full<Self>> {
        match self {
            Self::Host(into) => match endpoint.try_receive(session, into) {
                Ok(Ok((id, transfer))) => Ok(Ok((id, Moving::Direct(transfer)))),
                Ok(Err(reason)) => Ok(Err(reason.into())),
                Err(Full(into)) => Err(Full(Self::Host(into))),
            },
            Self::Device(stage, into) => match stage.try_receive(endpoint, session, into) {
                Ok(Ok((id, staged))) => Ok(Ok((id, Moving::Staged(staged)))),
                Ok(Err(error)) => Ok(Err(error)),
                Err(Full(into)) => Err(Full(Self::Device(stage, into))),
            },
        }
    }

    /// Sends it as the transfer that the peer granted; waits where it must.
    pub async fn send(
        self,
        endpoint: &Endpoint,
        session: SessionId,
        transfer: TransferId,
    ) -> Result<Moving, StageError> {
        Ok(match self {
            Self::Host(from) => Moving::Direct(endpoint.send(session, transfer, from).await?),
            Self::Device(stage, from) => {
                Moving::Staged(stage.send(endpoint, session, transfer, from).await)
            }
        })
    }
}

impl Moving {
    /// Asks for it to be given up; [`Moving::end`] waits until it was.
    pub fn cancel(&self) {
        match self {
            Self::Direct(transfer) => transfer.cancel(),
            // Given up when dropped.
            Self::Staged(_) => {}
        }
    }

    /// Waits until an engine has let go of its bytes, however it ended; what
    /// goes through a slot never had it touch them.
    pub async fn end(self) {
        match self {
            Self::Direct(transfer) => drop(transfer.await),
            Self::Staged(staged) => drop(staged),
        }
    }

    /// [`Transfer::take_interrupted`]; nothing of one that went through a slot,
    /// which has to begin anew.
    pub fn take_interrupted(&mut self) -> Option<Interrupted> {
        match self {
            Self::Direct(transfer) => transfer.take_interrupted(),
            Self::Staged(_) => None,
        }
    }
}

impl From<Lease> for Place {
    fn from(lease: Lease) -> Self {
        Self::Host(lease)
    }
}

impl Future for Moving {
    type Output = Result<Receipt, StageError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Direct(transfer) => Pin::new(transfer).poll(context).map_err(StageError::from),
            Self::Staged(staged) => Pin::new(staged).poll(context),
        }
    }
}
