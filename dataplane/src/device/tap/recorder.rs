//! Frames on their way into a pcap file: a ring, and a thread that writes.
//!
//! The ring holds the file's own bytes, so the thread that writes knows nothing
//! of frames, and whole records enter it or none.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::memory::View;

/// What is recorded, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The file. Made by the recorder; one that exists is refused, whatever it is.
    pub file: PathBuf,
    /// Of each frame, so many bytes at most.
    pub snap_bytes: u32,
    /// Length of the file at most, in bytes.
    pub file_bytes: u64,
}

impl Options {
    /// For one queue of a device: the first has the file, another one beside it
    /// with its number behind the name.
    pub fn of_queue(&self, queue: u16) -> Self {
        let mut file = self.file.clone().into_os_string();
        if queue > 0 {
            file.push(format!(".{queue}"));
        }
        Self {
            file: file.into(),
            ..self.clone()
        }
    }
}

/// Why frames cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecorderError {
    /// The file cannot be made, or exists.
    #[error("cannot make {}: {source}; name a file that does not exist", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel refuses a thread.
    #[error("cannot start the thread that writes: {0}")]
    Thread(#[source] io::Error),
}

/// What was recorded so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapSnapshot {
    /// The file.
    pub file: PathBuf,
    /// Frames in it, or on their way.
    pub frames: u64,
    /// Bytes of the file with these.
    pub bytes: u64,
    /// Frames that are missing in it: they came faster than the disk takes them,
    /// or it takes no more.
    pub missed: u64,
    /// Frames that passed after it had its full length.
    pub after_end: u64,
    /// Why it cannot be written any more.
    pub error: Option<String>,
}

/// Records frames. May only be used from one thread.
///
/// Dropping it waits until all that was recorded is written.
#[derive(Debug)]
pub struct Recorder {
    options: Options,
    /// Dropped before the writer, which then ends.
    ring: rtrb::Producer<u8>,
    writer: Writer,
    snapshot: TapSnapshot,
}

/// What the records of some milliseconds come to where headers are kept of a
/// million frames a second.
const RING_BYTES: usize = 4 << 20;

/// How often the writer looks into the ring: often enough that a fast link
/// does not fill it between, and so seldom that it costs an idle agent nothing.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// One write at most, so that the ring has room again soon.
const WRITE_MOST: usize = 256 << 10;

/// <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html>, section 4:
/// timestamps in nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
const HEADER_LEN: usize = 24;

/// The same, section 5.
const RECORD_LEN: usize = 16;

/// Frames begin with an Ethernet header.
const LINK_ETHERNET: u32 = 1;

impl Recorder {
    /// Makes the file, readable by its owner alone, and starts to write.
    pub fn start(options: &Options) -> Result<Self, RecorderError> {
        let refused = |source| RecorderError::File {
            file: options.file.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .write(true)
            // Follows no link at the end of the path, either.
            .create_new(true)
            .mode(0o600)
            .open(&options.file)
            .map_err(refused)?;
        file.write_all(&header(options.snap_bytes))
            .map_err(refused)?;
        let (ring, records) = rtrb::RingBuffer::new(RING_BYTES);
        Ok(Self {
            options: options.clone(),
            ring,
            writer: Writer::start(file, records).map_err(RecorderError::Thread)?,
            snapshot: TapSnapshot {
                file: options.file.clone(),
                bytes: HEADER_LEN as u64,
                ..TapSnapshot::default()
            },
        })
    }

    /// Records a frame of these parts, or counts that it is missing.
    pub fn record(&mut self, at: SystemTime, parts: [View<'_>; 2]) {
        let len = parts[0].len() + parts[1].len();
        let kept = len.min(self.options.snap_bytes as usize);
        let bytes = self.snapshot.bytes + (RECORD_LEN + kept) as u64;
        if self.snapshot.after_end > 0 || bytes > self.options.file_bytes {
            self.snapshot.after_end += 1;
            return;
        }
        let Ok(mut chunk) = self.ring.write_chunk(RECORD_LEN + kept) else {
            self.snapshot.missed += 1;
            return;
        };
        let (first, second) = chunk.as_mut_slices();
        let mut into = Spread { first, second };
        into.put(View::from(&record(at, kept, len)[..]));
        for part in parts {
            into.put(part);
        }
        chunk.commit_all();
        self.snapshot.frames += 1;
        self.snapshot.bytes = bytes;
    }

    /// What was recorded so far.
    pub fn snapshot(&self) -> TapSnapshot {
        TapSnapshot {
            error: self.writer.error.get().cloned(),
            ..self.snapshot.clone()
        }
    }
}

impl fmt::Display for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options {
            file,
            snap_bytes,
            file_bytes,
        } = &self.options;
        write!(
            f,
            "the first {snap_bytes} bytes of every frame are recorded in {}, until it has \
             {file_bytes} bytes",
            file.display()
        )
    }
}

/// Room in a ring, which may go over its end.
struct Spread<'a> {
    first: &'a mut [u8],
    second: &'a mut [u8],
}

impl Spread<'_> {
    /// Copies as much as there is room for.
    fn put(&mut self, bytes: View<'_>) {
        let count = bytes.copy_to(self.first);
        self.first = &mut std::mem::take(&mut self.first)[count..];
        if let Some(rest) = bytes.slice(count..bytes.len())
            && !rest.is_empty()
        {
            let count = rest.copy_to(self.second);
            self.second = &mut std::mem::take(&mut self.second)[count..];
        }
    }
}

fn header(snap_bytes: u32) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4..6].copy_from_slice(&2u16.to_le_bytes());
    header[6..8].copy_from_slice(&4u16.to_le_bytes());
    header[16..20].copy_from_slice(&snap_bytes.to_le_bytes());
    header[20..24].copy_from_slice(&LINK_ETHERNET.to_le_bytes());
    header
}

fn record(at: SystemTime, kept: usize, len: usize) -> [u8; RECORD_LEN] {
    // A clock before 1970 is no clock.
    let at = at.duration_since(SystemTime::UNIX_EPOCH);
    let at = at.unwrap_or_default();
    let words = [
        at.as_secs() as u32,
        at.subsec_nanos(),
        kept as u32,
        len as u32,
    ];
    let mut record = [0; RECORD_LEN];
    for (bytes, word) in record.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    record
}

/// The thread that writes, joined on drop.
#[derive(Debug)]
struct Writer {
    thread: Option<JoinHandle<()>>,
    error: Arc<OnceLock<String>>,
}

impl Writer {
    fn start(mut file: File, mut records: rtrb::Consumer<u8>) -> io::Result<Self> {
        let error = Arc::new(OnceLock::new());
        let said = Arc::clone(&error);
        let body = move || {
            if let Err(error) = write(&mut file, &mut records) {
                tracing::error!(%error, "frames are recorded no more: the file cannot be written");
                let _ = said.set(error.to_string());
            }
        };
        let thread = thread::Builder::new()
            .name("genie-tap".into())
            .spawn(body)?;
        Ok(Self {
            thread: Some(thread),
            error,
        })
    }
}

/// Writes until nobody records any more.
fn write(file: &mut impl Write, records: &mut rtrb::Consumer<u8>) -> io::Result<()> {
    loop {
        // Asked before looking: nothing comes after that.
        let last = records.is_abandoned();
        let there = records.slots().min(WRITE_MOST);
        let Ok(chunk) = records.read_chunk(there) else {
            continue;
        };
        let (first, second) = chunk.as_slices();
        file.write_all(first)?;
        file.write_all(second)?;
        chunk.commit_all();
        if there == 0 && last {
            return Ok(());
        }
        if there == 0 {
            thread::park_timeout(LOOK_EVERY);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the thread that records frames panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes some bytes, then none.
    struct FullDisk(usize);

    impl Write for FullDisk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            match taken {
                0 if !bytes.is_empty() => Err(io::ErrorKind::StorageFull.into()),
                _ => Ok(taken),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_queue_of_a_device_has_a_file() {
        let options = Options {
            file: "/x/a.pcap".into(),
            snap_bytes: 128,
            file_bytes: 1 << 20,
        };
        assert_eq!(options.of_queue(0), options);
        assert_eq!(options.of_queue(2).file, PathBuf::from("/x/a.pcap.2"));
    }

    #[test]
    fn a_full_disk_ends_the_writer_with_its_reason() {
        let (mut ring, mut records) = rtrb::RingBuffer::new(64);
        ring.push_entire_slice(&[7; 40]).unwrap();
        let error = write(&mut FullDisk(30), &mut records).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let mut records = records;
        drop(ring);
        assert!(write(&mut FullDisk(40), &mut records).is_ok());
    }

    #[test]
    fn a_record_goes_over_the_end_of_the_ring() {
        let (mut first, mut second) = ([0; 3], [0; 5]);
        let mut into = Spread {
            first: &mut first,
            second: &mut second,
        };
        for part in [&b"ab"[..], b"cdef", b"", b"gh"] {
            into.put(View::from(part));
        }
        assert_eq!((&first, &second), (b"abc", b"defgh"));
    }
}
