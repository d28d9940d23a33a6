//! Activations in 8 bits.

use std::ops::Range;

use bytemuck::cast;
use rayon::prelude::*;

use super::{BLOCK_QUADS, INT8_BLOCK, TILE_ROWS, Tile, TilePair, TileQuad, part};
use crate::{
    activations::RowSource,
    lanes::{Kernel, LANES, Lanes, PAIR, QUAD, dispatch},
};

/// Reusable memory for rows in 8 bits with a scale for each block of [`INT8_BLOCK`] columns.
#[derive(Debug, Default)]
pub struct Int8Buffer {
    quads: Vec<TileQuad>,
    scales: Vec<[f32; TILE_ROWS]>,
}

/// Rows of activations in 8 bits.
#[derive(Debug, Clone, Copy)]
pub struct Int8Rows<'a> {
    quads: &'a [TileQuad],
    scales: &'a [[f32; TILE_ROWS]],
    rows: usize,
    columns: usize,
}

impl<'a> Int8Rows<'a> {
    /// Number of rows.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn columns(self) -> usize {
        self.columns
    }

    /// Fours of columns of some tiles.
    pub(crate) fn quads(self, tiles: Range<usize>) -> &'a [TileQuad] {
        let length = self.columns.div_ceil(QUAD);
        &self.quads[tiles.start * length..tiles.end * length]
    }

    /// A tile, of tiles that were widened from `first` on.
    #[inline(always)]
    pub(crate) fn tile(self, tile: usize, (widened, first): (&'a [TilePair], usize)) -> Tile<'a> {
        let blocks = self.columns.div_ceil(INT8_BLOCK);
        let quads = self.quads(tile..tile + 1);
        Tile {
            quads,
            scales: &self.scales[tile * blocks..][..blocks],
            pairs: part(widened, tile - first, PAIR * quads.len()),
        }
    }
}

/// A part of a [`Int8Buffer`] that belongs to a tile.
pub(crate) struct TileMut<'a> {
    pub(crate) quads: &'a mut [TileQuad],
    pub(crate) scales: &'a mut [[f32; TILE_ROWS]],
}

impl TileMut<'_> {
    /// Quantizes a block of a row.
    #[inline(always)]
    pub(crate) fn set<L: Lanes>(
        &mut self,
        l: L,
        (row, block): (usize, usize),
        x: &[[f32; LANES]; INT8_BLOCK / LANES],
    ) {
        let mut bytes = [[0; QUAD]; BLOCK_QUADS];
        let scale = largest_of(l, x) / I8_MAX;
        self.scales[block][row] = scale;
        quantize_block(l, x, scale, &mut bytes);
        let quads = self.quads[block * BLOCK_QUADS..].iter_mut();
        for (to, quad) in quads.zip(bytes) {
            to[row] = quad.map(signed_byte::<L>);
        }
    }
}

impl Int8Buffer {
    /// Room for so many rows, whatever is in it, as tiles.
    pub(crate) fn room(&mut self, rows: usize, columns: usize) -> Vec<TileMut<'_>> {
        let tiles = rows.div_ceil(TILE_ROWS);
        let (quads, blocks) = (columns.div_ceil(QUAD), columns.div_ceil(INT8_BLOCK));
        self.quads.resize(tiles * quads, TileQuad::default());
        self.scales.resize(tiles * blocks, [0.0; TILE_ROWS]);
        let scales = self.scales.chunks_exact_mut(blocks);
        let all = self.quads.chunks_exact_mut(quads).zip(scales);
        all.map(|(quads, scales)| TileMut { quads, scales })
            .collect()
    }

    /// The rows that were written last.
    pub(crate) fn rows(&self, rows: usize, columns: usize) -> Int8Rows<'_> {
        Int8Rows {
            quads: &self.quads,
            scales: &self.scales,
            rows,
            columns,
        }
    }

    /// Computes and quantizes all rows of `source`, in parallel.
    pub fn quantize(&mut self, source: &impl RowSource) -> Int8Rows<'_> {
        let (rows, columns) = (source.rows(), source.length());
        // A thread isn't worth waking for fewer rows.
        let part = ((1 << 14) / (columns * TILE_ROWS)).max(1);
        let mut tiles = self.room(rows, columns);
        tiles
            .par_chunks_mut(part)
            .enumerate()
            .for_each(|(i, tiles)| {
                dispatch(QuantizeTiles {
                    source,
                    first: i * part * TILE_ROWS,
                    tiles,
                });
            });
        self.rows(rows, columns)
    }
}

/// Quantizes rows to tiles, from `first` on.
pub(crate) struct QuantizeTiles<'a, 'b, S> {
    pub(crate) source: &'a S,
    pub(crate) first: usize,
    pub(crate) tiles: &'a mut [TileMut<'b>],
}

impl<S: RowSource> Kernel for QuantizeTiles<'_, '_, S> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let length = self.source.length();
        let mut row = vec![[[0.0; LANES]; INT8_BLOCK / LANES]; length.div_ceil(INT8_BLOCK)];
        for (tile, first) in self.tiles.iter_mut().zip((self.first..).step_by(TILE_ROWS)) {
            for place in 0..TILE_ROWS.min(self.source.rows() - first) {
                let to = &mut row.as_flattened_mut()[..length / LANES];
                self.source.write(l, first + place, to);
                for (block, x) in row.iter().enumerate() {
                    tile.set(l, (place, block), x);
                }
            }
        }
    }
}

/// The largest integer of an activation or a weight.
pub(crate) const I8_MAX: f32 = i8::MAX as f32;

/// A signed value as the byte that [`Lanes::dot_quads`] takes; as itself where 16 bits are multiplied.
#[inline(always)]
pub(crate) fn signed_byte<L: Lanes>(x: i8) -> u8 {
    x.cast_unsigned() ^ L::BYTE_OFFSET.unwrap_or(0)
}

/// As [`signed_byte`], of a value without a sign: smaller by 128 where bytes have signs.
#[inline(always)]
pub(crate) fn unsigned_byte<L: Lanes>(x: u8) -> u8 {
    x ^ L::BYTE_OFFSET.unwrap_or(0) ^ 128
}

/// The largest of a block, without its sign.
#[inline(always)]
pub(crate) fn largest_of<L: Lanes>(l: L, x: &[[f32; LANES]; INT8_BLOCK / LANES]) -> f32 {
    let mut largest = l.splat(0.0);
    for x in x {
        largest = l.max(l.abs(l.load(x)), largest);
    }
    l.reduce_max(largest)
}

/// Quantizes a block to integers of this scale.
#[inline(always)]
pub(crate) fn quantize_block<L: Lanes>(
    l: L,
    x: &[[f32; LANES]; INT8_BLOCK / LANES],
    scale: f32,
    to: &mut [[i8; QUAD]; BLOCK_QUADS],
) {
    let inverse_scale = l.splat(if scale > 0.0 { 1.0 / scale } else { 0.0 });
    let mut bytes = [[0; LANES]; INT8_BLOCK / LANES];
    for (x, to) in x.iter().zip(&mut bytes) {
        l.store_i8(l.round(l.mul(l.load(x), inverse_scale)), to);
    }
    *to = cast(bytes);
}
