//! Products of rows with weights.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    HALVES, INT8_BLOCK, Int8Buffer, Int8Rows, Int8Weights, PANEL_ROWS, Sign, TILE_ROWS, TileSums,
    multiply, rows::TileMut, widen_panel, widen_tiles,
};
use crate::{
    lanes::{Kernel, LANES, Lanes, QUAD, dispatch},
    matmul::{CACHED, Epilogue, PARTS_PER_THREAD},
    pointwise::coarse_gelu,
};

/// Panels that make a block of the next product's activations.
const GROUP_PANELS: usize = INT8_BLOCK / PANEL_ROWS;

/// A block of products of a tile's rows.
type GroupSums = TileSums<{ INT8_BLOCK / LANES }>;

/// Multiplies rows `[n, columns]` with weights `[rows, columns]`, to `out` `[n, rows]`, and adds a bias.
///
/// # Panics
///
/// If the shapes don't match.
pub fn matmul_int8(
    x: Int8Rows<'_>,
    weights: &Int8Weights,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    out: &mut [f32],
) {
    assert_eq!(out.len(), x.rows() * weights.rows());
    let parts = Parts::new(weights);
    let mut pieces: Vec<_> = parts.of(|| Vec::with_capacity(x.rows()));
    for row in out.chunks_exact_mut(weights.rows()) {
        for (piece, part) in row.chunks_mut(parts.groups * INT8_BLOCK).zip(&mut pieces) {
            part.push(piece);
        }
    }
    let outputs = pieces.into_iter().map(|rows| ToRows { rows, epilogue });
    parts.run(x, weights, bias, outputs.collect());
}

/// As [`matmul_int8`], to blocks of [`INT8_BLOCK`] columns, each with all rows: `[blocks, n, INT8_BLOCK]`.
///
/// # Panics
///
/// If the shapes don't match.
pub fn matmul_int8_blocks(
    x: Int8Rows<'_>,
    weights: &Int8Weights,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let block = x.rows() * INT8_BLOCK;
    assert_eq!(out.len(), weights.rows().div_ceil(INT8_BLOCK) * block);
    let parts = Parts::new(weights);
    let outputs = out.chunks_mut(parts.groups * block);
    let outputs = outputs.map(|blocks| ToBlocks { blocks, block });
    parts.run(x, weights, bias, outputs.collect());
}

/// As [`matmul_int8`], to the activations of the next product: GELU of the sums, by its tanh approximation.
///
/// # Panics
///
/// If the shapes don't match.
pub fn gelu_matmul_int8<'a>(
    x: Int8Rows<'_>,
    weights: &Int8Weights,
    bias: Option<&[f32]>,
    out: &'a mut Int8Buffer,
) -> Int8Rows<'a> {
    let parts = Parts::new(weights);
    let mut pieces: Vec<_> = parts.of(Vec::new);
    for tile in out.room(x.rows(), weights.rows()) {
        let quads = tile.quads.chunks_mut(parts.groups * INT8_BLOCK / QUAD);
        let scales = tile.scales.chunks_mut(parts.groups);
        for ((quads, scales), part) in quads.zip(scales).zip(&mut pieces) {
            part.push(TileMut { quads, scales });
        }
    }
    parts.run(x, weights, bias, pieces.into_iter().map(ToTiles).collect());
    out.rows(x.rows(), weights.rows())
}

/// How a product is split among threads: by weights, not by rows, so that each is read once.
struct Parts {
    /// Blocks of the output in all.
    all: usize,
    /// Blocks of the output in each part.
    groups: usize,
}

impl Parts {
    fn new(weights: &Int8Weights) -> Self {
        let all = weights.rows().div_ceil(INT8_BLOCK);
        let groups = all.div_ceil(PARTS_PER_THREAD * rayon::current_num_threads());
        Self { all, groups }
    }

    fn of<T>(&self, new: impl Fn() -> T) -> Vec<T> {
        let parts = self.all.div_ceil(self.groups);
        std::iter::repeat_with(new).take(parts).collect()
    }

    fn run<O: Output>(
        &self,
        x: Int8Rows<'_>,
        weights: &Int8Weights,
        bias: Option<&[f32]>,
        outputs: Vec<O>,
    ) {
        assert_eq!(x.columns(), weights.columns());
        outputs.into_par_iter().enumerate().for_each(|(i, out)| {
            let groups = i * self.groups..self.all.min((i + 1) * self.groups);
            dispatch(Gemm {
                x,
                weights,
                bias,
                groups,
                out,
            });
        });
    }
}

/// What becomes of products.
trait Output: Send {
    /// Takes a block of some rows of a tile; `group` counts the blocks from the part's first.
    fn take<L: Lanes>(&mut self, l: L, at: (usize, usize), rows: usize, sums: &GroupSums);
}

/// Parts of rows whose other parts are other threads'.
struct ToRows<'a> {
    rows: Vec<&'a mut [f32]>,
    epilogue: Epilogue,
}

impl Output for ToRows<'_> {
    #[inline(always)]
    fn take<L: Lanes>(
        &mut self,
        l: L,
        (tile, group): (usize, usize),
        rows: usize,
        sums: &GroupSums,
    ) {
        for (row, sums) in self.rows[tile * TILE_ROWS..][..rows].iter_mut().zip(sums) {
            let rest = &mut row[group * INT8_BLOCK..];
            let length = rest.len().min(INT8_BLOCK);
            let (vectors, tail) = rest[..length].as_chunks_mut();
            for (to, sum) in vectors.iter_mut().zip(sums) {
                match self.epilogue {
                    Epilogue::Store => *to = *sum,
                    Epilogue::Add => l.store(l.add(l.load(to), l.load(sum)), to),
                }
            }
            let sums = &sums.as_flattened()[length - tail.len()..];
            self.epilogue.apply(tail, sums);
        }
    }
}

/// Blocks of columns.
struct ToBlocks<'a> {
    blocks: &'a mut [f32],
    /// Length of a block.
    block: usize,
}

impl Output for ToBlocks<'_> {
    #[inline(always)]
    fn take<L: Lanes>(
        &mut self,
        _: L,
        (tile, group): (usize, usize),
        rows: usize,
        sums: &GroupSums,
    ) {
        let start = group * self.block + tile * TILE_ROWS * INT8_BLOCK;
        let to = self.blocks[start..].as_chunks_mut().0.as_chunks_mut().0;
        to[..rows].copy_from_slice(&sums[..rows]);
    }
}

/// Parts of the next product's activations.
struct ToTiles<'a>(Vec<TileMut<'a>>);

impl Output for ToTiles<'_> {
    #[inline(always)]
    fn take<L: Lanes>(
        &mut self,
        l: L,
        (tile, group): (usize, usize),
        rows: usize,
        sums: &GroupSums,
    ) {
        for (row, sums) in sums.iter().enumerate().take(rows) {
            let mut block = [[0.0; LANES]; INT8_BLOCK / LANES];
            for (sum, to) in sums.iter().zip(&mut block) {
                l.store(coarse_gelu(l, l.load(sum)), to);
            }
            self.0[tile].set(l, (row, group), &block);
        }
    }
}

/// A product of rows with some blocks of the weights' rows.
struct Gemm<'a, O> {
    x: Int8Rows<'a>,
    weights: &'a Int8Weights,
    bias: Option<&'a [f32]>,
    groups: Range<usize>,
    out: O,
}

impl<O: Output> Kernel for Gemm<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let tiles = self.x.rows().div_ceil(TILE_ROWS);
        let cached = (CACHED / (TILE_ROWS * self.x.columns())).max(1);
        let (mut tile_pairs, mut panel_pairs) = (Vec::new(), Vec::new());
        let mut sums = GroupSums::default();
        for first in (0..tiles).step_by(cached) {
            let some = first..tiles.min(first + cached);
            tile_pairs.clear();
            widen_tiles(l, self.x.quads(some.clone()), &mut tile_pairs);
            for group in self.groups.clone() {
                let panels =
                    group * GROUP_PANELS..self.weights.panels().min((group + 1) * GROUP_PANELS);
                if panels.len() < GROUP_PANELS {
                    // What the group before left would count as its own.
                    sums = GroupSums::default();
                }
                panel_pairs.clear();
                for panel in panels.clone() {
                    let quads = self.weights.panel(panel, (&[], 0)).quads;
                    widen_panel(l, quads, &mut panel_pairs);
                }
                let mut bias = [[[0.0; LANES]; HALVES]; GROUP_PANELS];
                if let Some(all) = self.bias {
                    let all = &all[group * INT8_BLOCK..];
                    let length = all.len().min(INT8_BLOCK);
                    bias.as_flattened_mut().as_flattened_mut()[..length]
                        .copy_from_slice(&all[..length]);
                }
                for tile in some.clone() {
                    let x = (self.x.tile(tile, (&tile_pairs, first)), Sign::Signed);
                    for ((i, panel), bias) in panels.clone().enumerate().zip(&bias) {
                        let panel = self.weights.panel(panel, (&panel_pairs, panels.start));
                        multiply(l, x, panel, bias, (&mut sums, i * HALVES));
                    }
                    let rows = TILE_ROWS.min(self.x.rows() - tile * TILE_ROWS);
                    self.out
                        .take(l, (tile, group - self.groups.start), rows, &sums);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{rows::QuantizeTiles, tests::Decode},
        *,
    };
    use crate::{lanes::run_on_all, pointwise::F32Rows};

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..len).map(|_| rng.f32() * 4.0 - 2.0).collect()
    }

    /// [`matmul_int8`] on one thread.
    #[derive(Clone)]
    struct SingleThread<'a> {
        x: &'a [f32],
        weights: &'a Int8Weights,
        bias: &'a [f32],
    }

    impl Kernel for SingleThread<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let columns = self.weights.columns();
            let source = &F32Rows::new(self.x, columns);
            let mut buffer = Int8Buffer::default();
            QuantizeTiles {
                source,
                first: 0,
                tiles: &mut buffer.room(source.rows(), columns),
            }
            .run(l);
            let mut out = vec![0.0; source.rows() * self.weights.rows()];
            Gemm {
                x: buffer.rows(source.rows(), columns),
                weights: self.weights,
                bias: Some(self.bias),
                groups: 0..self.weights.rows().div_ceil(INT8_BLOCK),
                out: ToRows {
                    rows: out.chunks_exact_mut(self.weights.rows()).collect(),
                    epilogue: Epilogue::Store,
                },
            }
            .run(l);
            out
        }
    }

    fn distance(y: &[f32], exact: &[f64]) -> f64 {
        let off = y
            .iter()
            .zip(exact)
            .map(|(y, x)| (f64::from(*y) - x).powi(2));
        let all: f64 = exact.iter().map(|x| x * x).sum();
        (off.sum::<f64>() / all).sqrt()
    }

    #[test]
    fn rows_come_out_as_if_alone_on_every_processor() {
        for (rows, columns) in [(16, 16), (49, 96), (130, 64), (64, 208)] {
            let values = noise(rows * columns, 1);
            let row =
                |i: usize, to: &mut [f32]| to.copy_from_slice(&values[i * columns..][..columns]);
            let weights = Int8Weights::quantize(rows, columns, row).unwrap();
            let bias = noise(rows, 2);
            for tokens in [1, 7, 8, 9, 23, 64, 101] {
                let x = noise(tokens * columns, 3);
                let mut buffer = Int8Buffer::default();
                let quantized = buffer.quantize(&F32Rows::new(&x, columns));
                let mut out = vec![1.0; tokens * rows];
                matmul_int8(quantized, &weights, Some(&bias), Epilogue::Store, &mut out);
                let mut more = out.clone();
                matmul_int8(quantized, &weights, Some(&bias), Epilogue::Add, &mut more);
                let mut blocks = vec![1.0; tokens * rows.next_multiple_of(INT8_BLOCK)];
                matmul_int8_blocks(quantized, &weights, Some(&bias), &mut blocks);
                for (i, row) in out.chunks(rows).enumerate() {
                    for (j, y) in row.iter().enumerate() {
                        let block = j / INT8_BLOCK * tokens + i;
                        assert_eq!(blocks[block * INT8_BLOCK + j % INT8_BLOCK], *y);
                    }
                }
                let alone = |x| SingleThread {
                    x,
                    weights: &weights,
                    bias: &bias,
                };
                assert!(run_on_all(alone(&x[..])) == out, "{tokens} rows");
                for (i, (x, out)) in x.chunks(columns).zip(out.chunks(rows)).enumerate() {
                    assert!(dispatch(alone(x)) == out, "row {i} of {tokens}");
                    let exact = values.chunks(columns).zip(&bias).map(|(row, bias)| {
                        let products = row
                            .iter()
                            .zip(x)
                            .map(|(a, b)| f64::from(*a) * f64::from(*b));
                        products.sum::<f64>() + f64::from(*bias)
                    });
                    let off = distance(out, &exact.collect::<Vec<_>>());
                    assert!(off < 1.5e-2, "{off}");
                }
                for (more, out) in more.iter().zip(&out) {
                    assert_eq!(*more, 2.0 * out);
                }
            }
        }
    }

    #[test]
    fn gelu_goes_on_as_the_next_activations() {
        let (rows, columns, tokens) = (464, 96, 21);
        let values = noise(rows * columns, 1);
        let row = |i: usize, to: &mut [f32]| to.copy_from_slice(&values[i * columns..][..columns]);
        let weights = Int8Weights::quantize(rows, columns, row).unwrap();
        // The last block is not whole, and much smaller than what is before it.
        let mut bias = noise(rows, 2);
        bias[..448].fill(1000.0);
        let x = noise(tokens * columns, 3);
        let [mut first, mut second] = <[Int8Buffer; 2]>::default();
        let x = first.quantize(&F32Rows::new(&x, columns));
        let mut out = vec![0.0; tokens * rows];
        matmul_int8(x, &weights, Some(&bias), Epilogue::Store, &mut out);
        let exact = out.iter().map(|x| {
            let x = f64::from(*x);
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            x / 2.0 * (1.0 + u.tanh())
        });
        let fused = gelu_matmul_int8(x, &weights, Some(&bias), &mut second);
        assert_eq!((fused.rows(), fused.columns()), (tokens, rows));
        let (y, exact) = (dispatch(Decode(fused)), exact.collect::<Vec<_>>());
        for (y, exact) in y.chunks(rows).zip(exact.chunks(rows)) {
            for range in [0..448, 448..rows] {
                let off = distance(&y[range.clone()], &exact[range]);
                assert!(off < 1e-2, "{off}");
            }
        }
    }

    /// The extremes that an integer must hold.
    #[test]
    fn the_largest_products_fit() {
        let columns = 2 * INT8_BLOCK;
        for weight in [127.0, -127.0] {
            let weights = Int8Weights::quantize(3, columns, |_, to| to.fill(weight)).unwrap();
            for value in [1.0, -1.0] {
                let x = vec![value; 9 * columns];
                let expected = weight * value * columns as f32;
                let y = run_on_all(SingleThread {
                    x: &x,
                    weights: &weights,
                    bias: &[0.0; 3],
                });
                assert!(y.iter().all(|y| (y / expected - 1.0).abs() < 1e-6), "{y:?}");
            }
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_refused() {
        for broken in [f32::NAN, f32::INFINITY] {
            let row = |i, to: &mut [f32]| {
                to.fill(1.0);
                if i == 33 {
                    to[70] = broken;
                }
            };
            assert!(Int8Weights::quantize(40, 80, row).is_none());
        }
        assert!(Int8Weights::quantize(40, 80, |_, to| to.fill(0.0)).is_some());
    }

    #[test]
    fn zeros_stay_zeros() {
        let weights = Int8Weights::quantize(16, 32, |_, to| to.fill(1.0)).unwrap();
        let y = run_on_all(SingleThread {
            x: &[0.0; 64],
            weights: &weights,
            bias: &[0.0; 16],
        });
        assert_eq!(y, [0.0; 32]);
    }
}
