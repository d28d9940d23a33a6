//! Constrained decoding: an answer limited to a list of choices. At each step, only tokens that continue a choice are
//! allowed.

use crate::{
    error::{Error, Result},
    text::prompt::Prompter,
};

/// The token ids of each choice.
#[derive(Debug, Clone)]
pub(crate) struct Choices(Vec<Vec<u32>>);

/// The state of a constrained decoding: the choices that the tokens so far begin.
#[derive(Debug)]
pub(crate) struct ChoiceState {
    choices: Choices,
    /// Which of them are still possible.
    possible: Vec<usize>,
    /// Number of tokens so far.
    len: usize,
    /// Probability of the tokens so far, each among the tokens that were allowed.
    probability: f64,
}

impl Choices {
    /// Encodes choices.
    ///
    /// # Errors
    ///
    /// A text that can't be written with the tokens of the model of this name.
    pub(crate) fn encode(prompter: &Prompter, model: &str, texts: &[String]) -> Result<Self> {
        let tokens = texts.iter().map(|text| {
            // The prompt ends with "Assistant:", and an answer begins with a space.
            let ids = prompter.ids(&format!(" {text}"))?;
            match prompter.decode(&ids)?.trim() == text {
                true => Ok(ids),
                false => Err(Error::Setting {
                    property: "choices",
                    reason: format!("`{text}` can't be written with the tokens of `{model}`"),
                }),
            }
        });
        Ok(Self(tokens.collect::<Result<_>>()?))
    }

    /// The state before the first token; `None` if there are no choices, and every token is allowed.
    pub(crate) fn start(self) -> Option<ChoiceState> {
        let possible = (0..self.0.len()).collect::<Vec<_>>();
        (!possible.is_empty()).then_some(ChoiceState {
            choices: self,
            possible,
            len: 0,
            probability: 1.0,
        })
    }

    /// Tokens of the longest choice.
    pub(crate) fn longest(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(0)
    }
}

impl ChoiceState {
    /// The remaining tokens of each choice that is still possible.
    fn remaining(&self) -> impl Iterator<Item = &[u32]> {
        let rest = |i: &usize| &self.choices.0[*i][self.len..];
        self.possible.iter().map(rest)
    }

    /// Probability of the tokens so far, 0 to 1.
    pub(crate) fn probability(&self) -> f64 {
        self.probability
    }

    /// Whether a choice is complete and none continues.
    pub(crate) fn is_done(&self) -> bool {
        self.remaining().all(|rest| rest.is_empty())
    }

    /// The next token if only one is allowed, which needs no forward pass to choose.
    pub(crate) fn forced_token(&self) -> Option<u32> {
        let first = *self.remaining().next()?.first()?;
        let same = |rest: &[u32]| rest.first() == Some(&first);
        self.remaining().all(same).then_some(first)
    }

    /// Masks the logits of all tokens but those that continue a choice, or end a complete one.
    pub(crate) fn mask_logits(&self, logits: &mut [f32], stop: &[u32]) {
        let allowed = self.allowed(stop);
        for (token, logit) in logits.iter_mut().enumerate() {
            if !allowed.contains(&(token as u32)) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Advances by a token that was chosen by [masked](Self::mask_logits) logits.
    pub(crate) fn accept(&mut self, token: u32, logits: &[f32], stop: &[u32]) {
        let allowed = self.allowed(stop);
        let logit = |token: &u32| {
            f64::from(
                logits
                    .get(*token as usize)
                    .copied()
                    .unwrap_or(f32::NEG_INFINITY),
            )
        };
        let highest = allowed.iter().map(logit).fold(f64::NEG_INFINITY, f64::max);
        let weight = |token: &u32| (logit(token) - highest).exp();
        let ends = stop.contains(&token);
        // Whichever stop token ends it, the choice is the same.
        let accepted = allowed
            .iter()
            .filter(|other| **other == token || ends && stop.contains(other));
        self.probability *=
            accepted.map(weight).sum::<f64>() / allowed.iter().map(weight).sum::<f64>();
        self.advance(token, ends);
    }

    /// Advances by the [forced token](Self::forced_token).
    pub(crate) fn accept_forced(&mut self, token: u32) {
        self.advance(token, false);
    }

    fn advance(&mut self, token: u32, ends: bool) {
        let (choices, len) = (&self.choices.0, self.len);
        self.possible.retain(|i| match choices[*i].get(len) {
            Some(next) => !ends && *next == token,
            None => ends,
        });
        self.len += usize::from(!ends);
    }

    fn allowed(&self, stop: &[u32]) -> Vec<u32> {
        let mut allowed = Vec::new();
        for rest in self.remaining() {
            match rest.first() {
                Some(first) => allowed.push(*first),
                None => allowed.extend_from_slice(stop),
            }
        }
        allowed.sort_unstable();
        allowed.dedup();
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOP: [u32; 2] = [0, 9];

    fn choices(tokens: &[&[u32]]) -> Choices {
        Choices(tokens.iter().map(|tokens| tokens.to_vec()).collect())
    }

    #[test]
    fn only_tokens_of_a_choice_are_allowed() {
        let choices = choices(&[&[1, 2], &[1, 3, 4], &[5]]);
        let mut state = choices.start().unwrap();
        assert_eq!(state.forced_token(), None);
        let mut logits = [1.0f32; 10];
        state.mask_logits(&mut logits, &STOP);
        let left = (0..10).filter(|i| logits[*i].is_finite());
        assert_eq!(Vec::from_iter(left), [1, 5]);
        logits[1] = 1.0 + 3f32.ln();
        state.accept(1, &logits, &STOP);
        assert!((state.probability() - 0.75).abs() < 1e-6);
        let mut logits = [0.0f32; 10];
        state.mask_logits(&mut logits, &STOP);
        state.accept(3, &logits, &STOP);
        assert!((state.probability() - 0.375).abs() < 1e-6);
        // No choice is left: nothing to ask the model.
        assert_eq!(state.forced_token(), Some(4));
        state.accept_forced(4);
        assert!(state.is_done());
        assert!((state.probability() - 0.375).abs() < 1e-6);
    }

    #[test]
    fn a_choice_may_be_the_beginning_of_another() {
        let choices = choices(&[&[1], &[1, 2]]);
        for (token, text_goes_on) in [(2, true), (9, false)] {
            let mut state = choices.clone().start().unwrap();
            state.accept_forced(state.forced_token().unwrap());
            assert!(!state.is_done());
            assert_eq!(state.forced_token(), None);
            let mut logits = [0.0f32; 10];
            state.mask_logits(&mut logits, &STOP);
            state.accept(token, &logits, &STOP);
            assert!(state.is_done());
            // Two ways to end, one to go on.
            let expected = if text_goes_on { 1.0 } else { 2.0 } / 3.0;
            assert!((state.probability() - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn no_choices_allow_every_token() {
        assert!(choices(&[]).start().is_none());
    }
}
