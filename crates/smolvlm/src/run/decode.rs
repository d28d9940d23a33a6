//! From logits to a caption: greedy or sampled tokens, speculation, stop tokens and strings.

use std::ops::ControlFlow;

use candle_core::Tensor;
use candle_transformers::utils::apply_repeat_penalty;

use vlmnarrate_engine::{Event, Observer, Request};

use crate::{
    backends::{MAX_DRAFT, candle::values::look_at},
    error::{Error, Result},
    run::{model::Model, sampling, session::Session, speculation::Speculation},
    text::{choices::ChoiceState, prompt::Prompt},
};

/// What was generated, and how it ended.
pub(crate) struct Generated {
    pub(crate) tokens: Vec<u32>,
    /// By a stop token or string, not by `max_tokens`.
    pub(crate) stopped: bool,
    pub(crate) probability: f64,
}

impl Model {
    /// Logits that choose the token behind `ids`, the answer so far, of at most `max_tokens`. The prompt has `start`
    /// tokens. Where the draft goes on as the answer did, the rest of the draft is run with it.
    fn verify_draft(
        &self,
        session: &mut Session,
        start: usize,
        ids: &[u32],
        max_tokens: usize,
        speculation: &mut Speculation<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        if let Some(logits) = speculation.logits_after(ids) {
            return Ok(logits);
        }
        let seen = ids.len() - 1;
        // Rejected draft tokens are in the way.
        session.slot.truncate(start + seen);
        if !speculation.tokens.is_empty() {
            let accepted = speculation.logits.len() > 1 && speculation.tokens == ids[..seen];
            speculation.draft_len = match accepted {
                true => MAX_DRAFT.min(2 * speculation.draft_len),
                false => Speculation::FIRST_DRAFT,
            };
        }
        let draft = match speculation.draft.get(seen) {
            Some(token) if *token == ids[seen] => &speculation.draft[seen + 1..],
            _ => &[],
        };
        let draft = &draft[..draft
            .len()
            .min(speculation.draft_len)
            .min(max_tokens - ids.len())];
        speculation.tokens = [ids, draft].concat();
        let tokens = &speculation.tokens[seen..];
        speculation.logits = self.run_tokens(session, tokens, observer)?;
        Ok(speculation.logits[0].clone())
    }

    /// Tokens of one of the choices. The model is run only where there is something to choose.
    pub(crate) fn choose(
        &self,
        session: &mut Session,
        mut state: ChoiceState<'_>,
        logits: Tensor,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Generated> {
        let mut processor = sampling::processor(&request.sampling);
        let mut ids: Vec<u32> = Vec::new();
        // Tokens that the model has seen, and what it made of the last.
        let (mut seen, mut logits) = (0, Some(logits));
        while !state.is_done() {
            if let Some(token) = state.forced_token() {
                state.accept_forced(token);
                ids.push(token);
            } else {
                for token in &ids[seen..] {
                    logits = Some(self.step(session, *token, observer)?);
                }
                seen = ids.len();
                let Some(logits) = &logits else { break };
                let mut scores = scores(logits)?;
                check_scores(&scores)?;
                state.mask_logits(&mut scores, &self.stop);
                // Of those that are left too.
                check_scores(&scores)?;
                let restricted = Tensor::new(scores.as_slice(), logits.device())?;
                let token = processor.sample(&restricted)?;
                state.accept(token, &scores, &self.stop);
                if self.stop.contains(&token) {
                    break;
                }
                ids.push(token);
            }
            self.report(&ids, &[], observer)?;
        }
        Ok(Generated {
            tokens: ids,
            stopped: true,
            probability: state.probability(),
        })
    }

    /// Tokens until a stop token or string, or until `max_tokens` of them.
    pub(crate) fn decode(
        &self,
        session: &mut Session,
        prompt: &Prompt,
        mut logits: Tensor,
        request: &Request<'_>,
        (draft, is_same): (&[u32], bool),
        observer: &mut Observer<'_>,
    ) -> Result<Generated> {
        let generated = |tokens, stopped| Generated {
            tokens,
            stopped,
            probability: 1.0,
        };
        let mut speculation = Speculation::new(draft, is_same);
        let penalty = request.sampling.repetition_penalty;
        let mut processor = sampling::processor(&request.sampling);
        let mut ids = Vec::with_capacity(request.max_tokens);
        // As in the reference, the penalty counts the prompt's tokens too.
        let mut context = prompt.ids.clone();
        loop {
            look_at(&logits, check_scores)??;
            if penalty != 1.0 {
                logits = apply_repeat_penalty(&logits, penalty, &context)?;
            }
            if sampling::restricts(&request.sampling) {
                let mut scores = scores(&logits)?;
                sampling::restrict(&request.sampling, &mut scores);
                logits = Tensor::new(scores.as_slice(), logits.device())?;
            }
            let token = processor.sample(&logits)?;
            if self.stop.contains(&token) {
                return Ok(generated(ids, true));
            }
            ids.push(token);
            context.push(token);
            if self.report(&ids, request.stop_strings, observer)? {
                return Ok(generated(ids, true));
            }
            if ids.len() >= request.max_tokens {
                return Ok(generated(ids, false));
            }
            let (start, max_tokens) = (prompt.ids.len(), request.max_tokens);
            logits =
                self.verify_draft(session, start, &ids, max_tokens, &mut speculation, observer)?;
        }
    }

    /// Shows the text so far, unless its last character is still missing bytes. Says whether one of
    /// the strings that end it has come.
    pub(crate) fn report(
        &self,
        ids: &[u32],
        stop_strings: &[String],
        observer: &mut Observer<'_>,
    ) -> Result<bool> {
        let text = self.prompter.decode(ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(false);
        }
        let before = before_stop(&text, stop_strings);
        let event = Event::Text {
            text: before.unwrap_or(&text).trim_start(),
            tokens: ids.len(),
        };
        match observer(event) {
            ControlFlow::Continue(()) => Ok(before.is_some()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
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

/// What stands before the first of these strings, if one is there.
pub(crate) fn before_stop<'t>(text: &'t str, stop_strings: &[String]) -> Option<&'t str> {
    let ends = stop_strings.iter().filter(|stop| !stop.is_empty());
    let end = ends.filter_map(|stop| text.find(stop.as_str())).min()?;
    Some(&text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stop_string_counts() {
        let stop = ["b", "", "ab"].map(str::to_owned);
        assert_eq!(before_stop("xaby", &stop), Some("x"));
        assert_eq!(before_stop("xay", &stop), None);
    }
}
