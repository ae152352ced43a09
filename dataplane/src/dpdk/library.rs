//! Finding and opening the driver library.

use std::ffi::CStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use genie_dpdk_abi::{ABI_VERSION, Api, BUILD_ID, SYMBOL};
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW, Symbol};

/// The library's file name.
const FILE: &str = "libgenie_dpdk.so";

/// The variable that names another file; ignored in a setuid program.
const VARIABLE: &str = "GENIE_DPDK_LIB";

/// The driver library, open for the rest of the process's life.
#[derive(Clone, Copy)]
pub struct Library {
    api: &'static Api,
}

/// Why there is no driver library; what an operator reads as the reason that
/// DPDK is not used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No such file in any of the places.
    #[error("no {FILE} in {}: build it with `cargo build --release -p genie-dpdk-driver`", searched.join(", "))]
    NotFound {
        /// Where it was looked for.
        searched: Vec<String>,
    },
    /// The file cannot be looked at.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Somebody else owns the file, and so decides what would run here.
    #[error("{} belongs to user {owner}, neither root nor the caller: chown it", path.display())]
    NotOwned {
        /// The file, or the folder it is in.
        path: PathBuf,
        /// The owner's user id.
        owner: u32,
    },
    /// Anybody may change the file.
    #[error("{} may be written by anybody: chmod o-w it", path.display())]
    WorldWritable {
        /// The file, or the folder it is in.
        path: PathBuf,
    },
    /// The file is there but the dynamic linker refuses it, usually because
    /// DPDK's own libraries are not installed.
    #[error("{library} does not load (on Debian: apt install libdpdk-dev): {linker}")]
    MissingDependency {
        /// The file.
        library: String,
        /// The linker's words.
        linker: String,
    },
    /// The library is empty.
    #[error("{library} was built on a host without DPDK: build it where libdpdk is installed")]
    BuiltWithoutDpdk {
        /// The file.
        library: String,
    },
    /// The library and this program were not built together.
    #[error(
        "{library} is of build {theirs}, this program needs {ours}: install both from one build"
    )]
    OtherBuild {
        /// The file.
        library: String,
        /// The library's build id.
        theirs: String,
        /// This program's build id.
        ours: &'static str,
    },
}

/// Finds the library, checks who owns it, opens it and checks its build.
///
/// Looked for where `GENIE_DPDK_LIB` says, or else beside the program and then
/// in the system's library path. It is never closed: DPDK cannot be unloaded.
pub fn load() -> Result<Library, LoadError> {
    let named = std::env::var_os(VARIABLE).filter(|name| !name.is_empty() && !is_setuid());
    if let Some(path) = named.map(PathBuf::from) {
        if !path.exists() {
            return Err(LoadError::NotFound {
                searched: vec![format!("{VARIABLE}={}", path.display())],
            });
        }
        return open(&check_owner(&path, &trusted_users(None))?);
    }
    let mut searched = Vec::new();
    if let Ok(program) = std::env::current_exe()
        && let Some(folder) = program.parent()
    {
        let path = folder.join(FILE);
        if path.exists() {
            // Who could replace the library could as well replace the program.
            let owner = std::fs::metadata(&program)
                .ok()
                .map(|program| program.uid());
            return open(&check_owner(&path, &trusted_users(owner))?);
        }
        searched.push(folder.display().to_string());
    }
    searched.push("the system's library path".into());
    match open(Path::new(FILE)) {
        Err(LoadError::MissingDependency { linker, .. }) if is_about(&linker, FILE) => {
            Err(LoadError::NotFound { searched })
        }
        other => other,
    }
}

impl Library {
    pub(super) fn api(&self) -> &'static Api {
        self.api
    }

    /// DPDK's version, such as `DPDK 22.11.11`.
    pub fn dpdk_version(&self) -> String {
        // SAFETY: takes nothing.
        let version = unsafe { (self.api.dpdk_version)() };
        // SAFETY: a static NUL-terminated string, by the ABI.
        unsafe { CStr::from_ptr(version) }
            .to_string_lossy()
            .into_owned()
    }

    /// The build id that the library and this program share.
    pub fn build_id(&self) -> &'static str {
        BUILD_ID
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library")
            .field("dpdk", &self.dpdk_version())
            .finish()
    }
}

fn is_setuid() -> bool {
    // SAFETY: reads a value that the kernel put beside the arguments.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

fn trusted_users(beside: Option<u32>) -> Vec<u32> {
    let mut users = vec![0, rustix::process::geteuid().as_raw()];
    users.extend(beside);
    users
}

/// Refuses a file that, or whose folder, somebody else may change. What is
/// then opened is the file that was looked at, by the name returned.
fn check_owner(path: &Path, trusted: &[u32]) -> Result<PathBuf, LoadError> {
    let unreadable = |source| LoadError::Unreadable {
        path: path.into(),
        source,
    };
    let file = path.canonicalize().map_err(unreadable)?;
    let folder = file.parent().unwrap_or(Path::new("/"));
    for path in [file.as_path(), folder] {
        let metadata = path.metadata().map_err(unreadable)?;
        let path = path.to_path_buf();
        if !trusted.contains(&metadata.uid()) {
            return Err(LoadError::NotOwned {
                path,
                owner: metadata.uid(),
            });
        }
        if metadata.mode() & 0o002 != 0 {
            return Err(LoadError::WorldWritable { path });
        }
    }
    Ok(file)
}

fn open(path: &Path) -> Result<Library, LoadError> {
    let library = path.display().to_string();
    // SAFETY: the library's initialisers run; they are DPDK's, from a file that
    // was checked or that the system's own path gave.
    let handle = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        LoadError::MissingDependency {
            library: library.clone(),
            linker: text_of(&error),
        }
    })?;
    let api = {
        // SAFETY: the ABI fixes the symbol's type for all builds.
        let symbol: Result<Symbol<unsafe extern "C" fn() -> *const Api>, _> =
            unsafe { handle.get(SYMBOL.as_bytes()) };
        let Ok(symbol) = symbol else {
            return Err(LoadError::BuiltWithoutDpdk { library });
        };
        // SAFETY: takes nothing, does not unwind.
        unsafe { symbol() }
    };
    let api = check_build(&library, api)?;
    // DPDK has threads and signal handlers by now; its code must stay mapped.
    std::mem::forget(handle);
    Ok(Library { api })
}

/// The first three fields of the table, which no build moves.
#[repr(C)]
struct Stamp {
    abi_version: u32,
    api_bytes: u32,
    build_id: *const std::ffi::c_char,
}

fn check_build(library: &str, api: *const Api) -> Result<&'static Api, LoadError> {
    if api.is_null() {
        return Err(LoadError::BuiltWithoutDpdk {
            library: library.into(),
        });
    }
    // SAFETY: not null, and any build's table begins with these fields.
    let stamp = unsafe { &*api.cast::<Stamp>() };
    // SAFETY: NUL-terminated and static, by the ABI of any build.
    let theirs = unsafe { CStr::from_ptr(stamp.build_id) }
        .to_string_lossy()
        .into_owned();
    let same_layout =
        stamp.abi_version == ABI_VERSION && stamp.api_bytes as usize == size_of::<Api>();
    if !same_layout || theirs != BUILD_ID {
        return Err(LoadError::OtherBuild {
            library: library.into(),
            theirs,
            ours: BUILD_ID,
        });
    }
    // SAFETY: the same build, so the table is of this type; valid for ever.
    Ok(unsafe { &*api })
}

/// Whether the linker's words are about the absence of `file` itself.
fn is_about(linker: &str, file: &str) -> bool {
    linker.starts_with(&format!("{file}: cannot open shared object file"))
}

/// An error with its causes: libloading keeps the linker's words in a source.
fn text_of(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), text_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn file_with_mode(folder: &Path, mode: u32) -> PathBuf {
        let path = folder.join(FILE);
        std::fs::write(&path, b"not a library").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_file_that_anybody_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with_mode(folder.path(), 0o666);
        let refused = check_owner(&path, &trusted_users(None));
        assert!(
            matches!(refused, Err(LoadError::WorldWritable { .. })),
            "{refused:?}"
        );
        file_with_mode(folder.path(), 0o644);
        check_owner(&path, &trusted_users(None)).unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let refused = check_owner(&path, &trusted_users(None));
        assert!(
            matches!(refused, Err(LoadError::WorldWritable { .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_file_of_somebody_elses_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with_mode(folder.path(), 0o644);
        let own = rustix::process::geteuid().as_raw();
        let refused = check_owner(&path, &[own + 1]);
        assert!(matches!(refused, Err(LoadError::NotOwned { owner, .. }) if owner == own));
    }

    #[test]
    fn what_is_not_a_library_is_refused_in_the_linkers_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with_mode(folder.path(), 0o644);
        match open(&path) {
            Err(LoadError::MissingDependency { linker, .. }) => {
                assert!(
                    linker.contains("invalid ELF header") || linker.contains("too short"),
                    "{linker}"
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_library_of_another_build_is_refused() {
        let stamp = |abi_version, api_bytes, build_id: &'static CStr| {
            Box::leak(Box::new(Stamp {
                abi_version,
                api_bytes,
                build_id: build_id.as_ptr(),
            }))
        };
        let size = size_of::<Api>() as u32;
        for other in [
            stamp(ABI_VERSION, size, c"0.0.1+abi.0000000000000000"),
            stamp(ABI_VERSION + 1, size, c"x"),
            stamp(ABI_VERSION, size - 8, c"x"),
        ] {
            let refused = check_build("l", std::ptr::from_ref(other).cast());
            assert!(matches!(refused, Err(LoadError::OtherBuild { .. })));
        }
    }

    #[test]
    fn absence_is_told_from_a_missing_dependency() {
        assert!(is_about(
            "libgenie_dpdk.so: cannot open shared object file: No such file or directory",
            FILE
        ));
        assert!(!is_about(
            "librte_eal.so.23: cannot open shared object file: No such file",
            FILE
        ));
    }
}
