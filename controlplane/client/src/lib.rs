//! What programs use to hand tensors to their host's agent, and to take them from it.
//!
//! [`Client`] is a connection to the agent, [`Arena`] is memory shared with it,
//! in which programs allocate a [`Tensor`] without asking anybody. A put sends
//! tensors from there, a get brings tensors as [`Fetched`] memory, and a
//! [`RemoteTensor`] is a handle on one that stays where it is and of which
//! parts can be fetched. [`AsyncClient`] is the same for asynchronous code. See
//! `docs/applications.md` and the examples.
//!
//! ```no_run
//! use genie_client::{Client, Dtype, Memory};
//!
//! let mut client = Client::connect("/run/genie/agent.sock")?;
//! let arena = client.arena(1 << 20, Memory::Auto)?;
//! let weights = arena.tensor("weights", Dtype::F32, &[2, 2])?;
//! weights.write(0, &[0; 16]);
//! client.put(Some("b"), "model", &[weights], None)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The [`protocol`] on the application socket belongs to this crate too; the
//! agent is its other end.

#![forbid(unsafe_code)]

mod arena;
mod asynchronous;
mod batch;
mod client;
pub mod descriptor;
mod device;
pub mod frame;
mod notification;
pub mod protocol;
mod remote;
pub mod slice;
pub mod status;
pub mod tensor;
mod window;

pub use arena::{Arena, Fetched, Imported, NotOfArena, Packed, Tensor};
pub use asynchronous::AsyncClient;
pub use batch::{Batch, BatchError, Posted, Remote};
pub use client::{Canceller, Client, ClientError};
pub use device::{DeviceArena, DeviceMemory, FetchedOnDevice};
pub use notification::Listener;
pub use protocol::{
    Failure, FailureKind, IpcHandle, Listed, Memory, Moved, Notification, Owner, PeerLimit,
};
pub use remote::{Part, RemoteTensor, Selection};
pub use slice::{Run, SliceError, Span};
pub use status::AgentStatus;
pub use tensor::{Dtype, Metadata, TensorError, TensorInfo};
pub use window::Window;
