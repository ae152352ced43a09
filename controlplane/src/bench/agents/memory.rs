//! This end's blocks: in an arena on the host, or in an accelerator's memory.

use std::sync::Arc;

use genie_client::{Client, DeviceArena, Dtype, Memory, Tensor, TensorInfo};
use genie_dataplane::memory::accelerator::{
    self, Accelerator, CopyOp, DeviceLease, Pinned, Stream, Way,
};
use genie_dataplane::memory::{Lease, Region};

use crate::bench::BenchError;
use crate::bench::pool::{self, Layout, Pool};

/// Bytes that are copied to or from a device at a time.
const SLOT_BYTES: usize = 4 << 20;

/// Memory of one program, shared with its agent.
pub enum Blocks {
    /// In an arena.
    Host {
        /// All of it.
        tensor: Tensor,
        /// The same.
        pool: Pool,
    },
    /// On a device.
    Device(Box<Device>),
}

/// Memory of an accelerator's, and what copies into and out of it.
pub struct Device {
    arena: DeviceArena,
    tensor: Tensor,
    accelerator: Arc<dyn Accelerator>,
    // Ends its copies before the memory is unpinned.
    stream: Box<dyn Stream>,
    slot: Lease,
    _pinned: Pinned,
}

/// A tensor of this many bytes.
pub fn bytes(name: &str, len: u64) -> TensorInfo {
    TensorInfo {
        name: name.into(),
        dtype: Dtype::U8,
        shape: vec![len],
    }
}

impl Blocks {
    /// Takes memory of the agent's.
    pub fn new(client: &mut Client, len: u64, memory: Memory) -> Result<Self, BenchError> {
        if let Some(accelerator) = accelerator::open(memory.kind())? {
            let device = Device::new(client, accelerator, len)?;
            return Ok(Self::Device(Box::new(device)));
        }
        let tensor = client
            .arena(len, memory)?
            .tensor("blocks", Dtype::U8, &[len])?;
        let lease = tensor.lease().ok_or(BenchError::TooLarge(len))?;
        let pool = Pool::from(lease);
        Ok(Self::Host { tensor, pool })
    }

    /// All of it.
    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Host { tensor, .. } => tensor,
            Self::Device(device) => &device.tensor,
        }
    }

    /// What the memory is, as a row says it.
    pub fn kind(&self) -> String {
        match self {
            Self::Host { pool, .. } => pool.pages().into(),
            Self::Device(device) => device.accelerator.properties().kind.to_string(),
        }
    }

    /// What the device calls itself.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::Host { .. } => None,
            Self::Device(device) => Some(&device.accelerator.properties().name),
        }
    }

    /// Writes the row's pattern into all its buffers.
    pub fn fill(&mut self, layout: &Layout) -> Result<(), BenchError> {
        match self {
            Self::Host { pool, .. } => {
                pool.fill(layout);
                Ok(())
            }
            Self::Device(device) => device.fill(layout),
        }
    }

    /// Compares what was moved of a row with its pattern, as [`Pool::check`] does.
    pub fn check(
        &mut self,
        layout: &Layout,
        blocks: u64,
        bytes_max: u64,
    ) -> Result<u64, BenchError> {
        match self {
            Self::Host { pool, .. } => pool.check(layout, blocks, bytes_max),
            Self::Device(device) => device.check(layout, blocks, bytes_max),
        }
    }
}

impl Device {
    fn new(
        client: &mut Client,
        accelerator: Arc<dyn Accelerator>,
        len: u64,
    ) -> Result<Self, BenchError> {
        let arena = client.device_arena(&accelerator, len)?;
        let tensor = arena.tensor(bytes("blocks", len), 0)?;
        let (region, _) = Region::allocate(SLOT_BYTES)?;
        let pinned = Pinned::new(&region, &accelerator)?;
        Ok(Self {
            stream: accelerator.stream()?,
            arena,
            tensor,
            accelerator,
            slot: Lease::whole(region),
            _pinned: pinned,
        })
    }

    fn fill(&mut self, layout: &Layout) -> Result<(), BenchError> {
        let end = layout.bytes().min(self.tensor.len_bytes());
        for start in (0..end).step_by(SLOT_BYTES) {
            let slot = self.slot_of(end - start);
            pool::fill(&slot, layout.salt, start);
            self.copy(slot, start, Way::ToDevice)?;
        }
        Ok(())
    }

    fn check(&mut self, layout: &Layout, blocks: u64, bytes_max: u64) -> Result<u64, BenchError> {
        let mut checked = 0;
        for block in layout.checked(blocks, bytes_max).into_iter().flatten() {
            let first = layout.offset(block);
            for start in (0..layout.block_size).step_by(SLOT_BYTES) {
                let (at, slot) = (first + start, self.slot_of(layout.block_size - start));
                self.copy(slot.clone(), at, Way::ToHost)?;
                if !pool::is_pattern(&slot, layout.salt, at) {
                    return Err(BenchError::Inconsistent { block });
                }
            }
            checked += 1;
        }
        Ok(checked)
    }

    fn slot_of(&self, left: u64) -> Lease {
        let len = left.min(SLOT_BYTES as u64);
        self.slot.slice(0..len).expect("no longer than the slot")
    }

    fn copy(&mut self, host: Lease, at: u64, way: Way) -> Result<(), BenchError> {
        let end = at + host.len() as u64;
        let device: DeviceLease =
            (self.arena.lease().slice(at..end)).map_err(|_| BenchError::TooLarge(end))?;
        let copy = self.stream.copy(vec![CopyOp { host, device, way }])?;
        while self.stream.completed()? < copy {
            std::thread::yield_now();
        }
        Ok(())
    }
}
