//! A device that treats received frames badly: loss, duplication, corruption
//! and reordering, from a seed.
//!
//! Wraps any other device, so that the protocol is tested on the very drivers
//! it runs on.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use super::kept::Kept;
use super::{AttachError, Attachment, Capabilities, Counters, Device, FrameId, Steering, TxFrame};
use crate::ledger::Copies;
use crate::memory::{Lease, View};

/// How badly; each probability is in thousandths, per frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Seed of all decisions.
    pub seed: u64,
    /// Frames that never arrive.
    pub loss: u32,
    /// Frames that arrive twice.
    pub duplication: u32,
    /// Frames with one to four flipped bits.
    pub corruption: u32,
    /// Frames that later frames overtake.
    pub reordering: u32,
}

/// What was done to frames so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Frames dropped.
    pub lost: u64,
    /// Frames delivered twice.
    pub duplicated: u64,
    /// Frames changed.
    pub corrupted: u64,
    /// Frames held back.
    pub reordered: u64,
}

/// A device around another one. May only be used from the thread that uses that.
#[derive(Debug)]
pub struct FaultyDevice<D> {
    inner: D,
    faults: Faults,
    random: fastrand::Rng,
    /// Frames held back, each with how many bursts it has to wait still.
    held: VecDeque<(u32, Vec<u8>)>,
    /// Frames are this device's own, so it keeps them itself.
    kept: Kept<Vec<u8>>,
    done: Done,
}

impl<D: Device> FaultyDevice<D> {
    /// Wraps `inner`.
    pub fn new(inner: D, faults: Faults) -> Self {
        let random = fastrand::Rng::with_seed(faults.seed);
        Self {
            kept: Kept::new(inner.keepable()),
            inner,
            faults,
            random,
            held: VecDeque::new(),
            done: Done::default(),
        }
    }

    /// What was done to frames so far.
    pub fn done(&self) -> Done {
        self.done
    }
}

impl<D: Device> Device for FaultyDevice<D> {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        self.rx_burst_keeping(&mut |frame, _| {
            on_frame(frame);
            false
        })
    }

    fn keepable(&self) -> u32 {
        self.kept.most()
    }

    fn kept(&self, frame: FrameId) -> View<'_> {
        let kept = self.kept.get(frame);
        kept.map(|frame| View::from(&frame[..])).unwrap_or_default()
    }

    fn give_back(&mut self, frame: FrameId) {
        self.kept.take(frame);
    }

    fn rx_burst_keeping(
        &mut self,
        on_frame: &mut dyn FnMut(View<'_>, Option<FrameId>) -> bool,
    ) -> usize {
        let Self {
            inner,
            faults,
            random,
            held,
            kept,
            done,
        } = self;
        let mut on_frame = |frame: &[u8]| {
            if on_frame(View::from(frame), kept.next()) {
                kept.keep(frame.to_vec());
            }
        };
        let mut delivered = 0;
        for _ in 0..held.len() {
            let (wait, frame) = held.pop_front().expect("counted just now");
            if wait == 0 {
                on_frame(&frame);
                delivered += 1;
            } else {
                held.push_back((wait - 1, frame));
            }
        }
        inner.rx_burst(&mut |view| {
            let mut hit = |thousandths| random.u32(0..1000) < thousandths;
            let (lost, twice) = (hit(faults.loss), hit(faults.duplication));
            let (corrupt, late) = (hit(faults.corruption), hit(faults.reordering));
            if lost {
                done.lost += 1;
                return;
            }
            let mut frame = vec![0; view.len()];
            view.copy_to(&mut frame);
            if corrupt && !frame.is_empty() {
                done.corrupted += 1;
                for _ in 0..random.u32(1..=4) {
                    let byte = random.usize(0..frame.len());
                    frame[byte] ^= 1 << random.u32(0..8);
                }
            }
            for _ in 0..1 + u32::from(twice) {
                if late {
                    held.push_back((random.u32(1..40), frame.clone()));
                } else {
                    on_frame(&frame);
                    delivered += 1;
                }
            }
            done.duplicated += u64::from(twice);
            done.reordered += u64::from(late);
        });
        delivered
    }

    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        self.inner.tx_burst(frames)
    }

    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        self.inner.attach(lease)
    }

    fn detach(&mut self, attachment: Attachment) -> bool {
        self.inner.detach(attachment)
    }

    fn reap(&mut self) {
        self.inner.reap();
    }

    fn sweep(&mut self) {
        self.inner.sweep();
    }

    fn stop(&mut self) {
        self.held.clear();
        self.inner.stop();
    }

    fn is_stopped(&self) -> bool {
        self.inner.is_stopped()
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }

    fn copies(&self) -> Copies {
        self.inner.copies()
    }

    fn link_up(&self) -> bool {
        self.inner.link_up()
    }

    fn rx_event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.rx_event()
    }

    fn steering(&self) -> Option<Steering> {
        self.inner.steering()
    }

    fn passed_event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.passed_event()
    }

    fn arm_rx(&mut self, on: bool) -> bool {
        // What is held back comes out by being polled for.
        self.inner.arm_rx(on && self.held.is_empty())
    }
}
