//! Notifications: hearing that others have written.

use std::path::Path;
use std::time::Duration;

use crate::client::{Canceller, Client, ClientError};
use crate::protocol::{Answer, Ask, Notification};

/// Hears of the names under one prefix, over a connection of its own.
///
/// A notification that came with a write comes after its bytes: whoever reads
/// them then reads what was written. They come in the order in which the agent
/// took them in; those of one writer, each sent after the one before had ended,
/// in the writer's. Up to 1024 wait to be taken, what comes then is lost, and
/// the next one says how many were.
#[derive(Debug)]
pub struct Listener {
    client: Client,
}

impl Listener {
    /// Connects to the agent's socket and listens from then on.
    pub fn connect(path: impl AsRef<Path>, prefix: &str) -> Result<Self, ClientError> {
        let mut client = Client::connect(path)?;
        client.ask(&Ask::Listen {
            prefix: prefix.to_owned(),
        })?;
        client.recv_done()?;
        Ok(Self { client })
    }

    /// The next notification; none if none came within `limit`.
    pub fn next(&mut self, limit: Duration) -> Result<Option<Notification>, ClientError> {
        let limit_ms = limit.as_millis().try_into().unwrap_or(u64::MAX);
        self.client.ask(&Ask::Await { limit_ms })?;
        match self.client.recv()? {
            Answer::Notified(notification) => Ok(notification),
            _ => Err(self.client.unexpected()),
        }
    }

    /// What ends [`Listener::next`] from another thread.
    pub fn canceller(&self) -> Canceller {
        self.client.canceller()
    }
}
