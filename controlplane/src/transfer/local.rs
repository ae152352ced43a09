//! Put and get within one agent: one copy, so that what was verified stays as it is.

use std::sync::Arc;
use std::time::Instant;

use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::Lease;

use super::batch::batch_digest;
use super::{Arrived, Moved, Progress, Source, TransferError, lay_out};
use crate::message::Outcome;
use crate::store::{Budget, Owner, Store, Stored};
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
    store.check(prefix, &infos)?;
    let allocation = store.budget().allocate(bytes)?;
    let leases = lay_out(&allocation, &infos)?;
    let from = sources.iter().map(|source| &source.lease);
    let moved = copy_all(&infos, from, &leases, progress, began);
    let stored = |(info, lease): (TensorInfo, Lease)| Stored {
        info,
        lease,
        allocation: Arc::clone(&allocation),
        owner: owner.clone(),
    };
    store.commit(
        prefix,
        infos.into_iter().zip(leases).map(stored).collect(),
        metadata,
    )?;
    Ok(moved)
}

/// Copies what the store holds under `prefix` into memory from `budget`. Blocks.
pub fn fetch(
    store: &Store,
    prefix: &str,
    budget: &Budget,
    progress: &Progress,
) -> Result<(Arrived, Moved), TransferError> {
    let began = Instant::now();
    let (stored, metadata) = store.fetch(prefix)?;
    let tensors: Vec<TensorInfo> = stored.iter().map(|tensor| tensor.info.clone()).collect();
    let bytes = check_batch(prefix, &tensors, metadata.as_ref())?;
    progress.begin(bytes);
    let allocation = budget.allocate(bytes)?;
    let leases = lay_out(&allocation, &tensors)?;
    let from = stored.iter().map(|tensor| &tensor.lease);
    let moved = copy_all(&tensors, from, &leases, progress, began);
    Ok((
        Arrived {
            tensors,
            metadata,
            allocation,
        },
        moved,
    ))
}

fn copy_all<'a>(
    infos: &[TensorInfo],
    from: impl Iterator<Item = &'a Lease>,
    to: &[Lease],
    progress: &Progress,
    began: Instant,
) -> Moved {
    let digests: Vec<(u64, u32)> = from
        .zip(to)
        .map(|(from, to)| (to.len() as u64, copy(from, to, progress)))
        .collect();
    let bytes = digests.iter().map(|(len, _)| len).sum();
    let outcome = Outcome {
        tensors: infos.len() as u64,
        bytes,
        retransmits: 0,
        copies: Copies {
            genie: bytes,
            ..Copies::default()
        },
        digest: batch_digest(infos, &digests),
    };
    Moved::new(outcome, "local".to_owned(), Vec::new(), began)
}

/// Copies one tensor; returns the CRC32C of what was written.
fn copy(from: &Lease, to: &Lease, progress: &Progress) -> u32 {
    let len = to.len() as u64;
    let mut digest = genie_proto::DigestBuilder::new(len);
    let mut done = 0;
    while done < len {
        let part = CHUNK.min(len - done);
        let range = done as usize..(done + part) as usize;
        let view = from
            .view(range)
            .expect("source and destination have the same length");
        digest.add(done, part, to.place(done as usize, view));
        progress.add(part);
        done += part;
    }
    digest.finish().0
}
