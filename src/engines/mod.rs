//! The default engine: a model in this process, one behind an endpoint, or both. No other room names an engine.

#[cfg(all(feature = "openai", feature = "smolvlm"))]
mod fallback;

use vlmnarrate_engine::{EngineLoader, Found, ModelSettings, Result};
#[cfg(not(all(feature = "openai", feature = "smolvlm")))]
use vlmnarrate_engine::{Error, ErrorKind};
#[cfg(feature = "openai")]
pub use vlmnarrate_openai::OpenAiLoader;
#[cfg(feature = "smolvlm")]
pub use vlmnarrate_smolvlm::SmolVlmLoader;

/// The loader of an element without a loader of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DefaultLoader;

impl EngineLoader for DefaultLoader {
    fn open(&self, settings: &ModelSettings) -> Result<Found> {
        let Some(endpoint) = &settings.endpoint else {
            return open_local(settings);
        };
        let remote = open_remote(settings)?;
        match &endpoint.fallback_model {
            None => Ok(remote),
            Some(model) => {
                let mut local = settings.clone();
                local.endpoint = None;
                local.model = Some(model.clone());
                with_fallback(remote, open_local(&local)?)
            }
        }
    }
}

#[cfg(feature = "smolvlm")]
fn open_local(settings: &ModelSettings) -> Result<Found> {
    SmolVlmLoader.open(settings)
}

#[cfg(not(feature = "smolvlm"))]
fn open_local(_: &ModelSettings) -> Result<Found> {
    Err(missing(
        "this build runs no model in this process. Set endpoint, or build",
        "smolvlm",
    ))
}

#[cfg(feature = "openai")]
fn open_remote(settings: &ModelSettings) -> Result<Found> {
    OpenAiLoader.open(settings)
}

#[cfg(not(feature = "openai"))]
fn open_remote(_: &ModelSettings) -> Result<Found> {
    Err(missing(
        "endpoint: this build asks no server. Build",
        "openai",
    ))
}

#[cfg(all(feature = "openai", feature = "smolvlm"))]
use fallback::with_fallback;

#[cfg(not(all(feature = "openai", feature = "smolvlm")))]
fn with_fallback(_: Found, _: Found) -> Result<Found> {
    Err(missing(
        "fallback-model: this build has one engine. Build",
        "openai,smolvlm",
    ))
}

#[cfg(not(all(feature = "openai", feature = "smolvlm")))]
fn missing(what: &str, features: &str) -> Error {
    let message = format!("{what} the plugin with `cargo build --release --features {features}`");
    Error::new(ErrorKind::Settings, message)
}
