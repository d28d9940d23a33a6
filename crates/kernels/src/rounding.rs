//! Rows of activations, rounded for products with blocks of weights.

use std::{fmt::Debug, hint::black_box, ops::Range};

use rayon::prelude::*;

use super::{
    blocks::{BLOCK, Block, Block4, Block8, Block16, MANY, Nibbles, QUADS, Unpacked4},
    lanes::{Kernel, LANES, Lanes, dispatch},
};

/// Rows of activations, made one at a time.
pub trait Rows: Sync {
    fn rows(&self) -> usize;
    /// Of each row, in whole lanes.
    fn length(&self) -> usize;
    /// `inline(always)`, as all that a [`Kernel`] calls.
    fn write<L: Lanes>(&self, l: L, row: usize, to: &mut [[f32; LANES]]);
}

/// A way to round a row of activations.
pub trait Rounding: Copy + Send + Sync {
    type Value: Debug + Copy + Default + Send + Sync;
    /// What the values of a row, or of a block, are worth.
    type Mark: Debug + Copy + Default + Send + Sync;

    /// How many there are in a row of so many blocks.
    fn marks(blocks: usize) -> usize;
    fn round<L: Lanes>(
        l: L,
        row: &[[f32; LANES]],
        values: &mut [Self::Value],
        marks: &mut [Self::Mark],
    );
}

/// Products of activations that are rounded so with blocks `B`.
pub trait Times<B>: Rounding {
    /// What is made of sixteen rows of weights before the first product.
    type Prepared: Default;

    /// Most rows that are multiplied at once without [`Lanes::MANY`] registers.
    const FEW: usize;
    /// How many of so many rows are multiplied at once.
    fn at_once<L: Lanes>(rows: usize) -> usize;
    /// For so many rows, in the memory of the sixteen before.
    fn prepare<L: Lanes>(l: L, rows: usize, weights: &[B], prepared: &mut Self::Prepared);
    /// Products of rows from this one on.
    fn multiply<L: Lanes, const ROWS: usize>(
        l: L,
        x: Rounded<'_, Self>,
        first: usize,
        weights: &[B],
        prepared: &Self::Prepared,
    ) -> [L::Float; ROWS];
}

/// Rounded rows of activations.
#[derive(Clone, Copy)]
pub struct Rounded<'a, R: Rounding> {
    pub values: &'a [R::Value],
    pub marks: &'a [R::Mark],
    /// Of a row, in whole blocks.
    pub length: usize,
}

impl<'a, R: Rounding> Rounded<'a, R> {
    pub fn rows(self) -> usize {
        self.values.len() / self.length
    }

    pub fn part(self, rows: Range<usize>) -> Self {
        let marks = R::marks(self.length / BLOCK);
        Self {
            values: &self.values[rows.start * self.length..rows.end * self.length],
            marks: &self.marks[rows.start * marks..rows.end * marks],
            length: self.length,
        }
    }

    /// Blocks of rows from this one on.
    #[inline(always)]
    fn blocks<const ROWS: usize>(self, first: usize) -> [&'a [[R::Value; BLOCK]]; ROWS] {
        let blocks = self.length / BLOCK;
        std::array::from_fn(
            #[inline(always)]
            |row| &self.values.as_chunks().0[(first + row) * blocks..][..blocks],
        )
    }
}

/// Of each of some rows, a block.
#[inline(always)]
fn column<'a, T, const ROWS: usize>(rows: &[&'a [T]; ROWS], block: usize) -> [&'a T; ROWS] {
    std::array::from_fn(
        #[inline(always)]
        |row| &rows[row][block],
    )
}

/// 16 bits, by a scale of each row: the error is that of the weights alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Words;

impl Rounding for Words {
    type Value = i16;
    /// What 1 is worth.
    type Mark = f32;

    fn marks(_: usize) -> usize {
        1
    }

    #[inline(always)]
    fn round<L: Lanes>(l: L, row: &[[f32; LANES]], values: &mut [i16], marks: &mut [f32]) {
        marks[0] = round(l, row, WORD, values.as_chunks_mut().0);
    }
}

impl<B: Block> Times<B> for Words {
    /// Wide blocks, or none.
    type Prepared = Vec<Block16>;

    const FEW: usize = 6;

    fn at_once<L: Lanes>(rows: usize) -> usize {
        match rows <= B::rows::<L>() {
            true => B::rows::<L>(),
            false => Block16::rows::<L>(),
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(l: L, rows: usize, weights: &[B], wide: &mut Self::Prepared) {
        wide.clear();
        if rows <= B::rows::<L>() {
            return;
        }
        for block in weights {
            if let Some(block) = block.widen(l) {
                wide.push(block);
            }
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const ROWS: usize>(
        l: L,
        x: Rounded<'_, Self>,
        first: usize,
        weights: &[B],
        wide: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        // Of the first, no code is made for more rows than there are registers for.
        match ROWS <= B::rows::<L>() && wide.is_empty() {
            true => multiply_words(l, x, first, weights),
            false => multiply_words(l, x, first, wide),
        }
    }
}

#[inline(always)]
fn multiply_words<B: Block, L: Lanes, const ROWS: usize>(
    l: L,
    x: Rounded<'_, Words>,
    first: usize,
    weights: &[B],
) -> [L::Float; ROWS] {
    let rows = x.blocks::<ROWS>(first);
    let mut y = [l.splat(0.0); ROWS];
    for (i, block) in weights.iter().enumerate() {
        let products = block.products(l, column(&rows, i));
        let scales = block.scales(l);
        for (y, products) in y.iter_mut().zip(products) {
            *y = l.mul_add(l.to_float(products), scales, *y);
        }
    }
    for (y, scale) in y.iter_mut().zip(&x.marks[first..]) {
        *y = l.mul(*y, l.splat(*scale));
    }
    y
}

/// 7 bits, by the range of each block: two products with 8 bits fit 16, so that AVX2 takes three instructions for
/// 32 of them and not four. For many rows, where arithmetic is what takes time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bytes;

impl Rounding for Bytes {
    type Value = u8;
    /// What 1 is worth, and what 0 stands for.
    type Mark = [f32; 2];

    fn marks(blocks: usize) -> usize {
        blocks
    }

    #[inline(always)]
    fn round<L: Lanes>(l: L, row: &[[f32; LANES]], values: &mut [u8], marks: &mut [[f32; 2]]) {
        /// The largest that products of two with 8 bits fit 16 bits of.
        const LARGEST: f32 = 127.0;
        let blocks = row.as_chunks::<{ BLOCK / LANES }>().0.iter();
        let values = values.as_chunks_mut::<BLOCK>().0.iter_mut();
        for ((x, to), range) in blocks.zip(values).zip(marks) {
            let [low, high] = [l.load(&x[0]), l.load(&x[1])];
            let least = l.fold(l.min(low, high), f32::min);
            let largest = l.fold(l.max(low, high), f32::max);
            let span = largest - least;
            let up = if span > 0.0 { LARGEST / span } else { 0.0 };
            *range = [span / LARGEST, least];
            for (x, to) in [low, high].into_iter().zip(to.as_chunks_mut().0) {
                let x = l.mul(l.sub(x, l.splat(least)), l.splat(up));
                l.store_u8(l.round(x), to);
            }
        }
    }
}

impl Times<Block8> for Bytes {
    /// Of each block, scales and scaled sums of weights.
    type Prepared = Vec<[[f32; LANES]; 2]>;

    /// Of AVX2's registers, ten hold sums, two weights, and one each activations, products and ones.
    const FEW: usize = 5;

    fn at_once<L: Lanes>(_: usize) -> usize {
        match L::MANY {
            true => MANY,
            false => Self::FEW,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(l: L, _: usize, weights: &[Block8], prepared: &mut Self::Prepared) {
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
        l: L,
        x: Rounded<'_, Self>,
        first: usize,
        weights: &[Block8],
        prepared: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        let rows = x.blocks::<ROWS>(first);
        let blocks = weights.len();
        let ranges: [&[[f32; 2]]; ROWS] = std::array::from_fn(
            #[inline(always)]
            |row| &x.marks[(first + row) * blocks..][..blocks],
        );
        let quads = black_box(QUADS);
        let mut y = [l.splat(0.0); ROWS];
        for (i, (block, [scales, totals])) in weights.iter().zip(prepared).enumerate() {
            let products = block.byte_products(l, column(&rows, i), quads);
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
#[derive(Debug, Clone, Copy, Default)]
pub struct SignedBytes;

/// Of a block of [`SignedBytes`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Signed {
    /// What 1 is worth.
    scale: f32,
    /// The sum.
    total: i32,
}

impl Rounding for SignedBytes {
    type Value = i8;
    type Mark = Signed;

    fn marks(blocks: usize) -> usize {
        blocks
    }

    #[inline(always)]
    fn round<L: Lanes>(l: L, row: &[[f32; LANES]], values: &mut [i8], marks: &mut [Signed]) {
        let blocks = row.chunks_exact(BLOCK / LANES);
        let values = values.as_chunks_mut::<BLOCK>().0.iter_mut();
        for ((x, to), mark) in blocks.zip(values).zip(marks) {
            mark.scale = round_by(
                l,
                x,
                i8::MAX.into(),
                to.as_chunks_mut().0,
                #[inline(always)]
                |x, to| l.store_i8(x, to),
            );
            mark.total = to.iter().map(|x| i32::from(*x)).sum();
        }
    }
}

impl Times<Block4> for SignedBytes {
    /// Blocks with a byte a weight, or none.
    type Prepared = Vec<Unpacked4>;

    const FEW: usize = 5;

    fn at_once<L: Lanes>(rows: usize) -> usize {
        match L::MANY {
            _ if rows <= AS_STORED => AS_STORED,
            true => MANY,
            false => Self::FEW,
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(l: L, rows: usize, weights: &[Block4], unpacked: &mut Self::Prepared) {
        unpacked.clear();
        if rows <= AS_STORED {
            return;
        }
        for block in weights {
            unpacked.push(Unpacked4::new(l, block));
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const ROWS: usize>(
        l: L,
        x: Rounded<'_, Self>,
        first: usize,
        weights: &[Block4],
        unpacked: &Self::Prepared,
    ) -> [L::Float; ROWS] {
        // Of the first, no code is made for more rows than there are registers for.
        match ROWS <= AS_STORED && unpacked.is_empty() {
            true => multiply_nibbles(l, x, first, weights, QUADS),
            false => multiply_nibbles(l, x, first, unpacked, black_box(QUADS)),
        }
    }
}

/// Rows for which 4 bits aren't unpacked first.
const AS_STORED: usize = 2;

#[inline(always)]
fn multiply_nibbles<B: Nibbles, L: Lanes, const ROWS: usize>(
    l: L,
    x: Rounded<'_, SignedBytes>,
    first: usize,
    weights: &[B],
    quads: usize,
) -> [L::Float; ROWS] {
    let rows = x.blocks::<ROWS>(first);
    let mut y = [l.splat(0.0); ROWS];
    for (i, block) in weights.iter().enumerate() {
        let products = block.products(l, column(&rows, i), quads);
        let scales = block.scales(l);
        for (row, (y, products)) in y.iter_mut().zip(products).enumerate() {
            let Signed { scale, total } = x.marks[(first + row) * weights.len() + i];
            // Each weight was taken for 8 more.
            let products = l.sub_int(l.whole_narrow(products), l.splat_int(8 * total));
            *y = l.mul_add(l.to_float(products), l.mul(scales, l.splat(scale)), *y);
        }
    }
    y
}

/// Memory for rows in each form.
#[derive(Debug, Default)]
pub struct Activations {
    pub words: Room<Words>,
    pub bytes: Room<Bytes>,
    pub signed_bytes: Room<SignedBytes>,
}

/// Memory for rounded rows.
#[derive(Debug, Default)]
pub struct Room<R: Rounding> {
    values: Vec<R::Value>,
    marks: Vec<R::Mark>,
}

impl<R: Rounding> Room<R> {
    pub fn round(&mut self, source: &impl Rows) -> Rounded<'_, R> {
        let rows = source.rows();
        let length = source.length().next_multiple_of(BLOCK);
        let marks = R::marks(length / BLOCK);
        self.values.resize(rows * length, R::Value::default());
        self.marks.resize(rows * marks, R::Mark::default());
        // A thread isn't worth waking for fewer rows.
        let part = ((1 << 14) / length).max(1);
        self.values
            .par_chunks_mut(part * length)
            .zip(self.marks.par_chunks_mut(part * marks))
            .enumerate()
            .for_each(|(i, (values, marks))| {
                dispatch(Round::<_, R> {
                    source,
                    first: i * part,
                    values,
                    marks,
                })
            });
        Rounded {
            values: &self.values,
            marks: &self.marks,
            length,
        }
    }
}

/// Rounds rows from `first` on.
pub struct Round<'a, S, R: Rounding> {
    pub source: &'a S,
    pub first: usize,
    pub values: &'a mut [R::Value],
    pub marks: &'a mut [R::Mark],
}

impl<S: Rows, R: Rounding> Kernel for Round<'_, S, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let length = self.source.length();
        assert!(length.is_multiple_of(LANES));
        // In whole blocks, with zeros behind it.
        let padded = length.next_multiple_of(BLOCK);
        let mut row = vec![[0.0; LANES]; padded / LANES];
        let values = self.values.chunks_exact_mut(padded);
        let marks = self.marks.chunks_exact_mut(R::marks(padded / BLOCK));
        for (i, (values, marks)) in values.zip(marks).enumerate() {
            self.source
                .write(l, self.first + i, &mut row[..length / LANES]);
            R::round(l, &row, values, marks);
        }
    }
}

/// The largest of 16 bits.
pub const WORD: f32 = i16::MAX as f32;

/// Rounds values to integers up to `most`, and returns what 1 is worth.
#[inline(always)]
pub fn round<L: Lanes>(l: L, row: &[[f32; LANES]], most: f32, to: &mut [[i16; LANES]]) -> f32 {
    round_by(
        l,
        row,
        most,
        to,
        #[inline(always)]
        |x, to| l.store_i16(x, to),
    )
}

/// The same to integers of any size.
#[inline(always)]
fn round_by<L: Lanes, T>(
    l: L,
    row: &[[f32; LANES]],
    most: f32,
    to: &mut [[T; LANES]],
    store: impl Fn(L::Int, &mut [T; LANES]),
) -> f32 {
    let mut largest = l.splat(0.0);
    for x in row {
        largest = l.max(l.abs(l.load(x)), largest);
    }
    let largest = l.fold(largest, f32::max);
    let up = if largest > 0.0 { most / largest } else { 0.0 };
    for (x, to) in row.iter().zip(to) {
        store(l.round(l.mul(l.load(x), l.splat(up))), to);
    }
    largest / most
}
