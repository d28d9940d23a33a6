//! Speculative decoding: draft tokens are run before anybody knows whether they would be chosen.

use candle_core::Tensor;

use crate::backends::MAX_DRAFT;

/// Draft tokens and what became of them. The draft is the last caption, which says the same as long as the scene does.
///
/// A draft that is rejected costs time and changes nothing: each choice is made from the same logits as without.
pub(crate) struct Speculation<'a> {
    /// Empty for a backend that isn't batch-invariant.
    pub(crate) draft: &'a [u32],
    /// Tokens of the answer that were run, accepted or not, and the logits behind the last of them, each.
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<Tensor>,
    /// How many to verify at once: more and more as they are accepted.
    pub(crate) draft_len: usize,
}

impl<'a> Speculation<'a> {
    pub(crate) const FIRST_DRAFT: usize = 4;

    /// For a prompt that is the same as last time, pictures included, or not.
    pub(crate) fn new(draft: &'a [u32], is_same: bool) -> Self {
        Self {
            draft,
            tokens: Vec::new(),
            logits: Vec::new(),
            draft_len: if is_same {
                MAX_DRAFT
            } else {
                Self::FIRST_DRAFT
            },
        }
    }

    /// Logits that were computed behind these tokens.
    pub(crate) fn logits_after(&self, ids: &[u32]) -> Option<Tensor> {
        let known = self.tokens.len() - self.logits.len();
        let at = ids.len().checked_sub(known + 1)?;
        (self.tokens.get(..ids.len())? == ids).then(|| self.logits[at].clone())
    }
}
