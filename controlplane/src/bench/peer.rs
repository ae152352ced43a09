//! The other process of a benchmark: does what it is asked until the end.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use genie_dataplane::device::pair::PairDevice;
use genie_dataplane::endpoint::Transfer;
use genie_dataplane::{Secrets, TransferId};

use super::BenchError;
use super::baseline::{iperf3, raw, tcp};
use super::carriers::{Node, poll};
use super::channel::Channel;
use super::environment::cpu_time;
use super::genie::open_path;
use super::message::{Reply, Request, Usage};
use super::polled::{in_place, pingpong};
use super::pool::{Layout, Pool};
use super::window::Window;

/// What must be equal at both ends.
pub const VERSION: &str = concat!("genie bench 5, genie ", env!("CARGO_PKG_VERSION"));

/// How long the measuring process may be silent: it may run a row of any length.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A benchmark's other process, or a thread that stands for it.
#[derive(Debug)]
pub struct Peer {
    channel: Channel,
    /// This end's device, where the operator named one.
    device: Option<String>,
    /// This end of the devices joined in memory, where both ends are one process.
    pairs: Option<Receiver<PairDevice>>,
    pool: Option<Pool>,
    node: Option<Node>,
}

/// Connections served at a time: the most threads that `--threads` starts.
const CONNECTIONS_MAX: usize = 64;

/// Listens for benchmarks, for ever, or serves `once` one connection.
///
/// Each connection is one measuring thread's, served by a thread of its own.
pub fn serve(listen: SocketAddr, device: Option<String>, once: bool) -> Result<(), BenchError> {
    let listener = TcpListener::bind(listen).map_err(BenchError::Channel)?;
    let address = listener.local_addr().map_err(BenchError::Channel)?;
    println!("genie bench: ready on {address}");
    if !address.ip().is_loopback() {
        eprintln!("genie bench: whoever reaches {address} can have this process receive bytes");
    }
    let serving = Arc::new(());
    loop {
        let (stream, from) = listener.accept().map_err(BenchError::Channel)?;
        let peer = Peer::new(stream, device.clone(), None);
        if once {
            // How it ended is the measuring process's to say.
            let _ = peer?.run();
            return Ok(());
        }
        if Arc::strong_count(&serving) > CONNECTIONS_MAX {
            eprintln!("genie bench: {from}: {CONNECTIONS_MAX} connections are served already");
            continue;
        }
        let here = Arc::clone(&serving);
        std::thread::spawn(move || {
            if let Err(error) = peer.and_then(Peer::run) {
                eprintln!("genie bench: {from}: {error}");
            }
            drop(here);
        });
    }
}

impl Peer {
    /// The other end of `stream`.
    pub fn new(
        stream: TcpStream,
        device: Option<String>,
        pairs: Option<Receiver<PairDevice>>,
    ) -> Result<Self, BenchError> {
        let channel = Channel::new(stream).map_err(BenchError::Channel)?;
        Ok(Self {
            channel,
            device,
            pairs,
            pool: None,
            node: None,
        })
    }

    /// Answers requests until the end.
    pub fn run(mut self) -> Result<(), BenchError> {
        loop {
            let request = self.channel.receive(PATIENCE)?;
            if matches!(request, Request::Bye) {
                return Ok(());
            }
            let reply = match self.handle(request) {
                Ok(reply) => reply,
                // Without the other process there is nobody to tell.
                Err(error @ (BenchError::PeerGone | BenchError::Channel(_))) => return Err(error),
                Err(error) => Reply::Failed(error.to_string()),
            };
            self.channel.send(&reply)?;
        }
    }

    fn handle(&mut self, request: Request) -> Result<Reply, BenchError> {
        match request {
            Request::Hello(version) if version == VERSION => Ok(Reply::Done),
            Request::Hello(version) => Err(BenchError::Version(version)),
            Request::Memory { bytes, memory } => {
                self.pool = None;
                self.pool = Some(Pool::new(bytes, memory)?);
                Ok(Reply::Done)
            }
            Request::Start {
                kind,
                device,
                mut setup,
            } => {
                setup.secrets = setup.secrets.map(Secrets::of_the_other_end);
                let device = device.or_else(|| self.device.clone());
                let end = self.pairs.as_ref().and_then(|pairs| pairs.try_recv().ok());
                let listen = self.channel.local().map_err(BenchError::Channel)?.ip();
                let node = Node::start(kind, device.as_deref(), end, listen, &setup)?;
                let reply = Reply::Started(node.local.clone(), node.session);
                self.node = Some(node);
                Ok(reply)
            }
            Request::Open {
                local,
                session,
                token,
            } => {
                let node = self.node.as_mut().ok_or(BenchError::Garbage)?;
                open_path(node, &local, session, token, None)?;
                Ok(Reply::Done)
            }
            Request::Begin {
                layout,
                batch,
                echo,
            } => self.receive_blocks(layout, batch, echo),
            // What was under way when a row ended.
            Request::Grants(_) | Request::End { .. } => Err(BenchError::Garbage),
            Request::Stop => {
                self.node = None;
                Ok(Reply::Done)
            }
            Request::Usage => Ok(Reply::Used(match &self.node {
                Some(node) => node.usage(),
                None => Usage {
                    process: std::process::id(),
                    cpu_seconds: cpu_time().as_secs_f64(),
                    ..Usage::default()
                },
            })),
            Request::BareTcp { layout, how } => {
                let ip = self.channel.local().map_err(BenchError::Channel)?.ip();
                let pool = self.pool.clone().ok_or(BenchError::Garbage)?;
                Ok(Reply::Port(tcp::serve_once(ip, pool, layout, how)?))
            }
            Request::Iperf3 => Ok(Reply::Port(iperf3::serve_once()?)),
            Request::RawDevice { device, work } => {
                let pool = self.pool.clone().ok_or(BenchError::Garbage)?;
                self.channel.send(&Reply::Ready)?;
                let received = raw::receive(&device, &work, &pool)?;
                Ok(Reply::Frames(received))
            }
            Request::RawPong { device } => {
                self.channel.send(&Reply::Ready)?;
                Ok(Reply::Driver(raw::pong(&device)?))
            }
            Request::PolledPong {
                device,
                local,
                session,
                block_size,
                integrity,
            } => {
                let mut end = pingpong::open(&device)?;
                let (ours, name) = end.local();
                self.channel.send(&Reply::Polled(ours, name))?;
                end.connect(local, session, integrity)?;
                Ok(Reply::Driver(pingpong::pong(end, block_size)?))
            }
            Request::PolledRead {
                device,
                local,
                session,
                block_size,
                batch,
                integrity,
            } => {
                let mut end = in_place::open(&device)?;
                let (ours, name) = end.local();
                self.channel.send(&Reply::Polled(ours, name))?;
                end.connect(local, session, integrity)?;
                let (driver, sum) = in_place::read(end, block_size, batch)?;
                Ok(Reply::Read(driver, sum))
            }
            Request::Bye => Ok(Reply::Done),
        }
    }

    /// Receives the blocks of one row, until the other end says how many they were.
    fn receive_blocks(
        &mut self,
        layout: Layout,
        batch: usize,
        echo: bool,
    ) -> Result<Reply, BenchError> {
        let pool = self.pool.clone().ok_or(BenchError::Garbage)?;
        let Self { channel, node, .. } = self;
        let node = node.as_mut().ok_or(BenchError::Garbage)?;
        let mut window = Window::new(layout, pool.clone(), 2 * batch);
        let mut echoes = Echoes {
            pool,
            layout,
            granted: VecDeque::new(),
            next: 0,
            sent: Vec::new(),
        };
        let mut expected = None;
        loop {
            let ids = window.post(node)?;
            if !ids.is_empty() {
                channel.send(&Reply::Grants(ids))?;
            }
            node.dispatch()?;
            let arrived = window.collect(node)?;
            if echo {
                echoes.send(node, window.arrived())?;
            }
            while let Some(request) = channel.try_receive()? {
                match request {
                    Request::Grants(ids) => echoes.granted.extend(ids),
                    Request::End { blocks, bytes_max } => expected = Some((blocks, bytes_max)),
                    Request::Usage => channel.send(&Reply::Used(node.usage()))?,
                    _ => return Err(BenchError::Garbage),
                }
            }
            if let Some((blocks, bytes_max)) = expected
                && window.arrived() >= blocks
                && echoes.sent.is_empty()
            {
                return Ok(Reply::Checked(window.check(bytes_max)?));
            }
            if arrived == 0 {
                node.rest(Some(channel), Some(Duration::from_millis(100)));
            }
        }
    }
}

/// Blocks on their way back.
struct Echoes {
    pool: Pool,
    layout: Layout,
    granted: VecDeque<TransferId>,
    /// The next block to send back.
    next: u64,
    sent: Vec<Transfer>,
}

impl Echoes {
    fn send(&mut self, node: &mut Node, arrived: u64) -> Result<(), BenchError> {
        while self.next < arrived
            && let Some(id) = self.granted.pop_front()
        {
            let from = self.pool.block(&self.layout, self.next)?;
            let sent = node.endpoint.try_send(node.session, id, from);
            self.sent
                .push(sent.map_err(|_| BenchError::TooManyOperations)??);
            self.next += 1;
        }
        let mut failed = None;
        self.sent.retain_mut(|transfer| match poll(transfer) {
            None => true,
            Some(Ok(receipt)) => {
                node.count(&receipt);
                false
            }
            Some(Err(reason)) => {
                failed = Some(reason);
                false
            }
        });
        failed.map_or(Ok(()), |reason| Err(reason.into()))
    }
}
