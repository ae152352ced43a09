//! Small tensors in one packet each, into slots that the receiver granted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use genie_dataplane::device::Device;
use genie_dataplane::device::fault::{Faults, FaultyDevice};
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::engine::udp::{Config, Offer, OfferRefused, Offers};
use genie_dataplane::engine::{Command, Completion, FailReason, OperationId};
use genie_dataplane::memory::Lease;
use genie_dataplane::{OfferError, Secret, Secrets};

use crate::harness::{self, PATIENCE, contents, random_bytes, region};
use crate::polled::{Ends, SESSIONS, receipt};
use crate::sealed::Refusing;

const SLOTS: u16 = 8;

fn config(slots: u16) -> Config {
    Config {
        offers: Offers {
            slots,
            len_max: 9000,
        },
        ..harness::config()
    }
}

fn secrets() -> Secrets {
    Secrets {
        send: Secret([1; 32]),
        receive: Secret([2; 32]),
    }
}

fn open(options: &Options, slots: u16, secrets: Option<&Secrets>) -> Ends<PairDevice> {
    let (a, b) = pair(options);
    let mut ends = Ends::new([a, b], &config(slots));
    ends.open_both(secrets);
    granted(&mut ends);
    ends
}

/// Until the first end may offer something.
fn granted<D: Device>(ends: &mut Ends<D>) {
    let mut from = Some(region(&[]));
    let (since, mut began) = (Instant::now(), false);
    while !began {
        assert!(since.elapsed() < PATIENCE, "nothing is granted");
        let engine = &mut ends.engines[0];
        let lease = from.take().expect("it comes back");
        match engine.offer(SESSIONS[0], OperationId(0), Default::default(), lease) {
            Ok(_) => began = true,
            Err(refused) => {
                assert_eq!(refused.reason, OfferError::NotGranted);
                from = Some(refused.from);
                a_few_turns(ends);
            }
        }
    }
    ends.drive("the first one is there", |ends| {
        ends.answers[0].len() == 1 && ends.offers[1].len() == 1
    });
    let (_, sent) = receipt(ends.answers[0].pop().unwrap());
    assert_eq!(sent.unwrap().bytes, 0);
    let first = ends.offers[1].pop().unwrap();
    assert!(first.is_empty());
    ends.engines[1].release(first);
}

fn a_few_turns<D: Device>(ends: &mut Ends<D>) {
    let mut turns = 0;
    ends.drive("a few turns", |_| {
        turns += 1;
        turns > 2
    });
}

fn send<D: Device>(
    ends: &mut Ends<D>,
    operation: u64,
    metadata: &[u8],
    from: Lease,
) -> Result<genie_dataplane::TransferId, OfferRefused> {
    let metadata = metadata.try_into().expect("short");
    ends.engines[0].offer(SESSIONS[0], OperationId(operation), metadata, from)
}

fn bytes_of<D: Device>(ends: &Ends<D>, offer: &Offer) -> Vec<u8> {
    let view = ends.engines[1].offered(offer).expect("its slot is taken");
    let mut bytes = vec![0; view.len()];
    view.copy_to(&mut bytes);
    bytes
}

fn sizes_arrive(options: &Options, secrets: Option<&Secrets>, sizes: &[usize]) {
    let mut random = fastrand::Rng::with_seed(11);
    let mut ends = open(options, SLOTS, secrets);
    for (operation, &len) in (1..).zip(sizes) {
        let bytes = random_bytes(&mut random, len);
        let source = region(&bytes);
        let weak = Arc::downgrade(source.region());
        let id = send(&mut ends, operation, b"f32 2x3", source).expect("granted");
        ends.drive("both ends are answered", |ends| {
            ends.answers[0].len() == 1 && ends.offers[1].len() == 1
        });
        let (answered, sent) = receipt(ends.answers[0].pop().unwrap());
        let sent = sent.unwrap();
        assert_eq!(answered, OperationId(operation));
        assert_eq!(sent.bytes, len as u64);
        assert_eq!(sent.digest.0, crc32c::crc32c(&bytes), "length {len}");
        assert!(weak.upgrade().is_none(), "the lease is given back");
        let offer = ends.offers[1].pop().unwrap();
        assert_eq!((offer.session(), offer.transfer()), (SESSIONS[1], id));
        assert_eq!(
            (offer.metadata(), offer.len()),
            (&b"f32 2x3"[..], len as u64)
        );
        assert_eq!(offer.digest(), sent.digest);
        assert_eq!(bytes_of(&ends, &offer), bytes);
        ends.engines[1].release(offer);
        assert!(ends.answers[1].is_empty());
    }
}

#[test]
fn small_tensors_arrive_unasked_with_what_is_said_of_them() {
    let sizes = [0, 1, 64, 383, 384, 385, 4096, 8800];
    for tx_external in [true, false] {
        for completes_on_reap in [true, false] {
            let options = Options {
                tx_external,
                completes_on_reap,
                ..Options::default()
            };
            sizes_arrive(&options, None, &sizes);
        }
    }
}

#[test]
fn sealed_sessions_carry_what_fits_behind_the_headers() {
    sizes_arrive(&Options::default(), Some(&secrets()), &[0, 1, 64, 384]);
    let mut ends = open(&Options::default(), SLOTS, Some(&secrets()));
    let refused = send(&mut ends, 1, b"", region(&[1; 385])).expect_err("too long");
    let (len, max) = (385, 384);
    assert_eq!(refused.reason, OfferError::TooLong { len, max });
}

#[test]
fn without_a_slot_the_lease_comes_back_and_the_ordinary_way_is_open() {
    let mut ends = open(&Options::default(), SLOTS, None);
    let count = u64::from(SLOTS);
    let mut began = 0;
    let limit = Instant::now() + PATIENCE;
    // Until the receiver's application holds all there are.
    while ends.offers[1].len() < usize::from(SLOTS) {
        match send(&mut ends, began, &[], region(&[began as u8; 100])) {
            Ok(_) => began += 1,
            Err(refused) => assert_eq!(refused.reason, OfferError::NotGranted),
        }
        assert!(began <= count, "more than were granted");
        assert!(Instant::now() < limit, "{began} began");
        a_few_turns(&mut ends);
    }
    let from = region(&[began as u8; 100]);
    let refused = send(&mut ends, began, &[], from).expect_err("all are held");
    assert_eq!(refused.reason, OfferError::NotGranted);
    assert_eq!(contents(&refused.from), [began as u8; 100]);
    ends.drive("all are there", |ends| {
        ends.answers[0].len() as u64 == began && ends.offers[1].len() as u64 == began
    });
    ends.answers[0].clear();
    // The application holds all of them: nothing is granted, and a transfer moves.
    let into = region(&[0; 100]);
    ends.ask_transfer(1, refused.from, into.clone());
    ends.drive("the transfer is over", |ends| {
        ends.answers.iter().all(|answers| answers.len() == 1)
    });
    assert_eq!(contents(&into), [began as u8; 100]);
    ends.answers.iter_mut().for_each(Vec::clear);
    let refused = send(&mut ends, 50, &[], region(&[1; 100])).expect_err("all are held");
    assert_eq!(refused.reason, OfferError::NotGranted);
    let kept = ends.offers[1].pop().unwrap();
    for offer in std::mem::take(&mut ends.offers[1]) {
        ends.engines[1].release(offer);
    }
    let mut again = Some(region(&[9; 100]));
    let began = Instant::now();
    while let Some(from) = again.take() {
        assert!(
            began.elapsed() < PATIENCE,
            "what was released is not granted"
        );
        if let Err(refused) = send(&mut ends, 51, &[], from) {
            again = Some(refused.from);
            a_few_turns(&mut ends);
        }
    }
    ends.drive("it is there", |ends| ends.offers[1].len() == 1);
    let last = ends.offers[1].pop().unwrap();
    assert_eq!(bytes_of(&ends, &last), [9; 100]);
    // What was not released is still what it was.
    assert_eq!(bytes_of(&ends, &kept), vec![kept_value(&kept); 100]);
    let long = send(&mut ends, 52, &[], region(&[0; 9001])).expect_err("longer than a packet");
    assert!(matches!(
        long.reason,
        OfferError::TooLong { .. } | OfferError::NotGranted
    ));
}

#[test]
fn memory_that_the_device_cannot_reach_is_not_to_be_waited_for() {
    let (a, b) = pair(&Options::default());
    let devices = [a, b].map(|device| Refusing(device, "no mapping for it"));
    let mut ends = Ends::new(devices, &config(SLOTS));
    ends.open_both(None);
    granted(&mut ends);
    let bytes = [7; 1000];
    let refused = send(&mut ends, 1, &[], region(&bytes)).expect_err("too long to be copied");
    assert_eq!(refused.reason, OfferError::Unreachable);
    assert_eq!(contents(&refused.from), bytes);
    // What is short is copied into the packet.
    send(&mut ends, 2, &[], region(&bytes[..100])).expect("a slot is granted");
    ends.drive("it is there", |ends| ends.offers[1].len() == 1);
    let last = ends.offers[1].pop().expect("it is there");
    assert_eq!(bytes_of(&ends, &last), bytes[..100]);
}

/// The test's offers are numbered, the first of all was empty.
fn kept_value(offer: &Offer) -> u8 {
    offer.transfer().offer_number().unwrap() as u8 - 1
}

#[test]
fn bursts_arrive_exactly_through_loss_duplication_reordering_and_corruption() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (a, b) = pair(&Options::default());
    let faulty = |device, seed| {
        let faults = Faults {
            seed,
            loss: 50,
            duplication: 50,
            corruption: 20,
            reordering: 50,
        };
        FaultyDevice::new(device, faults)
    };
    let devices = [faulty(a, seed), faulty(b, seed ^ 1)];
    let mut ends = Ends::new(devices, &config(64));
    ends.open_both(None);
    granted(&mut ends);
    const COUNT: u64 = 3000;
    let (mut began, mut ended, mut came) = (0, 0, 0);
    let mut sources = HashMap::new();
    let limit = Instant::now() + PATIENCE;
    while ended < COUNT || came < COUNT {
        while began < COUNT {
            let len = random.usize(0..2000);
            let bytes = random_bytes(&mut random, len);
            match send(&mut ends, began, &began.to_be_bytes(), region(&bytes)) {
                Ok(id) => {
                    sources.insert(id, (began, bytes));
                    began += 1;
                }
                Err(refused) => {
                    assert_eq!(refused.reason, OfferError::NotGranted);
                    break;
                }
            }
        }
        assert!(Instant::now() < limit, "{ended} ended and {came} came");
        a_few_turns(&mut ends);
        for answer in std::mem::take(&mut ends.answers[0]) {
            let (_, sent) = receipt(answer);
            sent.expect("nobody gave it up");
            ended += 1;
        }
        for offer in std::mem::take(&mut ends.offers[1]) {
            let source = sources.remove(&offer.transfer());
            let (number, bytes) = source.expect("each comes once");
            assert_eq!(offer.metadata(), number.to_be_bytes());
            assert_eq!(bytes_of(&ends, &offer), bytes);
            ends.engines[1].release(offer);
            came += 1;
        }
    }
    assert_eq!((ended, came), (COUNT, COUNT));
}

#[test]
fn what_is_given_up_ends_once_and_the_rest_arrives() {
    let mut ends = open(&Options::default(), SLOTS, None);
    let given_up = send(&mut ends, 1, &[], region(&[1; 5000])).unwrap();
    send(&mut ends, 2, &[], region(&[2; 5000])).unwrap();
    let cancel = Command::Cancel {
        session: SESSIONS[0],
        transfer: given_up,
        outgoing: true,
    };
    ends.ask(0, cancel);
    ends.drive("both end", |ends| {
        ends.answers[0].len() == 2 && !ends.offers[1].is_empty()
    });
    let answers = ends.answers[0].drain(..).map(receipt);
    let answers: HashMap<_, _> = answers.collect();
    assert_eq!(answers[&OperationId(1)], Err(FailReason::Cancelled));
    assert_eq!(answers[&OperationId(2)].as_ref().unwrap().bytes, 5000);
    assert_eq!(ends.offers[1].len(), 1);
    assert_eq!(bytes_of(&ends, &ends.offers[1][0]), [2; 5000]);
}

#[test]
fn when_its_session_ends_each_is_answered_and_gives_its_memory_back() {
    let mut ends = open(&Options::default(), SLOTS, None);
    let mut memory = Vec::new();
    for (operation, len) in (1..).zip([0, 10, 5000]) {
        let source = region(&vec![1; len]);
        memory.push(Arc::downgrade(source.region()));
        send(&mut ends, operation, &[], source).unwrap();
    }
    let close = Command::Close {
        session: SESSIONS[0],
    };
    ends.ask(0, close);
    ends.drive("the other end hears of it", |ends| {
        matches!(ends.answers[1].last(), Some(Completion::Lost { .. }))
            && ends.answers[0].len() == 3
    });
    for answer in ends.answers[0].drain(..) {
        assert_eq!(receipt(answer).1, Err(FailReason::Closed));
    }
    assert!(memory.iter().all(|weak| weak.upgrade().is_none()));
    let refused = send(&mut ends, 9, &[], region(&[1])).expect_err("it is over");
    assert_eq!(refused.reason, OfferError::Closed);
}

#[test]
fn an_offer_is_gone_with_its_session() {
    let mut ends = open(&Options::default(), SLOTS, None);
    send(&mut ends, 1, &[], region(&[1; 9])).unwrap();
    ends.drive("it comes", |ends| !ends.offers[1].is_empty());
    let offer = ends.offers[1].pop().unwrap();
    let close = Command::Close {
        session: SESSIONS[1],
    };
    ends.ask(1, close);
    ends.drive("the session is over", |ends| {
        ends.engines[1].offered(&offer).is_none()
    });
    ends.engines[1].release(offer);
}
