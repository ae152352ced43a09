//! `pair:SOCKET`: the local stand-in for a NIC between two processes.
//!
//! Both processes are given the same path. Each end has a lock file beside the
//! socket, and a process becomes the first end whose lock it gets:
//!
//! | end | lock | device | opening it |
//! |---|---|---|---|
//! | first | `SOCKET.vhost` | vhost, `client=1` | returns at once; the link is down until the other end is there |
//! | second | `SOCKET.virtio` | virtio_user, `server=1` | waits inside the driver until vhost has connected, at most 1 s as that tries once a second |
//!
//! These are the roles in which either process may die and come back (the
//! kernel drops its locks, so it becomes the same end again): vhost as client
//! reconnects, and virtio_user as server takes it back. With vhost as server a
//! surviving virtio_user never carries traffic again. The other order (the
//! first process virtio_user) would keep it from starting until the second is
//! there.
//!
//! Found by experiment with DPDK 22.11.11:
//! - virtio_user says it takes an MTU of at most 9698; 9000 is used. It cannot
//!   refer to memory outside DPDK's heap, so it copies payloads into packets.
//!   vhost refers to any memory, and does the copying between the processes.
//! - [`DESCRIPTORS`] each way: vhost has no ring of its own and works with
//!   virtio_user's, which must be a power of two (`queue_size`).
//! - A full ring refuses frames, and loses none.
//! - virtio_user takes a peer back from the EAL's interrupt thread, if the port
//!   was configured with link interrupts (the library does); without them only
//!   when somebody asks for the link. With them no survivor aborted, in some
//!   forty kills of either end, half of them in the middle of traffic.
//! - Either end's link goes down at once when the peer is killed, and up again
//!   up to 1 s after it came back. Frames in the rings at that moment are sent
//!   again or lost, as on a wire.
//! - A killed virtio_user leaves its socket, which no server can bind again;
//!   the holder of the second lock removes it first.
//!
//! The lock files hold their holders' numbers of queues, which must be equal: of
//! two ends that differ, DPDK lets the queues that only one has carry nothing,
//! without an error. They stay: another process may have one open and be about
//! to lock it, and would then hold the lock of a file that is gone.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::FlockOperation;

/// Which end of a pair this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The first process: vhost.
    Vhost,
    /// The second process: virtio_user.
    VirtioUser,
}

/// Why a process cannot be an end of a pair.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// Two other processes are the ends.
    #[error("pair:{} joins two other processes already", .0.display())]
    Taken(PathBuf),
    /// A lock file cannot be made.
    #[error("cannot make {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The other end has another number of queues: some would carry nothing.
    #[error(
        "the other end of pair:{} has {theirs} queues, not {ours}: give both ends the same --queues",
        socket.display()
    )]
    Queues {
        /// The socket.
        socket: PathBuf,
        /// Queues of the living end.
        theirs: u16,
        /// Queues of this one.
        ours: u16,
    },
    /// What a killed process left cannot be removed.
    #[error("cannot remove {}, which a process that is gone left behind", path.display())]
    Stale {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A claim on one end of a pair; given up on drop, or by the kernel.
#[derive(Debug)]
pub struct Claim {
    end: End,
    socket: PathBuf,
    _lock: File,
}

/// Frames in each ring of a pair. Their buffers are written by one core and read
/// by another, again and again, and 256 of 9 KiB are about a second-level cache:
/// rings of 1024 carried 15 to 20 % less.
pub const DESCRIPTORS: u16 = 256;

impl Claim {
    /// Claims the first end that is free, for a device of so many queues.
    pub fn take(socket: &Path, queues: u16) -> Result<Self, PairError> {
        for end in [End::Vhost, End::VirtioUser] {
            let Some(lock) = try_lock(&end.lock_path(socket))? else {
                continue;
            };
            end.other().check_queues(socket, queues)?;
            note_queues(&lock, queues).map_err(|source| PairError::Lock {
                path: end.lock_path(socket),
                source,
            })?;
            let claim = Self {
                end,
                socket: socket.into(),
                _lock: lock,
            };
            if end == End::VirtioUser {
                claim.remove_socket()?;
            }
            return Ok(claim);
        }
        Err(PairError::Taken(socket.into()))
    }

    /// Which end it is.
    pub fn end(&self) -> End {
        self.end
    }

    /// The device for DPDK, with so many queues of rings of `descriptors` frames.
    pub fn devargs(&self, descriptors: u16, queues: u16) -> String {
        let socket = self.socket.display();
        match self.end {
            End::Vhost => format!("net_vhost0,iface={socket},client=1,queues={queues}"),
            End::VirtioUser => {
                let size = descriptors.next_power_of_two();
                format!("net_virtio_user0,path={socket},server=1,queues={queues},queue_size={size}")
            }
        }
    }

    /// Lets the driver wait for the other end no longer than `limit`: after
    /// that it is connected to by somebody who hangs up, and so fails.
    pub(super) fn limit_wait(&self, limit: Duration) -> Option<WaitLimit> {
        (self.end == End::VirtioUser).then(|| WaitLimit::start(self.socket.clone(), limit))
    }

    /// Only called while the second lock is held: no server is alive.
    fn remove_socket(&self) -> Result<(), PairError> {
        match std::fs::remove_file(&self.socket) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(PairError::Stale {
                path: self.socket.clone(),
                source,
            }),
            _ => Ok(()),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.end == End::VirtioUser {
            // The next holder of the lock removes what this cannot.
            let _ = self.remove_socket();
        }
    }
}

impl End {
    fn other(self) -> Self {
        match self {
            End::Vhost => End::VirtioUser,
            End::VirtioUser => End::Vhost,
        }
    }

    /// Refuses if this end is somebody's who lives, with another number of queues.
    fn check_queues(self, socket: &Path, ours: u16) -> Result<(), PairError> {
        let path = self.lock_path(socket);
        let mut options = OpenOptions::new();
        let Ok(file) = options.read(true).custom_flags(libc::O_NOFOLLOW).open(path) else {
            return Ok(());
        };
        let mut text = String::new();
        // More than the longest number; what is no number was not noted here.
        let _ = (&file).take(16).read_to_string(&mut text);
        let Ok(theirs) = text.trim().parse::<u16>() else {
            return Ok(());
        };
        // Looked at only where the numbers differ: whoever is about to take this
        // end would find it locked.
        let held = || {
            let lock = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
            lock == Err(rustix::io::Errno::WOULDBLOCK)
        };
        if theirs != ours && held() {
            let socket = socket.into();
            return Err(PairError::Queues {
                socket,
                theirs,
                ours,
            });
        }
        Ok(())
    }

    fn lock_path(self, socket: &Path) -> PathBuf {
        let suffix = match self {
            End::Vhost => ".vhost",
            End::VirtioUser => ".virtio",
        };
        let mut path = socket.as_os_str().to_owned();
        path.push(suffix);
        path.into()
    }
}

/// Notes in a lock file how many queues its holder has.
fn note_queues(mut lock: &File, queues: u16) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{queues}")
}

/// Opens and locks a file; `None` if another process holds the lock.
fn try_lock(path: &Path) -> Result<Option<File>, PairError> {
    let failed = |source| PairError::Lock {
        path: path.into(),
        source,
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Ends a wait inside the virtio_user driver, which has no limit of its own.
#[derive(Debug)]
pub(super) struct WaitLimit {
    done: Sender<()>,
    thread: JoinHandle<bool>,
}

impl WaitLimit {
    fn start(socket: PathBuf, limit: Duration) -> Self {
        let (done, opened) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            if opened.recv_timeout(limit) != Err(RecvTimeoutError::Timeout) {
                return false;
            }
            // Again and again: the driver may not have made its socket yet.
            while opened.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout)
            {
                let _ = UnixStream::connect(&socket);
            }
            true
        });
        Self { done, thread }
    }

    /// Ends the watch; whether the wait had to be cut short.
    pub(super) fn finish(self) -> bool {
        let Self { done, thread } = self;
        drop(done);
        thread.join().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_vhost_the_second_virtio_user_and_a_third_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("pair");
        let first = Claim::take(&socket, 1).unwrap();
        let second = Claim::take(&socket, 1).unwrap();
        assert_eq!((first.end(), second.end()), (End::Vhost, End::VirtioUser));
        assert!(matches!(Claim::take(&socket, 1), Err(PairError::Taken(_))));
        // Whichever goes comes back as what it was.
        drop(first);
        assert_eq!(Claim::take(&socket, 1).unwrap().end(), End::Vhost);
        let _first = Claim::take(&socket, 1).unwrap();
        drop(second);
        assert_eq!(Claim::take(&socket, 1).unwrap().end(), End::VirtioUser);
    }

    #[test]
    fn the_second_removes_a_socket_that_was_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("pair");
        std::fs::write(&socket, b"").unwrap();
        let _first = Claim::take(&socket, 1).unwrap();
        assert!(socket.exists(), "it may be a living server's");
        let _second = Claim::take(&socket, 1).unwrap();
        assert!(!socket.exists());
    }

    #[test]
    fn ends_with_different_numbers_of_queues_are_refused_while_both_live() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("pair");
        let first = Claim::take(&socket, 2).unwrap();
        let refused = Claim::take(&socket, 12).unwrap_err();
        let PairError::Queues { theirs, ours, .. } = refused else {
            panic!("{refused}");
        };
        assert_eq!((theirs, ours), (2, 12));
        let second = Claim::take(&socket, 2).unwrap();
        // What a killed process noted does not count.
        drop((first, second));
        let _first = Claim::take(&socket, 1).unwrap();
        assert_eq!(Claim::take(&socket, 1).unwrap().end(), End::VirtioUser);
    }

    #[test]
    fn a_lock_that_cannot_be_made_is_an_error() {
        let refused = Claim::take(Path::new("/nonexistent/pair"), 1);
        assert!(matches!(refused, Err(PairError::Lock { .. })));
    }

    #[test]
    fn a_wait_is_cut_short_only_after_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("pair");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let limit = WaitLimit::start(socket.clone(), Duration::from_secs(60));
        assert!(!limit.finish());
        let limit = WaitLimit::start(socket, Duration::from_millis(1));
        // Returns only because the limit connects.
        listener.accept().unwrap();
        assert!(limit.finish());
    }
}
