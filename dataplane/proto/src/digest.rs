//! The digest of a transfer, built from its segments' checksums in any order.
//!
//! A CRC is linear, so the CRC of a whole is the XOR of each piece's CRC
//! multiplied by `x^(8·n)` modulo the polynomial, where `n` is how many bytes
//! follow the piece (the identity behind zlib's `crc32_combine`). The CRC a
//! packet carries anyway is thereby enough: no byte is read twice.
//!
//! The `crc32c` crate's own combine builds matrices for each call and takes
//! microseconds; here a contiguous run costs one multiplication a segment.

use std::fmt;

use genie_crc::{multiply, multiply_slowly};
use serde::{Deserialize, Serialize};

/// CRC32C (RFC 3720, Castagnoli) of all bytes of a transfer.
///
/// Two ends that hold the same bytes have the same digest; it detects
/// accidents, not forgery.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub u32);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Whether the bytes of a session's transfers are under checksums. Both ends
/// must mean the same: where they do not, segments fail their check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Integrity {
    /// CRC32C of every segment, and a digest of the whole that both ends compare.
    #[default]
    Digest,
    /// None: checksums and digests of payloads are zero and nobody computes
    /// them. Headers and control packets are checked all the same.
    None,
}

impl Integrity {
    /// What stands for a payload's CRC32C: `compute`, if there is one.
    pub fn checksum(self, compute: impl FnOnce() -> u32) -> u32 {
        match self {
            Self::Digest => compute(),
            Self::None => 0,
        }
    }
}

/// Accumulates a [`Digest`] from the CRC32C of each segment.
///
/// Segments may come in any order and of any size; each byte must be covered
/// exactly once, which is the caller's to see to ([`crate::Incoming`] does).
#[derive(Clone, Debug)]
pub struct DigestBuilder {
    len: u64,
    /// The runs that are over, shifted to their place.
    total: u32,
    /// CRC of the run that segments are still being appended to.
    run: u32,
    run_end: u64,
    /// The length last multiplied by, and its power: segments are mostly alike.
    stride: u64,
    stride_power: u32,
}

impl DigestBuilder {
    /// For a transfer of `len` bytes.
    pub const fn new(len: u64) -> Self {
        Self {
            len,
            total: 0,
            run: 0,
            run_end: 0,
            stride: 0,
            stride_power: ONE,
        }
    }

    /// Takes in a segment whose bytes have the CRC32C `crc`.
    pub fn add(&mut self, offset: u64, len: u64, crc: u32) {
        debug_assert!(
            offset + len <= self.len,
            "a segment lies inside its transfer"
        );
        if offset == self.run_end {
            if len != self.stride {
                self.stride = len;
                self.stride_power = power(len);
            }
            self.run = multiply(self.run, self.stride_power) ^ crc;
        } else {
            self.total ^= multiply(self.run, power(self.len - self.run_end));
            self.run = crc;
        }
        self.run_end = offset + len;
    }

    /// The digest of what was added.
    pub fn finish(&self) -> Digest {
        Digest(self.total ^ multiply(self.run, power(self.len - self.run_end)))
    }
}

/// `x^0`: polynomials are bit-reflected.
const ONE: u32 = 1 << 31;
/// Bytes of a 48-bit length.
const LEN_BYTES: usize = 6;

/// `POWERS[k][b]`: `x^(8·b·256^k)`, so that a power takes one product a byte of the exponent.
static POWERS: [[u32; 256]; LEN_BYTES] = powers();

/// `x^(8·bytes)` modulo the polynomial.
fn power(bytes: u64) -> u32 {
    debug_assert!(bytes < 1 << 48, "lengths have 48 bits");
    let mut product = POWERS[0][(bytes & 0xff) as usize];
    let mut rest = bytes >> 8;
    for table in &POWERS[1..] {
        if rest == 0 {
            break;
        }
        let byte = (rest & 0xff) as usize;
        if byte != 0 {
            product = multiply(product, table[byte]);
        }
        rest >>= 8;
    }
    product
}

const fn powers() -> [[u32; 256]; LEN_BYTES] {
    let mut tables = [[ONE; 256]; LEN_BYTES];
    // x^8: eight places down from x^0.
    let mut step = ONE >> 8;
    let mut k = 0;
    while k < LEN_BYTES {
        let mut byte = 1;
        while byte < 256 {
            tables[k][byte] = multiply_slowly(tables[k][byte - 1], step);
            byte += 1;
        }
        step = multiply_slowly(tables[k][255], step);
        k += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn powers_add(a in 0u64..1 << 47, b in 0u64..1 << 47) {
            prop_assert_eq!(multiply(power(a), power(b)), power(a + b));
        }

        #[test]
        fn any_cut_in_any_order_gives_the_crc_of_the_whole(
            data in proptest::collection::vec(any::<u8>(), 0..2000),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
            keys in proptest::collection::vec(any::<u32>(), 21),
        ) {
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(data.len() + 1)).collect();
            at.extend([0, data.len()]);
            at.sort_unstable();
            let mut pieces: Vec<_> = at.windows(2).zip(keys).collect();
            pieces.sort_by_key(|(_, key)| *key);
            let mut builder = DigestBuilder::new(data.len() as u64);
            for (piece, _) in pieces {
                let bytes = &data[piece[0]..piece[1]];
                builder.add(piece[0] as u64, bytes.len() as u64, crc32c::crc32c(bytes));
            }
            prop_assert_eq!(builder.finish(), Digest(crc32c::crc32c(&data)));
        }
    }

    #[test]
    fn lengths_beyond_32_bits_shift_all_the_way() {
        // 5 GiB of zeros after one byte, by squaring what `crc32c` says of 1 GiB.
        let len = 5 * (1_u64 << 30) + 1;
        let gib = crc32c::crc32c_combine(0, 0, 1 << 30);
        assert_eq!(gib, 0);
        let one = crc32c::crc32c(b"x");
        let mut expected = one;
        for _ in 0..5 {
            expected = crc32c::crc32c_combine(expected, 0, 1 << 30);
        }
        let mut builder = DigestBuilder::new(len);
        builder.add(0, 1, one);
        assert_eq!(builder.finish(), Digest(expected));
    }
}
