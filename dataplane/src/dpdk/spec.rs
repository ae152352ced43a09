//! Which device to open, as an operator writes it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::memory::accelerator::direct::device_arguments;

/// A device: `pci:0000:3b:00.0`, `vdev:net_memif0,role=client`, `pair:/run/genie/pair`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceSpec {
    /// A NIC by PCI address, with the driver's arguments behind a comma.
    Pci(String),
    /// A virtual device with its arguments, as DPDK writes them.
    Vdev(String),
    /// One end of a pair between two processes on this host, both of which are
    /// given the same socket path; see [`super::pair`].
    Pair(PathBuf),
}

/// What is wrong with a device specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Neither of the three kinds.
    #[error(
        "'{0}' is no device: write pci:0000:3b:00.0, vdev:net_memif0,… or pair:/path/to/socket"
    )]
    Kind(String),
    /// Not a PCI address.
    #[error("'{0}' is no PCI address: write it as lspci -D does, 0000:3b:00.0")]
    Pci(String),
    /// Not the name of a virtual device.
    #[error("'{0}' is no virtual device: its name starts with net_, as in net_memif0")]
    Vdev(String),
    /// A socket path that the drivers cannot take.
    #[error("'{path}' cannot be a pair's socket: {reason}")]
    Pair {
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// What fits into `sockaddr_un` with its NUL.
const SOCKET_PATH_MAX: usize = 107;

impl DeviceSpec {
    /// The PCI address, for a device on that bus.
    pub fn pci_address(&self) -> Option<&str> {
        match self {
            Self::Pci(text) => text.split(',').next(),
            _ => None,
        }
    }

    /// The device with the arguments that GPUDirect needs of its driver, which
    /// is told from the card's vendor in `sys`.
    pub fn for_gpudirect(self, sys: &Path) -> Self {
        let Self::Pci(text) = self else { return self };
        let address = text.split(',').next().unwrap_or_default();
        let vendor = sys.join("bus/pci/devices").join(address).join("vendor");
        let vendor = std::fs::read_to_string(vendor).unwrap_or_default();
        // Mellanox.
        let driver = if vendor.trim() == "0x15b3" {
            "mlx5_pci"
        } else {
            ""
        };
        Self::Pci(device_arguments(driver, &text))
    }
}

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text.split_once(':') {
            Some(("pci", rest)) => parse_pci(rest),
            Some(("vdev", rest)) => parse_vdev(rest),
            Some(("pair", rest)) => parse_pair(rest),
            _ => Err(SpecError::Kind(text.into())),
        }
    }
}

fn parse_pci(text: &str) -> Result<DeviceSpec, SpecError> {
    let address = text.split(',').next().unwrap_or("");
    let hex = |from: usize, to: usize| {
        address
            .get(from..to)
            .is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let bytes = address.as_bytes();
    let is_address = bytes.len() == 12
        && (bytes[4], bytes[7], bytes[10]) == (b':', b':', b'.')
        && hex(0, 4)
        && hex(5, 7)
        && hex(8, 10)
        && hex(11, 12);
    if !is_address || text.contains('\0') {
        return Err(SpecError::Pci(text.into()));
    }
    Ok(DeviceSpec::Pci(text.into()))
}

fn parse_vdev(text: &str) -> Result<DeviceSpec, SpecError> {
    let name = text.split(',').next().unwrap_or("");
    let is_name = name
        .strip_prefix("net_")
        .is_some_and(|rest| !rest.is_empty());
    if !is_name || text.contains('\0') {
        return Err(SpecError::Vdev(text.into()));
    }
    Ok(DeviceSpec::Vdev(text.into()))
}

fn parse_pair(text: &str) -> Result<DeviceSpec, SpecError> {
    let wrong = |reason| {
        Err(SpecError::Pair {
            path: text.into(),
            reason,
        })
    };
    if text.is_empty() || text.ends_with('/') {
        return wrong("a file name is missing");
    }
    if text.len() > SOCKET_PATH_MAX {
        return wrong("it is longer than the 107 bytes a socket address holds");
    }
    if text.contains([',', '\0', '=', '"', '[', ']']) {
        return wrong("drivers read , = \" [ ] and NUL as syntax");
    }
    Ok(DeviceSpec::Pair(text.into()))
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(text) => write!(f, "pci:{text}"),
            Self::Vdev(text) => write!(f, "vdev:{text}"),
            Self::Pair(path) => write!(f, "pair:{}", path.display()),
        }
    }
}

impl TryFrom<String> for DeviceSpec {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<DeviceSpec> for String {
    fn from(spec: DeviceSpec) -> String {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for text in [
            "pci:0000:3b:00.0",
            "pci:0000:3b:00.0,mprq_en=1",
            "vdev:net_memif0,id=1",
            "pair:/run/g/p",
        ] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
        }
        let spec: DeviceSpec = "pci:0000:3b:00.0,mprq_en=1".parse().unwrap();
        assert_eq!(spec.pci_address(), Some("0000:3b:00.0"));
    }

    #[test]
    fn cards_whose_driver_reads_payloads_get_an_argument_against_it() {
        let sys = tempfile::tempdir().unwrap();
        let of = |address: &str, vendor: &str| {
            let folder = sys.path().join("bus/pci/devices").join(address);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("vendor"), vendor).unwrap();
        };
        of("0000:3b:00.0", "0x15b3\n");
        of("0000:3c:00.0", "0x8086\n");
        for (given, opened) in [
            ("pci:0000:3b:00.0", "pci:0000:3b:00.0,txq_inline_max=0"),
            (
                "pci:0000:3b:00.0,txq_inline_max=64",
                "pci:0000:3b:00.0,txq_inline_max=64",
            ),
            ("pci:0000:3c:00.0", "pci:0000:3c:00.0"),
            ("pci:0000:3d:00.0", "pci:0000:3d:00.0"),
            ("pair:/tmp/x", "pair:/tmp/x"),
        ] {
            let spec: DeviceSpec = given.parse().unwrap();
            assert_eq!(spec.for_gpudirect(sys.path()).to_string(), opened);
        }
    }

    #[test]
    fn what_no_driver_takes_is_refused() {
        let long = format!("pair:/{}", "x".repeat(107));
        for text in [
            "",
            "eth0",
            "pci:",
            "pci:3b:00.0",
            "pci:0000:3b:00:0",
            "pci:0000:zz:00.0",
            "pci:é0:3b:00.0",
            "vdev:",
            "vdev:net_",
            "vdev:crypto_null",
            "pair:",
            "pair:/run/",
            "pair:/a,server=1",
            &long,
        ] {
            assert!(text.parse::<DeviceSpec>().is_err(), "{text}");
        }
    }
}
