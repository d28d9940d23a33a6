//! Positions: of patches in a picture, of patches after pixel shuffle, of tokens in a sequence.

use crate::families::idefics3::config::TextConfig;

/// Position ids of `rows` × `cols` patches, for position embeddings of `side` × `side` patches.
///
/// Bucketed as in `Idefics3VisionEmbeddings`
/// ([`modeling_idefics3.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/modeling_idefics3.py)).
pub(crate) fn position_ids(rows: usize, cols: usize, side: usize) -> Vec<u32> {
    let bucket = |i: usize, n: usize| i * side / n;
    (0..rows)
        .flat_map(|i| (0..cols).map(move |j| (bucket(i, rows) * side + bucket(j, cols)) as u32))
        .collect()
}

/// Indices `0..n`, padded to a multiple of `multiple` by repeating the first and the last.
pub(crate) fn padded_indices(n: usize, multiple: usize) -> Vec<u32> {
    let missing = n.next_multiple_of(multiple) - n;
    let before = missing / 2;
    let indices = 0..n + missing;
    indices
        .map(|i| i.saturating_sub(before).min(n - 1) as u32)
        .collect()
}

/// Indices of `grid` × `grid` patches in the order of pixel shuffle: `factor`² patches of a token in a row.
#[cfg(feature = "cuda")]
pub(crate) fn pixel_shuffle_order(grid: usize, factor: usize) -> Vec<u32> {
    let indices = padded_indices(grid, factor);
    let chunks = indices.chunks_exact(factor);
    let tokens = chunks
        .clone()
        .flat_map(|rows| chunks.clone().map(move |cols| (rows, cols)));
    let patches = tokens.flat_map(|(rows, cols)| {
        rows.iter()
            .flat_map(move |row| cols.iter().map(move |col| (row, col)))
    });
    patches.map(|(row, col)| row * grid as u32 + col).collect()
}

/// Inverse frequencies of the rotary position embedding (RoPE), one for each pair of values of a head.
pub(crate) fn inverse_frequencies(c: &TextConfig) -> Vec<f32> {
    let head_dim = c.head_dim();
    let theta = c.rope_theta() as f32;
    let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
    exponents
        .map(|exponent| 1.0 / theta.powf(exponent))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_the_identity_at_the_native_side_and_spread_below_it() {
        assert_eq!(position_ids(4, 4, 4), (0..16).collect::<Vec<_>>());
        assert_eq!(position_ids(2, 2, 4), [0, 2, 8, 10]);
        // 3 over 4 buckets: 0, 4/3 → 1, 8/3 → 2.
        assert_eq!(position_ids(1, 3, 4), [0, 1, 2]);
    }
}
