//! Products with packed weights: integers inside blocks of 32, floats from block to block.
//!
//! Sums of 32 products are exact in an `i32`, whatever their order, and the blocks of a row are added from the first to
//! the last. So a row comes out the same, to the bit, whatever rows are computed beside it and on every processor.

use std::ops::Range;

use bytemuck::Pod;
use rayon::prelude::*;

use super::{
    activations::{ActivationFormat, MatMul, QuantizedRows},
    lanes::{Kernel, LANES, Lanes, dispatch},
    weights::{MAX_TILE_ROWS, PackedWeights},
};

/// What happens to a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// Overwrites the output.
    Store,
    /// Is added to the output, as a residual connection is.
    Add,
}

impl Epilogue {
    #[inline(always)]
    pub(crate) fn apply(self, out: &mut [f32], y: &[f32]) {
        for (out, y) in out.iter_mut().zip(y) {
            *out = match self {
                Self::Store => *y,
                Self::Add => *out + y,
            };
        }
    }
}

/// Multiplies rows `[n, columns]` with weights `[rows, columns]`, to `out` `[n, rows]`, and adds a bias.
///
/// # Panics
///
/// If the shapes don't match.
pub fn matmul<B: Pod + Send + Sync, F: MatMul<B>>(
    x: QuantizedRows<'_, F>,
    weights: &PackedWeights<B>,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    out: &mut [f32],
) {
    let rows = x.rows();
    assert_eq!(x.length, weights.columns());
    assert_eq!(out.len(), rows * weights.rows());
    // The weights are split among the threads, not the rows: each is prepared once, and the work comes out even.
    let panels = weights.panels();
    let part = panels.div_ceil(PARTS_PER_THREAD * rayon::current_num_threads());
    let mut parts: Vec<_> = (0..panels.div_ceil(part))
        .map(|_| Pieces(Vec::with_capacity(rows)))
        .collect();
    for row in out.chunks_exact_mut(weights.rows()) {
        for (piece, part) in row.chunks_mut(part * LANES).zip(&mut parts) {
            part.0.push(piece);
        }
    }
    parts.into_par_iter().enumerate().for_each(|(i, out)| {
        dispatch(Gemm {
            x,
            weights,
            bias,
            panels: i * part..panels.min((i + 1) * part),
            epilogue,
            out,
        })
    });
}

/// More than one, so that a thread that is late has less left to do.
pub(crate) const PARTS_PER_THREAD: usize = 2;
/// Bytes of activations that stay in a core's second cache while weights pass by.
pub(crate) const CACHED: usize = 256 << 10;

/// Rows that a product is written to.
pub(crate) trait OutRows {
    /// A part of a row.
    fn part(&mut self, row: usize, columns: Range<usize>) -> &mut [f32];
}

/// Parts of rows whose other parts are other threads'.
struct Pieces<'a>(Vec<&'a mut [f32]>);

impl OutRows for Pieces<'_> {
    #[inline(always)]
    fn part(&mut self, row: usize, columns: Range<usize>) -> &mut [f32] {
        &mut self.0[row][columns]
    }
}

/// A product of rows with some panels of the weights.
pub(crate) struct Gemm<'a, B, F: ActivationFormat, O> {
    pub(crate) x: QuantizedRows<'a, F>,
    pub(crate) weights: &'a PackedWeights<B>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) panels: Range<usize>,
    pub(crate) epilogue: Epilogue,
    pub(crate) out: O,
}

impl<B: Pod, F: MatMul<B>, O: OutRows> Kernel for Gemm<'_, B, F, O> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let rows = self.x.rows();
        let tile_rows = F::tile_rows::<L>(rows);
        let cached = CACHED / (self.x.length * size_of::<F::Value>());
        let cached = cached.max(1).next_multiple_of(tile_rows);
        let mut prepared = F::Prepared::default();
        let mut first_row = 0;
        while first_row < rows {
            let end = rows.min(first_row + cached);
            for panel in self.panels.clone() {
                let start = panel * LANES;
                let width = LANES.min(self.weights.rows() - start);
                let mut bias = [0.0; LANES];
                if let Some(all) = self.bias {
                    bias[..width].copy_from_slice(&all[start..][..width]);
                }
                let weights = self.weights.panel(panel);
                F::prepare(l, end - first_row, weights, &mut prepared);
                let column = (panel - self.panels.start) * LANES;
                let mut tile = Tile {
                    x: self.x,
                    weights,
                    prepared: &prepared,
                    bias: &bias,
                    columns: column..column + width,
                    epilogue: self.epilogue,
                    out: &mut self.out,
                };
                let mut row = first_row;
                while row < end {
                    row += match tile_rows.min(end - row) {
                        MAX_TILE_ROWS if L::MANY_REGISTERS => tile.run::<L, MAX_TILE_ROWS>(l, row),
                        8.. if L::MANY_REGISTERS => tile.run::<L, 8>(l, row),
                        7 if L::MANY_REGISTERS => tile.run::<L, 7>(l, row),
                        6.. if L::MANY_REGISTERS || F::MAX_FEW_REGISTER_ROWS >= 6 => {
                            tile.run::<L, 6>(l, row)
                        }
                        5.. => tile.run::<L, 5>(l, row),
                        4 => tile.run::<L, 4>(l, row),
                        3 => tile.run::<L, 3>(l, row),
                        2 => tile.run::<L, 2>(l, row),
                        _ => tile.run::<L, 1>(l, row),
                    };
                }
            }
            first_row = end;
        }
    }
}

/// A product of some rows with one panel: up to sixteen columns.
struct Tile<'a, B, F: MatMul<B>, O> {
    x: QuantizedRows<'a, F>,
    weights: &'a [B],
    prepared: &'a F::Prepared,
    bias: &'a [f32; LANES],
    columns: Range<usize>,
    epilogue: Epilogue,
    out: &'a mut O,
}

impl<B, F: MatMul<B>, O: OutRows> Tile<'_, B, F, O> {
    /// Computes `ROWS` rows from `first` on and returns their number.
    #[inline(always)]
    fn run<L: Lanes, const ROWS: usize>(&mut self, l: L, first: usize) -> usize {
        let products: [_; ROWS] = F::dot_rows(l, self.x, first, self.weights, self.prepared);
        let bias = l.load(self.bias);
        for (row, y) in products.into_iter().enumerate() {
            let y = l.add(y, bias);
            let out = self.out.part(first + row, self.columns.clone());
            if let ([out], []) = out.as_chunks_mut() {
                match self.epilogue {
                    Epilogue::Store => l.store(y, out),
                    Epilogue::Add => l.store(l.add(l.load(out), y), out),
                }
                continue;
            }
            let mut lanes = [0.0; LANES];
            l.store(y, &mut lanes);
            self.epilogue.apply(out, &lanes);
        }
        ROWS
    }
}

#[cfg(test)]
mod tests {
    use std::marker::PhantomData;

    use super::{
        super::{
            activations::{
                ActivationBuffer, ActivationBuffers, I8PerBlock, I16PerRow, QuantizeRows,
            },
            lanes::run_on_all,
            pointwise::F32Rows,
            weights::{BLOCK, BlockQ4_0x16, BlockQ8_0x16, GgmlBlock},
        },
        *,
    };

    /// Random weights in ggml's format, and their values.
    fn weights<B: GgmlBlock>(rows: usize, length: usize) -> (PackedWeights<B>, Vec<f32>) {
        let mut rng = fastrand::Rng::with_seed(1);
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        let nibbles = size_of::<B>() < size_of::<BlockQ8_0x16>();
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
        let packed = PackedWeights::from_ggml(rows, length, rows_of_bytes).unwrap();
        (packed, values)
    }

    fn noise(len: usize) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(2);
        (0..len).map(|_| rng.f32() * 4.0 - 2.0).collect()
    }

    /// [`matmul`] on one thread.
    struct SingleThread<'a, B, F> {
        x: &'a [f32],
        weights: &'a PackedWeights<B>,
        bias: &'a [f32],
        rounding: PhantomData<F>,
    }

    impl<B, F> Clone for SingleThread<'_, B, F> {
        fn clone(&self) -> Self {
            Self { ..*self }
        }
    }

    impl<B: GgmlBlock, F: MatMul<B>> Kernel for SingleThread<'_, B, F> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let length = self.weights.columns();
            let source = &F32Rows::new(self.x, length);
            let rows = source.rows();
            let interleaved = F::interleaved::<L>(rows);
            let places = rows.next_multiple_of(interleaved);
            let mut values = vec![F::Value::default(); places * length];
            let mut params =
                vec![F::QuantParams::default(); places * F::params_per_row(length / BLOCK)];
            QuantizeRows::<_, F> {
                source,
                rows: 0..rows,
                interleaved,
                values: &mut values,
                params: &mut params,
            }
            .run(l);
            let mut out = vec![0.0; rows * self.weights.rows()];
            Gemm {
                x: QuantizedRows::<F> {
                    values: &values,
                    params: &params,
                    rows,
                    length,
                },
                weights: self.weights,
                bias: Some(self.bias),
                panels: 0..self.weights.panels(),
                epilogue: Epilogue::Store,
                out: Pieces(out.chunks_exact_mut(self.weights.rows()).collect()),
            }
            .run(l);
            out
        }
    }

    /// Checks that each row comes out as if alone, with each instruction set, and within a relative distance of doubles.
    fn check<B: GgmlBlock, F: MatMul<B> + Default>(rows: usize, length: usize, bound: f64) {
        let (packed, numbers) = weights::<B>(rows, length);
        let bias = noise(rows);
        for tokens in [1, 2, 5, 6, 7, 13, 23, 99, 101] {
            let x = noise(tokens * length);
            let mut rounded = ActivationBuffer::<F>::default();
            let rounded = rounded.quantize(&F32Rows::new(&x, length));
            let mut out = vec![1.0; tokens * rows];
            matmul(rounded, &packed, Some(&bias), Epilogue::Store, &mut out);
            let mut more = out.clone();
            matmul(rounded, &packed, Some(&bias), Epilogue::Add, &mut more);
            let alone = |x| SingleThread {
                x,
                weights: &packed,
                bias: &bias,
                rounding: PhantomData::<F>,
            };
            assert!(run_on_all(alone(&x[..])) == out, "{tokens} rows");
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
            check::<BlockQ8_0x16, I16PerRow>(rows, length, 1e-4);
        }
    }

    #[test]
    fn products_with_4_bits() {
        for (rows, length) in [(16, 32), (49, 96)] {
            check::<BlockQ4_0x16, I8PerBlock>(rows, length, 1e-2);
        }
    }

    /// The extremes that an integer must hold.
    #[test]
    fn the_largest_products_fit() {
        let mut rounded = ActivationBuffers::default();
        let one = half::f16::ONE.to_le_bytes();
        for weight in [127i8, -128] {
            let row = [&one[..], &[weight.cast_unsigned(); 32]].concat();
            let packed = PackedWeights::<BlockQ8_0x16>::from_ggml(1, 32, [&row[..]]).unwrap();
            for value in [1.0, -1.0] {
                // As many rows as each way of multiplying takes at once.
                for rows in [1, 3, 8, 13] {
                    let x = vec![value; 32 * rows];
                    let mut out = vec![0.0; rows];
                    let x = rounded.i16_per_row.quantize(&F32Rows::new(&x, 32));
                    matmul(x, &packed, None, Epilogue::Store, &mut out);
                    assert_eq!(out, vec![32.0 * value * f32::from(weight); rows]);
                }
            }
        }
        for (byte, weight) in [(0, -8.0), (0xff, 7.0)] {
            let row = [&one[..], &[byte; 16]].concat();
            let packed = PackedWeights::<BlockQ4_0x16>::from_ggml(1, 32, [&row[..]]).unwrap();
            for (rows, value) in [(1, 127.0), (1, -127.0), (3, 127.0), (3, -127.0)] {
                let x = vec![value; 32 * rows];
                let x = F32Rows::new(&x, 32);
                let mut out = vec![0.0; rows];
                let x = rounded.i8_per_block.quantize(&x);
                matmul(x, &packed, None, Epilogue::Store, &mut out);
                assert_eq!(out, vec![32.0 * value * weight; rows]);
            }
        }
    }

    #[test]
    fn rows_are_padded_to_blocks() {
        fn check<B: GgmlBlock, F: MatMul<B> + Default>() {
            let (weights, _) = weights::<B>(16, 64);
            let mut buffer = ActivationBuffer::<F>::default();
            let mut product = |x: &[f32], length| {
                let mut out = vec![0.0; x.len() / length * 16];
                let x = buffer.quantize(&F32Rows::new(x, length));
                matmul(x, &weights, None, Epilogue::Store, &mut out);
                out
            };
            let mut x = noise(48);
            // Longer rows first: what they leave must not become padding.
            product(&noise(3 * 64), 64);
            let short = product(&x, 48);
            x.resize(64, 0.0);
            assert_eq!(product(&x, 64), short);
        }
        check::<BlockQ8_0x16, I16PerRow>();
        check::<BlockQ4_0x16, I8PerBlock>();
    }

    #[test]
    fn scales_that_are_not_finite_are_refused() {
        let mut row = [0; 34];
        assert!(PackedWeights::<BlockQ8_0x16>::from_ggml(1, 32, [&row[..]]).is_some());
        row[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert!(PackedWeights::<BlockQ8_0x16>::from_ggml(1, 32, [&row[..]]).is_none());
    }

    #[test]
    fn zeros_stay_zeros() {
        let (four, _) = weights::<BlockQ4_0x16>(16, 32);
        let (eight, _) = weights::<BlockQ8_0x16>(16, 32);
        let x = F32Rows::new(&[0.0; 32], 32);
        let mut rounded = ActivationBuffers::default();
        let mut out = [[1.0; 16]; 2];
        let [a, b] = &mut out;
        matmul(
            rounded.i16_per_row.quantize(&x),
            &eight,
            None,
            Epilogue::Store,
            a,
        );
        matmul(
            rounded.i8_per_block.quantize(&x),
            &four,
            None,
            Epilogue::Store,
            b,
        );
        assert_eq!(out, [[0.0; 16]; 2]);
    }
}
