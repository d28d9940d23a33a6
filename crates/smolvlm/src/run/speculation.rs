//! Speculative decoding: draft tokens are run before anybody knows whether they would be chosen.

use crate::backends::MAX_DRAFT;

/// Draft tokens and how far to trust them. The draft is the last caption, which says the same as long as the scene does.
///
/// A draft that is rejected costs time and changes nothing: each choice is made from the same logits as without.
#[derive(Debug, Default)]
pub(crate) struct Speculation {
    /// Empty for a backend that isn't batch-invariant.
    draft: Vec<u32>,
    /// How many to verify at once: more and more as they are accepted.
    draft_len: usize,
}

impl Speculation {
    const FIRST_DRAFT: usize = 4;

    /// For a prompt that is the same as last time, pictures included, or not.
    pub(crate) fn new(draft: Vec<u32>, is_same: bool) -> Self {
        Self {
            draft,
            draft_len: match is_same {
                true => MAX_DRAFT,
                false => Self::FIRST_DRAFT,
            },
        }
    }

    /// Draft tokens behind those of the answer, at most so many; none where the answer has gone another way.
    pub(crate) fn draft(&self, answer: &[u32], most: usize) -> &[u32] {
        // Only the last token counts: an answer may come back to the draft.
        let rest = match answer.len().checked_sub(1) {
            Some(last) if self.draft.get(last) != Some(&answer[last]) => &[],
            _ => self.draft.get(answer.len()..).unwrap_or_default(),
        };
        &rest[..rest.len().min(self.draft_len).min(most)]
    }

    /// Draft tokens behind those of the answer, if all of it is as the draft.
    pub(crate) fn rest(&self, answer: &[u32]) -> &[u32] {
        self.draft.strip_prefix(answer).unwrap_or_default()
    }

    /// The draft tokens of a step were all accepted, or not.
    pub(crate) fn verified(&mut self, accepted: bool) {
        self.draft_len = match accepted {
            true => MAX_DRAFT.min(2 * self.draft_len),
            false => Self::FIRST_DRAFT,
        };
    }
}
