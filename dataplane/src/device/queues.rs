//! Two devices of several queues each, joined in memory: [`super::pair`] from
//! every queue of one to every queue of the other.
//!
//! A function says which of the receiver's queues a frame comes to, as a NIC's
//! hash or its rules do, well or badly.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::pair::{Options, PairDevice, pair};
use super::{AttachError, Attachment, Capabilities, Counters, Device, TxFrame};
use crate::ledger::Copies;
use crate::memory::{Lease, View};

/// Which of the receiver's queues a frame comes to, modulo how many it has: from
/// the frame's own bytes, and the queue it was sent on.
pub type Sort = fn(&[u8], usize) -> usize;

/// One queue of an end. May only be used from one thread at a time.
#[derive(Debug)]
pub struct QueueDevice {
    queue: usize,
    sort: Sort,
    /// To and from each queue of the other end.
    links: Vec<PairDevice>,
    /// Which of them is received from first.
    turn: usize,
    /// Whether any queue of this end was stopped.
    stopped: Arc<AtomicBool>,
}

/// Makes two devices of `count` queues.
pub fn queues(options: &Options, count: usize, sort: Sort) -> (Vec<QueueDevice>, Vec<QueueDevice>) {
    let stopped = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let [mut first, mut second] = [0, 1].map(|end| {
        let queue = |queue| QueueDevice {
            queue,
            sort,
            links: Vec::with_capacity(count),
            turn: 0,
            stopped: Arc::clone(&stopped[end]),
        };
        (0..count).map(queue).collect::<Vec<_>>()
    });
    for one in &mut first {
        for other in &mut second {
            let (a, b) = pair(options);
            one.links.push(a);
            other.links.push(b);
        }
    }
    (first, second)
}

impl Device for QueueDevice {
    fn capabilities(&self) -> &Capabilities {
        self.links[0].capabilities()
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        if self.is_stopped() {
            return 0;
        }
        self.turn = (self.turn + 1) % self.links.len();
        self.links[self.turn].rx_burst(on_frame)
    }

    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        if self.is_stopped() {
            return 0;
        }
        for (count, frame) in frames.iter().enumerate() {
            let to = (self.sort)(&frame.head, self.queue) % self.links.len();
            if self.links[to].tx_burst(std::slice::from_ref(frame)) == 0 {
                return count;
            }
        }
        frames.len()
    }

    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        // All links give the same handles, as all do the same.
        let mut attachment = Err(AttachError::Full);
        for link in &mut self.links {
            attachment = link.attach(lease.clone());
        }
        attachment
    }

    fn detach(&mut self, attachment: Attachment) -> bool {
        if self.links.iter_mut().any(|link| link.refers(attachment)) {
            return false;
        }
        // No frame refers to it on any of them.
        self.links.iter_mut().all(|link| link.detach(attachment))
    }

    fn reap(&mut self) {
        self.links.iter_mut().for_each(Device::reap);
    }

    fn sweep(&mut self) {
        self.links.iter_mut().for_each(Device::sweep);
    }

    fn stop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.links.iter_mut().for_each(Device::stop);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for one in self.links.iter().map(Device::counters) {
            sum.rx_frames += one.rx_frames;
            sum.rx_bytes += one.rx_bytes;
            sum.tx_frames += one.tx_frames;
            sum.tx_bytes += one.tx_bytes;
            sum.tx_errors += one.tx_errors;
        }
        sum
    }

    fn copies(&self) -> Copies {
        let mut sum = Copies::default();
        self.links.iter().for_each(|link| sum.add(link.copies()));
        sum
    }

    fn link_up(&self) -> bool {
        self.links.iter().all(Device::link_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(device: &mut QueueDevice) -> usize {
        let links = device.links.len();
        (0..links).map(|_| device.rx_burst(&mut |_| {})).sum()
    }

    #[test]
    fn frames_come_to_the_queue_that_the_function_says() {
        let by_first_byte: Sort = |frame, _| usize::from(frame[0]);
        let (mut a, mut b) = queues(&Options::default(), 3, by_first_byte);
        let frame = |byte: u8| TxFrame {
            head: [byte; 20].into_iter().collect(),
            payload: None,
        };
        for one in &mut a {
            assert_eq!(one.tx_burst(&[frame(0), frame(2), frame(5)]), 3);
        }
        let got: Vec<_> = b.iter_mut().map(count).collect();
        assert_eq!(got, [3, 0, 6]);
        assert_eq!(a[1].counters().tx_frames, 3);
        assert_eq!(b[2].counters().rx_frames, 6);
    }

    #[test]
    fn one_queue_stops_all_of_its_end() {
        let (mut a, mut b) = queues(&Options::default(), 2, |_, queue| queue);
        a[0].stop();
        assert!(a[1].is_stopped() && !b[1].is_stopped());
        assert_eq!(a[1].tx_burst(&[TxFrame::default()]), 0);
        assert_eq!(b[1].tx_burst(&[TxFrame::default()]), 1);
    }
}
