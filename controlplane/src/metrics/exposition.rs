//! The text format of Prometheus
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
//!
//! The invariant: *one block a name, names end in base units, and whatever a
//! peer calls itself stays inside its label*.

use std::fmt::Write;

use genie_dataplane::engine::{SessionSnapshot, Snapshot};

use super::counters::{Moved, Traffic};
use crate::status::{AgentStatus, PeerUsage, TransportStatus};

/// Writes everything that there is to know of an agent.
pub fn exposition(status: &AgentStatus, moved: &[(Traffic, Moved)]) -> String {
    let mut page = Page::default();
    agent(&mut page, status);
    peers(&mut page, &status.peer_usage);
    traffic(&mut page, moved);
    engines(&mut page, &status.transports);
    devices(&mut page, &status.transports);
    ports(&mut page, &status.transports);
    sessions(&mut page, status);
    page.0
}

fn agent(page: &mut Page, status: &AgentStatus) {
    page.gauge("genie_info", "The agent's name and version; always 1.");
    let labels = [("node", &status.name[..]), ("version", &status.version)];
    page.sample("genie_info", &labels, 1.0);
    page.gauge("genie_uptime_seconds", "Seconds since the agent was ready.");
    page.sample("genie_uptime_seconds", &[], status.up_seconds);
    let identity = &status.identity;
    page.counter(
        "genie_refused_total",
        "Peers turned away, requests refused for want of a right, and connections dropped \
         for newer ones before they were sessions.",
    );
    for (what, refused) in [
        ("peer", identity.refused_peers),
        ("request", identity.refused_requests),
        ("stranger", identity.dropped_strangers),
    ] {
        page.sample("genie_refused_total", &[("what", what)], refused as f64);
    }
    page.gauge("genie_store_tensors", "Tensors in the store.");
    page.sample("genie_store_tensors", &[], status.store.tensors as f64);
    let memory = [("store", &status.store), ("arenas", &status.arenas)];
    page.gauge("genie_memory_used_bytes", "Bytes allocated, by what for.");
    for (pool, usage) in memory {
        page.sample(
            "genie_memory_used_bytes",
            &[("pool", pool)],
            usage.used_bytes as f64,
        );
    }
    page.gauge(
        "genie_memory_limit_bytes",
        "Bytes that may be allocated, by what for.",
    );
    for (pool, usage) in memory {
        page.sample(
            "genie_memory_limit_bytes",
            &[("pool", pool)],
            usage.limit_bytes as f64,
        );
    }
    page.gauge("genie_arenas", "Arenas of programs on this host.");
    page.sample("genie_arenas", &[], status.arenas.regions as f64);
    let users = &status.users;
    page.gauge(
        "genie_user_connections",
        "Connections of programs, by user id.",
    );
    for user in users {
        let uid = user.uid.to_string();
        page.sample(
            "genie_user_connections",
            &[("uid", &uid)],
            user.connections as f64,
        );
    }
    page.gauge(
        "genie_user_arena_bytes",
        "Bytes of arenas charged, by user id.",
    );
    for user in users {
        let uid = user.uid.to_string();
        page.sample(
            "genie_user_arena_bytes",
            &[("uid", &uid)],
            user.bytes as f64,
        );
    }
}

/// What peers' requests hold of this node, and what they were refused.
fn peers(page: &mut Page, peers: &[PeerUsage]) {
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&PeerUsage) -> u64| {
        page.gauge(name, help);
        for one in peers {
            page.sample(name, &[("peer", &one.peer)], value(one) as f64);
        }
    };
    gauge(
        "genie_peer_memory_used_bytes",
        "Bytes in the store that a peer's requests made.",
        &|one| one.memory_bytes,
    );
    gauge(
        "genie_peer_memory_limit_bytes",
        "Bytes in the store that a peer's requests may make.",
        &|one| one.memory_limit_bytes,
    );
    gauge(
        "genie_peer_transfers",
        "Transfers under way of a peer's requests.",
        &|one| one.transfers,
    );
    gauge(
        "genie_peer_transfers_limit",
        "Transfers that a peer's requests may have under way.",
        &|one| one.transfers_limit,
    );
    page.counter(
        "genie_peer_refused_total",
        "Requests of a peer refused because they met a limit, by which one.",
    );
    for one in peers {
        for (limit, refused) in [
            ("memory", one.refused.memory),
            ("transfers", one.refused.transfers),
            ("rate", one.refused.rate),
        ] {
            let labels = [("peer", &one.peer[..]), ("limit", limit)];
            page.sample("genie_peer_refused_total", &labels, refused as f64);
        }
    }
}

fn traffic(page: &mut Page, moved: &[(Traffic, Moved)]) {
    let mut counter = |name: &str, help: &str, value: &dyn Fn(&Moved) -> u64| {
        page.counter(name, help);
        for (traffic, moved) in moved {
            page.sample(name, &labels(traffic), value(moved) as f64);
        }
    };
    counter(
        "genie_bytes_total",
        "Tensor bytes that requests moved and verified.",
        &|moved| moved.bytes,
    );
    counter(
        "genie_tensors_total",
        "Tensors that requests moved.",
        &|moved| moved.tensors,
    );
    counter(
        "genie_retransmits_total",
        "Segments sent again in requests that succeeded.",
        &|moved| moved.retransmits,
    );
    page.counter(
        "genie_request_copied_bytes_total",
        "Bytes that CPUs copied for requests, at this end, by who copied them.",
    );
    for (traffic, moved) in moved {
        let copies = moved.copies;
        for (by, bytes) in [
            ("genie", copies.genie),
            ("driver", copies.driver),
            ("kernel", copies.kernel),
        ] {
            let [path, peer, direction] = labels(traffic);
            let labels = [path, peer, direction, ("by", by)];
            page.sample("genie_request_copied_bytes_total", &labels, bytes as f64);
        }
    }
}

fn labels(traffic: &Traffic) -> [(&'static str, &str); 3] {
    [
        ("path", &traffic.path),
        ("peer", &traffic.peer),
        ("direction", traffic.direction.label()),
    ]
}

fn engines(page: &mut Page, transports: &[TransportStatus]) {
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
        "Packets of sealed sessions dropped because they were not the peer's, by cause.",
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
fn devices(page: &mut Page, transports: &[TransportStatus]) {
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

fn ports(page: &mut Page, transports: &[TransportStatus]) {
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

fn sessions(page: &mut Page, status: &AgentStatus) {
    page.gauge("genie_peers", "Peers that can be dialled.");
    page.sample("genie_peers", &[], status.peers.len() as f64);
    page.gauge("genie_sessions", "Sessions that are up, by path and peer.");
    let mut groups = std::collections::BTreeMap::<(&str, &str), (u64, u64)>::new();
    for one in &status.sessions {
        let group = groups.entry((&one.path, &one.peer)).or_default();
        group.0 += 1;
        group.1 += one.requests;
    }
    for ((path, peer), (sessions, _)) in &groups {
        let labels = [("path", *path), ("peer", *peer)];
        page.sample("genie_sessions", &labels, *sessions as f64);
    }
    page.gauge("genie_requests", "Requests under way, by path and peer.");
    for ((path, peer), (_, requests)) in &groups {
        let labels = [("path", *path), ("peer", *peer)];
        page.sample("genie_requests", &labels, *requests as f64);
    }
    page.gauge("genie_transfers", "Transfers under way in an engine.");
    for (path, engine) in running(&status.transports) {
        let transfers: u64 = engine.sessions.iter().map(|one| one.transfers).sum();
        page.sample("genie_transfers", &[("path", path)], transfers as f64);
    }
    let paths = session_paths(status);
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&SessionSnapshot) -> Option<f64>| {
        page.gauge(name, help);
        for (path, peer, one) in &paths {
            if let Some(value) = value(one) {
                let id = one.session.0.to_string();
                let labels = [("path", *path), ("peer", *peer), ("session", &id)];
                page.sample(name, &labels, value);
            }
        }
    };
    gauge(
        "genie_session_round_trip_seconds",
        "Smoothed round trip of a session's path.",
        &|one| Some(one.round_trip?.as_secs_f64()),
    );
    gauge(
        "genie_session_round_trip_min_seconds",
        "The least round trip of a session's path.",
        &|one| Some(one.round_trip_min?.as_secs_f64()),
    );
    gauge(
        "genie_session_window_bytes",
        "Congestion window of a session's path.",
        &|one| Some(one.window_bytes? as f64),
    );
    gauge(
        "genie_session_in_flight_bytes",
        "Bytes of packets in flight on a session's path.",
        &|one| Some(one.in_flight_bytes? as f64),
    );
    gauge(
        "genie_session_granted_frames",
        "Frames of the receive ring that a session's peer may have in flight.",
        &|one| Some(one.granted? as f64),
    );
}

/// Engines' sessions with the path and the peer of each; names of peers are the
/// control plane's.
fn session_paths(status: &AgentStatus) -> Vec<(&str, &str, &SessionSnapshot)> {
    let mut paths = Vec::new();
    for (path, engine) in running(&status.transports) {
        for one in &engine.sessions {
            let of = status
                .sessions
                .iter()
                .find(|session| session.session == one.session.0 && session.path == path);
            paths.extend(of.map(|session| (path, &session.peer[..], one)));
        }
    }
    paths
}

fn running(transports: &[TransportStatus]) -> impl Iterator<Item = (&str, &Snapshot)> {
    transports.iter().filter_map(engine_of)
}

fn engine_of(transport: &TransportStatus) -> Option<(&str, &Snapshot)> {
    Some((transport.path.as_deref()?, transport.engine.as_ref()?))
}

/// A page being written.
#[derive(Default)]
struct Page(String);

impl Page {
    fn gauge(&mut self, name: &str, help: &str) {
        self.head(name, "gauge", help);
    }

    fn counter(&mut self, name: &str, help: &str) {
        self.head(name, "counter", help);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}")
            .expect("writing to a string cannot fail");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            write!(self.0, "{before}{label}=\"{}\"", escape(value))
                .expect("writing to a string cannot fail");
        }
        let after = if labels.is_empty() { "" } else { "}" };
        writeln!(self.0, "{after} {value}").expect("writing to a string cannot fail");
    }
}

/// A label's value as the format writes it.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Counters, Direction};

    #[test]
    fn a_peers_name_stays_inside_its_label() {
        let counters = Counters::default();
        let moved = Moved {
            bytes: 3,
            ..Moved::default()
        };
        counters.add("tcp", "b\"} 1\ngenie_lie{x=\"\\", Direction::Sent, moved);
        let status = crate::session::testing::node().status(0);
        let page = exposition(&status, &counters.moved());
        let line = "genie_bytes_total{path=\"tcp\",\
                    peer=\"b\\\"} 1\\ngenie_lie{x=\\\"\\\\\",direction=\"sent\"} 3";
        assert!(page.lines().any(|one| one == line), "{page}");
        assert!(!page.lines().any(|one| one.starts_with("genie_lie")));
    }

    #[test]
    fn each_name_has_one_block_and_a_base_unit() {
        let status = crate::session::testing::node().status(0);
        let page = exposition(&status, &[]);
        let mut names: Vec<&str> = Vec::new();
        for line in page.lines() {
            let Some(rest) = line.strip_prefix("# TYPE ") else {
                continue;
            };
            let (name, kind) = rest.split_once(' ').expect("name and kind");
            assert!(!names.contains(&name), "{name} twice");
            assert!(name.starts_with("genie_"));
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            // Seconds and bytes, never a multiple of them.
            let multiples = ["ms", "us", "ns", "kb", "mb", "gb", "kib", "mib", "gib"];
            assert!(
                !name.split('_').any(|word| multiples.contains(&word)),
                "{name}"
            );
            names.push(name);
        }
        assert!(names.len() > 15);
    }
}
