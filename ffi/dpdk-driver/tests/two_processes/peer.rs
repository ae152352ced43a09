//! One of the two processes: opens a port and does what its stdin says.
//!
//! A command a line, an answer a line. Frames carry their number and lengths,
//! so that the receiver knows every byte it must see.

use std::ffi::CString;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use genie_dpdk_abi::{
    Api, BURST_MAX, EalConfig, Port, PortConfig, PortInfo, PortStats, RxFrame, STATUS_OK, Text,
    TxFrame,
};

use crate::allocations::{counted, inside_bursts};

/// Ethernet header, frame number, length of the head, offset and length of the payload.
const HEAD_MIN: usize = 14 + 8 + 4 + 4 + 4;
const REGION_BYTES: usize = 1 << 20;
/// How long to wait for frames before giving up.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing must come for the sender to be done.
const QUIET: Duration = Duration::from_millis(1500);

struct Peer {
    api: &'static Api,
    port: *mut Port,
    info: PortInfo,
    region: Vec<u8>,
    attachment: u32,
    sent: u64,
}

/// Runs until stdin ends. `devargs` is DPDK's name of the device.
pub(crate) fn run(devargs: &str, no_huge: bool) -> ! {
    // A peer that waits inside a driver sees no end of its stdin.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .expect("a signal that exists");
    let mut peer = open(devargs, no_huge);
    let driver = peer.info.driver_name().to_owned();
    answer(&format!(
        "open {driver} mtu {} caps {:#x}",
        peer.info.mtu, peer.info.caps
    ));
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("stdin is a pipe");
        let mut words = line.split(' ');
        let command = words.next().unwrap_or_default();
        let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
        match (command, &numbers[..]) {
            ("send", [count, head, payload]) => peer.send(*count, *head, *payload),
            ("receive", [count]) => peer.receive(*count, PATIENCE),
            ("drain", []) => peer.receive(usize::MAX, QUIET),
            ("poll", [millis]) => peer.poll(Duration::from_millis(*millis as u64)),
            ("doze", [millis]) => peer.doze(Duration::from_millis(*millis as u64)),
            ("stray", []) => peer.stray(),
            ("stats", []) => peer.stats(),
            ("detach", []) => peer.detach(),
            ("link", [up]) => peer.link(*up == 1),
            ("close", []) => peer.close(),
            _ => panic!("no such command: {line}"),
        }
    }
    std::process::exit(0)
}

fn answer(text: &str) {
    println!("{text}");
    std::io::stdout().flush().expect("stdout is a pipe");
}

fn fail(what: &str, text: &Text) -> ! {
    answer(&format!("failed {what}: {}", text.as_str()));
    std::process::exit(1)
}

fn open(devargs: &str, no_huge: bool) -> Peer {
    // SAFETY: the table is valid for ever.
    let api = unsafe { &*genie_dpdk::genie_dpdk_api() };
    let mut text = Text::EMPTY;
    let prefix = CString::new(format!("genie-test-{}", std::process::id())).unwrap();
    let eal = EalConfig {
        file_prefix: prefix.as_ptr(),
        pci_allow: std::ptr::null(),
        memory_mib: 192,
        no_huge: no_huge.into(),
    };
    // SAFETY: configuration and text live through the call.
    if unsafe { (api.eal_init)(&eal, &mut text) } != STATUS_OK {
        fail("eal", &text);
    }
    // SAFETY: as above.
    let status = unsafe { (api.thread_register)(&mut text) };
    assert_eq!(status, STATUS_OK, "{}", text.as_str());
    let devargs = CString::new(devargs).unwrap();
    let config = PortConfig {
        devargs: devargs.as_ptr(),
        rx_descriptors: 1024,
        tx_descriptors: 1024,
        mtu: 9000,
        queues: 1,
        first_udp_port: 0,
        reserved: 0,
        spare_mbufs: 1024,
        attachments: 4,
    };
    let mut port = std::ptr::null_mut();
    // SAFETY: all three live through the call.
    if unsafe { (api.port_open)(&config, &mut port, &mut text) } != STATUS_OK {
        fail("open", &text);
    }
    let mut info = std::mem::MaybeUninit::uninit();
    // SAFETY: an open port; `info` is written.
    let status = unsafe { (api.port_info)(port, info.as_mut_ptr()) };
    assert_eq!(status, STATUS_OK);
    // SAFETY: written by the call above.
    let info = unsafe { info.assume_init() };
    let region: Vec<u8> = (0..REGION_BYTES).map(region_byte).collect();
    // SAFETY: the region lives as long as the peer and never moves.
    let attachment =
        unsafe { (api.ext_attach)(port, region.as_ptr(), REGION_BYTES as u64, &mut text) };
    assert_eq!(attachment, 0, "{}", text.as_str());
    Peer {
        api,
        port,
        info,
        region,
        attachment: 0,
        sent: 0,
    }
}

fn region_byte(at: usize) -> u8 {
    ((at as u32).wrapping_mul(2_654_435_761) >> 21) as u8
}

fn head_byte(number: u64, at: usize) -> u8 {
    (number as usize).wrapping_mul(31).wrapping_add(at * 7) as u8
}

impl Peer {
    /// Writes head number `number` and returns the payload's offset.
    fn fill(&self, head: &mut [u8], number: u64, payload: usize) -> usize {
        let offset = (number as usize * 4099) % (REGION_BYTES - payload.max(1));
        for (at, byte) in head.iter_mut().enumerate() {
            *byte = head_byte(number, at);
        }
        head[..6].fill(0xff);
        head[6..12].copy_from_slice(&self.info.mac);
        head[12..14].copy_from_slice(&0x88b5u16.to_be_bytes());
        head[14..22].copy_from_slice(&number.to_le_bytes());
        let head_len = head.len() as u32;
        head[22..26].copy_from_slice(&head_len.to_le_bytes());
        head[26..30].copy_from_slice(&(offset as u32).to_le_bytes());
        head[30..34].copy_from_slice(&(payload as u32).to_le_bytes());
        offset
    }

    fn send(&mut self, count: usize, head_len: usize, payload_len: usize) {
        assert!(head_len >= HEAD_MIN);
        let mut heads = vec![vec![0; head_len]; BURST_MAX];
        let (mut left, mut last) = (count, Instant::now());
        while left > 0 {
            let batch = left.min(BURST_MAX);
            let frames: Vec<TxFrame> = (0..batch)
                .map(|i| {
                    let offset = self.fill(&mut heads[i], self.sent + i as u64, payload_len);
                    TxFrame {
                        head: heads[i].as_ptr(),
                        payload: self.region[offset..].as_ptr(),
                        head_len: head_len as u32,
                        payload_len: payload_len as u32,
                        attachment: self.attachment,
                        reserved: 0,
                    }
                })
                .collect();
            // SAFETY: heads live through the call, the region until the end.
            let send = || unsafe { (self.api.tx_burst)(self.port, frames.as_ptr(), batch as u32) };
            let taken = counted(send);
            left -= taken as usize;
            self.sent += u64::from(taken);
            if taken > 0 {
                last = Instant::now();
            } else if last.elapsed() > PATIENCE {
                break;
            }
        }
        // What the ring had no room for is only sent by a further call.
        while self.raw_stats().tx_pending > 0 && last.elapsed() < PATIENCE {
            // SAFETY: an open port.
            unsafe { (self.api.tx_reap)(self.port) };
        }
        answer(&format!(
            "sent {} pending {}",
            count - left,
            self.raw_stats().tx_pending
        ));
    }

    /// Sends frames that name memory which is not attached, and nothing else.
    fn stray(&mut self) {
        let mut head = vec![0; 64];
        self.fill(&mut head, 0, 0);
        let end = self.region.as_ptr_range().end;
        let stray = |payload, payload_len, attachment| TxFrame {
            head: head.as_ptr(),
            payload,
            head_len: 64,
            payload_len,
            attachment,
            reserved: 0,
        };
        let frames = [
            stray(end.wrapping_sub(1), 2, 0),
            stray(self.region.as_ptr().wrapping_sub(1), 2, 0),
            stray(self.region.as_ptr(), 2, 1),
            stray(self.region.as_ptr(), 2, u32::MAX),
            stray(std::ptr::null(), 1, 0),
            stray(self.region.as_ptr(), 70_000, 0),
            stray(self.region.as_ptr(), 9000 + 14 - 64 + 1, 0),
        ];
        // SAFETY: the head lives through the call; nothing else is touched.
        let taken = unsafe { (self.api.tx_burst)(self.port, frames.as_ptr(), frames.len() as u32) };
        answer(&format!(
            "strays {taken} errors {}",
            self.raw_stats().tx_errors
        ));
    }

    fn burst(&mut self) -> (usize, usize, usize) {
        let nothing = RxFrame {
            mbuf: std::ptr::null_mut(),
            data: std::ptr::null(),
            data_len: 0,
            frame_len: 0,
            payload: std::ptr::null(),
            payload_len: 0,
            reserved: 0,
        };
        let mut frames = [nothing; BURST_MAX];
        // SAFETY: room for a burst.
        let receive =
            || unsafe { (self.api.rx_burst)(self.port, frames.as_mut_ptr(), BURST_MAX as u32) };
        let count = counted(receive);
        let frames = &frames[..count as usize];
        let (mut bad, mut bytes) = (0, 0);
        for frame in frames {
            // SAFETY: the port gave us these bytes, and the peer is done with them.
            let data = unsafe { std::slice::from_raw_parts(frame.data, frame.data_len as usize) };
            bad += usize::from(frame.data_len != frame.frame_len || !is_intact(data));
            bytes += data.len();
        }
        // SAFETY: received above, freed once.
        counted(|| unsafe { (self.api.rx_free)(self.port, frames.as_ptr(), count) });
        (frames.len(), bad, bytes)
    }

    /// Receives `wanted` frames, or until no more came for `quiet`.
    fn receive(&mut self, wanted: usize, quiet: Duration) {
        let (mut count, mut bad, mut bytes, mut last) = (0, 0, 0, Instant::now());
        while count < wanted && last.elapsed() < if count == 0 { PATIENCE } else { quiet } {
            let burst = self.burst();
            if burst.0 > 0 {
                last = Instant::now();
            }
            count += burst.0;
            bad += burst.1;
            bytes += burst.2;
        }
        answer(&format!("received {count} bad {bad} bytes {bytes}"));
    }

    /// Receives and reaps for a while, whatever comes.
    fn poll(&mut self, time: Duration) {
        let (end, mut count, mut bad) = (Instant::now() + time, 0, 0);
        while Instant::now() < end {
            let burst = self.burst();
            count += burst.0;
            bad += burst.1;
            // SAFETY: an open port.
            unsafe { (self.api.tx_reap)(self.port) };
        }
        answer(&format!("polled {count} bad {bad}"));
    }

    /// Sleeps until the port reports a frame, at most so long.
    fn doze(&mut self, limit: Duration) {
        use rustix::event::{Timespec, epoll};
        // SAFETY: an open port.
        let fd = unsafe { (self.api.rx_wait_fd)(self.port) };
        assert!(fd >= 0, "no descriptor: {fd}");
        // SAFETY: the port's own, and it stays open.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&set, fd, epoll::EventData::new_u64(0), flags).unwrap();
        let mut events = Vec::with_capacity(1);
        // What was reported before is not news.
        let buffer = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&set, buffer, Some(&Timespec::default())).unwrap();
        // SAFETY: an open port.
        let status = unsafe { (self.api.rx_interrupt)(self.port, 1) };
        assert_eq!(status, STATUS_OK);
        let there = self.burst().0;
        answer(&format!("dozing {there}"));
        events.clear();
        let buffer = rustix::buffer::spare_capacity(&mut events);
        let limit = Timespec::try_from(limit).unwrap();
        let woken = epoll::wait(&set, buffer, Some(&limit)).unwrap();
        // SAFETY: an open port.
        let status = unsafe { (self.api.rx_interrupt)(self.port, 0) };
        assert_eq!(status, STATUS_OK);
        answer(&format!("woken {woken}"));
    }

    fn raw_stats(&self) -> PortStats {
        let mut stats = PortStats::default();
        // SAFETY: an open port; `stats` is written.
        let status = unsafe { (self.api.port_stats)(self.port, &mut stats) };
        assert_eq!(status, STATUS_OK);
        stats
    }

    fn stats(&self) {
        // SAFETY: an open port.
        counted(|| unsafe { (self.api.tx_reap)(self.port) });
        let stats = self.raw_stats();
        // SAFETY: an open port.
        let refs = unsafe { (self.api.ext_refs)(self.port, self.attachment) };
        answer(&format!(
            "rx {} {} missed {} tx {} {} copied {} free {} used {} refs {refs} allocations {}",
            stats.rx_frames,
            stats.rx_bytes,
            stats.rx_missed,
            stats.tx_frames,
            stats.tx_bytes,
            stats.tx_copied_bytes,
            stats.mbufs_free,
            u64::from(self.info.mbufs) - stats.mbufs_free,
            inside_bursts(),
        ));
    }

    fn detach(&mut self) {
        // SAFETY: an open port.
        let first = unsafe { (self.api.ext_detach)(self.port, self.attachment) };
        // SAFETY: an open port.
        let again = unsafe { (self.api.ext_detach)(self.port, self.attachment) };
        answer(&format!("detached {first} then {again}"));
    }

    fn link(&self, wanted: bool) {
        let start = Instant::now();
        // SAFETY: an open port.
        let up = || unsafe { (self.api.port_link)(self.port) } == 1;
        while up() != wanted && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        answer(&format!(
            "link {} after {} ms",
            up(),
            start.elapsed().as_millis()
        ));
    }

    fn close(&mut self) {
        // SAFETY: an open port, which is not used again: stdin ends next.
        let missing = unsafe { (self.api.port_close)(self.port) };
        answer(&format!("closed missing {missing}"));
    }
}

fn is_intact(data: &[u8]) -> bool {
    if data.len() < HEAD_MIN {
        return false;
    }
    let word =
        |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().expect("four bytes")) as usize;
    let number = u64::from_le_bytes(data[14..22].try_into().expect("eight bytes"));
    let (head, offset, payload) = (word(22), word(26), word(30));
    data.len() == head + payload
        && (HEAD_MIN..head).all(|at| data[at] == head_byte(number, at))
        && data[head..]
            .iter()
            .enumerate()
            .all(|(i, byte)| *byte == region_byte(offset + i))
}
