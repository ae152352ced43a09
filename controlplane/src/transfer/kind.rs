//! What failures mean to programs.

use genie_client::FailureKind;
use genie_dataplane::engine::FailReason;
use genie_dataplane::memory::accelerator::AcceleratorError;

use super::TransferError;
use crate::budget::AllocateError;
use crate::devices::DeviceError;
use crate::store::SealError;

/// What a failure means to a program.
pub fn kind_of(error: &TransferError) -> FailureKind {
    match error {
        TransferError::NotFound(_)
        | TransferError::NotDone
        | TransferError::Seal(SealError::NotFound(_)) => FailureKind::NotFound,
        TransferError::Seal(SealError::Busy { .. }) => FailureKind::Busy,
        TransferError::Seal(SealError::Registered { .. } | SealError::Outside { .. })
        | TransferError::NoTarget(_)
        | TransferError::Message(_) => FailureKind::Invalid,
        TransferError::Removed(_) => FailureKind::Removed,
        TransferError::Cancelled => FailureKind::Cancelled,
        TransferError::Deadline(_) => FailureKind::Deadline,
        TransferError::Commit(_) | TransferError::Seal(SealError::Commit(_)) => FailureKind::Taken,
        TransferError::Tensor(_) | TransferError::Slice(_) => FailureKind::Invalid,
        TransferError::Limit(error) | TransferError::Allocate(AllocateError::Peer(error)) => {
            let (limit, figure) = error.limit();
            FailureKind::Limited { limit, figure }
        }
        TransferError::Allocate(AllocateError::Quota(_)) => FailureKind::Quota,
        TransferError::Allocate(AllocateError::Import(_)) => FailureKind::Descriptor,
        TransferError::Allocate(AllocateError::Device(DeviceError::Failed(
            AcceleratorError::OutOfMemory { .. },
        ))) => FailureKind::NoMemory,
        TransferError::Allocate(AllocateError::Device(DeviceError::Failed(
            AcceleratorError::Import { .. },
        ))) => FailureKind::Descriptor,
        TransferError::Allocate(AllocateError::Device(_)) | TransferError::Accelerator(_) => {
            FailureKind::Accelerator
        }
        TransferError::Allocate(_) => FailureKind::NoMemory,
        // The path under it was lost.
        TransferError::Failed(
            FailReason::Closed | FailReason::PathLost(_) | FailReason::Stopped,
        ) => FailureKind::Peer,
        TransferError::Digest { .. } | TransferError::Failed(_) => FailureKind::Corrupt,
        TransferError::Peer { kind, .. } => of_peer(*kind),
        TransferError::Session(_) => FailureKind::Peer,
        TransferError::Stalled { .. } => FailureKind::Stalled,
        TransferError::Stopping | TransferError::GivenUp => FailureKind::Stopping,
    }
}

/// What a peer's failure means here: what the program can do something about.
fn of_peer(kind: FailureKind) -> FailureKind {
    match kind {
        FailureKind::NotFound
        | FailureKind::Taken
        | FailureKind::NoMemory
        | FailureKind::Invalid
        | FailureKind::Corrupt
        | FailureKind::Accelerator
        | FailureKind::Removed
        | FailureKind::Busy
        | FailureKind::Stalled
        | FailureKind::Limited { .. } => kind,
        FailureKind::Quota
        | FailureKind::Descriptor
        | FailureKind::Peer
        | FailureKind::Stopping
        | FailureKind::Deadline
        | FailureKind::Cancelled => FailureKind::Peer,
    }
}
