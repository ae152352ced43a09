//! Windows, reads and writes of ranges, notifications and cancellation, between
//! real agents: what arrives, what it costs, and what is left after abuse.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use genie_client::protocol::{Answer, ArenaId, Ask, Direction, Note, Ranged, Ranges};
use genie_client::slice::{PIECES_MAX, RUNS_MAX};
use genie_client::{
    Arena, AsyncClient, Batch, BatchError, Client, ClientError, Dtype, FailureKind, Listener,
    Memory, Run, Span, Tensor, TensorInfo, Window, frame,
};
use genie_tests::{Agent, GENEROUS, eventually};

#[path = "../../controlplane/client/examples/window.rs"]
#[allow(dead_code, unreachable_pub)]
mod window;

/// Long enough that something can happen in the middle of its transfer.
const LONG: u64 = 256 << 20;

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

/// Memory of arenas and of the store, and requests under way.
fn held(agent: &Agent) -> [u64; 3] {
    let status = agent.status();
    let used = |part: &str| status[part]["used_bytes"].as_u64().expect("a number");
    let sessions = status["sessions"].as_array().expect("a list");
    let requests = sessions.iter().map(|s| s["requests"].as_u64().unwrap());
    [used("arenas"), used("store"), requests.sum()]
}

fn assert_back(agents: &[&Agent], before: &[[u64; 3]]) {
    eventually("everything was given back", || {
        let now: Vec<_> = agents.iter().map(|agent| held(agent)).collect();
        (now == before).then_some(())
    });
}

/// Bytes that differ from place to place.
fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let byte = |at: u64| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    (0..len).map(byte).collect()
}

fn tensor(arena: &Arena, len: u64, seed: u64) -> Tensor {
    let tensor = arena.tensor("t", Dtype::U8, &[len]).unwrap();
    tensor.write(0, &pattern(len, seed));
    tensor
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.len_bytes() as usize];
    tensor.read(0, &mut bytes);
    bytes
}

fn write(client: &mut Client, window: &Window, tensor: &Tensor) -> genie_client::Moved {
    let mut batch = Batch::write();
    let len = tensor.len_bytes();
    batch.range(window, 0..len, tensor, 0).unwrap();
    client.run(&batch).unwrap()
}

#[test]
fn the_example_works_here_and_with_a_peer() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let before = [held(&a), held(&b)];
    let (here, there) = (a.socket.to_str().unwrap(), b.socket.to_str().unwrap());
    window::run(here, None, here).unwrap();
    window::run(here, Some("b"), there).unwrap();
    assert_back(&[&a, &b], &before);
}

#[test]
fn ranges_are_scattered_and_gathered_without_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    let (one, other) = (
        client.arena(4 << 20, Memory::Auto).unwrap(),
        client.arena(4 << 20, Memory::Host).unwrap(),
    );
    let (first, second) = (tensor(&one, 1 << 20, 1), tensor(&other, 1 << 20, 2));
    for node in [None, Some("b")] {
        let small = client
            .create_window(node, "w/small", 1000, Memory::Auto)
            .unwrap();
        let large = client
            .create_window(node, "w/large", 2 << 20, Memory::Auto)
            .unwrap();
        let mut batch = Batch::write();
        batch.range(&large, 5..1000 + 5, &first, 17).unwrap();
        batch.range(&small, 0..1000, &second, 0).unwrap();
        batch.range(&large, 1 << 20..2 << 20, &second, 0).unwrap();
        batch.range(&large, 2 << 20..2 << 20, &second, 0).unwrap();
        let moved = client.run(&batch).unwrap();
        assert_eq!((moved.tensors, moved.bytes), (4, 2000 + (1 << 20)));
        let copies = if node.is_some() { 0.0 } else { 1.0 };
        assert_eq!(moved.copies_per_byte, copies, "{node:?}: {moved:?}");

        let (back, rest) = (tensor(&one, 1 << 20, 3), tensor(&other, 3000, 4));
        let mut batch = Batch::read();
        batch.range(&large, 1 << 20..2 << 20, &back, 0).unwrap();
        batch.range(&large, 0..1010, &rest, 990).unwrap();
        batch.range(&small, 0..990, &rest, 0).unwrap();
        let moved = client.run(&batch).unwrap();
        assert_eq!(moved.copies_per_byte, copies, "{node:?}: {moved:?}");
        assert!(bytes(&back) == pattern(1 << 20, 2));
        let rest = bytes(&rest);
        assert!(rest[..990] == pattern(990, 2)[..]);
        assert!(rest[990..995] == [0; 5] && rest[1995..2000] == [0; 5]);
        assert!(rest[995..1995] == pattern(1 << 20, 1)[17..1017]);
        assert!(rest[2000..] == pattern(3000, 4)[2000..]);
        assert_eq!(client.remove(node, "w").unwrap(), 2);
    }
    assert_eq!(b.status()["store"]["used_bytes"], 0);
}

#[test]
fn a_slice_of_a_tensor_is_read_into_an_arena() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let matrix = arena.tensor("matrix", Dtype::U8, &[100, 100]).unwrap();
    matrix.write(0, &pattern(10_000, 0));
    for node in [None, Some("b")] {
        client
            .put(node, "m", std::slice::from_ref(&matrix), None)
            .unwrap();
        let remote = client.open(node, "m/matrix").unwrap();
        let part = remote
            .slice(&[Span::stepped(10..20, 3), (40..45).into()])
            .unwrap();
        let got = tensor(&arena, 20, 9);
        let mut batch = Batch::read();
        batch.slice(&remote, &part, &got, 0).unwrap();
        assert_eq!(client.run(&batch).unwrap().bytes, 20);
        let all = pattern(10_000, 0);
        let expected = [10, 13, 16, 19].map(|row| &all[row * 100 + 40..row * 100 + 45]);
        assert_eq!(bytes(&got), expected.concat());
        let refused = Batch::write().range(&remote, 0..1, &got, 0).err();
        assert!(matches!(refused, Some(BatchError::Immutable { .. })));
    }
}

#[test]
fn registered_memory_is_written_where_it_is_and_only_while_its_program_lives() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut theirs = connect(&b);
    let arena = theirs.arena(1 << 20, Memory::Auto).unwrap();
    let (around, inside) = (tensor(&arena, 1000, 1), tensor(&arena, 5000, 1));
    theirs.register("kv", &inside).unwrap();
    assert_eq!(kind(theirs.register("kv", &inside)), FailureKind::Taken);

    let mut client = connect(&a);
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let window = client.window(Some("b"), "kv").unwrap();
    assert_eq!(window.len_bytes, 5000);
    let moved = write(&mut client, &window, &tensor(&arena, 4000, 7));
    assert_eq!(moved.copies_per_byte, 0.0);
    assert_eq!(bytes(&inside)[..4000], pattern(4000, 7));
    assert_eq!(bytes(&inside)[4000..], pattern(5000, 1)[4000..]);
    assert_eq!(bytes(&around), pattern(1000, 1));
    let info = |len| TensorInfo {
        name: "x".into(),
        dtype: Dtype::U8,
        shape: vec![len],
    };
    assert_eq!(
        kind(client.seal(&window, vec![(info(1), 0)])),
        FailureKind::Invalid
    );

    drop(theirs);
    eventually("the window is gone with its program", || {
        client.window(Some("b"), "kv").err()
    });
    let mut batch = Batch::read();
    batch
        .range(&window, 0..1, &tensor(&arena, 1, 0), 0)
        .unwrap();
    assert_eq!(kind(client.run(&batch)), FailureKind::NotFound);
}

#[test]
fn a_sealed_window_is_tensors_that_nobody_can_write() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let window = client
        .create_window(Some("b"), "m", 10_000, Memory::Auto)
        .unwrap();
    let put = client.put(Some("b"), "m", &[tensor(&arena, 1, 0)], None);
    assert_eq!(kind(put), FailureKind::Taken);
    write(&mut client, &window, &tensor(&arena, 10_000, 5));
    let info = |name: &str, len| TensorInfo {
        name: name.into(),
        dtype: Dtype::U8,
        shape: vec![len],
    };
    let mut refused = |tensors| kind(client.seal(&window, tensors));
    for bad in [
        vec![(info("x", 10_001), 0)],
        vec![(info("x", 1), u64::MAX)],
        vec![(info("x", u64::MAX), 1)],
        vec![(info("x", 10), 0), (info("y", 10), 9)],
        vec![(info("x", 1), 0), (info("x", 1), 1)],
        vec![(info("../x", 1), 0)],
    ] {
        assert_eq!(refused(bad), FailureKind::Invalid);
    }
    let tensors = vec![(info("late", 100), 9900), (info("early", 9000), 64)];
    client.seal(&window, tensors.clone()).unwrap();
    assert_eq!(kind(client.seal(&window, tensors)), FailureKind::NotFound);
    let got = client.get(Some("b"), "m", Memory::Auto).unwrap();
    let all = pattern(10_000, 5);
    assert_eq!(got.to_vec("late").unwrap(), all[9900..]);
    assert_eq!(got.to_vec("early").unwrap(), all[64..9064]);
    let mut batch = Batch::write();
    batch
        .range(&window, 0..1, &tensor(&arena, 1, 0), 0)
        .unwrap();
    assert_eq!(kind(client.run(&batch)), FailureKind::NotFound);
    let again = client.create_window(Some("b"), "m", 1, Memory::Auto);
    assert_eq!(kind(again), FailureKind::Taken);
    client.remove(Some("b"), "m").unwrap();
    assert_eq!(b.status()["store"]["used_bytes"], 0);
}

#[test]
fn batches_run_beside_each_other_and_beside_other_requests() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(4 << 20, Memory::Auto).unwrap();
    let window = client
        .create_window(Some("b"), "w", 1 << 20, Memory::Auto)
        .unwrap();
    let tensors: Vec<Tensor> = (0..200).map(|seed| tensor(&arena, 1000, seed)).collect();
    let post = |client: &mut Client, (index, tensor): (usize, &Tensor)| {
        let mut batch = Batch::write();
        let at = index as u64 * 1000;
        batch.range(&window, at..at + 1000, tensor, 0).unwrap();
        client.post(&batch).unwrap()
    };
    let mut posted = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        posted.push(post(&mut client, (index, tensor)));
        if index % 50 == 0 {
            assert_eq!(client.list(Some("b")).unwrap().len(), 1);
        }
    }
    // In another order than they were posted.
    for posted in posted.into_iter().rev() {
        assert_eq!(client.wait(posted).unwrap().bytes, 1000);
    }
    let back = tensor(&arena, 200_000, 0);
    let mut batch = Batch::read();
    let every = Run {
        offset: 0,
        len: 1000,
        stride: 1000,
        count: 200,
    };
    batch.run(&window, every, &back, 0).unwrap();
    assert_eq!(client.run(&batch).unwrap().tensors, 200);
    let expected: Vec<u8> = (0..200).flat_map(|seed| pattern(1000, seed)).collect();
    assert!(bytes(&back) == expected);
    drop(b);
}

#[test]
fn notifications_come_after_the_bytes_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut listener = Listener::connect(&b.socket, "w").unwrap();
    let mut elsewhere = Listener::connect(&b.socket, "x").unwrap();
    let mut client = connect(&a);
    let mut reader = connect(&b);
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let theirs = reader.arena(1 << 20, Memory::Auto).unwrap();
    let window = client
        .create_window(Some("b"), "w/1", 100_000, Memory::Auto)
        .unwrap();
    for seed in 0..20u64 {
        let mut batch = Batch::write();
        batch
            .range(&window, 0..100_000, &tensor(&arena, 100_000, seed), 0)
            .unwrap();
        batch.notify(&window, &seed.to_le_bytes()).unwrap();
        let posted = client.post(&batch).unwrap();
        let heard = listener
            .next(GENEROUS)
            .unwrap()
            .expect("a notification comes");
        assert_eq!((heard.name.as_str(), heard.lost), ("w/1", 0));
        assert_eq!(heard.message, seed.to_le_bytes());
        let got = tensor(&theirs, 100_000, 99);
        let mut batch = Batch::read();
        let local = reader.window(None, "w/1").unwrap();
        batch.range(&local, 0..100_000, &got, 0).unwrap();
        reader.run(&batch).unwrap();
        assert!(bytes(&got) == pattern(100_000, seed));
        assert_eq!(client.wait(posted).unwrap().listeners, 1);
    }
    assert_eq!(client.notify(Some("b"), "w", b"by itself").unwrap(), 1);
    assert_eq!(
        listener.next(GENEROUS).unwrap().unwrap().message,
        b"by itself"
    );
    assert_eq!(client.notify(Some("b"), "other", b"").unwrap(), 0);
    assert_eq!(elsewhere.next(Duration::from_millis(10)).unwrap(), None);
    let too_long = client.notify(Some("b"), "w", &[0; 4097]);
    assert_eq!(kind(too_long), FailureKind::Invalid);

    let stop = listener.canceller();
    let waiting = std::thread::spawn(move || kind(listener.next(GENEROUS)));
    std::thread::sleep(Duration::from_millis(50));
    stop.cancel();
    assert_eq!(waiting.join().unwrap(), FailureKind::Cancelled);
}

#[test]
fn what_is_cancelled_ends_at_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(LONG, Memory::Host).unwrap();
    let long = arena.tensor("long", Dtype::U8, &[LONG]).unwrap();
    let window = client
        .create_window(Some("b"), "w", LONG, Memory::Host)
        .unwrap();
    let before = [held(&a), held(&b)];
    for (round, make) in [Batch::write as fn() -> Batch, Batch::read, Batch::write]
        .iter()
        .enumerate()
    {
        let mut batch = make();
        batch.range(&window, 0..LONG, &long, 0).unwrap();
        let posted = client.post(&batch).unwrap();
        std::thread::sleep(Duration::from_millis(5 * round as u64));
        posted.cancel();
        assert_eq!(kind(client.wait(posted)), FailureKind::Cancelled);
        assert_back(&[&a, &b], &before);
    }
    // A batch that nobody waits for is cancelled too; then the window is free.
    let mut batch = Batch::write();
    batch.range(&window, 0..LONG, &long, 0).unwrap();
    drop(client.post(&batch).unwrap());
    assert_back(&[&a, &b], &before);

    // Another thread cancels what this one waits for.
    let stop = client.canceller();
    let stopper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        stop.cancel();
    });
    let put = client.put(Some("b"), "m", std::slice::from_ref(&long), None);
    assert_eq!(kind(put), FailureKind::Cancelled);
    stopper.join().unwrap();
    assert_back(&[&a, &b], &before);
    let info = TensorInfo {
        name: "t".into(),
        dtype: Dtype::U8,
        shape: vec![LONG],
    };
    client.seal(&window, vec![(info, 0)]).unwrap();
    assert_eq!(client.remove(Some("b"), "w").unwrap(), 1);
}

#[test]
fn a_future_that_is_dropped_cancels_its_request_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = AsyncClient::connect(&a.socket).await.unwrap();
        let arena = client.arena(LONG, Memory::Host).await.unwrap();
        let long = arena.tensor("long", Dtype::U8, &[LONG]).unwrap();
        let before = [held(&a), held(&b)];
        for wait in [0, 5, 20] {
            let put = client.put(Some("b"), "m", vec![long.clone()], None);
            let limit = Duration::from_millis(wait);
            let late = tokio::time::timeout(limit, put).await;
            assert!(late.is_err(), "{LONG} bytes in {wait} ms");
            // Waits for the one before, and is not cancelled with it.
            assert_eq!(client.list(Some("b")).await.unwrap(), []);
            assert_back(&[&a, &b], &before);
        }
        client.put(Some("b"), "m", vec![long], None).await.unwrap();
        assert_eq!(client.remove(Some("b"), "m").await.unwrap(), 1);
    });
}

#[test]
fn a_window_that_is_removed_ends_what_uses_it() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let (mut client, mut other) = (connect(&a), connect(&b));
    let arena = client.arena(LONG, Memory::Host).unwrap();
    let long = arena.tensor("long", Dtype::U8, &[LONG]).unwrap();
    let before = [held(&a), held(&b)];
    for make in [Batch::write as fn() -> Batch, Batch::read] {
        let window = client
            .create_window(Some("b"), "w", LONG, Memory::Host)
            .unwrap();
        let mut batch = make();
        batch.range(&window, 0..LONG, &long, 0).unwrap();
        let posted = client.post(&batch).unwrap();
        eventually("it is under way", || (held(&b)[2] > 0).then_some(()));
        assert_eq!(other.remove(None, "w").unwrap(), 1);
        assert_eq!(kind(client.wait(posted)), FailureKind::Removed);
        assert_back(&[&a, &b], &before);
    }
}

#[test]
fn a_program_that_dies_in_mid_read_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let before = [held(&a), held(&b)];
    connect(&a)
        .create_window(Some("b"), "w", LONG, Memory::Host)
        .unwrap();
    let with_window = held(&b);
    for round in 0..4 {
        let mut client = connect(&a);
        let arena = client.arena(LONG, Memory::Host).unwrap();
        let long = arena.tensor("long", Dtype::U8, &[LONG]).unwrap();
        let window = client.window(Some("b"), "w").unwrap();
        let mut batch = if round % 2 == 0 {
            Batch::read()
        } else {
            Batch::write()
        };
        batch.range(&window, 0..LONG, &long, 0).unwrap();
        let posted = client.post(&batch).unwrap();
        std::thread::sleep(Duration::from_millis(10 * round));
        drop(client);
        drop(posted);
        assert_back(&[&a, &b], &[before[0], with_window]);
    }
    connect(&b).remove(None, "w").unwrap();
    assert_back(&[&a, &b], &before);
}

/// A client that says whatever it likes.
struct Raw {
    stream: UnixStream,
    requests: u64,
}

impl Raw {
    fn connect(agent: &Agent) -> Self {
        let mut stream = UnixStream::connect(&agent.socket).unwrap();
        frame::exchange_preamble_blocking(&mut stream).unwrap();
        Self {
            stream,
            requests: 0,
        }
    }

    fn say(&mut self, ask: &Ask) {
        frame::write_blocking(&mut self.stream, ask).unwrap();
        self.requests += 1;
    }

    fn answer(&mut self) -> Answer {
        frame::read_blocking(&mut self.stream, frame::BODY_MAX).unwrap()
    }

    fn arena(&mut self, bytes: u64) -> ArenaId {
        let memory = Memory::Host;
        self.say(&Ask::Arena { bytes, memory });
        let Answer::Arena { arena, .. } = self.answer() else {
            panic!("no arena");
        };
        genie_client::descriptor::take(&self.stream)
            .unwrap()
            .expect("a descriptor");
        self.say(&Ask::Mapped { arena });
        assert!(matches!(self.answer(), Answer::Sealed));
        arena
    }

    fn refused(&mut self, batch: Ranges) -> FailureKind {
        self.say(&Ask::Batch(batch));
        match self.answer() {
            Answer::Completed { request, result } => {
                assert_eq!(request, self.requests - 1);
                result.expect_err("it makes no sense").kind
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ranges_that_make_no_sense_are_refused_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path());
    let mut client = connect(&a);
    for node in [None, Some("b")] {
        client
            .create_window(node, "w", 10_000, Memory::Auto)
            .unwrap();
    }
    let mut raw = Raw::connect(&a);
    let arena = raw.arena(1 << 20);
    let before = [held(&a), held(&b)];
    let range = |run, offset| Ranged {
        target: 0,
        run,
        arena,
        offset,
    };
    let strided = |offset, len, stride, count| Run {
        offset,
        len,
        stride,
        count,
    };
    let one = Run::bytes(0, 1);
    let outside = [
        Run::bytes(10_000, 1),
        Run::bytes(9_999, 2),
        Run::bytes(u64::MAX, 1),
        Run::bytes(1, u64::MAX),
        strided(0, 1, u64::MAX, 3),
        strided(0, 10, 5, 2),
        strided(0, 0, 0, 0),
        strided(0, 1 << 40, 1 << 40, 1 << 40),
        strided(0, 1, 1, PIECES_MAX + 1),
    ];
    let wrong: Vec<Vec<Ranged>> = outside
        .iter()
        .map(|run| vec![range(*run, 0)])
        .chain([
            vec![range(one, 1 << 20)],
            vec![range(one, u64::MAX)],
            vec![Ranged {
                target: 1,
                ..range(one, 0)
            }],
            vec![Ranged {
                arena: ArenaId(99),
                ..range(one, 0)
            }],
            vec![range(one, 0); RUNS_MAX + 1],
            // More than a million ranges, as they fit a frame.
            (0..100)
                .map(|at| range(strided(0, 0, 0, 10_000), at))
                .collect(),
        ])
        .collect();
    for node in [None, Some("b".to_owned())] {
        for direction in [Direction::Read, Direction::Write] {
            let batch = |ranges| Ranges {
                node: node.clone(),
                direction,
                targets: vec!["w".into()],
                ranges,
                note: None,
            };
            for ranges in &wrong {
                let shown = &ranges[..1];
                let refused = raw.refused(batch(ranges.clone()));
                assert_eq!(
                    refused,
                    FailureKind::Invalid,
                    "{node:?} {direction:?} {shown:?}"
                );
            }
            // Twice the same bytes, where they would be written.
            let (there, here) = ([0, 5], [0, 5]);
            let apart = [0, 10];
            let (there, here) = match direction {
                Direction::Read => (apart, here),
                Direction::Write => (there, apart),
            };
            let over = |index: usize| range(Run::bytes(there[index], 10), here[index]);
            let refused = raw.refused(batch(vec![over(0), over(1)]));
            assert_eq!(refused, FailureKind::Invalid);
            let mut unknown = batch(vec![range(one, 0)]);
            unknown.targets = vec!["none".into()];
            assert_eq!(raw.refused(unknown), FailureKind::NotFound);
            let mut note = batch(vec![range(one, 0)]);
            note.note = Some(Note {
                target: 1,
                message: Vec::new(),
            });
            assert_eq!(raw.refused(note), FailureKind::Invalid);
        }
    }
    raw.say(&Ask::Cancel { request: 12_345 });
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let back = tensor(&arena, 10_000, 1);
    for node in [None, Some("b")] {
        let window = client.window(node, "w").unwrap();
        let mut batch = Batch::read();
        batch.range(&window, 0..10_000, &back, 0).unwrap();
        client.run(&batch).unwrap();
        assert!(bytes(&back) == [0; 10_000], "nothing was written");
    }
    drop((back, arena));
    // Freed with the next request.
    client.list(None).unwrap();
    assert_back(&[&a, &b], &before);
    let too_many = Batch::write()
        .run(
            &client.window(None, "w").unwrap(),
            strided(0, 0, 0, 1_000_000),
            &tensor(&client.arena(4096, Memory::Auto).unwrap(), 1, 0),
            0,
        )
        .err();
    assert!(matches!(too_many, Some(BatchError::Slice(_))));
}

#[test]
fn what_was_fetched_is_not_read_into() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[]);
    let mut raw = Raw::connect(&a);
    let mut client = connect(&a);
    client.create_window(None, "w", 10, Memory::Auto).unwrap();
    let arena = client.arena(4096, Memory::Auto).unwrap();
    client
        .put(None, "m", &[tensor(&arena, 10, 1)], None)
        .unwrap();
    raw.say(&Ask::Get {
        node: None,
        prefix: "m".into(),
        memory: Memory::Auto,
    });
    let fetched = loop {
        if let Answer::Arrived { arena, .. } = raw.answer() {
            genie_client::descriptor::take(&raw.stream)
                .unwrap()
                .expect("a descriptor");
            break arena;
        }
    };
    let refused = raw.refused(Ranges {
        node: None,
        direction: Direction::Read,
        targets: vec!["w".into()],
        ranges: vec![Ranged {
            target: 0,
            run: Run::bytes(0, 1),
            arena: fetched,
            offset: 0,
        }],
        note: None,
    });
    assert_eq!(refused, FailureKind::Invalid);
}

#[test]
fn whichever_of_several_batches_ends_is_known_and_parts_of_tensors_go_where_they_should() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _b) = pair(folder.path());
    let mut client = connect(&a);
    let arena = client.arena(1 << 20, Memory::Auto).unwrap();
    let all = arena.tensor("all", Dtype::U8, &[4096]).unwrap();
    all.write(0, &pattern(4096, 3));
    let window = client
        .create_window(Some("b"), "w", 4096, Memory::Auto)
        .unwrap();
    let info = |len| TensorInfo {
        name: "part".into(),
        dtype: Dtype::U8,
        shape: vec![len],
    };
    assert!(all.part(info(1), 4096).is_err() && all.part(info(2), u64::MAX).is_err());
    let mut posted = Vec::new();
    for start in (0..4096).step_by(1024) {
        let part = all.part(info(1024), start).unwrap();
        let mut batch = Batch::write();
        batch.range(&window, start..start + 1024, &part, 0).unwrap();
        posted.push(client.post(&batch).unwrap());
    }
    eventually("all have ended", || {
        client.wait_any(Duration::from_millis(100)).unwrap();
        let ended = posted.iter().all(|one| client.has_ended(one));
        ended.then_some(())
    });
    for one in posted {
        assert_eq!(client.wait(one).unwrap().bytes, 1024);
    }
    // Nothing is under way: then there is nothing to wait for.
    client.wait_any(GENEROUS * 10).unwrap();
    let back = arena.tensor("back", Dtype::U8, &[4096]).unwrap();
    let mut batch = Batch::read();
    batch.range(&window, 0..4096, &back, 0).unwrap();
    client.run(&batch).unwrap();
    let mut bytes = vec![0; 4096];
    back.read(0, &mut bytes);
    assert_eq!(bytes, pattern(4096, 3));
}
