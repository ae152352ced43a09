//! Two devices joined in memory: what one sends the other receives.
//!
//! Stands in for a NIC where there is no DPDK: in tests of the engine, and to
//! measure what the protocol costs without a driver. Frames are copied once,
//! by the sending end, into buffers that travel round: nothing is allocated
//! after the start. Each end may be used from its own thread.

#![forbid(unsafe_code)]

use super::attachments::Attachments;
use super::kept::Kept;
use super::registrations::Registrations;
use super::{AttachError, Attachment, BURST_MAX, Capabilities, Counters, Device, FrameId, TxFrame};
use crate::ledger::Copies;
use crate::memory::{Lease, View};

/// How a pair behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Frames each direction holds; a full one refuses more.
    pub descriptors: u16,
    /// Whether frames may refer to attached memory. Where not, the copy is
    /// counted as Genie's own, as on a device that takes no external memory.
    pub tx_external: bool,
    /// Whether sent frames refer to their memory until [`Device::reap`] is
    /// called, as with drivers that collect only on the next burst.
    pub completes_on_reap: bool,
    /// Whether memory must be registered before frames refer to it, as with
    /// NICs behind an IOMMU.
    pub needs_registration: bool,
    /// Received frames that may be kept, with spare buffers for as many.
    pub keepable: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mtu: 9000,
            descriptors: 1024,
            tx_external: true,
            completes_on_reap: false,
            needs_registration: false,
            keepable: 0,
        }
    }
}

/// One end of a pair. May only be used from one thread at a time.
#[derive(Debug)]
pub struct PairDevice {
    capabilities: Capabilities,
    completes_on_reap: bool,
    outgoing: Direction<rtrb::Producer<Vec<u8>>, rtrb::Consumer<Vec<u8>>>,
    incoming: Direction<rtrb::Consumer<Vec<u8>>, rtrb::Producer<Vec<u8>>>,
    /// Frames that stay here, and what goes back in their place.
    kept: Kept<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// Beside each lease: frames that refer to it and were not reaped.
    attachments: Attachments<u32>,
    unreaped: Vec<Attachment>,
    /// After the attachments: those end before it does.
    registrations: Option<Registrations>,
    counters: Counters,
    copies: Copies,
    stopped: bool,
}

/// Full frames one way, empty buffers back.
#[derive(Debug)]
struct Direction<Full, Empty> {
    full: Full,
    empty: Empty,
}

/// Makes two devices, each of which receives what the other sends.
pub fn pair(options: &Options) -> (PairDevice, PairDevice) {
    let (to_second, from_first) = direction(options);
    let (to_first, from_second) = direction(options);
    (
        PairDevice::new(options, 1, to_second, from_second),
        PairDevice::new(options, 2, to_first, from_first),
    )
}

type Sending = Direction<rtrb::Producer<Vec<u8>>, rtrb::Consumer<Vec<u8>>>;
type Receiving = Direction<rtrb::Consumer<Vec<u8>>, rtrb::Producer<Vec<u8>>>;

const ETHERNET_HEADER: usize = 14;

fn direction(options: &Options) -> (Sending, Receiving) {
    let count = options.descriptors as usize;
    let (full_in, full_out) = rtrb::RingBuffer::new(count);
    let (mut empty_in, empty_out) = rtrb::RingBuffer::new(count);
    for _ in 0..count {
        empty_in
            .push(buffer(options))
            .expect("the ring was made for this many buffers");
    }
    (
        Direction {
            full: full_in,
            empty: empty_out,
        },
        Direction {
            full: full_out,
            empty: empty_in,
        },
    )
}

/// Room for a frame.
fn buffer(options: &Options) -> Vec<u8> {
    Vec::with_capacity(options.mtu as usize + ETHERNET_HEADER)
}

impl PairDevice {
    fn new(options: &Options, end: u8, outgoing: Sending, incoming: Receiving) -> Self {
        let capabilities = Capabilities {
            driver: "mem_pair".into(),
            // Locally administered.
            mac: [2, 0, 0, 0, 0, end],
            mtu: options.mtu,
            tx_external: options.tx_external,
            tx_udp_checksum: false,
            rx_interrupt: false,
            driver_copies_tx: options.tx_external,
            driver_copies_rx: false,
            rx_descriptors: options.descriptors,
            tx_descriptors: options.descriptors,
        };
        Self {
            capabilities,
            completes_on_reap: options.completes_on_reap,
            outgoing,
            incoming,
            kept: Kept::new(options.keepable.into()),
            spare: (0..options.keepable).map(|_| buffer(options)).collect(),
            attachments: Attachments::new(),
            unreaped: Vec::new(),
            registrations: options.needs_registration.then(Registrations::default),
            counters: Counters::default(),
            copies: Copies::default(),
            stopped: false,
        }
    }

    /// Whether frames that were not reaped refer to attached memory.
    pub(super) fn refers(&mut self, attachment: Attachment) -> bool {
        let unreaped = self.attachments.beside_mut(attachment);
        unreaped.is_some_and(|unreaped| *unreaped > 0)
    }

    /// Fills `buffer`; `false` if the frame's payload is not attached memory.
    fn fill(&mut self, buffer: &mut Vec<u8>, frame: &TxFrame) -> bool {
        buffer.clear();
        buffer.extend_from_slice(&frame.head);
        let Some(payload) = frame.payload else {
            return true;
        };
        let Some((bytes, _)) = self.attachments.resolve(payload) else {
            return false;
        };
        let head = buffer.len();
        buffer.resize(head + bytes.len(), 0);
        bytes.copy_to(&mut buffer[head..]);
        let copied = if self.capabilities.tx_external {
            &mut self.copies.driver
        } else {
            &mut self.copies.genie
        };
        *copied += bytes.len() as u64;
        if self.completes_on_reap {
            *self
                .attachments
                .beside_mut(payload.attachment)
                .expect("resolved just now") += 1;
            self.unreaped.push(payload.attachment);
        }
        true
    }
}

impl Device for PairDevice {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn rx_burst(&mut self, on_frame: &mut dyn FnMut(View<'_>)) -> usize {
        self.rx_burst_keeping(&mut |frame, _| {
            on_frame(frame);
            false
        })
    }

    fn keepable(&self) -> u32 {
        self.kept.most()
    }

    fn rx_burst_keeping(
        &mut self,
        on_frame: &mut dyn FnMut(View<'_>, Option<FrameId>) -> bool,
    ) -> usize {
        if self.stopped {
            return 0;
        }
        for count in 0..BURST_MAX {
            let Ok(mut buffer) = self.incoming.full.pop() else {
                return count;
            };
            self.counters.rx_frames += 1;
            self.counters.rx_bytes += buffer.len() as u64;
            if on_frame(View::from(&buffer[..]), self.kept.next()) {
                let spare = self.spare.pop().expect("one for each that is kept");
                self.kept.keep(std::mem::replace(&mut buffer, spare));
            }
            self.incoming
                .empty
                .push(buffer)
                .expect("there are as many places as buffers");
        }
        BURST_MAX
    }

    fn kept(&self, frame: FrameId) -> View<'_> {
        let buffer = self.kept.get(frame);
        buffer
            .map(|buffer| View::from(&buffer[..]))
            .unwrap_or_default()
    }

    fn give_back(&mut self, frame: FrameId) {
        self.spare.extend(self.kept.take(frame));
    }

    fn tx_burst(&mut self, frames: &[TxFrame]) -> usize {
        if self.stopped {
            return 0;
        }
        for (count, frame) in frames.iter().enumerate() {
            let largest = self.capabilities.mtu as usize + ETHERNET_HEADER;
            if frame.len() > largest {
                self.counters.tx_errors += 1;
                continue;
            }
            let Ok(mut buffer) = self.outgoing.empty.pop() else {
                return count;
            };
            if self.fill(&mut buffer, frame) {
                self.counters.tx_frames += 1;
                self.counters.tx_bytes += buffer.len() as u64;
            } else {
                self.counters.tx_errors += 1;
                buffer.clear();
            }
            self.outgoing
                .full
                .push(buffer)
                .expect("there are as many places as buffers");
        }
        frames.len()
    }

    fn attach(&mut self, lease: Lease) -> Result<Attachment, AttachError> {
        if let Some(registrations) = &mut self.registrations {
            // Nothing but the pin: both ends reach all memory there is.
            registrations.register(lease.region(), |_| Ok(()))?;
        }
        self.attachments.insert(lease, 0)
    }

    fn detach(&mut self, attachment: Attachment) -> bool {
        if self.refers(attachment) {
            return false;
        }
        self.attachments.remove(attachment);
        true
    }

    fn reap(&mut self) {
        for attachment in self.unreaped.drain(..) {
            if let Some(unreaped) = self.attachments.beside_mut(attachment) {
                *unreaped -= 1;
            }
        }
    }

    fn sweep(&mut self) {
        if let Some(registrations) = &mut self.registrations {
            registrations.sweep(drop);
        }
    }

    fn stop(&mut self) {
        self.stopped = true;
        self.unreaped.clear();
        self.attachments.beside_all(|unreaped| *unreaped = 0);
    }

    fn counters(&self) -> Counters {
        let made =
            |registrations: &Registrations| (registrations.made(), registrations.len() as u64);
        let (registrations, registered) = self.registrations.as_ref().map_or((0, 0), made);
        Counters {
            registrations,
            registered,
            ..self.counters
        }
    }

    fn copies(&self) -> Copies {
        self.copies
    }

    fn link_up(&self) -> bool {
        !self.incoming.full.is_abandoned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Payload;
    use crate::memory::{Backing, Region};

    fn lease() -> Lease {
        let lease = Lease::whole(Region::with_backing(4096, Backing::Shmem).unwrap());
        lease.write_at(0, View::from(&b"tensor"[..]));
        lease
    }

    fn frame(attachment: Attachment, offset: u64, len: u32) -> TxFrame {
        let mut frame = TxFrame::default();
        frame.head.try_extend_from_slice(b"head ").unwrap();
        frame.payload = Some(Payload {
            attachment,
            offset,
            len,
        });
        frame
    }

    fn received(device: &mut PairDevice) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        device.rx_burst(&mut |view| {
            let mut bytes = vec![0; view.len()];
            view.copy_to(&mut bytes);
            frames.push(bytes);
        });
        frames
    }

    #[test]
    fn a_frame_arrives_with_its_payload_and_is_counted() {
        let (mut a, mut b) = pair(&Options::default());
        let attachment = a.attach(lease()).unwrap();
        assert_eq!(a.tx_burst(&[frame(attachment, 2, 4)]), 1);
        assert_eq!(received(&mut b), [b"head nsor"]);
        assert_eq!(a.counters().tx_bytes, 9);
        assert_eq!(b.counters().rx_frames, 1);
        assert_eq!(
            a.copies(),
            Copies {
                driver: 4,
                ..Copies::default()
            }
        );
    }

    #[test]
    fn a_full_ring_takes_only_what_fits() {
        let (mut a, mut b) = pair(&Options {
            descriptors: 2,
            ..Options::default()
        });
        let attachment = a.attach(lease()).unwrap();
        let frames = vec![frame(attachment, 0, 1); 3];
        assert_eq!(a.tx_burst(&frames), 2);
        assert_eq!(received(&mut b).len(), 2);
        assert_eq!(a.tx_burst(&frames[2..]), 1);
    }

    #[test]
    fn memory_outside_the_attachment_is_not_sent() {
        let (mut a, mut b) = pair(&Options::default());
        let attachment = a.attach(lease()).unwrap();
        a.tx_burst(&[frame(attachment, 4095, 2), frame(Attachment(9), 0, 1)]);
        assert_eq!(a.counters().tx_errors, 2);
        assert!(received(&mut b).iter().all(Vec::is_empty));
    }

    #[test]
    fn a_lease_stays_until_its_frames_are_reaped() {
        let options = Options {
            completes_on_reap: true,
            ..Options::default()
        };
        let (mut a, _b) = pair(&options);
        let lease = lease();
        let region = std::sync::Arc::downgrade(lease.region());
        let attachment = a.attach(lease).unwrap();
        a.tx_burst(&[frame(attachment, 0, 4)]);
        assert!(!a.detach(attachment));
        assert!(region.upgrade().is_some());
        a.reap();
        assert!(a.detach(attachment));
        assert!(region.upgrade().is_none());
    }
}
