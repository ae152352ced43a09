//! A device whose frames are recorded in a pcap file, in both directions.
//!
//! Wraps any other device; an agent's port is always wrapped, and recorded only
//! where its operator asked for it. The invariant: *the engine's thread never
//! waits for the file*; what does not fit into the ring to the thread that
//! writes is counted, and missing in the file.

#![forbid(unsafe_code)]

mod recorder;

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::time::SystemTime;

use super::{AttachError, Attachment, Capabilities, Counters, Device, FrameId, Steering, TxFrame};
use crate::ledger::Copies;
use crate::memory::{Lease, View};

pub use recorder::{Options, Recorder, RecorderError, TapSnapshot};

/// A device around another one. May only be used from the thread that uses that.
#[derive(Debug)]
pub struct TapDevice<D> {
    inner: D,
    recorder: Option<Recorder>,
    /// What whoever asked for the record should know.
    caution: Option<String>,
    /// What frames may refer to, for the bytes behind their heads.
    leases: HashMap<Attachment, Lease>,
}

impl<D: Device> TapDevice<D> {
    /// Wraps `inner`. Without a recorder nothing is recorded; where one was
    /// wanted and could not be made, [`Device::cautions`] says why.
    pub fn new(inner: D, recorder: Option<Result<Recorder, RecorderError>>) -> Self {
        let (recorder, caution) = match recorder {
            None => (None, None),
            Some(Ok(recorder)) => {
                let caution = recorder.to_string();
                (Some(recorder), Some(caution))
            }
            Some(Err(error)) => (None, Some(format!("frames are not recorded: {error}"))),
        };
        Self {
            inner,
            recorder,
            caution,
            leases: HashMap::new(),
        }
    }
}

/// The bytes of a frame that is sent: its head, and what it refers to.
fn parts<'a>(leases: &'a HashMap<Attachment, Lease>, frame: &'a TxFrame) -> [View<'a>; 2] {
    let payload = frame.payload.and_then(|payload| {
        let start = usize::try_from(payload.offset).ok()?;
        let end = start.checked_add(payload.len as usize)?;
        leases.get(&payload.attachment)?.view(start..end)
    });
    [View::from(&frame.head[..]), payload.unwrap_or_default()]
}

impl<D: Device> Device for TapDevice<D> {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        let Some(recorder) = &mut self.recorder else {
            return self.inner.rx_burst(on_frame);
        };
        // Read once a burst, and not by a poll that finds nothing.
        let mut now = None;
        self.inner.rx_burst(&mut |frame| {
            let now = *now.get_or_insert_with(SystemTime::now);
            recorder.record(now, [frame, View::default()]);
            on_frame(frame);
        })
    }

    fn keepable(&self) -> u32 {
        self.inner.keepable()
    }

    fn rx_burst_keeping(
        &mut self,
        on_frame: &mut dyn FnMut(View<'_>, Option<FrameId>) -> bool,
    ) -> usize {
        let Some(recorder) = &mut self.recorder else {
            return self.inner.rx_burst_keeping(on_frame);
        };
        let mut now = None;
        self.inner.rx_burst_keeping(&mut |frame, id| {
            let now = *now.get_or_insert_with(SystemTime::now);
            recorder.record(now, [frame, View::default()]);
            on_frame(frame, id)
        })
    }

    fn kept(&self, frame: FrameId) -> View<'_> {
        self.inner.kept(frame)
    }

    fn give_back(&mut self, frame: FrameId) {
        self.inner.give_back(frame);
    }

    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        let Some(recorder) = &mut self.recorder else {
            return self.inner.tx_burst(frames);
        };
        // Before the other end can have received them.
        let now = SystemTime::now();
        let taken = self.inner.tx_burst(frames);
        for frame in &frames[..taken] {
            recorder.record(now, parts(&self.leases, frame));
        }
        taken
    }

    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        if self.recorder.is_none() {
            return self.inner.attach(lease);
        }
        let attachment = self.inner.attach(lease.clone())?;
        self.leases.insert(attachment, lease);
        Ok(attachment)
    }

    fn detach(&mut self, attachment: Attachment) -> bool {
        let detached = self.inner.detach(attachment);
        if detached {
            self.leases.remove(&attachment);
        }
        detached
    }

    fn reap(&mut self) {
        self.inner.reap();
    }

    fn sweep(&mut self) {
        self.inner.sweep();
    }

    fn stop(&mut self) {
        self.inner.stop();
    }

    fn is_stopped(&self) -> bool {
        self.inner.is_stopped()
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }

    fn cautions(&self) -> Vec<String> {
        let mut cautions = self.inner.cautions();
        cautions.extend(self.caution.clone());
        cautions
    }

    fn lacks(&self) -> Vec<String> {
        self.inner.lacks()
    }

    fn copies(&self) -> Copies {
        self.inner.copies()
    }

    fn steering(&self) -> Option<Steering> {
        self.inner.steering()
    }

    fn passed_event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.passed_event()
    }

    fn tap(&self) -> Option<TapSnapshot> {
        self.recorder.as_ref().map(Recorder::snapshot)
    }

    fn link_up(&self) -> bool {
        self.inner.link_up()
    }

    fn rx_event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.rx_event()
    }

    fn arm_rx(&mut self, on: bool) -> bool {
        self.inner.arm_rx(on)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::device::Payload;
    use crate::device::pair::{self, PairDevice, pair};
    use crate::memory::{Backing, Region};

    fn options(folder: &Path, snap_bytes: u32, file_bytes: u64) -> Options {
        Options {
            file: folder.join("frames.pcap"),
            snap_bytes,
            file_bytes,
        }
    }

    /// A device with a recorder, the device it talks to, and what it sends from.
    fn tapped(options: &Options) -> (TapDevice<PairDevice>, PairDevice, Attachment) {
        let (a, b) = pair(&pair::Options::default());
        let mut a = TapDevice::new(a, Some(Recorder::start(options)));
        let lease = Lease::whole(Region::with_backing(4096, Backing::Shmem).unwrap());
        lease.write_at(0, View::from(&b"a tensor"[..]));
        let attachment = a.attach(lease).unwrap();
        (a, b, attachment)
    }

    fn frame(head: &[u8], payload: Option<(Attachment, u32)>) -> TxFrame {
        let mut frame = TxFrame::default();
        frame.head.try_extend_from_slice(head).unwrap();
        frame.payload = payload.map(|(attachment, len)| Payload {
            attachment,
            offset: 2,
            len,
        });
        frame
    }

    /// Reads a file back as the format has it: each frame's time in nanoseconds
    /// since 1970, its kept bytes and its length.
    fn read(options: &Options) -> Vec<(u128, Vec<u8>, usize)> {
        let file = std::fs::read(&options.file).unwrap();
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        // Nanoseconds, version 2.4, no zone, accuracy, snap length, Ethernet.
        let header = [0, 4, 8, 12, 16, 20].map(word);
        assert_eq!(
            header,
            [0xa1b2_3c4d, 4 << 16 | 2, 0, 0, options.snap_bytes, 1]
        );
        let mut frames = Vec::new();
        let mut at = 24;
        while at < file.len() {
            let time = u128::from(word(at)) * 1_000_000_000 + u128::from(word(at + 4));
            let (kept, len) = (word(at + 8) as usize, word(at + 12) as usize);
            frames.push((time, file[at + 16..at + 16 + kept].to_vec(), len));
            at += 16 + kept;
        }
        assert_eq!(at, file.len(), "no record is cut");
        frames
    }

    #[test]
    fn frames_of_both_directions_are_recorded_up_to_the_snap_length() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path(), 8, 1 << 20);
        let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos();
        let begin = now();
        let (mut a, mut b, attachment) = tapped(&options);
        let sent = [
            frame(b"head ", Some((attachment, 6))),
            frame(b"a head of its own", None),
        ];
        assert_eq!(a.tx_burst(&sent), 2);
        assert_eq!(b.rx_burst(&mut |_| {}), 2);
        assert_eq!(b.tx_burst(&[frame(b"back", None)]), 1);
        let mut received = 0;
        assert_eq!(a.rx_burst(&mut |view| received += view.len()), 1);
        assert_eq!(received, 4);
        let snapshot = a.tap().expect("it records");
        assert_eq!(
            (snapshot.frames, snapshot.missed, snapshot.after_end),
            (3, 0, 0)
        );
        assert_eq!(snapshot.bytes, 24 + 3 * 16 + 8 + 8 + 4);
        assert!(a.detach(attachment));
        assert!(a.leases.is_empty());
        assert!(a.cautions().iter().any(|one| one.contains("frames.pcap")));
        // Waits until all is written.
        drop(a);
        let end = now();
        let frames = read(&options);
        let kept: Vec<(&[u8], usize)> = frames
            .iter()
            .map(|(_, kept, len)| (&kept[..], *len))
            .collect();
        let expected: [(&[u8], usize); 3] = [(b"head ten", 11), (b"a head o", 17), (b"back", 4)];
        assert_eq!(kept, expected);
        let times = frames.iter().map(|(time, _, _)| *time);
        assert!(times.clone().is_sorted());
        assert!(times.into_iter().all(|time| begin <= time && time <= end));
    }

    #[test]
    fn a_full_file_ends_with_a_whole_frame_and_the_rest_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        // Room for the header and two frames, and not for a third.
        let options = options(folder.path(), 64, 24 + 2 * (16 + 7) + 22);
        let (mut a, mut b, _) = tapped(&options);
        for _ in 0..5 {
            assert_eq!(a.tx_burst(&[frame(b"seven b", None)]), 1);
        }
        // Shorter, and it would fit: but then the file had a hole.
        assert_eq!(a.tx_burst(&[frame(b"6 byte", None)]), 1);
        assert_eq!(b.rx_burst(&mut |_| {}), 6, "the device goes on");
        let snapshot = a.tap().unwrap();
        assert_eq!(
            (snapshot.frames, snapshot.missed, snapshot.after_end),
            (2, 0, 4)
        );
        drop(a);
        assert_eq!(read(&options).len(), 2);
    }

    #[test]
    fn frames_that_the_writer_cannot_keep_up_with_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path(), 9000, 1 << 30);
        let (mut a, mut b, attachment) = tapped(&options);
        let sent = vec![frame(b"head", Some((attachment, 4000))); 32];
        let mut total = 0;
        // The writer wakes up now and then; a burst takes microseconds.
        while a.tap().unwrap().missed == 0 {
            assert_eq!(a.tx_burst(&sent), 32);
            assert_eq!(b.rx_burst(&mut |_| {}), 32);
            total += 32;
            assert!(total < 1 << 18, "a gibibyte, and the ring never filled");
        }
        let snapshot = a.tap().unwrap();
        assert_eq!(snapshot.frames + snapshot.missed, total);
        drop(a);
        let frames = read(&options);
        assert_eq!(frames.len() as u64, snapshot.frames);
        assert!(
            frames
                .iter()
                .all(|(_, kept, _)| kept.starts_with(b"headtensor"))
        );
    }

    #[test]
    fn a_file_that_exists_is_left_alone_and_the_device_works_on() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path(), 64, 1 << 20);
        let precious = folder.path().join("precious");
        std::fs::write(&precious, "kept").unwrap();
        std::os::unix::fs::symlink(&precious, &options.file).unwrap();
        let (mut a, mut b, attachment) = tapped(&options);
        assert!(a.tap().is_none());
        let caution = a.cautions().join("\n");
        assert!(caution.contains("frames are not recorded"), "{caution}");
        assert!(caution.contains("frames.pcap"), "{caution}");
        assert_eq!(a.tx_burst(&[frame(b"x", Some((attachment, 1)))]), 1);
        assert_eq!(b.rx_burst(&mut |_| {}), 1);
        assert_eq!(std::fs::read(&precious).unwrap(), b"kept");
    }

    #[test]
    fn the_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path(), 64, 1 << 20);
        let _recorder = Recorder::start(&options).unwrap();
        let mode = std::fs::metadata(&options.file).unwrap().permissions();
        assert_eq!(mode.mode() & 0o7777, 0o600);
    }
}
