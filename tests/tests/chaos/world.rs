//! Two agents joined by one kind of path, either of which can be started again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use genie_client::{AgentStatus, Client, ClientError};
use genie_tests::{Agent, GENEROUS, eventually, genie_command};

/// Limit of each store, in bytes.
pub(crate) const STORE: u64 = 272 << 20;

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// TCP over a veth between two network namespaces.
    Tcp,
    /// Descriptors that are passed on this host.
    Shm,
    /// virtio_user and vhost.
    Dpdk,
}

/// Two agents.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) kind: Kind,
    pub(crate) a: Host,
    pub(crate) b: Host,
    hosts: Option<Namespaces>,
    before: Option<[Held; 2]>,
}

/// Where one agent runs, and how it is started.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) agent: Agent,
    folder: PathBuf,
    flags: Vec<String>,
    namespace: Option<String>,
}

/// What an agent holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    descriptors: usize,
    /// Those that are not a worker's or a blocking call's of the runtime, which
    /// come and go, by name.
    threads: BTreeMap<String, usize>,
    arenas: u64,
    arena_bytes: u64,
    stored_bytes: u64,
    /// Of memory files: arenas, the store, DPDK's pages and the vhost peer's.
    mapped_bytes: u64,
    sessions: usize,
    path: String,
}

impl Kind {
    fn preference(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Shm => "shm",
            Self::Dpdk => "dpdk,tcp",
        }
    }

    /// How long a silent peer is waited for: TCP itself needs up to 1.4 s to
    /// find out that a link is back after a second.
    pub(crate) fn liveness(self) -> Duration {
        match self {
            Self::Tcp => Duration::from_secs(3),
            Self::Shm | Self::Dpdk => Duration::from_millis(1500),
        }
    }
}

impl World {
    /// Starts both; `Err` says why that kind cannot be here.
    pub(crate) fn start(kind: Kind, folder: &Path) -> Result<Self, String> {
        let hosts = match kind {
            Kind::Tcp => Some(Namespaces::make()?),
            Kind::Shm | Kind::Dpdk => None,
        };
        let mut flags: Vec<String> = [
            format!("--transport={}", kind.preference()),
            format!("--liveness={}ms", kind.liveness().as_millis()),
            "--stall=5s".into(),
            format!("--store-bytes={STORE}"),
        ]
        .into();
        if kind == Kind::Dpdk {
            flags.push(format!(
                "--dpdk-device=pair:{}",
                folder.join("pair").display()
            ));
        }
        if kind == Kind::Tcp {
            flags.push("--allow-unauthenticated".into());
        }
        let namespace = |index: usize| hosts.as_ref().map(|hosts| hosts.names[index].clone());
        let address = |index: usize| match kind {
            Kind::Tcp => format!("10.78.0.{}", index + 1),
            Kind::Shm | Kind::Dpdk => "127.0.0.1".into(),
        };
        let on = |index: usize| {
            let address = address(index);
            let of = ["--listen", "--data"].map(|flag| format!("{flag}={address}:0"));
            [&flags[..], &of[..]].concat()
        };
        let b = Host::start("b", folder, on(1), namespace(1));
        if kind == Kind::Dpdk {
            let status = status(&b.agent).map_err(|error| error.to_string())?;
            let mut transports = status.transports.into_iter();
            if let Some(reason) = transports.find_map(|one| one.reason) {
                return Err(reason);
            }
        }
        let mut of_a = on(0);
        of_a.push(b.agent.as_peer());
        let a = Host::start("a", folder, of_a, namespace(0));
        let mut world = Self {
            kind,
            a,
            b,
            hosts,
            before: None,
        };
        // Restarts must be found where the other end looks for them.
        world.b.stay();
        world.settle().map(|()| world)
    }

    /// Both hosts.
    pub(crate) fn hosts(&mut self) -> [&mut Host; 2] {
        [&mut self.a, &mut self.b]
    }

    /// Loses every frame between the two for so long.
    pub(crate) fn black_out(&self, time: Duration) {
        let hosts = self.hosts.as_ref().expect("there is a link to cut");
        hosts.set_link("down");
        std::thread::sleep(time);
        hosts.set_link("up");
    }

    /// Removes the network device between the two; after `time` there is another.
    pub(crate) fn remove_device(&self, time: Duration) {
        let hosts = self.hosts.as_ref().expect("there is a device to remove");
        let name = &hosts.names[0];
        ip(&["-n", name, "link", "delete", "wire"]).expect("the device is there");
        std::thread::sleep(time);
        hosts.connect().expect("as at the start");
    }

    /// Waits until both agents hold what they held at the start, within a session.
    pub(crate) fn settle(&mut self) -> Result<(), String> {
        let until = Instant::now() + GENEROUS * 2;
        loop {
            let now = self.held();
            match (&now, &self.before) {
                (Ok(now), Some(before)) if now == before => return Ok(()),
                (Ok(now), None) if now[0].sessions == 1 && now[1].sessions == 1 => {
                    std::thread::sleep(Duration::from_millis(300));
                    if self.held().as_ref() == Ok(now) {
                        self.before = Some(now.clone());
                        return Ok(());
                    }
                }
                _ => {}
            }
            if Instant::now() > until {
                return Err(format!("held {:#?}\nnow {now:#?}", self.before));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn held(&self) -> Result<[Held; 2], String> {
        let mut at_a = connect(&self.a.agent)?;
        // So that there is a session.
        at_a.list(Some("b")).map_err(|error| error.to_string())?;
        drop(at_a);
        Ok([held(&self.a.agent)?, held(&self.b.agent)?])
    }
}

/// A program's connection to an agent.
pub(crate) fn connect(agent: &Agent) -> Result<Client, String> {
    Client::connect(&agent.socket).map_err(|error| error.to_string())
}

fn status(agent: &Agent) -> Result<AgentStatus, ClientError> {
    Client::connect(&agent.socket)?.status()
}

fn held(agent: &Agent) -> Result<Held, String> {
    let status = status(agent).map_err(|error| error.to_string())?;
    // The connection that asked is gone soon.
    std::thread::sleep(Duration::from_millis(20));
    let mut threads = BTreeMap::new();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.pid()));
    for task in tasks.map_err(|error| error.to_string())?.flatten() {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if !name.starts_with("genie-control") && !name.is_empty() {
            *threads.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", agent.pid()));
    let maps = maps.map_err(|error| error.to_string())?;
    let mapped = maps.lines().filter(|line| line.contains("memfd:"));
    Ok(Held {
        descriptors: agent.descriptors(),
        threads,
        arenas: status.arenas.regions,
        arena_bytes: status.arenas.used_bytes,
        stored_bytes: status.store.used_bytes,
        mapped_bytes: mapped.filter_map(length).sum(),
        sessions: status.sessions.len(),
        path: status
            .sessions
            .first()
            .map(|one| one.path.clone())
            .unwrap_or_default(),
    })
}

/// How much a line of `/proc/PID/maps` maps.
fn length(line: &str) -> Option<u64> {
    let (from, rest) = line.split_once('-')?;
    let (to, _) = rest.split_once(' ')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(to)? - number(from)?)
}

impl Host {
    fn start(name: &str, folder: &Path, flags: Vec<String>, namespace: Option<String>) -> Self {
        let agent = run(name, folder, &flags, namespace.as_deref());
        Self {
            agent,
            folder: folder.to_owned(),
            flags,
            namespace,
        }
    }

    /// From now on its agent listens where it does now.
    fn stay(&mut self) {
        self.flags.retain(|flag| !flag.starts_with("--listen"));
        self.flags.push(format!("--listen={}", self.agent.listen));
    }

    /// Kills the agent.
    pub(crate) fn kill(&mut self) {
        self.agent.kill();
    }

    /// Tells the agent to end, and waits for it.
    pub(crate) fn close(&mut self) {
        let status = self.agent.stop();
        assert!(status.success(), "{status:?}\n{}", self.agent.log());
    }

    /// Starts it again.
    pub(crate) fn restart(&mut self) {
        let name = self.agent.name.clone();
        self.agent = run(&name, &self.folder, &self.flags, self.namespace.as_deref());
    }
}

fn run(name: &str, folder: &Path, flags: &[String], namespace: Option<&str>) -> Agent {
    let command = match namespace {
        None => genie_command(),
        Some(namespace) => {
            let genie = genie_command();
            let mut command = Command::new("ip");
            command
                .args(["netns", "exec", namespace])
                .arg(genie.get_program());
            genie_tests::clean(&mut command);
            command
        }
    };
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Agent::start_from(command, folder, name, &flags)
}

/// Two network namespaces with a veth between them; removed when dropped.
#[derive(Debug)]
struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    fn make() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces need root".into());
        }
        let names = ["a", "b"].map(|end| format!("chaos-{}-{end}", std::process::id()));
        let [a, b] = &names;
        ip(&["netns", "add", a])?;
        let made = Self {
            names: names.clone(),
        };
        ip(&["netns", "add", b])?;
        for name in &names {
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        made.connect()?;
        Ok(made)
    }

    fn connect(&self) -> Result<(), String> {
        let [a, b] = &self.names;
        ip(&[
            "-n", a, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", b,
        ])?;
        for (index, name) in self.names.iter().enumerate() {
            let address = format!("10.78.0.{}/24", index + 1);
            ip(&["-n", name, "address", "add", &address, "dev", "wire"])?;
            ip(&["-n", name, "link", "set", "wire", "up"])?;
        }
        Ok(())
    }

    fn set_link(&self, state: &str) {
        ip(&["-n", &self.names[0], "link", "set", "wire", state]).expect("the link is there");
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            // The second is not there if making it failed.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).output();
    let output = output.map_err(|error| format!("ip (Debian: iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "ip {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// Waits until an agent that was stopped takes requests again.
pub(crate) fn answers(agent: &Agent) {
    eventually("an agent that goes on answers", || status(agent).ok());
}
