//! SmolVLM as an [`Engine`].

use std::sync::Arc;

use super::engine::{
    Checkpoint, Engine, EngineInfo, EngineLoader, Error, LoadWatch, ModelSettings, Watch,
};
use crate::smolvlm::{self, Description, LoadOptions, Model, Request, Session, Source};

/// Loads the SmolVLM family from a folder, or the embedded demo model.
#[derive(Clone, Copy, Debug, Default)]
pub struct SmolVlmLoader;

impl EngineLoader for SmolVlmLoader {
    fn open(&self, settings: &ModelSettings) -> Result<Arc<dyn Checkpoint>, Error> {
        let source = Source::parse(settings.model.as_deref())?;
        Ok(Arc::new(SmolVlmCheckpoint {
            checkpoint: smolvlm::Checkpoint::open(&source)?,
            options: LoadOptions {
                dtype: settings.dtype,
                threads: settings.threads,
            },
        }))
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
        let mut progress = |done, total| watch(done, total);
        let model = Model::load(&self.checkpoint, &self.options, &mut progress)?;
        let session = model.session();
        Ok(Box::new(SmolVlm { model, session }))
    }
}

struct SmolVlm {
    model: Model,
    session: Session,
}

impl Engine for SmolVlm {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            model: self.model.name().to_owned(),
            revision: self.model.revision().to_owned(),
            device: self.model.device().to_owned(),
        }
    }

    fn describe(
        &mut self,
        request: &Request<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Description, Error> {
        Ok(self.model.describe(&mut self.session, request, watch)?)
    }
}
