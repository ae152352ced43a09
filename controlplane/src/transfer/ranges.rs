//! Ranges read from and written into windows: one transfer for every piece.
//!
//! Both ends know from the request what will move, so the receiver grants at
//! once. Bytes go from where they lie to where they belong: into the program's
//! arena, or out of it, and into the window, or out of it.

use std::sync::Arc;
use std::time::Instant;

use genie_client::protocol::{Direction, Note};
use genie_client::slice::{self, Run, SliceError};
use genie_client::{Moved, Owner};
use genie_dataplane::memory::accelerator::MemoryKind;
use genie_dataplane::stage::Place;

use super::batch::{Tally, receive_all, send_all};
use super::{Progress, TransferError, Way, done, finish, local, part};
use crate::budget::Charge;
use crate::message::{Outcome, Request, Runs};
use crate::node::Node;
use crate::notifications::check_message;
use crate::session::{Call, Session};
use crate::store::{Target, Using, removed};
use crate::tensor::{TensorInfo, check_name};

/// What a piece takes beside its bytes: a place, a description, a transfer.
const PIECE_BYTES: u64 = 512;

/// Checks what can be checked without the targets; returns how many pieces.
pub fn check(runs: &Runs, note: Option<&Note>) -> Result<u64, TransferError> {
    if runs.targets.len() > slice::RUNS_MAX {
        return Err(SliceError::TooMany.into());
    }
    runs.targets.iter().try_for_each(|name| check_name(name))?;
    let targets = runs.runs.iter().map(|(target, _)| target);
    for target in targets.chain(note.map(|note| &note.target)) {
        if *target as usize >= runs.targets.len() {
            return Err(TransferError::NoTarget(*target));
        }
    }
    if let Some(note) = note {
        check_message(&note.message)?;
    }
    Ok(slice::check_pieces(runs.runs.iter().map(|(_, run)| run))?)
}

/// What the names in a request stand for, and the bytes of it that are meant.
#[derive(Debug)]
struct Resolved {
    places: Vec<Place>,
    using: Vec<Using>,
    owners: Vec<Owner>,
    _charge: Charge,
}

/// Finds windows and tensors of this node's.
fn resolve(
    node: &Node,
    direction: Direction,
    runs: &Runs,
    actor: &Owner,
) -> Result<Resolved, TransferError> {
    let pieces = check(runs, None)?;
    let room = node.store_room(MemoryKind::Host, actor);
    let charge = room.charge(pieces * PIECE_BYTES)?;
    let find = |name: &String| match direction {
        Direction::Read => node.store.readable(name, actor),
        Direction::Write => node.store.window(name, actor),
    };
    let targets: Vec<Target> = runs.targets.iter().map(find).collect::<Result<_, _>>()?;
    let mut places = Vec::with_capacity(pieces as usize);
    for (target, run) in &runs.runs {
        cut(&targets[*target as usize].place, run, &mut places)?;
    }
    if direction == Direction::Write && written_twice(runs) {
        return Err(SliceError::Overlap.into());
    }
    Ok(Resolved {
        places,
        using: targets.iter().filter_map(Target::using).collect(),
        owners: targets.into_iter().map(|target| target.owner).collect(),
        _charge: charge,
    })
}

/// The pieces of a run.
pub fn cut(of: &Place, run: &Run, places: &mut Vec<Place>) -> Result<(), SliceError> {
    let len = of.len() as u64;
    if !run.is_inside(len) {
        return Err(SliceError::Outside { len });
    }
    let piece = |at| of.slice(at..at + run.len).expect("the run lies inside");
    places.extend(run.pieces().map(piece));
    Ok(())
}

fn written_twice(runs: &Runs) -> bool {
    // Two names of one window would be one target; a repeated name is found by it.
    let target = |index: u32| runs.targets[index as usize].as_str();
    let pieces = runs.runs.iter().flat_map(|(index, run)| {
        let (place, len) = (target(*index), run.len);
        run.pieces().map(move |at| (place, at, len))
    });
    slice::overlap(pieces)
}

fn infos(places: &[Place]) -> Vec<TensorInfo> {
    let info = |(index, place): (usize, &Place)| part::piece(index, place.len() as u64);
    places.iter().enumerate().map(info).collect()
}

/// Moves ranges between `places` and a peer's windows or tensors, piece by piece.
pub async fn with_peer(
    session: &Arc<Session>,
    direction: Direction,
    runs: Runs,
    places: Vec<Place>,
    note: Option<Note>,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let began = Instant::now();
    let infos = infos(&places);
    progress.begin(places.iter().map(|place| place.len() as u64).sum());
    let (request, way) = match direction {
        Direction::Read => (Request::Read(runs), Way::In),
        Direction::Write => (Request::Write { runs, note }, Way::Out),
    };
    let mut call = session.call(request).await?;
    let (tally, early) = match direction {
        Direction::Read => receive_all(&mut call, places, progress, true).await?,
        Direction::Write => send_all(&mut call, places, progress, true).await?,
    };
    let theirs = match early {
        Some(outcome) => outcome,
        None => done(&mut call).await?,
    };
    call.finish();
    finish(session, tally.outcome(&infos), theirs, way, began)
}

/// Moves ranges between `places` and this node's own windows or tensors: one copy.
/// Blocks.
pub fn here(
    node: &Node,
    direction: Direction,
    runs: &Runs,
    places: &[Place],
    note: Option<&Note>,
    actor: &Owner,
    progress: &Progress,
) -> Result<Moved, TransferError> {
    let began = Instant::now();
    let resolved = resolve(node, direction, runs, actor)?;
    progress.begin(places.iter().map(|place| place.len() as u64).sum());
    let infos = infos(places);
    let theirs = &resolved.places;
    let (from, to) = match direction {
        Direction::Read => (&theirs[..], places),
        Direction::Write => (places, &theirs[..]),
    };
    let mut moved = local::copy_all(&infos, from.iter(), to, progress, began)?;
    moved.listeners = tell(node, runs, &resolved, note, actor)?;
    Ok(moved)
}

/// Sends what a peer reads.
pub(super) async fn serve_read(
    node: &Node,
    call: &mut Call,
    runs: &Runs,
    peer: &Owner,
) -> Result<Outcome, TransferError> {
    let resolved = resolve(node, Direction::Read, runs, peer)?;
    let infos = infos(&resolved.places);
    let progress = Progress::holding(resolved.using.clone());
    let tally = tokio::select! {
        sent = send_all(call, resolved.places, &progress, false) => sent?.0,
        removed = removed(&resolved.using) => return Err(removed.into()),
    };
    Ok(tally.outcome(&infos))
}

/// Takes what a peer writes, and tells those who listen.
pub(super) async fn serve_write(
    node: &Node,
    call: &mut Call,
    runs: &Runs,
    note: Option<&Note>,
    peer: &Owner,
) -> Result<Outcome, TransferError> {
    check(runs, note)?;
    let mut resolved = resolve(node, Direction::Write, runs, peer)?;
    let places = std::mem::take(&mut resolved.places);
    let infos = infos(&places);
    // Whatever is still on its way when this is given up keeps the windows in use.
    let progress = Progress::holding(resolved.using.clone());
    let tally: Tally = tokio::select! {
        received = receive_all(call, places, &progress, false) => received?.0,
        removed = removed(&resolved.using) => return Err(removed.into()),
    };
    let listeners = tell(node, runs, &resolved, note, peer)?;
    Ok(Outcome {
        listeners,
        ..tally.outcome(&infos)
    })
}

/// Tells those who listen, unless the windows were removed meanwhile.
fn tell(
    node: &Node,
    runs: &Runs,
    resolved: &Resolved,
    note: Option<&Note>,
    from: &Owner,
) -> Result<u64, TransferError> {
    resolved.using.iter().try_for_each(Using::check)?;
    let Some(note) = note else {
        return Ok(0);
    };
    let target = note.target as usize;
    let (name, owner) = (&runs.targets[target], &resolved.owners[target]);
    Ok(node.notifications.tell(name, &note.message, from, owner))
}
