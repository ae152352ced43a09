//! How `put` and `get` end before they are done: interrupted, or out of time.
//!
//! Both from threads of their own, as the command itself may wait for a disk
//! that does not answer. The invariant: *an unfinished file is removed if its
//! file system answers, and the process ends even if not*.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::CommandError;

/// The agent gives a request up at its deadline, and knows more about why.
const GRACE: Duration = Duration::from_secs(1);

/// How long the removal of the unfinished file is waited for.
const REMOVAL: Duration = Duration::from_secs(1);

/// `setrlimit(2)`: sent when a file grows beyond `RLIMIT_FSIZE`.
const SIGXFSZ: i32 = 25;

/// The file that is being written, if any.
#[derive(Clone, Debug, Default)]
pub(super) struct Unfinished(Arc<Mutex<Option<PathBuf>>>);

impl Unfinished {
    /// Has it removed if the command ends early.
    pub(super) fn remember(&self, path: &Path) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
    }

    /// Ends the process, with a reason.
    fn give_up(&self, reason: &str) -> ! {
        eprintln!("genie: {reason}");
        let path = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(path) = path {
            let (removed, wait) = channel();
            std::thread::spawn(move || {
                // Already gone if it was just given its name.
                let _ = std::fs::remove_file(path);
                let _ = removed.send(());
            });
            let _ = wait.recv_timeout(REMOVAL);
        }
        std::process::exit(1)
    }

    /// Ends the command when it is interrupted.
    pub(super) fn end_on_signals(&self) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let guard = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        // A limit on file sizes is to be an error from write, not the end.
        let too_large = signal(SignalKind::from_raw(SIGXFSZ))?;
        drop(guard);
        let unfinished = self.clone();
        spawn("genie-signals", move || {
            let _too_large = too_large;
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
            });
            unfinished.give_up("interrupted")
        })
    }

    /// None so far. The command ends when it takes longer than `limit`, and the
    /// agent did not end it: its file or the agent itself does not answer.
    pub(super) fn until(limit: Option<Duration>) -> Result<Self, CommandError> {
        let unfinished = Self::default();
        if let Some(limit) = limit {
            let unfinished = unfinished.clone();
            let give_up = move || {
                std::thread::sleep(limit.saturating_add(GRACE));
                unfinished.give_up(&format!(
                    "not done within {limit:?}: given up, whatever the file or the agent is \
                     waiting for"
                ))
            };
            spawn("genie-deadline", give_up).map_err(CommandError::Watch)?;
        }
        Ok(unfinished)
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name(name.into());
    thread.spawn(run).map(drop)
}
