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

use candle_core::{DType, Device, Module, Result as CandleResult, Tensor};
use candle_nn::{RmsNorm, VarBuilder};
use vlmnarrate_engine::{Observer, Picture};

use super::{
    Backend, ImageInput, Needs, SequenceSlot,
    device::{OpenDevice, with_autorelease_pool},
    own,
    request_size::RequestSize,
};
use crate::{
    error::{Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::{checkpoint::Checkpoint, formats::Formats, weights::Loader},
    image,
    machine::pool::Pool,
    text::prompt::Prompt,
};
use decoder::Decoder;
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

    /// From `[tokens, hidden]`, which makes way, to the next state; `past` tokens are in the cache.
    fn forward(
        &self,
        x: Tensor,
        rope: &decoder::Angles,
        mask: Option<&Tensor>,
        cache: (&mut Self::Kv, usize),
        workspace: &mut W,
    ) -> CandleResult<Tensor>;

    /// Whether kernels of our own do all of it, each row by itself.
    fn is_fused(&self) -> bool {
        false
    }
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
        Ok(layer)
    }

    fn connector(linear: Linear) -> CandleResult<Linear> {
        Ok(linear)
    }

    fn decoder_layer(layer: decoder::Layer) -> CandleResult<decoder::Layer> {
        Ok(layer)
    }

    fn head(norm: RmsNorm, lm_head: Linear) -> CandleResult<decoder::Head> {
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
    fn room(&self) -> usize {
        self.cache.room()
    }

    fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
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
        checkpoint
            .weights
            .check_memory(formats, device.is_cpu(), has_room)?;
        let loader = Loader {
            weights: &checkpoint.weights,
            device: &device,
            progress,
        };
        let vb = VarBuilder::from_backend(Box::new(loader), dtype, device.clone());
        let matrices = Matrices { loader, formats };
        let config = &checkpoint.config;
        let encoder = Encoder::load(config, matrices, &vb)
            .map_err(|error| failed(Checkpoint::encoder_error, error))?;
        let decoder = Decoder::load(config, matrices, &vb)
            .map_err(|error| failed(Checkpoint::decoder_error, error))?;
        drop(vb);
        Ok(Self {
            encoder,
            decoder,
            config: config.clone(),
            preprocessor: checkpoint.preprocessor.clone(),
            dtype,
            device,
            pool: Pool::for_model(threads)?,
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

    fn install(&self, work: &mut (dyn FnMut() + Send)) {
        self.pool.install(|| with_autorelease_pool(work));
    }

    fn memory(&self, size: &RequestSize) -> Option<u64> {
        let is_fused = self.encoder.is_fused() && self.decoder.is_fused();
        let is_cpu = self.device.is_cpu();
        is_cpu.then(|| size.bytes(&self.config, self.dtype, is_fused))
    }

    fn keeps_features(&self, _slot: &dyn SequenceSlot, _rows: usize) -> bool {
        true
    }

    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()> {
        let slot = self.own(slot)?;
        let layers = self
            .decoder
            .new_kv(needs.capacity, self.dtype, &self.device);
        Ok(slot.cache.reserve(needs.capacity, layers)?)
    }

    fn encode(
        &self,
        slot: &mut dyn SequenceSlot,
        images: &[ImageInput<'_>],
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let slot = self.own(slot)?;
        let held = std::mem::take(&mut slot.features);
        let mut features = Vec::with_capacity(images.len());
        for (i, image) in images.iter().enumerate() {
            features.push(match image {
                ImageInput::CachedFeatures { .. } => held
                    .get(i)
                    .cloned()
                    .ok_or_else(|| Error::Session("it holds no such features".into()))?,
                ImageInput::Pixels(picture) => {
                    self.encoder.forward(&self.pixels(picture)?, observer)?
                }
            });
        }
        // A GPU has only been told so far.
        self.device.synchronize()?;
        slot.features = features;
        Ok(())
    }

    fn prefill(
        &self,
        slot: &mut dyn SequenceSlot,
        prompt: &Prompt,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let slot = self.own(slot)?;
        let embeds = self.decoder.embed(&prompt.ids)?;
        for (&(start, _), features) in prompt.images.iter().zip(&slot.features) {
            embeds.slice_set(&features.contiguous()?, 0, start)?;
        }
        let held = slot.cache.len();
        let embeds = embeds.narrow(0, held, prompt.ids.len() - held)?;
        let logits = self.decoder.forward(embeds, 1, &mut slot.cache, observer)?;
        Ok(logits.squeeze(0)?)
    }

    fn decode(
        &self,
        slot: &mut dyn SequenceSlot,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>> {
        let slot = self.own(slot)?;
        let embeds = self.decoder.embed(tokens)?;
        let logits = self
            .decoder
            .forward(embeds, tokens.len(), &mut slot.cache, observer)?;
        (0..tokens.len()).map(|row| Ok(logits.get(row)?)).collect()
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
        (kv, past): (&mut LayerKv, usize),
        (): &mut (),
    ) -> CandleResult<Tensor> {
        self.forward(&x, rope, mask, (&*kv, past))
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
