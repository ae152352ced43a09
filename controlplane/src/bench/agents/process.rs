//! An agent that is started for one run and ends with it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use genie_client::Memory;
use genie_dataplane::memory::accelerator::MemoryKind;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::BenchError;
use crate::bench::carriers::{Kind, LIVENESS};

/// How long an agent may take to be ready: that of a device's driver.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// How long it may take to end by itself.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Variables that an agent started here is to see.
const KEPT: [&str; 2] = ["GENIE_DPDK_LIB", "GENIE_SIM"];

/// How two agents are set up.
#[derive(Clone, Debug)]
pub struct Start {
    /// What carries blocks between them.
    pub kind: Kind,
    /// Connections of a TCP session.
    pub streams: u16,
    /// The kernel's congestion control of those, if one was asked for.
    pub congestion: Option<String>,
    /// Whose accelerator they need.
    pub memory: Memory,
    /// The most memory of programs, and the most that is stored.
    pub bytes: u64,
}

/// An agent's process.
#[derive(Debug)]
pub struct Process {
    /// Where programs reach it.
    pub socket: PathBuf,
    name: String,
    listen: String,
    child: Child,
}

impl Process {
    /// Starts one and waits until it is ready.
    pub fn start(
        folder: &Path,
        name: &str,
        peer: Option<&Process>,
        start: &Start,
    ) -> Result<Self, BenchError> {
        let binary = std::env::current_exe().map_err(BenchError::Channel)?;
        let (log, socket) = (folder.join(name), folder.join(format!("{name}.sock")));
        let mut command = Command::new(binary);
        for (variable, _) in std::env::vars_os() {
            let variable = variable.to_string_lossy();
            if variable.starts_with("GENIE_") && !KEPT.contains(&&*variable) {
                command.env_remove(&*variable);
            }
        }
        command.args(["bench-agent", "--json", "--name", name, "--metrics=off"]);
        command.args(["--listen=127.0.0.1:0", "--data=127.0.0.1:0"]);
        command.arg("--socket").arg(&socket);
        command.args(words(folder, start));
        if let Some(peer) = peer {
            command.arg(format!("--peer={}={}", peer.name, peer.listen));
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).map_err(BenchError::Channel)?)
            .spawn();
        let mut process = Self {
            socket,
            name: name.to_owned(),
            listen: String::new(),
            child: child.map_err(BenchError::Channel)?,
        };
        let ready: Option<Ready> = serde_json::from_str(&process.first_line()).ok();
        let ready = ready.ok_or_else(|| BenchError::Agent(last_line(&log)))?;
        process.listen = ready.listen;
        Ok(process)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn first_line(&mut self) -> String {
        let Some(stdout) = self.child.stdout.take() else {
            return String::new();
        };
        let (said, heard) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            // Nothing, if it ends: then there is no line either.
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = said.send(line);
        });
        heard.recv_timeout(READY_LIMIT).unwrap_or_default()
    }
}

/// The one line that an agent prints.
#[derive(serde::Deserialize)]
struct Ready {
    listen: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let until = Instant::now() + END_LIMIT;
        while Instant::now() < until {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn words(folder: &Path, start: &Start) -> Vec<String> {
    let mut words = vec![
        format!("--transport={}", start.kind),
        format!("--streams={}", start.streams),
        format!("--liveness={}s", LIVENESS.as_secs()),
        format!("--store-bytes={}", start.bytes),
        format!("--arena-bytes={}", start.bytes),
        format!("--user-arena-bytes={}", start.bytes),
        "--user-connections=128".into(),
    ];
    if start.kind == Kind::Dpdk {
        let pair = folder.join("pair");
        words.push(format!("--dpdk-device=pair:{}", pair.display()));
    }
    if let Some(congestion) = &start.congestion {
        words.push(format!("--tcp-congestion={congestion}"));
    }
    if start.memory.kind() != MemoryKind::Host {
        words.push(format!("--accelerator={}", start.memory));
    }
    words
}

/// The last words of a log.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    last.unwrap_or("it was not ready in time").trim().to_owned()
}
