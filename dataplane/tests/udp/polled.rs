//! Engines without threads: both ends are driven by the test.

use std::time::Instant;

use genie_dataplane::device::Device;
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::engine::udp::{self, Offer, Polled};
use genie_dataplane::engine::{
    Command, Completion, FailReason, OpenError, OperationId, Receipt, Remote,
};
use genie_dataplane::memory::Lease;
use genie_dataplane::{Integrity, Secrets, SessionId, TransferId};

use crate::harness::{PATIENCE, config, contents, random_bytes, region, short};

/// Two engines and what they have answered.
pub(crate) struct Ends<D> {
    pub(crate) engines: [Polled<D>; 2],
    pub(crate) answers: [Vec<Completion>; 2],
    pub(crate) offers: [Vec<Offer>; 2],
}

pub(crate) const SESSIONS: [SessionId; 2] = [SessionId(7), SessionId(8)];

impl Ends<PairDevice> {
    fn open() -> Self {
        let (a, b) = pair(&Options::default());
        let mut ends = Self::new([a, b], &config());
        ends.open_both(None);
        ends
    }
}

impl<D: Device> Ends<D> {
    pub(crate) fn new(devices: [D; 2], config: &udp::Config) -> Self {
        Self {
            engines: devices.map(|device| Polled::new(config.clone(), device)),
            answers: [Vec::new(), Vec::new()],
            offers: [Vec::new(), Vec::new()],
        }
    }

    pub(crate) fn open_both(&mut self, secrets: Option<&Secrets>) {
        let theirs = secrets.cloned().map(Secrets::of_the_other_end);
        self.ask_open(0, secrets.cloned());
        self.ask_open(1, theirs);
        self.drive("both paths open", |ends| {
            ends.answers.iter().all(|answers| answers.len() == 1)
        });
        for answers in &mut self.answers {
            let opened = answers.pop();
            assert!(
                matches!(opened, Some(Completion::Opened { result: Ok(_), .. })),
                "{opened:?}"
            );
        }
    }

    pub(crate) fn ask(&mut self, end: usize, command: Command) {
        let now = self.engines[end].now();
        self.engines[end].handle_command(now, command);
    }

    fn ask_open(&mut self, end: usize, secrets: Option<Secrets>) {
        let remote = udp::Remote {
            local: self.engines[1 - end].local(),
            session: SESSIONS[1 - end],
            secrets,
        };
        let command = Command::Open {
            operation: OperationId(1),
            session: SESSIONS[end],
            remote: Remote::Udp(remote),
            integrity: Integrity::Digest,
        };
        self.ask(end, command);
    }

    /// Has the first end send `from` and the second receive it into `into`.
    pub(crate) fn ask_transfer(&mut self, generation: u32, from: Lease, into: Lease) {
        let transfer = TransferId {
            slot: 0,
            generation,
        };
        let operation = OperationId(u64::from(generation));
        let receive = Command::Receive {
            operation,
            session: SESSIONS[1],
            transfer,
            into,
            resume: None,
        };
        self.ask(1, receive);
        let send = Command::Send {
            operation,
            session: SESSIONS[0],
            transfer,
            from,
            resume: None,
        };
        self.ask(0, send);
    }

    pub(crate) fn drive(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let limit = Instant::now() + PATIENCE;
        while !done(self) {
            for (engine, answers) in self.engines.iter_mut().zip(&mut self.answers) {
                engine.turn(engine.now());
                answers.extend(std::iter::from_fn(|| engine.poll_completion()));
            }
            for (engine, offers) in self.engines.iter_mut().zip(&mut self.offers) {
                offers.extend(std::iter::from_fn(|| engine.poll_offer()));
            }
            assert!(Instant::now() < limit, "never happened: {what}");
        }
    }
}

pub(crate) fn receipt(completion: Completion) -> (OperationId, Result<Receipt, FailReason>) {
    match completion {
        Completion::Transferred { operation, result } => (operation, result),
        other => panic!("no end of a transfer: {other:?}"),
    }
}

#[test]
fn a_tensor_moves_between_two_engines_on_one_thread() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut ends = Ends::open();
    for (generation, len) in (1..).zip([0, 1, 64, 4096, 100_000, 3 << 20]) {
        let bytes = random_bytes(&mut random, len);
        let into = region(&vec![0; len]);
        ends.ask_transfer(generation, region(&bytes), into.clone());
        ends.drive("both ends are answered", |ends| {
            ends.answers.iter().all(|answers| answers.len() == 1)
        });
        assert_eq!(contents(&into), bytes);
        let [sent, received] = [0, 1].map(|end| receipt(ends.answers[end].pop().unwrap()));
        assert_eq!(sent.0, OperationId(u64::from(generation)));
        let (sent, received) = (sent.1.unwrap(), received.1.unwrap());
        assert_eq!(
            (sent.bytes, received.bytes),
            (len as u64, len as u64),
            "length {len}"
        );
        assert_eq!(sent.digest.0, crc32c::crc32c(&bytes));
        assert_eq!(received.digest, sent.digest);
    }
}

#[test]
fn an_idle_engine_says_when_it_wants_to_be_driven() {
    let (a, b) = pair(&Options::default());
    let mut ends = Ends::new([a, b], &short());
    assert_eq!(ends.engines[0].next_deadline(), None);
    assert!(!ends.engines[0].turn(ends.engines[0].now()));
    // Nobody drives the other end, so this one waits for its answer.
    ends.ask_open(0, None);
    let engine = &mut ends.engines[0];
    let began = engine.now();
    assert!(engine.turn(began), "the question for the neighbour is due");
    let deadline = engine.next_deadline().expect("it will ask again");
    assert!(deadline > began, "{deadline:?} is after {began:?}");
    let limit = Instant::now() + PATIENCE;
    let refused = loop {
        engine.turn(engine.now());
        if let Some(completion) = engine.poll_completion() {
            break completion;
        }
        assert!(Instant::now() < limit, "never gave up");
    };
    let Completion::Opened { operation, result } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(operation, OperationId(1));
    assert!(
        matches!(result, Err(OpenError::NoNeighbour(_))),
        "{result:?}"
    );
}

#[test]
fn stop_ends_every_transfer_and_gives_memory_back() {
    let mut ends = Ends::open();
    let source = region(&[1; 4096]);
    let weak = std::sync::Arc::downgrade(source.region());
    let send = Command::Send {
        operation: OperationId(5),
        session: SESSIONS[0],
        transfer: TransferId {
            slot: 3,
            generation: 1,
        },
        from: source,
        resume: None,
    };
    ends.ask(0, send);
    ends.ask(0, Command::Stop);
    assert!(!ends.engines[0].is_finished());
    ends.drive("the engine ends", |ends| ends.engines[0].is_finished());
    // What moved of it would be there for another session to go on with.
    let answer = ends.answers[0].pop();
    assert!(
        matches!(
            &answer,
            Some(Completion::Interrupted {
                operation: OperationId(5),
                reason: FailReason::Closed,
                ..
            })
        ),
        "{answer:?}"
    );
    drop(answer);
    assert!(weak.upgrade().is_none(), "the engine kept the lease");
    ends.ask_open(0, None);
    ends.drive("a stopped engine opens nothing", |ends| {
        !ends.answers[0].is_empty()
    });
    let refused = ends.answers[0].pop();
    assert!(
        matches!(refused, Some(Completion::Opened { result: Err(_), .. })),
        "{refused:?}"
    );
}

/// The device is the caller's to look at only through the engine.
#[test]
fn an_engine_says_what_its_device_is() {
    let (device, _other) = pair(&Options::default());
    let (mtu, descriptors) = (
        device.capabilities().mtu,
        device.capabilities().rx_descriptors,
    );
    let local = Polled::new(config(), device).local();
    assert_eq!(local.mtu, mtu);
    assert!(local.credit > 0 && local.credit < descriptors);
}
