//! The client for asynchronous code, under whichever runtime.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;

use tokio::sync::oneshot;

use crate::arena::{Arena, Fetched, Tensor};
use crate::client::{Client, ClientError};
use crate::protocol::{Listed, Memory, Moved};
use crate::remote::{Part, RemoteTensor, Selection};
use crate::tensor::Metadata;

/// A connection to the agent whose requests are awaited.
///
/// A thread of its own speaks to the agent, one request after the other.
/// Dropping a future does not stop its request; dropping this does, and frees
/// everything. For several requests at a time, make several.
#[derive(Debug)]
pub struct AsyncClient {
    requests: mpsc::Sender<Request>,
    stream: UnixStream,
}

type Request = Box<dyn FnOnce(&mut Client) + Send>;

impl AsyncClient {
    /// Connects to the agent's socket.
    pub async fn connect(path: impl Into<PathBuf>) -> Result<Self, ClientError> {
        let path = path.into();
        let (requests, incoming) = mpsc::channel::<Request>();
        let (connected, answer) = oneshot::channel();
        let serve = move || {
            let mut client = match Client::connect(&path) {
                Ok(client) => client,
                Err(error) => return drop(connected.send(Err(error))),
            };
            let stream = client.stream().try_clone();
            let stream = stream.map_err(|source| ClientError::Connect { path, source });
            if connected.send(stream).is_ok() {
                incoming
                    .into_iter()
                    .for_each(|request| request(&mut client));
            }
        };
        std::thread::Builder::new()
            .name("genie-client".into())
            .spawn(serve)
            .map_err(|source| ClientError::Connect {
                path: PathBuf::new(),
                source,
            })?;
        let stream = answer.await.map_err(|_| ClientError::Lost(None))??;
        Ok(Self { requests, stream })
    }

    /// Runs any request on the connection's thread.
    pub async fn call<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, ClientError> {
        let (done, answer) = oneshot::channel();
        let request: Request = Box::new(move |client| {
            // Nobody waits any more if the future was dropped.
            let _ = done.send(request(client));
        });
        let lost = |_| ClientError::Lost(None);
        self.requests.send(request).map_err(|_| lost(()))?;
        answer.await.map_err(|_| lost(()))?
    }

    /// [`Client::arena`].
    pub async fn arena(&self, bytes: u64, memory: Memory) -> Result<Arena, ClientError> {
        self.call(move |client| client.arena(bytes, memory)).await
    }

    /// [`Client::put`]. The tensors are held until it ends.
    pub async fn put(
        &self,
        node: Option<&str>,
        prefix: &str,
        tensors: Vec<Tensor>,
        metadata: Option<Metadata>,
    ) -> Result<Moved, ClientError> {
        let (node, prefix) = (node.map(str::to_owned), prefix.to_owned());
        self.call(move |client| client.put(node.as_deref(), &prefix, &tensors, metadata))
            .await
    }

    /// [`Client::get`].
    pub async fn get(
        &self,
        node: Option<&str>,
        prefix: &str,
        memory: Memory,
    ) -> Result<Fetched, ClientError> {
        let (node, prefix) = (node.map(str::to_owned), prefix.to_owned());
        self.call(move |client| client.get(node.as_deref(), &prefix, memory))
            .await
    }

    /// [`Client::open`].
    pub async fn open(&self, node: Option<&str>, name: &str) -> Result<RemoteTensor, ClientError> {
        let (node, name) = (node.map(str::to_owned), name.to_owned());
        self.call(move |client| client.open(node.as_deref(), &name))
            .await
    }

    /// [`Client::fetch`].
    pub async fn fetch(
        &self,
        tensor: &RemoteTensor,
        part: Selection,
        memory: Memory,
    ) -> Result<Part, ClientError> {
        let tensor = tensor.clone();
        self.call(move |client| client.fetch(&tensor, part, memory))
            .await
    }

    /// [`Client::list`].
    pub async fn list(&self, node: Option<&str>) -> Result<Vec<Listed>, ClientError> {
        let node = node.map(str::to_owned);
        self.call(move |client| client.list(node.as_deref())).await
    }

    /// [`Client::remove`].
    pub async fn remove(&self, node: Option<&str>, name: &str) -> Result<u64, ClientError> {
        let (node, name) = (node.map(str::to_owned), name.to_owned());
        self.call(move |client| client.remove(node.as_deref(), &name))
            .await
    }
}

impl Drop for AsyncClient {
    fn drop(&mut self) {
        // Wakes the thread if it waits for an answer; the agent gives up what
        // is under way. Already shut if the agent is gone.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
