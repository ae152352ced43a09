//! Windows: memory elsewhere whose bytes can be written.

use crate::arena::Tensor;
use crate::client::{Client, ClientError};
use crate::protocol::{Answer, Ask, FailureKind, Memory, Owner};
use crate::tensor::TensorInfo;

/// A window: where it is and how long. Holds nothing there: somebody may remove
/// or seal it meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// On which node; none on this host's own agent.
    pub node: Option<String>,
    /// Its full name.
    pub name: String,
    /// Its length.
    pub len_bytes: u64,
    /// Who made it; none if that was this program just now.
    pub owner: Option<Owner>,
}

impl Client {
    /// Makes a window of `bytes` zeros in the store of `node`, or the local one.
    ///
    /// It stays until it is removed or sealed.
    pub fn create_window(
        &mut self,
        node: Option<&str>,
        name: &str,
        bytes: u64,
        memory: Memory,
    ) -> Result<Window, ClientError> {
        self.ask(&Ask::Window {
            node: node.map(str::to_owned),
            name: name.to_owned(),
            bytes,
            memory,
        })?;
        self.recv_done()?;
        Ok(Window {
            node: node.map(str::to_owned),
            name: name.to_owned(),
            len_bytes: bytes,
            owner: None,
        })
    }

    /// Makes a tensor's memory a window of the local agent's: peers and other
    /// programs of this user read and write it where it is.
    ///
    /// It stays until it is removed or this connection ends. The tensor's
    /// memory is then still written to by what was under way, and by nothing
    /// else: keep the tensor until then.
    pub fn register(&mut self, name: &str, tensor: &Tensor) -> Result<Window, ClientError> {
        if tensor.hold().connection != self.connection {
            return Err(ClientError::OtherConnection(tensor.info().name.clone()));
        }
        let (arena, offset) = tensor.position();
        let bytes = tensor.len_bytes();
        self.ask(&Ask::Register {
            name: name.to_owned(),
            arena,
            offset,
            bytes,
        })?;
        self.recv_done()?;
        Ok(Window {
            node: None,
            name: name.to_owned(),
            len_bytes: bytes,
            owner: None,
        })
    }

    /// The window of this full name, on `node` or locally.
    pub fn window(&mut self, node: Option<&str>, name: &str) -> Result<Window, ClientError> {
        let listed = self.list_under(node, Some(name))?;
        let mut windows = listed.into_iter().filter(|listed| listed.window);
        let found = windows.find(|listed| listed.name == name);
        let found = found.ok_or_else(|| ClientError::Failed {
            kind: FailureKind::NotFound,
            message: format!("no window is called {name:?}; 'genie ls' shows what there is"),
        })?;
        Ok(Window {
            node: node.map(str::to_owned),
            name: found.name,
            len_bytes: found.bytes,
            owner: Some(found.owner),
        })
    }

    /// Makes tensors of a window, each with its first byte there: `PREFIX/NAME`,
    /// where the prefix is the window's name. Nobody can change them any more.
    ///
    /// Fails as [`FailureKind::Busy`] while the window is used.
    pub fn seal(
        &mut self,
        window: &Window,
        tensors: Vec<(TensorInfo, u64)>,
    ) -> Result<(), ClientError> {
        self.ask(&Ask::Seal {
            node: window.node.clone(),
            name: window.name.clone(),
            tensors,
        })?;
        self.recv_done().map(drop)
    }

    /// Tells those who listen to `name` on `node` or locally; returns how many
    /// these are.
    pub fn notify(
        &mut self,
        node: Option<&str>,
        name: &str,
        message: &[u8],
    ) -> Result<u64, ClientError> {
        self.ask(&Ask::Notify {
            node: node.map(str::to_owned),
            name: name.to_owned(),
            message: message.to_owned(),
        })?;
        self.recv_done()
    }

    pub(crate) fn recv_done(&mut self) -> Result<u64, ClientError> {
        match self.recv()? {
            Answer::Done { listeners } => Ok(listeners),
            _ => Err(self.unexpected()),
        }
    }
}
