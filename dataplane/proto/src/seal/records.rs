//! Sealed records: what packets' keys do for a stream of bytes.
//!
//! A stream keeps its order, so a record's number is not written: each end
//! counts. The invariant: a number is used once, and a record that was left out,
//! repeated, put elsewhere or changed is not opened, nor is any after it.

use super::{EPOCH_BITS, Keys, OpenError, Secret, TAG_LEN};

/// The keys of one direction of one connection; the same at both ends.
#[derive(Debug)]
pub struct Records {
    keys: Keys,
    epoch_bits: u32,
    /// The next record's.
    number: u64,
}

impl Records {
    /// Of connection `index` of a path whose direction has this secret.
    pub fn new(secret: &Secret, index: u16) -> Self {
        Self::with_epochs(secret, index, EPOCH_BITS)
    }

    /// [`Records::new`] with epochs of `2^epoch_bits` records; for tests.
    pub fn with_epochs(secret: &Secret, index: u16, epoch_bits: u32) -> Self {
        let mut of_connection = Secret([0; 32]);
        let [high, low] = index.to_be_bytes();
        let label = [b"genie connection ".as_slice(), &[high, low]].concat();
        secret.expand(&label, &mut of_connection.0);
        Self {
            keys: Keys::new(0, &of_connection),
            epoch_bits,
            number: 0,
        }
    }

    /// Encrypts the next record in place, and returns the tag to be put behind
    /// it. `plain` stays readable and is authenticated.
    pub fn seal(&mut self, plain: &[u8], sealed: &mut [u8]) -> [u8; TAG_LEN] {
        let number = self.take_number();
        self.keys.seal(number, plain, sealed)
    }

    /// Decrypts the next record, with its tag behind it, in place.
    ///
    /// After an error the bytes mean nothing, and the stream is over.
    pub fn open(&mut self, plain: &[u8], sealed: &mut [u8]) -> Result<(), OpenError> {
        let number = self.take_number();
        self.keys.open(number, plain, sealed)
    }

    fn take_number(&mut self) -> u64 {
        let number = self.number;
        self.number += 1;
        while self.keys.epoch < number >> self.epoch_bits {
            self.keys = self.keys.following();
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends() -> (Records, Records) {
        let secret = Secret([7; 32]);
        // Four records an epoch.
        let end = || Records::with_epochs(&secret, 1, 2);
        (end(), end())
    }

    fn seal(records: &mut Records, text: &[u8]) -> Vec<u8> {
        let mut bytes = text.to_vec();
        let tag = records.seal(b"len", &mut bytes);
        bytes.extend_from_slice(&tag);
        bytes
    }

    fn open(records: &mut Records, sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
        let mut bytes = sealed.to_vec();
        records.open(b"len", &mut bytes)?;
        bytes.truncate(sealed.len() - TAG_LEN);
        Ok(bytes)
    }

    #[test]
    fn records_are_opened_in_their_order_over_many_epochs() {
        let (mut a, mut b) = ends();
        let mut seen = std::collections::HashSet::new();
        for number in 0..50u8 {
            let sealed = seal(&mut a, b"the same text");
            assert!(seen.insert(sealed.clone()), "record {number} repeats one");
            assert_eq!(open(&mut b, &sealed), Ok(b"the same text".to_vec()));
        }
    }

    #[test]
    fn what_is_not_the_next_record_is_refused() {
        type Change = fn(&mut Vec<Vec<u8>>);
        let changes: [(&str, Change); 5] = [
            ("left out", |records| {
                records.remove(0);
            }),
            ("repeated", |records| records[1] = records[0].clone()),
            ("swapped", |records| records.swap(0, 1)),
            ("changed", |records| records[1][0] ^= 1),
            ("cut", |records| records[1].truncate(20)),
        ];
        for (what, change) in changes {
            let (mut a, mut b) = ends();
            let mut records: Vec<_> = (0..2).map(|_| seal(&mut a, b"some text")).collect();
            change(&mut records);
            let opened = records.iter().map(|record| open(&mut b, record));
            let opened = opened.collect::<Result<Vec<_>, _>>();
            assert_eq!(opened, Err(OpenError::Tag), "{what}");
        }
    }

    #[test]
    fn what_is_readable_is_authenticated() {
        let (mut a, mut b) = ends();
        let mut sealed = seal(&mut a, b"text");
        assert_eq!(b.open(b"LEN", &mut sealed), Err(OpenError::Tag));
    }

    #[test]
    fn connections_and_directions_have_keys_of_their_own() {
        let of = |secret, index| seal(&mut Records::new(&Secret([secret; 32]), index), b"text");
        let all = [of(1, 0), of(1, 1), of(1, 256), of(2, 0)];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one));
        }
    }
}
