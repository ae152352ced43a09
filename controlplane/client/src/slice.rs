//! Parts of a tensor: ranges and strided slices, and the bytes they are.
//!
//! Made by programs, checked by the agent that has the tensor. The invariant
//! that [`check_runs`] guards: *a list of runs names bytes inside the tensor,
//! and in total no more than the tensor has*, so that a short request cannot
//! ask for a long answer.

use serde::{Deserialize, Serialize};

use crate::tensor::TensorInfo;

/// Most runs in one request: a message of a few hundred kilobytes.
pub const RUNS_MAX: usize = 8192;

/// Most pieces that the runs of one read or write may have: each is a transfer.
pub const PIECES_MAX: u64 = 65536;

/// Bytes at regular distances: `count` pieces of `len` bytes each, the first
/// at `offset`, every next one `stride` bytes after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First byte of the first piece.
    pub offset: u64,
    /// Bytes of each piece.
    pub len: u64,
    /// From the start of one piece to the start of the next; at least `len`.
    pub stride: u64,
    /// How many pieces.
    pub count: u64,
}

/// Which indices of one dimension: `start`, `start + step`, … below `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub start: u64,
    /// One past the last that may be taken.
    pub end: u64,
    /// From one to the next.
    pub step: u64,
}

/// Why a part of a tensor cannot be named.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SliceError {
    /// As many spans as the tensor has dimensions are needed.
    #[error("{spans} spans for a tensor of {dimensions} dimensions")]
    Dimensions {
        /// How many were given.
        spans: usize,
        /// How many there should be.
        dimensions: usize,
    },
    /// A span lies outside its dimension, or has step zero.
    #[error("{span:?} does not lie in dimension {dimension} of {len} elements")]
    Span {
        /// Which dimension.
        dimension: usize,
        /// Its length.
        len: u64,
        /// The span.
        span: Span,
    },
    /// Elements of less than a byte.
    #[error("elements of type {0} are parts of bytes: fetch the whole tensor")]
    PartsOfBytes(String),
    /// Too many pieces that are not at regular distances.
    #[error("the part falls into more than {RUNS_MAX} runs: fetch it in several parts")]
    TooMany,
    /// A run that lies outside, overlaps itself, or bytes named twice.
    #[error("the runs do not name bytes of a tensor of {len} bytes, each at most once")]
    Outside {
        /// Length of the tensor.
        len: u64,
    },
    /// More pieces than one request may have.
    #[error("the ranges have more than {PIECES_MAX} pieces: use several batches")]
    TooManyPieces,
    /// Two ranges that name the same bytes to be written.
    #[error("two ranges write the same bytes: which would stay is not defined")]
    Overlap,
}

impl Run {
    /// The bytes `offset..offset + len`.
    pub fn bytes(offset: u64, len: u64) -> Self {
        Self {
            offset,
            len,
            stride: len,
            count: 1,
        }
    }

    /// All bytes of it together; `None` if that does not fit.
    pub fn total(&self) -> Option<u64> {
        self.len.checked_mul(self.count)
    }

    /// Where each piece begins.
    pub fn pieces(&self) -> impl Iterator<Item = u64> + use<> {
        let Self {
            offset,
            stride,
            count,
            ..
        } = *self;
        (0..count).map(move |index| offset + index * stride)
    }

    /// Whether all pieces lie within `len` bytes, and none on another.
    pub fn is_inside(&self, len: u64) -> bool {
        let Some(last) = self.count.checked_sub(1) else {
            return false;
        };
        let end = last
            .checked_mul(self.stride)
            .and_then(|at| at.checked_add(self.offset))
            .and_then(|at| at.checked_add(self.len));
        end.is_some_and(|end| end <= len) && (last == 0 || self.stride >= self.len)
    }
}

impl From<std::ops::Range<u64>> for Span {
    fn from(range: std::ops::Range<u64>) -> Self {
        Self {
            start: range.start,
            end: range.end,
            step: 1,
        }
    }
}

impl Span {
    /// Every `step`th index of `range`.
    pub fn stepped(range: std::ops::Range<u64>, step: u64) -> Self {
        Self {
            step,
            ..range.into()
        }
    }

    fn count(&self) -> u64 {
        (self.end - self.start).div_ceil(self.step)
    }
}

/// Checks runs against a tensor of `len` bytes; returns how many they are.
pub fn check_runs(runs: &[Run], len: u64) -> Result<u64, SliceError> {
    if runs.len() > RUNS_MAX {
        return Err(SliceError::TooMany);
    }
    let outside = SliceError::Outside { len };
    let mut total = 0u64;
    for run in runs {
        let bytes = run.total().filter(|_| run.is_inside(len));
        total = bytes
            .and_then(|bytes| total.checked_add(bytes))
            .filter(|total| *total <= len)
            .ok_or(outside.clone())?;
    }
    Ok(total)
}

/// Checks how many runs and pieces a read or write has; returns its pieces.
pub fn check_pieces<'a>(runs: impl ExactSizeIterator<Item = &'a Run>) -> Result<u64, SliceError> {
    if runs.len() > RUNS_MAX {
        return Err(SliceError::TooMany);
    }
    let pieces = runs.fold(0u64, |sum, run| sum.saturating_add(run.count));
    if pieces > PIECES_MAX {
        return Err(SliceError::TooManyPieces);
    }
    Ok(pieces)
}

/// Whether any two of these ranges, each a place and its first byte and length,
/// have a byte in common.
pub fn overlap<P: Ord + Copy>(ranges: impl Iterator<Item = (P, u64, u64)>) -> bool {
    let mut sorted: Vec<_> = ranges.filter(|(_, _, len)| *len > 0).collect();
    sorted.sort_unstable();
    let is_over = |pair: &[(P, u64, u64)]| {
        let [(place, offset, len), (next_place, next, _)] = pair else {
            return false;
        };
        place == next_place && offset.saturating_add(*len) > *next
    };
    sorted.windows(2).any(is_over)
}

/// The bytes that `spans`, one a dimension, select of a tensor in row-major
/// order, and the shape they have.
pub fn runs_of(info: &TensorInfo, spans: &[Span]) -> Result<(Vec<Run>, Vec<u64>), SliceError> {
    let dimensions = info.shape.len();
    if spans.len() != dimensions {
        let spans = spans.len();
        return Err(SliceError::Dimensions { spans, dimensions });
    }
    for (dimension, (span, len)) in spans.iter().zip(&info.shape).enumerate() {
        if span.step == 0 || span.start > span.end || span.end > *len {
            let (len, span) = (*len, *span);
            return Err(SliceError::Span {
                dimension,
                len,
                span,
            });
        }
    }
    let bits = info.dtype.bitsize() as u64;
    if !bits.is_multiple_of(8) {
        return Err(SliceError::PartsOfBytes(info.dtype.to_string()));
    }
    let shape: Vec<u64> = spans.iter().map(Span::count).collect();
    if shape.contains(&0) {
        return Ok((Vec::new(), shape));
    }
    // From the innermost dimension out: first what is in one piece, then what
    // is at regular distances, then everything else, piece by piece.
    let mut run = Run::bytes(0, bits / 8);
    let mut starts = vec![0];
    let mut stride = bits / 8;
    for (span, len) in spans.iter().zip(&info.shape).rev() {
        let distance = stride * span.step;
        let count = span.count();
        let is_row = run.count == 1 && starts.len() == 1;
        if is_row && run.len == stride && (span.step == 1 || count == 1) {
            run.len *= count;
        } else if is_row && starts.len() == 1 {
            (run.stride, run.count) = (distance, count);
        } else if count > 1 {
            starts = repeat(&starts, count, distance)?;
        }
        run.offset += span.start * stride;
        stride *= len;
    }
    if run.count == 1 {
        run.stride = run.len;
    }
    let at = |start: &u64| Run {
        offset: run.offset + start,
        ..run
    };
    Ok((starts.iter().map(at).collect(), shape))
}

/// All starts, `count` times over, `distance` apart.
fn repeat(starts: &[u64], count: u64, distance: u64) -> Result<Vec<u64>, SliceError> {
    if (starts.len() as u64).saturating_mul(count) > RUNS_MAX as u64 {
        return Err(SliceError::TooMany);
    }
    let moved = |index| starts.iter().map(move |start| start + index * distance);
    Ok((0..count).flat_map(moved).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;
    use proptest::prelude::*;

    fn info(shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: "t".into(),
            dtype: Dtype::U16,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn whole_rows_are_one_run_and_a_column_another() {
        let info = info(&[4, 10]);
        let rows = runs_of(&info, &[(1..3).into(), (0..10).into()]).unwrap();
        assert_eq!(rows, (vec![Run::bytes(20, 40)], vec![2, 10]));
        let column = runs_of(&info, &[(0..4).into(), (3..5).into()]).unwrap();
        let expected = Run {
            offset: 6,
            len: 4,
            stride: 20,
            count: 4,
        };
        assert_eq!(column, (vec![expected], vec![4, 2]));
        let none = runs_of(&info, &[(2..2).into(), (0..10).into()]).unwrap();
        assert_eq!(none, (vec![], vec![0, 10]));
    }

    #[test]
    fn spans_outside_are_refused() {
        let info = info(&[4, 10]);
        let refused = |spans: &[Span]| runs_of(&info, spans).unwrap_err();
        assert!(matches!(
            refused(&[(0..4).into()]),
            SliceError::Dimensions { spans: 1, .. }
        ));
        assert!(matches!(
            refused(&[(0..5).into(), (0..1).into()]),
            SliceError::Span { dimension: 0, .. }
        ));
        assert!(matches!(
            refused(&[(0..4).into(), Span::stepped(0..9, 0)]),
            SliceError::Span { dimension: 1, .. }
        ));
        let half = TensorInfo {
            dtype: Dtype::F4,
            ..info.clone()
        };
        assert!(runs_of(&half, &[(0..4).into(), (0..10).into()]).is_err());
    }

    #[test]
    fn runs_that_ask_for_too_much_are_refused() {
        let inside = Run {
            offset: 0,
            len: 10,
            stride: 30,
            count: 4,
        };
        assert_eq!(check_runs(&[inside], 100), Ok(40));
        let bad = [
            Run {
                offset: 1,
                ..inside
            },
            Run {
                stride: 9,
                ..inside
            },
            Run { count: 0, ..inside },
            Run {
                count: u64::MAX,
                ..inside
            },
            Run {
                stride: u64::MAX,
                ..inside
            },
            Run {
                len: u64::MAX,
                ..inside
            },
        ];
        for run in bad {
            assert!(check_runs(&[run], 100).is_err(), "{run:?}");
        }
        assert!(check_runs(&[Run::bytes(0, 60); 2], 100).is_err(), "twice");
        assert!(check_runs(&vec![Run::bytes(0, 0); RUNS_MAX + 1], 100).is_err());
    }

    /// What the runs select of the bytes.
    fn gather(runs: &[Run], bytes: &[u8]) -> Vec<u8> {
        let piece = |run: &Run| {
            let len = run.len as usize;
            run.pieces()
                .flat_map(move |at| bytes[at as usize..at as usize + len].iter().copied())
                .collect::<Vec<u8>>()
        };
        runs.iter().flat_map(piece).collect()
    }

    proptest! {
        #[test]
        fn runs_select_what_indexing_would(
            dims in proptest::collection::vec((1u64..5, any::<[u8; 3]>()), 0..5),
        ) {
            let shape: Vec<u64> = dims.iter().map(|(len, _)| *len).collect();
            let spans: Vec<Span> = dims.iter().map(|(len, [a, b, step])| {
                let (a, b) = (u64::from(*a) % (len + 1), u64::from(*b) % (len + 1));
                Span::stepped(a.min(b)..a.max(b), u64::from(step % 3) + 1)
            }).collect();
            let info = info(&shape);
            let elements: u64 = shape.iter().product();
            let bytes: Vec<u8> = (0..elements as u16).flat_map(u16::to_le_bytes).collect();
            let (runs, selected) = runs_of(&info, &spans).unwrap();
            let expected: Vec<u8> = (0..elements).filter(|index| {
                let mut rest = *index;
                shape.iter().zip(&spans).rev().all(|(len, span)| {
                    let at = rest % len;
                    rest /= len;
                    at >= span.start && at < span.end && (at - span.start).is_multiple_of(span.step)
                })
            }).flat_map(|index| (index as u16).to_le_bytes()).collect();
            prop_assert_eq!(gather(&runs, &bytes), expected);
            prop_assert_eq!(selected.iter().product::<u64>() * 2, check_runs(&runs, bytes.len() as u64).unwrap());
        }
    }
}
