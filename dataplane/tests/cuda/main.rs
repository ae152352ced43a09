//! The CUDA driver's calls and their order, on a library that records them.
//!
//! No device takes part: these tests say that the right calls are made in the
//! right order and what becomes of their errors, not that a device would agree.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use genie_dataplane::memory::accelerator::cuda::Cuda;
use genie_dataplane::memory::accelerator::direct::{DeviceSide, Ordering};
use genie_dataplane::memory::accelerator::{
    Accelerator, AcceleratorError, CopyOp, DeviceAddress, DeviceLease, DeviceRegion, ForeignEvent,
    Import, MemoryKind, Piece, Pinned, Stream, Way,
};
use genie_dataplane::memory::{Backing, Lease, Region};
use genie_dataplane::stage::{Config, Stage, StageError, Trace};
use libloading::Library;

const CUDA: MemoryKind = MemoryKind::Cuda(0);

/// A recording driver of one test's own.
struct Fake {
    library: Library,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Fake {
    /// `lacks` is what the library is built without.
    fn new(lacks: &str) -> Self {
        static BUILT: OnceLock<tempfile::TempDir> = OnceLock::new();
        let built = BUILT.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            for lacks in ["nothing", "virtual_memory", "events", "kernels"] {
                build(&folder.path().join(lacks), lacks);
            }
            folder
        });
        // The loader knows a library by its file: a copy is another one.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcuda.so.1");
        std::fs::copy(built.path().join(lacks), &path).unwrap();
        // SAFETY: built above; it has no initialisers.
        let library = unsafe { Library::new(&path) }.unwrap();
        Self {
            library,
            path,
            _folder: folder,
        }
    }

    fn open(&self, ordinal: u32) -> Result<Cuda, AcceleratorError> {
        Cuda::open_with(&self.path, ordinal)
    }

    fn accelerator(&self) -> Arc<dyn Accelerator> {
        Arc::new(self.open(0).unwrap())
    }

    fn set(&self, version: i32, devices: i32) {
        // SAFETY: the type is that in `fake.rs`.
        let set = unsafe {
            self.library
                .get::<unsafe extern "C" fn(i32, i32)>("fake_set")
        };
        // SAFETY: two numbers.
        unsafe { set.unwrap()(version, devices) };
    }

    fn set_attribute(&self, which: u32, value: i32) {
        // SAFETY: the type is that in `fake.rs`.
        let set = unsafe {
            self.library
                .get::<unsafe extern "C" fn(u32, i32)>("fake_attribute")
        };
        // SAFETY: two numbers.
        unsafe { set.unwrap()(which, value) };
    }

    fn fail(&self, call: &str, after: u32, code: u32) {
        type Fail = unsafe extern "C" fn(*const u8, usize, u32, u32);
        // SAFETY: the type is that in `fake.rs`.
        let fail = unsafe { self.library.get::<Fail>("fake_fail") };
        // SAFETY: the name is read only.
        unsafe { fail.unwrap()(call.as_ptr(), call.len(), after, code) };
    }

    /// What was called since it was last asked, without looks at properties.
    fn calls(&self) -> Vec<String> {
        type Log = unsafe extern "C" fn(*mut u8, usize) -> usize;
        // SAFETY: the type is that in `fake.rs`.
        let log = unsafe { self.library.get::<Log>("fake_log") }.unwrap();
        let mut text = vec![0; 1 << 16];
        // SAFETY: as much room as is passed.
        let len = unsafe { log(text.as_mut_ptr(), text.len()) };
        text.truncate(len);
        let text = String::from_utf8(text).unwrap();
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn mapped(&self) -> usize {
        // SAFETY: the type is that in `fake.rs`.
        let mapped = unsafe {
            self.library
                .get::<unsafe extern "C" fn() -> usize>("fake_mapped")
        };
        // SAFETY: no arguments.
        unsafe { mapped.unwrap()() }
    }
}

fn build(into: &Path, lacks: &str) {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/fake.rs");
    let output = Command::new(rustc)
        .args(["--crate-type=cdylib", "--edition=2021", "-Copt-level=1"])
        .args(["--crate-name=fake_cuda", "--cfg"])
        .arg(format!("without_{lacks}"))
        .arg(source)
        .arg("-o")
        .arg(into)
        .output()
        .expect("rustc can be run");
    assert!(output.status.success(), "{output:?}");
}

fn host(bytes: &[u8]) -> Lease {
    let region = Region::with_backing(bytes.len().max(1), Backing::Shmem).unwrap();
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
        assert!(begin.elapsed() < Duration::from_secs(60), "never done");
        std::thread::yield_now();
    }
    Ok(())
}

#[test]
fn a_machine_without_the_driver_says_why() {
    let error = Cuda::open_with(Path::new("/nonexistent/libcuda.so.1"), 0).unwrap_err();
    assert!(
        matches!(&error, AcceleratorError::NoDriver(why) if why.contains("nonexistent")),
        "{error}"
    );
    // Whatever this machine has: an answer, not a panic.
    match Cuda::open(0) {
        Ok(cuda) => println!("this machine has {:?}", cuda.properties()),
        Err(error) => println!("this machine has none: {error}"),
    }
}

#[test]
fn a_driver_that_is_too_old_says_what_is_needed() {
    let fake = Fake::new("nothing");
    fake.set(10020, 1);
    let old = AcceleratorError::DriverTooOld {
        found: "10.2".into(),
        needed: "11.4".into(),
    };
    assert_eq!(fake.open(0).unwrap_err(), old);
    assert_eq!(fake.calls(), ["cuInit", "cuDriverGetVersion"]);
    let error = Fake::new("events").open(0).unwrap_err();
    assert!(
        matches!(&error, AcceleratorError::DriverTooOld { needed, .. } if needed.contains("cuEventQuery")),
        "{error}"
    );
}

#[test]
fn a_device_that_is_not_there_and_one_that_does_not_start() {
    let fake = Fake::new("nothing");
    let none = AcceleratorError::NoDevice {
        kind: MemoryKind::Cuda(2),
        count: 2,
    };
    assert_eq!(fake.open(2).unwrap_err(), none);
    fake.fail("cuInit", 0, 999);
    let error = fake.open(0).unwrap_err().to_string();
    assert_eq!(
        error,
        "cuda:0: cuInit failed with 999 (a code that this driver has no words for)"
    );
    fake.calls();
    fake.fail("cuMemGetAllocationGranularity", 0, 1);
    assert_eq!(fake.open(0).unwrap_err().code(), Some(1));
    assert_eq!(fake.calls().last().unwrap(), "cuDevicePrimaryCtxRelease");
}

#[test]
fn memory_is_created_mapped_and_given_back_in_order() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let properties = accelerator.properties();
    assert_eq!((properties.kind, properties.granularity), (CUDA, 2 << 20));
    assert_eq!(properties.name, "recorded device");
    assert!(properties.exports);
    fake.calls();
    let lease = device(&accelerator, 5000);
    assert_eq!(lease.region().len(), 2 << 20);
    let made = [
        "cuMemCreate",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
    ];
    assert_eq!(fake.calls(), made);
    drop(lease);
    let undone = ["cuMemUnmap", "cuMemAddressFree", "cuMemRelease"];
    assert_eq!(fake.calls(), undone);
    drop(accelerator);
    assert_eq!(fake.calls(), ["cuDevicePrimaryCtxRelease"]);
}

#[test]
fn every_step_that_fails_undoes_those_before() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let made = [
        "cuMemCreate",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
    ];
    let undone = ["cuMemUnmap", "cuMemAddressFree", "cuMemRelease"];
    for (step, call) in made.iter().enumerate() {
        fake.calls();
        fake.fail(call, 0, 2);
        let error = DeviceRegion::allocate(&accelerator, 1).unwrap_err();
        assert_eq!(error.code(), Some(2), "{error}");
        let calls = fake.calls();
        assert_eq!(calls[..=step], made[..=step]);
        assert_eq!(
            calls[step + 1..],
            undone[undone.len() - step..],
            "after {call}"
        );
    }
    fake.fail("cuMemCreate", 0, 2);
    let error = DeviceRegion::allocate(&accelerator, 1).unwrap_err();
    assert!(
        matches!(error, AcceleratorError::OutOfMemory { wanted, .. } if wanted == 2 << 20),
        "{error}"
    );
    assert_eq!(fake.mapped(), 0);
}

#[test]
fn a_driver_without_virtual_memory_allocates_and_cannot_export() {
    let fake = Fake::new("virtual_memory");
    let accelerator = fake.accelerator();
    assert!(!accelerator.properties().exports);
    fake.calls();
    let lease = device(&accelerator, 5000);
    let refused = lease.region().export().unwrap_err();
    assert!(matches!(refused, AcceleratorError::DriverTooOld { .. }));
    drop(lease);
    assert_eq!(fake.calls(), ["cuMemAlloc", "cuMemFree"]);
}

#[test]
fn memory_is_passed_by_descriptor_and_by_legacy_handle() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let lease = device(&accelerator, 10);
    let file = lease.region().export().unwrap();
    fake.calls();
    let import = |from| DeviceRegion::import(&accelerator, from);
    let descriptor = |file, len| import(Import::Descriptor { file, len });
    let imported = descriptor(file.try_clone().unwrap(), 10).unwrap();
    assert_eq!(fake.calls()[0], "cuMemImportFromShareableHandle");
    drop((lease, imported));
    fake.calls();
    // More than there is: refused by the driver, and everything undone.
    assert_eq!(descriptor(file, 3 << 20).unwrap_err().code(), Some(1));
    let tail = ["cuMemMap", "cuMemAddressFree", "cuMemRelease"];
    assert_eq!(fake.calls()[2..], tail);
    let null = std::fs::File::open("/dev/null").unwrap().into();
    assert_eq!(descriptor(null, 10).unwrap_err().code(), Some(1));
    // Legacy handles.
    let ipc = |first, len| {
        let mut handle = [0; 64];
        handle[0] = first;
        import(Import::Ipc { handle, len })
    };
    drop(ipc(1, 4096).unwrap());
    assert_eq!(fake.calls().last().unwrap(), "cuIpcCloseMemHandle");
    assert_eq!(ipc(0, 4096).unwrap_err().code(), Some(1));
    let claimed = ipc(1, 4097).unwrap_err();
    assert!(
        matches!(claimed, AcceleratorError::Import { .. }),
        "{claimed}"
    );
    assert_eq!(fake.mapped(), 0);
}

#[test]
fn pointers_of_the_host_of_another_device_or_too_long_are_refused() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let lease = device(&accelerator, 2 << 20);
    let adopt = |of: &Arc<dyn Accelerator>, address, len| {
        // SAFETY: `lease` outlives what is adopted.
        unsafe { DeviceRegion::adopt(of, address, len, Box::new(())) }
    };
    let adopted = adopt(&accelerator, lease.address(), 2 << 20).unwrap();
    assert!(adopted.export().is_err());
    let other: Arc<dyn Accelerator> = Arc::new(fake.open(1).unwrap());
    let why = |refused: Result<_, AcceleratorError>| refused.unwrap_err().to_string();
    assert!(why(adopt(&other, lease.address(), 10)).contains("it is memory of cuda:0"));
    assert!(why(adopt(&accelerator, lease.address(), (2 << 20) + 1)).contains("2097152 bytes"));
    let on_host = host(&[0; 10]);
    let address = DeviceAddress(on_host.as_ptr() as u64);
    assert!(why(adopt(&accelerator, address, 10)).contains("CUDA_ERROR_INVALID_VALUE"));
}

#[test]
fn a_batch_is_its_copies_and_one_event() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let there = device(&accelerator, 300);
    let memory = host(&[7; 600]);
    let pinned = Pinned::new(memory.region(), &accelerator).unwrap();
    let mut stream = accelerator.stream().unwrap();
    let part = |at: u64| memory.slice(at..at + 100).unwrap();
    let slice = |at: u64| there.slice(at..at + 100).unwrap();
    fake.calls();
    let ops = (0..3).map(|n| op(&part(n * 100), &slice(n * 100), Way::ToDevice));
    stream.copy(ops.collect()).unwrap();
    assert_eq!(stream.completed(), Ok(0), "it is asynchronous");
    memory.write_at(300, (&[0; 300][..]).into());
    let ops = (0..3).map(|n| op(&part(300 + n * 100), &slice(n * 100), Way::ToHost));
    let last = stream.copy(ops.collect()).unwrap();
    wait(&mut *stream, last).unwrap();
    assert_eq!(bytes(&memory), [7; 600]);
    let (to, from) = ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync");
    let (create, record) = ("cuEventCreate", "cuEventRecord");
    let calls = fake.calls();
    let begun: Vec<_> = calls
        .iter()
        .filter(|call| *call != "cuEventQuery")
        .collect();
    assert_eq!(
        begun,
        [to, to, to, create, record, from, from, from, create, record]
    );
    // An application's events, around what comes next.
    // SAFETY: the recording driver takes any number.
    let [first, second] = [77, 78].map(|event| unsafe { ForeignEvent::from_raw(event) });
    stream.wait_for(first).unwrap();
    stream
        .copy(vec![op(&part(0), &slice(0), Way::ToHost)])
        .unwrap();
    stream.signal(second).unwrap();
    assert_eq!(fake.calls(), ["cuStreamWaitEvent", from, record, record]);
    drop(stream);
    let end = [
        "cuStreamSynchronize",
        "cuEventDestroy",
        "cuEventDestroy",
        "cuStreamDestroy",
    ];
    assert_eq!(fake.calls(), end);
    drop((pinned, there));
    assert_eq!(fake.calls()[0], "cuMemHostUnregister");
}

#[test]
fn an_error_in_mid_copy_has_the_drivers_code_and_words_and_is_told_once() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let there = device(&accelerator, 100);
    let memory = host(&[1; 100]);
    let mut stream = accelerator.stream().unwrap();
    let held = Arc::strong_count(memory.region());
    fake.fail("cuEventQuery", 0, 214);
    let batch = stream
        .copy(vec![op(&memory, &there, Way::ToDevice)])
        .unwrap();
    assert!(Arc::strong_count(memory.region()) > held);
    let error = wait(&mut *stream, batch).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cuda:0: cuEventQuery failed with 214 \
         (CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered)"
    );
    assert!(error.is_sticky());
    // Nothing is held for a device that has stopped.
    assert_eq!(Arc::strong_count(memory.region()), held);
    assert_eq!(stream.completed(), Ok(1));
    // One that fails when it is begun waits for those before it.
    fake.calls();
    fake.fail("cuMemcpyHtoDAsync", 1, 1);
    let two = vec![
        op(&memory, &there, Way::ToDevice),
        op(&memory, &there, Way::ToDevice),
    ];
    assert_eq!(stream.copy(two).unwrap_err().code(), Some(1));
    assert_eq!(fake.calls().last().unwrap(), "cuStreamSynchronize");
    assert_eq!(Arc::strong_count(memory.region()), held);
}

#[test]
fn a_batch_under_way_when_the_device_fails_in_a_later_call_is_not_called_done() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let there = device(&accelerator, 100);
    let memory = host(&[1; 100]);
    let mut stream = accelerator.stream().unwrap();
    let copy = |stream: &mut dyn Stream| stream.copy(vec![op(&memory, &there, Way::ToDevice)]);
    assert_eq!(copy(&mut *stream).unwrap(), 1);
    fake.fail("cuMemcpyHtoDAsync", 0, 214);
    fake.fail("cuStreamSynchronize", 0, 214);
    assert_eq!(copy(&mut *stream).unwrap_err().code(), Some(214));
    assert_eq!(stream.completed().unwrap_err().code(), Some(214));
    assert_eq!(stream.completed(), Ok(1), "told once");
}

#[test]
fn a_stage_moves_tensors_through_the_driver() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let config = Config {
        slot_bytes: 4096,
        slots: 4,
    };
    let stage = Stage::start(Arc::clone(&accelerator), config, Trace::default()).unwrap();
    let data: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    let (there, back) = (device(&accelerator, data.len()), host(&vec![0; data.len()]));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let both = async {
        let up = stage.upload(&host(&data), &there).await?;
        Ok::<_, StageError>((up, stage.download(&there, &back).await?))
    };
    let crc = crc32c::crc32c(&data);
    assert_eq!(runtime.block_on(both), Ok((crc, crc)));
    assert!(bytes(&back) == data);
    let calls = fake.calls();
    let first = |call: &str| calls.iter().position(|one| one == call).unwrap();
    assert!(first("cuMemHostRegister") < first("cuMemcpyHtoDAsync"));
    let count = |call: &str| calls.iter().filter(|one| *one == call).count();
    let copies = data.len().div_ceil(4096);
    assert_eq!(count("cuMemcpyHtoDAsync"), copies);
    assert_eq!(count("cuMemcpyDtoHAsync"), copies);
    fake.fail("cuMemcpyHtoDAsync", 3, 700);
    let failed = runtime.block_on(stage.upload(&host(&data), &there));
    let Err(StageError::Accelerator(error)) = failed else {
        panic!("{failed:?}")
    };
    assert_eq!((error.code(), error.is_sticky()), (Some(700), true));
    fake.calls();
    drop(stage);
    let calls = fake.calls();
    let last = |call: &str| calls.iter().rposition(|one| one == call).unwrap();
    assert!(
        last("cuStreamDestroy") < last("cuMemHostUnregister"),
        "{calls:?}"
    );
}

/// Copies can be gathered from and to pinned memory by its own addresses.
const HOST_POINTERS: u32 = 91;

/// 300 pieces of 1000 bytes there and back, each at another's place.
fn scattered(accelerator: &Arc<dyn Accelerator>) {
    let data: Vec<u8> = (0..300_000u32).map(|at| (at % 249) as u8).collect();
    let memory = host(&data);
    let pinned = Pinned::new(memory.region(), accelerator).unwrap();
    let (there, other) = (
        device(accelerator, data.len()),
        device(accelerator, data.len()),
    );
    let part = |lease: &DeviceLease, n: u64| lease.slice(n * 1000..n * 1000 + 1000).unwrap();
    let here = |n: u64| memory.slice(n * 1000..n * 1000 + 1000).unwrap();
    let mut stream = accelerator.stream().unwrap();
    let up = (0..300).map(|n| op(&here(n), &part(&there, 299 - n), Way::ToDevice));
    let last = stream.copy(up.collect()).unwrap();
    wait(&mut *stream, last).unwrap();
    let piece = |n: u64| Piece {
        from: part(&there, 299 - n),
        to: part(&other, n),
    };
    let last = stream.gather((0..300).map(piece).collect()).unwrap();
    memory.write_at(0, (&vec![0; data.len()][..]).into());
    wait(&mut *stream, last).unwrap();
    let down = (0..300).map(|n| op(&here(n), &part(&other, n), Way::ToHost));
    let last = stream.copy(down.collect()).unwrap();
    wait(&mut *stream, last).unwrap();
    assert!(bytes(&memory) == data);
    drop((stream, pinned));
}

#[test]
fn many_small_copies_are_one_kernel_for_each_128_and_pieces_too() {
    let fake = Fake::new("nothing");
    fake.set_attribute(HOST_POINTERS, 1);
    let accelerator = fake.accelerator();
    fake.calls();
    scattered(&accelerator);
    let calls = fake.calls();
    let count = |call: &str| calls.iter().filter(|one| *one == call).count();
    assert_eq!(count("cuLaunchKernel"), 9, "{calls:?}");
    assert_eq!(count("cuModuleLoadData"), 1);
    let copies = calls.iter().filter(|call| call.starts_with("cuMemcpy"));
    assert_eq!(copies.count(), 0, "{calls:?}");
    drop(accelerator);
    let end = ["cuModuleUnload", "cuDevicePrimaryCtxRelease"];
    assert_eq!(fake.calls(), end);
}

#[test]
fn without_the_kernel_pieces_are_copied_one_by_one() {
    // An old driver; one that does not take the text; host memory out of reach.
    for (lacks, failing, reaches) in [
        ("kernels", None, 1),
        ("nothing", Some("cuModuleLoadData"), 1),
        ("nothing", Some("cuModuleGetFunction"), 1),
        ("nothing", None, 0),
    ] {
        let fake = Fake::new(lacks);
        fake.set_attribute(HOST_POINTERS, reaches);
        if let Some(call) = failing {
            fake.fail(call, 0, 218);
        }
        let accelerator = fake.accelerator();
        scattered(&accelerator);
        drop(accelerator);
        let calls = fake.calls();
        let count = |call: &str| calls.iter().filter(|one| *one == call).count();
        assert_eq!(count("cuMemcpyHtoDAsync"), 300);
        assert_eq!(count("cuMemcpyDtoHAsync"), 300);
        let loaded = lacks == "nothing" && failing.is_none();
        assert_eq!(count("cuMemcpyDtoDAsync"), if loaded { 0 } else { 300 });
        assert_eq!(count("cuLaunchKernel"), if loaded { 3 } else { 0 });
        let unloads = lacks == "nothing" && failing != Some("cuModuleLoadData");
        assert_eq!(count("cuModuleUnload"), usize::from(unloads));
    }
}

#[test]
fn a_kernel_that_fails_is_a_typed_error_and_the_memory_is_let_go() {
    let fake = Fake::new("nothing");
    let accelerator = fake.accelerator();
    let there = device(&accelerator, 2000);
    let piece = |at: u64| Piece {
        from: there.slice(at..at + 500).unwrap(),
        to: there.slice(at + 1000..at + 1500).unwrap(),
    };
    let held = Arc::strong_count(there.region());
    let mut stream = accelerator.stream().unwrap();
    fake.fail("cuLaunchKernel", 0, 719);
    let failed = stream.gather(vec![piece(0), piece(500)]).unwrap_err();
    assert_eq!((failed.code(), failed.is_sticky()), (Some(719), true));
    assert_eq!(fake.calls().last().unwrap(), "cuStreamSynchronize");
    assert_eq!(Arc::strong_count(there.region()), held);
    // One piece is a plain copy, and the stream goes on.
    let last = stream.gather(vec![piece(0)]).unwrap();
    wait(&mut *stream, last).unwrap();
    let calls = fake.calls();
    assert_eq!(calls[0], "cuMemcpyDtoDAsync");
    assert!(!calls.contains(&"cuLaunchKernel".to_owned()));
    let uneven = Piece {
        from: there.slice(0..10).unwrap(),
        to: there.slice(0..11).unwrap(),
    };
    let refused = stream.gather(vec![uneven]).unwrap_err();
    assert!(matches!(refused, AcceleratorError::NotItsMemory { .. }));
}

#[test]
fn the_kernels_text_assembles() {
    let folder = tempfile::tempdir().unwrap();
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/memory/accelerator/cuda/gather.ptx");
    let ptxas = std::env::var_os("GENIE_PTXAS").unwrap_or_else(|| "ptxas".into());
    let mut assemble = Command::new(ptxas);
    assemble
        .args(["-arch=sm_80", "-o"])
        .arg(folder.path().join("gather"));
    match assemble.arg(text).output() {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(error) => println!("skipped: no ptxas ({error}); name one in GENIE_PTXAS"),
    }
}

#[test]
fn the_device_says_what_gpudirect_needs_to_know() {
    let (supported, options, ordering) = (116, 117, 118);
    let fake = Fake::new("nothing");
    let cuda = fake.open(0).unwrap();
    let reason = cuda.supported().unwrap_err();
    assert!(reason.contains("does not support it"), "{reason}");
    assert_eq!(cuda.ordering(), Ok(Ordering::Unknown));
    fake.set_attribute(supported, 1);
    fake.set_attribute(options, 1);
    let cuda = fake.open(0).unwrap();
    assert_eq!(cuda.supported(), Ok(()));
    assert_eq!(cuda.ordering(), Ok(Ordering::Flushed));
    fake.set_attribute(ordering, 100);
    assert_eq!(cuda.ordering(), Ok(Ordering::Ordered));
    fake.calls();
    cuda.sync_memops(DeviceAddress(1 << 16)).unwrap();
    cuda.flush().unwrap();
    let calls = ["cuPointerSetAttribute", "cuFlushGPUDirectRDMAWrites"];
    assert_eq!(fake.calls(), calls);
    fake.fail("cuFlushGPUDirectRDMAWrites", 0, 801);
    let reason = cuda.flush().unwrap_err();
    assert!(
        reason.starts_with("cuda:0: cuFlushGPUDirectRDMAWrites failed with 801"),
        "{reason}"
    );
}
