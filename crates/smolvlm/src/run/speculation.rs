//! Speculative decoding: draft tokens are run before anybody knows whether they would be chosen.

use candle_core::Tensor;

/// Tokens that were run before anybody knew whether they would be chosen: those of the last caption, which
/// says the same as long as the scene does.
///
/// A draft that fails costs time and changes nothing: each choice is made from the same logits as without.
pub(crate) struct Speculation<'a> {
    /// None of a decoder whose rows depend on how many are run at once.
    pub(crate) draft: &'a [u32],
    /// Tokens of the caption that were run, chosen or not, and the logits behind the last of them, each.
    pub(crate) run: Vec<u32>,
    pub(crate) logits: Vec<Tensor>,
    /// How many to draft at once: more and more as they come true.
    pub(crate) pace: usize,
}

impl<'a> Speculation<'a> {
    pub(crate) const PACE: usize = 4;
    pub(crate) const MOST: usize = 16;

    /// Of a prompt that is the same, pictures included, or not.
    pub(crate) fn new(draft: &'a [u32], is_same: bool) -> Self {
        Self {
            draft,
            run: Vec::new(),
            logits: Vec::new(),
            pace: if is_same { Self::MOST } else { Self::PACE },
        }
    }

    /// What is known to follow these tokens.
    pub(crate) fn behind(&self, ids: &[u32]) -> Option<Tensor> {
        let known = self.run.len() - self.logits.len();
        let at = ids.len().checked_sub(known + 1)?;
        (self.run.get(..ids.len())? == ids).then(|| self.logits[at].clone())
    }
}
