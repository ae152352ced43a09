//! The TCP engine beside a bare loop over sockets, in the same run.
//!
//! `cargo run --release -p genie-benches --bin raw_tcp -- --streams 2`
//!
//! Both move the same bytes over loopback between threads of one process:
//! source and destination are `--mib` MiB, touched before, far larger than the
//! second-level cache. The bare loop writes and reads chunks of 256 KiB on
//! blocking sockets, one thread for each end of each connection, without a
//! checksum and with CRC32C at both ends. The engine does all that a transfer
//! does, on one thread for each end. Prints one JSON object; rates are decimal.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use genie_dataplane::engine::Remote;
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::tcp::{self, Role, Token};
use serde_json::json;

const CHUNK: usize = tcp::frame::CHUNK_MAX as usize;

#[derive(Debug, Parser)]
struct Options {
    /// TCP connections.
    #[arg(long, default_value_t = 2)]
    streams: u16,
    /// Size of the tensor in MiB.
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// Measurements of each kind, taken in turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tiny tensors of 100 bytes to move through the engine, too.
    #[arg(long, default_value_t = 10_000)]
    tiny: usize,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let bare = Bare::new(&options)?;
    let engine = Engine::new(&options)?;
    let (mut plain, mut checked, mut moved) = (Vec::new(), Vec::new(), Vec::new());
    let mut bare = bare;
    for _ in 0..options.rounds {
        plain.push(bare.round(false)?);
        checked.push(bare.round(true)?);
        moved.push(engine.round()?);
    }
    let tiny = engine.tiny(options.tiny)?;
    let bytes = (options.mib << 20) as f64;
    let rate = |times: &mut Vec<Duration>| {
        times.sort();
        bytes / times[times.len() / 2].as_secs_f64() / 1e9
    };
    let (plain, checked, moved) = (rate(&mut plain), rate(&mut checked), rate(&mut moved));
    println!(
        "{}",
        json!({
            "streams": options.streams,
            "mib": options.mib,
            "rounds": options.rounds,
            "bare_gb_per_s": plain,
            "bare_crc32c_gb_per_s": checked,
            "engine_gb_per_s": moved,
            "engine_of_bare_crc32c": moved / checked,
            "tiny_tensors": options.tiny,
            "tiny_seconds": tiny.as_secs_f64(),
        })
    );
    Ok(())
}

/// The bare loop: a piece of the tensor for each connection.
struct Bare {
    pieces: Vec<Piece>,
}

struct Piece {
    sender: TcpStream,
    receiver: TcpStream,
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Bare {
    fn new(options: &Options) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let len = (options.mib << 20) / usize::from(options.streams);
        let pieces = (0..options.streams).map(|seed| {
            let sender = TcpStream::connect(listener.local_addr()?)?;
            let (receiver, _) = listener.accept()?;
            sender.set_nodelay(true)?;
            // Ones, not zeros, so that every page is really there.
            Ok(Piece {
                sender,
                receiver,
                from: vec![seed as u8 + 1; len],
                into: vec![1; len],
            })
        });
        Ok(Self {
            pieces: pieces.collect::<Result<_>>()?,
        })
    }

    fn round(&mut self, checked: bool) -> Result<Duration> {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let mut ends = Vec::new();
            for piece in &mut self.pieces {
                let Piece {
                    sender,
                    receiver,
                    from,
                    into,
                } = piece;
                ends.push(scope.spawn(move || send(sender, from, checked)));
                ends.push(scope.spawn(move || receive(receiver, into, checked)));
            }
            ends.into_iter()
                .try_for_each(|end| end.join().expect("the loop does not panic"))
        })?;
        Ok(begin.elapsed())
    }
}

fn send(socket: &mut TcpStream, from: &[u8], checked: bool) -> Result<()> {
    for chunk in from.chunks(CHUNK) {
        let crc = if checked { crc32c::crc32c(chunk) } else { 0 };
        socket.write_all(&crc.to_ne_bytes())?;
        socket.write_all(chunk)?;
    }
    Ok(())
}

fn receive(socket: &mut TcpStream, into: &mut [u8], checked: bool) -> Result<()> {
    for chunk in into.chunks_mut(CHUNK) {
        let mut crc = [0; 4];
        socket.read_exact(&mut crc)?;
        socket.read_exact(chunk)?;
        if checked && crc32c::crc32c(chunk) != u32::from_ne_bytes(crc) {
            bail!("a chunk's checksum is wrong");
        }
    }
    Ok(())
}

/// Two engines with a session between them.
struct Engine {
    ends: [genie_dataplane::endpoint::Endpoint; 2],
    ids: [genie_dataplane::SessionId; 2],
    runtime: tokio::runtime::Runtime,
    from: Lease,
    into: Lease,
}

impl Engine {
    fn new(options: &Options) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let (a, _) = tcp::spawn(tcp::Config::default())?;
        let (b, address) = tcp::spawn(tcp::Config::default())?;
        a.completions.spawn()?;
        b.completions.spawn()?;
        let ends = [a.endpoint, b.endpoint];
        let ids = [ends[0].new_session(1), ends[1].new_session(2)];
        let remote = |role, session| {
            let token = Token([7; 16]);
            Remote::Tcp(tcp::Remote {
                role,
                session,
                token,
                streams: options.streams,
            })
        };
        let dialling = ends[0].open(ids[0], remote(Role::Dial(address), ids[1]));
        let accepting = ends[1].open(ids[1], remote(Role::Accept, ids[0]));
        let (dialled, accepted) = runtime.block_on(async { tokio::join!(dialling, accepting) });
        dialled.context("cannot open the session")?;
        accepted.context("cannot accept the session")?;
        let len = options.mib << 20;
        let region = |byte: u8| -> Result<Arc<Region>> {
            let region = Region::with_backing(len, Backing::Shmem)?;
            let lease = Lease::whole(Arc::clone(&region));
            let block = vec![byte; 1 << 20];
            for offset in (0..len).step_by(block.len()) {
                lease.write_at(offset, block[..].into());
            }
            Ok(region)
        };
        let (from, into) = (Lease::whole(region(1)?), Lease::whole(region(2)?));
        Ok(Self {
            ends,
            ids,
            runtime,
            from,
            into,
        })
    }

    fn round(&self) -> Result<Duration> {
        let begin = Instant::now();
        let [a, b] = &self.ends;
        self.runtime.block_on(async {
            let (id, received) = b.receive(self.ids[1], self.into.clone()).await?;
            let sent = a.send(self.ids[0], id, self.from.clone()).await?;
            let (sent, received) = tokio::join!(sent, received);
            if sent?.digest != received?.digest {
                bail!("the digests differ");
            }
            Ok(())
        })?;
        Ok(begin.elapsed())
    }

    /// Moves `count` tensors of 100 bytes, as many at once as the endpoint takes.
    fn tiny(&self, count: usize) -> Result<Duration> {
        const LEN: u64 = 100;
        const STRIDE: u64 = 128;
        // Half of the operations an endpoint may have outstanding.
        const AT_ONCE: usize = genie_dataplane::endpoint::OPERATIONS_MAX / 2;
        let begin = Instant::now();
        let [a, b] = &self.ends;
        self.runtime.block_on(async {
            let mut left = count;
            while left > 0 {
                let mut transfers = Vec::new();
                for at in 0..left.min(AT_ONCE) as u64 {
                    let range = at * STRIDE..at * STRIDE + LEN;
                    let (from, into) = (self.from.slice(range.clone())?, self.into.slice(range)?);
                    let (id, received) = b.receive(self.ids[1], into).await?;
                    transfers.push((a.send(self.ids[0], id, from).await?, received));
                }
                left -= transfers.len();
                for (sent, received) in transfers {
                    if sent.await?.digest != received.await?.digest {
                        bail!("the digests differ");
                    }
                }
            }
            Ok(())
        })?;
        Ok(begin.elapsed())
    }
}
