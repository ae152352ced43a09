//! A harness for tests across processes: real agents, the real `genie` command.
//!
//! Agents listen on ports of the kernel's choice and end with the value that
//! stands for them. The binary is looked for at `GENIE_BIN`, then beside the
//! test; `cargo build --release -p genie-controlplane` makes it.

#![forbid(unsafe_code)]

pub mod liar;
pub mod model;
pub mod nodes;
pub mod relay;
pub mod stuck_disk;

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde_json::Value;

/// How long anything may take that should take no time at all, on a machine
/// that does other things too.
pub const GENEROUS: Duration = Duration::from_secs(30);

/// An agent's process; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    /// Node name.
    pub name: String,
    /// Control address.
    pub listen: SocketAddr,
    /// Data address; none without TCP.
    pub data: Option<SocketAddr>,
    /// Application socket.
    pub socket: PathBuf,
    child: Child,
    log: PathBuf,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it said besides.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

/// A command that runs in the background; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    began: Instant,
}

/// The `genie` binary.
///
/// # Panics
/// If it was not built.
pub fn genie_path() -> PathBuf {
    let path = std::env::var_os("GENIE_BIN").map_or_else(
        || {
            let test = std::env::current_exe().expect("a test knows where it is");
            // target/release/deps/test-0123456789abcdef
            test.ancestors()
                .nth(2)
                .expect("tests lie in deps/")
                .join("genie")
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is missing: cargo build --release -p genie-controlplane",
        path.display()
    );
    path
}

/// A command without this process's `GENIE_` variables.
pub fn genie_command() -> Command {
    let mut command = Command::new(genie_path());
    clean(&mut command);
    command
}

/// Takes this process's `GENIE_` variables away from a command.
pub fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("GENIE_") {
            command.env_remove(name);
        }
    }
    if let Some(library) = std::env::var_os("GENIE_DPDK_LIB") {
        command.env("GENIE_DPDK_LIB", library);
    }
}

impl Agent {
    /// Starts an agent over TCP and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready; its log is shown.
    pub fn start(folder: &Path, name: &str, args: &[&str]) -> Self {
        let mut all = vec!["--transport", "tcp"];
        all.extend(args);
        Self::start_with(folder, name, &all)
    }

    /// [`Agent::start`], with the transports that `args` say.
    pub fn start_with(folder: &Path, name: &str, args: &[&str]) -> Self {
        Self::start_from(genie_command(), folder, name, args)
    }

    /// [`Agent::start_with`], with variables in its environment.
    ///
    /// # Panics
    /// As [`Agent::start`].
    pub fn start_in(folder: &Path, name: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut genie = genie_command();
        genie.envs(env.iter().copied());
        Self::start_from(genie, folder, name, args)
    }

    /// [`Agent::start_with`], from a command that runs `genie` in some way.
    ///
    /// # Panics
    /// As [`Agent::start`].
    pub fn start_from(mut genie: Command, folder: &Path, name: &str, args: &[&str]) -> Self {
        let log = folder.join(format!("{name}.log"));
        let socket = folder.join(format!("{name}.sock"));
        let mut child = genie
            .args(["agent", "--json", "--log", "debug", "--name", name])
            .args(default_address("--listen", args))
            .args(default_address("--data", args))
            .args(default_address("--metrics", args))
            .arg("--socket")
            .arg(&socket)
            .args(args)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).expect("the folder can be written"))
            .spawn()
            .expect("the binary can be run");
        let stdout = child.stdout.take().expect("stdout was piped");
        let (ready, wait) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = ready.send(line);
        });
        let line = wait.recv_timeout(GENEROUS).unwrap_or_default();
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            let _ = child.kill();
            let _ = child.wait();
            panic!("agent {name} is not ready: {line:?}\n{}", read_log(&log));
        };
        let address = |key: &str| ready[key].as_str().and_then(|text| text.parse().ok());
        let (listen, data) = (
            address("listen").expect("ready says where"),
            address("data"),
        );
        Self {
            name: name.to_owned(),
            listen,
            data,
            socket,
            child,
            log,
        }
    }

    /// The flag by which another agent knows this one.
    pub fn as_peer(&self) -> String {
        format!("--peer={}={}", self.name, self.listen)
    }

    /// Runs a command through this agent, to its end.
    pub fn genie(&self, args: &[&str]) -> Output {
        self.spawn(args).wait(GENEROUS)
    }

    /// Starts a command through this agent.
    pub fn spawn(&self, args: &[&str]) -> Running {
        let mut command = genie_command();
        command.args(args).env("GENIE_SOCKET", &self.socket);
        Running::start(command)
    }

    /// Starts a command as another user, for whom the binary and the socket
    /// must be in reach; only root can.
    pub fn spawn_as(&self, uid: u32, genie: &Path, args: &[&str]) -> Running {
        let mut command = Command::new(genie);
        clean(&mut command);
        command.args(args).env("GENIE_SOCKET", &self.socket);
        command.uid(uid).gid(uid);
        Running::start(command)
    }

    /// Runs a command with `--json`; returns what it printed.
    ///
    /// # Panics
    /// If it failed.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.genie(&[args, &["--json"]].concat());
        assert!(
            output.status.success(),
            "genie {args:?}: {output:?}\n{}",
            self.log()
        );
        serde_json::from_str(&output.stdout).expect("--json prints JSON")
    }

    /// `genie status`.
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid(&self.child), signal).expect("it is our child");
        if signal == Signal::STOP {
            // Its threads may still run when the signal was sent.
            let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
            let id = WaitId::Pid(pid(&self.child));
            rustix::process::waitid(id, stopped).expect("it is our child");
        }
    }

    /// Asks the agent to end, and waits for that.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        wait(&mut self.child, GENEROUS).expect("an agent ends on SIGTERM")
    }

    /// Kills the agent and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(folder).expect("it runs").count()
    }

    /// Waits until it has logged this.
    ///
    /// # Panics
    /// If it does not.
    pub fn assert_logs(&self, text: &str) {
        eventually(&format!("'{text}' is logged"), || {
            self.log().contains(text).then_some(())
        });
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        format!("--- log of {} ---\n{}", self.name, read_log(&self.log))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // A stopped process dies of SIGKILL too.
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

impl Running {
    /// Starts a command.
    pub fn start(mut command: Command) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // A binary that was just copied may be open for writing in a child
        // that another test is starting.
        let child = eventually("the command can be run", || match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => None,
            spawned => Some(spawned.expect("the command can be run")),
        });
        Self {
            child,
            began: Instant::now(),
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid(&self.child), signal).expect("it is our child");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end within `limit`: it hangs.
    pub fn wait(mut self, limit: Duration) -> Output {
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let stdout = std::thread::spawn(move || read_all(stdout));
        let stderr = std::thread::spawn(move || read_all(stderr));
        let status = wait(&mut self.child, limit);
        let took = self.began.elapsed();
        assert!(status.is_some(), "a command hangs: not done after {took:?}");
        let status = status.expect("just checked");
        let text =
            |thread: std::thread::JoinHandle<String>| thread.join().expect("reads to the end");
        Output {
            status,
            stdout: text(stdout),
            stderr: text(stderr),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    /// Whether it failed as a command should: exit code 1 and a reason that
    /// contains `reason`.
    ///
    /// # Panics
    /// If it did anything else.
    pub fn assert_fails_with(&self, reason: &str) {
        assert_eq!(
            self.status.code(),
            Some(1),
            "signal {:?}: {self:?}",
            self.status.signal()
        );
        assert!(
            self.stderr.contains(reason),
            "no {reason:?} in {:?}",
            self.stderr
        );
    }
}

/// A free port of the loopback interface, unless `args` say something else.
fn default_address(flag: &str, args: &[&str]) -> Option<String> {
    let value = |arg: &&str| {
        arg.strip_prefix(flag)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    };
    let given = args.iter().any(value);
    (!given).then(|| format!("{flag}=127.0.0.1:0"))
}

/// Looks again and again until `found` gives something.
///
/// # Panics
/// If it does not within [`GENEROUS`].
pub fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + GENEROUS;
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(Instant::now() < until, "still not: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            return Some(status);
        }
        if Instant::now() >= until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn read_all(stream: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        let _ = stream.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn read_log(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
