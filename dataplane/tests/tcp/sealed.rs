//! Sealed connections: everything arrives, and nothing that the peer did not seal.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use genie_dataplane::SessionId;
use genie_dataplane::engine::OpenError;
use genie_dataplane::tcp::Role;
use genie_proto::seal::Secret;

use crate::harness::{Engine, Link, bytes, empty, filled, secrets};

#[test]
fn tensors_of_all_lengths_arrive_over_any_number_of_connections() {
    for streams in [1, 2, 16] {
        let link = Link::sealed(streams);
        for len in [0, 1, 63, 65_536, 65_537, (256 << 10) + 1, (20 << 20) + 7] {
            link.move_and_check(&filled(len, len as u64));
        }
        link.stop();
    }
}

#[test]
fn many_small_tensors_both_ways_at_once() {
    let link = Link::sealed(2);
    let sources: Vec<_> = (0..500).map(|i| filled(i * 41, i as u64)).collect();
    let targets: Vec<_> = sources.iter().map(|from| empty(from.len())).collect();
    let transfers: Vec<_> = (sources.iter().zip(&targets).enumerate())
        .map(|(index, (from, into))| {
            let ends = [(&link.a, link.ids.0), (&link.b, link.ids.1)];
            let [sender, receiver] = [ends[index % 2], ends[1 - index % 2]];
            let (id, received) = receiver.0.receive(receiver.1, into.clone()).unwrap();
            let sent = sender.0.send(sender.1, id, from.clone()).unwrap();
            (sent, received)
        })
        .collect();
    for (index, (sent, received)) in transfers.into_iter().enumerate() {
        let (sent, received) = (sent.wait().unwrap(), received.wait().unwrap());
        assert_eq!(sent.digest, received.digest, "{index}");
        let [from, into] = [&sources[index], &targets[index]];
        assert_eq!(from.crc32c(0..from.len()), into.crc32c(0..into.len()));
    }
    link.stop();
}

/// Opens at both ends; `a` dials `address`.
fn open_both(
    a: &Engine,
    b: &Engine,
    address: SocketAddr,
    ids: (SessionId, SessionId),
) -> [Result<(), OpenError>; 2] {
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| b.open(ids.1, ids.0, Role::Accept, 1).map(drop));
        let dialled = a.open(ids.0, ids.1, Role::Dial(address), 1).map(drop);
        [dialled, accepting.join().unwrap()]
    })
}

/// Whoever has the token, but not the keys, opens nothing.
#[test]
fn an_end_without_the_keys_is_refused() {
    let others = Some(genie_proto::seal::Secrets {
        send: Secret([3; 32]),
        ..secrets()
    });
    for (of_a, what) in [(None, "plain"), (others, "other keys")] {
        let [mut a, mut b] = [Engine::quick(), Engine::quick()];
        a.secrets = of_a;
        b.secrets = Some(secrets().of_the_other_end());
        let opened = open_both(&a, &b, b.address, (SessionId(1), SessionId(2)));
        assert!(opened[0].is_err(), "{what}");
        let reason = opened[1].as_ref().unwrap_err().to_string();
        assert!(reason.contains("sealed record"), "{what}: {reason}");
        a.stop();
        b.stop();
    }
}

/// Passes one connection on to `to`, and keeps what its dialler said.
fn recorder(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let said = Arc::<Mutex<Vec<u8>>>::default();
    let record = Arc::clone(&said);
    std::thread::spawn(move || {
        let mut near = listener.accept().unwrap().0;
        let mut far = TcpStream::connect(to).unwrap();
        let (mut back, mut answers) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
        let mut some = [0; 4096];
        while let Ok(len @ 1..) = near.read(&mut some) {
            record.lock().unwrap().extend_from_slice(&some[..len]);
            if far.write_all(&some[..len]).is_err() {
                break;
            }
        }
    });
    (address, said)
}

/// A later session of the same two ends, even with the same ids and token, has
/// other keys, because each end puts something random into them.
#[test]
fn a_connection_that_was_recorded_cannot_be_replayed() {
    let [mut a, mut b] = [Engine::patient(), Engine::patient()];
    a.secrets = Some(secrets());
    b.secrets = Some(secrets().of_the_other_end());
    let (address, said) = recorder(b.address);
    let ids = (a.endpoint.new_session(1), b.endpoint.new_session(2));
    for opened in open_both(&a, &b, address, ids) {
        opened.unwrap();
    }
    let [from, into] = [filled(100_000, 5), empty(100_000)];
    let (id, received) = b.receive(ids.1, into.clone()).unwrap();
    a.send(ids.0, id, from.clone()).unwrap().wait().unwrap();
    received.wait().unwrap();
    b.endpoint.close(ids.1);

    let said = said.lock().unwrap().clone();
    assert!(said.len() > 100_000);
    let first = &bytes(&from)[..64];
    assert!(!said.windows(64).any(|part| part == first));
    let fresh = Secret([9; 32]);
    b.secrets = Some(genie_proto::seal::Secrets {
        receive: fresh,
        ..secrets().of_the_other_end()
    });
    let refused = std::thread::scope(|scope| {
        let accepting = scope.spawn(|| b.open(ids.1, ids.0, Role::Accept, 1));
        let mut replay = TcpStream::connect(b.address).unwrap();
        replay.write_all(&said).unwrap();
        accepting.join().unwrap().unwrap_err()
    });
    assert!(refused.to_string().contains("sealed record"), "{refused}");
    let status = b.status.clone();
    a.stop();
    b.stop();
    assert_eq!(status.snapshot().sealed.forged, 1);
}
