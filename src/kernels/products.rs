//! Products with packed weights: integers inside blocks of 32, floats from block to block.
//!
//! Activations are rounded to 16 bits by a scale of each row, so that the error is that of the weights
//! alone. A sum of 32 products of 16 by at most 12 bits is exact in an `i32`, so the order inside a block
//! doesn't matter; the blocks of a row are added from the first to the last. Hence a row comes out the same to
//! the bit whatever rows are computed beside it.

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::lanes::{Kernel, LANES, Lanes, PAIR, dispatch};

/// Values of a row with a common scale.
pub(crate) const BLOCK: usize = 32;
const PAIRS: usize = BLOCK / PAIR;

/// A block of each of sixteen rows of weights.
pub(crate) trait Block: Pod + Send + Sync {
    fn scales<L: Lanes>(&self, lanes: L) -> L::Float;
    /// Sums of what some rows of activations give with it.
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        lanes: L,
        x: [&[[i16; PAIR]; PAIRS]; ROWS],
    ) -> [L::Int; ROWS];
}

/// A block whose rows ggml has in bytes: a scale of half precision, then the weights.
pub(crate) trait Stored: Block {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]);
}

/// Adds the products of these neighbours to the sums.
#[inline(always)]
fn add_products<L: Lanes, const ROWS: usize>(
    l: L,
    sums: &mut [L::Int; ROWS],
    x: [&[[i16; PAIR]; PAIRS]; ROWS],
    pair: usize,
    weights: L::Pairs,
) {
    for row in 0..ROWS {
        sums[row] = l.dot(sums[row], l.pair(x[row][pair]), weights);
    }
}

/// 8 bits a weight, scales of half precision.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block8 {
    pub(crate) scales: [u16; LANES],
    pub(crate) weights: [[[i8; PAIR]; LANES]; PAIRS],
}

impl Block for Block8 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, lanes: L) -> L::Float {
        lanes.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        lanes: L,
        x: [&[[i16; PAIR]; PAIRS]; ROWS],
    ) -> [L::Int; ROWS] {
        let mut sums = [lanes.zero(); ROWS];
        for quarter in 0..4 {
            // In full: the end of a loop of 16 would be guessed wrong, once a block.
            let at = quarter * PAIRS / 4;
            for pair in [at, at + 1, at + 2, at + 3] {
                let weights = lanes.widen(&self.weights[pair]);
                add_products(lanes, &mut sums, x, pair, weights);
            }
        }
        sums
    }
}

impl Stored for Block8 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / PAIR][row][i % PAIR] = weight.cast_signed();
        }
    }
}

/// 4 bits a weight, 8 standing for 0: in each byte one of the first half of the block, and one of the second.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block4 {
    pub(crate) scales: [u16; LANES],
    pub(crate) weights: [[[u8; PAIR]; LANES]; PAIRS / 2],
}

impl Block for Block4 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, lanes: L) -> L::Float {
        lanes.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        lanes: L,
        x: [&[[i16; PAIR]; PAIRS]; ROWS],
    ) -> [L::Int; ROWS] {
        let mut sums = [lanes.zero(); ROWS];
        for pair in 0..PAIRS / 2 {
            let [low, high] = lanes.nibbles(&self.weights[pair]);
            add_products(lanes, &mut sums, x, pair, low);
            add_products(lanes, &mut sums, x, pair + PAIRS / 2, high);
        }
        sums
    }
}

impl Stored for Block4 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / PAIR][row][i % PAIR] = *weight;
        }
    }
}

/// 12 bits a weight.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block16 {
    pub(crate) scales: [f32; LANES],
    pub(crate) weights: [[[i16; PAIR]; LANES]; PAIRS],
}

impl Block for Block16 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, lanes: L) -> L::Float {
        lanes.load(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        lanes: L,
        x: [&[[i16; PAIR]; PAIRS]; ROWS],
    ) -> [L::Int; ROWS] {
        let mut sums = [lanes.zero(); ROWS];
        for pair in 0..PAIRS {
            let weights = lanes.pairs(&self.weights[pair]);
            add_products(lanes, &mut sums, x, pair, weights);
        }
        sums
    }
}

/// Rows of weights, sixteen at a time, block by block.
#[derive(Debug, Clone)]
pub(crate) struct Packed<B> {
    blocks: Vec<B>,
    rows: usize,
    length: usize,
}

impl<B: Block> Packed<B> {
    /// All zeros. `length` is that of a row, in whole blocks.
    pub(crate) fn new(rows: usize, length: usize) -> Self {
        assert!(length.is_multiple_of(BLOCK) && length > 0);
        let blocks = rows.div_ceil(LANES) * (length / BLOCK);
        Self {
            blocks: vec![B::zeroed(); blocks],
            rows,
            length,
        }
    }

    /// Of rows as ggml has them, one after the other; `None` if a scale is no number.
    pub(crate) fn pack<'a>(
        rows: usize,
        length: usize,
        bytes: impl IntoIterator<Item = &'a [u8]>,
    ) -> Option<Self>
    where
        B: Stored,
    {
        let mut packed = Self::new(rows, length);
        for (row, bytes) in bytes.into_iter().enumerate() {
            let panel = packed.panel_mut(row / LANES);
            let stored = bytes.chunks_exact(bytes.len() / panel.len());
            for (block, stored) in panel.iter_mut().zip(stored) {
                let (scale, weights) = stored.split_first_chunk()?;
                let scale = u16::from_le_bytes(*scale);
                if !half::f16::from_bits(scale).is_finite() {
                    return None;
                }
                block.set(row % LANES, scale, weights);
            }
        }
        Some(packed)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The blocks of sixteen rows, from the first value to the last.
    pub(crate) fn panel_mut(&mut self, panel: usize) -> &mut [B] {
        let blocks = self.length / BLOCK;
        &mut self.blocks[panel * blocks..][..blocks]
    }
}

/// Rows of activations, made one at a time.
pub(crate) trait Rows: Sync {
    fn rows(&self) -> usize;
    /// Of each row, in whole lanes.
    fn length(&self) -> usize;
    /// `inline(always)`, as all that a [`Kernel`] calls.
    fn write<L: Lanes>(&self, lanes: L, row: usize, to: &mut [[f32; LANES]]);
}

/// Rows of activations in 16 bits, each with its scale, in whole blocks.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    values: Vec<i16>,
    scales: Vec<f32>,
    length: usize,
}

impl Activations {
    /// Takes the place of what was there.
    pub(crate) fn round(&mut self, source: &impl Rows) {
        let (rows, length) = (source.rows(), source.length());
        assert!(length.is_multiple_of(LANES));
        self.length = length.next_multiple_of(BLOCK);
        self.values.resize(rows * self.length, 0);
        self.scales.resize(rows, 0.0);
        // A thread isn't worth waking for less.
        let part = ((1 << 14) / length).max(1);
        let parts = self.values.par_chunks_mut(part * self.length);
        parts
            .zip(self.scales.par_chunks_mut(part))
            .enumerate()
            .for_each(|(i, (values, scales))| {
                dispatch(Round {
                    source,
                    first: i * part,
                    values,
                    scales,
                    length,
                })
            });
    }

    pub(crate) fn rows(&self) -> usize {
        self.scales.len()
    }
}

/// Rounds rows to 16 bits.
struct Round<'a, R> {
    source: &'a R,
    first: usize,
    values: &'a mut [i16],
    scales: &'a mut [f32],
    length: usize,
}

impl<R: Rows> Kernel for Round<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let mut row = vec![[0.0; LANES]; self.length / LANES];
        let padded = self.length.next_multiple_of(BLOCK);
        let rows = self.values.chunks_exact_mut(padded).zip(self.scales);
        for (i, (values, scale)) in rows.enumerate() {
            self.source.write(l, self.first + i, &mut row);
            let (values, padding) = values.split_at_mut(self.length);
            *scale = round(l, &row, values.as_chunks_mut().0);
            padding.fill(0);
        }
    }
}

/// Rounds a row to 16 bits, and returns what one of them is worth.
#[inline(always)]
pub(crate) fn round<L: Lanes>(l: L, row: &[[f32; LANES]], to: &mut [[i16; LANES]]) -> f32 {
    let mut largest = l.splat(0.0);
    for x in row {
        largest = l.max(l.abs(l.load(x)), largest);
    }
    let largest = l.fold(largest, f32::max);
    let up = if largest > 0.0 {
        f32::from(i16::MAX) / largest
    } else {
        0.0
    };
    for (x, to) in row.iter().zip(to) {
        l.store_i16(l.round(l.mul(l.load(x), l.splat(up))), to);
    }
    largest / f32::from(i16::MAX)
}

/// Where a product goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    Set,
    Add,
}

/// `x` times the weights and a bias, row by row.
pub(crate) fn multiply<B: Block>(
    x: &Activations,
    weights: &Packed<B>,
    bias: Option<&[f32]>,
    into: Into,
    out: &mut [f32],
) {
    assert_eq!(x.length, weights.length);
    assert_eq!(out.len(), x.rows() * weights.rows);
    let threads = rayon::current_num_threads();
    let panels = weights.panels();
    if x.rows() >= FEW_ROWS {
        // So few at a time that they stay in the second cache while all weights pass by.
        let rows = x.rows().div_ceil(2 * threads);
        let rows = rows
            .min((192 << 10) / (2 * x.length))
            .max(1)
            .next_multiple_of(12);
        out.par_chunks_mut(rows * weights.rows)
            .zip(x.values.par_chunks(rows * x.length))
            .zip(x.scales.par_chunks(rows))
            .for_each(|((out, values), scales)| {
                dispatch(Product {
                    x: values,
                    scales,
                    weights,
                    bias,
                    panels: 0..panels,
                    into,
                    out,
                    stride: weights.rows,
                })
            });
        return;
    }
    let part = panels.div_ceil(2 * threads);
    let product = |i: usize, into, out: &mut [f32]| {
        dispatch(Product {
            x: &x.values,
            scales: &x.scales,
            weights,
            bias,
            panels: i * part..panels.min((i + 1) * part),
            into,
            stride: out.len() / x.rows(),
            out,
        })
    };
    let width = part * LANES;
    if x.rows() == 1 {
        let parts = out.par_chunks_mut(width).enumerate();
        return parts.for_each(|(i, out)| product(i, into, out));
    }
    // Each part's columns beside each other, then where they belong.
    let mut columns = vec![0.0; panels * LANES * x.rows()];
    let parts = columns.par_chunks_mut(width * x.rows()).enumerate();
    parts.for_each(|(i, columns)| product(i, Into::Set, columns));
    for (row, out) in out.chunks_exact_mut(weights.rows).enumerate() {
        let parts = columns.chunks(width * x.rows());
        for (columns, out) in parts.zip(out.chunks_mut(width)) {
            let columns = &columns[row * (columns.len() / x.rows())..];
            for (out, y) in out.iter_mut().zip(columns) {
                *out = match into {
                    Into::Set => *y,
                    Into::Add => *out + y,
                };
            }
        }
    }
}

/// Fewer are parted among the threads by the weights.
const FEW_ROWS: usize = 24;

/// A product of some rows with some of the weights, into rows that are `stride` apart.
pub(crate) struct Product<'a, B> {
    pub(crate) x: &'a [i16],
    pub(crate) scales: &'a [f32],
    pub(crate) weights: &'a Packed<B>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) panels: std::ops::Range<usize>,
    pub(crate) into: Into,
    pub(crate) out: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<B: Block> Kernel for Product<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let length = self.weights.length;
        let blocks = length / BLOCK;
        let first = self.panels.start;
        for panel in self.panels {
            let start = panel * LANES;
            let width = LANES.min(self.weights.rows - start);
            let mut bias = [0.0; LANES];
            if let Some(all) = self.bias {
                bias[..width].copy_from_slice(&all[start..][..width]);
            }
            for row in (0..self.scales.len()).step_by(L::ROWS) {
                let rows = L::ROWS.min(self.scales.len() - row);
                let tile = Tile {
                    x: &self.x[row * length..][..rows * length],
                    scales: &self.scales[row..][..rows],
                    weights: &self.weights.blocks[panel * blocks..][..blocks],
                    bias: &bias,
                    width,
                    into: self.into,
                    stride: self.stride,
                };
                let out = &mut self.out[row * self.stride + (panel - first) * LANES..];
                match rows {
                    1 => tile.run::<L, 1>(l, out),
                    2 => tile.run::<L, 2>(l, out),
                    3 => tile.run::<L, 3>(l, out),
                    4 => tile.run::<L, 4>(l, out),
                    5 => tile.run::<L, 5>(l, out),
                    _ => tile.run::<L, 6>(l, out),
                }
            }
        }
    }
}

/// Some rows, up to sixteen columns.
struct Tile<'a, B> {
    x: &'a [i16],
    scales: &'a [f32],
    weights: &'a [B],
    bias: &'a [f32; LANES],
    width: usize,
    into: Into,
    stride: usize,
}

impl<B: Block> Tile<'_, B> {
    #[inline(always)]
    fn run<L: Lanes, const ROWS: usize>(&self, l: L, out: &mut [f32]) {
        let length = self.weights.len() * BLOCK;
        let rows: [&[[[i16; PAIR]; PAIRS]]; ROWS] =
            std::array::from_fn(|row| bytemuck::cast_slice(&self.x[row * length..][..length]));
        let mut sums = [l.splat(0.0); ROWS];
        for (i, block) in self.weights.iter().enumerate() {
            let x: [&[[i16; PAIR]; PAIRS]; ROWS] = std::array::from_fn(|row| &rows[row][i]);
            let products = block.products(l, x);
            let scales = block.scales(l);
            for row in 0..ROWS {
                sums[row] = l.mul_add(l.to_float(products[row]), scales, sums[row]);
            }
        }
        let bias = l.load(self.bias);
        for row in 0..ROWS {
            let y = l.mul_add(sums[row], l.splat(self.scales[row]), bias);
            let out = &mut out[row * self.stride..][..self.width];
            if let ([out], []) = out.as_chunks_mut() {
                match self.into {
                    Into::Set => l.store(y, out),
                    Into::Add => l.store(l.add(l.load(out), y), out),
                }
                continue;
            }
            let mut lanes = [0.0; LANES];
            l.store(y, &mut lanes);
            for (out, y) in out.iter_mut().zip(lanes) {
                *out = match self.into {
                    Into::Set => y,
                    Into::Add => *out + y,
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lanes::Plain, super::pointwise::Values, *};

    /// Rows as ggml has them, and what they stand for.
    fn weights<B: Stored>(rows: usize, length: usize) -> (Packed<B>, Vec<f32>) {
        let mut rng = fastrand::Rng::with_seed(1);
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        let nibbles = size_of::<B>() < size_of::<Block8>();
        for _ in 0..rows * length / BLOCK {
            let scale = half::f16::from_f32(rng.f32() - 0.5);
            bytes.extend(scale.to_bits().to_le_bytes());
            let stored: Vec<_> = (0..if nibbles { 16 } else { 32 })
                .map(|_| rng.u8(..))
                .collect();
            let numbers: Vec<i32> = match nibbles {
                true => {
                    let low = stored.iter().map(|byte| i32::from(byte & 15) - 8);
                    let high = stored.iter().map(|byte| i32::from(byte >> 4) - 8);
                    low.chain(high).collect()
                }
                false => stored
                    .iter()
                    .map(|byte| byte.cast_signed().into())
                    .collect(),
            };
            values.extend(numbers.iter().map(|n| *n as f32 * scale.to_f32()));
            bytes.extend(stored);
        }
        let rows_of_bytes = bytes.chunks_exact(bytes.len() / rows);
        let packed = Packed::pack(rows, length, rows_of_bytes).unwrap();
        (packed, values)
    }

    fn noise(len: usize) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(2);
        (0..len).map(|_| rng.f32() * 4.0 - 2.0).collect()
    }

    fn rounded(x: &[f32], length: usize) -> Activations {
        let mut rounded = Activations::default();
        rounded.round(&Values::new(x, length));
        rounded
    }

    /// However many rows there are, each comes out as alone, as on any processor, and nearly as in doubles.
    fn check<B: Stored>(rows: usize, length: usize) {
        let (packed, numbers) = weights::<B>(rows, length);
        let bias = noise(rows);
        for tokens in [1, 2, 5, 6, 7, 13, 23, 24, 31] {
            let x = noise(tokens * length);
            let mut out = vec![1.0; tokens * rows];
            let x16 = rounded(&x, length);
            multiply(&x16, &packed, Some(&bias), Into::Set, &mut out);
            let mut more = out.clone();
            multiply(&x16, &packed, Some(&bias), Into::Add, &mut more);
            for (i, (x, out)) in x.chunks(length).zip(out.chunks(rows)).enumerate() {
                let mut plain = vec![0.0; rows];
                let x16 = rounded(x, length);
                Product {
                    x: &x16.values,
                    scales: &x16.scales,
                    weights: &packed,
                    bias: Some(&bias),
                    panels: 0..packed.panels(),
                    into: Into::Set,
                    out: &mut plain,
                    stride: rows,
                }
                .run(Plain);
                assert_eq!(plain, out, "row {i} of {tokens}");
                let exact = numbers.chunks(length).zip(&bias).map(|(row, bias)| {
                    let products = row
                        .iter()
                        .zip(x)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b));
                    products.sum::<f64>() + f64::from(*bias)
                });
                let (mut off, mut all) = (0.0, 0.0);
                for (y, exact) in out.iter().zip(exact) {
                    off += (f64::from(*y) - exact).powi(2);
                    all += exact * exact;
                }
                assert!(off <= all * 1e-8, "{off} of {all}");
            }
            for (more, out) in more.iter().zip(&out) {
                assert_eq!(*more, 2.0 * out);
            }
        }
    }

    #[test]
    fn products_with_8_bits() {
        check::<Block8>(16, 32);
        check::<Block8>(49, 96);
        check::<Block8>(130, 64);
    }

    #[test]
    fn products_with_4_bits() {
        check::<Block4>(16, 32);
        check::<Block4>(49, 96);
    }

    /// All that an i32 must hold.
    #[test]
    fn the_largest_products_fit() {
        let mut packed = Packed::<Block16>::new(16, 32);
        for block in packed.panel_mut(0) {
            block.scales = [1.0; LANES];
            block.weights = [[[2047; PAIR]; LANES]; PAIRS];
        }
        let x = rounded(&[1.0; 32], 32);
        let mut out = [0.0; 16];
        multiply(&x, &packed, None, Into::Set, &mut out);
        assert_eq!(out, [32.0 * 2047.0; 16]);
    }

    #[test]
    fn rows_are_padded_to_blocks() {
        let (packed, _) = weights::<Block8>(16, 64);
        let mut x = noise(48);
        let mut x16 = rounded(&noise(3 * 64), 64);
        x16.round(&Values::new(&x, 48));
        x.resize(64, 0.0);
        let [mut short, mut long] = [[0.0; 16]; 2];
        multiply(&x16, &packed, None, Into::Set, &mut short);
        multiply(&rounded(&x, 64), &packed, None, Into::Set, &mut long);
        assert_eq!(short, long);
    }

    #[test]
    fn a_scale_that_is_no_number_is_refused() {
        let mut row = [0; 34];
        assert!(Packed::<Block8>::pack(1, 32, [&row[..]]).is_some());
        row[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert!(Packed::<Block8>::pack(1, 32, [&row[..]]).is_none());
    }

    #[test]
    fn nothing_is_nothing() {
        let x = rounded(&[0.0; 32], 32);
        assert_eq!((x.scales, x.values), (vec![0.0], vec![0; 32]));
    }
}
