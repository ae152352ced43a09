//! The thread that does a simulated device's copies.

use super::{ECC_UNCORRECTABLE, Fault, Queue, Shared, State, UNKNOWN, Work, call};
use crate::memory::accelerator::{AcceleratorError, CopyOp, DeviceLease, Piece, Way};

impl Shared {
    /// Does what the streams have queued until the device is gone.
    pub(super) fn run(&self) {
        let mut random = fastrand::Rng::with_seed(self.config.seed);
        let mut turn = 0;
        while let Some((stream, work)) = self.take(&mut random, &mut turn) {
            let result = match &work {
                Work::Copy(ops) => self.operate(|| ops.iter().for_each(|op| self.copy(op))),
                Work::Gather(pieces) => {
                    self.operate(|| pieces.iter().for_each(|piece| self.move_piece(piece)))
                }
                Work::Batch(_) | Work::Wait(_) | Work::Signal(_) => Ok(()),
            };
            let left_over = self.finish(stream, &work, result);
            // With these leases may go memory, which takes the lock.
            drop((work, left_over));
        }
    }

    /// The head of some stream that can go on; `None` once the device is gone.
    fn take(&self, random: &mut fastrand::Rng, turn: &mut usize) -> Option<(u64, Work)> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            let mut ready = state.ready();
            if !ready.is_empty() {
                ready.sort_unstable();
                *turn = turn.wrapping_add(1);
                let at = if self.config.reorder {
                    random.usize(..ready.len())
                } else {
                    *turn % ready.len()
                };
                let stream = ready[at];
                let queue = state.streams.get_mut(&stream)?;
                queue.busy = true;
                return queue.work.pop_front().map(|work| (stream, work));
            }
            state = self.wait(state);
        }
    }

    /// Copies, unless this is the operation that is to fail.
    fn operate(&self, copy: impl FnOnce()) -> Result<(), AcceleratorError> {
        std::thread::sleep(self.config.delay);
        let mut state = self.lock();
        state.alive()?;
        state.fail_if_due()?;
        drop(state);
        copy();
        self.lock().copies_done += 1;
        Ok(())
    }

    /// Where leased bytes of the device really are.
    fn bytes(&self, lease: &DeviceLease) -> *mut u8 {
        let at = self.lock().private(lease.address(), lease.len());
        at.expect("checked when it was begun, and leased since")
    }

    fn move_piece(&self, Piece { from, to }: &Piece) {
        let (len, from, to) = (from.len(), self.bytes(from), self.bytes(to));
        // SAFETY: `check_piece` saw `len` bytes at both ends when it was begun,
        // and the leases keep both mapped; `copy` allows them to overlap.
        unsafe { std::ptr::copy(from, to, len) };
    }

    fn copy(&self, op: &CopyOp) {
        let (host, len) = (op.host.as_ptr(), op.host.len());
        let device = self.bytes(&op.device);
        match op.way {
            // SAFETY: `check_copy` saw `len` bytes at both ends when the copy
            // was begun, and the leases in `op` keep both mapped. They are two
            // different mappings, so they do not overlap.
            Way::ToDevice => unsafe { std::ptr::copy_nonoverlapping(host, device, len) },
            // SAFETY: as above, the other way.
            Way::ToHost => unsafe { std::ptr::copy_nonoverlapping(device, host, len) },
        }
    }

    /// Notes how the head ended; returns what must be dropped without the lock.
    fn finish(&self, stream: u64, work: &Work, result: Result<(), AcceleratorError>) -> Vec<Work> {
        let mut state = self.lock();
        let mut left_over = Vec::new();
        if let Err(error) = result {
            if error.is_sticky() {
                state.sticky = Some(error.clone());
            }
            if let Some(queue) = state.streams.get_mut(&stream) {
                left_over.extend(queue.work.drain(..));
                queue.completed = queue.begun;
                queue.error = Some(error);
            }
        }
        match work {
            Work::Signal(event) => drop(state.signalled.insert(*event)),
            Work::Batch(number) => {
                if let Some(queue) = state.streams.get_mut(&stream) {
                    queue.completed = queue.completed.max(*number);
                }
            }
            Work::Copy(_) | Work::Gather(_) | Work::Wait(_) => {}
        }
        if let Some(queue) = state.streams.get_mut(&stream) {
            queue.busy = false;
        }
        self.changed.notify_all();
        left_over
    }
}

impl State {
    fn ready(&self) -> Vec<u64> {
        let goes_on = |queue: &Queue| match queue.work.front() {
            None => false,
            Some(Work::Wait(event)) => self.signalled.contains(event),
            Some(Work::Copy(_) | Work::Gather(_)) => !self.held,
            Some(_) => true,
        };
        let ready = self.streams.iter().filter(|(_, queue)| goes_on(queue));
        ready.map(|(stream, _)| *stream).collect()
    }

    fn fail_if_due(&mut self) -> Result<(), AcceleratorError> {
        match &mut self.failing {
            Some((0, fault)) => {
                let error = match fault {
                    Fault::Once => call("copy", UNKNOWN, "asked to fail".into(), false),
                    Fault::Sticky => {
                        let text = "asked to fail like an uncorrectable memory error";
                        call("copy", ECC_UNCORRECTABLE, text.into(), true)
                    }
                };
                self.failing = None;
                Err(error)
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}
