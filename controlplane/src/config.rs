//! What an agent is told: flags, then `GENIE_*` variables, then a TOML file.
//!
//! A flag wins over its variable (clap sees to that), both win over the file.
//! A key or variable that nobody knows is refused with the nearest known one:
//! a typing error must not silently leave a default in place.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::FalseyValueParser;
use genie_dataplane::device::tap;
use genie_dataplane::dpdk::DeviceSpec;
use genie_dataplane::memory::accelerator::{MemoryKind, UnknownMemory};
use genie_dataplane::tcp::STREAMS_MAX;
use serde::Deserialize;

use crate::identity::CredentialFiles;
use crate::metrics;
use crate::quota::Limits;
use crate::quota::peer::PeerLimits;
use crate::rights::{ANYBODY, Access, Rights};
use crate::security::{DataSecurity, UnknownSecurity};
use crate::tensor::check_name;
use crate::transport::{Preference, PreferenceError};
use crate::units::{UnitError, parse_bytes, parse_duration, show_bytes};

/// Control port, and the data port next to it.
pub(crate) const CONTROL_PORT: u16 = 5555;
pub(crate) const DATA_PORT: u16 = 5556;

/// After how much silence a peer is given up, if nothing else was said.
const LIVENESS: Duration = Duration::from_secs(2);

/// How long a peer may take for one step of a request, if nothing else was
/// said: the longest is clearing memory, which has an allowance of its own.
const STALL: Duration = Duration::from_secs(30);

/// Of each recorded frame, if nothing else was said: all headers, and little of
/// the tensors, which are not the operator's.
const TAP_SNAP: u64 = 128;

/// Length of that record, if nothing else was said: some 400 000 frames.
const TAP_BYTES: u64 = 64 << 20;

/// How long an agent that was told to stop waits for what is under way.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Variables that start with `GENIE_` and are not flags of the agent.
const OTHER_VARIABLES: [&str; 15] = [
    "GENIE_BIN",
    "GENIE_COMMIT",
    "GENIE_DEADLINE",
    "GENIE_DPDK_LIB",
    "GENIE_FAILOVER_SECONDS",
    "GENIE_HUGEPAGES",
    "GENIE_JSON",
    "GENIE_LOG",
    "GENIE_MEMORY",
    "GENIE_PTXAS",
    "GENIE_PYTHON",
    "GENIE_RETRY",
    "GENIE_SIM",
    "GENIE_WIRE",
    "GENIE_WITHOUT_DPDK",
];

/// How those start that only tests, scripts and benchmarks read.
const OTHER_PREFIXES: [&str; 5] = [
    "GENIE_CHAOS_",
    "GENIE_GUEST_",
    "GENIE_LAB",
    "GENIE_REQUIRE_",
    "GENIE_TEST_",
];

/// The flags of `genie agent`; what is not given comes from the file or a default.
#[derive(Args, Clone, Debug, Default)]
pub struct AgentArgs {
    /// Read settings from this TOML file; its keys are the names of these flags
    #[arg(long, value_name = "FILE", env = "GENIE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Node name [default: the host's name]
    #[arg(long, env = "GENIE_NAME")]
    pub name: Option<String>,
    /// Where peers reach the agent [default: 127.0.0.1:5555]
    #[arg(long, value_name = "ADDR", env = "GENIE_LISTEN")]
    pub listen: Option<SocketAddr>,
    /// Where peers' TCP data connections arrive [default: port 5556 of the address of --listen]
    #[arg(long, value_name = "ADDR", env = "GENIE_DATA")]
    pub data: Option<SocketAddr>,
    /// The socket for programs on this host
    #[arg(long, value_name = "PATH", env = "GENIE_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Who may use the socket, as an octal file mode [default: 0666 for an agent of root's, else 0600]
    #[arg(long, value_name = "MODE", env = "GENIE_SOCKET_MODE", value_parser = parse_mode)]
    pub socket_mode: Option<u32>,
    /// The socket's group, by name or number
    #[arg(long, value_name = "GROUP", env = "GENIE_SOCKET_GROUP")]
    pub socket_group: Option<String>,
    /// Transports allowed, best first: auto, or one or more of shm,dpdk,tcp [default: auto]
    #[arg(long, value_name = "LIST", env = "GENIE_TRANSPORT")]
    pub transport: Option<Preference>,
    /// Device for DPDK: pci:0000:01:00.0, vdev:net_memif0,… or pair:SOCKET
    #[arg(long, value_name = "SPEC", env = "GENIE_DPDK_DEVICE")]
    pub dpdk_device: Option<DeviceSpec>,
    /// Record the DPDK device's frames in this pcap file, which must not exist
    #[arg(long, value_name = "FILE", env = "GENIE_TAP")]
    pub tap: Option<PathBuf>,
    /// Record of each frame at most this much [default: 128]
    #[arg(long, value_name = "BYTES", env = "GENIE_TAP_SNAP", value_parser = parse_bytes)]
    pub tap_snap: Option<u64>,
    /// Stop recording when the file has this length [default: 64MiB]
    #[arg(long, value_name = "BYTES", env = "GENIE_TAP_BYTES", value_parser = parse_bytes)]
    pub tap_bytes: Option<u64>,
    /// Queues of the DPDK device, with an engine each that polls on a thread of its own [default: 1]
    #[arg(long, value_name = "N", env = "GENIE_QUEUES", value_parser = clap::value_parser!(u16).range(1..=QUEUES_MAX as i64))]
    pub queues: Option<u16>,
    /// Largest IP packet on the DPDK device, in bytes, as far as it and its link carry that [default: 9000]
    #[arg(long, value_name = "BYTES", env = "GENIE_DPDK_MTU", value_parser = clap::value_parser!(u16).range(DPDK_MTU))]
    pub dpdk_mtu: Option<u16>,
    /// Address of this node on the DPDK device's link; may be repeated
    #[arg(
        long,
        value_name = "IP",
        env = "GENIE_DPDK_ADDRESS",
        value_delimiter = ','
    )]
    pub dpdk_address: Vec<IpAddr>,
    /// Accelerator whose memory tensors may be in: cuda:N, or sim, which is simulated; may be repeated
    #[arg(
        long,
        value_name = "KIND",
        env = "GENIE_ACCELERATOR",
        value_delimiter = ','
    )]
    pub accelerator: Vec<MemoryKind>,
    /// A peer that can be dialled; may be repeated
    #[arg(long, value_name = "NAME=ADDR", env = "GENIE_PEER", value_delimiter = ',', value_parser = parse_peer)]
    pub peer: Vec<(String, String)>,
    /// Limit of the tensor store, such as 8GiB [default: a quarter of the memory]
    #[arg(long, value_name = "BYTES", env = "GENIE_STORE_BYTES", value_parser = parse_bytes)]
    pub store_bytes: Option<u64>,
    /// Limit of all applications' arenas together [default: a quarter of the memory]
    #[arg(long, value_name = "BYTES", env = "GENIE_ARENA_BYTES", value_parser = parse_bytes)]
    pub arena_bytes: Option<u64>,
    /// Limit of one user's arenas [default: three quarters of --arena-bytes]
    #[arg(long, value_name = "BYTES", env = "GENIE_USER_ARENA_BYTES", value_parser = parse_bytes)]
    pub user_arena_bytes: Option<u64>,
    /// Most arenas of one user [default: 256]
    #[arg(long, value_name = "N", env = "GENIE_USER_ARENAS")]
    pub user_arenas: Option<u64>,
    /// Most connections of one user, each with one request at a time [default: 64]
    #[arg(long, value_name = "N", env = "GENIE_USER_CONNECTIONS")]
    pub user_connections: Option<u64>,
    /// Most memory in the store for one peer [default: --store-bytes]
    #[arg(long, value_name = "BYTES", env = "GENIE_PEER_MEMORY", value_parser = parse_bytes)]
    pub peer_memory: Option<u64>,
    /// Most transfers of one peer under way [default: 2048]
    #[arg(long, value_name = "N", env = "GENIE_PEER_TRANSFERS")]
    pub peer_transfers: Option<u64>,
    /// Most requests of one peer in a second [default: 100000]
    #[arg(long, value_name = "N", env = "GENIE_PEER_RATE")]
    pub peer_rate: Option<u64>,
    /// Most sessions of one peer [default: 64]
    #[arg(long, value_name = "N", env = "GENIE_PEER_SESSIONS")]
    pub peer_sessions: Option<u64>,
    /// Give a silent peer up after this long [default: 2s]
    #[arg(long, value_name = "TIME", env = "GENIE_LIVENESS", value_parser = parse_duration)]
    pub liveness: Option<Duration>,
    /// Give a request up that makes no progress for this long [default: 30s]
    #[arg(long, value_name = "TIME", env = "GENIE_STALL", value_parser = parse_duration)]
    pub stall: Option<Duration>,
    /// TCP connections a session [default: 2]
    #[arg(long, value_name = "N", env = "GENIE_STREAMS", value_parser = clap::value_parser!(u16).range(1..=STREAMS_MAX as i64))]
    pub streams: Option<u16>,
    /// The kernel's congestion control of TCP data connections: cubic, bbr … [default: the system's; over loopback cubic]
    #[arg(long, value_name = "NAME", env = "GENIE_TCP_CONGESTION")]
    pub tcp_congestion: Option<String>,
    /// Demand that tensors are encrypted and authenticated on their way: plain or aead, which needs credentials [default: plain]
    #[arg(long, value_name = "MODE", env = "GENIE_DATA_SECURITY")]
    pub data_security: Option<DataSecurity>,
    /// Certificates of the CA that peers' must be signed by ('genie ca init' makes one)
    #[arg(long, value_name = "FILE", env = "GENIE_CA")]
    pub ca: Option<PathBuf>,
    /// This node's certificate, with its --name ('genie ca issue NAME' makes one)
    #[arg(long, value_name = "FILE", env = "GENIE_CERT")]
    pub cert: Option<PathBuf>,
    /// The certificate's private key
    #[arg(long, value_name = "FILE", env = "GENIE_KEY")]
    pub key: Option<PathBuf>,
    /// A peer that may open sessions; may be repeated [default: all that the CA certified]
    #[arg(long, value_name = "NAME", env = "GENIE_ALLOW", value_delimiter = ',')]
    pub allow: Vec<String>,
    /// Where metrics are served over HTTP, or off [default: 127.0.0.1:9095]
    #[arg(long, value_name = "ADDR", env = "GENIE_METRICS")]
    pub metrics: Option<metrics::Wanted>,
    /// Listen on addresses that others can reach though nobody is authenticated
    #[arg(long, env = "GENIE_ALLOW_UNAUTHENTICATED", value_parser = FalseyValueParser::new())]
    pub allow_unauthenticated: bool,
}

/// Settings of an agent, complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Node name.
    pub name: String,
    /// Control address.
    pub listen: SocketAddr,
    /// Data address.
    pub data: SocketAddr,
    /// Application socket.
    pub socket: PathBuf,
    /// Its file mode.
    pub socket_mode: u32,
    /// Its group, if not the agent's own.
    pub socket_group: Option<u32>,
    /// Transports allowed, best first.
    pub transport: Preference,
    /// DPDK device.
    pub dpdk_device: Option<DeviceSpec>,
    /// Where its frames are recorded, if they are.
    pub tap: Option<tap::Options>,
    /// Queues of it.
    pub queues: u16,
    /// Largest IP packet on it, in bytes.
    pub dpdk_mtu: u16,
    /// Addresses on its link.
    pub dpdk_addresses: Vec<IpAddr>,
    /// Accelerators.
    pub accelerators: Vec<MemoryKind>,
    /// Peers by name.
    pub peers: BTreeMap<String, String>,
    /// Limit of the store.
    pub store_bytes: u64,
    /// Limit of all arenas.
    pub arena_bytes: u64,
    /// What one user may have.
    pub user_limits: Limits,
    /// What one peer may have.
    pub peer_limits: PeerLimits,
    /// What peers with limits of their own may have, by name.
    pub own_limits: BTreeMap<String, PeerLimits>,
    /// After how much silence a peer is given up.
    pub liveness: Duration,
    /// For how long a request may make no progress.
    pub stall: Duration,
    /// TCP connections a session.
    pub streams: u16,
    /// The kernel's congestion control of TCP data connections, if one was asked for.
    pub tcp_congestion: Option<String>,
    /// What paths must be.
    pub data_security: DataSecurity,
    /// Where its credentials lie.
    pub credentials: Option<CredentialFiles>,
    /// Which peers may open sessions, and what they may do.
    pub access: Access,
    /// Where metrics are served.
    pub metrics: metrics::Wanted,
    /// Whether it may listen where strangers can reach it.
    pub allow_unauthenticated: bool,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not TOML, or a value is of the wrong kind.
    #[error("{place}: {message}")]
    Toml {
        /// Which file.
        place: String,
        /// What is wrong, and where.
        message: String,
    },
    /// A key that nobody knows.
    #[error("{place}: unknown key '{key}'{suggestion}")]
    UnknownKey {
        /// Which file.
        place: String,
        /// The key.
        key: String,
        /// The nearest known one.
        suggestion: String,
    },
    /// A variable that nobody knows.
    #[error("unknown variable {name} in the environment{suggestion}")]
    UnknownVariable {
        /// Its name.
        name: String,
        /// The nearest known one.
        suggestion: String,
    },
    /// A value that cannot be.
    #[error("{key}: {message}")]
    Value {
        /// Which setting.
        key: &'static str,
        /// Why not.
        message: String,
    },
    /// No place for the socket.
    #[error("no default place for the application socket: name one with --socket")]
    NoSocket,
    /// Not for strangers.
    #[error(
        "{0} can be reached from other machines, and without credentials anybody could open \
         sessions: make some with 'genie ca init' and 'genie ca issue NAME' and add --ca, --cert \
         and --key; or listen on 127.0.0.1; or, in a private test network only, add \
         --allow-unauthenticated"
    )]
    Exposed(SocketAddr),
}

/// The TOML file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct File {
    name: Option<String>,
    listen: Option<SocketAddr>,
    data: Option<SocketAddr>,
    socket: Option<PathBuf>,
    socket_mode: Option<String>,
    socket_group: Option<String>,
    transport: Option<OneOrMore>,
    dpdk_device: Option<DeviceSpec>,
    tap: Option<PathBuf>,
    tap_snap: Option<Number>,
    tap_bytes: Option<Number>,
    queues: Option<u16>,
    dpdk_mtu: Option<u16>,
    dpdk_address: Option<OneOrMore>,
    accelerator: Option<OneOrMore>,
    peer: BTreeMap<String, String>,
    store_bytes: Option<Number>,
    arena_bytes: Option<Number>,
    user_arena_bytes: Option<Number>,
    user_arenas: Option<u64>,
    user_connections: Option<u64>,
    peer_memory: Option<Number>,
    peer_transfers: Option<u64>,
    peer_rate: Option<u64>,
    peer_sessions: Option<u64>,
    limits: BTreeMap<String, OwnLimits>,
    liveness: Option<String>,
    stall: Option<String>,
    streams: Option<u16>,
    tcp_congestion: Option<String>,
    data_security: Option<String>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    allow: Option<OneOrMore>,
    rights: BTreeMap<String, Rights>,
    metrics: Option<String>,
    allow_unauthenticated: bool,
}

/// Each has an engine that polls, and a ring toward every other.
const QUEUES_MAX: u16 = 32;

/// From what every IPv4 host takes (RFC 791) to what a packet buffer of DPDK's
/// has room for.
const DPDK_MTU: std::ops::RangeInclusive<i64> = 576..=65_000;

const KEYS: [&str; 38] = [
    "name",
    "listen",
    "data",
    "socket",
    "socket-mode",
    "socket-group",
    "transport",
    "dpdk-device",
    "tap",
    "tap-snap",
    "tap-bytes",
    "queues",
    "dpdk-mtu",
    "dpdk-address",
    "accelerator",
    "peer",
    "store-bytes",
    "arena-bytes",
    "user-arena-bytes",
    "user-arenas",
    "user-connections",
    "peer-memory",
    "peer-transfers",
    "peer-rate",
    "peer-sessions",
    "limits",
    "liveness",
    "stall",
    "streams",
    "tcp-congestion",
    "data-security",
    "ca",
    "cert",
    "key",
    "allow",
    "rights",
    "metrics",
    "allow-unauthenticated",
];

/// Limits of one peer's own; the others count where one is missing.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
struct OwnLimits {
    memory: Option<Number>,
    transfers: Option<u64>,
    rate: Option<u64>,
    sessions: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(u64),
    Text(String),
}

impl Config {
    /// Puts the settings together; `variables` are the environment's names.
    pub fn load(
        args: AgentArgs,
        variables: impl Iterator<Item = String>,
    ) -> Result<Self, ConfigError> {
        check_variables(variables)?;
        let file = match &args.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
                    path: path.clone(),
                    source,
                })?;
                File::parse(&text, &path.display().to_string())?
            }
            None => File::default(),
        };
        Self::merge(args, file)
    }

    /// The settings that a file of this text gives, without flags.
    #[cfg(any(test, fuzzing, feature = "fuzzing"))]
    pub(crate) fn of_text(text: &str, place: &str) -> Result<Self, ConfigError> {
        Self::merge(AgentArgs::default(), File::parse(text, place)?)
    }

    fn merge(args: AgentArgs, file: File) -> Result<Self, ConfigError> {
        let value = |key| move |message: String| ConfigError::Value { key, message };
        let listen = args
            .listen
            .or(file.listen)
            .unwrap_or(([127, 0, 0, 1], CONTROL_PORT).into());
        let transport = match (args.transport, file.transport) {
            (Some(transport), _) => transport,
            (None, Some(list)) => list
                .join()
                .parse()
                .map_err(|error: PreferenceError| value("transport")(error.to_string()))?,
            (None, None) => Preference::default(),
        };
        let dpdk_addresses = if args.dpdk_address.is_empty() {
            let list = file.dpdk_address.map(OneOrMore::list).unwrap_or_default();
            let parse = |text: String| {
                text.parse()
                    .map_err(|_| value("dpdk-address")(format!("'{text}' is no IP address")))
            };
            list.into_iter().map(parse).collect::<Result<_, _>>()?
        } else {
            args.dpdk_address
        };
        let accelerators = if args.accelerator.is_empty() {
            let list = file.accelerator.map(OneOrMore::list).unwrap_or_default();
            let parse = |text: String| {
                text.parse()
                    .map_err(|error: UnknownMemory| value("accelerator")(error.to_string()))
            };
            list.into_iter().map(parse).collect::<Result<_, _>>()?
        } else {
            args.accelerator
        };
        let time = |arg: Option<Duration>, file: Option<String>, key, default| match (arg, file) {
            (Some(time), _) => Ok(time),
            (None, Some(text)) => {
                parse_duration(&text).map_err(|error: UnitError| value(key)(error.to_string()))
            }
            (None, None) => Ok(default),
        };
        let bytes = |arg: Option<u64>, file: Option<Number>, key, default| match (arg, file) {
            (Some(bytes), _) | (None, Some(Number::Plain(bytes))) => Ok(bytes),
            (None, Some(Number::Text(text))) => {
                parse_bytes(&text).map_err(|error| value(key)(error.to_string()))
            }
            (None, None) => Ok(default),
        };
        let arena_bytes = bytes(
            args.arena_bytes,
            file.arena_bytes,
            "arena-bytes",
            quarter_of_memory(),
        )?;
        let user_limits = Limits {
            bytes: bytes(
                args.user_arena_bytes,
                file.user_arena_bytes,
                "user-arena-bytes",
                arena_bytes / 4 * 3,
            )?,
            arenas: args.user_arenas.or(file.user_arenas).unwrap_or(256),
            connections: args
                .user_connections
                .or(file.user_connections)
                .unwrap_or(64),
        };
        let store_bytes = bytes(
            args.store_bytes,
            file.store_bytes,
            "store-bytes",
            quarter_of_memory(),
        )?;
        let tap = match args.tap.or(file.tap) {
            Some(path) => {
                let snap = bytes(args.tap_snap, file.tap_snap, "tap-snap", TAP_SNAP)?;
                Some(tap::Options {
                    file: path,
                    snap_bytes: u32::try_from(snap).unwrap_or(u32::MAX),
                    file_bytes: bytes(args.tap_bytes, file.tap_bytes, "tap-bytes", TAP_BYTES)?,
                })
            }
            None => None,
        };
        let peer_limits = PeerLimits {
            memory: bytes(
                args.peer_memory,
                file.peer_memory,
                "peer-memory",
                store_bytes,
            )?,
            transfers: args.peer_transfers.or(file.peer_transfers).unwrap_or(2048),
            rate: args.peer_rate.or(file.peer_rate).unwrap_or(100_000),
            sessions: args.peer_sessions.or(file.peer_sessions).unwrap_or(64),
        };
        let own = |(name, own): (String, OwnLimits)| {
            let limits = PeerLimits {
                memory: bytes(None, own.memory, "limits", peer_limits.memory)?,
                transfers: own.transfers.unwrap_or(peer_limits.transfers),
                rate: own.rate.unwrap_or(peer_limits.rate),
                sessions: own.sessions.unwrap_or(peer_limits.sessions),
            };
            check_node(&name).map_err(value("limits"))?;
            Ok((name, limits))
        };
        let own_limits = file.limits.into_iter().map(own);
        let own_limits = own_limits.collect::<Result<_, ConfigError>>()?;
        let socket_mode = match (args.socket_mode, file.socket_mode) {
            (Some(mode), _) => mode,
            (None, Some(text)) => parse_mode(&text).map_err(value("socket-mode"))?,
            // Peer credentials and quotas keep users apart; a group does more.
            (None, None) if rustix::process::geteuid().is_root() => 0o666,
            (None, None) => 0o600,
        };
        let socket_group = args.socket_group.or(file.socket_group);
        let socket_group = socket_group
            .map(|group| find_group(&group))
            .transpose()
            .map_err(value("socket-group"))?;
        let peers = if args.peer.is_empty() {
            let parse =
                |(name, address)| parse_peer(&format!("{name}={address}")).map_err(value("peer"));
            file.peer.into_iter().map(parse).collect::<Result<_, _>>()?
        } else {
            args.peer.into_iter().collect()
        };
        let credentials = match (
            args.ca.or(file.ca),
            args.cert.or(file.cert),
            args.key.or(file.key),
        ) {
            (Some(ca), Some(cert), Some(key)) => Some(CredentialFiles { ca, cert, key }),
            (None, None, None) => None,
            (ca, cert, _) => {
                let missing = match (ca, cert) {
                    (None, _) => "ca",
                    (_, None) => "cert",
                    _ => "key",
                };
                return Err(value(missing)(
                    "--ca, --cert and --key go together: this one is missing".to_owned(),
                ));
            }
        };
        let allowed = if args.allow.is_empty() {
            file.allow.map(OneOrMore::list).unwrap_or_default()
        } else {
            args.allow
        };
        let access = Access {
            allowed: allowed.into_iter().collect(),
            rights: file.rights,
        };
        let config = Self {
            name: args.name.or(file.name).unwrap_or_else(host_name),
            listen,
            data: args
                .data
                .or(file.data)
                .unwrap_or_else(|| SocketAddr::new(listen.ip(), DATA_PORT)),
            socket: match args.socket.or(file.socket) {
                Some(socket) => socket,
                None => default_socket().ok_or(ConfigError::NoSocket)?,
            },
            socket_mode,
            socket_group,
            transport,
            dpdk_device: args.dpdk_device.or(file.dpdk_device),
            tap,
            queues: args.queues.or(file.queues).unwrap_or(1),
            dpdk_mtu: args.dpdk_mtu.or(file.dpdk_mtu).unwrap_or(9000),
            dpdk_addresses,
            accelerators,
            peers,
            store_bytes,
            arena_bytes,
            user_limits,
            peer_limits,
            own_limits,
            liveness: time(args.liveness, file.liveness, "liveness", LIVENESS)?,
            stall: time(args.stall, file.stall, "stall", STALL)?,
            streams: args.streams.or(file.streams).unwrap_or(2),
            tcp_congestion: args.tcp_congestion.or(file.tcp_congestion),
            data_security: match (args.data_security, file.data_security) {
                (Some(security), _) => security,
                (None, Some(text)) => text
                    .parse()
                    .map_err(|error: UnknownSecurity| value("data-security")(error.to_string()))?,
                (None, None) => DataSecurity::default(),
            },
            credentials,
            access,
            metrics: match (args.metrics, file.metrics) {
                (Some(wanted), _) => wanted,
                (None, Some(text)) => text
                    .parse()
                    .map_err(|error: metrics::WantedError| value("metrics")(error.to_string()))?,
                (None, None) => metrics::Wanted::default(),
            },
            allow_unauthenticated: args.allow_unauthenticated || file.allow_unauthenticated,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let value = |key, message: String| Err(ConfigError::Value { key, message });
        for name in self.peers.keys().chain([&self.name]) {
            if let Err(error) = check_node(name) {
                return value("name", error);
            }
        }
        if self.peers.contains_key(&self.name) {
            let name = &self.name;
            return value(
                "peer",
                format!("'{name}' is this node's own name: give it another --name"),
            );
        }
        if !(1..=STREAMS_MAX).contains(&self.streams) {
            return value(
                "streams",
                format!("{} is not between 1 and {STREAMS_MAX}", self.streams),
            );
        }
        if !(1..=QUEUES_MAX).contains(&self.queues) {
            return value(
                "queues",
                format!("{} is not between 1 and {QUEUES_MAX}", self.queues),
            );
        }
        if !DPDK_MTU.contains(&self.dpdk_mtu.into()) {
            let (least, most) = (DPDK_MTU.start(), DPDK_MTU.end());
            return value(
                "dpdk-mtu",
                format!("{} is not between {least} and {most}", self.dpdk_mtu),
            );
        }
        for name in self.access.allowed.iter().chain(self.access.rights.keys()) {
            if name != ANYBODY
                && let Err(error) = check_node(name)
            {
                return value("allow", error);
            }
        }
        if self.credentials.is_none() && self.access != Access::default() {
            return value(
                "allow",
                "without --ca, --cert and --key peers are whoever they say they are, so neither \
                 allow nor rights would keep anybody out"
                    .to_owned(),
            );
        }
        if self.credentials.is_none() && self.data_security == DataSecurity::Aead {
            return value(
                "data-security",
                "aead takes keys that only the two ends have: add --ca, --cert and --key \
                 ('genie ca init' and 'genie ca issue' make them)"
                    .to_owned(),
            );
        }
        if self.tap.is_some() && self.dpdk_device.is_none() {
            return value(
                "tap",
                "it records frames of the DPDK device: name one with --dpdk-device".to_owned(),
            );
        }
        let open = self.credentials.is_none();
        for address in [self.listen, self.data] {
            if open && !address.ip().is_loopback() && !self.allow_unauthenticated {
                return Err(ConfigError::Exposed(address));
            }
        }
        Ok(())
    }

    /// What must be said of security, if anything.
    pub fn warning(&self) -> Option<String> {
        if self.data_security == DataSecurity::Aead {
            return None;
        }
        if self.credentials.is_some() {
            // Whoever shares the link could still spoof UDP.
            return self.dpdk_device.as_ref().and_then(|device| match device {
                DeviceSpec::Pci(device) => Some(format!(
                    "packets of the DPDK path are not authenticated: whoever shares the link of \
                     pci:{device} can spoof them, unless --data-security aead seals them"
                )),
                _ => None,
            });
        }
        let addresses = [self.listen, self.data].into_iter();
        let exposed = addresses.filter(|address| !address.ip().is_loopback());
        let mut exposed: Vec<String> = exposed.map(|address| address.to_string()).collect();
        if let Some(DeviceSpec::Pci(device)) = &self.dpdk_device {
            exposed.push(format!("the network of pci:{device}"));
        }
        (!exposed.is_empty()).then(|| {
            format!(
                "anybody who can reach {} can read and change every tensor: \
                 sessions are not authenticated; use a private test network only",
                exposed.join(" or ")
            )
        })
    }

    /// The limits in words, for the log.
    pub fn limits(&self) -> String {
        format!(
            "store {}, of each peer {}, arenas {}, of each user {}",
            show_bytes(self.store_bytes),
            show_bytes(self.peer_limits.memory),
            show_bytes(self.arena_bytes),
            show_bytes(self.user_limits.bytes)
        )
    }
}

impl File {
    fn parse(text: &str, place: &str) -> Result<Self, ConfigError> {
        let toml = |error: toml::de::Error| ConfigError::Toml {
            place: place.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        };
        let table: toml::Table = text.parse().map_err(toml)?;
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(ConfigError::UnknownKey {
                place: place.to_owned(),
                key: key.clone(),
                suggestion: suggest(key, KEYS.iter().copied()),
            });
        }
        // From the text again, so that errors point to a line.
        toml::from_str(text).map_err(toml)
    }
}

impl OneOrMore {
    fn list(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::More(more) => more,
        }
    }

    fn join(self) -> String {
        self.list().join(",")
    }
}

/// The application socket if nothing else was said.
pub fn default_socket() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/run/genie/agent.sock".into());
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty())?;
    Some(Path::new(&runtime).join("genie/agent.sock"))
}

/// Reads an octal file mode without special bits.
fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| *mode <= 0o777)
        .ok_or_else(|| format!("'{text}' is no octal file mode, such as 0666 or 0660"))
}

/// A group's number, by its name in `/etc/group` or as it is.
fn find_group(group: &str) -> Result<u32, String> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let file = std::fs::read_to_string("/etc/group").unwrap_or_default();
    // group(5): name, password, number, members
    let number = file.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    });
    number.ok_or_else(|| {
        format!("no group is called '{group}' in /etc/group: add it with 'groupadd {group}', or give its number")
    })
}

/// Reads `NAME=ADDRESS`; an address is `HOST`, `HOST:PORT` or `[IPV6]:PORT`.
fn parse_peer(text: &str) -> Result<(String, String), String> {
    let refused = || format!("'{text}' is not NAME=ADDRESS, such as b=10.0.0.2:{CONTROL_PORT}");
    let (name, address) = text.split_once('=').ok_or_else(refused)?;
    check_node(name)?;
    if address.is_empty() {
        return Err(refused());
    }
    let has_port = address.parse::<SocketAddr>().is_ok()
        || address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.contains(':') && !host.is_empty() && port.parse::<u16>().is_ok()
        });
    let address = match address.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, CONTROL_PORT).to_string(),
        Err(_) if has_port => address.to_owned(),
        Err(_) if address.contains(':') => return Err(refused()),
        Err(_) => format!("{address}:{CONTROL_PORT}"),
    };
    Ok((name.to_owned(), address))
}

/// A node's name: one component, without what separates it from a prefix.
pub(crate) fn check_node(name: &str) -> Result<(), String> {
    check_name(name).map_err(|error| error.to_string())?;
    if name.contains(['/', ':', '=', ',']) {
        return Err(format!("the node name '{name}' contains one of / : = ,"));
    }
    Ok(())
}

pub(crate) fn check_variables(variables: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let known: BTreeSet<String> = KEYS
        .iter()
        // A table has no place in a variable.
        .filter(|key| !["rights", "limits"].contains(key))
        .map(|key| format!("GENIE_{}", key.to_uppercase().replace('-', "_")))
        .chain(OTHER_VARIABLES.map(str::to_owned))
        .chain(["GENIE_CONFIG".to_owned()])
        .collect();
    for name in variables.filter(|name| name.starts_with("GENIE_")) {
        let is_other = OTHER_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if !known.contains(&name) && !is_other {
            let suggestion = suggest(&name, known.iter().map(String::as_str));
            return Err(ConfigError::UnknownVariable { name, suggestion });
        }
    }
    Ok(())
}

fn suggest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> String {
    let distance = |word: &str| strsim::damerau_levenshtein(wrong, word);
    match known.map(|word| (distance(word), word)).min() {
        // Further away it would be a guess.
        Some((distance, word)) if distance <= 1 + wrong.len() / 3 => {
            format!(": did you mean '{word}'?")
        }
        _ => ": 'genie agent --help' lists what there is".to_owned(),
    }
}

fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    if check_node(&name).is_ok() {
        name
    } else {
        "genie".to_owned()
    }
}

fn quarter_of_memory() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) / 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn args() -> AgentArgs {
        AgentArgs {
            socket: Some("/tmp/s".into()),
            ..AgentArgs::default()
        }
    }

    fn load(args: AgentArgs, toml: &str) -> Result<Config, ConfigError> {
        Config::merge(args, File::parse(toml, "genie.toml")?)
    }

    fn refusal(toml: &str) -> String {
        load(args(), toml).unwrap_err().to_string()
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let toml = "name = 'f'\nstreams = 4\nliveness = '500ms'\nstore-bytes = '1GiB'\n\
                    transport = ['tcp']\n[peer]\nb = '127.0.0.1:7000'\n";
        let config = load(
            AgentArgs {
                streams: Some(8),
                ..args()
            },
            toml,
        )
        .unwrap();
        assert_eq!((config.name.as_str(), config.streams), ("f", 8));
        assert_eq!(config.liveness, Duration::from_millis(500));
        assert_eq!(config.store_bytes, 1 << 30);
        assert_eq!(config.transport.to_string(), "tcp");
        assert_eq!(config.peers["b"], "127.0.0.1:7000");
        assert_eq!(config.stall, STALL);
        assert_eq!(config.listen, "127.0.0.1:5555".parse().unwrap());
        assert_eq!(config.data, "127.0.0.1:5556".parse().unwrap());
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        assert!(refusal("strems = 4").contains("did you mean 'streams'?"));
        assert!(refusal("quux-corge-grault = 1").contains("--help"));
        let unknown = check_variables(["GENIE_LISTN".to_owned()].into_iter()).unwrap_err();
        assert!(unknown.to_string().contains("'GENIE_LISTEN'"), "{unknown}");
        let fine = ["GENIE_SOCKET", "GENIE_DPDK_LIB", "HOME"].map(str::to_owned);
        assert!(check_variables(fine.into_iter()).is_ok());
    }

    #[test]
    fn variables_of_scripts_are_no_mistakes() {
        let scripts = [
            include_str!("../../.ci/run"),
            include_str!("../../scripts/test"),
            include_str!("../../scripts/netns"),
        ];
        let part_of_name = |c: char| c.is_ascii_uppercase() || c == '_';
        for (at, _) in scripts.concat().match_indices("GENIE_") {
            let text = &scripts.concat()[at..];
            let name = text.split(|c| !part_of_name(c)).next().unwrap_or(text);
            check_variables([name.to_owned()].into_iter()).unwrap();
        }
    }

    #[test]
    fn values_that_cannot_be_are_named() {
        assert!(refusal("streams = 'four'").contains("streams"));
        assert!(refusal("streams = 0").contains("between 1 and"));
        assert!(refusal("dpdk-mtu = 65001").contains("between 576 and 65000"));
        assert!(refusal("queues = 33").contains("between 1 and 32"));
        assert!(refusal("liveness = '2 weeks'").contains("liveness"));
        assert!(refusal("stall = 'never'").contains("stall"));
        assert!(refusal("transport = 'rdma'").contains("rdma"));
        assert!(refusal("name = 'a/b'").contains("a/b"));
        assert!(refusal("name = 'b'\n[peer]\nb = 'x'").contains("own name"));
        assert!(refusal("name = ").contains("line 1"));
    }

    #[test]
    fn strangers_are_kept_out_unless_told_otherwise() {
        assert!(refusal("listen = '0.0.0.0:5555'").contains("--allow-unauthenticated"));
        let allowed = "listen = '0.0.0.0:5555'\nallow-unauthenticated = true";
        let config = load(args(), allowed).unwrap();
        assert!(config.warning().unwrap().contains("not authenticated"));
        assert_eq!(load(args(), "").unwrap().warning(), None);
        // A NIC of its own does not care where the control plane listens.
        let nic = load(args(), "dpdk-device = 'pci:0000:01:00.0'").unwrap();
        assert!(nic.warning().unwrap().contains("pci:0000:01:00.0"));
        let pair = load(args(), "dpdk-device = 'pair:/tmp/x'").unwrap();
        assert_eq!(pair.warning(), None);
    }

    #[test]
    fn frames_are_recorded_of_a_device_only_and_within_limits() {
        let refused = refusal("tap = '/tmp/f.pcap'");
        assert!(refused.contains("--dpdk-device"), "{refused}");
        let device = "dpdk-device = 'pair:/tmp/x'\ntap = '/tmp/f.pcap'";
        let expected = tap::Options {
            file: "/tmp/f.pcap".into(),
            snap_bytes: 128,
            file_bytes: 64 << 20,
        };
        assert_eq!(load(args(), device).unwrap().tap, Some(expected));
        let limits = format!("{device}\ntap-snap = '9KiB'\ntap-bytes = 4096");
        let tap = load(args(), &limits).unwrap().tap.unwrap();
        assert_eq!((tap.snap_bytes, tap.file_bytes), (9216, 4096));
        assert_eq!(load(args(), "").unwrap().tap, None);
    }

    #[test]
    fn credentials_come_whole_and_open_the_agent_to_the_network() {
        let files = "ca = 'ca.pem'\ncert = 'a.pem'\nkey = 'a.key'\n";
        let config = load(args(), &format!("{files}listen = '0.0.0.0:5555'\n")).unwrap();
        let expected = CredentialFiles {
            ca: "ca.pem".into(),
            cert: "a.pem".into(),
            key: "a.key".into(),
        };
        assert_eq!(config.credentials, Some(expected));
        assert_eq!(config.warning(), None);
        assert!(refusal("ca = 'x'\ncert = 'y'").starts_with("key: "));
        assert!(refusal("ca = 'x'\nkey = 'y'").starts_with("cert: "));
        assert!(refusal("key = 'x'").starts_with("ca: "));
        let nic = format!("{files}dpdk-device = 'pci:0000:01:00.0'");
        assert!(
            load(args(), &nic)
                .unwrap()
                .warning()
                .unwrap()
                .contains("spoof")
        );
    }

    #[test]
    fn rights_without_credentials_would_keep_nobody_out() {
        for toml in ["allow = 'b'", "[rights.b]\nput = ['m']"] {
            assert!(
                refusal(toml).contains("whoever they say they are"),
                "{toml}"
            );
        }
        let files = "ca = 'ca.pem'\ncert = 'a.pem'\nkey = 'a.key'\n";
        let config = load(
            args(),
            &format!("{files}allow = ['b', 'c']\n[rights.b]\nput = ['m']"),
        );
        let access = config.unwrap().access;
        assert!(access.admits("b") && !access.admits("d"));
        assert!(access.grants("b", crate::rights::Right::Put, "m/x"));
        assert!(refusal(&format!("{files}allow = 'a/b'")).contains("a/b"));
        assert!(refusal(&format!("{files}[rights.b]\nputt = ['m']")).contains("putt"));
        let ignored = check_variables(["GENIE_RIGHTS".to_owned()].into_iter());
        assert!(ignored.is_err(), "no variable can hold a table");
    }

    #[test]
    fn a_peer_may_have_limits_of_its_own() {
        let toml = "store-bytes = '1GiB'\npeer-transfers = 10\npeer-rate = 5\n\
                    [limits.b]\nmemory = '1MiB'\nrate = 7\n";
        let config = load(args(), toml).unwrap();
        let expected = PeerLimits {
            memory: 1 << 30,
            transfers: 10,
            rate: 5,
            sessions: 64,
        };
        assert_eq!(config.peer_limits, expected);
        let expected = PeerLimits {
            memory: 1 << 20,
            rate: 7,
            ..expected
        };
        assert_eq!(config.own_limits["b"], expected);
        assert!(refusal("[limits.b]\nspeed = 1").contains("speed"));
        assert!(refusal("[limits.'a/b']\nrate = 1").contains("a/b"));
        assert!(refusal("peer-memory = 'much'").contains("peer-memory"));
    }

    #[test]
    fn peers_get_the_default_port() {
        let peer = |text| parse_peer(text).map(|(_, address)| address);
        assert_eq!(peer("b=10.0.0.2"), Ok("10.0.0.2:5555".into()));
        assert_eq!(peer("b=10.0.0.2:1"), Ok("10.0.0.2:1".into()));
        assert_eq!(peer("b=::1"), Ok("[::1]:5555".into()));
        assert_eq!(peer("b=[::1]:7"), Ok("[::1]:7".into()));
        assert_eq!(peer("b=host"), Ok("host:5555".into()));
        for bad in ["b", "=x", "b=", "a:b=x", "b=host:port", "b=:1"] {
            assert!(peer(bad).is_err(), "{bad}");
        }
        let config = load(args(), "[peer]\nb = 'host'\nc = '::1'\n").unwrap();
        assert_eq!(config.peers["b"], "host:5555");
        assert_eq!(config.peers["c"], "[::1]:5555");
        assert!(refusal("[peer]\nb = 'host:port'").contains("NAME=ADDRESS"));
        assert!(refusal("[peer]\nb = ''").contains("peer"));
    }

    proptest! {
        #[test]
        fn a_file_from_anywhere_changes_nothing_or_is_refused_by_name(text in ".{0,200}") {
            match load(args(), &text) {
                // Nothing but comments and blanks.
                Ok(config) => prop_assert_eq!(config, load(args(), "").unwrap()),
                Err(error) => prop_assert!(error.to_string().starts_with("genie.toml")),
            }
        }

        #[test]
        fn a_value_from_anywhere_is_taken_or_refused_with_its_key(
            key in proptest::sample::select(&KEYS[..]),
            value in "[^'\n]{0,40}",
        ) {
            if let Err(error) = load(args(), &format!("{key} = '{value}'")) {
                let error = error.to_string();
                prop_assert!(error.contains(key), "{}", error);
            }
        }
    }
}
