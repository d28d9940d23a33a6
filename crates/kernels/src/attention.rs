//! Attention of the encoder, where each patch looks at all, and of the decoder, where each token looks back.

use rayon::prelude::*;

use super::{
    blocks::{BLOCK, Block16, Packed},
    lanes::{Kernel, LANES, Lanes, PAIR, dispatch},
    pointwise::exp,
    products::{Into, Product},
    rounding::{Rounded, WORD, Words, round},
};

/// Largest value of 12 bits that 32 products with 16 bits can have and fit an `i32`.
const LARGEST: f32 = 2047.0;

/// Rows of queries, keys and values: the three beside each other in each row, and the heads of each.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    pub x: &'a [f32],
    pub heads: usize,
    /// Values of a head, in whole lanes.
    pub size: usize,
}

impl<'a> Heads<'a> {
    fn row_length(&self) -> usize {
        3 * self.heads * self.size
    }

    fn rows(&self) -> usize {
        self.x.len() / self.row_length()
    }

    /// A row of a head's queries (0), keys (1) or values (2).
    #[inline(always)]
    fn row(&self, row: usize, which: usize, head: usize) -> &'a [[f32; LANES]] {
        let start = row * self.row_length() + (which * self.heads + head) * self.size;
        self.x[start..][..self.size].as_chunks().0
    }
}

/// Each row's attention to all: scores and sums of 16 by 12 bits, softmax in floats.
pub fn attend(heads: Heads<'_>, out: &mut [f32]) {
    let rows = heads.rows();
    let width = heads.heads * heads.size;
    assert_eq!(out.len(), rows * width);
    let sides: Vec<_> = (0..heads.heads)
        .into_par_iter()
        .map(|head| dispatch(Pack { heads, head }))
        .collect();
    // Scores of so many rows stay in the second cache.
    let part = ((96 << 10) / (4 * rows)).clamp(6, 48);
    out.par_chunks_mut(part * width)
        .enumerate()
        .for_each(|(i, out)| {
            dispatch(Attend {
                heads,
                sides: &sides,
                first: i * part,
                out,
            })
        });
}

/// Keys and values of a head, as weights.
struct Sides {
    keys: Packed<Block16>,
    values: Packed<Block16>,
}

struct Pack<'a> {
    heads: Heads<'a>,
    head: usize,
}

impl Kernel for Pack<'_> {
    type Output = Sides;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Sides {
        let Self { heads, head } = self;
        let (rows, size) = (heads.rows(), heads.size);
        let mut keys = Packed::<Block16>::new(rows, size.next_multiple_of(BLOCK));
        for panel in 0..keys.panels() {
            let blocks = keys.panel_mut(panel);
            for lane in 0..LANES.min(rows - panel * LANES) {
                let row = heads.row(panel * LANES + lane, 1, head);
                for (block, x) in blocks.iter_mut().zip(row.chunks(BLOCK / LANES)) {
                    let mut rounded = [[0; LANES]; BLOCK / LANES];
                    block.scales[lane] = round(l, x, LARGEST, &mut rounded);
                    let pairs = rounded.as_flattened().as_chunks().0;
                    for (weights, pair) in block.weights.iter_mut().zip(pairs) {
                        weights[lane] = *pair;
                    }
                }
            }
        }
        let mut values = Packed::<Block16>::new(size, rows.next_multiple_of(BLOCK));
        for panel in 0..values.panels() {
            for (i, block) in values.panel_mut(panel).iter_mut().enumerate() {
                let rows = i * BLOCK..rows.min((i + 1) * BLOCK);
                let row = |row| l.load(&heads.row(row, 2, head)[panel]);
                let mut largest = l.splat(0.0);
                for i in rows.clone() {
                    largest = l.max(l.abs(row(i)), largest);
                }
                let least = l.splat(f32::MIN_POSITIVE);
                let up = l.div(l.splat(LARGEST), l.max(largest, least));
                l.store(l.mul(largest, l.splat(1.0 / LARGEST)), &mut block.scales);
                for (j, i) in rows.enumerate() {
                    let mut rounded = [0; LANES];
                    l.store_i16(l.round(l.mul(row(i), up)), &mut rounded);
                    for (weights, value) in block.weights[j / PAIR].iter_mut().zip(rounded) {
                        weights[j % PAIR] = value;
                    }
                }
            }
        }
        Sides { keys, values }
    }
}

/// All heads of some rows.
struct Attend<'a> {
    heads: Heads<'a>,
    sides: &'a [Sides],
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Heads { heads, size, .. } = self.heads;
        let width = heads * size;
        let rows = self.out.len() / width;
        let all = self.heads.rows();
        let (padded, length) = (all.next_multiple_of(BLOCK), size.next_multiple_of(BLOCK));
        let mut queries = vec![0; rows * length];
        let mut scales = vec![0.0; rows];
        let mut scores = vec![0.0; rows * padded];
        let mut shares = vec![0; rows * padded];
        for (head, Sides { keys, values }) in self.sides.iter().enumerate() {
            for (i, (query, scale)) in queries
                .chunks_exact_mut(length)
                .zip(&mut scales)
                .enumerate()
            {
                let row = self.heads.row(self.first + i, 0, head);
                *scale = round(l, row, WORD, query.as_chunks_mut().0) / (size as f32).sqrt();
            }
            let x = Rounded::<Words> {
                values: &queries,
                marks: &scales,
                length,
            };
            Product {
                x,
                weights: keys,
                bias: None,
                panels: 0..keys.panels(),
                into: Into::Set,
                out: &mut scores,
                stride: padded,
            }
            .run(l);
            let softmax = scores
                .chunks_exact_mut(padded)
                .zip(shares.chunks_exact_mut(padded));
            for ((scores, shares), scale) in softmax.zip(&mut scales) {
                scores[all..].fill(f32::NEG_INFINITY);
                *scale = softmax_row(l, scores.as_chunks().0, shares.as_chunks_mut().0);
            }
            let x = Rounded::<Words> {
                values: &shares,
                marks: &scales,
                length: padded,
            };
            Product {
                x,
                weights: values,
                bias: None,
                panels: 0..values.panels(),
                into: Into::Set,
                out: &mut self.out[head * size..],
                stride: width,
            }
            .run(l);
        }
    }
}

/// Shares in 16 bits, and what one of them is worth.
#[inline(always)]
fn softmax_row<L: Lanes>(l: L, scores: &[[f32; LANES]], to: &mut [[i16; LANES]]) -> f32 {
    let mut largest = l.splat(f32::NEG_INFINITY);
    for x in scores {
        largest = l.max(l.load(x), largest);
    }
    let largest = l.splat(l.fold(largest, f32::max));
    let mut sum = l.splat(0.0);
    for (x, to) in scores.iter().zip(to) {
        let share = exp(l, l.sub(l.load(x), largest));
        sum = l.add(sum, share);
        l.store_i16(l.round(l.mul(share, l.splat(WORD))), to);
    }
    1.0 / (WORD * l.fold(sum, |a, b| a + b))
}

/// Keys and values of the tokens seen so far, of a layer: keys sixteen tokens beside each other, so that
/// sixteen scores come at once.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    keys: Vec<[f32; LANES]>,
    /// A token after the other.
    values: Vec<[f32; LANES]>,
    size: usize,
    capacity: usize,
}

impl Seen {
    pub fn new(heads: usize, size: usize, capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(LANES);
        Self {
            keys: vec![[0.0; LANES]; heads * capacity / LANES * size],
            values: vec![[0.0; LANES]; heads * capacity * size / LANES],
            size,
            capacity,
        }
    }

    fn keys(&self, head: usize) -> &[[f32; LANES]] {
        let length = self.capacity / LANES * self.size;
        &self.keys[head * length..][..length]
    }

    fn values(&self, head: usize) -> &[[f32; LANES]] {
        let length = self.capacity * self.size / LANES;
        &self.values[head * length..][..length]
    }

    fn write(&mut self, at: usize, head: usize, key: &[f32], value: &[f32]) {
        let start = (head * self.capacity / LANES + at / LANES) * self.size;
        for (lanes, x) in self.keys[start..][..self.size].iter_mut().zip(key) {
            lanes[at % LANES] = *x;
        }
        let start = (head * self.capacity + at) * self.size;
        let values = &mut self.values.as_flattened_mut()[start..][..self.size];
        values.copy_from_slice(value);
    }
}

/// Rows of queries, keys and values of the decoder: heads beside each other.
#[derive(Debug, Clone, Copy)]
pub struct Grouped {
    /// Of the queries; as many of them share a head of keys as there are times more.
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
}

impl Grouped {
    pub fn row_length(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.size
    }
}

/// Turns queries and keys by their positions, from `at` on, adds keys and values to what was seen, and writes
/// what each token gathers from those up to itself.
///
/// `cos` and `sin` have a row of half a head for each of the rows.
pub fn look_back(
    qkv: &mut [f32],
    shape: Grouped,
    (cos, sin): (&[f32], &[f32]),
    seen: &mut Seen,
    at: usize,
    out: &mut [f32],
) {
    let Grouped {
        heads,
        kv_heads,
        size,
    } = shape;
    let half = size / 2;
    for (i, row) in qkv.chunks_exact_mut(shape.row_length()).enumerate() {
        let (cos, sin) = (&cos[i * half..][..half], &sin[i * half..][..half]);
        let (turned, values) = row.split_at_mut((heads + kv_heads) * size);
        for head in turned.chunks_exact_mut(size) {
            let (a, b) = head.split_at_mut(half);
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
            }
        }
        let keys = &turned[heads * size..];
        for (head, (key, value)) in keys
            .chunks_exact(size)
            .zip(values.chunks_exact(size))
            .enumerate()
        {
            seen.write(at + i, head, key, value);
        }
    }
    let group = heads / kv_heads;
    let (qkv, seen) = (&*qkv, &*seen);
    let rows = qkv.len() / shape.row_length();
    // A thread isn't worth waking for less.
    let least = ((1 << 16) / ((at + rows) * group * size)).max(1);
    out.par_chunks_mut(group * size)
        .enumerate()
        .with_min_len(least)
        .for_each(|(i, out)| {
            let (row, head) = (i / kv_heads, i % kv_heads);
            let queries = &qkv[row * shape.row_length() + head * group * size..];
            dispatch(LookBack {
                queries: &queries[..group * size],
                keys: seen.keys(head),
                values: seen.values(head),
                size,
                tokens: at + row + 1,
                out: out.as_chunks_mut().0,
            })
        });
}

/// Queries that share a head of keys.
struct LookBack<'a> {
    queries: &'a [f32],
    keys: &'a [[f32; LANES]],
    values: &'a [[f32; LANES]],
    size: usize,
    tokens: usize,
    out: &'a mut [[f32; LANES]],
}

impl Kernel for LookBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let part = 4 * self.size;
        let mut shares = vec![[0.0; LANES]; 4 * self.tokens.div_ceil(LANES)];
        let out = std::mem::take(&mut self.out).chunks_mut(part / LANES);
        for (queries, out) in self.queries.chunks(part).zip(out) {
            match queries.len() / self.size {
                1 => self.gather::<L, 1>(l, queries, &mut shares, out),
                2 => self.gather::<L, 2>(l, queries, &mut shares, out),
                3 => self.gather::<L, 3>(l, queries, &mut shares, out),
                _ => self.gather::<L, 4>(l, queries, &mut shares, out),
            }
        }
    }
}

impl LookBack<'_> {
    #[inline(always)]
    fn gather<L: Lanes, const N: usize>(
        &self,
        l: L,
        queries: &[f32],
        shares: &mut [[f32; LANES]],
        out: &mut [[f32; LANES]],
    ) {
        let Self { size, tokens, .. } = *self;
        let queries: [&[f32]; N] = std::array::from_fn(|i| &queries[i * size..][..size]);
        let panels = tokens.div_ceil(LANES);
        let scale = l.splat(1.0 / (size as f32).sqrt());
        let mut largest = [l.splat(f32::NEG_INFINITY); N];
        for panel in 0..panels {
            let mut scores = [l.splat(0.0); N];
            let keys = &self.keys[panel * size..][..size];
            for (i, keys) in keys.iter().enumerate() {
                let keys = l.load(keys);
                for (scores, query) in scores.iter_mut().zip(&queries) {
                    *scores = l.mul_add(l.splat(query[i]), keys, *scores);
                }
            }
            for i in 0..N {
                let share = &mut shares[i * panels + panel];
                l.store(l.mul(scores[i], scale), share);
                // What comes later isn't seen.
                share[LANES.min(tokens - panel * LANES)..].fill(f32::NEG_INFINITY);
                largest[i] = l.max(l.load(share), largest[i]);
            }
        }
        for i in 0..N {
            let largest = l.splat(l.fold(largest[i], f32::max));
            let mut sum = l.splat(0.0);
            let shares = &mut shares[i * panels..][..panels];
            for share in shares.iter_mut() {
                let e = exp(l, l.sub(l.load(share), largest));
                l.store(e, share);
                sum = l.add(sum, e);
            }
            let scale = l.splat(1.0 / l.fold(sum, |a, b| a + b));
            for share in shares {
                l.store(l.mul(l.load(share), scale), share);
            }
        }
        for lane in 0..size / LANES {
            let mut sums = [l.splat(0.0); N];
            for token in 0..tokens {
                let values = l.load(&self.values[token * size / LANES + lane]);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let share = shares[i * panels + token / LANES][token % LANES];
                    *sum = l.mul_add(l.splat(share), values, *sum);
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                l.store(sum, &mut out[i * size / LANES + lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lanes::on_each, *};

    /// [`attend`] on one thread.
    #[derive(Clone)]
    struct AttendAlone<'a>(Heads<'a>);

    impl Kernel for AttendAlone<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let heads = self.0;
            let mut sides = Vec::new();
            for head in 0..heads.heads {
                sides.push(Pack { heads, head }.run(l));
            }
            let mut out = vec![0.0; heads.rows() * heads.heads * heads.size];
            Attend {
                heads,
                sides: &sides,
                first: 0,
                out: &mut out,
            }
            .run(l);
            out
        }
    }

    /// What queries that share a head of keys gather.
    #[derive(Clone)]
    struct Gathered<'a> {
        queries: &'a [f32],
        seen: &'a Seen,
        head: usize,
        tokens: usize,
    }

    impl Kernel for Gathered<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let mut out = vec![0.0; self.queries.len()];
            LookBack {
                queries: self.queries,
                keys: self.seen.keys(self.head),
                values: self.seen.values(self.head),
                size: self.seen.size,
                tokens: self.tokens,
                out: out.as_chunks_mut().0,
            }
            .run(l);
            out
        }
    }

    fn noise(len: usize) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(3);
        (0..len).map(|_| rng.f32() * 6.0 - 3.0).collect()
    }

    /// Softmax of the query's products with the keys, over their values.
    fn gathered<'a>(
        query: &[f32],
        seen: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone,
    ) -> Vec<f64> {
        let scale = (query.len() as f64).sqrt();
        let dot = |key: &[f32]| {
            let products = query
                .iter()
                .zip(key)
                .map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum::<f64>() / scale
        };
        let weights: Vec<_> = seen.clone().map(|(key, _)| dot(key).exp()).collect();
        let all: f64 = weights.iter().sum();
        let mut sums = vec![0.0; query.len()];
        for (weight, (_, value)) in weights.iter().zip(seen) {
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum += weight / all * f64::from(*value);
            }
        }
        sums
    }

    fn distance(y: &[f32], exact: &[f64]) -> f64 {
        let off = y
            .iter()
            .zip(exact)
            .map(|(y, exact)| (f64::from(*y) - exact).powi(2));
        let all = exact.iter().map(|exact| exact * exact);
        (off.sum::<f64>() / all.sum::<f64>()).sqrt()
    }

    #[test]
    fn patches_attend_to_all() {
        for (rows, heads, size) in [(1, 1, 16), (16, 2, 32), (50, 3, 48), (100, 2, 64)] {
            let x = noise(rows * 3 * heads * size);
            let heads = Heads { x: &x, heads, size };
            let width = heads.heads * size;
            let mut out = vec![0.0; rows * width];
            attend(heads, &mut out);

            assert!(on_each(AttendAlone(heads)) == out, "{rows} rows");

            let mut exact = Vec::new();
            for row in 0..rows {
                for head in 0..heads.heads {
                    let of = |row, which| heads.row(row, which, head).as_flattened();
                    let seen = (0..rows).map(|row| (of(row, 1), of(row, 2)));
                    exact.extend(gathered(of(row, 0), seen));
                }
            }
            let off = distance(&out, &exact);
            assert!(off < 1e-3, "{rows} {size}: {off}");
        }
    }

    /// All at once, one by one, and in doubles; with heads that share their keys by 1 to 5.
    #[test]
    fn tokens_look_back() {
        let (size, rows) = (32, 37);
        for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1)] {
            let shape = Grouped {
                heads,
                kv_heads,
                size,
            };
            let x = noise(rows * shape.row_length());
            let angles = noise(rows * size / 2);
            let cos: Vec<_> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<_> = angles.iter().map(|a| a.sin()).collect();
            let width = heads * size;

            let (mut turned, mut out) = (x.clone(), vec![0.0; rows * width]);
            let mut seen = Seen::new(kv_heads, size, rows);
            look_back(&mut turned, shape, (&cos, &sin), &mut seen, 0, &mut out);

            let mut seen = Seen::new(kv_heads, size, rows);
            for (at, row) in x.chunks(shape.row_length()).enumerate() {
                let turn = |angles: &'_ [f32]| angles[at * size / 2..][..size / 2].to_vec();
                let (cos, sin) = (turn(&cos), turn(&sin));
                let (mut row, mut alone) = (row.to_vec(), vec![0.0; width]);
                look_back(&mut row, shape, (&cos, &sin), &mut seen, at, &mut alone);
                assert_eq!(alone, out[at * width..][..width]);
                for head in 0..kv_heads {
                    let group = heads / kv_heads * size;
                    let kernel = Gathered {
                        queries: &row[head * group..][..group],
                        seen: &seen,
                        head,
                        tokens: at + 1,
                    };
                    assert_eq!(on_each(kernel), alone[head * group..][..group]);
                }
            }

            let head =
                |row: usize, head: usize| &turned[row * shape.row_length() + head * size..][..size];
            let mut exact = Vec::new();
            for row in 0..rows {
                for i in 0..heads {
                    let key = heads + i * kv_heads / heads;
                    let seen = (0..=row).map(|row| (head(row, key), head(row, key + kv_heads)));
                    exact.extend(gathered(head(row, i), seen));
                }
            }
            assert!(distance(&out, &exact) < 1e-6);
        }
    }

    #[test]
    fn positions_turn_pairs_of_halves() {
        let shape = Grouped {
            heads: 1,
            kv_heads: 1,
            size: 16,
        };
        let mut x: Vec<_> = (0..48).map(|i| i as f32).collect();
        let mut seen = Seen::new(1, 16, 1);
        look_back(
            &mut x,
            shape,
            (&[0.0; 8], &[1.0; 8]),
            &mut seen,
            0,
            &mut [0.0; 16],
        );
        // By a right angle: (a, b) to (-b, a). Values stay.
        assert_eq!(x[..3], [-8.0, -9.0, -10.0]);
        assert_eq!(x[8..11], [0.0, 1.0, 2.0]);
        assert_eq!(x[16..18], [-24.0, -25.0]);
        assert_eq!(x[32..34], [32.0, 33.0]);
    }
}
