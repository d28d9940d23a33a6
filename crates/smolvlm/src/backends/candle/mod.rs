//! The network on candle's tensors, wherever candle runs.
//!
//! [`TensorBackend`] is written once for candle's own layers ([`Candle`]) and for those that the CPU's kernels take the
//! place of ([`cpu::Fused`](super::cpu::Fused)).

#[cfg(feature = "candle-cuda")]
pub(crate) mod cuda;
pub(crate) mod decoder;
pub(crate) mod encoder;
pub(crate) mod kv_cache;
pub(crate) mod linear;
#[cfg(feature = "metal")]
pub(crate) mod metal;
pub(crate) mod values;

use std::fmt::Debug;

use candle_core::{DType, Device, Error as CandleError, Module, Result as CandleResult, Tensor};
use candle_nn::{RmsNorm, VarBuilder};
use vlmnarrate_engine::{Observer, Picture};

use super::{
    Backend, BatchLimits, EncodeJob, Needs, SequenceSlot, StepInput, StepJob, StepOutput, Stepped,
    device::{OpenDevice, with_autorelease_pool},
    own,
    request_size::{Fused, RequestMemory, RequestSize},
};
use crate::{
    error::{Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::{checkpoint::Checkpoint, formats::Formats, weights::Loader},
    image,
    machine::pool::Pool,
};
use decoder::{BatchRows, Decoder};
use encoder::Encoder;
use kv_cache::{KvCache, LayerKv};
use linear::{Linear, Matrices};

/// The parts of the network that a backend has its own of, made of candle's.
pub(crate) trait Parts: Debug + Send + Sync + 'static {
    /// What a forward pass keeps from layer to layer.
    type Workspace: Default;
    type EncoderLayer: EncoderLayer<Self::Workspace>;
    type Connector: Module + Debug + Send + Sync;
    type DecoderLayer: DecoderLayer<Self::Workspace>;
    type Head: Head<Self::Workspace>;

    fn encoder_layer(layer: encoder::Layer) -> CandleResult<Self::EncoderLayer>;
    fn connector(linear: Linear) -> CandleResult<Self::Connector>;
    fn decoder_layer(layer: decoder::Layer) -> CandleResult<Self::DecoderLayer>;
    fn head(norm: RmsNorm, lm_head: Linear) -> CandleResult<Self::Head>;
}

pub(crate) trait EncoderLayer<W>: Debug + Send + Sync {
    /// From `[patches, hidden]`, which makes way, to the next state.
    fn forward(&self, x: Tensor, workspace: &mut W) -> CandleResult<Tensor>;

    /// Whether kernels of our own do all of it.
    fn is_fused(&self) -> bool {
        false
    }
}

pub(crate) trait DecoderLayer<W>: Debug + Send + Sync {
    type Kv: Debug + Send + 'static;

    /// An empty cache of `[kv_heads, capacity, head_dim]`.
    fn new_kv(
        &self,
        shape: (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> CandleResult<Self::Kv>;

    /// From `[rows, hidden]`, which makes way, to the next state. The rows are those of the sequences, one behind the
    /// other; of more than one if the layer is fused.
    fn forward(
        &self,
        x: Tensor,
        rope: &decoder::Angles,
        mask: Option<&Tensor>,
        sequences: &mut [LayerRows<'_, Self::Kv>],
        workspace: &mut W,
    ) -> CandleResult<Tensor>;

    /// Whether kernels of our own do all of it, each row by itself.
    fn is_fused(&self) -> bool {
        false
    }
}

/// Rows of one sequence in a layer.
pub(crate) struct LayerRows<'a, C> {
    pub(crate) rows: usize,
    pub(crate) kv: &'a mut C,
    /// Tokens in the cache, behind which the rows come.
    pub(crate) past: usize,
}

/// The last norm, and the layer that gives each token of the vocabulary its logit.
pub(crate) trait Head<W>: Debug + Send + Sync {
    /// From `[rows, hidden]` to logits: `[rows, vocabulary]`, f32, on the CPU.
    fn forward(&self, states: &Tensor, workspace: &mut W) -> CandleResult<Tensor>;

    /// Whether kernels of our own do all of it, each row by itself.
    fn is_fused(&self) -> bool {
        false
    }
}

/// All layers as candle has them.
#[derive(Debug)]
pub(crate) struct Candle;

impl Parts for Candle {
    type Workspace = ();
    type EncoderLayer = encoder::Layer;
    type Connector = Linear;
    type DecoderLayer = decoder::Layer;
    type Head = decoder::Head;

    fn encoder_layer(layer: encoder::Layer) -> CandleResult<encoder::Layer> {
        layer.quantized()
    }

    fn connector(linear: Linear) -> CandleResult<Linear> {
        linear.quantized()
    }

    fn decoder_layer(layer: decoder::Layer) -> CandleResult<decoder::Layer> {
        layer.quantized()
    }

    fn head(norm: RmsNorm, lm_head: Linear) -> CandleResult<decoder::Head> {
        let lm_head = lm_head.quantized()?;
        Ok(decoder::Head { norm, lm_head })
    }
}

/// The network on candle's tensors, with the layers of `P`.
#[derive(Debug)]
pub(crate) struct TensorBackend<P: Parts> {
    encoder: Encoder<P>,
    decoder: Decoder<P>,
    config: Config,
    preprocessor: PreprocessorConfig,
    dtype: DType,
    device: Device,
    pool: Pool,
}

type Kv<P> = <<P as Parts>::DecoderLayer as DecoderLayer<<P as Parts>::Workspace>>::Kv;

/// Keys, values and features of one sequence.
#[derive(Debug)]
struct Slot<C> {
    cache: KvCache<C>,
    features: Vec<Tensor>,
}

impl<C: Debug + Send + 'static> SequenceSlot for Slot<C> {
    fn len(&self) -> usize {
        self.cache.len()
    }

    fn room(&self) -> usize {
        self.cache.room()
    }

    fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
    }

    fn kept_features(&self, needs: &Needs) -> usize {
        self.features.len().min(needs.pictures)
    }

    fn capacity(&self) -> usize {
        self.cache.capacity()
    }
}

impl<P: Parts> TensorBackend<P> {
    /// Loads a checkpoint; `failed` makes an error of candle's that of a file.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        device: &OpenDevice,
        (formats, progress): (Formats, &(dyn Fn(u64) -> bool + Sync)),
        failed: impl Fn(fn(&Checkpoint, String) -> Error, candle_core::Error) -> Error,
        threads: usize,
    ) -> Result<Self> {
        let has_room = |bytes| device.check_available(bytes);
        let device = device.tensors();
        let dtype = formats.dtype;
        checkpoint.weights.check_memory(formats, has_room)?;
        let pool = Pool::for_model(threads)?;
        let config = &checkpoint.config;
        type Loaded<P> =
            Result<(Encoder<P>, Decoder<P>), (fn(&Checkpoint, String) -> Error, CandleError)>;
        // Weights are quantized by all threads.
        let loaded: Loaded<P> = pool.install(|| {
            let loader = Loader {
                weights: &checkpoint.weights,
                device: &device,
                progress,
            };
            let vb = VarBuilder::from_backend(Box::new(loader), dtype, device.clone());
            let matrices = Matrices { loader, formats };
            let encoder = Encoder::load(config, matrices, &vb);
            let encoder = encoder.map_err(|error| (Checkpoint::encoder_error as _, error))?;
            let decoder = Decoder::load(config, matrices, &vb);
            let decoder = decoder.map_err(|error| (Checkpoint::decoder_error as _, error))?;
            Ok((encoder, decoder))
        });
        let (encoder, decoder) = loaded.map_err(|(report, error)| failed(report, error))?;
        Ok(Self {
            encoder,
            decoder,
            config: config.clone(),
            preprocessor: checkpoint.preprocessor.clone(),
            dtype,
            device,
            pool,
        })
    }

    /// Normalised pixel values, `[3, height, width]`, in the type and on the device of the tensors.
    fn pixels(&self, picture: &Picture) -> Result<Tensor> {
        let shape = (3, picture.height as usize, picture.width as usize);
        let planes = image::normalize(picture, &self.preprocessor);
        Ok(Tensor::from_vec(planes, shape, &self.device)?.to_dtype(self.dtype)?)
    }

    fn own<'s>(&self, slot: &'s mut dyn SequenceSlot) -> Result<&'s mut Slot<Kv<P>>> {
        own(slot)
    }

    /// Embeddings of rows behind those that a slot holds: `[rows, hidden]`.
    fn embed(&self, slot: &Slot<Kv<P>>, input: StepInput<'_>) -> Result<Tensor> {
        match input {
            StepInput::Tokens(tokens) => Ok(self.decoder.embed(tokens)?),
            StepInput::Prompt(prompt, end) => {
                let embeds = self.decoder.embed(&prompt.ids)?;
                for (&(start, _), features) in prompt.images.iter().zip(&slot.features) {
                    embeds.slice_set(&features.contiguous()?, 0, start)?;
                }
                let held = slot.cache.len();
                Ok(embeds.narrow(0, held, end - held)?)
            }
        }
    }
}

impl<P: Parts> Backend for TensorBackend<P> {
    fn new_slot(&self) -> Box<dyn SequenceSlot> {
        Box::new(Slot::<Kv<P>> {
            cache: KvCache::default(),
            features: Vec::new(),
        })
    }

    fn is_batch_invariant(&self) -> bool {
        self.decoder.is_fused()
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits {
            // Where rows are run alone, more sequences at once would only make each of them later.
            sequences: match self.is_batch_invariant() {
                true => 8,
                false => 1,
            },
            pictures: 1,
            overlaps: self.device.is_cpu(),
            rows: 256,
            answer_rows: usize::MAX,
        }
    }

    fn install(&self, work: &mut (dyn FnMut() + Send)) {
        self.pool.install(work);
    }

    fn memory(&self, size: &RequestSize) -> Option<RequestMemory> {
        let fused = Fused {
            encoder: self.encoder.is_fused(),
            decoder: self.decoder.is_fused(),
        };
        let is_cpu = self.device.is_cpu();
        is_cpu.then(|| size.memory(&self.config, self.dtype, fused))
    }

    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()> {
        let slot = self.own(slot)?;
        slot.features.truncate(needs.pictures);
        let layers = self
            .decoder
            .new_kv(needs.capacity, self.dtype, &self.device);
        Ok(slot.cache.reserve(needs.capacity, layers)?)
    }

    fn encode(&self, batch: &mut [EncodeJob<'_>], observer: &mut Observer<'_>) -> Result<()> {
        with_autorelease_pool(|| {
            for job in batch {
                let slot = self.own(job.slot)?;
                for picture in job.pictures {
                    let pixels = self.pixels(picture.picture)?;
                    let features = self.encoder.forward(&pixels, observer)?;
                    match slot.features.get_mut(picture.index) {
                        Some(old) => *old = features,
                        None => slot.features.push(features),
                    }
                }
            }
            // A GPU has only been told so far.
            Ok(self.device.synchronize()?)
        })
    }

    fn step(&self, batch: &mut [StepJob<'_>], observer: &mut Observer<'_>) -> Result<Stepped> {
        with_autorelease_pool(|| {
            let mut embeds = Vec::with_capacity(batch.len());
            let mut sequences = Vec::with_capacity(batch.len());
            for job in batch {
                let slot = self.own(job.slot)?;
                embeds.push(self.embed(slot, job.input)?);
                sequences.push(BatchRows {
                    rows: job.input.rows(slot.cache.len()),
                    logits: job.input.logits(),
                    cache: &mut slot.cache,
                });
            }
            let output = |logits| Ok(StepOutput::Logits(logits));
            let outputs = if self.decoder.is_fused() {
                let embeds = match &embeds[..] {
                    [embeds] => embeds.clone(),
                    all => Tensor::cat(all, 0)?,
                };
                let logits = self.decoder.forward(embeds, &mut sequences, observer)?;
                logits.into_iter().map(output).collect()
            } else {
                let alone = sequences.iter_mut().zip(embeds).map(|(sequence, embeds)| {
                    let sequences = std::slice::from_mut(sequence);
                    let mut logits = self.decoder.forward(embeds, sequences, observer)?;
                    output(logits.remove(0))
                });
                alone.collect()
            };
            Ok(Stepped {
                outputs,
                times: None,
            })
        })
    }

    fn set_features(&self, slot: &mut dyn SequenceSlot, features: &[Tensor]) -> Result<()> {
        self.own(slot)?.features = features.to_vec();
        Ok(())
    }

    fn features(&self, picture: &Picture, observer: &mut Observer<'_>) -> Result<Tensor> {
        self.encoder.forward(&self.pixels(picture)?, observer)
    }

    fn vision_states(&self, picture: &Picture) -> Result<(Vec<Tensor>, Tensor)> {
        self.encoder.hidden_states(&self.pixels(picture)?)
    }

    fn connect(&self, states: &Tensor, grid: (usize, usize)) -> Option<Result<Tensor>> {
        Some(self.encoder.connect(states, grid).map_err(Error::from))
    }
}

impl DecoderLayer<()> for decoder::Layer {
    type Kv = LayerKv;

    fn new_kv(
        &self,
        shape: (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> CandleResult<LayerKv> {
        LayerKv::new(shape, dtype, device)
    }

    fn forward(
        &self,
        x: Tensor,
        rope: &decoder::Angles,
        mask: Option<&Tensor>,
        sequences: &mut [LayerRows<'_, LayerKv>],
        (): &mut (),
    ) -> CandleResult<Tensor> {
        self.forward(&x, rope, mask, sequences)
    }
}

impl EncoderLayer<()> for encoder::Layer {
    fn forward(&self, x: Tensor, (): &mut ()) -> CandleResult<Tensor> {
        self.forward(&x)
    }
}

impl Head<()> for decoder::Head {
    fn forward(&self, states: &Tensor, (): &mut ()) -> CandleResult<Tensor> {
        self.forward(states)
    }
}
