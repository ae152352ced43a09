//! One of the two processes.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use genie_dataplane::device::{Attachment, BURST_MAX, Device, Payload, TxFrame};
use genie_dataplane::dpdk::{DeviceSpec, Options, Port};
use genie_dataplane::memory::{Lease, Region, View};

const REGION_BYTES: usize = 1 << 20;
const PAYLOAD_BYTES: usize = 8192;
const HEAD_BYTES: usize = 14 + 4;
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs until stdin ends; answers a line for each line, and one for opening.
pub(crate) fn run(socket: &Path) -> ! {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .expect("a signal that exists");
    let options = Options {
        peer_limit: Duration::from_secs(2),
        ..Options::default()
    };
    let mut port = match Port::open(&DeviceSpec::Pair(socket.into()), &options) {
        Ok(port) => port,
        Err(error) => {
            answer(&format!("refused: {error}"));
            std::process::exit(0)
        }
    };
    answer(&format!(
        "open {} mtu {}",
        port.capabilities().driver,
        port.capabilities().mtu
    ));
    let (region, _small_pages) = Region::allocate(REGION_BYTES).expect("memory");
    let lease = Lease::whole(region);
    lease.write_at(0, View::from(&pattern()[..]));
    let attachment = port.attach(lease).expect("a free place");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("stdin is a pipe");
        match line.split_once(' ').unwrap_or((&line, "0")) {
            ("link", _) => wait_for_link(&port),
            ("send", count) => send(&mut port, attachment, count.parse().expect("a number")),
            ("receive", count) => receive(&mut port, count.parse().expect("a number")),
            ("detach", _) => detach(&mut port, attachment),
            _ => panic!("no such command: {line}"),
        }
    }
    drop(port);
    answer("closed");
    std::process::exit(0)
}

fn answer(text: &str) {
    println!("{text}");
    std::io::stdout().flush().expect("stdout is a pipe");
}

fn pattern() -> Vec<u8> {
    (0..REGION_BYTES as u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 21) as u8)
        .collect()
}

fn wait_for_link(port: &Port) {
    let start = Instant::now();
    while !port.link_up() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    answer(&format!("link {}", port.link_up()));
}

fn frame(attachment: Attachment, number: usize) -> TxFrame {
    let offset = number * 4099 % (REGION_BYTES - PAYLOAD_BYTES);
    let mut frame = TxFrame::default();
    frame.head.extend([0xff; 14]);
    frame.head.extend((offset as u32).to_le_bytes());
    let len = PAYLOAD_BYTES as u32;
    frame.payload = Some(Payload {
        attachment,
        offset: offset as u64,
        len,
    });
    frame
}

fn send(port: &mut Port, attachment: Attachment, count: usize) {
    let before = port.counters().tx_frames;
    let (mut sent, start) = (0, Instant::now());
    while sent < count && start.elapsed() < PATIENCE {
        let batch = (count - sent).min(2 * BURST_MAX);
        let frames: Vec<_> = (sent..sent + batch).map(|i| frame(attachment, i)).collect();
        sent += port.tx_burst(&frames);
    }
    while port.stats().tx_pending > 0 && start.elapsed() < PATIENCE {
        port.reap();
    }
    let counted = port.counters().tx_frames - before;
    let in_flight = port.in_flight(attachment);
    answer(&format!(
        "sent {sent} counted {counted} in flight {in_flight}"
    ));
}

fn receive(port: &mut Port, count: usize) {
    let (pattern, before) = (pattern(), port.counters().rx_frames);
    let (mut received, mut bad, start) = (0, 0, Instant::now());
    while received < count && start.elapsed() < PATIENCE {
        received += port.rx_burst(&mut |frame| bad += usize::from(!is_intact(frame, &pattern)));
    }
    let counted = port.counters().rx_frames - before;
    answer(&format!("received {received} counted {counted} bad {bad}"));
}

fn is_intact(frame: View<'_>, pattern: &[u8]) -> bool {
    let mut bytes = vec![0; frame.len()];
    frame.copy_to(&mut bytes);
    if bytes.len() != HEAD_BYTES + PAYLOAD_BYTES {
        return false;
    }
    let (head, payload) = bytes.split_at(HEAD_BYTES);
    let offset = u32::from_le_bytes(head[14..].try_into().expect("four bytes")) as usize;
    pattern.get(offset..offset + PAYLOAD_BYTES) == Some(payload)
}

/// Gives the memory back and sends it nevertheless, which must reach nobody.
fn detach(port: &mut Port, attachment: Attachment) {
    port.reap();
    let gone = port.detach(attachment);
    let before = port.counters();
    let taken = port.tx_burst(&[frame(attachment, 0)]);
    let after = port.counters();
    let (sent, errors) = (
        after.tx_frames - before.tx_frames,
        after.tx_errors - before.tx_errors,
    );
    answer(&format!(
        "detached {gone} then taken {taken} sent {sent} errors {errors}"
    ));
}
