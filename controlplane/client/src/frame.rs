//! Frames: a length and a MessagePack body, after a preamble that says which
//! protocol this is.
//!
//! ```text
//!   preamble (8 bytes, once, each way):  'G' 'N' 'I' 'E'  lowest u16  highest u16
//!   frame:                               length u32, then that many bytes of MessagePack
//! ```
//!
//! All integers are big-endian. Used on the connection between two agents and
//! on the application socket. The invariant: *what a peer sends can neither
//! panic nor make us allocate more than it has really sent*.

use std::io::{self, Read, Write};
use std::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest body in bytes. Lists longer than this travel in several frames.
pub const BODY_MAX: usize = 16 << 20;

/// Largest body before the other side has introduced itself.
pub const HELLO_MAX: usize = 64 << 10;

/// Versions of the control protocol that this build speaks.
pub const VERSIONS: RangeInclusive<u16> = 3..=3;

const MAGIC: [u8; 4] = *b"GNIE";

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side closed the connection between two frames.
    #[error("the connection was closed")]
    Closed,
    /// The connection failed or ended inside a frame.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
    /// The first bytes are not Genie's.
    #[error("the other side does not speak Genie's protocol: is this the right port?")]
    NotGenie,
    /// No version in common.
    #[error(
        "the other side speaks protocol versions {} to {}, this build {} to {}: upgrade the older one",
        theirs.start(), theirs.end(), VERSIONS.start(), VERSIONS.end()
    )]
    Version {
        /// What the other side speaks.
        theirs: RangeInclusive<u16>,
    },
    /// Longer than allowed.
    #[error("a frame of {len} bytes is longer than {max}")]
    TooLong {
        /// Length announced.
        len: usize,
        /// Length allowed.
        max: usize,
    },
    /// Not what the protocol says should be there.
    #[error("a frame cannot be understood: {0}")]
    Malformed(String),
}

/// The first bytes of a connection.
pub fn preamble() -> [u8; 8] {
    let [a, b] = VERSIONS.start().to_be_bytes();
    let [c, d] = VERSIONS.end().to_be_bytes();
    let [g, n, i, e] = MAGIC;
    [g, n, i, e, a, b, c, d]
}

/// Checks the other side's first bytes; returns the version to speak.
pub fn check_preamble(bytes: [u8; 8]) -> Result<u16, FrameError> {
    let [g, n, i, e, a, b, c, d] = bytes;
    if [g, n, i, e] != MAGIC {
        return Err(FrameError::NotGenie);
    }
    let theirs = u16::from_be_bytes([a, b])..=u16::from_be_bytes([c, d]);
    let version = *VERSIONS.end().min(theirs.end());
    if theirs.contains(&version) && VERSIONS.contains(&version) {
        Ok(version)
    } else {
        Err(FrameError::Version { theirs })
    }
}

/// Encodes a message with its length.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    rmp_serde::encode::write_named(&mut bytes, message)
        .map_err(|error| FrameError::Malformed(error.to_string()))?;
    let len = bytes.len() - 4;
    if len > BODY_MAX {
        return Err(FrameError::TooLong { len, max: BODY_MAX });
    }
    bytes[..4].copy_from_slice(&(len as u32).to_be_bytes());
    Ok(bytes)
}

/// Decodes a body.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    rmp_serde::from_slice(body).map_err(|error| FrameError::Malformed(error.to_string()))
}

/// Sends our preamble and checks the other side's.
pub fn exchange_preamble_blocking(stream: &mut (impl Read + Write)) -> Result<u16, FrameError> {
    let written = stream.write_all(&preamble());
    // Somebody who turns us away may have closed already; why is in what they
    // sent before.
    let mut theirs = [0; 8];
    stream.read_exact(&mut theirs).map_err(ended)?;
    let version = check_preamble(theirs)?;
    written.map_err(FrameError::Io)?;
    Ok(version)
}

/// Reads one message of at most `max` bytes.
pub fn read_blocking<T: DeserializeOwned>(
    stream: &mut impl Read,
    max: usize,
) -> Result<T, FrameError> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).map_err(ended)?;
    let len = check_len(header, max)?;
    let mut body = Vec::new();
    let read = stream
        .take(len as u64)
        .read_to_end(&mut body)
        .map_err(FrameError::Io)?;
    if read < len {
        return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    decode(&body)
}

/// Writes one message.
pub fn write_blocking<T: Serialize>(
    stream: &mut impl Write,
    message: &T,
) -> Result<(), FrameError> {
    stream.write_all(&encode(message)?).map_err(FrameError::Io)
}

/// The length that a header announces, if it is allowed.
pub fn check_len(header: [u8; 4], max: usize) -> Result<usize, FrameError> {
    let len = u32::from_be_bytes(header) as usize;
    if len > max {
        Err(FrameError::TooLong { len, max })
    } else {
        Ok(len)
    }
}

/// What the end of the stream means between two frames.
pub fn ended(error: io::Error) -> FrameError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        FrameError::Closed
    } else {
        FrameError::Io(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Ask;
    use proptest::prelude::*;

    #[test]
    fn a_message_survives() {
        let bytes = encode(&("a", vec![1u32, 2])).unwrap();
        let back: (String, Vec<u32>) = read_blocking(&mut &bytes[..], BODY_MAX).unwrap();
        assert_eq!(back, ("a".into(), vec![1, 2]));
    }

    #[test]
    fn a_cut_frame_is_an_error_and_a_cut_between_frames_a_close() {
        let bytes = encode(&"some text").unwrap();
        let cut = read_blocking::<String>(&mut &bytes[..bytes.len() - 1], BODY_MAX);
        assert!(matches!(cut, Err(FrameError::Io(_))));
        let none = read_blocking::<String>(&mut &[][..], BODY_MAX);
        assert!(matches!(none, Err(FrameError::Closed)));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_read() {
        let result = read_blocking::<String>(&mut &[0xff; 4][..], BODY_MAX);
        assert!(matches!(
            result,
            Err(FrameError::TooLong {
                len: 0xffff_ffff,
                ..
            })
        ));
    }

    #[test]
    fn versions_must_overlap() {
        assert_eq!(check_preamble(preamble()).unwrap(), 3);
        let newer = *b"GNIE\0\x04\0\x05";
        let error = check_preamble(newer).unwrap_err().to_string();
        assert!(error.contains("versions 4 to 5"), "{error}");
        let wide = *b"GNIE\0\x00\0\x05";
        assert_eq!(check_preamble(wide).unwrap(), 3);
        let reversed = *b"GNIE\0\x05\0\x00";
        assert!(check_preamble(reversed).is_err());
        assert!(matches!(
            check_preamble(*b"GET / HT"),
            Err(FrameError::NotGenie)
        ));
    }

    proptest! {
        #[test]
        fn bytes_from_a_peer_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Ask>(&bytes);
            let _ = read_blocking::<Ask>(&mut &bytes[..], BODY_MAX);
        }

        #[test]
        fn a_mutated_message_never_panics(at in 0usize..64, value in any::<u8>()) {
            let message = Ask::Remove {
                node: None,
                name: "why".into(),
            };
            let mut bytes = encode(&message).unwrap();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = read_blocking::<Ask>(&mut &bytes[..], BODY_MAX);
        }
    }
}
