//! From a device specification to an open port.

use std::ffi::CString;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::time::Duration;

use genie_dpdk_abi as abi;

use super::library::{Library, LoadError};
use super::pair::{self, Claim, PairError};
use super::spec::DeviceSpec;
use super::vdev;
use crate::device::attachments::ATTACHMENTS_MAX;
use crate::engine::udp;

/// How to bring DPDK up and open a port.
///
/// The first port of a process brings DPDK up; for later ones `memory_mib`,
/// `no_huge` and `pci` are as the first had them.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory for DPDK's heap in MiB, from huge pages: rings, packet buffers.
    pub memory_mib: u32,
    /// Uses ordinary pages instead of huge ones. Virtual devices only, and slower.
    pub no_huge: bool,
    /// PCI addresses of all NICs this process will open, besides the first one.
    pub pci: Vec<String>,
    /// Largest IP packet in bytes; a device that carries less is used with its own limit.
    pub mtu: u16,
    /// Receive descriptors wanted; at most [`pair::DESCRIPTORS`] of a local pair.
    pub rx_descriptors: u16,
    /// Transmit descriptors wanted.
    pub tx_descriptors: u16,
    /// Queue pairs wanted; those of a local pair are as many at both ends.
    pub queues: u16,
    /// UDP port of the first queue's engine; those of the others follow. A device
    /// that can sort by port is told so.
    pub first_udp_port: u16,
    /// How long the second end of a pair waits for the first one.
    pub peer_limit: Duration,
}

/// The largest IP packet, where nothing else is said.
const MTU: u16 = 9000;

/// MiB of each queue: two pools of 9 KiB buffers come to 60, longer ones to more;
/// virtio's own memory to a few for all.
fn queue_mib(mtu: u16) -> u32 {
    4 + (60 * u32::from(mtu)).div_ceil(MTU.into()).max(60)
}

/// Packet buffers of each pool beyond those that the rings hold.
pub(super) const SPARE_MBUFS: u32 = 1024;

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 2 * queue_mib(MTU),
            no_huge: false,
            pci: Vec::new(),
            mtu: MTU,
            rx_descriptors: 1024,
            tx_descriptors: 1024,
            queues: 1,
            first_udp_port: udp::Config::default().port,
            // vhost tries to connect once a second.
            peer_limit: Duration::from_secs(5),
        }
    }
}

impl Options {
    /// The default ones, for so many queues and packets of up to `mtu` bytes.
    pub fn sized(queues: u16, mtu: u16) -> Self {
        Self {
            memory_mib: (u32::from(queues) + 1) * queue_mib(mtu),
            mtu,
            queues,
            ..Self::default()
        }
    }
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no driver library.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// This process cannot be an end of the pair.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// An argument holds a NUL byte.
    #[error("an argument holds a NUL byte")]
    Nul(#[from] std::ffi::NulError),
    /// DPDK does not come up.
    #[error("{0}")]
    Eal(String),
    /// The device cannot be opened.
    #[error("cannot open {spec}: {reason}")]
    Port {
        /// The device.
        spec: String,
        /// The library's words.
        reason: String,
    },
    /// The first end of the pair was claimed, but did not answer.
    #[error("nobody answers on {}: the process that holds its lock is stuck or not ready", .0.display())]
    PeerAbsent(PathBuf),
}

/// What opening a port gives: a handle for each of its queues.
pub(super) struct Opened {
    pub(super) library: Library,
    pub(super) queues: Vec<NonNull<abi::Port>>,
    pub(super) claim: Option<Claim>,
}

/// What [`super::open_queues`] does but for making the queues' handles.
pub(super) fn open(spec: &DeviceSpec, options: &Options) -> Result<Opened, OpenError> {
    let library = super::load()?;
    bring_up(library, spec, options)?;
    register_thread(library)?;
    let options = &match spec {
        DeviceSpec::Pair(_) => Options {
            rx_descriptors: options.rx_descriptors.min(pair::DESCRIPTORS),
            tx_descriptors: options.tx_descriptors.min(pair::DESCRIPTORS),
            ..options.clone()
        },
        _ => options.clone(),
    };
    let (claim, devargs, mtu) = match spec {
        DeviceSpec::Pci(text) => (None, text.clone(), options.mtu),
        DeviceSpec::Vdev(text) => {
            let (devargs, mtu) = vdev::complete(text, options.mtu, vdev::link_mtu);
            (None, vdev::with_queues(devargs, options.queues), mtu)
        }
        DeviceSpec::Pair(socket) => {
            let claim = Claim::take(socket, options.queues.max(1))?;
            let descriptors = options.rx_descriptors.max(options.tx_descriptors);
            let devargs = claim.devargs(descriptors, options.queues);
            (Some(claim), devargs, options.mtu)
        }
    };
    let limit = claim
        .as_ref()
        .and_then(|claim| claim.limit_wait(options.peer_limit));
    let opened = open_port(library, &devargs, mtu, options);
    let cut_short = limit.is_some_and(|limit| limit.finish());
    match (opened, spec) {
        (Ok(queues), _) => Ok(Opened {
            library,
            queues,
            claim,
        }),
        (Err(_), DeviceSpec::Pair(socket)) if cut_short => {
            Err(OpenError::PeerAbsent(socket.clone()))
        }
        (Err(reason), _) => Err(OpenError::Port {
            spec: spec.to_string(),
            reason,
        }),
    }
}

fn bring_up(library: Library, spec: &DeviceSpec, options: &Options) -> Result<(), OpenError> {
    let file_prefix = CString::new(format!("genie-{}", std::process::id()))?;
    // With its arguments: a device that is attached as DPDK comes up takes none later.
    let first = match spec {
        DeviceSpec::Pci(text) => Some(text.as_str()),
        _ => None,
    };
    let pci: Vec<&str> = first
        .into_iter()
        .chain(options.pci.iter().map(String::as_str))
        .collect();
    let pci_allow = CString::new(pci.join(";"))?;
    let config = abi::EalConfig {
        file_prefix: file_prefix.as_ptr(),
        pci_allow: pci_allow.as_ptr(),
        memory_mib: options.memory_mib,
        no_huge: options.no_huge.into(),
    };
    let mut text = abi::Text::EMPTY;
    // SAFETY: configuration and text live through the call.
    match unsafe { (library.api().eal_init)(&config, &mut text) } {
        abi::STATUS_OK => Ok(()),
        _ => Err(OpenError::Eal(text.as_str().into())),
    }
}

pub(super) fn register_thread(library: Library) -> Result<(), OpenError> {
    let mut text = abi::Text::EMPTY;
    // SAFETY: the text lives through the call.
    match unsafe { (library.api().thread_register)(&mut text) } {
        abi::STATUS_OK => Ok(()),
        _ => Err(OpenError::Eal(format!(
            "no lcore id for this thread: {}",
            text.as_str()
        ))),
    }
}

fn open_port(
    library: Library,
    devargs: &str,
    mtu: u16,
    options: &Options,
) -> Result<Vec<NonNull<abi::Port>>, String> {
    let devargs = CString::new(devargs).map_err(|error| error.to_string())?;
    let config = abi::PortConfig {
        devargs: devargs.as_ptr(),
        rx_descriptors: options.rx_descriptors,
        tx_descriptors: options.tx_descriptors,
        mtu,
        queues: options.queues.max(1),
        first_udp_port: options.first_udp_port,
        reserved: 0,
        spare_mbufs: SPARE_MBUFS,
        attachments: ATTACHMENTS_MAX as u32,
    };
    let mut queues = vec![std::ptr::null_mut(); usize::from(config.queues)];
    let mut text = abi::Text::EMPTY;
    // SAFETY: all three live through the call; there is a place for each queue.
    let status = unsafe { (library.api().port_open)(&config, queues.as_mut_ptr(), &mut text) };
    if status != abi::STATUS_OK {
        return Err(text.as_str().into());
    }
    Ok(queues.into_iter().filter_map(NonNull::new).collect())
}
