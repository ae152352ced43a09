//! Frames for asynchronous code; what they are is said in [`genie_client::frame`].
//!
//! Used on the connection between two agents and on the application socket.
//! The invariant: *what a peer sends can neither panic nor make us allocate
//! more than it has really sent*.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use genie_client::frame::*;

/// Sends our preamble and checks the other side's.
pub async fn exchange_preamble<S>(stream: &mut S) -> Result<u16, FrameError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream
        .write_all(&preamble())
        .await
        .map_err(FrameError::Io)?;
    stream.flush().await.map_err(FrameError::Io)?;
    let mut theirs = [0; 8];
    stream.read_exact(&mut theirs).await.map_err(ended)?;
    check_preamble(theirs)
}

/// Reads one message of at most `max` bytes. The caller owns the deadline.
pub async fn read<T, S>(stream: &mut S, max: usize) -> Result<T, FrameError>
where
    T: DeserializeOwned,
    S: AsyncRead + Unpin,
{
    let mut header = [0; 4];
    stream.read_exact(&mut header).await.map_err(ended)?;
    let len = check_len(header, max)?;
    // Grows with what arrives: an announced length alone costs nothing.
    let mut body = Vec::new();
    let read = stream
        .take(len as u64)
        .read_to_end(&mut body)
        .await
        .map_err(FrameError::Io)?;
    if read < len {
        return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    decode(&body)
}

/// Writes one message.
pub async fn write<T, S>(stream: &mut S, message: &T) -> Result<(), FrameError>
where
    T: Serialize,
    S: AsyncWrite + Unpin,
{
    stream
        .write_all(&encode(message)?)
        .await
        .map_err(FrameError::Io)?;
    // TLS keeps what it was given until then.
    stream.flush().await.map_err(FrameError::Io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Message, Outcome, Request};
    use crate::negotiation::Refusal;
    use crate::tensor::{DIMENSIONS_MAX, Dtype, TensorInfo};
    use crate::transport::Transport;
    use genie_client::{Listed, Owner};
    use genie_dataplane::SessionId;
    use genie_dataplane::tcp::Token;
    use proptest::prelude::*;

    #[test]
    fn a_message_survives() {
        let bytes = encode(&("a", vec![1u32, 2])).unwrap();
        let back: (String, Vec<u32>) = read_blocking(&mut &bytes[..], BODY_MAX).unwrap();
        assert_eq!(back, ("a".into(), vec![1, 2]));
    }

    /// One of each message that a request has, and of those that negotiate.
    fn messages() -> Vec<Message> {
        let info = |name: &str, shape: &[u64]| TensorInfo {
            name: name.into(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
        };
        let metadata = Some(vec![("format".to_owned(), "pt".to_owned())]);
        let refused = vec![Refusal {
            transport: Transport::Dpdk,
            reason: "no huge pages".into(),
        }];
        let listed = Listed {
            name: "m/a".into(),
            dtype: "BF16".into(),
            shape: vec![2, 3],
            bytes: 12,
            owner: Owner::Peer("b".into()),
            memory: "host".into(),
            window: false,
        };
        vec![
            Message::Hello(crate::session::testing::hello()),
            Message::Try {
                transport: Transport::Tcp,
                session: SessionId(7),
                token: Some(Token([9; 16])),
                salt: None,
            },
            Message::Try {
                transport: Transport::Dpdk,
                session: SessionId(7),
                token: None,
                salt: Some(crate::security::Salt([3; 16])),
            },
            Message::Trying {
                session: SessionId(8),
                salt: Some(crate::security::Salt([4; 16])),
            },
            Message::TryRefused {
                reason: "busy".into(),
            },
            Message::Opened { result: Ok(()) },
            Message::Opened {
                result: Err("no answer".into()),
            },
            Message::Chosen {
                refused: refused.clone(),
            },
            Message::NoPath { refused },
            Message::Ping,
            Message::Bye {
                reason: "why".into(),
                passing: true,
            },
            Message::Begin {
                id: 1,
                request: Request::Put {
                    prefix: "m".into(),
                    count: 2,
                    metadata: metadata.clone(),
                    memory: Default::default(),
                    key: None,
                },
            },
            Message::Begin {
                id: 2,
                request: Request::List { under: None },
            },
            Message::Tensors {
                id: 1,
                tensors: vec![info("a", &[2, 3]), info("b", &[])],
            },
            Message::Found {
                id: 3,
                count: 2,
                metadata,
            },
            Message::Listed {
                id: 2,
                tensors: vec![listed],
            },
            Message::Done {
                id: 1,
                result: Ok(Outcome::default()),
            },
            Message::Done {
                id: 1,
                result: Err(genie_client::protocol::Failure {
                    kind: genie_client::FailureKind::NoMemory,
                    message: "the store is full".into(),
                }),
            },
            Message::Denied {
                id: 1,
                right: crate::rights::Right::Put,
                name: "m".into(),
            },
            Message::Cancel { id: 1 },
            Message::Begin {
                id: 4,
                request: crate::message::Request::Write {
                    runs: crate::message::Runs {
                        targets: vec!["w".into()],
                        runs: vec![(0, genie_client::Run::bytes(3, 4))],
                    },
                    note: Some(genie_client::protocol::Note {
                        target: 0,
                        message: b"go".to_vec(),
                    }),
                },
            },
        ]
    }

    /// A message that was understood is one that can be said again.
    fn check_stable(message: &Message) {
        let bytes = encode(message).unwrap();
        let again: Message = read_blocking(&mut &bytes[..], BODY_MAX).unwrap();
        assert_eq!(encode(&again).unwrap(), bytes, "{message:?}");
        if let Message::Tensors { tensors, .. } = message {
            let dimensions = tensors.iter().map(|info| info.shape.len());
            assert!(dimensions.max().unwrap_or(0) <= DIMENSIONS_MAX);
        }
    }

    /// Whether `bytes` were read as the first page of this file says.
    fn check_read(bytes: &[u8], result: Result<Message, FrameError>) {
        let Some((header, body)) = bytes.split_first_chunk::<4>() else {
            assert!(matches!(result, Err(FrameError::Closed)), "{result:?}");
            return;
        };
        let len = u32::from_be_bytes(*header) as usize;
        match result {
            Ok(message) => {
                assert!(len <= body.len());
                check_stable(&message);
            }
            Err(FrameError::TooLong { .. }) => assert!(len > BODY_MAX),
            Err(FrameError::Io(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                assert!(len <= BODY_MAX && body.len() < len);
            }
            Err(FrameError::Malformed(reason)) => {
                assert!(len <= body.len() && !reason.is_empty());
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn every_message_survives_and_every_change_of_a_byte_is_survived() {
        for message in messages() {
            check_stable(&message);
            let bytes = encode(&message).unwrap();
            for at in 0..bytes.len() {
                let cut = &bytes[..at];
                let result = read_blocking::<Message>(&mut &cut[..], BODY_MAX);
                assert!(result.is_err(), "{message:?} cut to {at} bytes");
                check_read(cut, result);
                // Lengths and types of MessagePack, and every single bit.
                let flips = (0..8).map(|bit| bytes[at] ^ (1 << bit));
                for value in flips.chain([0xc0, 0xc6, 0xdb, 0xdd, 0xdf]) {
                    let mut changed = bytes.clone();
                    changed[at] = value;
                    check_read(&changed, read_blocking(&mut &changed[..], BODY_MAX));
                }
            }
        }
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
        fn bytes_from_anywhere_are_refused_for_the_right_reason(
            bytes in proptest::collection::vec(any::<u8>(), 0..512),
        ) {
            let result = read_blocking::<Message>(&mut &bytes[..], BODY_MAX);
            check_read(&bytes, result);
            if let Ok(message) = decode::<Message>(&bytes) {
                check_stable(&message);
            }
        }

        #[test]
        fn a_mutated_message_is_refused_or_is_another_message(
            which in any::<proptest::sample::Index>(),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..5),
            keep in any::<proptest::sample::Index>(),
        ) {
            let messages = messages();
            let mut bytes = encode(which.get(&messages)).unwrap();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            // Cut half of the time.
            let keep = keep.index(2 * bytes.len()).min(bytes.len());
            let bytes = &bytes[..keep];
            check_read(bytes, read_blocking(&mut &bytes[..], BODY_MAX));
        }
    }
}
