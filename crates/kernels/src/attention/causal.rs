//! Grouped-query attention with a causal mask, as in the decoder: each token attends to itself and those before.

use rayon::prelude::*;

use crate::{
    lanes::{Kernel, LANES, Lanes, dispatch},
    pointwise::exp,
};

/// The KV cache of a layer, with the keys of sixteen tokens interleaved: sixteen scores are computed at once.
#[derive(Debug, Clone, Default)]
pub struct PackedKv {
    /// `[kv_heads, capacity / 16, head_size]`, a vector each.
    keys: Vec<[f32; LANES]>,
    /// `[kv_heads, capacity, head_size]`
    values: Vec<[f32; LANES]>,
    head_size: usize,
    capacity: usize,
}

impl PackedKv {
    /// An empty cache with room for `capacity` tokens. `head_size` is a multiple of [`LANES`].
    pub fn new(kv_heads: usize, head_size: usize, capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(LANES);
        Self {
            keys: vec![[0.0; LANES]; kv_heads * capacity / LANES * head_size],
            values: vec![[0.0; LANES]; kv_heads * capacity * head_size / LANES],
            head_size,
            capacity,
        }
    }

    fn keys(&self, kv_head: usize) -> &[[f32; LANES]] {
        let length = self.capacity / LANES * self.head_size;
        &self.keys[kv_head * length..][..length]
    }

    fn values(&self, kv_head: usize) -> &[[f32; LANES]] {
        let length = self.capacity * self.head_size / LANES;
        &self.values[kv_head * length..][..length]
    }

    fn store(&mut self, position: usize, kv_head: usize, key: &[f32], value: &[f32]) {
        let start = (kv_head * self.capacity / LANES + position / LANES) * self.head_size;
        for (lanes, x) in self.keys[start..][..self.head_size].iter_mut().zip(key) {
            lanes[position % LANES] = *x;
        }
        let start = (kv_head * self.capacity + position) * self.head_size;
        let values = &mut self.values.as_flattened_mut()[start..][..self.head_size];
        values.copy_from_slice(value);
    }
}

/// Shape of rows `[heads + 2 * kv_heads, head_size]` of queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct QkvShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads. Each is shared by `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Values of a head, a multiple of [`LANES`].
    pub head_size: usize,
}

impl QkvShape {
    /// Values of a row.
    pub fn row_length(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }
}

/// Rows of one sequence in a batch.
#[derive(Debug)]
pub struct SequenceRows<'a> {
    /// Number of the rows, which stand one behind the other.
    pub rows: usize,
    /// The layer's cache of the sequence.
    pub kv: &'a mut PackedKv,
    /// Tokens in the cache, behind which the rows come.
    pub past: usize,
}

/// RoPE, KV cache update and causal attention of a batch, into rows `[heads, head_size]` of `attn_out`.
///
/// `qkv` holds the rows of all sequences, one sequence behind the other. Queries and keys are rotated in place. `cos` and
/// `sin` have `head_size / 2` values for each row.
pub fn causal_attention(
    qkv: &mut [f32],
    shape: QkvShape,
    (cos, sin): (&[f32], &[f32]),
    sequences: &mut [SequenceRows<'_>],
    attn_out: &mut [f32],
) {
    let QkvShape {
        heads,
        kv_heads,
        head_size,
    } = shape;
    let half = head_size / 2;
    // Of each row, its sequence and the tokens that it attends to.
    let mut attended = Vec::with_capacity(qkv.len() / shape.row_length());
    for (i, sequence) in sequences.iter().enumerate() {
        let (past, rows) = (sequence.past, sequence.rows);
        attended.extend((0..rows).map(|row| (i, past + row + 1)));
    }
    for ((i, row), (sequence, tokens)) in qkv
        .chunks_exact_mut(shape.row_length())
        .enumerate()
        .zip(&attended)
    {
        let (cos, sin) = (&cos[i * half..][..half], &sin[i * half..][..half]);
        let (rotated, values) = row.split_at_mut((heads + kv_heads) * head_size);
        for head in rotated.chunks_exact_mut(head_size) {
            let (a, b) = head.split_at_mut(half);
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
            }
        }
        let kv = &mut sequences[*sequence].kv;
        let keys = &rotated[heads * head_size..];
        for (kv_head, (key, value)) in keys
            .chunks_exact(head_size)
            .zip(values.chunks_exact(head_size))
            .enumerate()
        {
            kv.store(tokens - 1, kv_head, key, value);
        }
    }
    let group = heads / kv_heads;
    let (qkv, sequences) = (&*qkv, &*sequences);
    let rows = attended.len();
    let tokens: usize = attended.iter().map(|(_, tokens)| tokens).sum();
    // A thread isn't worth waking for less.
    let min_len = ((1 << 16) / (tokens / rows.max(1) * group * head_size).max(1)).max(1);
    attn_out
        .par_chunks_mut(group * head_size)
        .enumerate()
        .with_min_len(min_len)
        .for_each(|(i, attn_out)| {
            let (row, kv_head) = (i / kv_heads, i % kv_heads);
            let (sequence, tokens) = attended[row];
            let kv = &*sequences[sequence].kv;
            let queries = &qkv[row * shape.row_length() + kv_head * group * head_size..];
            dispatch(AttendGroup {
                queries: &queries[..group * head_size],
                keys: kv.keys(kv_head),
                values: kv.values(kv_head),
                head_size,
                tokens,
                attn_out: attn_out.as_chunks_mut().0,
            })
        });
}

/// Attention of one token's query heads that share a KV head.
struct AttendGroup<'a> {
    queries: &'a [f32],
    keys: &'a [[f32; LANES]],
    values: &'a [[f32; LANES]],
    head_size: usize,
    tokens: usize,
    attn_out: &'a mut [[f32; LANES]],
}

impl Kernel for AttendGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let part = 4 * self.head_size;
        let mut probs = vec![[0.0; LANES]; 4 * self.tokens.div_ceil(LANES)];
        let out = std::mem::take(&mut self.attn_out).chunks_mut(part / LANES);
        for (queries, out) in self.queries.chunks(part).zip(out) {
            match queries.len() / self.head_size {
                1 => self.attend::<L, 1>(l, queries, &mut probs, out),
                2 => self.attend::<L, 2>(l, queries, &mut probs, out),
                3 => self.attend::<L, 3>(l, queries, &mut probs, out),
                _ => self.attend::<L, 4>(l, queries, &mut probs, out),
            }
        }
    }
}

impl AttendGroup<'_> {
    /// Attention of `N` query heads.
    #[inline(always)]
    fn attend<L: Lanes, const N: usize>(
        &self,
        l: L,
        queries: &[f32],
        probs: &mut [[f32; LANES]],
        out: &mut [[f32; LANES]],
    ) {
        let Self {
            head_size, tokens, ..
        } = *self;
        let queries: [&[f32]; N] = std::array::from_fn(|i| &queries[i * head_size..][..head_size]);
        let panels = tokens.div_ceil(LANES);
        let scale = l.splat(1.0 / (head_size as f32).sqrt());
        let mut largest = [l.splat(f32::NEG_INFINITY); N];
        for panel in 0..panels {
            let mut scores = [l.splat(0.0); N];
            let keys = &self.keys[panel * head_size..][..head_size];
            for (i, keys) in keys.iter().enumerate() {
                let keys = l.load(keys);
                for (scores, query) in scores.iter_mut().zip(&queries) {
                    *scores = l.mul_add(l.splat(query[i]), keys, *scores);
                }
            }
            for i in 0..N {
                let score = &mut probs[i * panels + panel];
                l.store(l.mul(scores[i], scale), score);
                // The causal mask.
                score[LANES.min(tokens - panel * LANES)..].fill(f32::NEG_INFINITY);
                largest[i] = l.max(l.load(score), largest[i]);
            }
        }
        for i in 0..N {
            let largest = l.splat(l.reduce_max(largest[i]));
            let mut sum = l.splat(0.0);
            let probs = &mut probs[i * panels..][..panels];
            for prob in probs.iter_mut() {
                let e = exp(l, l.sub(l.load(prob), largest));
                l.store(e, prob);
                sum = l.add(sum, e);
            }
            let scale = l.splat(1.0 / l.reduce(sum, |a, b| a + b));
            for prob in probs {
                l.store(l.mul(l.load(prob), scale), prob);
            }
        }
        for lane in 0..head_size / LANES {
            let mut sums = [l.splat(0.0); N];
            for token in 0..tokens {
                let values = l.load(&self.values[token * head_size / LANES + lane]);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let prob = probs[i * panels + token / LANES][token % LANES];
                    *sum = l.mul_add(l.splat(prob), values, *sum);
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                l.store(sum, &mut out[i * head_size / LANES + lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{distance, exact_attention, noise},
        *,
    };
    use crate::lanes::run_on_all;

    /// [`AttendGroup`] with an output of its own.
    #[derive(Clone)]
    struct SingleThread<'a> {
        queries: &'a [f32],
        kv: &'a PackedKv,
        kv_head: usize,
        tokens: usize,
    }

    impl Kernel for SingleThread<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Vec<f32> {
            let mut out = vec![0.0; self.queries.len()];
            AttendGroup {
                queries: self.queries,
                keys: self.kv.keys(self.kv_head),
                values: self.kv.values(self.kv_head),
                head_size: self.kv.head_size,
                tokens: self.tokens,
                attn_out: out.as_chunks_mut().0,
            }
            .run(l);
            out
        }
    }

    /// [`causal_attention`] of one sequence.
    fn attend(
        (qkv, shape): (&mut [f32], QkvShape),
        rope: (&[f32], &[f32]),
        (kv, past): (&mut PackedKv, usize),
        attn_out: &mut [f32],
    ) {
        let rows = qkv.len() / shape.row_length();
        let mut sequences = [SequenceRows { rows, kv, past }];
        causal_attention(qkv, shape, rope, &mut sequences, attn_out);
    }

    /// A sequence's rows come out as they do alone, whatever stands beside them.
    #[test]
    fn sequences_of_a_batch_do_not_meet() {
        let shape = QkvShape {
            heads: 4,
            kv_heads: 2,
            head_size: 16,
        };
        let (length, width, half) = (shape.row_length(), 64, 8);
        let lengths = [3, 1, 0, 20, 2];
        let rows = lengths.iter().sum::<usize>();
        let x = noise(rows * length);
        let (cos, sin) = (noise(rows * half), noise(rows * half));
        let mut kv = Vec::new();
        for (i, before) in [5, 0, 2, 17, 1].into_iter().enumerate() {
            let mut cache = PackedKv::new(2, 16, 40);
            let mut past = noise((before + i) * length)[i * length..].to_vec();
            attend(
                (&mut past, shape),
                (&vec![1.0; before * half], &vec![0.0; before * half]),
                (&mut cache, 0),
                &mut vec![0.0; before * width],
            );
            kv.push((cache, before));
        }

        let mut alone = vec![0.0; rows * width];
        let mut start = 0;
        for (rows, (kv, past)) in lengths.iter().zip(&kv) {
            let end = start + rows;
            attend(
                (&mut x[start * length..end * length].to_vec(), shape),
                (
                    &cos[start * half..end * half],
                    &sin[start * half..end * half],
                ),
                (&mut kv.clone(), *past),
                &mut alone[start * width..end * width],
            );
            start = end;
        }

        let mut together = vec![0.0; rows * width];
        let sequences = lengths.iter().zip(&mut kv);
        let mut sequences: Vec<_> = sequences
            .map(|(&rows, (kv, past))| SequenceRows {
                rows,
                kv,
                past: *past,
            })
            .collect();
        causal_attention(
            &mut x.clone(),
            shape,
            (&cos, &sin),
            &mut sequences,
            &mut together,
        );
        assert_eq!(together, alone);
    }

    /// Prefill, one token at a time, and doubles agree, with groups of 1 to 5 query heads.
    #[test]
    fn tokens_attend_to_those_before() {
        let (head_size, rows) = (32, 37);
        for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1)] {
            let shape = QkvShape {
                heads,
                kv_heads,
                head_size,
            };
            let x = noise(rows * shape.row_length());
            let angles = noise(rows * head_size / 2);
            let cos: Vec<_> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<_> = angles.iter().map(|a| a.sin()).collect();
            let width = heads * head_size;

            let (mut rotated, mut out) = (x.clone(), vec![0.0; rows * width]);
            let mut kv = PackedKv::new(kv_heads, head_size, rows);
            attend((&mut rotated, shape), (&cos, &sin), (&mut kv, 0), &mut out);

            let mut kv = PackedKv::new(kv_heads, head_size, rows);
            for (past, row) in x.chunks(shape.row_length()).enumerate() {
                let at =
                    |angles: &'_ [f32]| angles[past * head_size / 2..][..head_size / 2].to_vec();
                let (cos, sin) = (at(&cos), at(&sin));
                let (mut row, mut one) = (row.to_vec(), vec![0.0; width]);
                attend((&mut row, shape), (&cos, &sin), (&mut kv, past), &mut one);
                assert_eq!(one, out[past * width..][..width]);
                for kv_head in 0..kv_heads {
                    let group = heads / kv_heads * head_size;
                    let kernel = SingleThread {
                        queries: &row[kv_head * group..][..group],
                        kv: &kv,
                        kv_head,
                        tokens: past + 1,
                    };
                    assert_eq!(run_on_all(kernel), one[kv_head * group..][..group]);
                }
            }

            let head = |row: usize, head: usize| {
                &rotated[row * shape.row_length() + head * head_size..][..head_size]
            };
            let mut exact = Vec::new();
            for row in 0..rows {
                for i in 0..heads {
                    let key = heads + i * kv_heads / heads;
                    let kv = (0..=row).map(|row| (head(row, key), head(row, key + kv_heads)));
                    exact.extend(exact_attention(head(row, i), kv));
                }
            }
            assert!(distance(&out, &exact) < 1e-6);
        }
    }

    #[test]
    fn rope_rotates_pairs_of_halves() {
        let shape = QkvShape {
            heads: 1,
            kv_heads: 1,
            head_size: 16,
        };
        let mut x: Vec<_> = (0..48).map(|i| i as f32).collect();
        let mut kv = PackedKv::new(1, 16, 1);
        attend(
            (&mut x, shape),
            (&[0.0; 8], &[1.0; 8]),
            (&mut kv, 0),
            &mut [0.0; 16],
        );
        // By a right angle: (a, b) to (-b, a). Values stay.
        assert_eq!(x[..3], [-8.0, -9.0, -10.0]);
        assert_eq!(x[8..11], [0.0, 1.0, 2.0]);
        assert_eq!(x[16..18], [-24.0, -25.0]);
        assert_eq!(x[32..34], [32.0, 33.0]);
    }
}
