//! What a device's failure does to a transfer, and what it does not.

use genie_dataplane::engine::FailReason;
use genie_dataplane::memory::accelerator::AcceleratorError;
use genie_dataplane::memory::accelerator::sim::Fault;

use super::*;

fn link(test: impl FnOnce(&End, &End)) {
    let link = tcp::Link::new(1);
    {
        let a = End::new(sim::Config::default(), &link.a.endpoint, link.ids.0);
        let b = End::new(sim::Config::default(), &link.b.endpoint, link.ids.1);
        test(&a, &b);
    }
    link.stop();
}

fn one(from: &End, to: &End, source: &DeviceLease, into: &DeviceLease) -> (Staged, Staged) {
    block_on(async {
        let received = to.stage.receive(&to.endpoint, to.session, into.clone());
        let (id, received) = received.await.unwrap();
        let sent = from
            .stage
            .send(&from.endpoint, from.session, id, source.clone());
        (sent.await, received)
    })
}

fn arrives(from: &End, to: &End) {
    let bytes = vec![77; 3 * SLOTS.slot_bytes];
    let (source, into) = (from.upload(&bytes), to.device(bytes.len()));
    for (sent, received) in move_ranges(from, to, &source, &into) {
        assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    }
    assert!(to.download(&into) == bytes);
}

#[test]
fn a_copy_that_fails_at_the_sender_fails_its_range_and_the_session_lives() {
    link(|from, to| {
        let (source, into) = (from.upload(&[1; 1000]), to.device(1000));
        from.sim.fail_copy(0, Fault::Once);
        let (sent, received) = one(from, to, &source, &into);
        let error = sent.wait().unwrap_err();
        let StageError::Accelerator(error) = error else {
            panic!("{error}")
        };
        assert_eq!((error.code(), error.is_sticky()), (Some(999), false));
        // The receiver is not told by the data path: its request gives it up.
        drop(received);
        arrives(from, to);
        from.assert_idle();
        to.assert_idle();
    });
}

#[test]
fn a_copy_that_fails_at_the_receiver_is_told_after_the_wire_and_the_session_lives() {
    link(|from, to| {
        let (source, into) = (from.upload(&[1; 1000]), to.device(1000));
        to.sim.fail_copy(0, Fault::Once);
        let (sent, received) = one(from, to, &source, &into);
        assert_eq!(sent.wait().map(|receipt| receipt.bytes), Ok(1000));
        let error = received.wait().unwrap_err();
        assert!(
            matches!(&error, StageError::Accelerator(error) if error.code() == Some(999)),
            "{error}"
        );
        arrives(from, to);
        to.assert_idle();
    });
}

#[test]
fn a_sticky_error_in_mid_transfer_fails_the_device_and_not_the_session() {
    link(|from, to| {
        let bytes = vec![5; 12 * SLOTS.slot_bytes];
        let (source, into) = (from.upload(&bytes), to.device(bytes.len()));
        to.sim.fail_copy(5, Fault::Sticky);
        let answers = move_ranges(from, to, &source, &into);
        assert!(answers.iter().all(|(sent, _)| sent.is_ok()), "{answers:?}");
        let failed = answers
            .iter()
            .filter_map(|(_, received)| received.as_ref().err());
        let failed: Vec<_> = failed.collect();
        assert!(failed.len() >= 7, "{failed:?}");
        for error in failed {
            assert!(
                matches!(error, StageError::Accelerator(error)
                    if error.is_sticky() && error.code() == Some(214)),
                "{error}"
            );
        }
        // Host memory still moves in the same session.
        block_on(async {
            let into = host(&[0; 500]);
            let receive = to.endpoint.receive(to.session, into.clone());
            let (id, received) = receive.await.unwrap();
            let sent = from.endpoint.send(from.session, id, host(&[8; 500]));
            assert_eq!(sent.await.unwrap().await.unwrap().bytes, 500);
            received.await.unwrap();
            assert_eq!(udp::contents(&into), [8; 500]);
        });
    });
}

#[test]
fn a_dropped_transfer_gives_its_slot_back_when_the_engine_has() {
    link(|from, to| {
        let into = to.device(1000);
        for _ in 0..3 * SLOTS.slots {
            let received = to.stage.receive(&to.endpoint, to.session, into.clone());
            let received = block_on(async { tokio::time::timeout(PATIENCE, received).await });
            let (_, received) = received.expect("a slot was not given back").unwrap();
            drop(received);
        }
        arrives(from, to);
    });
}

#[test]
fn a_full_stage_refuses_and_gives_the_lease_back() {
    link(|_, to| {
        let into = to.device(1000);
        let receive = || to.stage.try_receive(&to.endpoint, to.session, into.clone());
        let held: Vec<_> = (0..SLOTS.slots)
            .map(|_| receive().unwrap().unwrap())
            .collect();
        assert_eq!(receive().unwrap_err().0.len(), 1000);
        drop(held);
        to.assert_idle();
    });
}

#[test]
fn a_session_that_ends_fails_what_is_staged() {
    link(|from, to| {
        let (source, into) = (from.upload(&[1; 1000]), to.device(1000));
        from.sim.hold();
        let (sent, received) = one(from, to, &source, &into);
        to.endpoint.close(to.session);
        assert_eq!(received.wait(), Err(StageError::Wire(FailReason::Closed)));
        from.sim.release();
        assert!(matches!(sent.wait(), Err(StageError::Wire(_))));
        from.assert_idle();
        to.assert_idle();
    });
}

#[test]
fn a_stage_that_is_dropped_ends_what_waits_for_it() {
    let link = tcp::Link::new(1);
    let to = End::new(sim::Config::default(), &link.b.endpoint, link.ids.1);
    let into = to.device(10);
    let received = to.stage.receive(&to.endpoint, to.session, into.clone());
    let (_, received) = block_on(received).unwrap();
    let End { sim, stage, .. } = to;
    drop(stage);
    assert_eq!(
        received.wait(),
        Err(StageError::Wire(FailReason::Cancelled))
    );
    assert_eq!((sim.pinned(), sim.violations()), (0, vec![]));
    drop(into);
    assert_eq!(sim.used_bytes(), 0);
    let gone = AcceleratorError::Stopped(genie_dataplane::memory::accelerator::MemoryKind::Sim);
    assert_eq!(gone.to_string(), "sim has been stopped");
    link.stop();
}
