//! What one user of this host may have, and has; for peers see [`peer`].
//!
//! Charged by the application socket before anything is made, given back when
//! the thing itself is gone: bytes and arenas with the last lease on their
//! memory, connections with their task. The invariant: *what is charged is
//! charged to the user whom the kernel named when the connection was made*.

pub mod peer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use genie_client::status::UserStatus;

use crate::units::show_bytes;

/// What one user may have. One connection has one request under way and costs
/// one descriptor, an arena another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections.
    pub connections: u64,
    /// Arenas.
    pub arenas: u64,
    /// Bytes of arenas, and of requests while they are read.
    pub bytes: u64,
}

/// The users of an agent. Clones refer to the same ones.
#[derive(Clone, Debug)]
pub struct Quotas(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Limits,
    users: Mutex<HashMap<u32, Limits>>,
}

/// One user, to charge things to. Clones are the same user.
#[derive(Clone, Debug)]
pub struct User {
    quotas: Quotas,
    uid: u32,
}

/// Something charged; given back on drop.
#[derive(Debug)]
#[must_use = "dropping a charge gives it back"]
pub struct Charge {
    user: User,
    what: Limits,
}

/// A user would have too much.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuotaError {
    /// Too many connections.
    #[error(
        "user {uid} has {limit} connections to the agent, as many as one user may have: \
         close some, or start the agent with a larger --user-connections"
    )]
    Connections {
        /// Who.
        uid: u32,
        /// How many are allowed.
        limit: u64,
    },
    /// Too many arenas.
    #[error(
        "user {uid} has {limit} arenas, as many as one user may have: \
         drop some, or start the agent with a larger --user-arenas"
    )]
    Arenas {
        /// Who.
        uid: u32,
        /// How many are allowed.
        limit: u64,
    },
    /// Too many bytes.
    #[error(
        "{} are wanted and user {uid} has {} of the {} one user may have: \
         drop arenas, or start the agent with larger --arena-bytes and --user-arena-bytes",
        show_bytes(*wanted), show_bytes(*used), show_bytes(*limit)
    )]
    Bytes {
        /// Who.
        uid: u32,
        /// Bytes asked for.
        wanted: u64,
        /// Bytes in use.
        used: u64,
        /// The limit.
        limit: u64,
    },
}

const NOTHING: Limits = Limits {
    connections: 0,
    arenas: 0,
    bytes: 0,
};

impl Quotas {
    /// Users that may have `limits` each.
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner {
            limits,
            users: Mutex::default(),
        }))
    }

    /// The user of this id.
    pub fn user(&self, uid: u32) -> User {
        User {
            quotas: self.clone(),
            uid,
        }
    }

    /// Everybody who has anything, by id.
    pub fn status(&self) -> Vec<UserStatus> {
        let one = |(uid, has): (&u32, &Limits)| UserStatus {
            uid: *uid,
            connections: has.connections,
            arenas: has.arenas,
            bytes: has.bytes,
        };
        let mut users: Vec<_> = self.lock().iter().map(one).collect();
        users.sort_by_key(|user| user.uid);
        users
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Limits>> {
        // Nothing here panics while it holds the lock half-changed.
        self.0.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl User {
    /// The user's id.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Charges a connection.
    pub fn connection(&self) -> Result<Charge, QuotaError> {
        self.charge(Limits {
            connections: 1,
            ..NOTHING
        })
    }

    /// Charges an arena of `bytes`.
    pub fn arena(&self, bytes: u64) -> Result<Charge, QuotaError> {
        self.charge(Limits {
            arenas: 1,
            bytes,
            ..NOTHING
        })
    }

    /// Charges bytes of the agent's own memory.
    pub fn bytes(&self, bytes: u64) -> Result<Charge, QuotaError> {
        self.charge(Limits { bytes, ..NOTHING })
    }

    fn charge(&self, what: Limits) -> Result<Charge, QuotaError> {
        let (uid, limits) = (self.uid, self.quotas.0.limits);
        let mut users = self.quotas.lock();
        let has = users.get(&uid).copied().unwrap_or(NOTHING);
        let then = Limits {
            connections: has.connections + what.connections,
            arenas: has.arenas + what.arenas,
            bytes: has.bytes.saturating_add(what.bytes),
        };
        if then.connections > limits.connections {
            let limit = limits.connections;
            return Err(QuotaError::Connections { uid, limit });
        }
        if then.arenas > limits.arenas {
            let limit = limits.arenas;
            return Err(QuotaError::Arenas { uid, limit });
        }
        if then.bytes > limits.bytes {
            return Err(QuotaError::Bytes {
                uid,
                wanted: what.bytes,
                used: has.bytes,
                limit: limits.bytes,
            });
        }
        users.insert(uid, then);
        Ok(Charge {
            user: self.clone(),
            what,
        })
    }
}

impl Charge {
    /// Charges `bytes` instead, if that is more.
    pub fn grow_to(&mut self, bytes: u64) -> Result<(), QuotaError> {
        let mut more = self.user.bytes(bytes.saturating_sub(self.what.bytes))?;
        self.what.bytes += std::mem::take(&mut more.what.bytes);
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut users = self.user.quotas.lock();
        if let Some(has) = users.get_mut(&self.user.uid) {
            has.connections -= self.what.connections;
            has.arenas -= self.what.arenas;
            has.bytes -= self.what.bytes;
            if *has == NOTHING {
                users.remove(&self.user.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas() -> Quotas {
        Quotas::new(Limits {
            connections: 2,
            arenas: 2,
            bytes: 100,
        })
    }

    #[test]
    fn one_user_cannot_have_more_but_another_can() {
        let quotas = quotas();
        let (one, other) = (quotas.user(1), quotas.user(2));
        let held = (one.arena(60).unwrap(), one.arena(40).unwrap());
        assert!(matches!(one.arena(0), Err(QuotaError::Arenas { .. })));
        assert!(matches!(
            one.bytes(1),
            Err(QuotaError::Bytes { used: 100, .. })
        ));
        assert!(one.bytes(u64::MAX).is_err());
        let _theirs = other.arena(100).unwrap();
        drop(held);
        let _again = one.arena(100).unwrap();
    }

    #[test]
    fn what_is_dropped_is_given_back() {
        let quotas = quotas();
        let user = quotas.user(7);
        let connections = [user.connection().unwrap(), user.connection().unwrap()];
        assert!(matches!(
            user.connection(),
            Err(QuotaError::Connections { limit: 2, .. })
        ));
        let mut request = user.bytes(10).unwrap();
        request.grow_to(90).unwrap();
        request.grow_to(20).unwrap();
        assert!(request.grow_to(101).is_err());
        let expected = UserStatus {
            uid: 7,
            connections: 2,
            arenas: 0,
            bytes: 90,
        };
        assert_eq!(quotas.status(), [expected]);
        drop((connections, request));
        assert_eq!(quotas.status(), []);
    }
}
