//! Several queues of one device, each with an engine: frames that come to the
//! wrong one are passed on.
//!
//! Every engine listens on a UDP port of its own, the first one's and those
//! behind it, so any queue sees from a frame whose it is. A NIC may be told to
//! sort by that; where frames come to another queue all the same, [`Steered`]
//! copies them into a ring toward their owner. The invariants: *engines share
//! nothing but these rings*, each of which has one writer and one reader, and *a
//! full ring loses the frame*, which is counted and recovered as any loss is.
//!
//! What is no datagram stays where it came, so that a question is answered once,
//! but answers of ARP and neighbour discovery go to every engine: each has a
//! table of its own, and only those learn that have asked.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::frame::{self, Addressee};
use super::ring::Bell;
use crate::device::tap::TapSnapshot;
use crate::device::{
    AttachError, Attachment, BURST_MAX, Capabilities, Counters, Device, Steering, TxFrame,
};
use crate::ledger::Copies;
use crate::memory::{Lease, View};

/// Ethernet header and two VLAN tags: what is longer than an IP packet.
const ETHERNET: usize = 14 + 8;

/// How much is kept in a ring between two queues.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Frames.
    pub frames: usize,
    /// Bytes of the longest.
    pub frame_bytes: usize,
}

/// One queue's place among its siblings; see [`places`].
#[derive(Debug)]
pub struct Place {
    /// UDP port of the first queue's engine.
    first_port: u16,
    /// Toward the queue of that index; none toward itself.
    outgoing: Vec<Option<Outgoing>>,
    incoming: Vec<Incoming>,
    /// Which of them is looked at first, so that each has its turn.
    turn: usize,
    /// Rung for this queue by its siblings.
    bell: Arc<Bell>,
    steering: Steering,
    copied_bytes: u64,
}

/// A frame that was passed on.
#[derive(Debug)]
struct Passed {
    len: usize,
    bytes: Box<[u8]>,
}

/// Full buffers one way, empty ones back.
#[derive(Debug)]
struct Outgoing {
    full: rtrb::Producer<Passed>,
    empty: rtrb::Consumer<Passed>,
    bell: Arc<Bell>,
    /// Whether anything was put in since the owner was last woken.
    fresh: bool,
}

#[derive(Debug)]
struct Incoming {
    full: rtrb::Consumer<Passed>,
    empty: rtrb::Producer<Passed>,
}

/// A queue of a device whose frames may come to any of its queues.
///
/// May only be used from the thread that uses the queue. One alone passes
/// nothing on and costs nothing.
#[derive(Debug)]
pub struct Steered<D> {
    inner: D,
    place: Place,
}

impl Room {
    /// For queues like this: as many frames as peers may have in flight toward
    /// one engine.
    pub fn of(capabilities: &Capabilities) -> Self {
        Self {
            frames: usize::from(capabilities.rx_descriptors / 2).max(1),
            frame_bytes: usize::from(capabilities.mtu) + ETHERNET,
        }
    }
}

/// Makes the places of so many queues, whose engines listen on `first_port` and
/// the ports behind it.
pub fn places(queues: u16, first_port: u16, room: Room) -> rustix::io::Result<Vec<Place>> {
    let count = usize::from(queues);
    let bells = (0..count).map(|_| Bell::new().map(Arc::new));
    let bells = bells.collect::<rustix::io::Result<Vec<_>>>()?;
    let place = |(queue, bell): (u16, &Arc<Bell>)| Place {
        first_port,
        outgoing: Vec::with_capacity(count),
        incoming: Vec::with_capacity(count),
        turn: 0,
        bell: Arc::clone(bell),
        steering: Steering {
            queue,
            queues,
            ..Steering::default()
        },
        copied_bytes: 0,
    };
    let mut places: Vec<_> = (0..queues).zip(&bells).map(place).collect();
    for from in 0..count {
        for (to, bell) in bells.iter().enumerate() {
            if from == to {
                places[from].outgoing.push(None);
                continue;
            }
            let (outgoing, incoming) = ring(room, bell);
            places[from].outgoing.push(Some(outgoing));
            places[to].incoming.push(incoming);
        }
    }
    Ok(places)
}

fn ring(room: Room, bell: &Arc<Bell>) -> (Outgoing, Incoming) {
    let (full_in, full_out) = rtrb::RingBuffer::new(room.frames);
    let (mut empty_in, empty_out) = rtrb::RingBuffer::new(room.frames);
    for _ in 0..room.frames {
        let bytes = vec![0; room.frame_bytes].into_boxed_slice();
        empty_in
            .push(Passed { len: 0, bytes })
            .expect("the ring was made for this many buffers");
    }
    (
        Outgoing {
            full: full_in,
            empty: empty_out,
            bell: Arc::clone(bell),
            fresh: false,
        },
        Incoming {
            full: full_out,
            empty: empty_in,
        },
    )
}

impl Place {
    /// Which queue's it is.
    pub fn queue(&self) -> u16 {
        self.steering.queue
    }

    /// UDP port of the queue's engine.
    pub fn port(&self) -> u16 {
        self.first_port.wrapping_add(self.steering.queue)
    }

    fn is_alone(&self) -> bool {
        self.incoming.is_empty()
    }

    /// Shows frames that siblings passed on, up to a burst of them.
    fn take(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        let count = self.incoming.len();
        self.turn = (self.turn + 1) % count;
        let mut taken = 0;
        for index in 0..count {
            let ring = &mut self.incoming[(self.turn + index) % count];
            while taken < BURST_MAX
                && let Ok(passed) = ring.full.pop()
            {
                on_frame(View::from(&passed.bytes[..passed.len]));
                ring.empty
                    .push(passed)
                    .expect("there are as many places as buffers");
                taken += 1;
            }
        }
        self.steering.received += taken as u64;
        taken
    }

    /// Passes a frame on where it belongs; whether it is this queue's too.
    fn sort(&mut self, frame: View<'_>) -> bool {
        let mut head = [0; frame::HEADERS_MAX];
        let have = frame.copy_to(&mut head);
        match frame::addressee(&head[..have]) {
            Addressee::Port(port) => {
                let owner = usize::from(port.wrapping_sub(self.first_port));
                match self.outgoing.get(owner) {
                    Some(Some(_)) => self.pass(owner, frame),
                    // Our own, or nobody's, which the engine counts.
                    Some(None) | None => return true,
                }
                false
            }
            Addressee::Everybody => {
                for owner in 0..self.outgoing.len() {
                    if self.outgoing[owner].is_some() {
                        self.pass(owner, frame);
                    }
                }
                true
            }
            Addressee::Anybody => true,
        }
    }

    fn pass(&mut self, owner: usize, frame: View<'_>) {
        let Some(ring) = &mut self.outgoing[owner] else {
            return;
        };
        let fits = |passed: &Passed| frame.len() <= passed.bytes.len();
        let buffer = ring.empty.peek().is_ok_and(fits).then(|| ring.empty.pop());
        let Some(Ok(mut passed)) = buffer else {
            self.steering.dropped += 1;
            return;
        };
        passed.len = frame.copy_to(&mut passed.bytes);
        self.copied_bytes += passed.len as u64;
        ring.full
            .push(passed)
            .expect("there are as many places as buffers");
        ring.fresh = true;
        self.steering.forwarded += 1;
    }

    /// Wakes the siblings that something was passed on to.
    fn wake(&mut self) {
        for ring in self.outgoing.iter_mut().flatten() {
            if std::mem::take(&mut ring.fresh) {
                ring.bell.ring_if_asleep();
            }
        }
    }
}

impl<D: Device> Steered<D> {
    /// Gives a queue its place.
    pub fn new(inner: D, place: Place) -> Self {
        Self { inner, place }
    }
}

impl<D: Device> Device for Steered<D> {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        let Self { inner, place } = self;
        if place.is_alone() {
            return inner.rx_burst(on_frame);
        }
        let taken = place.take(on_frame);
        let received = inner.rx_burst(&mut |frame| {
            if place.sort(frame) {
                on_frame(frame);
            }
        });
        if received > 0 {
            place.wake();
        }
        taken + received
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
        self.inner.stop();
    }

    fn is_stopped(&self) -> bool {
        self.inner.is_stopped()
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }

    fn cautions(&self) -> Vec<String> {
        self.inner.cautions()
    }

    fn lacks(&self) -> Vec<String> {
        self.inner.lacks()
    }

    fn steering(&self) -> Option<Steering> {
        (!self.place.is_alone()).then_some(self.place.steering)
    }

    fn tap(&self) -> Option<TapSnapshot> {
        self.inner.tap()
    }

    fn copies(&self) -> Copies {
        let mut copies = self.inner.copies();
        copies.genie += self.place.copied_bytes;
        copies
    }

    fn link_up(&self) -> bool {
        self.inner.link_up()
    }

    fn rx_event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.rx_event()
    }

    fn passed_event(&self) -> Option<BorrowedFd<'_>> {
        (!self.place.is_alone()).then(|| self.place.bell.as_fd())
    }

    fn arm_rx(&mut self, on: bool) -> bool {
        // Before the last look at the rings, which the caller takes after this.
        if on {
            self.place.bell.prepare_sleep();
        }
        let armed = self.inner.arm_rx(on);
        if !armed {
            self.place.bell.finish_sleep();
        }
        armed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::pair::{Options, PairDevice, pair};
    use crate::engine::frame::{End, Flow};

    const FIRST: u16 = 5556;
    const ROOM: Room = Room {
        frames: 4,
        frame_bytes: 200,
    };

    /// Queues of a device with their peers, which stand for the wire.
    fn steered(queues: u16, room: Room) -> (Vec<Steered<PairDevice>>, Vec<PairDevice>) {
        let places = places(queues, FIRST, room).unwrap();
        let one = |place| {
            let (device, wire) = pair(&Options::default());
            (Steered::new(device, place), wire)
        };
        places.into_iter().map(one).unzip()
    }

    fn datagram(port: u16, tag: u8) -> TxFrame {
        let end = |address: &str, port| End {
            mac: [2; 6],
            address: std::net::SocketAddr::new(address.parse().unwrap(), port),
        };
        let family = if tag.is_multiple_of(2) {
            ("10.0.0.1", "10.0.0.2")
        } else {
            ("fd00::1", "fd00::2")
        };
        let flow = Flow::new(end(family.0, 9), end(family.1, port)).unwrap();
        let mut frame = TxFrame::default();
        flow.begin_headers(&mut frame.head);
        flow.finish_headers(&mut frame.head, 3);
        frame.head.try_extend_from_slice(&[tag; 3]).unwrap();
        frame
    }

    /// The last byte of every frame that is received.
    fn tags(device: &mut impl Device) -> Vec<u8> {
        let mut tags = Vec::new();
        device.rx_burst(&mut |frame| {
            let mut bytes = vec![0; frame.len()];
            frame.copy_to(&mut bytes);
            tags.extend(bytes.last());
        });
        tags
    }

    #[test]
    fn frames_reach_their_owner_whichever_queue_they_come_to() {
        let (mut queues, mut wires) = steered(3, ROOM);
        for (wire, tags) in wires.iter_mut().zip([[0, 1, 2], [3, 4, 5], [6, 7, 8]]) {
            let frames = [0, 1, 2].map(|owner| datagram(FIRST + owner, tags[usize::from(owner)]));
            assert_eq!(wire.tx_burst(&frames), 3);
        }
        let mut got = [(); 3].map(|()| Vec::new());
        for _ in 0..2 {
            for (queue, got) in queues.iter_mut().zip(&mut got) {
                got.extend(tags(queue));
            }
        }
        got.iter_mut().for_each(|got| got.sort_unstable());
        assert_eq!(got, [[0, 3, 6], [1, 4, 7], [2, 5, 8]]);
        for (index, queue) in (0..).zip(&queues) {
            let expected = Steering {
                queue: index,
                queues: 3,
                forwarded: 2,
                received: 2,
                dropped: 0,
            };
            assert_eq!(queue.steering(), Some(expected));
        }
    }

    #[test]
    fn a_full_ring_drops_and_counts_and_then_goes_on() {
        let (mut queues, mut wires) = steered(2, ROOM);
        let (first, second) = queues.split_at_mut(1);
        for round in 0..3 {
            let frames: Vec<_> = (0..6).map(|tag| datagram(FIRST + 1, tag)).collect();
            assert_eq!(wires[0].tx_burst(&frames), 6);
            assert_eq!(tags(&mut first[0]), []);
            assert_eq!(tags(&mut second[0]), [0, 1, 2, 3], "round {round}");
            let steering = first[0].steering().unwrap();
            assert_eq!(
                (steering.forwarded, steering.dropped),
                (4 * (round + 1), 2 * (round + 1))
            );
        }
        // Headers and payload of the four that were passed on, each time: two of
        // either family.
        let bytes = [14 + 20 + 8 + 3, 14 + 40 + 8 + 3].map(|len| 3 * 2 * len);
        assert_eq!(first[0].copies().genie, bytes.iter().sum::<u64>());
    }

    #[test]
    fn a_frame_longer_than_a_buffer_is_dropped() {
        let room = Room {
            frames: 4,
            frame_bytes: 40,
        };
        let (mut queues, mut wires) = steered(2, room);
        wires[0].tx_burst(&[datagram(FIRST + 1, 0)]);
        assert_eq!(tags(&mut queues[0]), []);
        assert_eq!(tags(&mut queues[1]), []);
        assert_eq!(queues[0].steering().unwrap().dropped, 1);
    }

    #[test]
    fn strangers_stay_and_answers_of_neighbours_go_to_all() {
        use crate::engine::link::Link;
        let (mut queues, mut wires) = steered(2, ROOM);
        for family in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (own, peer) = (family.0.parse().unwrap(), family.1.parse().unwrap());
            let mut asking = Link::new([2; 6], vec![own]);
            let question = asking.request(own, peer).unwrap();
            let answer = Link::new([4; 6], vec![peer]).handle(&question).unwrap();
            let frame = |head| TxFrame {
                head,
                payload: None,
            };
            wires[0].tx_burst(&[frame(question), datagram(9, 7), frame(answer)]);
            assert_eq!(tags(&mut queues[0]).len(), 3);
            assert_eq!(tags(&mut queues[1]).len(), 1, "only the answer");
        }
    }

    #[test]
    fn a_sleeper_is_woken_by_what_is_passed_on_and_by_nothing_else() {
        use rustix::event::{PollFd, PollFlags, Timespec};
        let (mut queues, mut wires) = steered(2, ROOM);
        let (first, second) = queues.split_at_mut(1);
        let rung = |queue: &Steered<PairDevice>| {
            let event = queue.passed_event().unwrap();
            let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
        };
        let mut pass = || {
            wires[0].tx_burst(&[datagram(FIRST + 1, 0)]);
            tags(&mut first[0]);
        };
        pass();
        assert!(!rung(&second[0]), "it is awake");
        second[0].place.bell.prepare_sleep();
        assert!(!rung(&second[0]));
        pass();
        assert!(rung(&second[0]));
        // A device without interrupts is not slept on.
        assert!(!second[0].arm_rx(true));
    }
}
