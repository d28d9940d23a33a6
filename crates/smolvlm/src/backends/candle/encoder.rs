//! SigLIP vision encoder and connector, after
//! [`modeling_idefics3.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/modeling_idefics3.py).
//!
//! Three things differ from `candle_transformers::models::siglip`, and are why it isn't used: patches
//! take bucketed position ids, so that a picture of any side meets the table learned at the native one;
//! the patch embedding is a matrix product, since candle has no bf16 convolution on the CPU; and an
//! observer is asked at each layer whether to go on.

use candle_core::{DType, Error as CandleError, Module, Result as CandleResult, Tensor};
use candle_nn::{LayerNorm, VarBuilder, layer_norm, ops::softmax_last_dim};
use vlmnarrate_engine::Observer;

use super::{
    EncoderLayer, Parts,
    linear::{Linear, Matrices},
    values::first_broken,
};
use crate::{
    backends::layer_done,
    error::{Error, Result},
    families::idefics3::{
        config::{Config, VisionConfig},
        names::{self, encoder_layer as module},
        positions::{padded_indices, position_ids},
    },
};

/// From the pixels of a picture to the features that stand in its place among the decoder's embeddings.
#[derive(Debug)]
pub(crate) struct Encoder<P: Parts> {
    patch_embedding: Linear,
    position_embedding: Tensor,
    layers: Vec<P::EncoderLayer>,
    post_layernorm: LayerNorm,
    connector: P::Connector,
    hidden: usize,
    patch_size: usize,
    scale_factor: usize,
}

impl<P: Parts> Encoder<P> {
    /// `vb` is at the checkpoint's root.
    pub(crate) fn load(
        config: &Config,
        matrices: Matrices<'_>,
        vb: &VarBuilder,
    ) -> CandleResult<Self> {
        let c = &config.vision_config;
        let patch = c.num_channels * c.patch_size * c.patch_size;
        let conv = vb.pp(names::PATCH_EMBEDDING);
        let kernel = (c.hidden_size, c.num_channels, c.patch_size, c.patch_size);
        // Dense in any case: the first layer sees pixels, and its error would go through all others.
        let patch_embedding = Linear::Dense(candle_nn::Linear::new(
            conv.get(kernel, "weight")?
                .reshape((c.hidden_size, patch))?,
            Some(conv.get(c.hidden_size, "bias")?),
        ));
        let side = c.image_size / c.patch_size;
        let position_embedding = vb
            .pp(names::POSITION_EMBEDDING)
            .get((side * side, c.hidden_size), "weight")?;
        let layer =
            |i| P::encoder_layer(Layer::load(c, matrices, &vb.pp(names::encoder_layer(i)))?);
        let layers = (0..c.num_hidden_layers)
            .map(layer)
            .collect::<CandleResult<_>>()?;
        let shuffled = c.hidden_size * config.scale_factor * config.scale_factor;
        let post_layernorm = vb.pp(names::POST_LAYERNORM);
        Ok(Self {
            patch_embedding,
            position_embedding,
            layers,
            post_layernorm: layer_norm(c.hidden_size, c.layer_norm_eps, post_layernorm)?,
            connector: P::connector(Linear::load(
                (shuffled, config.text_config.hidden_size),
                false,
                matrices,
                vb.pp(names::CONNECTOR),
            )?)?,
            hidden: c.hidden_size,
            patch_size: c.patch_size,
            scale_factor: config.scale_factor,
        })
    }

    /// `pixels` is `[3, height, width]`, normalised; the result is `[tokens, text hidden size]`.
    pub(crate) fn forward(&self, pixels: &Tensor, observer: &mut Observer<'_>) -> Result<Tensor> {
        let grid = self.grid(pixels)?;
        let x = self.encode(self.embed(pixels, grid)?, |_| layer_done(observer))?;
        self.finish(&x, grid)
    }

    fn finish(&self, x: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        if x.device().is_cpu() && first_broken(x)?.is_some() {
            return Err(Error::NotFinite);
        }
        Ok(self.connect(x, grid)?)
    }

    /// Whether kernels of our own do all layers.
    pub(crate) fn is_fused(&self) -> bool {
        self.layers.iter().all(EncoderLayer::is_fused)
    }

    /// Rows and columns of patches.
    fn grid(&self, pixels: &Tensor) -> CandleResult<(usize, usize)> {
        let (channels, height, width) = pixels.dims3()?;
        let (rows, cols) = (height / self.patch_size, width / self.patch_size);
        match channels == 3 && rows > 0 && cols > 0 {
            true => Ok((rows, cols)),
            false => Err(CandleError::msg(format!(
                "{channels} channels of {height} × {width} pixels hold no patch of {}",
                self.patch_size
            ))),
        }
    }

    /// Embedded patches, which make way, through the layers, each state shown to `after`, and the last norm.
    fn encode(
        &self,
        mut x: Tensor,
        mut after: impl FnMut(&Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut workspace = P::Workspace::default();
        for layer in &self.layers {
            x = layer.forward(x, &mut workspace)?;
            after(&x)?;
        }
        Ok(self.post_layernorm.forward(&x)?)
    }

    /// Patches row by row, each with the embedding of its bucketed position: `[patches, hidden]`.
    fn embed(&self, pixels: &Tensor, (rows, cols): (usize, usize)) -> CandleResult<Tensor> {
        let p = self.patch_size;
        let patches = pixels
            .narrow(1, 0, rows * p)?
            .narrow(2, 0, cols * p)?
            .reshape((3, rows, p, cols, p))?
            .permute((1, 3, 0, 2, 4))?
            .reshape((rows * cols, 3 * p * p))?;
        let side = self.position_embedding.dim(0)?.isqrt();
        let ids = Tensor::from_vec(position_ids(rows, cols, side), rows * cols, pixels.device())?;
        self.patch_embedding.forward(&patches)? + self.position_embedding.index_select(&ids, 0)?
    }

    /// States after the embedding, after each layer and after the last norm, and the features.
    pub(crate) fn hidden_states(&self, pixels: &Tensor) -> Result<(Vec<Tensor>, Tensor)> {
        let grid = self.grid(pixels)?;
        let x = self.embed(pixels, grid)?;
        let mut states = vec![x.copy()?];
        let last = self.encode(x, |state| {
            states.push(state.copy()?);
            Ok(())
        })?;
        let features = self.finish(&last, grid)?;
        states.push(last);
        Ok((states, features))
    }

    /// Pixel shuffle and projection: squares of `scale_factor`² patches become one token each.
    ///
    /// The reference has no answer for a grid that doesn't divide (224 px is 14 × 14 patches, by 4).
    /// Here it grows to the next one that does by repeating its edge patches, evenly on both sides: the
    /// encoder still runs on the 196 patches, and the connector sees only features like those it was
    /// trained on.
    pub(crate) fn connect(&self, x: &Tensor, (rows, cols): (usize, usize)) -> CandleResult<Tensor> {
        let s = self.scale_factor;
        let (patches, hidden) = x.dims2()?;
        if patches == 0 || rows.checked_mul(cols) != Some(patches) || hidden != self.hidden {
            return Err(CandleError::msg(format!(
                "{patches} states of {hidden} values are no grid of {rows} × {cols} of {}",
                self.hidden
            )));
        }
        let x = x.reshape((rows, cols, hidden))?;
        let x = repeat_edges(&repeat_edges(&x, 0, s)?, 1, s)?;
        let (rows, cols, _) = x.dims3()?;
        let (token_rows, token_cols) = (rows / s, cols / s);
        let x = x
            .reshape((token_rows, s, token_cols, s, hidden))?
            .permute((0, 2, 1, 3, 4))?
            .reshape((token_rows * token_cols, s * s * hidden))?;
        self.connector.forward(&x)
    }
}

/// Grows `dim` to a multiple of `multiple` by repeating its first and last entries.
fn repeat_edges(x: &Tensor, dim: usize, multiple: usize) -> CandleResult<Tensor> {
    let n = x.dim(dim)?;
    if n.is_multiple_of(multiple) {
        return Ok(x.clone());
    }
    x.index_select(&Tensor::new(padded_indices(n, multiple), x.device())?, dim)
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) layer_norm1: LayerNorm,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) out_proj: Linear,
    pub(crate) layer_norm2: LayerNorm,
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
    pub(crate) heads: usize,
}

impl Layer {
    fn load(c: &VisionConfig, matrices: Matrices<'_>, vb: &VarBuilder) -> CandleResult<Self> {
        let n = c.hidden_size;
        let norm = |name| layer_norm(n, c.layer_norm_eps, vb.pp(name));
        let linear = |from, to, name| Linear::load((from, to), true, matrices, vb.pp(name));
        Ok(Self {
            layer_norm1: norm(module::LAYER_NORM1)?,
            q_proj: linear(n, n, module::Q_PROJ)?,
            k_proj: linear(n, n, module::K_PROJ)?,
            v_proj: linear(n, n, module::V_PROJ)?,
            out_proj: linear(n, n, module::OUT_PROJ)?,
            layer_norm2: norm(module::LAYER_NORM2)?,
            fc1: linear(n, c.intermediate_size, module::FC1)?,
            fc2: linear(c.intermediate_size, n, module::FC2)?,
            heads: c.num_attention_heads,
        })
    }

    /// The layer as candle runs it.
    pub(crate) fn quantized(self) -> CandleResult<Self> {
        Ok(Self {
            q_proj: self.q_proj.quantized()?,
            k_proj: self.k_proj.quantized()?,
            v_proj: self.v_proj.quantized()?,
            out_proj: self.out_proj.quantized()?,
            fc1: self.fc1.quantized()?,
            fc2: self.fc2.quantized()?,
            ..self
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let x = (x + self.attention(&self.layer_norm1.forward(x)?)?)?;
        let mlp = self
            .fc2
            .forward(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?.gelu()?)?;
        x + mlp
    }

    fn attention(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (n, hidden) = x.dims2()?;
        let head_dim = hidden / self.heads;
        let split = |x: Tensor| {
            x.reshape((n, self.heads, head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let q = (split(self.q_proj.forward(x)?)? * (head_dim as f64).powf(-0.5))?;
        let k = split(self.k_proj.forward(x)?)?;
        let v = split(self.v_proj.forward(x)?)?;
        let weights = softmax_f32(&q.matmul(&k.t()?)?)?;
        let out = weights.matmul(&v)?.transpose(0, 1)?.reshape((n, hidden))?;
        self.out_proj.forward(&out)
    }
}

/// Softmax over the last dimension in f32 whatever the input, as the reference computes it.
pub(crate) fn softmax_f32(scores: &Tensor) -> CandleResult<Tensor> {
    softmax_last_dim(&scores.to_dtype(DType::F32)?)?.to_dtype(scores.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_grid_that_does_not_divide_repeats_its_edges_evenly() -> CandleResult<()> {
        let x = Tensor::arange(0u32, 14, &Device::Cpu)?.reshape((14, 1, 1))?;
        let padded = repeat_edges(&x, 0, 4)?.flatten_all()?.to_vec1::<u32>()?;
        let expected = [0].into_iter().chain(0..14).chain([13]).collect::<Vec<_>>();
        assert_eq!(padded, expected);
        // 27 patches by 3 divide: nothing is added.
        let x = Tensor::arange(0u32, 27, &Device::Cpu)?.reshape((1, 27, 1))?;
        assert_eq!(repeat_edges(&x, 1, 3)?.dims(), [1, 27, 1]);
        Ok(())
    }
}
