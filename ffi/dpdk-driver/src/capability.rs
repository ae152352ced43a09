//! What each driver can and cannot do beyond what it says of itself.
//!
//! One table by driver name; every entry is something that was measured or
//! that a driver's guide states. A driver that is not in it is judged by its
//! bus: a PCI device is a NIC that reaches memory by DMA, anything else is
//! assumed to take nothing but DPDK's own memory.

/// What a frame may refer to on transmission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum External {
    /// Any memory of the process: the driver copies it with the CPU.
    Any,
    /// Memory registered with DPDK and mapped for the device.
    Registered,
    /// Only DPDK's own memory; payloads are copied into packet buffers.
    Never,
}

/// What is known of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traits {
    pub(crate) external: External,
    /// Whether chains of packet buffers may be sent, if it says so itself.
    pub(crate) multi_seg: bool,
    /// Whether it copies with the CPU on (transmission, reception).
    pub(crate) copies: (bool, bool),
    /// Whether it can wake a sleeping thread.
    pub(crate) rx_interrupt: bool,
    /// Whether traffic goes on when the peer process died and came back.
    pub(crate) survives_peer: bool,
    /// Whether the death of the peer may crash this process.
    pub(crate) fragile: bool,
    /// Whether `rte_eth_dev_configure` refuses an MTU that works all the same.
    pub(crate) hides_mtu: bool,
    /// What it keeps of each packet buffer for itself, in bytes.
    pub(crate) headroom: u32,
    /// The smallest packet buffer that it takes, in bytes.
    pub(crate) room: u32,
}

const NIC: Traits = Traits {
    external: External::Registered,
    multi_seg: true,
    copies: (false, false),
    rx_interrupt: true,
    survives_peer: true,
    fragile: false,
    hides_mtu: false,
    headroom: 0,
    room: 0,
};

const VIRTUAL: Traits = Traits {
    external: External::Never,
    multi_seg: true,
    copies: (true, true),
    rx_interrupt: false,
    survives_peer: false,
    fragile: false,
    hides_mtu: false,
    headroom: 0,
    room: 0,
};

/// Looks up a driver by its name and the arguments of the device.
pub(crate) fn traits(driver: &str, devargs: &str) -> Traits {
    match driver {
        // The back end does all the copying of the pair, from and to any memory.
        "net_vhost" => Traits {
            external: External::Any,
            rx_interrupt: true,
            survives_peer: true,
            ..VIRTUAL
        },
        // The back end maps DPDK's heap only: a payload elsewhere stalls the
        // ring without an error.
        "net_virtio_user" => Traits {
            copies: (false, false),
            rx_interrupt: true,
            survives_peer: true,
            ..VIRTUAL
        },
        // The PCI device collects sent frames only when its ring is nearly
        // full, so memory that one refers to would stay in use for ever.
        "net_virtio" => Traits {
            external: External::Never,
            ..NIC
        },
        // Cards that are mostly emulated, and QEMU drops a frame of which a piece
        // lies in two pages that are not side by side in the host, as pieces of
        // tensors do; packet buffers do not.
        "net_e1000_em" | "net_vmxnet3" => Traits {
            external: External::Never,
            ..NIC
        },
        // Zero-copy mode translates addresses within DPDK's heap without a
        // check: a payload elsewhere is a segmentation fault. A dying peer
        // unmaps the ring under the driver about one time in three.
        "net_memif" if devargs.contains("zero-copy=yes") => Traits {
            copies: (false, false),
            fragile: true,
            hides_mtu: true,
            ..VIRTUAL
        },
        "net_memif" => Traits {
            external: External::Any,
            fragile: true,
            hides_mtu: true,
            ..VIRTUAL
        },
        // Each frame of its ring has to fit into one packet buffer, less the
        // kernel's header (`TPACKET2_HDRLEN` without the address).
        "net_af_packet" => Traits {
            room: argument(devargs, "framesz")
                .unwrap_or(2048)
                .saturating_sub(32),
            external: External::Any,
            survives_peer: true,
            hides_mtu: true,
            ..VIRTUAL
        },
        // Passes packet buffers on as they are, to itself or within a process.
        "net_ring" => Traits {
            external: External::Any,
            copies: (false, false),
            ..VIRTUAL
        },
        // Sends garbage for chains and for external buffers. The kernel keeps
        // `XDP_PACKET_HEADROOM` of each buffer, and none may be shorter than
        // the driver's own frame.
        "net_af_xdp" => Traits {
            multi_seg: false,
            headroom: 256,
            room: 2048,
            survives_peer: true,
            ..VIRTUAL
        },
        _ if is_pci(devargs) => NIC,
        _ => VIRTUAL,
    }
}

/// A number among the arguments of a device.
fn argument(devargs: &str, key: &str) -> Option<u32> {
    let mut arguments = devargs.split(',').skip(1);
    let value = arguments.find_map(|one| one.strip_prefix(key)?.strip_prefix('='))?;
    value.parse().ok()
}

/// Whether a device is named by a PCI address, `0000:3b:00.0` or `3b:00.0`.
pub(crate) fn is_pci(devargs: &str) -> bool {
    let address = devargs.split(',').next().unwrap_or("");
    let address = address.strip_prefix("pci:").unwrap_or(address);
    let hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let Some((rest, function)) = address.rsplit_once('.') else {
        return false;
    };
    let mut parts = rest.rsplit(':');
    let device = parts.next().is_some_and(|part| hex(part, 2));
    let bus = parts.next().is_some_and(|part| hex(part, 2));
    let domain = parts.next().is_none_or(|part| hex(part, 4));
    hex(function, 1) && device && bus && domain && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_addresses_are_told_from_virtual_devices() {
        for pci in [
            "0000:3b:00.0",
            "3b:00.1",
            "0000:3b:00.0,arg=1",
            "pci:0000:3b:00.0",
        ] {
            assert!(is_pci(pci), "{pci}");
        }
        for other in [
            "net_memif0",
            "net_memif0,socket=/a.b:c",
            "",
            "0000:3b:00",
            "x:3b:00.0",
        ] {
            assert!(!is_pci(other), "{other}");
        }
    }

    #[test]
    fn only_some_hide_their_limit_or_keep_a_part_of_each_buffer() {
        let find = |holds: fn(&Traits) -> bool| -> Vec<&str> {
            let drivers = [
                "net_vhost",
                "net_virtio_user",
                "net_memif",
                "net_af_packet",
                "net_af_xdp",
                "net_other",
            ];
            let driver = |driver: &&str| holds(&traits(driver, "x"));
            drivers.into_iter().filter(driver).collect()
        };
        assert_eq!(find(|one| one.hides_mtu), ["net_memif", "net_af_packet"]);
        assert_eq!(find(|one| one.headroom > 0), ["net_af_xdp"]);
        let room = |devargs| traits("net_af_packet", devargs).room;
        assert_eq!(room("net_af_packet0,iface=x,framesz=1616"), 1584);
        assert_eq!(room("net_af_packet0,iface=x"), 2016);
        assert!(!traits("net_e1000", "0000:3b:00.0").hides_mtu);
    }

    /// What docs/devices.md says of each device, in the order of its columns:
    /// chains, memory on transmission, interrupt, survives its peer, fragile,
    /// copies on transmission and reception.
    #[test]
    fn the_table_is_what_was_measured() {
        use External::{Any, Never, Registered};
        let (yes, no) = (true, false);
        for (driver, devargs, chains, external, interrupt, survives, fragile, copies) in [
            (
                "net_vhost",
                "net_vhost0",
                yes,
                Any,
                yes,
                yes,
                no,
                (yes, yes),
            ),
            (
                "net_virtio_user",
                "net_virtio_user0",
                yes,
                Never,
                yes,
                yes,
                no,
                (no, no),
            ),
            ("net_memif", "net_memif0", yes, Any, no, no, yes, (yes, yes)),
            (
                "net_memif",
                "net_memif0,zero-copy=yes",
                yes,
                Never,
                no,
                no,
                yes,
                (no, no),
            ),
            (
                "net_af_packet",
                "net_af_packet0",
                yes,
                Any,
                no,
                yes,
                no,
                (yes, yes),
            ),
            (
                "net_af_xdp",
                "net_af_xdp0",
                no,
                Never,
                no,
                yes,
                no,
                (yes, yes),
            ),
            (
                "net_virtio",
                "0000:00:04.0",
                yes,
                Never,
                yes,
                yes,
                no,
                (no, no),
            ),
            (
                "net_e1000_em",
                "0000:00:02.0",
                yes,
                Never,
                yes,
                yes,
                no,
                (no, no),
            ),
            (
                "net_ice",
                "0000:3b:00.0",
                yes,
                Registered,
                yes,
                yes,
                no,
                (no, no),
            ),
            (
                "net_unheard_of",
                "net_unheard_of0",
                yes,
                Never,
                no,
                no,
                no,
                (yes, yes),
            ),
        ] {
            let known = traits(driver, devargs);
            assert_eq!(known.multi_seg, chains, "{devargs}: chains");
            assert_eq!(known.external, external, "{devargs}: memory");
            assert_eq!(known.rx_interrupt, interrupt, "{devargs}: interrupt");
            assert_eq!(known.survives_peer, survives, "{devargs}: survives");
            assert_eq!(known.fragile, fragile, "{devargs}: fragile");
            assert_eq!(known.copies, copies, "{devargs}: copies");
        }
        // These refuse an MTU in their configuration that they carry.
        for driver in ["net_memif", "net_af_packet"] {
            assert!(traits(driver, driver).hides_mtu, "{driver}");
        }
    }

    #[test]
    fn only_dpdk_memory_where_the_back_end_maps_nothing_else() {
        assert_eq!(
            traits("net_virtio_user", "net_virtio_user0").external,
            External::Never
        );
        assert_eq!(
            traits("net_memif", "net_memif0,zero-copy=yes").external,
            External::Never
        );
        assert_eq!(traits("net_memif", "net_memif0").external, External::Any);
        assert_eq!(
            traits("net_unheard_of", "net_unheard_of0").external,
            External::Never
        );
        assert_eq!(
            traits("net_ice", "0000:3b:00.0").external,
            External::Registered
        );
    }
}
