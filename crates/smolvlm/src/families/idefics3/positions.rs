//! Where things stand: patches in a picture, tokens in a sequence.

use crate::families::idefics3::config::TextConfig;

/// Position ids of a `rows` × `cols` grid in a table learned for `side` × `side` patches.
pub(crate) fn position_ids(rows: usize, cols: usize, side: usize) -> Vec<u32> {
    let bucket = |i: usize, n: usize| i * side / n;
    (0..rows)
        .flat_map(|i| (0..cols).map(move |j| (bucket(i, rows) * side + bucket(j, cols)) as u32))
        .collect()
}

/// `n` places grown to a multiple of `multiple` by repeating the first and the last.
pub(crate) fn repeated(n: usize, multiple: usize) -> Vec<u32> {
    let missing = n.next_multiple_of(multiple) - n;
    let before = missing / 2;
    let places = 0..n + missing;
    places
        .map(|i| i.saturating_sub(before).min(n - 1) as u32)
        .collect()
}

/// The patches of a square grid in the order that pixel shuffle folds squares of `factor`² of them.
#[cfg(feature = "cuda")]
pub(crate) fn pixel_shuffle_order(grid: usize, factor: usize) -> Vec<u32> {
    let places = repeated(grid, factor);
    let squares = places.chunks_exact(factor);
    let tokens = squares
        .clone()
        .flat_map(|rows| squares.clone().map(move |cols| (rows, cols)));
    let patches = tokens.flat_map(|(rows, cols)| {
        rows.iter()
            .flat_map(move |row| cols.iter().map(move |col| (row, col)))
    });
    patches.map(|(row, col)| row * grid as u32 + col).collect()
}

/// Inverse frequencies of the rotary position embedding, one for each pair of a head's values.
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
