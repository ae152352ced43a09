//! What `--tap` records of two agents' frames, read back.
//!
//! Skipped, with the reason, where there is no DPDK or no huge page;
//! `GENIE_REQUIRE_DPDK=1` turns that into a failure.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, eventually};
use serde_json::Value;

const TENSOR: usize = 3 << 20;

fn engine(agent: &Agent) -> Value {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let dpdk = transports.iter().find(|one| one["transport"] == "dpdk");
    dpdk.expect("every agent lists it").clone()
}

/// A frame on record: UDP payload bytes, or none for ARP and neighbour discovery.
fn payload_of(frame: &[u8]) -> Option<&[u8]> {
    let udp = match frame[12..14] {
        [0x08, 0x00] if frame[23] == 17 => 14 + 20,
        [0x86, 0xdd] if frame[20] == 17 => 14 + 40,
        _ => return None,
    };
    let port = u16::from_be_bytes([frame[udp + 2], frame[udp + 3]]);
    (port == 5556).then(|| &frame[udp + 8..])
}

/// The frames of a pcap file whose frames are kept whole.
fn read(file: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(file).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 0xa1b2_3c4d, "times in nanoseconds");
    let (mut at, mut frames) = (24, Vec::new());
    while at < bytes.len() {
        let (kept, len) = (word(at + 8) as usize, word(at + 12) as usize);
        assert_eq!(kept, len);
        frames.push(bytes[at + 16..at + 16 + kept].to_vec());
        at += 16 + kept;
    }
    frames
}

/// How many frames `tcpdump` finds; none where it is not there.
fn count_with_tcpdump(file: &Path) -> Option<usize> {
    let mut tcpdump = Command::new("tcpdump");
    // As whoever runs the test: the file is theirs alone.
    tcpdump.args(["-Z", "root", "-n", "-r"]).arg(file);
    let output = match tcpdump.output() {
        Ok(output) => output,
        Err(error) => {
            println!("not read with tcpdump: {error}");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    Some(output.stdout.iter().filter(|byte| **byte == b'\n').count())
}

#[test]
fn both_ends_record_what_passed() {
    let folder = tempfile::tempdir().unwrap();
    let device = format!(
        "--dpdk-device=pair:{}",
        folder.path().join("pair").display()
    );
    let start = |name: &str, more: &[&str]| {
        let file = folder.path().join(format!("{name}.pcap"));
        let tap = format!("--tap={}", file.display());
        let flags = ["--transport=dpdk,tcp", &device, &tap, "--tap-snap=16KiB"];
        let agent = Agent::start_with(folder.path(), name, &[&flags[..], more].concat());
        (agent, file)
    };
    let (b, b_file) = start("b", &[]);
    if let Some(reason) = engine(&b)["reason"].as_str() {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        return println!("skipped: {reason}");
    }
    let (a, a_file) = start("a", &[&b.as_peer()]);
    let model = folder.path().join("m.safetensors");
    let tensor = Tensor::bytes("t", TENSOR);
    let written = tensor.bytes.clone();
    model::write(&model, &[tensor], &[]);
    let put = a.json(&["put", model.to_str().unwrap(), "b:m"]);
    assert!(put["path"].as_str().unwrap().starts_with("dpdk:"), "{put}");

    for (mut agent, file) in [(a, a_file), (b, b_file)] {
        let tap = || engine(&agent)["engine"]["tap"].clone();
        eventually("the record has the whole tensor", || {
            (tap()["bytes"].as_u64()? > TENSOR as u64).then_some(())
        });
        let text = agent.genie(&["status"]).stdout;
        assert!(text.contains("recorded in /"), "{text}");
        assert_eq!(tap()["missed"], 0);
        assert_eq!(tap()["after_end"], 0);
        assert!(agent.stop().success());
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let frames = read(&file);
        // Every piece of the tensor is behind the headers of some frame.
        let payloads: Vec<&[u8]> = frames
            .iter()
            .filter_map(|frame| payload_of(frame))
            .collect();
        let total: usize = payloads.iter().map(|payload| payload.len()).sum();
        assert!(total > TENSOR, "{total} bytes");
        for at in [0, TENSOR / 2, TENSOR - 64] {
            let piece = &written[at..at + 64];
            let found = |payload: &&[u8]| payload.windows(64).any(|window| window == piece);
            assert!(payloads.iter().any(found), "byte {at}");
        }
        if let Some(count) = count_with_tcpdump(&file) {
            assert_eq!(count, frames.len());
        }
    }
}
