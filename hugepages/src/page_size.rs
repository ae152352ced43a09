//! The size of a huge page.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The size of a huge page in bytes, shown as the kernel's cgroup files do
/// (`2MB`, `1GB`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageSize {
    bytes: u64,
}

impl PageSize {
    /// 2 MiB: the everyday size on x86-64 and on 64-bit Arm with 4 KiB pages.
    pub const MB_2: Self = Self { bytes: 2 << 20 };
    /// 1 GiB: fewer TLB and IOMMU entries; best reserved at boot.
    pub const GB_1: Self = Self { bytes: 1 << 30 };

    /// A size of `kib` KiB, as the kernel's directory names count; `None`
    /// when that is no power of two.
    pub fn from_kib(kib: u64) -> Option<Self> {
        let bytes = kib.checked_mul(1024)?;
        bytes.is_power_of_two().then_some(Self { bytes })
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// The size in KiB.
    pub fn kib(self) -> u64 {
        self.bytes / 1024
    }

    /// How many pages hold `len_bytes`.
    pub fn pages_for(self, len_bytes: u64) -> u64 {
        len_bytes.div_ceil(self.bytes)
    }

    /// The name of this size's directory in sysfs.
    pub(crate) fn directory(self) -> String {
        format!("hugepages-{}kB", self.kib())
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kib() {
            kib if kib >= 1 << 20 => write!(f, "{}GB", kib >> 20),
            kib if kib >= 1 << 10 => write!(f, "{}MB", kib >> 10),
            kib => write!(f, "{kib}KB"),
        }
    }
}

/// A text that names no page size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no page size: write a power of two with K, M or G, such as 2M or 1G")]
pub struct ParsePageSizeError {
    text: String,
}

impl FromStr for PageSize {
    type Err = ParsePageSizeError;

    /// Reads `2M`, `2MB`, `1G`, `64K`, in either case. Units are binary, as
    /// everywhere in the kernel's names for pages.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.trim().to_ascii_lowercase();
        let plain = lower.strip_suffix('b').unwrap_or(&lower);
        let parse = |suffix: char, shift: u32| {
            let count: u64 = plain.strip_suffix(suffix)?.parse().ok()?;
            Self::from_kib(count.checked_mul(1 << shift)?)
        };
        parse('k', 0)
            .or_else(|| parse('m', 10))
            .or_else(|| parse('g', 20))
            .ok_or_else(|| ParsePageSizeError {
                text: text.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_shows_the_usual_sizes() {
        for (text, size, shown) in [
            ("2M", PageSize::MB_2, "2MB"),
            ("2mb", PageSize::MB_2, "2MB"),
            ("2048K", PageSize::MB_2, "2MB"),
            ("1G", PageSize::GB_1, "1GB"),
            ("64kB", PageSize { bytes: 65536 }, "64KB"),
        ] {
            assert_eq!(text.parse(), Ok(size), "{text}");
            assert_eq!(size.to_string(), shown);
        }
    }

    #[test]
    fn refuses_what_is_no_size() {
        for text in [
            "",
            "2",
            "M",
            "3M",
            "0M",
            "-2M",
            "2T",
            "18446744073709551615G",
        ] {
            assert!(text.parse::<PageSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn counts_pages_rounding_up() {
        assert_eq!(PageSize::MB_2.pages_for(0), 0);
        assert_eq!(PageSize::MB_2.pages_for(1), 1);
        assert_eq!(PageSize::MB_2.pages_for(4 << 20), 2);
        assert_eq!(PageSize::MB_2.pages_for((4 << 20) + 1), 3);
    }
}
