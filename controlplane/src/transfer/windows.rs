//! Windows of this node's, made and sealed for peers and programs alike.

use std::time::Duration;

use genie_client::Owner;
use genie_dataplane::memory::accelerator::MemoryKind;
use tokio::time::{Instant, sleep};

use super::{TransferError, allocate};
use crate::node::Node;
use crate::notifications::check_message;
use crate::store::{SealError, description_bytes, window_bytes};
use crate::tensor::{TensorInfo, check_batch, check_name};

/// For how long sealing waits for those who still use a window: a transfer that
/// was just answered or given up is over long before.
const SEAL_LIMIT: Duration = Duration::from_secs(1);

/// Makes a window in the store.
pub async fn make(
    node: &Node,
    name: &str,
    bytes: u64,
    memory: MemoryKind,
    owner: &Owner,
) -> Result<(), TransferError> {
    check_name(name)?;
    node.store.check_window(name, owner)?;
    let room = node.store_room(memory, owner);
    let charge = room.charge(window_bytes(name))?;
    let allocation = allocate(&room, bytes).await?;
    Ok(node
        .store
        .make_window(name, allocation, bytes, owner, charge)?)
}

/// Makes tensors of a window; returns how many.
pub async fn seal(
    node: &Node,
    name: &str,
    tensors: &[(TensorInfo, u64)],
    owner: &Owner,
) -> Result<u64, TransferError> {
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    check_batch(name, &infos, None)?;
    let until = Instant::now() + SEAL_LIMIT;
    loop {
        let described = description_bytes(name, &infos, None, owner);
        let room = node.store_room(MemoryKind::Host, owner);
        let charge = room.charge(described)?;
        match node.store.seal(name, tensors, owner, charge) {
            Err(SealError::Busy { .. }) if Instant::now() < until => {
                sleep(Duration::from_millis(1)).await;
            }
            sealed => return Ok(sealed?),
        }
    }
}

/// Tells those who listen to a name; returns how many.
pub fn notify(node: &Node, name: &str, message: &[u8], from: &Owner) -> Result<u64, TransferError> {
    check_name(name)?;
    check_message(message)?;
    Ok(node.notifications.tell(name, message, from, from))
}
