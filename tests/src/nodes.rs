//! Two agents in this process, joined by loopback TCP through a relay, by a pair
//! of devices in memory whose cable can be pulled, and by memory they pass.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use genie_controlplane::agent::attend;
use genie_controlplane::identity::authority;
use genie_controlplane::identity::{CredentialFiles, Credentials, Identity};
use genie_controlplane::node::{Node, Parts};
use genie_controlplane::quota::Limits;
use genie_controlplane::quota::peer::PeerLimits;
use genie_controlplane::security::DataSecurity;
use genie_controlplane::session::establish;
use genie_controlplane::status::SessionStatus;
use genie_controlplane::strangers::Strangers;
use genie_controlplane::transport::{Local, Transport, Transports};
use genie_dataplane::device::pair::{Options, PairDevice, pair};
use genie_dataplane::device::{AttachError, Attachment, Capabilities, Counters, Device, TxFrame};
use genie_dataplane::engine::udp;
use genie_dataplane::ledger::Copies;
use genie_dataplane::memory::{Lease, View};
use genie_dataplane::{shm, tcp};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::relay::Relay;

/// The cable between the two devices; both ends see it alike.
#[derive(Debug, Default)]
pub struct Cable {
    cut: AtomicBool,
    /// Frames that still pass before it is cut; 0: it is not going to be.
    left: AtomicU64,
    jammed: AtomicBool,
    delivered: AtomicU64,
}

/// Two agents, and a runtime that serves them.
#[derive(Debug)]
pub struct Nodes {
    /// Knows `b` as a peer.
    pub a: Arc<Node>,
    /// Is dialled.
    pub b: Arc<Node>,
    /// Between their devices.
    pub cable: Arc<Cable>,
    /// Before the data port of `b`.
    pub relay: Relay,
    /// Runs both.
    pub runtime: Runtime,
}

/// What may differ from one test to the next.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What `a` prefers.
    pub preference: &'static str,
    /// After how much silence a path or a peer is given up.
    pub liveness: Duration,
    /// For how long a request may make no progress.
    pub stall: Duration,
    /// Limit of each store.
    pub store_bytes: u64,
    /// Transfers that a peer may have under way.
    pub peer_transfers: u64,
    /// Whether they may pass each other memory, too.
    pub shm: bool,
    /// Whether they have credentials and demand that tensors are sealed.
    pub sealed: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            preference: "dpdk,tcp",
            liveness: Duration::from_secs(1),
            stall: Duration::from_secs(30),
            store_bytes: 2 << 30,
            peer_transfers: 2048,
            shm: false,
            sealed: false,
        }
    }
}

impl Cable {
    /// Cuts it: frames are lost, both ways.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    /// Cuts it once this many more frames have been delivered.
    pub fn cut_after(&self, frames: u64) {
        self.left.store(frames, Ordering::SeqCst);
    }

    /// Makes the devices take nothing and give nothing back: what a driver does
    /// whose device was removed.
    pub fn jam(&self) {
        self.jammed.store(true, Ordering::SeqCst);
    }

    /// Mends it.
    pub fn mend(&self) {
        self.left.store(0, Ordering::SeqCst);
        self.cut.store(false, Ordering::SeqCst);
        self.jammed.store(false, Ordering::SeqCst);
    }

    /// Whether it is cut.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// Frames that got through.
    pub fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::SeqCst)
    }

    fn passes(&self) -> bool {
        if self.is_cut() || self.jammed.load(Ordering::Relaxed) {
            return false;
        }
        self.delivered.fetch_add(1, Ordering::Relaxed);
        if self.left.load(Ordering::Relaxed) > 0 && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.cut();
        }
        true
    }
}

impl Nodes {
    /// Starts both agents.
    ///
    /// # Panics
    /// If the kernel refuses a socket or a thread.
    pub fn start(setup: &Setup) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime starts");
        let cable = Arc::<Cable>::default();
        let (one, other) = pair(&Options::default());
        let pki = setup.sealed.then(|| {
            let folder = tempfile::tempdir().expect("a folder can be made");
            authority::init(folder.path()).expect("a new CA");
            folder
        });
        let [of_a, of_b] = ["a", "b"].map(|name| {
            let folder = pki.as_ref()?.path();
            Some(Arc::new(certify(folder, name)))
        });
        let b = start("b", other, &cable, setup, None, of_b);
        let (b, listen, relay) = runtime.block_on(b);
        let a = start("a", one, &cable, setup, Some(("b", listen)), of_a);
        let (a, ..) = runtime.block_on(a);
        Self {
            a,
            b,
            cable,
            relay,
            runtime,
        }
    }

    /// The session between them as `node` sees it; none if there is none.
    pub fn session(node: &Node) -> Option<SessionStatus> {
        node.status(0).sessions.into_iter().next()
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in [&self.a, &self.b] {
            node.stop();
            node.end_sessions("the test is over");
            // A jammed device would keep its engine for a second.
            self.cable.jammed.store(false, Ordering::SeqCst);
            node.transports.stop();
        }
    }
}

/// A certificate of the CA in `folder`.
fn certify(folder: &Path, name: &str) -> Credentials {
    authority::issue(folder, name, authority::in_days(1)).expect("the CA certifies");
    let files = CredentialFiles {
        ca: folder.join("ca.pem"),
        cert: folder.join(format!("{name}.pem")),
        key: folder.join(format!("{name}.key")),
    };
    Credentials::load(&files, name).expect("what was just made is right")
}

async fn start(
    name: &str,
    device: PairDevice,
    cable: &Arc<Cable>,
    setup: &Setup,
    peer: Option<(&str, std::net::SocketAddr)>,
    credentials: Option<Arc<Credentials>>,
) -> (Arc<Node>, std::net::SocketAddr, Relay) {
    let any = ([127, 0, 0, 1], 0).into();
    let plugged = Plugged {
        inner: device,
        cable: Arc::clone(cable),
    };
    let config = udp::Config {
        liveness: setup.liveness,
        ..udp::Config::default()
    };
    let (udp, local) =
        udp::spawn(config, move || Ok::<_, Infallible>(plugged)).expect("an engine starts");
    let mut transports = Transports::default();
    let mut attended = vec![transports.add(Transport::Dpdk, Local::Dpdk(local), udp)];
    if setup.shm {
        let config = shm::Config {
            liveness: setup.liveness,
            open_limit: setup.liveness,
            progress_limit: setup.stall,
        };
        let (shm, local) = shm::spawn(config).expect("an engine starts");
        attended.push(transports.add(Transport::Shm, Local::Shm(local), shm));
    }
    let config = tcp::Config {
        liveness: setup.liveness,
        open_limit: setup.liveness,
        progress_limit: setup.stall,
        listen: any,
        streams: 2,
        congestion: None,
    };
    let streams = config.streams;
    let (tcp, data) = tcp::spawn(config).expect("an engine starts");
    let relay = Relay::toward(data);
    let data = relay.address();
    let local = Local::Tcp { data, streams };
    attended.push(transports.add(Transport::Tcp, local, tcp));
    let listener = TcpListener::bind(any).await.expect("loopback is there");
    let listen = listener.local_addr().expect("it is bound");
    let peers = peer.map(|(name, address)| (name.to_owned(), address.to_string()));
    let node = Node::new(Parts {
        name: name.to_owned(),
        preference: setup.preference.parse().expect("a preference"),
        data_security: if setup.sealed {
            DataSecurity::Aead
        } else {
            DataSecurity::Plain
        },
        liveness: setup.liveness,
        stall: setup.stall,
        transports,
        store_bytes: setup.store_bytes,
        arena_bytes: 1 << 30,
        user_limits: Limits {
            connections: 1,
            arenas: 1,
            bytes: 1 << 20,
        },
        peer_limits: PeerLimits {
            memory: setup.store_bytes,
            transfers: setup.peer_transfers,
            rate: 100_000,
            sessions: 64,
        },
        own_limits: BTreeMap::new(),
        peers: peers.into_iter().collect::<BTreeMap<_, _>>(),
        listen,
        socket: "unused".into(),
        warning: None,
        devices: Default::default(),
        identity: Identity::new(credentials, Default::default()),
        metrics: Default::default(),
    });
    for attended in attended {
        attend(&node, attended);
    }
    let served = Arc::clone(&node);
    tokio::spawn(async move {
        let strangers = Strangers::default();
        while let Ok((stream, address)) = listener.accept().await {
            let node = Arc::clone(&served);
            let newcomer = strangers.enter(address.ip());
            tokio::spawn(async move {
                let place = newcomer.expect("no crowd comes here").place().await;
                establish::accept(&node, stream, place).await.map(drop)
            });
        }
    });
    (node, listen, relay)
}

/// A device with the cable in it.
#[derive(Debug)]
struct Plugged {
    inner: PairDevice,
    cable: Arc<Cable>,
}

impl Plugged {
    fn is_jammed(&self) -> bool {
        self.cable.jammed.load(Ordering::Relaxed)
    }
}

impl Device for Plugged {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        let cable = &self.cable;
        self.inner.rx_burst(&mut |view| {
            if cable.passes() {
                on_frame(view);
            }
        })
    }

    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        if self.is_jammed() {
            return 0;
        }
        self.inner.tx_burst(frames)
    }

    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        self.inner.attach(lease)
    }

    fn detach(&mut self, attachment: Attachment) -> bool {
        !self.is_jammed() && self.inner.detach(attachment)
    }

    fn reap(&mut self) {
        self.inner.reap();
    }

    fn stop(&mut self) {
        self.cable.jammed.store(false, Ordering::SeqCst);
        self.cable.cut();
        self.inner.stop();
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }

    fn copies(&self) -> Copies {
        self.inner.copies()
    }

    fn link_up(&self) -> bool {
        self.inner.link_up()
    }
}
