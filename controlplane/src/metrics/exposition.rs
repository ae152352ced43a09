//! The text format of Prometheus
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
//!
//! The invariant: *one block a name, names end in base units, and whatever a
//! peer calls itself stays inside its label*.

use genie_dataplane::engine::SessionSnapshot;

use super::counters::{Moved, Traffic};
use super::engines::{Name, devices, engines, ports, queues, running};
use super::page::Page;
use crate::status::{AgentStatus, PeerUsage};

/// Writes everything that there is to know of an agent.
pub fn exposition(status: &AgentStatus, moved: &[(Traffic, Moved)]) -> String {
    let mut page = Page::default();
    agent(&mut page, status);
    peers(&mut page, &status.peer_usage);
    traffic(&mut page, moved);
    engines(&mut page, &status.transports);
    devices(&mut page, &status.transports);
    ports(&mut page, &status.transports);
    queues(&mut page, &status.transports);
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
    for (one, engine) in running(&status.transports) {
        let transfers: u64 = engine.sessions.iter().map(|one| one.transfers).sum();
        page.sample("genie_transfers", &one.labels(&[]), transfers as f64);
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
    for (Name { path, .. }, engine) in running(&status.transports) {
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
