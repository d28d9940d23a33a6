//! The errors of this crate.

use cudarc::driver::DriverError;

use super::describe;

/// Why the GPU can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The driver's library can't be opened.
    #[error("there is no NVIDIA driver (libcuda.so.1)")]
    NoDriver,
    /// The driver is older than the toolkit that compiled the kernels.
    #[error("the NVIDIA driver is for CUDA {driver} and this build for {toolkit}")]
    OldDriver {
        /// CUDA version of the driver, or what it says.
        driver: String,
        /// CUDA version of the toolkit.
        toolkit: String,
    },
    /// The driver has no GPU.
    #[error("the NVIDIA driver finds no GPU ({reason})")]
    NoDevice {
        /// The driver's message.
        reason: String,
    },
    /// The GPU is from before Ampere.
    #[error(
        "the GPU {name} is older than this build can use (compute capability {found}, 8.0 is needed)"
    )]
    OldDevice {
        /// Name of the GPU.
        name: String,
        /// Its compute capability.
        found: String,
    },
    /// The build has a stand-in in place of compiled kernels.
    #[error("this build was made without a CUDA compiler and has no kernels")]
    NoKernels,
    /// Device memory is exhausted. Sizes are in megabytes of 10⁶ bytes.
    #[error("the GPU has no memory for {needed} MB more, {free} of its {total} MB are free")]
    OutOfMemory {
        /// What was asked for.
        needed: u64,
        /// Free memory.
        free: u64,
        /// Memory of the GPU.
        total: u64,
    },
    /// An operation failed. The process may not be able to use the GPU any more.
    #[error("the GPU failed: {0}")]
    Failed(String),
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `bytes` are more than the free of all bytes.
    pub(super) fn out_of_memory(bytes: u64, (free, total): (usize, usize)) -> Self {
        Self::OutOfMemory {
            needed: bytes.div_ceil(1_000_000),
            free: free as u64 / 1_000_000,
            total: total as u64 / 1_000_000,
        }
    }
}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        Self::Failed(describe(error))
    }
}
