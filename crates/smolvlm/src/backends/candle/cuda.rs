//! NVIDIA's GPUs, through candle: for those before Ampere, and for models that our own kernels don't know. Type-checked
//! and linted with a stand-in for nvcc, and never run so far.

use candle_core::{
    CudaDevice, DType,
    cuda_backend::cudarc::driver::{CudaContext, DriverError},
};

use vlmnarrate_engine::Remedy;

use crate::{
    error::{Result, plain},
    machine::device::{DeviceInfo, device_error},
};

/// Whether the machine has a GPU.
pub(crate) fn is_there() -> bool {
    CudaContext::device_count().is_ok_and(|count| count > 0)
}

/// The type that weights are held in by default: before Ampere there is no bf16.
pub(crate) fn dtype() -> DType {
    let capability = CudaContext::new(0).and_then(|context| context.compute_capability());
    match capability {
        Ok((major, _)) if major < 8 => DType::F32,
        _ => DType::BF16,
    }
}

/// The first GPU, with a stream of its own each time.
pub(crate) fn open() -> Result<CudaDevice> {
    CudaDevice::new_with_stream(0)
        .map_err(|e| device_error(format!("CUDA: {}", plain(&e)), Remedy::Cpu))
}

pub(crate) fn info(device: &CudaDevice) -> DeviceInfo {
    let stream = device.cuda_stream();
    let context = stream.context();
    DeviceInfo {
        kind: "cuda",
        name: context.name().unwrap_or_else(|_| "an NVIDIA GPU".into()),
        memory: context.total_mem().map_or(0, |bytes| bytes as u64),
    }
}

/// Bytes that the GPU has free.
pub(crate) fn free(device: &CudaDevice) -> Result<u64, DriverError> {
    let (free, _) = device.cuda_stream().context().mem_get_info()?;
    Ok(free as u64)
}
