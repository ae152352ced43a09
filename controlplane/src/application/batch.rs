//! Batches of ranges: requests that run beside the others of a connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use genie_client::protocol::{Answer, BATCHES_MAX, Direction, Failure, Ranges};
use genie_client::{Moved, Owner};
use genie_dataplane::stage::Place;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::memory::Arenas;
use super::{MemoryError, late, remote};
use crate::budget::AllocateError;
use crate::message::Runs;
use crate::metrics;
use crate::node::Node;
use crate::quota::User;
use crate::transfer::{self, Progress, TransferError, ranges};

/// The batches of one connection. Dropping them gives all up.
#[derive(Debug, Default)]
pub(super) struct Batches {
    running: JoinSet<(u64, Result<Moved, TransferError>)>,
    stops: HashMap<u64, oneshot::Sender<()>>,
}

/// What a piece takes while a batch is under way, about.
const PIECE_BYTES: u64 = 512;

impl Batches {
    /// Begins a batch; its end comes out of [`Batches::next`], after `deadline`
    /// at the latest.
    pub(super) fn begin(
        &mut self,
        node: &Arc<Node>,
        user: &User,
        arenas: &Arenas,
        request: u64,
        batch: Ranges,
        deadline: Option<Duration>,
    ) -> Result<(), MemoryError> {
        if self.stops.len() >= BATCHES_MAX {
            return Err(MemoryError::Batches);
        }
        let direction = batch.direction;
        let (runs, places) = places(arenas, &batch)?;
        let pieces = places.len() as u64;
        let charge = user.bytes(pieces * PIECE_BYTES);
        let charge = charge.map_err(|error| TransferError::from(AllocateError::from(error)))?;
        let (node, owner) = (Arc::clone(node), Owner::User(user.uid()));
        let (stop, stopped) = oneshot::channel::<()>();
        self.stops.insert(request, stop);
        self.running.spawn(async move {
            let _charge = charge;
            let progress = Progress::default();
            let moved = {
                let (peer, note) = (remote(&node, batch.node), batch.note);
                let run = run(&node, peer, direction, runs, places, note, owner, &progress);
                tokio::select! {
                    moved = run => moved,
                    // Stopped, not merely dropped: that is the connection's end.
                    Ok(()) = stopped => Err(TransferError::Cancelled),
                    limit = late(deadline) => Err(TransferError::Deadline(limit)),
                }
            };
            // The program may use its memory for something else once it knows.
            progress.landed().await;
            (request, moved)
        });
        Ok(())
    }

    /// Cancels a batch, if it is still under way.
    pub(super) fn cancel(&mut self, request: u64) {
        if let Some(stop) = self.stops.remove(&request) {
            // It has just ended by itself, if nobody is there to be told.
            let _ = stop.send(());
        }
    }

    /// The next batch that ends; never, while there is none.
    pub(super) async fn next(&mut self) -> Answer {
        let (request, result) = loop {
            match self.running.join_next().await {
                Some(Ok(ended)) => break ended,
                Some(Err(error)) => tracing::error!("a batch panicked: {error}"),
                None => std::future::pending().await,
            }
        };
        self.stops.remove(&request);
        let result = result.map_err(|error| Failure {
            kind: transfer::kind_of(&error),
            message: error.to_string(),
        });
        Answer::Completed { request, result }
    }
}

/// What a failure to begin is answered with.
pub(super) fn refused(request: u64, error: &MemoryError) -> Answer {
    let result = Err(Failure {
        kind: error.kind(),
        message: error.to_string(),
    });
    Answer::Completed { request, result }
}

/// The pieces of a batch in the program's memory, which is checked to be its own.
fn places(arenas: &Arenas, batch: &Ranges) -> Result<(Runs, Vec<Place>), MemoryError> {
    let targets = batch.targets.clone();
    let ranges = batch.ranges.iter();
    let runs = ranges.map(|range| (range.target, range.run)).collect();
    let runs = Runs { targets, runs };
    let pieces = ranges::check(&runs, batch.note.as_ref())?;
    let mut places = Vec::with_capacity(pieces as usize);
    for range in &batch.ranges {
        let outside = || MemoryError::OutsideArena(range.arena);
        let len = range.run.total().ok_or_else(outside)?;
        let all = arenas.place(range.arena, range.offset, len, batch.direction)?;
        for index in 0..range.run.count {
            let at = index * range.run.len;
            let piece = all.slice(at..at + range.run.len);
            places.push(piece.map_err(|_| outside())?);
        }
    }
    let local = batch.ranges.iter().map(|range| {
        let len = range.run.total().unwrap_or(u64::MAX);
        (range.arena.0, range.offset, len)
    });
    if batch.direction == Direction::Read && genie_client::slice::overlap(local) {
        return Err(TransferError::from(genie_client::SliceError::Overlap).into());
    }
    Ok((runs, places))
}

#[allow(clippy::too_many_arguments, reason = "the parts of one request")]
async fn run(
    node: &Arc<Node>,
    peer: Option<String>,
    direction: Direction,
    runs: Runs,
    places: Vec<Place>,
    note: Option<genie_client::protocol::Note>,
    owner: Owner,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let _busy = node.begin().ok_or(TransferError::Stopping)?;
    let _room = node.batch_room(peer.as_deref()).await;
    let Some(peer) = peer else {
        return run_here(node, direction, runs, places, note, owner, progress).await;
    };
    let session = node.session(&peer).await?;
    let moved = ranges::with_peer(&session, direction, runs, places, note, progress).await?;
    let way = match direction {
        Direction::Read => metrics::Direction::Received,
        Direction::Write => metrics::Direction::Sent,
    };
    node.counters.dialled(&peer, way, &moved);
    Ok(moved)
}

async fn run_here(
    node: &Arc<Node>,
    direction: Direction,
    runs: Runs,
    places: Vec<Place>,
    note: Option<genie_client::protocol::Note>,
    owner: Owner,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let _given_up = progress.give_up_on_drop();
    let (node, progress) = (Arc::clone(node), progress.clone());
    let landing = progress.landing();
    let copy = move || {
        let _landing = landing;
        let note = note.as_ref();
        ranges::here(&node, direction, &runs, &places, note, &owner, &progress)
    };
    let copied = tokio::task::spawn_blocking(copy).await;
    copied.unwrap_or(Err(TransferError::Stopping))
}
