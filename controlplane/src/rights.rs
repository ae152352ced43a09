//! Which peers may open sessions, and what they may do under which names.
//!
//! Only for peers whose name is proven: without credentials there are no
//! rights to configure. The rules, in this order:
//!
//! - with a list of allowed peers, nobody else opens a session;
//! - a peer has the rights of its own entry, else those of the entry `*`;
//! - where there are no entries at all, every allowed peer may do everything,
//!   and where there are, a peer without one may do nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::message::Request;

/// The entry for peers without one of their own.
pub const ANYBODY: &str = "*";

/// Something a peer can be allowed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Right {
    /// To add tensors and windows, to write into windows, and to notify.
    Put,
    /// To read tensors and windows, whole or in part.
    Get,
    /// To see names.
    List,
    /// To remove tensors.
    Remove,
}

/// Under which names a peer may do what; `*` is every name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct Rights {
    put: Vec<String>,
    get: Vec<String>,
    list: Vec<String>,
    remove: Vec<String>,
}

/// Whom an agent admits, and to what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Who may open sessions; everybody who can prove a name if empty.
    pub allowed: BTreeSet<String>,
    /// What they may do; everything if empty.
    pub rights: BTreeMap<String, Rights>,
}

impl Access {
    /// Whether a peer may open a session.
    pub fn admits(&self, peer: &str) -> bool {
        self.allowed.is_empty() || self.allowed.contains(peer)
    }

    /// Whether a peer may do this to a name or everything under it; the name
    /// is empty for the whole store.
    pub fn grants(&self, peer: &str, right: Right, name: &str) -> bool {
        if self.rights.is_empty() {
            return true;
        }
        let rights = self.rights.get(peer).or_else(|| self.rights.get(ANYBODY));
        rights.is_some_and(|rights| {
            let prefixes = rights.prefixes(right).iter();
            prefixes.into_iter().any(|prefix| covers(prefix, name))
        })
    }
}

impl Rights {
    fn prefixes(&self, right: Right) -> &[String] {
        match right {
            Right::Put => &self.put,
            Right::Get => &self.get,
            Right::List => &self.list,
            Right::Remove => &self.remove,
        }
    }
}

impl Request {
    /// The rights it takes, each on one name.
    pub fn needs(&self) -> Vec<(Right, &str)> {
        match self {
            Self::Put { prefix, .. } | Self::Recall { prefix, .. } => vec![(Right::Put, prefix)],
            Self::Get { prefix } => vec![(Right::Get, prefix)],
            Self::Fetch { name, .. } => vec![(Right::Get, name)],
            Self::List { under } => vec![(Right::List, under.as_deref().unwrap_or_default())],
            Self::Remove { name } => vec![(Right::Remove, name)],
            Self::Window { name, .. } | Self::Seal { name, .. } | Self::Notify { name, .. } => {
                vec![(Right::Put, name)]
            }
            Self::Read(runs) => runs
                .targets
                .iter()
                .map(|name| (Right::Get, &name[..]))
                .collect(),
            Self::Write { runs, .. } => runs
                .targets
                .iter()
                .map(|name| (Right::Put, &name[..]))
                .collect(),
        }
    }
}

/// Whether a name is `prefix` or below it.
fn covers(prefix: &str, name: &str) -> bool {
    if prefix == ANYBODY {
        return true;
    }
    let prefix = prefix.trim_end_matches('/');
    let below = name.strip_prefix(prefix);
    !prefix.is_empty() && below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::List => "list",
            Self::Remove => "remove",
        })
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |names: Vec<&String>| {
            let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
            names.join(", ")
        };
        match self.allowed.len() {
            0 => write!(f, "every node with such a certificate may open sessions")?,
            _ => write!(f, "sessions for {}", names(self.allowed.iter().collect()))?,
        }
        match self.rights.len() {
            0 => write!(f, " and do everything"),
            _ => write!(f, ", rights for {}", names(self.rights.keys().collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(toml: &str) -> Access {
        Access {
            allowed: BTreeSet::new(),
            rights: toml::from_str(toml).unwrap(),
        }
    }

    #[test]
    fn a_prefix_ends_where_a_component_does() {
        let access = access("[b]\nget = ['m', 'x/y/']\n");
        for name in ["m", "m/a", "m/a/b", "x/y", "x/y/z"] {
            assert!(access.grants("b", Right::Get, name), "{name}");
        }
        for name in ["", "mm", "x", "x/yy", "a/m"] {
            assert!(!access.grants("b", Right::Get, name), "{name}");
        }
        assert!(!access.grants("b", Right::Put, "m"));
        assert!(!access.grants("c", Right::Get, "m"), "no entry, no rights");
    }

    #[test]
    fn an_own_entry_counts_instead_of_the_one_for_anybody() {
        let access = access("['*']\nlist = ['*']\nget = ['']\n[b]\nput = ['*']\n");
        assert!(access.grants("c", Right::List, ""));
        assert!(
            !access.grants("c", Right::Get, "m"),
            "an empty prefix is nothing"
        );
        assert!(!access.grants("b", Right::List, "m"));
        assert!(access.grants("b", Right::Put, "m"));
    }

    #[test]
    fn nothing_configured_allows_everything_and_a_list_only_those_in_it() {
        let mut access = Access::default();
        assert!(access.admits("b") && access.grants("b", Right::Remove, "m"));
        access.allowed.insert("b".to_owned());
        assert!(access.admits("b") && !access.admits("c"));
    }

    #[test]
    fn a_batch_takes_a_right_on_every_target() {
        let runs = || crate::message::Runs {
            targets: vec!["a".into(), "b".into()],
            runs: Vec::new(),
        };
        let read = Request::Read(runs());
        assert_eq!(read.needs(), [(Right::Get, "a"), (Right::Get, "b")]);
        let (runs, note) = (runs(), None);
        let write = Request::Write { runs, note };
        assert_eq!(write.needs(), [(Right::Put, "a"), (Right::Put, "b")]);
    }

    #[test]
    fn a_wrong_word_is_no_right() {
        let wrong: Result<Rights, _> = toml::from_str("gett = ['m']");
        assert!(wrong.unwrap_err().to_string().contains("gett"));
    }
}
