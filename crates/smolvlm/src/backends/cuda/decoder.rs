//! The Llama decoder on the GPU: prefill by products of many rows, decoding by one persistent kernel.

use candle_core::Result as CandleResult;

use crate::{
    backends::cuda::{
        scratch::Scratch,
        weights::{Part, Uploader},
    },
    families::idefics3::{
        config::Config,
        names::{self, decoder_layer as module},
    },
};
use vlmnarrate_cuda::{
    Attention, DecodeInput, DecodePlan, DecoderShape, Epilogue, Gpu, Kernels, Memory, Norm,
    PromptRows, QkvShape, Result, RopeStoreKv, Weights,
};

pub(crate) struct Decoder {
    embed_tokens: Weights,
    layers: Vec<Layer>,
    /// Weights of all layers' norms and of the last norm.
    norms: Memory,
    /// `None` with tied embeddings.
    lm_head: Option<Weights>,
    inv_freq: Memory,
    shape: DecoderShape,
}

struct Layer {
    input_layernorm: Norm,
    qkv: Weights,
    o_proj: Weights,
    post_attention_layernorm: Norm,
    gate_up: Weights,
    down_proj: Weights,
}

impl Decoder {
    pub(crate) fn load(
        config: &Config,
        inv_freq: &[f32],
        from: &Uploader<'_>,
    ) -> CandleResult<Self> {
        let c = &config.text_config;
        let (hidden, intermediate) = (c.hidden_size, c.intermediate_size);
        let shape = QkvShape {
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads(),
            head_size: c.head_dim(),
        };
        let linear = |name: String, rows, columns| from.linear(rows, columns, &name);
        let queries = shape.heads * shape.head_size;
        let keys = shape.kv_heads * shape.head_size;
        let mut norms = Vec::new();
        let mut norm = |name: &str| {
            let weight = from.floats(&[hidden], &format!("{name}.weight"))?;
            norms.extend_from_slice(&weight);
            Ok::<_, candle_core::Error>(Norm {
                weight: from.upload(&weight)?,
                bias: None,
                epsilon: c.rms_norm_eps,
                length: hidden,
            })
        };
        let embed_tokens = linear(names::EMBED_TOKENS.into(), c.vocab_size, hidden)?;
        let mut layers = Vec::new();
        for i in 0..c.num_hidden_layers {
            let name = names::decoder_layer(i);
            let [q, k, v] = [module::Q_PROJ, module::K_PROJ, module::V_PROJ]
                .map(|part| format!("{name}.{part}"));
            let attention = [
                Part::halves_interleaved(queries, &q, shape.head_size),
                Part::halves_interleaved(keys, &k, shape.head_size),
                Part::plain(keys, &v),
            ];
            let [gate, up] =
                [module::GATE_PROJ, module::UP_PROJ].map(|part| format!("{name}.{part}"));
            layers.push(Layer {
                input_layernorm: norm(&format!("{name}.{}", module::INPUT_LAYERNORM))?,
                qkv: from.layers(&attention, hidden, false)?,
                o_proj: linear(format!("{name}.{}", module::O_PROJ), hidden, queries)?,
                post_attention_layernorm: norm(&format!(
                    "{name}.{}",
                    module::POST_ATTENTION_LAYERNORM
                ))?,
                gate_up: from.interleaved(intermediate, hidden, [&gate, &up])?,
                down_proj: linear(
                    format!("{name}.{}", module::DOWN_PROJ),
                    hidden,
                    intermediate,
                )?,
            });
        }
        norms.extend(from.floats(&[hidden], &names::weight(names::NORM))?);
        let is_tied = config.tie_word_embeddings && !from.contains(&names::weight(names::LM_HEAD));
        let lm_head = (!is_tied).then(|| linear(names::LM_HEAD.into(), c.vocab_size, hidden));
        Ok(Self {
            embed_tokens,
            layers,
            norms: from.upload(&norms)?,
            lm_head: lm_head.transpose()?,
            inv_freq: from.upload(inv_freq)?,
            shape: DecoderShape {
                layers: c.num_hidden_layers,
                hidden,
                qkv: shape,
                intermediate,
                vocab_size: c.vocab_size,
                epsilon: c.rms_norm_eps,
            },
        })
    }

    pub(crate) fn shape(&self) -> &DecoderShape {
        &self.shape
    }

    /// Bytes of a token in the KV cache, for values of `size` bytes.
    pub(crate) fn kv_bytes_per_token(&self, size: usize) -> usize {
        let qkv = self.shape.qkv;
        2 * self.shape.layers * qkv.kv_heads * qkv.head_size * size
    }

    pub(crate) fn plan(&self, gpu: &Gpu, kernels: &Kernels) -> Result<DecodePlan> {
        let layers = self.layers.iter().flat_map(|layer| {
            let Layer {
                qkv,
                o_proj,
                gate_up,
                down_proj,
                ..
            } = layer;
            [qkv, o_proj, gate_up, down_proj]
        });
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        DecodePlan::new(gpu, kernels.dtype(), self.shape, layers.chain([head]))
    }

    /// Makes room for prompts of so many rows. Returns whether memory moved.
    pub(crate) fn reserve(&self, gpu: &Gpu, scratch: &mut Scratch, rows: usize) -> Result<bool> {
        let DecoderShape {
            hidden,
            qkv,
            intermediate,
            ..
        } = self.shape;
        scratch.reserve(
            gpu,
            rows,
            [
                hidden,
                qkv.row_length(),
                qkv.heads * qkv.head_size,
                intermediate,
                qkv.head_size,
            ],
        )
    }

    /// Computes keys and values of the prompts in `scratch.rows` into their KV caches.
    pub(crate) fn prefill(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        scratch: &mut Scratch,
        (count, sequence_count, longest): (usize, usize, usize),
    ) -> Result<()> {
        let Scratch {
            x,
            normed,
            qkv,
            attn_out,
            inner,
            rows,
            rotations,
            sequences,
            ..
        } = scratch;
        let shape = self.shape.qkv;
        let rows = PromptRows {
            rows,
            count,
            sequences,
            sequence_count,
        };
        let rope = (&self.inv_freq, &mut *rotations);
        kernels.embed(gpu, rows, &self.embed_tokens, x, rope)?;
        for (i, layer) in self.layers.iter().enumerate() {
            kernels.norm(gpu, (x, count), &layer.input_layernorm, normed, None)?;
            let rope = Epilogue::RopeStoreKv(RopeStoreKv {
                rows,
                rotations,
                shape,
                layer: i,
            });
            kernels.gemm(gpu, (normed, count), &layer.qkv, rope, qkv)?;
            // The decode kernel starts over from the last token, so the last layer's output is not needed.
            if i + 1 == self.layers.len() {
                break;
            }
            let attention = Attention::Causal {
                sequences,
                count: sequence_count,
                longest,
                rows: count,
                layer: i,
            };
            kernels.attention(gpu, qkv, shape, attention, attn_out)?;
            kernels.gemm(gpu, (attn_out, count), &layer.o_proj, Epilogue::AddF32, x)?;
            kernels.norm(
                gpu,
                (x, count),
                &layer.post_attention_layernorm,
                normed,
                None,
            )?;
            kernels.gemm(
                gpu,
                (normed, count),
                &layer.gate_up,
                Epilogue::SwiGlu,
                inner,
            )?;
            kernels.gemm(gpu, (inner, count), &layer.down_proj, Epilogue::AddF32, x)?;
        }
        Ok(())
    }

    /// Generates the sequences' tokens, or with `logits` runs their tokens and draft tokens once.
    pub(crate) fn decode(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        plan: &DecodePlan,
        (sequences, count): (&Memory, usize),
        logits: Option<&Memory>,
        stop_tokens: &Memory,
    ) -> Result<()> {
        let input = DecodeInput {
            sequences,
            count,
            logits,
            embed_tokens: &self.embed_tokens,
            norms: &self.norms,
            inv_freq: &self.inv_freq,
            stop_tokens,
        };
        kernels.decode(gpu, plan, input)
    }
}
