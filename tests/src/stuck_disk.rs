//! A disk that does not answer any more: a FUSE file system that knows names and
//! sizes and the first bytes of one file. Once these were read, or a file was
//! made, it takes no question, so that whoever waits can be killed at least: of
//! one that it has taken, the kernel awaits the answer in any case.
//!
//! The protocol is that of `linux/fuse.h`, version 7.31, as far as it is asked.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mount::{MountFlags, UnmountFlags};

/// How the file is called that can be read a little.
pub const FILE: &str = "file";

const ROOT: u64 = 1;
const OLD: u64 = 2;
const NEW: u64 = 3;

/// For how many seconds the kernel need not ask again for size and mode.
const KEPT: u64 = 3600;

const NOT_FOUND: i32 = -2;
const NO_SUCH_CALL: i32 = -38;

/// Largest question: a write of 128 KiB, and its header.
const QUESTION_MAX: usize = (128 << 10) + 4096;
const HEADER_LEN: usize = 40;

/// A mounted one; dropped, it fails everybody who still waits for it.
#[derive(Debug)]
pub struct StuckDisk {
    folder: PathBuf,
    device: Arc<File>,
    stuck: Arc<AtomicBool>,
}

/// A file of `len` bytes, of which the first can be read.
#[derive(Clone, Debug)]
pub struct Known {
    /// Bytes at its beginning.
    pub head: Vec<u8>,
    /// Its size.
    pub len: u64,
}

impl StuckDisk {
    /// Mounts one on a folder; fails where this process may not.
    pub fn mount(folder: &Path, known: Known) -> io::Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let fd = device.as_raw_fd();
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other");
        let options = std::ffi::CString::new(options).expect("no zero bytes");
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount("stuck", folder, "fuse", flags, &*options)?;
        let disk = Self {
            folder: folder.to_owned(),
            device: Arc::new(device),
            stuck: Arc::default(),
        };
        let (device, stuck) = (Arc::clone(&disk.device), Arc::clone(&disk.stuck));
        std::thread::spawn(move || {
            let mut question = vec![0; QUESTION_MAX];
            // Or until it is unmounted.
            while let Ok(len) = (&*device).read(&mut question) {
                let question = &question[..len];
                let (answer, is_last) = answer(&known, question);
                stuck.store(is_last, Ordering::SeqCst);
                match answer {
                    Answer::None => {}
                    Answer::Error(error) => reply(&device, question, error, &[]),
                    Answer::Bytes(bytes) => reply(&device, question, 0, &bytes),
                }
                if is_last {
                    return;
                }
            }
        });
        Ok(disk)
    }

    /// Whether it has given its last answer.
    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::SeqCst)
    }
}

impl Drop for StuckDisk {
    fn drop(&mut self) {
        // Fails every question, with which the thread ends too.
        let _ = rustix::mount::unmount(&self.folder, UnmountFlags::FORCE | UnmountFlags::DETACH);
    }
}

enum Answer {
    /// It is not a question.
    None,
    Error(i32),
    Bytes(Vec<u8>),
}

/// What is said, and whether nothing is said after it.
fn answer(known: &Known, question: &[u8]) -> (Answer, bool) {
    let (operation, node) = (u32_at(question, 4), u64_at(question, 16));
    let body = &question[HEADER_LEN..];
    let mut is_last = false;
    let answer = match operation {
        LOOKUP if body == [FILE.as_bytes(), &[0]].concat() => Answer::Bytes(entry(known, OLD)),
        LOOKUP => Answer::Error(NOT_FOUND),
        FORGET | INTERRUPT | BATCH_FORGET => Answer::None,
        GETATTR | SETATTR => {
            let mut bytes = vec![0; 16];
            bytes[..8].copy_from_slice(&KEPT.to_ne_bytes());
            bytes.extend(attributes(known, node));
            Answer::Bytes(bytes)
        }
        OPEN => {
            is_last = known.head.is_empty();
            Answer::Bytes(opened())
        }
        CREATE => {
            is_last = true;
            Answer::Bytes([entry(known, NEW), opened()].concat())
        }
        READ => {
            let (from, len) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            let head = known.head.get(from..).unwrap_or_default();
            is_last = head.len() <= len;
            Answer::Bytes(head[..len.min(head.len())].to_vec())
        }
        INIT => Answer::Bytes(init()),
        RELEASE | FLUSH => Answer::Bytes(Vec::new()),
        _ => Answer::Error(NO_SUCH_CALL),
    };
    (answer, is_last)
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

fn reply(device: &File, question: &[u8], error: i32, body: &[u8]) {
    let mut bytes = Vec::new();
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend(error.to_ne_bytes());
    bytes.extend(&question[8..16]);
    bytes.extend(body);
    // Whoever asked may have gone.
    let _ = (&*device).write(&bytes);
}

/// `fuse_init_out`: version 7.31, writes of 128 KiB.
fn init() -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [7, 31, 0, 0, 0, 128 << 10, 1] {
        bytes.extend(u32::to_ne_bytes(word));
    }
    bytes.resize(64, 0);
    bytes
}

/// `fuse_open_out`: bytes go past the page cache, and closing waits for nothing.
fn opened() -> Vec<u8> {
    const DIRECT_IO: u32 = 1 << 0;
    const NO_FLUSH: u32 = 1 << 5;
    let mut bytes = vec![0; 16];
    bytes[8..12].copy_from_slice(&(DIRECT_IO | NO_FLUSH).to_ne_bytes());
    bytes
}

/// `fuse_entry_out`: attributes are kept, so that bytes are what is waited for.
fn entry(known: &Known, node: u64) -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes[..8].copy_from_slice(&node.to_ne_bytes());
    bytes[24..32].copy_from_slice(&KEPT.to_ne_bytes());
    bytes.extend(attributes(known, node));
    bytes
}

/// `fuse_attr`.
fn attributes(known: &Known, node: u64) -> Vec<u8> {
    let (size, mode) = match node {
        ROOT => (0, 0o40777),
        OLD => (known.len, 0o100666),
        _ => (0, 0o100666),
    };
    let mut bytes = Vec::new();
    for word in [node, size, 0, 0, 0, 0] {
        bytes.extend(u64::to_ne_bytes(word));
    }
    for word in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        bytes.extend(u32::to_ne_bytes(word));
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
