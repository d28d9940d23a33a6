//! The model on NVIDIA's GPUs, by kernels of our own.
//!
//! candle's operations would do, at several hundred launches a token and a copy to the host for each: a caption of
//! the smallest model would take as long on the fastest GPU as on two cores of a CPU. Here a caption is a graph for
//! the encoder, one for the prompt, and a single launch for all of its tokens.
//!
//!
//! A step generates up to as many tokens as its caller wants, for several sequences, in one launch.

mod backend;
mod decoder;
mod encoder;
mod engine;
mod scratch;
mod slot;
mod weights;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use crate::{
    error::{Error, Result},
    families::idefics3::{config::Config, positions::inverse_frequencies},
    files::{checkpoint::Checkpoint, weights::Loader},
};
use decoder::Decoder;
use encoder::Encoder;
use engine::Engine;
use vlmnarrate_cuda::{self as cuda, Gpu, Kernels, MAX_ROWS, MappedWords};
use vlmnarrate_engine::{DType, Remedy};

pub(crate) use slot::Slot;

/// Sequences that are decoded at once.
const MAX_SEQUENCES: usize = 8;
/// A model on the GPU.
pub(crate) struct Network {
    gpu: Arc<Gpu>,
    engine: Mutex<Engine>,
    kv_bytes_per_token: usize,
    config: Config,
    vocabulary: usize,
    max_rows: usize,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").finish_non_exhaustive()
    }
}

impl From<cuda::Error> for Error {
    fn from(error: cuda::Error) -> Self {
        let advice = match &error {
            cuda::Error::NoDriver => "; install it",
            cuda::Error::OldDriver { .. } => {
                "; update the driver, or build with an older CUDA toolkit"
            }
            cuda::Error::NoDevice { .. } => "; see what nvidia-smi says",
            cuda::Error::OldDevice { .. } => "",
            cuda::Error::NoKernels => "; build it with nvcc",
            cuda::Error::OutOfMemory { .. } => "; close what else uses it, or take a smaller model",
            cuda::Error::Failed(_) => {
                return Self::Device(format!(
                    "{error}; what nvidia-smi and the kernel's log say may tell why. A new process may use it again"
                ));
            }
        };
        Self::NoDevice {
            reason: format!("{error}{advice}"),
            remedy: Remedy::Cpu,
        }
    }
}

impl Network {
    /// Loads a checkpoint's weights, as bf16 unless another type is named.
    pub(crate) fn load(
        gpu: Gpu,
        checkpoint: &Checkpoint,
        dtype: DType,
        loader: Loader<'_>,
        stops: &[u32],
        failed: impl Fn(fn(&Checkpoint, String) -> Error, candle_core::Error) -> Error,
    ) -> Result<Self> {
        let config = &checkpoint.config;
        let c = &config.text_config;
        fits(checkpoint).map_err(|reason| Error::NoDevice {
            reason: format!("the GPU's kernels don't know {reason}"),
            remedy: Remedy::Cpu,
        })?;
        let dtype = match dtype {
            DType::Auto | DType::Bf16 => cuda::DType::Bf16,
            DType::F16 => cuda::DType::F16,
            DType::F32 => cuda::DType::F32,
        };
        let kernels = Kernels::new(&gpu, dtype)?;
        gpu.check_free_memory(checkpoint.weights.parameter_count() * dtype.bytes() as u64)?;
        let gpu_error = Mutex::default();
        let from = weights::Uploader::new(&gpu, dtype, loader, &gpu_error);
        let why = |report, error| match gpu_error.lock().unwrap_or_else(|e| e.into_inner()).take() {
            Some(error) => cuda::Error::into(error),
            None => failed(report, error),
        };
        let encoder = Encoder::load(config, &checkpoint.preprocessor, &from)
            .map_err(|error| why(Checkpoint::encoder_error, error))?;
        let decoder = Decoder::load(config, &inverse_frequencies(c), &from)
            .map_err(|error| why(Checkpoint::decoder_error, error))?;
        let plan = decoder.plan(&gpu, &kernels)?;
        let mut is_stop = vec![0u32; c.vocab_size.div_ceil(32)];
        for stop in stops {
            // All were looked at when the model was opened.
            if let Some(word) = is_stop.get_mut(*stop as usize / 32) {
                *word |= 1 << (stop % 32);
            }
        }
        let mut stop_tokens = gpu.memory(is_stop.len() * size_of::<u32>())?;
        gpu.write(&is_stop, &mut stop_tokens, 0)?;
        let gpu = Arc::new(gpu);
        let kv_bytes_per_token = decoder.kv_bytes_per_token(dtype.bytes());
        let max_rows = plan.max_rows();
        let engine = Engine::new(
            gpu.clone(),
            kernels,
            encoder,
            decoder,
            plan,
            stop_tokens,
            c.max_position_embeddings,
        )?;
        Ok(Self {
            gpu,
            engine: Mutex::new(engine),
            kv_bytes_per_token,
            config: config.clone(),
            vocabulary: c.vocab_size,
            max_rows,
        })
    }

    /// Tokens that can be run at once for their logits.
    pub(crate) fn max_rows(&self) -> usize {
        self.max_rows.min(MAX_ROWS)
    }

    pub(crate) fn slot(&self) -> Slot {
        Slot::new(
            self.gpu.clone(),
            self.kv_bytes_per_token,
            self.config.text_config.hidden_size,
        )
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Whether the kernels know all that a model has; else what they don't.
pub(crate) fn fits(checkpoint: &Checkpoint) -> Result<(), String> {
    let (t, v) = (
        &checkpoint.config.text_config,
        &checkpoint.config.vision_config,
    );
    if t.attention_bias || t.mlp_bias {
        return Err("biases in the decoder".into());
    }
    if !matches!(t.head_dim(), 8 | 16 | 32 | 64 | 128) {
        return Err(format!("heads of {} values in the decoder", t.head_dim()));
    }
    if t.hidden_size > 2048 {
        return Err(format!("states of {} values in the decoder", t.hidden_size));
    }
    let head = v.hidden_size / v.num_attention_heads;
    if head > 128 || !head.is_multiple_of(8) {
        return Err(format!("heads of {head} values in the encoder"));
    }
    let sides = [
        t.hidden_size,
        t.intermediate_size,
        v.hidden_size,
        v.intermediate_size,
    ];
    match sides.iter().find(|side| !side.is_multiple_of(8)) {
        Some(side) => Err(format!("rows of {side} values, which is no multiple of 8")),
        None => Ok(()),
    }
}

/// Places of the words that host and device share.
const CANCELLED: usize = 0;
const COUNT: usize = 1;
const GENERATED: usize = 2;
/// The bit of the count's word from which on the reason of the end stands.
const END: u32 = 24;

/// Adds tokens that have come since. Returns whether there were any.
fn take_new(words: &MappedWords, generated: &mut Vec<u32>) -> bool {
    let before = generated.len();
    let count = (words.get(COUNT) & ((1 << END) - 1)) as usize;
    generated.extend((before..count).map(|i| words.get(GENERATED + i) as u32));
    generated.len() > before
}
