//! The GPU of NVIDIA: its driver, opened when somebody asks for it, and the kernels beside this file.
//!
//! The kernels are compiled ahead, by `build.rs`, into the library: what runs them needs no more than the driver. All
//! work of a model goes through one stream, in the order that it is asked for.
#![allow(
    unsafe_code,
    reason = "kernels take addresses; the operations check what they are given"
)]

mod arguments;
mod driver;
mod operations;
mod plan;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI32, Ordering},
    },
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DeviceRepr,
    DriverError, LaunchConfig, PushKernelArg, result,
    sys::{self, CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUresult},
};

pub use arguments::{MOST_ROWS, Row, Sequence};
pub use driver::is_there;
pub use operations::{
    Attended, Gather, Heads, Kernels, Norm, Number, Pictures, Places, Rows, Then, Turned, Weights,
};
pub use plan::{Decode, Plan, Stack};

/// Machine code for several generations of cards, and for those to come a form that the driver compiles.
static CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// How files of that kind begin.
const FATBIN: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();

/// Of the compiler, as the driver counts: 13000 is 13.0.
const TOOLKIT: &str = env!("VLMNARRATE_CUDA_TOOLKIT");

/// What went wrong, with the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("there is no NVIDIA driver (libcuda.so.1); install it, or take device=cpu")]
    NoDriver,
    #[error(
        "the NVIDIA driver is for CUDA {driver} and this build for {toolkit}; update the driver, build with an older \
         CUDA toolkit, or take device=cpu"
    )]
    OldDriver { driver: String, toolkit: String },
    #[error(
        "the NVIDIA driver finds no GPU ({reason}); see what nvidia-smi says, or take device=cpu"
    )]
    NoDevice { reason: String },
    #[error(
        "the GPU {name} is older than this build can use (compute capability {found}, 8.0 is needed); take device=cpu"
    )]
    OldDevice { name: String, found: String },
    #[error(
        "this build was made without a CUDA compiler and has no kernels; build it with nvcc, or take device=cpu"
    )]
    NoKernels,
    #[error(
        "the GPU has no memory for {needed} MB more, {free} of its {total} MB are free; close what else uses it, take \
         a smaller model, or device=cpu"
    )]
    Memory { needed: u64, free: u64, total: u64 },
    #[error(
        "the GPU failed: {0}; what nvidia-smi and the kernel's log say may tell why. A new process may use it again"
    )]
    Failed(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// So many bytes are not among the free of all.
    fn memory(bytes: u64, (free, total): (usize, usize)) -> Self {
        Self::Memory {
            needed: bytes.div_ceil(1_000_000),
            free: free as u64 / 1_000_000,
            total: total as u64 / 1_000_000,
        }
    }
}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        Self::Failed(told(error))
    }
}

fn told(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// `13000` as people write it.
fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// Of the compiler, as people write it.
fn toolkit() -> String {
    TOOLKIT.parse().map_or_else(|_| TOOLKIT.into(), version)
}

/// What is known of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub name: String,
    /// Bytes in all.
    pub memory: u64,
}

/// An open GPU, and a stream for one model's work.
pub struct Gpu {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    pub info: Info,
    /// Streaming multiprocessors.
    processors: u32,
    /// Bytes of shared memory that a block can have.
    shared: usize,
    /// Held while work is captured, when memory that somebody else asks for would be taken for a part of it.
    gate: Gate,
}

type Gate = Arc<Mutex<()>>;

fn pass(gate: &Gate) -> MutexGuard<'_, ()> {
    gate.lock().unwrap_or_else(|e| e.into_inner())
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu").field(&self.info).finish()
    }
}

impl Gpu {
    /// The first GPU; which one that is `CUDA_VISIBLE_DEVICES` tells.
    pub fn open() -> Result<Self> {
        driver::look()?;
        let context = CudaContext::new(0).map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::Failed("no memory to open it".into()),
            _ => Error::NoDevice {
                reason: told(error),
            },
        })?;
        let info = Info {
            name: context.name()?,
            memory: context.total_mem()? as u64,
        };
        // SAFETY: all of a model's work goes through one stream, in order: there is nothing to keep apart.
        unsafe { context.disable_event_tracking() };
        let code = cudarc::nvrtc::Ptx::from_binary(CODE.to_vec());
        let module = context.load_module(code).map_err(|error| match error.0 {
            // What stands in for the compiler where there is none leaves this behind.
            _ if !CODE.starts_with(&FATBIN) => Error::NoKernels,
            CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE => Error::OldDriver {
                driver: format!("one that says: {}", told(error)),
                toolkit: toolkit(),
            },
            _ => error.into(),
        })?;
        let attribute = |attribute| context.attribute(attribute);
        Ok(Self {
            gate: Gate::default(),
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

    /// A kernel, allowed to use so much shared memory.
    fn function(&self, name: &str, shared: usize) -> Result<CudaFunction> {
        let function = self.module.load_function(name)?;
        function.set_attribute(
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            shared as i32,
        )?;
        Ok(function)
    }

    /// So many bytes, whatever they are.
    pub fn memory(&self, bytes: usize) -> Result<Memory> {
        // Behind the end a kernel may look at a whole vector.
        let bytes = bytes.next_multiple_of(16).max(16);
        let _gate = pass(&self.gate);
        // SAFETY: bytes of any value are bytes.
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
            gate: self.gate.clone(),
        })
    }

    fn out_of_memory(&self, error: DriverError, bytes: usize) -> Error {
        match (error.0, self.context().mem_get_info()) {
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok(memory)) => Error::memory(bytes as u64, memory),
            _ => error.into(),
        }
    }

    /// Whether so many bytes can be had, as far as the driver tells.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        let memory = self.context().mem_get_info()?;
        match bytes <= memory.0 as u64 {
            true => Ok(()),
            false => Err(Error::memory(bytes, memory)),
        }
    }

    pub fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> Result<Memory> {
        let mut memory = self.memory(size_of_val(values))?;
        self.write(values, &mut memory, 0)?;
        Ok(memory)
    }

    /// Copies to the device, behind so many bytes. Of memory that isn't pinned the driver has a copy when this returns.
    pub fn write<T: bytemuck::Pod>(&self, values: &[T], to: &mut Memory, at: usize) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let to = to.part(at, bytes.len());
        let _gate = pass(&self.gate);
        self.context().bind_to_thread()?;
        // SAFETY: `to` lies inside its memory.
        Ok(unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }?)
    }

    /// Copies from the device when all work before is done.
    pub fn read<T: bytemuck::Pod>(&self, from: &Memory, at: usize, len: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); len];
        let bytes = bytemuck::cast_slice_mut::<T, u8>(&mut values);
        let from = from.part(at, bytes.len());
        self.context().bind_to_thread()?;
        // SAFETY: `from` lies inside its memory, and nobody has `values` before all is there.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }?;
        self.stream.synchronize()?;
        Ok(values)
    }

    pub fn copy(
        &self,
        from: &Memory,
        at: usize,
        to: &Memory,
        to_at: usize,
        bytes: usize,
    ) -> Result<()> {
        let (from, to) = (from.part(at, bytes), to.part(to_at, bytes));
        // SAFETY: both parts lie inside their memory, and the stream does one thing after the other.
        Ok(unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }?)
    }

    /// Copies from pinned memory to the device, some time before what is asked for next. Until then it must stay as
    /// it is.
    pub fn send(
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

    pub fn clear(&self, memory: &mut Memory) -> Result<()> {
        self.context().bind_to_thread()?;
        let (address, len) = (memory.part(0, memory.len), memory.len);
        // SAFETY: all of the memory, and no more.
        Ok(unsafe { result::memset_d8_async(address, 0, len, self.stream.cu_stream()) }?)
    }

    pub fn event(&self) -> Result<Event> {
        Ok(Event(
            self.context()
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?,
        ))
    }

    pub fn record(&self, event: &Event) -> Result<()> {
        Ok(event.0.record(&self.stream)?)
    }

    /// Memory of the host that the device can write to while it works.
    pub fn words(&self, len: usize) -> Result<Words> {
        self.context().bind_to_thread()?;
        // SAFETY: set to zero below, before anybody reads it.
        let address = unsafe {
            let address =
                result::malloc_host(len * size_of::<i32>(), sys::CU_MEMHOSTALLOC_DEVICEMAP)?;
            std::ptr::write_bytes(address.cast::<i32>(), 0, len);
            address.cast()
        };
        Ok(Words {
            address,
            len,
            context: self.context().clone(),
        })
    }

    /// Memory of the host that copies to the device start from at once.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        Ok(Pinned(self.words(bytes.div_ceil(size_of::<i32>()).max(1))?))
    }

    /// What `work` asks for, to be asked for again at once. Nothing of it runs now.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let _gate = pass(&self.gate);
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
        // SAFETY: `arguments` is the one struct that each kernel takes; what it points to was checked by whoever made it.
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

/// How many blocks of how many threads, and their shared memory.
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

/// Memory of the device.
pub struct Memory {
    /// Until it is dropped.
    slice: Option<CudaSlice<u8>>,
    address: u64,
    len: usize,
    gate: Gate,
}

impl Memory {
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// Address of a part, which must lie inside.
    pub fn part(&self, at: usize, bytes: usize) -> u64 {
        assert!(
            at.checked_add(bytes).is_some_and(|end| end <= self.bytes()),
            "{at} + {bytes} of {} bytes",
            self.bytes()
        );
        self.address + at as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _gate = pass(&self.gate);
        if let Some(slice) = self.slice.take() {
            // It is freed in whatever thread that is.
            let _ = slice.context().bind_to_thread();
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({})", self.bytes())
    }
}

/// A moment in the stream.
pub struct Event(CudaEvent);

impl Event {
    pub fn has_passed(&self) -> Result<bool> {
        Ok(self.0.try_is_complete()?)
    }

    /// Time from this one to a later one; both have passed.
    pub fn until(&self, end: &Self) -> Result<std::time::Duration> {
        let ms = self.0.elapsed_ms(&end.0)?;
        Ok(std::time::Duration::from_secs_f32(ms.max(0.0) / 1e3))
    }
}

/// Work that can be asked for at once.
pub struct Graph(CudaGraph);

// SAFETY: it is used under the lock of the model's work, by one thread at a time.
unsafe impl Send for Graph {}

impl Graph {
    pub fn launch(&self) -> Result<()> {
        Ok(self.0.launch()?)
    }
}

/// Numbers that host and device both see.
pub struct Words {
    address: *mut AtomicI32,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: atomics, in memory that lives as long as this.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    pub fn len(&self) -> usize {
        self.len
    }

    fn all(&self) -> &[AtomicI32] {
        // SAFETY: allocated with this length, and set; atomics may be written to by others.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }

    pub fn get(&self, at: usize) -> i32 {
        self.all()[at].load(Ordering::Acquire)
    }

    pub fn set(&self, at: usize, value: i32) {
        self.all()[at].store(value, Ordering::Release);
    }

    /// Address for the device, which is the host's.
    pub fn part(&self, at: usize, len: usize) -> u64 {
        assert!(at + len <= self.len);
        self.address as u64 + (at * size_of::<i32>()) as u64
    }
}

/// Bytes that copies to the device start from.
#[derive(Debug)]
pub struct Pinned(Words);

impl Pinned {
    pub fn bytes(&self) -> usize {
        self.0.len() * size_of::<i32>()
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: set when it was made, and written to through `&mut self` alone.
        unsafe { std::slice::from_raw_parts(self.0.address.cast(), self.bytes()) }
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let len = self.bytes();
        // SAFETY: as above, and nobody else has it.
        let all = unsafe { std::slice::from_raw_parts_mut(self.0.address.cast::<u8>(), len) };
        all[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Words({})", self.len)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by malloc_host, and no work that knows of it is left.
            let _ = unsafe { result::free_host(self.address.cast()) };
        }
    }
}
