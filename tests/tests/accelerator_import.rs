//! Device memory that a program holds itself: handed to the agent by
//! descriptor, put from and read into, on the simulated accelerator.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use genie_client::{
    Batch, Client, ClientError, DeviceMemory, Dtype, FailureKind, IpcHandle, Memory, TensorInfo,
};
use genie_dataplane::memory::accelerator::sim::{self, Sim};
use genie_dataplane::memory::accelerator::{Accelerator, DeviceLease, DeviceRegion};
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::stage::{self, Stage, Trace};
use genie_tests::{Agent, GENEROUS, Running, eventually};
use rustix::fs::{MemfdFlags, SealFlags};

const SIM: &str = "--accelerator=sim";
/// Three slots of a stage, and some.
const LEN: u64 = 3 * (2 << 20) + 12345;

/// A program with an accelerator of its own.
struct Program {
    stage: Stage,
    accelerator: Arc<dyn Accelerator>,
}

impl Program {
    fn new() -> Self {
        let accelerator: Arc<dyn Accelerator> = Arc::new(Sim::new(sim::Config::default()).unwrap());
        let config = stage::Config::default();
        let stage = Stage::start(Arc::clone(&accelerator), config, Trace::default()).unwrap();
        Self { stage, accelerator }
    }

    fn memory(&self, bytes: &[u8]) -> Arc<DeviceRegion> {
        let region = DeviceRegion::allocate(&self.accelerator, bytes.len()).unwrap();
        let lease = DeviceLease::new(Arc::clone(&region), 0, bytes.len() as u64).unwrap();
        block_on(self.stage.upload(&host(bytes), &lease)).unwrap();
        region
    }

    fn bytes(&self, region: &Arc<DeviceRegion>, len: u64) -> Vec<u8> {
        let lease = DeviceLease::new(Arc::clone(region), 0, len).unwrap();
        let into = host(&vec![0; len as usize]);
        block_on(self.stage.download(&lease, &into)).unwrap();
        let mut bytes = vec![0; len as usize];
        into.read_at(0, &mut bytes);
        bytes
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(future)
}

fn host(bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len().max(1), Backing::Shmem).unwrap();
    let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
    lease.write_at(0, bytes.into());
    lease
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| ((i * 31) >> 3) as u8).collect()
}

fn info(name: &str, len: u64) -> TensorInfo {
    TensorInfo {
        name: name.into(),
        dtype: Dtype::U8,
        shape: vec![len],
    }
}

fn pair(folder: &Path, flags: &[&str], env: &[(&str, &str)]) -> (Agent, Agent) {
    let b = Agent::start_with(folder, "b", &["--transport=tcp", SIM]);
    let peer = b.as_peer();
    let all = [&["--transport=tcp", SIM, &peer][..], flags].concat();
    (Agent::start_in(folder, "a", &all, env), b)
}

fn connect(agent: &Agent) -> Client {
    Client::connect(&agent.socket).expect("the agent listens")
}

fn failed<T>(result: Result<T, ClientError>) -> (FailureKind, String) {
    match result {
        Err(ClientError::Failed { kind, message }) => (kind, message),
        Err(error) => panic!("the agent gave no reason: {error}"),
        Ok(_) => panic!("it was done"),
    }
}

fn assert_nothing_held(agent: &Agent) {
    eventually("the agent gives memory back", || {
        (agent.status()["arenas"]["used_bytes"] == 0).then_some(())
    });
}

#[test]
fn tensors_are_put_from_and_read_into_a_programs_own_device_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), &[], &[]);
    let program = Program::new();
    let bytes = pattern(LEN);
    let (from, into) = (program.memory(&bytes), program.memory(&[0; LEN as usize]));
    let mut client = connect(&a);
    // The same memory twice is two arenas, each counted.
    let shared = client.share_device(&from).unwrap();
    let again = client.share_device(&from).unwrap();
    let used = a.status()["arenas"]["used_bytes"].as_u64().unwrap();
    assert_eq!(used, 2 * from.len() as u64);
    let tensors = [
        shared.tensor(info("all", LEN), 0).unwrap(),
        again.tensor(info("part", 4099), 4097).unwrap(),
    ];
    for node in [Some("b"), None] {
        let put = client.put_into(node, "m", &tensors, None, Memory::Sim, |_, _| {});
        assert_eq!(put.unwrap().bytes, LEN + 4099);
        // Into memory of the program's, beginning past the start of a page.
        let target = client.share_device(&into).unwrap();
        let mut batch = Batch::read();
        for (name, offset, len) in [("m/all", 0, LEN), ("m/part", 100, 4099)] {
            let tensor = client.open(node, name).unwrap();
            let local = target.tensor(info("t", len), offset).unwrap();
            batch.range(&tensor, 0..len, &local, 0).unwrap();
            let moved = client.run(&batch).unwrap();
            assert_eq!(moved.bytes, batch.len_bytes());
            let mut expected = bytes.clone();
            if offset > 0 {
                expected[100..][..4099].copy_from_slice(&bytes[4097..][..4099]);
            }
            assert_eq!(program.bytes(&into, LEN), expected, "{node:?} {name}");
            batch = Batch::read();
        }
        client.remove(node, "m").unwrap();
    }
    drop((shared, again, tensors, client));
    assert_nothing_held(&a);
    assert_eq!(b.status()["store"]["used_bytes"], 0);
    assert_eq!(
        program.bytes(&from, LEN),
        bytes,
        "the program keeps its own"
    );
}

#[test]
fn memory_that_cannot_be_used_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let a = Agent::start(folder.path(), "a", &[SIM, "--user-arena-bytes=16MiB"]);
    let program = Program::new();
    let memory = program.memory(&[7; 4096]);
    let file = memory.export().unwrap();
    let mut client = connect(&a);
    let mut import = |memory, from, bytes| failed(client.import_device(memory, from, bytes));
    let by = |file: &OwnedFd| file.try_clone().unwrap();
    let page = by(&file);
    let page = DeviceMemory::Descriptor(page.as_fd());
    let seals = SealFlags::SHRINK | SealFlags::GROW;
    let hosts = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&hosts, 4096).unwrap();
    rustix::fs::fcntl_add_seals(&hosts, seals).unwrap();
    let zero = OwnedFd::from(File::open("/dev/zero").unwrap());
    let ipc = DeviceMemory::Ipc(IpcHandle([1; 64]));
    let cases = [
        // Memory of another device, or of none.
        (
            Memory::Cuda(0),
            page,
            4096,
            FailureKind::Accelerator,
            "does not use cuda:0",
        ),
        (
            Memory::Auto,
            page,
            4096,
            FailureKind::Invalid,
            "host is no accelerator",
        ),
        // Descriptors of the host's memory and of nothing.
        (
            Memory::Sim,
            DeviceMemory::Descriptor(hosts.as_fd()),
            4096,
            FailureKind::Descriptor,
            "is the host's memory",
        ),
        (
            Memory::Sim,
            DeviceMemory::Descriptor(zero.as_fd()),
            4096,
            FailureKind::Descriptor,
            "no memory of a simulated device",
        ),
        (
            Memory::Sim,
            ipc,
            4096,
            FailureKind::Descriptor,
            "no legacy handles",
        ),
        // More than there is, than one user may have, than an address space has.
        (
            Memory::Sim,
            page,
            4097,
            FailureKind::Descriptor,
            "4097 bytes of 4096",
        ),
        (Memory::Sim, page, 17 << 20, FailureKind::Quota, "may have"),
        (Memory::Sim, page, u64::MAX, FailureKind::Quota, "may have"),
    ];
    for (memory, from, bytes, kind, reason) in cases {
        let refused = import(memory, from, bytes);
        assert_eq!(refused.0, kind, "{refused:?}");
        assert!(refused.1.contains(reason), "{refused:?}");
    }
    assert_nothing_held(&a);
    // The connection goes on, and outside of what was passed there is nothing.
    let arena = client.import_device(Memory::Sim, page, 4096).unwrap();
    assert!(arena.tensor(info("t", 4097), 0).is_err());
    let tensor = arena.tensor(info("t", 4096), 0).unwrap();
    client.put(None, "m", &[tensor], None).unwrap();
    let got = client.get(None, "m", Memory::Auto).unwrap();
    assert_eq!(got.to_vec("t").unwrap(), [7; 4096]);
}

#[test]
fn an_agent_that_has_no_room_on_the_device_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let small = [("GENIE_SIM", "bytes=1048576")];
    let a = Agent::start_in(folder.path(), "a", &[SIM], &small);
    let program = Program::new();
    let memory = program.memory(&vec![1; 2 << 20]);
    let refused = failed(connect(&a).share_device(&memory));
    assert_eq!(refused.0, FailureKind::NoMemory, "{refused:?}");
    assert!(refused.1.contains("sim has no room"), "{refused:?}");
    assert_nothing_held(&a);
}

/// The environment variable with the socket of the agent that a child puts to.
const CHILD: &str = "GENIE_TEST_IMPORTER";

/// No test by itself: the program that is killed below.
#[test]
fn child_that_puts_its_own_memory_until_it_is_killed() {
    let Some(socket) = std::env::var_os(CHILD) else {
        return;
    };
    let program = Program::new();
    let memory = program.memory(&pattern(32 << 20));
    let mut client = Client::connect(socket).unwrap();
    let shared = client.share_device(&memory).unwrap();
    let tensor = shared.tensor(info("t", 32 << 20), 0).unwrap();
    loop {
        let all = [tensor.clone()];
        client
            .put_into(Some("b"), "child", &all, None, Memory::Sim, |_, _| {})
            .unwrap();
        client.remove(Some("b"), "child").unwrap();
    }
}

#[test]
fn a_program_that_dies_in_mid_transfer_leaves_nothing_and_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    // Each of the sixteen copies of a put takes 20 ms: it is in the middle of one.
    let (a, b) = pair(folder.path(), &[], &[("GENIE_SIM", "delay-us=20000")]);
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args([
                "--exact",
                "child_that_puts_its_own_memory_until_it_is_killed",
            ])
            .env(CHILD, &a.socket);
        let child = Running::start(child);
        eventually("a put is under way", || {
            let arriving = b.status()["store"]["used_bytes"].as_u64()? > 0;
            arriving.then_some(())
        });
        child.signal(rustix::process::Signal::KILL);
        let ended = child.wait(GENEROUS);
        assert!(!ended.status.success());
        assert_nothing_held(&a);
        // What it had put whole may stay; what it had not does not.
        eventually("the half of a put is gone", || {
            let _ = connect(&a).remove(Some("b"), "child");
            (b.status()["store"]["used_bytes"] == 0).then_some(())
        });
    }
    // The session and the device go on.
    let program = Program::new();
    let bytes = pattern(100_000);
    let memory = program.memory(&bytes);
    let mut client = connect(&a);
    let shared = client.share_device(&memory).unwrap();
    let tensor = shared.tensor(info("t", 100_000), 0).unwrap();
    client.put(Some("b"), "m", &[tensor], None).unwrap();
    let got = client.get(Some("b"), "m", Memory::Auto).unwrap();
    assert_eq!(got.to_vec("t").unwrap(), bytes);
    assert_eq!(b.log().matches("session up").count(), 1);
    let died = a.status()["accelerators"][0]["reason"].is_string();
    assert!(!died, "{}", a.status());
}

/// The environment variable with the socket of the agent whose memory a child maps.
const BORROWER: &str = "GENIE_TEST_BORROWER";

/// No test by itself: imports the agent's memory, puts from it and is killed.
#[test]
fn child_that_maps_the_agents_memory_until_it_is_killed() {
    let Some(socket) = std::env::var_os(BORROWER) else {
        return;
    };
    let program = Program::new();
    let mut client = Client::connect(socket).unwrap();
    let arena = client.device_arena(&program.accelerator, 32 << 20).unwrap();
    let tensor = arena.tensor(info("t", 32 << 20), 0).unwrap();
    block_on(
        program
            .stage
            .upload(&host(&pattern(32 << 20)), arena.lease()),
    )
    .unwrap();
    loop {
        let all = [tensor.clone()];
        client
            .put_into(Some("b"), "child", &all, None, Memory::Sim, |_, _| {})
            .unwrap();
        client.remove(Some("b"), "child").unwrap();
    }
}

#[test]
fn a_program_that_dies_with_the_agents_memory_mapped_gives_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), &[], &[("GENIE_SIM", "delay-us=20000")]);
    // Memory of somebody else on the same device.
    let program = Program::new();
    let bytes = pattern(LEN);
    let memory = program.memory(&bytes);
    let mut client = connect(&a);
    let shared = client.share_device(&memory).unwrap();
    let tensor = shared.tensor(info("t", LEN), 0).unwrap();
    let put = |client: &mut Client, node| {
        let all = [tensor.clone()];
        client.put_into(node, "mine", &all, None, Memory::Sim, |_, _| {})
    };
    put(&mut client, None).unwrap();
    let others = a.status()["arenas"]["used_bytes"].clone();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args([
            "--exact",
            "child_that_maps_the_agents_memory_until_it_is_killed",
        ])
        .env(BORROWER, &a.socket);
    let child = Running::start(child);
    eventually("a put is under way", || {
        (b.status()["store"]["used_bytes"].as_u64()? > 0).then_some(())
    });
    child.signal(rustix::process::Signal::KILL);
    assert!(!child.wait(GENEROUS).status.success());
    eventually("the agent has its memory back", || {
        (a.status()["arenas"]["used_bytes"] == others).then_some(())
    });
    eventually("the half of a put is gone", || {
        let _ = connect(&a).remove(Some("b"), "child");
        (b.status()["store"]["used_bytes"] == 0).then_some(())
    });
    // The other memory is as it was, and the session and the device go on.
    let got = client.get(None, "mine", Memory::Auto).unwrap();
    assert!(got.to_vec("t").unwrap() == bytes);
    put(&mut client, Some("b")).unwrap();
    let got = client.get(Some("b"), "mine", Memory::Auto).unwrap();
    assert!(got.to_vec("t").unwrap() == bytes);
    assert_eq!(b.log().matches("session up").count(), 1);
}
