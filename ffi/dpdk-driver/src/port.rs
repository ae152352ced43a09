//! A port: an Ethernet device with its queue pairs, and all they need.

use std::ffi::{CStr, CString, NulError};
use std::sync::Arc;

use genie_dpdk_abi as abi;
use genie_dpdk_sys as sys;

use crate::capability::{self, External as ExternalMemory, Traits};
use crate::eal::{Eal, EalError};
use crate::errno::Errno;
use crate::external::External;
use crate::mempool::Mempool;
use crate::queue::{Counts, QueuePair};
use crate::shared::{Device, Retired, Shared};

/// Ethernet header, without VLAN tags.
const ETHERNET_HEADER: u32 = 14;

/// Two VLAN tags and what virtio puts before a frame; room, never counted.
const FRAME_SLACK: u32 = 8 + 16;

/// What the caller wants; see [`abi::PortConfig`].
#[derive(Clone, Debug)]
pub(crate) struct PortOptions {
    pub(crate) devargs: String,
    pub(crate) rx_descriptors: u16,
    pub(crate) tx_descriptors: u16,
    pub(crate) mtu: u16,
    pub(crate) queues: u16,
    pub(crate) first_udp_port: u16,
    pub(crate) spare_mbufs: u32,
    pub(crate) attachments: u32,
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Eal(#[from] EalError),
    #[error(
        "{0} is a PCI device, but this process brought DPDK up without the PCI bus: \
         name it among the PCI addresses when the agent starts"
    )]
    PciOff(String),
    #[error("the device arguments hold a NUL byte")]
    Nul(#[from] NulError),
    #[error("DPDK cannot attach {devargs}: {errno}")]
    Probe { devargs: String, errno: Errno },
    #[error("{devargs} is attached but has no Ethernet port of that name")]
    NoPort { devargs: String },
    #[error("{driver} takes an MTU of {min} to {max}, not {wanted}")]
    Mtu {
        driver: String,
        min: u16,
        max: u16,
        wanted: u16,
    },
    #[error("{driver} has at most {most} queues, not {wanted}: ask for no more with --queues")]
    Queues {
        driver: String,
        most: u16,
        wanted: u16,
    },
    #[error("{driver}: {step} fails: {errno}")]
    Step {
        driver: String,
        step: &'static str,
        errno: Errno,
    },
}

impl OpenError {
    pub(crate) fn status(&self) -> i32 {
        match self {
            Self::Probe { errno, .. } | Self::Step { errno, .. } => errno.status(),
            Self::NoPort { .. } => Errno::NODEV.status(),
            _ => Errno::INVAL.status(),
        }
    }
}

/// One queue pair of a started port. May only be used from one thread at a time.
///
/// Fields are in the order in which they must go: frames kept by the queues,
/// the device with those in its rings, then the pools all of them came from.
pub(crate) struct Port {
    pub(crate) queues: QueuePair,
    shared: Arc<Shared>,
    external: External,
    rx_pool: Mempool,
    tx_pool: Mempool,
    /// Packet buffers in a GPU's memory; see [`crate::direct`].
    pub(crate) device_pool: Option<Mempool>,
    /// How many pieces of it the card can reach.
    pub(crate) device_pieces: usize,
    info: abi::PortInfo,
    /// Whether this queue has left.
    stopped: bool,
}

impl Port {
    /// Attaches, configures and starts a device; returns its queues.
    pub(crate) fn open(eal: Eal, options: &PortOptions) -> Result<Vec<Self>, OpenError> {
        if capability::is_pci(&options.devargs) && !eal.has_pci {
            return Err(OpenError::PciOff(options.devargs.clone()));
        }
        let port = attach(&options.devargs)?;
        let raw = device_info(port).map_err(|errno| OpenError::Probe {
            devargs: options.devargs.clone(),
            errno,
        })?;
        let device = Device {
            port,
            device: raw.device,
        };
        let driver = driver_name(&raw);
        let traits = capability::traits(&driver, &options.devargs);
        let failed = |step| {
            let driver = driver.clone();
            move |errno| OpenError::Step {
                driver,
                step,
                errno,
            }
        };
        let mtu = mtu_of(&raw, traits, options.mtu);
        if !traits.hides_mtu && mtu < raw.min_mtu {
            let (min, max, wanted) = (raw.min_mtu, raw.max_mtu, options.mtu);
            return Err(OpenError::Mtu {
                driver,
                min,
                max,
                wanted,
            });
        }
        let most = raw.max_rx_queues.min(raw.max_tx_queues);
        if options.queues > most {
            let wanted = options.queues;
            return Err(OpenError::Queues {
                driver,
                most,
                wanted,
            });
        }
        let caps = capabilities(&raw, traits);
        let set_up_with = |caps| set_up(port, &raw, caps, traits, mtu, options);
        let without = caps & !abi::CAP_RX_INTERRUPT;
        let (caps, set_up) = match set_up_with(caps) {
            // Rather no interrupts than no port.
            Err(_) if without != caps => (without, set_up_with(without)),
            done => (caps, done),
        };
        let Setup {
            rx_descriptors,
            tx_descriptors,
            numa_node,
            max_frame,
            pools,
        } = set_up.map_err(|(step, errno)| failed(step)(errno))?;
        // For neighbour discovery. Devices without filters have no such
        // function and let everything in.
        // SAFETY: a started port.
        let _ = unsafe { sys::rte_eth_allmulticast_enable(port) };

        // Drivers that copy are done with a frame when they have taken it.
        let reaps = traits.external == ExternalMemory::Any || {
            // SAFETY: a started port; nothing was sent yet.
            let status = unsafe { sys::rte_eth_tx_done_cleanup(port, 0, 0) };
            Errno::check(status) != Err(Errno::NOTSUP)
        };
        let caps = if reaps { caps | abi::CAP_TX_REAP } else { caps };

        // Where it fails frames come to any queue, whose owner passes them on.
        let sorts = options.queues > 1 && sort(port, options).is_ok();
        let caps = if sorts {
            caps | abi::CAP_RX_SORTS
        } else {
            caps
        };
        let info = abi::PortInfo {
            driver: fixed(&driver),
            mac: mac(port).map_err(failed("reading its address"))?,
            mtu,
            max_frame,
            rx_descriptors,
            tx_descriptors,
            mbufs: pools[0].0.count() + pools[0].1.count(),
            numa_node,
            caps,
        };
        let shared = Arc::new(Shared::new(device, options.queues));
        let queue = |(index, pools)| {
            let shared = Arc::clone(&shared);
            Self::new(shared, index, pools, info, options.attachments)
        };
        Ok((0..options.queues).zip(pools).map(queue).collect())
    }

    /// The handle of a queue that was set up with these pools.
    fn new(
        shared: Arc<Shared>,
        index: u16,
        (rx_pool, tx_pool): (Mempool, Mempool),
        mut info: abi::PortInfo,
        attachments: u32,
    ) -> Self {
        let mut external = External::new(attachments);
        let (attachments, attachment_count) = external.as_raw();
        let mode = sys::genie_tx_mode {
            pool: tx_pool.as_ptr(),
            attachments,
            attachment_count,
            max_frame: info.max_frame,
            external: info.has(abi::CAP_TX_EXTERNAL),
        };
        // SAFETY: the port was started just now, its queue of this index is
        // nobody else's; pool and attachments are dropped after the queues, see
        // the order of fields.
        let mut queues = unsafe { QueuePair::new(shared.device.port, index, mode) };
        if queues.rx_wait_fd().is_none() {
            info.caps &= !abi::CAP_RX_INTERRUPT;
        }
        queues.counts = (shared.queues > 1).then(Counts::default);
        Self {
            queues,
            shared,
            external,
            rx_pool,
            tx_pool,
            device_pool: None,
            device_pieces: 0,
            info,
            stopped: false,
        }
    }

    pub(crate) fn info(&self) -> &abi::PortInfo {
        &self.info
    }

    /// DPDK's number of it.
    pub(crate) fn number(&self) -> u16 {
        self.shared.device.port
    }

    /// How many queues the port has.
    pub(crate) fn queue_count(&self) -> u16 {
        self.shared.queues
    }

    pub(crate) fn raw_device(&self) -> *mut sys::rte_device {
        self.shared.device.device
    }

    pub(crate) fn rx_pool(&self) -> &Mempool {
        &self.rx_pool
    }

    /// For a port that was stopped and cannot be started again.
    pub(crate) fn give_up(&mut self) {
        self.stopped = true;
        self.queues.drop_pending();
        self.shared.leave_stopped();
    }

    pub(crate) fn external(&self) -> &External {
        &self.external
    }

    pub(crate) fn external_mut(&mut self) -> &mut External {
        &mut self.external
    }

    /// Whether bursts may be moved: not after [`Port::stop`], of whichever queue.
    pub(crate) fn is_running(&mut self) -> bool {
        if !self.stopped && self.shared.is_stopping() {
            // The thread that asked is answered by the memory it gets back.
            let _ = self.leave();
        }
        !self.stopped
    }

    /// Whether the port was stopped, by whichever queue.
    pub(crate) fn was_stopped(&self) -> bool {
        self.stopped || self.shared.is_stopping()
    }

    pub(crate) fn link_up(&self) -> bool {
        let mut link = sys::rte_eth_link::default();
        // SAFETY: a valid port; `link` is ours and written.
        let status = unsafe { sys::rte_eth_link_get_nowait(self.shared.device.port, &mut link) };
        status == 0 && link.link_status() != 0
    }

    pub(crate) fn stats(&self) -> abi::PortStats {
        let mut raw = sys::rte_eth_stats::default();
        // SAFETY: a valid port; `raw` is ours and written.
        // Where a driver keeps no counters they stay zero.
        let _ = unsafe { sys::rte_eth_stats_get(self.shared.device.port, &mut raw) };
        let mut stats = abi::PortStats {
            rx_frames: raw.ipackets,
            rx_bytes: raw.ibytes,
            rx_missed: raw.imissed + raw.rx_nombuf,
            rx_errors: raw.ierrors,
            tx_frames: raw.opackets,
            tx_bytes: raw.obytes,
            tx_errors: raw.oerrors,
            tx_copied_bytes: self.queues.copied_bytes,
            mbufs_free: u64::from(self.rx_pool.available() + self.tx_pool.available()),
            tx_pending: self.queues.pending() as u64,
        };
        if let Some(counts) = self.queues.counts {
            stats.rx_frames = counts.rx_frames;
            stats.rx_bytes = counts.rx_bytes;
            stats.tx_frames = counts.tx_frames;
            stats.tx_bytes = counts.tx_bytes;
            if self.queues.index() > 0 {
                (stats.rx_missed, stats.rx_errors, stats.tx_errors) = (0, 0, 0);
            }
        }
        stats.tx_errors += self.queues.bad_frames;
        stats
    }

    /// Stops the port: this queue at once, the others when they are next used.
    pub(crate) fn stop(&mut self) -> Result<(), Errno> {
        self.shared.stop();
        self.leave()
    }

    /// Frees the frames that wait; the last queue to leave stops the port, which
    /// frees those in its rings.
    fn leave(&mut self) -> Result<(), Errno> {
        if self.stopped {
            return Ok(());
        }
        self.stopped = true;
        self.queues.drop_pending();
        self.shared.leave()
    }

    /// Closes this queue, and the port with its last one. Returns how many
    /// packet buffers did not come back, or, while the port stays open, still
    /// refer to memory attached here.
    pub(crate) fn close(mut self) -> u32 {
        // A device that cannot be stopped is closed all the same.
        let _ = self.leave();
        let Self {
            queues,
            shared,
            external,
            rx_pool,
            tx_pool,
            device_pool,
            ..
        } = self;
        drop(queues);
        let still = external.references();
        let pools = [rx_pool, tx_pool].into_iter().chain(device_pool).collect();
        shared.retire(Retired { external, pools });
        // Closing is one at a time, so one of several is the last.
        Arc::into_inner(shared).map_or(still, Shared::close)
    }

    /// Registers memory with DPDK and maps it for this device's DMA.
    ///
    /// # Safety
    /// `len` bytes at `base` are mapped until [`Port::unregister`]; both are
    /// multiples of `page_bytes`, the size of its pages.
    pub(crate) unsafe fn register(
        &self,
        base: *mut u8,
        len: u64,
        page_bytes: u64,
    ) -> Result<(), Errno> {
        self.shared.map(base, len, || {
            let base = base.cast();
            // SAFETY: the caller's promise; IOVAs are addresses, so no table.
            let status = unsafe {
                sys::rte_extmem_register(
                    base,
                    len as usize,
                    std::ptr::null_mut(),
                    0,
                    page_bytes as usize,
                )
            };
            match Errno::check(status) {
                // Another port of this process registered it.
                Ok(_) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
            let device = self.raw_device();
            // SAFETY: registered memory and the device of an open port.
            let status = unsafe { sys::rte_dev_dma_map(device, base, base as u64, len as usize) };
            match Errno::check(status) {
                Ok(_) => Ok(()),
                Err(errno) => {
                    // SAFETY: registered above; not mapped.
                    unsafe { sys::rte_extmem_unregister(base, len as usize) };
                    Err(errno)
                }
            }
        })
    }

    /// Undoes [`Port::register`].
    pub(crate) fn unregister(&self, base: *mut u8, len: u64) -> Result<(), Errno> {
        self.shared.unmap(base, len, || {
            let (base, device) = (base.cast(), self.raw_device());
            // SAFETY: DPDK looks the range up and refuses one it does not know.
            let status = unsafe { sys::rte_dev_dma_unmap(device, base, base as u64, len as usize) };
            Errno::check(status)?;
            // SAFETY: as above.
            Errno::check(unsafe { sys::rte_extmem_unregister(base, len as usize) })?;
            Ok(())
        })
    }
}

/// Attaches a device and finds its port.
fn attach(devargs: &str) -> Result<u16, OpenError> {
    let failed = |errno| OpenError::Probe {
        devargs: devargs.into(),
        errno,
    };
    let text = CString::new(devargs)?;
    // SAFETY: a NUL-terminated string, copied.
    match Errno::check(unsafe { sys::rte_dev_probe(text.as_ptr()) }) {
        // An allowed PCI device was attached when the EAL came up.
        Ok(_) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let name = devargs.split(',').next().unwrap_or(devargs);
    let name = CString::new(name)?;
    let mut port = 0;
    // SAFETY: a NUL-terminated string; `port` is ours and written.
    let status = unsafe { sys::rte_eth_dev_get_port_by_name(name.as_ptr(), &mut port) };
    Errno::check(status).map_err(|_| OpenError::NoPort {
        devargs: devargs.into(),
    })?;
    Ok(port)
}

fn device_info(port: u16) -> Result<sys::rte_eth_dev_info, Errno> {
    let mut info = sys::rte_eth_dev_info::default();
    // SAFETY: a valid port; `info` is ours and written.
    Errno::check(unsafe { sys::rte_eth_dev_info_get(port, &mut info) })?;
    Ok(info)
}

fn driver_name(info: &sys::rte_eth_dev_info) -> String {
    if info.driver_name.is_null() {
        return "unknown".into();
    }
    // SAFETY: NUL-terminated and static: a driver's name.
    unsafe { CStr::from_ptr(info.driver_name) }
        .to_string_lossy()
        .into_owned()
}

fn capabilities(info: &sys::rte_eth_dev_info, traits: Traits) -> u64 {
    // SAFETY: returns constants.
    let bits = unsafe { sys::genie_offloads() };
    let multi_seg = traits.multi_seg && info.tx_offload_capa & bits.tx_multi_segs != 0;
    let external = multi_seg && traits.external != ExternalMemory::Never;
    let registered = external && traits.external == ExternalMemory::Registered;
    [
        (abi::CAP_TX_MULTI_SEG, multi_seg),
        (abi::CAP_TX_EXTERNAL, external),
        (abi::CAP_NEEDS_REGISTRATION, registered),
        (abi::CAP_RX_INTERRUPT, traits.rx_interrupt),
        (
            abi::CAP_TX_IPV4_CHECKSUM,
            info.tx_offload_capa & bits.tx_ipv4_cksum != 0,
        ),
        (
            abi::CAP_TX_UDP_CHECKSUM,
            info.tx_offload_capa & bits.tx_udp_cksum != 0,
        ),
        (
            abi::CAP_RX_UDP_CHECKSUM,
            info.rx_offload_capa & bits.rx_udp_cksum != 0,
        ),
        (
            abi::CAP_RX_BUFFER_SPLIT,
            info.rx_offload_capa & bits.rx_buffer_split != 0,
        ),
        (abi::CAP_DRIVER_COPIES_TX, traits.copies.0),
        (abi::CAP_DRIVER_COPIES_RX, traits.copies.1),
        (abi::CAP_SURVIVES_PEER, traits.survives_peer),
        (abi::CAP_FRAGILE, traits.fragile),
    ]
    .iter()
    .filter(|(_, holds)| *holds)
    .fold(0, |set, (bit, _)| set | bit)
}

/// The largest IP packet up to what is `wanted`: no more than the device says,
/// if it says what it can do.
fn mtu_of(raw: &sys::rte_eth_dev_info, traits: Traits, wanted: u16) -> u16 {
    if traits.hides_mtu {
        wanted
    } else {
        wanted.min(raw.max_mtu)
    }
}

/// What a started port was given.
struct Setup {
    rx_descriptors: u16,
    tx_descriptors: u16,
    numa_node: i32,
    max_frame: u32,
    /// For reception and transmission, of each queue.
    pools: Vec<(Mempool, Mempool)>,
}

/// Configures a port, gives it queues and buffers, and starts it. An error
/// comes with the step that failed.
fn set_up(
    port: u16,
    raw: &sys::rte_eth_dev_info,
    caps: u64,
    traits: Traits,
    mtu: u16,
    options: &PortOptions,
) -> Result<Setup, (&'static str, Errno)> {
    let failed = |step| move |errno| (step, errno);
    configure(port, raw, caps, traits, mtu, options.queues).map_err(failed("configuring it"))?;
    let (mut rx_descriptors, mut tx_descriptors) = (options.rx_descriptors, options.tx_descriptors);
    // SAFETY: a configured port; both are ours and written.
    let status = unsafe {
        sys::rte_eth_dev_adjust_nb_rx_tx_desc(port, &mut rx_descriptors, &mut tx_descriptors)
    };
    Errno::check(status).map_err(failed("choosing descriptors"))?;

    // SAFETY: a valid port.
    let numa_node = unsafe { sys::rte_eth_dev_socket_id(port) };
    let max_frame = u32::from(mtu) + ETHERNET_HEADER;
    // Twice the cache, as each of the threads that come to use it keeps
    // up to one and a half times that many to itself.
    let spare = options.spare_mbufs + 2 * sys::GENIE_MBUF_CACHE;
    let rx_count = u32::from(rx_descriptors) + spare;
    let tx_count = 2 * u32::from(tx_descriptors) + spare;
    let room = max_frame + FRAME_SLACK + traits.headroom;
    let room = room.max(raw.min_rx_bufsize).max(traits.room);
    let pool = |count| Mempool::new(count, room, numa_node);
    let node = numa_node as u32;
    let mut pools = Vec::with_capacity(usize::from(options.queues));
    for queue in 0..options.queues {
        let rx_pool = pool(rx_count).map_err(failed("making its receive buffers"))?;
        let tx_pool = pool(tx_count).map_err(failed("making its transmit buffers"))?;
        // SAFETY: configured; the pool outlives the port; null means defaults.
        let status = unsafe {
            let (defaults, pool) = (std::ptr::null(), rx_pool.as_ptr());
            sys::rte_eth_rx_queue_setup(port, queue, rx_descriptors, node, defaults, pool)
        };
        Errno::check(status).map_err(failed("setting its receive queue up"))?;
        // SAFETY: as above.
        let status = unsafe {
            sys::rte_eth_tx_queue_setup(port, queue, tx_descriptors, node, std::ptr::null())
        };
        Errno::check(status).map_err(failed("setting its transmit queue up"))?;
        pools.push((rx_pool, tx_pool));
    }
    // SAFETY: configured, and its queues are set up.
    let status = unsafe { sys::rte_eth_dev_start(port) };
    Errno::check(status).map_err(failed("starting it"))?;
    Ok(Setup {
        rx_descriptors,
        tx_descriptors,
        numa_node,
        max_frame,
        pools,
    })
}

fn configure(
    port: u16,
    info: &sys::rte_eth_dev_info,
    caps: u64,
    traits: Traits,
    mtu: u16,
    queues: u16,
) -> Result<(), Errno> {
    // SAFETY: returns constants.
    let bits = unsafe { sys::genie_offloads() };
    let mut config = sys::rte_eth_conf::default();
    if !traits.hides_mtu {
        config.rxmode.mtu = u32::from(mtu);
    }
    if caps & abi::CAP_TX_MULTI_SEG != 0 {
        config.txmode.offloads |= bits.tx_multi_segs & info.tx_offload_capa;
    }
    if wants_link_interrupt(info) {
        config.intr_conf.set_lsc(1);
    }
    if caps & abi::CAP_RX_INTERRUPT != 0 {
        config.intr_conf.set_rxq(1);
    }
    // SAFETY: an attached port that is not started; `config` is read.
    Errno::check(unsafe { sys::rte_eth_dev_configure(port, queues, queues, &config) })?;
    Ok(())
}

/// Whether the driver can report a change of its link by itself. virtio_user
/// takes a peer back only then, or when somebody asks for its link; and with it
/// asking reads a word in memory, where it was a system call that raced with
/// the interrupt thread.
fn wants_link_interrupt(info: &sys::rte_eth_dev_info) -> bool {
    // SAFETY: null, or flags that live as long as the device.
    let flags = unsafe { info.dev_flags.as_ref() };
    flags.is_some_and(|flags| flags & sys::GENIE_DEV_INTR_LSC != 0)
}

/// Has datagrams delivered to the queues that own their ports. Most virtual
/// devices cannot; a rule or two that one took before it refused stay true.
fn sort(port: u16, options: &PortOptions) -> Result<(), Errno> {
    for queue in 0..options.queues {
        let udp_port = options.first_udp_port.wrapping_add(queue);
        // SAFETY: a started port, one of its queues.
        Errno::check(unsafe { sys::genie_flow_udp_port(port, queue, udp_port) })?;
    }
    Ok(())
}

fn mac(port: u16) -> Result<[u8; 6], Errno> {
    let mut address = sys::rte_ether_addr::default();
    // SAFETY: a valid port; `address` is ours and written.
    Errno::check(unsafe { sys::rte_eth_macaddr_get(port, &mut address) })?;
    Ok(address.addr_bytes)
}

fn fixed(name: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    let len = name.len().min(31);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}
