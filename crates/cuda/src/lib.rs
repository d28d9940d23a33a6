//! CUDA kernels of transformers for NVIDIA GPUs from Ampere on: vision encoder, prefill, and greedy decoding with
//! speculation in a single launch.
//!
//! - [`Gpu`] is an open device and a stream, which runs its work in order. [`Memory`] is on the device, [`Pinned`] and
//!   [`MappedWords`] are memory of the host that the device reads or writes.
//! - [`Kernels`] are the kernels for one [`DType`], as functions that check their arguments: [`Kernels::gemm`] with an
//!   [`Epilogue`], [`Kernels::norm`], [`Kernels::attention`], [`Kernels::patchify`], [`Kernels::embed`].
//! - [`Kernels::decode`] generates tokens of several [`Sequence`]s as a [`DecodePlan`] says, and verifies their draft
//!   tokens. Tokens appear in [`MappedWords`] as they are generated.
//!
//! nvcc compiles the kernels ahead of time, in `build.rs`. The binary needs only the NVIDIA driver, which is opened at run
//! time, not the CUDA toolkit. `tools/cuda/emulate.sh` runs the kernels on a CPU, for tests.
#![allow(
    unsafe_code,
    reason = "kernels take addresses; the operations check what they are given"
)]

#[cfg(feature = "linked-elsewhere")]
compile_error!(
    "the features `cuda` and `candle-cuda` exclude each other: our kernels open the driver at run time, candle links with \
     CUDA, and both share one cudarc. Build with one of them"
);

mod arguments;
mod driver;
mod error;
mod memory;
mod operations;
mod parameters;
mod plan;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard},
};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg, result,
    sys::{self, CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUresult},
};

pub use arguments::{MAX_ROWS, PromptRow, Sequence};
pub use driver::is_available;
pub use error::{Error, Result};
pub use memory::{Event, Graph, MappedWords, Memory, Pinned};
pub use operations::Kernels;
pub use parameters::{
    Attention, DType, Epilogue, Images, Norm, PositionEmbedding, PromptRows, QkvShape, RopeStoreKv,
    RowGather, Weights,
};
pub use plan::{DecodeInput, DecodePlan, DecoderShape};

/// Machine code for several generations of GPUs, and PTX for later ones.
static CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Magic number of a fatbin.
const FATBIN: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();

/// CUDA version of the compiler, as the driver encodes it: 13000 is 13.0.
const TOOLKIT: &str = env!("VLMNARRATE_CUDA_TOOLKIT");

fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// 13000 as 13.0.
fn format_version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// CUDA version of the compiler, as 13.0.
fn toolkit_version() -> String {
    TOOLKIT
        .parse()
        .map_or_else(|_| TOOLKIT.into(), format_version)
}

/// Name and size of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// Name, as the driver has it.
    pub name: String,
    /// Bytes of device memory.
    pub memory: u64,
}

/// An open GPU, and a stream for the work of one model.
pub struct Gpu {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    /// Name and size.
    pub info: GpuInfo,
    /// Streaming multiprocessors.
    processors: u32,
    /// Most bytes of shared memory of a block.
    shared: usize,
    /// Held during a capture, which would record allocations of other threads.
    capture_lock: CaptureLock,
}

type CaptureLock = Arc<Mutex<()>>;

fn lock(lock: &CaptureLock) -> MutexGuard<'_, ()> {
    lock.lock().unwrap_or_else(|e| e.into_inner())
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu").field(&self.info).finish()
    }
}

impl Gpu {
    /// Opens the first GPU that `CUDA_VISIBLE_DEVICES` leaves.
    ///
    /// # Errors
    ///
    /// Any but [`Error::OutOfMemory`].
    pub fn open() -> Result<Self> {
        driver::check()?;
        let context = CudaContext::new(0).map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::Failed("no memory to open it".into()),
            _ => Error::NoDevice {
                reason: describe(error),
            },
        })?;
        let info = GpuInfo {
            name: context.name()?,
            memory: context.total_mem()? as u64,
        };
        // SAFETY: all work goes through one stream, in order, so no other stream needs to be waited for.
        unsafe { context.disable_event_tracking() };
        let code = cudarc::nvrtc::Ptx::from_binary(CODE.to_vec());
        let module = context.load_module(code).map_err(|error| match error.0 {
            // Left by the stand-in for nvcc.
            _ if !CODE.starts_with(&FATBIN) => Error::NoKernels,
            CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE => Error::OldDriver {
                driver: format!("one that says: {}", describe(error)),
                toolkit: toolkit_version(),
            },
            _ => error.into(),
        })?;
        let attribute = |attribute| context.attribute(attribute);
        Ok(Self {
            capture_lock: CaptureLock::default(),
            stream: context.new_stream()?,
            module,
            info,
            processors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                as u32,
            shared: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )? as usize,
        })
    }

    fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    /// A kernel that may use `shared` bytes of dynamic shared memory.
    fn function(&self, name: &str, shared: usize) -> Result<CudaFunction> {
        let function = self.module.load_function(name)?;
        function.set_attribute(
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            shared as i32,
        )?;
        Ok(function)
    }

    /// Allocates uninitialised device memory.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], or [`Error::Failed`].
    pub fn memory(&self, bytes: usize) -> Result<Memory> {
        // Kernels load whole vectors, also at the end.
        let bytes = bytes.next_multiple_of(16).max(16);
        let _guard = lock(&self.capture_lock);
        // SAFETY: bytes may have any value.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) };
        let slice = slice.map_err(|error| self.out_of_memory(error, bytes))?;
        let address = {
            use cudarc::driver::DevicePtr;
            slice.device_ptr(&self.stream).0
        };
        Ok(Memory {
            address,
            slice: Some(slice),
            len: bytes,
            capture_lock: self.capture_lock.clone(),
        })
    }

    fn out_of_memory(&self, error: DriverError, bytes: usize) -> Error {
        match (error.0, self.context().mem_get_info()) {
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok(memory)) => {
                Error::out_of_memory(bytes as u64, memory)
            }
            _ => error.into(),
        }
    }

    /// Checks that `bytes` of device memory are free.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], or [`Error::Failed`].
    pub fn check_free_memory(&self, bytes: u64) -> Result<()> {
        let memory = self.context().mem_get_info()?;
        match bytes <= memory.0 as u64 {
            true => Ok(()),
            false => Err(Error::out_of_memory(bytes, memory)),
        }
    }

    /// Allocates device memory and copies values to it.
    pub fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> Result<Memory> {
        let mut memory = self.memory(size_of_val(values))?;
        self.write(values, &mut memory, 0)?;
        Ok(memory)
    }

    /// Copies values to device memory, from byte `at` on. The values may be dropped afterwards: the driver has staged a
    /// copy of memory that is not pinned.
    pub fn write<T: bytemuck::Pod>(&self, values: &[T], to: &mut Memory, at: usize) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let to = to.part(at, bytes.len());
        let _guard = lock(&self.capture_lock);
        self.context().bind_to_thread()?;
        // SAFETY: `to` lies inside its memory.
        Ok(unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }?)
    }

    /// Waits for all earlier work and copies `len` values from device memory, from byte `at` on.
    pub fn read<T: bytemuck::Pod>(&self, from: &Memory, at: usize, len: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); len];
        let bytes = bytemuck::cast_slice_mut::<T, u8>(&mut values);
        let from = from.part(at, bytes.len());
        self.context().bind_to_thread()?;
        // SAFETY: `from` lies inside its memory, and `values` is not used before the copy is complete.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }?;
        self.stream.synchronize()?;
        Ok(values)
    }

    /// Copies within device memory, from byte `at` of `from` to byte `to_at` of `to`.
    pub fn copy(
        &self,
        from: &Memory,
        at: usize,
        to: &Memory,
        to_at: usize,
        bytes: usize,
    ) -> Result<()> {
        let (from, to) = (from.part(at, bytes), to.part(to_at, bytes));
        // SAFETY: both parts lie inside their memory, and the stream works in order.
        Ok(unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }?)
    }

    /// Copies from pinned memory to device memory, asynchronously. The pinned memory must not change before later work of
    /// the stream is done.
    pub fn copy_pinned(
        &self,
        from: &Pinned,
        at: usize,
        to: &mut Memory,
        to_at: usize,
        bytes: usize,
    ) -> Result<()> {
        let to = to.part(to_at, bytes);
        let from = &from.as_slice()[at..at + bytes];
        // SAFETY: `to` lies inside its memory.
        Ok(unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) }?)
    }

    /// Sets device memory to zeros.
    pub fn clear(&self, memory: &mut Memory) -> Result<()> {
        self.context().bind_to_thread()?;
        let (address, len) = (memory.part(0, memory.len), memory.len);
        // SAFETY: all of the memory, and no more.
        Ok(unsafe { result::memset_d8_async(address, 0, len, self.stream.cu_stream()) }?)
    }

    /// An event of this device.
    pub fn event(&self) -> Result<Event> {
        Ok(Event(
            self.context()
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?,
        ))
    }

    /// Records an event in the stream.
    pub fn record(&self, event: &Event) -> Result<()> {
        Ok(event.0.record(&self.stream)?)
    }

    /// Allocates mapped host memory of `len` words, all zero.
    pub fn mapped_words(&self, len: usize) -> Result<MappedWords> {
        self.context().bind_to_thread()?;
        // SAFETY: set to zero below, before anybody reads it.
        let address = unsafe {
            let address =
                result::malloc_host(len * size_of::<i32>(), sys::CU_MEMHOSTALLOC_DEVICEMAP)?;
            std::ptr::write_bytes(address.cast::<i32>(), 0, len);
            address.cast()
        };
        Ok(MappedWords {
            address,
            len,
            context: self.context().clone(),
        })
    }

    /// Allocates pinned host memory.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        Ok(Pinned(
            self.mapped_words(bytes.div_ceil(size_of::<i32>()).max(1))?,
        ))
    }

    /// Captures the work that `work` submits, without running it, as a graph to be launched.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let _guard = lock(&self.capture_lock);
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let worked = catch_unwind(AssertUnwindSafe(work));
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        match worked {
            Ok(worked) => worked?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        graph?
            .map(Graph)
            .ok_or_else(|| Error::Failed("an empty graph".into()))
    }

    fn launch<A: DeviceRepr>(
        &self,
        function: &CudaFunction,
        shape: Shape,
        arguments: &A,
    ) -> Result<()> {
        let config = shape.config();
        // SAFETY: every kernel takes one struct, which is `arguments`. Its addresses were checked when it was made.
        unsafe {
            let mut launch = self.stream.launch_builder(function);
            launch.arg(arguments);
            match shape.cooperative {
                true => launch.launch_cooperative(config)?,
                false => launch.launch(config)?,
            };
        }
        Ok(())
    }
}

/// Launch configuration.
#[derive(Debug, Clone, Copy)]
struct Shape {
    blocks: (usize, usize, usize),
    threads: usize,
    shared: usize,
    cooperative: bool,
}

impl Shape {
    fn config(self) -> LaunchConfig {
        let (x, y, z) = self.blocks;
        LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: (self.threads as u32, 1, 1),
            shared_mem_bytes: self.shared as u32,
        }
    }
}
