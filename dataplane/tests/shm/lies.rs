//! A peer of our own making, which speaks the protocol and breaks it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use genie_dataplane::engine::FailReason;
use genie_dataplane::shm::message::{LEN, Message, Reason};
use genie_dataplane::shm::{Config, Role};
use genie_dataplane::{Digest, SessionId, TransferId};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::harness::{Engine, PATIENCE, TOKEN, assert_given_back, bytes, empty, filled};

/// A fake peer that has dialled an engine.
struct Peer {
    engine: Engine,
    id: SessionId,
    socket: OwnedFd,
}

/// A sealed memory file with these bytes.
fn memory(bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("lies", flags).unwrap();
    rustix::io::pwrite(&file, bytes, 0).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn dial(engine: &Engine) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
    let name = engine.local.name.as_bytes();
    let address = SocketAddrUnix::new_abstract_name(name).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    socket
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptor: Option<&OwnedFd>) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|one| [one.as_fd()]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let bytes = [IoSlice::new(bytes)];
    rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)
}

impl Peer {
    /// Opens a session as a good peer does.
    fn new() -> Self {
        Self::of(Engine::patient())
    }

    fn of(engine: Engine) -> Self {
        let id = engine.endpoint.new_session(1);
        let socket = dial(&engine);
        std::thread::scope(|scope| {
            let accepting = scope.spawn(|| engine.open(id, SessionId(9), Role::Accept, TOKEN));
            let hello = Message::Hello {
                session: id,
                token: TOKEN,
            };
            let probe = memory(&TOKEN.0, SealFlags::SHRINK);
            send(&socket, &hello.encode(), Some(&probe)).unwrap();
            assert_eq!(hear_from(&socket), Some(Message::Welcome));
            send(&socket, &Message::Ping.encode(), None).unwrap();
            assert_eq!(hear_from(&socket), Some(Message::Pong));
            accepting.join().unwrap().unwrap();
        });
        Self { engine, id, socket }
    }

    fn say(&self, message: Message) {
        send(&self.socket, &message.encode(), None).unwrap();
    }

    fn pass(&self, region: u32, file: &OwnedFd) {
        let message = Message::Region { region };
        send(&self.socket, &message.encode(), Some(file)).unwrap();
    }

    fn offer(&self, transfer: TransferId, region: u32, offset: u64, len: u64) {
        self.say(Message::Offer {
            transfer,
            region,
            offset,
            len,
        });
    }

    /// The engine's next message; none once it has closed the connection.
    fn hear(&self) -> Option<Message> {
        hear_from(&self.socket)
    }

    /// Asserts that the session is lost for a breach of the protocol.
    fn expect_thrown_out(mut self, what: &str) {
        let lost = self.engine.await_lost();
        assert_eq!(lost.session, self.id);
        let FailReason::Protocol(why) = lost.reason else {
            panic!("{:?}", lost.reason);
        };
        assert!(why.contains(what), "{why}");
        self.engine.stop();
    }
}

fn hear_from(socket: &OwnedFd) -> Option<Message> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; LEN];
    let mut into = [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC);
    match received.unwrap().bytes {
        0 => None,
        len => Some(Message::decode(&bytes[..len]).expect("an engine says what can be understood")),
    }
}

/// What a peer does that no peer may.
type Lie<'a> = &'a dyn Fn(&Peer);

const SEALS: SealFlags = SealFlags::SHRINK;

#[test]
fn a_good_peer_is_served() {
    let peer = Peer::new();
    let into = empty(1000);
    let (transfer, received) = peer.engine.receive(peer.id, into.clone());
    peer.pass(3, &memory(&[7; 5000], SEALS));
    peer.offer(transfer, 3, 4000, 1000);
    let digest = Digest(crc32c::crc32c(&[7; 1000]));
    assert_eq!(peer.hear(), Some(Message::Done { transfer, digest }));
    peer.say(Message::Verdict {
        transfer,
        equal: true,
    });
    assert_eq!(received.wait().unwrap().digest, digest);
    assert_eq!(bytes(&into), [7; 1000]);
    peer.engine.stop();
}

#[test]
fn nothing_is_taken_from_beyond_the_memory_that_was_passed() {
    let peer = Peer::new();
    peer.pass(0, &memory(&[1; 4096], SEALS));
    for (offset, len) in [(4000, 97), (4097, 0), (u64::MAX, 2), (0, 4097)] {
        let into = empty(len as usize);
        let (transfer, received) = peer.engine.receive(peer.id, into.clone());
        peer.offer(transfer, 0, offset, len);
        let reset = Message::Reset {
            transfer,
            by_sender: false,
            reason: Reason::Memory,
        };
        assert_eq!(peer.hear(), Some(reset), "{offset} {len}");
        assert!(matches!(received.wait(), Err(FailReason::Refused(_))));
        assert_given_back(&into);
    }
    peer.engine.stop();
}

#[test]
fn an_offer_of_what_was_not_granted_changes_nothing() {
    let peer = Peer::new();
    peer.pass(0, &memory(&[1; 4096], SEALS));
    let into = empty(100);
    let (granted, received) = peer.engine.receive(peer.id, into.clone());
    let stale = TransferId {
        generation: granted.generation + 1,
        ..granted
    };
    peer.offer(stale, 0, 0, 100);
    let reset = Message::Reset {
        transfer: stale,
        by_sender: false,
        reason: Reason::Unknown,
    };
    assert_eq!(peer.hear(), Some(reset));
    assert_eq!(bytes(&into), [0; 100]);
    received.cancel();
    assert_eq!(received.wait(), Err(FailReason::Cancelled));
    peer.engine.stop();
}

#[test]
fn a_verdict_before_the_bytes_proves_nothing() {
    let peer = Peer::new();
    let into = empty(100);
    let (transfer, received) = peer.engine.receive(peer.id, into.clone());
    peer.say(Message::Verdict {
        transfer,
        equal: true,
    });
    peer.say(Message::Done {
        transfer,
        digest: Digest(1),
    });
    peer.pass(0, &memory(&[5; 100], SEALS));
    peer.offer(transfer, 0, 0, 100);
    assert!(matches!(peer.hear(), Some(Message::Done { .. })));
    peer.say(Message::Verdict {
        transfer,
        equal: false,
    });
    assert_eq!(received.wait(), Err(FailReason::DigestMismatch));
    peer.engine.stop();
}

#[test]
fn a_wrong_digest_fails_the_sender() {
    let peer = Peer::new();
    let from = filled(1000, 1);
    let transfer = TransferId {
        slot: 0,
        generation: 1,
    };
    let sent = peer.engine.send(peer.id, transfer, from.clone());
    assert!(matches!(peer.hear(), Some(Message::Region { .. })));
    assert!(matches!(
        peer.hear(),
        Some(Message::Offer { len: 1000, .. })
    ));
    peer.say(Message::Done {
        transfer,
        digest: Digest(from.crc32c(0..1000) ^ 1),
    });
    let verdict = Message::Verdict {
        transfer,
        equal: false,
    };
    assert_eq!(peer.hear(), Some(verdict));
    assert_eq!(sent.wait(), Err(FailReason::DigestMismatch));
    assert_given_back(&from);
    peer.engine.stop();
}

#[test]
fn what_is_passed_can_only_be_read() {
    let peer = Peer::new();
    let from = filled(4096, 1);
    let transfer = TransferId {
        slot: 0,
        generation: 1,
    };
    let sent = peer.engine.send(peer.id, transfer, from.clone());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; LEN];
    let mut into = [IoSliceMut::new(&mut bytes)];
    rustix::net::recvmsg(&peer.socket, &mut into, &mut control, RecvFlags::empty()).unwrap();
    let file = control.drain().find_map(|message| match message {
        rustix::net::RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let file = file.expect("a region comes with its descriptor");
    assert!(rustix::io::pwrite(&file, b"x", 64).is_err());
    let mut first = [0; 8];
    rustix::io::pread(&file, &mut first, 64).unwrap();
    assert_eq!(first, self::bytes(&from)[..8]);
    drop(sent);
    peer.engine.stop();
}

#[test]
fn memory_that_could_be_pulled_away_is_not_taken() {
    let unsealed = memory(&[1; 100], SealFlags::empty());
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    for (bad, what) in [
        (unsealed, "SHRINK"),
        (file, "not of a memory file"),
        (pipe, "not of a memory file"),
    ] {
        let peer = Peer::new();
        peer.pass(0, &bad);
        peer.expect_thrown_out(what);
    }
}

#[test]
fn breaches_of_the_protocol_end_the_session_with_the_reason() {
    let some = TransferId {
        slot: 0,
        generation: 1,
    };
    let cases: [(&str, Lie<'_>); 6] = [
        ("no message", &|peer| {
            send(&peer.socket, &[0xff; LEN], None).unwrap();
        }),
        ("no message", &|peer| {
            send(&peer.socket, &[1; LEN + 1], None).unwrap();
        }),
        ("a second HELLO", &|peer| {
            peer.say(Message::Hello {
                session: peer.id,
                token: TOKEN,
            });
        }),
        ("not asked for", &|peer| peer.say(Message::Welcome)),
        ("number twice", &|peer| {
            peer.pass(1, &memory(&[0; 10], SEALS));
            peer.pass(1, &memory(&[0; 10], SEALS));
        }),
        ("more regions", &|peer| {
            let file = memory(&[0; 10], SEALS);
            for region in 0..1000 {
                let message = Message::Region { region }.encode();
                // It is thrown out before it has passed them all.
                if send(&peer.socket, &message, Some(&file)).is_err() {
                    break;
                }
            }
        }),
    ];
    for (what, lie) in cases {
        let peer = Peer::new();
        lie(&peer);
        peer.expect_thrown_out(what);
    }
    // One that names a region that was never passed.
    let peer = Peer::new();
    let (transfer, _received) = peer.engine.receive(peer.id, empty(10));
    assert_eq!(transfer.slot, some.slot);
    peer.offer(transfer, 77, 0, 10);
    peer.expect_thrown_out("not passed");
}

#[test]
fn a_region_without_its_descriptor_costs_its_transfers_only() {
    let peer = Peer::new();
    peer.say(Message::Region { region: 5 });
    let (transfer, received) = peer.engine.receive(peer.id, empty(10));
    peer.offer(transfer, 5, 0, 10);
    assert!(matches!(received.wait(), Err(FailReason::Refused(_))));
    let (transfer, received) = peer.engine.receive(peer.id, empty(10));
    peer.pass(6, &memory(&[3; 10], SEALS));
    peer.offer(transfer, 6, 0, 10);
    assert!(matches!(peer.hear(), Some(Message::Reset { .. })));
    assert!(matches!(peer.hear(), Some(Message::Done { .. })));
    peer.say(Message::Verdict {
        transfer,
        equal: true,
    });
    received.wait().unwrap();
    peer.engine.stop();
}

#[test]
fn a_stranger_gets_no_session() {
    let engine = Engine::patient();
    let socket = dial(&engine);
    send(&socket, &Message::Ping.encode(), None).unwrap();
    assert_eq!(hear_from(&socket), None, "who says no HELLO is closed");
    // With a HELLO but no descriptor, or another than it should be.
    for probe in [None, Some(memory(&[1; 16], SEALS))] {
        let id = engine.endpoint.new_session(1);
        let socket = dial(&engine);
        std::thread::scope(|scope| {
            let accepting = scope.spawn(|| engine.open(id, SessionId(9), Role::Accept, TOKEN));
            let hello = Message::Hello {
                session: id,
                token: TOKEN,
            };
            send(&socket, &hello.encode(), probe.as_ref()).unwrap();
            assert_eq!(hear_from(&socket), None);
            assert!(accepting.join().unwrap().is_err());
        });
    }
    engine.stop();
}

#[test]
fn a_peer_that_stops_answering_is_given_up() {
    let liveness = Duration::from_millis(400);
    let mut peer = Peer::of(Engine::start(Config {
        liveness,
        open_limit: PATIENCE,
        progress_limit: PATIENCE,
    }));
    let began = Instant::now();
    let lost = peer.engine.await_lost();
    assert!(matches!(lost.reason, FailReason::PathLost(_)), "{lost:?}");
    assert!(began.elapsed() >= liveness / 2);
    peer.engine.stop();
}

#[test]
fn a_peer_that_answers_and_does_nothing_is_given_up() {
    let mut peer = Peer::of(Engine::start(Config {
        liveness: PATIENCE,
        open_limit: PATIENCE,
        progress_limit: Duration::from_millis(300),
    }));
    let (_, received) = peer.engine.receive(peer.id, empty(10));
    let lost = peer.engine.await_lost();
    let FailReason::PathLost(why) = lost.reason else {
        panic!("{:?}", lost.reason);
    };
    assert!(why.contains("no transfer moved"), "{why}");
    assert!(matches!(received.wait(), Err(FailReason::PathLost(_))));
    peer.engine.stop();
}

#[test]
fn a_peer_that_asks_and_never_listens_is_thrown_out() {
    let mut peer = Peer::new();
    let flags = rustix::fs::fcntl_getfl(&peer.socket).unwrap();
    rustix::fs::fcntl_setfl(&peer.socket, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    let began = Instant::now();
    loop {
        match send(&peer.socket, &Message::Ping.encode(), None) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => std::thread::yield_now(),
            Err(_) => break,
        }
        assert!(began.elapsed() < PATIENCE, "its answers pile up for ever");
    }
    let lost = peer.engine.await_lost();
    assert!(matches!(lost.reason, FailReason::PathLost(_)), "{lost:?}");
    peer.engine.stop();
}
