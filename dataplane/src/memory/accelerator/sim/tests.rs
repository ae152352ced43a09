use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use super::*;
use crate::memory::accelerator::{DeviceLease, DeviceRegion, Pinned, Way};
use crate::memory::{Backing, Lease, Region};

const PATIENCE: Duration = Duration::from_secs(60);

fn sim(config: Config) -> (Arc<Sim>, Arc<dyn Accelerator>) {
    let sim = Arc::new(Sim::new(config).unwrap());
    let accelerator: Arc<dyn Accelerator> = Arc::clone(&sim) as _;
    (sim, accelerator)
}

/// Host memory that the device may reach. Never unpinned: the device goes first.
fn pinned(sim: &Sim, bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len().max(1), Backing::Shmem).unwrap();
    // SAFETY: the tests keep the lease for as long as they copy.
    unsafe { sim.pin(region.as_ptr(), region.len()) }.unwrap();
    let lease = Lease::new(region, 0, bytes.len() as u64).unwrap();
    lease.write_at(0, bytes.into());
    lease
}

fn bytes(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.len()];
    lease.read_at(0, &mut bytes);
    bytes
}

fn device(accelerator: &Arc<dyn Accelerator>, len: usize) -> DeviceLease {
    let region = DeviceRegion::allocate(accelerator, len).unwrap();
    DeviceLease::new(region, 0, len as u64).unwrap()
}

fn op(host: &Lease, device: &DeviceLease, way: Way) -> CopyOp {
    CopyOp {
        host: host.clone(),
        device: device.clone(),
        way,
    }
}

fn wait(stream: &mut dyn Stream, batch: u64) -> Result<(), AcceleratorError> {
    let begin = Instant::now();
    while stream.completed()? < batch {
        assert!(begin.elapsed() < PATIENCE, "a copy never ended");
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

#[test]
fn bytes_go_to_the_device_and_come_back() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 10_000);
    let data: Vec<u8> = (0..10_000u32).map(|at| (at * 7) as u8).collect();
    let (from, to) = (pinned(&sim, &data), pinned(&sim, &vec![0; 10_000]));
    let mut stream = accelerator.stream().unwrap();
    stream.copy(vec![op(&from, &there, Way::ToDevice)]).unwrap();
    let last = stream.copy(vec![op(&to, &there, Way::ToHost)]).unwrap();
    wait(&mut *stream, last).unwrap();
    assert_eq!(bytes(&to), data);
    assert_eq!((last, sim.copies_done(), sim.used_bytes()), (2, 2, 12288));
    drop(there);
    assert_eq!(sim.used_bytes(), 0);
}

/// Run as a child by the next test: touches device memory with the CPU.
#[test]
fn child_that_touches_device_memory() {
    if std::env::var_os("GENIE_TEST_TOUCH").is_none() {
        return;
    }
    let (_sim, accelerator) = sim(Config::default());
    let lease = device(&accelerator, 4096);
    let address = lease.address().0 as *const u8;
    // SAFETY: not safe at all: this must fault, which is what is tested.
    let byte = unsafe { address.read_volatile() };
    println!("read {byte}");
}

#[test]
fn a_stray_access_of_the_cpu_faults() {
    let name = "memory::accelerator::sim::tests::child_that_touches_device_memory";
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("GENIE_TEST_TOUCH", "1")
        .output()
        .unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGSEGV), "{child:?}");
}

#[test]
fn memory_that_is_not_pinned_or_not_the_devices_is_refused() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 64);
    let unpinned = Lease::whole(Region::with_backing(64, Backing::Shmem).unwrap());
    let unpinned = unpinned.slice(0..64).unwrap();
    let mut stream = accelerator.stream().unwrap();
    let refused = stream.copy(vec![op(&unpinned, &there, Way::ToHost)]);
    assert_eq!(refused.unwrap_err().code(), Some(INVALID_VALUE));
    let host = pinned(&sim, &[0; 64]);
    let (_other, others) = self::sim(Config::default());
    let foreign = device(&others, 64);
    let refused = stream.copy(vec![op(&host, &foreign, Way::ToHost)]);
    assert!(matches!(
        refused,
        Err(AcceleratorError::NotItsMemory { .. })
    ));
    // SAFETY: refused, since it is the host's.
    let adopted = unsafe {
        let address = DeviceAddress(host.as_ptr() as u64);
        DeviceRegion::adopt(&accelerator, address, 64, Box::new(()))
    };
    assert!(matches!(
        adopted,
        Err(AcceleratorError::NotItsMemory { .. })
    ));
    assert_eq!(sim.copies_done(), 0);
}

#[test]
fn a_full_device_says_so_with_the_drivers_code() {
    let (sim, accelerator) = sim(Config {
        memory_bytes: 8192,
        ..Config::default()
    });
    let held = device(&accelerator, 8192);
    for len in [1, 8193, usize::MAX] {
        let refused = DeviceRegion::allocate(&accelerator, len).unwrap_err();
        assert!(
            matches!(refused, AcceleratorError::OutOfMemory { code: 2, .. }),
            "{refused}"
        );
    }
    drop(held);
    assert_eq!(sim.used_bytes(), 0);
    device(&accelerator, 8192);
}

#[test]
fn copies_of_one_stream_keep_their_order_and_those_of_two_do_not() {
    let (sim, accelerator) = sim(Config {
        seed: 7,
        ..Config::default()
    });
    let there = device(&accelerator, 64);
    let marks: Vec<Lease> = (0..40u8).map(|mark| pinned(&sim, &[mark; 64])).collect();
    let mut streams = [accelerator.stream().unwrap(), accelerator.stream().unwrap()];
    sim.hold();
    let (mut seen, mut last) = (Vec::new(), [0; 2]);
    for (index, mark) in marks.iter().enumerate() {
        let into = pinned(&sim, &[255; 64]);
        let batch = vec![
            op(mark, &there, Way::ToDevice),
            op(&into, &there, Way::ToHost),
        ];
        last[index % 2] = streams[index % 2].copy(batch).unwrap();
        seen.push(into);
    }
    sim.release();
    wait(&mut *streams[0], last[0]).unwrap();
    wait(&mut *streams[1], last[1]).unwrap();
    let read: Vec<u8> = seen.iter().map(|into| bytes(into)[0]).collect();
    // Within a stream what is read back is its own last write or one of the
    // other stream's in between; across streams some are not in turn.
    let of_others = read
        .iter()
        .enumerate()
        .filter(|(at, mark)| usize::from(**mark) != *at);
    assert!(of_others.count() > 0, "nothing was reordered: {read:?}");
    assert_eq!(sim.copies_done(), 80);
}

#[test]
fn a_copy_that_fails_ends_what_its_stream_began_and_no_more() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 64);
    let host = pinned(&sim, &[3; 64]);
    let mut stream = accelerator.stream().unwrap();
    let mut other = accelerator.stream().unwrap();
    sim.hold();
    sim.fail_copy(0, Fault::Once);
    let last = stream.copy(vec![op(&host, &there, Way::ToDevice)]).unwrap();
    sim.release();
    let error = wait(&mut *stream, last).unwrap_err();
    assert_eq!((error.code(), error.is_sticky()), (Some(UNKNOWN), false));
    let again = stream.copy(vec![op(&host, &there, Way::ToDevice)]).unwrap();
    wait(&mut *stream, again).unwrap();
    let last = other.copy(vec![op(&host, &there, Way::ToHost)]).unwrap();
    wait(&mut *other, last).unwrap();
}

#[test]
fn a_sticky_error_fails_every_call_and_memory_can_still_be_given_back() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 64);
    let host = pinned(&sim, &[3; 64]);
    let mut stream = accelerator.stream().unwrap();
    sim.fail_copy(0, Fault::Sticky);
    let last = stream.copy(vec![op(&host, &there, Way::ToDevice)]).unwrap();
    let error = wait(&mut *stream, last).unwrap_err();
    assert_eq!((error.code(), error.is_sticky()), (Some(214), true));
    let refused = [
        accelerator.allocate(1).unwrap_err(),
        accelerator.stream().err().unwrap(),
        stream
            .copy(vec![op(&host, &there, Way::ToHost)])
            .unwrap_err(),
        stream.completed().unwrap_err(),
    ];
    assert!(refused.iter().all(|refused| *refused == error));
    drop((stream, there));
    assert_eq!(sim.used_bytes(), 0);
}

#[test]
fn memory_is_passed_by_descriptor() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 4096);
    let host = pinned(&sim, &[9; 4096]);
    let mut stream = accelerator.stream().unwrap();
    let last = stream.copy(vec![op(&host, &there, Way::ToDevice)]).unwrap();
    wait(&mut *stream, last).unwrap();
    let file = there.region().export().unwrap();
    let (importer, importers) = self::sim(Config::default());
    let import = |file, len| DeviceRegion::import(&importers, Import::Descriptor { file, len });
    assert!(import(file.try_clone().unwrap(), 4097).is_err());
    let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(matches!(
        import(null, 1),
        Err(AcceleratorError::Import { .. })
    ));
    let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
    let hosts = rustix::fs::memfd_create("genie", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&hosts, 4096).unwrap();
    rustix::fs::fcntl_add_seals(&hosts, seals).unwrap();
    let refused = import(hosts, 4096).unwrap_err().to_string();
    assert!(refused.contains("is the host's memory"), "{refused}");
    let imported = DeviceLease::whole(import(file, 4096).unwrap());
    // The exporter is gone; what was imported stays.
    drop((there, stream));
    let into = pinned(&importer, &[0; 4096]);
    let mut stream = importers.stream().unwrap();
    let last = stream
        .copy(vec![op(&into, &imported, Way::ToHost)])
        .unwrap();
    wait(&mut *stream, last).unwrap();
    assert_eq!(bytes(&into), [9; 4096]);
}

#[test]
fn copies_wait_for_an_event_and_signal_another() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 64);
    let (from, to) = (pinned(&sim, &[5; 64]), pinned(&sim, &[0; 64]));
    let (ready, done) = (sim.event(), sim.event());
    let mut stream = accelerator.stream().unwrap();
    stream.wait_for(ready).unwrap();
    stream.copy(vec![op(&from, &there, Way::ToDevice)]).unwrap();
    let last = stream.copy(vec![op(&to, &there, Way::ToHost)]).unwrap();
    stream.signal(done).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((stream.completed(), sim.is_set(done)), (Ok(0), false));
    sim.set(ready);
    wait(&mut *stream, last).unwrap();
    assert_eq!(bytes(&to), [5; 64]);
    let begin = Instant::now();
    while !sim.is_set(done) {
        assert!(begin.elapsed() < PATIENCE, "the event was never signalled");
        std::thread::yield_now();
    }
}

#[test]
fn many_small_copies_and_pieces_are_one_operation() {
    let (sim, accelerator) = sim(Config::default());
    let there = device(&accelerator, 64 << 10);
    let data: Vec<u8> = (0..64u32 << 10).map(|at| ((at * 7) >> 3) as u8).collect();
    let host = pinned(&sim, &data);
    let mut stream = accelerator.stream().unwrap();
    let part = |lease: &DeviceLease, at: u64, len: u64| lease.slice(at..at + len).unwrap();
    // Each to a place that is another's at the other end.
    let small = |way, from: &Lease| {
        let one = |n: u64| {
            let (here, at) = (n * 1000, (31 - n) * 1000);
            op(
                &from.slice(here..here + 1000).unwrap(),
                &part(&there, at, 1000),
                way,
            )
        };
        (0..32).map(one).collect::<Vec<_>>()
    };
    let last = stream.copy(small(Way::ToDevice, &host)).unwrap();
    wait(&mut *stream, last).unwrap();
    assert_eq!(sim.copies_done(), 1);
    let back = pinned(&sim, &vec![0; data.len()]);
    let last = stream.copy(small(Way::ToHost, &back)).unwrap();
    wait(&mut *stream, last).unwrap();
    assert_eq!(bytes(&back)[..32_000], data[..32_000]);

    // Within the device: what was turned round is turned back.
    let other = device(&accelerator, 64 << 10);
    let piece = |n: u64| Piece {
        from: part(&there, (31 - n) * 1000, 1000),
        to: part(&other, n * 1000, 1000),
    };
    let last = stream.gather((0..32).map(piece).collect()).unwrap();
    wait(&mut *stream, last).unwrap();
    assert_eq!(sim.copies_done(), 3);
    let whole = stream.copy(vec![op(&back, &other, Way::ToHost)]).unwrap();
    wait(&mut *stream, whole).unwrap();
    assert_eq!(bytes(&back)[..32_000], data[..32_000]);
    // It fails as one, and the stream goes on.
    sim.fail_copy(0, Fault::Once);
    let last = stream.gather((0..32).map(piece).collect()).unwrap();
    let failed = wait(&mut *stream, last).unwrap_err();
    assert_eq!((failed.code(), failed.is_sticky()), (Some(UNKNOWN), false));
    let last = stream.gather(vec![piece(0)]).unwrap();
    wait(&mut *stream, last).unwrap();
    // Ends that do not fit, and memory of somebody else.
    let uneven = Piece {
        from: part(&there, 0, 9),
        to: part(&other, 0, 10),
    };
    let refused = stream.gather(vec![piece(0), uneven]).unwrap_err();
    assert_eq!(refused.code(), Some(INVALID_VALUE));
    let (_sim, others) = self::sim(Config::default());
    let stray = Piece {
        from: device(&others, 10),
        to: part(&other, 0, 10),
    };
    let refused = stream.gather(vec![stray]).unwrap_err();
    assert!(matches!(refused, AcceleratorError::NotItsMemory { .. }));
}

#[test]
fn memory_is_pinned_once_and_unpinned_before_it_goes_away() {
    let (sim, accelerator) = sim(Config::default());
    let region = Region::with_backing(8192, Backing::Shmem).unwrap();
    let one = Pinned::new(&region, &accelerator).unwrap();
    let error = Pinned::new(&region, &accelerator).unwrap_err();
    assert_eq!(error.code(), Some(ALREADY_REGISTERED));
    let at = region.as_ptr();
    // A part of it, and a piece that only touches its end.
    for inside in [0, 4096] {
        // SAFETY: refused; mapped in any case.
        let refused = unsafe { sim.pin(at.wrapping_add(inside), 4096) };
        assert_eq!(refused.unwrap_err().code(), Some(ALREADY_REGISTERED));
    }
    assert_eq!((sim.pinned(), sim.violations()), (1, vec![]));
    drop(one);
    assert_eq!((sim.pinned(), sim.violations()), (0, vec![]));
    // SAFETY: not pinned any more: nothing but a record of it.
    unsafe { sim.unpin(at) };
    assert!(sim.violations()[0].ends_with("which is not pinned"));
    drop(region);
    // Unless another test maps something there at that very moment.
    let is_noticed = (0..100).any(|_| {
        let region = Region::with_backing(8192, Backing::Shmem).unwrap();
        let at = region.as_ptr();
        // SAFETY: mapped until `region` is dropped, which is too early.
        unsafe { sim.pin(at, 8192) }.unwrap();
        drop(region);
        // SAFETY: no copy was begun.
        unsafe { sim.unpin(at) };
        sim.violations().len() > 1
    });
    assert!(is_noticed);
    assert!(sim.violations()[1].ends_with("after it was unmapped"));
}

#[test]
fn memory_that_copies_wait_for_is_not_unpinned_unnoticed() {
    let (sim, accelerator) = sim(Config::default());
    let region = Region::with_backing(4096, Backing::Shmem).unwrap();
    let there = device(&accelerator, 4096);
    let pinned = Pinned::new(&region, &accelerator).unwrap();
    let mut stream = accelerator.stream().unwrap();
    sim.hold();
    let host = Lease::whole(Arc::clone(&region));
    let last = stream.copy(vec![op(&host, &there, Way::ToDevice)]).unwrap();
    drop(pinned);
    assert!(sim.violations()[0].ends_with("while copies wait for it"));
    sim.release();
    wait(&mut *stream, last).unwrap();
}
