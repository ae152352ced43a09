//! Which packet numbers were accepted, so that none is accepted twice.
//!
//! The window of RFC 4303 section 3.4.3, kept as a ring of words as in
//! RFC 6479: going on never shifts bits. The opener of sealed packets asks it
//! before it spends anything on a packet, and records only what was authentic.

/// How many packet numbers are remembered: with the words' slack, more than a
/// receive ring holds and than credit allows in flight.
pub const WINDOW: u64 = (WORDS as u64 - 1) * 64;

const WORDS: usize = 65;

/// The numbers accepted among the highest [`WINDOW`].
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    /// One above the highest number accepted.
    next: u64,
    bits: [u64; WORDS],
}

/// Why a number is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Replay {
    /// It was accepted before.
    #[error("the packet was accepted before")]
    Seen,
    /// It is so far below the highest that nobody remembers.
    #[error("the packet is older than the replay window")]
    TooOld,
}

impl ReplayWindow {
    /// A window that has seen nothing.
    pub fn new() -> Self {
        Self {
            next: 0,
            bits: [0; WORDS],
        }
    }

    /// One above the highest number accepted.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether a packet of this number may be accepted.
    pub fn check(&self, number: u64) -> Result<(), Replay> {
        if number >= self.next {
            return Ok(());
        }
        if self.next - number > WINDOW {
            return Err(Replay::TooOld);
        }
        let (word, bit) = place(number);
        if self.bits[word] & bit == 0 {
            Ok(())
        } else {
            Err(Replay::Seen)
        }
    }

    /// Records a packet that [`ReplayWindow::check`] allows and that is authentic.
    pub fn record(&mut self, number: u64) {
        debug_assert_eq!(self.check(number), Ok(()));
        if number >= self.next {
            // Words that the highest number enters held numbers that are too
            // old by now. At most all of them, however far it jumps.
            let entered = (number / 64).saturating_sub(self.next.wrapping_sub(1) / 64);
            if self.next == 0 || entered >= WORDS as u64 {
                self.bits = [0; WORDS];
            } else {
                for ahead in 0..entered {
                    let (word, _) = place(number - ahead * 64);
                    self.bits[word] = 0;
                }
            }
            self.next = number + 1;
        }
        let (word, bit) = place(number);
        self.bits[word] |= bit;
    }
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self::new()
    }
}

fn place(number: u64) -> (usize, u64) {
    ((number / 64 % WORDS as u64) as usize, 1 << (number % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn a_number_is_accepted_once() {
        let mut window = ReplayWindow::new();
        for number in [0, 2, 1, 5000, 4999] {
            assert_eq!(window.check(number), Ok(()), "{number}");
            window.record(number);
            assert_eq!(window.check(number), Err(Replay::Seen), "{number}");
        }
        assert_eq!(window.check(2), Err(Replay::TooOld));
    }

    #[test]
    fn the_edge_is_where_it_is_said_to_be() {
        let mut window = ReplayWindow::new();
        window.record(100_000);
        assert_eq!(window.check(100_001 - WINDOW), Ok(()));
        assert_eq!(window.check(100_000 - WINDOW), Err(Replay::TooOld));
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_set(
            start in 0u64..1 << 47,
            steps in proptest::collection::vec((0i64..3, 0i64..9000), 1..600),
        ) {
            let (mut window, mut seen) = (ReplayWindow::new(), HashSet::new());
            let mut at = start;
            for (how, by) in steps {
                at = match how {
                    0 => at + 1,
                    1 => at + by as u64,
                    _ => at.saturating_sub(by as u64),
                };
                let next = seen.iter().max().map_or(0, |highest| highest + 1);
                prop_assert_eq!(window.next(), next);
                let expected = if at < next && next - at > WINDOW {
                    Err(Replay::TooOld)
                } else if seen.contains(&at) {
                    Err(Replay::Seen)
                } else {
                    Ok(())
                };
                prop_assert_eq!(window.check(at), expected);
                if expected.is_ok() {
                    window.record(at);
                    seen.insert(at);
                }
            }
        }
    }
}
