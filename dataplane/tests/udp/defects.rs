//! What the research prototype got wrong, each defect with a test that it fails.
//!
//! | the prototype | here |
//! |---|---|
//! | simulated success, and its sender hung when retries ran out | [`a_link_that_swallows_everything_fails_both_ends_within_the_limit`] |
//! | never verified its checksum | [`bytes_arrive_exactly_through_loss_duplication_reordering_and_corruption`] |
//! | allocated what the first fragment said | [`nothing_is_written_that_was_not_granted`] |
//! | sent to no Ethernet address in particular | [`every_packet_is_addressed_to_the_peers_own_port`] |
//! | answered no ARP | [`both_ends_ask_and_answer_for_their_addresses`] |
//! | took packets from anybody | [`packets_of_another_session_or_sender_are_dropped`] |
//! | cut sizes to 32 bits | `offsets_beyond_32_bits_land_where_they_belong` of `genie-proto` |
//! | never carried a tensor over DPDK | `tests/tests/dpdk.rs`, by the port's own counters |

use std::sync::Arc;
use std::sync::atomic::Ordering;

use genie_dataplane::TransferId;
use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, pair};
use genie_dataplane::engine::FailReason;
use genie_dataplane::engine::udp::Config;

use crate::harness::{
    Node, block_on, config, connect, contents, eventually, outcome, random_bytes, region, rigs,
    short, transfer,
};

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

#[test]
fn a_link_that_swallows_everything_fails_both_ends_within_the_limit() {
    let (a, b) = rigs(&Options::default());
    let switches = [Arc::clone(&a.switches), Arc::clone(&b.switches)];
    let (mut a, b) = connect(a, b, short());
    let destination = region(&[0; 100_000]);
    let (id, incoming) = block_on(b.endpoint.receive(b.session, destination)).unwrap();
    for switches in switches {
        switches.swallows.store(true, Ordering::Relaxed);
    }
    let source = region(&[7; 100_000]);
    let memory = Arc::downgrade(source.region());
    let outgoing = block_on(a.endpoint.send(a.session, id, source)).unwrap();
    let failed = outgoing.wait();
    assert!(matches!(failed, Err(FailReason::PathLost(_))), "{failed:?}");
    assert!(memory.upgrade().is_none(), "the lease was given back");
    let lost = a
        .lost
        .blocking_recv()
        .expect("the session is reported as lost");
    assert_eq!(lost.session, a.session);
    let failed = incoming.wait();
    assert!(matches!(failed, Err(FailReason::PathLost(_))), "{failed:?}");
}

#[test]
fn bytes_arrive_exactly_through_loss_duplication_reordering_and_corruption() {
    for seed in 0..6 {
        println!("seed {seed}");
        let faults = Faults {
            seed,
            loss: 20,
            duplication: 20,
            corruption: 20,
            reordering: 30,
        };
        let (a, b) = pair(&Options {
            mtu: 1500,
            ..Options::default()
        });
        let a = FaultyDevice::new(a, faults);
        let b = FaultyDevice::new(
            b,
            Faults {
                seed: seed + 1000,
                ..faults
            },
        );
        let (a, b) = connect(a, b, config());
        let bytes = random_bytes(&mut fastrand::Rng::with_seed(seed), 2_000_000);
        let (sent, _) = transfer(&a, &b, &bytes);
        assert!(
            sent.retransmits > 0,
            "frames were lost, so some were sent again"
        );
        transfer(&b, &a, &bytes[..70_001]);
    }
}

/// The length of a transfer and the place of its bytes are the receiver's to
/// choose: what it did not grant is dropped, and its memory stays as it was.
#[test]
fn nothing_is_written_that_was_not_granted() {
    let (a, b) = pair(&Options::default());
    let (a, b) = connect(a, b, short());
    let destination = region(&[3; 1000]);
    let (granted, _incoming) =
        block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
    let other = TransferId {
        slot: granted.slot + 1,
        generation: granted.generation,
    };
    // Longer than the grant, and under an id that was never granted.
    for id in [granted, other] {
        let sent = block_on(a.endpoint.send(a.session, id, region(&[9; 100_000])));
        // The session is lost with the first of them; then nothing begins.
        if let Ok(outgoing) = sent {
            assert!(outcome(outgoing).expect("answered").is_err());
        }
    }
    assert_eq!(contents(&destination), [3; 1000]);
    assert_eq!(b.status.snapshot().received_bytes, 0);
}

#[test]
fn every_packet_is_addressed_to_the_peers_own_port() {
    let (a, b) = rigs(&Options::default());
    let watch = Arc::clone(&b.switches);
    watch.records.store(true, Ordering::Relaxed);
    let (a, b) = connect(a, b, config());
    transfer(&a, &b, &[1; 100_000]);
    let seen = watch.seen.lock().unwrap();
    let packets: Vec<_> = seen
        .iter()
        .filter(|frame| frame[12..14] == ETHERTYPE_IPV6 && frame[20] == UDP)
        .collect();
    assert!(packets.len() > 10);
    for packet in packets {
        // The addresses that a pair of devices in memory has.
        assert_eq!(packet[..6], [2, 0, 0, 0, 0, 2], "to b's port");
        assert_eq!(packet[6..12], [2, 0, 0, 0, 0, 1], "from a's port");
    }
}

#[test]
fn both_ends_ask_and_answer_for_their_addresses() {
    let addressed = |address: &str| Config {
        addresses: vec![address.parse().unwrap()],
        ..config()
    };
    for (first, second, is_question, is_answer) in [
        (
            "10.7.0.1",
            "10.7.0.2",
            (|frame| frame[12..14] == ETHERTYPE_ARP && frame[21] == 1) as fn(&[u8]) -> bool,
            (|frame| frame[12..14] == ETHERTYPE_ARP && frame[21] == 2) as fn(&[u8]) -> bool,
        ),
        (
            "fd00::1",
            "fd00::2",
            |frame| frame[12..14] == ETHERTYPE_IPV6 && frame[20] == ICMPV6 && frame[54] == 135,
            |frame| frame[12..14] == ETHERTYPE_IPV6 && frame[20] == ICMPV6 && frame[54] == 136,
        ),
    ] {
        let (a, b) = rigs(&Options::default());
        let watches = [Arc::clone(&a.switches), Arc::clone(&b.switches)];
        for watch in &watches {
            watch.records.store(true, Ordering::Relaxed);
        }
        let a = Node::start(a, addressed(first));
        let b = Node::start(b, addressed(second));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(&a));
            a.open(&b).unwrap();
            other.join().unwrap().unwrap();
        });
        transfer(&a, &b, &[1; 10_000]);
        for watch in watches {
            let seen = watch.seen.lock().unwrap();
            assert!(
                seen.iter().any(|frame| is_question(frame)),
                "{first}: asked"
            );
            assert!(
                seen.iter().any(|frame| is_answer(frame)),
                "{first}: answered"
            );
        }
    }
}

/// Whoever does not know the id that the receiver chose for the session, or is
/// not the peer of that session, is not listened to. (That is no protection
/// against somebody who reads the link.)
#[test]
fn packets_of_another_session_or_sender_are_dropped() {
    let (a, b) = rigs(&Options::default());
    let watch = Arc::clone(&b.switches);
    let addressed = |address: &str| Config {
        addresses: vec![address.parse().unwrap()],
        ..config()
    };
    let mut a = Node::start(a, addressed("10.7.0.1"));
    let mut b = Node::start(b, addressed("10.7.0.2"));
    let open = |a: &Node, b: &Node| {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| b.open(a));
            a.open(b).unwrap();
            other.join().unwrap().unwrap();
        });
    };
    open(&a, &b);
    watch.records.store(true, Ordering::Relaxed);
    transfer(&a, &b, &[6; 20_000]);
    watch.records.store(false, Ordering::Relaxed);
    let recorded: Vec<_> = std::mem::take(&mut *watch.seen.lock().unwrap())
        .into_iter()
        .filter(|frame| frame[12..14] == ETHERTYPE_IPV4)
        .collect();
    assert!(recorded.len() > 3);
    // The same packets from another address, while their session is open. The
    // header's sum stays right: what one octet gains another loses.
    let forged = recorded.iter().map(|frame| {
        let mut frame = frame.clone();
        (frame[27], frame[29]) = (frame[27] + 1, frame[29] - 1);
        frame
    });
    let dropped = b.status.snapshot().dropped;
    let count = recorded.len() as u64;
    watch.injected.lock().unwrap().extend(forged);
    eventually("forged packets are dropped", || {
        b.status.snapshot().dropped >= dropped + count
    });
    // The session as it was recorded, played to the next one.
    a.endpoint.close(a.session);
    b.endpoint.close(b.session);
    a.session = a.endpoint.new_session(a.session.0 + 1);
    b.session = b.endpoint.new_session(b.session.0 + 1);
    open(&a, &b);
    let destination = region(&[0; 20_000]);
    let (_id, _incoming) = block_on(b.endpoint.receive(b.session, destination.clone())).unwrap();
    let dropped = b.status.snapshot().dropped;
    watch.injected.lock().unwrap().extend(recorded);
    eventually("replayed packets are dropped", || {
        b.status.snapshot().dropped >= dropped + count
    });
    assert_eq!(contents(&destination), [0; 20_000]);
    transfer(&a, &b, &[7; 20_000]);
}
