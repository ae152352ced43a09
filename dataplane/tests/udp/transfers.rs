//! Tensors between two engines over devices that work, or lose and spoil frames.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::engine::FailReason;
use genie_dataplane::engine::udp::Config;
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Arena, Backing, Region, View};

use crate::harness::{
    Node, block_on, config, connect, contents, random_bytes, region, rigs, transfer,
};

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
}

#[test]
fn ipv4_and_arp_work_as_ipv6_does() {
    let (a, b) = pair(&Options::default());
    let addressed = |address: &str| Config {
        addresses: vec![address.parse().unwrap()],
        ..config()
    };
    let a = Node::start(a, addressed("10.7.0.1"));
    let b = Node::start(b, addressed("10.7.0.2"));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.open(&a));
        a.open(&b).unwrap();
        other.join().unwrap().unwrap();
    });
    transfer(
        &a,
        &b,
        &random_bytes(&mut fastrand::Rng::with_seed(2), 300_000),
    );
}

#[test]
fn ten_thousand_tensors_of_an_arena_cost_one_registration() {
    const COUNT: u64 = 10_000;
    const LEN: u64 = 3000;
    let options = Options {
        needs_registration: true,
        completes_on_reap: true,
        ..Options::default()
    };
    let (a, b) = pair(&options);
    let (a, b) = connect(a, b, config());
    let arena = Arena::new(Region::with_backing(4 << 20, Backing::Shmem).unwrap());
    let port = || a.status.snapshot().port.expect("a device has a port");
    for index in 0..COUNT {
        let block = arena.allocate(LEN as usize).unwrap();
        let bytes = [index as u8; LEN as usize];
        block.lease().write_at(0, View::from(&bytes[..]));
        let into = region(&[0; LEN as usize]);
        let (id, incoming) = block_on(b.endpoint.receive(b.session, into.clone())).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, block.lease())).unwrap();
        outgoing.wait().unwrap();
        incoming.wait().unwrap();
        assert_eq!(contents(&into), bytes, "tensor {index}");
    }
    let until = Instant::now() + crate::harness::PATIENCE;
    while port().tx_bytes < COUNT * LEN {
        assert!(Instant::now() < until, "not counted: {:?}", port());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((port().registrations, port().registered), (1, 1));
    // The arena's end is the registration's.
    drop(arena);
    while port().registered > 0 {
        assert!(Instant::now() < until, "still registered: {:?}", port());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(port().registrations, 1);
}

#[test]
fn many_small_tensors_at_once() {
    const COUNT: usize = 10_000;
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let bytes: Vec<u8> = (0..COUNT * 8).map(|i| (i / 8 + i) as u8).collect();
    let (from, to) = (region(&bytes), region(&vec![0; bytes.len()]));
    let mut transfers = std::collections::VecDeque::new();
    let finish = |pair: (genie_dataplane::endpoint::Transfer, _)| {
        let (incoming, outgoing): (_, genie_dataplane::endpoint::Transfer) = pair;
        assert_eq!(
            outgoing.wait().unwrap().digest,
            incoming.wait().unwrap().digest
        );
    };
    for index in 0..COUNT as u64 {
        let slice = index * 8..index * 8 + 8;
        let into = to.slice(slice.clone()).unwrap();
        let (id, incoming) = block_on(b.endpoint.receive(b.session, into)).unwrap();
        let source = from.slice(slice).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
        transfers.push_back((incoming, outgoing));
        if transfers.len() > 3000 {
            finish(transfers.pop_front().unwrap());
        }
    }
    transfers.into_iter().for_each(finish);
    assert_eq!(contents(&to), bytes);
}

#[test]
fn the_ledger_counts_the_copies_that_the_device_forces() {
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(3), 1_000_000);
    for (tx_external, genie, driver) in [(true, 0, 1), (false, 1, 0)] {
        let (a, b) = pair(&Options {
            tx_external,
            ..Options::default()
        });
        let (a, b) = connect(a, b, config());
        let (sent, received) = transfer(&a, &b, &bytes);
        let whole = |copies: u64| copies * (bytes.len() as u64 + sent.retransmits * 9000);
        let least = |copies: u64| copies * bytes.len() as u64;
        assert!(
            (least(genie)..=whole(genie)).contains(&sent.copies.genie),
            "{sent:?}"
        );
        assert!(
            (least(driver)..=whole(driver)).contains(&sent.copies.driver),
            "{sent:?}"
        );
        let once = Copies {
            genie: bytes.len() as u64,
            ..Copies::default()
        };
        assert_eq!(received.copies, once);
    }
}

#[test]
fn the_ports_own_counters_show_the_bytes() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, config());
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(4), 3_000_000);
    transfer(&a, &b, &bytes);
    let wait_until = Instant::now() + Duration::from_secs(20);
    loop {
        let (a, b) = (a.status.snapshot(), b.status.snapshot());
        let port = |snapshot: &genie_dataplane::engine::Snapshot| snapshot.port.unwrap();
        if a.sent_bytes == bytes.len() as u64 && b.received_bytes == a.sent_bytes {
            assert!(port(&a).tx_bytes > a.sent_bytes);
            assert!(port(&b).rx_bytes > a.sent_bytes);
            assert_eq!(a.sessions.len(), 1);
            break;
        }
        assert!(
            Instant::now() < wait_until,
            "the status never showed the transfer: {a:?} {b:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn memory_that_changes_while_it_moves_is_a_digest_mismatch_or_arrives_as_one_state() {
    // Frames are lost so that segments are read twice, at different times.
    let faults = Faults {
        seed: 5,
        loss: 100,
        ..Faults::default()
    };
    let (a, b) = pair(&Options {
        mtu: 1500,
        ..Options::default()
    });
    let (a, b) = connect(
        FaultyDevice::new(a, faults),
        FaultyDevice::new(b, faults),
        config(),
    );
    let source = region(&vec![0; 3_000_000]);
    let destination = region(&vec![0; 3_000_000]);
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let (sent, received) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let at = fastrand::usize(0..3_000_000);
                source.write_at(at, View::from(&[fastrand::u8(..)][..]));
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        let (id, incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
        let outgoing = block_on(a.endpoint.send(a.session, id, source.clone())).unwrap();
        let results = (outgoing.wait(), incoming.wait());
        stop.store(true, Ordering::Relaxed);
        results
    });
    assert!(
        writes.load(Ordering::Relaxed) > 1000,
        "the writer ran meanwhile"
    );
    match (sent, received) {
        (Ok(sent), Ok(received)) => {
            assert_eq!(sent.digest, received.digest);
            let arrived = crc32c::crc32c(&contents(&destination));
            assert_eq!(
                received.digest.0, arrived,
                "what arrived is what was verified"
            );
        }
        (sent, received) => {
            assert_eq!(sent, Err(FailReason::DigestMismatch));
            assert_eq!(received, Err(FailReason::DigestMismatch));
        }
    }
    transfer(&a, &b, &[3; 5000]);
}

#[test]
fn sessions_come_and_go_and_leave_nothing() {
    let (a, b) = pair(&Options::default());
    let mut a = Node::start(a, config());
    let mut b = Node::start(b, config());
    for round in 0..50 {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(&a));
            a.open(&b)
                .unwrap_or_else(|error| panic!("round {round}: {error}"));
            other.join().unwrap().unwrap();
        });
        transfer(&a, &b, &[round as u8; 20_000]);
        a.endpoint.close(a.session);
        b.endpoint.close(b.session);
        a.session = a.endpoint.new_session(fastrand::u32(..));
        b.session = b.endpoint.new_session(fastrand::u32(..));
    }
    let limit = Instant::now() + Duration::from_secs(20);
    while a.status.snapshot().sessions.len() + b.status.snapshot().sessions.len() > 0 {
        assert!(Instant::now() < limit, "closed sessions stay");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A NIC would drop what does not fit into its ring; this device holds more than
/// it says it does, and counts.
#[test]
fn eight_flows_never_fill_the_receivers_ring() {
    const RING: u16 = 256;
    let (a, b) = rigs(&Options {
        descriptors: 4096,
        ..Options::default()
    });
    let fullest = Arc::clone(&b.switches);
    let mut a = Node::start(a, config());
    let mut b = Node::start(b.claiming(RING), config());
    let mut sessions = Vec::new();
    for _ in 0..8 {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(&a));
            a.open(&b).expect("a opens");
            other.join().unwrap().expect("b opens");
        });
        sessions.push((a.session, b.session));
        a.session = a.endpoint.new_session(fastrand::u32(..));
        b.session = b.endpoint.new_session(fastrand::u32(..));
    }
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(5), 8 << 20);
    let source = region(&bytes);
    let mut moving = Vec::new();
    for (from, to) in sessions {
        let into = region(&vec![0; bytes.len()]);
        let (id, incoming) = block_on(b.endpoint.receive(to, into.clone())).unwrap();
        let outgoing = block_on(a.endpoint.send(from, id, source.clone())).unwrap();
        moving.push((into, incoming, outgoing));
    }
    for (into, incoming, outgoing) in moving {
        outgoing.wait().expect("the sender is told of success");
        incoming.wait().expect("the receiver is told of success");
        assert!(contents(&into) == bytes);
    }
    let fullest = fullest.fullest.load(Ordering::Relaxed);
    assert!(fullest <= u64::from(RING), "{fullest} frames waited");
    assert!(fullest > 16, "the ring was used: {fullest}");
}

#[test]
fn the_smaller_of_two_mtus_is_kept() {
    let (a, b) = rigs(&Options::default());
    let watch = std::sync::Arc::clone(&b.switches);
    let mut a = Node::start(a, config());
    let mut b = Node::start(b, config());
    // What each tells the other of itself; the devices take 9000 bytes.
    a.local.mtu = 4000;
    b.local.mtu = 2000;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| b.open(&a));
        a.open(&b).unwrap();
        other.join().unwrap().unwrap();
    });
    watch.records.store(true, Ordering::Relaxed);
    transfer(&a, &b, &[1; 100_000]);
    let longest = watch.seen.lock().unwrap().iter().map(Vec::len).max();
    // An Ethernet header more than the MTU, and granules of 64 bytes.
    let longest = longest.expect("frames arrived");
    assert!((1900..=2014).contains(&longest), "{longest}");
    drop((a, b));
}
