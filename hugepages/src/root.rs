//! Where `/sys` and `/proc` are found, and how a pool's size is set.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The directory that stands for `/`: the machine's own, or a tree of plain
/// files in tests and in containers that see the host below another path.
#[derive(Clone, Debug)]
pub struct Root {
    pub(crate) prefix: PathBuf,
    /// Writes a count to a pool's `nr_hugepages`; tests put a small model of
    /// the kernel here.
    pub(crate) set: fn(&Path, u64) -> io::Result<()>,
}

impl Root {
    /// The machine's own `/`.
    pub fn system() -> Self {
        Self::at("/")
    }

    /// A tree below `prefix`, laid out like `/`.
    pub fn at(prefix: impl Into<PathBuf>) -> Self {
        Self {
            prefix: prefix.into(),
            set: |path, count| fs::write(path, format!("{count}\n")),
        }
    }

    /// The path below this root that stands for the absolute path `absolute`.
    pub fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let absolute = absolute.as_ref();
        self.prefix
            .join(absolute.strip_prefix("/").unwrap_or(absolute))
    }
}

impl Default for Root {
    fn default() -> Self {
        Self::system()
    }
}

/// Reads a file that holds one decimal number.
pub(crate) fn read_count(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{:?} is not a count", text.trim()),
        )
    })
}

/// The entries of `dir` named `prefix` and then something, sorted by name.
/// A directory that is not there has none.
pub(crate) fn entries(dir: &Path, prefix: &str) -> io::Result<Vec<(String, PathBuf)>> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry?;
        if let Some(rest) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix(prefix))
        {
            found.push((rest.to_owned(), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
