//! Sessions that lose their path, and go on over another one.
//!
//! Two agents in this process, over devices in memory, loopback TCP and shm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use genie_client::Owner;
use genie_controlplane::node::Node;
use genie_controlplane::status::SessionStatus;
use genie_controlplane::tensor::{Dtype, TensorInfo};
use genie_controlplane::transfer::{self, Progress, Source, TransferError};
use genie_controlplane::transport::Transport;
use genie_dataplane::memory::{Backing, Lease, Region, View};
use genie_tests::eventually;
use genie_tests::nodes::{Nodes, Setup};

const MIB: usize = 1 << 20;

/// A tensor to send, of bytes that differ with `seed`.
fn source(name: &str, len: usize, seed: u64) -> Source {
    let region = Region::with_backing(len.max(1), Backing::Shmem).unwrap();
    let lease = Lease::new(region, 0, len as u64).unwrap();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut block = vec![0u8; 64 << 10];
    for at in (0..len).step_by(block.len()) {
        random.fill(&mut block);
        let end = (len - at).min(block.len());
        lease.write_at(at, View::from(&block[..end]));
    }
    let info = TensorInfo {
        name: name.to_owned(),
        dtype: Dtype::U8,
        shape: vec![len as u64],
    };
    let lease = lease.into();
    Source { info, lease }
}

fn crc(source: &Source) -> u32 {
    let lease = source.lease.host().expect("host memory");
    lease.crc32c(0..lease.len())
}

/// The CRC32C of what `node` stores.
fn stored(node: &Node, name: &str) -> u32 {
    let reader = Owner::Peer("a".to_owned());
    let tensor = node.store.tensor(name, &reader).expect("it is stored");
    let lease = tensor.lease.host().expect("host memory").clone();
    lease.crc32c(0..lease.len())
}

async fn put(
    a: &Arc<Node>,
    prefix: &str,
    sources: Vec<Source>,
) -> Result<genie_client::Moved, TransferError> {
    let session = a.session("b").await?;
    let progress = Progress::default();
    transfer::put(
        &session,
        prefix,
        sources,
        None,
        Default::default(),
        None,
        &progress,
    )
    .await
}

fn session(node: &Node) -> SessionStatus {
    Nodes::session(node).expect("the session lives")
}

/// Puts one tensor of this length and cuts the cable in the middle of it.
fn put_and_cut(nodes: &Nodes, len: usize) -> (genie_client::Moved, Source) {
    let source = source("x", len, 7);
    nodes.runtime.block_on(nodes.a.session("b")).unwrap();
    nodes.cable.cut_after(len as u64 / 9000 / 3);
    let moved = nodes
        .runtime
        .block_on(put(&nodes.a, "big", vec![source.clone()]));
    (moved.expect("it goes on"), source)
}

#[test]
fn a_put_whose_device_path_dies_goes_on_over_tcp_and_later_returns() {
    let nodes = Nodes::start(&Setup::default());
    let len = 192 * MIB + 5;
    let (moved, source) = put_and_cut(&nodes, len);
    assert!(nodes.cable.is_cut(), "in the middle");
    assert_eq!(moved.path, "tcp");
    assert!(moved.reasons[0].starts_with("dpdk: lost: "), "{moved:?}");
    assert_eq!(stored(&nodes.b, "big/x"), crc(&source));
    // Only what was missing went over TCP.
    let kernel = moved.received_copies.kernel;
    assert!(0 < kernel && kernel < len as u64 * 9 / 10, "{kernel}");
    for node in [&nodes.a, &nodes.b] {
        let status = session(node);
        assert_eq!((status.path.as_str(), status.path_changes), ("tcp", 1));
        let change = &status.changes[0];
        assert!(change.from.starts_with("dpdk:"), "{change:?}");
        assert!(change.reason.contains("path was lost"), "{change:?}");
        assert!(status.reasons[0].starts_with("dpdk: lost: "), "{status:?}");
    }

    nodes.cable.mend();
    let back = Instant::now();
    eventually("the session returns to the device", || {
        let status = session(&nodes.a);
        status.path.starts_with("dpdk:").then_some(())
    });
    // It has proved itself for twice the liveness limit.
    assert!(
        back.elapsed() >= Duration::from_secs(2),
        "{:?}",
        back.elapsed()
    );
    eventually("the peer knows", || {
        (session(&nodes.b).path_changes == 2).then_some(())
    });
    let again = nodes
        .runtime
        .block_on(put(&nodes.a, "big", vec![source.clone()]));
    let again = again.expect("the device works again");
    assert!(again.path.starts_with("dpdk:"), "{again:?}");
    assert_eq!(again.reasons, Vec::<String>::new());
}

#[test]
fn an_idle_session_leaves_a_dead_device_before_it_is_needed_and_returns() {
    let nodes = Nodes::start(&Setup {
        liveness: Duration::from_secs(3),
        ..Setup::default()
    });
    let Nodes { a, b, cable, .. } = &nodes;
    nodes.runtime.block_on(a.session("b")).unwrap();
    // Silence alone is no fault, however long it lasts.
    std::thread::sleep(Duration::from_secs(8));
    assert_eq!(session(a).path_changes, 0);
    cable.cut();
    eventually("both know", || {
        let paths = [a, b].map(|node| session(node).path);
        (paths == ["tcp", "tcp"]).then_some(())
    });
    let change = &session(a).changes[0];
    assert!(change.reason.contains("nothing heard for 3s"), "{change:?}");
    cable.mend();
    eventually("the session returns to the device", || {
        session(a).path.starts_with("dpdk:").then_some(())
    });
}

#[test]
fn a_get_goes_on_too() {
    let nodes = Nodes::start(&Setup::default());
    let source = source("x", 160 * MIB, 3);
    let Nodes { a, b, cable, .. } = &nodes;
    nodes
        .runtime
        .block_on(put(a, "m", vec![source.clone()]))
        .expect("a sound path");
    cable.cut_after(5000);
    let room = a.store.budget().room();
    let got = nodes.runtime.block_on(async {
        let session = a.session("b").await.unwrap();
        transfer::get(&session, "m", &room, &Progress::default()).await
    });
    let (arrived, moved) = got.expect("it goes on");
    assert_eq!(moved.path, "tcp");
    let lease = arrived.allocation.lease(0, 160 * MIB as u64);
    let lease = lease.host().expect("host memory");
    assert_eq!(lease.crc32c(0..lease.len()), crc(&source));
    assert_eq!(session(b).requests, 0);
}

#[test]
fn a_batch_of_many_tensors_goes_on_and_each_is_there_once() {
    let nodes = Nodes::start(&Setup::default());
    let sources: Vec<_> = (0..6000)
        .map(|i| source(&format!("t{i}"), i * 7 % 40_000, i as u64))
        .collect();
    nodes.runtime.block_on(nodes.a.session("b")).unwrap();
    nodes.cable.cut_after(4000);
    let moved = nodes.runtime.block_on(put(&nodes.a, "m", sources.clone()));
    let moved = moved.expect("it goes on");
    assert!(nodes.cable.is_cut());
    assert_eq!((moved.tensors, moved.path.as_str()), (6000, "tcp"));
    let total: usize = (0..6000).map(|i| i * 7 % 40_000).sum();
    assert_eq!(moved.bytes, total as u64);
    for source in &sources {
        let name = format!("m/{}", source.info.name);
        assert_eq!(stored(&nodes.b, &name), crc(source), "{name}");
    }
    assert_eq!(nodes.b.store.usage().tensors, 6000);
}

#[test]
fn a_session_told_to_use_the_device_alone_fails_with_the_reason() {
    let nodes = Nodes::start(&Setup {
        preference: "dpdk",
        ..Setup::default()
    });
    nodes.runtime.block_on(nodes.a.session("b")).unwrap();
    nodes.cable.cut_after(5000);
    let source = source("x", 160 * MIB, 1);
    let began = Instant::now();
    let put = nodes.runtime.block_on(put(&nodes.a, "m", vec![source]));
    let error = put.expect_err("there is no other path").to_string();
    assert!(error.contains("the path was lost"), "{error}");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    eventually("everything is given back", || {
        let used = nodes.b.store.usage().used_bytes;
        (used == 0 && Nodes::session(&nodes.b).is_none()).then_some(())
    });
}

#[test]
fn an_outage_of_a_moment_changes_nothing() {
    let nodes = Nodes::start(&Setup {
        liveness: Duration::from_secs(4),
        ..Setup::default()
    });
    let Nodes { a, cable, .. } = &nodes;
    nodes.runtime.block_on(a.session("b")).unwrap();
    cable.cut_after(4000);
    let moved = std::thread::scope(|scope| {
        scope.spawn(|| {
            eventually("it is cut", || cable.is_cut().then_some(()));
            std::thread::sleep(Duration::from_millis(1500));
            cable.mend();
        });
        let source = source("x", 160 * MIB, 9);
        nodes.runtime.block_on(put(a, "m", vec![source]))
    });
    let moved = moved.expect("it goes on over the same path");
    assert!(moved.path.starts_with("dpdk:"), "{moved:?}");
    assert_eq!(session(a).path_changes, 0);
}

#[test]
fn a_device_that_gives_nothing_back_is_left_for_tcp() {
    let nodes = Nodes::start(&Setup::default());
    let Nodes { a, b, cable, .. } = &nodes;
    nodes.runtime.block_on(a.session("b")).unwrap();
    let source = source("x", 160 * MIB, 2);
    let before = cable.delivered();
    let moved = std::thread::scope(|scope| {
        scope.spawn(|| {
            eventually("it is under way", || {
                (cable.delivered() > before + 3000).then_some(())
            });
            cable.jam();
        });
        nodes.runtime.block_on(put(a, "m", vec![source.clone()]))
    });
    assert_eq!(moved.expect("it goes on").path, "tcp");
    assert_eq!(stored(b, "m/x"), crc(&source));
}

#[test]
fn a_put_that_loses_one_of_its_connections_goes_on_over_new_ones() {
    let nodes = Nodes::start(&Setup {
        preference: "tcp",
        ..Setup::default()
    });
    let len = 192 * MIB + 5;
    let source = source("x", len, 9);
    nodes.runtime.block_on(nodes.a.session("b")).unwrap();
    nodes.relay.cut_one_after(len as u64 / 2);
    let moved = nodes
        .runtime
        .block_on(put(&nodes.a, "big", vec![source.clone()]));
    let moved = moved.expect("it goes on");
    assert_eq!(moved.path, "tcp");
    assert_eq!(stored(&nodes.b, "big/x"), crc(&source));
    // Only what was missing was sent again: less than a quarter is half-read
    // chunks, and what was in the buffers of the lost connections.
    let kernel = moved.received_copies.kernel;
    assert!(kernel < len as u64 * 5 / 4, "{kernel} of {len}");
    for node in [&nodes.a, &nodes.b] {
        let status = session(node);
        assert_eq!((status.path.as_str(), status.path_changes), ("tcp", 1));
        let change = &status.changes[0];
        assert_eq!((change.from.as_str(), change.to.as_str()), ("tcp", "tcp"));
        assert!(change.reason.contains("connection"), "{change:?}");
    }
}

/// Puts 256 MiB over shm and stops the engine of `b`, `delay` after it expects
/// the first tensor. Returns how many bytes went over TCP instead, and of how many.
fn put_and_stop_shm(sources: &[Source], delay: Duration) -> (u64, u64) {
    let nodes = Nodes::start(&Setup {
        preference: "shm,tcp",
        shm: true,
        // So that there is a middle where one processor does it all: tensor by
        // tensor, not each step of all of them in turn.
        peer_transfers: 4,
        ..Setup::default()
    });
    nodes.runtime.block_on(nodes.a.session("b")).unwrap();
    assert_eq!(session(&nodes.a).path, "shm");
    let shm = nodes.b.transports.engine(Transport::Shm);
    let endpoint = &shm.expect("it was started").endpoint;
    let (free, over) = (endpoint.free(), AtomicBool::new(false));
    let moved = std::thread::scope(|scope| {
        scope.spawn(|| {
            while endpoint.free() == free && !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_micros(50));
            }
            std::thread::sleep(delay);
            endpoint.stop();
        });
        let put = put(&nodes.a, "many", sources.to_vec());
        let moved = nodes.runtime.block_on(put);
        over.store(true, Ordering::SeqCst);
        moved.expect("it goes on")
    });
    for source in sources {
        let name = format!("many/{}", source.info.name);
        assert_eq!(stored(&nodes.b, &name), crc(source), "{name}");
    }
    // Over shm the sending end copies nothing.
    let [sent, received] = [&moved.sent_copies, &moved.received_copies].map(|one| one.kernel);
    // Tensors that were copied but not yet confirmed are sent again whole, all
    // of them at the worst: by each path a byte is copied once at the most.
    assert!(received <= moved.bytes * 2, "{moved:?}");
    if sent > 0 {
        let status = session(&nodes.a);
        assert_eq!(moved.path, "tcp");
        assert_eq!((status.path.as_str(), status.path_changes), ("tcp", 1));
        assert!(status.reasons[0].starts_with("shm: lost: "), "{status:?}");
    }
    (sent, moved.bytes)
}

#[test]
fn a_put_whose_shm_path_dies_goes_on_over_tcp() {
    let sources: Vec<Source> = (0..32)
        .map(|index| source(&index.to_string(), 8 * MIB + 3, index))
        .collect();
    // How long it takes depends on the machine, and on what else that does.
    let mut delay = Duration::from_millis(16);
    for _ in 0..60 {
        let (sent, bytes) = put_and_stop_shm(&sources, delay);
        println!("stopped after {delay:?}: {sent} of {bytes} bytes went over TCP");
        match sent {
            0 => delay = delay * 2 / 3,
            // Some of it was there already.
            sent if sent < bytes => return,
            _ => delay = delay * 5 / 4 + Duration::from_micros(100),
        }
    }
    panic!("it was never stopped in the middle");
}

/// Device, TCP, device, again and again under load. Each change's gap is
/// printed: `GENIE_FAILOVER_SECONDS=60 cargo test --release -p genie-tests
/// --test failover -- --nocapture load`.
#[test]
fn continuous_load_survives_every_change_of_path() {
    let seconds = std::env::var("GENIE_FAILOVER_SECONDS");
    let seconds = seconds.map_or(12, |text| text.parse().expect("a number of seconds"));
    let nodes = Nodes::start(&Setup::default());
    let Nodes { a, b, cable, .. } = &nodes;
    let end = Instant::now() + Duration::from_secs(seconds);
    let puts = std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < end {
                std::thread::sleep(Duration::from_secs(2));
                cable.cut();
                std::thread::sleep(Duration::from_secs(2));
                cable.mend();
                std::thread::sleep(Duration::from_secs(5));
            }
        });
        let mut puts = 0u64;
        while Instant::now() < end {
            let source = source("x", 64 * MIB + 13, puts);
            let moved = nodes.runtime.block_on(put(a, "load", vec![source.clone()]));
            let moved = moved.unwrap_or_else(|error| panic!("put {puts}: {error}"));
            let crc = crc(&source);
            assert_eq!(moved.digest, format!("crc32c:{crc:08x}"));
            assert_eq!(stored(b, "load/x"), crc, "put {puts}");
            puts += 1;
        }
        puts
    });
    let status = session(a);
    println!(
        "{puts} puts of 64 MiB, {} changes of path",
        status.path_changes
    );
    for change in &status.changes {
        println!(
            "{} -> {}: {:.1} ms without a path: {}",
            change.from, change.to, change.gap_ms, change.reason
        );
    }
    assert!(status.path_changes >= 2, "there and back: {status:?}");
    assert_eq!(b.store.usage().tensors, 1);
}
