//! A stream: batches of asynchronous copies, each ended by an event.

use std::collections::VecDeque;
use std::ffi::c_uint;
use std::sync::Arc;

use cudarc::driver::sys;

use super::library::{Code, NOT_READY, SUCCESS};
use super::{Device, gather};
use crate::memory::accelerator::{
    AcceleratorError, CopyOp, DeviceLease, ForeignEvent, Piece, Stream, Way, is_scattered,
};

/// A CUDA stream, and what its copies hold.
pub(super) struct CudaStream {
    device: Arc<Device>,
    stream: sys::CUstream,
    /// Begun and not seen to be finished.
    batches: VecDeque<Batch>,
    /// Events that may be recorded again.
    idle_events: Vec<sys::CUevent>,
    begun: u64,
    completed: u64,
    /// Batches were under way when the stream failed in another call, which says
    /// nothing of them: told by the next [`Stream::completed`].
    failed: Option<AcceleratorError>,
}

struct Batch {
    number: u64,
    done: sys::CUevent,
    /// Memory that the device reads and writes.
    _held: Held,
}

/// What is kept until a batch is finished.
#[expect(dead_code, reason = "held, not looked at")]
enum Held {
    Copies(Vec<CopyOp>),
    Pieces(Vec<Piece>),
}

// SAFETY: stream and events may be used by any thread, by one at a time, which
// `&mut self` sees to; the context is made current in every call.
unsafe impl Send for CudaStream {}

impl CudaStream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, AcceleratorError> {
        let _current = device.enter()?;
        // Copies wait for nothing of the default stream's.
        let apart = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is written.
        device.check("cuStreamCreate", unsafe {
            (device.library.required.cuStreamCreate)(&mut stream, apart)
        })?;
        Ok(Self {
            device: Arc::clone(device),
            stream,
            batches: VecDeque::new(),
            idle_events: Vec::new(),
            begun: 0,
            completed: 0,
            failed: None,
        })
    }

    /// Checks that a lease is `len` bytes of this device's.
    fn check(&self, lease: &DeviceLease, len: usize) -> Result<(), AcceleratorError> {
        if len == lease.len() && lease.kind() == self.device.kind() {
            return Ok(());
        }
        Err(AcceleratorError::NotItsMemory {
            kind: self.device.kind(),
            address: lease.address(),
            len,
            what: format!("it is {} bytes of {}", lease.len(), lease.kind()),
        })
    }

    fn begin_batch(&self, batch: &[CopyOp]) -> Result<(), AcceleratorError> {
        let fits = |op: &CopyOp| self.check(&op.device, op.host.len());
        batch.iter().try_for_each(fits)?;
        if is_scattered(batch)
            && let Some(kernel) = self.device.host_gather()
        {
            let piece = |op: &CopyOp| {
                let (host, device) = (op.host.as_ptr() as u64, op.device.address().0);
                let len = op.host.len() as u64;
                match op.way {
                    Way::ToDevice => gather::Piece::new(host, device, len),
                    Way::ToHost => gather::Piece::new(device, host, len),
                }
            };
            let pieces: Vec<_> = batch.iter().map(piece).collect();
            return self.device.launch(kernel, &pieces, self.stream);
        }
        batch.iter().try_for_each(|op| self.begin(op))
    }

    fn begin_pieces(&self, pieces: &[Piece]) -> Result<(), AcceleratorError> {
        for piece in pieces {
            self.check(&piece.from, piece.from.len())?;
            self.check(&piece.to, piece.from.len())?;
        }
        let raw = |Piece { from, to }: &Piece| {
            gather::Piece::new(from.address().0, to.address().0, from.len() as u64)
        };
        let raw: Vec<_> = pieces.iter().map(raw).collect();
        // One alone is what copy engines are for.
        if raw.len() > 1
            && let Ok(kernel) = self.device.gather()
        {
            return self.device.launch(kernel, &raw, self.stream);
        }
        raw.iter()
            .try_for_each(|piece| self.device.copy_piece(piece, self.stream))
    }

    /// Ends a batch that was begun, or what was begun of it.
    fn end_batch(
        &mut self,
        begun: Result<(), AcceleratorError>,
        held: Held,
    ) -> Result<u64, AcceleratorError> {
        let done = begun.and_then(|()| self.record()).inspect_err(|_| {
            // Those before the one that failed are under way, and so are batches.
            let others = !self.batches.is_empty();
            let code = self.synchronize();
            let (library, kind) = (&self.device.library, self.device.kind());
            library.log(kind, "cuStreamSynchronize", code);
            let ended = self.device.check("cuStreamSynchronize", code);
            self.failed = ended.err().filter(|_| others).or(self.failed.take());
        })?;
        self.begun += 1;
        self.batches.push_back(Batch {
            number: self.begun,
            done,
            _held: held,
        });
        Ok(self.begun)
    }

    fn begin(&self, op: &CopyOp) -> Result<(), AcceleratorError> {
        let required = &self.device.library.required;
        let (host, len) = (op.host.as_ptr(), op.host.len());
        let device = op.device.address().0;
        if len == 0 {
            return Ok(());
        }
        let (call, code) = match op.way {
            // SAFETY: `len` bytes are leased at both ends; the batch keeps the
            // leases until its event is done or the stream was synchronised.
            Way::ToDevice => ("cuMemcpyHtoDAsync", unsafe {
                (required.cuMemcpyHtoDAsync_v2)(device, host.cast(), len, self.stream)
            }),
            // SAFETY: as above, the other way; imported memory that may only be
            // read is refused by the driver, which could not pin it for writing.
            Way::ToHost => ("cuMemcpyDtoHAsync", unsafe {
                (required.cuMemcpyDtoHAsync_v2)(host.cast(), device, len, self.stream)
            }),
        };
        self.device.check(call, code)
    }

    /// Records the end of everything begun so far.
    fn record(&mut self) -> Result<sys::CUevent, AcceleratorError> {
        let required = &self.device.library.required;
        let event = match self.idle_events.pop() {
            Some(event) => event,
            None => {
                // Without a time stamp it is cheaper to ask.
                let flag = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as c_uint;
                let mut event = std::ptr::null_mut();
                // SAFETY: `event` is written.
                let code = unsafe { (required.cuEventCreate)(&mut event, flag) };
                self.device.check("cuEventCreate", code)?;
                event
            }
        };
        // SAFETY: an event and a stream of this context.
        let code = unsafe { (required.cuEventRecord)(event, self.stream) };
        let recorded = self.device.check("cuEventRecord", code);
        if recorded.is_err() {
            self.idle_events.push(event);
        }
        recorded.map(|()| event)
    }

    /// Waits until the device does nothing more for this stream, however that ends.
    fn synchronize(&mut self) -> Code {
        // SAFETY: a stream of this context.
        let code = unsafe { (self.device.library.required.cuStreamSynchronize)(self.stream) };
        for batch in self.batches.drain(..) {
            self.idle_events.push(batch.done);
        }
        self.completed = self.begun;
        code
    }
}

impl Stream for CudaStream {
    fn copy(&mut self, batch: Vec<CopyOp>) -> Result<u64, AcceleratorError> {
        let device = Arc::clone(&self.device);
        let _current = device.enter()?;
        let begun = self.begin_batch(&batch);
        self.end_batch(begun, Held::Copies(batch))
    }

    fn gather(&mut self, pieces: Vec<Piece>) -> Result<u64, AcceleratorError> {
        let device = Arc::clone(&self.device);
        let _current = device.enter()?;
        let begun = self.begin_pieces(&pieces);
        self.end_batch(begun, Held::Pieces(pieces))
    }

    fn completed(&mut self) -> Result<u64, AcceleratorError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.batches.is_empty() {
            return Ok(self.completed);
        }
        let device = Arc::clone(&self.device);
        let _current = device.enter()?;
        while let Some(batch) = self.batches.front() {
            // SAFETY: an event of this context, recorded in `copy`.
            match unsafe { (device.library.required.cuEventQuery)(batch.done) } {
                SUCCESS => {
                    self.completed = batch.number;
                    self.idle_events.push(batch.done);
                    self.batches.pop_front();
                }
                NOT_READY => break,
                code => {
                    self.synchronize();
                    device.check("cuEventQuery", code)?;
                }
            }
        }
        Ok(self.completed)
    }

    fn wait_for(&mut self, event: ForeignEvent) -> Result<(), AcceleratorError> {
        let _current = self.device.enter()?;
        let event = event.0 as usize as sys::CUevent;
        // SAFETY: whoever made it a `ForeignEvent` promised that it is one.
        self.device.check("cuStreamWaitEvent", unsafe {
            (self.device.library.required.cuStreamWaitEvent)(self.stream, event, 0)
        })
    }

    fn signal(&mut self, event: ForeignEvent) -> Result<(), AcceleratorError> {
        let _current = self.device.enter()?;
        let event = event.0 as usize as sys::CUevent;
        // SAFETY: whoever made it a `ForeignEvent` promised that it is one.
        self.device.check("cuEventRecord", unsafe {
            (self.device.library.required.cuEventRecord)(event, self.stream)
        })
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let device = Arc::clone(&self.device);
        let Ok(_current) = device.enter() else {
            // A dead context does nothing more with the memory.
            return;
        };
        let log = |call, code| device.library.log(device.kind(), call, code);
        log("cuStreamSynchronize", self.synchronize());
        let required = &device.library.required;
        for event in self.idle_events.drain(..) {
            // SAFETY: made in `record`; nothing waits for it.
            log("cuEventDestroy", unsafe {
                (required.cuEventDestroy_v2)(event)
            });
        }
        // SAFETY: made in `new`, and idle.
        log("cuStreamDestroy", unsafe {
            (required.cuStreamDestroy_v2)(self.stream)
        });
    }
}
