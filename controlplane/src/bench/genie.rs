//! Genie as a carrier: two engines, blocks sent or sent there and back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use genie_client::Memory;
use genie_dataplane::endpoint::Transfer;
use genie_dataplane::{SessionId, TransferId};

use super::BenchError;
use super::carriers::{Kind, LIVENESS, Node, poll};
use super::channel::Channel;
use super::measure::{Carrier, Slot};
use super::message::{Reply, Request, Setup, Usage};
use super::pool::{Layout, Pool};
use super::window::Window;
use crate::transport::Keys;
use crate::transport::Local;

/// A session between this process and the other one.
#[derive(Debug)]
pub struct Session {
    node: Node,
    /// The other end's driver.
    remote_driver: String,
}

/// One row of it.
#[derive(Debug)]
pub struct Blocks<'a> {
    session: &'a mut Session,
    channel: &'a mut Channel,
    pool: &'a Pool,
    layout: Layout,
    granted: VecDeque<TransferId>,
    in_flight: Vec<(Slot, Transfer)>,
    /// The blocks' way back; none for one-way rows.
    echo: Option<Window>,
    /// Slots in the order their echoes come back.
    echoes: VecDeque<Slot>,
    begun: u64,
}

impl Session {
    /// Has the other process start its engine and opens a session between them.
    ///
    /// This end's device is opened first: of a pair it is vhost.
    pub fn open(
        channel: &mut Channel,
        kind: Kind,
        start: impl FnOnce() -> Result<Node, BenchError>,
        device: Option<String>,
        setup: Setup,
    ) -> Result<Self, BenchError> {
        let mut node = start()?;
        let request = Request::Start {
            kind,
            device,
            setup,
        };
        let (local, session) = match ask(channel, &request)? {
            Reply::Started(local, session) => (local, session),
            other => return Err(unexpected(other)),
        };
        let token = crate::node::random();
        let request = Request::Open {
            local: node.local.clone(),
            session: node.session,
            token,
        };
        channel.send(&request)?;
        let remote_driver = match &local {
            Local::Dpdk(local) => local.driver.clone(),
            Local::Tcp { .. } => "tcp".into(),
            Local::Shm(_) => "shm".into(),
        };
        let dialled = channel.peer().map_err(BenchError::Channel)?;
        open_path(&mut node, &local, session, token, Some(dialled))?;
        expect_done(channel.receive(LIVENESS + Duration::from_secs(5))?)?;
        Ok(Self {
            node,
            remote_driver,
        })
    }

    /// The drivers of both ends.
    pub fn device(&self) -> String {
        format!("{} → {}", self.node.driver(), self.remote_driver)
    }

    /// This end's engine.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Begins a row.
    pub fn blocks<'a>(
        &'a mut self,
        channel: &'a mut Channel,
        pool: &'a Pool,
        layout: Layout,
        batch: usize,
        echo: bool,
    ) -> Result<Blocks<'a>, BenchError> {
        let granted = match ask(
            channel,
            &Request::Begin {
                layout,
                batch,
                echo,
            },
        )? {
            Reply::Grants(ids) => ids.into(),
            other => return Err(unexpected(other)),
        };
        // Memory of its own: in the sources' it would find what it looks for.
        let echo = if echo {
            let back = Pool::new(layout.bytes(), Memory::Auto)?;
            Some(Window::new(layout, back, 2 * batch))
        } else {
            None
        };
        let mut blocks = Blocks {
            echo,
            session: self,
            channel,
            pool,
            layout,
            granted,
            in_flight: Vec::with_capacity(batch),
            echoes: VecDeque::new(),
            begun: 0,
        };
        blocks.grant()?;
        Ok(blocks)
    }
}

/// Opens this end of the path to the other process's engine.
pub fn open_path(
    node: &mut Node,
    remote: &Local,
    session: SessionId,
    token: [u8; 16],
    dialled: Option<std::net::SocketAddr>,
) -> Result<(), BenchError> {
    let keys = Keys {
        token: genie_dataplane::tcp::Token(token),
        secrets: node.secrets.clone(),
    };
    let remote = remote.remote(&node.local, session, keys, dialled);
    let (endpoint, ours, integrity) = (node.endpoint.clone(), node.session, node.integrity);
    let opening = std::pin::pin!(endpoint.open_with(ours, remote, integrity));
    node.wait(opening)??;
    Ok(())
}

impl Blocks<'_> {
    /// Ends the row; returns how many blocks were compared with what was sent.
    pub fn end(self, bytes_max: u64) -> Result<u64, BenchError> {
        let request = Request::End {
            blocks: self.begun,
            bytes_max,
        };
        self.channel.send(&request)?;
        let until = Instant::now() + Duration::from_secs(60);
        let checked = loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.channel.receive(left)? {
                Reply::Grants(_) => {}
                Reply::Checked(blocks) => break blocks,
                other => return Err(unexpected(other)),
            }
        };
        match self.echo {
            // What came back was compared here with what went out.
            Some(window) => Ok(checked.min(window.check(bytes_max)?)),
            None => Ok(checked),
        }
    }

    /// What both ends have used so far.
    pub fn usage(&mut self) -> Result<[Usage; 2], BenchError> {
        self.channel.send(&Request::Usage)?;
        loop {
            match self.channel.receive(LIVENESS)? {
                Reply::Grants(ids) => self.granted.extend(ids),
                Reply::Used(theirs) => return Ok([self.session.node.usage(), theirs]),
                other => return Err(unexpected(other)),
            }
        }
    }

    fn grant(&mut self) -> Result<(), BenchError> {
        if let Some(window) = &mut self.echo {
            let ids = window.post(&self.session.node)?;
            if !ids.is_empty() {
                self.channel.send(&Request::Grants(ids))?;
            }
        }
        Ok(())
    }

    fn take_grants(&mut self) -> Result<(), BenchError> {
        while let Some(reply) = self.channel.try_receive()? {
            match reply {
                Reply::Grants(ids) => self.granted.extend(ids),
                other => return Err(unexpected(other)),
            }
        }
        Ok(())
    }

    fn collect(&mut self, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        self.session.node.dispatch()?;
        let Self {
            in_flight,
            session,
            echo,
            echoes,
            ..
        } = self;
        let mut failed = None;
        in_flight.retain_mut(|(slot, transfer)| match poll(transfer) {
            None => true,
            Some(Ok(receipt)) => {
                session.node.count(&receipt);
                if echo.is_none() {
                    done.push(*slot);
                }
                false
            }
            Some(Err(reason)) => {
                failed = Some(reason);
                false
            }
        });
        if let Some(reason) = failed {
            return Err(reason.into());
        }
        if let Some(window) = echo {
            for _ in 0..window.collect(&mut session.node)? {
                done.extend(echoes.pop_front());
            }
            self.grant()?;
        }
        Ok(())
    }
}

impl Carrier for Blocks<'_> {
    fn begin(&mut self, slot: Slot) -> Result<(), BenchError> {
        let until = Instant::now() + LIVENESS;
        while self.granted.is_empty() {
            self.take_grants()?;
            if self.granted.is_empty() {
                if Instant::now() >= until {
                    return Err(BenchError::Silent(LIVENESS));
                }
                // What completes meanwhile is found by the next `complete`.
                super::channel::wait_readable(
                    &[std::os::fd::AsFd::as_fd(self.channel)],
                    Some(Duration::from_millis(100)),
                );
            }
        }
        let id = self.granted.pop_front().ok_or(BenchError::PeerGone)?;
        let from = self.pool.stamp(&self.layout, self.begun)?;
        let node = &self.session.node;
        let sent = node.endpoint.try_send(node.session, id, from);
        self.in_flight
            .push((slot, sent.map_err(|_| BenchError::TooManyOperations)??));
        if self.echo.is_some() {
            self.echoes.push_back(slot);
        }
        self.begun += 1;
        Ok(())
    }

    fn complete(&mut self, until: Option<Instant>, done: &mut Vec<Slot>) -> Result<(), BenchError> {
        // The engine's own liveness limit ends a transfer; this ends a wait
        // for something that was never begun.
        let stalled = Instant::now() + 6 * LIVENESS;
        loop {
            self.collect(done)?;
            self.take_grants()?;
            let now = Instant::now();
            if !done.is_empty() || until.is_some_and(|until| until <= now) {
                return Ok(());
            }
            if now >= stalled {
                return Err(BenchError::Silent(6 * LIVENESS));
            }
            let limit = until.unwrap_or(stalled).saturating_duration_since(now);
            self.session.node.rest(Some(self.channel), Some(limit));
        }
    }
}

/// Asks and waits for the answer.
pub fn ask(channel: &mut Channel, request: &Request) -> Result<Reply, BenchError> {
    channel.send(request)?;
    match channel.receive(Duration::from_secs(30))? {
        Reply::Failed(reason) => Err(BenchError::Refused(reason)),
        reply => Ok(reply),
    }
}

/// A reply that must be [`Reply::Done`].
pub fn expect_done(reply: Reply) -> Result<(), BenchError> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(unexpected(other)),
    }
}

/// What a reply that does not fit means.
pub fn unexpected(reply: Reply) -> BenchError {
    match reply {
        Reply::Failed(reason) => BenchError::Refused(reason),
        _ => BenchError::Garbage,
    }
}
