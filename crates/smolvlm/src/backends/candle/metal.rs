//! The GPU of a Mac, through candle. It was type-checked (`tools/check-metal.sh`) and never run.

use candle_core::{DType, MetalDevice, backend::BackendDevice};
use objc2::{rc::autoreleasepool, runtime::ProtocolObject};
use objc2_metal::{MTLCopyAllDevices, MTLDevice};
use vlmnarrate_engine::Remedy;

use crate::{
    error::{Result, plain},
    machine::device::{DeviceInfo, device_error},
};

/// What checkpoints are published in: their activations fit, where f16 may overflow. candle has a kernel in it for
/// each of our operations, and those for matrices can't be compiled without bfloat (macOS 14) in any case.
pub(crate) const DTYPE: DType = DType::BF16;

/// Whether the machine has a GPU.
pub(crate) fn is_there() -> bool {
    !MTLCopyAllDevices().is_empty()
}

/// The first GPU, with a command queue of its own each time.
pub(crate) fn open() -> Result<MetalDevice> {
    // candle takes it for granted.
    if !is_there() {
        return Err(device_error(
            "this machine has no GPU for Metal",
            Remedy::AnyDevice,
        ));
    }
    let failed = |e| device_error(format!("Metal: {}", plain(&e)), Remedy::Cpu);
    MetalDevice::new(0).map_err(failed)
}

/// Memory is what Metal lets the GPU have of the machine's.
pub(crate) fn info(device: &MetalDevice) -> DeviceInfo {
    let gpu: &ProtocolObject<dyn MTLDevice> = device.metal_device().as_ref();
    DeviceInfo {
        kind: "metal",
        name: gpu.name().to_string(),
        memory: gpu.recommendedMaxWorkingSetSize(),
    }
}

/// Frees what Metal leaves to the thread's pool meanwhile, which else would be freed when the thread ends.
pub(crate) fn with_autorelease_pool<T>(work: impl FnOnce() -> T) -> T {
    autoreleasepool(|_| work())
}
