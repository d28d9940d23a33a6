//! What computes: candle's tensors, on the CPU with kernels of our own in their place, or the engine of a GPU.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

#[cfg(feature = "cuda")]
use crate::backends::cuda;
use crate::{
    backends::candle::{decoder::Decoder, encoder::Vision, kv_cache::KvCache, linear::Matrices},
    error::{Error, Result},
    files::{checkpoint::Checkpoint, formats::Formats, weights::Loader},
    run::device::Chosen,
};
use vlmnarrate_engine::Observer;

#[derive(Debug)]
pub(crate) enum Network {
    Tensors(Box<Tensors>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Network),
}

#[derive(Debug)]
pub(crate) struct Tensors {
    pub(crate) vision: Vision,
    pub(crate) decoder: Decoder,
    pub(crate) dtype: DType,
    /// Where they lie.
    pub(crate) device: Device,
}

impl Tensors {
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        chosen: &Chosen,
        (formats, progress): (Formats, &(dyn Fn(u64) -> bool + Sync)),
        failed: impl Fn(fn(&Checkpoint, String) -> Error, candle_core::Error) -> Error,
    ) -> Result<Self> {
        let device = chosen.tensors();
        let dtype = formats.dtype;
        let has_room = |bytes| chosen.has_room(bytes);
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
        let vision = Vision::load(config, matrices, vb.pp("model"))
            .map_err(|error| failed(Checkpoint::encoder_error, error))?;
        let decoder = Decoder::load(config, matrices, vb)
            .map_err(|error| failed(Checkpoint::decoder_error, error))?;
        Ok(Self {
            vision,
            decoder,
            dtype,
            device,
        })
    }
}

/// What a network keeps of the tokens that it has seen.
#[derive(Debug)]
pub(crate) enum Cache {
    Tensors(KvCache),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Seat),
}

impl Cache {
    /// That of candle's tensors, for who has them.
    pub(crate) fn tensors(&mut self) -> &mut KvCache {
        match self {
            Self::Tensors(cache) => cache,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => unreachable!("a cache of another network"),
        }
    }

    /// Number of tokens that there is room for beside those held.
    fn room(&self) -> usize {
        match self {
            Self::Tensors(cache) => cache.room(),
            #[cfg(feature = "cuda")]
            Self::Cuda(seat) => seat.room(),
        }
    }

    /// Forgets every token but the first `len`.
    pub(crate) fn truncate(&mut self, len: usize) {
        match self {
            Self::Tensors(cache) => cache.truncate(len),
            #[cfg(feature = "cuda")]
            Self::Cuda(seat) => seat.truncate(len),
        }
    }
}

impl Network {
    pub(crate) fn cache(&self) -> Cache {
        match self {
            Self::Tensors(tensors) => Cache::Tensors(tensors.decoder.cache()),
            #[cfg(feature = "cuda")]
            Self::Cuda(network) => Cache::Cuda(network.seat()),
        }
    }

    /// Whether each position comes out the same to the bit however many are run at once.
    pub(crate) fn is_exact(&self) -> bool {
        match self {
            Self::Tensors(tensors) => tensors.decoder.is_exact(),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => true,
        }
    }

    /// Runs tokens of the vocabulary behind those in the cache and returns the logits behind each.
    pub(crate) fn run(
        &self,
        cache: &mut Cache,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>> {
        let room = cache.room();
        if tokens.len() > room {
            return Err(Error::Session(format!(
                "{} tokens are more than the {room} that there is room for; prefill with more room",
                tokens.len()
            )));
        }
        match (self, cache) {
            (Self::Tensors(tensors), Cache::Tensors(cache)) => {
                let embeds = tensors.decoder.embed(tokens)?;
                let logits = tensors
                    .decoder
                    .forward(embeds, tokens.len(), cache, observer)?;
                (0..tokens.len()).map(|row| Ok(logits.get(row)?)).collect()
            }
            #[cfg(feature = "cuda")]
            (Self::Cuda(network), Cache::Cuda(seat)) => network.run(seat, tokens, observer),
            #[cfg(feature = "cuda")]
            _ => unreachable!("a cache of another network"),
        }
    }
}
