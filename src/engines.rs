//! From settings to an engine: the only file that names one.

use vlmnarrate_engine::EngineLoader;
#[cfg(not(feature = "smolvlm"))]
use vlmnarrate_engine::{Error, ErrorKind, Found, ModelSettings, Result};
#[cfg(feature = "smolvlm")]
pub use vlmnarrate_smolvlm::SmolVlmLoader;

/// The engine of an element that was given no other.
#[cfg(feature = "smolvlm")]
pub(crate) fn default_loader() -> impl EngineLoader {
    SmolVlmLoader
}

/// The engine of an element that was given no other.
#[cfg(not(feature = "smolvlm"))]
pub(crate) fn default_loader() -> impl EngineLoader {
    struct NoEngine;

    impl EngineLoader for NoEngine {
        fn open(&self, _: &ModelSettings) -> Result<Found> {
            Err(Error::new(
                ErrorKind::Settings,
                "this build has no engine; build it with `cargo build --release --features smolvlm`",
            ))
        }
    }
    NoEngine
}
