//! The Llama decoder on the GPU: prompts by products of many rows, captions by one kernel that stays.

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
    Attended, Decode, Gpu, Heads, Kernels, Memory, Norm, Plan, Result, Rows, Stack, Then, Turned,
    Weights,
};

pub(crate) struct Decoder {
    embed_tokens: Weights,
    layers: Vec<Layer>,
    /// Of all layers, and the last.
    norms: Memory,
    /// None where the embeddings are the head.
    lm_head: Option<Weights>,
    frequencies: Memory,
    stack: Stack,
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
        frequencies: &[f32],
        from: &Uploader<'_>,
    ) -> CandleResult<Self> {
        let c = &config.text_config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let heads = Heads {
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads(),
            size: c.head_dim(),
        };
        let linear = |name: String, rows, columns| from.linear(rows, columns, &name);
        let (queries, keys) = (heads.heads * heads.size, heads.kv_heads * heads.size);
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
                Part::turned(queries, &q, heads.size),
                Part::turned(keys, &k, heads.size),
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
                gate_up: from.paired(inner, hidden, [&gate, &up])?,
                down_proj: linear(format!("{name}.{}", module::DOWN_PROJ), hidden, inner)?,
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
            frequencies: from.upload(frequencies)?,
            stack: Stack {
                layers: c.num_hidden_layers,
                hidden,
                heads,
                inner,
                vocabulary: c.vocab_size,
                epsilon: c.rms_norm_eps,
            },
        })
    }

    pub(crate) fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Bytes that keys and values of a token take, all layers', for numbers of so many bytes.
    pub(crate) fn cached(&self, bytes: usize) -> usize {
        let heads = self.stack.heads;
        2 * self.stack.layers * heads.kv_heads * heads.size * bytes
    }

    pub(crate) fn plan(&self, gpu: &Gpu, kernels: &Kernels) -> Result<Plan> {
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
        Plan::new(gpu, kernels.number(), self.stack, layers.chain([head]))
    }

    pub(crate) fn reserve(&self, gpu: &Gpu, scratch: &mut Scratch, rows: usize) -> Result<bool> {
        let Stack {
            hidden,
            heads,
            inner,
            ..
        } = self.stack;
        scratch.reserve(
            gpu,
            rows,
            [
                hidden,
                heads.width(),
                heads.heads * heads.size,
                inner,
                heads.size,
            ],
        )
    }

    /// Puts keys and values of the prompts in `scratch.rows` into their caches. The longest has so many rows.
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
            attended,
            inner,
            rows,
            turns,
            sequences,
            ..
        } = scratch;
        let heads = self.stack.heads;
        let rows = Rows {
            rows,
            count,
            sequences,
            sequence_count,
        };
        let turning = (&self.frequencies, &mut *turns);
        kernels.embed(gpu, rows, &self.embed_tokens, x, turning)?;
        for (i, layer) in self.layers.iter().enumerate() {
            kernels.norm(gpu, (x, count), &layer.input_layernorm, normed, None)?;
            let turn = Then::Turn(Turned {
                rows,
                turns,
                heads,
                layer: i,
            });
            kernels.gemm(gpu, (normed, count), &layer.qkv, turn, qkv)?;
            // Nobody reads what comes out of the last layer.
            if i + 1 == self.layers.len() {
                break;
            }
            let attention = Attended::Prompts {
                sequences,
                count: sequence_count,
                longest,
                rows: count,
                layer: i,
            };
            kernels.attention(gpu, qkv, heads, attention, attended)?;
            kernels.gemm(gpu, (attended, count), &layer.o_proj, Then::Add, x)?;
            kernels.norm(
                gpu,
                (x, count),
                &layer.post_attention_layernorm,
                normed,
                None,
            )?;
            kernels.gemm(gpu, (normed, count), &layer.gate_up, Then::GatedSilu, inner)?;
            kernels.gemm(gpu, (inner, count), &layer.down_proj, Then::Add, x)?;
        }
        Ok(())
    }

    /// Makes the captions of `scratch.sequences`, or with `scores` runs their rows once.
    pub(crate) fn decode(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        plan: &Plan,
        (sequences, count): (&Memory, usize),
        scores: Option<&Memory>,
        stops: &Memory,
    ) -> Result<()> {
        let decode = Decode {
            sequences,
            count,
            scores,
            table: &self.embed_tokens,
            norms: &self.norms,
            frequencies: &self.frequencies,
            stops,
        };
        kernels.decode(gpu, plan, decode)
    }
}
