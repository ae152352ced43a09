//! Limits of this process and modes of this kernel that bound huge pages.

use std::fmt;

use serde::Serialize;

/// A resource limit in bytes; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// What applies now.
    pub soft_bytes: Option<u64>,
    /// How far the process may raise it itself.
    pub hard_bytes: Option<u64>,
}

impl Limit {
    /// Finds `Max locked memory` (RLIMIT_MEMLOCK) in `/proc/self/limits`.
    pub(crate) fn memlock(limits: &str) -> Option<Self> {
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max locked memory"))?;
        let mut fields = line.split_whitespace();
        let mut value = || match fields.next()? {
            "unlimited" => Some(None),
            text => text.parse().ok().map(Some),
        };
        Some(Self {
            soft_bytes: value()?,
            hard_bytes: value()?,
        })
    }
}

/// The mode of transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transparent {
    /// Every mapping that can have them gets them.
    Always,
    /// A mapping gets them when it asks with `madvise(MADV_HUGEPAGE)`.
    Madvise,
    /// No mapping gets them.
    Never,
    /// This kernel has none.
    Absent,
}

impl Transparent {
    /// Reads `transparent_hugepage/enabled`: the mode in brackets is the one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once('[')?;
        match rest.split_once(']')?.0 {
            "always" => Some(Self::Always),
            "madvise" => Some(Self::Madvise),
            "never" => Some(Self::Never),
            _ => None,
        }
    }
}

impl fmt::Display for Transparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Madvise => "madvise",
            Self::Never => "never",
            Self::Absent => "absent",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_locked_memory_from_the_limits_table() {
        let table = "Limit                     Soft Limit           Hard Limit           Units\n\
             Max locked memory         8388608              unlimited            bytes\n";
        assert_eq!(
            Limit::memlock(table),
            Some(Limit {
                soft_bytes: Some(8 << 20),
                hard_bytes: None
            })
        );
        assert_eq!(Limit::memlock("Max locked memory         many"), None);
        assert_eq!(Limit::memlock(""), None);
    }

    #[test]
    fn reads_the_mode_in_brackets() {
        assert_eq!(
            Transparent::parse("always [madvise] never\n"),
            Some(Transparent::Madvise)
        );
        assert_eq!(Transparent::parse("always madvise never"), None);
        assert_eq!(Transparent::parse("[sometimes]"), None);
    }
}
