//! The default engine. No other file names an engine.

use vlmnarrate_engine::EngineLoader;
#[cfg(not(feature = "smolvlm"))]
use vlmnarrate_engine::{Error, ErrorKind, Found, ModelSettings, Result};
#[cfg(feature = "smolvlm")]
pub use vlmnarrate_smolvlm::SmolVlmLoader;

/// The loader of an element without a loader of its own.
#[cfg(feature = "smolvlm")]
pub(crate) fn default_loader() -> impl EngineLoader {
    SmolVlmLoader
}

/// The loader of an element without a loader of its own.
#[cfg(not(feature = "smolvlm"))]
pub(crate) fn default_loader() -> impl EngineLoader {
    struct NoEngine;

    impl EngineLoader for NoEngine {
        fn open(&self, _: &ModelSettings) -> Result<Found> {
            Err(Error::new(
                ErrorKind::Settings,
                "this build has no engine. Build the plugin with `cargo build --release --features smolvlm`",
            ))
        }
    }
    NoEngine
}
