//! Parts of a stored tensor, on their way out.
//!
//! Long pieces leave as they lie, each as a transfer of its own. Short ones are
//! gathered first, which is a copy that the ledger shows: a transfer has a cost
//! of its own, and a packet per row of a narrow column would be a waste.

use genie_client::slice::{self, Run};
use genie_dataplane::memory::Lease;
use genie_dataplane::stage::Place;
use tokio::runtime::Handle;

use super::TransferError;
use crate::budget::Room;
use crate::tensor::{Dtype, TensorInfo};

/// The prefix that the parts of a tensor are checked under.
pub(super) const PREFIX: &str = "part";

/// Pieces of at least this many bytes are sent as they lie: some eight jumbo
/// frames, beyond which the cost of a transfer of its own no longer shows.
const DIRECT_MIN: u64 = 64 << 10;

/// What is sent of a tensor, and how many bytes were copied to send it.
pub(super) struct Pieces {
    pub(super) infos: Vec<TensorInfo>,
    pub(super) leases: Vec<Place>,
    pub(super) copied: u64,
}

/// Cuts the runs out of a tensor; gathers short ones into memory from `room`. Blocks.
///
/// A device's tensor whose short pieces are wanted is first copied to the host, whole.
pub(super) fn cut(from: &Place, runs: &[Run], room: &Room) -> Result<Pieces, TransferError> {
    slice::check_runs(runs, from.len() as u64)?;
    let short = |run: &&Run| run.count > 1 && run.len < DIRECT_MIN;
    let copied: u64 = runs.iter().filter(short).filter_map(Run::total).sum();
    let (gathered, host, downloaded) = match copied {
        0 => (None, None, 0),
        bytes => {
            let (host, downloaded) = host(from, room)?;
            let into = room.on_host().allocate(bytes)?.lease(0, bytes);
            let into = into.host().expect("made on the host").clone();
            (Some(into), Some(host), downloaded)
        }
    };
    let copied = copied + downloaded;
    let mut pieces = Pieces {
        infos: Vec::new(),
        leases: Vec::new(),
        copied,
    };
    let mut used = 0;
    for run in runs {
        match (&gathered, &host) {
            (Some(memory), Some(from)) if short(&run) => {
                let len = run.len * run.count;
                let into = memory.slice(used..used + len).expect("made for all");
                gather(from, std::slice::from_ref(run), &into);
                used += len;
                pieces.push(into.into());
            }
            _ => {
                let part = |at| from.slice(at..at + run.len).expect("the runs were checked");
                run.pieces().for_each(|at| pieces.push(part(at)));
            }
        }
    }
    Ok(pieces)
}

impl Pieces {
    fn push(&mut self, lease: Place) {
        self.infos.push(piece(self.infos.len(), lease.len() as u64));
        self.leases.push(lease);
    }
}

/// The bytes of a tensor in host memory, and how many were copied to have them. Blocks.
pub(super) fn host(from: &Place, room: &Room) -> Result<(Lease, u64), TransferError> {
    match from {
        Place::Host(lease) => Ok((lease.clone(), 0)),
        Place::Device(stage, lease) => {
            let bytes = lease.len() as u64;
            let host = room.on_host().allocate(bytes)?.lease(0, bytes);
            let host = host.host().expect("made on the host").clone();
            Handle::current().block_on(stage.download(lease, &host))?;
            Ok((host, bytes))
        }
    }
}

/// How the piece of this number is described on its way.
pub(super) fn piece(index: usize, len: u64) -> TensorInfo {
    TensorInfo {
        // In order by name, as the digest of a batch goes.
        name: format!("{index:08}"),
        dtype: Dtype::U8,
        shape: vec![len],
    }
}

/// Copies the runs, which were checked, one after the other into `into`.
pub(super) fn gather(from: &Lease, runs: &[Run], into: &Lease) {
    let mut done = 0;
    for run in runs {
        let len = run.len as usize;
        for at in run.pieces() {
            let at = at as usize;
            let piece = from.view(at..at + len).expect("the runs were checked");
            into.write_at(done, piece);
            done += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use genie_dataplane::memory::{Backing, Region};

    #[test]
    fn short_pieces_are_gathered_and_long_ones_left_where_they_are() {
        let region = Region::with_backing(1 << 20, Backing::Shmem).unwrap();
        let from = Lease::whole(region);
        for row in 0..4u8 {
            from.write_at(row as usize * 100, (&[row; 3][..]).into());
        }
        let column = Run {
            offset: 0,
            len: 3,
            stride: 100,
            count: 4,
        };
        let rows = Run {
            offset: 1000,
            len: DIRECT_MIN,
            stride: 2 * DIRECT_MIN,
            count: 3,
        };
        let budget = Budget::new("test", "--test", 1 << 20);
        let place = Place::from(from.clone());
        let pieces = cut(&place, &[rows, column, Run::bytes(7, 1)], &budget.room()).unwrap();
        let lengths: Vec<_> = pieces.leases.iter().map(Place::len).collect();
        assert_eq!(lengths, [65536, 65536, 65536, 12, 1]);
        assert_eq!(pieces.copied, 12);
        let mut bytes = [9; 12];
        let host = |at: usize| pieces.leases[at].host().unwrap();
        host(3).read_at(0, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(
            host(1).as_ptr(),
            from.slice(1000 + 131072..(1 << 20)).unwrap().as_ptr()
        );
        drop(pieces);
        assert_eq!(budget.usage().used_bytes, 0);
        assert!(cut(&place, &[Run::bytes(1 << 20, 1)], &budget.room()).is_err());
    }
}
