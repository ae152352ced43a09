//! Entry points for the fuzz targets in `fuzz/`, and for the tests that run
//! their corpus. Any input is fine; a panic is a finding.
//!
//! What is accepted must be sound: it comes back as it went after it is
//! written again, and what is computed from it stays within its limits.

use genie_client::protocol::{Answer, Ask, Ranges};
use genie_client::slice::{PIECES_MAX, Run, check_runs};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Config;
use crate::frame::{BODY_MAX, FrameError, check_len, check_preamble, decode, encode};
use crate::message::{Message, Runs};
use crate::safetensors::{HEADER_MAX, Header};
use crate::tensor::{DIMENSIONS_MAX, Metadata, TensorError, TensorInfo, check_batch};
use crate::transfer;

/// The length against which byte ranges are checked.
const TENSOR_BYTES: u64 = 1 << 20;

/// Reads `bytes` as what a peer sends: its preamble, then frames. Returns how
/// many messages were understood.
pub fn frames(bytes: &[u8]) -> usize {
    let Some((preamble, mut rest)) = bytes.split_first_chunk::<8>() else {
        return 0;
    };
    // Whatever it says, so that every input gets to the frames.
    let _ = check_preamble(*preamble);
    let mut understood = 0;
    while let Some((message, after)) = next::<Message>(rest) {
        rest = after;
        let Ok(message) = message else { continue };
        understood += 1;
        match &message {
            Message::Tensors { tensors, .. } => tensors_of("", tensors, None),
            Message::Listed { tensors, .. } => {
                for listed in tensors {
                    assert!(listed.shape.len() <= DIMENSIONS_MAX);
                    let _ = listed.check();
                }
            }
            Message::Found { metadata, .. } => tensors_of("", &[], metadata.as_ref()),
            _ => {}
        }
    }
    understood
}

/// Reads `bytes` as what a program sends to its agent, and as what an agent
/// answers. Returns how many requests were understood.
pub fn application(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    let mut understood = 0;
    while let Some((ask, after)) = next::<Ask>(rest) {
        rest = after;
        let Ok(ask) = ask else { continue };
        understood += 1;
        match &ask {
            Ask::Fetch { runs, .. } => ranges(runs),
            Ask::Batch(batch) => pieces(batch),
            Ask::Tensors(placed) => {
                let infos: Vec<_> = placed.iter().map(|placed| placed.info.clone()).collect();
                tensors_of("m", &infos, None);
            }
            Ask::Put {
                prefix, metadata, ..
            } => tensors_of(prefix, &[], metadata.as_ref()),
            _ => {}
        }
    }
    let mut rest = bytes;
    while let Some((_, after)) = next::<Answer>(rest) {
        rest = after;
    }
    understood
}

/// What is checked of a batch names bytes of its window, and no more than may be.
fn pieces(batch: &Ranges) {
    let runs = batch.ranges.iter().map(|range| (range.target, range.run));
    let runs = Runs {
        targets: batch.targets.clone(),
        runs: runs.collect(),
    };
    let Ok(count) = transfer::ranges::check(&runs, batch.note.as_ref()) else {
        return;
    };
    assert!(count <= PIECES_MAX);
    for (_, run) in &runs.runs {
        if run.is_inside(TENSOR_BYTES) {
            let inside = |at: u64| at + run.len <= TENSOR_BYTES;
            assert!(run.pieces().all(inside));
        }
    }
}

/// Reads `bytes` as the header of a file of tensors; returns whether it is one.
pub fn header(bytes: &[u8]) -> bool {
    let Ok(header) = Header::parse(bytes) else {
        return false;
    };
    let lens = header.tensors.iter().map(TensorInfo::len_bytes);
    let total = lens.sum::<Result<u64, TensorError>>();
    assert_eq!(total.ok(), Some(header.data_len));
    let again = Header::encode(&header.tensors, header.metadata.as_ref());
    assert!(again.len() as u64 <= HEADER_MAX);
    let (len, json) = again.split_first_chunk::<8>().expect("it has a length");
    assert_eq!(u64::from_le_bytes(*len), json.len() as u64);
    let read = Header::parse(json).expect("what was written can be read");
    assert_eq!(read, header);
    true
}

/// Reads `bytes` as an agent's configuration file; returns whether it is one.
/// A refusal says where.
pub fn configuration(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    match Config::of_text(text, "genie.toml") {
        Ok(config) => {
            assert!(config.streams >= 1);
            assert!(!config.liveness.is_zero() && !config.stall.is_zero());
            assert!(!config.peers.contains_key(&config.name));
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

/// The first frame of `bytes`, as far as there is a whole one, and what follows.
fn next<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<(Result<T, FrameError>, &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<4>()?;
    let len = check_len(*header, BODY_MAX).ok()?;
    let (body, rest) = rest.split_at_checked(len)?;
    let message: Result<T, FrameError> = decode(body);
    if let Ok(message) = &message {
        let said = encode(message).expect("what was understood can be said");
        let again: T = decode(&said[4..]).expect("and understood again");
        assert_eq!(encode(&again).expect("and said again"), said);
    }
    Some((message, rest))
}

fn tensors_of(prefix: &str, tensors: &[TensorInfo], metadata: Option<&Metadata>) {
    let mut total = Some(0u64);
    for tensor in tensors {
        assert!(tensor.shape.len() <= DIMENSIONS_MAX);
        let len = tensor.len_bytes().ok();
        total = total.and_then(|total| total.checked_add(len?));
    }
    if let Ok(bytes) = check_batch(prefix, tensors, metadata) {
        assert_eq!(Some(bytes), total);
    }
}

fn ranges(runs: &[Run]) {
    if let Ok(bytes) = check_runs(runs, TENSOR_BYTES) {
        let totals = runs.iter().map(|run| run.total().expect("it was checked"));
        assert_eq!(totals.sum::<u64>(), bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::Path;

    /// What became of the kept inputs of a target, by name.
    fn run<T>(target: &str, entry: fn(&[u8]) -> T) -> BTreeMap<String, T> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let inputs = std::fs::read_dir(corpus).expect("the corpus is kept beside the targets");
        let inputs = inputs.map(|input| {
            let path = input.expect("the folder can be read").path();
            let name = path.file_name().expect("it has a name").to_string_lossy();
            println!("{target}/{name}");
            let bytes = std::fs::read(&path).expect("it can be read");
            (name.into_owned(), entry(&bytes))
        });
        inputs.collect()
    }

    #[test]
    fn the_corpus_of_frames_passes() {
        let understood = run("frame", frames);
        for (name, count) in [("hello", 1), ("conversation", 10), ("empty", 0)] {
            assert_eq!(understood.get(name), Some(&count), "{name}");
        }
    }

    #[test]
    fn the_corpus_of_the_application_socket_passes() {
        let understood = run("application", application);
        for (name, count) in [("requests", 21), ("empty", 0)] {
            assert_eq!(understood.get(name), Some(&count), "{name}");
        }
    }

    #[test]
    fn the_corpus_of_headers_passes() {
        let sound = run("header", header);
        for (name, expected) in [
            ("real", true),
            ("metadata", true),
            ("none", true),
            ("overlap", false),
            ("twice", false),
            ("huge", false),
        ] {
            assert_eq!(sound.get(name), Some(&expected), "{name}");
        }
    }

    #[test]
    fn the_corpus_of_configurations_passes() {
        let sound = run("configuration", configuration);
        for (name, expected) in [
            ("full", true),
            ("empty", true),
            ("unknown", false),
            ("wrong", false),
        ] {
            assert_eq!(sound.get(name), Some(&expected), "{name}");
        }
    }

    /// Writes the inputs that a fuzzer starts from; run it when messages change:
    /// `cargo test -p genie-controlplane --release write_seeds -- --ignored`.
    #[test]
    #[ignore = "writes the corpus, and asserts nothing"]
    fn write_seeds() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let write = |name: &str, bytes: Vec<u8>| {
            std::fs::write(corpus.join(name), bytes).expect("the corpus can be written");
        };
        let joined =
            |preamble: &[u8], messages: &[Vec<u8>]| [preamble, &messages.concat()].concat();
        let hello = encode(&Message::Hello(crate::session::testing::hello()));
        let hello = hello.expect("it can be encoded");
        let preamble = crate::frame::preamble();
        write(
            "frame/hello",
            joined(&preamble, std::slice::from_ref(&hello)),
        );
        write("frame/empty", Vec::new());
        write("frame/conversation", joined(&preamble, &seeds::messages()));
        write("application/requests", joined(&[], &seeds::requests()));
        write("application/answers", joined(&[], &seeds::answers()));
        write("application/empty", Vec::new());
    }

    mod seeds {
        use super::*;
        use crate::message::{Outcome, Request};
        use crate::negotiation::Refusal;
        use crate::security::Salt;
        use crate::tensor::Dtype;
        use crate::transport::Transport;
        use genie_client::protocol::{
            ArenaId, Direction, FailureKind, IpcHandle, Note, Placed, Ranged,
        };
        use genie_client::{Listed, Memory, Owner};
        use genie_dataplane::tcp::Token;
        use genie_dataplane::{SessionId, TransferId};

        fn said<T: Serialize>(messages: &[T]) -> Vec<Vec<u8>> {
            let said = messages.iter().map(encode);
            said.collect::<Result<_, _>>().expect("they can be encoded")
        }

        fn info() -> TensorInfo {
            TensorInfo {
                name: "m/a".into(),
                dtype: Dtype::BF16,
                shape: vec![2, 3],
            }
        }

        fn listed() -> Listed {
            Listed {
                name: "m/a".into(),
                dtype: "BF16".into(),
                shape: vec![2, 3],
                bytes: 12,
                owner: Owner::Peer("b".into()),
                memory: "host".into(),
                window: false,
            }
        }

        fn metadata() -> Option<Metadata> {
            Some(vec![("format".into(), "pt".into())])
        }

        pub(super) fn messages() -> Vec<Vec<u8>> {
            said(&[
                Message::Try {
                    transport: Transport::Tcp,
                    session: SessionId(7),
                    token: Some(Token([9; 16])),
                    salt: Some(Salt([3; 16])),
                },
                Message::Trying {
                    session: SessionId(8),
                    salt: Some(Salt([4; 16])),
                },
                Message::Chosen {
                    refused: vec![Refusal {
                        transport: Transport::Dpdk,
                        reason: "no huge pages".into(),
                    }],
                },
                Message::Ping,
                Message::Begin {
                    id: 1,
                    request: Request::Put {
                        prefix: "m".into(),
                        count: 1,
                        metadata: metadata(),
                        memory: Default::default(),
                        key: Some(crate::message::RequestKey([7; 16])),
                    },
                },
                Message::Tensors {
                    id: 1,
                    tensors: vec![info()],
                },
                Message::Granted {
                    id: 1,
                    path: 1,
                    transfers: vec![TransferId {
                        slot: 1,
                        generation: 2,
                    }],
                },
                Message::Listed {
                    id: 2,
                    tensors: vec![listed()],
                },
                Message::Done {
                    id: 1,
                    result: Ok(Outcome::default()),
                },
                Message::Begin {
                    id: 3,
                    request: Request::Write {
                        runs: Runs {
                            targets: vec!["w".into()],
                            runs: vec![(0, Run::bytes(0, 4))],
                        },
                        note: Some(note()),
                    },
                },
            ])
        }

        fn note() -> Note {
            Note {
                target: 0,
                message: b"go".to_vec(),
            }
        }

        pub(super) fn requests() -> Vec<Vec<u8>> {
            let arena = ArenaId(1);
            said(&[
                Ask::Arena {
                    bytes: 4096,
                    memory: Memory::Auto,
                },
                Ask::Mapped { arena },
                Ask::Free { arena },
                Ask::Import,
                Ask::ImportDevice {
                    memory: Memory::Cuda(0),
                    bytes: 4096,
                    handle: Some(IpcHandle([7; 64])),
                },
                Ask::Read {
                    offset: 0,
                    bytes: 1,
                    memory: Memory::Cuda(0),
                },
                Ask::Put {
                    node: Some("b".into()),
                    prefix: "m".into(),
                    count: 1,
                    metadata: metadata(),
                    memory: Memory::Host,
                },
                Ask::Tensors(vec![Placed {
                    info: info(),
                    arena,
                    offset: 64,
                }]),
                Ask::Get {
                    node: None,
                    prefix: "m".into(),
                    memory: Memory::Hugepage,
                },
                Ask::Fetch {
                    node: None,
                    name: "m/a".into(),
                    runs: vec![Run::bytes(0, 4), Run::bytes(8, 4)],
                    memory: Memory::Sim,
                },
                Ask::List {
                    node: None,
                    under: Some("m".into()),
                },
                Ask::Remove {
                    node: None,
                    name: "m".into(),
                },
                Ask::Status,
                Ask::Window {
                    node: Some("b".into()),
                    name: "w".into(),
                    bytes: 4096,
                    memory: Memory::Auto,
                },
                Ask::Register {
                    name: "w".into(),
                    arena,
                    offset: 0,
                    bytes: 64,
                },
                Ask::Seal {
                    node: None,
                    name: "w".into(),
                    tensors: vec![(info(), 64)],
                },
                Ask::Batch(Ranges {
                    node: None,
                    direction: Direction::Write,
                    targets: vec!["w".into()],
                    ranges: vec![Ranged {
                        target: 0,
                        run: Run::bytes(0, 4),
                        arena,
                        offset: 8,
                    }],
                    note: Some(note()),
                }),
                Ask::Cancel { request: 3 },
                Ask::Listen { prefix: "w".into() },
                Ask::Await { limit_ms: 10 },
                Ask::Notify {
                    node: None,
                    name: "w".into(),
                    message: b"go".to_vec(),
                },
            ])
        }

        pub(super) fn answers() -> Vec<Vec<u8>> {
            said(&[
                Answer::Sealed,
                Answer::Progress { done: 1, total: 2 },
                Answer::Found {
                    count: 1,
                    metadata: metadata(),
                },
                Answer::Tensors(vec![info()]),
                Answer::Listed {
                    tensors: vec![listed()],
                    last: true,
                },
                Answer::Failed {
                    kind: FailureKind::Quota,
                    message: "too much".into(),
                },
                Answer::Failed {
                    kind: FailureKind::Limited {
                        limit: genie_client::PeerLimit::Transfers,
                        figure: 2048,
                    },
                    message: "too much".into(),
                },
            ])
        }
    }
}
