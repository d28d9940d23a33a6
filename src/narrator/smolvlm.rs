//! SmolVLM as an [`Engine`].

use std::{
    ops::ControlFlow,
    sync::{Arc, LazyLock},
};

#[cfg(feature = "hub")]
use super::engine::{DownloadWatch, Remote};
use super::{
    engine::{
        Checkpoint, Engine, EngineInfo, EngineLoader, Error, Found, LoadWatch, ModelSettings, Watch,
    },
    registry::Registry,
};
use crate::smolvlm::{
    self, Description, Fingerprint, LoadOptions, Model, Request, Session, Source,
};

/// Elements with the same model, loaded in the same way, share its weights and its threads.
static LOADED: LazyLock<Registry<(Fingerprint, LoadOptions), Model>> = LazyLock::new(Registry::new);

/// Loads the SmolVLM family from a folder, GGUF files or the hub, or the embedded demo model.
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
        options.device.check()?;
        match source {
            #[cfg(feature = "hub")]
            Source::Hub(repository) => Ok(Found::Remote(Arc::new(OnHub {
                repository,
                options,
            }))),
            source => Ok(Found::Here(open(&source, options)?)),
        }
    }
}

fn open(source: &Source, options: LoadOptions) -> Result<Arc<dyn Checkpoint>, Error> {
    let checkpoint = smolvlm::Checkpoint::open(source)?;
    Ok(Arc::new(SmolVlmCheckpoint {
        checkpoint,
        options,
    }))
}

#[cfg(feature = "hub")]
struct OnHub {
    repository: smolvlm::Repository,
    options: LoadOptions,
}

#[cfg(feature = "hub")]
impl Remote for OnHub {
    fn name(&self) -> &str {
        self.repository.id()
    }

    fn download(&self, watch: &mut DownloadWatch<'_>) -> Result<Arc<dyn Checkpoint>, Error> {
        let source = self.repository.download(watch)?;
        open(&source, self.options)
    }
}

struct SmolVlmCheckpoint {
    checkpoint: smolvlm::Checkpoint,
    options: LoadOptions,
}

impl Checkpoint for SmolVlmCheckpoint {
    fn name(&self) -> &str {
        self.checkpoint.name()
    }

    fn image_size(&self) -> u32 {
        self.checkpoint.image_size()
    }

    fn check_image_size(&self, side: u32) -> Result<(), Error> {
        Ok(self.checkpoint.check_image_size(side)?)
    }

    fn is_demo(&self) -> bool {
        self.checkpoint.is_demo()
    }

    fn load(&self, watch: &mut LoadWatch<'_>) -> Result<Box<dyn Engine>, Error> {
        let options = self.options.resolve(&self.checkpoint)?;
        let key = (self.checkpoint.fingerprint().clone(), options);
        let waiting = |watch: &mut LoadWatch<'_>| match watch(0, 1) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(smolvlm::Error::Cancelled),
        };
        let load = |watch: &mut LoadWatch<'_>| {
            let mut progress = |done, total| watch(done, total);
            Model::load(&self.checkpoint, &options, &mut progress)
        };
        let model = LOADED.get(key, watch, waiting, load)?;
        let session = model.session();
        Ok(Box::new(SmolVlm { model, session }))
    }
}

struct SmolVlm {
    model: Arc<Model>,
    session: Session,
}

impl Engine for SmolVlm {
    fn info(&self) -> EngineInfo {
        let device = self.model.device();
        EngineInfo {
            model: self.model.name().to_owned(),
            revision: self.model.revision().to_owned(),
            device: device.kind.to_owned(),
            device_name: device.name.clone(),
            device_memory: device.memory,
        }
    }

    fn check(&self, request: &Request<'_>) -> Result<(), Error> {
        Ok(self.model.check(request)?)
    }

    fn describe(
        &mut self,
        request: &Request<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Description, Error> {
        Ok(self.model.describe(&mut self.session, request, watch)?)
    }
}
