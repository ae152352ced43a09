//! Virtual devices by their arguments: what they carry, and what is missing.
//!
//! memif, af_packet and af_xdp do not say how long a frame they take; it
//! follows from their arguments and from the interface below them. What the
//! operator does not say is completed so that frames are as long as they can be.

#![forbid(unsafe_code)]

/// Ethernet header, without VLAN tags.
const ETHERNET_HEADER: u16 = 14;

/// What the drivers take for `bsize` and `framesz` where nothing is said.
const DEFAULT_BUFFER: u16 = 2048;

/// What the kernel puts before a packet in a frame of `PACKET_MMAP`: its own
/// header and a socket address, aligned (`TPACKET2_HDRLEN`, packet(7)).
const PACKET_MMAP_HEADER: u16 = 66;

/// Of an af_packet ring for long frames: four fill a block of whole pages, as
/// they must, and a packet buffer holds one.
const LONG_FRAMES: &str = "framesz=9216,blocksz=36864,framecnt=512";
const LONG_FRAME: u16 = 9216;

/// For frames beyond that: one fills a block. The longest is the most that a
/// length of 16 bits can say in whole pages.
const PAGE: u16 = 4096;
const LONGEST_FRAME: u16 = 15 * PAGE;
const LONGEST_FRAMES: u16 = 256;

/// The longest frame of af_xdp: one page, less what kernel and DPDK keep of it.
const AF_XDP_FRAME: u16 = 3400;

/// Where no interface says otherwise.
const ETHERNET_MTU: u16 = 1500;

/// Completes a virtual device's arguments and gives the largest IP packet that
/// it then carries, no more than `mtu`. `link_mtu` tells an interface's.
pub(super) fn complete(
    devargs: &str,
    mtu: u16,
    link_mtu: impl Fn(&str) -> Option<u16>,
) -> (String, u16) {
    let name = devargs.split(',').next().unwrap_or("");
    let argument = |key: &str| {
        let mut arguments = devargs.split(',').skip(1);
        arguments.find_map(|one| one.split_once('=').filter(|(k, _)| *k == key))
    };
    let number = |key| argument(key).and_then(|(_, value)| value.parse::<u16>().ok());
    let interface = || {
        let link = argument("iface").and_then(|(_, name)| link_mtu(name));
        mtu.min(link.unwrap_or(ETHERNET_MTU))
    };
    if name.starts_with("net_memif") {
        return match number("bsize") {
            Some(bytes) => (
                devargs.into(),
                mtu.min(bytes.saturating_sub(ETHERNET_HEADER)),
            ),
            // One descriptor a frame: the driver loses and mixes up chains of them.
            None => {
                let bytes = (mtu + ETHERNET_HEADER).next_multiple_of(64);
                (format!("{devargs},bsize={bytes}"), mtu)
            }
        };
    }
    if name.starts_with("net_af_packet") {
        let wanted = interface();
        let holds = |frame: u16| frame.saturating_sub(PACKET_MMAP_HEADER + ETHERNET_HEADER);
        let said = ["framesz", "blocksz", "framecnt"];
        return match number("framesz") {
            Some(frame) => (devargs.into(), wanted.min(holds(frame))),
            None if wanted > holds(LONG_FRAME)
                && said.iter().all(|key| argument(key).is_none()) =>
            {
                let headers = PACKET_MMAP_HEADER + ETHERNET_HEADER;
                let pages = wanted.saturating_add(headers).div_ceil(PAGE);
                let frame = pages.min(LONGEST_FRAME / PAGE) * PAGE;
                let frames = format!("framesz={frame},blocksz={frame},framecnt={LONGEST_FRAMES}");
                (format!("{devargs},{frames}"), wanted.min(holds(frame)))
            }
            None if wanted > holds(DEFAULT_BUFFER)
                && said.iter().all(|key| argument(key).is_none()) =>
            {
                (
                    format!("{devargs},{LONG_FRAMES}"),
                    wanted.min(holds(LONG_FRAME)),
                )
            }
            None => (devargs.into(), wanted.min(holds(DEFAULT_BUFFER))),
        };
    }
    if name.starts_with("net_af_xdp") {
        return (
            devargs.into(),
            interface().min(AF_XDP_FRAME - ETHERNET_HEADER),
        );
    }
    (devargs.into(), mtu)
}

/// The arguments for so many queues, unless the operator says how many.
pub(super) fn with_queues(devargs: String, queues: u16) -> String {
    let name = devargs.split(',').next().unwrap_or("");
    let keys = [
        ("net_vhost", "queues"),
        ("net_virtio_user", "queues"),
        ("net_af_packet", "qpairs"),
        ("net_af_xdp", "queue_count"),
    ];
    let key = keys
        .into_iter()
        .find(|(driver, _)| name.starts_with(driver));
    match key {
        Some((_, key)) if queues > 1 && !devargs.contains(&format!(",{key}=")) => {
            format!("{devargs},{key}={queues}")
        }
        _ => devargs,
    }
}

/// An interface's MTU, of the network namespace that this process is in.
pub(super) fn link_mtu(interface: &str) -> Option<u16> {
    if interface.contains('/') {
        return None;
    }
    let text = std::fs::read_to_string(format!("/sys/class/net/{interface}/mtu")).ok()?;
    let mtu: u32 = text.trim().parse().ok()?;
    Some(u16::try_from(mtu).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(devargs: &str) -> (String, u16) {
        completed_to(devargs, 9000)
    }

    fn completed_to(devargs: &str, mtu: u16) -> (String, u16) {
        let link = |name: &str| match name {
            "jumbo0" => Some(9000),
            "eth0" => Some(1500),
            "long0" => Some(u16::MAX),
            _ => None,
        };
        complete(devargs, mtu, link)
    }

    #[test]
    fn frames_are_as_long_as_each_device_carries() {
        let same = |devargs: &str, mtu| assert_eq!(completed(devargs), (devargs.into(), mtu));
        same("net_memif0,id=1,bsize=2048", 2034);
        same("net_memif0,bsize=65000", 9000);
        same("net_af_packet0,iface=eth0", 1500);
        same("net_af_packet0,iface=none", 1500);
        same("net_af_packet0,iface=jumbo0,framesz=4096", 4016);
        same("net_af_packet0,iface=jumbo0,blocksz=65536", 1968);
        same("net_af_xdp0,iface=eth0", 1500);
        same("net_af_xdp0,iface=jumbo0", 3386);
        same("net_null0", 9000);
    }

    #[test]
    fn what_is_not_said_is_completed() {
        assert_eq!(
            completed("net_memif0,id=1"),
            ("net_memif0,id=1,bsize=9024".into(), 9000)
        );
        let (devargs, mtu) = completed("net_af_packet0,iface=jumbo0");
        assert!(devargs.ends_with(LONG_FRAMES), "{devargs}");
        assert_eq!(mtu, 9000);
    }

    #[test]
    fn frames_are_longer_where_that_is_asked_for() {
        let said = |devargs: &str, mtu| completed_to(devargs, mtu);
        let (devargs, mtu) = said("net_memif0,id=1", 65_000);
        assert_eq!(
            (devargs, mtu),
            ("net_memif0,id=1,bsize=65024".into(), 65_000)
        );
        assert_eq!(said("net_memif0,bsize=32768", 65_000).1, 32_754);
        let (devargs, mtu) = said("net_af_packet0,iface=long0", 16_000);
        let expected = "net_af_packet0,iface=long0,framesz=16384,blocksz=16384,framecnt=256";
        assert_eq!((devargs.as_str(), mtu), (expected, 16_000));
        let (devargs, mtu) = said("net_af_packet0,iface=long0", 65_000);
        assert!(devargs.contains("framesz=61440,blocksz=61440"), "{devargs}");
        assert_eq!(mtu, 61_360);
        assert_eq!(said("net_af_packet0,iface=jumbo0", 65_000).1, 9000);
        assert_eq!(said("net_null0", 65_000).1, 65_000);
    }

    #[test]
    fn queues_are_asked_for_in_each_drivers_words_but_once() {
        let with = |devargs: &str, queues| with_queues(devargs.into(), queues);
        assert_eq!(
            with("net_vhost0,iface=/x", 2),
            "net_vhost0,iface=/x,queues=2"
        );
        assert_eq!(
            with("net_af_packet0,iface=x", 4),
            "net_af_packet0,iface=x,qpairs=4"
        );
        for (same, queues) in [
            ("net_vhost0,iface=/x", 1),
            ("net_virtio_user0,path=/x,queues=1", 2),
            ("net_memif0,id=1", 2),
        ] {
            assert_eq!(with(same, queues), same);
        }
    }

    #[test]
    fn an_interface_is_a_name() {
        assert_eq!(link_mtu("../../../etc/hostname"), None);
        assert!(link_mtu("lo").is_some());
    }
}
