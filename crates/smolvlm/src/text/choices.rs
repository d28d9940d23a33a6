//! Captions limited to a list: at each step only tokens that lead to one of the choices count.

use crate::{
    error::{Error, Result},
    run::model::Model,
};

/// The choices as tokens.
#[derive(Debug)]
pub(crate) struct Choices(Vec<Vec<u32>>);

/// How far a caption has come through the choices.
#[derive(Debug)]
pub(crate) struct Walk<'c> {
    /// What is left of each choice that is still possible.
    left: Vec<&'c [u32]>,
    /// Of the tokens taken, among those that were allowed.
    probability: f64,
}

impl Model {
    pub(crate) fn choices(&self, texts: &[String]) -> Result<Choices> {
        let tokens = texts.iter().map(|text| {
            // An answer stands behind "Assistant:" and a space.
            let ids = self.prompter().ids(&format!(" {text}"))?;
            match self.prompter().decode(&ids)?.trim() == text {
                true => Ok(ids),
                false => Err(Error::Setting {
                    property: "choices",
                    reason: format!(
                        "`{text}` can't be written with the tokens of `{}`",
                        self.name()
                    ),
                }),
            }
        });
        Ok(Choices(tokens.collect::<Result<_>>()?))
    }
}

impl Choices {
    /// `None` where there is nothing to choose from: everything goes.
    pub(crate) fn walk(&self) -> Option<Walk<'_>> {
        let left = self.0.iter().map(Vec::as_slice).collect::<Vec<_>>();
        (!left.is_empty()).then_some(Walk {
            left,
            probability: 1.0,
        })
    }

    /// Tokens of the longest.
    pub(crate) fn longest(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(0)
    }
}

impl Walk<'_> {
    pub(crate) fn probability(&self) -> f64 {
        self.probability
    }

    /// Whether a choice is complete and none goes on from here.
    pub(crate) fn is_done(&self) -> bool {
        self.left.iter().all(|left| left.is_empty())
    }

    /// The next token where there is but one: the model need not be asked.
    pub(crate) fn only(&self) -> Option<u32> {
        let first = *self.left.first()?.first()?;
        let same = |left: &&[u32]| left.first() == Some(&first);
        self.left.iter().all(same).then_some(first)
    }

    /// Leaves only the logits of tokens that go on with a choice, or end one.
    pub(crate) fn restrict(&self, logits: &mut [f32], stop: &[u32]) {
        let allowed = self.allowed(stop);
        for (token, logit) in logits.iter_mut().enumerate() {
            if !allowed.contains(&(token as u32)) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Goes on with a token that was chosen by `logits`, restricted as above.
    pub(crate) fn take(&mut self, token: u32, logits: &[f32], stop: &[u32]) {
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
        // Whichever token ends it, it is the same choice.
        let taken = allowed
            .iter()
            .filter(|other| **other == token || ends && stop.contains(other));
        self.probability *=
            taken.map(weight).sum::<f64>() / allowed.iter().map(weight).sum::<f64>();
        self.advance(token, ends);
    }

    /// Goes on with the [only](Self::only) token.
    pub(crate) fn take_only(&mut self, token: u32) {
        self.advance(token, false);
    }

    fn advance(&mut self, token: u32, ends: bool) {
        self.left.retain_mut(|left| match left.split_first() {
            Some((first, rest)) if !ends && *first == token => {
                *left = rest;
                true
            }
            None => ends,
            _ => false,
        });
    }

    fn allowed(&self, stop: &[u32]) -> Vec<u32> {
        let mut allowed = Vec::new();
        for left in &self.left {
            match left.first() {
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
    fn what_is_not_a_choice_is_not_allowed() {
        let choices = choices(&[&[1, 2], &[1, 3, 4], &[5]]);
        let mut walk = choices.walk().unwrap();
        assert_eq!(walk.only(), None);
        let mut logits = [1.0f32; 10];
        walk.restrict(&mut logits, &STOP);
        let left = (0..10).filter(|i| logits[*i].is_finite());
        assert_eq!(Vec::from_iter(left), [1, 5]);
        logits[1] = 1.0 + 3f32.ln();
        walk.take(1, &logits, &STOP);
        assert!((walk.probability() - 0.75).abs() < 1e-6);
        let mut logits = [0.0f32; 10];
        walk.restrict(&mut logits, &STOP);
        walk.take(3, &logits, &STOP);
        assert!((walk.probability() - 0.375).abs() < 1e-6);
        // No choice is left: nothing to ask the model.
        assert_eq!(walk.only(), Some(4));
        walk.take_only(4);
        assert!(walk.is_done());
        assert!((walk.probability() - 0.375).abs() < 1e-6);
    }

    #[test]
    fn a_choice_may_be_the_beginning_of_another() {
        let choices = choices(&[&[1], &[1, 2]]);
        for (token, text_goes_on) in [(2, true), (9, false)] {
            let mut walk = choices.walk().unwrap();
            walk.take_only(walk.only().unwrap());
            assert!(!walk.is_done());
            assert_eq!(walk.only(), None);
            let mut logits = [0.0f32; 10];
            walk.restrict(&mut logits, &STOP);
            walk.take(token, &logits, &STOP);
            assert!(walk.is_done());
            // Two ways to end, one to go on.
            let expected = if text_goes_on { 1.0 } else { 2.0 } / 3.0;
            assert!((walk.probability() - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn nothing_to_choose_from_is_no_choice() {
        assert!(choices(&[]).walk().is_none());
    }
}
