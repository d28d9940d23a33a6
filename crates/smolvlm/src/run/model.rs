//! A loaded model.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::Tensor;
use vlmnarrate_engine::{Observer, Picture};

#[cfg(feature = "cuda")]
use crate::{backends::cuda, files::weights::Loader};
use crate::{
    backends::{
        Backend,
        candle::{Candle, TensorBackend},
        cpu::Fused,
        device::OpenDevice,
    },
    error::{self, Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::{
        checkpoint::Checkpoint,
        source,
        weights::{LoadProgress, Progress},
    },
    image,
    machine::device::DeviceInfo,
    run::{caches::Caches, options::LoadOptions, scheduler::Scheduler, session::Session},
    text::prompt::{self, Prompter, Span},
};

/// A loaded model. Immutable: each caller brings a [`Session`].
#[derive(Debug)]
pub struct Model {
    /// Tells sessions of this model from those of others.
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) revision: String,
    pub(crate) config: Config,
    pub(crate) preprocessor: PreprocessorConfig,
    pub(crate) prompter: Prompter,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) scheduler: Scheduler,
    pub(crate) caches: Caches,
    /// Tokens that end a caption.
    pub(crate) stop: Vec<u32>,
    pub(crate) info: DeviceInfo,
}

impl Model {
    /// Loads a checkpoint; `progress` is called for each tensor and may end the load.
    ///
    /// # Errors
    ///
    /// Broken or missing files, no memory, no such device; [`Error::Cancelled`] after a `Break`.
    pub fn load<'a>(
        checkpoint: &'a Checkpoint,
        options: &LoadOptions,
        progress: &'a mut Progress<'a>,
    ) -> Result<Self> {
        let options = options.resolve(checkpoint)?;
        let LoadOptions {
            device, threads, ..
        } = options;
        let formats = options.formats(checkpoint)?;
        let device = OpenDevice::open(device)?;
        let template = checkpoint.chat_template.clone();
        let prompter = Prompter::with_template(template, checkpoint.tokenizer()?)
            .map_err(|reason| checkpoint.file_error(source::TOKENIZER, reason))?;
        let config = checkpoint.config.clone();
        if let (Some(expected), Some(found)) = (config.image_token_id, prompter.token_id("<image>"))
            && expected != found
        {
            return Err(checkpoint.file_error(
                source::TOKENIZER,
                format!("`<image>` is {found}, config.json says {expected}"),
            ));
        }
        prompter
            .check_vocabulary(config.text_config.vocab_size)
            .map_err(|reason| checkpoint.file_error(source::TOKENIZER, reason))?;
        let stop: Vec<u32> = prompter
            .token_id(prompt::END_OF_UTTERANCE)
            .into_iter()
            .chain(checkpoint.eos_token_ids.iter().copied())
            .collect();

        let progress = Mutex::new(LoadProgress::new(&checkpoint.weights, progress));
        let add = |bytes| {
            progress
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .add(bytes)
        };
        let failed = |report: fn(&Checkpoint, String) -> Error, error| match progress
            .lock()
            .is_ok_and(|p| p.cancelled)
        {
            true => Error::Cancelled,
            false => report(checkpoint, error::plain(&error)),
        };
        let info = device.info();
        let backend: Arc<dyn Backend> = match device {
            #[cfg(feature = "cuda")]
            OpenDevice::Cuda(gpu) => {
                let loader = Loader {
                    weights: &checkpoint.weights,
                    device: &Device::Cpu,
                    progress: &add,
                };
                let dtype = options.dtype;
                Arc::new(cuda::Network::load(
                    *gpu, checkpoint, dtype, loader, &stop, failed,
                )?)
            }
            device => {
                let has_quantized = options.has_quantized(checkpoint);
                let formats = (formats, &add as &(dyn Fn(u64) -> bool + Sync));
                match matches!(device, OpenDevice::Cpu) && has_quantized {
                    true => Arc::new(TensorBackend::<Fused>::load(
                        checkpoint, &device, formats, failed, threads,
                    )?),
                    false => Arc::new(TensorBackend::<Candle>::load(
                        checkpoint, &device, formats, failed, threads,
                    )?),
                }
            }
        };
        static LOADED: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            id: LOADED.fetch_add(1, Ordering::Relaxed),
            name: checkpoint.name().to_owned(),
            revision: checkpoint.revision().to_owned(),
            preprocessor: checkpoint.preprocessor.clone(),
            config,
            prompter,
            scheduler: Scheduler::new(backend.clone())?,
            caches: Caches::default(),
            backend,
            stop,
            info,
        })
    }

    /// Name of the model, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Commit or branch of the model on the hub; empty for a model that isn't from there.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The device that the model runs on.
    pub fn device(&self) -> &DeviceInfo {
        &self.info
    }

    /// An empty session, for one caller.
    pub fn session(&self) -> Session {
        Session::new(self.id, self.caches.new_place())
    }

    /// What `config.json` says.
    #[doc(hidden)]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What `preprocessor_config.json` says.
    #[doc(hidden)]
    pub fn preprocessor(&self) -> &PreprocessorConfig {
        &self.preprocessor
    }

    /// From messages to tokens, and back.
    #[doc(hidden)]
    pub fn prompter(&self) -> &Prompter {
        &self.prompter
    }

    /// Features of a square picture, which stand in its place among the decoder's embeddings: `[tokens, text hidden size]`.
    ///
    /// # Errors
    ///
    /// [`Error::Picture`] for one that the encoder can't take, [`Error::Cancelled`] after a `Break`.
    #[doc(hidden)]
    pub fn features(&self, picture: &Picture, observer: &mut Observer<'_>) -> Result<Tensor> {
        self.check_picture(picture)?;
        self.backend.features(picture, observer)
    }

    /// States after the embedding, after each layer of the encoder and after its last norm, as far as the backend has
    /// them in memory: what parity tests hold against the reference stage by stage.
    #[doc(hidden)]
    pub fn vision_states(&self, picture: &Picture) -> Result<Vec<Tensor>> {
        self.check_picture(picture)?;
        Ok(self.backend.vision_states(picture)?.0)
    }

    /// The connector alone, from `[patches, hidden]` of a grid of rows and columns to features; `None` where the backend
    /// can't run it alone.
    #[doc(hidden)]
    pub fn connect(&self, states: &Tensor, grid: (usize, usize)) -> Option<Result<Tensor>> {
        self.backend.connect(states, grid)
    }

    /// Checks that the encoder can run on this picture as it is.
    pub(crate) fn check_picture(&self, picture: &Picture) -> Result<()> {
        image::check(picture)?;
        let (width, height) = (picture.width, picture.height);
        let least = self.config.vision_config.patch_size;
        if width == height
            && width as usize >= least
            && self.config.check_side(width as usize).is_ok()
        {
            return Ok(());
        }
        Err(Error::Picture(format!(
            "{width} × {height} pixels; the encoder takes squares, of at least {least} and of no more than it can attend to"
        )))
    }

    /// How a square picture of this size stands in the prompt, behind `grid` tiles of the same size.
    #[doc(hidden)]
    pub fn span(&self, picture: &Picture, grid: (usize, usize)) -> Span {
        self.grid_span(grid, picture.width)
    }
}
