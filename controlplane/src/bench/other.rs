//! The other end of a benchmark, started or reached.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use genie_dataplane::device::pair::PairDevice;

use super::BenchError;
use super::channel::Channel;
use super::message::Request;
use super::peer::Peer;

/// The other end, for as long as it is needed.
#[derive(Debug)]
pub struct Other {
    /// The connection to it.
    pub channel: Channel,
    /// Gives it its end of the devices joined in memory, where it is a thread.
    pub pairs: Option<Sender<PairDevice>>,
    child: Option<Child>,
    thread: Option<JoinHandle<()>>,
    /// Where a pair's socket is, where both processes are on this host.
    pub folder: Option<tempfile::TempDir>,
}

impl Other {
    fn new(channel: Channel) -> Self {
        Self {
            channel,
            pairs: None,
            child: None,
            thread: None,
            folder: None,
        }
    }

    /// A process that serves at `address`.
    pub fn reach(address: std::net::SocketAddr) -> Result<Self, BenchError> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5));
        let channel = stream.and_then(Channel::new).map_err(BenchError::Channel)?;
        Ok(Self::new(channel))
    }

    /// A thread of this process.
    pub fn thread() -> Result<Self, BenchError> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(BenchError::Channel)?;
        let address = listener.local_addr().map_err(BenchError::Channel)?;
        let (pairs, theirs) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            if let Ok(peer) = Peer::new(stream, None, Some(theirs)) {
                // The measuring thread notices that the connection ends.
                let _ = peer.run();
            }
        });
        let mut other = Self::reach(address)?;
        (other.pairs, other.thread) = (Some(pairs), Some(thread));
        Ok(other)
    }

    /// A process started here; ends with this.
    pub fn spawn() -> Result<Self, BenchError> {
        let binary = std::env::current_exe().map_err(BenchError::Channel)?;
        let mut child = Command::new(binary)
            .args(["bench", "--serve", "127.0.0.1:0", "--once"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(BenchError::Channel)?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout)
                .read_line(&mut line)
                .map_err(BenchError::Channel)?;
        }
        let address = line
            .trim()
            .rsplit(' ')
            .next()
            .and_then(|address| address.parse().ok());
        let folder = tempfile::tempdir().map_err(BenchError::Channel)?;
        let reached = address.ok_or(BenchError::PeerGone).and_then(Self::reach);
        match reached {
            Ok(mut other) => {
                (other.child, other.folder) = (Some(child), Some(folder));
                Ok(other)
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // Whether it hears this or sees the connection end, it ends.
        let _ = self.channel.send(&Request::Bye);
        let _ = rustix::net::shutdown(&self.channel, rustix::net::Shutdown::Both);
        if let Some(mut child) = self.child.take() {
            for _ in 0..200 {
                if matches!(child.try_wait(), Ok(Some(_))) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
