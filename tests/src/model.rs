//! Safetensors files written by hand, sound and otherwise.
//!
//! Independent of the code under test: a header is JSON text that a test can
//! bend as it likes.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its type, as the format spells it.
    pub dtype: &'static str,
    /// Its dimensions.
    pub shape: Vec<u64>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor of `len` bytes that depend on its name.
    pub fn bytes(name: &str, len: usize) -> Self {
        let seed = name
            .bytes()
            .fold(1u64, |a, b| a.wrapping_mul(31).wrapping_add(b.into()));
        Self {
            name: name.to_owned(),
            dtype: "U8",
            shape: vec![len as u64],
            bytes: noise(seed, len),
        }
    }
}

/// Bytes without a pattern that a bug could reproduce by accident.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes a file as the reference library would.
pub fn write(path: &Path, tensors: &[Tensor], metadata: &[(&str, &str)]) {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let metadata: Map<String, Value> = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect();
        header.insert("__metadata__".to_owned(), Value::Object(metadata));
    }
    let mut offset = 0;
    let mut data = Vec::new();
    for tensor in tensors {
        let end = offset + tensor.bytes.len();
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end],
        });
        assert!(
            header.insert(tensor.name.clone(), entry).is_none(),
            "a name twice"
        );
        offset = end;
        data.extend_from_slice(&tensor.bytes);
    }
    write_raw(path, &Value::Object(header).to_string(), &data);
}

/// Writes a header that may say anything, and data.
pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut file = File::create(path).expect("the folder can be written");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .expect("there is room");
    file.write_all(header.as_bytes()).expect("there is room");
    file.write_all(data).expect("there is room");
}

/// Writes a file of `count` tensors of `len` zero bytes each, without using the disk.
pub fn write_sparse(path: &Path, count: u64, len: u64) {
    let entry = |index: u64| {
        let (begin, end) = (index * len, (index + 1) * len);
        format!(r#""t{index:04}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{begin},{end}]}}"#)
    };
    let header = format!(
        "{{{}}}",
        (0..count).map(entry).collect::<Vec<_>>().join(",")
    );
    write_raw(path, &header, &[]);
    let mut file = File::options()
        .write(true)
        .open(path)
        .expect("just written");
    let end = file.seek(SeekFrom::End(0)).expect("a file has an end");
    file.set_len(end + count * len)
        .expect("a sparse file takes no room");
}

/// What a file says of a tensor and what it holds: name, type, shape, bytes.
pub type Entry = (String, Value, Value, Vec<u8>);

/// What a file holds: metadata, and tensors by name.
///
/// # Panics
/// If it is not a sound file.
pub fn read(path: &Path) -> (Value, Vec<Entry>) {
    let bytes = std::fs::read(path).expect("the file is there");
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Map<String, Value> =
        serde_json::from_slice(&bytes[8..8 + len]).expect("the header is JSON");
    let data = &bytes[8 + len..];
    let mut metadata = Value::Null;
    let mut tensors = Vec::new();
    for (name, entry) in header {
        if name == "__metadata__" {
            metadata = entry;
            continue;
        }
        let offset =
            |index: usize| entry["data_offsets"][index].as_u64().expect("a number") as usize;
        let bytes = data[offset(0)..offset(1)].to_vec();
        tensors.push((name, entry["dtype"].clone(), entry["shape"].clone(), bytes));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    (metadata, tensors)
}
