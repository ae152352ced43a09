//! Handles on tensors that stay where they are.

use std::sync::Arc;

use genie_dataplane::memory::{Lease, Region};

use crate::arena::{Hold, to_vec};
use crate::protocol::{Moved, Owner};
use crate::slice::{self, Run, SliceError, Span};
use crate::tensor::{Dtype, TensorInfo};

/// A stored tensor: where it is and what it looks like. Holds nothing there:
/// somebody may remove or replace it meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTensor {
    /// On which node; none on this host's own agent.
    pub node: Option<String>,
    /// What it is; the name is the full one.
    pub info: TensorInfo,
    /// Who put it.
    pub owner: Owner,
}

/// A part of a tensor that was fetched, its bytes one after the other in
/// memory that nobody can change any more.
#[derive(Debug)]
pub struct Part {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Dimensions of the part.
    pub shape: Vec<u64>,
    /// How it moved.
    pub moved: Moved,
    pub(crate) region: Arc<Region>,
    pub(crate) _hold: Arc<Hold>,
}

/// Which part of a tensor: its bytes there, and the shape it will have here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    pub(crate) runs: Vec<Run>,
    pub(crate) shape: Vec<u64>,
    pub(crate) dtype: Dtype,
}

impl RemoteTensor {
    /// The elements that `spans` select, one for each dimension.
    pub fn slice(&self, spans: &[Span]) -> Result<Selection, SliceError> {
        let (runs, shape) = slice::runs_of(&self.info, spans)?;
        slice::check_runs(&runs, self.len_bytes())?;
        let dtype = self.info.dtype;
        Ok(Selection { runs, shape, dtype })
    }

    /// These bytes, in this order, each at most once; the part will be of bytes.
    pub fn bytes(&self, runs: Vec<Run>) -> Result<Selection, SliceError> {
        let total = slice::check_runs(&runs, self.len_bytes())?;
        Ok(Selection {
            runs,
            shape: vec![total],
            dtype: Dtype::U8,
        })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.info.len_bytes().unwrap_or(0)
    }
}

impl Part {
    /// Its bytes.
    pub fn lease(&self) -> Lease {
        let lease = Lease::whole(Arc::clone(&self.region));
        let part = lease.slice(0..self.moved.bytes);
        part.expect("the agent passed memory for all bytes")
    }

    /// A copy of its bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        to_vec(&self.lease())
    }
}
