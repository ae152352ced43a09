//! Device to device while everything goes wrong at once: copies are late and out
//! of turn, some fail, and frames are lost, doubled and overtaken.

use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::memory::accelerator::sim::Fault;

use super::*;

/// In thousandths.
fn faults(seed: u64) -> Faults {
    Faults {
        seed,
        loss: 20,
        duplication: 20,
        reordering: 20,
        ..Faults::default()
    }
}

fn late(seed: u64) -> sim::Config {
    sim::Config {
        delay: Duration::from_micros(500),
        seed,
        ..sim::Config::default()
    }
}

/// A session over a link that treats frames badly.
fn over_bad_udp(seed: u64, test: impl FnOnce(&End, &End)) {
    let (a, b) = pair(&Options::default());
    let a = FaultyDevice::new(a, faults(seed));
    let b = FaultyDevice::new(b, faults(seed + 1));
    let (a, b) = udp::connect(a, b, udp::config());
    let from = End::new(late(seed), &a.endpoint, a.session);
    let to = End::new(late(seed + 1), &b.endpoint, b.session);
    test(&from, &to);
}

fn over_tcp(seed: u64, test: impl FnOnce(&End, &End)) {
    let link = tcp::Link::new(2);
    {
        let from = End::new(late(seed), &link.a.endpoint, link.ids.0);
        let to = End::new(late(seed + 1), &link.b.endpoint, link.ids.1);
        test(&from, &to);
    }
    link.stop();
}

fn arrives(from: &End, to: &End, bytes: &[u8]) {
    let (source, into) = (from.upload(bytes), to.device(bytes.len()));
    for (sent, received) in move_ranges(from, to, &source, &into) {
        assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    }
    assert!(to.download(&into) == bytes, "{} bytes differ", bytes.len());
    assert!(from.download(&source) == bytes, "the source changed");
}

/// Fails a copy at either end in mid-transfer, some ranges into it.
fn fails_and_goes_on(seed: u64, from: &End, to: &End) {
    let mut random = fastrand::Rng::with_seed(seed);
    let bytes = udp::random_bytes(&mut random, 9 * SLOTS.slot_bytes + 77);
    let beside = udp::random_bytes(&mut random, 3 * SLOTS.slot_bytes);
    // Other memory of the same devices.
    let (here, there) = (from.upload(&beside), to.upload(&beside));
    arrives(from, to, &bytes);
    for round in 0..3 {
        let (source, into) = (from.upload(&bytes), to.device(bytes.len()));
        to.sim.fail_copy(2 + round, Fault::Once);
        let answers = move_ranges(from, to, &source, &into);
        let failed = answers.iter().filter_map(|(sent, received)| {
            assert!(sent.is_ok(), "seed {seed}: {sent:?}");
            received.as_ref().err()
        });
        let failed: Vec<_> = failed.collect();
        // The one that failed, and those that its stream had begun.
        assert!((1..=SLOTS.slots).contains(&failed.len()), "{failed:?}");
        for error in failed {
            let text = "sim: copy failed with 999 (asked to fail)";
            assert!(matches!(error, StageError::Accelerator(_)), "{error}");
            assert_eq!(error.to_string(), text);
        }
        arrives(from, to, &bytes);
        for (end, lease) in [(from, &here), (to, &there)] {
            assert!(end.download(lease) == beside, "seed {seed}, round {round}");
        }
    }
    from.assert_idle();
    to.assert_idle();
}

#[test]
fn ranges_arrive_over_a_link_that_loses_doubles_and_reorders() {
    over_bad_udp(11, |from, to| {
        let mut random = fastrand::Rng::with_seed(11);
        for len in [1, 65_536, 65_537, 1_000_003] {
            arrives(from, to, &udp::random_bytes(&mut random, len));
        }
        from.assert_idle();
        to.assert_idle();
    });
}

#[test]
fn a_failing_copy_over_a_bad_link_harms_its_range_alone() {
    for seed in [21, 22] {
        over_bad_udp(seed, |from, to| fails_and_goes_on(seed, from, to));
    }
}

#[test]
fn a_failing_copy_over_tcp_harms_its_range_alone() {
    over_tcp(31, |from, to| fails_and_goes_on(31, from, to));
}
