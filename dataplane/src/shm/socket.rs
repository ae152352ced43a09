//! One connection between two engines, and the descriptors it passes.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::message::{LEN, Message};
use crate::tcp::Token;

/// What every engine's name begins with: a peer cannot send us to a socket
/// that belongs to another program.
const PREFIX: &str = "genie-shm-";

/// Hexadecimal digits after it.
const DIGITS: usize = 32;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// File systems that memory files belong to; see statfs(2).
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What came out of a socket.
#[derive(Debug)]
pub(crate) enum Received {
    /// A message, and the descriptor that came with it.
    Message(Message, Option<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// Nothing any more.
    Closed,
    /// Something that is no message.
    Garbage,
}

/// A name that nobody else has.
pub(crate) fn new_name() -> String {
    format!("{PREFIX}{:0width$x}", fastrand::u128(..), width = DIGITS)
}

/// Names this run of the host's kernel.
pub(crate) fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

fn address(name: &str) -> io::Result<SocketAddrUnix> {
    let digits = name.strip_prefix(PREFIX).unwrap_or_default();
    let is_ours = digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_ours {
        let reason = "the peer's socket has a name that no engine has";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    Ok(SocketAddrUnix::new_abstract_name(name.as_bytes())?)
}

fn new() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok(socket)
}

/// Listens under a name.
pub(crate) fn listen(name: &str) -> io::Result<OwnedFd> {
    let socket = new()?;
    rustix::net::bind(&socket, &address(name)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Accepts a connection.
pub(crate) fn accept(listener: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
}

/// Connects to a peer; says why it cannot be reached.
pub(crate) fn connect(name: &str) -> io::Result<OwnedFd> {
    let socket = new()?;
    rustix::net::connect(&socket, &address(name)?)?;
    Ok(socket)
}

/// Why the process at the other end may not see our memory, if it may not.
pub(crate) fn refuse_user(socket: &OwnedFd) -> Option<String> {
    let ours = rustix::process::geteuid();
    match rustix::net::sockopt::socket_peercred(socket) {
        Ok(peer) if peer.uid == ours => None,
        Ok(peer) => Some(format!(
            "the peer's agent belongs to user {}, this one to {}: regions are only passed within one user",
            peer.uid.as_raw(),
            ours.as_raw()
        )),
        Err(error) => Some(format!("the peer's user cannot be found out: {error}")),
    }
}

/// Sends a message; `false` if the socket is full.
pub(crate) fn send(
    socket: &OwnedFd,
    message: &Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|one| [one]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let bytes = message.encode();
    let sent = rustix::io::retry_on_intr(|| {
        let bytes = [IoSlice::new(&bytes)];
        rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)
    });
    match sent {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the next message.
pub(crate) fn receive(socket: &OwnedFd) -> rustix::io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // One byte more: a longer message must not look like one of ours.
    let mut bytes = [0; LEN + 1];
    let received = rustix::io::retry_on_intr(|| {
        let mut bytes = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(socket, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let received = match received {
        Ok(received) => received,
        Err(Errno::AGAIN) => return Ok(Received::Nothing),
        Err(error) => return Err(error),
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(match received.bytes {
        0 => Received::Closed,
        len => match Message::decode(&bytes[..len]) {
            Some(message) => Received::Message(message, descriptor),
            None => Received::Garbage,
        },
    })
}

/// A descriptor of the same file with which it can only be read.
pub(crate) fn read_only(file: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// The length of a memory file that cannot become shorter.
///
/// Anything else is refused: reading a stranger's file may block for ever.
pub(crate) fn check_memory(file: &OwnedFd) -> Result<u64, String> {
    let seals = rustix::fs::fcntl_get_seals(file)
        .map_err(|_| "the descriptor is not of a memory file".to_owned())?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err("the memory file can be cut off: it lacks the seal SHRINK".into());
    }
    let kind = rustix::fs::fstatfs(file).map_err(|error| error.to_string())?;
    if ![TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&(kind.f_type as u64)) {
        return Err("the descriptor is not of a memory file".into());
    }
    let status = rustix::fs::fstat(file).map_err(|error| error.to_string())?;
    u64::try_from(status.st_size).map_err(|_| "the memory file has no length".into())
}

/// A memory file that contains a token, to be passed for a try.
pub(crate) fn probe(token: &Token) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("genie-shm-probe", flags)?;
    rustix::io::pwrite(&file, &token.0, 0)?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    read_only(&file)
}

/// Whether a descriptor that was passed is such a file.
pub(crate) fn check_probe(file: Option<&OwnedFd>, token: &Token) -> Result<(), String> {
    let file = file.ok_or("no descriptor came with its greeting")?;
    check_memory(file)?;
    let mut bytes = [0; 16];
    let read = rustix::io::pread(file, &mut bytes, 0).map_err(|error| error.to_string())?;
    if read == bytes.len() && token.matches(&Token(bytes)) {
        Ok(())
    } else {
        Err("the memory it passed is not what it should be".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_engines_are_reached() {
        assert!(address(&new_name()).is_ok());
        for bad in [
            "",
            "docker",
            "genie-shm-",
            "genie-shm-zz",
            "/run/genie/agent.sock",
        ] {
            assert!(address(bad).is_err(), "{bad}");
        }
        let long = format!("{}0", new_name());
        assert!(address(&long).is_err());
        let nobody = connect(&new_name()).unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn only_sealed_memory_files_are_read() {
        let token = Token([5; 16]);
        let probe = probe(&token).unwrap();
        assert_eq!(check_probe(Some(&probe), &token), Ok(()));
        assert!(check_probe(Some(&probe), &Token([6; 16])).is_err());
        assert!(check_probe(None, &token).is_err());
        // It may be read and nothing else.
        assert!(rustix::io::pwrite(&probe, b"x", 0).is_err());
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(check_memory(&file).is_err());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let unsealed = rustix::fs::memfd_create("unsealed", flags).unwrap();
        assert!(check_memory(&unsealed).unwrap_err().contains("SHRINK"));
        let pipe = rustix::pipe::pipe().unwrap().0;
        assert!(check_memory(&pipe).is_err());
    }
}
