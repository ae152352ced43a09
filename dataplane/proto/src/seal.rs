//! Sealed packets: encrypted and authenticated, each accepted once. For streams: [`Records`].
//!
//! AES-128-GCM (RFC 5116) with the packet number as nonce, as in RFC 9001
//! section 5.3. What stays readable is the header up to its header check; it is
//! authenticated. The rest, from the check on (a checksum of the payload would
//! tell about it), is encrypted, and a tag of [`TAG_LEN`] bytes follows.
//!
//! ```text
//!  0                    36      40
//!  ┌────────────────────┬───────┬──────────────────┬──────────┐
//!  │ header             │ check │ payload          │ tag      │
//!  └────────────────────┴───────┴──────────────────┴──────────┘
//!    authenticated        encrypted and authenticated
//! ```
//!
//! Keys change with the **epoch**, which is the packet number divided by
//! `2^`[`EPOCH_BITS`]: both ends know it without saying so. The secret of an
//! epoch is made from the one before and cannot be turned back, so keys that
//! were dropped are gone. The receiver keeps the epoch before for as long as a
//! packet of it can be inside the replay window.
//!
//! The invariants: a sealer never uses a packet number twice; an opener gives
//! out nothing of a packet that is not authentic, or that it gave out before.
//! An engine owns one of each for a path, and calls them for every packet.

mod records;

use std::fmt;

use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf;
use serde::{Deserialize, Serialize};

use crate::connection::DropCause;
use crate::replay::{Replay, ReplayWindow, WINDOW};
use crate::wire::{HEADER_LEN, PLAIN_LEN, peek_number};

pub use records::Records;

/// Bytes of the tag behind a sealed packet.
pub const TAG_LEN: usize = 16;

/// A key seals `2^22` packets: below the `2^23` that RFC 9001 appendix B.1
/// allows AES-GCM for packets of up to 64 KiB, and far above what credit lets
/// be in flight, so that never a whole epoch is lost.
pub const EPOCH_BITS: u32 = 22;

/// What the packets of one direction of a path are sealed with in the end.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

/// The secrets of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    /// Of the packets that this end sends.
    pub send: Secret,
    /// Of the packets that this end receives.
    pub receive: Secret,
}

/// Seals what one end of a path sends.
#[derive(Debug)]
pub struct Sealer {
    keys: Keys,
    epoch_bits: u32,
    /// The least number that was not used yet.
    next: u64,
}

/// Opens what one end of a path receives.
#[derive(Debug)]
pub struct Opener {
    /// Of the epoch before, while packets of it may come.
    previous: Option<Keys>,
    current: Keys,
    /// Ready beforehand: a forged number must not cost more than another packet.
    next: Keys,
    window: ReplayWindow,
    epoch_bits: u32,
}

/// Why a packet is not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Too short for a header and a tag.
    #[error("too short to be sealed")]
    Length,
    /// Its number was accepted before, or is older than the replay window.
    #[error(transparent)]
    Replayed(#[from] Replay),
    /// Its key was dropped.
    #[error("the packet is of an epoch that is over")]
    OldEpoch,
    /// It was not sealed by the peer for this path, or was changed since.
    #[error("the tag does not match")]
    Tag,
}

/// The key of one epoch, and the secret of the next.
struct Keys {
    epoch: u64,
    key: LessSafeKey,
    iv: [u8; aead::NONCE_LEN],
    following: Secret,
}

impl Sealer {
    /// Seals with keys made from `secret`.
    pub fn new(secret: &Secret) -> Self {
        Self::with_epochs(secret, EPOCH_BITS)
    }

    /// [`Sealer::new`] with epochs of `2^epoch_bits` packets; for tests.
    pub fn with_epochs(secret: &Secret, epoch_bits: u32) -> Self {
        Self {
            keys: Keys::new(0, secret),
            epoch_bits,
            next: 0,
        }
    }

    /// Encrypts `sealed`, which begins with the check, in place, and returns the
    /// tag to be put behind it. `plain` is the header before that.
    ///
    /// # Panics
    /// If the packet number was used before: the connection never gives one twice,
    /// and a nonce that is used twice gives the key away.
    pub fn seal(&mut self, plain: &[u8; PLAIN_LEN], sealed: &mut [u8]) -> [u8; TAG_LEN] {
        let number = peek_number(plain);
        assert!(number >= self.next, "packet number {number} is used twice");
        self.next = number + 1;
        while self.keys.epoch < number >> self.epoch_bits {
            self.keys = self.keys.following();
        }
        self.keys.seal(number, plain, sealed)
    }
}

impl Opener {
    /// Opens with keys made from `secret`.
    pub fn new(secret: &Secret) -> Self {
        Self::with_epochs(secret, EPOCH_BITS)
    }

    /// [`Opener::new`] with epochs of `2^epoch_bits` packets; for tests.
    pub fn with_epochs(secret: &Secret, epoch_bits: u32) -> Self {
        let current = Keys::new(0, secret);
        Self {
            previous: None,
            next: current.following(),
            current,
            window: ReplayWindow::new(),
            epoch_bits,
        }
    }

    /// Decrypts a datagram in place; returns its length without the tag.
    ///
    /// After an error the bytes mean nothing. `datagram` must be private to the
    /// caller: nothing may change it between the check of its tag and its use.
    pub fn open(&mut self, datagram: &mut [u8]) -> Result<usize, OpenError> {
        if datagram.len() < HEADER_LEN + TAG_LEN {
            return Err(OpenError::Length);
        }
        let (plain, sealed) = datagram
            .split_first_chunk_mut::<PLAIN_LEN>()
            .ok_or(OpenError::Length)?;
        let number = peek_number(plain);
        let epoch = number >> self.epoch_bits;
        let keys = if epoch == self.current.epoch {
            &self.current
        } else if epoch == self.next.epoch {
            &self.next
        } else if epoch > self.current.epoch {
            // An epoch is longer than credit lets anything be in flight.
            return Err(OpenError::Tag);
        } else {
            let previous = self.previous.as_ref();
            let kept = previous.filter(|keys| keys.epoch == epoch);
            kept.ok_or(OpenError::OldEpoch)?
        };
        self.window.check(number)?;
        keys.open(number, plain, sealed)?;
        self.window.record(number);
        if epoch == self.next.epoch {
            let next = self.next.following();
            let current = std::mem::replace(&mut self.next, next);
            self.previous = Some(std::mem::replace(&mut self.current, current));
        }
        let begun = self.current.epoch << self.epoch_bits;
        if self.previous.is_some() && self.window.next() >= begun + WINDOW {
            self.previous = None;
        }
        Ok(datagram.len() - TAG_LEN)
    }
}

impl From<OpenError> for DropCause {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Length => Self::Length,
            OpenError::Replayed(_) => Self::Replayed,
            OpenError::OldEpoch => Self::OldEpoch,
            OpenError::Tag => Self::Forged,
        }
    }
}

impl Keys {
    fn new(epoch: u64, secret: &Secret) -> Self {
        let mut key = [0; 16];
        secret.expand(b"genie key", &mut key);
        let mut iv = [0; aead::NONCE_LEN];
        secret.expand(b"genie iv", &mut iv);
        let mut following = Secret([0; 32]);
        secret.expand(b"genie epoch", &mut following.0);
        let key = UnboundKey::new(&aead::AES_128_GCM, &key).expect("sixteen bytes are a key");
        Self {
            epoch,
            key: LessSafeKey::new(key),
            iv,
            following,
        }
    }

    fn following(&self) -> Self {
        Self::new(self.epoch + 1, &self.following)
    }

    /// RFC 9001 section 5.3: the packet number, XORed with the IV.
    fn nonce(&self, number: u64) -> Nonce {
        let mut nonce = self.iv;
        let number = number.to_be_bytes();
        for (byte, of_number) in nonce[aead::NONCE_LEN - 8..].iter_mut().zip(number) {
            *byte ^= of_number;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    fn seal(&self, number: u64, plain: &[u8], sealed: &mut [u8]) -> [u8; TAG_LEN] {
        let tag = self
            .key
            .seal_in_place_separate_tag(self.nonce(number), Aad::from(plain), sealed)
            .expect("a datagram is far shorter than AES-GCM allows");
        let mut bytes = [0; TAG_LEN];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }

    fn open(&self, number: u64, plain: &[u8], sealed: &mut [u8]) -> Result<(), OpenError> {
        let opened = self
            .key
            .open_in_place(self.nonce(number), Aad::from(plain), sealed);
        opened.map(drop).map_err(|_| OpenError::Tag)
    }
}

impl Secret {
    /// HKDF-Expand (RFC 5869) with SHA-256.
    fn expand(&self, label: &[u8], into: &mut [u8]) {
        struct Len(usize);
        impl hkdf::KeyType for Len {
            fn len(&self) -> usize {
                self.0
            }
        }
        let secret = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &self.0);
        secret
            .expand(&[label], Len(into.len()))
            .and_then(|expanded| expanded.fill(into))
            .expect("HKDF gives up to 8160 bytes");
    }
}

impl Secrets {
    /// What the other end of the path has.
    pub fn of_the_other_end(self) -> Self {
        Self {
            send: self.receive,
            receive: self.send,
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{SessionId, TransferId};
    use crate::wire::{Header, Kind, crc};

    /// Epochs of 16384 packets: longer than the replay window.
    const BITS: u32 = 14;

    fn ends() -> (Sealer, Opener) {
        let secret = Secret([7; 32]);
        (
            Sealer::with_epochs(&secret, BITS),
            Opener::with_epochs(&secret, BITS),
        )
    }

    fn packet(number: u64, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            kind: Kind::Data,
            flags: 0,
            payload_len: payload.len() as u16,
            session: SessionId(1),
            transfer: TransferId {
                slot: 2,
                generation: 3,
            },
            timestamp: 4,
            path: 5,
            packet_number: number,
            offset: 640,
        };
        let mut bytes = header.encode(crc(payload)).to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    fn seal(sealer: &mut Sealer, number: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = packet(number, payload);
        let (plain, sealed) = bytes.split_first_chunk_mut::<PLAIN_LEN>().unwrap();
        let tag = sealer.seal(plain, sealed);
        bytes.extend_from_slice(&tag);
        bytes
    }

    fn open(opener: &mut Opener, sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
        let mut bytes = sealed.to_vec();
        let len = opener.open(&mut bytes)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    #[test]
    fn a_packet_is_opened_once_and_nothing_of_its_payload_was_readable() {
        let (mut sealer, mut opener) = ends();
        let payload = [0x5a; 256];
        let sealed = seal(&mut sealer, 9, &payload);
        let whole = packet(9, &payload);
        assert_eq!(sealed[..PLAIN_LEN], whole[..PLAIN_LEN]);
        assert_ne!(sealed[PLAIN_LEN..HEADER_LEN], whole[PLAIN_LEN..HEADER_LEN]);
        assert!(!sealed.windows(4).any(|bytes| bytes == [0x5a; 4]));
        assert_eq!(open(&mut opener, &sealed), Ok(whole));
        let again = open(&mut opener, &sealed);
        assert_eq!(again, Err(OpenError::Replayed(Replay::Seen)));
    }

    #[test]
    fn one_flipped_bit_anywhere_is_refused_and_costs_nothing() {
        let (mut sealer, mut opener) = ends();
        let sealed = seal(&mut sealer, 1, b"sixty-four or fewer");
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&mut opener, &bad), Err(OpenError::Tag), "bit {bit}");
        }
        for len in 0..sealed.len() {
            assert!(open(&mut opener, &sealed[..len]).is_err(), "{len} bytes");
        }
        assert!(open(&mut opener, &sealed).is_ok());
    }

    #[test]
    fn another_secret_opens_nothing() {
        let (mut sealer, _) = ends();
        let mut other = Opener::with_epochs(&Secret([8; 32]), BITS);
        let sealed = seal(&mut sealer, 0, b"");
        assert_eq!(open(&mut other, &sealed), Err(OpenError::Tag));
    }

    #[test]
    fn keys_change_with_the_epoch_and_old_ones_are_dropped() {
        let (mut sealer, mut opener) = ends();
        let end = 1u64 << BITS;
        let last = seal(&mut sealer, end - 2, b"last but one");
        let late = seal(&mut sealer, end - 1, b"late");
        let first = seal(&mut sealer, end, b"first");
        assert!(open(&mut opener, &last).is_ok());
        // A forged number of the next epoch changes no key.
        let mut forged = first.clone();
        forged[PLAIN_LEN] ^= 1;
        assert_eq!(open(&mut opener, &forged), Err(OpenError::Tag));
        assert_eq!(opener.current.epoch, 0);
        assert!(open(&mut opener, &first).is_ok());
        assert_eq!(opener.current.epoch, 1);
        assert!(open(&mut opener, &late).is_ok(), "inside the window");
        let on = seal(&mut sealer, end + WINDOW - 1, b"on");
        assert!(open(&mut opener, &on).is_ok());
        assert!(opener.previous.is_none());
        for old in [&last, &late] {
            assert_eq!(open(&mut opener, old), Err(OpenError::OldEpoch));
        }
        // Two epochs ahead is nobody's.
        let far = seal(&mut sealer, 3 * end, b"far");
        assert_eq!(open(&mut opener, &far), Err(OpenError::Tag));
    }

    #[test]
    fn the_epochs_of_both_ends_go_on_together() {
        let secret = Secret([9; 32]);
        let (mut sealer, mut opener) = (
            Sealer::with_epochs(&secret, 4),
            Opener::with_epochs(&secret, 4),
        );
        for number in 0..200 {
            let sealed = seal(&mut sealer, number, &[number as u8; 100]);
            assert_eq!(
                open(&mut opener, &sealed),
                Ok(packet(number, &[number as u8; 100]))
            );
        }
        assert_eq!(opener.current.epoch, 12);
    }

    #[test]
    #[should_panic(expected = "used twice")]
    fn a_number_is_never_sealed_twice() {
        let (mut sealer, _) = ends();
        seal(&mut sealer, 5, b"");
        seal(&mut sealer, 5, b"");
    }
}
