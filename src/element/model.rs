//! The model of an element, loaded or being loaded.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    engines,
    prompt::{IntervalRequest, picture_size},
    remedies::worded,
    worker::Worker,
};
use vlmnarrate_engine::{Checkpoint, EngineLoader, Error, ImageSize, ModelSettings};

/// The engine loader of an element.
pub(crate) struct Loader(pub(crate) Arc<dyn EngineLoader>);

impl Default for Loader {
    fn default() -> Self {
        Self(Arc::new(engines::DefaultLoader))
    }
}

/// A model and the worker that owns it.
pub(crate) struct LoadedModel {
    pub(crate) worker: Worker,
    pub(crate) settings: ModelSettings,
    checked_request: CheckedRequest,
    was_started: AtomicBool,
}

/// The request that the model was checked with when it was loaded; shared with the worker's callbacks.
pub(crate) type CheckedRequest = Arc<Mutex<Option<IntervalRequest>>>;

impl LoadedModel {
    pub(crate) fn new(
        worker: Worker,
        settings: ModelSettings,
        checked_request: CheckedRequest,
    ) -> Self {
        Self {
            worker,
            settings,
            checked_request,
            was_started: AtomicBool::new(false),
        }
    }

    /// Takes frames from now on.
    pub(crate) fn start(&self) {
        self.was_started.store(true, Ordering::Relaxed);
        self.worker.start();
    }

    /// Whether the model can be kept for another run with this request.
    ///
    /// A model that failed before its first run is kept: its error was just reported, and another load would fail
    /// the same way, unless what it refused was a request that has changed.
    pub(crate) fn is_usable(&self, request: &IntervalRequest) -> bool {
        let request_changed = || {
            let checked = self.checked_request.lock().unwrap();
            checked.as_ref().is_some_and(|checked| checked != request)
        };
        !self.worker.has_failed() || !self.was_started.load(Ordering::Relaxed) && !request_changed()
    }

    /// Size of the pictures for this model with this `image-size`. `None` if the size is the model's to choose and the
    /// model is still being downloaded.
    pub(crate) fn picture_size(&self, image_size: u32) -> Option<ImageSize> {
        match (self.worker.checkpoint(), image_size) {
            (Some(checkpoint), _) => Some(picture_size(image_size, checkpoint)),
            (None, 0) => None,
            // Models that are downloaded take squares.
            (None, side) => Some(ImageSize::Square(side)),
        }
    }
}

/// Checks an `image-size`, of which 0 fits every model.
pub(crate) fn check_image_size(checkpoint: &dyn Checkpoint, side: u32) -> Result<(), Error> {
    match side {
        0 => Ok(()),
        side => checkpoint.check_image_size(side).map_err(worded),
    }
}
