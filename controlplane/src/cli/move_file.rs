//! `put` and `get`: between a file and an arena.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use genie_client::{Client, Memory, Moved};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::device::{self, Device};
use super::{CommandError, Target};
use crate::safetensors::{Draft, ModelFile};
use crate::tensor::check_batch;

/// What `put` and `get` print.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// How the tensors moved between the agents.
    #[serde(flatten)]
    pub(super) moved: Moved,
    /// Time for reading or writing the file, apart from `seconds`.
    pub(super) file_seconds: f64,
    /// CPU copies between file and arena per byte, apart from `copies_per_byte`:
    /// the kernel's one, between the page cache and the arena.
    pub(super) file_copies_per_byte: f64,
}

pub(super) fn put(
    client: &mut Client,
    file: &Path,
    to: &Target,
    memory: Memory,
    json: bool,
) -> Result<Report, CommandError> {
    let model = ModelFile::open(file)?;
    let header = &model.header;
    check_batch(&to.name, &header.tensors, header.metadata.as_ref()).map_err(|source| {
        CommandError::Tensor {
            file: file.display().to_string(),
            source,
        }
    })?;
    let outside = |source| CommandError::Arena {
        file: file.display().to_string(),
        source,
    };
    let device = Device::open(memory)?;
    let began = Instant::now();
    let bar = Bar::new("read", json);
    let show = |done| bar.show(done, header.data_len);
    let tensors = if let Some(device) = &device {
        let arena = client.device_arena(device.accelerator(), header.data_len)?;
        let host = device::host(header.data_len)?;
        model.read_into(&host, show)?;
        device.upload(&host, arena.lease())?;
        arena.packed(header.tensors.clone()).map_err(outside)?
    } else {
        let arena = client.arena(header.data_len, memory)?;
        let packed = arena.packed(header.tensors.clone()).map_err(outside)?;
        model.read_into(&packed.lease, show)?;
        packed.tensors
    };
    bar.end();
    let file_seconds = began.elapsed().as_secs_f64();
    let bar = Bar::new("put", json);
    let show = |done, total| bar.show(done, total);
    let (node, metadata) = (to.node.as_deref(), header.metadata.clone());
    let moved = client.put_into(node, &to.name, &tensors, metadata, memory, show)?;
    bar.end();
    Ok(Report {
        moved,
        file_seconds,
        file_copies_per_byte: copies(&device),
    })
}

pub(super) fn get(
    client: &mut Client,
    from: &Target,
    file: &Path,
    memory: Memory,
    json: bool,
) -> Result<Report, CommandError> {
    // Before anything moves: a folder that cannot be written is found now.
    let cleanup = Cleanup::watch().map_err(CommandError::Signals)?;
    let draft = Draft::create(file)?;
    cleanup.remember(draft.temporary());
    let bar = Bar::new("get", json);
    let show = |done, total| bar.show(done, total);
    let device = Device::open(memory)?;
    let (node, prefix) = (from.node.as_deref(), &from.name[..]);
    let (fetched, began) = if let Some(device) = &device {
        let fetched = client.get_on(device.accelerator(), node, prefix, show)?;
        let began = Instant::now();
        let host = device.download(fetched.lease())?;
        (
            (fetched.tensors, fetched.metadata, fetched.moved, host),
            began,
        )
    } else {
        let fetched = client.get_with(node, prefix, memory, show)?;
        let lease = fetched.lease();
        let fetched = (fetched.tensors, fetched.metadata, fetched.moved, lease);
        (fetched, Instant::now())
    };
    bar.end();
    let (tensors, metadata, moved, lease) = fetched;
    let bar = Bar::new("write", json);
    let bytes = moved.bytes;
    draft.write(&tensors, metadata.as_ref(), &lease, |done| {
        bar.show(done, bytes)
    })?;
    bar.end();
    let file_seconds = began.elapsed().as_secs_f64();
    Ok(Report {
        moved,
        file_seconds,
        file_copies_per_byte: copies(&device),
    })
}

/// Between page cache and memory; with an accelerator also to or from a slot.
fn copies(device: &Option<Device>) -> f64 {
    if device.is_some() { 2.0 } else { 1.0 }
}

/// A progress bar on a terminal; nothing anywhere else.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new(what: &'static str, json: bool) -> Self {
        if json || !std::io::stderr().is_terminal() || !std::io::stdout().is_terminal() {
            return Self(None);
        }
        let template =
            "{prefix:5} [{bar:40}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}";
        let style = ProgressStyle::with_template(template).expect("the template is a constant");
        let bar = ProgressBar::new(0).with_style(style).with_prefix(what);
        Self(Some(bar))
    }

    fn show(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    fn end(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Removes the unfinished file when the program is interrupted.
struct Cleanup(Arc<Mutex<Option<PathBuf>>>);

impl Cleanup {
    /// Starts watching, on a thread of its own.
    fn watch() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let unfinished: Arc<Mutex<Option<PathBuf>>> = Arc::default();
        let to_remove = Arc::clone(&unfinished);
        let guard = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        // A limit on file sizes is to be an error from write, not the end.
        let too_large = signal(SignalKind::from_raw(SIGXFSZ))?;
        drop(guard);
        std::thread::Builder::new()
            .name("genie-signals".into())
            .spawn(move || {
                let _too_large = too_large;
                runtime.block_on(async {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                });
                let path = to_remove
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                if let Some(path) = path {
                    // Already gone if it was just given its name.
                    let _ = std::fs::remove_file(path);
                }
                eprintln!("genie: interrupted");
                std::process::exit(1);
            })?;
        Ok(Self(unfinished))
    }

    fn remember(&self, path: &Path) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
    }
}

/// `setrlimit(2)`: sent when a file grows beyond `RLIMIT_FSIZE`.
const SIGXFSZ: i32 = 25;
