//! Who this agent is, whom it believes, and what peers may do.
//!
//! An agent's name is the name in its certificate, which a CA of the operator's
//! own has signed ([`authority`] makes both). Control connections are TLS 1.3
//! with both ends authenticated ([`credentials`], [`stream`]); what a peer may
//! then do is in [`crate::rights`]. All of it can be replaced while the agent
//! runs. The invariant: *whoever looks sees one complete set, old or new*.

pub mod authority;
pub mod credentials;
pub mod stream;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

pub use credentials::{CredentialError, CredentialFiles, Credentials};

use crate::rights::{Access, Right};
use crate::status::IdentityStatus;

/// What an agent is and whom it admits; shared by all its tasks.
#[derive(Debug)]
pub struct Identity {
    current: RwLock<Arc<Current>>,
    refused_peers: AtomicU64,
    refused_requests: AtomicU64,
    dropped_strangers: AtomicU64,
}

/// One complete set.
#[derive(Debug, Default)]
pub struct Current {
    /// Certificate, key and CA; none where peers are not authenticated.
    pub credentials: Option<Arc<Credentials>>,
    /// Whom it admits, and to what.
    pub access: Access,
    /// Why newer files are not used, if they are not.
    pub reload_error: Option<String>,
}

impl Identity {
    /// Begins with these.
    pub fn new(credentials: Option<Arc<Credentials>>, access: Access) -> Self {
        let current = Current {
            credentials,
            access,
            reload_error: None,
        };
        Self {
            current: RwLock::new(Arc::new(current)),
            refused_peers: AtomicU64::new(0),
            refused_requests: AtomicU64::new(0),
            dropped_strangers: AtomicU64::new(0),
        }
    }

    /// What counts at this moment.
    pub fn current(&self) -> Arc<Current> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on these count.
    pub fn replace(&self, credentials: Option<Arc<Credentials>>, access: Access) {
        self.set(Current {
            credentials,
            access,
            reload_error: None,
        });
    }

    /// Notes why the old ones still count.
    pub fn keep(&self, reason: String) {
        let old = self.current();
        self.set(Current {
            credentials: old.credentials.clone(),
            access: old.access.clone(),
            reload_error: Some(reason),
        });
    }

    /// Counts a peer that was turned away.
    pub fn count_refused_peer(&self) {
        self.refused_peers.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that lost its place before it was a session.
    pub fn count_dropped_stranger(&self) {
        self.dropped_strangers.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether `peer` may do this; a refusal is counted and logged.
    pub fn check(&self, peer: &str, right: Right, name: &str) -> bool {
        let granted = self.current().access.grants(peer, right, name);
        if !granted {
            self.refused_requests.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(peer, %right, name, "a request was refused: no such right");
        }
        granted
    }

    /// In words, for `genie status`.
    pub fn status(&self) -> IdentityStatus {
        let current = self.current();
        IdentityStatus {
            authenticated: current.credentials.is_some(),
            summary: current.summary(),
            reload_error: current.reload_error.clone(),
            refused_peers: self.refused_peers.load(Ordering::Relaxed),
            refused_requests: self.refused_requests.load(Ordering::Relaxed),
            dropped_strangers: self.dropped_strangers.load(Ordering::Relaxed),
        }
    }

    fn set(&self, current: Current) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(current);
    }
}

impl Current {
    /// Who can be whom here, in one line.
    pub fn summary(&self) -> String {
        match &self.credentials {
            None => "no credentials: peers are whoever they say they are".to_owned(),
            Some(credentials) => format!("{credentials}; {}", self.access),
        }
    }
}
