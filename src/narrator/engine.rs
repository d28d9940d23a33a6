//! What the worker needs from a model, and nothing more.
//!
//! SmolVLM is one engine (see [`super::SmolVlmLoader`]); an application brings another through
//! [`VlmNarrate::set_engine_loader`](crate::vlmnarrate::VlmNarrate::set_engine_loader).

use std::{ffi::OsString, ops::ControlFlow, sync::Arc};

pub use crate::smolvlm::{
    Clip, DType, Description, DeviceKind, ErrorKind, Event, Picture, Quantization, Request,
    Sampling, Timings, Transfer,
};

/// Which model, and how to hold it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelSettings {
    /// A folder, a GGUF file or an id of the Hugging Face hub; `None` is the model embedded in the library.
    pub model: Option<OsString>,
    /// The projector of a GGUF file; `None` to have it found beside the file.
    pub mmproj: Option<OsString>,
    /// Branch, tag or commit on the hub; `None` is `main`.
    pub revision: Option<String>,
    pub device: DeviceKind,
    pub dtype: DType,
    pub quantization: Quantization,
    /// 0 = all cores.
    pub threads: usize,
    /// Nice value of the threads, 0 to 19. Elements that share a model share its threads: that of
    /// the first counts.
    pub nice: u8,
}

/// What went wrong, in one line that names the file or property and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "cancelled")
    }
}

impl From<crate::smolvlm::Error> for Error {
    fn from(error: crate::smolvlm::Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// Hears how many bytes of how many are loaded; `Break` ends the load.
pub type LoadWatch<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + Send + 'a;

/// Hears of each layer and token; `Break` ends the answer.
pub type Watch<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + Send + 'a;

/// Hears of each piece that is downloaded; `Break` ends the download.
pub type DownloadWatch<'a> = dyn FnMut(Transfer) -> ControlFlow<()> + Send + 'a;

/// Finds a model from the element's settings.
pub trait EngineLoader: Send + Sync {
    /// Checks all that can be checked at once: it runs inside the state change NULL→READY, and so
    /// it doesn't wait for a network.
    fn open(&self, settings: &ModelSettings) -> Result<Found, Error>;
}

/// Where a model is.
pub enum Found {
    Here(Arc<dyn Checkpoint>),
    Remote(Arc<dyn Remote>),
}

/// A model that must be downloaded before more is known of it than its name.
pub trait Remote: Send + Sync {
    fn name(&self) -> &str;

    /// Downloads it and checks what [`EngineLoader::open`] would have. Runs on the worker's thread
    /// and may take long.
    fn download(&self, watch: &mut DownloadWatch<'_>) -> Result<Arc<dyn Checkpoint>, Error>;
}

/// A model that was found and looks whole, not yet loaded.
pub trait Checkpoint: Send + Sync {
    fn name(&self) -> &str;

    /// Side in pixels of the pictures that the model was trained on.
    fn image_size(&self) -> u32;

    /// Whether the model can look at pictures of this side.
    fn check_image_size(&self, side: u32) -> Result<(), Error>;

    /// The small model inside the library, which knows `videotestsrc` pictures only.
    fn is_demo(&self) -> bool {
        false
    }

    /// Loads it. Runs on the worker's thread and may take long.
    fn load(&self, watch: &mut LoadWatch<'_>) -> Result<Box<dyn Engine>, Error>;
}

/// What a caption says of the engine that made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineInfo {
    pub model: String,
    pub revision: String,
    /// `cpu`, `cuda`, `metal` or the like.
    pub device: String,
    /// Of the processor or the GPU.
    pub device_name: String,
    /// Bytes that the device has in all; 0 where nobody knows.
    pub device_memory: u64,
}

/// A loaded model.
///
/// It is made and dropped on the worker's thread, so it need not be `Send`.
pub trait Engine {
    fn info(&self) -> EngineInfo;

    /// Whether requests as this one can be answered, asked once when the model is loaded. Its pictures are blank, and
    /// the frames of its clip have no time. What is refused here is an error then; what is refused later costs the
    /// captions of its frames.
    fn check(&self, _request: &Request<'_>) -> Result<(), Error> {
        Ok(())
    }

    /// Answers one request. `watch` wants to be called often (each layer, each token): how fast
    /// a flush or a state change can interrupt depends on it. After a `Break` the answer is
    /// [`ErrorKind::Cancelled`].
    fn describe(
        &mut self,
        request: &Request<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Description, Error>;
}
