//! Keeps a path under a session: replaces one that is lost, returns to a better one.
//!
//! One task for each session. The dialler's decides and opens, by the same
//! words as at the start (`Try`, `Trying`, `Opened`, `Chosen`); the acceptor's
//! answers. Either end may say that a path is lost (`PathLost`). What moves
//! over a path is interrupted when it is closed, and goes on over the next one:
//! see [`crate::transfer`]. Where no other path is allowed the session ends
//! with the reason.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::{sleep_until, timeout};

use super::comeback::{Comeback, Verdict};
use super::path::{Asked, Draft, Line, Opener, Peer};
use super::route::Stage;
use super::{Direction, Session, SessionError, show_refusals};
use crate::message::Message;
use crate::negotiation::{Refusal, better_refused};
use crate::node::{Node, random};
use crate::transport::Transport;

/// Messages of a negotiation that may wait: each is answered before the next.
pub(super) const INBOX: usize = 16;

/// Paths that may be lost within [`LOSSES_WITHIN`]; a session that loses more
/// does not get anywhere.
const LOSSES_MAX: usize = 8;

/// See [`LOSSES_MAX`].
const LOSSES_WITHIN: Duration = Duration::from_secs(60);

/// The task of one session.
pub(super) struct Steward {
    node: Arc<Node>,
    session: Arc<Session>,
    peer: Peer,
    inbox: mpsc::Receiver<Message>,
    stage: watch::Receiver<Stage>,
    comeback: Comeback,
    losses: VecDeque<Instant>,
    /// The last path whose loss the peer was told of.
    told: u32,
}

/// Talks beside the requests of a session.
struct Aside<'a> {
    session: &'a Session,
    inbox: &'a mut mpsc::Receiver<Message>,
}

impl Line for Aside<'_> {
    async fn send(&mut self, message: Message) -> Result<(), SessionError> {
        self.session.say(message).await
    }

    async fn recv(&mut self, limit: Duration) -> Result<Message, SessionError> {
        loop {
            let message = timeout(limit, self.inbox.recv()).await;
            match message.map_err(|_| SessionError::Silent {
                peer: self.session.peer.clone(),
                limit,
            })? {
                Some(Message::PathLost { number, reason }) => {
                    self.session.hear_lost(number, &reason);
                }
                Some(message) => return Ok(message),
                None => return Err(self.session.error()),
            }
        }
    }
}

impl Steward {
    pub(super) fn new(
        node: Arc<Node>,
        session: Arc<Session>,
        peer: Peer,
        inbox: mpsc::Receiver<Message>,
    ) -> Self {
        let stage = session.route.watch();
        let comeback = Comeback::new(node.liveness);
        Self {
            node,
            session,
            peer,
            inbox,
            stage,
            comeback,
            losses: VecDeque::new(),
            told: 0,
        }
    }

    /// Runs until the session ends.
    pub(super) async fn run(mut self) {
        let session = Arc::clone(&self.session);
        let served = async {
            let served = match self.session.direction {
                Direction::Dialled => self.decide().await,
                Direction::Accepted => self.answer().await,
            };
            if let Err(error) = served {
                session.end(error.to_string());
            }
        };
        tokio::select! {
            _ = session.until_ended() => {}
            () = served => {}
        }
    }

    /// The dialler's part.
    async fn decide(&mut self) -> Result<(), SessionError> {
        self.plan_return();
        loop {
            let due = self.comeback.due().map(|due| self.session.since + due);
            tokio::select! {
                biased;
                reason = lost(&mut self.stage) => self.replace(&reason).await?,
                message = self.inbox.recv() => match message {
                    Some(Message::PathLost { number, reason }) => {
                        self.session.hear_lost(number, &reason);
                    }
                    Some(other) => return Err(self.opener().unexpected(&other)),
                    None => return Ok(()),
                },
                () = until(due) => self.try_to_return().await?,
            }
        }
    }

    /// Opens another path in place of the one that was lost for `reason`.
    async fn replace(&mut self, reason: &str) -> Result<(), SessionError> {
        let stage = self.session.route.stage();
        self.tell_lost(&stage, reason).await?;
        self.count_loss(reason)?;
        let lost = stage.path.transport;
        let plan = self.opener().plan();
        let mut refused = plan.refused;
        refused.push(Refusal {
            transport: lost,
            reason: format!("lost: {reason}"),
        });
        // Kernel connections can be made anew at once; a device that was just
        // lost has to prove itself first.
        let again = (lost == Transport::Tcp).then_some(lost);
        let others = plan.candidates.into_iter().filter(|other| *other != lost);
        let allowed: Vec<_> = again.into_iter().chain(others).collect();
        let mut tried = Vec::new();
        for transport in allowed {
            match self.offer(transport).await? {
                Ok(draft) => return self.choose(draft, transport, refused, reason).await,
                Err(reason) => tried.push(Refusal { transport, reason }),
            }
        }
        // Tells the acceptor, which ends the session for the same reason.
        let reason = match &tried[..] {
            [] => reason.to_owned(),
            tried => format!(
                "{reason}; and no other path opens: {}",
                show_refusals(tried, &self.node.preference)
            ),
        };
        Err(SessionError::Ended(
            format!("peer '{}': {reason}", self.session.peer).into(),
        ))
    }

    /// Opens a better path than the present one; takes it once it has proved itself.
    async fn try_to_return(&mut self) -> Result<(), SessionError> {
        let Some(better) = self.better() else {
            self.comeback.is_content();
            return Ok(());
        };
        let began = Instant::now();
        let offered = self.offer(better).await?;
        let took = began.elapsed();
        let [random] = random();
        let now = self.session.since.elapsed();
        let draft = match offered {
            Ok(draft) => draft,
            Err(reason) => {
                tracing::debug!(peer = %self.peer.name, transport = %better, %reason, "still down");
                self.comeback.failed(now, random);
                return Ok(());
            }
        };
        match self.comeback.opened(now, took, random) {
            Verdict::Return => {
                let refused = self.opener().plan().refused;
                let why = format!("{better} works again");
                self.choose(draft, better, refused, &why).await
            }
            Verdict::NotYet => {
                drop(draft);
                let refused = Vec::new();
                self.session.say(Message::NoPath { refused }).await
            }
        }
    }

    async fn offer(&mut self, transport: Transport) -> Result<Result<Draft, String>, SessionError> {
        let opener = Opener {
            node: &self.node,
            peer: &self.peer,
        };
        let mut line = Aside {
            session: &self.session,
            inbox: &mut self.inbox,
        };
        opener.offer(&mut line, transport).await
    }

    /// Tells the acceptor that the path just opened carries the session.
    async fn choose(
        &mut self,
        draft: Draft,
        transport: Transport,
        refused: Vec<Refusal>,
        why: &str,
    ) -> Result<(), SessionError> {
        let (ours, theirs) = (&self.node.preference, &self.peer.preference);
        let refused = better_refused(transport, refused, ours, theirs);
        let chosen = Message::Chosen {
            refused: refused.clone(),
        };
        // From here on the acceptor may use it; what it sends early waits.
        self.session.change_path(draft, refused, why);
        self.session.say(chosen).await?;
        self.plan_return();
        Ok(())
    }

    /// Begins to look after a better path, if there is one.
    fn plan_return(&mut self) {
        let [random] = random();
        match self.better() {
            Some(_) => self
                .comeback
                .fell_back(self.session.since.elapsed(), random),
            None => self.comeback.is_content(),
        }
    }

    /// The best transport, if the session does not use it.
    fn better(&self) -> Option<Transport> {
        let best = self.opener().plan().candidates.into_iter().next()?;
        (best != self.session.path().transport).then_some(best)
    }

    fn opener(&self) -> Opener<'_> {
        Opener {
            node: &self.node,
            peer: &self.peer,
        }
    }

    /// Refuses to go on once too many paths were lost within a while.
    fn count_loss(&mut self, reason: &str) -> Result<(), SessionError> {
        let now = Instant::now();
        self.losses.retain(|at| now - *at < LOSSES_WITHIN);
        self.losses.push_back(now);
        if self.losses.len() > LOSSES_MAX {
            return Err(SessionError::Ended(
                format!(
                    "peer '{}': {} paths were lost within {LOSSES_WITHIN:?}, the last one: {reason}",
                    self.session.peer,
                    self.losses.len()
                )
                .into(),
            ));
        }
        Ok(())
    }

    async fn tell_lost(&mut self, stage: &Stage, reason: &str) -> Result<(), SessionError> {
        let number = stage.path.number;
        if self.told == number {
            return Ok(());
        }
        self.told = number;
        let reason = reason.to_owned();
        self.session.say(Message::PathLost { number, reason }).await
    }

    /// The acceptor's part.
    async fn answer(&mut self) -> Result<(), SessionError> {
        let mut draft: Option<Draft> = None;
        loop {
            let untold = self.told != self.session.path().number;
            let message = tokio::select! {
                biased;
                reason = lost(&mut self.stage), if untold => {
                    let stage = self.session.route.stage();
                    self.tell_lost(&stage, &reason).await?;
                    continue;
                }
                message = self.inbox.recv() => message,
            };
            match message {
                Some(Message::Try {
                    transport,
                    session,
                    token,
                    salt,
                }) => {
                    // Closes the one before, if any.
                    drop(draft.take());
                    let opener = Opener {
                        node: &self.node,
                        peer: &self.peer,
                    };
                    let mut line = Aside {
                        session: &self.session,
                        inbox: &mut self.inbox,
                    };
                    let asked = Asked {
                        transport,
                        session,
                        token,
                        salt,
                    };
                    draft = opener.answer(&mut line, asked).await?;
                }
                Some(Message::Chosen { refused }) => match draft.take() {
                    Some(draft) => {
                        let why = "the peer returns to a better path";
                        self.session.change_path(draft, refused, why);
                    }
                    None => return Err(self.opener().unexpected(&Message::Chosen { refused })),
                },
                Some(Message::NoPath { .. }) => drop(draft.take()),
                Some(Message::PathLost { number, reason }) => {
                    self.session.hear_lost(number, &reason);
                }
                Some(other) => return Err(self.opener().unexpected(&other)),
                None => return Ok(()),
            }
        }
    }
}

/// Waits until no path carries the session; says why.
async fn lost(stage: &mut watch::Receiver<Stage>) -> Arc<str> {
    loop {
        if let Some((reason, _)) = &stage.borrow_and_update().lost {
            return Arc::clone(reason);
        }
        if stage.changed().await.is_err() {
            // The session is gone, and this task with it.
            return std::future::pending().await;
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
