//! Where a model runs.

use candle_core::{DType, Device};
use vlmnarrate_engine::{DeviceKind, Remedy};

#[cfg(feature = "candle-cuda")]
use super::candle::cuda as candle_cuda;
#[cfg(feature = "metal")]
use super::candle::metal;
#[cfg(feature = "cuda")]
use super::cuda;
#[cfg(any(feature = "candle-cuda", feature = "metal"))]
use crate::machine::memory_limits::{Limit, Of};
use crate::{
    error::Result,
    files::checkpoint::Checkpoint,
    machine::{
        device::{DeviceInfo, device_error},
        memory::{self, Shortage},
    },
};

/// Whether this build can run models there. Whether the machine can is seen when one is loaded.
pub fn check(kind: DeviceKind) -> Result<()> {
    let (name, features) = match kind {
        DeviceKind::Cuda if !cfg!(any(feature = "cuda", feature = "candle-cuda")) => {
            ("CUDA", "cuda`")
        }
        DeviceKind::Metal if !cfg!(feature = "metal") => ("Metal", "metal` on a Mac"),
        _ => return Ok(()),
    };
    let reason = format!(
        "this build has no {name}; build it with `cargo build --release --features {features}"
    );
    Err(device_error(reason, Remedy::AnyDevice))
}

/// What `Auto` comes to for this model on this machine.
pub(crate) fn resolve(kind: DeviceKind, checkpoint: &Checkpoint) -> DeviceKind {
    #[cfg(not(feature = "cuda"))]
    let _ = checkpoint;
    match kind {
        #[cfg(feature = "cuda")]
        DeviceKind::Auto if vlmnarrate_cuda::is_available() && cuda::fits(checkpoint).is_ok() => {
            DeviceKind::Cuda
        }
        #[cfg(feature = "candle-cuda")]
        DeviceKind::Auto if candle_cuda::is_there() => DeviceKind::Cuda,
        #[cfg(feature = "metal")]
        DeviceKind::Auto if metal::is_there() => DeviceKind::Metal,
        DeviceKind::Auto => DeviceKind::Cpu,
        kind => kind,
    }
}

/// The type that weights are held in by default, on a device that [`resolve`] returned.
pub(crate) fn dtype(kind: DeviceKind) -> DType {
    match kind {
        #[cfg(feature = "candle-cuda")]
        DeviceKind::Cuda => candle_cuda::dtype(),
        #[cfg(not(feature = "candle-cuda"))]
        DeviceKind::Cuda => DType::BF16,
        #[cfg(feature = "metal")]
        DeviceKind::Metal => metal::DTYPE,
        _ => DType::F32,
    }
}

/// Whether quantized weights stay so there: our CUDA kernels take dense ones alone.
pub(crate) fn takes_blocks(kind: DeviceKind) -> bool {
    kind != DeviceKind::Cuda || cfg!(feature = "candle-cuda")
}

/// A device that is open, for one model.
pub(crate) enum OpenDevice {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(Box<vlmnarrate_cuda::Gpu>),
    #[cfg(feature = "candle-cuda")]
    CandleCuda(candle_core::CudaDevice),
    #[cfg(feature = "metal")]
    Metal(candle_core::MetalDevice),
}

impl OpenDevice {
    /// Of what `resolve` said.
    pub(crate) fn open(kind: DeviceKind) -> Result<Self> {
        match kind {
            #[cfg(feature = "cuda")]
            DeviceKind::Cuda => Ok(Self::Cuda(vlmnarrate_cuda::Gpu::open()?.into())),
            #[cfg(feature = "candle-cuda")]
            DeviceKind::Cuda => candle_cuda::open().map(Self::CandleCuda),
            #[cfg(feature = "metal")]
            DeviceKind::Metal => metal::open().map(Self::Metal),
            _ => Ok(Self::Cpu),
        }
    }

    pub(crate) fn info(&self) -> DeviceInfo {
        match self {
            Self::Cpu => DeviceInfo::cpu(),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => DeviceInfo {
                kind: "cuda",
                name: gpu.info.name.clone(),
                memory: gpu.info.memory,
            },
            #[cfg(feature = "candle-cuda")]
            Self::CandleCuda(device) => candle_cuda::info(device),
            #[cfg(feature = "metal")]
            Self::Metal(device) => metal::info(device),
        }
    }

    /// Where candle's tensors lie.
    pub(crate) fn tensors(&self) -> Device {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Device::Cpu,
            Self::Cpu => Device::Cpu,
            #[cfg(feature = "candle-cuda")]
            Self::CandleCuda(device) => Device::Cuda(device.clone()),
            #[cfg(feature = "metal")]
            Self::Metal(device) => Device::Metal(device.clone()),
        }
    }

    /// Whether so many bytes can be had for weights.
    pub(crate) fn check_available(&self, bytes: u64) -> Result<(), Shortage> {
        match self {
            // Its engine asks it itself.
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Ok(()),
            Self::Cpu => memory::check_available(bytes),
            #[cfg(feature = "candle-cuda")]
            // An allocation that fails is an error in any case.
            Self::CandleCuda(device) => {
                on_gpu(bytes, candle_cuda::free(device).unwrap_or(u64::MAX))
            }
            #[cfg(feature = "metal")]
            Self::Metal(device) => on_gpu(bytes, metal::info(device).memory),
        }
    }
}

#[cfg(any(feature = "candle-cuda", feature = "metal"))]
fn on_gpu(bytes: u64, free: u64) -> Result<(), Shortage> {
    match bytes <= free {
        true => Ok(()),
        false => Err(Shortage::Limit(Limit { of: Of::Gpu, free })),
    }
}

/// Around each caption, on the thread that it is made on.
pub(crate) fn with_autorelease_pool<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "metal")]
    return metal::with_autorelease_pool(work);
    #[cfg(not(feature = "metal"))]
    work()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::source::Source;

    #[test]
    fn what_is_not_built_in_names_the_build_that_has_it() {
        let says = |kind: DeviceKind| {
            check(kind).map_err(|error| {
                assert_eq!(error.remedy(), Some(Remedy::AnyDevice));
                error.to_string()
            })
        };
        assert_eq!(says(DeviceKind::Auto), Ok(()));
        assert_eq!(says(DeviceKind::Cpu), Ok(()));
        if let Err(error) = says(DeviceKind::Cuda) {
            assert_eq!(
                error,
                "device: this build has no CUDA; build it with `cargo build --release --features cuda`"
            );
        }
        if let Err(error) = says(DeviceKind::Metal) {
            assert_eq!(
                error,
                "device: this build has no Metal; build it with `cargo build --release --features \
                 metal` on a Mac"
            );
        }
    }

    #[test]
    fn there_is_always_a_cpu() {
        let demo = Checkpoint::open(&Source::Demo).unwrap();
        assert_ne!(resolve(DeviceKind::Auto, &demo), DeviceKind::Auto);
        assert_eq!(resolve(DeviceKind::Cpu, &demo), DeviceKind::Cpu);
    }
}
