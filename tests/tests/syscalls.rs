//! What an engine's thread asks of the kernel while tensors move over a device:
//! nothing but its sleeps, counted by `strace -c`.
//!
//! Skipped, with the reason, where there is no DPDK, no huge page or no strace,
//! or where it may not trace; `GENIE_REQUIRE_DPDK=1` turns the first two into
//! failures.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use genie_tests::model::{self, Tensor};
use genie_tests::{Agent, eventually};
use rustix::process::{Pid, Signal};
use serde_json::Value;

const TENSOR: usize = 128 << 20;
const PUTS: usize = 4;

/// What the sleep of either end costs a thread at most: interrupts on, two waits,
/// reads of what woke it; and bursts that report themselves to an end that sleeps.
const CALLS_OF_A_SLEEP: u64 = 8;

fn engine(agent: &Agent) -> Value {
    let status = agent.status();
    let transports = status["transports"].as_array().expect("a list");
    let dpdk = transports.iter().find(|one| one["transport"] == "dpdk");
    dpdk.expect("every agent lists it").clone()
}

/// Frames through the agent's port so far, both ways, and how often its engine slept.
fn frames_and_sleeps(agent: &Agent) -> (u64, u64) {
    let snapshot = &engine(agent)["engine"];
    let port = |name: &str| snapshot["port"][name].as_u64().unwrap_or(0);
    let sleeps = snapshot["idle"]["sleeps"].as_u64().expect("it polls");
    (port("tx_frames") + port("rx_frames"), sleeps)
}

/// The thread that polls the agent's device.
fn engine_thread(agent: &Agent) -> u32 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap();
    let is_engine = |path: &PathBuf| {
        std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "genie-udp")
    };
    let found = threads.map(|one| one.unwrap().path()).find(is_engine);
    let found = found.expect("an agent with a device has such a thread");
    let name = found.file_name().and_then(|name| name.to_str());
    name.unwrap().parse().expect("a thread's number")
}

/// `strace -c` of one thread.
struct Tracer {
    child: Child,
    summary: PathBuf,
}

impl Tracer {
    /// None, having said why, where there is no strace or it may not trace.
    fn attach(thread: u32, summary: &Path) -> Option<Self> {
        let started = Command::new("strace")
            .args(["-c", "-U", "calls,name", "-o"])
            .arg(summary)
            .args(["-p", &thread.to_string()])
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: strace does not start: {error}");
                return None;
            }
        };
        let mut said = String::new();
        let stderr = child.stderr.as_mut().expect("piped");
        BufReader::new(stderr).read_line(&mut said).unwrap();
        if !said.contains("attached") {
            child.wait().unwrap();
            println!("skipped: strace may not trace: {said}");
            return None;
        }
        Some(Self {
            child,
            summary: summary.into(),
        })
    }

    /// Ends it; returns its calls and what it counted. Calls to yield are left
    /// out: those are made by an engine that finds nothing to do, 20 µs apart.
    fn finish(mut self) -> (u64, String) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::INT).unwrap();
        self.child.wait().unwrap();
        let text = std::fs::read_to_string(&self.summary).unwrap();
        let calls = text.lines().filter_map(|line| {
            let (calls, name) = line.trim().split_once(char::is_whitespace)?;
            (!["total", "sched_yield"].contains(&name.trim())).then(|| calls.parse::<u64>().ok())?
        });
        (calls.sum(), text)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // One that is over has nothing left to be ended.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

#[test]
fn an_engine_makes_no_system_call_for_a_frame() {
    let folder = tempfile::tempdir().unwrap();
    let device = format!(
        "--dpdk-device=pair:{}",
        folder.path().join("pair").display()
    );
    let flags = ["--transport=dpdk,tcp", &device];
    let b = Agent::start_with(folder.path(), "b", &flags);
    if let Some(reason) = engine(&b)["reason"].as_str() {
        assert!(
            std::env::var_os("GENIE_REQUIRE_DPDK").is_none(),
            "DPDK is required: {reason}"
        );
        return println!("skipped: {reason}");
    }
    let peer = b.as_peer();
    let a = Agent::start_with(folder.path(), "a", &[&flags[..], &[&peer]].concat());
    let file = folder.path().join("m.safetensors");
    model::write(&file, &[Tensor::bytes("t", TENSOR)], &[]);
    let put = |number: usize| {
        let name = format!("b:m{number}");
        let put = a.json(&["put", file.to_str().unwrap(), &name]);
        assert!(put["path"].as_str().unwrap().starts_with("dpdk:"), "{put}");
    };
    // All that is made once is made.
    put(0);
    let agents = [&a, &b];
    let before = agents.map(frames_and_sleeps);
    let attach = |agent: &&Agent| {
        let summary = folder.path().join(format!("{}.strace", agent.pid()));
        Tracer::attach(engine_thread(agent), &summary)
    };
    let Some(tracers) = agents.iter().map(attach).collect::<Option<Vec<_>>>() else {
        return;
    };
    (1..=PUTS).for_each(put);
    let traced: Vec<_> = tracers.into_iter().map(Tracer::finish).collect();
    // An engine publishes its counters some times a second: the last sleeps too.
    std::thread::sleep(std::time::Duration::from_millis(500));
    // With 9000-byte packets.
    let least = (PUTS * TENSOR / 9000) as u64;
    let [a, b] = [0, 1].map(|at| {
        let moved = || {
            let (frames, sleeps) = frames_and_sleeps(agents[at]);
            let (frames, sleeps) = (frames - before[at].0, sleeps - before[at].1);
            (frames >= least).then_some((frames, sleeps))
        };
        eventually("the port has counted the puts", moved)
    });
    let sleeps = a.1 + b.1;
    for ((calls, summary), (frames, _)) in traced.into_iter().zip([a, b]) {
        let said = format!("{calls} calls, {frames} frames, {sleeps} sleeps\n{summary}");
        println!("{said}");
        assert!(calls > 0, "an engine sleeps between puts: {said}");
        // On a busy machine engines wait, and sleep, in the middle of a transfer.
        let most = frames / 1000 + CALLS_OF_A_SLEEP * sleeps;
        assert!(calls < most && most < frames, "at most {most}: {said}");
    }
}
