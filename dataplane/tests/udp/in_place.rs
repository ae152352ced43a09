//! Tensors that are read in the frames they arrive in.

use std::time::{Duration, Instant};

use genie_dataplane::device::Device;
use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::engine::udp::{Config, InPlace, InPlaceRefused, Piece};
use genie_dataplane::engine::{Command, FailReason, OperationId, Receipt};
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::Lease;
use genie_dataplane::{Secret, Secrets, SessionId, TransferError, TransferId};

use crate::harness::{self, PATIENCE, random_bytes, region};
use crate::polled::{Ends, SESSIONS, receipt};

const FRAMES: u16 = 32;

fn config(frames: u16, deadline: Duration) -> Config {
    Config {
        in_place: InPlace { frames, deadline },
        ..harness::config()
    }
}

fn options(keepable: u16) -> Options {
    Options {
        keepable,
        ..Options::default()
    }
}

fn open(keepable: u16, config: &Config) -> Ends<PairDevice> {
    let (a, b) = pair(&options(keepable));
    let mut ends = Ends::new([a, b], config);
    ends.open_both(None);
    ends
}

fn transfer(generation: u32) -> TransferId {
    TransferId {
        slot: 0,
        generation,
    }
}

/// Has the second end expect what the first sends.
fn ask<D: Device>(ends: &mut Ends<D>, generation: u32, from: Lease) {
    let (operation, id) = (OperationId(generation.into()), transfer(generation));
    ends.engines[1]
        .receive_in_place(SESSIONS[1], operation, id, from.len() as u64)
        .expect("there are frames");
    let send = Command::Send {
        operation,
        session: SESSIONS[0],
        transfer: id,
        from,
        resume: None,
    };
    ends.ask(0, send);
}

fn a_turn<D: Device>(ends: &mut Ends<D>) {
    let mut turns = 0;
    ends.drive("a turn", |_| {
        turns += 1;
        turns > 1
    });
}

/// Copies a piece to where it belongs.
fn read<D: Device>(ends: &Ends<D>, piece: &Piece, into: &mut [u8]) {
    let view = ends.engines[1].piece(piece).expect("it is kept");
    assert_eq!(view.len(), piece.len() as usize);
    let at = piece.offset() as usize;
    view.copy_to(&mut into[at..at + view.len()]);
}

/// Drives both ends until they have answered, showing `on_piece` what arrives.
/// Returns what they answered.
fn receive<D: Device>(
    ends: &mut Ends<D>,
    mut on_piece: impl FnMut(&mut Ends<D>, Piece),
) -> [Result<Receipt, FailReason>; 2] {
    let limit = Instant::now() + PATIENCE;
    while ends.answers.iter().any(|answers| answers.is_empty()) {
        a_turn(ends);
        while let Some(piece) = ends.engines[1].poll_piece() {
            on_piece(ends, piece);
        }
        assert!(Instant::now() < limit, "never answered: {:?}", ends.answers);
    }
    [0, 1].map(|end| receipt(ends.answers[end].pop().unwrap()).1)
}

/// Moves tensors of these lengths, each piece of which is given back once read.
fn tensors_arrive<D: Device>(ends: &mut Ends<D>, lens: &[usize]) {
    let mut random = fastrand::Rng::with_seed(5);
    for (generation, &len) in (1..).zip(lens) {
        let bytes = random_bytes(&mut random, len);
        ask(ends, generation, region(&bytes));
        let mut read_bytes = vec![0; len];
        let mut shown = 0;
        let [sent, received] = receive(ends, |ends, piece| {
            assert_eq!(
                (piece.session(), piece.transfer()),
                (SESSIONS[1], transfer(generation))
            );
            read(ends, &piece, &mut read_bytes);
            shown += piece.len() as usize;
            ends.engines[1].release_piece(piece);
        });
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert!(read_bytes == bytes, "length {len}");
        assert_eq!(shown, len, "each byte once");
        assert_eq!(received.bytes, len as u64);
        assert_eq!(received.copies, Copies::default(), "nothing was copied");
        assert_eq!(received.digest.0, crc32c::crc32c(&bytes));
        assert_eq!(sent.digest, received.digest);
    }
}

#[test]
fn every_byte_is_shown_once_and_nothing_is_copied() {
    let mut ends = open(64, &config(FRAMES, Duration::from_secs(60)));
    tensors_arrive(&mut ends, &[0, 1, 64, 8900, 100_000, 3 << 20]);
}

#[test]
fn every_byte_is_shown_once_through_loss_repetition_and_corruption() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let (a, b) = pair(&options(64));
    let faults = |seed| Faults {
        seed,
        loss: 20,
        duplication: 20,
        corruption: 10,
        reordering: 20,
    };
    let devices = [
        FaultyDevice::new(a, faults(seed)),
        FaultyDevice::new(b, faults(seed.wrapping_add(1))),
    ];
    let mut ends = Ends::new(devices, &config(FRAMES, Duration::from_secs(60)));
    ends.open_both(None);
    tensors_arrive(&mut ends, &[1, 8900, 500_000, 2 << 20]);
}

#[test]
fn a_slow_reader_stops_the_sender_and_loses_nothing() {
    let mut ends = open(64, &config(FRAMES, Duration::from_secs(60)));
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(6), 1 << 20);
    ask(&mut ends, 1, region(&bytes));
    let mut read_bytes = vec![0; bytes.len()];
    let (mut held, mut most) = (Vec::new(), 0);
    let limit = Instant::now() + PATIENCE;
    while ends.answers[0].is_empty() {
        // Long enough that all comes that may.
        for _ in 0..20 {
            a_turn(&mut ends);
        }
        held.extend(std::iter::from_fn(|| ends.engines[1].poll_piece()));
        most = most.max(held.len());
        assert!(held.len() <= usize::from(FRAMES), "{} pieces", held.len());
        // In another order than they came in.
        while let Some(piece) = held.pop() {
            read(&ends, &piece, &mut read_bytes);
            ends.engines[1].release_piece(piece);
        }
        assert!(Instant::now() < limit, "never sent");
    }
    let sent = receipt(ends.answers[0].pop().unwrap()).1.unwrap();
    assert!(read_bytes == bytes);
    assert_eq!((sent.retransmits, most), (0, usize::from(FRAMES)));
}

#[test]
fn a_piece_that_is_not_given_back_is_taken_and_its_transfer_fails() {
    let deadline = Duration::from_millis(50);
    let mut ends = open(FRAMES, &config(FRAMES, deadline));
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(7), 1 << 20);
    ask(&mut ends, 1, region(&bytes));
    let mut held = Vec::new();
    let [sent, received] = receive(&mut ends, |_, piece| held.push(piece));
    assert_eq!(received, Err(FailReason::Unread(deadline)));
    assert_eq!(sent, Err(FailReason::CancelledByPeer));
    let reason = received.unwrap_err().to_string();
    assert_eq!(reason, "a piece was read for longer than 50ms");
    // The first, at least, and then the others.
    let limit = Instant::now() + PATIENCE;
    while held
        .iter()
        .any(|piece| ends.engines[1].piece(piece).is_some())
    {
        a_turn(&mut ends);
        assert!(Instant::now() < limit, "they were never taken back");
    }
    held.drain(..)
        .for_each(|piece| ends.engines[1].release_piece(piece));
    // All frames are there for the next one.
    ask(&mut ends, 2, region(&bytes));
    let mut read_bytes = vec![0; bytes.len()];
    let results = receive(&mut ends, |ends, piece| {
        if piece.transfer() == transfer(2) {
            read(ends, &piece, &mut read_bytes);
        }
        ends.engines[1].release_piece(piece);
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert!(read_bytes == bytes);
}

#[test]
fn pieces_outlive_their_session_but_not_their_deadline() {
    let mut ends = open(FRAMES, &config(FRAMES, Duration::from_secs(60)));
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(8), 1 << 20);
    ask(&mut ends, 1, region(&bytes));
    let mut held = Vec::new();
    while held.is_empty() {
        a_turn(&mut ends);
        held.extend(std::iter::from_fn(|| ends.engines[1].poll_piece()));
    }
    ends.ask(1, Command::Stop);
    ends.drive("the engine ends", |ends| ends.engines[1].is_finished());
    let mut read_bytes = vec![0; bytes.len()];
    for piece in held {
        read(&ends, &piece, &mut read_bytes);
        let (at, len) = (piece.offset() as usize, piece.len() as usize);
        assert!(read_bytes[at..at + len] == bytes[at..at + len]);
        ends.engines[1].release_piece(piece);
    }
}

/// The sender's verdict is no data: it comes although no frame is left for any.
#[test]
fn a_reader_may_hold_every_frame_until_its_tensor_is_whole() {
    let mut ends = open(FRAMES, &config(FRAMES, Duration::from_secs(60)));
    let mut random = fastrand::Rng::with_seed(10);
    let mut longest = 0;
    ask(&mut ends, 1, region(&random_bytes(&mut random, 1 << 16)));
    let results = receive(&mut ends, |ends, piece| {
        longest = longest.max(piece.len() as usize);
        ends.engines[1].release_piece(piece);
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    for generation in 2..5 {
        let bytes = random_bytes(&mut random, usize::from(FRAMES) * longest);
        ask(&mut ends, generation, region(&bytes));
        let mut held = Vec::new();
        let results = receive(&mut ends, |_, piece| held.push(piece));
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_eq!(held.len(), usize::from(FRAMES));
        let mut read_bytes = vec![0; bytes.len()];
        for piece in held {
            read(&ends, &piece, &mut read_bytes);
            ends.engines[1].release_piece(piece);
        }
        assert!(read_bytes == bytes);
    }
}

#[test]
fn pieces_of_a_session_that_is_gone_are_not_its_successors() {
    let mut ends = open(2 * FRAMES, &config(FRAMES, Duration::from_secs(60)));
    let bytes = random_bytes(&mut fastrand::Rng::with_seed(9), 1 << 18);
    ask(&mut ends, 1, region(&bytes));
    let mut held = Vec::new();
    while held.is_empty() {
        a_turn(&mut ends);
        held.extend(std::iter::from_fn(|| ends.engines[1].poll_piece()));
    }
    for (end, session) in SESSIONS.into_iter().enumerate() {
        ends.ask(end, Command::Close { session });
    }
    // Each has lost its transfer, and then there is nothing left of it.
    ends.drive("both ends have answered", |ends| {
        ends.answers.iter().all(|answers| !answers.is_empty())
    });
    let closed = Instant::now();
    ends.drive("both sessions are gone", |_| {
        closed.elapsed() > Duration::from_millis(200)
    });
    ends.answers.iter_mut().for_each(Vec::clear);
    // The same names again.
    ends.open_both(None);
    ask(&mut ends, 1, region(&bytes));
    for piece in held {
        assert!(ends.engines[1].piece(&piece).is_some());
        ends.engines[1].release_piece(piece);
    }
    let mut read_bytes = vec![0; bytes.len()];
    let results = receive(&mut ends, |ends, piece| {
        read(ends, &piece, &mut read_bytes);
        ends.engines[1].release_piece(piece);
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert!(read_bytes == bytes);
}

#[test]
fn what_cannot_be_read_in_place_is_refused_with_its_reason() {
    let forever = Duration::from_secs(60);
    let ask = |ends: &mut Ends<PairDevice>, session, id| {
        ends.engines[1].receive_in_place(session, OperationId(9), id, 100)
    };
    let mut ends = open(FRAMES, &config(0, forever));
    let wanted = InPlaceRefused::NoFrames {
        wanted: 0,
        left: FRAMES.into(),
    };
    assert_eq!(ask(&mut ends, SESSIONS[1], transfer(1)), Err(wanted));

    let mut ends = open(0, &config(FRAMES, forever));
    let wanted = InPlaceRefused::NoFrames {
        wanted: FRAMES.into(),
        left: 0,
    };
    let refused = ask(&mut ends, SESSIONS[1], transfer(1)).unwrap_err();
    assert_eq!(refused, wanted);
    assert_eq!(
        refused.to_string(),
        "no frames to keep: 32 a session, and 0 are left"
    );

    let mut ends = open(FRAMES, &config(FRAMES, forever));
    let unknown = SessionId(99);
    assert_eq!(
        ask(&mut ends, unknown, transfer(1)),
        Err(InPlaceRefused::NotOpen)
    );
    assert_eq!(ask(&mut ends, SESSIONS[1], transfer(1)), Ok(()));
    assert_eq!(
        ask(&mut ends, SESSIONS[1], transfer(1)),
        Err(InPlaceRefused::Transfer(TransferError::SlotBusy(transfer(
            1
        ))))
    );

    let secrets = Secrets {
        send: Secret([1; 32]),
        receive: Secret([2; 32]),
    };
    let (a, b) = pair(&options(FRAMES));
    let mut ends = Ends::new([a, b], &config(FRAMES, forever));
    ends.open_both(Some(&secrets));
    assert_eq!(
        ask(&mut ends, SESSIONS[1], transfer(1)),
        Err(InPlaceRefused::Sealed)
    );
}
