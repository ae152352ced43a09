//! The client for asynchronous code, under whichever runtime.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use tokio::sync::oneshot;

use crate::arena::{Arena, Fetched, Tensor};
use crate::batch::Batch;
use crate::client::{Client, ClientError, Writer};
use crate::protocol::{Listed, Memory, Moved};
use crate::remote::{Part, RemoteTensor, Selection};
use crate::tensor::Metadata;
use crate::window::Window;

/// A connection to the agent whose requests are awaited.
///
/// A thread of its own speaks to the agent, one request after the other.
/// Dropping a future cancels its request, at both ends; dropping this cancels
/// all, and frees everything. For several requests at a time, make several.
#[derive(Debug)]
pub struct AsyncClient {
    requests: mpsc::Sender<Request>,
    stream: UnixStream,
    writer: Writer,
    running: Arc<Mutex<Running>>,
}

/// Which call the thread is at.
#[derive(Debug, Default)]
struct Running {
    call: Option<u64>,
    next: u64,
}

/// A call that is awaited; cancelled when nobody does any more.
#[derive(Debug)]
struct Call<'a, T> {
    client: &'a AsyncClient,
    number: u64,
    answer: oneshot::Receiver<T>,
}

impl<T> Drop for Call<'_, T> {
    fn drop(&mut self) {
        // Not begun: the thread sees that nobody waits. It does not go on to
        // another call while this is looked at.
        self.answer.close();
        let running = lock(&self.client.running);
        if running.call == Some(self.number) {
            self.client.writer.stop_call();
        }
    }
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
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
            let parts = stream.map(|stream| (stream, client.canceller().0));
            if connected.send(parts).is_ok() {
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
        let (stream, writer) = answer.await.map_err(|_| ClientError::Lost(None))??;
        Ok(Self {
            requests,
            stream,
            writer,
            running: Arc::default(),
        })
    }

    /// Runs any request on the connection's thread.
    pub async fn call<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, ClientError> {
        let (done, answer) = oneshot::channel();
        let number = {
            let mut running = lock(&self.running);
            running.next += 1;
            running.next
        };
        let (running, writer) = (Arc::clone(&self.running), self.writer.clone());
        let request: Request = Box::new(move |client| {
            {
                let mut running = lock(&running);
                if done.is_closed() {
                    return;
                }
                running.call = Some(number);
                writer.begin_call();
            }
            let result = request(client);
            {
                let mut running = lock(&running);
                running.call = None;
                writer.begin_call();
            }
            // Nobody waits any more if the future was dropped.
            let _ = done.send(result);
        });
        let lost = |_| ClientError::Lost(None);
        self.requests.send(request).map_err(|_| lost(()))?;
        let mut call = Call {
            client: self,
            number,
            answer,
        };
        (&mut call.answer).await.map_err(|_| lost(()))?
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

    /// [`Client::create_window`].
    pub async fn create_window(
        &self,
        node: Option<&str>,
        name: &str,
        bytes: u64,
        memory: Memory,
    ) -> Result<Window, ClientError> {
        let (node, name) = (node.map(str::to_owned), name.to_owned());
        self.call(move |client| client.create_window(node.as_deref(), &name, bytes, memory))
            .await
    }

    /// [`Client::run`].
    pub async fn run(&self, batch: &Batch) -> Result<Moved, ClientError> {
        let batch = batch.clone();
        self.call(move |client| client.run(&batch)).await
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
