//! Bytes that somebody else may change while we look at them.

use std::marker::PhantomData;
use std::ops::Range;

/// A borrowed run of bytes that is read only by copying it out.
///
/// What lies in a packet buffer or an application's arena may be written by a
/// device or another process at any time, so no `&[u8]` over it exists.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    base: *const u8,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> View<'a> {
    /// Makes a view of memory that a slice cannot describe.
    ///
    /// # Safety
    /// `base..base + len` must be readable for the whole of `'a`.
    pub unsafe fn from_raw(base: *const u8, len: usize) -> Self {
        Self {
            base,
            len,
            owner: PhantomData,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part of this view in `range`, or `None` where that lies outside.
    pub fn slice(&self, range: Range<usize>) -> Option<View<'a>> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        // SAFETY: `range.start <= self.len`, so the result stays in, or one
        // past the end of, the same readable run.
        let base = unsafe { self.base.add(range.start) };
        Some(View {
            base,
            len: range.end - range.start,
            owner: PhantomData,
        })
    }

    /// Copies the first bytes into `into`; returns how many there were.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let len = self.len.min(into.len());
        // SAFETY: `len` bytes are readable here by the type's invariant and
        // writable in `into`, which is ours alone, so they cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.base, into.as_mut_ptr(), len) };
        len
    }

    /// Reads all bytes as words, the last filled up with zeros, without copying
    /// them anywhere first.
    pub fn fold_words<T>(&self, first: T, mut fold: impl FnMut(T, u64) -> T) -> T {
        const WORD: usize = size_of::<u64>();
        let (mut result, whole) = (first, self.len / WORD);
        for at in 0..whole {
            let word = self.base.wrapping_add(at * WORD).cast::<u64>();
            // SAFETY: the word ends at or before `len`, so it is readable by the
            // type's invariant; it need not be aligned.
            let word = unsafe { word.read_unaligned() };
            result = fold(result, u64::from_le(word));
        }
        let mut last = [0; WORD];
        let rest = self.slice(whole * WORD..self.len);
        match rest.map_or(0, |rest| rest.copy_to(&mut last)) {
            0 => result,
            _ => fold(result, u64::from_le_bytes(last)),
        }
    }

    /// CRC32C of the bytes as they are now.
    pub fn crc32c(&self) -> u32 {
        // SAFETY: readable by the type's invariant.
        unsafe { super::crc_of(0, self.base, self.len) }
    }

    /// The address of the first byte, for calls into a device.
    pub fn as_ptr(&self) -> *const u8 {
        self.base
    }
}

impl Default for View<'_> {
    fn default() -> Self {
        Self::from(&[][..])
    }
}

impl<'a> From<&'a [u8]> for View<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self {
            base: bytes.as_ptr(),
            len: bytes.len(),
            owner: PhantomData,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_words_are_read_and_the_last_is_filled_up() {
        let bytes: Vec<u8> = (0..21).collect();
        for len in [0, 7, 8, 9, 16, 20] {
            // Aligned to nothing.
            let view = View::from(&bytes[1..1 + len]);
            let mut read = Vec::new();
            view.fold_words((), |(), word| read.extend(word.to_le_bytes()));
            let mut padded = bytes[1..1 + len].to_vec();
            padded.resize(len.next_multiple_of(8), 0);
            assert_eq!(read, padded);
        }
    }

    #[test]
    fn slices_stay_inside() {
        let bytes = [1u8, 2, 3, 4];
        let view = View::from(&bytes[..]);
        assert!(view.slice(2..5).is_none());
        #[expect(clippy::reversed_empty_ranges)]
        let reversed = 3..2;
        assert!(view.slice(reversed).is_none());
        let mut out = [0; 8];
        assert_eq!(view.slice(1..3).unwrap().copy_to(&mut out), 2);
        assert_eq!(out[..2], [2, 3]);
        assert!(view.slice(4..4).unwrap().is_empty());
    }
}
