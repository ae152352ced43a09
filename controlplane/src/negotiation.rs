//! Which path two agents take, and why not a better one.
//!
//! Pure decisions; [`crate::session`] talks and opens paths. The dialler's
//! order counts, filtered by what the other allows. A candidate counts only
//! once a path was really opened over it from both ends. The list of refusals
//! is made by the dialler and handed to the other, so that both show the same.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::transport::{Offer, Preference, Transport};

/// A transport that was not used though one side prefers it, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which.
    pub transport: Transport,
    /// Why, naming the node at fault.
    pub reason: String,
}

/// What one node says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it allows, in its order.
    pub preference: &'a Preference,
    /// What it has.
    pub offers: &'a [Offer],
}

/// What to try, in order, and what need not be tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// To be opened until one works.
    pub candidates: Vec<Transport>,
    /// Out of the question.
    pub refused: Vec<Refusal>,
}

/// Decides what to try.
pub fn plan(dialler: Side<'_>, acceptor: Side<'_>) -> Plan {
    let mut plan = Plan {
        candidates: Vec::new(),
        refused: Vec::new(),
    };
    let theirs = acceptor.preference.as_slice().iter();
    let extra = theirs.filter(|transport| !dialler.preference.allows(**transport));
    for transport in dialler.preference.as_slice().iter().chain(extra).copied() {
        match obstacle(dialler, transport).or_else(|| obstacle(acceptor, transport)) {
            Some(reason) => plan.refused.push(Refusal { transport, reason }),
            None => plan.candidates.push(transport),
        }
    }
    plan
}

/// The refusals that matter once `chosen` carries the session: those of
/// transports that one side ranks higher.
pub fn better_refused(
    chosen: Transport,
    refused: Vec<Refusal>,
    dialler: &Preference,
    acceptor: &Preference,
) -> Vec<Refusal> {
    let better = |preference: &Preference, transport: Transport| {
        let rank = |wanted| preference.as_slice().iter().position(|t| *t == wanted);
        matches!((rank(transport), rank(chosen)), (Some(a), Some(b)) if a < b)
    };
    let matters = |refusal: &Refusal| {
        better(dialler, refusal.transport) || better(acceptor, refusal.transport)
    };
    refused.into_iter().filter(matters).collect()
}

fn obstacle(side: Side<'_>, transport: Transport) -> Option<String> {
    let Side {
        name,
        preference,
        offers,
    } = side;
    if !preference.allows(transport) {
        return Some(format!(
            "node '{name}' does not allow it (--transport {preference})"
        ));
    }
    match offers
        .iter()
        .find(|offer| offer.transport == transport)
        .map(|offer| &offer.local)
    {
        Some(Ok(_)) => None,
        Some(Err(reason)) => Some(format!("node '{name}': {reason}")),
        None => Some(format!("node '{name}' does not have it")),
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.transport, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Local;

    fn tcp() -> Offer {
        let data = "127.0.0.1:1".parse().unwrap();
        Offer {
            transport: Transport::Tcp,
            local: Ok(Local::Tcp { data, streams: 1 }),
        }
    }

    fn no_dpdk(reason: &str) -> Offer {
        Offer {
            transport: Transport::Dpdk,
            local: Err(reason.into()),
        }
    }

    fn preference(text: &str) -> Preference {
        text.parse().unwrap()
    }

    #[test]
    fn what_one_side_lacks_is_refused_in_its_name() {
        let both = preference("dpdk,tcp");
        let a = [tcp(), no_dpdk("no device was given")];
        let b = [tcp(), no_dpdk("no huge pages")];
        let dialler = Side {
            name: "a",
            preference: &both,
            offers: &a,
        };
        let acceptor = Side {
            name: "b",
            preference: &both,
            offers: &b,
        };
        let plan = plan(dialler, acceptor);
        assert_eq!(plan.candidates, [Transport::Tcp]);
        assert_eq!(
            plan.refused[0].to_string(),
            "dpdk: node 'a': no device was given"
        );
    }

    #[test]
    fn one_word_alone_leaves_nothing_else() {
        let (dpdk, both) = (preference("dpdk"), preference("dpdk,tcp"));
        let a = [tcp(), no_dpdk("no huge pages")];
        let dialler = Side {
            name: "a",
            preference: &dpdk,
            offers: &a,
        };
        let acceptor = Side {
            name: "b",
            preference: &both,
            offers: &a,
        };
        let one = plan(dialler, acceptor);
        assert_eq!(one.candidates, []);
        assert_eq!(one.refused.len(), 2);
        let other = plan(acceptor, dialler);
        assert_eq!(other.candidates, []);
        assert!(
            other.refused[1]
                .reason
                .contains("node 'a' does not allow it")
        );
    }

    #[test]
    fn only_better_paths_need_a_reason() {
        let refused = vec![Refusal {
            transport: Transport::Dpdk,
            reason: "x".into(),
        }];
        let (tcp_first, both) = (preference("tcp,dpdk"), preference("dpdk,tcp"));
        let keep = |a, b| better_refused(Transport::Tcp, refused.clone(), a, b).len();
        assert_eq!(keep(&tcp_first, &tcp_first), 0);
        assert_eq!(keep(&both, &tcp_first), 1);
        assert_eq!(keep(&tcp_first, &both), 1);
        assert_eq!(keep(&preference("tcp"), &both), 1);
    }
}
