//! Attention without a mask, as in the vision encoder: each row attends to all rows.

use rayon::prelude::*;

use crate::{
    activations::{I16_MAX, PlainI16PerRow, QuantizedRows, quantize_i16},
    lanes::{Kernel, LANES, Lanes, PAIR, dispatch},
    matmul::{Epilogue, Gemm, Strided},
    pointwise::exp,
    weights::{BLOCK, BlockI16x16, PackedWeights},
};

/// Largest integer of keys and values: 32 products of 12 with 16 bits fit an `i32`.
const I12_MAX: f32 = 2047.0;

/// Rows `[3, heads, head_size]` of queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct QkvRows<'a> {
    /// The rows, one after the other.
    pub qkv: &'a [f32],
    /// Number of heads.
    pub heads: usize,
    /// Values of a head, a multiple of [`LANES`].
    pub head_size: usize,
}

const QUERY: usize = 0;
const KEY: usize = 1;
const VALUE: usize = 2;

impl<'a> QkvRows<'a> {
    fn row_length(&self) -> usize {
        3 * self.heads * self.head_size
    }

    fn rows(&self) -> usize {
        self.qkv.len() / self.row_length()
    }

    /// One head's [`QUERY`], [`KEY`] or [`VALUE`] of a row.
    #[inline(always)]
    fn row(&self, row: usize, which: usize, head: usize) -> &'a [[f32; LANES]] {
        let start = row * self.row_length() + (which * self.heads + head) * self.head_size;
        self.qkv[start..][..self.head_size].as_chunks().0
    }
}

/// Attention of each row to all rows, into rows `[heads, head_size]` of `attn_out`.
///
/// Scores and weighted sums are products of 16 with 12 bits, softmax is in f32.
///
/// # Panics
///
/// If `attn_out` has another number of rows than `qkv`.
pub fn bidirectional_attention(qkv: QkvRows<'_>, attn_out: &mut [f32]) {
    let rows = qkv.rows();
    let width = qkv.heads * qkv.head_size;
    assert_eq!(attn_out.len(), rows * width);
    let kv: Vec<_> = (0..qkv.heads)
        .into_par_iter()
        .map(|head| dispatch(PackHead { qkv, head }))
        .collect();
    // The scores of so many rows stay in the second cache.
    let part = ((96 << 10) / (4 * rows)).clamp(6, 48);
    attn_out
        .par_chunks_mut(part * width)
        .enumerate()
        .for_each(|(i, attn_out)| {
            dispatch(AttendRows {
                qkv,
                kv: &kv,
                first: i * part,
                attn_out,
            })
        });
}

/// Keys and values of a head, packed as weights.
struct HeadKv {
    keys: PackedWeights<BlockI16x16>,
    values: PackedWeights<BlockI16x16>,
}

/// Packs keys and values of a head.
struct PackHead<'a> {
    qkv: QkvRows<'a>,
    head: usize,
}

impl Kernel for PackHead<'_> {
    type Output = HeadKv;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> HeadKv {
        let Self { qkv, head } = self;
        let (rows, head_size) = (qkv.rows(), qkv.head_size);
        let mut keys = PackedWeights::<BlockI16x16>::zeros(rows, head_size.next_multiple_of(BLOCK));
        for panel in 0..keys.panels() {
            let blocks = keys.panel_mut(panel);
            for lane in 0..LANES.min(rows - panel * LANES) {
                let row = qkv.row(panel * LANES + lane, KEY, head);
                for (block, x) in blocks.iter_mut().zip(row.chunks(BLOCK / LANES)) {
                    let mut quantized = [[0; LANES]; BLOCK / LANES];
                    block.scales[lane] = quantize_i16(l, x, I12_MAX, &mut quantized);
                    let pairs = quantized.as_flattened().as_chunks().0;
                    for (weights, pair) in block.weights.iter_mut().zip(pairs) {
                        weights[lane] = *pair;
                    }
                }
            }
        }
        let mut values =
            PackedWeights::<BlockI16x16>::zeros(head_size, rows.next_multiple_of(BLOCK));
        for panel in 0..values.panels() {
            for (i, block) in values.panel_mut(panel).iter_mut().enumerate() {
                let rows = i * BLOCK..rows.min((i + 1) * BLOCK);
                let row = |row| l.load(&qkv.row(row, VALUE, head)[panel]);
                let mut largest = l.splat(0.0);
                for i in rows.clone() {
                    largest = l.max(l.abs(row(i)), largest);
                }
                let least = l.splat(f32::MIN_POSITIVE);
                let inverse_scale = l.div(l.splat(I12_MAX), l.max(largest, least));
                l.store(l.mul(largest, l.splat(1.0 / I12_MAX)), &mut block.scales);
                for (j, i) in rows.enumerate() {
                    let mut quantized = [0; LANES];
                    l.store_i16(l.round(l.mul(row(i), inverse_scale)), &mut quantized);
                    for (weights, value) in block.weights[j / PAIR].iter_mut().zip(quantized) {
                        weights[j % PAIR] = value;
                    }
                }
            }
        }
        HeadKv { keys, values }
    }
}

/// Attention of some rows from `first` on, for all heads.
struct AttendRows<'a> {
    qkv: QkvRows<'a>,
    kv: &'a [HeadKv],
    first: usize,
    attn_out: &'a mut [f32],
}

impl Kernel for AttendRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let QkvRows {
            heads, head_size, ..
        } = self.qkv;
        let width = heads * head_size;
        let rows = self.attn_out.len() / width;
        let keys_len = self.qkv.rows();
        let (padded, length) = (
            keys_len.next_multiple_of(BLOCK),
            head_size.next_multiple_of(BLOCK),
        );
        let mut queries = vec![0; rows * length];
        let mut scales = vec![0.0; rows];
        let mut scores = vec![0.0; rows * padded];
        let mut probs = vec![0; rows * padded];
        for (head, HeadKv { keys, values }) in self.kv.iter().enumerate() {
            for (i, (query, scale)) in queries
                .chunks_exact_mut(length)
                .zip(&mut scales)
                .enumerate()
            {
                let row = self.qkv.row(self.first + i, QUERY, head);
                *scale = quantize_i16(l, row, I16_MAX, query.as_chunks_mut().0)
                    / (head_size as f32).sqrt();
            }
            let x = QuantizedRows::<PlainI16PerRow> {
                values: &queries,
                params: &scales,
                rows,
                length,
            };
            Gemm {
                x,
                weights: keys,
                bias: None,
                panels: 0..keys.panels(),
                epilogue: Epilogue::Store,
                out: Strided {
                    out: &mut scores,
                    stride: padded,
                },
            }
            .run(l);
            let softmax = scores
                .chunks_exact_mut(padded)
                .zip(probs.chunks_exact_mut(padded));
            for ((scores, probs), scale) in softmax.zip(&mut scales) {
                scores[keys_len..].fill(f32::NEG_INFINITY);
                *scale = softmax_row(l, scores.as_chunks().0, probs.as_chunks_mut().0);
            }
            let x = QuantizedRows::<PlainI16PerRow> {
                values: &probs,
                params: &scales,
                rows,
                length: padded,
            };
            Gemm {
                x,
                weights: values,
                bias: None,
                panels: 0..values.panels(),
                epilogue: Epilogue::Store,
                out: Strided {
                    out: &mut self.attn_out[head * head_size..],
                    stride: width,
                },
            }
            .run(l);
        }
    }
}

/// Softmax of a row to probabilities of 16 bits. Returns their scale.
#[inline(always)]
fn softmax_row<L: Lanes>(l: L, scores: &[[f32; LANES]], probs: &mut [[i16; LANES]]) -> f32 {
    let mut largest = l.splat(f32::NEG_INFINITY);
    for x in scores {
        largest = l.max(l.load(x), largest);
    }
    let largest = l.splat(l.reduce_max(largest));
    let mut sum = l.splat(0.0);
    for (x, to) in scores.iter().zip(probs) {
        let prob = exp(l, l.sub(l.load(x), largest));
        sum = l.add(sum, prob);
        l.store_i16(l.round(l.mul(prob, l.splat(I16_MAX))), to);
    }
    1.0 / (I16_MAX * l.reduce(sum, |a, b| a + b))
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{distance, exact_attention, noise},
        *,
    };
    use crate::lanes::run_on_all;

    /// [`bidirectional_attention`] on one thread.
    #[derive(Clone)]
    struct SingleThread<'a>(QkvRows<'a>);

    impl Kernel for SingleThread<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let qkv = self.0;
            let mut kv = Vec::new();
            for head in 0..qkv.heads {
                kv.push(PackHead { qkv, head }.run(l));
            }
            let mut out = vec![0.0; qkv.rows() * qkv.heads * qkv.head_size];
            AttendRows {
                qkv,
                kv: &kv,
                first: 0,
                attn_out: &mut out,
            }
            .run(l);
            out
        }
    }

    #[test]
    fn rows_attend_to_all_rows() {
        for (rows, heads, head_size) in [(1, 1, 16), (16, 2, 32), (50, 3, 48), (100, 2, 64)] {
            let x = noise(rows * 3 * heads * head_size);
            let qkv = QkvRows {
                qkv: &x,
                heads,
                head_size,
            };
            let mut out = vec![0.0; rows * heads * head_size];
            bidirectional_attention(qkv, &mut out);

            assert!(run_on_all(SingleThread(qkv)) == out, "{rows} rows");

            let mut exact = Vec::new();
            for row in 0..rows {
                for head in 0..heads {
                    let of = |row, which| qkv.row(row, which, head).as_flattened();
                    let kv = (0..rows).map(|row| (of(row, KEY), of(row, VALUE)));
                    exact.extend(exact_attention(of(row, QUERY), kv));
                }
            }
            let off = distance(&out, &exact);
            assert!(off < 1e-3, "{rows} {head_size}: {off}");
        }
    }
}
