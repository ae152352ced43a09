//! Put and get within one agent: one copy, so that what was verified stays as it is.

use std::time::Instant;

use genie_client::slice::{self, Run};
use genie_client::{Moved, Owner};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::stage::Place;
use tokio::runtime::Handle;

use super::batch::batch_digest;
use super::{Arrived, Progress, Source, TransferError, lay_out, moved, part};
use crate::budget::{AllocateError, Room};
use crate::message::Outcome;
use crate::store::{Store, description_bytes};
use crate::tensor::{Metadata, TensorInfo, check_batch};

/// Copied at a time, so that progress shows and a stop is noticed.
const CHUNK: u64 = 8 << 20;

/// Copies a batch into the store, into memory from `room`. Blocks.
pub fn keep(
    store: &Store,
    prefix: &str,
    sources: &[Source],
    metadata: Option<Metadata>,
    owner: &Owner,
    room: &Room,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let began = Instant::now();
    let infos: Vec<TensorInfo> = sources.iter().map(|source| source.info.clone()).collect();
    let bytes = check_batch(prefix, &infos, metadata.as_ref())?;
    progress.begin(bytes);
    store.check(prefix, &infos, owner)?;
    let described = description_bytes(prefix, &infos, metadata.as_ref(), owner);
    let charge = store.budget().charge(described)?;
    let allocation = room.allocate(bytes)?;
    let leases = lay_out(&allocation, &infos)?;
    let from = sources.iter().map(|source| &source.lease);
    let moved = copy_all(&infos, from, &leases, progress, began)?;
    let stored = infos.into_iter().zip(leases).collect();
    // Blocking is allowed here.
    drop(store.commit(prefix, stored, metadata, owner, charge)?);
    Ok(moved)
}

/// Copies what the store holds under `prefix` into memory from `room`. Blocks.
pub fn fetch(
    store: &Store,
    prefix: &str,
    reader: &Owner,
    room: &Room,
    progress: &Progress,
) -> Result<(Arrived, Moved), TransferError> {
    let began = Instant::now();
    let (stored, metadata) = store.fetch(prefix, reader)?;
    let tensors: Vec<TensorInfo> = stored.iter().map(|tensor| tensor.info.clone()).collect();
    let bytes = check_batch(prefix, &tensors, metadata.as_ref())?;
    progress.begin(bytes);
    let allocation = room.allocate(bytes)?;
    let leases = lay_out(&allocation, &tensors)?;
    let from = stored.iter().map(|tensor| &tensor.lease);
    let moved = copy_all(&tensors, from, &leases, progress, began)?;
    Ok((
        Arrived {
            tensors,
            metadata,
            allocation,
        },
        moved,
    ))
}

/// Copies a part of a stored tensor into memory from `room`. Blocks.
pub fn part(
    store: &Store,
    name: &str,
    runs: &[Run],
    reader: &Owner,
    room: &Room,
    progress: &Progress,
) -> Result<(Arrived, Moved), TransferError> {
    let began = Instant::now();
    let from = store.tensor(name, reader)?.lease;
    let bytes = slice::check_runs(runs, from.len() as u64)?;
    progress.begin(bytes);
    let allocation = room.allocate(bytes)?;
    let into = allocation.lease(0, bytes);
    let host = match into.host() {
        Some(into) => into.clone(),
        None => on_host(bytes, room)?,
    };
    let (from, copied) = part::host(&from, room)?;
    part::gather(&from, runs, &host);
    let tensors = vec![part::piece(0, bytes)];
    let copied = copied + bytes;
    let (crc, copied) = match &into {
        Place::Host(_) => {
            progress.add(bytes);
            (host.crc32c(0..bytes as usize), copied)
        }
        Place::Device(..) => (copy(&host.into(), &into, progress)?, copied + bytes),
    };
    let moved = local_moved(&tensors, &[(bytes, crc)], copied, began);
    Ok((
        Arrived {
            tensors,
            metadata: None,
            allocation,
        },
        moved,
    ))
}

/// Copies all tensors, unless they are given up meanwhile.
pub(super) fn copy_all<'a>(
    infos: &[TensorInfo],
    from: impl Iterator<Item = &'a Place>,
    to: &[Place],
    progress: &Progress,
    began: Instant,
) -> Result<Moved, TransferError> {
    let mut digests = Vec::with_capacity(to.len());
    let mut copied = 0;
    for (from, to) in from.zip(to) {
        let len = to.len() as u64;
        digests.push((len, copy(from, to, progress)?));
        // From one slot to another where both are a device's.
        let both = from.host().is_none() && to.host().is_none();
        copied += if both { 2 * len } else { len };
    }
    progress.check()?;
    Ok(local_moved(infos, &digests, copied, began))
}

/// `copied` bytes were copied at the one end that there is.
fn local_moved(infos: &[TensorInfo], digests: &[(u64, u32)], copied: u64, began: Instant) -> Moved {
    let bytes = digests.iter().map(|(len, _)| len).sum();
    let outcome = Outcome {
        tensors: infos.len() as u64,
        bytes,
        retransmits: 0,
        copies: Copies {
            genie: copied,
            ..Copies::default()
        },
        digest: batch_digest(infos, digests),
        listeners: 0,
    };
    let path = "local".to_owned();
    moved(Outcome::default(), outcome, path, Vec::new(), began)
}

/// Copies one tensor; returns the CRC32C of what was written.
fn copy(from: &Place, to: &Place, progress: &Progress) -> Result<u32, TransferError> {
    let len = to.len() as u64;
    let mut digest = genie_proto::DigestBuilder::new(len);
    let mut done = 0;
    while done < len {
        progress.check()?;
        let part = CHUNK.min(len - done);
        let range = done..done + part;
        let cut = |place: &Place| place.slice(range.clone()).expect("both are as long");
        digest.add(done, part, copy_part(&cut(from), &cut(to))?);
        progress.add(part);
        done += part;
    }
    Ok(digest.finish().0)
}

/// Copies at most [`CHUNK`] bytes; a device's go through its slots.
fn copy_part(from: &Place, to: &Place) -> Result<u32, TransferError> {
    match (from, to) {
        (Place::Host(from), Place::Host(to)) => {
            let view = from.view(0..to.len()).expect("both are as long");
            Ok(to.place(0, view))
        }
        (Place::Host(from), Place::Device(stage, to)) => {
            Ok(Handle::current().block_on(stage.upload(from, to))?)
        }
        (Place::Device(stage, from), Place::Host(to)) => {
            Ok(Handle::current().block_on(stage.download(from, to))?)
        }
        (Place::Device(stage, device), Place::Device(into, to)) => {
            let host = Region::with_backing(device.len().max(1), Backing::Shmem);
            let host = Lease::whole(host.map_err(|source| AllocateError::Memory {
                wanted: device.len() as u64,
                source,
            })?);
            let host = host.slice(0..device.len() as u64).expect("made as long");
            let through = async {
                stage.download(device, &host).await?;
                into.upload(&host, to).await
            };
            Ok(Handle::current().block_on(through)?)
        }
    }
}

/// Host memory of `bytes` beside what `room` is for.
fn on_host(bytes: u64, room: &Room) -> Result<Lease, TransferError> {
    let place = room.on_host().allocate(bytes)?.lease(0, bytes);
    Ok(place.host().expect("made on the host").clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::tensor::Dtype;

    #[test]
    fn what_is_given_up_is_not_stored() {
        let store = Store::new(1 << 20);
        let from = Budget::new("test", "--test", 1 << 20).room().allocate(1000);
        let info = TensorInfo {
            name: "a".into(),
            dtype: Dtype::U8,
            shape: vec![1000],
        };
        let lease = from.unwrap().lease(0, 1000);
        let sources = [Source { info, lease }];
        let keep = |progress: &Progress| {
            let owner = Owner::User(0);
            let room = store.budget().room();
            super::keep(&store, "m", &sources, None, &owner, &room, progress)
        };
        let progress = Progress::default();
        drop(progress.give_up_on_drop());
        assert!(matches!(keep(&progress), Err(TransferError::GivenUp)));
        assert_eq!(store.usage().used_bytes, 0);
        assert!(store.list(None, &Owner::User(0)).is_empty());

        assert_eq!(keep(&Progress::default()).unwrap().bytes, 1000);
        let (room, owner) = (store.budget().room(), Owner::User(0));
        assert!(matches!(
            fetch(&store, "m", &owner, &room, &progress),
            Err(TransferError::GivenUp)
        ));
    }
}
