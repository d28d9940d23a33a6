//! Products with packed weights: integers inside blocks of 32, floats from block to block.
//!
//! Sums of 32 products are exact in an `i32`, so the order inside a block doesn't matter, and the blocks of a row
//! are added from the first to the last. Hence a row comes out the same to the bit whatever rows are computed
//! beside it, and on whatever processor.
//!
//! Activations are rounded on the way, in one of two ways:
//!
//! * [`Words`]: to 16 bits by a scale of each row. The error is that of the weights alone.
//! * [`Bytes`]: to 7 bits by the range of each block: two products with 8 bits fit 16, which AVX2 multiplies
//!   with half of the instructions. For many rows, where arithmetic is what takes time.

use std::{hint::black_box, ops::Range};

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::lanes::{Kernel, LANES, Lanes, PAIR, QUAD, dispatch};

/// Values of a row with a common scale.
pub(crate) const BLOCK: usize = 32;
const PAIRS: usize = BLOCK / PAIR;
const QUADS: usize = BLOCK / QUAD;

/// A block of each of sixteen rows of weights.
pub(crate) trait Block: Pod + Send + Sync {
    /// Rows of words whose products are summed at once: as many as there are registers for.
    const ROWS: usize;

    fn scales<L: Lanes>(&self, l: L) -> L::Float;

    /// Sums of what some rows of activations give with it; `totals` are the sums of each row's.
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        totals: [i32; ROWS],
    ) -> [L::Int; ROWS];

    /// The same in 16 bits, which many rows are multiplied with in less time; `None` if it is so already.
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16>;
}

/// A block whose rows ggml has in bytes: a scale of half precision, then the weights.
pub(crate) trait Stored: Block {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]);

    /// Sums of what some rows of activations, up to 127, give with it.
    ///
    /// `QUADS` comes as `quads`: told that it is constant, compilers unroll the loop, put rows before weights
    /// and run out of registers.
    fn byte_products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[u8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Int; ROWS];
}

/// 8 bits a weight, scales of half precision.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block8 {
    scales: [u16; LANES],
    weights: [[[i8; QUAD]; LANES]; QUADS],
}

impl Block for Block8 {
    const ROWS: usize = 2;

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        _: [i32; ROWS],
    ) -> [L::Int; ROWS] {
        let mut parts = [l.no_parts(); ROWS];
        for (i, weights) in self.weights.iter().enumerate() {
            let weights = l.widen(weights);
            for (parts, x) in parts.iter_mut().zip(x) {
                *parts = l.dot_fours(*parts, l.four(x.as_chunks().0[i]), weights);
            }
        }
        let mut sums = [l.splat_int(0); ROWS];
        for (sum, parts) in sums.iter_mut().zip(parts) {
            *sum = l.whole(parts);
        }
        sums
    }

    #[inline(always)]
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16> {
        let mut wide = Block16::zeroed();
        l.store(self.scales(l), &mut wide.scales);
        for (weights, to) in self.weights.iter().zip(wide.weights.as_chunks_mut().0) {
            let [first, last] = l.split(l.widen(weights));
            let [to_first, to_last] = to;
            l.store_pairs(first, to_first);
            l.store_pairs(last, to_last);
        }
        Some(wide)
    }
}

impl Stored for Block8 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / QUAD][row][i % QUAD] = weight.cast_signed();
        }
    }

    #[inline(always)]
    fn byte_products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[u8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        for i in 0..quads {
            let i = i % QUADS;
            let weights = l.quads(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = l.dot_quads(*sum, l.quad(x.as_chunks().0[i]), weights);
            }
        }
        sums
    }
}

/// 4 bits a weight, 8 standing for 0: in each byte one of the first half of the block, and one of the second.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block4 {
    scales: [u16; LANES],
    weights: [[[u8; QUAD]; LANES]; QUADS / 2],
}

impl Block for Block4 {
    const ROWS: usize = 2;

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        totals: [i32; ROWS],
    ) -> [L::Int; ROWS] {
        let mut parts = [l.no_parts(); ROWS];
        for (i, weights) in self.weights.iter().enumerate() {
            let [low, high] = l.nibbles(weights);
            for (parts, x) in parts.iter_mut().zip(x) {
                let x = x.as_chunks().0;
                *parts = l.dot_fours(*parts, l.four(x[i]), low);
                *parts = l.dot_fours(*parts, l.four(x[i + QUADS / 2]), high);
            }
        }
        // Each weight was taken for 8 more.
        let mut sums = [l.splat_int(0); ROWS];
        for (sum, (parts, total)) in sums.iter_mut().zip(parts.into_iter().zip(totals)) {
            *sum = l.sub_int(l.whole(parts), l.splat_int(8 * total));
        }
        sums
    }

    #[inline(always)]
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16> {
        let mut wide = Block16::zeroed();
        l.store(self.scales(l), &mut wide.scales);
        let (low, high) = wide.weights.split_at_mut(PAIRS / 2);
        let to = low.as_chunks_mut().0.iter_mut().zip(high.as_chunks_mut().0);
        for (weights, (low, high)) in self.weights.iter().zip(to) {
            for (nibbles, to) in l.nibbles(weights).into_iter().zip([low, high]) {
                let [first, last] = l.split(nibbles);
                let [to_first, to_last] = to;
                l.store_pairs(first, to_first);
                l.store_pairs(last, to_last);
            }
        }
        for weight in wide.weights.as_flattened_mut().as_flattened_mut() {
            *weight -= 8;
        }
        Some(wide)
    }
}

impl Stored for Block4 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / QUAD][row][i % QUAD] = *weight;
        }
    }

    #[inline(always)]
    fn byte_products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[u8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        for i in 0..quads / 2 {
            let i = i % (QUADS / 2);
            let [low, high] = l.nibble_quads(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                let x = x.as_chunks().0;
                *sum = l.dot_quads(*sum, l.quad(x[i]), low);
                *sum = l.dot_quads(*sum, l.quad(x[i + QUADS / 2]), high);
            }
        }
        sums
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
    const ROWS: usize = 6;

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        _: [i32; ROWS],
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        // In two loops: the end of one of 16 would be guessed wrong, once a block.
        for quarter in 0..4 {
            let at = quarter * PAIRS / 4;
            for i in [at, at + 1, at + 2, at + 3] {
                let weights = l.pairs(&self.weights[i]);
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = l.dot_pairs(*sum, l.pair(x.as_chunks().0[i]), weights);
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn widen<L: Lanes>(&self, _: L) -> Option<Block16> {
        None
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
    fn panel(&self, panel: usize) -> &[B] {
        let blocks = self.length / BLOCK;
        &self.blocks[panel * blocks..][..blocks]
    }

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
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]);
}

/// Rounded rows of activations, to be multiplied with blocks `B`.
pub(crate) trait Rounded<B>: Copy + Send + Sync {
    /// What is made of sixteen rows of weights before the first product.
    type Prepared;

    fn rows(self) -> usize;
    fn length(self) -> usize;
    fn part(self, rows: Range<usize>) -> Self;
    fn prepare<L: Lanes>(self, l: L, weights: &[B]) -> Self::Prepared;
    /// Most rows that are ever multiplied at once.
    const MOST: usize;
    /// Rows that are multiplied at once.
    fn at_once(self) -> usize;
    /// Products of rows from this one on.
    fn multiply<L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[B],
        prepared: &Self::Prepared,
    ) -> [L::Float; ROWS];
}

/// 16 bits, by a scale of each row.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a> {
    pub(crate) values: &'a [i16],
    pub(crate) scales: &'a [f32],
    /// Sums of each block, if the weights want to know.
    pub(crate) totals: &'a [i32],
    pub(crate) length: usize,
}

impl<B: Block> Rounded<B> for Words<'_> {
    const MOST: usize = Block16::ROWS;
    /// Wide blocks, or none.
    type Prepared = Vec<Block16>;

    fn rows(self) -> usize {
        self.scales.len()
    }

    fn length(self) -> usize {
        self.length
    }

    fn part(self, rows: Range<usize>) -> Self {
        let blocks = self.length / BLOCK;
        Self {
            values: &self.values[rows.start * self.length..rows.end * self.length],
            totals: &self.totals[rows.start * blocks..rows.end * blocks],
            scales: &self.scales[rows],
            length: self.length,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(self, l: L, weights: &[B]) -> Self::Prepared {
        if self.scales.len() <= B::ROWS {
            return Vec::new();
        }
        let mut wide = Vec::with_capacity(weights.len());
        for block in weights {
            if let Some(block) = block.widen(l) {
                wide.push(block);
            }
        }
        wide
    }

    fn at_once(self) -> usize {
        match self.scales.len() <= B::ROWS {
            true => B::ROWS,
            false => Block16::ROWS,
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
        match ROWS <= B::ROWS && wide.is_empty() {
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
            let totals: [_; ROWS] = std::array::from_fn(
                #[inline(always)]
                |row| match self.totals {
                    [] => 0,
                    totals => totals[(first + row) * blocks + i],
                },
            );
            let x: [_; ROWS] = std::array::from_fn(
                #[inline(always)]
                |row| &rows[row][i],
            );
            let products = block.products(l, x, totals);
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

/// 7 bits, by the range of each block.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    values: &'a [u8],
    ranges: &'a [[f32; 2]],
    length: usize,
}

impl<B: Stored> Rounded<B> for Bytes<'_> {
    const MOST: usize = 5;
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

    fn at_once(self) -> usize {
        5 // Of AVX2's registers, ten hold sums, two weights, and one each activations, products and ones.
    }

    #[inline(always)]
    fn prepare<L: Lanes>(self, l: L, weights: &[B]) -> Self::Prepared {
        let mut prepared = vec![[[0.0; LANES]; 2]; weights.len()];
        for (block, [scales, totals]) in weights.iter().zip(&mut prepared) {
            let [sums] = block.byte_products(l, [&[1; BLOCK]], QUADS);
            let s = block.scales(l);
            l.store(s, scales);
            l.store(l.mul(l.to_float(sums), s), totals);
        }
        prepared
    }

    #[inline(always)]
    fn multiply<L: Lanes, const ROWS: usize>(
        self,
        l: L,
        first: usize,
        weights: &[B],
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
        let mut sums = [l.splat(0.0); ROWS];
        for (i, (block, [scales, totals])) in weights.iter().zip(prepared).enumerate() {
            let x: [_; ROWS] = std::array::from_fn(
                #[inline(always)]
                |row| &rows[row][i],
            );
            let products = block.byte_products(l, x, quads);
            let (scales, totals) = (l.load(scales), l.load(totals));
            for (row, (sum, products)) in sums.iter_mut().zip(products).enumerate() {
                let [scale, low] = ranges[row][i];
                let scale = l.mul(scales, l.splat(scale));
                *sum = l.mul_add(l.to_float(products), scale, *sum);
                *sum = l.mul_add(totals, l.splat(low), *sum);
            }
        }
        sums
    }
}

/// Memory for rounded rows.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    words: Vec<i16>,
    scales: Vec<f32>,
    totals: Vec<i32>,
    bytes: Vec<u8>,
    ranges: Vec<[f32; 2]>,
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
        self.totals.resize(rows * length / BLOCK, 0);
        let part = Self::part(length);
        self.words
            .par_chunks_mut(part * length)
            .zip(self.totals.par_chunks_mut(part * length / BLOCK))
            .zip(self.scales.par_chunks_mut(part))
            .enumerate()
            .for_each(|(i, ((values, totals), scales))| {
                dispatch(RoundToWords {
                    source,
                    first: i * part,
                    values,
                    totals,
                    scales,
                })
            });
        Words {
            values: &self.words,
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

struct RoundToWords<'a, R> {
    source: &'a R,
    first: usize,
    values: &'a mut [i16],
    totals: &'a mut [i32],
    scales: &'a mut [f32],
}

impl<R: Rows> Kernel for RoundToWords<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let length = self.source.length();
        let mut row = blocks_for(length);
        let values = self.values.chunks_exact_mut(LANES * row.len());
        let totals = self.totals.chunks_exact_mut(row.len() * LANES / BLOCK);
        for (i, ((values, totals), scale)) in values.zip(totals).zip(self.scales).enumerate() {
            self.source
                .write(l, self.first + i, &mut row[..length / LANES]);
            *scale = round(l, &row, values.as_chunks_mut().0);
            for (block, total) in values.as_chunks::<BLOCK>().0.iter().zip(totals) {
                *total = block.iter().map(|x| i32::from(*x)).sum();
            }
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

struct RoundToBytes<'a, R> {
    source: &'a R,
    first: usize,
    values: &'a mut [u8],
    ranges: &'a mut [[f32; 2]],
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

/// Where a product goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    Set,
    Add,
}

/// `x` times the weights and a bias, row by row.
pub(crate) fn multiply<B: Block, X: Rounded<B>>(
    x: X,
    weights: &Packed<B>,
    bias: Option<&[f32]>,
    into: Into,
    out: &mut [f32],
) {
    let rows = x.rows();
    assert_eq!(x.length(), weights.length);
    assert_eq!(out.len(), rows * weights.rows);
    let threads = rayon::current_num_threads();
    let panels = weights.panels();
    if rows >= FEW_ROWS {
        // Of so many the values stay in the second cache while all weights pass by.
        let part = rows.div_ceil(2 * threads).min((192 << 10) / x.length());
        let part = part.max(1).next_multiple_of(x.at_once());
        let parts = out.par_chunks_mut(part * weights.rows).enumerate();
        parts.for_each(|(i, out)| {
            dispatch(Product {
                x: x.part(i * part..rows.min((i + 1) * part)),
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
            x,
            weights,
            bias,
            panels: i * part..panels.min((i + 1) * part),
            into,
            stride: out.len() / rows,
            out,
        })
    };
    let width = part * LANES;
    if rows == 1 {
        let parts = out.par_chunks_mut(width).enumerate();
        return parts.for_each(|(i, out)| product(i, into, out));
    }
    // Each part's columns beside each other, then where they belong.
    let mut columns = vec![0.0; panels * LANES * rows];
    let parts = columns.par_chunks_mut(width * rows).enumerate();
    parts.for_each(|(i, columns)| product(i, Into::Set, columns));
    let columns = &columns;
    let least = (1 << 14) / weights.rows + 1;
    out.par_chunks_exact_mut(weights.rows)
        .enumerate()
        .with_min_len(least)
        .for_each(|(row, out)| {
            let parts = columns.chunks(width * rows);
            for (columns, out) in parts.zip(out.chunks_mut(width)) {
                let columns = &columns[row * (columns.len() / rows)..];
                for (out, y) in out.iter_mut().zip(columns) {
                    *out = match into {
                        Into::Set => *y,
                        Into::Add => *out + y,
                    };
                }
            }
        });
}

/// Fewer are parted among the threads by the weights, which are then prepared once.
const FEW_ROWS: usize = 100;

/// A product of some rows with some of the weights, into rows that are `stride` apart.
pub(crate) struct Product<'a, B, X> {
    pub(crate) x: X,
    pub(crate) weights: &'a Packed<B>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) panels: Range<usize>,
    pub(crate) into: Into,
    pub(crate) out: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<B: Block, X: Rounded<B>> Kernel for Product<'_, B, X> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let first = self.panels.start;
        let rows = self.x.rows();
        for panel in self.panels {
            let start = panel * LANES;
            let width = LANES.min(self.weights.rows - start);
            let mut bias = [0.0; LANES];
            if let Some(all) = self.bias {
                bias[..width].copy_from_slice(&all[start..][..width]);
            }
            let weights = self.weights.panel(panel);
            let tile = Tile {
                x: self.x,
                weights,
                prepared: self.x.prepare(l, weights),
                bias: &bias,
                width,
                into: self.into,
                stride: self.stride,
            };
            let at_once = self.x.at_once();
            for row in (0..rows).step_by(at_once) {
                let out = &mut self.out[row * self.stride + (panel - first) * LANES..];
                match at_once.min(rows - row) {
                    1 => tile.run::<L, 1>(l, row, out),
                    2 => tile.run::<L, 2>(l, row, out),
                    3 => tile.run::<L, 3>(l, row, out),
                    4 => tile.run::<L, 4>(l, row, out),
                    6 if X::MOST >= 6 => tile.run::<L, 6>(l, row, out),
                    _ => tile.run::<L, 5>(l, row, out),
                }
            }
        }
    }
}

/// Some rows, up to sixteen columns.
struct Tile<'a, B, X: Rounded<B>> {
    x: X,
    weights: &'a [B],
    prepared: X::Prepared,
    bias: &'a [f32; LANES],
    width: usize,
    into: Into,
    stride: usize,
}

impl<B: Block, X: Rounded<B>> Tile<'_, B, X> {
    #[inline(always)]
    fn run<L: Lanes, const ROWS: usize>(&self, l: L, first: usize, out: &mut [f32]) {
        let products: [_; ROWS] = self.x.multiply(l, first, self.weights, &self.prepared);
        let bias = l.load(self.bias);
        for (row, y) in products.into_iter().enumerate() {
            let y = l.add(y, bias);
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

    /// Multiplies as [`Words`] or [`Bytes`].
    fn product<B: Stored>(
        bytes: bool,
        x: &[f32],
        weights: &Packed<B>,
        bias: Option<&[f32]>,
        into: Into,
        out: &mut [f32],
    ) {
        let x = Values::new(x, weights.length);
        let mut rounded = Activations::default();
        match bytes {
            true => multiply(rounded.bytes(&x), weights, bias, into, out),
            false => multiply(rounded.words(&x), weights, bias, into, out),
        }
    }

    /// As any processor does it.
    fn plain<B: Stored>(bytes: bool, x: &[f32], weights: &Packed<B>, bias: &[f32]) -> Vec<f32> {
        fn run<B: Block, X: Rounded<B>>(x: X, weights: &Packed<B>, bias: &[f32], out: &mut [f32]) {
            Product {
                x,
                weights,
                bias: Some(bias),
                panels: 0..weights.panels(),
                into: Into::Set,
                stride: out.len() / x.rows(),
                out,
            }
            .run(Plain);
        }
        let x = Values::new(x, weights.length);
        let (blocks, rows) = (weights.length / BLOCK, x.rows());
        let mut out = vec![0.0; rows * weights.rows];
        if bytes {
            let mut values = vec![0; rows * weights.length];
            let mut ranges = vec![[0.0; 2]; rows * blocks];
            RoundToBytes {
                source: &x,
                first: 0,
                values: &mut values,
                ranges: &mut ranges,
            }
            .run(Plain);
            let x = Bytes {
                values: &values,
                ranges: &ranges,
                length: weights.length,
            };
            run(x, weights, bias, &mut out);
        } else {
            let mut values = vec![0; rows * weights.length];
            let (mut totals, mut scales) = (vec![0; rows * blocks], vec![0.0; rows]);
            RoundToWords {
                source: &x,
                first: 0,
                values: &mut values,
                totals: &mut totals,
                scales: &mut scales,
            }
            .run(Plain);
            let x = Words {
                values: &values,
                scales: &scales,
                totals: &totals,
                length: weights.length,
            };
            run(x, weights, bias, &mut out);
        }
        out
    }

    /// However many rows there are, each comes out as alone, as on any processor, and off by so much of what
    /// doubles give.
    fn check<B: Stored>(bytes: bool, rows: usize, length: usize, bound: f64) {
        let (packed, numbers) = weights::<B>(rows, length);
        let bias = noise(rows);
        for tokens in [1, 2, 5, 6, 7, 13, 23, 99, 101] {
            let x = noise(tokens * length);
            let mut out = vec![1.0; tokens * rows];
            product(bytes, &x, &packed, Some(&bias), Into::Set, &mut out);
            let mut more = out.clone();
            product(bytes, &x, &packed, Some(&bias), Into::Add, &mut more);
            for (i, (x, out)) in x.chunks(length).zip(out.chunks(rows)).enumerate() {
                assert_eq!(plain(bytes, x, &packed, &bias), out, "row {i} of {tokens}");
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
                let off = (off / all).sqrt();
                assert!(off <= bound, "{off}");
            }
            for (more, out) in more.iter().zip(&out) {
                assert_eq!(*more, 2.0 * out);
            }
        }
    }

    #[test]
    fn products_with_8_bits() {
        for (rows, length) in [(16, 32), (49, 96), (130, 64)] {
            check::<Block8>(false, rows, length, 1e-4);
            check::<Block8>(true, rows, length, 4e-2);
        }
    }

    #[test]
    fn products_with_4_bits() {
        for (rows, length) in [(16, 32), (49, 96)] {
            check::<Block4>(false, rows, length, 1e-4);
            check::<Block4>(true, rows, length, 4e-2);
        }
    }

    /// All that an integer must hold.
    #[test]
    fn the_largest_products_fit() {
        let mut packed = Packed::<Block16>::new(16, 32);
        for block in packed.panel_mut(0) {
            block.scales = [1.0; LANES];
            block.weights = [[[2047; PAIR]; LANES]; PAIRS];
        }
        let mut rounded = Activations::default();
        let mut out = [0.0; 16];
        let x = rounded.words(&Values::new(&[1.0; 32], 32)).values;
        let x = Words {
            values: x,
            scales: &[1.0 / 32767.0],
            totals: &[],
            length: 32,
        };
        multiply(x, &packed, None, Into::Set, &mut out);
        assert_eq!(out, [32.0 * 2047.0; 16]);

        let one = half::f16::ONE.to_le_bytes();
        for weight in [127i8, -128] {
            let row = [&one[..], &[weight.cast_unsigned(); 32]].concat();
            let packed = Packed::<Block8>::pack(1, 32, [&row[..]]).unwrap();
            let mut x = [127.0; 32];
            x[0] = 0.0;
            let mut out = [0.0];
            product(true, &x, &packed, None, Into::Set, &mut out);
            assert_eq!(out, [31.0 * 127.0 * f32::from(weight)]);
        }
    }

    #[test]
    fn rows_are_padded_to_blocks() {
        let (packed, _) = weights::<Block8>(16, 64);
        let mut rounded = Activations::default();
        let x = noise(48);
        for bytes in [true, false] {
            let [mut short, mut long] = [[0.0; 16]; 2];
            // What was there before is no padding.
            let before = noise(3 * 64);
            let (before, values) = (Values::new(&before, 64), Values::new(&x, 48));
            if bytes {
                rounded.bytes(&before);
                multiply(rounded.bytes(&values), &packed, None, Into::Set, &mut short);
            } else {
                rounded.words(&before);
                multiply(rounded.words(&values), &packed, None, Into::Set, &mut short);
            }
            let mut padded = x.clone();
            padded.resize(64, 0.0);
            product(bytes, &padded, &packed, None, Into::Set, &mut long);
            assert_eq!(short, long);
        }
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
        let (packed, _) = weights::<Block4>(16, 32);
        for bytes in [true, false] {
            let mut out = [1.0; 16];
            product(bytes, &[0.0; 32], &packed, None, Into::Set, &mut out);
            assert_eq!(out, [0.0; 16]);
        }
    }
}
