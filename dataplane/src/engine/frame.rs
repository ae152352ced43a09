//! Ethernet, IP and UDP around the protocol's packets.
//!
//! Out: a template per flow, in which only lengths and one checksum change. In:
//! a parser for the one kind of frame that matters, an unfragmented UDP
//! datagram; everything else is [`link`](super::link)'s. Both are bounded by
//! [`HEAD_MAX`] and never look at tensor bytes.
//!
//! UDP checksums are not used: the header check and CRC32C of the protocol
//! cover more. IPv4 allows that outright (RFC 768), IPv6 for tunnels whose
//! payload checks itself and whose ends are bound to each other by an id, here
//! the session (RFC 6935, RFC 6936 section 4).

#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use arrayvec::ArrayVec;

use crate::device::HEAD_MAX;

/// The bytes of a frame that are not a tensor's.
pub type Head = ArrayVec<u8, HEAD_MAX>;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const PROTOCOL_UDP: u8 = 17;
const HOP_LIMIT: u8 = 64;

/// The longest headers before the protocol's own: Ethernet, IPv6 and UDP.
pub const HEADERS_MAX: usize = ETHERNET + IPV6 + UDP;

/// The largest UDP payload in an IP packet of `mtu` bytes to `address`.
pub fn udp_payload_max(mtu: u16, address: IpAddr) -> u16 {
    let ip = if address.is_ipv4() { IPV4 } else { IPV6 };
    mtu.saturating_sub((ip + UDP) as u16)
}

/// The headers of every frame from one local to one remote port.
#[derive(Clone, Debug)]
pub struct Flow {
    template: ArrayVec<u8, HEADERS_MAX>,
    remote: SocketAddr,
}

/// One end of a flow.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IP address and UDP port.
    pub address: SocketAddr,
}

impl Flow {
    /// Prepares the headers of frames from `local` to `remote`.
    ///
    /// `None` if the two are not of one address family.
    pub fn new(local: End, remote: End) -> Option<Self> {
        let mut template = ArrayVec::new();
        let mut put = |bytes: &[u8]| {
            template
                .try_extend_from_slice(bytes)
                .expect("HEADERS_MAX is the sum of the longest")
        };
        put(&remote.mac);
        put(&local.mac);
        match (local.address.ip(), remote.address.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                put(&ETHERTYPE_IPV4);
                // Don't fragment; an atomic datagram needs no identification (RFC 6864).
                put(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, HOP_LIMIT, PROTOCOL_UDP, 0, 0]);
                put(&from.octets());
                put(&to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                put(&ETHERTYPE_IPV6);
                put(&[0x60, 0, 0, 0, 0, 0, PROTOCOL_UDP, HOP_LIMIT]);
                put(&from.octets());
                put(&to.octets());
            }
            _ => return None,
        }
        put(&local.address.port().to_be_bytes());
        put(&remote.address.port().to_be_bytes());
        put(&[0, 0, 0, 0]);
        Some(Self {
            template,
            remote: remote.address,
        })
    }

    /// Where the frames go.
    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// Begins `head` with the headers of a datagram, whose length is still to be
    /// told to [`Flow::finish_headers`].
    pub fn begin_headers(&self, head: &mut Head) {
        head.clear();
        head.try_extend_from_slice(&self.template)
            .expect("HEADERS_MAX < HEAD_MAX");
    }

    /// Completes the headers in `head` for a datagram of `udp_payload` bytes.
    pub fn finish_headers(&self, head: &mut Head, udp_payload: usize) {
        let udp_len = ((UDP + udp_payload) as u16).to_be_bytes();
        let udp = self.template.len() - UDP;
        head[udp + 4..udp + 6].copy_from_slice(&udp_len);
        if self.remote.is_ipv4() {
            let total = (IPV4 + UDP + udp_payload) as u16;
            head[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&total.to_be_bytes());
            let checksum = !ones_complement_sum(&head[ETHERNET..ETHERNET + IPV4]);
            head[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&checksum.to_be_bytes());
        } else {
            head[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&udp_len);
        }
    }
}

/// A UDP datagram inside a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// Whom it is for.
    pub to: SocketAddr,
    /// Where in the frame its payload begins.
    pub payload_at: usize,
    /// Length of its payload in bytes; lies inside the frame.
    pub payload_len: usize,
}

/// What a frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A whole UDP datagram.
    Datagram(Datagram),
    /// Something for [`link`](super::link): ARP, ICMPv6 or unknown.
    Other,
    /// Broken, truncated or a fragment.
    Bad,
}

/// Whom a frame is for, among the engines of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressee {
    /// The one that listens on this UDP port.
    Port(u16),
    /// All of them: an answer of ARP or neighbour discovery.
    Everybody,
    /// Whoever sees it.
    Anybody,
}

/// Whom a frame is for, from its beginning; whether it is sound is left to
/// [`parse`], by whoever it is for.
pub fn addressee(head: &[u8]) -> Addressee {
    const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
    const ARP_REPLY: [u8; 2] = [0, 2];
    const PROTOCOL_ICMPV6: u8 = 58;
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    let two = |at: usize| Some([*head.get(at)?, *head.get(at + 1)?]);
    let port = |udp: usize| two(udp + 2).map(u16::from_be_bytes);
    let found = match two(12) {
        Some(ETHERTYPE_IPV4) if head.get(ETHERNET + 9) == Some(&PROTOCOL_UDP) => {
            port(ETHERNET + IPV4).map(Addressee::Port)
        }
        Some(ETHERTYPE_IPV6) => match head.get(ETHERNET + 6) {
            Some(&PROTOCOL_UDP) => port(ETHERNET + IPV6).map(Addressee::Port),
            Some(&PROTOCOL_ICMPV6) => (head.get(ETHERNET + IPV6) == Some(&NEIGHBOUR_ADVERTISEMENT))
                .then_some(Addressee::Everybody),
            _ => None,
        },
        Some(ETHERTYPE_ARP) => {
            (two(ETHERNET + 6) == Some(ARP_REPLY)).then_some(Addressee::Everybody)
        }
        _ => None,
    };
    found.unwrap_or(Addressee::Anybody)
}

/// Parses the beginning `head` of a frame that is `frame_len` bytes long.
///
/// `head` must hold the first [`HEADERS_MAX`] bytes, or all if there are fewer.
pub fn parse(head: &[u8], frame_len: usize) -> Parsed {
    let Some((ethernet, packet)) = head.split_at_checked(ETHERNET) else {
        return Parsed::Bad;
    };
    let packet_len = frame_len - ETHERNET;
    let ip = match [ethernet[12], ethernet[13]] {
        ETHERTYPE_IPV4 => parse_ipv4(packet, packet_len),
        ETHERTYPE_IPV6 => parse_ipv6(packet, packet_len),
        _ => return Parsed::Other,
    };
    let ip = match ip {
        Ok(ip) => ip,
        Err(not_udp) => return not_udp,
    };
    let Some(udp) = packet.get(ip.header_len..ip.header_len + UDP) else {
        return Parsed::Bad;
    };
    let udp_len = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
    if udp_len < UDP || udp_len > ip.body_len {
        return Parsed::Bad;
    }
    Parsed::Datagram(Datagram {
        from: SocketAddr::new(ip.from, u16::from_be_bytes([udp[0], udp[1]])),
        to: SocketAddr::new(ip.to, u16::from_be_bytes([udp[2], udp[3]])),
        payload_at: ETHERNET + ip.header_len + UDP,
        payload_len: udp_len - UDP,
    })
}

struct Ip {
    from: IpAddr,
    to: IpAddr,
    header_len: usize,
    /// Bytes behind the IP header; shorter than the frame where that is padded.
    body_len: usize,
}

fn parse_ipv4(packet: &[u8], packet_len: usize) -> Result<Ip, Parsed> {
    let Some((header, _)) = packet.split_first_chunk::<IPV4>() else {
        return Err(Parsed::Bad);
    };
    if header[9] != PROTOCOL_UDP {
        return Err(Parsed::Other);
    }
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let options = header[0] != 0x45;
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    let intact = ones_complement_sum(header) == 0xffff;
    if options || fragment || !intact || total < IPV4 || total > packet_len {
        return Err(Parsed::Bad);
    }
    Ok(Ip {
        from: IpAddr::V4(Ipv4Addr::new(
            header[12], header[13], header[14], header[15],
        )),
        to: IpAddr::V4(Ipv4Addr::new(
            header[16], header[17], header[18], header[19],
        )),
        header_len: IPV4,
        body_len: total - IPV4,
    })
}

fn parse_ipv6(packet: &[u8], packet_len: usize) -> Result<Ip, Parsed> {
    let Some((header, _)) = packet.split_first_chunk::<IPV6>() else {
        return Err(Parsed::Bad);
    };
    if header[6] != PROTOCOL_UDP {
        // Extension headers, fragments among them, are not ours either.
        return Err(Parsed::Other);
    }
    let body_len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || body_len > packet_len - IPV6 {
        return Err(Parsed::Bad);
    }
    let address = |at: usize| {
        let octets: [u8; 16] = header[at..at + 16].try_into().expect("a slice of sixteen");
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Ok(Ip {
        from: address(8),
        to: address(24),
        header_len: IPV6,
        body_len,
    })
}

/// The sum of RFC 1071 over an even number of bytes.
fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn end(mac: u8, address: &str) -> End {
        End {
            mac: [2, 0, 0, 0, 0, mac],
            address: address.parse().unwrap(),
        }
    }

    fn frame(local: &str, remote: &str, payload: &[u8]) -> Vec<u8> {
        let flow = Flow::new(end(1, local), end(2, remote)).unwrap();
        let mut head = Head::new();
        flow.begin_headers(&mut head);
        flow.finish_headers(&mut head, payload.len());
        [&head[..], payload].concat()
    }

    #[test]
    fn what_is_written_is_parsed_in_both_families() {
        for (local, remote) in [
            ("10.0.0.1:1000", "10.0.0.2:5556"),
            ("[fe80::1]:1000", "[fe80::2]:5556"),
        ] {
            // Padding behind the datagram, as short frames have, is not payload.
            for padding in [0, 20] {
                let mut bytes = frame(local, remote, b"hello");
                let payload_at = bytes.len() - 5;
                bytes.resize(bytes.len() + padding, 0);
                let Parsed::Datagram(datagram) = parse(&bytes, bytes.len()) else {
                    panic!("{local}")
                };
                assert_eq!(datagram.from, local.parse().unwrap());
                assert_eq!(datagram.to, remote.parse().unwrap());
                assert_eq!((datagram.payload_at, datagram.payload_len), (payload_at, 5));
            }
        }
    }

    #[test]
    fn the_headers_are_what_another_implementation_reads() {
        use smoltcp::wire::{EthernetFrame, Ipv4Packet, UdpPacket};
        let bytes = frame("10.0.0.1:1000", "10.0.0.2:5556", b"hello");
        let ethernet = EthernetFrame::new_checked(&bytes[..]).unwrap();
        let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
        assert!(ip.verify_checksum() && ip.dont_frag());
        let udp = UdpPacket::new_checked(ip.payload()).unwrap();
        assert_eq!(
            (udp.src_port(), udp.dst_port(), udp.payload()),
            (1000, 5556, &b"hello"[..])
        );
    }

    #[test]
    fn fragments_wrong_checksums_and_long_lengths_are_bad() {
        let good = frame("10.0.0.1:1000", "10.0.0.2:5556", b"hello");
        for (what, at, value) in [
            ("checksum", 10, 0xee),
            ("version", 0, 0x20),
            ("length", 24, 0xff),
        ] {
            let mut bytes = good.clone();
            bytes[ETHERNET + at] ^= value;
            assert_eq!(parse(&bytes, bytes.len()), Parsed::Bad, "{what}");
        }
        let mut fragment = good.clone();
        fragment[ETHERNET + 6] |= 0x20;
        // The flag's value taken off the checksum, so that only the flag is wrong.
        fragment[ETHERNET + 10] = fragment[ETHERNET + 10].wrapping_sub(0x20);
        assert_eq!(
            ones_complement_sum(&fragment[ETHERNET..ETHERNET + IPV4]),
            0xffff
        );
        assert_eq!(parse(&fragment, fragment.len()), Parsed::Bad);
        let mut longer = frame("[fe80::1]:1000", "[fe80::2]:5556", b"hello");
        longer[ETHERNET + 5] += 1;
        assert_eq!(parse(&longer, longer.len()), Parsed::Bad);
    }

    #[test]
    fn families_do_not_mix() {
        assert!(Flow::new(end(1, "10.0.0.1:1"), end(2, "[fe80::1]:1")).is_none());
    }

    proptest! {
        /// Whatever arrives, a datagram that is found lies inside its frame.
        #[test]
        fn a_datagram_lies_inside_its_frame(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            kind in 0..3,
            more in 0usize..3000,
        ) {
            if bytes.len() > 24 && kind < 2 {
                let ethertype = [ETHERTYPE_IPV4, ETHERTYPE_IPV6][kind as usize];
                bytes[12..14].copy_from_slice(&ethertype);
                bytes[14] = [0x45, 0x60][kind as usize];
                bytes[[23, 20][kind as usize]] = PROTOCOL_UDP;
            }
            let len = if bytes.len() >= HEADERS_MAX { bytes.len() + more } else { bytes.len() };
            if let Parsed::Datagram(datagram) = parse(&bytes, len) {
                prop_assert!(datagram.payload_at + datagram.payload_len <= len);
            }
        }
    }
}
