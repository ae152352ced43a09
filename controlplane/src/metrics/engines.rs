//! What engines and their devices tell of themselves.

use genie_dataplane::engine::Snapshot;

use super::page::Page;
use crate::status::TransportStatus;

/// What every engine counts.
pub(super) fn engines(page: &mut Page, transports: &[TransportStatus]) {
    page.gauge("genie_transport_usable", "Whether a transport can be used.");
    for one in transports {
        let usable = f64::from(u8::from(one.path.is_some()));
        page.sample(
            "genie_transport_usable",
            &[("transport", &one.transport)],
            usable,
        );
    }
    let engines: Vec<_> = running(transports).collect();
    page.counter(
        "genie_engine_bytes_total",
        "Tensor bytes that an engine moved.",
    );
    for (one, engine) in &engines {
        for (direction, bytes) in [
            ("sent", engine.sent_bytes),
            ("received", engine.received_bytes),
        ] {
            let labels = one.labels(&[("direction", direction)]);
            page.sample("genie_engine_bytes_total", &labels, bytes as f64);
        }
    }
    page.counter(
        "genie_copied_bytes_total",
        "Bytes that CPUs copied at this end: the copy ledger.",
    );
    for (one, engine) in &engines {
        for (by, bytes) in [
            ("genie", engine.copies.genie),
            ("driver", engine.copies.driver),
            ("kernel", engine.copies.kernel),
        ] {
            let labels = one.labels(&[("by", by)]);
            page.sample("genie_copied_bytes_total", &labels, bytes as f64);
        }
    }
    page.counter(
        "genie_engine_dropped_total",
        "Packets and frames dropped because they were bad and of no session.",
    );
    for (one, engine) in &engines {
        page.sample(
            "genie_engine_dropped_total",
            &one.labels(&[]),
            engine.dropped as f64,
        );
    }
    page.counter(
        "genie_sealed_dropped_total",
        "What came in sealed sessions and was not the peer's, by cause: packets, or records of a TCP connection, which end it.",
    );
    for (one, engine) in &engines {
        for (cause, packets) in [
            ("forged", engine.sealed.forged),
            ("replayed", engine.sealed.replayed),
            ("old_epoch", engine.sealed.old_epoch),
        ] {
            let labels = one.labels(&[("cause", cause)]);
            page.sample("genie_sealed_dropped_total", &labels, packets as f64);
        }
    }
}

/// What only engines that speak the UDP protocol on a device can tell.
pub(super) fn devices(page: &mut Page, transports: &[TransportStatus]) {
    let engines: Vec<_> = running(transports).collect();
    page.counter(
        "genie_engine_resent_total",
        "Segments that an engine sent again, by cause: packet_threshold and time_threshold are \
         losses found from acknowledgements, probe is a timeout.",
    );
    for (one, engine) in &engines {
        let Some(resent) = engine.resent else {
            continue;
        };
        for (cause, segments) in [
            ("packet_threshold", resent.packet_threshold),
            ("time_threshold", resent.time_threshold),
            ("probe", resent.probe),
        ] {
            let labels = one.labels(&[("cause", cause)]);
            page.sample("genie_engine_resent_total", &labels, segments as f64);
        }
    }
    page.counter(
        "genie_engine_spurious_losses_total",
        "Packets given up for lost whose acknowledgement came after all.",
    );
    for (one, engine) in &engines {
        if let Some(resent) = engine.resent {
            let labels = one.labels(&[]);
            let spurious = resent.spurious as f64;
            page.sample("genie_engine_spurious_losses_total", &labels, spurious);
        }
    }
    page.counter(
        "genie_engine_time_seconds_total",
        "How a polling engine's thread spent its time: busy, spin, pause or sleep.",
    );
    for (one, engine) in &engines {
        let Some(idle) = engine.idle else { continue };
        for (state, time) in [
            ("busy", idle.busy),
            ("spin", idle.spin),
            ("pause", idle.pause),
            ("sleep", idle.sleep),
        ] {
            let labels = one.labels(&[("state", state)]);
            page.sample(
                "genie_engine_time_seconds_total",
                &labels,
                time.as_secs_f64(),
            );
        }
    }
    page.counter(
        "genie_engine_sleeps_total",
        "How often a polling engine's thread went to sleep.",
    );
    for (one, engine) in &engines {
        if let Some(idle) = engine.idle {
            let labels = one.labels(&[]);
            page.sample("genie_engine_sleeps_total", &labels, idle.sleeps as f64);
        }
    }
    page.gauge(
        "genie_receive_ring_frames",
        "A device's receive ring: its size, what peers may have in flight, what was granted.",
    );
    for (one, engine) in &engines {
        let Some(ring) = engine.ring else { continue };
        for (what, frames) in [
            ("size", ring.frames),
            ("credit", ring.credit),
            ("granted", ring.granted),
        ] {
            let labels = one.labels(&[("what", what)]);
            page.sample("genie_receive_ring_frames", &labels, frames as f64);
        }
    }
    page.gauge(
        "genie_device_mtu_bytes",
        "The largest IP packet that a device carries.",
    );
    for (one, engine) in &engines {
        if let Some(mtu) = engine.mtu {
            page.sample("genie_device_mtu_bytes", &one.labels(&[]), mtu.into());
        }
    }
}

/// A port's own counters.
pub(super) fn ports(page: &mut Page, transports: &[TransportStatus]) {
    let ports: Vec<_> = running(transports)
        .filter_map(|(one, engine)| Some((one, engine.port?)))
        .collect();
    page.counter(
        "genie_port_frames_total",
        "Frames that a device's port carried.",
    );
    for (one, port) in &ports {
        for (direction, frames) in [("sent", port.tx_frames), ("received", port.rx_frames)] {
            let labels = one.labels(&[("direction", direction)]);
            page.sample("genie_port_frames_total", &labels, frames as f64);
        }
    }
    page.counter(
        "genie_port_bytes_total",
        "Bytes that a device's port carried.",
    );
    for (one, port) in &ports {
        for (direction, bytes) in [("sent", port.tx_bytes), ("received", port.rx_bytes)] {
            let labels = one.labels(&[("direction", direction)]);
            page.sample("genie_port_bytes_total", &labels, bytes as f64);
        }
    }
    page.counter(
        "genie_port_lost_frames_total",
        "Frames that a port lost, by cause: no descriptor free, or an error in sending.",
    );
    for (one, port) in &ports {
        for (cause, frames) in [("missed", port.rx_missed), ("error", port.tx_errors)] {
            let labels = one.labels(&[("cause", cause)]);
            page.sample("genie_port_lost_frames_total", &labels, frames as f64);
        }
    }
}

/// Frames between the queues of a device that has several.
pub(super) fn queues(page: &mut Page, transports: &[TransportStatus]) {
    page.counter(
        "genie_queue_forwarded_frames_total",
        "Frames that came to another queue than their owner's: passed on by this one, received \
         from others, or lost as the ring between them was full.",
    );
    for (one, engine) in running(transports) {
        let Some(steering) = engine.steering else {
            continue;
        };
        for (what, frames) in [
            ("passed_on", steering.forwarded),
            ("received", steering.received),
            ("lost", steering.dropped),
        ] {
            let labels = one.labels(&[("what", what)]);
            page.sample("genie_queue_forwarded_frames_total", &labels, frames as f64);
        }
    }
}

/// What an engine is called in labels.
#[derive(Clone, Debug)]
pub(super) struct Name<'a> {
    pub(super) path: &'a str,
    /// Where it is one of several of a device.
    queue: Option<String>,
}

impl<'a> Name<'a> {
    /// Its own labels, and `more`.
    pub(super) fn labels<'b>(&'b self, more: &[(&'b str, &'b str)]) -> Vec<(&'b str, &'b str)> {
        let queue = self.queue.as_deref().map(|queue| ("queue", queue));
        let own = std::iter::once(("path", self.path)).chain(queue);
        own.chain(more.iter().copied()).collect()
    }
}

/// The engines that run, with their names.
pub(super) fn running(
    transports: &[TransportStatus],
) -> impl Iterator<Item = (Name<'_>, &Snapshot)> {
    transports.iter().filter_map(engine_of)
}

fn engine_of(transport: &TransportStatus) -> Option<(Name<'_>, &Snapshot)> {
    let engine = transport.engine.as_ref()?;
    let queue = transport.queue.map(|queue| queue.to_string());
    let path = transport.path.as_deref()?;
    Some((Name { path, queue }, engine))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use genie_dataplane::device::{Counters, Steering};

    use super::*;

    #[test]
    fn engines_of_one_device_are_told_apart() {
        let one = |queue: Option<u16>| TransportStatus {
            transport: "dpdk".to_owned(),
            path: Some("dpdk:net_some".to_owned()),
            queue,
            data: None,
            reason: None,
            engine: Some(Snapshot {
                port: Some(Counters::default()),
                steering: queue.map(|queue| Steering {
                    queue,
                    queues: 2,
                    forwarded: 7,
                    ..Steering::default()
                }),
                ..Snapshot::default()
            }),
        };
        let page_of = |transports: &[TransportStatus]| {
            let mut page = Page::default();
            engines(&mut page, transports);
            ports(&mut page, transports);
            queues(&mut page, transports);
            page.0
        };
        let page = page_of(&[one(Some(0)), one(Some(1))]);
        let line = "genie_queue_forwarded_frames_total\
                    {path=\"dpdk:net_some\",queue=\"1\",what=\"passed_on\"} 7";
        assert!(page.lines().any(|one| one == line), "{page}");
        let samples = |line: &&str| line.starts_with("genie_") && line.contains("path=");
        let all: Vec<_> = page.lines().filter(samples).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert!(!page_of(&[one(None)]).contains("queue="));
    }
}
