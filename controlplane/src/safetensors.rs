//! Reading and writing `.safetensors` files without mapping them.
//!
//! Called by the `genie` command. The format is an 8-byte little-endian header
//! length, a JSON header, then the tensors' bytes without gaps
//! (<https://github.com/huggingface/safetensors>). A file can be truncated by
//! its owner at any time, so it is never mapped: bytes are read with `pread`
//! into an arena. The order of tensors and of metadata is kept, so that a file
//! that the reference library wrote comes back byte for byte.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use genie_dataplane::memory::Lease;
use serde::de::{self, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::tensor::{Dtype, Metadata, TensorError, TensorInfo};

/// Largest header, the limit of the reference library.
pub const HEADER_MAX: u64 = 100_000_000;

/// Read and written at a time: large enough that system calls do not count,
/// small enough that progress shows.
const CHUNK: u64 = 8 << 20;

/// Symbolic links that are followed, as many as the kernel does.
const LINKS_MAX: usize = 40;

const METADATA_KEY: &str = "__metadata__";

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The disk is full.
    #[error(
        "no room in {} for {needed} bytes: free some space or name a file on another disk",
        path.display()
    )]
    Full {
        /// Which folder.
        path: PathBuf,
        /// How many bytes the file has.
        needed: u64,
    },
    /// Not a safetensors file, or one that contradicts itself.
    #[error("{} is not a sound safetensors file: {source}", path.display())]
    Header {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// Shorter than it was when it was opened.
    #[error("{} became shorter while it was read", .0.display())]
    Shrunk(PathBuf),
}

/// What is wrong with a header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Too short to hold a header.
    #[error("{0} bytes are too few for a header")]
    Short(u64),
    /// The header's length is not credible.
    #[error("the header claims {claimed} bytes, the file has {file} and {HEADER_MAX} are allowed")]
    Length {
        /// What the file says.
        claimed: u64,
        /// Length of the whole file.
        file: u64,
    },
    /// The JSON is not a header.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A type nobody knows.
    #[error(
        "tensor {name:?} has the unknown type {dtype:?}: this build knows the types of safetensors 0.8"
    )]
    Dtype {
        /// Which tensor.
        name: String,
        /// What it says.
        dtype: String,
    },
    /// A tensor's bytes overlap another's, leave a gap, or lie outside.
    #[error("tensor {name:?} claims bytes {begin} to {end}, expected {expected}")]
    Offsets {
        /// Which tensor.
        name: String,
        /// Its first byte.
        begin: u64,
        /// One past its last byte.
        end: u64,
        /// Where it should lie.
        expected: String,
    },
    /// The tensors do not cover the file.
    #[error(
        "the tensors take {tensors} bytes, the file holds {data}: it is truncated or has trailing bytes"
    )]
    Coverage {
        /// Bytes that the header describes.
        tensors: u64,
        /// Bytes that are there.
        data: u64,
    },
    /// A name, shape or count that cannot be.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The tensors in the order of their bytes, which have no gaps.
    pub tensors: Vec<TensorInfo>,
    /// The file's metadata, if it has an entry for it.
    pub metadata: Option<Metadata>,
    /// Bytes of all tensors together.
    pub data_len: u64,
}

/// A file whose header was read and found sound.
#[derive(Debug)]
pub struct ModelFile {
    /// What it holds.
    pub header: Header,
    file: File,
    path: PathBuf,
    data_start: u64,
}

impl Header {
    /// Reads the JSON of a header.
    pub fn parse(json: &[u8]) -> Result<Self, HeaderError> {
        let mut raw: RawHeader = serde_json::from_slice(json)?;
        // Stable: tensors without bytes keep the header's order.
        raw.tensors.sort_by_key(|(_, raw)| raw.data_offsets);
        let mut names = HashSet::with_capacity(raw.tensors.len());
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        let mut data_len = 0u64;
        for (name, raw) in &raw.tensors {
            if !names.insert(name) {
                return Err(TensorError::Duplicate(name.clone()).into());
            }
            let info = TensorInfo {
                name: name.clone(),
                dtype: parse_dtype(name, &raw.dtype)?,
                shape: raw.shape.clone(),
            };
            let (begin, end) = raw.data_offsets;
            let len = info.len_bytes()?;
            let expected_end = data_len.checked_add(len);
            if begin != data_len || Some(end) != expected_end {
                let expected = format!("{len} bytes from {data_len} on");
                return Err(HeaderError::Offsets {
                    name: name.clone(),
                    begin,
                    end,
                    expected,
                });
            }
            data_len = end;
            tensors.push(info);
        }
        Ok(Self {
            tensors,
            metadata: raw.metadata,
            data_len,
        })
    }

    /// Writes the length and the JSON, padded to 8 bytes as the reference library does.
    pub fn encode(tensors: &[TensorInfo], metadata: Option<&Metadata>) -> Vec<u8> {
        let mut json = vec![0u8; 8];
        let mut comma = "{";
        let mut entry = |json: &mut Vec<u8>, key: &str, value: &dyn Fn(&mut Vec<u8>)| {
            json.extend_from_slice(comma.as_bytes());
            push_json(json, key);
            json.push(b':');
            value(json);
            comma = ",";
        };
        if let Some(metadata) = metadata {
            entry(&mut json, METADATA_KEY, &|json| push_map(json, metadata));
        }
        let mut begin = 0u64;
        for tensor in tensors {
            let end = begin
                + tensor
                    .len_bytes()
                    .expect("a stored tensor's size was checked");
            let raw = RawTensor {
                dtype: tensor.dtype.to_string(),
                shape: tensor.shape.clone(),
                data_offsets: (begin, end),
            };
            entry(&mut json, &tensor.name, &|json| push_json(json, &raw));
            begin = end;
        }
        json.extend_from_slice(if comma == "{" { b"{}" } else { b"}" });
        json.resize(json.len().next_multiple_of(8), b' ');
        let len = json.len() as u64 - 8;
        json[..8].copy_from_slice(&len.to_le_bytes());
        json
    }
}

impl ModelFile {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let io = |action| {
            move |source| FileError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let bad = |source| FileError::Header {
            path: path.to_owned(),
            source,
        };
        let regular = |stat: fs::Metadata| match stat.is_file() {
            true => Ok(stat.len()),
            false => Err(io::Error::other("not a regular file")),
        };
        // Opening a pipe would wait for whoever writes into it.
        let stat = fs::metadata(path).map_err(io("open"))?;
        regular(stat).map_err(io("read"))?;
        let file = File::open(path).map_err(io("open"))?;
        let stat = file.metadata().map_err(io("read"))?;
        let len = regular(stat).map_err(io("read"))?;
        if len < 8 {
            return Err(bad(HeaderError::Short(len)));
        }
        let mut claimed = [0; 8];
        file.read_exact_at(&mut claimed, 0).map_err(io("read"))?;
        let claimed = u64::from_le_bytes(claimed);
        if claimed > HEADER_MAX || claimed > len - 8 {
            return Err(bad(HeaderError::Length { claimed, file: len }));
        }
        let mut json = vec![0; claimed as usize];
        file.read_exact_at(&mut json, 8).map_err(io("read"))?;
        let header = Header::parse(&json).map_err(bad)?;
        let (data_start, data) = (8 + claimed, len - 8 - claimed);
        if header.data_len != data {
            return Err(bad(HeaderError::Coverage {
                tensors: header.data_len,
                data,
            }));
        }
        Ok(Self {
            header,
            file,
            path: path.to_owned(),
            data_start,
        })
    }

    /// Copies all tensors' bytes to the start of `into`, reporting bytes read so far.
    ///
    /// # Panics
    /// If they do not fit: the caller made the arena of `data_len` bytes.
    pub fn read_into(&self, into: &Lease, mut progress: impl FnMut(u64)) -> Result<(), FileError> {
        let io = |source| FileError::Io {
            action: "read",
            path: self.path.clone(),
            source,
        };
        let mut done = 0u64;
        while done < self.header.data_len {
            let part = done as usize..self.header.data_len.min(done + CHUNK) as usize;
            let read = into.read_file(part, &self.file, self.data_start + done);
            match read.map_err(io)? {
                0 => return Err(FileError::Shrunk(self.path.clone())),
                read => done += read as u64,
            }
            progress(done);
        }
        Ok(())
    }
}

/// A file being written: invisible under its own name until it is complete.
#[derive(Debug)]
pub struct Draft {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Draft {
    /// Begins a file that will be called `path`, or what that links to.
    ///
    /// A file that is there keeps its mode; anything else that is there, such
    /// as a device, is refused rather than replaced.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        let refused = |source| FileError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        };
        let old = old_file(path).map_err(refused)?;
        let path = follow_links(path).map_err(refused)?;
        let folder = folder_of(&path);
        let io = |source| FileError::Io {
            action: "write in",
            path: folder.to_owned(),
            source,
        };
        let file = tempfile::Builder::new()
            .prefix(".genie-")
            .suffix(".part")
            // The umask takes off what it wants, as for any new file.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(io)?;
        if let Some(old) = old {
            // As far as we may; before the mode, which is for this owner.
            let _ = fchown(file.as_file(), Some(old.uid()), Some(old.gid()));
            let mode = Permissions::from_mode(old.mode() & 0o777);
            file.as_file().set_permissions(mode).map_err(io)?;
        }
        Ok(Self { file, path })
    }

    /// Where the bytes are for now; to be removed if the program is interrupted.
    pub fn temporary(&self) -> &Path {
        self.file.path()
    }

    /// Writes header and tensors and gives the file its name.
    ///
    /// `from` is the tensors' bytes without gaps, in order.
    pub fn write(
        mut self,
        tensors: &[TensorInfo],
        metadata: Option<&Metadata>,
        from: &Lease,
        mut progress: impl FnMut(u64),
    ) -> Result<(), FileError> {
        let header = Header::encode(tensors, metadata);
        let needed = header.len() as u64 + from.len() as u64;
        let failed = |path: &Path, source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FileError::Full {
                path: folder_of(path).to_owned(),
                needed,
            },
            _ => FileError::Io {
                action: "write",
                path: path.to_owned(),
                source,
            },
        };
        let path = self.path.clone();
        self.fill(&header, from, &mut progress)
            .map_err(|e| failed(&path, e))?;
        self.file
            .as_file()
            .sync_all()
            .map_err(|e| failed(&path, e))?;
        self.file
            .persist(&self.path)
            .map_err(|e| failed(&path, e.error))?;
        Ok(())
    }

    fn fill(
        &mut self,
        header: &[u8],
        from: &Lease,
        progress: &mut dyn FnMut(u64),
    ) -> io::Result<()> {
        let file = self.file.as_file_mut();
        // Finds a full disk before the first byte, where the file system can.
        let needed = header.len() as u64 + from.len() as u64;
        match rustix::fs::fallocate(&*file, rustix::fs::FallocateFlags::empty(), 0, needed) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        file.write_all(header)?;
        let mut done = 0;
        while done < from.len() {
            let part = done..from.len().min(done + CHUNK as usize);
            match from.write_file(part, &*file)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => done += written,
            }
            progress(done as u64);
        }
        Ok(())
    }
}

/// The regular file that is to be replaced, if there is one.
fn old_file(path: &Path) -> io::Result<Option<fs::Metadata>> {
    let old = match fs::metadata(path) {
        Ok(old) => old,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if old.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !old.is_file() {
        let what = "it is there and not a regular file: name another";
        return Err(io::Error::other(what));
    }
    Ok(Some(old))
}

/// Where a path leads, whether or not anything is there.
fn follow_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&path) {
            Ok(target) => path = folder_of(&path).join(target),
            // Not a link, or nothing yet.
            Err(_) => return Ok(path),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

/// The folder that holds `path`.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[derive(Default)]
struct RawHeader {
    metadata: Option<Metadata>,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(Serialize, Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A JSON object of strings, in order.
struct Pairs(Metadata);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(key) = map.next_key::<String>()? {
                    if key != METADATA_KEY {
                        header.tensors.push((key, map.next_value()?));
                    } else if header.metadata.is_none() {
                        header.metadata = Some(map.next_value::<Pairs>()?.0);
                    } else {
                        return Err(de::Error::custom("__metadata__ is there twice"));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Metadata::new();
                let mut keys = HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if !keys.insert(key.clone()) {
                        return Err(de::Error::custom(format!(
                            "metadata {key:?} is there twice"
                        )));
                    }
                    pairs.push((key, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}

fn parse_dtype(name: &str, dtype: &str) -> Result<Dtype, HeaderError> {
    let parsed: Result<Dtype, de::value::Error> = Dtype::deserialize(dtype.into_deserializer());
    parsed.map_err(|_| HeaderError::Dtype {
        name: name.to_owned(),
        dtype: dtype.to_owned(),
    })
}

fn push_json(json: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    serde_json::to_writer(json, value).expect("strings and numbers always have a JSON form");
}

fn push_map(json: &mut Vec<u8>, pairs: &Metadata) {
    json.push(b'{');
    for (index, (key, value)) in pairs.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        push_json(json, key);
        json.push(b':');
        push_json(json, value);
    }
    json.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use genie_dataplane::memory::{Backing, Region};
    use proptest::prelude::*;

    fn file_of(json: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<ModelFile, FileError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        ModelFile::open(file.path())
    }

    fn refusal(bytes: &[u8]) -> String {
        open(bytes).unwrap_err().to_string()
    }

    #[test]
    fn files_that_contradict_themselves_are_refused_with_the_reason() {
        assert!(refusal(b"abc").contains("too few"));
        assert!(refusal(&[0xff; 64]).contains("claims"));
        assert!(refusal(&file_of("{", b"")).contains("EOF"));
        assert!(refusal(&file_of("[]", b"")).contains("object of tensors"));
        let a = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        assert!(open(&file_of(a, b"1234")).is_ok());
        assert!(refusal(&file_of(a, b"123")).contains("truncated"));
        assert!(refusal(&file_of(a, b"12345")).contains("trailing"));
        let unknown = r#"{"a":{"dtype":"Q7","shape":[4],"data_offsets":[0,4]}}"#;
        assert!(refusal(&file_of(unknown, b"1234")).contains(r#"unknown type "Q7""#));
        let gap = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        assert!(refusal(&file_of(gap, b"123")).contains("expected 2 bytes from 0 on"));
        let short = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
        assert!(refusal(&file_of(short, b"1234")).contains("expected 8 bytes"));
        let reversed = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[5,0]}}"#;
        assert!(refusal(&file_of(reversed, b"")).contains("claims bytes 5 to 0"));
        let huge = r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
        assert!(refusal(&file_of(huge, b"")).contains("whole number of bytes"));
        let twice = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        assert!(refusal(&file_of(twice, b"")).contains("twice"));
        let negative = r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}"#;
        assert!(refusal(&file_of(negative, b"")).contains("invalid value"));
    }

    /// The JSON of a header as models have it.
    fn real_header() -> Vec<u8> {
        let info = |name: &str, dtype, shape: &[u64]| TensorInfo {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        let tensors = [
            info("model.embed.weight", Dtype::BF16, &[10, 12]),
            info("重み\"", Dtype::F8_E5M2, &[3]),
            info("none", Dtype::I64, &[0, 5]),
            info("scalar", Dtype::BOOL, &[]),
        ];
        let metadata = vec![("format".to_owned(), "pt".to_owned())];
        Header::encode(&tensors, Some(&metadata))[8..].to_vec()
    }

    /// A header that is taken has no gaps, and comes back as it was.
    fn check_sound(json: &[u8]) {
        let Ok(header) = Header::parse(json) else {
            return;
        };
        let lens = header.tensors.iter().map(|info| info.len_bytes().unwrap());
        assert_eq!(lens.sum::<u64>(), header.data_len);
        let again = Header::encode(&header.tensors, header.metadata.as_ref());
        assert_eq!(Header::parse(&again[8..]).unwrap(), header);
    }

    #[test]
    fn every_change_of_a_byte_of_a_header_is_survived() {
        let json = real_header();
        check_sound(&json);
        let text = json.trim_ascii_end().len();
        for at in 0..json.len() {
            assert_eq!(
                Header::parse(&json[..at]).is_ok(),
                at >= text,
                "cut to {at}"
            );
            let flips = (0..8).map(|bit| json[at] ^ (1 << bit));
            for value in flips.chain(*b"{}[]\":,0-e ") {
                let mut changed = json.clone();
                changed[at] = value;
                check_sound(&changed);
            }
        }
    }

    #[test]
    fn metadata_must_be_strings_and_keeps_its_order() {
        let bytes = file_of(r#"{"__metadata__":{"z":"1","a":"2"}}"#, b"");
        let metadata = open(&bytes).unwrap().header.metadata.unwrap();
        assert_eq!(
            metadata,
            [("z".into(), "1".into()), ("a".into(), "2".into())]
        );
        assert!(open(&file_of(r#"{"__metadata__":{"z":1}}"#, b"")).is_err());
        assert!(open(&file_of(r#"{"__metadata__":{"z":"1","z":"2"}}"#, b"")).is_err());
    }

    #[test]
    fn a_file_of_the_reference_library_comes_back_byte_for_byte() {
        let views: Vec<(String, ::safetensors::tensor::TensorView<'_>)> = vec![
            ("重み".into(), view(Dtype::BF16, vec![3], b"abcdef")),
            ("a\"quote".into(), view(Dtype::F8_E4M3, vec![2, 2], b"wxyz")),
            ("none".into(), view(Dtype::I64, vec![0, 5], b"")),
            ("scalar".into(), view(Dtype::BOOL, vec![], b"\x01")),
        ];
        let metadata = [("format".to_owned(), "pt".to_owned())]
            .into_iter()
            .collect();
        let bytes = ::safetensors::serialize(views, Some(metadata)).unwrap();
        let model = open(&bytes).unwrap();
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let lease = Lease::new(region, 0, model.header.data_len).unwrap();
        model.read_into(&lease, |_| ()).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.safetensors");
        let Header {
            tensors, metadata, ..
        } = &model.header;
        Draft::create(&out)
            .unwrap()
            .write(tensors, metadata.as_ref(), &lease, |_| ())
            .unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), bytes);
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "only the file itself"
        );
    }

    #[test]
    fn a_draft_that_is_given_up_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let draft = Draft::create(&folder.path().join("x")).unwrap();
        assert!(draft.temporary().exists());
        drop(draft);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// Writes a file without tensors.
    fn write_empty(path: &Path) -> Result<(), FileError> {
        let region = Region::with_backing(4096, Backing::Shmem).unwrap();
        let none = Lease::new(region, 0, 0).unwrap();
        Draft::create(path)?.write(&[], None, &none, |_| ())
    }

    #[test]
    fn what_is_not_a_regular_file_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        for path in [&socket, &link, Path::new("/dev/null")] {
            let refused = write_empty(path).unwrap_err().to_string();
            assert!(refused.contains("not a regular file"), "{refused}");
            assert!(!fs::metadata(path).unwrap().is_file());
        }
        assert!(write_empty(folder.path()).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_are_written_through_and_modes_kept() {
        let folder = tempfile::tempdir().unwrap();
        let in_folder = |name: &str| folder.path().join(name);
        fs::create_dir(in_folder("sub")).unwrap();
        let target = in_folder("sub/target");
        let (first, second) = (in_folder("first"), in_folder("second"));
        std::os::unix::fs::symlink("second", &first).unwrap();
        std::os::unix::fs::symlink("sub/target", &second).unwrap();
        write_empty(&first).unwrap();
        assert!(ModelFile::open(&target).is_ok(), "through a dangling link");

        fs::write(&target, b"old").unwrap();
        fs::set_permissions(&target, Permissions::from_mode(0o604)).unwrap();
        write_empty(&first).unwrap();
        assert!(ModelFile::open(&target).is_ok());
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o604);
        for link in [&first, &second] {
            assert!(fs::symlink_metadata(link).unwrap().is_symlink());
        }
        std::os::unix::fs::symlink("round", in_folder("round")).unwrap();
        assert!(write_empty(&in_folder("round")).is_err());
    }

    #[test]
    fn a_name_without_a_folder_lies_in_the_current_one() {
        assert_eq!(folder_of(Path::new("x.safetensors")), Path::new("."));
        assert_eq!(folder_of(Path::new("a/x")), Path::new("a"));
    }

    fn view(dtype: Dtype, shape: Vec<usize>, data: &[u8]) -> ::safetensors::tensor::TensorView<'_> {
        ::safetensors::tensor::TensorView::new(dtype, shape, data).unwrap()
    }

    proptest! {
        #[test]
        fn a_header_from_anywhere_is_refused(json in ".{0,200}") {
            let empty = json.split_whitespace().collect::<String>() == "{}";
            prop_assert_eq!(Header::parse(json.as_bytes()).is_ok(), empty);
        }

        #[test]
        fn a_mutated_header_is_refused_or_sound(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..5),
        ) {
            let mut json = real_header();
            for (at, value) in changes {
                let at = at.index(json.len());
                json[at] = value;
            }
            check_sound(&json);
        }

        #[test]
        fn a_header_that_parses_is_one_that_can_be_written(
            shape in proptest::collection::vec(any::<u64>(), 0..4),
            begin in any::<u64>(),
            len in any::<u64>(),
        ) {
            let end = begin.wrapping_add(len);
            let json = format!(
                r#"{{"a":{{"dtype":"I16","shape":{shape:?},"data_offsets":[{begin},{end}]}}}}"#
            );
            if let Ok(header) = Header::parse(json.as_bytes()) {
                let bytes = Header::encode(&header.tensors, None);
                prop_assert_eq!(Header::parse(&bytes[8..]).unwrap(), header);
            }
        }
    }
}
