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

mod checkpoint;
mod choices;
mod config;
mod decoder;
mod error;
mod fingerprint;
mod generate;
mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod image;
mod kv_cache;
mod linear;
mod memory;
mod packed;
mod prompt;
mod source;
mod tokenizer;
mod vision;
mod weights;

use std::sync::Mutex;

use candle_core::{Device, Tensor, quantized::GgmlDType};
use candle_nn::VarBuilder;

pub use checkpoint::Checkpoint;
pub use config::{Config, LongestEdge, PreprocessorConfig, TextConfig, VisionConfig};
pub use error::{Error, ErrorKind, Result};
pub use fingerprint::Fingerprint;
pub use generate::{Clip, Description, Event, Request, Sampling, Session, Timings};
#[cfg(feature = "hub")]
pub use hub::Repository;
pub use image::{Picture, Processed, Processor};
pub use prompt::{Content, Message, Prompt, Prompter, Role, Span, question, video};
pub use source::{Source, Transfer};
pub use vision::Vision;
pub use weights::Progress;

use decoder::Decoder;
use kv_cache::KvCache;
use linear::Matrices;
use weights::{LoadProgress, Loader};

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
    /// The fastest on the device: f32 on the CPU, where candle widens anything smaller on each product.
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

impl DType {
    fn resolve(self) -> candle_core::DType {
        match self {
            Self::Auto | Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
            Self::F16 => candle_core::DType::F16,
        }
    }
}

/// Number format that the weights of linear layers, which are nearly all there are, are quantized to as they
/// are loaded. Those that a GGUF file has quantized stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Quantization {
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
    fn vision(self) -> Option<GgmlDType> {
        match self {
            Self::None => None,
            Self::Q8_0 | Self::Q4_0 => Some(GgmlDType::Q8_0),
        }
    }

    fn decoder(self) -> Option<GgmlDType> {
        match self {
            Self::None => None,
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
    /// With quantized weights it is f32: products are made in it.
    pub dtype: DType,
    pub quantization: Quantization,
    /// CPU threads; 0 takes all cores. Where nothing is quantized, candle runs element-wise operations in a pool
    /// of its own, for the whole process, whose size `CANDLE_NUM_THREADS` sets.
    pub threads: usize,
}

/// A loaded model. Immutable: callers that share it bring a [`Session`] each.
#[derive(Debug)]
pub struct Model {
    name: String,
    revision: String,
    config: Config,
    preprocessor: PreprocessorConfig,
    prompter: Prompter,
    vision: Vision,
    decoder: Decoder,
    /// Tokens that end a caption.
    stop: Vec<u32>,
    dtype: candle_core::DType,
    device: Device,
    pool: rayon::ThreadPool,
}

impl Model {
    /// Loads what `checkpoint` found; `progress` hears of every tensor and may end the load.
    pub fn load<'a>(
        checkpoint: &'a Checkpoint,
        options: &LoadOptions,
        progress: &'a mut Progress<'a>,
    ) -> Result<Self> {
        let device = Device::Cpu;
        let dtype = options.dtype.resolve();
        let quantization = options.quantization;
        let has_blocks = quantization != Quantization::None || checkpoint.weights.has_blocks();
        if has_blocks && dtype != candle_core::DType::F32 {
            return Err(Error::Setting {
                property: "dtype",
                reason: "products with quantized weights are made in f32; leave it at auto".into(),
            });
        }
        let prompter = Prompter::new(checkpoint.chat_template.clone(), checkpoint.tokenizer()?)
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
        let stop = prompter
            .token_id(prompt::END_OF_UTTERANCE)
            .into_iter()
            .chain(checkpoint.eos.iter().copied())
            .collect();

        let blocks = quantization.decoder();
        checkpoint.weights.check_memory(dtype, blocks)?;

        let progress = Mutex::new(LoadProgress::new(progress));
        let loader = Loader {
            weights: &checkpoint.weights,
            progress: &progress,
        };
        let vb = VarBuilder::from_backend(Box::new(loader), dtype, device.clone());
        let matrices = |blocks| Matrices { loader, blocks };
        let failed = |report: fn(&Checkpoint, String) -> Error| {
            let progress = &progress;
            move |e| match progress.lock().is_ok_and(|p| p.cancelled) {
                true => Error::Cancelled,
                false => report(checkpoint, error::plain(&e)),
            }
        };
        let vision = Vision::load(&config, matrices(quantization.vision()), vb.pp("model"))
            .map_err(failed(Checkpoint::encoder_error))?;
        let (layers, head) = (quantization.decoder(), quantization.head());
        let decoder = Decoder::load(&config, matrices(layers), matrices(head), vb)
            .map_err(failed(Checkpoint::decoder_error))?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("vlmnarrate-cpu{i}"))
            .build()
            .map_err(|e| Error::Setting {
                property: "threads",
                reason: format!("{e}; lower it"),
            })?;
        Ok(Self {
            name: checkpoint.name().to_owned(),
            revision: checkpoint.revision().to_owned(),
            preprocessor: checkpoint.preprocessor.clone(),
            config,
            prompter,
            vision,
            decoder,
            stop,
            dtype,
            device,
            pool,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Where it runs: `cpu`.
    pub fn device(&self) -> &str {
        "cpu"
    }

    /// A fresh session, empty but for its shape.
    pub fn session(&self) -> Session {
        Session {
            cache: self.decoder.cache(),
            last: None,
        }
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

    pub fn vision(&self) -> &Vision {
        &self.vision
    }

    /// Normalised pixel values, `[3, height, width]`, in the model's type.
    pub fn pixels(&self, picture: &Picture) -> Result<Tensor> {
        let shape = (3, picture.height as usize, picture.width as usize);
        let planes = picture.normalise(&self.preprocessor);
        Ok(Tensor::from_vec(planes, shape, &self.device)?.to_dtype(self.dtype)?)
    }

    /// How a square picture of this size stands in the prompt, behind `grid` tiles of the same size.
    pub fn span(&self, picture: &Picture, grid: (usize, usize)) -> Span {
        Span {
            grid,
            tokens: self.config.tokens_per_picture(picture.width as usize),
        }
    }
}
