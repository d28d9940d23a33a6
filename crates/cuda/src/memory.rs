//! Memory of the device, memory of the host that the device sees, events and graphs.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
};

use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaSlice, result};

use super::{CaptureLock, Result, lock};

/// Device memory, freed when dropped.
pub struct Memory {
    /// `None` only while being dropped.
    pub(super) slice: Option<CudaSlice<u8>>,
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) capture_lock: CaptureLock,
}

impl Memory {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// Device address of `bytes` bytes from byte `at` on.
    ///
    /// # Panics
    ///
    /// If the part does not lie inside the memory.
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
        let _guard = lock(&self.capture_lock);
        if let Some(slice) = self.slice.take() {
            // Any thread may drop it.
            let _ = slice.context().bind_to_thread();
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({})", self.bytes())
    }
}

/// An event in the stream.
pub struct Event(pub(super) CudaEvent);

impl Event {
    /// Whether the stream has reached the event.
    pub fn is_complete(&self) -> Result<bool> {
        Ok(self.0.try_is_complete()?)
    }

    /// Time from this event to a later one. Both must be complete.
    pub fn elapsed_until(&self, end: &Self) -> Result<std::time::Duration> {
        let ms = self.0.elapsed_ms(&end.0)?;
        Ok(std::time::Duration::from_secs_f32(ms.max(0.0) / 1e3))
    }
}

/// Captured work, to be launched as a whole.
pub struct Graph(pub(super) CudaGraph);

// SAFETY: launches take `&self` of a type that is not Sync, so one thread at a time uses the graph.
unsafe impl Send for Graph {}

impl Graph {
    /// Launches all of the work in the stream that it was captured from.
    pub fn launch(&self) -> Result<()> {
        Ok(self.0.launch()?)
    }
}

/// Mapped host memory: words that host and device both read and write, also during a launch.
pub struct MappedWords {
    pub(super) address: *mut AtomicI32,
    pub(super) len: usize,
    pub(super) context: Arc<CudaContext>,
}

// SAFETY: atomics, in memory that lives as long as the value.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Number of words.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    fn all(&self) -> &[AtomicI32] {
        // SAFETY: allocated with this length and initialised. Others may write to atomics.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }

    /// Loads a word.
    pub fn get(&self, at: usize) -> i32 {
        self.all()[at].load(Ordering::Acquire)
    }

    /// Stores a word.
    pub fn set(&self, at: usize, value: i32) {
        self.all()[at].store(value, Ordering::Release);
    }

    /// Device address of `len` words from word `at` on.
    ///
    /// # Panics
    ///
    /// If the part does not lie inside the memory.
    pub fn part(&self, at: usize, len: usize) -> u64 {
        assert!(at + len <= self.len);
        self.address as u64 + (at * size_of::<i32>()) as u64
    }
}

/// Pinned host memory, which the device copies from asynchronously.
#[derive(Debug)]
pub struct Pinned(pub(super) MappedWords);

impl Pinned {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.0.len() * size_of::<i32>()
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised, and written to through `&mut self` alone.
        unsafe { std::slice::from_raw_parts(self.0.address.cast(), self.bytes()) }
    }

    /// Writes bytes from byte `at` on.
    ///
    /// # Panics
    ///
    /// If they don't fit.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let len = self.bytes();
        // SAFETY: as above, and `&mut self` is unique.
        let all = unsafe { std::slice::from_raw_parts_mut(self.0.address.cast::<u8>(), len) };
        all[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl fmt::Debug for MappedWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedWords({})", self.len)
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by malloc_host, and no work that uses it is left.
            let _ = unsafe { result::free_host(self.address.cast()) };
        }
    }
}
