//! A peer of our own making, which speaks the protocol and breaks it.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use genie_dataplane::endpoint::Transfer;
use genie_dataplane::engine::FailReason;
use genie_dataplane::memory::Lease;

use genie_dataplane::tcp::frame::{
    HEADER_LEN, HELLO_LEN, Header, Hello, Kind, Malformed, Reason, SUM_ABOVE, Verdict,
};
use genie_dataplane::tcp::{self, Role, Token};
use genie_dataplane::{SessionId, TransferId};

use crate::harness::{
    Engine, Link, PATIENCE, TOKEN, assert_given_back, bytes, empty, filled, patient, quick,
};

const OURS: SessionId = SessionId(4711);

/// A fake peer with one connection to an engine.
struct Peer {
    engine: Engine,
    id: SessionId,
    socket: TcpStream,
}

impl Peer {
    /// Accepts the engine's connection as a good peer does.
    fn new() -> Self {
        Self::of(Engine::patient())
    }

    fn of(engine: Engine) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let id = engine.endpoint.new_session(1);
        let role = Role::Dial(listener.local_addr().unwrap());
        let socket = std::thread::scope(|scope| {
            let opening = scope.spawn(|| engine.open(id, OURS, role, 1));
            let (mut socket, _) = listener.accept().unwrap();
            let mut bytes = [0; HELLO_LEN];
            socket.read_exact(&mut bytes).unwrap();
            let hello = Hello::parse(&bytes).unwrap();
            assert_eq!((hello.session, hello.token == TOKEN), (OURS, true));
            let answer = Hello {
                session: id,
                ..hello
            };
            socket.write_all(&answer.encode()).unwrap();
            let ping = read_frame(&mut socket);
            assert_eq!(ping.kind, Kind::Ping);
            let pong = Header::plain(Kind::Pong, ping.offset);
            socket.write_all(&pong.encode()).unwrap();
            opening.join().unwrap().unwrap();
            socket
        });
        Self { engine, id, socket }
    }

    fn say(&mut self, header: Header, payload: &[u8]) {
        self.socket.write_all(&header.encode()).unwrap();
        self.socket.write_all(payload).unwrap();
    }

    /// A chunk with the checksum that belongs to it.
    fn chunk(&mut self, transfer: TransferId, offset: u64, payload: &[u8]) {
        let header = Header {
            offset,
            payload_len: payload.len() as u32,
            crc: crc32c::crc32c(payload),
            ..Header::about(Kind::Data, transfer)
        };
        self.say(header, payload);
    }

    /// The engine's next frame that is not about liveness.
    fn hear(&mut self) -> Header {
        loop {
            let header = read_frame(&mut self.socket);
            match header.kind {
                Kind::Ping => self.say(Header::plain(Kind::Pong, header.offset), &[]),
                Kind::Pong => {}
                _ => return header,
            }
        }
    }

    fn expect(&self, into: &Lease) -> (TransferId, Transfer) {
        self.engine.receive(self.id, into.clone()).unwrap()
    }

    /// Asserts that the session ended because the protocol was broken.
    fn assert_broken(mut self, transfer: Transfer, lease: &Lease) {
        let answer = transfer.wait();
        assert!(matches!(answer, Err(FailReason::Protocol(_))), "{answer:?}");
        let (lost, _) = self.engine.await_lost();
        assert_eq!(lost.session, self.id);
        assert!(
            matches!(lost.reason, FailReason::Protocol(_)),
            "{:?}",
            lost.reason
        );
        assert_given_back(lease);
        self.engine.stop();
    }
}

fn read_frame(socket: &mut TcpStream) -> Header {
    let mut bytes = [0; HEADER_LEN];
    socket.read_exact(&mut bytes).unwrap();
    Header::parse(&bytes).unwrap()
}

#[test]
fn an_honest_fake_peer_gets_its_tensor_through() {
    let mut peer = Peer::new();
    let (from, into) = (bytes(&filled(200, 1)), empty(200));
    let (id, received) = peer.expect(&into);
    peer.chunk(id, 128, &from[128..]);
    peer.chunk(id, 0, &from[..128]);
    let done = peer.hear();
    assert_eq!(
        (done.kind, done.offset, done.crc),
        (Kind::Done, 200, crc32c::crc32c(&from))
    );
    peer.say(Header::about(Kind::DoneOk, id), &[]);
    assert_eq!(received.wait().unwrap().bytes, 200);
    assert_eq!(bytes(&into), from);
    peer.engine.stop();
}

#[test]
fn bytes_beyond_the_grant_are_never_written() {
    // (granted, offset, length) of what may not be.
    let cases = [
        (128, 64, 128),
        (128, 128, 64),
        (128, u64::MAX - 63, 64),
        (128, 0, 0),
        (128, 1, 64),
        (128, 0, 63),
        (0, 0, 64),
        (0, 64, 0),
    ];
    for (granted, offset, len) in cases {
        let mut peer = Peer::new();
        let whole = empty(1024);
        let into = whole.slice(256..256 + granted).unwrap();
        let (id, received) = peer.expect(&into);
        drop(into);
        peer.chunk(id, offset, &vec![0xff; len]);
        peer.assert_broken(received, &whole);
        assert!(
            bytes(&whole).iter().all(|byte| *byte == 0),
            "{offset} {len}"
        );
    }
}

#[test]
fn a_length_of_four_gibibytes_ends_the_session() {
    let mut peer = Peer::new();
    let into = empty(128);
    let (id, received) = peer.expect(&into);
    let header = Header {
        payload_len: u32::MAX,
        ..Header::about(Kind::Data, id)
    };
    assert_eq!(
        Header::parse(&header.encode()),
        Err(Malformed::PayloadLen(u32::MAX))
    );
    peer.say(header, &[]);
    peer.assert_broken(received, &into);
}

#[test]
fn a_bad_header_ends_the_session() {
    let mut peer = Peer::new();
    let into = empty(128);
    let (_, received) = peer.expect(&into);
    peer.socket.write_all(&[0x5a; HEADER_LEN]).unwrap();
    peer.assert_broken(received, &into);
}

#[test]
fn a_late_chunk_of_an_old_generation_never_lands() {
    let mut peer = Peer::new();
    let into = empty(128);
    let (id, received) = peer.expect(&into);
    let old = TransferId {
        generation: id.generation - 1,
        ..id
    };
    peer.chunk(old, 0, &[0xff; 128]);
    let reset = peer.hear();
    assert_eq!(
        (reset.kind, reset.reason, reset.transfer),
        (Kind::ResetByReceiver, Reason::Unknown, old)
    );
    assert!(bytes(&into).iter().all(|byte| *byte == 0));
    // The right one still works.
    peer.chunk(id, 0, &[7; 128]);
    assert_eq!(peer.hear().kind, Kind::Done);
    received.wait().unwrap();
    assert!(bytes(&into).iter().all(|byte| *byte == 7));
    peer.engine.stop();
}

#[test]
fn verified_bytes_are_not_overwritten() {
    let mut peer = Peer::new();
    let into = empty(256);
    let (id, received) = peer.expect(&into);
    peer.chunk(id, 0, &[1; 128]);
    peer.chunk(id, 0, &[2; 128]);
    peer.chunk(id, 64, &[3; 128]);
    peer.chunk(id, 128, &[4; 128]);
    assert_eq!(peer.hear().kind, Kind::Done);
    peer.chunk(id, 0, &[5; 256]);
    peer.say(Header::about(Kind::DoneOk, id), &[]);
    received.wait().unwrap();
    let got = bytes(&into);
    assert!(got[..128].iter().all(|byte| *byte == 1));
    assert!(got[128..].iter().all(|byte| *byte == 4));
    peer.engine.stop();
}

#[test]
fn a_wrong_payload_checksum_fails_the_transfer_and_not_the_session() {
    let mut peer = Peer::new();
    let into = empty(64);
    let (id, received) = peer.expect(&into);
    let header = Header {
        payload_len: 64,
        crc: 1,
        ..Header::about(Kind::Data, id)
    };
    peer.say(header, &[9; 64]);
    let reset = peer.hear();
    assert_eq!(
        (reset.kind, reset.reason),
        (Kind::ResetByReceiver, Reason::Digest)
    );
    assert_eq!(received.wait(), Err(FailReason::DigestMismatch));
    let into = empty(128);
    let (id, received) = peer.expect(&into);
    peer.chunk(id, 0, &[9; 64]);
    peer.chunk(id, 64, &[9; 64]);
    assert_eq!(peer.hear().kind, Kind::Done);
    // The other end may still find that the digests differ.
    peer.say(Header::about(Kind::DoneMismatch, id), &[]);
    assert_eq!(received.wait(), Err(FailReason::DigestMismatch));
    assert_given_back(&into);
    peer.engine.stop();
}

#[test]
fn the_checksum_of_a_long_chunk_follows_it() {
    let mut peer = Peer::new();
    let len = SUM_ABOVE as usize + 64;
    let from = bytes(&filled(len, 3));
    let into = empty(len);
    let (id, received) = peer.expect(&into);
    let data = Header {
        payload_len: len as u32,
        ..Header::about(Kind::Data, id)
    };
    let sum = |crc| Header {
        crc,
        ..Header::about(Kind::Sum, id)
    };
    peer.say(data, &from);
    peer.say(sum(crc32c::crc32c(&from)), &[]);
    assert_eq!(peer.hear().kind, Kind::Done);
    assert_eq!(received.wait().unwrap().digest.0, crc32c::crc32c(&from));
    assert_eq!(bytes(&into), from);
    // A wrong one fails the transfer and not the session.
    let (id, received) = peer.expect(&into);
    let data = Header {
        transfer: id,
        ..data
    };
    peer.say(data, &from);
    peer.say(sum(crc32c::crc32c(&from) ^ 1), &[]);
    assert_eq!(peer.hear().reason, Reason::Digest);
    assert_eq!(received.wait(), Err(FailReason::DigestMismatch));
    // None, or one for nothing, ends it.
    let (id, received) = peer.expect(&into);
    let data = Header {
        transfer: id,
        ..data
    };
    peer.say(data, &from);
    peer.say(Header::plain(Kind::Ping, 1), &[]);
    peer.assert_broken(received, &into);
    let mut peer = Peer::new();
    let (_, received) = peer.expect(&into);
    peer.say(sum(0), &[]);
    peer.assert_broken(received, &into);
}

#[test]
fn a_chunk_is_not_verified_before_its_checksum_is_there() {
    let mut peer = Peer::new();
    let len = SUM_ABOVE as usize + 64;
    let from = bytes(&filled(len, 3));
    let into = empty(len);
    let (id, received) = peer.expect(&into);
    let data = Header {
        payload_len: len as u32,
        ..Header::about(Kind::Data, id)
    };
    peer.say(data, &from);
    // All its bytes are written; whoever gives it up now gets the lease back.
    let last = || {
        let mut byte = [0];
        into.read_at(len - 1, &mut byte);
        byte[0]
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while last() != from[len - 1] {
        assert!(std::time::Instant::now() < deadline, "no bytes arrive");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(received);
    assert_eq!(peer.hear().kind, Kind::ResetByReceiver);
    assert_given_back(&into);
    let sum = Header {
        crc: crc32c::crc32c(&from),
        ..Header::about(Kind::Sum, id)
    };
    peer.say(sum, &[]);
    // The session goes on.
    let (id, received) = peer.expect(&into);
    peer.say(
        Header {
            transfer: id,
            ..data
        },
        &from,
    );
    peer.say(
        Header {
            transfer: id,
            ..sum
        },
        &[],
    );
    received.wait().unwrap();
    peer.engine.stop();
}

#[test]
fn a_tensor_in_one_frame_needs_no_confirmation() {
    let mut peer = Peer::new();
    for len in [0, 64, 100] {
        let into = empty(len.max(1)).slice(0..len as u64).unwrap();
        let (id, received) = peer.expect(&into);
        peer.chunk(id, 0, &vec![3; len]);
        let done = peer.hear();
        assert_eq!((done.kind, done.offset), (Kind::Done, len as u64));
        assert_eq!(received.wait().unwrap().bytes, len as u64);
        // Who confirms or denies it all the same changes nothing.
        peer.say(Header::about(Kind::DoneOk, id), &[]);
        peer.say(Header::about(Kind::DoneMismatch, id), &[]);
    }
    let from = filled(64, 1);
    let id = TransferId {
        slot: 0,
        generation: 1,
    };
    let sent = peer.engine.send(peer.id, id, from).unwrap();
    let data = peer.hear();
    peer.socket.read_exact(&mut [0; 64]).unwrap();
    let done = Header {
        offset: 64,
        crc: data.crc,
        ..Header::about(Kind::Done, id)
    };
    peer.say(done, &[]);
    sent.wait().unwrap();
    // Up to the answer to this there is no DONE_OK.
    peer.say(Header::plain(Kind::Ping, 77), &[]);
    loop {
        let frame = read_frame(&mut peer.socket);
        match frame.kind {
            Kind::Pong if frame.offset == 77 => break,
            Kind::Ping | Kind::Pong => {}
            other => panic!("{other:?}"),
        }
    }
    peer.engine.stop();
}

#[test]
fn a_confirmation_of_what_was_never_received_ends_the_session() {
    let mut peer = Peer::new();
    let into = empty(64);
    let (id, received) = peer.expect(&into);
    // The grant may still be on its way to the engine's thread.
    std::thread::sleep(Duration::from_millis(50));
    peer.say(Header::about(Kind::DoneOk, id), &[]);
    peer.assert_broken(received, &into);
}

#[test]
fn done_for_what_nobody_sent_is_answered_and_harmless() {
    let mut peer = Peer::new();
    let id = TransferId {
        slot: 9,
        generation: 9,
    };
    peer.say(Header::about(Kind::Done, id), &[]);
    let reset = peer.hear();
    assert_eq!(
        (reset.kind, reset.reason, reset.transfer),
        (Kind::ResetBySender, Reason::Unknown, id)
    );
    peer.engine.stop();
}

#[test]
fn a_digest_that_lies_fails_at_the_sender() {
    let mut peer = Peer::new();
    let from = filled(64, 1);
    let id = TransferId {
        slot: 0,
        generation: 1,
    };
    let sent = peer.engine.send(peer.id, id, from.clone()).unwrap();
    let data = peer.hear();
    assert_eq!((data.kind, data.payload_len), (Kind::Data, 64));
    peer.socket.read_exact(&mut [0; 64]).unwrap();
    let done = Header {
        offset: 64,
        crc: data.crc ^ 1,
        ..Header::about(Kind::Done, id)
    };
    peer.say(done, &[]);
    assert_eq!(peer.hear().kind, Kind::DoneMismatch);
    assert_eq!(sent.wait(), Err(FailReason::DigestMismatch));
    assert_given_back(&from);
    peer.engine.stop();
}

#[test]
fn done_before_everything_was_sent_ends_the_session() {
    let mut peer = Peer::new();
    // More than the kernel's buffers hold while nobody reads.
    let from = filled(256 << 20, 1);
    let id = TransferId {
        slot: 0,
        generation: 1,
    };
    let sent = peer.engine.send(peer.id, id, from.clone()).unwrap();
    assert_eq!(peer.hear().kind, Kind::Data);
    peer.say(Header::about(Kind::Done, id), &[]);
    peer.assert_broken(sent, &from);
}

#[test]
fn a_peer_that_dies_is_noticed_at_once() {
    let mut peer = Peer::new();
    let into = empty(128);
    let (_, received) = peer.expect(&into);
    std::thread::sleep(Duration::from_millis(50));
    drop(peer.socket);
    let answer = received.wait();
    assert!(matches!(answer, Err(FailReason::PathLost(_))), "{answer:?}");
    peer.engine.await_lost();
    assert_given_back(&into);
    peer.engine.stop();
}

#[test]
fn a_peer_that_falls_silent_is_lost_within_the_limit() {
    for sending in [false, true] {
        // While sending, the PING waits behind more than the kernel takes.
        let lease = if sending {
            filled(256 << 20, 1)
        } else {
            empty(128)
        };
        let mut peer = Peer::of(Engine::quick());
        let transfer = if sending {
            let id = TransferId {
                slot: 0,
                generation: 1,
            };
            peer.engine.send(peer.id, id, lease.clone()).unwrap()
        } else {
            peer.expect(&lease).1
        };
        let (lost, after) = peer.engine.await_lost();
        assert!(
            matches!(lost.reason, FailReason::PathLost(_)),
            "{:?}",
            lost.reason
        );
        assert!(after > quick().liveness / 4, "{after:?} is too soon");
        assert!(matches!(transfer.wait(), Err(FailReason::PathLost(_))));
        assert_given_back(&lease);
        peer.engine.stop();
    }
}

/// Shows `hello` to `engine`; what it answers.
fn greet(engine: &Engine, hello: &[u8]) -> Result<Hello, ErrorKind> {
    let mut socket = TcpStream::connect(engine.address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(hello).unwrap();
    let mut bytes = [0; HELLO_LEN];
    socket
        .read_exact(&mut bytes)
        .map_err(|error| error.kind())?;
    Ok(Hello::parse(&bytes).unwrap())
}

#[test]
fn who_does_not_belong_is_refused_and_disturbs_nobody() {
    // The half of a HELLO below waits for the limit on opening.
    let link = Link::between(Engine::patient(), Engine::quick(), 2);
    let good = Hello {
        session: link.ids.1,
        token: TOKEN,
        stream: 0,
        streams: 2,
        verdict: Verdict::Welcome,
    };
    let wrong_token = Hello {
        token: Token([0; 16]),
        ..good
    };
    let answer = greet(&link.b, &wrong_token.encode()).unwrap();
    assert_eq!(answer.verdict, Verdict::UnknownSession);
    // The place is taken, and there is no third one.
    for stream in [0, 2, u16::MAX] {
        let answer = greet(&link.b, &Hello { stream, ..good }.encode()).unwrap();
        assert_eq!(answer.verdict, Verdict::WrongStream);
    }
    let unknown = Hello {
        session: SessionId(99),
        ..good
    };
    let answer = greet(&link.b, &unknown.encode()).unwrap();
    assert_eq!(answer.verdict, Verdict::UnknownSession);
    let mut newer = good.encode();
    newer[9] = 200;
    let answer = greet(&link.b, &newer).unwrap();
    assert_eq!(answer.verdict, Verdict::WrongVersion);
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0xff; 8]] {
        assert!(greet(&link.b, garbage).is_err());
    }
    // Half a HELLO, and then nothing.
    let answer = greet(&link.b, &good.encode()[..20]);
    assert!(matches!(answer, Ok(hello) if hello.verdict == Verdict::UnknownSession));
    link.move_and_check(&filled(1 << 20, 1));
    link.stop();
}

#[test]
fn a_peer_that_answers_and_does_nothing_is_lost_too() {
    let config = tcp::Config {
        progress_limit: Duration::from_millis(800),
        ..patient()
    };
    let mut peer = Peer::of(Engine::start(config));
    let into = empty(128);
    let (id, received) = peer.expect(&into);
    // A chunk is movement; then nothing but PONGs.
    std::thread::sleep(Duration::from_millis(50));
    peer.chunk(id, 0, &[1; 64]);
    let mut socket = peer.socket.try_clone().unwrap();
    let answering = std::thread::spawn(move || {
        let mut bytes = [0; HEADER_LEN];
        while socket.read_exact(&mut bytes).is_ok() {
            let header = Header::parse(&bytes).unwrap();
            if header.kind == Kind::Ping {
                let pong = Header::plain(Kind::Pong, header.offset);
                if socket.write_all(&pong.encode()).is_err() {
                    break;
                }
            }
        }
    });
    let (lost, _) = peer.engine.await_lost();
    assert_eq!(lost.session, peer.id);
    let answer = received.wait();
    assert!(
        matches!(&answer, Err(FailReason::PathLost(why)) if why.contains("no transfer moved")),
        "{answer:?}"
    );
    assert_given_back(&into);
    peer.engine.stop();
    answering.join().unwrap();
}
