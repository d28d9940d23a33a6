//! Rows of activations, rounded for products with blocks of weights.

use std::{hint::black_box, ops::Range};

use rayon::prelude::*;

use super::{
    blocks::{BLOCK, Block, Block4, Block8, Block16, MANY, Nibbles, QUADS, Unpacked4},
    lanes::{Kernel, LANES, Lanes, dispatch},
};

/// Rows of activations, made one at a time.
pub(crate) trait Rows: Sync {
    fn rows(&self) -> usize;
    /// Of each row, in whole lanes.
    fn length(&self) -> usize;
    /// `inline(always)`, as all that a [`Kernel`] calls.
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]);
}

/// Rounded rows of activations, to be multiplied with blocks `B`.
pub(crate) trait Rounded<B>: Copy + Send + Sync {
    /// What is made of sixteen rows of weights before the first product.
    type Prepared: Default;

    fn rows(self) -> usize;
    fn length(self) -> usize;
    fn part(self, rows: Range<usize>) -> Self;
    /// In the memory of the sixteen before.
    fn prepare<L: Lanes>(self, l: L, weights: &[B], prepared: &mut Self::Prepared);
    /// Most rows that are multiplied at once without [`Lanes::MANY`] registers.
    const FEW: usize;
    /// Rows that are multiplied at once.
    fn at_once<L: Lanes>(self) -> usize;
    /// Products of rows from this one on.
    fn multiply<L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[B],
        prepared: &Self::Prepared,
    ) -> [L::Float; ROWS];
}

/// 16 bits, by a scale of each row: the error is that of the weights alone.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a> {
    pub(crate) values: &'a [i16],
    pub(crate) scales: &'a [f32],
    pub(crate) length: usize,
}

impl<B: Block> Rounded<B> for Words<'_> {
    const FEW: usize = 6;
    /// Wide blocks, or none.
    type Prepared = Vec<Block16>;

    fn rows(self) -> usize {
        self.scales.len()
    }

    fn length(self) -> usize {
        self.length
    }

    fn part(self, rows: Range<usize>) -> Self {
        Self {
            values: &self.values[rows.start * self.length..rows.end * self.length],
            scales: &self.scales[rows],
            length: self.length,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(self, l: L, weights: &[B], wide: &mut Self::Prepared) {
        wide.clear();
        if self.scales.len() <= B::rows::<L>() {
            return;
        }
        for block in weights {
            if let Some(block) = block.widen(l) {
                wide.push(block);
            }
        }
    }

    fn at_once<L: Lanes>(self) -> usize {
        match self.scales.len() <= B::rows::<L>() {
            true => B::rows::<L>(),
            false => Block16::rows::<L>(),
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[B],
        wide: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        // Of the first, no code is made for more rows than there are registers for.
        match ROWS <= B::rows::<L>() && wide.is_empty() {
            true => self.multiply_blocks(l, first, weights),
            false => self.multiply_blocks(l, first, wide),
        }
    }
}

impl Words<'_> {
    #[inline(always)]
    fn multiply_blocks<B: Block, L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[B],
    ) -> [L::Float; ROWS] {
        let blocks = weights.len();
        let rows: [&[[i16; BLOCK]]; ROWS] = std::array::from_fn(
            #[inline(always)]
            |row| &self.values.as_chunks().0[(first + row) * blocks..][..blocks],
        );
        let mut sums = [l.splat(0.0); ROWS];
        for (i, block) in weights.iter().enumerate() {
            let x: [_; ROWS] = std::array::from_fn(
                #[inline(always)]
                |row| &rows[row][i],
            );
            let products = block.products(l, x);
            let scales = block.scales(l);
            for (sum, products) in sums.iter_mut().zip(products) {
                *sum = l.mul_add(l.to_float(products), scales, *sum);
            }
        }
        let scales = &self.scales[first..][..ROWS];
        for (sum, scale) in sums.iter_mut().zip(scales) {
            *sum = l.mul(*sum, l.splat(*scale));
        }
        sums
    }
}

/// 7 bits, by the range of each block: two products with 8 bits fit 16, so that AVX2 takes three instructions for
/// 32 of them and not four. For many rows, where arithmetic is what takes time.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub(super) values: &'a [u8],
    /// What 1 is worth, and what 0 stands for.
    pub(super) ranges: &'a [[f32; 2]],
    pub(super) length: usize,
}

impl Rounded<Block8> for Bytes<'_> {
    /// Of AVX2's registers, ten hold sums, two weights, and one each activations, products and ones.
    const FEW: usize = 5;
    /// Of each block, scales and scaled sums of weights.
    type Prepared = Vec<[[f32; LANES]; 2]>;

    fn rows(self) -> usize {
        self.values.len() / self.length
    }

    fn length(self) -> usize {
        self.length
    }

    fn part(self, rows: Range<usize>) -> Self {
        let blocks = self.length / BLOCK;
        Self {
            values: &self.values[rows.start * self.length..rows.end * self.length],
            ranges: &self.ranges[rows.start * blocks..rows.end * blocks],
            length: self.length,
        }
    }

    fn at_once<L: Lanes>(self) -> usize {
        match L::MANY {
            true => MANY,
            false => Self::FEW,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(self, l: L, weights: &[Block8], prepared: &mut Self::Prepared) {
        prepared.resize(weights.len(), [[0.0; LANES]; 2]);
        for (block, [scales, totals]) in weights.iter().zip(prepared) {
            let [sums] = block.byte_products(l, [&[1; BLOCK]], QUADS);
            let s = block.scales(l);
            l.store(s, scales);
            l.store(l.mul(l.to_float(sums), s), totals);
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[Block8],
        prepared: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        let blocks = weights.len();
        let rows: [&[[u8; BLOCK]]; ROWS] = std::array::from_fn(
            #[inline(always)]
            |row| &self.values.as_chunks().0[(first + row) * blocks..][..blocks],
        );
        let ranges: [&[[f32; 2]]; ROWS] = std::array::from_fn(
            #[inline(always)]
            |row| &self.ranges[(first + row) * blocks..][..blocks],
        );
        let quads = black_box(QUADS);
        let mut y = [l.splat(0.0); ROWS];
        for (i, (block, [scales, totals])) in weights.iter().zip(prepared).enumerate() {
            let x: [_; ROWS] = std::array::from_fn(
                #[inline(always)]
                |row| &rows[row][i],
            );
            let products = block.byte_products(l, x, quads);
            let (scales, totals) = (l.load(scales), l.load(totals));
            for (row, (y, products)) in y.iter_mut().zip(products).enumerate() {
                let [scale, low] = ranges[row][i];
                let scale = l.mul(scales, l.splat(scale));
                *y = l.mul_add(l.to_float(products), scale, *y);
                *y = l.mul_add(totals, l.splat(low), *y);
            }
        }
        y
    }
}

/// 8 bits and a sign, by a scale of each block: with 4 bits the products of a whole block fit 16.
#[derive(Clone, Copy)]
pub(crate) struct SignedBytes<'a> {
    pub(super) values: &'a [i8],
    /// Of each block, what 1 is worth.
    pub(super) scales: &'a [f32],
    /// Of each block, the sum.
    pub(super) totals: &'a [i32],
    pub(super) length: usize,
}

impl Rounded<Block4> for SignedBytes<'_> {
    const FEW: usize = 5;
    /// Blocks with a byte a weight, or none.
    type Prepared = Vec<Unpacked4>;

    fn rows(self) -> usize {
        self.values.len() / self.length
    }

    fn length(self) -> usize {
        self.length
    }

    fn part(self, rows: Range<usize>) -> Self {
        let blocks = self.length / BLOCK;
        Self {
            values: &self.values[rows.start * self.length..rows.end * self.length],
            scales: &self.scales[rows.start * blocks..rows.end * blocks],
            totals: &self.totals[rows.start * blocks..rows.end * blocks],
            length: self.length,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(self, l: L, weights: &[Block4], unpacked: &mut Self::Prepared) {
        unpacked.clear();
        if self.rows() <= AS_STORED {
            return;
        }
        for block in weights {
            unpacked.push(Unpacked4::new(l, block));
        }
    }

    fn at_once<L: Lanes>(self) -> usize {
        match L::MANY {
            _ if self.rows() <= AS_STORED => AS_STORED,
            true => MANY,
            false => Self::FEW,
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[Block4],
        unpacked: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        // Of the first, no code is made for more rows than there are registers for.
        match ROWS <= AS_STORED && unpacked.is_empty() {
            true => self.multiply_blocks(l, first, weights, QUADS),
            false => self.multiply_blocks(l, first, unpacked, black_box(QUADS)),
        }
    }
}

/// Rows for which 4 bits aren't unpacked first.
const AS_STORED: usize = 2;

impl SignedBytes<'_> {
    #[inline(always)]
    fn multiply_blocks<B: Nibbles, L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[B],
        quads: usize,
    ) -> [L::Float; ROWS] {
        let blocks = weights.len();
        let rows: [&[[i8; BLOCK]]; ROWS] = std::array::from_fn(
            #[inline(always)]
            |row| &self.values.as_chunks().0[(first + row) * blocks..][..blocks],
        );
        let mut y = [l.splat(0.0); ROWS];
        for (i, block) in weights.iter().enumerate() {
            let x: [_; ROWS] = std::array::from_fn(
                #[inline(always)]
                |row| &rows[row][i],
            );
            let products = block.products(l, x, quads);
            let scales = block.scales(l);
            for (row, (y, products)) in y.iter_mut().zip(products).enumerate() {
                let at = (first + row) * blocks + i;
                // Each weight was taken for 8 more.
                let more = l.splat_int(8 * self.totals[at]);
                let products = l.sub_int(l.whole_narrow(products), more);
                let scale = l.mul(scales, l.splat(self.scales[at]));
                *y = l.mul_add(l.to_float(products), scale, *y);
            }
        }
        y
    }
}

/// Memory for rounded rows.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    words: Vec<i16>,
    scales: Vec<f32>,
    bytes: Vec<u8>,
    ranges: Vec<[f32; 2]>,
    signed: Vec<i8>,
    totals: Vec<i32>,
}

impl Activations {
    /// Rows that a thread takes: it isn't worth waking for less.
    fn part(length: usize) -> usize {
        ((1 << 14) / length).max(1)
    }

    pub(crate) fn words(&mut self, source: &impl Rows) -> Words<'_> {
        let rows = source.rows();
        let length = source.length().next_multiple_of(BLOCK);
        self.words.resize(rows * length, 0);
        self.scales.resize(rows, 0.0);
        let part = Self::part(length);
        self.words
            .par_chunks_mut(part * length)
            .zip(self.scales.par_chunks_mut(part))
            .enumerate()
            .for_each(|(i, (values, scales))| {
                dispatch(RoundToWords {
                    source,
                    first: i * part,
                    values,
                    scales,
                })
            });
        Words {
            values: &self.words,
            scales: &self.scales,
            length,
        }
    }

    pub(crate) fn signed_bytes(&mut self, source: &impl Rows) -> SignedBytes<'_> {
        let rows = source.rows();
        let length = source.length().next_multiple_of(BLOCK);
        self.signed.resize(rows * length, 0);
        self.scales.resize(rows * length / BLOCK, 0.0);
        self.totals.resize(rows * length / BLOCK, 0);
        let part = Self::part(length);
        self.signed
            .par_chunks_mut(part * length)
            .zip(self.scales.par_chunks_mut(part * length / BLOCK))
            .zip(self.totals.par_chunks_mut(part * length / BLOCK))
            .enumerate()
            .for_each(|(i, ((values, scales), totals))| {
                dispatch(RoundToSignedBytes {
                    source,
                    first: i * part,
                    values,
                    scales,
                    totals,
                })
            });
        SignedBytes {
            values: &self.signed,
            scales: &self.scales,
            totals: &self.totals,
            length,
        }
    }

    pub(crate) fn bytes(&mut self, source: &impl Rows) -> Bytes<'_> {
        let rows = source.rows();
        let length = source.length().next_multiple_of(BLOCK);
        self.bytes.resize(rows * length, 0);
        self.ranges.resize(rows * length / BLOCK, [0.0; 2]);
        let part = Self::part(length);
        self.bytes
            .par_chunks_mut(part * length)
            .zip(self.ranges.par_chunks_mut(part * length / BLOCK))
            .enumerate()
            .for_each(|(i, (values, ranges))| {
                dispatch(RoundToBytes {
                    source,
                    first: i * part,
                    values,
                    ranges,
                })
            });
        Bytes {
            values: &self.bytes,
            ranges: &self.ranges,
            length,
        }
    }
}

/// A row of so many values, in whole blocks, that are zeros behind it.
fn blocks_for(length: usize) -> Vec<[f32; LANES]> {
    assert!(length.is_multiple_of(LANES));
    vec![[0.0; LANES]; length.next_multiple_of(BLOCK) / LANES]
}

pub(super) struct RoundToWords<'a, R> {
    pub(super) source: &'a R,
    pub(super) first: usize,
    pub(super) values: &'a mut [i16],
    pub(super) scales: &'a mut [f32],
}

impl<R: Rows> Kernel for RoundToWords<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let length = self.source.length();
        let mut row = blocks_for(length);
        let values = self.values.chunks_exact_mut(LANES * row.len());
        for (i, (values, scale)) in values.zip(self.scales).enumerate() {
            self.source
                .write(l, self.first + i, &mut row[..length / LANES]);
            *scale = round(l, &row, WORD, values.as_chunks_mut().0);
        }
    }
}

pub(super) struct RoundToSignedBytes<'a, R> {
    pub(super) source: &'a R,
    pub(super) first: usize,
    pub(super) values: &'a mut [i8],
    pub(super) scales: &'a mut [f32],
    pub(super) totals: &'a mut [i32],
}

impl<R: Rows> Kernel for RoundToSignedBytes<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        const LARGEST: f32 = i8::MAX as f32;
        let length = self.source.length();
        let mut row = blocks_for(length);
        let blocks = row.len() * LANES / BLOCK;
        let rows = self
            .values
            .as_chunks_mut::<BLOCK>()
            .0
            .chunks_exact_mut(blocks)
            .zip(self.scales.chunks_exact_mut(blocks))
            .zip(self.totals.chunks_exact_mut(blocks));
        for (i, ((values, scales), totals)) in rows.enumerate() {
            self.source
                .write(l, self.first + i, &mut row[..length / LANES]);
            let blocks = row.as_chunks::<{ BLOCK / LANES }>().0.iter();
            let to = values.iter_mut().zip(scales.iter_mut().zip(totals));
            for (x, (values, (scale, total))) in blocks.zip(to) {
                let [low, high] = [l.load(&x[0]), l.load(&x[1])];
                let largest = l.fold(l.max(l.abs(low), l.abs(high)), f32::max);
                let up = if largest > 0.0 {
                    LARGEST / largest
                } else {
                    0.0
                };
                *scale = largest / LARGEST;
                for (x, to) in [low, high].into_iter().zip(values.as_chunks_mut().0) {
                    l.store_i8(l.round(l.mul(x, l.splat(up))), to);
                }
                *total = values.iter().map(|x| i32::from(*x)).sum();
            }
        }
    }
}

/// The largest of 16 bits.
pub(super) const WORD: f32 = i16::MAX as f32;

/// Rounds values to integers up to `most`, and returns what 1 is worth.
#[inline(always)]
pub(super) fn round<L: Lanes>(
    l: L,
    row: &[[f32; LANES]],
    most: f32,
    to: &mut [[i16; LANES]],
) -> f32 {
    let mut largest = l.splat(0.0);
    for x in row {
        largest = l.max(l.abs(l.load(x)), largest);
    }
    let largest = l.fold(largest, f32::max);
    let up = if largest > 0.0 { most / largest } else { 0.0 };
    for (x, to) in row.iter().zip(to) {
        l.store_i16(l.round(l.mul(l.load(x), l.splat(up))), to);
    }
    largest / most
}

pub(super) struct RoundToBytes<'a, R> {
    pub(super) source: &'a R,
    pub(super) first: usize,
    pub(super) values: &'a mut [u8],
    pub(super) ranges: &'a mut [[f32; 2]],
}

impl<R: Rows> Kernel for RoundToBytes<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        /// The largest that products of two with 8 bits fit 16 bits of.
        const LARGEST: f32 = 127.0;
        let length = self.source.length();
        let mut row = blocks_for(length);
        let blocks = row.len() * LANES / BLOCK;
        let values = self.values.as_chunks_mut().0.chunks_exact_mut(row.len());
        let ranges = self.ranges.chunks_exact_mut(blocks);
        for (i, (values, ranges)) in values.zip(ranges).enumerate() {
            self.source
                .write(l, self.first + i, &mut row[..length / LANES]);
            let blocks = row.as_chunks::<{ BLOCK / LANES }>().0.iter();
            let values = values.as_chunks_mut::<{ BLOCK / LANES }>().0;
            for ((x, to), range) in blocks.zip(values).zip(ranges) {
                let [low, high] = [l.load(&x[0]), l.load(&x[1])];
                let least = l.fold(l.min(low, high), f32::min);
                let largest = l.fold(l.max(low, high), f32::max);
                let span = largest - least;
                let up = if span > 0.0 { LARGEST / span } else { 0.0 };
                *range = [span / LARGEST, least];
                for (x, to) in [low, high].into_iter().zip(to) {
                    let x = l.mul(l.sub(x, l.splat(least)), l.splat(up));
                    l.store_u8(l.round(x), to);
                }
            }
        }
    }
}
