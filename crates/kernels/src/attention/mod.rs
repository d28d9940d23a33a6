//! Softmax attention of the vision encoder and of the decoder.

mod bidirectional;
mod causal;
mod softmax;

pub use bidirectional::{QkvBlocks, bidirectional_attention};
pub use causal::{PackedKv, QkvShape, SequenceRows, causal_attention};

#[cfg(test)]
mod tests {
    pub fn noise(len: usize) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(3);
        (0..len).map(|_| rng.f32() * 6.0 - 3.0).collect()
    }

    /// Attention of one query in doubles.
    pub fn exact_attention<'a>(
        query: &[f32],
        kv: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone,
    ) -> Vec<f64> {
        let scale = (query.len() as f64).sqrt();
        let dot = |key: &[f32]| {
            let products = query
                .iter()
                .zip(key)
                .map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum::<f64>() / scale
        };
        let weights: Vec<_> = kv.clone().map(|(key, _)| dot(key).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut sums = vec![0.0; query.len()];
        for (weight, (_, value)) in weights.iter().zip(kv) {
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum += weight / total * f64::from(*value);
            }
        }
        sums
    }

    /// Relative distance.
    pub fn distance(y: &[f32], exact: &[f64]) -> f64 {
        let squares = y
            .iter()
            .zip(exact)
            .map(|(y, exact)| (f64::from(*y) - exact).powi(2));
        let norm = exact.iter().map(|exact| exact * exact);
        (squares.sum::<f64>() / norm.sum::<f64>()).sqrt()
    }
}
