//! Agents as carriers: blocks that programs read, write and put.
//!
//! Where a row of [`super::genie`] is two engines and nothing else, here all
//! takes part that does when programs use Genie: a request over the agent's
//! socket, the control plane, the other agent, and the engines. The peer does
//! nothing but run its agent. In reading order: [`process`] (agents started for
//! one run), [`memory`] (this end's blocks), [`blocks`] (a program and its
//! requests).

pub mod blocks;
pub mod memory;
pub mod process;

use std::path::{Path, PathBuf};

use genie_client::{AgentStatus, Client};

use super::BenchError;
use super::environment::cpu_time_of;
use super::message::Usage;
use process::{Process, Start};

/// The agent whose programs measure, and the one that has the windows.
#[derive(Debug)]
pub struct Agents {
    /// The socket of this host's agent.
    pub socket: PathBuf,
    /// What it calls the other one.
    pub node: String,
    /// Its process, if that can be known.
    process: Option<u32>,
    /// Both, if they were started for this; this end's is the first to go.
    started: Option<[Process; 2]>,
    /// Where their sockets are.
    _folder: Option<tempfile::TempDir>,
}

/// How the other agent is called that is started here.
const PEER: &str = "bench-b";

impl Agents {
    /// An agent that runs, and a peer of its.
    pub fn running(socket: PathBuf, node: String) -> Result<Self, BenchError> {
        let process = Client::connect(&socket)?.agent_process();
        Ok(Self {
            socket,
            node,
            process,
            started: None,
            _folder: None,
        })
    }

    /// Starts two agents on this host, the second with a window for the first.
    pub fn start(start: &Start) -> Result<Self, BenchError> {
        let folder = tempfile::tempdir().map_err(BenchError::Channel)?;
        let b = Process::start(folder.path(), PEER, None, start)?;
        let a = Process::start(folder.path(), "bench-a", Some(&b), start)?;
        Ok(Self {
            socket: a.socket.clone(),
            node: PEER.into(),
            process: Some(a.pid()),
            started: Some([a, b]),
            _folder: Some(folder),
        })
    }

    /// CPU time of the agents that can be watched.
    pub fn usage(&self) -> Vec<Usage> {
        let used = self.processes().into_iter().filter_map(|process| {
            Some(Usage {
                process,
                cpu_seconds: cpu_time_of(process)?.as_secs_f64(),
                ..Usage::default()
            })
        });
        used.collect()
    }

    /// What a reader of the CPU figures must know.
    pub fn cpu_reason(&self) -> &'static str {
        match (&self.started, self.process.and_then(cpu_time_of)) {
            (Some(_), _) => "CPU: this program and both agents",
            (None, Some(_)) => "CPU: this program and this host's agent, not the peer's",
            (None, None) => "CPU: this program only",
        }
    }

    /// The paths of both ends' sessions with each other, as far as they can be
    /// asked, and why not a better one.
    pub fn paths(&self) -> Result<(String, Vec<String>), BenchError> {
        let (ours, reasons) = path(&self.socket, |peer| peer == self.node)?;
        let theirs = match &self.started {
            Some([_, b]) => Some(path(&b.socket, |_| true)?.0),
            None => None,
        };
        let both = theirs.map_or(ours.clone(), |theirs| format!("{ours} → {theirs}"));
        Ok((both, reasons))
    }

    fn processes(&self) -> Vec<u32> {
        match &self.started {
            Some(both) => both.iter().map(Process::pid).collect(),
            None => self.process.into_iter().collect(),
        }
    }
}

/// The path to a peer, and why better ones were refused.
fn path(
    socket: &Path,
    is_peer: impl Fn(&str) -> bool,
) -> Result<(String, Vec<String>), BenchError> {
    let AgentStatus { sessions, .. } = Client::connect(socket)?.status()?;
    let mut sessions = sessions.into_iter();
    let session = sessions.find(|session| is_peer(&session.peer));
    let session = session.ok_or(BenchError::PeerGone)?;
    Ok((session.path, session.reasons))
}
