//! Devices of several queues with an engine each, whose frames come to wrong ones.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::Options;
use genie_dataplane::device::queues::{QueueDevice, Sort, queues};
use genie_dataplane::device::{
    AttachError, Attachment, Capabilities, Counters, Device, Steering, TxFrame,
};
use genie_dataplane::engine::steer::{Room, Steered, places};
use genie_dataplane::engine::udp::{self, Config};
use genie_dataplane::engine::{FailReason, Status};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Lease, View};

use crate::harness::{
    Node, block_on, config, eventually, outcome, random_bytes, region, short, transfer,
};

/// Nothing is sorted: what a NIC without rules does.
const ALL_TO_FIRST: Sort = |_, _| 0;

/// As a hash does that knows nothing of ports.
const ANYWHERE: Sort = |frame, queue| {
    let sum: usize = frame.iter().map(|byte| usize::from(*byte)).sum();
    sum + queue
};

/// The engines of both ends, on these devices.
fn start<D: Device + Send + 'static>(
    ends: (Vec<D>, Vec<D>),
    config: &Config,
) -> (Vec<Node>, Vec<Node>) {
    let end = |mut devices: Vec<D>| {
        let first = devices.remove(0);
        let open = move || Ok::<_, Infallible>((first, devices));
        let engines = udp::spawn_queues(config.clone(), open, Ok).unwrap();
        let nodes: Vec<_> = engines.into_iter().map(Node::of).collect();
        for (node, port) in nodes.iter().zip(config.port..) {
            assert_eq!(node.local.port, port);
        }
        nodes
    };
    (end(ends.0), end(ends.1))
}

/// Opens a session between each engine of one end and its neighbour's of the other.
fn cross(a: &[Node], b: &mut [Node]) {
    b.rotate_left(1);
    for (a, b) in a.iter().zip(b) {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(a));
            a.open(b).expect("a opens");
            other.join().unwrap().expect("b opens");
        });
    }
}

/// Moves tensors both ways in all sessions at once.
fn move_all(a: &[Node], b: &[Node], lens: &[usize]) {
    std::thread::scope(|scope| {
        for (index, (a, b)) in a.iter().zip(b).enumerate() {
            for (seed, from, to) in [(2 * index, a, b), (2 * index + 1, b, a)] {
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed as u64);
                    for len in lens {
                        transfer(from, to, &random_bytes(&mut random, *len));
                    }
                });
            }
        }
    });
}

/// All zero until the engine has published something.
fn steering(status: &Status) -> Steering {
    status.snapshot().steering.unwrap_or_default()
}

#[test]
fn tensors_arrive_where_every_frame_comes_to_the_first_queue() {
    let (a, mut b) = start(queues(&Options::default(), 3, ALL_TO_FIRST), &config());
    cross(&a, &mut b);
    move_all(&a, &b, &[0, 1, 9000, 3_000_000]);
    // Turned by one, to meet its neighbours.
    let (first, others) = (&b[2], &b[..2]);
    eventually("the first queue of b tells what it passed on", || {
        let told = steering(&first.status);
        let received: u64 = others.iter().map(|o| steering(&o.status).received).sum();
        // 3 MB each way for two engines, in frames of at most 9 kB.
        told.forwarded > 600 && received == told.forwarded
    });
    assert_eq!(steering(&first.status).received, 0);
    for other in others {
        assert_eq!(steering(&other.status).forwarded, 0);
    }
    eventually("what is passed on is counted as copied", || {
        a[0].status.snapshot().copies.genie > 6_000_000
    });
}

#[test]
fn tensors_arrive_from_any_queue_through_loss_and_repetition() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let (a, b) = queues(&Options::default(), 2, ANYWHERE);
    let mut end = 0;
    let mut faulty = |device| {
        end += 1;
        let faults = Faults {
            seed: seed + end,
            loss: 20,
            duplication: 20,
            corruption: 5,
            reordering: 20,
        };
        FaultyDevice::new(device, faults)
    };
    let a = a.into_iter().map(&mut faulty).collect();
    let b = b.into_iter().map(&mut faulty).collect();
    let (a, mut b) = start((a, b), &config());
    cross(&a, &mut b);
    move_all(&a, &b, &[1, 100_000, 2_000_000]);
    eventually("all queues have passed frames on", || {
        let mut all = a.iter().chain(&b);
        all.all(|node| steering(&node.status).forwarded > 0)
    });
}

/// Engines on places of their own, with rings far shorter than what is in flight.
#[test]
fn what_a_full_ring_loses_is_sent_again() {
    let room = Room {
        frames: 2,
        frame_bytes: 9022,
    };
    let (a, b) = queues(&Options::default(), 2, ALL_TO_FIRST);
    let start = |devices: Vec<QueueDevice>| -> Vec<Node> {
        let places = places(2, config().port, room).unwrap();
        let start = |(device, place): (_, genie_dataplane::engine::steer::Place)| {
            let config = Config {
                port: place.port(),
                ..config()
            };
            Node::start(Steered::new(device, place), config)
        };
        devices.into_iter().zip(places).map(start).collect()
    };
    let (a, mut b) = (start(a), start(b));
    cross(&a, &mut b);
    move_all(&a, &b, &[4_000_000]);
    eventually("a ring was full", || {
        steering(&a[0].status).dropped + steering(&b[1].status).dropped > 0
    });
}

#[test]
fn an_engine_that_sleeps_on_interrupts_gets_what_is_passed_on() {
    let (a, b) = queues(&Options::default(), 2, ALL_TO_FIRST);
    // The first queue has no interrupts; the second has, and none ever comes.
    let doze = |devices: Vec<QueueDevice>| -> Vec<Wrapped> {
        let second = |(index, device)| Wrapped::new(device, index == 1);
        devices.into_iter().enumerate().map(second).collect()
    };
    let (a, b) = start((doze(a), doze(b)), &config());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b[1].open(&a[1]));
        a[1].open(&b[1]).expect("a opens");
        other.join().unwrap().expect("b opens");
    });
    for len in [1, 100_000, 1_000_000] {
        // Long enough for both to be asleep.
        std::thread::sleep(std::time::Duration::from_millis(20));
        transfer(&a[1], &b[1], &vec![len as u8; len]);
    }
    eventually("the second queue slept, and got frames", || {
        let slept = b[1].status.snapshot().idle.is_some_and(|i| i.sleeps > 0);
        slept && steering(&b[1].status).received > 100
    });
}

#[test]
fn a_queue_that_is_stuck_ends_its_siblings_and_everybody_is_answered() {
    let options = Options {
        completes_on_reap: true,
        ..Options::default()
    };
    let (a, b) = queues(&options, 2, |_, queue| queue);
    let wrap = |devices: Vec<QueueDevice>| -> Vec<Wrapped> {
        let one = |device| Wrapped::new(device, false);
        devices.into_iter().map(one).collect()
    };
    let (a, b) = (wrap(a), wrap(b));
    let dead = Arc::clone(&a[0].dead);
    let (mut a, b) = start((a, b), &short());
    for (a, b) in a.iter().zip(&b) {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(a));
            a.open(b).expect("a opens");
            other.join().unwrap().expect("b opens");
        });
    }
    // Under way on the sound queue for as long as nobody sends.
    let (_, waiting) = block_on(a[1].endpoint.receive(a[1].session, region(&[0; 9]))).unwrap();
    let (id, _incoming) =
        block_on(b[0].endpoint.receive(b[0].session, region(&[0; 5_000_000]))).unwrap();
    dead.store(true, Ordering::Relaxed);
    let source = region(&[1; 5_000_000]);
    let memory = Arc::downgrade(source.region());
    let outgoing = block_on(a[0].endpoint.send(a[0].session, id, source)).unwrap();
    let answer = outcome(outgoing).expect("answered though the queue is dead");
    assert!(matches!(answer, Err(FailReason::PathLost(_))), "{answer:?}");
    assert!(memory.upgrade().is_none());
    let answer = outcome(waiting).expect("answered though another queue is dead");
    assert!(matches!(answer, Err(FailReason::PathLost(_))), "{answer:?}");
    for node in &mut a {
        node.engine.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_queue_whose_thread_cannot_use_it_ends_those_before_it() {
    #[derive(Debug, thiserror::Error)]
    #[error("not this one")]
    struct Refused;
    let (mut a, _b) = queues(&Options::default(), 3, ALL_TO_FIRST);
    let gone = Arc::new(());
    let alive = Arc::downgrade(&gone);
    let held: Vec<_> = a.drain(..).map(|one| (one, Arc::clone(&gone))).collect();
    drop(gone);
    let open = move || {
        let mut held = held.into_iter();
        let (first, _) = held.next().unwrap();
        Ok::<_, Refused>((first, held.collect()))
    };
    let enter = |(device, _): (QueueDevice, Arc<()>)| match device.capabilities().mtu {
        9000 => Err(Refused),
        _ => Ok(device),
    };
    let error = udp::spawn_queues(config(), open, enter).unwrap_err();
    let chain = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(chain, "not this one");
    assert!(alive.upgrade().is_none(), "every queue was given up");
}

/// A queue that may have interrupts of which none comes, and may die.
struct Wrapped {
    inner: QueueDevice,
    capabilities: Capabilities,
    event: Option<OwnedFd>,
    /// Neither delivers frames nor finishes those it took.
    dead: Arc<AtomicBool>,
}

impl Wrapped {
    fn new(inner: QueueDevice, interrupts: bool) -> Self {
        let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        Self {
            capabilities: Capabilities {
                rx_interrupt: interrupts,
                ..inner.capabilities().clone()
            },
            inner,
            event: interrupts.then(event),
            dead: Arc::default(),
        }
    }

    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }
}

impl Device for Wrapped {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        if self.is_dead() {
            return 0;
        }
        self.inner.rx_burst(on_frame)
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
        if !self.is_dead() {
            self.inner.reap();
        }
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
    fn copies(&self) -> Copies {
        self.inner.copies()
    }
    fn link_up(&self) -> bool {
        true
    }
    fn rx_event(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(AsFd::as_fd)
    }
    fn arm_rx(&mut self, on: bool) -> bool {
        on && self.event.is_some()
    }
}
