//! SmolVLM and SmolVLM2 (256M, 500M, 2.2B) in candle.
//!
//! One code path for the whole family, driven by the checkpoint's `config.json`: a SigLIP vision encoder
//! ([`Vision`]), pixel shuffle and a projection into the embeddings of a Llama decoder, greedy or sampled
//! decoding into a key-value cache that is written in place. Quantized layers run on kernels of our own on the CPU,
//! the others on candle. The judge is the reference implementation,
//! transformers' [idefics3](https://github.com/huggingface/transformers/tree/main/src/transformers/models/idefics3)
//! and [smolvlm](https://github.com/huggingface/transformers/tree/main/src/transformers/models/smolvlm): the
//! tests in `tests/parity.rs` hold every stage against tensors it wrote.
//!
//! Nothing in here knows of GStreamer.
//!
//! ```
//! use std::ops::ControlFlow;
//! use gstvlmnarrate::smolvlm::{Checkpoint, LoadOptions, Model, Picture, Request, Sampling, Source};
//!
//! # fn main() -> Result<(), gstvlmnarrate::smolvlm::Error> {
//! let checkpoint = Checkpoint::open(&Source::Demo)?;
//! let side = checkpoint.image_size();
//! let model = Model::load(&checkpoint, &LoadOptions::default(), &mut |_, _| ControlFlow::Continue(()))?;
//! let red = [255, 0, 0].repeat((side * side) as usize);
//! let request = Request {
//!     pictures: &[&Picture::new(side, side, red).expect("a whole picture")],
//!     clip: None,
//!     splitting: false,
//!     system: None,
//!     prompt: "Describe this frame in one sentence.",
//!     max_tokens: 20,
//!     sampling: Sampling::default(),
//!     stop_strings: &[],
//!     choices: &[],
//! };
//! let caption = model.describe(&mut model.session(), &request, &mut |_| ControlFlow::Continue(()))?;
//! assert!(caption.text.contains("red"));
//! # Ok(())
//! # }
//! ```

mod chat_template;
mod checkpoint;
mod choices;
mod config;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod decoder;
mod decoding;
mod device;
mod error;
mod fingerprint;
mod formats;
mod generate;
mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod image;
mod kv_cache;
mod linear;
mod memory;
mod memory_limits;
#[cfg(feature = "metal")]
mod metal;
mod network;
mod packed;
mod prompt;
mod request;
mod sampling;
mod session;
mod size;
mod source;
mod tokenizer;
mod vision;
mod weights;

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{Tensor, quantized::GgmlDType};

pub use chat_template::{ChatTemplate, SpecialTokens};
pub use checkpoint::Checkpoint;
pub use config::{Config, LongestEdge, PreprocessorConfig, TextConfig, VisionConfig};
pub use device::{DeviceInfo, DeviceKind};
pub use error::{Error, ErrorKind, Result};
pub use fingerprint::Fingerprint;
pub use generate::{Description, Event, Timings};
#[cfg(feature = "hub")]
pub use hub::Repository;
pub use image::{Picture, Processed, Processor};
pub use prompt::{Content, Message, Prompt, Prompter, Role, Span, question, video};
pub use request::{Clip, Request};
pub use sampling::Sampling;
pub use session::Session;
pub use source::{Source, Transfer};
pub use vision::Vision;
pub use weights::Progress;

use decoder::Decoder;
use device::Chosen;
use formats::Formats;
use kv_cache::KvCache;
use linear::Matrices;
use network::{Network, Tensors};
use prompt::check_token;
use weights::{LoadProgress, Loader};

use crate::threads::Pool;

/// Told of progress at every vision layer, decoder layer and token; `Break` ends the work there with
/// [`Error::Cancelled`].
pub type Observer<'a> = dyn FnMut(Event<'_>) -> std::ops::ControlFlow<()> + Send + 'a;

/// One layer is done: may we go on?
fn layer_done(observer: &mut Observer<'_>) -> Result<()> {
    if observer(Event::Layer).is_break() {
        return Err(Error::Cancelled);
    }
    Ok(())
}

/// The type that weights are held and products are computed in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// The fastest on the device: f32 on the CPU, where candle widens anything smaller on each product, and
    /// beside blocks; bf16 on a GPU.
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

impl DType {
    /// `None` for automatic.
    fn named(self) -> Option<candle_core::DType> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(candle_core::DType::F32),
            Self::Bf16 => Some(candle_core::DType::BF16),
            Self::F16 => Some(candle_core::DType::F16),
        }
    }
}

/// Number format that the weights of linear layers, which are nearly all there are, are quantized to as they
/// are loaded. Those that a GGUF file has quantized stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// The fastest on the device: `Q8_0` on the CPU, at half the time and a third of the memory of f32; none on
    /// a GPU, and where a [`DType`] is named.
    Auto,
    /// As [`DType`] says.
    #[default]
    None,
    /// Blocks of 32 weights with a common scale, 8 bits a weight.
    Q8_0,
    /// 4 bits a weight in the decoder's layers, which take time by their size; encoder and head as in `Q8_0`:
    /// the encoder takes time by its arithmetic, and the head chooses the words.
    Q4_0,
}

impl Quantization {
    fn resolve(self, device: DeviceKind, dtype: DType) -> Self {
        match self {
            // Its kernels take dense weights alone.
            _ if device == DeviceKind::Cuda => Self::None,
            Self::Auto if (device, dtype) == (DeviceKind::Cpu, DType::Auto) => Self::Q8_0,
            Self::Auto => Self::None,
            named => named,
        }
    }

    fn vision(self) -> Option<GgmlDType> {
        match self {
            Self::Auto | Self::None => None,
            Self::Q8_0 | Self::Q4_0 => Some(GgmlDType::Q8_0),
        }
    }

    fn decoder(self) -> Option<GgmlDType> {
        match self {
            Self::Auto | Self::None => None,
            Self::Q8_0 => Some(GgmlDType::Q8_0),
            Self::Q4_0 => Some(GgmlDType::Q4_0),
        }
    }

    fn head(self) -> Option<GgmlDType> {
        self.vision()
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct LoadOptions {
    pub device: DeviceKind,
    /// With quantized weights it is f32: products are made in it.
    pub dtype: DType,
    pub quantization: Quantization,
    /// CPU threads; 0 takes all cores. Where nothing is quantized, candle runs element-wise operations in a pool
    /// of its own, for the whole process, whose size `CANDLE_NUM_THREADS` sets.
    pub threads: usize,
}

impl LoadOptions {
    /// With what is left to the machine chosen for a model, so that options that come to the same are the same.
    pub fn resolve(self, checkpoint: &Checkpoint) -> Result<Self> {
        self.device.check()?;
        let device = self.device.resolve(checkpoint);
        Ok(Self {
            device,
            quantization: self.quantization.resolve(device, self.dtype),
            ..self
        })
    }

    /// Of options that [`resolve`](Self::resolve) gave: what the weights are held in.
    fn formats(&self, checkpoint: &Checkpoint) -> Result<Formats> {
        let has_blocks = self.device != DeviceKind::Cuda
            && (self.quantization != Quantization::None || checkpoint.weights.has_blocks());
        if has_blocks && !matches!(self.dtype, DType::Auto | DType::F32) {
            return Err(Error::Setting {
                property: "dtype",
                reason: "products with quantized weights are made in f32; leave it at auto".into(),
            });
        }
        let dtype = match self.dtype.named() {
            Some(dtype) => dtype,
            None if has_blocks => candle_core::DType::F32,
            None => self.device.dtype(),
        };
        Ok(Formats {
            dtype,
            quantization: self.quantization,
        })
    }

    /// Bytes that the weights of a model take in memory when it is loaded with these options.
    pub fn memory(self, checkpoint: &Checkpoint) -> Result<u64> {
        let options = self.resolve(checkpoint)?;
        let formats = options.formats(checkpoint)?;
        let weights = &checkpoint.weights;
        Ok(match options.device {
            // Its kernels take no blocks.
            DeviceKind::Cuda => weights.values() * formats.dtype.size_in_bytes() as u64,
            device => weights.size(formats, device == DeviceKind::Cpu),
        })
    }
}

/// A loaded model. Immutable: callers that share it bring a [`Session`] each.
#[derive(Debug)]
pub struct Model {
    /// Tells its sessions from those of others.
    id: u64,
    name: String,
    revision: String,
    config: Config,
    preprocessor: PreprocessorConfig,
    prompter: Prompter,
    network: Network,
    /// Tokens that end a caption.
    stop: Vec<u32>,
    info: DeviceInfo,
    pool: Pool,
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
                cuda::Network::load(*gpu, checkpoint, options.dtype, loader, &stop, failed)
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
    fn check_picture(&self, picture: &Picture) -> Result<()> {
        picture.check()?;
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
        picture.check()?;
        let shape = (3, picture.height as usize, picture.width as usize);
        let planes = picture.normalise(&self.preprocessor);
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
