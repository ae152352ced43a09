//! Sealed packets between two engines: nothing can be read, nothing counts twice,
//! and nothing of an earlier session counts at all.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::device::{AttachError, Attachment, Capabilities, Counters, Device, TxFrame};
use genie_dataplane::engine::udp::Config;
use genie_dataplane::engine::{OpenError, SealedSnapshot};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Lease, View};
use genie_dataplane::{Secret, Secrets};

use crate::harness::{
    Node, Switches, block_on, config, contents, eventually, random_bytes, region, rigs, short,
    transfer,
};

/// The secrets of both ends.
fn secrets(seed: u8) -> [Secrets; 2] {
    let (one, other) = (Secret([seed; 32]), Secret([!seed; 32]));
    [
        Secrets {
            send: one.clone(),
            receive: other.clone(),
        },
        Secrets {
            send: other,
            receive: one,
        },
    ]
}

fn open(a: &Node, b: &Node, seed: u8) {
    let [ours, theirs] = secrets(seed);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.open_with(a, Some(theirs)));
        a.open_with(b, Some(ours)).expect("a opens");
        other.join().unwrap().expect("b opens");
    });
}

pub(crate) fn connect<D: Device + Send + 'static>(a: D, b: D, config: Config) -> (Node, Node) {
    let (a, b) = (Node::start(a, config.clone()), Node::start(b, config));
    open(&a, &b, 1);
    (a, b)
}

fn dropped(node: &Node) -> SealedSnapshot {
    let snapshot = node.status.snapshot();
    let of = |session: &&genie_dataplane::engine::SessionSnapshot| session.session == node.session;
    let session = snapshot.sessions.iter().find(of);
    session
        .and_then(|session| session.sealed)
        .unwrap_or_default()
}

fn record(switches: &Switches, on: bool) -> Vec<Vec<u8>> {
    switches.records.store(on, Ordering::Relaxed);
    std::mem::take(&mut switches.seen.lock().unwrap())
}

/// Puts frames on the link and waits until all were looked at.
fn inject(switches: &Switches, frames: Vec<Vec<u8>>) {
    switches.injected.lock().unwrap().extend(frames);
    eventually("the frames are taken", || {
        switches.injected.lock().unwrap().is_empty()
    });
}

#[test]
fn tensors_of_all_sizes_arrive_in_both_directions() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let mut random = fastrand::Rng::with_seed(1);
    for len in [0, 1, 63, 64, 65, 8000, 9000, 9001, 100_000, 5_000_000] {
        let bytes = random_bytes(&mut random, len);
        transfer(&a, &b, &bytes);
        transfer(&b, &a, &bytes);
    }
    assert_eq!(dropped(&a), SealedSnapshot::default());
}

#[test]
fn bytes_arrive_exactly_through_faults_over_devices_that_keep_frames() {
    for seed in 0..4 {
        println!("seed {seed}");
        let faults = Faults {
            seed,
            loss: 20,
            duplication: 20,
            corruption: 20,
            reordering: 30,
        };
        // So few descriptors that senders wait for them, and slots with them.
        let (a, b) = pair(&Options {
            mtu: 1500,
            descriptors: 40,
            completes_on_reap: true,
            needs_registration: true,
            ..Options::default()
        });
        let (a, b) = connect(
            FaultyDevice::new(a, faults),
            FaultyDevice::new(
                b,
                Faults {
                    seed: seed + 1000,
                    ..faults
                },
            ),
            config(),
        );
        let bytes = random_bytes(&mut fastrand::Rng::with_seed(seed), 2_000_000);
        let (sent, _) = transfer(&a, &b, &bytes);
        assert!(sent.retransmits > 0, "frames were lost");
        transfer(&b, &a, &bytes[..70_001]);
        eventually("what was spoiled and repeated is counted", || {
            let (a, b) = (dropped(&a), dropped(&b));
            a.forged + b.forged > 0 && a.replayed + b.replayed > 0
        });
    }
}

#[test]
fn nothing_of_a_tensor_can_be_read_on_the_link() {
    let (a, b) = rigs(&Options::default());
    let watch = Arc::clone(&b.switches);
    let (a, b) = connect(a, b, config());
    watch.records.store(true, Ordering::Relaxed);
    let bytes = vec![0x5a; 1_000_000];
    let crc = crc32c::crc32c(&bytes).to_be_bytes();
    transfer(&a, &b, &bytes);
    let seen = record(&watch, false);
    let total: usize = seen.iter().map(Vec::len).sum();
    assert!(total > bytes.len(), "{total} bytes were recorded");
    for frame in &seen {
        assert!(!frame.windows(8).any(|window| window == [0x5a; 8]));
        assert!(!frame.windows(4).any(|window| window == crc));
    }
}

#[test]
fn a_recorded_packet_is_dropped_and_counted() {
    let (a, b) = rigs(&Options::default());
    let watch = Arc::clone(&b.switches);
    let (a, b) = connect(a, b, config());
    watch.records.store(true, Ordering::Relaxed);
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(2), 300_000);
    transfer(&a, &b, &bytes);
    let seen = record(&watch, false);
    assert!(seen.len() > 30, "{} frames", seen.len());
    // The next tensor waits where the recorded one went.
    let destination = region(&vec![7; bytes.len()]);
    let (id, incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
    let count = seen.len() as u64;
    inject(&watch, seen);
    eventually("every one is counted", || dropped(&b).replayed == count);
    assert_eq!(contents(&destination), vec![7; bytes.len()]);
    let outgoing = block_on(a.endpoint.send(a.session, id, region(&bytes))).unwrap();
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    assert_eq!(contents(&destination), bytes);
}

/// What somebody recorded of a session that is over, put into the next one,
/// under its ids: keys are of one path, and never come again.
#[test]
fn a_recorded_session_cannot_be_replayed() {
    let (a, b) = rigs(&Options::default());
    let watch = Arc::clone(&b.switches);
    watch.records.store(true, Ordering::Relaxed);
    let (mut a, mut b) = connect(a, b, config());
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(3), 300_000);
    transfer(&a, &b, &bytes);
    let before = b.session;
    a.endpoint.close(a.session);
    b.endpoint.close(b.session);
    let mut seen = record(&watch, false);
    a.session = a.endpoint.new_session(fastrand::u32(..));
    b.session = b.endpoint.new_session(fastrand::u32(..));
    open(&a, &b, 2);
    let destination = region(&vec![7; bytes.len()]);
    let (id, incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
    let mut count = 0;
    for frame in &mut seen {
        // Who replays can change what is not sealed, if not make it authentic.
        let id = before.0.to_be_bytes();
        if let Some(at) = frame.windows(4).position(|window| window == id) {
            frame[at..at + 4].copy_from_slice(&b.session.0.to_be_bytes());
            count += 1;
        }
    }
    assert!(count > 30, "{count} frames of the session");
    inject(&watch, seen);
    // A few have a number that the new session's own packets had already.
    eventually("every one is counted", || {
        let SealedSnapshot {
            forged, replayed, ..
        } = dropped(&b);
        forged + replayed == count && forged > count / 2
    });
    assert_eq!(contents(&destination), vec![7; bytes.len()]);
    let outgoing = block_on(a.endpoint.send(a.session, id, region(&bytes))).unwrap();
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    assert_eq!(contents(&destination), bytes);
}

#[test]
fn a_flipped_bit_is_found_by_the_tag() {
    let (a, b) = rigs(&Options::default());
    let watch = Arc::clone(&b.switches);
    let (a, b) = connect(a, b, config());
    // Packets that b has not seen: a sends while b is deaf.
    watch.dead.store(true, Ordering::Relaxed);
    watch.records.store(true, Ordering::Relaxed);
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(4), 100_000);
    let destination = region(&vec![7; bytes.len()]);
    let (id, incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
    let outgoing = block_on(a.endpoint.send(a.session, id, region(&bytes))).unwrap();
    eventually("data is recorded", || {
        let seen = watch.seen.lock().unwrap();
        seen.iter().any(|frame| frame.len() > 8000)
    });
    let seen = record(&watch, false);
    let good = seen.iter().find(|frame| frame.len() > 8000).unwrap();
    let bad = (0..8).map(|bit| {
        let mut bad = good.clone();
        let at = bad.len() - 1 - bit * 1000;
        bad[at] ^= 1 << bit;
        bad
    });
    inject(&watch, bad.collect());
    eventually("every one is counted", || dropped(&b).forged == 8);
    assert_eq!(contents(&destination), vec![7; bytes.len()]);
    watch.dead.store(false, Ordering::Relaxed);
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    assert_eq!(contents(&destination), bytes);
}

#[test]
fn an_end_that_seals_and_one_that_does_not_open_no_path() {
    for theirs in [None, Some(secrets(9)[1].clone())] {
        let (a, b) = pair(&Options::default());
        let (a, b) = (Node::start(a, short()), Node::start(b, short()));
        let [ours, _] = secrets(1);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open_with(&a, theirs));
            let opened = a.open_with(&b, Some(ours));
            assert!(matches!(opened, Err(OpenError::NoAnswer(_))), "{opened:?}");
            let opened = other.join().unwrap();
            assert!(matches!(opened, Err(OpenError::NoAnswer(_))), "{opened:?}");
        });
    }
}

#[test]
fn the_ledger_counts_what_sealing_copies() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(5), 1_000_000);
    let (sent, received) = transfer(&a, &b, &bytes);
    // Into the slot where it is sealed; out of the packet to be opened, and on.
    // On a busy machine an answer may be late, and a segment go out again.
    let again = sent.retransmits * 9000;
    let once = bytes.len() as u64;
    let (sent, received) = (sent.copies, received.copies);
    assert!((once..=once + again).contains(&sent.genie), "{sent:?}");
    let twice = 2 * once..=2 * (once + again);
    assert!(twice.contains(&received.genie), "{received:?}");
    assert_eq!((received.driver, received.kernel), (0, 0));
}

#[test]
fn a_device_that_cannot_send_slots_says_so() {
    let refusal = "no mapping for it";
    let (a, b) = pair(&Options::default());
    let a = Node::start(Refusing(a, refusal), config());
    let b = Node::start(b, config());
    for _ in 0..2 {
        let [ours, _] = secrets(1);
        let refused = a.open_with(&b, Some(ours));
        let Err(OpenError::Refused(reason)) = refused else {
            panic!("{refused:?}");
        };
        assert!(reason.contains(refusal), "{reason}");
    }
}

/// A device that reaches no memory but its own.
pub(crate) struct Refusing(pub(crate) PairDevice, pub(crate) &'static str);

impl Device for Refusing {
    fn capabilities(&self) -> &Capabilities {
        self.0.capabilities()
    }
    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        self.0.rx_burst(on_frame)
    }
    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        self.0.tx_burst(frames)
    }
    fn attach(&mut self, _: Lease) -> Result<Attachment, AttachError> {
        Err(AttachError::Unreachable(self.1.into()))
    }
    fn detach(&mut self, attachment: Attachment) -> bool {
        self.0.detach(attachment)
    }
    fn reap(&mut self) {
        self.0.reap();
    }
    fn stop(&mut self) {
        self.0.stop();
    }
    fn counters(&self) -> Counters {
        self.0.counters()
    }
    fn copies(&self) -> Copies {
        self.0.copies()
    }
    fn link_up(&self) -> bool {
        true
    }
}
