//! Llama decoder over embeddings, after
//! [`modeling_llama.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py).
//!
//! `candle_transformers::models::llama` would fit but for its cache: private, grown by concatenation,
//! without a way back to a prefix.

use candle_core::{D, DType, Device, Error as CandleError, Module, Result as CandleResult, Tensor};
use candle_nn::{RmsNorm, VarBuilder, ops::silu, rms_norm, rotary_emb::rope};
use vlmnarrate_engine::Observer;

use super::{
    DecoderLayer, Head as _, Kv, LayerRows, Parts,
    encoder::softmax_f32,
    kv_cache::{KvCache, LayerKv},
    linear::{Embedding, Linear, Matrices},
    values::first_broken,
};
use crate::{
    backends::layer_done,
    error::Result,
    families::idefics3::{
        config::{Config, TextConfig},
        names::{self, decoder_layer as module},
        positions::inverse_frequencies,
    },
};

/// From embeddings to logits.
#[derive(Debug)]
pub(crate) struct Decoder<P: Parts> {
    embed_tokens: Embedding,
    layers: Vec<P::DecoderLayer>,
    head: P::Head,
    rope: Rope,
    kv_heads: usize,
}

impl<P: Parts> Decoder<P> {
    /// `vb` is at the checkpoint's root.
    pub(crate) fn load(
        config: &Config,
        matrices: Matrices<'_>,
        vb: &VarBuilder,
    ) -> CandleResult<Self> {
        let c = &config.text_config;
        let table = (c.vocab_size, c.hidden_size);
        let embed_tokens = Embedding::load(table, matrices, vb.pp(names::EMBED_TOKENS))?;
        let layer =
            |i| P::decoder_layer(Layer::load(c, matrices, &vb.pp(names::decoder_layer(i)))?);
        let layers = (0..c.num_hidden_layers)
            .map(layer)
            .collect::<CandleResult<_>>()?;
        // As transformers 5 reads it: a stored head counts whatever the configuration says.
        let has_head = vb.contains_tensor(&names::weight(names::LM_HEAD));
        let lm_head = if config.tie_word_embeddings && !has_head {
            embed_tokens.tied(matrices.tied_head()?)?
        } else {
            let shape = (c.hidden_size, c.vocab_size);
            Linear::load(shape, false, matrices, vb.pp(names::LM_HEAD))?
        };
        let norm = rms_norm(c.hidden_size, c.rms_norm_eps, vb.pp(names::NORM))?;
        Ok(Self {
            embed_tokens,
            layers,
            head: P::head(norm, lm_head)?,
            rope: Rope::new(c),
            kv_heads: c.num_key_value_heads(),
        })
    }

    /// Empty caches of all layers for so many tokens.
    pub(crate) fn new_kv(
        &self,
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> impl Iterator<Item = CandleResult<Kv<P>>> {
        let shape = (self.kv_heads, capacity, self.rope.head_dim);
        self.layers
            .iter()
            .map(move |layer| layer.new_kv(shape, dtype, device))
    }

    /// `[tokens, hidden]`
    pub(crate) fn embed(&self, ids: &[u32]) -> CandleResult<Tensor> {
        self.embed_tokens.forward(ids)
    }

    /// Whether kernels of our own do all of it, each row by itself.
    pub(crate) fn is_fused(&self) -> bool {
        self.head.is_fused() && self.layers.iter().all(DecoderLayer::is_fused)
    }

    /// Runs `[rows, hidden]` embeddings, which make way: those of the sequences, one behind the other, each behind what
    /// its cache holds, in room that the caller has reserved. Of more than one sequence if all layers are fused.
    ///
    /// Returns logits of each sequence, `[vocabulary]` of each row of which they are wanted, f32, on the CPU, where the
    /// choice is made.
    pub(crate) fn forward(
        &self,
        embeds: Tensor,
        sequences: &mut [BatchRows<'_, Kv<P>>],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Vec<Tensor>>> {
        let positions = sequences.iter().flat_map(|sequence| {
            let past = sequence.cache.len();
            past..past + sequence.rows
        });
        let angles = self.rope.at(positions, &embeds)?;
        let mask = match &*sequences {
            [alone] if alone.rows > 1 && !self.is_fused() => {
                let (dtype, device) = (embeds.dtype(), embeds.device());
                Some(causal_mask(alone.rows, alone.cache.len(), dtype, device)?)
            }
            _ => None,
        };
        let mut workspace = P::Workspace::default();
        let mut x = embeds;
        for (i, layer) in self.layers.iter().enumerate() {
            let mut layer_rows: Vec<_> = sequences
                .iter_mut()
                .map(|sequence| LayerRows {
                    rows: sequence.rows,
                    past: sequence.cache.len(),
                    kv: sequence.cache.layer(i),
                })
                .collect();
            x = layer.forward(x, &angles, mask.as_ref(), &mut layer_rows, &mut workspace)?;
            layer_done(observer)?;
        }
        let logits = self.logits(&x, sequences, &mut workspace)?;
        // Last: after a failure the rows may be run again.
        for sequence in sequences {
            sequence.cache.advance(sequence.rows);
        }
        Ok(logits)
    }

    /// Logits of the last rows of each sequence, from all rows' last states.
    fn logits(
        &self,
        x: &Tensor,
        sequences: &[BatchRows<'_, Kv<P>>],
        workspace: &mut P::Workspace,
    ) -> Result<Vec<Vec<Tensor>>> {
        let is_cpu = x.device().is_cpu();
        // Of each sequence its first row, and the first that is broken.
        let (mut start, mut broken, mut wanted) = (0, Vec::new(), Vec::new());
        for sequence in sequences {
            let end = start + sequence.rows;
            broken.push(match is_cpu {
                true => first_broken(&x.narrow(0, start, sequence.rows)?)?,
                false => None,
            });
            // Those before are never read; of one position the head is as large as a quarter of the rest.
            if sequence.logits > 0 {
                wanted.push(x.narrow(0, end - sequence.logits, sequence.logits)?);
            }
            start = end;
        }
        let states = match &wanted[..] {
            [] => return Ok(sequences.iter().map(|_| Vec::new()).collect()),
            [states] => states.contiguous()?,
            all => Tensor::cat(all, 0)?,
        };
        let logits = self.head.forward(&states, workspace)?;
        let mut row = 0;
        let mut all = Vec::with_capacity(sequences.len());
        for (sequence, broken) in sequences.iter().zip(broken) {
            let first = sequence.rows - sequence.logits;
            let of_row = |i| match broken {
                // As floats have it: what attends to a value that is not finite is not finite either.
                Some(broken) if first + i >= broken => {
                    Tensor::full(f32::NAN, logits.dim(1)?, logits.device())
                }
                _ => logits.get(row + i),
            };
            let of_sequence = (0..sequence.logits).map(of_row);
            all.push(of_sequence.collect::<CandleResult<Vec<_>>>()?);
            row += sequence.logits;
        }
        Ok(all)
    }
}

/// Rows of one sequence in a batch.
pub(crate) struct BatchRows<'a, C> {
    pub(crate) rows: usize,
    /// The last rows, of which logits are wanted.
    pub(crate) logits: usize,
    pub(crate) cache: &'a mut KvCache<C>,
}

/// candle's last norm and head.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) norm: RmsNorm,
    pub(crate) lm_head: Linear,
}

impl Head {
    pub(crate) fn forward(&self, states: &Tensor) -> CandleResult<Tensor> {
        let logits = self.lm_head.forward(&self.norm.forward(states)?)?;
        logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)
    }
}

/// Zero where token `i` of `n` may attend to, −∞ beyond; `seen` tokens stand before them.
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

    /// For a row of each position, in the type and on the device of `like`.
    fn at(&self, positions: impl Iterator<Item = usize>, like: &Tensor) -> CandleResult<Angles> {
        let n = like.dim(0)?;
        let positions = positions.map(|position| position as f32);
        let angles = positions.flat_map(|p| self.inv_freq.iter().map(move |f| p * f));
        let (sin, cos): (Vec<_>, Vec<_>) = angles.map(|angle| (angle.sin(), angle.cos())).unzip();
        let tensor = |values: &[f32]| {
            let shape = (n, self.inv_freq.len());
            Tensor::from_slice(values, shape, like.device())?.to_dtype(like.dtype())
        };
        Ok(Angles {
            cos: tensor(&cos)?,
            sin: tensor(&sin)?,
            values: [cos, sin],
        })
    }
}

/// Cosines and sines, `[n, head_dim / 2]`, of some positions.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
    values: [Vec<f32>; 2],
}

impl Angles {
    pub(crate) fn values(&self) -> (&[f32], &[f32]) {
        let [cos, sin] = &self.values;
        (cos, sin)
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
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

impl Layer {
    fn load(c: &TextConfig, matrices: Matrices<'_>, vb: &VarBuilder) -> CandleResult<Self> {
        let (n, head_dim) = (c.hidden_size, c.head_dim());
        let (heads, kv_heads) = (c.num_attention_heads, c.num_key_value_heads());
        let norm = |name| rms_norm(n, c.rms_norm_eps, vb.pp(name));
        let attn =
            |from, to, name| Linear::load((from, to), c.attention_bias, matrices, vb.pp(name));
        let mlp = |from, to, name| Linear::load((from, to), c.mlp_bias, matrices, vb.pp(name));
        Ok(Self {
            input_layernorm: norm(module::INPUT_LAYERNORM)?,
            q_proj: attn(n, heads * head_dim, module::Q_PROJ)?,
            k_proj: attn(n, kv_heads * head_dim, module::K_PROJ)?,
            v_proj: attn(n, kv_heads * head_dim, module::V_PROJ)?,
            o_proj: attn(heads * head_dim, n, module::O_PROJ)?,
            post_attention_layernorm: norm(module::POST_ATTENTION_LAYERNORM)?,
            gate_proj: mlp(n, c.intermediate_size, module::GATE_PROJ)?,
            up_proj: mlp(n, c.intermediate_size, module::UP_PROJ)?,
            down_proj: mlp(c.intermediate_size, n, module::DOWN_PROJ)?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// The layer as candle runs it.
    pub(crate) fn quantized(self) -> CandleResult<Self> {
        Ok(Self {
            q_proj: self.q_proj.quantized()?,
            k_proj: self.k_proj.quantized()?,
            v_proj: self.v_proj.quantized()?,
            o_proj: self.o_proj.quantized()?,
            gate_proj: self.gate_proj.quantized()?,
            up_proj: self.up_proj.quantized()?,
            down_proj: self.down_proj.quantized()?,
            ..self
        })
    }

    pub(crate) fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        mask: Option<&Tensor>,
        sequences: &[LayerRows<'_, LayerKv>],
    ) -> CandleResult<Tensor> {
        let [LayerRows { kv, past, .. }] = sequences else {
            return Err(CandleError::msg(
                "candle's layers run one sequence at a time",
            ));
        };
        let cache = (&**kv, *past);
        let normed = self.input_layernorm.forward(x)?;
        let x = (x + self.attention(&normed, angles, mask, cache)?)?;
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
        Angles { cos, sin, .. }: &Angles,
        mask: Option<&Tensor>,
        (kv, past): (&LayerKv, usize),
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
        let (keys, values) = kv.write(&k.squeeze(0)?, &v.squeeze(0)?, past)?;
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
