//! Sealed packets among strangers' bytes: what is opened was sealed, once.

use std::collections::{HashMap, HashSet};

use crate::seal::{Opener, Sealer, Secret, TAG_LEN};
use crate::wire::{HEADER_LEN, PLAIN_LEN};

/// Epochs short enough that a script reaches several.
const EPOCH_BITS: u32 = 6;
/// Packets that somebody on the link remembers.
const SEEN_MAX: usize = 64;

/// Seals packets as `script` says, and delivers, skips, changes, cuts and repeats
/// them, with bytes of nobody's between them.
///
/// Asserts that a packet is opened only with its tag, as it was sealed, and not
/// twice. Returns how many were opened.
pub fn unseal(script: &[u8]) -> usize {
    let secret = Secret([5; 32]);
    let mut sealer = Sealer::with_epochs(&secret, EPOCH_BITS);
    let mut opener = Opener::with_epochs(&secret, EPOCH_BITS);
    let mut script = script.iter().copied();
    let (mut number, mut seen) = (0u64, Vec::new());
    let (mut sealed, mut opened) = (HashMap::new(), HashSet::new());
    while let Some(op) = script.next() {
        let byte = script.next().unwrap_or(0);
        let mut datagram: Vec<u8> = match op % 8 {
            // A new packet, after some that are lost.
            0..=2 => {
                number += 1 + u64::from(op >> 4);
                let plain = packet(number, byte);
                let packet = seal(&mut sealer, &plain);
                sealed.insert(packet.clone(), plain);
                seen.push(packet);
                if seen.len() > SEEN_MAX {
                    seen.remove(0);
                }
                continue;
            }
            3 | 4 => pick(&seen, byte),
            5 => {
                let mut packet = pick(&seen, byte);
                let at = script.next().unwrap_or(0);
                if let Some(byte) = packet.get_mut(usize::from(at)) {
                    *byte ^= 1 << (op >> 5);
                }
                packet
            }
            6 => {
                let mut packet = pick(&seen, byte);
                packet.truncate(usize::from(op) << 1);
                packet
            }
            _ => script.by_ref().take(usize::from(byte)).collect(),
        };
        let arrived = datagram.clone();
        if let Ok(len) = opener.open(&mut datagram) {
            let plain = &datagram[..len];
            match sealed.get(&arrived) {
                Some(packet) => assert_eq!(plain, &packet[..], "opened as another packet"),
                // A fuzzer sees the tag that its own is compared with, and learns it.
                None => {
                    let mut other = Sealer::with_epochs(&secret, EPOCH_BITS);
                    assert_eq!(seal(&mut other, plain), arrived, "opened with a bad tag");
                }
            }
            assert!(opened.insert(arrived), "opened twice");
        }
    }
    opened.len()
}

fn packet(number: u64, len: u8) -> Vec<u8> {
    let mut packet = vec![len; HEADER_LEN + usize::from(len)];
    packet[22..28].copy_from_slice(&number.to_be_bytes()[2..]);
    packet
}

fn seal(sealer: &mut Sealer, plain: &[u8]) -> Vec<u8> {
    let mut packet = plain.to_vec();
    let (readable, rest) = packet
        .split_first_chunk_mut::<PLAIN_LEN>()
        .expect("longer than a header");
    let tag: [u8; TAG_LEN] = sealer.seal(readable, rest);
    packet.extend_from_slice(&tag);
    packet
}

fn pick(seen: &[Vec<u8>], byte: u8) -> Vec<u8> {
    let at = usize::from(byte) % seen.len().max(1);
    seen.get(at).cloned().unwrap_or_default()
}
