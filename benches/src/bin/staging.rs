//! Device memory over TCP, beside the copies and the wire alone, in one run.
//!
//! `cargo run --release -p genie-benches --bin staging -- --memory cuda:0`
//!
//! Two engines of this process over loopback. In turn: pinned copies to and
//! from the device, ranges from host to host, and ranges from device to device
//! through slots. Staging can be no faster than the slowest of the first three;
//! `of_slowest` is how near it comes. Besides, copies within the device: the
//! whole at once, and in pieces of a packet's length that come in another order
//! than they go; `gather_of_copy` compares these. In each round what was
//! staged and what was gathered is compared with what was sent. On `sim`
//! the figures say nothing about any device. Prints one JSON object.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use genie_dataplane::SessionId;
use genie_dataplane::endpoint::Endpoint;
use genie_dataplane::engine::Remote;
use genie_dataplane::memory::accelerator::{
    self, Accelerator, CopyOp, DeviceLease, DeviceRegion, MemoryKind, Piece, Pinned, Way,
};
use genie_dataplane::memory::{Lease, Region};
use genie_dataplane::stage::{Config, Place, Stage, Trace, ranges};
use genie_dataplane::tcp::{self, Role, Token};
use serde_json::json;
use tokio::sync::mpsc;

/// The payload of a jumbo packet, and whole vectors of 16 bytes.
const PIECE: usize = 8192;

#[derive(Debug, Parser)]
struct Options {
    /// Whose memory: cuda:N or sim.
    #[arg(long, default_value = "sim")]
    memory: MemoryKind,
    /// Size of the tensor in MiB.
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// Measurements of each kind, taken in turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a slot in KiB.
    #[arg(long, default_value_t = 2048)]
    slot_kib: usize,
    /// Slots for each direction.
    #[arg(long, default_value_t = 16)]
    slots: usize,
}

/// One end of the session.
struct End {
    endpoint: Endpoint,
    session: SessionId,
    stage: Arc<Stage>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(accelerator) = accelerator::open(options.memory)? else {
        bail!("host memory is not staged: name an accelerator");
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let report = runtime.block_on(measure(&options, &accelerator))?;
    println!("{report}");
    Ok(())
}

async fn measure(
    options: &Options,
    accelerator: &Arc<dyn Accelerator>,
) -> Result<serde_json::Value> {
    let config = Config {
        slot_bytes: options.slot_kib << 10,
        slots: options.slots,
    };
    let (a, b) = connect(accelerator, config).await?;
    let len = options.mib << 20;
    let (from, into) = (device(accelerator, len)?, device(accelerator, len)?);
    let (source, target) = (host(len)?, host(len)?);
    fill(&source);
    a.stage.upload(&source, &from).await?;
    let sent = source.crc32c(0..len);
    let check = async || {
        let arrived = b.stage.download(&into, &target).await?;
        ensure!(arrived == sent, "{arrived:08x} arrived, not {sent:08x}");
        Ok(())
    };
    let staged = (
        Place::Device(Arc::clone(&a.stage), from.clone()),
        Place::Device(Arc::clone(&b.stage), into.clone()),
    );
    let plain = (Place::Host(source.clone()), Place::Host(target.clone()));
    let mut times = [const { Vec::new() }; 6];
    for _ in 0..options.rounds {
        times[0].push(copy(accelerator, config, &from, Way::ToHost)?);
        times[1].push(copy(accelerator, config, &into, Way::ToDevice)?);
        times[2].push(carry(&a, &b, &plain, config.slot_bytes).await?);
        // The copy before it left other bytes there.
        times[3].push(carry(&a, &b, &staged, config.slot_bytes).await?);
        check().await?;
        times[4].push(gather(accelerator, &from, &into, len)?);
        copy(accelerator, config, &into, Way::ToDevice)?;
        times[5].push(gather(accelerator, &from, &into, PIECE)?);
        check().await?;
    }
    let [to_host, to_device, wire, staged, within, gathered] = times.map(|times| rate(len, times));
    let slowest = to_host.min(to_device).min(wire);
    let properties = accelerator.properties();
    Ok(json!({
        "memory": options.memory,
        "device": properties.name,
        "driver": properties.driver,
        "bytes": len,
        "slot_bytes": config.slot_bytes,
        "slots": config.slots,
        "to_host_gb_per_s": to_host,
        "to_device_gb_per_s": to_device,
        "wire_gb_per_s": wire,
        "staged_gb_per_s": staged,
        "of_slowest": staged / slowest,
        "device_copy_gb_per_s": within,
        "gather_gb_per_s": gathered,
        "gather_of_copy": gathered / within,
        "digest": format!("crc32c:{sent:08x}"),
    }))
}

async fn connect(accelerator: &Arc<dyn Accelerator>, config: Config) -> Result<(End, End)> {
    let start = || -> Result<_> {
        let (running, address) = tcp::spawn(tcp::Config::default())?;
        running.completions.spawn()?;
        let stage = Stage::start(Arc::clone(accelerator), config, Trace::default())?;
        Ok((running.endpoint, address, Arc::new(stage)))
    };
    let ((a, _, a_stage), (b, address, b_stage)) = (start()?, start()?);
    let ids = (a.new_session(1), b.new_session(2));
    let remote = |role, session| {
        Remote::Tcp(tcp::Remote {
            secrets: None,
            role,
            session,
            token: Token([7; 16]),
            streams: 2,
        })
    };
    let (dialled, accepted) = tokio::join!(
        a.open(ids.0, remote(Role::Dial(address), ids.1)),
        b.open(ids.1, remote(Role::Accept, ids.0)),
    );
    dialled.and(accepted).context("cannot open a session")?;
    let end = |endpoint, session, stage| End {
        endpoint,
        session,
        stage,
    };
    Ok((end(a, ids.0, a_stage), end(b, ids.1, b_stage)))
}

/// Moves all ranges, as many at a time as the ends take.
async fn carry(a: &End, b: &End, way: &(Place, Place), step: usize) -> Result<Duration> {
    let (from, into) = way;
    let began = Instant::now();
    let (grant, mut granted) = mpsc::unbounded_channel();
    let receive = async {
        let mut moving = Vec::new();
        for range in ranges(into.len(), step) {
            let (id, one) = into.slice(range)?.receive(&b.endpoint, b.session).await?;
            grant.send(id)?;
            moving.push(one);
        }
        for one in moving {
            one.await?;
        }
        anyhow::Ok(())
    };
    let send = async {
        let mut moving = Vec::new();
        for range in ranges(from.len(), step) {
            let id = granted
                .recv()
                .await
                .context("nothing is granted any more")?;
            let one = from.slice(range)?.send(&a.endpoint, a.session, id).await?;
            moving.push(one);
        }
        for one in moving {
            one.await?;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(receive, send)?;
    Ok(began.elapsed())
}

/// Copies all of a device's memory through as many pinned bytes as a stage has.
fn copy(
    accelerator: &Arc<dyn Accelerator>,
    config: Config,
    device: &DeviceLease,
    way: Way,
) -> Result<Duration> {
    let (region, _) = Region::allocate(config.slot_bytes * config.slots)?;
    let _pinned = Pinned::new(&region, accelerator)?;
    let slots = Lease::whole(region);
    let mut stream = accelerator.stream()?;
    let began = Instant::now();
    let mut last = 0;
    for (index, range) in ranges(device.len(), config.slot_bytes).enumerate() {
        let start = (index % config.slots * config.slot_bytes) as u64;
        let op = CopyOp {
            host: slots.slice(start..start + (range.end - range.start))?,
            device: device.slice(range)?,
            way,
        };
        last = stream.copy(vec![op])?;
    }
    while stream.completed()? < last {
        std::thread::yield_now();
    }
    Ok(began.elapsed())
}

/// Copies all of a device's memory to another place of it, in pieces; the
/// order of its bytes is the same in the end.
fn gather(
    accelerator: &Arc<dyn Accelerator>,
    from: &DeviceLease,
    into: &DeviceLease,
    step: usize,
) -> Result<Duration> {
    let mut stream = accelerator.stream()?;
    let mut order: Vec<_> = ranges(from.len(), step).collect();
    fastrand::Rng::with_seed(5).shuffle(&mut order);
    let piece = |range: std::ops::Range<u64>| {
        let from = from.slice(range.clone())?;
        let to = into.slice(range)?;
        anyhow::Ok(Piece { from, to })
    };
    let pieces = order.into_iter().map(piece).collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    let last = stream.gather(pieces)?;
    while stream.completed()? < last {
        std::thread::yield_now();
    }
    Ok(began.elapsed())
}

fn device(accelerator: &Arc<dyn Accelerator>, len: usize) -> Result<DeviceLease> {
    let region = DeviceRegion::allocate(accelerator, len)?;
    Ok(DeviceLease::new(region, 0, len as u64)?)
}

fn host(len: usize) -> Result<Lease> {
    let (region, _) = Region::allocate(len)?;
    Ok(Lease::new(region, 0, len as u64)?)
}

fn fill(lease: &Lease) {
    let mut random = fastrand::Rng::with_seed(11);
    let mut block = [0; 4096];
    for at in (0..lease.len()).step_by(block.len()) {
        random.fill(&mut block);
        lease.write_at(at, (&block[..]).into());
    }
}

/// Decimal gigabytes a second, of the median.
fn rate(len: usize, mut times: Vec<Duration>) -> f64 {
    times.sort();
    len as f64 / times[times.len() / 2].as_secs_f64() / 1e9
}
