//! Whether the driver and its GPU are there, before anything of cudarc is called that panics without.

use std::ffi::c_int;

use cudarc::driver::{
    CudaContext, result,
    sys::{self, CUdevice_attribute, CUresult},
};

use super::{CODE, Error, Result, TOOLKIT, told, version};

/// Of cudarc's declarations, as `Cargo.toml` chooses them.
const BINDINGS: i32 = 12000;

/// Whether there is a GPU that this build can use. Opens the driver, not the GPU.
pub fn is_there() -> bool {
    look().is_ok()
}

/// The driver and its first GPU are there and new enough.
pub(super) fn look() -> Result<()> {
    if CODE.is_empty() {
        return Err(Error::NoKernels);
    }
    // cudarc would panic.
    // SAFETY: the driver's initialisers may run in any process.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    let driver = driver_version()?;
    let needed = TOOLKIT.parse().unwrap_or(0).max(BINDINGS);
    // Of one major version all can load what any of it has compiled.
    if driver.is_none_or(|driver| driver / 1000 < needed / 1000) {
        return Err(Error::OldDriver {
            driver: driver.map_or_else(|| "of an unknown version".into(), version),
            toolkit: version(needed),
        });
    }
    let no_device = |error| Error::NoDevice {
        reason: told(error),
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

/// `None` of a library that tells of none: it isn't one that cudarc knows.
///
/// cudarc looks for each function as it is called, and panics where there is none. A driver of the
/// version that it was generated for has them all, so that only this one has to be looked for.
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
