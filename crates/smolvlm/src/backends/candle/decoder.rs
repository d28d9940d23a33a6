//! Llama decoder over embeddings, after
//! [`modeling_llama.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py).
//!
//! `candle_transformers::models::llama` would fit but for its cache: private, grown by concatenation,
//! without a way back to a prefix.

use candle_core::{D, DType, Device, Module, Result as CandleResult, Tensor};
use candle_nn::{RmsNorm, VarBuilder, ops::silu, rms_norm, rotary_emb::rope};

use crate::{
    backends::{
        candle::{
            encoder::softmax_f32,
            kv_cache::{KvCache, Seen},
            linear::{Embedding, Linear, Matrices},
        },
        cpu::layers::{self, DecoderLayer, Workspace, in_place},
        layer_done,
    },
    error::Result,
    families::idefics3::config::{Config, TextConfig},
    files::formats::HEAD,
};
use vlmnarrate_engine::Observer;

#[derive(Debug)]
pub(crate) struct Decoder {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    head: Head,
    rope: Rope,
    kv_heads: usize,
}

impl Decoder {
    /// `vb` is at the checkpoint's root.
    pub(crate) fn load(
        config: &Config,
        matrices: Matrices<'_>,
        vb: VarBuilder,
    ) -> CandleResult<Self> {
        let c = &config.text_config;
        let m = vb.pp("model.text_model");
        let table = (c.vocab_size, c.hidden_size);
        let embed_tokens = Embedding::load(table, matrices, m.pp("embed_tokens"))?;
        let layers = (0..c.num_hidden_layers)
            .map(|i| Layer::load(c, matrices, m.pp("layers").pp(i)))
            .collect::<CandleResult<_>>()?;
        // As transformers 5 reads it: a stored head counts whatever the configuration says.
        let lm_head = if config.tie_word_embeddings && !vb.contains_tensor(HEAD) {
            embed_tokens.tied(matrices.tied_head()?)?
        } else {
            let shape = (c.hidden_size, c.vocab_size);
            Linear::load(shape, false, matrices, vb.pp("lm_head"))?
        };
        let norm = rms_norm(c.hidden_size, c.rms_norm_eps, m.pp("norm"))?;
        Ok(Self {
            embed_tokens,
            layers,
            head: match layers::Head::new(&norm, &lm_head)? {
                Some(head) => Head::Packed(head),
                None => Head::Tensors(norm, lm_head),
            },
            rope: Rope::new(c),
            kv_heads: c.num_key_value_heads(),
        })
    }

    /// An empty cache in this decoder's shape.
    pub(crate) fn cache(&self) -> KvCache {
        let packed = self.layers.iter().map(Layer::is_packed).collect();
        KvCache::new(packed, self.kv_heads, self.rope.head_dim)
    }

    /// `[tokens, hidden]`
    pub(crate) fn embed(&self, ids: &[u32]) -> CandleResult<Tensor> {
        self.embed_tokens.forward(ids)
    }

    /// Whether each position comes out the same to the bit however many are run at once.
    pub(crate) fn is_exact(&self) -> bool {
        matches!(self.head, Head::Packed(_)) && self.layers.iter().all(Layer::is_packed)
    }

    /// Runs `[n, hidden]` embeddings, which make way, behind what `cache` holds, in room that the caller has
    /// reserved, and returns the logits (`[last, vocab]`, f32) of the last positions. They are on the CPU, where
    /// the choice is made.
    pub(crate) fn forward(
        &self,
        embeds: Tensor,
        last: usize,
        cache: &mut KvCache,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let n = embeds.dim(0)?;
        let turn = self.rope.at(cache.len(), n, &embeds)?;
        let mask = (n > 1 && !self.is_exact())
            .then(|| causal_mask(n, cache.len(), embeds.dtype(), embeds.device()))
            .transpose()?;
        let mut workspace = Workspace::default();
        let mut x = embeds;
        let at = cache.len();
        for (layer, seen) in self.layers.iter().zip(cache.layers()) {
            x = match (layer, seen) {
                (Layer::Tensors(layer), Seen::Tensors(keys, values)) => {
                    let cache = Cache { keys, values, at };
                    layer.forward(&x, &turn, mask.as_ref(), cache)?
                }
                (Layer::Packed(layer), Seen::Packed(seen)) => in_place(x, |x| {
                    layer.forward(x, turn.values(), seen, at, &mut workspace)
                })?,
                _ => unreachable!("a cache of another decoder"),
            };
            layer_done(observer)?;
        }
        cache.advance(n);
        let broken = match x.device().is_cpu() {
            true => layers::first_broken(&x)?,
            false => None,
        };
        // Those before are never read; of one position the head is as large as a quarter of the rest.
        let states = x.narrow(0, n - last, last)?.contiguous()?;
        let logits = match &self.head {
            Head::Tensors(norm, lm_head) => {
                let logits = lm_head.forward(&norm.forward(&states)?)?;
                logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?
            }
            Head::Packed(head) => {
                let states = states.flatten_all()?.to_vec1()?;
                let logits = head.forward(&states, &mut workspace);
                let shape = (last, logits.len() / last);
                Tensor::from_vec(logits, shape, &Device::Cpu)?
            }
        };
        match broken {
            None => Ok(logits),
            // As floats have it: whoever looks back at what is no number is none either.
            Some(row) => {
                let finite = row.saturating_sub(n - last);
                let none =
                    Tensor::full(f32::NAN, (last - finite, logits.dim(1)?), logits.device())?;
                Ok(Tensor::cat(&[&logits.narrow(0, 0, finite)?, &none], 0)?)
            }
        }
    }
}

/// The last norm and the layer that gives each token of the vocabulary its score.
#[derive(Debug)]
enum Head {
    Tensors(RmsNorm, Linear),
    Packed(layers::Head),
}

/// Zero where token `i` of `n` may look back, −∞ beyond; `seen` tokens stand before them.
fn causal_mask(n: usize, seen: usize, dtype: DType, device: &Device) -> CandleResult<Tensor> {
    let mask = (0..n)
        .flat_map(|i| {
            (0..seen + n).map(move |j| {
                if j <= seen + i {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
        })
        .collect::<Vec<_>>();
    Tensor::from_vec(mask, (n, seen + n), device)?.to_dtype(dtype)
}

/// Of each pair of a head's values.
pub(crate) fn inverse_frequencies(c: &TextConfig) -> Vec<f32> {
    let head_dim = c.head_dim();
    let theta = c.rope_theta() as f32;
    let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
    exponents
        .map(|exponent| 1.0 / theta.powf(exponent))
        .collect()
}

/// Rotary position embedding; angles in f32 from the inverse frequencies, as the reference makes them.
#[derive(Debug)]
struct Rope {
    inv_freq: Vec<f32>,
    head_dim: usize,
}

impl Rope {
    fn new(c: &TextConfig) -> Self {
        Self {
            inv_freq: inverse_frequencies(c),
            head_dim: c.head_dim(),
        }
    }

    /// For `n` positions from `start` on, in the type and on the device of `like`.
    fn at(&self, start: usize, n: usize, like: &Tensor) -> CandleResult<Turn> {
        let positions = (start..start + n).map(|position| position as f32);
        let angles = positions.flat_map(|p| self.inv_freq.iter().map(move |f| p * f));
        let (sin, cos): (Vec<_>, Vec<_>) = angles.map(|angle| (angle.sin(), angle.cos())).unzip();
        let tensor = |values: &[f32]| {
            let shape = (n, self.inv_freq.len());
            Tensor::from_slice(values, shape, like.device())?.to_dtype(like.dtype())
        };
        Ok(Turn {
            cos: tensor(&cos)?,
            sin: tensor(&sin)?,
            values: [cos, sin],
        })
    }
}

/// Cosines and sines, `[n, head_dim / 2]`, of some positions.
struct Turn {
    cos: Tensor,
    sin: Tensor,
    values: [Vec<f32>; 2],
}

impl Turn {
    fn values(&self) -> (&[f32], &[f32]) {
        let [cos, sin] = &self.values;
        (cos, sin)
    }
}

#[derive(Debug)]
enum Layer {
    Tensors(TensorLayer),
    Packed(DecoderLayer),
}

impl Layer {
    fn load(c: &TextConfig, matrices: Matrices<'_>, vb: VarBuilder) -> CandleResult<Self> {
        let layer = TensorLayer::load(c, matrices, vb)?;
        Ok(match DecoderLayer::new(&layer)? {
            Some(layer) => Self::Packed(layer),
            None => Self::Tensors(layer),
        })
    }

    fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }
}

/// Where a layer puts the keys and values of new tokens, behind those of the `at` that it has seen.
#[derive(Clone, Copy)]
struct Cache<'a> {
    keys: &'a Tensor,
    values: &'a Tensor,
    at: usize,
}

impl Cache<'_> {
    /// Takes `[kv_heads, n, head_dim]` and returns all keys and values as views.
    fn write(&self, k: &Tensor, v: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        self.keys.slice_set(k, 1, self.at)?;
        self.values.slice_set(v, 1, self.at)?;
        let total = self.at + k.dim(1)?;
        Ok((
            self.keys.narrow(1, 0, total)?,
            self.values.narrow(1, 0, total)?,
        ))
    }
}

#[derive(Debug)]
pub(crate) struct TensorLayer {
    pub(crate) input_layernorm: RmsNorm,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) post_attention_layernorm: RmsNorm,
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl TensorLayer {
    fn load(c: &TextConfig, matrices: Matrices<'_>, vb: VarBuilder) -> CandleResult<Self> {
        let (n, head_dim) = (c.hidden_size, c.head_dim());
        let (heads, kv_heads) = (c.num_attention_heads, c.num_key_value_heads());
        let attn = vb.pp("self_attn");
        let mlp = vb.pp("mlp");
        let norm = |name| rms_norm(n, c.rms_norm_eps, vb.pp(name));
        let attn_linear =
            |from, to, name| Linear::load((from, to), c.attention_bias, matrices, attn.pp(name));
        let mlp_linear =
            |from, to, name| Linear::load((from, to), c.mlp_bias, matrices, mlp.pp(name));
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            q_proj: attn_linear(n, heads * head_dim, "q_proj")?,
            k_proj: attn_linear(n, kv_heads * head_dim, "k_proj")?,
            v_proj: attn_linear(n, kv_heads * head_dim, "v_proj")?,
            o_proj: attn_linear(heads * head_dim, n, "o_proj")?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: mlp_linear(n, c.intermediate_size, "gate_proj")?,
            up_proj: mlp_linear(n, c.intermediate_size, "up_proj")?,
            down_proj: mlp_linear(c.intermediate_size, n, "down_proj")?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        turn: &Turn,
        mask: Option<&Tensor>,
        cache: Cache<'_>,
    ) -> CandleResult<Tensor> {
        let normed = self.input_layernorm.forward(x)?;
        let x = (x + self.attention(&normed, turn, mask, cache)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let gate = silu(&self.gate_proj.forward(&normed)?)?;
        let mlp = self
            .down_proj
            .forward(&(gate * self.up_proj.forward(&normed)?)?)?;
        x + mlp
    }

    fn attention(
        &self,
        x: &Tensor,
        Turn { cos, sin, .. }: &Turn,
        mask: Option<&Tensor>,
        cache: Cache<'_>,
    ) -> CandleResult<Tensor> {
        let n = x.dim(0)?;
        let split = |x: Tensor, heads| {
            x.reshape((1, n, heads, self.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = rope(&split(self.q_proj.forward(x)?, self.heads)?, cos, sin)?;
        let k = rope(&split(self.k_proj.forward(x)?, self.kv_heads)?, cos, sin)?;
        let v = split(self.v_proj.forward(x)?, self.kv_heads)?;
        let (keys, values) = cache.write(&k.squeeze(0)?, &v.squeeze(0)?)?;
        // Query heads that share a key head stand next to each other: one product per key head does
        // them all, without repeating keys or values.
        let group = self.heads / self.kv_heads * n;
        let q = q.reshape((self.kv_heads, group, self.head_dim))?;
        let scores = (q.matmul(&keys.t()?)? * (self.head_dim as f64).powf(-0.5))?;
        let total = scores.dim(D::Minus1)?;
        let scores = match mask {
            Some(mask) => scores
                .reshape((self.heads, n, total))?
                .broadcast_add(mask)?
                .reshape((self.kv_heads, group, total))?,
            None => scores,
        };
        let out = softmax_f32(&scores)?
            .matmul(&values)?
            .reshape((self.heads, n, self.head_dim))?
            .transpose(0, 1)?
            .reshape((n, self.heads * self.head_dim))?;
        self.o_proj.forward(&out)
    }
}
