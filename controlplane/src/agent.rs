//! The agent: one process a host, from its first line to its last.
//!
//! Called by `genie agent`. It owns the order of things: both listeners are
//! bound before anything is promised, `ready` is printed when everything can be
//! used, and on SIGTERM nothing new is begun while what is under way may end.

use std::fs::Permissions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use genie_dataplane::device::tap::{Recorder, TapDevice};
use genie_dataplane::endpoint::Completions;
use genie_dataplane::engine::udp;
use genie_dataplane::{dpdk, shm, tcp};
use genie_hugepages::{Backing, Choice, PageSize, Root};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::application::{self, ApplicationError};
use crate::config::{Config, ConfigError, DRAIN_LIMIT};
use crate::devices::Devices;
use crate::frame::FrameError;
use crate::identity::{CredentialError, Credentials, Identity};
use crate::metrics;
use crate::node::{Node, Parts};
use crate::rights::Access;
use crate::session::{SessionError, establish};
use crate::status::MetricsStatus;
use crate::strangers::Strangers;
use crate::transport::{Attended, Local, Preference, Transport, Transports};

/// Programs that may be connected at a time.
const APPLICATIONS_MAX: usize = 256;

/// How long the files that SIGHUP is for may take to read: they are small.
const RELOAD_LIMIT: Duration = Duration::from_secs(5);

/// Why the agent did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Somebody else listens there.
    #[error(
        "{what} {address} is in use: another agent may run ('genie status' shows it); \
         stop that one or choose another with {flag}"
    )]
    InUse {
        /// Which of its addresses.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What sets it.
        flag: &'static str,
    },
    /// The kernel does not let us listen.
    #[error("cannot listen on {what} {address}: {source}; choose another with {flag}")]
    Listen {
        /// Which of its addresses.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What sets it.
        flag: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// An agent answers on the application socket.
    #[error(
        "another agent answers on {}: stop it ('genie status' shows it), \
         or choose another socket with --socket", .0.display()
    )]
    SocketInUse(PathBuf),
    /// The application socket cannot be given to its group.
    #[error(
        "cannot give {} to group {group}: {source}; run the agent in that group \
         (SupplementaryGroups= in its unit), or name one that it is in with --socket-group",
        path.display()
    )]
    SocketGroup {
        /// The socket.
        path: PathBuf,
        /// The group's number.
        group: u32,
        /// The system's answer.
        source: io::Error,
    },
    /// The application socket cannot be made.
    #[error("cannot make the application socket {}: {source}; choose another with --socket", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Its credentials are no good.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// Nothing that is allowed works.
    #[error("none of the allowed transports ({allowed}) can be used: {reasons}")]
    NoTransport {
        /// What --transport says.
        allowed: String,
        /// Each one's reason.
        reasons: String,
    },
    /// The kernel refused something an agent cannot do without.
    #[error("the agent cannot run: {0}")]
    System(#[from] io::Error),
}

/// Runs an agent until SIGTERM or SIGINT; returns once everything is given back.
/// On SIGHUP `reload` gives newer settings, of which identity and access count.
pub fn run(
    config: Config,
    reload: impl Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
    json: bool,
) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Control only: tensor bytes are moved by the engines' own threads.
        .worker_threads(2)
        .thread_name("genie-control")
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(config, reload, json));
    // A blocking copy or allocation that is still under way is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

async fn serve(
    config: Config,
    reload: impl Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
    json: bool,
) -> Result<(), AgentError> {
    let mut stop = Stop::new()?;
    // Before anything is promised: SIGHUP must never end an agent.
    let mut hangup = signal(SignalKind::hangup())?;
    let credentials = load_credentials(&config)?;
    let listener = listen(config.listen).await?;
    let (applications, socket) = bind_socket(&config).await?;
    let (transports, attended, devices) = start_transports(&config)?;
    let (scrapers, metrics) = listen_metrics(config.metrics).await;
    let node = Node::new(Parts {
        name: config.name.clone(),
        preference: config.transport.clone(),
        data_security: config.data_security,
        liveness: config.liveness,
        stall: config.stall,
        transports,
        store_bytes: config.store_bytes,
        arena_bytes: config.arena_bytes,
        user_limits: config.user_limits,
        peer_limits: config.peer_limits,
        own_limits: config.own_limits.clone(),
        peers: config.peers.clone(),
        listen: listener.local_addr()?,
        socket: config.socket.clone(),
        warning: config.warning(),
        devices,
        identity: Identity::new(credentials, config.access.clone()),
        metrics,
    });
    for attended in attended {
        attend(&node, attended);
    }
    announce(&node, &config, json)?;
    tokio::select! {
        () = accept_peers(&node, &listener) => {}
        () = accept_applications(&node, &applications) => {}
        () = renew(&node, &mut hangup, Arc::new(reload)) => {}
        () = metrics::serve(&node, scrapers) => {}
        name = stop.wait() => tracing::info!("{name}: stopping"),
    }
    node.stop();
    drop((listener, applications, socket));
    drain(&node, &mut stop).await;
    node.end_sessions("this agent was stopped");
    // Lets the sessions say goodbye.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let stopped = tokio::task::spawn_blocking(move || node.transports.stop()).await;
    stopped.map_err(|error| io::Error::other(error).into())
}

fn load_credentials(config: &Config) -> Result<Option<Arc<Credentials>>, CredentialError> {
    let load = |files| Credentials::load(files, &config.name).map(Arc::new);
    config.credentials.as_ref().map(load).transpose()
}

/// Takes newer credentials, allowed peers and rights whenever SIGHUP says so.
async fn renew<R>(node: &Arc<Node>, hangup: &mut Signal, reload: Arc<R>)
where
    R: Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
{
    while hangup.recv().await.is_some() {
        let (of, reload) = (Arc::clone(node), Arc::clone(&reload));
        // Files may take as long as their disk likes, and nobody waits for them.
        let read = tokio::task::spawn_blocking(move || newer(&of, &*reload));
        let read = match timeout(RELOAD_LIMIT, read).await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!(
                "the files were not read within {RELOAD_LIMIT:?}: send SIGHUP again once they can be"
            )),
        };
        match read {
            Ok(newer) => {
                node.identity.replace(newer.credentials, newer.access);
                let summary = node.identity.current().summary();
                tracing::info!("SIGHUP: from now on {summary}");
                node.end_unwanted_sessions();
            }
            Err(reason) => {
                tracing::error!("SIGHUP: everything stays as it was: {reason}");
                node.identity.keep(reason);
            }
        }
    }
}

/// What a running agent takes of its files.
struct Newer {
    credentials: Option<Arc<Credentials>>,
    access: Access,
}

/// Reads the files. Blocks.
fn newer(node: &Node, reload: &impl Fn() -> Result<Config, ConfigError>) -> Result<Newer, String> {
    let config = reload().map_err(|error| error.to_string())?;
    if config.name != node.name {
        let (new, old) = (&config.name, &node.name);
        return Err(format!(
            "the node's name changed from '{old}' to '{new}': restart the agent for that"
        ));
    }
    let had = node.identity.current().credentials.is_some();
    if had != config.credentials.is_some() {
        return Err(
            "TLS cannot be turned on or off in a running agent: restart it for that".to_owned(),
        );
    }
    let credentials = load_credentials(&config).map_err(|error| error.to_string())?;
    let access = config.access;
    Ok(Newer {
        credentials,
        access,
    })
}

async fn drain(node: &Node, stop: &mut Stop) {
    let until = Instant::now() + DRAIN_LIMIT;
    while node.is_busy() && Instant::now() < until {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(10)) => {}
            name = stop.wait() => {
                tracing::warn!("{name} again: giving up what is under way");
                return;
            }
        }
    }
    if node.is_busy() {
        tracing::warn!("giving up what is still under way after {DRAIN_LIMIT:?}");
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, AgentError> {
    let (what, flag) = ("the control address", "--listen");
    TcpListener::bind(address)
        .await
        .map_err(|source| refused_listen(what, address, flag, source))
}

/// An agent without metrics is still an agent.
async fn listen_metrics(wanted: metrics::Wanted) -> (Option<TcpListener>, MetricsStatus) {
    let metrics::Wanted(Some(address)) = wanted else {
        return Default::default();
    };
    let bound = TcpListener::bind(address).await;
    match bound.and_then(|listener| Ok((listener.local_addr()?, listener))) {
        Ok((address, listener)) => {
            let address = Some(address);
            (
                Some(listener),
                MetricsStatus {
                    address,
                    reason: None,
                },
            )
        }
        Err(error) => {
            let reason = format!(
                "cannot listen on {address}: {error}; choose another with --metrics, or off"
            );
            tracing::warn!("no metrics: {reason}");
            let reason = Some(reason);
            (
                None,
                MetricsStatus {
                    address: None,
                    reason,
                },
            )
        }
    }
}

fn refused_listen(
    what: &'static str,
    address: SocketAddr,
    flag: &'static str,
    source: io::Error,
) -> AgentError {
    if source.kind() == io::ErrorKind::AddrInUse {
        AgentError::InUse {
            what,
            address,
            flag,
        }
    } else {
        AgentError::Listen {
            what,
            address,
            flag,
            source,
        }
    }
}

/// Starts what is allowed, and accelerators; notes why the rest cannot be used.
fn start_transports(config: &Config) -> Result<(Transports, Vec<Attended>, Devices), AgentError> {
    let accelerators = Arc::new(OnceLock::new());
    let mut transports = Transports::default();
    let mut attended = Vec::new();
    for transport in config.transport.as_slice().iter().copied() {
        let started = match transport {
            Transport::Tcp => Ok(vec![start_tcp(config)?]),
            Transport::Dpdk => start_dpdk(config, &accelerators),
            Transport::Shm => start_shm(config).map(|one| vec![one]),
        };
        match started {
            Ok(engines) => {
                let add = |(local, running)| transports.add(transport, local, running);
                attended.extend(engines.into_iter().map(add));
            }
            Err(reason) => {
                tracing::info!(%reason, "{transport} cannot be used");
                transports.refuse(transport, reason);
            }
        }
    }
    if transports.engines().is_empty() {
        let reasons = transports.refused().iter();
        let reasons = reasons.map(|(transport, reason)| format!("{transport}: {reason}"));
        let reasons = reasons.collect::<Vec<_>>().join("; ");
        return Err(AgentError::NoTransport {
            allowed: config.transport.to_string(),
            reasons,
        });
    }
    let devices = accelerators.get_or_init(|| Devices::open(&config.accelerators));
    Ok((transports, attended, devices.clone()))
}

type Started = (Local, genie_dataplane::endpoint::Running);

fn start_tcp(config: &Config) -> Result<Started, AgentError> {
    let tcp = tcp::Config {
        listen: config.data,
        streams: config.streams,
        liveness: config.liveness,
        open_limit: config.liveness,
        progress_limit: config.stall,
        congestion: config.tcp_congestion.clone(),
    };
    let (running, data) = tcp::spawn(tcp)
        .map_err(|source| refused_listen("the data address", config.data, "--data", source))?;
    Ok((
        Local::Tcp {
            data,
            streams: config.streams,
        },
        running,
    ))
}

fn start_shm(config: &Config) -> Result<Started, String> {
    let shm = shm::Config {
        liveness: config.liveness,
        open_limit: config.liveness,
        progress_limit: config.stall,
    };
    let (running, local) = shm::spawn(shm).map_err(|error| error.to_string())?;
    Ok((Local::Shm(local), running))
}

/// Opens the port, and then the accelerators: their slots may be anywhere, the
/// port's packet buffers need huge pages.
fn start_dpdk(
    config: &Config,
    accelerators: &Arc<OnceLock<Devices>>,
) -> Result<Vec<Started>, String> {
    let Some(mut device) = config.dpdk_device.clone() else {
        return Err("no device was given (--dpdk-device)".to_owned());
    };
    if !config.accelerators.is_empty() {
        device = device.for_gpudirect(Path::new("/sys"));
    }
    // Looked for first: without it the pages do not matter.
    dpdk::load().map_err(|error| show_chain(&error))?;
    let options = dpdk::Options::sized(config.queues, config.dpdk_mtu);
    check_huge_pages(u64::from(options.memory_mib) << 20)?;
    let engine = udp::Config {
        addresses: config.dpdk_addresses.clone(),
        liveness: config.liveness,
        ..udp::Config::default()
    };
    let (port_opened, opening) = std::sync::mpsc::channel::<()>();
    let (kinds, opened) = (config.accelerators.clone(), Arc::clone(accelerators));
    // Not by the port's thread, which DPDK binds to a processor: what an
    // accelerator starts would be bound to it too.
    let opener = std::thread::spawn(move || {
        let _ = opening.recv();
        opened.get_or_init(|| Devices::open(&kinds)).clone()
    });
    // Nor what records its frames.
    let queue = 0..config.queues;
    let recorders = queue.map(|queue| Some(Recorder::start(&config.tap.as_ref()?.of_queue(queue))));
    let recorders: Vec<_> = recorders.collect();
    let open = move || {
        let queues = dpdk::open_queues(&device, &options);
        drop(port_opened);
        let devices = opener.join();
        let mut queues = queues?.into_iter().zip(recorders);
        let (first, recorder) = queues.next().expect("at least one was asked for");
        let mut port = first.enter()?;
        if let Ok(devices) = devices {
            devices.try_direct(&mut port);
        }
        Ok((TapDevice::new(port, recorder), queues.collect()))
    };
    let enter = |(queue, recorder): (dpdk::Queue, _)| {
        let port = queue.enter()?;
        Ok::<_, dpdk::OpenError>(TapDevice::new(port, recorder))
    };
    let opened = udp::spawn_queues(engine, open, enter);
    let engines = opened.map_err(|error| show_chain(&error))?.into_iter();
    let started = engines.map(|(running, local)| (Local::Dpdk(local), running));
    Ok(started.collect())
}

/// DPDK's own words for a lack of huge pages do not say what to do.
fn check_huge_pages(bytes: u64) -> Result<(), String> {
    let survey = genie_hugepages::survey(&Root::default()).map_err(|error| error.to_string())?;
    match survey.choose(PageSize::MB_2, bytes) {
        Choice {
            backing: Backing::Huge(_),
            ..
        } => Ok(()),
        Choice { reasons, .. } => {
            let reason = reasons.into_iter().next().unwrap_or_default();
            Err(format!("no huge pages: {reason}"))
        }
    }
}

/// An error and what caused it, in one line.
fn show_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Dispatches an engine's answers, and tells sessions that it has lost their
/// paths. To be called on a runtime, once for each engine.
pub fn attend(node: &Arc<Node>, attended: Attended) {
    let Attended {
        transport,
        queue,
        completions,
        mut lost,
    } = attended;
    tokio::spawn(async move {
        if let Err(error) = dispatch(completions).await {
            tracing::error!(%error, %transport, "cannot wait for the engine's answers");
        }
    });
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while let Some(lost) = lost.recv().await {
            node.lose(transport, queue, &lost);
        }
    });
}

async fn dispatch(mut completions: Completions) -> io::Result<()> {
    // The same eventfd under a descriptor of its own, which tokio may keep.
    let bell = completions.as_fd().try_clone_to_owned()?;
    #[expect(
        deprecated,
        reason = "deprecated for types whose descriptor may change or close under tokio; an OwnedFd's cannot"
    )]
    let bell = AsyncFd::with_interest(bell, Interest::READABLE)?;
    while completions.dispatch() {
        if completions.prepare_sleep() {
            bell.readable().await?.clear_ready();
            completions.finish_sleep();
        }
    }
    Ok(())
}

async fn accept_peers(node: &Arc<Node>, listener: &TcpListener) {
    let strangers = Strangers::default();
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                wait_after(&error).await;
                continue;
            }
        };
        let Some(newcomer) = strangers.enter(address.ip()) else {
            node.identity.count_dropped_stranger();
            tracing::warn!(%address, "no session: too many others wait for a place");
            continue;
        };
        let node = Arc::clone(node);
        tokio::spawn(async move {
            let accepted = match timeout(node.liveness, newcomer.place()).await {
                Ok(place) => establish::accept(&node, stream, place).await,
                Err(_) => {
                    node.identity.count_dropped_stranger();
                    Err(SessionError::Crowded)
                }
            };
            if let Err(error) = accepted {
                tracing::warn!(%address, "no session: {error}");
            }
        });
    }
}

async fn accept_applications(node: &Arc<Node>, listener: &UnixListener) {
    let places = Arc::new(Semaphore::new(APPLICATIONS_MAX));
    loop {
        let permit = Arc::clone(&places).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                wait_after(&error).await;
                continue;
            }
        };
        // The kernel's word, from when the connection was made.
        let user = match stream.peer_cred() {
            Ok(credentials) => node.quotas.user(credentials.uid()),
            Err(error) => {
                tracing::warn!("an application was dropped: {error}");
                continue;
            }
        };
        let charge = match user.connection() {
            Ok(charge) => charge,
            Err(error) => {
                tracing::warn!("an application was turned away: {error}");
                application::refuse(stream, &error);
                continue;
            }
        };
        let node = Arc::clone(node);
        tokio::spawn(async move {
            let _held = (permit, charge);
            match application::serve(node, stream, user).await {
                // It looked whether anybody is there, or left without reading the answer.
                Ok(()) | Err(ApplicationError::Frame(FrameError::Closed | FrameError::Io(_))) => {}
                Err(error) => tracing::warn!("an application was dropped: {error}"),
            }
        });
    }
}

/// Descriptors may have run out; they come back as connections end.
async fn wait_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Removes the application socket when the agent stops.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "cannot remove the socket");
        }
    }
}

async fn bind_socket(config: &Config) -> Result<(UnixListener, SocketFile), AgentError> {
    let path: &Path = &config.socket;
    let failed = |source| AgentError::Socket {
        path: path.to_owned(),
        source,
    };
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        && !folder.exists()
    {
        std::fs::create_dir_all(folder).map_err(failed)?;
        // Whatever the umask: who may use the socket is said by its own mode.
        std::fs::set_permissions(folder, Permissions::from_mode(0o755)).map_err(failed)?;
    }
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket {
        match tokio::net::UnixStream::connect(path).await {
            Ok(_) => return Err(AgentError::SocketInUse(path.to_owned())),
            // Left behind by an agent that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let socket = SocketFile(path.to_owned());
    if let Some(group) = config.socket_group {
        std::os::unix::fs::chown(path, None, Some(group)).map_err(|source| {
            AgentError::SocketGroup {
                path: path.to_owned(),
                group,
                source,
            }
        })?;
    }
    std::fs::set_permissions(path, Permissions::from_mode(config.socket_mode)).map_err(failed)?;
    Ok((listener, socket))
}

/// Says on stdout that the agent can be used.
fn announce(node: &Node, config: &Config, json: bool) -> io::Result<()> {
    let status = node.status(0);
    if let Some(warning) = &status.warning {
        tracing::warn!("{warning}");
    }
    tracing::info!("{}", status.identity.summary);
    tracing::info!(limits = config.limits(), "{} starts", status.name);
    let usable = |preference: &Preference| {
        let there = |t: &Transport| node.transports.engine(*t).map(|engine| engine.path());
        preference
            .as_slice()
            .iter()
            .filter_map(there)
            .collect::<Vec<_>>()
    };
    let paths = usable(&node.preference);
    let data = status
        .transports
        .iter()
        .find_map(|transport| transport.data);
    let mut stdout = io::stdout().lock();
    if json {
        let ready = serde_json::json!({
            "ready": true,
            "name": status.name,
            "instance": status.instance,
            "listen": status.listen,
            "data": data,
            "socket": status.socket,
            "paths": paths,
            "warning": status.warning,
        });
        writeln!(stdout, "{ready}")?;
    } else {
        let data = data.map(|data| format!(" data={data}")).unwrap_or_default();
        writeln!(
            stdout,
            "ready name={} listen={}{data} socket={} paths={}",
            status.name,
            status.listen,
            status.socket.display(),
            paths.join(",")
        )?;
    }
    stdout.flush()
}

/// The two signals that end an agent.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
