//! From logits to an answer: greedy, sampled or constrained tokens, speculation, stop tokens.

use candle_core::{Device, Tensor};
use candle_transformers::{generation::LogitsProcessor, utils::apply_repeat_penalty};
use vlmnarrate_engine::Sampling;

use crate::{
    backends::candle::values::look_at,
    error::{Error, Result},
    run::{sampling, speculation::Speculation},
    text::{choices::ChoiceState, prompt::Prompt},
};

/// An answer in the making. It chooses tokens by the logits that a step brings, and says what to run in the next.
#[derive(Debug)]
pub(crate) struct Generation {
    prompt_len: usize,
    /// The prompt and the answer so far: as in the reference, the penalty counts the prompt's tokens too.
    context: Vec<u32>,
    max_tokens: usize,
    /// Tokens that end the answer.
    stop: Vec<u32>,
    sampling: Sampling,
    processor: Processor,
    choices: Option<ChoiceState>,
    speculation: Speculation,
    /// Rows of the last step: tokens of the answer that had not been run, then draft tokens.
    pending: Vec<u32>,
    ended: Option<End>,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By a stop token, or with a whole choice.
    Stopped,
    /// By the limit of its tokens.
    Truncated,
}

/// candle's, which can't be shown.
struct Processor(LogitsProcessor);

impl std::fmt::Debug for Processor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Processor")
    }
}

impl Generation {
    pub(crate) fn new(
        prompt: &Prompt,
        (max_tokens, stop): (usize, Vec<u32>),
        sampling: Sampling,
        choices: Option<ChoiceState>,
        speculation: Speculation,
    ) -> Self {
        Self {
            prompt_len: prompt.ids.len(),
            context: prompt.ids.clone(),
            max_tokens,
            stop,
            processor: Processor(sampling::processor(&sampling)),
            sampling,
            choices,
            speculation,
            pending: Vec::new(),
            ended: None,
        }
    }

    /// Tokens of the answer so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.context[self.prompt_len..]
    }

    pub(crate) fn ended(&self) -> Option<End> {
        self.ended
    }

    /// Probability of the choice, 1 without choices.
    pub(crate) fn probability(&self) -> f64 {
        self.choices.as_ref().map_or(1.0, ChoiceState::probability)
    }

    /// Tokens of the prompt and of the answer that were run, those of rejected drafts apart.
    pub(crate) fn seen(&self) -> usize {
        self.context.len()
            - match &self.choices {
                Some(_) => self.pending.len(),
                None => 1,
            }
    }

    /// Goes on from the logits behind each row of the last step, or behind the prompt.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`].
    pub(crate) fn advance(&mut self, logits: Vec<Tensor>) -> Result<()> {
        match self.choices.take() {
            Some(mut state) => {
                let result = self.choose(&mut state, logits);
                self.choices = Some(state);
                result
            }
            None => self.sample(logits),
        }
    }

    /// Tokens until a stop token, or until `max_tokens` of them, as far as the draft goes on as the answer does.
    fn sample(&mut self, logits: Vec<Tensor>) -> Result<()> {
        let rows = logits.len();
        for (i, mut logits) in logits.into_iter().enumerate() {
            look_at(&logits, check_scores)??;
            let penalty = self.sampling.repetition_penalty;
            if penalty != 1.0 {
                logits = apply_repeat_penalty(&logits, penalty, &self.context)?;
            }
            if sampling::restricts(&self.sampling) {
                let mut scores = scores(&logits)?;
                sampling::restrict(&self.sampling, &mut scores);
                logits = Tensor::new(scores.as_slice(), logits.device())?;
            }
            let token = self.processor.0.sample(&logits)?;
            if self.stop.contains(&token) {
                self.ended = Some(End::Stopped);
                return Ok(());
            }
            self.context.push(token);
            if self.tokens().len() >= self.max_tokens {
                self.ended = Some(End::Truncated);
                return Ok(());
            }
            // What follows was computed behind another token.
            if i + 1 < rows && self.pending[i + 1] != token {
                self.speculation.verified(false);
                return Ok(());
            }
        }
        if !self.pending.is_empty() {
            self.speculation.verified(rows > 1);
        }
        Ok(())
    }

    /// Tokens of one of the choices, as far as there is nothing to choose.
    fn choose(&mut self, state: &mut ChoiceState, mut logits: Vec<Tensor>) -> Result<()> {
        let mut logits = logits.pop();
        self.pending.clear();
        while !state.is_done() {
            let token = if let Some(token) = state.forced_token() {
                state.accept_forced(token);
                token
            } else {
                // They are those behind the last token that was run.
                let Some(logits) = logits.take().filter(|_| self.pending.is_empty()) else {
                    return Ok(());
                };
                let mut scores = scores(&logits)?;
                check_scores(&scores)?;
                state.mask_logits(&mut scores, &self.stop);
                // Of those that are left too.
                check_scores(&scores)?;
                let restricted = Tensor::new(scores.as_slice(), &Device::Cpu)?;
                let token = self.processor.0.sample(&restricted)?;
                state.accept(token, &scores, &self.stop);
                if self.stop.contains(&token) {
                    break;
                }
                token
            };
            self.context.push(token);
            self.pending.push(token);
        }
        self.ended = Some(End::Stopped);
        Ok(())
    }

    /// Goes on with tokens that the backend has generated.
    pub(crate) fn accept_generated(&mut self, tokens: &[u32], stopped: bool) {
        self.context.extend_from_slice(tokens);
        if stopped {
            self.ended = Some(End::Stopped);
        } else if self.tokens().len() >= self.max_tokens {
            self.ended = Some(End::Truncated);
        }
    }

    /// Makes [`rows`](Self::rows) those of the next step, with at most so many draft tokens.
    pub(crate) fn prepare_rows(&mut self, most_drafts: usize) {
        if self.choices.is_none() {
            let (seen, max) = (self.tokens().len(), self.max_tokens);
            let answer = &self.context[self.prompt_len..];
            let draft = self.speculation.draft(answer, most_drafts.min(max - seen));
            self.pending = [&answer[seen - 1..], draft].concat();
        }
    }

    /// Rows of the next step: what of the answer was not run, then draft tokens.
    pub(crate) fn rows(&self) -> &[u32] {
        &self.pending
    }

    /// Whether a backend may generate the answer by itself, of the likeliest tokens.
    pub(crate) fn is_greedy(&self) -> bool {
        sampling::is_greedy(&self.sampling)
            && self.sampling.repetition_penalty == 1.0
            && self.choices.is_none()
    }

    /// Tokens that the answer may still have, and draft tokens that they may begin with.
    pub(crate) fn rest(&self) -> (usize, &[u32]) {
        let answer = self.tokens();
        (
            self.max_tokens - answer.len(),
            self.speculation.rest(answer),
        )
    }
}

/// That one token can be the likeliest.
fn check_scores(scores: &[f32]) -> Result<()> {
    // Without a way out in the middle the compiler takes many at a time.
    let all = scores
        .iter()
        .fold(true, |all, y| all & (*y < f32::INFINITY));
    let any = scores
        .iter()
        .fold(false, |any, y| any | (*y > f32::NEG_INFINITY));
    match all && any {
        true => Ok(()),
        false => Err(Error::NotFinite),
    }
}

/// Logits as numbers.
fn scores(logits: &Tensor) -> Result<Vec<f32>> {
    Ok(logits
        .to_dtype(candle_core::DType::F32)?
        .flatten_all()?
        .to_vec1()?)
}
