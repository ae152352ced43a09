//! Products of polynomials modulo that of CRC32C.
//!
//! All are bit-reflected: bit 31 is `x^0`.

/// The polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `ZEROS[k][b]`: byte `b` followed by `k + 1` zero bytes, reduced (slicing by 4).
static ZEROS: [[u32; 256]; 4] = zeros();

/// The product of two polynomials modulo the polynomial, which shifts a CRC32C by
/// as many bytes as the other factor is a power of `x^8`.
#[inline]
pub fn multiply(a: u32, b: u32) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("pclmulqdq") && std::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has both instructions, as was just asked.
        return unsafe { multiply_by_instructions(a, b) };
    }
    multiply_by_tables(a, b)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "pclmulqdq,sse4.2")]
fn multiply_by_instructions(a: u32, b: u32) -> u32 {
    use std::arch::x86_64::{
        _mm_clmulepi64_si128, _mm_crc32_u32, _mm_cvtsi32_si128, _mm_cvtsi128_si64,
    };

    let factor = |bits: u32| _mm_cvtsi32_si128(bits.cast_signed());
    let product = _mm_clmulepi64_si128::<0>(factor(a), factor(b));
    let product = aligned(_mm_cvtsi128_si64(product).cast_unsigned());
    // The instruction reduces what it is given, with 32 zero bits behind.
    (product >> 32) as u32 ^ _mm_crc32_u32(0, product as u32)
}

fn multiply_by_tables(a: u32, b: u32) -> u32 {
    let product = aligned(carryless(a, b));
    let low = product as u32;
    (product >> 32) as u32
        ^ ZEROS[3][(low & 0xff) as usize]
        ^ ZEROS[2][(low >> 8 & 0xff) as usize]
        ^ ZEROS[1][(low >> 16 & 0xff) as usize]
        ^ ZEROS[0][(low >> 24) as usize]
}

/// A carry-less product has 63 bits, the highest power in bit 0; one up makes it a
/// reflected 64-bit value, whose low half still has to be reduced.
fn aligned(product: u64) -> u64 {
    product << 1
}

/// Carry-less product by integer multiplication "with holes": of operands with
/// only every fourth bit set, a column sums at most eight ones, which three
/// bits hold, so no carry reaches the next column (as BearSSL's `ghash_ctmul`).
fn carryless(a: u32, b: u32) -> u64 {
    const HOLES: u64 = 0x1111_1111_1111_1111;
    let (a, b) = (u64::from(a), u64::from(b));
    let a = [a & HOLES, a & HOLES << 1, a & HOLES << 2, a & HOLES << 3];
    let b = [b & HOLES, b & HOLES << 1, b & HOLES << 2, b & HOLES << 3];
    let mut product = 0;
    for class in 0..4 {
        let mut sum = 0;
        for (i, a) in a.iter().enumerate() {
            sum ^= a.wrapping_mul(b[(class + 4 - i) % 4]);
        }
        product |= sum & HOLES << class;
    }
    product
}

/// [`multiply`], bit by bit, for tables made when compiling.
pub const fn multiply_slowly(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        if a >> bit & 1 == 1 {
            product ^= b;
        }
        b = b >> 1 ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
    }
    product
}

const fn zeros() -> [[u32; 256]; 4] {
    let mut tables = [[0; 256]; 4];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bits = 0;
        while bits < 32 {
            value = value >> 1 ^ if value & 1 == 1 { POLYNOMIAL } else { 0 };
            bits += 1;
            if bits % 8 == 0 {
                tables[bits / 8 - 1][byte] = value;
            }
        }
        byte += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_quick_products_are_the_slow_one(a: u32, b: u32) {
            prop_assert_eq!(multiply_by_tables(a, b), multiply_slowly(a, b));
            prop_assert_eq!(multiply(a, b), multiply_slowly(a, b));
        }
    }
}
