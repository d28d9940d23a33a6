//! Activations in 16 bits.

use std::hint::black_box;

use bytemuck::{cast, cast_slice};

use super::{
    ActivationFormat, I16_MAX, MatMul, QuantizedRows, column, quantize_i16, symmetric_scale,
};
use crate::{
    lanes::{LANES, Lanes, QUAD},
    weights::{BlockI16x16, BlockQ8_0x16, DotI16, MAX_TILE_ROWS, QUADS},
};

/// 16 bits with a scale for each row. The error of a product is that of its weights alone.
///
/// Where bytes are multiplied fastest, four activations lie as their four lower bytes and then their four higher ones,
/// both without signs, and the rows of a tile are interleaved by such fours. So 8-bit weights need not be widened, and
/// whole sums are the same integers.
#[derive(Debug, Clone, Copy, Default)]
pub struct I16PerRow;

impl ActivationFormat for I16PerRow {
    type Value = i16;
    /// The scale.
    type QuantParams = f32;

    fn params_per_row(_: usize) -> usize {
        1
    }

    #[inline(always)]
    fn interleaved<L: Lanes>(rows: usize) -> usize {
        match L::SPLITS_I16 {
            true => rows.clamp(1, SPLIT_TILE_ROWS),
            false => 1,
        }
    }

    #[inline(always)]
    fn quantize<L: Lanes>(
        l: L,
        row: &[[f32; LANES]],
        (place, places): (usize, usize),
        values: &mut [i16],
        params: &mut [f32],
    ) {
        if !L::SPLITS_I16 {
            params[0] = quantize_i16(l, row, I16_MAX, values.as_chunks_mut().0);
            return;
        }
        let inverse_scale;
        (inverse_scale, params[place]) = symmetric_scale(l, row, I16_MAX);
        let fours = values.as_chunks_mut::<QUAD>().0;
        let lanes = fours.chunks_exact_mut(places * LANES / QUAD);
        for (x, to) in row.iter().zip(lanes) {
            let mut quantized = [0; LANES];
            let x = l.mul(l.load(x), l.splat(inverse_scale));
            l.store_i16(l.round(x), &mut quantized);
            // Bytes of a whole vector at a time.
            let low: [[u8; QUAD]; LANES / QUAD] = cast(quantized.map(|x| x as u8));
            let high: [[u8; QUAD]; LANES / QUAD] = cast(quantized.map(|x| (x >> 8) as u8 ^ SIGN));
            for (four, to) in low.into_iter().zip(high).zip(to.chunks_exact_mut(places)) {
                to[place] = cast(<[_; 2]>::from(four));
            }
        }
    }
}

/// The sign of a byte, which makes −128 to 127 of 0 to 255.
const SIGN: u8 = 0x80;

impl MatMul<BlockQ8_0x16> for I16PerRow {
    /// Weights widened to 16 bits, or none.
    type Prepared = Vec<BlockI16x16>;

    const MAX_FEW_REGISTER_ROWS: usize = 6;

    fn tile_rows<L: Lanes>(rows: usize) -> usize {
        match L::SPLITS_I16 {
            // Three sums a row, and four registers for weights and their scales.
            true => SPLIT_TILE_ROWS,
            false => match widens(rows) {
                false => WITHOUT_WIDENING,
                true if L::MANY_REGISTERS => MAX_TILE_ROWS,
                true => Self::MAX_FEW_REGISTER_ROWS,
            },
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(l: L, rows: usize, weights: &[BlockQ8_0x16], wide: &mut Self::Prepared) {
        wide.clear();
        if !L::SPLITS_I16 && widens(rows) {
            // An iterator's closure would not be inlined.
            for block in weights {
                wide.push(block.to_i16(l));
            }
        }
    }

    #[inline(always)]
    fn dot_rows<L: Lanes, const ROWS: usize>(
        l: L,
        x: QuantizedRows<'_, Self>,
        first: usize,
        weights: &[BlockQ8_0x16],
        wide: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        // Each arm is compiled for no more rows than there are registers for.
        if L::SPLITS_I16 {
            return match ROWS <= SPLIT_TILE_ROWS {
                true => dot_split(l, x, first, weights),
                false => [l.splat(0.0); ROWS],
            };
        }
        match ROWS <= WITHOUT_WIDENING && wide.is_empty() {
            true => dot_blocks(l, x, first, weights),
            false => dot_blocks(l, x, first, wide),
        }
    }
}

/// Rows of a tile of products by bytes.
const SPLIT_TILE_ROWS: usize = 8;
/// Rows for which weights are not worth widening.
const WITHOUT_WIDENING: usize = 2;

fn widens(rows: usize) -> bool {
    rows > WITHOUT_WIDENING
}

/// Dot products of `ROWS` rows from `first` on, by bytes.
#[inline(always)]
fn dot_split<L: Lanes, const ROWS: usize>(
    l: L,
    x: QuantizedRows<'_, I16PerRow>,
    first: usize,
    weights: &[BlockQ8_0x16],
) -> [L::Float; ROWS] {
    let places = I16PerRow::interleaved::<L>(x.rows);
    let (tile, place) = (first / places, first % places);
    let values: &[[[u8; QUAD]; 2]] = cast_slice(x.values);
    let blocks = values.chunks_exact(places * QUADS);
    let quads = black_box(QUADS);
    let mut y = [l.splat(0.0); ROWS];
    for (block, x) in weights.iter().zip(blocks.skip(tile * weights.len())) {
        let products: [_; ROWS] = block.dot_split_rows(l, &x[place..], places, quads);
        let scales = block.scales(l);
        for (y, products) in y.iter_mut().zip(products) {
            *y = l.mul_add(l.to_float(products), scales, *y);
        }
    }
    for (y, scale) in y.iter_mut().zip(&x.params[first..]) {
        *y = l.mul(*y, l.splat(*scale));
    }
    y
}

/// Dot products of `ROWS` rows from `first` on, by the sums of each block.
#[inline(always)]
fn dot_blocks<B: DotI16, L: Lanes, const ROWS: usize>(
    l: L,
    x: QuantizedRows<'_, I16PerRow>,
    first: usize,
    weights: &[B],
) -> [L::Float; ROWS] {
    let rows = x.blocks::<ROWS>(first);
    let mut y = [l.splat(0.0); ROWS];
    for (i, block) in weights.iter().enumerate() {
        let products = block.dot_rows(l, column(&rows, i));
        let scales = block.scales(l);
        for (y, products) in y.iter_mut().zip(products) {
            *y = l.mul_add(l.to_float(products), scales, *y);
        }
    }
    for (y, scale) in y.iter_mut().zip(&x.params[first..]) {
        *y = l.mul(*y, l.splat(*scale));
    }
    y
}
