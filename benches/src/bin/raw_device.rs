//! The bare loop: frames from one process to another through the driver
//! library and nothing else. The baseline for every claim about the DPDK path.
//!
//! Starts itself twice, once for each end of a pair, and prints a line of JSON
//! for each direction and each thing the receiver does with a frame. Which
//! process starts first decides which driver sends.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use genie_dataplane::device::{BURST_MAX, Device, Payload, TxFrame};
use genie_dataplane::dpdk::{DeviceSpec, Options, Port};
use genie_dataplane::memory::{Lease, Region, View};
use serde_json::{Value, json};

/// Ethernet, IPv6, UDP and Genie's data header: what a frame of the engine has
/// in front of its payload, within 2 bytes.
const HEAD_BYTES: usize = 94;

/// The tensor that is sent from and received into: beyond any cache.
const REGION_BYTES: usize = 64 << 20;

/// Frames before the clock starts.
const WARM_UP: Duration = Duration::from_millis(300);

/// Measures a bare loop over two processes and a pair of virtual devices.
#[derive(Parser)]
struct Arguments {
    /// Length of a frame in bytes, Ethernet header included.
    #[arg(long, default_value_t = 9000)]
    frame: usize,
    /// Seconds measured for each line.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Only this use of the frames.
    #[arg(long)]
    only: Option<Use>,
    /// Internal: which end this process is.
    #[arg(long, hide = true)]
    end: Option<End>,
    /// Internal: the socket of the pair.
    #[arg(long, hide = true)]
    socket: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum End {
    Send,
    Receive,
}

/// What the receiver does with the payload of a frame.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Use {
    /// Counts the frame.
    Untouched,
    /// Copies it to its place in a buffer of 64 MiB.
    Copy,
    /// Copies it and computes the CRC32C of the copy.
    CopyCrc,
}

impl Use {
    fn name(self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Copy => "copy",
            Self::CopyCrc => "copy-crc",
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(
        arguments.frame > HEAD_BYTES,
        "a frame has {HEAD_BYTES} bytes of headers"
    );
    match (arguments.end, &arguments.socket) {
        (Some(End::Send), Some(socket)) => send(socket, &arguments),
        (Some(End::Receive), Some(socket)) => receive(socket, &arguments),
        _ => measure_all(&arguments),
    }
}

fn measure_all(arguments: &Arguments) -> Result<()> {
    let uses = [Use::Untouched, Use::Copy, Use::CopyCrc];
    for first in [End::Receive, End::Send] {
        for what in uses
            .into_iter()
            .filter(|what| arguments.only.is_none_or(|only| only == *what))
        {
            println!("{}", measure(arguments, first, what)?);
        }
    }
    Ok(())
}

fn measure(arguments: &Arguments, first: End, what: Use) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("pair");
    let second = if first == End::Send {
        End::Receive
    } else {
        End::Send
    };
    let one = start(arguments, first, what, &socket)?;
    // The first to lock is vhost: wait until it has.
    let lock = folder.path().join("pair.vhost");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !lock.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let two = start(arguments, second, what, &socket)?;
    let (sender, receiver) = if first == End::Send {
        (one, two)
    } else {
        (two, one)
    };
    // The receiver ends by itself, the sender when its stdin closes.
    let received = answer(receiver)?;
    let sent = answer(sender)?;
    Ok(json!({
        "use": what.name(),
        "sender": sent["driver"],
        "receiver": received["driver"],
        "frame_bytes": arguments.frame,
        "gb_per_s": received["gb_per_s"],
        "mpps": received["mpps"],
        "frames": received["frames"],
        "bad": received["bad"],
        "sender_copies_per_byte": sent["copies_per_byte"],
        "receiver_missed": received["missed"],
        "sender_errors": sent["errors"],
    }))
}

fn start(arguments: &Arguments, end: End, what: Use, socket: &Path) -> Result<Child> {
    let end = end.to_possible_value().context("both ends have names")?;
    Command::new(std::env::current_exe()?)
        .args(["--end", end.get_name(), "--only", what.name()])
        .args(["--frame", &arguments.frame.to_string()])
        .args(["--seconds", &arguments.seconds.to_string()])
        .arg("--socket")
        .arg(socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the other process")
}

fn answer(mut child: Child) -> Result<Value> {
    // A receiver does not read its stdin; a sender takes its end as the sign.
    let mut stdout = child.stdout.take().context("it is piped")?;
    drop(child.stdin.take());
    let mut text = String::new();
    stdout.read_to_string(&mut text)?;
    let status = child.wait()?;
    ensure!(status.success(), "an end failed: {status}");
    serde_json::from_str(&text).context("an end prints JSON")
}

fn open(socket: &Path) -> Result<(Port, Lease)> {
    // Ends with the process that started it, whatever happens to that.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let port = Port::open(&DeviceSpec::Pair(socket.into()), &Options::default())?;
    let (region, _small_pages) = Region::allocate(REGION_BYTES)?;
    let lease = Lease::whole(region);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !port.link_up() {
        ensure!(Instant::now() < deadline, "the other end did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok((port, lease))
}

fn send(socket: &Path, arguments: &Arguments) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopper = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        stopper.store(true, Ordering::Relaxed);
    });
    let (mut port, lease) = open(socket)?;
    let pattern: Vec<u8> = (0..REGION_BYTES).map(pattern).collect();
    lease.write_at(0, View::from(&pattern[..]));
    drop(pattern);
    let attachment = port.attach(lease)?;
    let len = arguments.frame - HEAD_BYTES;
    let mut frames = vec![TxFrame::default(); BURST_MAX];
    for frame in &mut frames {
        frame.head = [0xff; HEAD_BYTES].into_iter().collect();
    }
    let (mut next, mut sent_bytes) = (0, 0u64);
    while !stop.load(Ordering::Relaxed) {
        let mut at = next;
        for frame in &mut frames {
            let number = (at as u32).to_le_bytes();
            frame.head[14..18].copy_from_slice(&number);
            frame.payload = Some(Payload {
                attachment,
                offset: at as u64,
                len: len as u32,
            });
            at = after(at, len);
        }
        let taken = port.tx_burst(&frames);
        sent_bytes += (taken * len) as u64;
        for _ in 0..taken {
            next = after(next, len);
        }
    }
    port.reap();
    println!(
        "{}",
        json!({
            "driver": port.capabilities().driver,
            "copies_per_byte": port.copies().per_byte(sent_bytes),
            "errors": port.counters().tx_errors,
        })
    );
    Ok(())
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

fn receive(socket: &Path, arguments: &Arguments) -> Result<()> {
    let (mut port, lease) = open(socket)?;
    let what = arguments.only.context("an end knows what to do")?;
    let (mut frames, mut crc, mut bad) = (0u64, 0u32, 0u64);
    let mut on_frame = |frame: View<'_>| {
        let mut at = [0; 4];
        let place = frame.slice(14..18);
        let payload = frame.slice(HEAD_BYTES..frame.len());
        let (Some(place), Some(payload)) = (place, payload) else {
            bad += 1;
            return;
        };
        place.copy_to(&mut at);
        let at = u32::from_le_bytes(at) as usize;
        if frame.len() != arguments.frame || at + payload.len() > REGION_BYTES {
            bad += 1;
            return;
        }
        match what {
            Use::Untouched => {}
            Use::Copy => lease.write_at(at, payload),
            Use::CopyCrc => crc ^= lease.place(at, payload),
        }
        frames += 1;
    };
    let run = |port: &mut Port, time: Duration, on_frame: &mut dyn FnMut(View<'_>)| {
        let start = Instant::now();
        let mut elapsed = start.elapsed();
        while elapsed < time {
            // The clock is read once in a while: it costs what a frame does.
            for _ in 0..16 {
                port.rx_burst(on_frame);
            }
            elapsed = start.elapsed();
        }
        elapsed
    };
    let waiting = Instant::now();
    while port.rx_burst(&mut on_frame) == 0 {
        ensure!(waiting.elapsed() < Duration::from_secs(10), "no frame came");
    }
    run(&mut port, WARM_UP, &mut on_frame);
    let before = port.counters().rx_frames;
    let elapsed = run(
        &mut port,
        Duration::from_secs_f64(arguments.seconds),
        &mut on_frame,
    );
    let counters = port.counters();
    let count = (counters.rx_frames - before) as f64;
    if what != Use::Untouched {
        bad += u64::from(!is_intact(&lease, arguments.frame - HEAD_BYTES));
    }
    std::hint::black_box(crc);
    println!(
        "{}",
        json!({
            "driver": port.capabilities().driver,
            "frames": frames,
            "bad": bad,
            "missed": counters.rx_missed,
            "gb_per_s": round(count * arguments.frame as f64 / elapsed.as_secs_f64() / 1e9),
            "mpps": round(count / elapsed.as_secs_f64() / 1e6),
        })
    );
    Ok(())
}

/// Whether the first payloads in the buffer are what the sender had there.
fn is_intact(lease: &Lease, len: usize) -> bool {
    let mut bytes = vec![0; 16 * len];
    lease.read_at(0, &mut bytes);
    bytes
        .iter()
        .enumerate()
        .all(|(at, byte)| *byte == pattern(at))
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
