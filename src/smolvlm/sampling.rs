//! How a token is chosen among the likely ones.

use candle_transformers::generation::{LogitsProcessor, Sampling as CandleSampling};

use super::{Error, Result};

/// How the next token is chosen; the default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token always.
    pub temperature: f64,
    /// Sample among the likeliest tokens that sum up to this probability; 1 takes all.
    pub top_p: f64,
    /// Sample among so many of the likeliest tokens; 0 takes all.
    pub top_k: usize,
    /// Sample among tokens at least so likely as this share of the likeliest; 0 takes all.
    pub min_p: f64,
    /// Above 1, tokens already in prompt or caption lose weight.
    pub repetition_penalty: f32,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// So cold that dividing by the temperature would leave the range of f32.
    const COLD: f64 = 1e-5;

    /// Whether the likeliest token is taken always.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < Self::COLD
    }

    /// That every setting is a number in its range.
    pub(super) fn check(&self) -> Result<()> {
        let penalty = f64::from(self.repetition_penalty);
        for (property, value, range) in [
            ("temperature", self.temperature, 0.0..=f64::MAX),
            ("top-p", self.top_p, 0.0..=1.0),
            ("min-p", self.min_p, 0.0..=1.0),
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

    pub(super) fn processor(&self) -> LogitsProcessor {
        let temperature = self.temperature;
        let all = self.top_p <= 0.0 || self.top_p >= 1.0;
        // In f32 it would be none, and leave no token.
        let p = self.top_p.max(f32::MIN_POSITIVE.into());
        let sampling = match (!self.is_greedy(), self.top_k, all) {
            (false, ..) => CandleSampling::ArgMax,
            (true, 0, true) => CandleSampling::All { temperature },
            (true, 0, false) => CandleSampling::TopP { p, temperature },
            (true, k, true) => CandleSampling::TopK { k, temperature },
            (true, k, false) => CandleSampling::TopKThenTopP { k, p, temperature },
        };
        LogitsProcessor::from_sampling(self.seed, sampling)
    }

    /// Whether `min_p` leaves out tokens.
    pub(super) fn restricts(&self) -> bool {
        self.min_p > 0.0 && !self.is_greedy()
    }

    /// Leaves only the logits that `min_p` does.
    pub(super) fn restrict(&self, logits: &mut [f32]) {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = f64::from(highest) + self.temperature * self.min_p.ln();
        for logit in logits {
            if f64::from(*logit) < least {
                *logit = f32::NEG_INFINITY;
            }
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
        sampling.restrict(&mut logits);
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
            let mut processor = sampling.processor();
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
