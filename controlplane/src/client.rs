//! The other end of the application socket, for programs in Rust.
//!
//! Blocking; one request at a time on a connection. Used by the `genie`
//! command. Tensor bytes go through an [`Arena`], never through the socket.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use genie_dataplane::memory::{Lease, Region, RegionError};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::application::{Answer, Ask, DESCRIPTOR_BYTE, Placed, TENSORS_PER_MESSAGE};
use crate::frame::{self, FrameError};
use crate::status::AgentStatus;
use crate::store::Listed;
use crate::tensor::{Metadata, TensorInfo};
use crate::transfer::Moved;

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No agent there.
    #[error(
        "no agent listens on {}: start one with 'genie agent', or name its socket with --socket",
        .0.display()
    )]
    NoAgent(PathBuf),
    /// The socket's permissions.
    #[error(
        "no permission to use {}: run as root, or as a member of the group that 'ls -l {}' shows",
        .0.display(), .0.display()
    )]
    Permission(PathBuf),
    /// Anything else about connecting.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The agent went away or was not understood.
    #[error("the agent: {0}; 'genie status' shows whether it still runs")]
    Frame(#[from] FrameError),
    /// The agent's answer has no place here.
    #[error("the agent answered something unexpected: is it of the same version as this program?")]
    Unexpected,
    /// No descriptor came where one should.
    #[error("the agent passed no memory")]
    NoDescriptor,
    /// The memory could not be mapped.
    #[error("cannot map the arena: {0}")]
    Map(#[from] RegionError),
    /// The agent says why.
    #[error("{0}")]
    Failed(String),
}

/// A connection to the local agent.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

/// Memory shared with the agent, from which tensors are put.
#[derive(Debug)]
pub struct Arena {
    region: Arc<Region>,
}

/// What a get brought.
#[derive(Debug)]
pub struct Fetched {
    /// The tensors; one after the other in `memory`, without gaps.
    pub tensors: Vec<TensorInfo>,
    /// Their prefix's metadata.
    pub metadata: Option<Metadata>,
    /// Their bytes, to be read; sealed against writing.
    pub memory: OwnedFd,
    /// How they moved.
    pub moved: Moved,
}

impl Client {
    /// Connects to the agent's socket.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let mut stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoAgent(path.to_owned())
            }
            io::ErrorKind::PermissionDenied => ClientError::Permission(path.to_owned()),
            _ => ClientError::Connect {
                path: path.to_owned(),
                source,
            },
        })?;
        frame::exchange_preamble_blocking(&mut stream)?;
        Ok(Self { stream })
    }

    /// Asks for memory of at least `bytes`; replaces the arena before.
    pub fn arena(&mut self, bytes: u64) -> Result<Arena, ClientError> {
        self.ask(&Ask::Arena { bytes })?;
        let Answer::Arena = self.recv()? else {
            return Err(ClientError::Unexpected);
        };
        let region = Region::from_memfd(self.recv_descriptor()?)?;
        self.ask(&Ask::Mapped)?;
        let Answer::Sealed = self.recv()? else {
            return Err(ClientError::Unexpected);
        };
        Ok(Arena { region })
    }

    /// Puts tensors that lie in the arena under `prefix`, on `node` or locally.
    pub fn put(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        tensors: Vec<Placed>,
        metadata: Option<Metadata>,
        progress: impl FnMut(u64, u64),
    ) -> Result<Moved, ClientError> {
        let (node, prefix) = (node.map(str::to_owned), prefix.to_owned());
        let count = tensors.len() as u64;
        self.ask(&Ask::Put {
            node,
            prefix,
            count,
            metadata,
        })?;
        for tensors in tensors.chunks(TENSORS_PER_MESSAGE) {
            self.ask(&Ask::Tensors(tensors.to_vec()))?;
        }
        match self.recv_after(progress)? {
            Answer::Moved(moved) => Ok(moved),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Fetches the tensors under `prefix`, from `node` or locally.
    pub fn get(
        &mut self,
        node: Option<&str>,
        prefix: &str,
        progress: impl FnMut(u64, u64),
    ) -> Result<Fetched, ClientError> {
        let (node, prefix) = (node.map(str::to_owned), prefix.to_owned());
        self.ask(&Ask::Get { node, prefix })?;
        let Answer::Found { count, metadata } = self.recv_after(progress)? else {
            return Err(ClientError::Unexpected);
        };
        let mut tensors = Vec::new();
        while (tensors.len() as u64) < count {
            match self.recv()? {
                Answer::Tensors(more) => tensors.extend(more),
                _ => return Err(ClientError::Unexpected),
            }
        }
        let Answer::Moved(moved) = self.recv()? else {
            return Err(ClientError::Unexpected);
        };
        let memory = self.recv_descriptor()?;
        Ok(Fetched {
            tensors,
            metadata,
            memory,
            moved,
        })
    }

    /// Lists the store of `node`, or the local one.
    pub fn list(&mut self, node: Option<&str>) -> Result<Vec<Listed>, ClientError> {
        self.ask(&Ask::List {
            node: node.map(str::to_owned),
        })?;
        let mut listed = Vec::new();
        loop {
            match self.recv()? {
                Answer::Listed { tensors, last } => {
                    listed.extend(tensors);
                    if last {
                        return Ok(listed);
                    }
                }
                _ => return Err(ClientError::Unexpected),
            }
        }
    }

    /// Removes a tensor, or all under a prefix; returns how many.
    pub fn remove(&mut self, node: Option<&str>, name: &str) -> Result<u64, ClientError> {
        self.ask(&Ask::Remove {
            node: node.map(str::to_owned),
            name: name.to_owned(),
        })?;
        match self.recv()? {
            Answer::Removed { tensors } => Ok(tensors),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The agent's picture of itself.
    pub fn status(&mut self) -> Result<AgentStatus, ClientError> {
        self.ask(&Ask::Status)?;
        match self.recv()? {
            Answer::Status(status) => Ok(*status),
            _ => Err(ClientError::Unexpected),
        }
    }

    fn ask(&mut self, ask: &Ask) -> Result<(), ClientError> {
        Ok(frame::write_blocking(&mut self.stream, ask)?)
    }

    fn recv(&mut self) -> Result<Answer, ClientError> {
        match frame::read_blocking(&mut self.stream, frame::BODY_MAX)? {
            Answer::Failed { message } => Err(ClientError::Failed(message)),
            answer => Ok(answer),
        }
    }

    /// The next answer that is not about progress.
    fn recv_after(&mut self, mut progress: impl FnMut(u64, u64)) -> Result<Answer, ClientError> {
        loop {
            match self.recv()? {
                Answer::Progress { done, total } => progress(done, total),
                answer => return Ok(answer),
            }
        }
    }

    fn recv_descriptor(&mut self) -> Result<OwnedFd, ClientError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(&self.stream, &mut bytes, &mut control, flags)
        })
        .map_err(|error| FrameError::Io(error.into()))?;
        if received.bytes == 0 {
            return Err(FrameError::Closed.into());
        }
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match descriptor {
            Some(descriptor) if byte == [DESCRIPTOR_BYTE] => Ok(descriptor),
            _ => Err(ClientError::NoDescriptor),
        }
    }
}

impl Arena {
    /// All of it.
    pub fn lease(&self) -> Lease {
        Lease::whole(Arc::clone(&self.region))
    }
}
