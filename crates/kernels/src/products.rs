//! Products with packed weights: integers inside blocks of 32, floats from block to block.
//!
//! Sums of 32 products are exact in an `i32`, so the order inside a block doesn't matter, and the blocks of a row
//! are added from the first to the last. Hence a row comes out the same to the bit whatever rows are computed
//! beside it, and on whatever processor.

use std::{marker::PhantomData, ops::Range};

use bytemuck::Pod;
use rayon::prelude::*;

use super::{
    blocks::{MANY, Packed},
    lanes::{Kernel, LANES, Lanes, dispatch},
    rounding::{Rounded, Rounding, Times},
};

/// Where a product goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    Set,
    Add,
}

impl Into {
    #[inline(always)]
    fn put(self, out: &mut [f32], y: &[f32]) {
        for (out, y) in out.iter_mut().zip(y) {
            *out = match self {
                Self::Set => *y,
                Self::Add => *out + y,
            };
        }
    }
}

/// `x` times the weights and a bias, row by row.
pub fn multiply<B: Pod + Send + Sync, R: Times<B>>(
    x: Rounded<'_, R>,
    weights: &Packed<B>,
    bias: Option<&[f32]>,
    into: Into,
    out: &mut [f32],
) {
    let rows = x.rows();
    assert_eq!(x.length, weights.length());
    assert_eq!(out.len(), rows * weights.rows());
    let threads = rayon::current_num_threads();
    let panels = weights.panels();
    if rows >= FEW_ROWS {
        // Of so many the values stay in the second cache while all weights pass by.
        let part = rows.div_ceil(2 * threads).min((192 << 10) / x.length);
        let part = part
            .max(1)
            .next_multiple_of(dispatch(AtOnce::<B, R>(rows, PhantomData)));
        let parts = out.par_chunks_mut(part * weights.rows()).enumerate();
        parts.for_each(|(i, out)| {
            dispatch(Product {
                x: x.part(i * part..rows.min((i + 1) * part)),
                weights,
                bias,
                panels: 0..panels,
                into,
                out,
                stride: weights.rows(),
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
    let least = (1 << 14) / weights.rows() + 1;
    out.par_chunks_exact_mut(weights.rows())
        .enumerate()
        .with_min_len(least)
        .for_each(|(row, out)| {
            let parts = columns.chunks(width * rows);
            for (columns, out) in parts.zip(out.chunks_mut(width)) {
                into.put(out, &columns[row * (columns.len() / rows)..]);
            }
        });
}

/// Fewer are parted among the threads by the weights, which are then prepared once.
const FEW_ROWS: usize = 100;

/// A product of some rows with some of the weights, into rows that are `stride` apart.
pub struct Product<'a, B, R: Rounding> {
    pub x: Rounded<'a, R>,
    pub weights: &'a Packed<B>,
    pub bias: Option<&'a [f32]>,
    pub panels: Range<usize>,
    pub into: Into,
    pub out: &'a mut [f32],
    pub stride: usize,
}

impl<B: Pod, R: Times<B>> Kernel for Product<'_, B, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let first = self.panels.start;
        let rows = self.x.rows();
        let mut prepared = R::Prepared::default();
        for panel in self.panels {
            let start = panel * LANES;
            let width = LANES.min(self.weights.rows() - start);
            let mut bias = [0.0; LANES];
            if let Some(all) = self.bias {
                bias[..width].copy_from_slice(&all[start..][..width]);
            }
            let weights = self.weights.panel(panel);
            R::prepare(l, rows, weights, &mut prepared);
            let tile = Tile {
                x: self.x,
                weights,
                prepared: &prepared,
                bias: &bias,
                width,
                into: self.into,
                stride: self.stride,
            };
            let at_once = R::at_once::<L>(rows);
            let mut row = 0;
            while row < rows {
                let out = &mut self.out[row * self.stride + (panel - first) * LANES..];
                row += match at_once.min(rows - row) {
                    MANY if L::MANY => tile.run::<L, MANY>(l, row, out),
                    6.. if L::MANY || R::FEW >= 6 => tile.run::<L, 6>(l, row, out),
                    5.. => tile.run::<L, 5>(l, row, out),
                    4 => tile.run::<L, 4>(l, row, out),
                    3 => tile.run::<L, 3>(l, row, out),
                    2 => tile.run::<L, 2>(l, row, out),
                    _ => tile.run::<L, 1>(l, row, out),
                };
            }
        }
    }
}

/// Asks how many rows are multiplied at once.
struct AtOnce<B, R>(usize, PhantomData<(B, R)>);

impl<B, R: Times<B>> Kernel for AtOnce<B, R> {
    type Output = usize;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> usize {
        R::at_once::<L>(self.0)
    }
}

/// Some rows, up to sixteen columns.
struct Tile<'a, B, R: Times<B>> {
    x: Rounded<'a, R>,
    weights: &'a [B],
    prepared: &'a R::Prepared,
    bias: &'a [f32; LANES],
    width: usize,
    into: Into,
    stride: usize,
}

impl<B, R: Times<B>> Tile<'_, B, R> {
    /// Returns how many.
    #[inline(always)]
    fn run<L: Lanes, const ROWS: usize>(&self, l: L, first: usize, out: &mut [f32]) -> usize {
        let products: [_; ROWS] = R::multiply(l, self.x, first, self.weights, self.prepared);
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
            self.into.put(out, &lanes);
        }
        ROWS
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            blocks::{BLOCK, Block4, Block8, Block16, PAIRS, Stored},
            lanes::{PAIR, on_each},
            pointwise::Values,
            rounding::{Activations, Bytes, Room, Round, SignedBytes, Words},
        },
        *,
    };

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

    /// What [`multiply`] gives, on one thread.
    struct Alone<'a, B, R> {
        x: &'a [f32],
        weights: &'a Packed<B>,
        bias: &'a [f32],
        rounding: PhantomData<R>,
    }

    impl<B, R> Clone for Alone<'_, B, R> {
        fn clone(&self) -> Self {
            Self { ..*self }
        }
    }

    impl<B: Stored, R: Times<B>> Kernel for Alone<'_, B, R> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let length = self.weights.length();
            let source = &Values::new(self.x, length);
            let rows = source.rows();
            let mut values = vec![R::Value::default(); rows * length];
            let mut marks = vec![R::Mark::default(); rows * R::marks(length / BLOCK)];
            Round::<_, R> {
                source,
                first: 0,
                values: &mut values,
                marks: &mut marks,
            }
            .run(l);
            let mut out = vec![0.0; rows * self.weights.rows()];
            Product {
                x: Rounded::<R> {
                    values: &values,
                    marks: &marks,
                    length,
                },
                weights: self.weights,
                bias: Some(self.bias),
                panels: 0..self.weights.panels(),
                into: Into::Set,
                stride: self.weights.rows(),
                out: &mut out,
            }
            .run(l);
            out
        }
    }

    /// However many rows there are, each comes out as alone, with each kind of lanes, and off by so much of what
    /// doubles give.
    fn check<B: Stored, R: Times<B> + Default>(rows: usize, length: usize, bound: f64) {
        let (packed, numbers) = weights::<B>(rows, length);
        let bias = noise(rows);
        for tokens in [1, 2, 5, 6, 7, 13, 23, 99, 101] {
            let x = noise(tokens * length);
            let mut rounded = Room::<R>::default();
            let rounded = rounded.round(&Values::new(&x, length));
            let mut out = vec![1.0; tokens * rows];
            multiply(rounded, &packed, Some(&bias), Into::Set, &mut out);
            let mut more = out.clone();
            multiply(rounded, &packed, Some(&bias), Into::Add, &mut more);
            let alone = |x| Alone {
                x,
                weights: &packed,
                bias: &bias,
                rounding: PhantomData::<R>,
            };
            assert!(on_each(alone(&x[..])) == out, "{tokens} rows");
            for (i, (x, out)) in x.chunks(length).zip(out.chunks(rows)).enumerate() {
                assert!(dispatch(alone(x)) == out, "row {i} of {tokens}");
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
            check::<Block8, Words>(rows, length, 1e-4);
            check::<Block8, Bytes>(rows, length, 4e-2);
        }
    }

    #[test]
    fn products_with_4_bits() {
        for (rows, length) in [(16, 32), (49, 96)] {
            check::<Block4, SignedBytes>(rows, length, 1e-2);
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
        let x = Rounded::<Words> {
            values: rounded.words.round(&Values::new(&[1.0; 32], 32)).values,
            marks: &[1.0 / 32767.0],
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
            let x = Values::new(&x, 32);
            multiply(rounded.bytes.round(&x), &packed, None, Into::Set, &mut out);
            assert_eq!(out, [31.0 * 127.0 * f32::from(weight)]);
        }
        for (byte, weight) in [(0, -8.0), (0xff, 7.0)] {
            let row = [&one[..], &[byte; 16]].concat();
            let packed = Packed::<Block4>::pack(1, 32, [&row[..]]).unwrap();
            for (rows, value) in [(1, 127.0), (1, -127.0), (3, 127.0), (3, -127.0)] {
                let x = vec![value; 32 * rows];
                let x = Values::new(&x, 32);
                let mut out = vec![0.0; rows];
                let x = rounded.signed_bytes.round(&x);
                multiply(x, &packed, None, Into::Set, &mut out);
                assert_eq!(out, vec![32.0 * value * weight; rows]);
            }
        }
    }

    #[test]
    fn rows_are_padded_to_blocks() {
        fn check<B: Stored, R: Times<B> + Default>() {
            let (weights, _) = weights::<B>(16, 64);
            let mut room = Room::<R>::default();
            let mut product = |x: &[f32], length| {
                let mut out = vec![0.0; x.len() / length * 16];
                let x = room.round(&Values::new(x, length));
                multiply(x, &weights, None, Into::Set, &mut out);
                out
            };
            let mut x = noise(48);
            // What was there before is no padding.
            product(&noise(3 * 64), 64);
            let short = product(&x, 48);
            x.resize(64, 0.0);
            assert_eq!(product(&x, 64), short);
        }
        check::<Block8, Words>();
        check::<Block8, Bytes>();
        check::<Block4, SignedBytes>();
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
        let (four, _) = weights::<Block4>(16, 32);
        let (eight, _) = weights::<Block8>(16, 32);
        let x = Values::new(&[0.0; 32], 32);
        let mut rounded = Activations::default();
        let mut out = [[1.0; 16]; 3];
        let [a, b, c] = &mut out;
        multiply(rounded.words.round(&x), &eight, None, Into::Set, a);
        multiply(rounded.bytes.round(&x), &eight, None, Into::Set, b);
        multiply(rounded.signed_bytes.round(&x), &four, None, Into::Set, c);
        assert_eq!(out, [[0.0; 16]; 3]);
    }
}
