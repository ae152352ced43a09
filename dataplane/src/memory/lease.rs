//! Leases: a transfer's hold on a slice of a region.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use super::arena::Used;
use super::{Region, View, crc_of};

/// A hold on a slice of a region; the bytes cannot be freed before it is dropped.
///
/// Cloning makes another hold on the same slice. Reading and writing copy
/// through raw pointers: another process may change the bytes at any time.
#[derive(Clone, Debug)]
pub struct Lease {
    region: Arc<Region>,
    offset: usize,
    len: usize,
    /// The block of an arena that it is part of.
    used: Option<Arc<Used>>,
}

/// A slice that is not inside its region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("bytes {offset}..{offset}+{len} lie outside a region of {region_len} bytes")]
pub struct OutOfBounds {
    /// Start of the slice.
    pub offset: u64,
    /// Length of the slice.
    pub len: u64,
    /// Length of the region.
    pub region_len: u64,
}

impl Lease {
    /// Takes a hold on `len` bytes at `offset` of `region`.
    pub fn new(region: Arc<Region>, offset: u64, len: u64) -> Result<Self, OutOfBounds> {
        let region_len = region.len() as u64;
        match offset.checked_add(len) {
            Some(end) if end <= region_len => Ok(Self {
                region,
                offset: offset as usize,
                len: len as usize,
                used: None,
            }),
            _ => Err(OutOfBounds {
                offset,
                len,
                region_len,
            }),
        }
    }

    /// Takes a hold on all of `region`.
    pub fn whole(region: Arc<Region>) -> Self {
        let len = region.len();
        Self {
            region,
            offset: 0,
            len,
            used: None,
        }
    }

    /// This lease, holding a block of an arena too.
    pub(super) fn keeping(self, used: Arc<Used>) -> Self {
        let used = Some(used);
        Self { used, ..self }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice has no bytes, as a zero-element tensor has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The region the slice lies in.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Offset of the slice in its region, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// A hold on a part of this slice.
    pub fn slice(&self, range: Range<u64>) -> Result<Lease, OutOfBounds> {
        let inside = range.start <= range.end && range.end <= self.len as u64;
        if !inside {
            return Err(OutOfBounds {
                offset: range.start,
                len: range.end.saturating_sub(range.start),
                region_len: self.len as u64,
            });
        }
        Ok(Lease {
            region: Arc::clone(&self.region),
            offset: self.offset + range.start as usize,
            len: (range.end - range.start) as usize,
            used: self.used.clone(),
        })
    }

    /// The address of the first byte, for calls into a device or the kernel.
    ///
    /// Valid for as long as this lease or a clone of it lives.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: offset <= region.len() since `new`, so this stays in the mapping.
        unsafe { self.region.as_ptr().add(self.offset) }
    }

    /// The bytes in `range` as a view; `None` where that lies outside.
    pub fn view(&self, range: Range<usize>) -> Option<View<'_>> {
        // SAFETY: the slice is mapped and readable while `self` is borrowed.
        let all = unsafe { View::from_raw(self.as_ptr(), self.len) };
        all.slice(range)
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Panics
    /// If they do not fit, which the caller checked against its grant, or if
    /// the region was imported and may only be read.
    pub fn write_at(&self, offset: usize, bytes: View<'_>) {
        let to = self.destination(offset, bytes.len());
        // SAFETY: `target` checked that the bytes fit. The source may lie in
        // the same region (a copy within an arena), so the ranges may overlap.
        unsafe { std::ptr::copy(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Writes `bytes` at `offset` and returns the CRC32C of what was written.
    ///
    /// Copy and checksum take turns over blocks that stay in the first-level
    /// cache, so that the payload comes from memory once. The CRC is of the
    /// destination: a source that another process changes in between does not
    /// pass as verified.
    ///
    /// # Panics
    /// If they do not fit, which the caller checked against its grant, or if
    /// the region was imported and may only be read.
    pub fn place(&self, offset: usize, bytes: View<'_>) -> u32 {
        let len = bytes.len();
        let mut to = self.destination(offset, len);
        let mut from = bytes.as_ptr();
        let (mut left, mut crc) = (len, 0);
        while left > 0 {
            let block = left.min(CACHE_BLOCK);
            self.prefetch(offset + len - left + PREFETCH_AHEAD, block);
            // SAFETY: `destination` checked all `len` bytes; `from` and `to` are
            // advanced by the same amounts, which sum up to `len`.
            unsafe { std::ptr::copy(from, to, block) };
            // SAFETY: these bytes were just written and stay mapped; the
            // slice lives only for this call. See `crc_of` on other writers.
            crc = unsafe { crc_of(crc, to, block) };
            // SAFETY: still inside, or one past the end of, the source.
            from = unsafe { from.add(block) };
            // SAFETY: still inside, or one past the end of, the destination.
            to = unsafe { to.add(block) };
            left -= block;
        }
        crc
    }

    /// CRC32C of the bytes in `range`.
    ///
    /// # Panics
    /// If the range lies outside: the caller cut it from its own transfer.
    pub fn crc32c(&self, range: Range<usize>) -> u32 {
        self.crc32c_append(0, range)
    }

    /// Continues `crc` over the bytes in `range`.
    ///
    /// # Panics
    /// If the range lies outside: the caller cut it from its own transfer.
    pub fn crc32c_append(&self, crc: u32, range: Range<usize>) -> u32 {
        let len = range.end.saturating_sub(range.start);
        // SAFETY: `target` checked the bounds.
        unsafe { crc_of(crc, self.target(range.start, len), len) }
    }

    /// CRC32C of the bytes in `range`, of a tensor that is read from its beginning
    /// to its end and is in no cache yet: what comes next is asked for meanwhile.
    ///
    /// # Panics
    /// If the range lies outside: the caller cut it from its own transfer.
    pub fn stream_crc32c(&self, range: Range<usize>) -> u32 {
        range.clone().step_by(CACHE_BLOCK).fold(0, |crc, at| {
            let end = range.end.min(at + CACHE_BLOCK);
            self.prefetch(at + PREFETCH_AHEAD, end - at);
            self.crc32c_append(crc, at..end)
        })
    }

    /// Asks for `len` bytes at `offset` to be in the first-level cache soon, as
    /// far as they are this lease's. Processors guess what is read next, but
    /// not beyond a page of 4 KiB, nor what is written.
    #[inline]
    fn prefetch(&self, offset: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for at in (offset..self.len.min(offset + len)).step_by(CACHE_LINE) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

            // SAFETY: faults nowhere, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.as_ptr().wrapping_add(at).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (offset, len);
    }

    /// Copies the bytes at `offset` into `into`.
    ///
    /// # Panics
    /// If the range lies outside: the caller cut it from its own transfer.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) {
        let from = self.target(offset, into.len());
        // SAFETY: `target` checked the bounds, and `into` is ours alone.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Reads from a file at `at` straight into `range`; returns how many bytes
    /// that were, fewer than asked for at the file's end. One copy, the kernel's.
    ///
    /// # Panics
    /// If the range lies outside, or the region may only be read.
    pub fn read_file(&self, range: Range<usize>, file: impl AsFd, at: u64) -> io::Result<usize> {
        let len = range.end.saturating_sub(range.start);
        let to = self.destination(range.start, len);
        let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        retry(|| {
            // SAFETY: `destination` checked that `len` writable bytes are there.
            unsafe { libc::pread(file.as_fd().as_raw_fd(), to.cast(), len, at) }
        })
    }

    /// Reads from a socket or a file's position straight into `range`; returns
    /// how many bytes that were, none at the end. One copy, the kernel's.
    ///
    /// # Panics
    /// If the range lies outside, or the region may only be read.
    pub fn read_stream(&self, range: Range<usize>, stream: impl AsFd) -> io::Result<usize> {
        let len = range.end.saturating_sub(range.start);
        let to = self.destination(range.start, len);
        retry(|| {
            // SAFETY: `destination` checked that `len` writable bytes are there.
            unsafe { libc::read(stream.as_fd().as_raw_fd(), to.cast(), len) }
        })
    }

    /// Writes bytes in `range` straight to a file's position; returns how many
    /// it took. One copy, the kernel's.
    ///
    /// # Panics
    /// If the range lies outside: the caller cut it from its own tensor.
    pub fn write_file(&self, range: Range<usize>, file: impl AsFd) -> io::Result<usize> {
        let len = range.end.saturating_sub(range.start);
        let from = self.target(range.start, len);
        retry(|| {
            // SAFETY: `target` checked that `len` readable bytes are there.
            unsafe { libc::write(file.as_fd().as_raw_fd(), from.cast(), len) }
        })
    }

    fn destination(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            self.region.is_writable(),
            "imported memory may only be read"
        );
        self.target(offset, len)
    }

    fn target(&self, offset: usize, len: usize) -> *mut u8 {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(
            fits,
            "{len} bytes at {offset} lie outside a lease of {} bytes",
            self.len
        );
        // SAFETY: offset <= self.len, which lies in the mapping.
        unsafe { self.as_ptr().add(offset) }
    }
}

/// Calls until no signal came in between.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(len) => return Ok(len),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Copies and checksums go on in blocks of this size, each behind the request for
/// memory that comes later. Four times what the checksum folds at a time (384
/// bytes). docs/benchmarks.md has others.
const CACHE_BLOCK: usize = 1536;

/// How far ahead memory is asked for: what is read or written while it comes.
const PREFETCH_AHEAD: usize = 8192;

#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    fn region(len: usize) -> Arc<Region> {
        Region::with_backing(len, Backing::Shmem).unwrap()
    }

    #[test]
    fn bounds_are_checked_without_wrapping() {
        let region = region(4096);
        assert!(Lease::new(Arc::clone(&region), 4000, 97).is_err());
        assert!(Lease::new(Arc::clone(&region), u64::MAX, 2).is_err());
        let lease = Lease::new(region, 4000, 96).unwrap();
        assert!(lease.slice(0..97).is_err());
        assert_eq!(lease.slice(90..96).unwrap().offset(), 4090);
        assert!(lease.view(0..97).is_none());
    }

    #[test]
    #[should_panic(expected = "outside a lease")]
    fn a_write_outside_panics_before_it_writes() {
        let lease = Lease::new(region(4096), 0, 10).unwrap();
        lease.write_at(8, View::from(&[0u8; 3][..]));
    }

    #[test]
    fn place_returns_the_crc_of_what_it_wrote() {
        let lease = Lease::whole(region(16384));
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i * 7) as u8).collect();
        let crc = lease.place(100, View::from(&bytes[..]));
        assert_eq!(crc, crc32c::crc32c(&bytes));
        assert_eq!(crc, lease.crc32c(100..10_100));
        assert_eq!(crc, lease.stream_crc32c(100..10_100));
        assert_eq!(lease.stream_crc32c(5..5), 0);
        let mut back = vec![0; bytes.len()];
        lease.read_at(100, &mut back);
        assert_eq!(back, bytes);
    }

    #[test]
    fn files_are_read_and_written_without_a_buffer() {
        let file = tempfile::tempfile().unwrap();
        let lease = Lease::whole(region(4096));
        lease.write_at(10, View::from(&b"tensor"[..]));
        assert_eq!(lease.write_file(10..16, &file).unwrap(), 6);
        let other = Lease::whole(region(4096));
        assert_eq!(
            other.read_file(100..110, &file, 1).unwrap(),
            5,
            "to the end"
        );
        let mut bytes = [0; 5];
        other.read_at(100, &mut bytes);
        assert_eq!(&bytes, b"ensor");
        let folder = std::fs::File::open("/").unwrap();
        assert!(other.read_file(0..1, &folder, 0).is_err());
    }

    #[test]
    fn a_lease_keeps_the_region() {
        let region = region(4096);
        let weak = Arc::downgrade(&region);
        let lease = Lease::whole(region);
        let part = lease.slice(0..1).unwrap();
        drop(lease);
        assert!(weak.upgrade().is_some());
        drop(part);
        assert!(weak.upgrade().is_none());
    }
}
