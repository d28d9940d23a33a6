//! Attention without a mask, as in the vision encoder: each row attends to all rows.
//!
//! Everything is a product of bytes. Scores are computed with a query in each lane, so that their maxima, powers and sums
//! need no step across lanes, and probabilities come out as the next product takes them.

use std::{f32::consts::LOG2_E, ops::Range};

use bytemuck::cast;
use rayon::prelude::*;

use super::softmax::{BlockSums, combine, softmax_block};
use crate::{
    int8::{
        BLOCK_QUADS, BlockParams, HALVES, INT8_BLOCK, Int8Buffer, Int8Rows, Int8Weights,
        PANEL_ROWS, Panel, PanelPair, PanelQuad, Sign, TILE_ROWS, Tile, TileMut, TilePair,
        TileQuad, TileSums, multiply, part, scale_of, set_lane, widen_panel, widen_tiles,
    },
    lanes::{Kernel, LANES, Lanes, PAIR, QUAD, dispatch},
};

/// Vectors of a block of columns.
const VECTORS: usize = INT8_BLOCK / LANES;

/// A block of a row.
type Block = [[f32; LANES]; VECTORS];

/// Queries, keys and values of rows as [`matmul_int8_blocks`](crate::matmul_int8_blocks) writes them: `[3, heads,
/// head_size]` columns in blocks of [`INT8_BLOCK`], each block with all rows.
///
/// `head_size` divides [`INT8_BLOCK`] and is no less than [`LANES`], or is a multiple of it. Heads of other sizes are
/// padded with zeros.
#[derive(Debug, Clone, Copy)]
pub struct QkvBlocks<'a> {
    /// The blocks, one after the other.
    pub qkv: &'a [f32],
    /// Number of rows.
    pub rows: usize,
    /// Number of heads.
    pub heads: usize,
    /// Values of a head.
    pub head_size: usize,
    /// What scores are multiplied with: 1 / √(head size before padding).
    pub scale: f32,
}

const QUERY: usize = 0;
const KEY: usize = 1;
const VALUE: usize = 2;

/// [`QUERY`], [`KEY`] or [`VALUE`] of a head.
#[derive(Clone, Copy)]
struct Head<'a> {
    /// Blocks with all rows.
    blocks: &'a [f32],
    rows: usize,
    /// Where the head begins in its first block, and how many vectors it has in each.
    vectors: (usize, usize),
}

impl<'a> Head<'a> {
    /// The head's vectors in a block of a row.
    #[inline(always)]
    fn block(&self, row: usize, block: usize) -> &'a [[f32; LANES]] {
        let start = (block * self.rows + row) * INT8_BLOCK;
        let vectors: &[[f32; LANES]] = self.blocks[start..][..INT8_BLOCK].as_chunks().0;
        &vectors[self.vectors.0..][..self.vectors.1]
    }
}

impl<'a> QkvBlocks<'a> {
    /// Blocks of a head.
    fn blocks(&self) -> usize {
        self.head_size.div_ceil(INT8_BLOCK)
    }

    fn head(&self, which: usize, head: usize) -> Head<'a> {
        let column = (which * self.heads + head) * self.head_size;
        let length = self.rows * INT8_BLOCK;
        Head {
            blocks: &self.qkv[column / INT8_BLOCK * length..][..self.blocks() * length],
            rows: self.rows,
            vectors: (
                column % INT8_BLOCK / LANES,
                VECTORS.min(self.head_size / LANES),
            ),
        }
    }
}

/// Attention of each row to all rows, to rows `[heads, head_size]` in 8 bits.
///
/// Queries, keys, values and probabilities have 8 bits, with scales for each row, channel or query in each block of
/// [`INT8_BLOCK`] keys; softmax is in f32.
///
/// # Panics
///
/// If there are not so many rows, or the head size is not as said.
pub fn bidirectional_attention<'a>(qkv: QkvBlocks<'_>, out: &'a mut Int8Buffer) -> Int8Rows<'a> {
    let head_size = qkv.head_size;
    assert!(head_size.is_multiple_of(LANES));
    assert!(head_size.is_multiple_of(INT8_BLOCK) || INT8_BLOCK.is_multiple_of(head_size));
    let width = qkv.heads * head_size;
    let length = (3 * width).next_multiple_of(INT8_BLOCK);
    assert_eq!(qkv.qkv.len(), length * qkv.rows);
    let kv: Vec<_> = (0..qkv.heads)
        .into_par_iter()
        .map(|head| dispatch(PackHead { qkv, head }))
        .collect();
    let mut tiles = out.room(qkv.rows, width);
    let parts = tiles.par_chunks_mut(QUERY_TILES).enumerate();
    parts.for_each_init(Scratch::default, |scratch, (i, tiles)| {
        dispatch(AttendRows {
            qkv,
            kv: &kv,
            first: i * PANEL_ROWS,
            tiles,
            scratch,
        });
    });
    out.rows(qkv.rows, width)
}

/// Keys and values of a head, quantized.
struct HeadKv {
    /// Rows of activations: what keys have in common changes no probability, and was taken off.
    keys: Int8Buffer,
    /// Weights, a row for each channel and a column for each key, without the means of channels.
    values: Int8Weights,
    value_means: Vec<[[f32; LANES]; HALVES]>,
    /// Keys and values [widened](widen_tiles).
    key_pairs: Vec<TilePair>,
    value_pairs: Vec<PanelPair>,
}

/// Packs keys and values of a head.
struct PackHead<'a> {
    qkv: QkvBlocks<'a>,
    head: usize,
}

impl Kernel for PackHead<'_> {
    type Output = HeadKv;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> HeadKv {
        let qkv = self.qkv;
        let (rows, head_size) = (qkv.rows, qkv.head_size);
        let mut keys = Int8Buffer::default();
        let head = qkv.head(KEY, self.head);
        let mut tiles = keys.room(rows, head_size);
        for block in 0..qkv.blocks() {
            let means = means(l, head, block);
            for (i, tile) in tiles.iter_mut().enumerate() {
                for (place, i) in (i * TILE_ROWS..rows).take(TILE_ROWS).enumerate() {
                    let mut row = Block::default();
                    for ((x, mean), to) in head.block(i, block).iter().zip(&means).zip(&mut row) {
                        l.store(l.sub(l.load(x), l.load(mean)), to);
                    }
                    tile.set(l, (place, block), &row);
                }
            }
        }
        drop(tiles);
        let mut key_pairs = Vec::new();
        let tiles = 0..rows.div_ceil(TILE_ROWS);
        let quads = keys.rows(rows, head_size).quads(tiles);
        widen_tiles(l, quads, &mut key_pairs);

        let head = qkv.head(VALUE, self.head);
        let mut values = Int8Weights::zeros(head_size, rows.next_multiple_of(INT8_BLOCK));
        let mut value_means = Vec::with_capacity(values.panels());
        let mut value_pairs = Vec::new();
        for panel in 0..values.panels() {
            let (block, first) = (panel * HALVES / VECTORS, panel * HALVES % VECTORS);
            let means: [_; HALVES] = {
                let means = means(l, head, block);
                std::array::from_fn(
                    #[inline(always)]
                    |half| means[first + half],
                )
            };
            value_means.push(means);
            let (quads, params) = values.panel_mut(panel);
            let blocks = quads.chunks_exact_mut(BLOCK_QUADS).zip(params).enumerate();
            for (i, (quads, params)) in blocks {
                let keys = i * INT8_BLOCK..rows.min((i + 1) * INT8_BLOCK);
                let mut scales = [[0.0; LANES]; HALVES];
                // A head of one vector leaves half of its panel empty.
                let vectors = first..head.vectors.1.min(first + HALVES);
                for (half, vector) in vectors.enumerate() {
                    let mean = l.load(&means[half]);
                    scales[half] = pack_values(
                        l,
                        keys.clone(),
                        (quads, half),
                        #[inline(always)]
                        |row| l.sub(l.load(&head.block(row, block)[vector]), mean),
                    );
                }
                *params = BlockParams::new(scales, quads);
            }
            widen_panel(l, quads, &mut value_pairs);
        }
        HeadKv {
            keys,
            values,
            value_means,
            key_pairs,
            value_pairs,
        }
    }
}

/// Means over all rows of each column of a block.
#[inline(always)]
fn means<L: Lanes>(l: L, head: Head<'_>, block: usize) -> Block {
    let mut sums = [l.splat(0.0); VECTORS];
    for row in 0..head.rows {
        for (sum, x) in sums.iter_mut().zip(head.block(row, block)) {
            *sum = l.add(*sum, l.load(x));
        }
    }
    let part = l.splat(1.0 / head.rows as f32);
    let mut means = Block::default();
    for (sum, to) in sums.into_iter().zip(&mut means) {
        l.store(l.mul(sum, part), to);
    }
    means
}

/// Quantizes a block of keys' values of sixteen channels to half a panel, and returns the channels' scales.
#[inline(always)]
fn pack_values<L: Lanes>(
    l: L,
    keys: Range<usize>,
    (quads, half): (&mut [PanelQuad], usize),
    value: impl Fn(usize) -> L::Float,
) -> [f32; LANES] {
    let mut largest = l.splat(0.0);
    for key in keys.clone() {
        largest = l.max(l.abs(value(key)), largest);
    }
    let mut scales = [0.0; LANES];
    l.store(largest, &mut scales);
    for scale in &mut scales {
        *scale = scale_of(*scale);
    }
    let inverse_scale = l.div(
        l.splat(1.0),
        l.max(l.load(&scales), l.splat(f32::MIN_POSITIVE)),
    );
    for (quad, key) in quads.iter_mut().zip(keys.clone().step_by(QUAD)) {
        let mut four = [l.splat_int(0); QUAD];
        for (x, key) in four.iter_mut().zip(key..keys.end) {
            *x = l.round(l.mul(value(key), inverse_scale));
        }
        let mut bytes = [[0; QUAD]; LANES];
        l.store_bytes(four, &mut bytes);
        quad[half] = cast(bytes);
    }
    scales
}

/// Attention of up to thirty-two rows from `first` on, for all heads.
struct AttendRows<'a, 'b> {
    qkv: QkvBlocks<'a>,
    kv: &'a [HeadKv],
    first: usize,
    tiles: &'a mut [TileMut<'b>],
    scratch: &'a mut Scratch,
}

/// Memory that is used again for other rows.
#[derive(Default)]
struct Scratch {
    queries: Queries,
    probs: Vec<TileQuad>,
    prob_pairs: Vec<TilePair>,
    scales: Vec<[f32; TILE_ROWS]>,
    sums: Vec<BlockSums>,
}

/// Tiles that a panel's queries are.
const QUERY_TILES: usize = PANEL_ROWS / TILE_ROWS;
/// Tiles of a block of keys.
const KEY_TILES: usize = INT8_BLOCK / TILE_ROWS;

impl Kernel for AttendRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let qkv = self.qkv;
        let rows = self.first..qkv.rows.min(self.first + PANEL_ROWS);
        let blocks = qkv.rows.div_ceil(INT8_BLOCK);
        let length = blocks * BLOCK_QUADS;
        let Scratch {
            queries,
            probs,
            prob_pairs,
            scales,
            sums,
        } = self.scratch;
        probs.resize(QUERY_TILES * length, TileQuad::default());
        scales.resize(QUERY_TILES * blocks, [0.0; TILE_ROWS]);
        let mut scores = [TileSums::<HALVES>::default(); KEY_TILES];
        // A block of the output at a time, which may be of several heads, or of a part of one.
        let mut outs = [TileSums::<VECTORS>::default(); QUERY_TILES];
        for (head, kv) in self.kv.iter().enumerate() {
            queries.set(l, qkv, rows.clone(), head);
            let keys = kv.keys.rows(qkv.rows, qkv.head_size);
            sums.clear();
            for block in 0..blocks {
                let count = INT8_BLOCK.min(qkv.rows - block * INT8_BLOCK);
                let tiles = block * KEY_TILES..;
                for (scores, tile) in scores.iter_mut().zip(tiles).take(count.div_ceil(TILE_ROWS)) {
                    let keys = (keys.tile(tile, (&kv.key_pairs, 0)), Sign::Signed);
                    multiply(l, keys, queries.panel(), &Default::default(), (scores, 0));
                }
                let probs = probs[block * BLOCK_QUADS..].chunks_mut(length);
                sums.push(softmax_block(l, &scores.as_flattened()[..count], probs));
            }
            combine(l, sums, scales);
            prob_pairs.clear();
            widen_tiles(l, probs, prob_pairs);
            for (panel, means) in kv.value_means.iter().enumerate() {
                let values = kv.values.panel(panel, (&kv.value_pairs, 0));
                let column = head * qkv.head_size + panel * PANEL_ROWS;
                let at = column % INT8_BLOCK / LANES;
                let tiles = probs.chunks_exact(length).zip(scales.chunks_exact(blocks));
                let tiles = tiles.zip(&mut outs).take(self.tiles.len()).enumerate();
                for (i, ((quads, scales), out)) in tiles {
                    let tile = Tile {
                        quads,
                        scales,
                        pairs: part(prob_pairs, i, PAIR * length),
                    };
                    multiply(l, (tile, Sign::Unsigned), values, means, (out, at));
                }
                let end = column + PANEL_ROWS.min(qkv.head_size);
                if end.is_multiple_of(INT8_BLOCK) || end == qkv.heads * qkv.head_size {
                    for (tile, out) in self.tiles.iter_mut().zip(&mut outs) {
                        for (row, x) in out.iter().enumerate() {
                            tile.set(l, (row, column / INT8_BLOCK), x);
                        }
                        *out = TileSums::default();
                    }
                }
            }
        }
    }
}

/// Queries as weights, a lane for each.
#[derive(Default)]
struct Queries {
    quads: Vec<PanelQuad>,
    params: Vec<BlockParams>,
    pairs: Vec<PanelPair>,
}

impl Queries {
    #[inline(always)]
    fn set<L: Lanes>(&mut self, l: L, qkv: QkvBlocks<'_>, rows: Range<usize>, head: usize) {
        self.quads
            .resize(qkv.head_size / QUAD, PanelQuad::default());
        self.params.clear();
        let head = qkv.head(QUERY, head);
        // Scores become powers of two.
        let factor = l.splat(LOG2_E * qkv.scale);
        for (block, quads) in self.quads.chunks_mut(BLOCK_QUADS).enumerate() {
            let mut scales = [[0.0; LANES]; HALVES];
            for (place, row) in rows.clone().enumerate() {
                let (half, lane) = (place / LANES, place % LANES);
                let mut x = Block::default();
                for (x, to) in head.block(row, block).iter().zip(&mut x) {
                    l.store(l.mul(l.load(x), factor), to);
                }
                scales[half][lane] = set_lane(l, &x, (half, lane), quads);
            }
            self.params.push(BlockParams::new(scales, quads));
        }
        self.pairs.clear();
        widen_panel(l, &self.quads, &mut self.pairs);
    }

    fn panel(&self) -> Panel<'_> {
        Panel {
            quads: &self.quads,
            params: &self.params,
            pairs: &self.pairs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{distance, exact_attention, noise},
        *,
    };
    use crate::{int8::tests::Decode, lanes::run_on_all};

    /// [`bidirectional_attention`] on one thread.
    #[derive(Clone)]
    struct SingleThread<'a>(QkvBlocks<'a>);

    impl Kernel for SingleThread<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let qkv = self.0;
            let mut kv = Vec::new();
            for head in 0..qkv.heads {
                kv.push(PackHead { qkv, head }.run(l));
            }
            let width = qkv.heads * qkv.head_size;
            let mut out = Int8Buffer::default();
            let mut scratch = Scratch::default();
            for (i, tiles) in out
                .room(qkv.rows, width)
                .chunks_mut(QUERY_TILES)
                .enumerate()
            {
                AttendRows {
                    qkv,
                    kv: &kv,
                    first: i * PANEL_ROWS,
                    tiles,
                    scratch: &mut scratch,
                }
                .run(l);
            }
            Decode(out.rows(qkv.rows, width)).run(l)
        }
    }

    #[test]
    fn rows_attend_to_all_rows() {
        for (rows, heads, head_size) in [
            (1, 1, 16),
            (16, 2, 32),
            (50, 3, 16),
            (65, 5, 32),
            (100, 2, 64),
            (131, 1, 128),
        ] {
            let columns = usize::next_multiple_of(3 * heads * head_size, INT8_BLOCK);
            let x = noise(rows * columns);
            let qkv = QkvBlocks {
                qkv: &x,
                rows,
                heads,
                head_size,
                scale: 1.0 / (head_size as f32).sqrt(),
            };
            let mut out = Int8Buffer::default();
            let out = dispatch(Decode(bidirectional_attention(qkv, &mut out)));
            assert!(run_on_all(SingleThread(qkv)) == out, "{rows} rows");

            let head = |row, which, head| {
                let head = qkv.head(which, head);
                let blocks = (0..qkv.blocks()).map(|block| head.block(row, block).as_flattened());
                blocks.collect::<Vec<_>>().concat()
            };
            let mut exact = Vec::new();
            for row in 0..rows {
                for i in 0..heads {
                    let kv = (0..rows).map(|row| (head(row, KEY, i), head(row, VALUE, i)));
                    let kv: Vec<_> = kv.collect();
                    let kv = kv.iter().map(|(key, value)| (&key[..], &value[..]));
                    exact.extend(exact_attention(&head(row, QUERY, i), kv));
                }
            }
            let off = distance(&out, &exact);
            assert!(off < 1.5e-2, "{rows} {head_size}: {off}");
        }
    }

    #[test]
    fn what_all_keys_have_in_common_costs_no_precision() {
        let (rows, heads, head_size) = (80, 2, 32);
        let mut x = noise(rows * 3 * heads * head_size);
        let off = |x: &[f32]| {
            let qkv = QkvBlocks {
                qkv: x,
                rows,
                heads,
                head_size,
                scale: 0.1,
            };
            dispatch(Decode(bidirectional_attention(
                qkv,
                &mut Int8Buffer::default(),
            )))
        };
        let before = off(&x);
        // A channel of the keys that is the same everywhere, as real models have it.
        for row in 0..rows {
            x[rows * INT8_BLOCK + row * INT8_BLOCK + 5] += 500.0;
        }
        let after: Vec<_> = off(&x).into_iter().map(f64::from).collect();
        assert!(distance(&before, &after) < 1e-2);
    }
}
