//! Put and get within one agent: one copy, so that what was verified stays as it is.

use std::time::Instant;

use genie_client::slice::{self, Run};
use genie_client::{Moved, Owner};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::Lease;

use super::batch::batch_digest;
use super::{Arrived, Progress, Source, TransferError, lay_out, moved, part};
use crate::budget::Room;
use crate::message::Outcome;
use crate::store::{Store, description_bytes};
use crate::tensor::{Metadata, TensorInfo, check_batch};

/// Copied at a time, so that progress shows and a stop is noticed.
const CHUNK: u64 = 8 << 20;

/// Copies a batch into the store. Blocks.
pub fn keep(
    store: &Store,
    prefix: &str,
    sources: &[Source],
    metadata: Option<Metadata>,
    owner: &Owner,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let began = Instant::now();
    let infos: Vec<TensorInfo> = sources.iter().map(|source| source.info.clone()).collect();
    let bytes = check_batch(prefix, &infos, metadata.as_ref())?;
    progress.begin(bytes);
    store.check(prefix, &infos, owner)?;
    let described = description_bytes(prefix, &infos, metadata.as_ref(), owner);
    let charge = store.budget().charge(described)?;
    let allocation = store.budget().room().allocate(bytes)?;
    let leases = lay_out(&allocation, &infos)?;
    let from = sources.iter().map(|source| &source.lease);
    let moved = copy_all(&infos, from, &leases, progress, began)?;
    let stored = infos.into_iter().zip(leases).collect();
    store.commit(prefix, stored, metadata, owner, charge)?;
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
    part::gather(&from, runs, &into);
    progress.add(bytes);
    let tensors = vec![part::piece(0, bytes)];
    let digests = [(bytes, into.crc32c(0..bytes as usize))];
    let moved = local_moved(&tensors, &digests, began);
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
fn copy_all<'a>(
    infos: &[TensorInfo],
    from: impl Iterator<Item = &'a Lease>,
    to: &[Lease],
    progress: &Progress,
    began: Instant,
) -> Result<Moved, TransferError> {
    let mut digests = Vec::with_capacity(to.len());
    for (from, to) in from.zip(to) {
        digests.push((to.len() as u64, copy(from, to, progress)?));
    }
    progress.check()?;
    Ok(local_moved(infos, &digests, began))
}

/// One copy of every byte, at the one end that there is.
fn local_moved(infos: &[TensorInfo], digests: &[(u64, u32)], began: Instant) -> Moved {
    let bytes = digests.iter().map(|(len, _)| len).sum();
    let outcome = Outcome {
        tensors: infos.len() as u64,
        bytes,
        retransmits: 0,
        copies: Copies {
            genie: bytes,
            ..Copies::default()
        },
        digest: batch_digest(infos, digests),
    };
    let path = "local".to_owned();
    moved(Outcome::default(), outcome, path, Vec::new(), began)
}

/// Copies one tensor; returns the CRC32C of what was written.
fn copy(from: &Lease, to: &Lease, progress: &Progress) -> Result<u32, TransferError> {
    let len = to.len() as u64;
    let mut digest = genie_proto::DigestBuilder::new(len);
    let mut done = 0;
    while done < len {
        progress.check()?;
        let part = CHUNK.min(len - done);
        let range = done as usize..(done + part) as usize;
        let view = from
            .view(range)
            .expect("source and destination have the same length");
        digest.add(done, part, to.place(done as usize, view));
        progress.add(part);
        done += part;
    }
    Ok(digest.finish().0)
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
            super::keep(&store, "m", &sources, None, &owner, progress)
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
