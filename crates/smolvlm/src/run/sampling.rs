//! How a token is chosen among the likely ones.

use candle_transformers::generation::{LogitsProcessor, Sampling as CandleSampling};

use vlmnarrate_engine::Sampling;

use crate::error::{Error, Result};

/// So cold that dividing by the temperature would leave the range of f32.
const COLD: f64 = 1e-5;

/// Whether the likeliest token is taken always.
pub(crate) fn is_greedy(sampling: &Sampling) -> bool {
    sampling.temperature < COLD
}

/// That every setting is a number in its range.
pub(crate) fn check(sampling: &Sampling) -> Result<()> {
    let penalty = f64::from(sampling.repetition_penalty);
    for (property, value, range) in [
        ("temperature", sampling.temperature, 0.0..=f64::MAX),
        ("top-p", sampling.top_p, 0.0..=1.0),
        ("min-p", sampling.min_p, 0.0..=1.0),
        ("repetition-penalty", penalty, 0.01..=100.0),
    ] {
        if !range.contains(&value) {
            return Err(Error::Setting {
                property,
                reason: format!("{value} is not in {range:?}"),
            });
        }
    }
    Ok(())
}

pub(crate) fn processor(sampling: &Sampling) -> LogitsProcessor {
    let temperature = sampling.temperature;
    let all = sampling.top_p <= 0.0 || sampling.top_p >= 1.0;
    // In f32 it would be none, and leave no token.
    let p = sampling.top_p.max(f32::MIN_POSITIVE.into());
    let chosen = match (!is_greedy(sampling), sampling.top_k, all) {
        (false, ..) => CandleSampling::ArgMax,
        (true, 0, true) => CandleSampling::All { temperature },
        (true, 0, false) => CandleSampling::TopP { p, temperature },
        (true, k, true) => CandleSampling::TopK { k, temperature },
        (true, k, false) => CandleSampling::TopKThenTopP { k, p, temperature },
    };
    LogitsProcessor::from_sampling(sampling.seed, chosen)
}

/// Whether `min_p` leaves out tokens.
pub(crate) fn restricts(sampling: &Sampling) -> bool {
    sampling.min_p > 0.0 && !is_greedy(sampling)
}

/// Leaves only the logits that `min_p` does.
pub(crate) fn restrict(sampling: &Sampling, logits: &mut [f32]) {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = f64::from(highest) + sampling.temperature * sampling.min_p.ln();
    for logit in logits {
        if f64::from(*logit) < least {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;

    #[test]
    fn min_p_leaves_what_is_likely_enough() {
        let sampling = Sampling {
            temperature: 2.0,
            min_p: 0.5,
            ..Sampling::default()
        };
        // After the temperature these are 1, 0.51 and 0.49 of the likeliest.
        let mut logits = [0.0, 2.0 * 0.51f32.ln(), 2.0 * 0.49f32.ln()];
        restrict(&sampling, &mut logits);
        assert_eq!(logits.map(f32::is_finite), [true, true, false]);
    }

    #[test]
    fn greedy_is_the_default_and_every_knob_counts() {
        let with = |top_k, top_p| {
            let sampling = Sampling {
                temperature: 0.5,
                top_k,
                top_p,
                seed: 7,
                ..Sampling::default()
            };
            let logits = Tensor::new(&[0f32, 1.0, 2.0, 3.0], &candle_core::Device::Cpu)?;
            let mut processor = processor(&sampling);
            (0..200)
                .map(|_| processor.sample(&logits))
                .collect::<candle_core::Result<std::collections::BTreeSet<_>>>()
        };
        let set = |ids: &[u32]| ids.iter().copied().collect();
        assert_eq!(Sampling::default().temperature, 0.0);
        assert_eq!(with(1, 1.0).unwrap(), set(&[3]));
        assert_eq!(with(2, 1.0).unwrap(), set(&[2, 3]));
        assert_eq!(with(0, 0.5).unwrap(), set(&[3]));
        assert!(with(0, 1.0).unwrap().len() > 2);
    }
}
