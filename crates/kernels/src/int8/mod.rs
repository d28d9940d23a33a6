//! Products of 8-bit activations with 8-bit weights, both with a scale for each block of [`INT8_BLOCK`] columns.
//!
//! Meant for many rows, where arithmetic is what takes the time: a vision encoder's. Rows of activations are interleaved
//! by eight and weights by thirty-two, so that a product reads both from one place to the next, and has sixteen sums of
//! sixteen lanes where there are registers for them. Sums of a block are exact, and blocks are added from the first to
//! the last: a row comes out the same, to the bit, on every processor and whatever rows are computed beside it.

mod matmul;
mod rows;
mod weights;

use std::hint::black_box;

use bytemuck::cast;

pub use matmul::{gelu_matmul_int8, matmul_int8, matmul_int8_blocks};
use rows::{I8_MAX, largest_of, quantize_block};
pub use rows::{Int8Buffer, Int8Rows};
pub(crate) use rows::{TileMut, unsigned_byte};
pub use weights::Int8Weights;
pub(crate) use weights::{BlockParams, PanelQuad, scale_of, set_lane};

use crate::lanes::{LANES, Lanes, PAIR, QUAD};

/// Columns with a common scale.
pub const INT8_BLOCK: usize = 64;
/// Fours of columns in a block.
pub(crate) const BLOCK_QUADS: usize = INT8_BLOCK / QUAD;
/// Rows of activations that lie interleaved.
pub(crate) const TILE_ROWS: usize = 8;
/// Vectors of weights' rows that lie side by side.
pub(crate) const HALVES: usize = 2;
/// Rows of weights that lie interleaved.
pub(crate) const PANEL_ROWS: usize = HALVES * LANES;

/// The same four columns of a tile's rows, as [`Lanes::dot_quads`] takes them.
pub(crate) type TileQuad = [[u8; QUAD]; TILE_ROWS];
/// Products of a tile's rows with weights' rows, a vector of these at a time.
pub(crate) type TileSums<const VECTORS: usize> = [[[f32; LANES]; VECTORS]; TILE_ROWS];

/// Quantized activations of eight rows.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) quads: &'a [TileQuad],
    /// A scale for each row, of each block.
    pub(crate) scales: &'a [[f32; TILE_ROWS]],
    /// The quads [widened](widen_tiles).
    pub(crate) pairs: &'a [TilePair],
}

/// Quantized weights of thirty-two rows.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) quads: &'a [PanelQuad],
    pub(crate) params: &'a [BlockParams],
    /// The quads [widened](widen_panel).
    pub(crate) pairs: &'a [PanelPair],
}

/// What an 8-bit activation can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    /// From −127 to 127.
    Signed,
    /// From 0 to 255.
    Unsigned,
}

/// Two columns of a tile's rows in 16 bits.
pub(crate) type TilePair = [[i16; PAIR]; TILE_ROWS];
/// Two columns of a panel's rows in 16 bits.
pub(crate) type PanelPair = [[[i16; PAIR]; LANES]; HALVES];

/// Appends tiles in pairs of 16 bits, if the processor multiplies these in less time than bytes.
#[inline(always)]
pub(crate) fn widen_tiles<L: Lanes>(l: L, quads: &[TileQuad], to: &mut Vec<TilePair>) {
    if L::BYTE_OFFSET.is_some() {
        return;
    }
    for two in quads.chunks(LANES / TILE_ROWS) {
        let mut lanes = [[0; QUAD]; LANES];
        for (lane, quad) in lanes.iter_mut().zip(two.as_flattened()) {
            *lane = cast(*quad);
        }
        let mut pairs = [[[0; PAIR]; LANES]; PAIR];
        let [first, last] = l.split_pairs(l.widen_quads(&lanes));
        l.store_pairs(first, &mut pairs[0]);
        l.store_pairs(last, &mut pairs[1]);
        for i in 0..two.len() {
            for pairs in &pairs {
                to.push(pairs.as_chunks().0[i]);
            }
        }
    }
}

/// Appends a panel in pairs of 16 bits, as [`widen_tiles`].
#[inline(always)]
pub(crate) fn widen_panel<L: Lanes>(l: L, quads: &[PanelQuad], to: &mut Vec<PanelPair>) {
    if L::BYTE_OFFSET.is_some() {
        return;
    }
    for quads in quads {
        let mut pairs = [PanelPair::default(); PAIR];
        let [first, last] = &mut pairs;
        for (half, quads) in quads.iter().enumerate() {
            let [a, b] = l.split_pairs(l.widen_quads(quads));
            l.store_pairs(a, &mut first[half]);
            l.store_pairs(b, &mut last[half]);
        }
        to.extend(pairs);
    }
}

/// One of some equal parts of what was widened, if anything was.
#[inline(always)]
pub(crate) fn part<T>(widened: &[T], i: usize, length: usize) -> &[T] {
    match widened.is_empty() {
        true => &[],
        false => &widened[i * length..][..length],
    }
}

/// Products of a tile with a panel, to the vectors of `out` from `at` on, and what they are added to.
#[inline(always)]
pub(crate) fn multiply<L: Lanes, const VECTORS: usize>(
    l: L,
    (tile, sign): (Tile<'_>, Sign),
    panel: Panel<'_>,
    bias: &[[f32; LANES]; HALVES],
    (out, at): (&mut TileSums<VECTORS>, usize),
) {
    match L::BYTE_OFFSET {
        Some(offset) if L::MANY_REGISTERS => {
            let y = initial::<L, TILE_ROWS, HALVES>(l, bias);
            let y = multiply_bytes(l, (tile, sign, offset), panel, (0, 0), y);
            store(l, y, (0, at), out);
        }
        offset => {
            for half in 0..HALVES {
                for row in (0..TILE_ROWS).step_by(FEW_ROWS) {
                    let y = initial::<L, FEW_ROWS, 1>(l, &bias[half..]);
                    let y = match offset {
                        Some(offset) => {
                            multiply_bytes(l, (tile, sign, offset), panel, (row, half), y)
                        }
                        None => multiply_pairs(l, (tile, sign), panel, (row, half), y),
                    };
                    store(l, y, (row, at + half), out);
                }
            }
        }
    }
}

#[inline(always)]
fn initial<L: Lanes, const ROWS: usize, const PARTS: usize>(
    l: L,
    bias: &[[f32; LANES]],
) -> [[L::Float; PARTS]; ROWS] {
    let bias: [_; PARTS] = std::array::from_fn(
        #[inline(always)]
        |part| l.load(&bias[part]),
    );
    [bias; ROWS]
}

/// Rows at once where there are not [`Lanes::MANY_REGISTERS`].
const FEW_ROWS: usize = 4;

/// Adds products of `ROWS` rows with `PARTS` halves of the panel, from a row and a half on.
#[inline(always)]
fn multiply_bytes<L: Lanes, const ROWS: usize, const PARTS: usize>(
    l: L,
    (tile, sign, offset): (Tile<'_>, Sign, u8),
    panel: Panel<'_>,
    (row, half): (usize, usize),
    mut y: [[L::Float; PARTS]; ROWS],
) -> [[L::Float; PARTS]; ROWS] {
    // A constant would be unrolled, and then rows put before weights, for which there are no registers.
    let block = black_box(BLOCK_QUADS);
    let blocks = tile.quads.chunks(block).zip(tile.scales);
    let weights = panel.quads.chunks(block).zip(panel.params);
    for ((x, scales), (weights, params)) in blocks.zip(weights) {
        let mut sums = [[l.splat_int(0); PARTS]; ROWS];
        for part in 0..PARTS {
            let start = params.start(l, half + part, sign, offset);
            for sums in &mut sums {
                sums[part] = start;
            }
        }
        for (x, weights) in x.iter().zip(weights) {
            let weights: [_; PARTS] = std::array::from_fn(
                #[inline(always)]
                |part| l.load_quads(&weights[half + part]),
            );
            for (sums, x) in sums.iter_mut().zip(&x[row..]) {
                let x = l.splat_quad(*x);
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = l.dot_quads(*sum, x, weights);
                }
            }
        }
        add_scaled(l, &mut y, sums, &scales[row..], (params, half));
    }
    y
}

/// As [`multiply_bytes`], of 16 bits.
#[inline(always)]
fn multiply_pairs<L: Lanes>(
    l: L,
    (tile, sign): (Tile<'_>, Sign),
    panel: Panel<'_>,
    (row, half): (usize, usize),
    mut y: [[L::Float; 1]; FEW_ROWS],
) -> [[L::Float; 1]; FEW_ROWS] {
    let block = black_box(PAIR * BLOCK_QUADS);
    let blocks = tile.pairs.chunks(block).zip(tile.scales);
    let weights = panel.pairs.chunks(block).zip(panel.params);
    for ((x, scales), (weights, params)) in blocks.zip(weights) {
        let mut sums = [[params.start(l, half, sign, 0); 1]; FEW_ROWS];
        for (x, weights) in x.iter().zip(weights) {
            let weights = l.load_pairs(&weights[half]);
            for ([sum], x) in sums.iter_mut().zip(&x[row..]) {
                *sum = l.dot_pairs(*sum, l.splat_pair(*x), weights);
            }
        }
        add_scaled(l, &mut y, sums, &scales[row..], (params, half));
    }
    y
}

#[inline(always)]
fn add_scaled<L: Lanes, const ROWS: usize, const PARTS: usize>(
    l: L,
    y: &mut [[L::Float; PARTS]; ROWS],
    sums: [[L::Int; PARTS]; ROWS],
    rows: &[f32],
    (params, half): (&BlockParams, usize),
) {
    let weights: [_; PARTS] = std::array::from_fn(
        #[inline(always)]
        |part| params.scales(l, half + part),
    );
    for ((y, sums), scale) in y.iter_mut().zip(sums).zip(rows) {
        for ((y, sum), weights) in y.iter_mut().zip(sums).zip(weights) {
            *y = l.mul_add(l.to_float(sum), l.mul(weights, l.splat(*scale)), *y);
        }
    }
}

#[inline(always)]
fn store<L: Lanes, const ROWS: usize, const PARTS: usize, const VECTORS: usize>(
    l: L,
    y: [[L::Float; PARTS]; ROWS],
    (row, at): (usize, usize),
    out: &mut TileSums<VECTORS>,
) {
    for (y, out) in y.into_iter().zip(&mut out[row..]) {
        // Behind the last vector nothing is wanted.
        for (y, out) in y.into_iter().zip(out.iter_mut().skip(at)) {
            l.store(y, out);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::lanes::Kernel;

    /// What quantized rows stand for.
    #[derive(Clone)]
    pub(crate) struct Decode<'a>(pub(crate) Int8Rows<'a>);

    impl Kernel for Decode<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, _: L) -> Vec<f32> {
            let mut values = Vec::new();
            for row in 0..self.0.rows() {
                let tile = self.0.tile(row / TILE_ROWS, (&[], 0));
                let blocks = tile.quads.chunks(BLOCK_QUADS).zip(tile.scales);
                for (quads, scales) in blocks {
                    let row = row % TILE_ROWS;
                    let bytes = quads.iter().flat_map(|quad| quad[row]);
                    let sign = L::BYTE_OFFSET.unwrap_or(0);
                    let value = |byte: u8| f32::from((byte ^ sign).cast_signed()) * scales[row];
                    values.extend(bytes.map(value));
                }
            }
            values
        }
    }
}
