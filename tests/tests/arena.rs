//! Programs and their arenas: what they can do, and what they can't do to the
//! agent or to each other whatever they try.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use genie_client::protocol::{Answer, ArenaId, Ask, Placed};
use genie_client::{
    Client, ClientError, Dtype, FailureKind, Memory, Run, Span, Tensor, TensorInfo, descriptor,
    frame,
};
use genie_dataplane::memory::{Lease, Region};
use genie_tests::{Agent, GENEROUS, eventually, model};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

#[path = "../../controlplane/client/examples/partial_fetch.rs"]
#[allow(dead_code, unreachable_pub)]
mod partial_fetch;
#[path = "../../controlplane/client/examples/put_get.rs"]
#[allow(dead_code, unreachable_pub)]
mod put_get;

const ROUNDS: usize = 100;

fn pair(folder: &Path) -> (Agent, Agent) {
    let b = Agent::start(folder, "b", &[]);
    let a = Agent::start(folder, "a", &[&b.as_peer()]);
    (a, b)
}

fn connect(agent: &Agent) -> Client {
    Client::connect(&agent.socket).expect("the agent listens")
}

fn kind<T>(result: Result<T, ClientError>) -> FailureKind {
    match result {
        Err(ClientError::Failed { kind, .. }) => kind,
        Err(error) => panic!("the agent gave no reason: {error}"),
        Ok(_) => panic!("it was done"),
    }
}

/// What an agent holds: descriptors, arenas, their bytes, bytes of the store,
/// and KiB of shared and of huge pages that it has mapped.
type Held = [u64; 6];

fn held(agent: &Agent) -> Held {
    let status = agent.status();
    let count = |part: &str, key: &str| status[part][key].as_u64().expect("a number");
    // The status command's own connection is gone soon.
    std::thread::sleep(Duration::from_millis(20));
    [
        agent.descriptors() as u64,
        count("arenas", "regions"),
        count("arenas", "used_bytes"),
        count("store", "used_bytes"),
        mapped_kib(agent, "RssShmem:"),
        mapped_kib(agent, "HugetlbPages:"),
    ]
}

/// What the kernel says that an agent has mapped.
fn mapped_kib(agent: &Agent, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let value = line.expect("the kernel counts them").split_whitespace();
    value.map(str::parse).next().unwrap().expect("a number")
}

/// What agents hold when nothing is under way.
fn settled(agents: &[&Agent]) -> Vec<Held> {
    let all = || agents.iter().map(|agent| held(agent)).collect::<Vec<_>>();
    eventually("nothing is under way", || {
        let first = all();
        std::thread::sleep(Duration::from_millis(100));
        (all() == first).then_some(first)
    })
}

/// Waits until agents hold again what they held before.
fn assert_back(agents: &[&Agent], before: &[Held]) {
    let until = Instant::now() + GENEROUS;
    loop {
        let now: Vec<Held> = agents.iter().map(|agent| held(agent)).collect();
        if now == before {
            return;
        }
        assert!(
            Instant::now() < until,
            "held {before:?} before, now {now:?}"
        );
    }
}

/// Whether a program that behaves is served.
fn assert_works(agent: &Agent) {
    let socket = agent.socket.to_str().unwrap();
    put_get::run(socket, None).expect("the agent goes on");
}

/// A client that says whatever it likes.
struct Raw {
    stream: UnixStream,
}

impl Raw {
    fn connect(agent: &Agent) -> Self {
        let mut stream = UnixStream::connect(&agent.socket).unwrap();
        frame::exchange_preamble_blocking(&mut stream).unwrap();
        Self { stream }
    }

    fn say(&mut self, ask: &Ask) {
        frame::write_blocking(&mut self.stream, ask).unwrap();
    }

    fn ask(&mut self, ask: &Ask) -> Answer {
        self.say(ask);
        self.answer()
    }

    /// The next answer that is not about progress.
    fn answer(&mut self) -> Answer {
        loop {
            match frame::read_blocking(&mut self.stream, frame::BODY_MAX).unwrap() {
                Answer::Progress { .. } => {}
                answer => return answer,
            }
        }
    }

    fn failure(&mut self, ask: &Ask) -> FailureKind {
        match self.ask(ask) {
            Answer::Failed { kind, .. } => kind,
            other => panic!("{other:?}"),
        }
    }

    fn arena(&mut self, bytes: u64, memory: Memory) -> (ArenaId, OwnedFd) {
        match self.ask(&Ask::Arena { bytes, memory }) {
            Answer::Arena { arena, .. } => {
                let fd = descriptor::take(&self.stream).unwrap();
                (arena, fd.expect("a descriptor"))
            }
            other => panic!("{other:?}"),
        }
    }

    fn put(&mut self, node: Option<&str>, placed: Placed) -> Answer {
        self.say(&Ask::Put {
            node: node.map(str::to_owned),
            prefix: "m".into(),
            count: 1,
            metadata: None,
            memory: Memory::Auto,
        });
        self.ask(&Ask::Tensors(vec![placed]))
    }
}

fn placed(arena: ArenaId, offset: u64, len: u64) -> Placed {
    Placed {
        info: info("t", len),
        arena,
        offset,
    }
}

fn info(name: &str, len: u64) -> TensorInfo {
    TensorInfo {
        name: name.into(),
        dtype: Dtype::U8,
        shape: vec![len],
    }
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, len).unwrap();
    rustix::io::pwrite(&file, b"tensor", 0).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

const ALL: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);

#[test]
fn the_examples_work_locally_and_with_a_peer() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let socket = a.socket.to_str().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for node in [None, Some("b")] {
        put_get::run(socket, node).unwrap();
        runtime.block_on(partial_fetch::run(socket, node)).unwrap();
    }
    assert_eq!(b.status()["store"]["tensors"], 0);
}

#[test]
fn over_tcp_nobody_but_the_kernel_copies() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(8 << 20, Memory::Auto).unwrap();
    let tensor = arena.tensor("t", Dtype::U8, &[5_000_000]).unwrap();
    let bytes = model::noise(1, 5_000_000);
    tensor.write(0, &bytes);
    let put = client.put(Some("b"), "m", &[tensor], None).unwrap();
    let got = client.get(Some("b"), "m", Memory::Auto).unwrap();
    assert_eq!(got.to_vec("t").unwrap(), bytes);
    for moved in [&put, &got.moved] {
        assert_eq!(moved.sent_copies.genie, 0);
        assert_eq!(moved.received_copies.genie, 0);
        assert_eq!(moved.sent_copies.kernel, 5_000_000);
        assert_eq!(moved.received_copies.kernel, 5_000_000);
        assert_eq!(moved.copies.driver, 0);
    }
}

#[test]
fn what_was_put_stays_as_it_was_and_is_one_copy() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut client = connect(&a);
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let tensor = arena.tensor("t", Dtype::U8, &[5000]).unwrap();
    let bytes = model::noise(1, 5000);
    tensor.write(0, &bytes);
    let put = client
        .put(None, "m", std::slice::from_ref(&tensor), None)
        .unwrap();
    assert_eq!(put.copies.genie, 5000);
    tensor.write(0, &[0; 5000]);
    let got = client.get(None, "m", Memory::Auto).unwrap();
    assert_eq!(got.to_vec("t").unwrap(), bytes);
    assert_eq!(got.moved.digest, put.digest);
}

#[test]
fn only_the_part_that_is_asked_for_travels() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(4 << 20, Memory::Auto).unwrap();
    let (rows, columns) = (1000u64, 1000u64);
    let tensor = arena.tensor("t", Dtype::U16, &[rows, columns]).unwrap();
    let bytes = model::noise(1, (2 * rows * columns) as usize);
    tensor.write(0, &bytes);
    client
        .put(Some("b"), "m", std::slice::from_ref(&tensor), None)
        .unwrap();
    client.put(None, "m", &[tensor], None).unwrap();
    let element = |row: u64, column: u64| {
        let at = 2 * (row * columns + column) as usize;
        bytes[at..at + 2].iter().copied()
    };
    for node in [Some("b"), None] {
        let remote = client.open(node, "m/t").unwrap();
        assert_eq!(remote.info.shape, [rows, columns]);
        // Rows lie in one piece and are sent from where they are.
        let some = remote
            .slice(&[(100..300).into(), (0..columns).into()])
            .unwrap();
        let part = client.fetch(&remote, some, Memory::Auto).unwrap();
        assert_eq!(part.to_vec(), bytes[200_000..600_000]);
        assert_eq!(part.shape, [200, columns]);
        assert_eq!(part.moved.sent_copies.genie, 0);
        assert_eq!(part.moved.bytes, 400_000, "and no more");
        // A column is gathered first, which the ledger shows.
        let some = remote
            .slice(&[Span::stepped(0..rows, 3), (7..9).into()])
            .unwrap();
        let part = client.fetch(&remote, some, Memory::Auto).unwrap();
        let expected: Vec<u8> = (0..rows)
            .step_by(3)
            .flat_map(|row| element(row, 7).chain(element(row, 8)))
            .collect();
        assert_eq!(part.to_vec(), expected);
        assert_eq!(part.moved.copies.genie, expected.len() as u64);
        // Bytes, in whatever order; and none.
        let runs = vec![Run::bytes(1_000_000, 100_000), Run::bytes(5, 3)];
        let part = client
            .fetch(&remote, remote.bytes(runs).unwrap(), Memory::Auto)
            .unwrap();
        assert_eq!(
            part.to_vec(),
            [&bytes[1_000_000..1_100_000], &bytes[5..8]].concat()
        );
        let none = remote.slice(&[(5..5).into(), (0..columns).into()]).unwrap();
        assert_eq!(
            client.fetch(&remote, none, Memory::Auto).unwrap().to_vec(),
            [0; 0]
        );
    }
    let received = b.status()["transports"][0]["engine"]["received_bytes"].as_u64();
    assert!(received.unwrap() < 2_100_000, "{received:?}: the put alone");

    let gone = client.open(Some("b"), "m/t").unwrap();
    client.remove(Some("b"), "m/t").unwrap();
    let all = gone.bytes(vec![Run::bytes(0, 1)]).unwrap();
    assert!(client.fetch(&gone, all, Memory::Auto).is_err());
    assert_eq!(kind(client.open(None, "m/none")), FailureKind::NotFound);
    let mut raw = Raw::connect(&a);
    let outside = Ask::Fetch {
        node: None,
        name: "m/t".into(),
        runs: vec![Run {
            offset: 0,
            len: 1,
            stride: 0,
            count: u64::MAX,
        }],
        memory: Memory::Auto,
    };
    assert_eq!(raw.failure(&outside), FailureKind::Invalid);
}

#[test]
fn sealed_memory_of_a_programs_own_is_put_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let mut client = connect(&a);
    let imported = client.import(memfd(8192, ALL)).unwrap();
    assert_eq!((imported.len_bytes(), imported.copied_bytes()), (8192, 0));
    let tensor = imported.tensor(info("t", 6), 0).unwrap();
    assert!(imported.tensor(info("t", 6), 8187).is_err());
    let put = client.put(Some("b"), "m", &[tensor], None).unwrap();
    assert_eq!(put.copies.genie, 0);
    let got = client.get(Some("b"), "m", Memory::Auto).unwrap();
    assert_eq!(got.to_vec("t").unwrap(), b"tensor");
}

#[test]
fn memory_that_could_change_is_refused_with_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut client = connect(&a);
    let cases = [
        (SealFlags::empty(), "F_SEAL_SHRINK"),
        (ALL - SealFlags::SHRINK, "F_SEAL_SHRINK"),
        (ALL - SealFlags::GROW, "F_SEAL_GROW"),
        (ALL - SealFlags::SEAL, "F_SEAL_SEAL"),
        (ALL - SealFlags::FUTURE_WRITE, "F_SEAL_FUTURE_WRITE"),
    ];
    for (seals, missing) in cases {
        let refused = client.import(memfd(4096, seals)).unwrap_err();
        assert!(refused.to_string().contains(missing), "{refused}");
        assert_eq!(kind::<()>(Err(refused)), FailureKind::Descriptor);
    }
    assert_eq!(held(&a)[1..3], [0, 0]);
}

#[test]
fn a_file_is_read_once_by_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let path = folder.path().join("file");
    let bytes = model::noise(3, 3_000_000);
    File::create(&path).unwrap().write_all(&bytes).unwrap();
    let file = File::open(&path).unwrap();
    let mut client = connect(&a);
    let read = client
        .read_file(&file, 1000, 2_000_000, Memory::Auto)
        .unwrap();
    assert_eq!(
        (read.len_bytes(), read.copied_bytes()),
        (2_000_000, 2_000_000)
    );
    let tensor = read.tensor(info("t", 1_000_000), 500_000).unwrap();
    drop(read);
    client.put(None, "m", &[tensor], None).unwrap();
    let got = client.get(None, "m", Memory::Auto).unwrap();
    assert_eq!(got.to_vec("t").unwrap(), bytes[501_000..1_501_000]);

    let beyond = client.read_file(&file, 2_999_999, 2, Memory::Auto);
    assert_eq!(kind(beyond), FailureKind::Descriptor);
    let overflow = client.read_file(&file, u64::MAX, 2, Memory::Auto);
    assert_eq!(kind(overflow), FailureKind::Descriptor);
}

#[test]
fn wrong_descriptors_are_errors_and_are_closed() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut client = connect(&a);
    let before = settled(&[&a]);
    let (pipe, _other) = std::io::pipe().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let path_only = rustix::fs::OFlags::PATH;
    let wrong: Vec<OwnedFd> = vec![
        File::open(folder.path()).unwrap().into(),
        File::open("/dev/zero").unwrap().into(),
        pipe.into(),
        socket.into(),
        rustix::fs::open(&a.socket, path_only, rustix::fs::Mode::empty()).unwrap(),
        File::create(folder.path().join("write-only"))
            .unwrap()
            .into(),
    ];
    for _ in 0..ROUNDS {
        for fd in &wrong {
            assert_eq!(kind(client.import(fd)), FailureKind::Descriptor);
            let read = client.read_file(fd, 0, 1, Memory::Auto);
            assert_eq!(kind(read), FailureKind::Descriptor);
        }
    }
    // No descriptor at all, and a byte that is none of ours.
    let mut raw = Raw::connect(&a);
    raw.say(&Ask::Import);
    raw.stream.write_all(&[0xfd]).unwrap();
    assert!(matches!(
        raw.answer(),
        Answer::Failed {
            kind: FailureKind::Descriptor,
            ..
        }
    ));
    raw.say(&Ask::Import);
    raw.stream.write_all(b"x").unwrap();
    assert!(frame::read_blocking::<Answer>(&mut raw.stream, frame::BODY_MAX).is_err());
    // One that nobody asked for, with a request.
    let mut raw = Raw::connect(&a);
    descriptor::pass(&raw.stream, wrong[1].as_fd()).unwrap();
    let _ = raw.stream.write_all(&[0; 16]);
    drop(raw);
    assert_back(&[&a], &before);
    assert_works(&a);
}

#[test]
fn more_than_there_is_or_one_user_may_have_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let limits = [
        "--arena-bytes=64MiB",
        "--user-arena-bytes=32MiB",
        "--user-arenas=3",
        "--user-connections=4",
    ];
    let a = Agent::start(folder.path(), "a", &limits);
    let mut client = connect(&a);
    for bytes in [1 << 40, u64::MAX, 33 << 20] {
        assert_eq!(kind(client.arena(bytes, Memory::Auto)), FailureKind::Quota);
    }
    let sparse = File::create_new(folder.path().join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    let sparse = File::open(folder.path().join("sparse")).unwrap();
    let read = client.read_file(&sparse, 0, 1 << 40, Memory::Auto);
    assert_eq!(kind(read), FailureKind::Quota);
    assert_eq!(kind(client.import(memfd(1 << 40, ALL))), FailureKind::Quota);

    let arenas: Vec<_> = (0..3)
        .map(|_| client.arena(4096, Memory::Auto).unwrap())
        .collect();
    assert_eq!(kind(client.arena(4096, Memory::Auto)), FailureKind::Quota);
    drop(arenas);
    client
        .arena(4096, Memory::Auto)
        .expect("dropped arenas are given back");

    let held: Vec<_> = (0..3).map(|_| connect(&a)).collect();
    let refused = Client::connect(&a.socket).and_then(|mut one| one.list(None));
    assert_eq!(kind(refused), FailureKind::Quota);
    drop(held);
    eventually("connections are given back", || {
        Client::connect(&a.socket)
            .and_then(|mut one| one.list(None))
            .ok()
    });
}

#[test]
fn an_arena_is_of_no_use_before_it_is_sealed_nor_to_another_connection() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut raw = Raw::connect(&a);
    let (arena, fd) = raw.arena(8192, Memory::Host);
    assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "not even now");
    let refused = |answer| match answer {
        Answer::Failed { kind, .. } => kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        refused(raw.put(None, placed(arena, 0, 10))),
        FailureKind::Invalid
    );
    assert!(matches!(raw.ask(&Ask::Mapped { arena }), Answer::Sealed));
    assert!(matches!(raw.ask(&Ask::Mapped { arena }), Answer::Sealed));
    for (offset, len) in [(8192, 1), (0, 8193), (u64::MAX, 2), (2, 1 << 60)] {
        let answer = raw.put(None, placed(arena, offset, len));
        assert_eq!(refused(answer), FailureKind::Invalid, "{offset} {len}");
    }
    let mut other = Raw::connect(&a);
    assert_eq!(
        refused(other.put(None, placed(arena, 0, 10))),
        FailureKind::Invalid
    );
    assert_eq!(other.failure(&Ask::Free { arena }), FailureKind::Invalid);
    assert!(matches!(raw.ask(&Ask::Free { arena }), Answer::Freed));
    assert_eq!(raw.failure(&Ask::Free { arena }), FailureKind::Invalid);
    assert_eq!(
        refused(raw.put(None, placed(arena, 0, 10))),
        FailureKind::Invalid
    );

    let (mut one, mut two) = (connect(&a), connect(&a));
    let tensor = one
        .arena(4096, Memory::Auto)
        .unwrap()
        .tensor("t", Dtype::U8, &[1])
        .unwrap();
    let put = two.put(None, "m", &[tensor], None);
    assert!(matches!(put, Err(ClientError::OtherConnection(_))));
}

#[test]
fn holes_and_truncation_cost_the_agent_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let before = settled(&[&a]);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for round in 0..ROUNDS {
        // On huge pages a hole is where the agent's access would be a SIGBUS.
        let memory = if round % 2 == 0 {
            Memory::Auto
        } else {
            Memory::Host
        };
        let mut raw = Raw::connect(&a);
        let (arena, fd) = raw.arena(2 << 20, memory);
        let len = rustix::fs::fstat(&fd).unwrap().st_size as u64;
        rustix::fs::fallocate(&fd, punch, 0, len).expect("nobody uses it yet");
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        assert!(rustix::fs::ftruncate(&fd, 2 * len).is_err());
        assert!(matches!(raw.ask(&Ask::Mapped { arena }), Answer::Sealed));
        assert!(rustix::fs::fallocate(&fd, punch, 0, len).is_err());
        assert!(Region::from_memfd(fd).is_err(), "nor mapped for writing");
        let answer = raw.put(None, placed(arena, 0, 2 << 20));
        assert!(matches!(answer, Answer::Moved(_)), "{answer:?}");
    }
    connect(&a).remove(None, "m").unwrap();
    assert_back(&[&a], &before);
    assert_works(&a);
}

/// Bytes of a tensor that is written to while it moves: some milliseconds' worth.
const SCRIBBLED: usize = 8 << 20;

#[test]
fn scribbling_over_a_tensor_in_flight_is_a_mismatch_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(SCRIBBLED as u64, Memory::Auto).unwrap();
    let tensor = arena.tensor("t", Dtype::U8, &[SCRIBBLED as u64]).unwrap();
    let tensors = std::slice::from_ref(&tensor);
    client.put(Some("b"), "m", tensors, None).unwrap();
    let before = settled(&[&a, &b]);
    let stop = Arc::new(AtomicBool::new(false));
    let scribbler = std::thread::spawn({
        let (tensor, stop) = (tensor.clone(), Arc::clone(&stop));
        move || {
            let mut seed = 0u32;
            while !stop.load(Ordering::Relaxed) {
                seed += 1;
                let at = (seed as usize).wrapping_mul(0x9e37_79b9) % SCRIBBLED;
                tensor.write(at & !4095, &[seed as u8; 4096]);
            }
        }
    });
    let (mut good, mut bad) = (0, 0);
    for _ in 0..ROUNDS {
        match client.put(Some("b"), "m", std::slice::from_ref(&tensor), None) {
            Ok(put) => {
                // Whatever it is now: both ends say that it is the same.
                let got = client.get(Some("b"), "m", Memory::Auto).unwrap();
                assert_eq!(got.moved.digest, put.digest);
                good += 1;
            }
            Err(ClientError::Failed { kind, message }) => {
                let known = [FailureKind::Corrupt, FailureKind::Peer];
                assert!(known.contains(&kind), "{kind:?} {message}");
                bad += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    scribbler.join().unwrap();
    println!("{good} puts arrived, {bad} were given up");
    client
        .put(Some("b"), "m", &[tensor], None)
        .expect("both agents go on");
    assert_eq!(b.status()["store"]["tensors"], 1);
    assert_back(&[&a, &b], &before);
}

/// How a program leaves its put.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Leaves {
    /// Before the agent sealed its arena.
    BeforeSealing,
    /// Before the list of its tensors.
    BeforeTheList,
    /// With half of the list sent.
    WithinTheList,
    /// Within a message.
    WithinAMessage,
    /// While its tensors move.
    AfterTheList,
    /// The same, its own mapping gone: the agent has one of its own.
    Unmapped,
    /// By speaking while its tensors move.
    BySpeaking,
}

impl Leaves {
    const ALL: [Self; 7] = [
        Self::BeforeSealing,
        Self::BeforeTheList,
        Self::WithinTheList,
        Self::WithinAMessage,
        Self::AfterTheList,
        Self::Unmapped,
        Self::BySpeaking,
    ];

    /// Whether its put may have been done before it was missed.
    fn may_be_done(name: &str) -> bool {
        [Self::AfterTheList, Self::Unmapped, Self::BySpeaking]
            .iter()
            .any(|how| name == format!("{how:?}/t"))
    }

    fn leave(self, agent: &Agent, bytes: &[u8]) {
        let len = bytes.len() as u64;
        let mut raw = Raw::connect(agent);
        let (arena, fd) = raw.arena(len, Memory::Host);
        let region = Region::from_memfd(fd).unwrap();
        Lease::whole(Arc::clone(&region)).write_at(0, bytes.into());
        if self == Self::BeforeSealing {
            return;
        }
        assert!(matches!(raw.ask(&Ask::Mapped { arena }), Answer::Sealed));
        if self == Self::Unmapped {
            drop(region);
        }
        raw.say(&Ask::Put {
            node: Some("b".into()),
            prefix: format!("{self:?}"),
            count: if self == Self::WithinTheList { 2 } else { 1 },
            metadata: None,
            memory: Memory::Auto,
        });
        match self {
            Self::BeforeSealing | Self::BeforeTheList => {}
            Self::WithinAMessage => raw.stream.write_all(&[0, 0, 1, 0, 1, 2, 3]).unwrap(),
            _ => raw.say(&Ask::Tensors(vec![placed(arena, 0, len)])),
        }
        if self == Self::BySpeaking {
            let _ = frame::write_blocking(&mut raw.stream, &Ask::Status);
        }
    }
}

#[test]
fn programs_that_leave_in_the_middle_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let b = Agent::start(folder.path(), "b", &[]);
    // Programs come faster than a busy machine clears up behind them: what is
    // tried here is not the limits of a user.
    let flags = [
        &b.as_peer(),
        "--user-connections=2000",
        "--user-arenas=2000",
        "--user-arena-bytes=4GiB",
    ];
    let a = Agent::start(folder.path(), "a", &flags);
    assert_works(&a);
    let (mut at_a, mut at_b) = (connect(&a), connect(&b));
    at_a.list(Some("b")).unwrap();
    let before = settled(&[&a, &b]);
    let bytes = model::noise(9, 1 << 20);
    for _ in 0..ROUNDS {
        for how in Leaves::ALL {
            how.leave(&a, &bytes);
        }
    }
    // What was not told whole is never there; what was may have been done
    // before its program was missed, is then whole, and nothing else is left.
    let mut done = 0;
    let until = Instant::now() + GENEROUS;
    loop {
        // Over the session, so that there is one again if a stall cost the first.
        let listed = match at_a.list(Some("b")) {
            Ok(listed) => listed,
            Err(error) => {
                assert!(Instant::now() < until, "{error}");
                continue;
            }
        };
        for listed in listed {
            assert!(Leaves::may_be_done(&listed.name), "{} is kept", listed.name);
            let prefix = listed.name.trim_end_matches("/t");
            let got = at_b.get(None, prefix, Memory::Auto).unwrap();
            assert!(got.to_vec("t").unwrap() == bytes, "{} is torn", listed.name);
            at_b.remove(None, &listed.name).unwrap();
            done += 1;
        }
        let now = [held(&a), held(&b)];
        if now[..] == before {
            break;
        }
        assert!(Instant::now() < until, "held {before:?}, now {now:?}");
    }
    println!("{done} puts were done all the same");
    assert_eq!(at_b.list(None).unwrap().len(), 0);
    assert_works(&a);
}

#[test]
fn a_program_that_unmaps_its_tensors_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let bytes = model::noise(10, 100_000);
    let mut raw = Raw::connect(&a);
    let before = settled(&[&a]);
    for _ in 0..ROUNDS {
        let (arena, fd) = raw.arena(100_000, Memory::Auto);
        let region = Region::from_memfd(fd).unwrap();
        Lease::whole(Arc::clone(&region)).write_at(0, bytes[..].into());
        assert!(matches!(raw.ask(&Ask::Mapped { arena }), Answer::Sealed));
        drop(region);
        // The agent has a mapping of its own.
        let answer = raw.put(None, placed(arena, 0, 100_000));
        assert!(matches!(answer, Answer::Moved(_)), "{answer:?}");
        assert!(matches!(raw.ask(&Ask::Free { arena }), Answer::Freed));
    }
    let mut client = connect(&a);
    let got = client.get(None, "m", Memory::Auto).unwrap();
    assert!(got.to_vec("t").unwrap() == bytes);
    drop(got);
    client.remove(None, "m").unwrap();
    drop(client);
    assert_back(&[&a], &before);
}

#[test]
fn a_flood_of_requests_is_answered_or_ends_its_connection_alone() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &["--user-arena-bytes=4MiB"]);
    let before = settled(&[&a]);
    let long = vec![placed(ArenaId(0), 0, 0); 4000];
    for round in 0..ROUNDS {
        let mut raw = Raw::connect(&a);
        for _ in 0..100 {
            raw.say(&Ask::Free { arena: ArenaId(7) });
            raw.say(&Ask::List {
                node: None,
                under: None,
            });
        }
        for _ in 0..100 {
            assert!(matches!(raw.answer(), Answer::Failed { .. }));
            assert!(matches!(raw.answer(), Answer::Listed { .. }));
        }
        // A list that never ends is the user's own memory, not the agent's.
        let mut flood = Raw::connect(&a);
        flood.say(&Ask::Put {
            node: None,
            prefix: "m".into(),
            count: 4 << 20,
            metadata: None,
            memory: Memory::Auto,
        });
        let refused = (0..1000).any(|_| {
            let list = Ask::Tensors(long.clone());
            frame::write_blocking(&mut flood.stream, &list).is_err()
        });
        assert!(refused, "round {round}: 4 million tensors were taken");
    }
    assert_back(&[&a], &before);
    assert_works(&a);
}

#[test]
fn a_tebibyte_is_refused_a_hundred_times() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let sparse = File::create_new(folder.path().join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    let sparse = File::open(folder.path().join("sparse")).unwrap();
    let before = settled(&[&a]);
    let mut client = connect(&a);
    for _ in 0..ROUNDS {
        let arena = client.arena(1 << 40, Memory::Auto);
        assert_eq!(kind(arena), FailureKind::Quota);
        let read = client.read_file(&sparse, 0, 1 << 40, Memory::Auto);
        assert_eq!(kind(read), FailureKind::Quota);
        let import = client.import(memfd(1 << 40, ALL));
        assert_eq!(kind(import), FailureKind::Quota);
    }
    drop(client);
    assert_back(&[&a], &before);
    assert_works(&a);
}

#[test]
fn a_killed_program_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let file = folder.path().join("m.safetensors");
    model::write_sparse(&file, 16, 1 << 20);
    a.json(&["put", file.to_str().unwrap(), "b:m"]);
    let before = settled(&[&a, &b]);
    for round in 0..ROUNDS {
        let put = a.spawn(&["put", file.to_str().unwrap(), "b:m"]);
        // Sooner and later on its way.
        std::thread::sleep(Duration::from_micros(100 * round as u64));
        put.signal(rustix::process::Signal::KILL);
        drop(put);
    }
    assert_back(&[&a, &b], &before);
    assert_works(&a);
}

#[test]
fn all_of_it_together_a_hundred_times_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    connect(&a).list(Some("b")).unwrap();
    let file = folder.path().join("m.safetensors");
    model::write_sparse(&file, 4, 256 << 10);
    let zero = File::open("/dev/zero").unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = 1u64 << 20;
    a.json(&["put", file.to_str().unwrap(), "b:k"]);
    let before = settled(&[&a, &b]);
    for round in 0..ROUNDS as u64 {
        let killed = a.spawn(&["put", file.to_str().unwrap(), "b:k"]);
        // Asks for too much, passes what is no memory, frees what it has not.
        let mut raw = Raw::connect(&a);
        let bytes = 1 << 40;
        let memory = Memory::Auto;
        assert_eq!(
            raw.failure(&Ask::Arena { bytes, memory }),
            FailureKind::Quota
        );
        raw.say(&Ask::Import);
        descriptor::pass(&raw.stream, zero.as_fd()).unwrap();
        assert!(matches!(raw.answer(), Answer::Failed { .. }));
        let arena = ArenaId(round as u32);
        assert_eq!(raw.failure(&Ask::Free { arena }), FailureKind::Invalid);
        // Punches and truncates, maps, scribbles while it moves, unmaps, leaves.
        let (arena, fd) = raw.arena(len, Memory::Auto);
        let size = rustix::fs::fstat(&fd).unwrap().st_size as u64;
        rustix::fs::fallocate(&fd, punch, 0, size).unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        let region = Region::from_memfd(fd).unwrap();
        assert!(matches!(raw.ask(&Ask::Mapped { arena }), Answer::Sealed));
        raw.say(&Ask::Put {
            node: Some("b".into()),
            prefix: "k".into(),
            count: 1,
            metadata: None,
            memory: Memory::Auto,
        });
        raw.say(&Ask::Tensors(vec![placed(arena, 0, len)]));
        let lease = Lease::whole(Arc::clone(&region));
        let junk = [round as u8; 4096];
        (0..64).for_each(|at| lease.write_at(at * 4096, (&junk[..]).into()));
        drop((lease, region));
        if round % 2 == 0 {
            let answer = raw.answer();
            let known = matches!(
                answer,
                Answer::Moved(_)
                    | Answer::Failed {
                        kind: FailureKind::Corrupt | FailureKind::Peer,
                        ..
                    }
            );
            assert!(known, "{answer:?}");
        }
        drop(raw);
        killed.signal(rustix::process::Signal::KILL);
    }
    // The store keeps what was put last, whoever of them that was.
    a.json(&["put", file.to_str().unwrap(), "b:k"]);
    assert_back(&[&a, &b], &before);
    assert_works(&a);
}

#[test]
fn a_lost_agent_is_an_error_and_connecting_again_the_callers_choice() {
    let folder = tempfile::tempdir().unwrap();
    let mut a = Agent::start(folder.path(), "a", &[]);
    let mut client = connect(&a);
    let arena = client.arena(4096, Memory::Auto).unwrap();
    let tensor: Tensor = arena.tensor("t", Dtype::U8, &[10]).unwrap();
    a.kill();
    for _ in 0..2 {
        let lost = client.put(None, "m", std::slice::from_ref(&tensor), None);
        assert!(matches!(lost, Err(ClientError::Lost(_))), "{lost:?}");
    }
    // What is in the arena is still the program's to read.
    tensor.write(0, b"0123456789");
    let again = Agent::start(folder.path(), "a", &[]);
    let lost = client.list(None);
    assert!(matches!(lost, Err(ClientError::Lost(_))), "not by itself");
    connect(&again).list(None).unwrap();
    let none = Client::connect(folder.path().join("none.sock"));
    assert!(matches!(none, Err(ClientError::NoAgent(_))));
}

#[test]
fn foreign_memory_under_pages_that_are_missing_is_no_danger() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut client = connect(&a);
    // Sparse: the pages are made when it is taken, and are the user's to pay.
    let imported = client.import(memfd(16 << 20, ALL)).unwrap();
    let tensor = imported.tensor(info("t", 16 << 20), 0).unwrap();
    client.put(None, "m", &[tensor], None).unwrap();
    assert_eq!(a.status()["users"][0]["bytes"], 16 << 20);
    drop(imported);
    client.list(None).unwrap();
    assert_eq!(a.status()["arenas"]["used_bytes"], 0);
}
