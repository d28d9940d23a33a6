//! The engine contract, implemented by SmolVLM.

use std::{
    ops::ControlFlow,
    sync::{Arc, LazyLock},
};

use vlmnarrate_engine::{
    Answer, Checkpoint, Engine, EngineInfo, EngineLoader, Error, Found, ImageSize, LoadObserver,
    ModelSettings, Observer, Priority, Request,
};
#[cfg(feature = "hub")]
use vlmnarrate_engine::{Download, DownloadObserver};

use crate::{
    backends::device,
    error,
    files::{self, fingerprint::Fingerprint, source::Source},
    run::{model::Model, options::LoadOptions, registry::Registry, session::Session},
};

/// Loaded models: elements with the same model and options share its weights and threads.
static MODELS: LazyLock<Registry<(Fingerprint, LoadOptions), Model>> = LazyLock::new(Registry::new);

/// The loader of SmolVLM models: from a folder, from GGUF files, from the Hugging Face hub, or the embedded demo model.
#[derive(Clone, Copy, Debug, Default)]
pub struct SmolVlmLoader;

impl EngineLoader for SmolVlmLoader {
    fn open(&self, settings: &ModelSettings) -> Result<Found, Error> {
        let model = settings.model.as_deref();
        let source = match settings.mmproj.as_deref().filter(|path| !path.is_empty()) {
            Some(mmproj) => Source::with_mmproj(model, mmproj)?,
            None => Source::parse(model, settings.revision.as_deref())?,
        };
        let options = LoadOptions {
            device: settings.device,
            dtype: settings.dtype,
            quantization: settings.quantization,
            threads: settings.threads,
        };
        device::check(options.device)?;
        match source {
            #[cfg(feature = "hub")]
            Source::Hub(repository) => Ok(Found::ToDownload(Arc::new(HubDownload {
                repository,
                options,
            }))),
            source => Ok(Found::Ready(open(&source, options)?)),
        }
    }
}

fn open(source: &Source, options: LoadOptions) -> Result<Arc<dyn Checkpoint>, Error> {
    let checkpoint = files::checkpoint::Checkpoint::open(source)?;
    Ok(Arc::new(SmolVlmCheckpoint {
        checkpoint,
        options,
    }))
}

/// A model of the hub that is not in its cache.
#[cfg(feature = "hub")]
struct HubDownload {
    repository: files::hub::Repository,
    options: LoadOptions,
}

#[cfg(feature = "hub")]
impl Download for HubDownload {
    fn name(&self) -> &str {
        self.repository.id()
    }

    fn download(&self, observer: &mut DownloadObserver<'_>) -> Result<Arc<dyn Checkpoint>, Error> {
        let source = self.repository.download(observer)?;
        open(&source, self.options)
    }
}

/// A checkpoint with the options to load it with.
struct SmolVlmCheckpoint {
    checkpoint: files::checkpoint::Checkpoint,
    options: LoadOptions,
}

impl Checkpoint for SmolVlmCheckpoint {
    fn name(&self) -> &str {
        self.checkpoint.name()
    }

    fn image_size(&self) -> ImageSize {
        ImageSize::Square(self.checkpoint.image_size())
    }

    fn check_image_size(&self, side: u32) -> Result<(), Error> {
        Ok(self.checkpoint.check_image_size(side)?)
    }

    fn is_demo(&self) -> bool {
        self.checkpoint.is_demo()
    }

    fn load(&self, observer: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>, Error> {
        let options = self.options.resolve(&self.checkpoint)?;
        let key = (self.checkpoint.fingerprint().clone(), options);
        let waiting = |observer: &mut LoadObserver<'_>| match observer(0, 1) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(error::Error::Cancelled),
        };
        let load = |observer: &mut LoadObserver<'_>| {
            let mut progress = |done, total| observer(done, total);
            Model::load(&self.checkpoint, &options, &mut progress)
        };
        let model = MODELS.get(key, observer, waiting, load)?;
        let session = model.session();
        let weights_memory = options.memory(&self.checkpoint)?;
        Ok(Box::new(SmolVlm {
            model,
            session,
            dtype: options.formats(&self.checkpoint)?.dtype.as_str(),
            quantization: options.quantization_name(&self.checkpoint),
            weights_memory,
        }))
    }
}

/// A loaded model, shared with other elements, and this element's session.
struct SmolVlm {
    model: Arc<Model>,
    session: Session,
    dtype: &'static str,
    quantization: &'static str,
    weights_memory: u64,
}

impl Engine for SmolVlm {
    fn info(&self) -> EngineInfo {
        let device = self.model.device();
        let mut info = EngineInfo::default();
        info.model = self.model.name().to_owned();
        info.revision = self.model.revision().to_owned();
        info.device = device.kind.to_owned();
        info.device_name = device.name.clone();
        info.device_memory = device.memory;
        info.dtype = self.dtype.to_owned();
        info.quantization = self.quantization.to_owned();
        info.weights_memory = self.weights_memory;
        info
    }

    fn check(&self, request: &Request<'_>) -> Result<(), Error> {
        Ok(self.model.check(request)?)
    }

    fn wait_turn(&mut self, priority: Priority, observer: &mut Observer<'_>) -> Result<(), Error> {
        Ok(self
            .model
            .wait_turn(&mut self.session, priority, observer)?)
    }

    fn give_up_turn(&mut self) {
        self.session.give_up_turn();
    }

    fn describe(
        &mut self,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Answer, Error> {
        Ok(self.model.describe(&mut self.session, request, observer)?)
    }
}
