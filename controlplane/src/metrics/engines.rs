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
    let engines: Vec<(&str, &Snapshot)> = running(transports).collect();
    page.counter(
        "genie_engine_bytes_total",
        "Tensor bytes that an engine moved.",
    );
    for (path, engine) in &engines {
        for (direction, bytes) in [
            ("sent", engine.sent_bytes),
            ("received", engine.received_bytes),
        ] {
            let labels = [("path", *path), ("direction", direction)];
            page.sample("genie_engine_bytes_total", &labels, bytes as f64);
        }
    }
    page.counter(
        "genie_copied_bytes_total",
        "Bytes that CPUs copied at this end: the copy ledger.",
    );
    for (path, engine) in &engines {
        for (by, bytes) in [
            ("genie", engine.copies.genie),
            ("driver", engine.copies.driver),
            ("kernel", engine.copies.kernel),
        ] {
            let labels = [("path", *path), ("by", by)];
            page.sample("genie_copied_bytes_total", &labels, bytes as f64);
        }
    }
    page.counter(
        "genie_engine_dropped_total",
        "Packets and frames dropped because they were bad and of no session.",
    );
    for (path, engine) in &engines {
        page.sample(
            "genie_engine_dropped_total",
            &[("path", path)],
            engine.dropped as f64,
        );
    }
    page.counter(
        "genie_sealed_dropped_total",
        "What came in sealed sessions and was not the peer's, by cause: packets, or records of a TCP connection, which end it.",
    );
    for (path, engine) in &engines {
        for (cause, packets) in [
            ("forged", engine.sealed.forged),
            ("replayed", engine.sealed.replayed),
            ("old_epoch", engine.sealed.old_epoch),
        ] {
            let labels = [("path", *path), ("cause", cause)];
            page.sample("genie_sealed_dropped_total", &labels, packets as f64);
        }
    }
}

/// What only engines that speak the UDP protocol on a device can tell.
pub(super) fn devices(page: &mut Page, transports: &[TransportStatus]) {
    let engines: Vec<(&str, &Snapshot)> = running(transports).collect();
    page.counter(
        "genie_engine_resent_total",
        "Segments that an engine sent again, by cause: packet_threshold and time_threshold are \
         losses found from acknowledgements, probe is a timeout.",
    );
    for (path, engine) in &engines {
        let Some(resent) = engine.resent else {
            continue;
        };
        for (cause, segments) in [
            ("packet_threshold", resent.packet_threshold),
            ("time_threshold", resent.time_threshold),
            ("probe", resent.probe),
        ] {
            let labels = [("path", *path), ("cause", cause)];
            page.sample("genie_engine_resent_total", &labels, segments as f64);
        }
    }
    page.counter(
        "genie_engine_spurious_losses_total",
        "Packets given up for lost whose acknowledgement came after all.",
    );
    for (path, engine) in &engines {
        if let Some(resent) = engine.resent {
            let labels = [("path", *path)];
            let spurious = resent.spurious as f64;
            page.sample("genie_engine_spurious_losses_total", &labels, spurious);
        }
    }
    page.counter(
        "genie_engine_time_seconds_total",
        "How a polling engine's thread spent its time: busy, spin, pause or sleep.",
    );
    for (path, engine) in &engines {
        let Some(idle) = engine.idle else { continue };
        for (state, time) in [
            ("busy", idle.busy),
            ("spin", idle.spin),
            ("pause", idle.pause),
            ("sleep", idle.sleep),
        ] {
            let labels = [("path", *path), ("state", state)];
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
    for (path, engine) in &engines {
        if let Some(idle) = engine.idle {
            let labels = [("path", *path)];
            page.sample("genie_engine_sleeps_total", &labels, idle.sleeps as f64);
        }
    }
    page.gauge(
        "genie_receive_ring_frames",
        "A device's receive ring: its size, what peers may have in flight, what was granted.",
    );
    for (path, engine) in &engines {
        let Some(ring) = engine.ring else { continue };
        for (what, frames) in [
            ("size", ring.frames),
            ("credit", ring.credit),
            ("granted", ring.granted),
        ] {
            let labels = [("path", *path), ("what", what)];
            page.sample("genie_receive_ring_frames", &labels, frames as f64);
        }
    }
    page.gauge(
        "genie_device_mtu_bytes",
        "The largest IP packet that a device carries.",
    );
    for (path, engine) in &engines {
        if let Some(mtu) = engine.mtu {
            page.sample("genie_device_mtu_bytes", &[("path", path)], mtu.into());
        }
    }
}

/// A port's own counters.
pub(super) fn ports(page: &mut Page, transports: &[TransportStatus]) {
    let ports: Vec<_> = running(transports)
        .filter_map(|(path, engine)| Some((path, engine.port?)))
        .collect();
    page.counter(
        "genie_port_frames_total",
        "Frames that a device's port carried.",
    );
    for (path, port) in &ports {
        for (direction, frames) in [("sent", port.tx_frames), ("received", port.rx_frames)] {
            let labels = [("path", *path), ("direction", direction)];
            page.sample("genie_port_frames_total", &labels, frames as f64);
        }
    }
    page.counter(
        "genie_port_bytes_total",
        "Bytes that a device's port carried.",
    );
    for (path, port) in &ports {
        for (direction, bytes) in [("sent", port.tx_bytes), ("received", port.rx_bytes)] {
            let labels = [("path", *path), ("direction", direction)];
            page.sample("genie_port_bytes_total", &labels, bytes as f64);
        }
    }
    page.counter(
        "genie_port_lost_frames_total",
        "Frames that a port lost, by cause: no descriptor free, or an error in sending.",
    );
    for (path, port) in &ports {
        for (cause, frames) in [("missed", port.rx_missed), ("error", port.tx_errors)] {
            let labels = [("path", *path), ("cause", cause)];
            page.sample("genie_port_lost_frames_total", &labels, frames as f64);
        }
    }
}

/// The engines that run, with their paths.
pub(super) fn running(transports: &[TransportStatus]) -> impl Iterator<Item = (&str, &Snapshot)> {
    transports.iter().filter_map(engine_of)
}

fn engine_of(transport: &TransportStatus) -> Option<(&str, &Snapshot)> {
    Some((transport.path.as_deref()?, transport.engine.as_ref()?))
}
