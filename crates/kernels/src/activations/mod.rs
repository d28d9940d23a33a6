//! Rows of activations, quantized for products with blocks of weights.

mod i16;

use std::{fmt::Debug, hint::black_box, marker::PhantomData, ops::Range};

pub use i16::I16PerRow;
use rayon::prelude::*;

use super::{
    lanes::{Kernel, LANES, Lanes, dispatch},
    weights::{BLOCK, BlockQ4_0x16, DotI8, MAX_TILE_ROWS, QUADS, UnpackedQ4_0x16},
};

/// Rows of f32 activations, computed one at a time while they are in the first cache.
///
/// Implemented by what can stand before a product: [`F32Rows`](crate::F32Rows), [`LayerNorm`](crate::LayerNorm),
/// [`RmsNorm`](crate::RmsNorm) and [`SwiGlu`](crate::SwiGlu).
pub trait RowSource: Sync {
    /// Number of rows.
    fn rows(&self) -> usize;
    /// Values of a row, a multiple of [`LANES`].
    fn length(&self) -> usize;
    /// Writes a row. `inline(always)`, as everything that a [`Kernel`] calls.
    #[doc(hidden)]
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]);
}

/// A format that rows of activations are quantized to.
pub trait ActivationFormat: Copy + Send + Sync {
    /// A quantized activation.
    type Value: Debug + Copy + Default + Send + Sync;
    /// Scale, and offset or sum, of a row or of a block.
    type QuantParams: Debug + Copy + Default + Send + Sync;

    /// Number of [`QuantParams`](Self::QuantParams) of a row of so many blocks.
    fn params_per_row(blocks: usize) -> usize;
    /// Of so many rows, how many lie interleaved; 1 if each lies by itself.
    #[doc(hidden)]
    fn interleaved<L: Lanes>(_rows: usize) -> usize {
        1
    }
    /// Quantizes a row to its place, from 0, of so many among [interleaved](Self::interleaved) ones.
    #[doc(hidden)]
    fn quantize<L: Lanes>(
        l: L,
        row: &[[f32; LANES]],
        place: (usize, usize),
        values: &mut [Self::Value],
        params: &mut [Self::QuantParams],
    );
}

/// An activation format that can be multiplied with weights in blocks `B`.
pub trait MatMul<B>: ActivationFormat {
    /// What is computed once from sixteen rows of weights, before the first product.
    #[doc(hidden)]
    type Prepared: Default;

    /// Most rows of a tile without [`Lanes::MANY_REGISTERS`].
    #[doc(hidden)]
    const MAX_FEW_REGISTER_ROWS: usize;
    /// Rows that a tile has when there are so many in all.
    #[doc(hidden)]
    fn tile_rows<L: Lanes>(rows: usize) -> usize;
    /// Prepares weights for so many rows, in the memory of the sixteen rows before.
    #[doc(hidden)]
    fn prepare<L: Lanes>(l: L, rows: usize, weights: &[B], prepared: &mut Self::Prepared);
    /// Dot products of `ROWS` rows from `first` on.
    #[doc(hidden)]
    fn dot_rows<L: Lanes, const ROWS: usize>(
        l: L,
        x: QuantizedRows<'_, Self>,
        first: usize,
        weights: &[B],
        prepared: &Self::Prepared,
    ) -> [L::Float; ROWS];
}

/// Quantized rows of activations.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedRows<'a, F: ActivationFormat> {
    pub(crate) values: &'a [F::Value],
    pub(crate) params: &'a [F::QuantParams],
    pub(crate) rows: usize,
    /// Values of a row, in whole blocks.
    pub(crate) length: usize,
}

impl<'a, F: ActivationFormat> QuantizedRows<'a, F> {
    /// Number of rows.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Blocks of `ROWS` rows from `first` on.
    #[inline(always)]
    fn blocks<const ROWS: usize>(self, first: usize) -> [&'a [[F::Value; BLOCK]]; ROWS] {
        let blocks = self.length / BLOCK;
        std::array::from_fn(
            #[inline(always)]
            |row| &self.values.as_chunks().0[(first + row) * blocks..][..blocks],
        )
    }
}

/// The same block of each of some rows.
#[inline(always)]
fn column<'a, T, const ROWS: usize>(rows: &[&'a [T]; ROWS], block: usize) -> [&'a T; ROWS] {
    std::array::from_fn(
        #[inline(always)]
        |row| &rows[row][block],
    )
}

/// Signed 8 bits with a scale for each block of 32, as ggml's Q8_0 and Q8_1.
///
/// The products of a whole block with 4 bits fit 16.
#[derive(Debug, Clone, Copy, Default)]
pub struct I8PerBlock;

/// Scale and sum of a block of [`I8PerBlock`].
#[derive(Debug, Clone, Copy, Default)]
pub struct I8BlockParams {
    scale: f32,
    /// Sum of the quantized activations.
    sum: i32,
}

impl ActivationFormat for I8PerBlock {
    type Value = i8;
    type QuantParams = I8BlockParams;

    fn params_per_row(blocks: usize) -> usize {
        blocks
    }

    #[inline(always)]
    fn quantize<L: Lanes>(
        l: L,
        row: &[[f32; LANES]],
        _: (usize, usize),
        values: &mut [i8],
        params: &mut [I8BlockParams],
    ) {
        let blocks = row.chunks_exact(BLOCK / LANES);
        let values = values.as_chunks_mut::<BLOCK>().0.iter_mut();
        for ((x, to), params) in blocks.zip(values).zip(params) {
            params.scale = quantize_symmetric(
                l,
                x,
                i8::MAX.into(),
                to.as_chunks_mut().0,
                #[inline(always)]
                |x, to| l.store_i8(x, to),
            );
            params.sum = to.iter().map(|x| i32::from(*x)).sum();
        }
    }
}

impl MatMul<BlockQ4_0x16> for I8PerBlock {
    /// Blocks with a byte for each weight, or none.
    type Prepared = Vec<UnpackedQ4_0x16>;

    const MAX_FEW_REGISTER_ROWS: usize = 5;

    fn tile_rows<L: Lanes>(rows: usize) -> usize {
        match L::MANY_REGISTERS {
            _ if rows <= MAX_PACKED_ROWS => MAX_PACKED_ROWS,
            true => MAX_TILE_ROWS,
            false => Self::MAX_FEW_REGISTER_ROWS,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(
        l: L,
        rows: usize,
        weights: &[BlockQ4_0x16],
        unpacked: &mut Self::Prepared,
    ) {
        unpacked.clear();
        if rows <= MAX_PACKED_ROWS {
            return;
        }
        for block in weights {
            unpacked.push(UnpackedQ4_0x16::new(l, block));
        }
    }

    #[inline(always)]
    fn dot_rows<L: Lanes, const ROWS: usize>(
        l: L,
        x: QuantizedRows<'_, Self>,
        first: usize,
        weights: &[BlockQ4_0x16],
        unpacked: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        // The first arm is compiled for no more rows than there are registers for.
        match ROWS <= MAX_PACKED_ROWS && unpacked.is_empty() {
            true => dot_i8(l, x, first, weights, QUADS),
            false => dot_i8(l, x, first, unpacked, black_box(QUADS)),
        }
    }
}

/// Most rows for which 4 bits are not unpacked first.
const MAX_PACKED_ROWS: usize = 2;

#[inline(always)]
fn dot_i8<B: DotI8, L: Lanes, const ROWS: usize>(
    l: L,
    x: QuantizedRows<'_, I8PerBlock>,
    first: usize,
    weights: &[B],
    quads: usize,
) -> [L::Float; ROWS] {
    let rows = x.blocks::<ROWS>(first);
    let mut y = [l.splat(0.0); ROWS];
    for (i, block) in weights.iter().enumerate() {
        let products = block.dot_i8_rows(l, column(&rows, i), quads);
        let scales = block.scales(l);
        for (row, (y, products)) in y.iter_mut().zip(products).enumerate() {
            let I8BlockParams { scale, sum } = x.params[(first + row) * weights.len() + i];
            // Each weight was taken as larger by 8.
            let products = l.sub_int(l.reduce_narrow(products), l.splat_int(8 * sum));
            *y = l.mul_add(l.to_float(products), l.mul(scales, l.splat(scale)), *y);
        }
    }
    y
}

/// Reusable memory for rows in each format.
#[derive(Debug, Default)]
pub struct ActivationBuffers {
    /// For Q8_0 weights.
    pub i16_per_row: ActivationBuffer<I16PerRow>,
    /// For Q4_0 weights.
    pub i8_per_block: ActivationBuffer<I8PerBlock>,
}

/// Reusable memory for rows in one format.
#[derive(Debug, Default)]
pub struct ActivationBuffer<F: ActivationFormat> {
    values: Vec<F::Value>,
    params: Vec<F::QuantParams>,
}

impl<F: ActivationFormat> ActivationBuffer<F> {
    /// Computes and quantizes all rows of `source`, in parallel, each padded with zeros to whole blocks.
    pub fn quantize(&mut self, source: &impl RowSource) -> QuantizedRows<'_, F> {
        let rows = source.rows();
        let length = source.length().next_multiple_of(BLOCK);
        let params = F::params_per_row(length / BLOCK);
        let together = dispatch(Interleaved(rows, PhantomData::<F>));
        let places = rows.next_multiple_of(together);
        self.values.resize(places * length, F::Value::default());
        self.params
            .resize(places * params, F::QuantParams::default());
        // A thread isn't worth waking for fewer rows.
        let part = ((1 << 14) / length).max(1).next_multiple_of(together);
        self.values
            .par_chunks_mut(part * length)
            .zip(self.params.par_chunks_mut(part * params))
            .enumerate()
            .for_each(|(i, (values, params))| {
                dispatch(QuantizeRows::<_, F> {
                    source,
                    rows: i * part..rows.min((i + 1) * part),
                    interleaved: together,
                    values,
                    params,
                })
            });
        QuantizedRows {
            values: &self.values,
            params: &self.params,
            rows,
            length,
        }
    }
}

/// Asks how many of some rows lie interleaved.
struct Interleaved<F>(usize, PhantomData<F>);

impl<F: ActivationFormat> Kernel for Interleaved<F> {
    type Output = usize;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> usize {
        F::interleaved::<L>(self.0)
    }
}

/// Quantizes some rows, the first of which begins interleaved ones.
pub(crate) struct QuantizeRows<'a, S, F: ActivationFormat> {
    pub(crate) source: &'a S,
    pub(crate) rows: Range<usize>,
    pub(crate) interleaved: usize,
    pub(crate) values: &'a mut [F::Value],
    pub(crate) params: &'a mut [F::QuantParams],
}

impl<S: RowSource, F: ActivationFormat> Kernel for QuantizeRows<'_, S, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let length = self.source.length();
        assert!(length.is_multiple_of(LANES));
        let padded = length.next_multiple_of(BLOCK);
        let mut row = vec![[0.0; LANES]; padded / LANES];
        let together = self.interleaved;
        let params = F::params_per_row(padded / BLOCK);
        let values = self.values.chunks_exact_mut(together * padded);
        let params = self.params.chunks_exact_mut(together * params);
        let mut rows = self.rows;
        for (values, params) in values.zip(params) {
            for (place, i) in rows.by_ref().take(together).enumerate() {
                self.source.write(l, i, &mut row[..length / LANES]);
                F::quantize(l, &row, (place, together), values, params);
            }
        }
    }
}

pub(crate) const I16_MAX: f32 = i16::MAX as f32;

/// Quantizes values to integers from `-max` to `max` and returns their scale.
#[inline(always)]
pub(crate) fn quantize_i16<L: Lanes>(
    l: L,
    row: &[[f32; LANES]],
    max: f32,
    to: &mut [[i16; LANES]],
) -> f32 {
    quantize_symmetric(
        l,
        row,
        max,
        to,
        #[inline(always)]
        |x, to| l.store_i16(x, to),
    )
}

/// As [`quantize_i16`], to integers of any size.
#[inline(always)]
fn quantize_symmetric<L: Lanes, T>(
    l: L,
    row: &[[f32; LANES]],
    max: f32,
    to: &mut [[T; LANES]],
    store: impl Fn(L::Int, &mut [T; LANES]),
) -> f32 {
    let (inverse_scale, scale) = symmetric_scale(l, row, max);
    for (x, to) in row.iter().zip(to) {
        store(l.round(l.mul(l.load(x), l.splat(inverse_scale))), to);
    }
    scale
}

/// What values are multiplied with to become integers from `-max` to `max`, and these to become values.
#[inline(always)]
fn symmetric_scale<L: Lanes>(l: L, row: &[[f32; LANES]], max: f32) -> (f32, f32) {
    let mut largest = l.splat(0.0);
    for x in row {
        largest = l.max(l.abs(l.load(x)), largest);
    }
    let largest = l.reduce_max(largest);
    let inverse_scale = if largest > 0.0 { max / largest } else { 0.0 };
    (inverse_scale, largest / max)
}
