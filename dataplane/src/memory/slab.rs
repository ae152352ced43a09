//! Memory of the engine's own that a device reads: where payloads are sealed.
//!
//! The only place where a slice of a region's bytes exists. Its invariant makes
//! that sound: *nobody but the owner of the slab writes them*. The file behind
//! it never leaves this process, and its leases go to a device only, which reads.

use std::ops::Range;
use std::sync::Arc;

use super::{Lease, Region, RegionError};
use crate::device::{AttachError, Attachment, Device};

/// A region that is written as a slice. May only be used from one thread at a time.
#[derive(Debug)]
pub struct Slab {
    region: Arc<Region>,
}

impl Slab {
    /// Makes a slab of at least `len_bytes`; on huge pages where there are some.
    pub fn new(len_bytes: usize) -> Result<Self, RegionError> {
        let (region, _) = Region::allocate(len_bytes)?;
        Ok(Self { region })
    }

    /// Lets frames of the device refer to the bytes in `range`.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn attach(
        &self,
        range: Range<usize>,
        device: &mut dyn Device,
    ) -> Result<Attachment, AttachError> {
        let (start, len) = (range.start as u64, range.len() as u64);
        let lease = Lease::new(Arc::clone(&self.region), start, len);
        device.attach(lease.expect("a range inside the slab"))
    }

    /// The bytes in `range`, to be written while no frame refers to them.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.region.len());
        let first = self.region.as_ptr().wrapping_add(range.start);
        // SAFETY: inside the mapping, checked above, which lives as long as
        // `self`. No other mapping of its file exists, and its leases are with
        // a device, which makes no reference to the bytes and writes none;
        // `&mut self` keeps a second slice from being made.
        unsafe { std::slice::from_raw_parts_mut(first, range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::pair::{Options, pair};
    use crate::device::{Payload, TxFrame};

    #[test]
    fn what_is_written_is_what_a_device_sends() {
        let (mut device, mut other) = pair(&Options::default());
        let mut slab = Slab::new(8192).unwrap();
        slab.bytes_mut(4096..4100).copy_from_slice(b"slab");
        let attachment = slab.attach(4096..8192, &mut device).unwrap();
        let frame = TxFrame {
            payload: Some(Payload {
                attachment,
                offset: 0,
                len: 4,
            }),
            ..TxFrame::default()
        };
        assert_eq!(device.tx_burst(&[frame]), 1);
        let mut arrived = [0; 4];
        other.rx_burst(&mut |view| {
            view.copy_to(&mut arrived);
        });
        assert_eq!(&arrived, b"slab");
        assert!(device.detach(attachment));
        slab.bytes_mut(4096..4100).fill(0);
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_slice_outside_is_refused() {
        let mut slab = Slab::new(4096).unwrap();
        let len = slab.region.len();
        slab.bytes_mut(len..len + 1);
    }
}
