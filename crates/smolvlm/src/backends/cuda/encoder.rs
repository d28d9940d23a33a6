//! The vision encoder on the GPU: as candle has it, for several pictures at once.

use std::collections::HashMap;

use candle_core::Result as CandleResult;

use crate::{
    backends::cuda::{
        scratch::Scratch,
        weights::{Part, Uploader},
    },
    families::idefics3::{
        config::{Config, PreprocessorConfig},
        names::{self, encoder_layer as module},
        positions,
    },
    image,
};
use vlmnarrate_cuda::{
    Attended, Gather, Gpu, Heads, Kernels, Memory, Norm, Pictures, Places, Result, Then, Weights,
};

pub(crate) struct Encoder {
    patch_embedding: Weights,
    position_embedding: Memory,
    /// Patches of a side of the pictures seen in training.
    native: usize,
    layers: Vec<Layer>,
    post_layernorm: Norm,
    connector: Weights,
    heads: Heads,
    patch: usize,
    fold: usize,
    inner: usize,
    /// What each byte of each channel is.
    values: Memory,
    /// By the side of the pictures.
    grids: HashMap<usize, Grid>,
}

struct Layer {
    layer_norm1: Norm,
    qkv: Weights,
    out_proj: Weights,
    layer_norm2: Norm,
    fc1: Weights,
    fc2: Weights,
}

/// Which position each patch has, and which patch stands where when squares of them are folded into tokens.
struct Grid {
    positions: Memory,
    folded: Memory,
    patches: usize,
    tokens: usize,
}

impl Encoder {
    pub(crate) fn load(
        config: &Config,
        preprocessor: &PreprocessorConfig,
        from: &Uploader<'_>,
    ) -> CandleResult<Self> {
        let c = &config.vision_config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let norm = |name: &str| from.layer_norm(hidden, c.layer_norm_eps, name);
        let layer = |i| {
            let name = names::encoder_layer(i);
            let linear = |parts: &[&str], rows, columns| {
                let names = parts.iter().map(|part| format!("{name}.{part}"));
                let names: Vec<_> = names.collect();
                let parts = names.iter().map(|name| Part::plain(rows, name));
                from.layers(&parts.collect::<Vec<_>>(), columns, true)
            };
            let attention = [module::Q_PROJ, module::K_PROJ, module::V_PROJ];
            Ok(Layer {
                layer_norm1: norm(&format!("{name}.{}", module::LAYER_NORM1))?,
                qkv: linear(&attention, hidden, hidden)?,
                out_proj: linear(&[module::OUT_PROJ], hidden, hidden)?,
                layer_norm2: norm(&format!("{name}.{}", module::LAYER_NORM2))?,
                fc1: linear(&[module::FC1], inner, hidden)?,
                fc2: linear(&[module::FC2], hidden, inner)?,
            })
        };
        let native = c.image_size / c.patch_size;
        let positions = names::weight(names::POSITION_EMBEDDING);
        let folded = hidden * config.scale_factor.pow(2);
        Ok(Self {
            patch_embedding: from.patches(hidden, c.patch_size, names::PATCH_EMBEDDING)?,
            position_embedding: from
                .upload(&from.floats(&[native * native, hidden], &positions)?)?,
            native,
            layers: (0..c.num_hidden_layers)
                .map(layer)
                .collect::<CandleResult<_>>()?,
            post_layernorm: norm(names::POST_LAYERNORM)?,
            connector: from.linear(config.text_config.hidden_size, folded, names::CONNECTOR)?,
            heads: Heads {
                heads: c.num_attention_heads,
                kv_heads: c.num_attention_heads,
                size: hidden / c.num_attention_heads,
            },
            patch: c.patch_size,
            fold: config.scale_factor,
            inner,
            values: from.upload(&image::values(preprocessor).concat())?,
            grids: HashMap::new(),
        })
    }

    pub(crate) fn hidden(&self) -> usize {
        self.post_layernorm.length
    }

    /// Makes room for so many pictures; says whether something moved.
    pub(crate) fn reserve(
        &mut self,
        gpu: &Gpu,
        scratch: &mut Scratch,
        count: usize,
        side: usize,
    ) -> Result<bool> {
        if !self.grids.contains_key(&side) {
            let grid = side / self.patch;
            let positions = positions::position_ids(grid, grid, self.native);
            let folded = positions::pixel_shuffle_order(grid, self.fold);
            self.grids.insert(
                side,
                Grid {
                    positions: gpu.upload(&positions)?,
                    patches: grid * grid,
                    tokens: folded.len() / self.fold.pow(2),
                    folded: gpu.upload(&folded)?,
                },
            );
        }
        let grid = &self.grids[&side];
        let hidden = self.hidden();
        let rows = count * grid.patches.max(grid.tokens * self.fold.pow(2));
        let widest = self.inner.max(self.patch_embedding.columns);
        let moved = scratch.reserve(gpu, rows, [hidden, self.heads.width(), hidden, widest, 0])?;
        let features = scratch.features(gpu, count * grid.tokens * self.connector.rows)?;
        Ok(scratch.pictures(gpu, count * side * side * 3)? | features | moved)
    }

    /// Tokens of a picture of this side, which was reserved for.
    pub(crate) fn tokens(&self, side: usize) -> usize {
        self.grids[&side].tokens
    }

    /// The last state, normed but not folded, after a run.
    pub(crate) fn normed(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        scratch: &mut Scratch,
        (count, side): (usize, usize),
    ) -> Result<Vec<f32>> {
        let rows = count * self.grids[&side].patches;
        let Scratch { x, normed, .. } = scratch;
        kernels.norm(gpu, (x, rows), &self.post_layernorm, normed, None)?;
        kernels.number().read(gpu, normed, rows * self.hidden())
    }

    /// Runs the pictures in `scratch.rgb`; their features come to `scratch.features`. `after` hears of each state.
    pub(crate) fn run(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        scratch: &mut Scratch,
        (count, side): (usize, usize),
        after: &mut dyn FnMut(&Memory, usize) -> Result<()>,
    ) -> Result<()> {
        let Scratch {
            rgb,
            features,
            x,
            normed,
            qkv,
            attended,
            inner,
            ..
        } = scratch;
        let grid = &self.grids[&side];
        let rows = count * grid.patches;
        let pictures = Pictures {
            rgb,
            count,
            side,
            patch: self.patch,
            columns: self.patch_embedding.columns,
            values: &self.values,
        };
        kernels.patches(gpu, pictures, inner)?;
        let places = Places {
            table: &self.position_embedding,
            positions: &grid.positions,
            count: grid.patches,
        };
        kernels.gemm(
            gpu,
            (inner, rows),
            &self.patch_embedding,
            Then::Embed(places),
            x,
        )?;
        after(x, rows)?;
        let attention = Attended::Pictures {
            count,
            rows: grid.patches,
        };
        for layer in &self.layers {
            kernels.norm(gpu, (x, rows), &layer.layer_norm1, normed, None)?;
            kernels.gemm(gpu, (normed, rows), &layer.qkv, Then::Store, qkv)?;
            kernels.attention(gpu, qkv, self.heads, attention, attended)?;
            kernels.gemm(gpu, (attended, rows), &layer.out_proj, Then::Add, x)?;
            kernels.norm(gpu, (x, rows), &layer.layer_norm2, normed, None)?;
            kernels.gemm(gpu, (normed, rows), &layer.fc1, Then::Gelu, inner)?;
            kernels.gemm(gpu, (inner, rows), &layer.fc2, Then::Add, x)?;
            after(x, rows)?;
        }
        let places = grid.tokens * self.fold.pow(2);
        let gather = Gather {
            source: &grid.folded,
            places,
            stride: grid.patches,
        };
        kernels.norm(
            gpu,
            (x, count * places),
            &self.post_layernorm,
            normed,
            Some(gather),
        )?;
        kernels.gemm(
            gpu,
            (normed, count * grid.tokens),
            &self.connector,
            Then::Set,
            features,
        )
    }
}
