//! One connection against a scripted peer: what must not happen.

use std::time::Duration;

use genie_proto::wire::{
    Ack, AckRange, Body, Done, DoneAck, FLAG_FIN, HEADER_LEN, Header, Kind, Probe, ProbeAck, Reset,
    Scope,
};
use genie_proto::{
    CloseReason, Config, Connection, Digest, DropCause, Event, FailReason, PathLostReason, Segment,
    SessionId, Time, TransferError, TransferId,
};

const ID: TransferId = TransferId {
    slot: 3,
    generation: 7,
};
const LOCAL: SessionId = SessionId(0xa);

/// A peer whose packets are built by hand.
struct Script {
    connection: Connection,
    memory: Vec<u8>,
    number: u64,
    now: Time,
}

impl Script {
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn with(config: Config) -> Self {
        Self {
            connection: Connection::new(config, LOCAL, SessionId(0xb), Time(0)),
            memory: vec![0; 1 << 20],
            number: 0,
            now: Time(0),
        }
    }

    fn header(&mut self, kind: Kind, transfer: TransferId) -> Header {
        self.number += 1;
        Header {
            kind,
            flags: 0,
            payload_len: 0,
            session: LOCAL,
            transfer,
            timestamp: 0,
            path: 0,
            packet_number: self.number,
            offset: 0,
        }
    }

    fn feed(&mut self, packet: &[u8]) {
        let memory = &mut self.memory;
        self.connection
            .handle_datagram(self.now, packet, packet.len(), |segment| {
                let segment: genie_proto::Segment = segment.expect("the whole datagram is given");
                let payload = &packet[HEADER_LEN..];
                memory[segment.offset as usize..][..payload.len()].copy_from_slice(payload);
                crc32c::crc32c(payload)
            });
    }

    fn control(&mut self, transfer: TransferId, body: &Body) {
        let payload = body.encode();
        let mut header = self.header(body.kind(), transfer);
        header.payload_len = payload.len() as u16;
        let mut packet = header.encode(crc32c::crc32c(&payload)).to_vec();
        packet.extend_from_slice(&payload);
        self.feed(&packet);
    }

    fn data(&mut self, transfer: TransferId, offset: u64, payload: &[u8], fin: bool) {
        let mut header = self.header(Kind::Data, transfer);
        header.flags = if fin { FLAG_FIN } else { 0 };
        header.payload_len = payload.len() as u16;
        header.offset = offset;
        let mut packet = header.encode(crc32c::crc32c(payload)).to_vec();
        packet.extend_from_slice(payload);
        self.feed(&packet);
    }

    fn transmit(&mut self) -> Option<(Header, Option<Body>)> {
        let transmit = self.connection.poll_transmit(self.now, |_| 0)?;
        let len = transmit.head.len() + transmit.payload.map_or(0, |s| s.len as usize);
        let (header, _) = Header::parse(&transmit.head, len).unwrap();
        let body = (header.kind != Kind::Data)
            .then(|| Body::parse(header.kind, &transmit.head[HEADER_LEN..]).unwrap());
        Some((header, body))
    }

    /// The peer asks for a sign of life and hears it; returns when it spoke last.
    fn be_probed(&mut self) -> Time {
        self.control(ID, &Body::Probe(Probe { token: 5 }));
        let sent: Vec<_> = std::iter::from_fn(|| self.transmit()).collect();
        let (header, _) = sent.last().expect("an answer");
        self.control(ID, &ack(header.packet_number, header.packet_number));
        let heard = self.now;
        self.now = heard + Duration::from_millis(1);
        self.connection.handle_timeout(self.now);
        while self.transmit().is_some() {}
        heard
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.connection.poll_event()).collect()
    }

    fn drops(&self, cause: DropCause) -> u64 {
        self.connection.stats().drops(cause)
    }
}

fn ack(first: u64, last: u64) -> Body {
    let ranges = [AckRange { first, last }].into_iter().collect();
    Body::Ack(Ack {
        delay_us: 0,
        echo: 0,
        credit: 512,
        ecn_ce: 0,
        ranges,
    })
}

#[test]
fn a_late_packet_of_an_older_generation_never_lands() {
    let mut script = Script::new();
    let older = TransferId {
        generation: ID.generation - 1,
        ..ID
    };
    script.connection.receive(older, 128).unwrap();
    script.connection.cancel(older, false);
    script.connection.receive(ID, 128).unwrap();
    script.data(older, 0, &[1; 128], true);
    assert_eq!(script.memory[..128], [0; 128]);
    assert_eq!(script.connection.stats().duplicate_segments, 1);
    script.data(ID, 0, &[2; 128], true);
    assert_eq!(script.memory[..128], [2; 128]);
}

#[test]
fn data_before_its_grant_is_dropped_and_not_acknowledged() {
    let mut script = Script::new();
    script.data(ID, 0, &[1; 128], true);
    assert_eq!(script.drops(DropCause::NotGranted), 1);
    assert_eq!(script.transmit(), None);
    script
        .connection
        .receive(
            TransferId {
                generation: 6,
                ..ID
            },
            128,
        )
        .unwrap();
    script.data(ID, 0, &[1; 128], true);
    assert_eq!(script.drops(DropCause::NotGranted), 2);
    assert_eq!(script.memory[..128], [0; 128]);
}

#[test]
fn data_outside_its_grant_never_lands_and_ends_the_transfer() {
    let mut script = Script::new();
    script.connection.receive(ID, 128).unwrap();
    script.data(ID, 128, &[1; 64], true);
    script.data(ID, 64, &[1; 128], true);
    assert_eq!(script.drops(DropCause::OutOfBounds), 2);
    script.data(ID, 0, &[1; 64], true);
    assert_eq!(script.drops(DropCause::LengthMismatch), 1);
    assert_eq!(script.memory[..256], [0; 256]);
    assert_eq!(script.events(), []);
    for _ in 0..5 {
        script.data(ID, 64, &[1; 128], true);
    }
    let reason = FailReason::LengthMismatch;
    assert_eq!(
        script.events(),
        [Event::Failed {
            transfer: ID,
            outgoing: false,
            reason
        }]
    );
    let (header, body) = script.transmit().unwrap();
    assert_eq!((header.kind, header.transfer), (Kind::Reset, ID));
    assert_eq!(
        body,
        Some(Body::Reset(Reset {
            scope: Scope::ToMe,
            reason: 3
        }))
    );
}

#[test]
fn a_segment_that_fails_its_checksum_is_a_lost_one() {
    let mut script = Script::new();
    script.connection.receive(ID, 64).unwrap();
    let mut header = script.header(Kind::Data, ID);
    header.flags = FLAG_FIN;
    header.payload_len = 64;
    let mut packet = header.encode(crc32c::crc32c(&[5; 64])).to_vec();
    packet.extend_from_slice(&[5; 64]);
    packet[HEADER_LEN + 9] ^= 4;
    script.feed(&packet);
    assert_eq!(script.drops(DropCause::PayloadCheck), 1);
    assert_eq!(script.connection.stats().bytes_received, 0);
    assert_eq!(script.transmit(), None, "neither ACK nor DONE");
    packet[HEADER_LEN + 9] ^= 4;
    script.feed(&packet);
    let (header, body) = script.transmit().unwrap();
    let digest = Digest(crc32c::crc32c(&[5; 64]));
    assert_eq!(
        (header.kind, body),
        (Kind::Done, Some(Body::Done(Done { len: 64, digest })))
    );
}

#[test]
fn verified_bytes_are_never_written_again() {
    let mut script = Script::new();
    script.connection.receive(ID, 256).unwrap();
    script.data(ID, 64, &[1; 64], false);
    script.data(ID, 64, &[2; 64], false);
    script.data(ID, 0, &[3; 128], false);
    assert_eq!(script.drops(DropCause::Overlap), 1);
    assert_eq!(script.connection.stats().duplicate_segments, 1);
    assert_eq!(script.memory[..192], [[0; 64], [1; 64], [0; 64]].concat());
}

#[test]
fn offsets_beyond_32_bits_land_where_they_belong() {
    let len = (1 << 33) + 64;
    let mut script = Script::new();
    script.connection.receive(ID, len).unwrap();
    let mut header = script.header(Kind::Data, ID);
    header.flags = FLAG_FIN;
    header.payload_len = 64;
    header.offset = 1 << 33;
    let mut packet = header.encode(crc32c::crc32c(&[5; 64])).to_vec();
    packet.extend_from_slice(&[5; 64]);
    let mut placed = None;
    script
        .connection
        .handle_datagram(Time(0), &packet, packet.len(), |segment| {
            placed = segment;
            crc32c::crc32c(&packet[HEADER_LEN..])
        });
    assert_eq!(
        placed,
        Some(Segment {
            transfer: ID,
            offset: 1 << 33,
            len: 64
        })
    );
    script.connection.send(ID, len).unwrap();
    assert_eq!(script.transmit().unwrap().0.kind, Kind::Data);
}

#[test]
fn an_ack_of_a_packet_never_sent_closes_the_session() {
    let mut script = Script::new();
    script.connection.send(ID, 64).unwrap();
    assert_eq!(script.transmit().unwrap().0.packet_number, 0);
    script.control(ID, &ack(0, 1));
    let events = script.events();
    assert_eq!(
        events[0],
        Event::Failed {
            transfer: ID,
            outgoing: true,
            reason: FailReason::Closed
        }
    );
    assert!(matches!(
        events[1],
        Event::Closed {
            reason: CloseReason::Violation(_)
        }
    ));
    let (header, body) = script.transmit().unwrap();
    assert_eq!(header.kind, Kind::Reset);
    assert_eq!(
        body,
        Some(Body::Reset(Reset {
            scope: Scope::Session,
            reason: 4
        }))
    );
    assert_eq!(script.connection.send(ID, 1), Err(TransferError::Closed));
}

#[test]
fn a_done_before_every_byte_was_sent_closes_the_session() {
    let mut script = Script::new();
    script.connection.send(ID, 1 << 20).unwrap();
    script.transmit().unwrap();
    script.control(
        ID,
        &Body::Done(Done {
            len: 1 << 20,
            digest: Digest(0),
        }),
    );
    assert!(matches!(
        script.events()[..],
        [Event::Failed { .. }, Event::Closed { .. }]
    ));
}

#[test]
fn a_done_for_a_transfer_never_begun_is_answered_with_a_reset() {
    let mut script = Script::new();
    script.control(
        ID,
        &Body::Done(Done {
            len: 1,
            digest: Digest(0),
        }),
    );
    let sent = std::iter::from_fn(|| script.transmit()).collect::<Vec<_>>();
    let (header, body) = &sent[0];
    assert_eq!((header.kind, header.transfer), (Kind::Reset, ID));
    assert_eq!(
        *body,
        Some(Body::Reset(Reset {
            scope: Scope::FromMe,
            reason: 2
        }))
    );
}

#[test]
fn a_done_that_comes_again_gets_the_same_answer() {
    let mut script = Script::new();
    script.connection.send(ID, 64).unwrap();
    script.transmit().unwrap();
    let done = Body::Done(Done {
        len: 64,
        digest: Digest(0),
    });
    for _ in 0..2 {
        script.control(ID, &done);
        script.now = script.now + Duration::from_micros(200);
        let sent = std::iter::from_fn(|| script.transmit()).collect::<Vec<_>>();
        assert!(
            sent.iter()
                .any(|(_, body)| *body == Some(Body::DoneAck(DoneAck::Ok)))
        );
    }
    assert_eq!(script.events().len(), 1);
}

#[test]
fn digests_that_differ_fail_the_transfer_at_either_end() {
    let reason = FailReason::DigestMismatch;
    let mut script = Script::new();
    script.connection.send(ID, 64).unwrap();
    script.transmit().unwrap();
    script.control(
        ID,
        &Body::Done(Done {
            len: 64,
            digest: Digest(1),
        }),
    );
    assert_eq!(
        script.events(),
        [Event::Failed {
            transfer: ID,
            outgoing: true,
            reason
        }]
    );
    let (_, body) = script.transmit().unwrap();
    assert_eq!(body, Some(Body::DoneAck(DoneAck::DigestMismatch)));

    script.connection.receive(ID, 64).unwrap();
    script.data(ID, 0, &[1; 64], true);
    script.control(ID, &Body::DoneAck(DoneAck::DigestMismatch));
    assert_eq!(
        script.events(),
        [Event::Failed {
            transfer: ID,
            outgoing: false,
            reason
        }]
    );
}

#[test]
fn a_silent_peer_loses_the_path_and_hangs_nobody() {
    for outgoing in [true, false] {
        let mut script = Script::new();
        match outgoing {
            true => script.connection.send(ID, 100_000).unwrap(),
            false => script.connection.receive(ID, 100_000).unwrap(),
        }
        let mut events = Vec::new();
        while events.is_empty() {
            while script.transmit().is_some() {}
            script.now = script
                .now
                .max(script.connection.poll_timeout().expect("a timer runs"));
            script.connection.handle_timeout(script.now);
            events = script.events();
        }
        let reason = FailReason::PathLost;
        let lost = PathLostReason::Silent(Duration::from_secs(2));
        assert_eq!(
            events,
            [
                Event::Failed {
                    transfer: ID,
                    outgoing,
                    reason
                },
                Event::PathLost { reason: lost }
            ]
        );
        assert_eq!(script.now, Time(2_000_000_000));
        assert_eq!(script.connection.poll_timeout(), None);
        assert_eq!(script.transmit(), None);
    }
}

#[test]
fn probe_timeouts_in_a_row_lose_the_path() {
    let config = Config {
        pto_limit: 3,
        ..Config::default()
    };
    let mut connection = Connection::new(config, LOCAL, SessionId(1), Time(0));
    let mut now = Time(0);
    connection.probe(now);
    let mut sent = 0;
    let lost = loop {
        while connection.poll_transmit(now, |_| 0).is_some() {
            sent += 1;
        }
        now = now.max(connection.poll_timeout().expect("a timer runs"));
        connection.handle_timeout(now);
        if let Some(event) = connection.poll_event() {
            break event;
        }
    };
    assert_eq!(
        lost,
        Event::PathLost {
            reason: PathLostReason::ProbeTimeouts(3)
        }
    );
    // 10 + 20 ms and the delay, doubled each time: (1 + 2 + 4 + 8) of them.
    assert_eq!(now, Time(15 * 30_100_000));
    assert_eq!(sent, 4);
}

#[test]
fn an_idle_connection_has_no_timer() {
    let mut script = Script::new();
    assert_eq!(script.transmit(), None);
    assert_eq!(script.connection.poll_timeout(), None);
    script.connection.handle_timeout(Time(u64::MAX / 2));
    assert_eq!(script.events(), []);
}

#[test]
fn an_idle_peer_is_probed_and_its_path_given_up_if_it_stays_silent() {
    let second = Duration::from_secs(1);
    let mut script = Script::with(Config {
        idle_probe: Some(second),
        ..Config::default()
    });
    assert_eq!(
        script.connection.poll_timeout(),
        None,
        "nobody was heard yet"
    );
    let mut heard = script.be_probed();
    for answered in [true, true, false] {
        assert_eq!(script.connection.poll_timeout(), Some(heard + second));
        script.now = heard + second;
        script.connection.handle_timeout(script.now);
        let (header, body) = script.transmit().expect("a probe");
        let Some(Body::Probe(probe)) = body else {
            panic!("{body:?}")
        };
        assert_eq!(script.transmit(), None);
        if answered {
            script.now = script.now + Duration::from_millis(1);
            script.control(ID, &ack(header.packet_number, header.packet_number));
            script.control(ID, &Body::ProbeAck(ProbeAck { token: probe.token }));
            heard = script.be_probed();
            assert_eq!(script.events(), []);
        }
    }
    let began = script.now;
    let mut events = Vec::new();
    while events.is_empty() {
        while script.transmit().is_some() {}
        script.now = script.connection.poll_timeout().expect("a timer runs");
        script.connection.handle_timeout(script.now);
        events = script.events();
    }
    let reason = PathLostReason::Silent(Duration::from_secs(2));
    assert_eq!(events, [Event::PathLost { reason }]);
    assert_eq!(script.now, began + Duration::from_secs(2));
}

#[test]
fn a_slot_is_used_again_only_under_a_higher_generation() {
    let mut script = Script::new();
    script.connection.receive(ID, 0).unwrap();
    assert_eq!(
        script.connection.receive(ID, 0),
        Err(TransferError::SlotBusy(ID))
    );
    script.connection.cancel(ID, false);
    let stale = TransferError::StaleGeneration { id: ID, last: 7 };
    assert_eq!(script.connection.receive(ID, 0), Err(stale));
    script.connection.send(ID, 64).unwrap();
    assert_eq!(script.connection.send(ID, 64), Err(stale));
    let far = TransferId {
        slot: 1 << 16,
        generation: 1,
    };
    let error = TransferError::SlotOutOfRange {
        slot: 1 << 16,
        slots_max: 1 << 16,
    };
    assert_eq!(script.connection.receive(far, 0), Err(error));
    script.events();
    // The peer granted the slot anew, so it gave the earlier transfer up.
    script
        .connection
        .send(
            TransferId {
                generation: 8,
                ..ID
            },
            64,
        )
        .unwrap();
    let reason = FailReason::CancelledByPeer;
    assert_eq!(
        script.events(),
        [Event::Failed {
            transfer: ID,
            outgoing: true,
            reason
        }]
    );
}

#[test]
fn credit_bounds_the_packets_in_flight() {
    let config = Config {
        remote_credit: 4,
        ..Config::default()
    };
    let mut script = Script::new();
    script.connection = Connection::new(config, LOCAL, SessionId(1), Time(0));
    script.connection.send(ID, 1 << 20).unwrap();
    let mut sent = 0;
    while script.transmit().is_some() {
        sent += 1;
    }
    assert_eq!(sent, 4);
    let Body::Ack(mut eight) = ack(0, 1) else {
        unreachable!()
    };
    eight.credit = 8;
    script.number = 7;
    script.control(ID, &Body::Ack(eight));
    script.number = 5;
    script.control(ID, &ack(0, 1));
    while script.transmit().is_some() {
        sent += 1;
    }
    assert_eq!(sent, 2 + 8);
}

#[test]
fn credit_that_comes_back_is_told_at_once() {
    let mut script = Script::new();
    script.connection.receive(ID, 128).unwrap();
    script.connection.set_receive_credit(0);
    script.data(ID, 0, &[1; 64], false);
    script.now = script.now + Duration::from_millis(1);
    let credit = |sent: Option<(Header, Option<Body>)>| match sent {
        Some((_, Some(Body::Ack(ack)))) => Some(ack.credit),
        _ => None,
    };
    assert_eq!(credit(script.transmit()), Some(0));
    assert_eq!(script.transmit(), None);
    script.connection.set_receive_credit(5);
    assert_eq!(credit(script.transmit()), Some(5));
    script.connection.set_receive_credit(6);
    assert_eq!(script.transmit(), None, "the next ACK will do");
}

#[test]
fn without_credit_a_sender_probes_and_goes_on_when_it_returns() {
    let config = Config {
        remote_credit: 0,
        ..Config::default()
    };
    let mut script = Script::new();
    script.connection = Connection::new(config, LOCAL, SessionId(1), Time(0));
    script.connection.send(ID, 64).unwrap();
    assert_eq!(script.transmit(), None);
    script.now = script.connection.poll_timeout().unwrap();
    assert!(script.now <= Time(0) + Duration::from_millis(20), "soon");
    script.connection.handle_timeout(script.now);
    assert_eq!(script.transmit().unwrap().0.kind, Kind::Probe);
    assert_eq!(script.transmit(), None);
    script.control(ID, &ack(0, 0));
    assert_eq!(script.transmit().unwrap().0.kind, Kind::Data);
}

#[test]
fn credit_is_for_data_and_what_is_said_of_it_goes_without() {
    let config = Config {
        remote_credit: 0,
        ..Config::default()
    };
    let mut script = Script::new();
    script.connection = Connection::new(config, LOCAL, SessionId(1), Time(0));
    script.connection.receive(ID, 64).unwrap();
    script.data(ID, 0, &[1; 64], true);
    assert_eq!(script.transmit().unwrap().0.kind, Kind::Done);
    // Not without end: these are in flight like any other.
    for token in 0..9 {
        script.control(ID, &Body::Probe(Probe { token }));
    }
    let answers = std::iter::from_fn(|| script.transmit());
    let answers = answers.filter(|(header, _)| header.kind == Kind::ProbeAck);
    assert_eq!(answers.count(), 1);
}

#[test]
fn a_closed_connection_says_so_again_ever_more_rarely() {
    let mut script = Script::new();
    script.connection.receive(ID, 64).unwrap();
    script.connection.close(77);
    let reason = FailReason::Closed;
    assert_eq!(
        script.events(),
        [
            Event::Failed {
                transfer: ID,
                outgoing: false,
                reason
            },
            Event::Closed {
                reason: CloseReason::Local(77)
            }
        ]
    );
    let mut told = 0;
    for _ in 0..64 {
        while let Some((_, body)) = script.transmit() {
            assert_eq!(
                body,
                Some(Body::Reset(Reset {
                    scope: Scope::Session,
                    reason: 77
                }))
            );
            told += 1;
        }
        script.data(ID, 0, &[1; 64], true);
    }
    assert_eq!(told, 1 + 6);
    assert_eq!(script.memory[..64], [0; 64]);
}

#[test]
fn a_probe_timeout_sends_two_packets_beyond_a_full_window() {
    let mut script = Script::new();
    script.connection.send(ID, 1 << 20).unwrap();
    let mut first = 0;
    while script.transmit().is_some() {
        first += 1;
    }
    assert_eq!(
        first, 11,
        "ten packets' bytes, the last of which began inside"
    );
    for timeout in 1..4 {
        script.now = script.connection.poll_timeout().unwrap();
        script.connection.handle_timeout(script.now);
        let sent: Vec<_> = std::iter::from_fn(|| script.transmit()).collect();
        assert_eq!(script.connection.stats().ptos, timeout);
        assert_eq!(script.connection.stats().retransmits.probe, 2 * timeout);
        let oldest = 2 * (timeout - 1) * 1408;
        let offsets: Vec<_> = sent.iter().map(|(header, _)| header.offset).collect();
        assert_eq!(
            offsets,
            [oldest, oldest + 1408],
            "the oldest, under new numbers"
        );
        assert_eq!(sent[0].0.packet_number, 11 + 2 * (timeout - 1));
    }
}

#[test]
fn a_packet_that_comes_twice_is_taken_once() {
    let mut script = Script::new();
    script.connection.receive(ID, 128).unwrap();
    script.data(ID, 0, &[1; 64], false);
    script.number -= 1;
    script.data(ID, 64, &[2; 64], true);
    assert_eq!(script.drops(DropCause::DuplicatePacket), 1);
    assert_eq!(script.memory[64..128], [0; 64]);
    assert_eq!(script.connection.stats().packets_received, 1);
}

#[test]
fn silence_is_probed_before_the_path_is_given_up() {
    let mut script = Script::new();
    script.connection.receive(ID, 128).unwrap();
    assert_eq!(script.transmit(), None);
    script.now = script.connection.poll_timeout().unwrap();
    assert_eq!(script.now, Time(500_000_000));
    script.connection.handle_timeout(script.now);
    let (header, body) = script.transmit().unwrap();
    assert_eq!(header.kind, Kind::Probe);
    let Some(Body::Probe(probe)) = body else {
        unreachable!()
    };
    // The answer starts the count again.
    script.now = script.now + Duration::from_millis(1);
    script.control(ID, &ack(header.packet_number, header.packet_number));
    script.control(ID, &Body::ProbeAck(ProbeAck { token: probe.token }));
    script.now = script.now + Duration::from_micros(100);
    while script.transmit().is_some() {}
    assert_eq!(script.events(), [], "nobody asked for it");
    assert_eq!(script.connection.poll_timeout(), Some(Time(1_001_000_000)));
}

/// A duplicate whose header was damaged in a way its 16-bit check misses must
/// not be acknowledged under the wrong number, also where only the header is at
/// hand.
#[test]
fn a_duplicate_is_acknowledged_only_if_its_payload_vouches_for_it() {
    let mut script = Script::new();
    script.connection.receive(ID, 128).unwrap();
    let payload = [5; 64];
    let packet = |script: &mut Script| {
        let mut header = script.header(Kind::Data, ID);
        header.payload_len = 64;
        header.encode(crc32c::crc32c(&payload))
    };
    let mut asked = Vec::new();
    for crc in [crc32c::crc32c(&payload), 1, crc32c::crc32c(&payload)] {
        let head = packet(&mut script);
        let len = head.len() + payload.len();
        script
            .connection
            .handle_datagram(Time(0), &head, len, |segment| {
                asked.push(segment.is_some());
                crc
            });
    }
    assert_eq!(
        asked,
        [true, false, false],
        "placed once, then only checked"
    );
    let stats = script.connection.stats();
    assert_eq!(stats.drops(DropCause::PayloadCheck), 1);
    assert_eq!(stats.duplicate_segments, 1);
}

/// Runs a transfer of 100 000 bytes between two connections for two simulated
/// minutes over a path that drops what `drop(from the sender, packet)` names.
fn events_over(drop: impl Fn(bool, &[u8]) -> bool) -> Vec<Event> {
    let mut ends = [
        Connection::new(Config::default(), LOCAL, SessionId(0xb), Time(0)),
        Connection::new(Config::default(), SessionId(0xb), LOCAL, Time(0)),
    ];
    ends[1].receive(ID, 100_000).unwrap();
    ends[0].send(ID, 100_000).unwrap();
    let (mut events, mut now) = (Vec::new(), Time(0));
    while now < Time(0) + Duration::from_secs(120) {
        for from in [0, 1] {
            while let Some(transmit) = ends[from].poll_transmit(now, |segment| {
                crc32c::crc32c(&vec![7; segment.len as usize])
            }) {
                let mut packet = transmit.head.to_vec();
                let len = transmit.payload.map_or(0, |segment| segment.len as usize);
                packet.resize(packet.len() + len, 7);
                if !drop(from == 0, &packet) {
                    ends[1 - from].handle_datagram(now, &packet, packet.len(), |_| {
                        crc32c::crc32c(&packet[HEADER_LEN..])
                    });
                }
            }
            events.extend(std::iter::from_fn(|| ends[from].poll_event()));
        }
        now = now + Duration::from_micros(500);
        for end in &mut ends {
            if end.poll_timeout().is_some_and(|at| at <= now) {
                end.handle_timeout(now);
            }
        }
    }
    events
}

fn stalled(events: &[Event]) -> usize {
    let lost = |event: &&Event| {
        matches!(
            event,
            Event::PathLost {
                reason: PathLostReason::Stalled(_)
            }
        )
    };
    events.iter().filter(lost).count()
}

/// Probes get through, segments do not: a path MTU that nobody told us of.
#[test]
fn a_path_that_swallows_full_packets_is_lost_at_both_ends() {
    let events = events_over(|_, packet| packet.len() > 1000);
    assert_eq!(stalled(&events), 2, "{events:?}");
}

#[test]
fn a_peer_that_acknowledges_everything_and_confirms_nothing_is_lost() {
    let done = Kind::Done as u8;
    let events = events_over(|from_sender, packet| !from_sender && packet[0] & 15 == done);
    assert_eq!(stalled(&events), 2, "{events:?}");
    let whole = events_over(|_, _| false);
    assert_eq!(stalled(&whole), 0);
    assert!(matches!(whole[0], Event::Sent { .. }), "{whole:?}");
}
