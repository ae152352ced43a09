//! Device memory through engines: device → slot → wire → slot → device, on the
//! simulated accelerator, over kernel TCP and over the UDP engine's in-memory
//! device.

#[path = "../tcp/harness.rs"]
#[allow(dead_code)]
mod tcp;
#[path = "../udp/harness.rs"]
#[allow(dead_code)]
mod udp;

mod faults;
mod lossy;
mod transfers;

use std::sync::Arc;
use std::time::Duration;

use genie_dataplane::SessionId;
use genie_dataplane::endpoint::Endpoint;
use genie_dataplane::engine::Receipt;
use genie_dataplane::memory::accelerator::sim::{self, Sim};
use genie_dataplane::memory::accelerator::{Accelerator, DeviceLease, DeviceRegion};
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::stage::{self, Stage, StageError, Staged, Trace, ranges};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Small slots: many ranges without many bytes.
pub(crate) const SLOTS: stage::Config = stage::Config {
    slot_bytes: 64 << 10,
    slots: 4,
};

/// A device, its stage, and the end of a session.
pub(crate) struct End {
    pub(crate) sim: Arc<Sim>,
    pub(crate) stage: Stage,
    pub(crate) endpoint: Endpoint,
    pub(crate) session: SessionId,
}

impl End {
    pub(crate) fn new(config: sim::Config, endpoint: &Endpoint, session: SessionId) -> Self {
        let sim = Arc::new(Sim::new(config).unwrap());
        let stage = Stage::start(Arc::clone(&sim) as _, SLOTS, Trace::kept()).unwrap();
        Self {
            sim,
            stage,
            endpoint: endpoint.clone(),
            session,
        }
    }

    pub(crate) fn device(&self, len: usize) -> DeviceLease {
        let accelerator: Arc<dyn Accelerator> = Arc::clone(&self.sim) as _;
        let region = DeviceRegion::allocate(&accelerator, len).unwrap();
        DeviceLease::new(region, 0, len as u64).unwrap()
    }

    /// A tensor on the device.
    pub(crate) fn upload(&self, bytes: &[u8]) -> DeviceLease {
        let lease = self.device(bytes.len());
        block_on(self.stage.upload(&host(bytes), &lease)).unwrap();
        lease
    }

    pub(crate) fn download(&self, lease: &DeviceLease) -> Vec<u8> {
        let into = host(&vec![0; lease.len()]);
        block_on(self.stage.download(lease, &into)).unwrap();
        udp::contents(&into)
    }

    /// Asserts that nothing is under way: all slots of both ways can be had.
    pub(crate) fn assert_idle(&self) {
        let probe = self.device(SLOTS.slots * SLOTS.slot_bytes);
        let bytes = vec![1; probe.len()];
        let again = async {
            self.stage.upload(&host(&bytes), &probe).await?;
            self.stage.download(&probe, &host(&bytes)).await
        };
        let limited = block_on(async { tokio::time::timeout(PATIENCE, again).await });
        limited.expect("a slot was not given back").unwrap();
        // Nor was anything done in an order that a real device does not forgive.
        assert_eq!(self.sim.violations(), Vec::<String>::new());
    }
}

pub(crate) fn host(bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len().max(1), Backing::Shmem).unwrap();
    let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
    lease.write_at(0, bytes.into());
    lease
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    udp::block_on(future)
}

/// Moves a tensor in ranges, as many at once as there are slots; every range's
/// two answers, in order.
pub(crate) fn move_ranges(
    from: &End,
    to: &End,
    source: &DeviceLease,
    into: &DeviceLease,
) -> Vec<(Result<Receipt, StageError>, Result<Receipt, StageError>)> {
    let all: Vec<_> = ranges(source.len(), SLOTS.slot_bytes).collect();
    std::thread::scope(|scope| {
        let (grants, granted) = std::sync::mpsc::channel();
        let (all, cut) = (&all, |lease: &DeviceLease, range| {
            lease.slice(range).unwrap()
        });
        let receiving = scope.spawn(move || {
            let mut staged: Vec<Staged> = Vec::new();
            for range in all {
                let into = cut(into, range.clone());
                let received = to.stage.receive(&to.endpoint, to.session, into);
                let (id, received) = block_on(received).unwrap();
                grants.send(id).unwrap();
                staged.push(received);
            }
            drop(grants);
            staged.into_iter().map(Staged::wait).collect::<Vec<_>>()
        });
        let mut sent = Vec::new();
        for (range, id) in all.iter().zip(granted) {
            let source = cut(source, range.clone());
            let staged = from.stage.send(&from.endpoint, from.session, id, source);
            sent.push(block_on(staged));
        }
        let sent: Vec<_> = sent.into_iter().map(Staged::wait).collect();
        sent.into_iter().zip(receiving.join().unwrap()).collect()
    })
}
