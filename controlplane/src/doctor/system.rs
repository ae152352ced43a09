//! What the checks look at: the real machine, or in tests one that is made up.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use genie_client::{Client, ClientError};
use genie_clock::Clock;
use genie_dataplane::dpdk::{self, LoadError};
use genie_dataplane::memory::accelerator::{self, MemoryKind};
use genie_hugepages::{Root, Survey};

use crate::frame::{FrameError, exchange_preamble_blocking};
use crate::status::{AgentStatus, SessionStatus};

/// How long anything may take that the doctor asks over a network.
const PATIENCE: Duration = Duration::from_secs(5);

/// How an address answers to whoever wants to listen on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// It is free.
    Free,
    /// Somebody listens there.
    Taken,
    /// The system refuses for another reason.
    Refused(String),
}

/// What the agent on this host says.
#[derive(Clone, Debug)]
pub enum AgentReply {
    /// Nobody is there.
    Absent,
    /// It does not talk to this user.
    Refused(String),
    /// It is there.
    Status(Box<AgentStatus>),
}

/// What a peer's control port says to whoever knocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerReply {
    /// Nobody is there.
    Unreachable(String),
    /// Somebody is, who is not of Genie, or not in a language of ours.
    Foreign(String),
    /// An agent of another version, older or newer than this one.
    Version {
        /// What it says.
        why: String,
        /// Whether this host has the older one.
        ours_is_older: bool,
    },
    /// An agent; after how long it answered.
    Genie(Duration),
}

/// A machine, as far as the checks look at it.
pub trait System {
    /// The effective user.
    fn uid(&self) -> u32;
    /// A file's text; none if it cannot be read.
    fn read(&self, path: &str) -> Option<String>;
    /// The names in a folder, in order; none if it cannot be read.
    fn list(&self, path: &str) -> Vec<String>;
    /// The last component of what a link points to.
    fn link(&self, path: &str) -> Option<String>;
    /// Whether this user may make files in a folder.
    fn writable(&self, folder: &Path) -> bool;
    /// Huge pages.
    fn huge_pages(&self) -> Result<Survey, String>;
    /// DPDK's version and Genie's build of the driver, or why there is none.
    fn dpdk(&self) -> Result<String, (String, DpdkLack)>;
    /// The first CUDA device, or why there is none.
    fn cuda(&self) -> Result<String, String>;
    /// Moves a few bytes over TCP on the loopback interface.
    fn loopback(&self) -> Result<(), String>;
    /// Whether one could listen there.
    fn bind(&self, address: SocketAddr) -> Bind;
    /// A port that is free on this address.
    fn free_port(&self, address: SocketAddr) -> Option<u16>;
    /// The time.
    fn now(&self) -> SystemTime;
    /// What the kernel says of its clock.
    fn clock(&self) -> Result<Clock, String>;
    /// What a network interface does for the CPU (ethtool -k); none if that
    /// cannot be asked.
    fn offloads(&self, interface: &str) -> Option<String>;
    /// The agent behind a socket.
    fn agent(&self, socket: &Path) -> AgentReply;
    /// Has the agent open a session with a peer; what it is, or why there is none.
    fn session(&self, socket: &Path, node: &str) -> Result<SessionStatus, String>;
    /// Knocks at a peer's control port.
    fn knock(&self, address: &str) -> PeerReply;
}

/// What to do about a lack of DPDK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpdkLack {
    /// Genie's driver library is not there.
    Driver,
    /// DPDK itself is not installed.
    Library,
    /// Files that must not be trusted, or do not belong together.
    Files,
}

/// This machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Real;

impl System for Real {
    fn uid(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(path).ok()
    }

    fn list(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn link(&self, path: &str) -> Option<String> {
        let target = std::fs::read_link(path).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    fn writable(&self, folder: &Path) -> bool {
        tempfile::tempfile_in(folder).is_ok()
    }

    fn huge_pages(&self) -> Result<Survey, String> {
        genie_hugepages::survey(&Root::default()).map_err(|error| error.to_string())
    }

    fn dpdk(&self) -> Result<String, (String, DpdkLack)> {
        match dpdk::load() {
            Ok(library) => Ok(format!(
                "{}, driver library of build {}",
                library.dpdk_version(),
                library.build_id()
            )),
            Err(error) => {
                let lack = match &error {
                    LoadError::NotFound { .. } | LoadError::BuiltWithoutDpdk { .. } => {
                        DpdkLack::Driver
                    }
                    LoadError::MissingDependency { .. } => DpdkLack::Library,
                    _ => DpdkLack::Files,
                };
                Err((error.to_string(), lack))
            }
        }
    }

    fn cuda(&self) -> Result<String, String> {
        match accelerator::open(MemoryKind::Cuda(0)) {
            Ok(Some(device)) => {
                let properties = device.properties();
                Ok(format!("{}, driver {}", properties.name, properties.driver))
            }
            Ok(None) => Err("there is no such device".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn loopback(&self) -> Result<(), String> {
        exchange().map_err(|error| error.to_string())
    }

    fn bind(&self, address: SocketAddr) -> Bind {
        match TcpListener::bind(address) {
            Ok(_) => Bind::Free,
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Bind::Taken,
            Err(error) => Bind::Refused(error.to_string()),
        }
    }

    fn free_port(&self, mut address: SocketAddr) -> Option<u16> {
        address.set_port(0);
        let listener = TcpListener::bind(address).ok()?;
        Some(listener.local_addr().ok()?.port())
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn clock(&self) -> Result<Clock, String> {
        genie_clock::clock().map_err(|error| error.to_string())
    }

    fn offloads(&self, interface: &str) -> Option<String> {
        let output = Command::new("ethtool").args(["-k", interface]).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn agent(&self, socket: &Path) -> AgentReply {
        let status = Client::connect(socket).and_then(|mut client| client.status());
        match status {
            Ok(status) => AgentReply::Status(Box::new(status)),
            Err(ClientError::NoAgent(_)) => AgentReply::Absent,
            Err(error) => AgentReply::Refused(error.to_string()),
        }
    }

    fn session(&self, socket: &Path, node: &str) -> Result<SessionStatus, String> {
        let text = |error: ClientError| error.to_string();
        let mut client = Client::connect(socket).map_err(text)?;
        // A listing needs a session; what it lists, or that it may not, does
        // not matter.
        let listed = client.list(Some(node)).map_err(text);
        let sessions = client.status().map_err(text)?.sessions;
        let found = sessions.into_iter().find(|session| session.peer == node);
        match (found, listed) {
            (Some(session), _) => Ok(session),
            (None, Err(error)) => Err(error),
            (None, Ok(_)) => Err("the session has ended already".to_owned()),
        }
    }

    fn knock(&self, address: &str) -> PeerReply {
        let began = Instant::now();
        let mut stream = match connect(address) {
            Ok(stream) => stream,
            Err(error) => return PeerReply::Unreachable(error.to_string()),
        };
        let took = began.elapsed();
        match exchange_preamble_blocking(&mut stream) {
            Ok(_) => PeerReply::Genie(took),
            Err(error) => {
                let why = error.to_string();
                match error {
                    FrameError::Version { theirs } => PeerReply::Version {
                        why,
                        ours_is_older: theirs.start() > crate::frame::VERSIONS.end(),
                    },
                    _ => PeerReply::Foreign(why),
                }
            }
        }
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn exchange() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let mut near = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
    let (mut far, _) = listener.accept()?;
    far.set_read_timeout(Some(PATIENCE))?;
    near.write_all(b"genie")?;
    let mut bytes = [0; 5];
    far.read_exact(&mut bytes)?;
    if &bytes == b"genie" {
        Ok(())
    } else {
        Err(io::Error::other("other bytes arrived than were sent"))
    }
}
