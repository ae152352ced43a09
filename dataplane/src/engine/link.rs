//! What an owner of a port must do itself: answer ARP and neighbour discovery,
//! and ask for its peers' Ethernet addresses.
//!
//! Used by the UDP engine for ports that the kernel does not see. Learns only
//! addresses it has asked for, so that nobody on the link can fill its table.
//! RFC 826 (ARP), RFC 4861 (neighbour discovery), RFC 4291 (interface ids).

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags,
    NdiscRepr,
};

use super::frame::Head;

/// The link-layer state of one port.
#[derive(Debug)]
pub struct Link {
    mac: EthernetAddress,
    addresses: Vec<IpAddr>,
    /// Peers that were asked for; `None` until they answer.
    neighbours: HashMap<IpAddr, Option<[u8; 6]>>,
}

impl Link {
    /// A port with this Ethernet address that answers for `addresses`.
    ///
    /// Without any, it takes the link-local IPv6 address of its interface id.
    pub fn new(mac: [u8; 6], addresses: Vec<IpAddr>) -> Self {
        let addresses = if addresses.is_empty() {
            vec![IpAddr::V6(link_local(mac))]
        } else {
            addresses
        };
        Self {
            mac: EthernetAddress(mac),
            addresses,
            neighbours: HashMap::new(),
        }
    }

    /// The port's Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac.0
    }

    /// The port's own addresses, most preferred first.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Our and the peer's address to use: the first pair of one family and one kind.
    pub fn choose(&self, peer: &[IpAddr]) -> Option<(IpAddr, IpAddr)> {
        let own = |theirs: &IpAddr| {
            let fits = |ours: &&IpAddr| {
                ours.is_ipv4() == theirs.is_ipv4() && is_link_local(ours) == is_link_local(theirs)
            };
            self.addresses
                .iter()
                .find(fits)
                .map(|ours| (*ours, *theirs))
        };
        peer.iter().find_map(own)
    }

    /// The Ethernet address of a peer, once it has answered a [`Link::request`].
    pub fn neighbour(&self, address: IpAddr) -> Option<[u8; 6]> {
        self.neighbours.get(&address).copied().flatten()
    }

    /// A frame that asks for the Ethernet address of `peer`, whose answer is then learned.
    pub fn request(&mut self, own: IpAddr, peer: IpAddr) -> Option<Head> {
        let frame = match (own, peer) {
            (IpAddr::V4(own), IpAddr::V4(peer)) => {
                self.arp(ArpOperation::Request, own, EthernetAddress::BROADCAST, peer)
            }
            (IpAddr::V6(own), IpAddr::V6(peer)) => {
                let solicit = NdiscRepr::NeighborSolicit {
                    target_addr: peer,
                    lladdr: Some(self.mac.into()),
                };
                let group = solicited_node(peer);
                self.ndisc(solicit, multicast_mac(group), own, group)
            }
            _ => return None,
        };
        self.neighbours.entry(peer).or_default();
        Some(frame)
    }

    /// Forgets a peer, at the end of its last session.
    pub fn forget(&mut self, peer: IpAddr) {
        self.neighbours.remove(&peer);
    }

    /// Handles a whole frame that is no UDP datagram; returns the answer, if any.
    pub fn handle(&mut self, frame: &[u8]) -> Option<Head> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        match frame.ethertype() {
            EthernetProtocol::Arp => self.handle_arp(frame.payload()),
            EthernetProtocol::Ipv6 => self.handle_icmpv6(frame.payload()),
            _ => None,
        }
    }

    fn handle_arp(&mut self, packet: &[u8]) -> Option<Head> {
        let packet = ArpPacket::new_checked(packet).ok()?;
        let ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = ArpRepr::parse(&packet).ok()?
        else {
            return None;
        };
        if !self.addresses.contains(&IpAddr::V4(target_protocol_addr)) {
            return None;
        }
        self.learn(IpAddr::V4(source_protocol_addr), source_hardware_addr);
        let asked = operation == ArpOperation::Request;
        asked.then(|| {
            let own = target_protocol_addr;
            self.arp(
                ArpOperation::Reply,
                own,
                source_hardware_addr,
                source_protocol_addr,
            )
        })
    }

    fn handle_icmpv6(&mut self, packet: &[u8]) -> Option<Head> {
        let ip = Ipv6Packet::new_checked(packet).ok()?;
        // Only a neighbour can send a packet that no router has passed on (RFC 4861, 7.1).
        if ip.next_header() != IpProtocol::Icmpv6 || ip.hop_limit() != 255 {
            return None;
        }
        let icmp = Icmpv6Packet::new_checked(ip.payload()).ok()?;
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let checks = ChecksumCapabilities::default();
        match Icmpv6Repr::parse(&from, &to, &icmp, &checks).ok()? {
            Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit {
                target_addr,
                lladdr,
            }) if self.addresses.contains(&IpAddr::V6(target_addr)) => {
                let mac = EthernetAddress::from_bytes(lladdr?.as_bytes().get(..6)?);
                self.learn(IpAddr::V6(from), mac);
                let advert = NdiscRepr::NeighborAdvert {
                    flags: NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE,
                    target_addr,
                    lladdr: Some(self.mac.into()),
                };
                Some(self.ndisc(advert, mac, target_addr, from))
            }
            Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
                target_addr,
                lladdr,
                ..
            }) => {
                let mac = EthernetAddress::from_bytes(lladdr?.as_bytes().get(..6)?);
                self.learn(IpAddr::V6(target_addr), mac);
                None
            }
            _ => None,
        }
    }

    fn learn(&mut self, address: IpAddr, mac: EthernetAddress) {
        if let Some(known) = self.neighbours.get_mut(&address)
            && mac.is_unicast()
        {
            *known = Some(mac.0);
        }
    }

    fn arp(
        &self,
        operation: ArpOperation,
        own: Ipv4Addr,
        mac: EthernetAddress,
        peer: Ipv4Addr,
    ) -> Head {
        let arp = ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: self.mac,
            source_protocol_addr: own,
            target_hardware_addr: mac,
            target_protocol_addr: peer,
        };
        let (mut head, at) = self.ethernet(mac, EthernetProtocol::Arp, arp.buffer_len());
        arp.emit(&mut ArpPacket::new_unchecked(&mut head[at..]));
        head
    }

    fn ndisc(
        &self,
        message: NdiscRepr<'_>,
        mac: EthernetAddress,
        from: Ipv6Addr,
        to: Ipv6Addr,
    ) -> Head {
        let message = Icmpv6Repr::Ndisc(message);
        let ip = Ipv6Repr {
            src_addr: from,
            dst_addr: to,
            next_header: IpProtocol::Icmpv6,
            payload_len: message.buffer_len(),
            hop_limit: 255,
        };
        let len = ip.buffer_len() + message.buffer_len();
        let (mut head, at) = self.ethernet(mac, EthernetProtocol::Ipv6, len);
        let mut packet = Ipv6Packet::new_unchecked(&mut head[at..]);
        ip.emit(&mut packet);
        let mut body = Icmpv6Packet::new_unchecked(packet.payload_mut());
        message.emit(&from, &to, &mut body, &ChecksumCapabilities::default());
        head
    }

    /// A frame with room for `len` bytes behind its Ethernet header, and where they begin.
    fn ethernet(
        &self,
        to: EthernetAddress,
        ethertype: EthernetProtocol,
        len: usize,
    ) -> (Head, usize) {
        let header = EthernetRepr {
            src_addr: self.mac,
            dst_addr: to,
            ethertype,
        };
        let at = header.buffer_len();
        let mut head = Head::new();
        let zeroes = std::iter::repeat_n(0, at + len);
        head.extend(zeroes);
        header.emit(&mut EthernetFrame::new_unchecked(&mut head[..]));
        (head, at)
    }
}

/// The link-local address whose interface id is `mac` as EUI-64.
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let word = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        word(a ^ 2, b),
        word(c, 0xff),
        word(0xfe, d),
        word(e, f),
    )
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// RFC 4291, section 2.7.1.
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., x, y, z] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z])
}

/// RFC 2464, section 7.
fn multicast_mac(group: Ipv6Addr) -> EthernetAddress {
    let [.., w, x, y, z] = group.octets();
    EthernetAddress([0x33, 0x33, w, x, y, z])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
    const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

    fn resolves(own: &str, peer: &str) {
        let (own, peer): (IpAddr, IpAddr) = (own.parse().unwrap(), peer.parse().unwrap());
        let mut a = Link::new(A, vec![own]);
        let mut b = Link::new(B, vec![peer]);
        assert_eq!(a.choose(b.addresses()), Some((own, peer)));
        let question = a.request(own, peer).unwrap();
        assert_ne!(question[..6], A);
        assert_eq!(
            a.neighbour(peer),
            None,
            "nothing is known before the answer"
        );
        let answer = b.handle(&question).expect("the owner answers");
        assert_eq!(
            answer[..6],
            A,
            "the answer is addressed to who asked, not to all"
        );
        assert!(a.handle(&answer).is_none());
        assert_eq!(a.neighbour(peer), Some(B));
        assert_eq!(b.neighbour(own), None, "who never asked learns nothing");
        a.forget(peer);
        assert_eq!(a.neighbour(peer), None);
    }

    #[test]
    fn arp_resolves_ipv4() {
        resolves("10.1.0.1", "10.1.0.2");
    }

    #[test]
    fn neighbour_discovery_resolves_ipv6() {
        resolves("fd00::1", "fd00::2");
    }

    #[test]
    fn a_port_without_addresses_takes_its_link_local_one() {
        let link = Link::new([0x52, 0x54, 0, 0x12, 0x34, 0x56], Vec::new());
        assert_eq!(
            link.addresses(),
            ["fe80::5054:ff:fe12:3456".parse::<IpAddr>().unwrap()]
        );
    }

    #[test]
    fn questions_for_others_are_not_answered() {
        let mut a = Link::new(A, vec!["10.1.0.1".parse().unwrap()]);
        let mut b = Link::new(B, vec!["10.1.0.2".parse().unwrap()]);
        let other = "10.1.0.3".parse().unwrap();
        let question = a.request("10.1.0.1".parse().unwrap(), other).unwrap();
        assert!(b.handle(&question).is_none());
    }

    #[test]
    fn an_advertisement_nobody_asked_for_is_not_learned() {
        let mut a = Link::new(A, vec!["fd00::1".parse().unwrap()]);
        let mut b = Link::new(B, vec!["fd00::2".parse().unwrap()]);
        let mut c = Link::new(A, vec!["fd00::1".parse().unwrap()]);
        let (own, peer) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        let answer = b.handle(&a.request(own, peer).unwrap()).unwrap();
        assert!(c.handle(&answer).is_none());
        assert_eq!(c.neighbour(peer), None);
    }

    #[test]
    fn addresses_of_different_kinds_are_not_paired() {
        let link = Link::new(
            A,
            vec!["fe80::1".parse().unwrap(), "10.0.0.1".parse().unwrap()],
        );
        let peer = ["fd00::2".parse().unwrap(), "10.0.0.2".parse().unwrap()];
        assert_eq!(link.choose(&peer).unwrap().1, peer[1]);
        assert_eq!(link.choose(&peer[..1]), None);
    }

    proptest! {
        /// Any frame, and any damaged real one, is handled without a panic.
        #[test]
        fn damaged_frames_do_no_harm(
            noise in prop::collection::vec(any::<u8>(), 0..160),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            family in any::<bool>(),
        ) {
            let (own, peer): (IpAddr, IpAddr) = if family {
                ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap())
            } else {
                ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap())
            };
            let mut a = Link::new(A, vec![own]);
            let mut b = Link::new(B, vec![peer]);
            b.handle(&noise);
            let mut question = a.request(own, peer).unwrap();
            for (at, value) in flips {
                let at = at.index(question.len());
                question[at] ^= value;
            }
            if let Some(answer) = b.handle(&question) {
                prop_assert!(answer.len() < 100);
            }
        }
    }
}
