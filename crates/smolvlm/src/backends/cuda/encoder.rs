//! The vision encoder on the GPU, for several images at once.

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
    Attention, Epilogue, Gpu, Images, Kernels, Memory, Norm, PositionEmbedding, QkvShape, Result,
    RowGather, Weights,
};

pub(crate) struct Encoder {
    patch_embedding: Weights,
    position_embedding: Memory,
    /// Patches of a side of the images that the position embedding was trained with.
    native_grid: usize,
    layers: Vec<Layer>,
    post_layernorm: Norm,
    connector: Weights,
    qkv_shape: QkvShape,
    patch_size: usize,
    /// The pixel-shuffle factor: a token is made of its square of patches.
    scale_factor: usize,
    intermediate: usize,
    /// As [`Images::pixel_table`].
    pixel_table: Memory,
    /// By the side of the images.
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

/// Position ids of an image's patches, and their order for the pixel shuffle.
struct Grid {
    position_ids: Memory,
    pixel_shuffle: Memory,
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
        let (hidden, intermediate) = (c.hidden_size, c.intermediate_size);
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
                fc1: linear(&[module::FC1], intermediate, hidden)?,
                fc2: linear(&[module::FC2], hidden, intermediate)?,
            })
        };
        let native_grid = c.image_size / c.patch_size;
        let positions = names::weight(names::POSITION_EMBEDDING);
        let shuffled = hidden * config.scale_factor.pow(2);
        Ok(Self {
            patch_embedding: from.patches(hidden, c.patch_size, names::PATCH_EMBEDDING)?,
            position_embedding: from
                .upload(&from.floats(&[native_grid * native_grid, hidden], &positions)?)?,
            native_grid,
            layers: (0..c.num_hidden_layers)
                .map(layer)
                .collect::<CandleResult<_>>()?,
            post_layernorm: norm(names::POST_LAYERNORM)?,
            connector: from.linear(config.text_config.hidden_size, shuffled, names::CONNECTOR)?,
            qkv_shape: QkvShape {
                heads: c.num_attention_heads,
                kv_heads: c.num_attention_heads,
                head_size: hidden / c.num_attention_heads,
            },
            patch_size: c.patch_size,
            scale_factor: config.scale_factor,
            intermediate,
            pixel_table: from.upload(&image::normalization_tables(preprocessor).concat())?,
            grids: HashMap::new(),
        })
    }

    pub(crate) fn hidden(&self) -> usize {
        self.post_layernorm.length
    }

    /// Makes room for so many images of a size. Returns whether memory moved.
    pub(crate) fn reserve(
        &mut self,
        gpu: &Gpu,
        scratch: &mut Scratch,
        count: usize,
        side: usize,
    ) -> Result<bool> {
        if !self.grids.contains_key(&side) {
            let grid = side / self.patch_size;
            let position_ids = positions::position_ids(grid, grid, self.native_grid);
            let order = positions::pixel_shuffle_order(grid, self.scale_factor);
            self.grids.insert(
                side,
                Grid {
                    position_ids: gpu.upload(&position_ids)?,
                    patches: grid * grid,
                    tokens: order.len() / self.scale_factor.pow(2),
                    pixel_shuffle: gpu.upload(&order)?,
                },
            );
        }
        let grid = &self.grids[&side];
        let hidden = self.hidden();
        let rows = count * grid.patches.max(grid.tokens * self.scale_factor.pow(2));
        let widest = self.intermediate.max(self.patch_embedding.columns);
        let moved = scratch.reserve(
            gpu,
            rows,
            [hidden, self.qkv_shape.row_length(), hidden, widest, 0],
        )?;
        let features = scratch.features(gpu, count * grid.tokens * self.connector.rows)?;
        Ok(scratch.images(gpu, count * side * side * 3)? | features | moved)
    }

    /// Tokens of an image of this side, for which there must be room.
    pub(crate) fn tokens(&self, side: usize) -> usize {
        self.grids[&side].tokens
    }

    /// The normed last hidden state, before the pixel shuffle, after a run.
    pub(crate) fn last_hidden_state(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        scratch: &mut Scratch,
        (count, side): (usize, usize),
    ) -> Result<Vec<f32>> {
        let rows = count * self.grids[&side].patches;
        let Scratch { x, normed, .. } = scratch;
        kernels.norm(gpu, (x, rows), &self.post_layernorm, normed, None)?;
        kernels.dtype().read(gpu, normed, rows * self.hidden())
    }

    /// Encodes the images in `scratch.rgb` to `scratch.features`. `after` is called with each hidden state.
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
            attn_out,
            inner,
            ..
        } = scratch;
        let grid = &self.grids[&side];
        let rows = count * grid.patches;
        let images = Images {
            rgb,
            count,
            side,
            patch_size: self.patch_size,
            columns: self.patch_embedding.columns,
            pixel_table: &self.pixel_table,
        };
        kernels.patchify(gpu, images, inner)?;
        let positions = PositionEmbedding {
            table: &self.position_embedding,
            ids: &grid.position_ids,
            patches: grid.patches,
        };
        kernels.gemm(
            gpu,
            (inner, rows),
            &self.patch_embedding,
            Epilogue::AddPositions(positions),
            x,
        )?;
        after(x, rows)?;
        let attention = Attention::Bidirectional {
            images: count,
            rows: grid.patches,
        };
        for layer in &self.layers {
            kernels.norm(gpu, (x, rows), &layer.layer_norm1, normed, None)?;
            kernels.gemm(gpu, (normed, rows), &layer.qkv, Epilogue::Store, qkv)?;
            kernels.attention(gpu, qkv, self.qkv_shape, attention, attn_out)?;
            kernels.gemm(gpu, (attn_out, rows), &layer.out_proj, Epilogue::AddF32, x)?;
            kernels.norm(gpu, (x, rows), &layer.layer_norm2, normed, None)?;
            kernels.gemm(gpu, (normed, rows), &layer.fc1, Epilogue::Gelu, inner)?;
            kernels.gemm(gpu, (inner, rows), &layer.fc2, Epilogue::AddF32, x)?;
            after(x, rows)?;
        }
        let per_image = grid.tokens * self.scale_factor.pow(2);
        let gather = RowGather {
            indices: &grid.pixel_shuffle,
            per_image,
            stride: grid.patches,
        };
        kernels.norm(
            gpu,
            (x, count * per_image),
            &self.post_layernorm,
            normed,
            Some(gather),
        )?;
        kernels.gemm(
            gpu,
            (normed, count * grid.tokens),
            &self.connector,
            Epilogue::StoreF32,
            features,
        )
    }
}
