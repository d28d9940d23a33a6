//! Checks for the driver and a GPU, before calls into cudarc that panic without them.

use std::ffi::c_int;

use cudarc::driver::{
    CudaContext, result,
    sys::{self, CUdevice_attribute, CUresult},
};

use super::{CODE, Error, Result, TOOLKIT, describe, format_version};

/// CUDA version of cudarc's bindings, as chosen in `Cargo.toml`.
const BINDINGS_VERSION: i32 = 12000;

/// Whether there is a GPU that this build can use. Opens the driver, not the GPU.
pub fn is_available() -> bool {
    check().is_ok()
}

/// Checks that there are a driver and a GPU and that both are new enough.
pub(super) fn check() -> Result<()> {
    if CODE.is_empty() {
        return Err(Error::NoKernels);
    }
    // Without the library cudarc would panic.
    // SAFETY: the driver's initialisers may run in any process.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    let driver = driver_version()?;
    let needed = TOOLKIT.parse().unwrap_or(0).max(BINDINGS_VERSION);
    // Minor version compatibility: a driver loads what any toolkit of its major version has compiled.
    if driver.is_none_or(|driver| driver / 1000 < needed / 1000) {
        return Err(Error::OldDriver {
            driver: driver.map_or_else(|| "of an unknown version".into(), format_version),
            toolkit: format_version(needed),
        });
    }
    let no_device = |error| Error::NoDevice {
        reason: describe(error),
    };
    result::init().map_err(no_device)?;
    if CudaContext::device_count().map_err(no_device)? == 0 {
        return Err(Error::NoDevice {
            reason: "it counts none".into(),
        });
    }
    let device = result::device::get(0).map_err(no_device)?;
    let capability = |which| {
        // SAFETY: the driver has just named the device.
        unsafe { result::device::get_attribute(device, which) }
    };
    let major = capability(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = capability(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    match major {
        8.. => Ok(()),
        _ => Err(Error::OldDevice {
            name: result::device::get_name(device)?,
            found: format!("{major}.{minor}"),
        }),
    }
}

/// CUDA version of the driver, or `None` if the library doesn't tell and so is none that cudarc knows.
///
/// cudarc looks functions up as they are called and panics if one is missing. A driver of the bindings' version has all of
/// them, so this is the only function that needs a lookup without a panic.
fn driver_version() -> Result<Option<i32>> {
    type Get = unsafe extern "C" fn(*mut c_int) -> CUresult;
    // SAFETY: the library is there.
    let library = unsafe { sys::culib() };
    // SAFETY: the type is that of the driver's header.
    let Ok(get) = (unsafe { library.get::<Get>(c"cuDriverGetVersion") }) else {
        return Ok(None);
    };
    let mut driver = 0;
    // SAFETY: writes one number.
    unsafe { get(&mut driver) }.result()?;
    Ok(Some(driver))
}
