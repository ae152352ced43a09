//! The environment abstraction layer: once a process, never undone.

use std::cell::Cell;
use std::ffi::{CString, NulError};
use std::sync::OnceLock;

use genie_dpdk_sys as sys;

use crate::errno::Errno;

/// Proof that the EAL is up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Eal {
    /// Whether the PCI bus was scanned.
    pub(crate) has_pci: bool,
}

/// How to bring the EAL up.
#[derive(Clone, Debug)]
pub(crate) struct EalOptions {
    pub(crate) file_prefix: String,
    pub(crate) pci_allow: Vec<String>,
    pub(crate) memory_mib: u32,
    pub(crate) no_huge: bool,
}

/// Why the EAL is not up. Kept, as it cannot be tried again in this process.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum EalError {
    #[error(
        "the EAL does not start: {errno}{hint}; its own words are on stderr (arguments: {arguments})"
    )]
    Refused {
        arguments: String,
        errno: Errno,
        hint: &'static str,
    },
    #[error("an EAL argument holds a NUL byte")]
    Nul(#[from] NulError),
    #[error("no thread can be started to bring the EAL up")]
    Thread,
    #[error("the EAL was not brought up: call eal_init first")]
    NotUp,
}

static STATE: OnceLock<Result<Eal, EalError>> = OnceLock::new();

/// Brings the EAL up, or repeats what the first call came to.
///
/// It runs on a thread that ends at once: that becomes DPDK's lcore 0, with the
/// affinity it inherits, so no thread of the caller's is pinned to a core.
pub(crate) fn init(options: EalOptions) -> Result<Eal, EalError> {
    let start = || {
        std::thread::Builder::new()
            .name("genie-eal".into())
            .spawn(move || start(&options))
            .map_err(|_| EalError::Thread)?
            .join()
            .unwrap_or(Err(EalError::Thread))
    };
    STATE.get_or_init(start).clone()
}

/// The EAL, if it is up.
pub(crate) fn get() -> Result<Eal, EalError> {
    STATE.get().cloned().unwrap_or(Err(EalError::NotUp))
}

fn start(options: &EalOptions) -> Result<Eal, EalError> {
    let arguments = arguments(options);
    let owned: Vec<CString> = arguments
        .iter()
        .map(|text| CString::new(text.as_str()))
        .collect::<Result<_, _>>()?;
    // DPDK permutes the array and keeps pointers into the strings: both stay
    // for the life of the process.
    let argv: Vec<_> = owned
        .into_iter()
        .map(CString::into_raw)
        .chain([std::ptr::null_mut()])
        .collect();
    let argv = Vec::leak(argv);
    // SAFETY: a NULL-terminated array of leaked strings; called once a process,
    // guarded by `STATE`.
    let status = unsafe { sys::rte_eal_init(argv.len() as i32 - 1, argv.as_mut_ptr()) };
    if status >= 0 {
        return Ok(Eal {
            has_pci: !options.pci_allow.is_empty(),
        });
    }
    let hint = if options.no_huge {
        ""
    } else {
        ", reserve more huge pages with 'genie hugepages reserve' as root (docs/hugepages.md says how many)"
    };
    Err(EalError::Refused {
        arguments: arguments[1..].join(" "),
        errno: Errno::last(),
        hint,
    })
}

fn arguments(options: &EalOptions) -> Vec<String> {
    let mut arguments: Vec<String> = vec!["genie".into()];
    let mut push = |text: &str| arguments.push(text.into());
    if options.no_huge {
        push("--no-huge");
    } else {
        // Nothing in the file system; one descriptor a page size, since the
        // vhost protocol passes at most eight.
        push("--in-memory");
        push("--single-file-segments");
    }
    push("--iova-mode=va");
    push("--no-telemetry");
    push("--log-level=*:warning");
    push(&format!("--file-prefix={}", options.file_prefix));
    push(&format!("-m{}", options.memory_mib));
    push(&format!("--lcores=0@({})", allowed_cpus()));
    if options.pci_allow.is_empty() {
        push("--no-pci");
    }
    for address in &options.pci_allow {
        push("-a");
        push(address);
    }
    arguments
}

/// The CPUs this process may run on, as `0,1,5`.
fn allowed_cpus() -> String {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else {
        return "0".into();
    };
    let cpus = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    cpus.map(|cpu| cpu.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

/// An lcore id for a thread that DPDK did not start; given back when it ends.
struct Lcore;

impl Drop for Lcore {
    fn drop(&mut self) {
        // SAFETY: this thread was registered, once, by `register_thread`.
        unsafe { sys::rte_thread_unregister() };
    }
}

/// Gives the calling thread an lcore id, if it has none.
pub(crate) fn register_thread(_up: Eal) -> Result<(), Errno> {
    thread_local! {
        static LCORE: Cell<Option<Lcore>> = const { Cell::new(None) };
    }
    // SAFETY: reads a thread-local integer.
    if unsafe { sys::genie_lcore_id() } != sys::GENIE_LCORE_ID_ANY {
        return Ok(());
    }
    // SAFETY: the EAL is up; this thread has no lcore id.
    let status = unsafe { sys::rte_thread_register() };
    if status != 0 {
        return Err(Errno::last());
    }
    LCORE.set(Some(Lcore));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> EalOptions {
        EalOptions {
            file_prefix: "p".into(),
            pci_allow: Vec::new(),
            memory_mib: 64,
            no_huge: false,
        }
    }

    #[test]
    fn the_pci_bus_stays_off_unless_asked_for() {
        assert!(arguments(&options()).contains(&"--no-pci".into()));
        let asked = EalOptions {
            pci_allow: vec!["0000:3b:00.0".into()],
            ..options()
        };
        let arguments = arguments(&asked);
        assert!(!arguments.contains(&"--no-pci".into()));
        assert!(
            arguments
                .windows(2)
                .any(|pair| pair == ["-a", "0000:3b:00.0"])
        );
    }

    #[test]
    fn ordinary_pages_exclude_in_memory() {
        let arguments = arguments(&EalOptions {
            no_huge: true,
            ..options()
        });
        assert!(arguments.contains(&"--no-huge".into()));
        assert!(!arguments.contains(&"--in-memory".into()));
    }

    #[test]
    fn without_an_eal_there_is_a_reason() {
        assert!(matches!(get(), Err(EalError::NotUp)));
    }
}
