//! The contract between whoever has pictures and whoever describes them.
//!
//! An [`EngineLoader`] turns [`ModelSettings`] into a [`Checkpoint`], at once or after a [`Download`]; a checkpoint is
//! loaded into an [`Engine`]; an engine turns each [`Request`] into an [`Answer`]. An engine may hold weights in this
//! process or ask a server: nothing here knows which, nor where pictures come from.
//!
//! ```
//! use std::sync::Arc;
//! use vlmnarrate_engine::*;
//!
//! /// Counts pictures.
//! struct Counter;
//!
//! impl EngineLoader for Counter {
//!     fn open(&self, _: &ModelSettings) -> Result<Found, Error> {
//!         Ok(Found::Ready(Arc::new(Counter)))
//!     }
//! }
//!
//! impl Checkpoint for Counter {
//!     fn name(&self) -> &str {
//!         "counter"
//!     }
//!
//!     fn image_size(&self) -> ImageSize {
//!         ImageSize::Square(64)
//!     }
//!
//!     fn load(&self, _: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>, Error> {
//!         Ok(Box::new(Counter))
//!     }
//! }
//!
//! impl Engine for Counter {
//!     fn info(&self) -> EngineInfo {
//!         let mut info = EngineInfo::default();
//!         info.model = "counter".into();
//!         info
//!     }
//!
//!     fn describe(&mut self, request: &Request<'_>, _: &mut Observer<'_>) -> Result<Answer, Error> {
//!         Ok(Answer::new(format!("{} pictures", request.pictures.len())))
//!     }
//! }
//! # let Ok(Found::Ready(checkpoint)) = Counter.open(&ModelSettings::default()) else { panic!() };
//! # assert_eq!(checkpoint.load(&mut |_, _| std::ops::ControlFlow::Continue(())).unwrap().info().model, "counter");
//! ```

mod answer;
mod clip;
mod error;
mod picture;
mod request;
mod settings;
pub mod threads;

use std::{ops::ControlFlow, sync::Arc};

pub use answer::{Answer, Event, Timings};
pub use clip::Clip;
pub use error::{Error, ErrorKind, Remedy, Result};
pub use picture::{ImageSize, Picture};
pub use request::{Priority, Request, Sampling, Setting};
pub use settings::{DType, DeviceKind, EndpointSettings, ImageFormat, ModelSettings, Quantization};

/// Called with the bytes loaded so far and in all; `Break` ends the load with [`ErrorKind::Cancelled`].
pub type LoadObserver<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + Send + 'a;

/// Called at each layer and each token, or every few milliseconds; `Break` ends the answer with
/// [`ErrorKind::Cancelled`].
pub type Observer<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + Send + 'a;

/// Called for each piece that arrives; `Break` ends the download with [`ErrorKind::Cancelled`].
pub type DownloadObserver<'a> = dyn FnMut(Transfer) -> ControlFlow<()> + Send + 'a;

/// How far a download has come, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transfer {
    /// Of the total, with what was there before the download began.
    pub done: u64,
    /// Of all files; 0 while nobody knows.
    pub total: u64,
    /// Received over the network since the download began.
    pub received: u64,
}

/// Finds a model from settings.
pub trait EngineLoader: Send + Sync {
    /// Checks all that can be checked at once.
    ///
    /// The element calls it inside the state change NULL→READY, so it must not wait for a network.
    ///
    /// # Errors
    ///
    /// Settings that contradict each other, and a model that is missing or unfit.
    fn open(&self, settings: &ModelSettings) -> Result<Found>;
}

/// Where a model is.
pub enum Found {
    /// On this machine, or on a server that holds it.
    Ready(Arc<dyn Checkpoint>),
    /// In a repository, from which it must be downloaded first.
    ToDownload(Arc<dyn Download>),
}

/// A model of which no more than the name is known before it is downloaded.
pub trait Download: Send + Sync {
    /// Name of the model, for people.
    fn name(&self) -> &str;

    /// Downloads the model, and checks what [`EngineLoader::open`] would have checked.
    ///
    /// Runs on the worker's thread and may take long.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] where another try may succeed, and whatever the network, the server or the disk
    /// refuses.
    fn download(&self, observer: &mut DownloadObserver<'_>) -> Result<Arc<dyn Checkpoint>>;
}

/// A model that was found and looks whole, not yet loaded.
pub trait Checkpoint: Send + Sync {
    /// Name of the model, for people.
    fn name(&self) -> &str;

    /// Shape and size of the pictures that the model prefers.
    fn image_size(&self) -> ImageSize;

    /// Checks that the model takes pictures of its shape and of this side, in pixels.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Settings`].
    fn check_image_size(&self, _side: u32) -> Result<()> {
        Ok(())
    }

    /// Whether this is the small model inside the library, which knows `videotestsrc` pictures only.
    fn is_demo(&self) -> bool {
        false
    }

    /// Loads the model.
    ///
    /// Runs on the worker's thread and may take long.
    ///
    /// # Errors
    ///
    /// Broken files, no memory, no such device; [`ErrorKind::Cancelled`] after a `Break`.
    fn load(&self, observer: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>>;
}

/// What a caption says of the engine that made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineInfo {
    /// Name of the model.
    pub model: String,
    /// Branch, tag or commit of the model; empty where there is none.
    pub revision: String,
    /// `cpu`, `cuda`, `metal`, `remote` or the like.
    pub device: String,
    /// Name of the processor, the GPU or the host.
    pub device_name: String,
    /// Bytes that the device has in all; 0 where nobody knows.
    pub device_memory: u64,
    /// Data type of the computation, `f32` or the like; empty where nobody knows.
    pub dtype: String,
    /// Quantization of the weights: `none`, `q8-0` or the like, `file` for what a file came with; empty where nobody
    /// knows.
    pub quantization: String,
    /// Bytes of the weights in memory; 0 where nobody knows.
    pub weights_memory: u64,
}

/// A loaded model.
///
/// It is made and dropped on the worker's thread, so it need not be `Send`.
pub trait Engine {
    /// What captions say of this engine.
    fn info(&self) -> EngineInfo;

    /// Checks that requests like this one can be answered, once when the model is loaded.
    ///
    /// The request's pictures are blank, and the frames of its clip have no time. What is refused here is an error of
    /// the settings; what [`describe`](Self::describe) refuses costs the captions of single frames.
    ///
    /// # Errors
    ///
    /// Whatever is certain to fail whatever the pictures show.
    fn check(&self, _request: &Request<'_>) -> Result<()> {
        Ok(())
    }

    /// Waits until [`describe`](Self::describe) would begin at once. The default does not wait. Where several engines
    /// share a model or a server, those of a high priority are first.
    ///
    /// Whoever has the pictures calls it before taking the newest one, so that no picture grows old in a queue. The
    /// turn is used up by the next `describe`, or given back by [`give_up_turn`](Self::give_up_turn).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Cancelled`] after a `Break`.
    fn wait_turn(&mut self, _priority: Priority, _observer: &mut Observer<'_>) -> Result<()> {
        Ok(())
    }

    /// Gives back a turn that no request needs any more.
    fn give_up_turn(&mut self) {}

    /// Answers one request.
    ///
    /// The observer wants to be called often (each layer, each token): how fast a flush or a state change can
    /// interrupt depends on it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Cancelled`] after a `Break`, [`ErrorKind::Failed`] where the next request may succeed,
    /// [`ErrorKind::Unavailable`] where the same request may succeed later, and anything else for good.
    fn describe(&mut self, request: &Request<'_>, observer: &mut Observer<'_>) -> Result<Answer>;
}
