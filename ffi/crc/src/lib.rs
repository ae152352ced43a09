//! CRC32C (RFC 3720, Castagnoli) of headers and other short runs of bytes.
//!
//! A packet's header is 34 bytes, and both ends check it. Libraries are made for
//! long runs: they align, and set up parallel streams, which takes longer than
//! the checksum of a header. Here a short run goes through the processor's own
//! instruction, eight bytes at a time; a long one, or one on a processor without
//! it, through [`crc32c`](https://docs.rs/crc32c).

mod product;

pub use product::{multiply, multiply_slowly};

/// The longest run that is faster here than through the library.
pub const SHORT_MAX: usize = 128;

/// CRC32C of `bytes`.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// CRC32C of what `crc` is of, with `bytes` behind it.
#[inline]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() <= SHORT_MAX && std::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the instruction, as was just asked.
        return unsafe { short(crc, bytes) };
    }
    crc32c::crc32c_append(crc, bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn short(crc: u32, bytes: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u16, _mm_crc32_u32, _mm_crc32_u64};

    // The state is the CRC without its final inversion.
    let (words, rest) = bytes.as_chunks::<8>();
    let state = words.iter().fold(u64::from(!crc), |state, word| {
        _mm_crc32_u64(state, u64::from_le_bytes(*word))
    });
    // The instruction leaves the upper half zero.
    let mut state = state as u32;
    let (quarter, rest) = rest.as_chunks::<4>();
    for word in quarter {
        state = _mm_crc32_u32(state, u32::from_le_bytes(*word));
    }
    let (pair, rest) = rest.as_chunks::<2>();
    for word in pair {
        state = _mm_crc32_u16(state, u16::from_le_bytes(*word));
    }
    for byte in rest {
        state = _mm_crc32_u8(state, *byte);
    }
    !state
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_check_value_is_the_catalogues() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    proptest! {
        #[test]
        fn whatever_the_length_it_is_the_librarys(
            crc: u32,
            bytes in prop::collection::vec(any::<u8>(), 0..2 * SHORT_MAX),
        ) {
            prop_assert_eq!(crc32c_append(crc, &bytes), crc32c::crc32c_append(crc, &bytes));
            prop_assert_eq!(crc32c(&bytes), crc32c::crc32c(&bytes));
        }
    }
}
