//! What has moved of a transfer whose path was lost, so that another goes on.
//!
//! An engine hands it back with the failure ([`super::Completion::Interrupted`])
//! once it holds no lease for the transfer any more and no frame can reach its
//! memory; whoever owns the session hands it to the next engine with the same
//! lease. The invariant is that of [`genie_proto::Incoming`]: what is marked
//! was verified and is not written again. A tensor that one frame carried whole
//! may be finished at the receiver while the sender is interrupted: what the
//! receiver does not ask for then is there.

#![forbid(unsafe_code)]

use std::ops::Range;

use genie_proto::transfer::{BadRange, GRANULE};
use genie_proto::{Incoming, Outgoing};

use crate::ledger::Copies;
use crate::memory::Lease;

/// What has moved of a transfer over all its paths so far.
#[derive(Debug)]
pub struct Partial<T> {
    /// Which bytes.
    pub moved: T,
    /// What it took.
    pub cost: Cost,
}

/// What moving some bytes of a transfer took at this end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Segments sent more than once.
    pub retransmits: u64,
    /// Bytes that CPUs copied.
    pub copies: Copies,
}

/// The end of a transfer that was interrupted, either way.
#[derive(Debug)]
pub enum Interrupted {
    /// We receive it.
    Incoming(Partial<Incoming>),
    /// We send it.
    Outgoing(Partial<Outgoing>),
}

impl Partial<Incoming> {
    /// Gets ready to go on over another path: what the sender shall be asked for,
    /// at most `ranges_max` ranges, and at least one of a transfer with bytes.
    ///
    /// The sender confirms a transfer on the path that carries its last byte, so
    /// one that is complete and was not confirmed takes its last bytes back; and
    /// beyond `ranges_max` gaps everything is fetched again. `into` is where it
    /// was received.
    pub fn prepare(&mut self, into: &Lease, ranges_max: usize) -> Vec<Range<u64>> {
        let len = self.moved.len();
        if self.moved.is_complete() && len > 0 {
            self.retract(into, (len - 1) / GRANULE * GRANULE);
        }
        let mut missing: Vec<_> = self.moved.missing().take(ranges_max + 1).collect();
        if missing.len() > ranges_max {
            missing.truncate(ranges_max);
            if let Some(last) = missing.last_mut() {
                self.retract(into, last.start);
                last.end = len;
            }
        }
        missing
    }

    /// Takes everything from `floor` on back.
    fn retract(&mut self, into: &Lease, floor: u64) {
        let above = |range: Range<u64>| range.start.max(floor)..range.end;
        let applied = self.moved.applied().map(above);
        let ranges: Vec<_> = applied.filter(|range| !range.is_empty()).collect();
        for range in ranges {
            let crc = into.crc32c(range.start as usize..range.end as usize);
            self.moved.retract(range, crc);
        }
    }
}

impl Partial<Outgoing> {
    /// A transfer of `from` of which this end knows nothing any more: reads it
    /// once for its digest.
    pub fn rebuild(from: &Lease) -> Self {
        let digest = genie_proto::Digest(from.crc32c(0..from.len()));
        Self {
            moved: Outgoing::sent(from.len() as u64, digest),
            cost: Cost::default(),
        }
    }

    /// Gets ready to go on over another path with what the receiver says it lacks.
    pub fn prepare(&mut self, missing: &[Range<u64>]) -> Result<(), BadRange> {
        self.moved.resume(missing.iter().cloned())
    }
}

impl Cost {
    /// This and what was added to it.
    pub fn plus(mut self, other: Self) -> Self {
        self.retransmits += other.retransmits;
        self.copies.add(other.copies);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Region, View};

    fn lease(bytes: &[u8]) -> Lease {
        let region = Region::with_backing(bytes.len(), Backing::Shmem).unwrap();
        let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
        lease.write_at(0, View::from(bytes));
        lease
    }

    /// A transfer of 1000 bytes of which these are applied.
    fn partial(data: &[u8], applied: &[Range<usize>]) -> Partial<Incoming> {
        let mut moved = Incoming::new(data.len() as u64).unwrap();
        for range in applied {
            let crc = crc32c::crc32c(&data[range.clone()]);
            moved.apply(range.start as u64, range.len() as u64, crc);
        }
        Partial {
            moved,
            cost: Cost::default(),
        }
    }

    fn finish(mut partial: Partial<Incoming>, data: &[u8], missing: &[Range<u64>]) {
        for range in missing {
            let bytes = &data[range.start as usize..range.end as usize];
            let len = range.end - range.start;
            partial.moved.apply(range.start, len, crc32c::crc32c(bytes));
        }
        assert!(partial.moved.is_complete());
        assert_eq!(partial.moved.digest().0, crc32c::crc32c(data));
    }

    #[test]
    fn something_is_always_asked_for_and_never_too_many_ranges() {
        let data: Vec<u8> = (0..1000).map(|i| (i * 31 % 251) as u8).collect();
        let lease = lease(&data);
        let mut complete = partial(&data, &[0..512, 512..1000]);
        let missing = complete.prepare(&lease, 8);
        assert_eq!((missing.len(), &missing[0]), (1, &(960..1000)));
        finish(complete, &data, &missing);

        let islands = [64..128, 192..256, 320..384, 448..1000];
        let mut few = partial(&data, &islands);
        assert_eq!(few.prepare(&lease, 4).len(), 4, "as they are");
        let mut many = partial(&data, &islands);
        let missing = many.prepare(&lease, 2);
        assert_eq!(missing, [0..64, 128..1000]);
        finish(many, &data, &missing);
    }

    #[test]
    fn a_sender_that_knows_nothing_reads_its_digest() {
        let data = [7u8; 300];
        let mut partial = Partial::rebuild(&lease(&data));
        partial.prepare(&[64..128, 256..300]).unwrap();
        assert_eq!(partial.moved.bytes_again(), 108);
        assert_eq!(
            partial.moved.digest().map(|digest| digest.0),
            Some(crc32c::crc32c(&data))
        );
        assert!(partial.prepare(&[0..64, 256..301]).is_err());
    }
}
