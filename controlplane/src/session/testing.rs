//! Sessions without a peer, for tests of what a peer may do to them.

use genie_dataplane::tcp;

use crate::transport::Transport;

use super::*;

/// How long a request may stall.
pub(crate) const STALL: Duration = Duration::from_millis(200);

const LOCAL: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

/// A node without transports.
pub(crate) fn node() -> Arc<Node> {
    Node::new(crate::node::Parts {
        name: "a".into(),
        preference: crate::transport::Preference::default(),
        data_security: Default::default(),
        liveness: Duration::from_millis(250),
        stall: STALL,
        transports: Default::default(),
        store_bytes: 1 << 20,
        arena_bytes: 1 << 20,
        user_limits: crate::quota::Limits {
            connections: 1,
            arenas: 1,
            bytes: 1 << 20,
        },
        peer_limits: crate::quota::peer::PeerLimits {
            memory: 1 << 20,
            transfers: 64,
            rate: 1000,
            sessions: 1,
        },
        own_limits: Default::default(),
        peers: Default::default(),
        listen: LOCAL.into(),
        socket: "unused".into(),
        warning: None,
        devices: Default::default(),
        identity: crate::identity::Identity::new(None, Default::default()),
        metrics: Default::default(),
    })
}

/// How a node without transports introduces itself.
pub(crate) fn hello() -> crate::message::Hello {
    let node = node();
    node.hello(&node.transports.seat())
}

/// A session whose writer takes nothing, so that nothing ends a request by chance.
pub(crate) fn session(direction: Direction) -> (Arc<Session>, mpsc::Receiver<Message>) {
    let (running, _) = tcp::spawn(tcp::Config {
        listen: LOCAL.into(),
        streams: 1,
        liveness: Duration::from_secs(2),
        open_limit: Duration::from_secs(2),
        progress_limit: Duration::from_secs(2),
        ..tcp::Config::default()
    })
    .unwrap();
    let (outbox, outgoing) = mpsc::channel(OUTBOX);
    let endpoint = running.endpoint;
    let path = Path {
        number: 1,
        transport: Transport::Tcp,
        queue: 0,
        name: "tcp".into(),
        session: endpoint.new_session(1),
        endpoint,
        round_trip: Duration::ZERO,
        sealed: false,
    };
    let session = Arc::new(Session {
        peer: "b".into(),
        instance: Instance([1; 16]),
        direction,
        route: Route::new(path, Vec::new()),
        chain: None,
        since: Instant::now(),
        stall: STALL,
        range_bytes: None,
        outbox,
        // Nobody keeps a path under it.
        negotiation: mpsc::channel(1).0,
        calls: Mutex::default(),
        next_call: AtomicU64::new(1),
        end: watch::Sender::new(None),
    });
    (session, outgoing)
}
