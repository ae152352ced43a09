//! What a peer's requests get: the acceptor's end.

use std::sync::Arc;

use genie_client::Owner;
use genie_client::slice::Run;
use genie_dataplane::memory::accelerator::MemoryKind;
use genie_dataplane::stage::Place;

use super::batch::{receive_all, send_all, send_list};
use super::{Progress, TransferError, allocate, lay_out, part, ranges, recv_list, windows};
use crate::budget::Room;
use crate::message::{Message, Outcome, Request, RequestKey};
use crate::metrics::Direction;
use crate::node::Node;
use crate::session::Call;
use crate::store::description_bytes;
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
    let direction = match &request {
        Request::Put { .. } | Request::Write { .. } => Some(Direction::Received),
        Request::Get { .. } | Request::Fetch { .. } | Request::Read(_) => Some(Direction::Sent),
        Request::List { .. }
        | Request::Remove { .. }
        | Request::Recall { .. }
        | Request::Window { .. }
        | Request::Seal { .. }
        | Request::Notify { .. } => None,
    };
    if direction.is_some() {
        let account = node.peer_quotas.account(&call.session().peer);
        call.share(account.share()?);
    }
    let outcome = answer(node, call, request).await?;
    if let Some(direction) = direction {
        node.counters.served(call.session(), direction, &outcome);
    }
    Ok(outcome)
}

async fn answer(
    node: &Arc<Node>,
    call: &mut Call,
    request: Request,
) -> Result<Outcome, TransferError> {
    let peer = Owner::Peer(call.session().peer.clone());
    match request {
        Request::Put {
            prefix,
            count,
            metadata,
            memory,
            key,
        } => {
            let room = node.store_room(memory, &peer);
            let put = Put {
                prefix: &prefix,
                count,
                metadata,
                key,
            };
            serve_put(node, call, put, &room, &peer).await
        }
        Request::Recall { key, .. } => {
            let done = node.once.recall(&call.session().peer, key);
            done.ok_or(TransferError::NotDone)
        }
        Request::Get { prefix } => serve_get(node, call, &prefix, &peer).await,
        Request::Fetch { name, runs } => serve_fetch(node, call, &name, runs, &peer).await,
        Request::List { under } => {
            let listed = node.store.list(under.as_deref(), &peer);
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
        Request::Read(runs) => ranges::serve_read(node, call, &runs, &peer).await,
        Request::Write { runs, note } => {
            ranges::serve_write(node, call, &runs, note.as_ref(), &peer).await
        }
        Request::Window {
            name,
            bytes,
            memory,
        } => {
            windows::make(node, &name, bytes, memory, &peer).await?;
            Ok(Outcome::default())
        }
        Request::Seal { name, tensors } => {
            let tensors = windows::seal(node, &name, &tensors, &peer).await?;
            Ok(Outcome {
                tensors,
                ..Outcome::default()
            })
        }
        Request::Notify { name, message } => Ok(Outcome {
            listeners: windows::notify(node, &name, &message, &peer)?,
            ..Outcome::default()
        }),
        Request::Remove { name } => {
            let tensors = node.store.remove(&name, &peer)?;
            Ok(Outcome {
                tensors,
                ..Outcome::default()
            })
        }
    }
}

/// What a put says of itself.
struct Put<'a> {
    prefix: &'a str,
    count: u64,
    metadata: Option<Metadata>,
    key: Option<RequestKey>,
}

async fn serve_put(
    node: &Arc<Node>,
    call: &mut Call,
    put: Put<'_>,
    room: &Room,
    peer: &Owner,
) -> Result<Outcome, TransferError> {
    let Put {
        prefix,
        count,
        metadata,
        key,
    } = put;
    let (infos, mut charge) = recv_list(call, count, metadata.as_ref(), room).await?;
    let bytes = check_batch(prefix, &infos, metadata.as_ref())?;
    node.store.check(prefix, &infos, peer)?;
    charge.grow_to(description_bytes(prefix, &infos, metadata.as_ref(), peer))?;
    let allocation = allocate(room, bytes).await?;
    let leases = lay_out(&allocation, &infos)?;
    let (tally, _) = receive_all(call, leases.clone(), &Progress::default(), false).await?;
    let outcome = tally.outcome(&infos);
    let tensors = infos.into_iter().zip(leases).collect();
    let commit = || node.store.commit(prefix, tensors, metadata, peer, charge);
    let (outcome, replaced) = (node.once).commit(&call.session().peer, key, outcome, commit)?;
    tokio::task::spawn_blocking(move || drop(replaced));
    Ok(outcome)
}

async fn serve_get(
    node: &Arc<Node>,
    call: &mut Call,
    prefix: &str,
    peer: &Owner,
) -> Result<Outcome, TransferError> {
    let (stored, metadata) = node.store.fetch(prefix, peer)?;
    let (infos, leases): (Vec<_>, _) = stored
        .into_iter()
        .map(|tensor| (tensor.info, tensor.lease))
        .unzip();
    send(call, &infos, leases, metadata).await
}

async fn serve_fetch(
    node: &Arc<Node>,
    call: &mut Call,
    name: &str,
    runs: Vec<Run>,
    peer: &Owner,
) -> Result<Outcome, TransferError> {
    let from = node.store.tensor(name, peer)?.lease;
    let room = node.store_room(MemoryKind::Host, peer);
    let cut = tokio::task::spawn_blocking(move || part::cut(&from, &runs, &room)).await;
    let pieces = cut.map_err(|_| TransferError::Stopping)??;
    let mut outcome = send(call, &pieces.infos, pieces.leases, None).await?;
    outcome.copies.genie += pieces.copied;
    Ok(outcome)
}

/// Says what there is and sends it.
async fn send(
    call: &mut Call,
    infos: &[TensorInfo],
    leases: Vec<Place>,
    metadata: Option<Metadata>,
) -> Result<Outcome, TransferError> {
    call.send(Message::Found {
        id: call.id(),
        count: infos.len() as u64,
        metadata,
    })
    .await?;
    send_list(call, infos).await?;
    let (tally, _) = send_all(call, leases, &Progress::default(), false).await?;
    Ok(tally.outcome(infos))
}
