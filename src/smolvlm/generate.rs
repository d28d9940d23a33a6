//! From a request to a caption: prefill, greedy or sampled decoding, stop, clean text.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use candle_core::Tensor;
use candle_transformers::{
    generation::{LogitsProcessor, Sampling as CandleSampling},
    utils::apply_repeat_penalty,
};

use super::{Error, KvCache, Model, Observer, Picture, Prompt, Result, prompt::question};

/// What to describe and how.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Square pictures, already at the side the encoder is to run at, in the order of the prompt.
    pub pictures: &'a [Picture],
    pub system: Option<&'a str>,
    pub prompt: &'a str,
    /// Most tokens of the caption.
    pub max_tokens: usize,
    pub sampling: Sampling,
}

/// How the next token is chosen; the default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token always.
    pub temperature: f64,
    /// Sample among the likeliest tokens that sum up to this probability; 1 takes all.
    pub top_p: f64,
    /// Sample among so many of the likeliest tokens; 0 takes all.
    pub top_k: usize,
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
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    fn processor(&self) -> LogitsProcessor {
        let temperature = self.temperature;
        let all = self.top_p <= 0.0 || self.top_p >= 1.0;
        let sampling = match (temperature > 0.0, self.top_k, all) {
            (false, ..) => CandleSampling::ArgMax,
            (true, 0, true) => CandleSampling::All { temperature },
            (true, 0, false) => CandleSampling::TopP {
                p: self.top_p,
                temperature,
            },
            (true, k, true) => CandleSampling::TopK { k, temperature },
            (true, k, false) => CandleSampling::TopKThenTopP {
                k,
                p: self.top_p,
                temperature,
            },
        };
        LogitsProcessor::from_sampling(self.seed, sampling)
    }
}

/// What an observer is told while a caption is made.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A layer of the encoder or decoder is done.
    Layer,
    /// The caption as far as it has got, never cut inside a character.
    Text(&'a str),
}

/// A finished caption.
#[derive(Debug, Clone)]
pub struct Description {
    pub text: String,
    /// Tokens made, the one that ended the caption not counted.
    pub tokens: usize,
    /// Whether `max_tokens` ended it.
    pub truncated: bool,
    pub timings: Timings,
}

/// Time spent in each stage.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    pub preprocess: Duration,
    pub vision: Duration,
    pub prefill: Duration,
    pub decode: Duration,
}

/// What one caller keeps from caption to caption: the cache's memory.
#[derive(Debug)]
pub struct Session {
    pub(super) cache: KvCache,
}

/// Splits the time that passes into stages.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

impl Model {
    /// Describes the pictures; `observer` is asked at each layer and each token whether to go on.
    pub fn describe(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Description> {
        self.pool.install(|| self.run(session, request, observer))
    }

    fn run(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Description> {
        let mut watch = Stopwatch(Instant::now());
        let mut timings = Timings::default();

        let messages = question(request.system, request.pictures.len(), request.prompt);
        let spans = request.pictures.iter().map(|p| self.span(p, (0, 0)));
        let prompt = self
            .prompter
            .encode(&messages, &spans.collect::<Vec<_>>())?;
        let pixels = request
            .pictures
            .iter()
            .map(|p| self.pixels(p))
            .collect::<Result<Vec<_>>>()?;
        timings.preprocess = watch.lap();

        let features = pixels
            .iter()
            .map(|p| self.vision.forward(p, observer))
            .collect::<Result<Vec<_>>>()?;
        timings.vision = watch.lap();

        let logits = self.prefill(session, &prompt, &features, request.max_tokens, observer)?;
        timings.prefill = watch.lap();

        let (ids, stopped) = self.decode(session, &prompt, logits, request, observer)?;
        timings.decode = watch.lap();

        Ok(Description {
            text: self.prompter.decode(&ids)?.trim().to_owned(),
            tokens: ids.len(),
            truncated: !stopped,
            timings,
        })
    }

    /// Runs the prompt, pictures' features in their places, through an emptied cache with room for `room`
    /// tokens more, and returns the logits that choose the first of them.
    pub fn prefill(
        &self,
        session: &mut Session,
        prompt: &Prompt,
        features: &[Tensor],
        room: usize,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let capacity = prompt.ids.len() + room;
        let limit = self.config.text_config.max_position_embeddings;
        if capacity > limit {
            return Err(Error::Prompt(format!(
                "{} tokens and max-tokens {room} exceed the model's {limit}; shorten one of them",
                prompt.ids.len()
            )));
        }
        let embeds = self.decoder.embed(&prompt.ids)?;
        for (&(start, len), features) in prompt.images.iter().zip(features) {
            if features.dim(0)? != len {
                return Err(Error::Prompt(format!(
                    "a picture of {} features in a place of {len} tokens",
                    features.dim(0)?
                )));
            }
            embeds.slice_set(&features.contiguous()?, 0, start)?;
        }
        session.cache.truncate(0);
        session
            .cache
            .reserve(capacity, embeds.dtype(), embeds.device())?;
        self.decoder.forward(&embeds, &mut session.cache, observer)
    }

    /// Runs one more token and returns the logits that choose the next.
    pub fn step(
        &self,
        session: &mut Session,
        token: u32,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let embeds = self.decoder.embed(&[token])?;
        self.decoder.forward(&embeds, &mut session.cache, observer)
    }

    /// Tokens until a stop token (true) or until `max_tokens` of them (false).
    fn decode(
        &self,
        session: &mut Session,
        prompt: &Prompt,
        mut logits: Tensor,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<(Vec<u32>, bool)> {
        let penalty = request.sampling.repetition_penalty;
        let mut processor = request.sampling.processor();
        let mut ids = Vec::with_capacity(request.max_tokens);
        // As in the reference, the penalty counts the prompt's tokens too.
        let mut context = prompt.ids.clone();
        loop {
            if penalty != 1.0 {
                logits = apply_repeat_penalty(&logits, penalty, &context)?;
            }
            let token = processor.sample(&logits)?;
            if self.stop.contains(&token) {
                return Ok((ids, true));
            }
            ids.push(token);
            context.push(token);
            self.report(&ids, observer)?;
            if ids.len() >= request.max_tokens {
                return Ok((ids, false));
            }
            logits = self.step(session, token, observer)?;
        }
    }

    /// Shows the text so far, unless its last character is still missing bytes.
    fn report(&self, ids: &[u32], observer: &mut Observer<'_>) -> Result<()> {
        let text = self.prompter.decode(ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(());
        }
        match observer(Event::Text(text.trim_start())) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
