//! The accelerators of this agent: which there are, and why not the others.
//!
//! Opened when the agent starts, each with a stage of its own. What cannot be
//! opened is refused with its reason wherever it is asked for, never replaced
//! by something else.

use std::sync::{Arc, OnceLock};

use genie_client::status::AcceleratorStatus;
use genie_dataplane::device::Device as _;
use genie_dataplane::dpdk::Port;
use genie_dataplane::memory::accelerator::{
    self, Accelerator, AcceleratorError, DeviceLease, DeviceRegion, Import, MemoryKind,
};
use genie_dataplane::stage::{Config, Stage, Trace};

/// All accelerators of this agent. Clones refer to the same ones.
#[derive(Clone, Debug, Default)]
pub struct Devices(Arc<Vec<Device>>);

#[derive(Debug)]
struct Device {
    kind: MemoryKind,
    /// What moves its tensors, or why it cannot be used.
    stage: Result<Arc<Stage>, String>,
    /// Why no network card reaches its memory, once a port was asked.
    refused: OnceLock<String>,
}

/// How much of a device's memory the steps of GPUDirect are tried with: whole
/// pages of any device's.
const TRIAL_BYTES: usize = 2 << 20;

/// Why tensors cannot be in a device's memory.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The agent was not asked to use it.
    #[error("this agent does not use {0}: start it with --accelerator {0}")]
    Unused(MemoryKind),
    /// It was, and cannot.
    #[error("{kind} cannot be used: {reason}")]
    Unusable {
        /// Which.
        kind: MemoryKind,
        /// Why.
        reason: String,
    },
    /// It failed.
    #[error(transparent)]
    Failed(#[from] AcceleratorError),
}

impl Devices {
    /// Opens what can be opened.
    pub fn open(kinds: &[MemoryKind]) -> Self {
        let one = |kind: &MemoryKind| {
            let stage = open(*kind);
            if let Err(reason) = &stage {
                tracing::warn!(%kind, reason, "the accelerator cannot be used");
            }
            Device {
                kind: *kind,
                stage,
                refused: OnceLock::new(),
            }
        };
        Self(Arc::new(kinds.iter().map(one).collect()))
    }

    /// What moves the tensors of a device.
    pub fn stage(&self, kind: MemoryKind) -> Result<&Arc<Stage>, DeviceError> {
        let device = self.0.iter().find(|device| device.kind == kind);
        let device = device.ok_or(DeviceError::Unused(kind))?;
        device
            .stage
            .as_ref()
            .map_err(|reason| DeviceError::Unusable {
                kind,
                reason: reason.clone(),
            })
    }

    /// Allocates on a device.
    pub fn allocate(
        &self,
        kind: MemoryKind,
        bytes: usize,
    ) -> Result<(Arc<Stage>, Arc<DeviceRegion>), DeviceError> {
        let stage = self.stage(kind)?;
        let region = DeviceRegion::allocate(stage.accelerator(), bytes)?;
        Ok((Arc::clone(stage), region))
    }

    /// Takes memory of another process on a device.
    pub fn import(
        &self,
        kind: MemoryKind,
        from: Import,
    ) -> Result<(Arc<Stage>, Arc<DeviceRegion>), DeviceError> {
        let stage = self.stage(kind)?;
        let region = DeviceRegion::import(stage.accelerator(), from)?;
        Ok((Arc::clone(stage), region))
    }

    /// Takes the steps of GPUDirect for every device with a port that carries
    /// nothing yet, and keeps why tensors are staged.
    ///
    /// To be called on the port's thread.
    pub fn try_direct(&self, port: &mut Port) {
        for device in self.0.iter() {
            let Ok(stage) = &device.stage else { continue };
            let reason = try_direct(stage.accelerator(), port);
            tracing::info!(kind = %device.kind, reason, "no GPUDirect: tensors are staged");
            // An agent has one port.
            let _ = device.refused.set(reason);
        }
    }

    /// Why tensors on a DPDK path are staged, a sentence for each device.
    pub fn reasons(&self) -> Vec<String> {
        let reason = |device: &Device| {
            let refused = device.refused.get()?;
            let kind = device.kind;
            Some(format!("{kind} is staged through host memory: {refused}"))
        };
        self.0.iter().filter_map(reason).collect()
    }

    /// The longest transfer in a session with this agent, where that is limited:
    /// by the shortest slot.
    pub fn range_bytes(&self) -> Option<u64> {
        let slots = self
            .0
            .iter()
            .filter_map(|device| device.stage.as_ref().ok());
        slots.map(|stage| stage.slot_bytes() as u64).min()
    }

    /// What `status` shows.
    pub fn status(&self) -> Vec<AcceleratorStatus> {
        let one = |device: &Device| {
            let Device { kind, stage, .. } = device;
            let usable = stage.as_ref().ok();
            let properties = stage.as_ref().map(|stage| stage.accelerator().properties());
            let slots = stage.as_ref().ok().map(|stage| stage.slot_memory());
            AcceleratorStatus {
                kind: *kind,
                slots_bytes: slots.map_or(0, |slots| slots.bytes as u64),
                slots_reason: slots.and_then(|slots| slots.reason.clone()),
                name: properties.ok().map(|properties| properties.name.clone()),
                driver: properties.ok().map(|properties| properties.driver.clone()),
                memory_bytes: properties.map_or(0, |properties| properties.memory_bytes),
                reason: match stage {
                    Ok(stage) => stage.broken().map(|error| {
                        format!(
                            "{error}: nothing can be done with it until the agent is started again"
                        )
                    }),
                    Err(reason) => Some(reason.clone()),
                },
                gpudirect: usable.map(|stage| device.why_staged(stage)),
            }
        };
        self.0.iter().map(one).collect()
    }
}

impl Device {
    fn why_staged(&self, stage: &Stage) -> String {
        let refused = self.refused.get().cloned();
        let supported = &stage.accelerator().properties().gpudirect;
        refused
            .or_else(|| supported.clone().err())
            .unwrap_or_else(|| "no DPDK port is open".to_owned())
    }
}

/// Why tensors of a device are staged on a path over `port`.
fn try_direct(accelerator: &Arc<dyn Accelerator>, port: &mut Port) -> String {
    let region = match DeviceRegion::allocate(accelerator, TRIAL_BYTES) {
        Ok(region) => region,
        Err(error) => return format!("no memory to try it with: {error}"),
    };
    let driver = port.capabilities().driver.clone();
    let lease = DeviceLease::whole(region);
    match port.try_direct(accelerator.direct(), lease) {
        Ok(()) => {
            format!("{driver} can do every step of it, but no engine receives into device memory")
        }
        Err(refused) => refused.to_string(),
    }
}

/// Both ends' limits together; a peer cannot make transfers so short that the
/// cost of each is all that is left.
pub fn agreed_range(ours: Option<u64>, theirs: Option<u64>) -> Option<u64> {
    const SHORTEST: u64 = 64 << 10;
    let limits = ours.into_iter().chain(theirs);
    limits.map(|limit| limit.max(SHORTEST)).min()
}

fn open(kind: MemoryKind) -> Result<Arc<Stage>, String> {
    let accelerator = accelerator::open(kind).map_err(|error| error.to_string())?;
    let accelerator = accelerator.ok_or("host memory is no accelerator")?;
    let stage = Stage::start(accelerator, Config::default(), Trace::default());
    stage.map(Arc::new).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_refused_with_its_reason() {
        let devices = Devices::open(&[MemoryKind::Sim, MemoryKind::Host]);
        assert!(devices.stage(MemoryKind::Sim).is_ok());
        let unused = devices.stage(MemoryKind::Cuda(3)).unwrap_err().to_string();
        assert_eq!(
            unused,
            "this agent does not use cuda:3: start it with --accelerator cuda:3"
        );
        let host = devices.stage(MemoryKind::Host).unwrap_err().to_string();
        assert_eq!(host, "host cannot be used: host memory is no accelerator");
        let status = devices.status();
        assert!(status[0].name.as_ref().unwrap().contains("simulated"));
        assert!(status[1].reason.is_some());
        // No port was asked: what the device says of itself.
        let staged = status[0].gpudirect.as_deref();
        assert_eq!(staged, Some("no network card reaches simulated memory"));
        assert_eq!(devices.reasons(), [""; 0]);
    }

    #[test]
    fn the_shorter_range_counts_and_none_is_too_short() {
        assert_eq!(agreed_range(None, None), None);
        assert_eq!(agreed_range(Some(1 << 21), None), Some(1 << 21));
        assert_eq!(agreed_range(Some(1 << 21), Some(1 << 20)), Some(1 << 20));
        assert_eq!(agreed_range(Some(1 << 21), Some(0)), Some(64 << 10));
    }
}
