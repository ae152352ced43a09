//! What arrives, and that wire and copies overlap.

use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::memory::accelerator::Way;
use genie_dataplane::stage::{Span, Step};
use genie_proto::DigestBuilder;

use super::*;

/// Delayed and reordered: no copy is done when it is begun.
fn slow(seed: u64) -> sim::Config {
    sim::Config {
        delay: Duration::from_millis(2),
        seed,
        ..sim::Config::default()
    }
}

fn over_tcp(test: impl FnOnce(&End, &End)) {
    let link = tcp::Link::new(2);
    {
        let a = End::new(slow(1), &link.a.endpoint, link.ids.0);
        let b = End::new(slow(2), &link.b.endpoint, link.ids.1);
        test(&a, &b);
    }
    link.stop();
}

fn over_udp(options: &Options, test: impl FnOnce(&End, &End)) {
    let (a, b) = pair(options);
    let (a, b) = udp::connect(a, b, udp::config());
    let from = End::new(slow(3), &a.endpoint, a.session);
    let to = End::new(slow(4), &b.endpoint, b.session);
    test(&from, &to);
}

/// Lengths around those of slots and granules.
const LENGTHS: [usize; 6] = [0, 1, 65_535, 65_536, 65_537, 1_000_003];

fn every_length_arrives(from: &End, to: &End) {
    let mut random = fastrand::Rng::with_seed(5);
    for len in LENGTHS {
        let bytes = udp::random_bytes(&mut random, len);
        let (source, into) = (from.upload(&bytes), to.device(len));
        let mut digest = DigestBuilder::new(len as u64);
        let mut offset = 0;
        for (sent, received) in move_ranges(from, to, &source, &into) {
            let (sent, received) = (sent.unwrap(), received.unwrap());
            assert_eq!((sent.digest, sent.bytes), (received.digest, received.bytes));
            digest.add(offset, sent.bytes, sent.digest.0);
            offset += sent.bytes;
        }
        assert_eq!(digest.finish().0, crc32c::crc32c(&bytes), "of {len} bytes");
        assert!(to.download(&into) == bytes, "{len} bytes differ");
    }
    from.assert_idle();
    to.assert_idle();
}

#[test]
fn tensors_go_from_device_to_device_over_tcp() {
    over_tcp(every_length_arrives);
}

#[test]
fn tensors_go_from_device_to_device_over_udp() {
    over_udp(&Options::default(), every_length_arrives);
}

fn overlap(a: &Span, b: &Span) -> bool {
    a.begin < b.end && b.begin < a.end
}

/// Of the spans of one end: whether a copy and another range's wire overlap.
fn wire_and_copy_overlap(spans: &[Span]) -> bool {
    let is_wire = |span: &&Span| span.step == Step::Wire;
    spans.iter().filter(is_wire).any(|wire| {
        let copies = spans.iter().filter(|span| !is_wire(span));
        copies
            .filter(|copy| copy.transfer != wire.transfer)
            .any(|copy| overlap(copy, wire))
    })
}

#[test]
fn wire_and_copies_overlap_at_both_ends() {
    over_tcp(|from, to| {
        let bytes = udp::random_bytes(&mut fastrand::Rng::with_seed(9), 40 * SLOTS.slot_bytes);
        let (source, into) = (from.upload(&bytes), to.device(bytes.len()));
        drop((from.stage.take_trace(), to.stage.take_trace()));
        for (sent, received) in move_ranges(from, to, &source, &into) {
            assert_eq!(sent.unwrap().digest, received.unwrap().digest);
        }
        for (end, which) in [(from, "sender"), (to, "receiver")] {
            let spans = end.stage.take_trace();
            // Forty copies, forty transfers, none of them twice.
            assert_eq!(spans.len(), 80, "{which}");
            assert!(wire_and_copy_overlap(&spans), "{which}: {spans:?}");
        }
        assert!(to.download(&into) == bytes);
    });
}

#[test]
fn a_range_is_one_copy_however_many_packets_it_takes() {
    over_tcp(|from, to| {
        let bytes = udp::random_bytes(&mut fastrand::Rng::with_seed(3), 4 * SLOTS.slot_bytes);
        let (source, into) = (from.upload(&bytes), to.device(bytes.len()));
        let before = from.sim.copies_done();
        move_ranges(from, to, &source, &into);
        assert_eq!(
            from.sim.copies_done() - before,
            4,
            "one copy a slot, none a packet"
        );
        assert!(to.download(&into) == bytes);
    });
}

/// A program computes a tensor, sends it, and overwrites it, without ever waiting.
#[test]
fn copies_wait_for_what_computes_a_tensor_and_tell_who_writes_it_next() {
    over_tcp(|from, to| {
        let bytes = udp::random_bytes(&mut fastrand::Rng::with_seed(7), 3 * SLOTS.slot_bytes);
        let (source, into) = (from.upload(&bytes), to.device(bytes.len()));
        let (computed, sent) = (from.sim.event(), from.sim.event());
        let (read, arrived) = (to.sim.event(), to.sim.event());
        block_on(from.stage.wait_for(Way::ToHost, computed)).unwrap();
        block_on(to.stage.wait_for(Way::ToDevice, read)).unwrap();
        // Nothing is under way: an event for that is signalled at once.
        let nothing = from.sim.event();
        block_on(from.stage.signal(Way::ToDevice, nothing)).unwrap();
        std::thread::scope(|scope| {
            let moved = scope.spawn(|| move_ranges(from, to, &source, &into));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!moved.is_finished() && from.sim.is_set(nothing));
            // Asked for after the copies, and resolved once they were begun.
            let told = scope.spawn(|| block_on(from.stage.signal(Way::ToHost, sent)));
            told.join().unwrap().unwrap();
            assert!(!from.sim.is_set(sent), "it is not computed yet");
            from.sim.set(computed);
            udp::eventually("it may be overwritten", || from.sim.is_set(sent));
            // At the receiver somebody still reads what was there before.
            let told = scope.spawn(|| block_on(to.stage.signal(Way::ToDevice, arrived)));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!moved.is_finished() && !to.sim.is_set(arrived));
            to.sim.set(read);
            for (sent, received) in moved.join().unwrap() {
                assert_eq!(sent.unwrap().digest, received.unwrap().digest);
            }
            told.join().unwrap().unwrap();
        });
        udp::eventually("it is there", || to.sim.is_set(arrived));
        assert!(to.download(&into) == bytes);
    });
}
