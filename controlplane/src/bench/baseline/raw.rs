//! The bare device: frames of the engine's shape, and no engine.
//!
//! What is done with payloads is done as the engine does it, at both ends: the
//! sender reads each for its CRC32C, which travels in the frame, and the
//! receiver compares it with that of what it has copied to its place.

use std::ops::Range;
use std::time::{Duration, Instant};

use genie_dataplane::device::{BURST_MAX, Device, Payload, TxFrame};
use genie_dataplane::dpdk::{DeviceSpec, Port};
use genie_dataplane::memory::{Lease, Region, View};
use serde::{Deserialize, Serialize};

use crate::bench::BenchError;
use crate::bench::carriers::{Kind, dpdk_options};
use crate::bench::environment::cpu_time;

/// Ethernet, IPv6, UDP and Genie's data header: what a frame of the engine has
/// in front of its payload, within 2 bytes.
const HEAD_BYTES: usize = 94;

/// Where in the head a frame says which payload it has, and its CRC32C.
const PLACE: Range<usize> = 14..18;
const CRC: Range<usize> = 18..22;

/// What is sent from and received into: beyond any second-level cache.
const REGION_BYTES: usize = 64 << 20;

/// Room for the frames that are sent.
const MTU: u16 = 9000;

/// Frames before the clock starts.
const WARM_UP: Duration = Duration::from_millis(200);

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

/// What a receiver saw.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Received {
    /// Its driver.
    pub driver: String,
    /// Frames in the time measured.
    pub frames: u64,
    /// The time measured.
    pub seconds: f64,
    /// Frames that were not what was sent.
    pub bad: u64,
    /// CPU time meanwhile: a poller's is all of one processor.
    pub cpu_seconds: f64,
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
    /// All three.
    pub const ALL: [Use; 3] = [Use::Untouched, Use::Copy, Use::CopyCrc];

    /// As a baseline's name says it.
    pub fn name(self) -> &'static str {
        match self {
            Use::Untouched => "untouched",
            Use::Copy => "copy",
            Use::CopyCrc => "copy-crc",
        }
    }
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

/// Sends frames until `stop` says so. `opened` is called
/// between opening the device, so that this is the first end of a pair, and
/// waiting for the other end.
pub fn send(
    device: &str,
    frame_bytes: usize,
    what: Use,
    opened: impl FnOnce() -> Result<(), BenchError>,
    mut stop: impl FnMut() -> Result<bool, BenchError>,
) -> Result<Sent, BenchError> {
    let mut port = open(device)?;
    opened()?;
    wait_for_link(&port)?;
    let lease = Lease::whole(Region::allocate(REGION_BYTES)?.0);
    let pattern: Vec<u8> = (0..REGION_BYTES).map(pattern).collect();
    lease.write_at(0, View::from(&pattern[..]));
    drop(pattern);
    let refused = |error| BenchError::Engine(Kind::Dpdk, format!("{error}"));
    let attachment = port.attach(lease.clone()).map_err(refused)?;
    let len = frame_bytes - HEAD_BYTES;
    let mut next = 0;
    let mut fill = |frame: &mut TxFrame| {
        frame.head = [0xff; HEAD_BYTES].into_iter().collect();
        frame.head[PLACE].copy_from_slice(&(next as u32).to_le_bytes());
        if what == Use::CopyCrc {
            let crc = lease.crc32c(next..next + len);
            frame.head[CRC].copy_from_slice(&crc.to_le_bytes());
        }
        frame.payload = Some(Payload {
            attachment,
            offset: next as u64,
            len: len as u32,
        });
        next = after(next, len);
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

/// Receives frames for so long.
pub fn receive(
    device: &str,
    frame_bytes: usize,
    what: Use,
    seconds: f64,
) -> Result<Received, BenchError> {
    let mut port = open(device)?;
    wait_for_link(&port)?;
    let lease = Lease::whole(Region::allocate(REGION_BYTES)?.0);
    let (mut frames, mut bad) = (0u64, 0u64);
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
        if frame.len() != frame_bytes || at + payload.len() > REGION_BYTES {
            bad += 1;
            return;
        }
        match what {
            Use::Untouched => {}
            Use::Copy => lease.write_at(at, payload),
            Use::CopyCrc => bad += u64::from(lease.place(at, payload) != crc),
        }
        frames += 1;
    };
    let run = |port: &mut Port, time: Duration, on_frame: &mut dyn FnMut(View<'_>)| {
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < time {
            for _ in 0..16 {
                count += port.rx_burst(on_frame) as u64;
            }
        }
        (count, start.elapsed())
    };
    let until = Instant::now() + LINK_LIMIT;
    while port.rx_burst(&mut on_frame) == 0 {
        if Instant::now() > until {
            return Err(BenchError::Silent(LINK_LIMIT));
        }
    }
    run(&mut port, WARM_UP, &mut on_frame);
    let before = cpu_time();
    let (count, time) = run(&mut port, Duration::from_secs_f64(seconds), &mut on_frame);
    let cpu_seconds = (cpu_time() - before).as_secs_f64();
    let len = frame_bytes - HEAD_BYTES;
    if what != Use::Untouched {
        // Long enough was received for the first payloads to be in their places.
        let mut bytes = vec![0; 16 * len];
        lease.read_at(0, &mut bytes);
        bad += u64::from(
            bytes
                .iter()
                .enumerate()
                .any(|(at, byte)| *byte != pattern(at)),
        );
    }
    let driver = port.capabilities().driver.clone();
    Ok(Received {
        driver,
        frames: count,
        seconds: time.as_secs_f64(),
        bad,
        cpu_seconds,
    })
}

/// The place in the region after a payload at `at`.
fn after(at: usize, len: usize) -> usize {
    if at + 2 * len > REGION_BYTES {
        0
    } else {
        at + len
    }
}

/// What the sender has at each place: not the same for two neighbouring frames.
fn pattern(at: usize) -> u8 {
    ((at as u32).wrapping_mul(2_654_435_761) >> 21) as u8
}
