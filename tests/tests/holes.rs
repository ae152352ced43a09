//! Holes in huge pages that nothing can fill: the access that would be a SIGBUS.
//!
//! In a process of its own, since it empties the pool of huge pages for a
//! moment. Skipped, with the reason, where none can be had.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use genie_client::protocol::{Answer, ArenaId, Ask, Placed};
use genie_client::{Dtype, FailureKind, Memory, TensorInfo, descriptor, frame};
use genie_dataplane::memory::{Backing, Region};
use genie_hugepages::{PageSize, Reservation, Root, reserve};
use genie_tests::{Agent, eventually};
use rustix::fs::FallocateFlags;

const PAGE: u64 = 2 << 20;
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

fn pages() -> Option<Reservation> {
    match reserve(&Root::system(), PageSize::MB_2, 4, None) {
        Ok(reservation) => Some(reservation),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn ask(stream: &mut UnixStream, ask: &Ask) -> Answer {
    frame::write_blocking(stream, ask).unwrap();
    frame::read_blocking(stream, frame::BODY_MAX).unwrap()
}

/// An arena on one huge page; none while others have them all.
fn arena(stream: &mut UnixStream) -> Option<(ArenaId, OwnedFd)> {
    let wanted = Ask::Arena {
        bytes: PAGE,
        memory: Memory::Hugepage,
    };
    match ask(stream, &wanted) {
        Answer::Arena { arena, .. } => {
            let fd = descriptor::take(stream).unwrap();
            Some((arena, fd.expect("a descriptor")))
        }
        Answer::Failed { kind, .. } => {
            assert_eq!(kind, FailureKind::NoMemory);
            None
        }
        other => panic!("{other:?}"),
    }
}

/// All huge pages that are free.
fn take_all() -> Vec<Arc<Region>> {
    std::iter::from_fn(|| Region::with_backing(PAGE as usize, Backing::HUGE_2M).ok()).collect()
}

fn put(stream: &mut UnixStream, arena: ArenaId) -> Answer {
    let put = Ask::Put {
        node: None,
        prefix: "m".into(),
        count: 1,
        metadata: None,
        memory: Memory::Auto,
    };
    frame::write_blocking(stream, &put).unwrap();
    let info = TensorInfo {
        name: "t".into(),
        dtype: Dtype::U8,
        shape: vec![PAGE],
    };
    let placed = Placed {
        info,
        arena,
        offset: 0,
    };
    frame::write_blocking(stream, &Ask::Tensors(vec![placed])).unwrap();
    loop {
        match frame::read_blocking(stream, frame::BODY_MAX).unwrap() {
            Answer::Progress { .. } => {}
            answer => return answer,
        }
    }
}

#[test]
fn holes_that_no_page_can_fill_are_refused_before_the_agent_looks() {
    let Some(_pages) = pages() else { return };
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "a", &[]);
    let connect = || {
        let mut stream = UnixStream::connect(&agent.socket).unwrap();
        frame::exchange_preamble_blocking(&mut stream).unwrap();
        stream
    };

    // Before the seals: the hole is made, and its page is somebody else's.
    // Whoever else is on this machine may give one back in between: then the
    // hole is filled, which is well too, but not what is looked for here.
    eventually("the hole could not be filled", || {
        let mut stream = connect();
        let (arena, fd) = arena(&mut stream)?;
        rustix::fs::fallocate(&fd, PUNCH, 0, PAGE).expect("it is not sealed yet");
        let taken = take_all();
        assert!(!taken.is_empty(), "not even the page of the hole");
        match ask(&mut stream, &Ask::Mapped { arena }) {
            Answer::Sealed => None,
            Answer::Failed { kind, message } => {
                assert_eq!(kind, FailureKind::Descriptor);
                assert!(message.contains("pages are missing"), "{message}");
                // And so nothing is ever put from it.
                let refused = put(&mut stream, arena);
                let invalid = matches!(
                    refused,
                    Answer::Failed {
                        kind: FailureKind::Invalid,
                        ..
                    }
                );
                assert!(invalid, "{refused:?}");
                Some(())
            }
            other => panic!("{other:?}"),
        }
    });

    // After the seals: there is no hole, and it can be put with the pool empty.
    let mut stream = connect();
    let (arena, fd) = eventually("a page is free", || arena(&mut stream));
    let sealed = ask(&mut stream, &Ask::Mapped { arena });
    assert!(matches!(sealed, Answer::Sealed), "{sealed:?}");
    let refused = rustix::fs::fallocate(&fd, PUNCH, 0, PAGE);
    assert_eq!(refused, Err(rustix::io::Errno::PERM));
    let _taken = take_all();
    let moved = put(&mut stream, arena);
    assert!(matches!(moved, Answer::Moved(_)), "{moved:?}");
    let listed = agent.json(&["ls"]);
    assert_eq!(listed[0]["bytes"], PAGE);
}
