//! What a tensor is called and what it looks like; never its bytes.

use std::collections::HashSet;
use std::fmt;

pub use safetensors::Dtype;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The longest full name (`PREFIX/NAME`) in bytes: generous for any framework's
/// parameter paths, small enough that a million names fit into memory.
pub const NAME_MAX: usize = 1024;

/// Most dimensions of a shape; far above what any framework supports.
pub const DIMENSIONS_MAX: usize = 64;

/// Most tensors in one batch.
pub const TENSORS_MAX: u64 = 4 << 20;

/// Most memory for the descriptions in one batch or listing: a million tensors
/// with names and shapes of the usual length.
pub const LIST_MAX: usize = 128 << 20;

/// Most bytes of a prefix's metadata, keys and values together.
pub const METADATA_MAX: usize = 4 << 20;

/// Key and value pairs that belong to a prefix, in the order they came in.
pub type Metadata = Vec<(String, String)>;

/// A tensor's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    /// Its name within its prefix.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Dimensions; none for a scalar.
    #[serde(deserialize_with = "deserialize_shape")]
    pub shape: Vec<u64>,
}

/// Counts a list as it comes in, so that no more of it is held than is allowed.
#[derive(Debug)]
pub struct ListLimit {
    announced: u64,
    tensors: u64,
    bytes: usize,
}

/// Why a name, a shape or a batch was refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TensorError {
    /// Nothing there.
    #[error("a name is empty")]
    EmptyName,
    /// Too long.
    #[error("a name of {0} bytes is too long: at most {NAME_MAX} with its prefix")]
    LongName(usize),
    /// `NUL`, an escape or another control character.
    #[error("the name {0:?} contains a control character")]
    ControlCharacter(String),
    /// A part between slashes is empty, `.` or `..`.
    #[error("the name {0:?} has an empty part, '.' or '..' between its slashes")]
    BadComponent(String),
    /// The same name twice in a batch.
    #[error("the name {0:?} is there twice")]
    Duplicate(String),
    /// Too many dimensions.
    #[error("tensor {name:?} has {dimensions} dimensions: at most {DIMENSIONS_MAX}")]
    Dimensions {
        /// Which tensor.
        name: String,
        /// How many it has.
        dimensions: usize,
    },
    /// The number of bytes does not fit 64 bits, or is not whole.
    #[error(
        "tensor {name:?} of shape {shape:?} and type {dtype} has no whole number of bytes that can be addressed"
    )]
    Size {
        /// Which tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its type.
        dtype: Dtype,
    },
    /// Too many tensors.
    #[error("{0} tensors in one batch are too many: at most {TENSORS_MAX}")]
    TooMany(u64),
    /// More than was said there would be.
    #[error("the list has more than the {0} tensors that were announced")]
    Unannounced(u64),
    /// Their descriptions are too long, all together.
    #[error(
        "the names and shapes of the tensors take more than {LIST_MAX} bytes: \
         use several batches, or shorter names"
    )]
    LongList,
    /// Too much metadata.
    #[error("{0} bytes of metadata are too many: at most {METADATA_MAX}")]
    Metadata(usize),
}

impl TensorInfo {
    /// Roughly the memory that it takes.
    pub fn held_bytes(&self) -> usize {
        size_of::<Self>() + self.name.len() + size_of_val(&self.shape[..])
    }

    /// Checks its name and its size.
    pub fn check(&self) -> Result<(), TensorError> {
        check_name(&self.name)?;
        self.len_bytes().map(drop)
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> Result<u64, TensorError> {
        let size = || TensorError::Size {
            name: self.name.clone(),
            shape: self.shape.clone(),
            dtype: self.dtype,
        };
        if self.shape.len() > DIMENSIONS_MAX {
            let (name, dimensions) = (self.name.clone(), self.shape.len());
            return Err(TensorError::Dimensions { name, dimensions });
        }
        let elements = self.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let bits = elements.and_then(|n| n.checked_mul(self.dtype.bitsize() as u64));
        bits.filter(|bits| bits.is_multiple_of(8))
            .map(|bits| bits / 8)
            .ok_or_else(size)
    }
}

impl ListLimit {
    /// A limit for a list of `announced` tensors and what comes with it.
    pub fn new(announced: u64, metadata: Option<&Metadata>) -> Result<Self, TensorError> {
        if announced > TENSORS_MAX {
            return Err(TensorError::TooMany(announced));
        }
        let bytes = metadata_bytes(metadata);
        if bytes > METADATA_MAX {
            return Err(TensorError::Metadata(bytes));
        }
        Ok(Self {
            announced,
            tensors: 0,
            bytes,
        })
    }

    /// Checks one more.
    pub fn add(&mut self, info: &TensorInfo) -> Result<(), TensorError> {
        info.check()?;
        self.count(info.held_bytes())
    }

    /// Counts one more of `bytes`.
    pub fn count(&mut self, bytes: usize) -> Result<(), TensorError> {
        if self.tensors == self.announced {
            return Err(TensorError::Unannounced(self.announced));
        }
        self.tensors += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > LIST_MAX {
            return Err(TensorError::LongList);
        }
        Ok(())
    }

    /// Memory for all of it so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Bytes of keys and values together.
pub fn metadata_bytes(metadata: Option<&Metadata>) -> usize {
    let pairs = metadata.into_iter().flatten();
    pairs.map(|(key, value)| key.len() + value.len()).sum()
}

/// Reads a shape; a long one is refused before it takes memory.
pub(crate) fn deserialize_shape<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<u64>, D::Error> {
    struct Dimensions;
    impl<'de> Visitor<'de> for Dimensions {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {DIMENSIONS_MAX} dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = seq.next_element()? {
                if shape.len() == DIMENSIONS_MAX {
                    return Err(de::Error::invalid_length(shape.len() + 1, &self));
                }
                shape.push(dimension);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Dimensions)
}

/// Checks a prefix, a name or both joined by a slash.
pub fn check_name(name: &str) -> Result<(), TensorError> {
    if name.is_empty() {
        return Err(TensorError::EmptyName);
    }
    if name.len() > NAME_MAX {
        return Err(TensorError::LongName(name.len()));
    }
    if name.chars().any(char::is_control) {
        return Err(TensorError::ControlCharacter(name.to_owned()));
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(TensorError::BadComponent(name.to_owned()));
    }
    Ok(())
}

/// Checks a batch that is to be put under `prefix`; returns its bytes in total.
pub fn check_batch(
    prefix: &str,
    tensors: &[TensorInfo],
    metadata: Option<&Metadata>,
) -> Result<u64, TensorError> {
    check_name(prefix)?;
    let mut limit = ListLimit::new(tensors.len() as u64, metadata)?;
    let mut seen = HashSet::with_capacity(tensors.len());
    let mut total = 0u64;
    for tensor in tensors {
        limit.add(tensor)?;
        let full = prefix.len() + 1 + tensor.name.len();
        if full > NAME_MAX {
            return Err(TensorError::LongName(full));
        }
        if !seen.insert(&tensor.name) {
            return Err(TensorError::Duplicate(tensor.name.clone()));
        }
        let too_large = || TensorError::Size {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            dtype: tensor.dtype,
        };
        total = total
            .checked_add(tensor.len_bytes()?)
            .ok_or_else(too_large)?;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: name.into(),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn names_that_could_leave_their_prefix_are_refused() {
        for bad in ["", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "a/./b"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            check_name("a\0b"),
            Err(TensorError::ControlCharacter("a\0b".into()))
        );
        assert!(check_name("a\u{85}b").is_err());
        assert!(check_name(&"x".repeat(NAME_MAX + 1)).is_err());
        for good in ["a", "model.layers.0.weight", "a/b", "..a", "重み", "a b"] {
            assert_eq!(check_name(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn sizes_do_not_wrap() {
        assert_eq!(info("a", &[]).len_bytes(), Ok(4));
        assert_eq!(info("a", &[3, 0, 7]).len_bytes(), Ok(0));
        assert!(info("a", &[u64::MAX, 2]).len_bytes().is_err());
        assert!(info("a", &[1; 65]).len_bytes().is_err());
        let half = TensorInfo {
            dtype: Dtype::F4,
            ..info("a", &[3])
        };
        assert!(half.len_bytes().is_err());
        let huge = [info("a", &[1 << 61]), info("b", &[1 << 61])];
        assert!(check_batch("p", &huge, None).is_err());
    }

    #[test]
    fn a_list_is_refused_as_soon_as_it_is_too_long() {
        let mut limit = ListLimit::new(2, None).unwrap();
        assert_eq!(limit.add(&info("a", &[])), Ok(()));
        assert!(limit.add(&info("../a", &[])).is_err());
        assert!(limit.add(&info("a", &[1; 65])).is_err());
        assert_eq!(limit.add(&info("b", &[])), Ok(()));
        let more = limit.add(&info("c", &[]));
        assert_eq!(more, Err(TensorError::Unannounced(2)));

        let mut limit = ListLimit::new(TENSORS_MAX, None).unwrap();
        let long = info(&"x".repeat(NAME_MAX), &[1; DIMENSIONS_MAX]);
        let fit = LIST_MAX / long.held_bytes();
        assert!((0..fit).all(|_| limit.add(&long).is_ok()));
        assert_eq!(limit.add(&long), Err(TensorError::LongList));
        assert!(ListLimit::new(TENSORS_MAX + 1, None).is_err());
        let metadata = vec![("k".to_owned(), "v".repeat(METADATA_MAX))];
        assert!(ListLimit::new(1, Some(&metadata)).is_err());
    }

    #[test]
    fn a_shape_of_too_many_dimensions_is_not_even_decoded() {
        let encode = |info: &TensorInfo| rmp_serde::to_vec_named(info).unwrap();
        let decode = |bytes: &[u8]| rmp_serde::from_slice::<TensorInfo>(bytes);
        let widest = info("a", &[1; DIMENSIONS_MAX]);
        assert_eq!(decode(&encode(&widest)).unwrap(), widest);
        let refused = decode(&encode(&info("a", &[1; 65]))).unwrap_err();
        assert!(refused.to_string().contains("at most 64 dimensions"));
    }

    #[test]
    fn a_name_twice_is_refused() {
        let twice = [info("a", &[]), info("a", &[])];
        assert_eq!(
            check_batch("p", &twice, None),
            Err(TensorError::Duplicate("a".into()))
        );
    }
}
