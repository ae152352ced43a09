//! Whole Ethernet frames of one interface, over an AF_PACKET socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvfrom, send,
    setsockopt, socket, sockopt,
};

/// Asks for enough that a burst waits in the kernel while this process does not run.
const SOCKET_BUFFER_BYTES: usize = 16 << 20;

/// `PACKET_OUTGOING` of `linux/if_packet.h`: what this host sends itself.
const OUTGOING: u8 = 4;

/// One interface. Needs `CAP_NET_RAW`.
#[derive(Debug)]
pub struct Interface {
    socket: OwnedFd,
    name: String,
    index: usize,
    /// The kernel's count of frames that came in, when this was opened.
    received_before: u64,
    received: u64,
    refused: u64,
}

impl Interface {
    /// Opens the interface of that name.
    pub fn open(name: &str) -> io::Result<Self> {
        let address = link_address(name)?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::EthAll;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, protocol)?;
        setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES)?;
        setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES)?;
        // The address says no protocol, and the kernel then keeps the socket's.
        bind(socket.as_raw_fd(), &address)?;
        Ok(Self {
            socket,
            received_before: kernel_count(name)?,
            name: name.into(),
            index: address.ifindex(),
            received: 0,
            refused: 0,
        })
    }

    /// Receives the next frame into `buffer`; `None` if there is none now.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), buffer) {
                // Until the socket was bound it heard every interface.
                Ok((len, Some(from))) if from.ifindex() == self.index => {
                    if from.pkttype() != OUTGOING {
                        self.received += 1;
                        return Ok(Some(len));
                    }
                }
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                // Said once after the interface went down and up again.
                Err(Errno::ENETDOWN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends a frame; one that the kernel has no room for is counted as refused.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        match send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
            Ok(_) => Ok(()),
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EMSGSIZE | Errno::ENETDOWN) => {
                self.refused += 1;
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Frames the kernel did not take.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Frames that came in and were never seen here: the socket's buffer was full.
    pub fn missed(&self) -> io::Result<u64> {
        let came = kernel_count(&self.name)?.saturating_sub(self.received_before);
        Ok(came.saturating_sub(self.received))
    }
}

impl AsFd for Interface {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn link_address(name: &str) -> io::Result<LinkAddr> {
    getifaddrs()?
        .filter(|interface| interface.interface_name == name)
        .find_map(|interface| interface.address?.as_link_addr().copied())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}")))
}

fn kernel_count(name: &str) -> io::Result<u64> {
    let path = format!("/sys/class/net/{name}/statistics/rx_packets");
    let text = std::fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
