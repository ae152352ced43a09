//! A port of the driver library as a [`Device`].

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use arrayvec::ArrayVec;
use genie_dpdk_abi as abi;

use super::library::Library;
use super::open::{OpenError, Opened, Options, SPARE_MBUFS};
use super::pair::Claim;
use super::spec::DeviceSpec;
use crate::device::attachments::Attachments;
use crate::device::kept::Kept;
use crate::device::registrations::Registrations;
use crate::device::{
    AttachError, Attachment, BURST_MAX, Capabilities, Counters, Device, FrameId, TxFrame,
};
use crate::ledger::Copies;
use crate::memory::{Lease, Region, View};

/// An attachment handle that the library never gives: for a lease of no bytes,
/// and for a frame whose payload is not attached.
const NO_HANDLE: u32 = u32::MAX;

/// Received frames that may be kept: most of the packet buffers beyond those that
/// the rings hold, so that the receive ring is never short of any.
const KEEPABLE: u32 = SPARE_MBUFS / 4 * 3;

/// One queue pair of an open port.
///
/// May only be used from the thread that opened it, or that it was given to
/// with [`Queue::enter`]: DPDK then knows that thread.
#[derive(Debug)]
pub struct Port {
    pub(super) library: Library,
    pub(super) raw: NonNull<abi::Port>,
    pub(super) info: abi::PortInfo,
    /// The arguments it was opened with.
    pub(super) arguments: String,
    capabilities: Capabilities,
    /// Beside each lease: the library's handle.
    attachments: Attachments<u32>,
    /// Regions mapped for the device's DMA.
    registrations: Registrations,
    /// Room for a burst, so that an idle poll need not clear any.
    pub(super) received: Box<[MaybeUninit<abi::RxFrame>; BURST_MAX]>,
    /// Packet buffers that somebody reads, and some that are to be freed, so
    /// that the library is called for many at a time.
    kept: Kept<abi::RxFrame>,
    given_back: ArrayVec<abi::RxFrame, BURST_MAX>,
    pub(super) unusable_frames: u64,
    /// Whether other queues of the port are somebody else's.
    shares_port: bool,
    /// Kept until the last queue is closed.
    _claim: Option<Arc<Claim>>,
}

/// One queue pair of an open port, which no thread uses yet.
#[derive(Debug)]
pub struct Queue(Port);

// SAFETY: the library takes calls for a handle from any thread, one at a time;
// whoever has the `Queue` is the only one who can make them, and burst functions
// are called only after `enter`, from then on by one thread.
unsafe impl Send for Queue {}

impl Queue {
    /// Makes it the calling thread's.
    pub fn enter(self) -> Result<Port, OpenError> {
        super::open::register_thread(self.0.library)?;
        Ok(self.0)
    }

    /// What the port can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }
}

/// Loads the library, brings DPDK up if this is the first port, and opens the
/// device with as many queues as `options` say; one for each thread.
pub fn open_queues(spec: &DeviceSpec, options: &Options) -> Result<Vec<Queue>, OpenError> {
    let Opened {
        library,
        queues,
        claim,
    } = super::open::open(spec, options)?;
    let claim = claim.map(Arc::new);
    let several = queues.len() > 1;
    let queue = |raw| {
        let mut port = Port::new(library, raw, claim.clone(), spec.to_string());
        port.shares_port = several;
        Queue(port)
    };
    Ok(queues.into_iter().map(queue).collect())
}

impl Port {
    /// Loads the library, brings DPDK up if this is the first port, and opens
    /// the device. To be called on the thread that will use the port.
    pub fn open(spec: &DeviceSpec, options: &Options) -> Result<Self, OpenError> {
        let one = Options {
            queues: 1,
            ..options.clone()
        };
        let mut queues = open_queues(spec, &one)?;
        let Queue(port) = queues.pop().expect("as many as were asked for");
        Ok(port)
    }

    fn new(
        library: Library,
        raw: NonNull<abi::Port>,
        claim: Option<Arc<Claim>>,
        arguments: String,
    ) -> Self {
        let api = library.api();
        let mut info = MaybeUninit::<abi::PortInfo>::uninit();
        // SAFETY: an open port; `info` is written.
        unsafe { (api.port_info)(raw.as_ptr(), info.as_mut_ptr()) };
        // SAFETY: written by the call above, which cannot fail on an open port.
        let info = unsafe { info.assume_init() };
        let capabilities = Capabilities {
            driver: info.driver_name().into(),
            mac: info.mac,
            mtu: info.mtu,
            tx_external: info.has(abi::CAP_TX_EXTERNAL),
            // The port may be able to, but a `TxFrame` cannot ask for it.
            tx_udp_checksum: false,
            rx_interrupt: info.has(abi::CAP_RX_INTERRUPT),
            driver_copies_tx: info.has(abi::CAP_DRIVER_COPIES_TX),
            driver_copies_rx: info.has(abi::CAP_DRIVER_COPIES_RX),
            rx_descriptors: info.rx_descriptors,
            tx_descriptors: info.tx_descriptors,
        };
        Self {
            library,
            raw,
            info,
            arguments,
            capabilities,
            attachments: Attachments::new(),
            registrations: Registrations::default(),
            received: Box::new([const { MaybeUninit::uninit() }; BURST_MAX]),
            kept: Kept::new(KEEPABLE),
            given_back: ArrayVec::new(),
            unusable_frames: 0,
            shares_port: false,
            _claim: claim,
        }
    }

    /// What the library says of the port, beyond [`Device::capabilities`].
    pub fn info(&self) -> &abi::PortInfo {
        &self.info
    }

    /// The port's own counters and the library's.
    pub fn stats(&self) -> abi::PortStats {
        let mut stats = abi::PortStats::default();
        // SAFETY: an open port; `stats` is written.
        unsafe { (self.library.api().port_stats)(self.raw.as_ptr(), &mut stats) };
        stats
    }

    /// Packet buffers that refer to attached memory.
    pub fn in_flight(&mut self, attachment: Attachment) -> u32 {
        let Some(handle) = self.attachments.beside_mut(attachment) else {
            return 0;
        };
        // SAFETY: an open port; any handle may be asked about.
        let references = unsafe { (self.library.api().ext_refs)(self.raw.as_ptr(), *handle) };
        // One is the attachment's own.
        references.saturating_sub(1)
    }

    fn describe(&self, frame: &TxFrame) -> abi::TxFrame {
        let mut described = abi::TxFrame {
            head: frame.head.as_ptr(),
            payload: std::ptr::null(),
            head_len: frame.head.len() as u32,
            payload_len: 0,
            attachment: NO_HANDLE,
            reserved: 0,
        };
        if let Some(payload) = frame.payload {
            // What is not attached stays NO_HANDLE: the library takes such a
            // frame, drops it and counts it.
            described.payload_len = payload.len;
            if let Some((bytes, handle)) = self.attachments.resolve(payload) {
                described.payload = bytes.as_ptr();
                described.attachment = *handle;
            }
        }
        described
    }

    /// Maps the lease's region for DMA where the device needs that.
    fn register(&mut self, lease: &Lease) -> Result<(), AttachError> {
        if !self.info.has(abi::CAP_NEEDS_REGISTRATION) {
            return Ok(());
        }
        let (library, port) = (self.library, self.raw.as_ptr());
        self.registrations.register(lease.region(), |region| {
            let (base, len) = (region.as_ptr(), region.len() as u64);
            let page_bytes = region.backing().page_bytes() as u64;
            let mut text = abi::Text::EMPTY;
            // SAFETY: the region is mapped until `registrations` gives it up,
            // whole pages by its own invariant; the port is open.
            let status =
                unsafe { (library.api().mem_register)(port, base, len, page_bytes, &mut text) };
            if status == abi::STATUS_OK {
                Ok(())
            } else {
                Err(AttachError::Unreachable(text.as_str().into()))
            }
        })
    }

    /// A burst of frames, if there are any.
    pub(super) fn receive(&mut self) -> Option<Burst> {
        let first = self.received.as_mut_ptr().cast::<abi::RxFrame>();
        // SAFETY: an open port on its thread; room for a burst.
        let count =
            unsafe { (self.library.api().rx_burst)(self.raw.as_ptr(), first, BURST_MAX as u32) };
        (count > 0).then_some(Burst {
            library: self.library,
            raw: self.raw,
            first,
            count,
        })
    }

    fn free_given_back(&mut self) {
        let (first, count) = (self.given_back.as_ptr(), self.given_back.len() as u32);
        if count > 0 {
            // SAFETY: received from this port on this thread and not freed before.
            unsafe { (self.library.api().rx_free)(self.raw.as_ptr(), first, count) };
            self.given_back.clear();
        }
    }

    fn unmap(&self, region: Arc<Region>) {
        let mut text = abi::Text::EMPTY;
        let (base, len) = (region.as_ptr(), region.len() as u64);
        // SAFETY: registered with these values; no frame refers to it.
        let status =
            unsafe { (self.library.api().mem_unregister)(self.raw.as_ptr(), base, len, &mut text) };
        if status != abi::STATUS_OK {
            // The device may still reach it.
            tracing::error!(
                reason = text.as_str(),
                "memory stays mapped for DMA and is kept"
            );
            std::mem::forget(region);
        }
    }
}

impl Device for Port {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        let Some(burst) = self.receive() else {
            return 0;
        };
        for frame in burst.frames() {
            if frame.data_len != frame.frame_len {
                self.unusable_frames += 1;
                continue;
            }
            // SAFETY: the packet buffer is ours until `burst` is dropped, and
            // the view cannot outlive this call.
            on_frame(unsafe { View::from_raw(frame.data, frame.data_len as usize) });
        }
        burst.count as usize
    }

    fn keepable(&self) -> u32 {
        self.kept.most()
    }

    fn rx_burst_keeping(
        &mut self,
        on_frame: &mut dyn FnMut(View<'_>, Option<FrameId>) -> bool,
    ) -> usize {
        self.free_given_back();
        let Some(mut burst) = self.receive() else {
            return 0;
        };
        for frame in burst.frames_mut() {
            if frame.data_len != frame.frame_len {
                self.unusable_frames += 1;
                continue;
            }
            // SAFETY: as in `rx_burst`; one that is kept stays ours.
            let view = unsafe { View::from_raw(frame.data, frame.data_len as usize) };
            if on_frame(view, self.kept.next()) {
                self.kept.keep(*frame);
                frame.mbuf = std::ptr::null_mut();
            }
        }
        burst.count as usize
    }

    fn kept(&self, frame: FrameId) -> View<'_> {
        let Some(frame) = self.kept.get(frame) else {
            return View::default();
        };
        // SAFETY: the packet buffer is ours until it is given back, for which
        // the port must be borrowed anew.
        unsafe { View::from_raw(frame.data, frame.data_len as usize) }
    }

    fn give_back(&mut self, frame: FrameId) {
        let Some(frame) = self.kept.take(frame) else {
            return;
        };
        self.given_back.push(frame);
        if self.given_back.is_full() {
            self.free_given_back();
        }
    }

    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        let mut taken = 0;
        for frames in frames.chunks(BURST_MAX) {
            let described: ArrayVec<abi::TxFrame, BURST_MAX> =
                frames.iter().map(|frame| self.describe(frame)).collect();
            let count = described.len() as u32;
            // SAFETY: an open port on its thread; heads live through the call,
            // attached memory is leased until it is detached.
            let some = unsafe {
                (self.library.api().tx_burst)(self.raw.as_ptr(), described.as_ptr(), count)
            };
            taken += some as usize;
            if some < count {
                break;
            }
        }
        taken
    }

    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        if lease.is_empty() {
            return self.attachments.insert(lease, NO_HANDLE);
        }
        self.register(&lease)?;
        let mut text = abi::Text::EMPTY;
        let (base, len) = (lease.as_ptr(), lease.len() as u64);
        // SAFETY: an open port; the lease is kept until the handle is given back.
        let status =
            unsafe { (self.library.api().ext_attach)(self.raw.as_ptr(), base, len, &mut text) };
        let Ok(handle) = u32::try_from(status) else {
            return Err(AttachError::Full);
        };
        self.attachments.insert(lease, handle).inspect_err(|_| {
            // SAFETY: given above; no frame refers to it.
            unsafe { (self.library.api().ext_detach)(self.raw.as_ptr(), handle) };
        })
    }

    fn detach(&mut self, attachment: Attachment) -> bool {
        let Some(handle) = self.attachments.beside_mut(attachment).copied() else {
            return true;
        };
        if handle != NO_HANDLE {
            // SAFETY: an open port; the handle is one that it gave.
            let status = unsafe { (self.library.api().ext_detach)(self.raw.as_ptr(), handle) };
            if status != abi::STATUS_OK {
                return false;
            }
        }
        self.attachments.remove(attachment);
        true
    }

    fn reap(&mut self) {
        // SAFETY: an open port on its thread.
        unsafe { (self.library.api().tx_reap)(self.raw.as_ptr()) };
    }

    fn sweep(&mut self) {
        let mut registrations = std::mem::take(&mut self.registrations);
        registrations.sweep(|region| self.unmap(region));
        self.registrations = registrations;
    }

    fn stop(&mut self) {
        // SAFETY: an open port, not in a burst function.
        unsafe { (self.library.api().port_stop)(self.raw.as_ptr()) };
    }

    fn is_stopped(&self) -> bool {
        // SAFETY: an open port.
        unsafe { (self.library.api().port_stopped)(self.raw.as_ptr()) == 1 }
    }

    fn counters(&self) -> Counters {
        let stats = self.stats();
        Counters {
            rx_frames: stats.rx_frames,
            rx_bytes: stats.rx_bytes,
            rx_missed: stats.rx_missed + stats.rx_errors + self.unusable_frames,
            tx_frames: stats.tx_frames,
            tx_bytes: stats.tx_bytes,
            tx_errors: stats.tx_errors,
            registrations: self.registrations.made(),
            registered: self.registrations.len() as u64,
        }
    }

    fn cautions(&self) -> Vec<String> {
        cautions(&self.info)
    }

    fn lacks(&self) -> Vec<String> {
        let mut lacks = lacks(self.info.caps);
        if self.shares_port && !self.info.has(abi::CAP_RX_SORTS) {
            lacks.push("sorting by UDP port: engines pass frames on".into());
        }
        lacks
    }

    fn copies(&self) -> Copies {
        let stats = self.stats();
        let sent = if self.capabilities.driver_copies_tx {
            stats.tx_bytes
        } else {
            0
        };
        let received = if self.capabilities.driver_copies_rx {
            stats.rx_bytes
        } else {
            0
        };
        Copies {
            genie: stats.tx_copied_bytes,
            driver: sent + received,
            ..Copies::default()
        }
    }

    fn link_up(&self) -> bool {
        // SAFETY: an open port.
        unsafe { (self.library.api().port_link)(self.raw.as_ptr()) == 1 }
    }

    fn rx_event(&self) -> Option<BorrowedFd<'_>> {
        if !self.capabilities.rx_interrupt {
            return None;
        }
        // SAFETY: an open port.
        let fd = unsafe { (self.library.api().rx_wait_fd)(self.raw.as_ptr()) };
        // SAFETY: the port's own and open until the port is closed, which takes
        // it by value.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn arm_rx(&mut self, on: bool) -> bool {
        if !self.capabilities.rx_interrupt {
            return false;
        }
        // SAFETY: an open port, not in a burst function.
        let status = unsafe { (self.library.api().rx_interrupt)(self.raw.as_ptr(), u32::from(on)) };
        on && status == abi::STATUS_OK
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if !self.shares_port {
            self.stop();
        }
        for frame in 0..self.kept.most() {
            self.give_back(FrameId(frame));
        }
        self.free_given_back();
        for region in self.registrations.take() {
            self.unmap(region);
        }
        // SAFETY: the handle is not used again.
        let missing = unsafe { (self.library.api().port_close)(self.raw.as_ptr()) };
        if missing != 0 {
            tracing::error!(
                missing,
                "packet buffers did not come back; their memory is kept"
            );
            // One of them may refer to it.
            std::mem::forget(std::mem::take(&mut self.attachments));
        }
    }
}

/// What its driver does that a service may not want; docs/devices.md.
fn cautions(info: &abi::PortInfo) -> Vec<String> {
    let driver = info.driver_name();
    let mut cautions = Vec::new();
    if info.has(abi::CAP_FRAGILE) {
        cautions.push(format!(
            "{driver}: the death of the peer may crash this agent, and frames of several \
             descriptors are lost or mixed up where its ring is full: for benchmarks, not for a \
             service"
        ));
    }
    if !info.has(abi::CAP_SURVIVES_PEER) {
        cautions.push(format!(
            "{driver}: when the peer's process has died, this agent must be started again too"
        ));
    }
    if !info.has(abi::CAP_TX_MULTI_SEG) {
        cautions.push(format!(
            "{driver}: frames have one segment, so payloads are copied into packet buffers"
        ));
    }
    cautions
}

/// Capabilities that a good NIC has, and what it means where one is missing.
const WANTED: [(u64, &str); 6] = [
    (abi::CAP_TX_UDP_CHECKSUM, "UDP checksums on transmission"),
    (abi::CAP_RX_UDP_CHECKSUM, "UDP checksums on reception"),
    (abi::CAP_TX_MULTI_SEG, "frames of several segments"),
    (abi::CAP_TX_EXTERNAL, "sending from memory of programs"),
    (abi::CAP_RX_INTERRUPT, "receive interrupts"),
    (abi::CAP_RX_BUFFER_SPLIT, "splitting headers from payloads"),
];

fn lacks(caps: u64) -> Vec<String> {
    let missing = WANTED.iter().filter(|(bit, _)| caps & bit == 0);
    missing.map(|(_, what)| (*what).to_owned()).collect()
}

/// Received frames, given back on drop, also when `on_frame` panics.
pub(super) struct Burst {
    pub(super) library: Library,
    pub(super) raw: NonNull<abi::Port>,
    pub(super) first: *mut abi::RxFrame,
    pub(super) count: u32,
}

impl Burst {
    pub(super) fn frames(&self) -> &[abi::RxFrame] {
        // SAFETY: `rx_burst` wrote that many at `first`, in a box of the port's.
        unsafe { std::slice::from_raw_parts(self.first, self.count as usize) }
    }
}

impl Burst {
    fn frames_mut(&mut self) -> &mut [abi::RxFrame] {
        // SAFETY: as above; the box is not looked at by anybody else meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.count as usize) }
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        // SAFETY: received from this port on this thread and not freed before.
        unsafe { (self.library.api().rx_free)(self.raw.as_ptr(), self.first, self.count) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(caps: u64) -> abi::PortInfo {
        let mut driver = [0; 32];
        driver[..8].copy_from_slice(b"net_some");
        abi::PortInfo {
            driver,
            mac: [2; 6],
            mtu: 1500,
            max_frame: 1514,
            rx_descriptors: 1,
            tx_descriptors: 1,
            mbufs: 1,
            numa_node: 0,
            caps,
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(lacks(u64::MAX), [""; 0]);
        assert_eq!(lacks(0).len(), WANTED.len());
        assert_eq!(lacks(!abi::CAP_RX_INTERRUPT), ["receive interrupts"]);
    }

    #[test]
    fn every_quirk_of_a_driver_is_said() {
        let sound = abi::CAP_SURVIVES_PEER | abi::CAP_TX_MULTI_SEG;
        assert_eq!(cautions(&info(sound)), [""; 0]);
        let all = cautions(&info(abi::CAP_FRAGILE));
        assert_eq!(all.len(), 3);
        for (caution, word) in all.iter().zip(["crash", "started again", "one segment"]) {
            assert!(caution.starts_with("net_some: "), "{caution}");
            assert!(caution.contains(word), "{caution}");
        }
    }
}
