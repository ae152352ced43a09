//! The bare device: frames of the engine's shape, and no engine.
//!
//! What is done with payloads is done as the engine does it, at both ends: the
//! sender reads each for its CRC32C, which travels in the frame, and the
//! receiver compares it with that of what it has copied to its place.

use std::ops::Range;
use std::time::{Duration, Instant};

use genie_dataplane::device::{BURST_MAX, Device, HEAD_MAX, Payload, TxFrame};
use genie_dataplane::dpdk::{DeviceSpec, Port};
use genie_dataplane::memory::{Lease, Region, View};
use serde::{Deserialize, Serialize};

use crate::bench::BenchError;
use crate::bench::carriers::{Kind, dpdk_options};
use crate::bench::environment::cpu_time;
use crate::bench::measure::{Carrier, Slot};
use crate::bench::pool::{self, Pool};

/// Ethernet, IPv6, UDP and Genie's data header: what a frame of the engine has
/// in front of its payload.
const HEAD_BYTES: usize = 14 + 40 + 8 + 40;

/// Bytes of a tensor in a frame of the engine's, on a port of MTU 9000.
pub const PAYLOAD_BYTES: usize = 8896;

/// Length of a frame.
const FRAME_BYTES: usize = HEAD_BYTES + PAYLOAD_BYTES;

/// Where in the head a frame says which payload it has, and its CRC32C.
const PLACE: Range<usize> = 14..18;
const CRC: Range<usize> = 18..22;

/// Room for the frames that are sent.
pub const MTU: u16 = 9000;

/// Frames before the clock starts.
const WARM_UP: Duration = Duration::from_millis(200);

/// Between two frames of a ping-pong there is never so much time.
const PING_PAUSE: Duration = Duration::from_secs(1);

/// How long the other end may take to come.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// What the receiver does with the payload of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Use {
    /// Counts the frame.
    Untouched,
    /// Copies it to its place in a large buffer.
    Copy,
    /// Copies it there and compares the CRC32C of the copy with the sender's.
    CopyCrc,
}

/// What both ends must know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Work {
    /// What is done with each frame's payload.
    pub what: Use,
    /// What is sent from, and received into, from its beginning to its end and
    /// again.
    pub region_bytes: usize,
    /// Chooses what is sent.
    pub salt: u64,
    /// How long each repeat takes.
    pub seconds: f64,
    /// How often it is measured.
    pub repeats: usize,
}

/// What a receiver saw.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Received {
    /// Its driver.
    pub driver: String,
    /// Frames in each of the times measured, and how long that was in seconds.
    pub repeats: Vec<(u64, f64)>,
    /// Frames that were not what was sent.
    pub bad: u64,
    /// CPU time meanwhile: a poller's is all of one processor.
    pub cpu_seconds: f64,
}

impl Work {
    /// The place in the region after a payload at `at`.
    fn after(&self, at: usize) -> usize {
        if at + 2 * PAYLOAD_BYTES > self.region_bytes {
            0
        } else {
            at + PAYLOAD_BYTES
        }
    }
}

/// What a sender did.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Its driver.
    pub driver: String,
    /// Frames that the device took.
    pub frames: u64,
    /// CPU time meanwhile.
    pub cpu_seconds: f64,
}

impl Use {
    /// As a baseline's name says it.
    pub fn name(self) -> &'static str {
        match self {
            Use::Untouched => "untouched",
            Use::Copy => "copy",
            Use::CopyCrc => "copy-crc",
        }
    }
}

/// Frames there and back, one at a time: the sending end.
#[derive(Debug)]
pub struct Ping {
    port: Port,
    frame: TxFrame,
    waiting: Option<Slot>,
}

impl Ping {
    /// As [`send`], with blocks of so many bytes, at most [`PAYLOAD_BYTES`].
    pub fn open(
        device: &str,
        block_bytes: usize,
        opened: impl FnOnce() -> Result<(), BenchError>,
    ) -> Result<Self, BenchError> {
        let mut port = open(device)?;
        opened()?;
        wait_for_link(&port)?;
        let memory = Lease::whole(Region::allocate(PAYLOAD_BYTES)?.0);
        let frame = ping_frame(&mut port, &memory, HEAD_BYTES + block_bytes)?;
        let waiting = None;
        Ok(Self {
            port,
            frame,
            waiting,
        })
    }

    /// The driver.
    pub fn driver(&self) -> &str {
        &self.port.capabilities().driver
    }
}

impl Carrier for Ping {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let until = Instant::now() + LINK_LIMIT;
        while self.port.tx_burst(std::slice::from_ref(&self.frame)) == 0 {
            if Instant::now() > until {
                return Err(BenchError::Silent(LINK_LIMIT));
            }
        }
        self.waiting = Some(slot);
        Ok(())
    }

    fn complete(&mut self, _: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        let (mut polls, mut began) = (0u64, None);
        while self.port.rx_burst(&mut |_| {}) == 0 {
            polls += 1;
            // The clock is looked at once in a while.
            if polls.is_multiple_of(1 << 16)
                && began.get_or_insert_with(Instant::now).elapsed() > LINK_LIMIT
            {
                return Err(BenchError::Silent(LINK_LIMIT));
            }
        }
        done.extend(self.waiting.take());
        Ok(())
    }
}

/// A frame of `len` bytes: as the engine does it, short ones lie behind the
/// headers and of long ones the frame refers to `memory`.
fn ping_frame(port: &mut Port, memory: &Lease, len: usize) -> Result<TxFrame, BenchError> {
    let head_len = if len <= HEAD_MAX { len } else { HEAD_BYTES };
    let mut frame = TxFrame {
        head: std::iter::repeat_n(0xff, head_len).collect(),
        payload: None,
    };
    if len > head_len {
        let refused = |error| BenchError::Engine(Kind::Dpdk, format!("{error}"));
        let attachment = port.attach(memory.clone()).map_err(refused)?;
        frame.payload = Some(Payload {
            attachment,
            offset: 0,
            len: (len - head_len).min(PAYLOAD_BYTES) as u32,
        });
    }
    Ok(frame)
}

/// Frames there and back: the other end, until none has come for a while.
/// Returns its driver.
pub fn pong(device: &str) -> Result<String, BenchError> {
    let mut port = open(device)?;
    wait_for_link(&port)?;
    let memory = Lease::whole(Region::allocate(PAYLOAD_BYTES)?.0);
    let long = ping_frame(&mut port, &memory, HEAD_BYTES + PAYLOAD_BYTES)?;
    let (mut last, mut limit) = (Instant::now(), LINK_LIMIT);
    while last.elapsed() < limit {
        for _ in 0..1024 {
            let mut back = TxFrame::default();
            let count = port.rx_burst(&mut |frame| {
                if frame.len() > HEAD_MAX
                    && let Some(payload) = frame.slice(HEAD_BYTES..frame.len())
                    && payload.len() <= PAYLOAD_BYTES
                {
                    memory.write_at(0, payload);
                    back = long.clone();
                    back.payload = back.payload.map(|place| Payload {
                        len: payload.len() as u32,
                        ..place
                    });
                    return;
                }
                let mut bytes = [0; HEAD_MAX];
                let len = frame.copy_to(&mut bytes);
                back.head = bytes[..len].iter().copied().collect();
            });
            if count > 0 {
                while port.tx_burst(std::slice::from_ref(&back)) == 0 {}
                (last, limit) = (Instant::now(), PING_PAUSE);
            }
        }
    }
    Ok(port.capabilities().driver.clone())
}

fn open(device: &str) -> Result<Port, BenchError> {
    let refused = |error: &dyn std::fmt::Display| BenchError::Engine(Kind::Dpdk, error.to_string());
    let spec: DeviceSpec = device.parse().map_err(|error| refused(&error))?;
    Port::open(&spec, &dpdk_options(MTU)).map_err(|error| refused(&error))
}

fn wait_for_link(port: &Port) -> Result<(), BenchError> {
    let until = Instant::now() + LINK_LIMIT;
    while !port.link_up() {
        if Instant::now() > until {
            return Err(BenchError::Silent(LINK_LIMIT));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Sends frames out of `pool` until `stop` says so. `opened` is called between
/// opening the device, so that this is the first end of a pair, and waiting for
/// the other end.
pub fn send(
    device: &str,
    work: &Work,
    pool: &Pool,
    opened: impl FnOnce() -> Result<(), BenchError>,
    mut stop: impl FnMut() -> Result<bool, BenchError>,
) -> Result<Sent, BenchError> {
    let mut port = open(device)?;
    opened()?;
    wait_for_link(&port)?;
    let lease = pool.first(work.region_bytes)?;
    pool::fill(&lease, work.salt, 0);
    let refused = |error| BenchError::Engine(Kind::Dpdk, format!("{error}"));
    let attachment = port.attach(lease.clone()).map_err(refused)?;
    let len = PAYLOAD_BYTES;
    let mut next = 0;
    let mut fill = |frame: &mut TxFrame| {
        frame.head = [0xff; HEAD_BYTES].into_iter().collect();
        frame.head[PLACE].copy_from_slice(&(next as u32).to_le_bytes());
        if work.what == Use::CopyCrc {
            let crc = lease.stream_crc32c(next..next + len);
            frame.head[CRC].copy_from_slice(&crc.to_le_bytes());
        }
        frame.payload = Some(Payload {
            attachment,
            offset: next as u64,
            len: len as u32,
        });
        next = work.after(next);
    };
    let mut frames = vec![TxFrame::default(); BURST_MAX];
    frames.iter_mut().for_each(&mut fill);
    let (mut sent, before) = (0, cpu_time());
    while !stop()? {
        // The channel is looked at once in a while: that is a system call.
        for _ in 0..1024 {
            let taken = port.tx_burst(&frames);
            sent += taken as u64;
            // What was not taken is sent next, as it is.
            frames.rotate_left(taken);
            frames[BURST_MAX - taken..].iter_mut().for_each(&mut fill);
        }
    }
    let cpu_seconds = (cpu_time() - before).as_secs_f64();
    port.reap();
    Ok(Sent {
        driver: port.capabilities().driver.clone(),
        frames: sent,
        cpu_seconds,
    })
}

/// Receives frames into `pool`, and counts them.
pub fn receive(device: &str, work: &Work, pool: &Pool) -> Result<Received, BenchError> {
    let mut port = open(device)?;
    wait_for_link(&port)?;
    let lease = pool.first(work.region_bytes)?;
    // Present before the clock starts, and nothing that was sent.
    pool::fill(&lease, work.salt + 1, 0);
    let mut bad = 0u64;
    let mut on_frame = |frame: View<'_>| {
        let word = |range: Range<usize>| {
            let mut word = [0; 4];
            frame.slice(range)?.copy_to(&mut word);
            Some(u32::from_le_bytes(word))
        };
        let payload = frame.slice(HEAD_BYTES..frame.len());
        let (Some(at), Some(crc), Some(payload)) = (word(PLACE), word(CRC), payload) else {
            bad += 1;
            return;
        };
        let at = at as usize;
        if frame.len() != FRAME_BYTES || at + payload.len() > work.region_bytes {
            bad += 1;
            return;
        }
        match work.what {
            Use::Untouched => {}
            Use::Copy => lease.write_at(at, payload),
            Use::CopyCrc => bad += u64::from(lease.place(at, payload) != crc),
        }
    };
    let run = |port: &mut Port, time: Duration, on_frame: &mut dyn FnMut(View<'_>)| {
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < time {
            for _ in 0..16 {
                count += port.rx_burst(on_frame) as u64;
            }
        }
        (count, start.elapsed().as_secs_f64())
    };
    let until = Instant::now() + LINK_LIMIT;
    while port.rx_burst(&mut on_frame) == 0 {
        if Instant::now() > until {
            return Err(BenchError::Silent(LINK_LIMIT));
        }
    }
    run(&mut port, WARM_UP, &mut on_frame);
    let before = cpu_time();
    let time = Duration::from_secs_f64(work.seconds);
    let repeats = (0..work.repeats).map(|_| run(&mut port, time, &mut on_frame));
    let repeats: Vec<(u64, f64)> = repeats.collect();
    let cpu_seconds = (cpu_time() - before).as_secs_f64();
    if work.what != Use::Untouched {
        // Long enough was received for the first payloads to be in their places.
        let first = lease.slice(0..16 * PAYLOAD_BYTES as u64);
        bad += u64::from(!first.is_ok_and(|first| pool::is_pattern(&first, work.salt, 0)));
    }
    Ok(Received {
        driver: port.capabilities().driver.clone(),
        repeats,
        bad,
        cpu_seconds,
    })
}
