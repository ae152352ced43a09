//! Parts of a stored tensor, on their way out.
//!
//! Long pieces leave as they lie, each as a transfer of its own. Short ones are
//! gathered first, which is a copy that the ledger shows: a transfer has a cost
//! of its own, and a packet per row of a narrow column would be a waste.

use genie_client::slice::{self, Run};
use genie_dataplane::memory::Lease;

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
    pub(super) leases: Vec<Lease>,
    pub(super) copied: u64,
}

/// Cuts the runs out of a tensor; gathers short ones into memory from `room`. Blocks.
pub(super) fn cut(from: &Lease, runs: &[Run], room: &Room) -> Result<Pieces, TransferError> {
    slice::check_runs(runs, from.len() as u64)?;
    let short = |run: &&Run| run.count > 1 && run.len < DIRECT_MIN;
    let copied = runs.iter().filter(short).filter_map(Run::total).sum();
    let gathered = match copied {
        0 => None,
        bytes => Some(room.allocate(bytes)?),
    };
    let mut pieces = Pieces {
        infos: Vec::new(),
        leases: Vec::new(),
        copied,
    };
    let mut used = 0;
    for run in runs {
        match &gathered {
            Some(memory) if short(&run) => {
                let len = run.len * run.count;
                let into = memory.lease(used, len);
                gather(from, std::slice::from_ref(run), &into);
                used += len;
                pieces.push(into);
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
    fn push(&mut self, lease: Lease) {
        self.infos.push(piece(self.infos.len(), lease.len() as u64));
        self.leases.push(lease);
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
        let pieces = cut(&from, &[rows, column, Run::bytes(7, 1)], &budget.room()).unwrap();
        let lengths: Vec<_> = pieces.leases.iter().map(Lease::len).collect();
        assert_eq!(lengths, [65536, 65536, 65536, 12, 1]);
        assert_eq!(pieces.copied, 12);
        let mut bytes = [9; 12];
        pieces.leases[3].read_at(0, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(
            pieces.leases[1].as_ptr(),
            from.slice(1000 + 131072..(1 << 20)).unwrap().as_ptr()
        );
        drop(pieces);
        assert_eq!(budget.usage().used_bytes, 0);
        assert!(cut(&from, &[Run::bytes(1 << 20, 1)], &budget.room()).is_err());
    }
}
