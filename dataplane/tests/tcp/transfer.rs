//! Bytes arrive, whatever their number, in both directions at once.

use std::collections::VecDeque;
use std::pin::pin;

use genie_dataplane::endpoint::OPERATIONS_MAX;
use genie_dataplane::engine::{Cost, Full, Partial, Receipt};
use genie_proto::Incoming;

use crate::harness::{Engine, Link, assert_given_back, block_on, bytes, empty, filled, open_both};

const CHUNK: usize = genie_dataplane::tcp::frame::CHUNK_MAX as usize;

#[test]
fn every_awkward_size_arrives() {
    let link = Link::new(2);
    for len in [
        0,
        1,
        63,
        64,
        65,
        4096,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        3 * CHUNK + 64,
        10 * CHUNK + 1,
    ] {
        let from = filled(len, len as u64);
        link.move_and_check(&from);
        assert_given_back(&from);
    }
    link.stop();
}

#[test]
fn a_small_tensor_that_another_path_began_is_finished() {
    let link = Link::new(2);
    let from = filled(200, 5);
    let data = bytes(&from);
    for applied in [0, 64, 128] {
        let into = empty(200);
        let mut moved = Incoming::new(200).unwrap();
        if applied > 0 {
            into.write_at(0, data[..applied].into());
            moved.apply(0, applied as u64, crc32c::crc32c(&data[..applied]));
        }
        let mut received = Partial {
            moved,
            cost: Cost::default(),
        };
        let missing = received.prepare(&into, 8);
        let mut sent = Partial::rebuild(&from);
        sent.prepare(&missing).unwrap();
        let (a, b) = (&link.a.endpoint, &link.b.endpoint);
        let receive = b.resume_receive(link.ids.1, into.clone(), Box::new(received));
        let (id, incoming) = block_on(receive).unwrap();
        let send = a.resume_send(link.ids.0, id, from.clone(), Box::new(sent));
        let outgoing = block_on(send).unwrap();
        assert_eq!(outgoing.wait().unwrap().bytes, 200, "after {applied}");
        assert_eq!(incoming.wait().unwrap().bytes, 200, "after {applied}");
        assert_eq!(bytes(&into), data);
    }
    link.stop();
}

#[test]
fn a_hundred_mebibytes_arrive_over_any_number_of_connections() {
    let from = filled(100 << 20, 7);
    for streams in [1, 2, 5] {
        let link = Link::new(streams);
        link.move_and_check(&from);
        link.stop();
    }
    assert_given_back(&from);
}

#[test]
fn ten_thousand_tiny_tensors_arrive() {
    const COUNT: usize = 10_000;
    const LEN: usize = 100;
    let link = Link::new(2);
    let from = filled(COUNT * 128, 3);
    let into = empty(COUNT * 128);
    let begin = std::time::Instant::now();
    std::thread::scope(|scope| {
        let (ids, for_a) = std::sync::mpsc::channel();
        let receiving = scope.spawn({
            let (link, into) = (&link, &into);
            move || {
                let mut transfers = Vec::new();
                for i in 0..COUNT {
                    let begin = (i * 128) as u64;
                    let part = into.slice(begin..begin + LEN as u64).unwrap();
                    let (id, transfer) = link.b.receive(link.ids.1, part).unwrap();
                    ids.send(id).unwrap();
                    transfers.push(transfer);
                }
                drop(ids);
                transfers
                    .into_iter()
                    .map(|t| t.wait().unwrap())
                    .collect::<Vec<Receipt>>()
            }
        });
        let mut sent = Vec::new();
        for (i, id) in for_a.into_iter().enumerate() {
            let begin = (i * 128) as u64;
            let part = from.slice(begin..begin + LEN as u64).unwrap();
            sent.push(link.a.send(link.ids.0, id, part).unwrap());
        }
        let sent: Vec<Receipt> = sent.into_iter().map(|t| t.wait().unwrap()).collect();
        let received = receiving.join().unwrap();
        assert_eq!(sent.len(), COUNT);
        assert!(
            sent.iter()
                .zip(&received)
                .all(|(a, b)| a.digest == b.digest)
        );
    });
    println!("{COUNT} tensors in {:?}", begin.elapsed());
    let (from_bytes, into_bytes) = (bytes(&from), bytes(&into));
    for i in 0..COUNT {
        let range = i * 128..i * 128 + LEN;
        assert_eq!(from_bytes[range.clone()], into_bytes[range.clone()]);
        // Nothing was written beside the tensors.
        assert!(
            into_bytes[range.end..(i + 1) * 128]
                .iter()
                .all(|byte| *byte == 0)
        );
    }
    assert_given_back(&from);
    assert_given_back(&into);
    link.stop();
}

#[test]
fn both_directions_at_once() {
    let link = Link::new(2);
    let (from_a, from_b) = (filled(20 << 20, 1), filled(20 << 20, 2));
    let (into_a, into_b) = (empty(20 << 20), empty(20 << 20));
    // Both ids are slot 0, generation 1: directions do not mix.
    let (id_b, received_b) = link.b.receive(link.ids.1, into_b.clone()).unwrap();
    let (id_a, received_a) = link.a.receive(link.ids.0, into_a.clone()).unwrap();
    assert_eq!(id_a, id_b);
    let sent_a = link.a.send(link.ids.0, id_b, from_a.clone()).unwrap();
    let sent_b = link.b.send(link.ids.1, id_a, from_b.clone()).unwrap();
    for transfer in [sent_a, sent_b, received_a, received_b] {
        assert_eq!(transfer.wait().unwrap().bytes, 20 << 20);
    }
    assert_eq!(bytes(&from_a), bytes(&into_b));
    assert_eq!(bytes(&from_b), bytes(&into_a));
    for lease in [from_a, from_b, into_a, into_b] {
        assert_given_back(&lease);
    }
    link.stop();
}

#[test]
fn a_small_tensor_does_not_wait_for_a_large_one() {
    let link = Link::new(1);
    let (large, small) = (filled(256 << 20, 1), filled(1000, 2));
    let (large_into, small_into) = (empty(256 << 20), empty(1000));
    let (large_id, large_received) = link.b.receive(link.ids.1, large_into).unwrap();
    let (small_id, small_received) = link.b.receive(link.ids.1, small_into).unwrap();
    let large_sent = link.a.send(link.ids.0, large_id, large).unwrap();
    let small_sent = link.a.send(link.ids.0, small_id, small).unwrap();
    small_sent.wait().unwrap();
    let received = link.b.status.snapshot().received_bytes;
    assert!(received < 256 << 20, "the small one was last");
    small_received.wait().unwrap();
    large_sent.wait().unwrap();
    large_received.wait().unwrap();
    link.stop();
}

#[test]
fn two_sessions_of_two_engines_do_not_mix() {
    let link = Link::new(2);
    let other = open_both(&link.a, &link.b, 1);
    let (one, two) = (filled(1 << 20, 1), filled(1 << 20, 2));
    let (one_into, two_into) = (empty(1 << 20), empty(1 << 20));
    let (one_id, one_received) = link.b.receive(link.ids.1, one_into.clone()).unwrap();
    let (two_id, two_received) = link.b.receive(other.1, two_into.clone()).unwrap();
    assert_eq!(one_id, two_id);
    link.a
        .send(link.ids.0, one_id, one.clone())
        .unwrap()
        .wait()
        .unwrap();
    link.a
        .send(other.0, two_id, two.clone())
        .unwrap()
        .wait()
        .unwrap();
    one_received.wait().unwrap();
    two_received.wait().unwrap();
    assert_eq!(bytes(&one), bytes(&one_into));
    assert_eq!(bytes(&two), bytes(&two_into));
    link.stop();
}

#[test]
fn the_engine_counts_what_it_moves() {
    let link = Link::new(2);
    let from = filled(1 << 20, 1);
    link.move_and_check(&from);
    // Published within a tenth of a second, and again when the engine ends.
    let (a, b) = (link.a.status.clone(), link.b.status.clone());
    link.stop();
    let (a, b) = (a.snapshot(), b.snapshot());
    assert_eq!((a.driver.as_str(), a.port), ("tcp", None));
    assert_eq!((a.sent_bytes, b.received_bytes), (1 << 20, 1 << 20));
    assert_eq!((a.copies.kernel, b.copies.kernel), (1 << 20, 1 << 20));
    assert_eq!((a.copies.genie, b.copies.genie), (0, 0));
    assert_eq!((a.dropped, b.dropped), (0, 0));
    let idle = Engine::quick();
    let status = idle.status.clone();
    idle.stop();
    assert_eq!(status.snapshot().sent_bytes, 0);
}

#[test]
fn who_asks_for_too_much_is_refused_or_waits_until_something_ends() {
    let link = Link::new(1);
    let endpoint = link.b.endpoint.clone();
    let (from, into) = (filled(512, 3), empty(512));
    let mut expected = VecDeque::new();
    let refused = loop {
        match endpoint.try_receive(link.ids.1, into.clone()) {
            Ok(begun) => expected.push_back(begun.unwrap()),
            Err(Full(lease)) => break lease,
        }
    };
    assert_eq!(expected.len(), OPERATIONS_MAX);
    assert_eq!((refused.len(), endpoint.free()), (512, 0));
    let mut one_more = pin!(endpoint.receive(link.ids.1, refused));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(one_more.as_mut().poll(&mut context).is_pending());
    // The sender's end has room: it is not its own to give.
    assert_eq!(link.a.endpoint.free(), OPERATIONS_MAX);

    let (id, first) = expected.pop_front().unwrap();
    let sent = link.a.send(link.ids.0, id, from.clone()).unwrap();
    assert_eq!(sent.wait().unwrap().digest, first.wait().unwrap().digest);
    let (id, last) = block_on(one_more).unwrap();
    assert_eq!(endpoint.free(), 0);
    let sent = link.a.send(link.ids.0, id, from.clone()).unwrap();
    assert_eq!(sent.wait().unwrap().digest, last.wait().unwrap().digest);
    assert_eq!(bytes(&into), bytes(&from));
    drop(expected);
    link.stop();
    assert_given_back(&into);
}
