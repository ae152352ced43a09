//! What an engine tells of itself.

use genie_proto::{Credit, Time};

use super::Polled;
use crate::device::Device;
use crate::engine::{RingSnapshot, status};

impl<D: Device> Polled<D> {
    pub(super) fn publish(&mut self, now: Time) {
        let Self { device, core, .. } = self;
        if now.since(core.published) < status::PUBLISH_EVERY {
            return;
        }
        core.published = now;
        device.sweep();
        // By another queue's owner: sessions are lost as on a link that is down.
        core.stopping |= device.is_stopped() && core.sessions.is_empty();
        core.status.publish(|snapshot| {
            snapshot.driver.clone_from(&device.capabilities().driver);
            if snapshot.mtu.is_none() {
                snapshot.cautions = device.cautions();
                snapshot.lacks = device.lacks();
                snapshot.mtu = Some(device.capabilities().mtu);
            }
            snapshot.port = Some(device.counters());
            snapshot.tap = device.tap();
            snapshot.dropped = core.dropped;
            snapshot.sent_bytes = core.totals.sent_bytes;
            snapshot.received_bytes = core.totals.received_bytes;
            snapshot.copies = device.copies();
            snapshot.copies.genie += core.totals.copied_bytes;
            snapshot.sealed = core.totals.sealed;
            snapshot.idle = core.idle;
            snapshot.steering = device.steering();
            let mut resent = core.totals.resent;
            let mut ring = ring(device.capabilities().rx_descriptors);
            snapshot.sessions.clear();
            for session in core.sessions.values() {
                snapshot.copies.genie += session.copied_bytes();
                let session = session.snapshot();
                let sealed = session.sealed.unwrap_or_default();
                snapshot.sealed = snapshot.sealed.plus(sealed);
                resent = resent.plus(session.resent.unwrap_or_default());
                ring.granted += session.granted.unwrap_or(0);
                snapshot.sessions.push(session);
            }
            snapshot.resent = Some(resent);
            snapshot.ring = Some(ring);
        });
    }
}

/// Packets that all peers may have in flight: half the receive ring, so that
/// our own late polling loses nothing, nor peers whose shares just change.
pub(super) fn credit(rx_descriptors: u16) -> u32 {
    u32::from(rx_descriptors / 2).max(1)
}

/// An empty receive ring of this length.
fn ring(rx_descriptors: u16) -> RingSnapshot {
    RingSnapshot {
        frames: rx_descriptors.into(),
        credit: credit(rx_descriptors).into(),
        granted: 0,
    }
}

/// What a peer begins with.
pub(super) fn first_credit(rx_descriptors: u16) -> u16 {
    let first = Credit::first(credit(rx_descriptors));
    first.try_into().unwrap_or(u16::MAX)
}
