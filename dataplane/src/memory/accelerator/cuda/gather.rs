//! The one kernel of ours: many pieces copied in one operation.
//!
//! Its text is PTX, which the driver compiles for whatever device there is; no
//! toolkit takes part. Where the driver does not take it, pieces are copied one
//! by one. `ptxas` assembles it; it was never run on a device.

use std::ffi::{CString, c_uint, c_void};

use cudarc::driver::sys;

use super::Device;
use crate::memory::accelerator::AcceleratorError;

const PTX: &str = include_str!("gather.ptx");

/// As many as fit into the parameters of a launch, 4 KiB; the kernel's own number.
const PIECES: usize = 128;

/// Threads of a block.
const THREADS: c_uint = 256;

/// What a block moves before another one shares a piece with it: eight vectors
/// of 16 bytes for each thread.
const BLOCK_BYTES: u64 = 16 * 8 * THREADS as u64;

/// The most blocks that share a piece: enough to fill a device with one alone.
const BLOCKS_MAX: u64 = 256;

/// A piece, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Piece {
    from: u64,
    to: u64,
    len: u64,
}

const _: () = assert!(size_of::<[Piece; PIECES]>() == 3072);

/// The loaded kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
    /// Whether it can use addresses of pinned host memory.
    reaches_host: bool,
}

// SAFETY: modules and functions may be used on any thread; the context is made
// current around every call.
unsafe impl Send for Kernel {}
// SAFETY: as above; both pointers are only passed on.
unsafe impl Sync for Kernel {}

impl Piece {
    pub(super) fn new(from: u64, to: u64, len: u64) -> Self {
        Self { from, to, len }
    }
}

impl Device {
    /// The kernel, or why there is none. The context is current.
    pub(super) fn gather(&self) -> Result<&Kernel, &AcceleratorError> {
        let load = || {
            self.load().inspect_err(|error| {
                tracing::info!(%error, "pieces of device memory are copied one by one");
            })
        };
        self.gather.get_or_init(load).as_ref()
    }

    /// The kernel, if it can use pinned host memory too.
    pub(super) fn host_gather(&self) -> Option<&Kernel> {
        self.gather().ok().filter(|kernel| kernel.reaches_host)
    }

    fn load(&self) -> Result<Kernel, AcceleratorError> {
        let Some(kernels) = &self.library.kernels else {
            return Err(self.too_old("cuModuleLoadData"));
        };
        let text = CString::new(PTX).expect("no NUL in it");
        let mut module = std::ptr::null_mut();
        // SAFETY: `module` is written; the text ends with a NUL and is copied.
        self.check("cuModuleLoadData", unsafe {
            (kernels.cuModuleLoadData)(&mut module, text.as_ptr().cast())
        })?;
        let mut kernel = Kernel {
            module,
            function: std::ptr::null_mut(),
            reaches_host: false,
        };
        let name = c"genie_gather".as_ptr();
        // SAFETY: `function` is written; the module was just loaded.
        let code = unsafe { (kernels.cuModuleGetFunction)(&mut kernel.function, module, name) };
        if let Err(error) = self.check("cuModuleGetFunction", code) {
            self.unload(kernel);
            return Err(error);
        }
        use sys::CUdevice_attribute_enum as Attribute;
        let same = Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        kernel.reaches_host = self.attribute(same).is_ok_and(|same| same != 0);
        Ok(kernel)
    }

    /// Gives the kernel back.
    pub(super) fn unload(&self, kernel: Kernel) {
        let (Some(kernels), Ok(_current)) = (&self.library.kernels, self.enter()) else {
            // A dead context has given it back already.
            return;
        };
        // SAFETY: loaded once; every stream has waited for its launches.
        let code = unsafe { (kernels.cuModuleUnload)(kernel.module) };
        self.library.log(self.kind(), "cuModuleUnload", code);
    }

    /// Copies all pieces, a launch for each [`PIECES`] of them. The context is
    /// current; the caller keeps both ends until the stream is done with it.
    pub(super) fn launch(
        &self,
        kernel: &Kernel,
        pieces: &[Piece],
        stream: sys::CUstream,
    ) -> Result<(), AcceleratorError> {
        let Some(kernels) = &self.library.kernels else {
            return Err(self.too_old("cuLaunchKernel"));
        };
        for pieces in pieces.chunks(PIECES) {
            let mut table = [Piece::default(); PIECES];
            table[..pieces.len()].copy_from_slice(pieces);
            let longest = pieces.iter().map(|piece| piece.len).max().unwrap_or(0);
            let blocks = longest.div_ceil(BLOCK_BYTES).clamp(1, BLOCKS_MAX) as c_uint;
            let mut parameters = [(&raw mut table).cast::<c_void>()];
            // SAFETY: the parameter has the kernel's own length and is copied
            // by the call; each piece has `len` bytes at both ends, leased.
            let code = unsafe {
                (kernels.cuLaunchKernel)(
                    kernel.function,
                    pieces.len() as c_uint,
                    blocks,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream,
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            self.check("cuLaunchKernel", code)?;
        }
        Ok(())
    }

    /// Copies a piece without the kernel. The context is current.
    pub(super) fn copy_piece(
        &self,
        piece: &Piece,
        stream: sys::CUstream,
    ) -> Result<(), AcceleratorError> {
        let Piece { from, to, len } = *piece;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: `len` bytes are leased at both ends until the batch is done.
        let code =
            unsafe { (self.library.required.cuMemcpyDtoDAsync_v2)(to, from, len as usize, stream) };
        self.check("cuMemcpyDtoDAsync", code)
    }
}
