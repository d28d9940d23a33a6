//! A loaded model.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::Tensor;
use vlmnarrate_engine::{Observer, Picture};

#[cfg(feature = "cuda")]
use crate::{backends, files::weights::Loader};
use crate::{
    backends::{
        candle::encoder::Vision,
        network::{Network, Tensors},
    },
    error::{self, Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::{
        checkpoint::Checkpoint,
        source,
        weights::{LoadProgress, Progress},
    },
    image,
    run::{
        device::{Chosen, DeviceInfo},
        options::LoadOptions,
        pool::Pool,
        session::Session,
    },
    text::prompt::{self, Prompter, Span},
};

/// A loaded model. Immutable: callers that share it bring a [`Session`] each.
#[derive(Debug)]
pub struct Model {
    /// Tells its sessions from those of others.
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) revision: String,
    pub(crate) config: Config,
    pub(crate) preprocessor: PreprocessorConfig,
    pub(crate) prompter: Prompter,
    pub(crate) network: Network,
    /// Tokens that end a caption.
    pub(crate) stop: Vec<u32>,
    pub(crate) info: DeviceInfo,
    pub(crate) pool: Pool,
}

impl Model {
    /// Loads what `checkpoint` found; `progress` hears of every tensor and may end the load.
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
        let chosen = Chosen::open(device)?;
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
            .chain(checkpoint.eos.iter().copied())
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
        let info = chosen.info();
        let network = match chosen {
            #[cfg(feature = "cuda")]
            Chosen::Cuda(gpu) => {
                let loader = Loader {
                    weights: &checkpoint.weights,
                    device: &Device::Cpu,
                    progress: &add,
                };
                backends::cuda::Network::load(
                    *gpu,
                    checkpoint,
                    options.dtype,
                    loader,
                    &stop,
                    failed,
                )
                .map(Network::Cuda)
            }
            chosen => Tensors::load(checkpoint, &chosen, (formats, &add), failed)
                .map(|t| Network::Tensors(t.into())),
        }?;
        let pool = Pool::new("vlmnarrate-cpu", threads).map_err(|e| Error::Setting {
            property: "threads",
            reason: format!("{e}; lower it"),
        })?;
        static LOADED: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            id: LOADED.fetch_add(1, Ordering::Relaxed),
            name: checkpoint.name().to_owned(),
            revision: checkpoint.revision().to_owned(),
            preprocessor: checkpoint.preprocessor.clone(),
            config,
            prompter,
            network,
            stop,
            info,
            pool,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// What it runs on.
    pub fn device(&self) -> &DeviceInfo {
        &self.info
    }

    /// A fresh session, empty but for its shape.
    pub fn session(&self) -> Session {
        Session::new(self.id, self.network.cache())
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn preprocessor(&self) -> &PreprocessorConfig {
        &self.preprocessor
    }

    pub fn prompter(&self) -> &Prompter {
        &self.prompter
    }

    /// The encoder in candle's tensors; none where a GPU's engine takes its place.
    pub fn vision(&self) -> Option<&Vision> {
        match &self.network {
            Network::Tensors(tensors) => Some(&tensors.vision),
            #[cfg(feature = "cuda")]
            Network::Cuda(_) => None,
        }
    }

    /// What stands in a square picture's place among the decoder's embeddings: `[tokens, text hidden size]`.
    pub fn features(&self, picture: &Picture, observer: &mut Observer<'_>) -> Result<Tensor> {
        self.check_picture(picture)?;
        match &self.network {
            Network::Tensors(tensors) => tensors.vision.forward(&self.pixels(picture)?, observer),
            #[cfg(feature = "cuda")]
            Network::Cuda(network) => Ok(self.states_cuda(network, picture)?.1),
        }
    }

    /// States after the embedding, after each layer of the encoder and after its last norm, as far as its engine
    /// has them in memory: what parity tests hold against the reference stage by stage.
    pub fn vision_states(&self, picture: &Picture) -> Result<Vec<Tensor>> {
        self.check_picture(picture)?;
        match &self.network {
            Network::Tensors(tensors) => tensors.vision.hidden_states(&self.pixels(picture)?),
            #[cfg(feature = "cuda")]
            Network::Cuda(network) => Ok(self.states_cuda(network, picture)?.0),
        }
    }

    /// That the encoder can run on this picture as it is.
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

    /// Normalised pixel values, `[3, height, width]`, in the type and on the device of the tensors.
    pub fn pixels(&self, picture: &Picture) -> Result<Tensor> {
        image::check(picture)?;
        let shape = (3, picture.height as usize, picture.width as usize);
        let planes = image::normalise(picture, &self.preprocessor);
        match &self.network {
            Network::Tensors(tensors) => {
                Ok(Tensor::from_vec(planes, shape, &tensors.device)?.to_dtype(tensors.dtype)?)
            }
            #[cfg(feature = "cuda")]
            Network::Cuda(_) => Ok(Tensor::from_vec(planes, shape, &Device::Cpu)?),
        }
    }

    /// How a square picture of this size stands in the prompt, behind `grid` tiles of the same size.
    pub fn span(&self, picture: &Picture, grid: (usize, usize)) -> Span {
        Span {
            grid,
            tokens: self.config.tokens_per_picture(picture.width as usize),
        }
    }
}
