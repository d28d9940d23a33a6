//! Loading, starting, cancelling and unloading of the element's model.

use std::sync::Arc;

use gst::{prelude::*, subclass::prelude::*};

use crate::{
    element::{
        callbacks::ElementCallbacks,
        imp::VlmNarrate,
        model::{CheckedRequest, LoadedModel, check_image_size},
        panics,
    },
    remedies::worded,
    worker::Worker,
};
use vlmnarrate_engine::{Error, ErrorKind, Found, ModelSettings};
use vlmnarrate_mailbox::Epoch;

impl VlmNarrate {
    pub(crate) fn model(&self) -> Option<Arc<LoadedModel>> {
        self.model.lock().unwrap().clone()
    }

    /// Opens the model, and starts to load it on a thread of its own.
    pub(crate) fn load(&self) -> Result<(), gst::StateChangeError> {
        let (settings, image_size) = {
            let settings = self.settings.lock().unwrap();
            (settings.model_settings(), settings.image_size)
        };
        let loader = self.loader.lock().unwrap().0.clone();
        let model = loader.open(&settings).map_err(worded).and_then(|found| {
            if let Found::Ready(checkpoint) = &found {
                check_image_size(checkpoint.as_ref(), image_size)?;
            }
            self.spawn_worker(found, settings)
        });
        match model {
            Ok(model) => {
                self.enter_epoch(model.worker.epoch());
                *self.model.lock().unwrap() = Some(Arc::new(model));
                Ok(())
            }
            Err(error) => {
                self.post_error(&error);
                Err(gst::StateChangeError)
            }
        }
    }

    fn spawn_worker(&self, found: Found, settings: ModelSettings) -> Result<LoadedModel, Error> {
        let (name, is_demo) = match &found {
            Found::Ready(checkpoint) => (checkpoint.name(), checkpoint.is_demo()),
            Found::ToDownload(download) => (download.name(), false),
        };
        if is_demo {
            #[cfg(feature = "hub")]
            const TEXT: &str = "The built-in demo model only knows videotestsrc patterns. For real \
                video, set model to a SmolVLM checkpoint: the id of a model on the Hugging Face hub, \
                for example model=HuggingFaceTB/SmolVLM2-500M-Video-Instruct, or a folder";
            #[cfg(not(feature = "hub"))]
            const TEXT: &str = "The built-in demo model only knows videotestsrc patterns. For real \
                video, set model to the folder of a SmolVLM checkpoint";
            // Also as debug text, the only one that gst-launch-1.0 shows.
            gst::element_imp_info!(self, gst::LibraryError::Settings, ("{TEXT}"), ["{TEXT}"]);
        }
        let checked_request = CheckedRequest::default();
        let callbacks = ElementCallbacks::new(&self.obj(), name, checked_request.clone());
        panics::install_panic_hook();
        let predecessor = self.closing_worker.lock().unwrap().take();
        let worker = Worker::spawn(found, settings.nice, predecessor, Box::new(callbacks));
        let worker = worker.map_err(|error| {
            let message = format!("can't start the model's thread: {error}");
            Error::new(ErrorKind::Failed, message)
        })?;
        Ok(LoadedModel::new(worker, settings, checked_request))
    }

    /// Loads the model anew if its properties have changed in READY or its worker has failed.
    pub(crate) fn reload_if_changed(&self) -> Result<(), gst::StateChangeError> {
        let (settings, request) = {
            let settings = self.settings.lock().unwrap();
            (settings.model_settings(), settings.interval_request())
        };
        if self
            .model()
            .is_some_and(|model| model.settings == settings && model.is_usable(&request))
        {
            return Ok(());
        }
        self.unload();
        self.load()
    }

    /// Closes the worker. A worker that does not end soon is waited for before the next model is loaded.
    pub(crate) fn unload(&self) {
        let model = self.model.lock().unwrap().take();
        if let Some(model) = model {
            let closing = model.worker.close();
            *self.closing_worker.lock().unwrap() = closing;
        }
    }

    /// Takes frames from now on.
    pub(crate) fn start_narrating(&self) {
        self.stats.reset();
        self.captions.lock().unwrap().restart_sequence();
        let merge = self.settings.lock().unwrap().merge_captions;
        self.text.set_merge(merge);
        if let Some(model) = self.model() {
            model.start();
        }
    }

    /// Cancels all jobs, and wakes a streaming thread that waits for one.
    pub(crate) fn stop_narrating(&self) {
        if let Some(model) = self.model() {
            self.cancelled(model.worker.stop());
        }
    }

    pub(crate) fn flush_start(&self) {
        if let Some(model) = self.model() {
            self.cancelled(model.worker.flush_start());
        }
    }

    pub(crate) fn flush_stop(&self) {
        if let Some(model) = self.model() {
            model.worker.flush_stop();
        }
    }

    /// Cancels all jobs, and takes new ones at once.
    pub(crate) fn cancel(&self) {
        if let Some(model) = self.model() {
            self.cancelled(model.worker.cancel());
        }
    }

    fn cancelled(&self, epoch: Epoch) {
        self.requests.retry_all();
        self.enter_epoch(epoch);
    }

    fn enter_epoch(&self, epoch: Epoch) {
        let had_caption = self.captions.lock().unwrap().enter_epoch(epoch);
        if had_caption {
            self.obj().notify("caption");
        }
    }

    /// Checks that the model takes pictures of this side. Any side is fine while no model is open.
    pub(crate) fn check_image_size(&self, side: u32) -> Result<(), Error> {
        let model = self.model();
        match model.as_ref().and_then(|model| model.worker.checkpoint()) {
            Some(checkpoint) => check_image_size(checkpoint, side),
            None => Ok(()),
        }
    }

    /// Posts the ERROR of a model that can't be loaded or makes no more captions.
    pub(crate) fn post_error(&self, error: &Error) {
        let class = match error.kind {
            ErrorKind::NotFound => gst::ResourceError::NotFound,
            ErrorKind::OpenRead => gst::ResourceError::OpenRead,
            ErrorKind::NotAuthorized => gst::ResourceError::NotAuthorized,
            ErrorKind::Write => gst::ResourceError::Write,
            ErrorKind::NoSpaceLeft => gst::ResourceError::NoSpaceLeft,
            ErrorKind::Settings => gst::ResourceError::Settings,
            ErrorKind::Unavailable => gst::ResourceError::Busy,
            _ => gst::ResourceError::Failed,
        };
        let remedy = match error.kind {
            ErrorKind::Unavailable => ". Set the element to NULL and try again later",
            _ => "",
        };
        gst::element_imp_error!(self, class, ("{error}{remedy}"));
    }
}
