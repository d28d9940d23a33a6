//! Softmax with a query in each lane, a block of keys at a time.

use crate::{
    int8::{BLOCK_QUADS, HALVES, TILE_ROWS, TileQuad, unsigned_byte},
    lanes::{LANES, Lanes, QUAD},
    pointwise::coarse_exp2,
};

/// What a block of keys has of each query's probabilities.
#[derive(Clone, Copy)]
pub(super) struct BlockSums {
    /// The score that they are relative to.
    base: [[f32; LANES]; HALVES],
    sums: [[f32; LANES]; HALVES],
}

/// Probabilities of a block of keys, relative to the largest of each query, to the tiles of the queries.
#[inline(always)]
pub(super) fn softmax_block<'a, L: Lanes>(
    l: L,
    scores: &[[[f32; LANES]; HALVES]],
    tiles: impl Iterator<Item = &'a mut [TileQuad]>,
) -> BlockSums {
    let mut part = BlockSums {
        base: [[0.0; LANES]; HALVES],
        sums: [[0.0; LANES]; HALVES],
    };
    let mut quads = [[[[0; QUAD]; LANES]; BLOCK_QUADS]; HALVES];
    for (half, quads) in quads.iter_mut().enumerate() {
        let mut largest = l.splat(f32::NEG_INFINITY);
        for score in scores {
            largest = l.max(l.load(&score[half]), largest);
        }
        // The largest becomes 255.
        let base = l.sub(largest, l.splat(LOG2_255));
        let mut sum = l.splat(0.0);
        let (fours, rest) = scores.as_chunks::<QUAD>();
        for (scores, quad) in fours.iter().zip(&mut *quads) {
            sum = four(l, scores, half, (base, sum), quad);
        }
        if !rest.is_empty() {
            sum = four(l, rest, half, (base, sum), &mut quads[fours.len()]);
        }
        l.store(base, &mut part.base[half]);
        l.store(sum, &mut part.sums[half]);
    }
    for (i, tile) in tiles.enumerate() {
        let (half, row) = (i * TILE_ROWS / LANES, i * TILE_ROWS % LANES);
        for (to, quad) in tile.iter_mut().zip(&quads[half]) {
            for (to, quad) in to.iter_mut().zip(&quad[row..]) {
                *to = quad.map(unsigned_byte::<L>);
            }
        }
    }
    part
}

/// Probabilities of up to four keys, and their sum with `sum`.
#[inline(always)]
fn four<L: Lanes>(
    l: L,
    scores: &[[[f32; LANES]; HALVES]],
    half: usize,
    (base, mut sum): (L::Float, L::Float),
    to: &mut [[u8; QUAD]; LANES],
) -> L::Float {
    let mut rounded = [l.splat_int(0); QUAD];
    for (score, to) in scores.iter().zip(&mut rounded) {
        let prob = coarse_exp2(l, l.sub(l.load(&score[half]), base));
        sum = l.add(sum, prob);
        *to = l.round(prob);
    }
    l.store_bytes(rounded, to);
    sum
}

/// The power of two that is the largest integer of a probability.
const LOG2_255: f32 = 7.994_353_4;

/// What each block's probabilities are multiplied with, for each query of each tile.
#[inline(always)]
pub(super) fn combine<L: Lanes>(l: L, parts: &[BlockSums], scales: &mut [[f32; TILE_ROWS]]) {
    for half in 0..HALVES {
        let mut largest = l.splat(f32::NEG_INFINITY);
        for part in parts {
            largest = l.max(l.load(&part.base[half]), largest);
        }
        let mut sum = l.splat(0.0);
        for part in parts {
            let weight = weight(l, &part.base[half], largest);
            sum = l.mul_add(weight, l.load(&part.sums[half]), sum);
        }
        let inverse = l.div(l.splat(1.0), sum);
        for (block, part) in parts.iter().enumerate() {
            let mut lanes = [0.0; LANES];
            l.store(
                l.mul(weight(l, &part.base[half], largest), inverse),
                &mut lanes,
            );
            for (i, rows) in lanes.as_chunks().0.iter().enumerate() {
                let tile = half * LANES / TILE_ROWS + i;
                scales[tile * parts.len() + block] = *rows;
            }
        }
    }
}

/// What the probabilities of a block count for.
#[inline(always)]
fn weight<L: Lanes>(l: L, of_block: &[f32; LANES], of_all: L::Float) -> L::Float {
    coarse_exp2(l, l.sub(l.load(of_block), of_all))
}
