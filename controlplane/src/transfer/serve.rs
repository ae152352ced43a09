//! What a peer's requests get: the acceptor's end.

use std::sync::Arc;

use super::batch::{receive_all, send_all, send_list};
use super::{Progress, TransferError, allocate, lay_out, recv_list};
use crate::message::{Message, Outcome, Request};
use crate::node::Node;
use crate::session::Call;
use crate::store::{Owner, Stored, description_bytes};
use crate::tensor::{Metadata, TensorInfo, check_batch};

/// Stored tensors listed in one message: some hundred kilobytes.
const LISTED: usize = 1024;

/// Does what a peer asks for.
pub async fn serve(
    node: &Arc<Node>,
    call: &mut Call,
    request: Request,
) -> Result<Outcome, TransferError> {
    let _busy = node.begin().ok_or(TransferError::Stopping)?;
    match request {
        Request::Put {
            prefix,
            count,
            metadata,
        } => serve_put(node, call, &prefix, count, metadata).await,
        Request::Get { prefix } => serve_get(node, call, &prefix).await,
        Request::List => {
            let listed = node.store.list();
            for tensors in listed.chunks(LISTED) {
                let tensors = tensors.to_vec();
                call.send(Message::Listed {
                    id: call.id(),
                    tensors,
                })
                .await?;
            }
            Ok(Outcome {
                tensors: listed.len() as u64,
                ..Outcome::default()
            })
        }
        Request::Remove { name } => {
            let tensors = node.store.remove(&name)?;
            Ok(Outcome {
                tensors,
                ..Outcome::default()
            })
        }
    }
}

async fn serve_put(
    node: &Arc<Node>,
    call: &mut Call,
    prefix: &str,
    count: u64,
    metadata: Option<Metadata>,
) -> Result<Outcome, TransferError> {
    let budget = node.store.budget();
    let (infos, mut charge) = recv_list(call, count, metadata.as_ref(), budget).await?;
    let bytes = check_batch(prefix, &infos, metadata.as_ref())?;
    node.store.check(prefix, &infos)?;
    let owner = Owner::Peer(call.session().peer.clone());
    charge.grow_to(description_bytes(prefix, &infos, metadata.as_ref(), &owner))?;
    let allocation = allocate(budget, bytes).await?;
    let leases = lay_out(&allocation, &infos)?;
    let (tally, _) = receive_all(call, leases.clone(), &Progress::default()).await?;
    let outcome = tally.outcome(&infos);
    let stored = |(info, lease): (TensorInfo, _)| Stored {
        info,
        lease,
        allocation: Arc::clone(&allocation),
        owner: owner.clone(),
    };
    let tensors = infos.into_iter().zip(leases).map(stored).collect();
    node.store.commit(prefix, tensors, metadata, charge)?;
    Ok(outcome)
}

async fn serve_get(
    node: &Arc<Node>,
    call: &mut Call,
    prefix: &str,
) -> Result<Outcome, TransferError> {
    // Held until the end, so that the memory stays counted while it is sent.
    let (stored, metadata) = node.store.fetch(prefix)?;
    let infos: Vec<TensorInfo> = stored.iter().map(|tensor| tensor.info.clone()).collect();
    let count = infos.len() as u64;
    call.send(Message::Found {
        id: call.id(),
        count,
        metadata,
    })
    .await?;
    send_list(call, &infos).await?;
    let leases = stored.iter().map(|tensor| tensor.lease.clone()).collect();
    let (tally, _) = send_all(call, leases, &Progress::default()).await?;
    Ok(tally.outcome(&infos))
}
