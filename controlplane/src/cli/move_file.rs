//! `put` and `get`: between a file and an arena.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

use genie_client::{Client, Memory, Moved};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::device::{self, Device};
use super::end::Unfinished;
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
    unfinished: &Unfinished,
    json: bool,
) -> Result<Report, CommandError> {
    unfinished.end_on_signals().map_err(CommandError::Watch)?;
    // The kernel gives signals to the first thread, so that one waits for no disk.
    std::thread::scope(|scope| {
        let get = || get_file(client, from, file, memory, json, unfinished);
        let got = scope.spawn(get).join();
        got.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn get_file(
    client: &mut Client,
    from: &Target,
    file: &Path,
    memory: Memory,
    json: bool,
    unfinished: &Unfinished,
) -> Result<Report, CommandError> {
    // Before anything moves: a folder that cannot be written is found now.
    let draft = Draft::create(file)?;
    unfinished.remember(draft.temporary());
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
