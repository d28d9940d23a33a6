//! Weights in 8 bits.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::{
    BLOCK_QUADS, HALVES, I8_MAX, INT8_BLOCK, PANEL_ROWS, Panel, PanelPair, Sign, largest_of, part,
    quantize_block,
};
use crate::{
    lanes::{Kernel, LANES, Lanes, PAIR, QUAD, dispatch},
    weights::{Storage, all_finite},
};

/// The same four columns of thirty-two rows of weights.
pub(crate) type PanelQuad = [[[i8; QUAD]; LANES]; HALVES];

/// Of a block of columns of thirty-two rows of weights.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct BlockParams {
    /// As [`bfloat16`](scale_of) has them.
    scales: [[u16; LANES]; HALVES],
    /// Sums of the weights, 128 times which a product grows by if each activation is larger by 128.
    sums: [[i16; LANES]; HALVES],
}

impl BlockParams {
    /// Of weights that are known. `scales` is for each row, as [`scale_of`] gives them.
    pub(crate) fn new(scales: [[f32; LANES]; HALVES], quads: &[PanelQuad]) -> Self {
        let mut sums = [[0; LANES]; HALVES];
        for quad in quads {
            for (sum, quad) in sums.as_flattened_mut().iter_mut().zip(quad.as_flattened()) {
                *sum += quad.iter().map(|x| i16::from(*x)).sum::<i16>();
            }
        }
        Self {
            scales: scales.map(|half| half.map(|scale| (scale.to_bits() >> 16) as u16)),
            sums,
        }
    }

    #[inline(always)]
    pub(crate) fn scales<L: Lanes>(&self, l: L, half: usize) -> L::Float {
        l.load_bf16(&self.scales[half])
    }

    /// What sums of products of bytes start with, so that they end as those of activations of this sign.
    #[inline(always)]
    pub(crate) fn start<L: Lanes>(&self, l: L, half: usize, sign: Sign, offset: u8) -> L::Int {
        let zero = l.splat_int(0);
        let excess = l.load_times_128(&self.sums[half]);
        match (sign, offset) {
            // The bytes are larger by 128 than the activations, or smaller.
            (Sign::Signed, 128) => l.sub_int(zero, excess),
            (Sign::Unsigned, 0) => excess,
            _ => zero,
        }
    }
}

/// The scale of weights, the largest of which is so large: the next bfloat16, with which it becomes no more than 127.
#[inline(always)]
pub(crate) fn scale_of(largest: f32) -> f32 {
    f32::from_bits((largest / I8_MAX).to_bits().wrapping_add(0xffff) & !0xffff)
}

/// A weight matrix `[rows, columns]` in 8 bits with a scale for each row and block of [`INT8_BLOCK`] columns.
///
/// Panels of thirty-two rows follow each other, each with its fours of columns from the first to the last.
#[derive(Debug)]
pub struct Int8Weights {
    quads: Storage<PanelQuad>,
    params: Storage<BlockParams>,
    rows: usize,
    columns: usize,
}

impl Int8Weights {
    /// Quantizes rows, in parallel. `write` puts a row, by its number, to where it is told. `None` if a value is not
    /// finite.
    ///
    /// # Panics
    ///
    /// If `columns` is zero.
    pub fn quantize(
        rows: usize,
        columns: usize,
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Option<Self> {
        let mut weights = Self::zeros(rows, columns);
        let (quads, blocks) = weights.panel_lengths();
        let all = weights.quads.all_mut().par_chunks_exact_mut(quads);
        let all = all.zip(weights.params.all_mut().par_chunks_exact_mut(blocks));
        let is_finite = all.enumerate().all(|(panel, (quads, params))| {
            let mut row = vec![0.0; blocks * INT8_BLOCK];
            let first = panel * PANEL_ROWS;
            let mut scales = vec![[[0.0; LANES]; HALVES]; blocks];
            for place in 0..PANEL_ROWS.min(rows - first) {
                write(first + place, &mut row[..columns]);
                let quantized = dispatch(QuantizeRow {
                    row: &row,
                    place: (place / LANES, place % LANES),
                    quads,
                    scales: &mut scales,
                });
                if !quantized {
                    return false;
                }
            }
            let blocks = quads.chunks(BLOCK_QUADS).zip(scales);
            for ((quads, scales), params) in blocks.zip(params) {
                *params = BlockParams::new(scales, quads);
            }
            true
        });
        is_finite.then_some(weights)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// A matrix of zeros.
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        assert!(columns > 0);
        let mut weights = Self {
            quads: Storage::zeroed(0),
            params: Storage::zeroed(0),
            rows,
            columns,
        };
        let (quads, blocks) = weights.panel_lengths();
        weights.quads = Storage::zeroed(weights.panels() * quads);
        weights.params = Storage::zeroed(weights.panels() * blocks);
        weights
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// Fours of columns, and blocks.
    fn panel_lengths(&self) -> (usize, usize) {
        (
            self.columns.div_ceil(QUAD),
            self.columns.div_ceil(INT8_BLOCK),
        )
    }

    /// A panel, of panels that were widened from `first` on.
    #[inline(always)]
    pub(crate) fn panel<'a>(
        &'a self,
        panel: usize,
        (widened, first): (&'a [PanelPair], usize),
    ) -> Panel<'a> {
        let (quads, blocks) = self.panel_lengths();
        Panel {
            quads: &self.quads.all()[panel * quads..][..quads],
            params: &self.params.all()[panel * blocks..][..blocks],
            pairs: part(widened, panel - first, PAIR * quads),
        }
    }

    /// The fours of columns of a panel, and its blocks.
    pub(crate) fn panel_mut(&mut self, panel: usize) -> (&mut [PanelQuad], &mut [BlockParams]) {
        let (quads, blocks) = self.panel_lengths();
        (
            &mut self.quads.all_mut()[panel * quads..][..quads],
            &mut self.params.all_mut()[panel * blocks..][..blocks],
        )
    }
}

/// Quantizes a row, in whole blocks, to its place in a panel. Gives whether all values are finite.
struct QuantizeRow<'a> {
    row: &'a [f32],
    place: (usize, usize),
    quads: &'a mut [PanelQuad],
    scales: &'a mut [[[f32; LANES]; HALVES]],
}

impl Kernel for QuantizeRow<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> bool {
        let (half, lane) = self.place;
        let blocks = self.row.as_chunks::<INT8_BLOCK>().0.iter();
        let quads = self.quads.chunks_mut(BLOCK_QUADS);
        for ((row, quads), scales) in blocks.zip(quads).zip(self.scales) {
            if !all_finite(row) {
                return false;
            }
            let row = row.as_chunks().0.first_chunk().expect("a whole block");
            scales[half][lane] = set_lane(l, row, (half, lane), quads);
        }
        true
    }
}

/// Quantizes a block of a row to its place in a panel, and returns its scale.
#[inline(always)]
pub(crate) fn set_lane<L: Lanes>(
    l: L,
    x: &[[f32; LANES]; INT8_BLOCK / LANES],
    (half, lane): (usize, usize),
    quads: &mut [PanelQuad],
) -> f32 {
    let mut bytes = [[0; QUAD]; BLOCK_QUADS];
    let scale = scale_of(largest_of(l, x));
    quantize_block(l, x, scale, &mut bytes);
    for (quad, bytes) in quads.iter_mut().zip(bytes) {
        quad[half][lane] = bytes;
    }
    scale
}
