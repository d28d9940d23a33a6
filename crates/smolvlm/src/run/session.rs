//! What a caller keeps from caption to caption, and what the next has of the last.

use candle_core::Tensor;

use crate::{
    backends::network::Cache,
    error::{Error, Result},
    text::prompt::{Message, Prompt, Prompter, Span},
};
use vlmnarrate_engine::Picture;

/// What one caller keeps from caption to caption: the cache, and what the next caption may have in common with
/// the last.
#[derive(Debug)]
pub struct Session {
    /// The model's, by [`Model::session`](super::Model::session).
    model: u64,
    pub(crate) cache: Cache,
    pub(crate) last: Option<Last>,
    /// The last question and its tokens: mostly it is the next one too.
    asked: Option<(Question, Prompt)>,
}

impl Session {
    pub(crate) fn new(model: u64, cache: Cache) -> Self {
        Self {
            model,
            cache,
            last: None,
            asked: None,
        }
    }

    /// A cache of another model has other layers, and of the same shape other contents.
    pub(crate) fn check(&self, model: u64) -> Result<()> {
        match self.model == model {
            true => Ok(()),
            false => Err(Error::Session(
                "it is of another model; each has its own".into(),
            )),
        }
    }

    /// The question's tokens, of which those of the last are known.
    pub(crate) fn prompt(&mut self, prompter: &Prompter, question: Question) -> Result<Prompt> {
        match &self.asked {
            Some((asked, prompt)) if *asked == question => Ok(prompt.clone()),
            _ => {
                let prompt = prompter.encode(&question.messages, &question.spans)?;
                self.asked = Some((question, prompt.clone()));
                Ok(prompt)
            }
        }
    }

    /// Makes the next caption as if it were the first, in the same memory.
    pub fn forget(&mut self) {
        self.last = None;
        self.cache.truncate(0);
    }
}

/// What a prompt is made of.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) messages: Vec<Message>,
    /// Of its pictures.
    pub(crate) spans: Vec<Span>,
}

/// A caption that was made, with all that it was made of.
#[derive(Debug)]
pub(crate) struct Last {
    /// Of the prompt, which the cache holds still.
    pub(crate) prompt: Prompt,
    pub(crate) squares: Vec<Picture>,
    /// None where the cache holds them.
    pub(crate) features: Vec<Tensor>,
    /// Tokens of the caption.
    pub(crate) ids: Vec<u32>,
}

impl Last {
    /// Features of this square picture in this place, if it is the same as then.
    pub(crate) fn features(&self, place: usize, square: &Picture) -> Option<Tensor> {
        (self.squares.get(place)? == square).then(|| self.features[place].clone())
    }

    /// Whether this picture stood in this place of this prompt.
    #[cfg(feature = "cuda")]
    pub(crate) fn has(&self, place: usize, square: &Picture, prompt: &Prompt) -> bool {
        self.squares.get(place) == Some(square)
            && self.prompt.images[..=place] == prompt.images[..=place]
    }

    /// Tokens from the first on that the prompt has in common with this one, whose first `same` pictures are
    /// those of then.
    pub(crate) fn in_common(&self, prompt: &Prompt, same: usize) -> usize {
        let tokens = self.prompt.ids.iter().zip(&prompt.ids);
        let tokens = tokens.take_while(|(a, b)| a == b).count();
        let places = self.prompt.images.iter().zip(&prompt.images);
        let places = places.take_while(|(a, b)| a == b).count();
        match prompt.images.get(same.min(places)) {
            Some((start, _)) => tokens.min(*start),
            None => tokens,
        }
    }
}

/// Tokens that were run before anybody knew whether they would be chosen: those of the last caption, which
/// says the same as long as the scene does.
///
/// A guess that fails costs time and changes nothing: each choice is made from the same logits as without.
pub(crate) struct Ahead<'a> {
    /// None of a decoder whose rows depend on how many are run at once.
    pub(crate) guess: &'a [u32],
    /// Tokens of the caption that were run, chosen or not, and the logits behind the last of them, each.
    pub(crate) run: Vec<u32>,
    pub(crate) logits: Vec<Tensor>,
    /// How many to guess at once: more and more as they come true.
    pub(crate) pace: usize,
}

impl<'a> Ahead<'a> {
    pub(crate) const PACE: usize = 4;
    pub(crate) const MOST: usize = 16;

    /// Of a prompt that is the same, pictures included, or not.
    pub(crate) fn new(guess: &'a [u32], is_same: bool) -> Self {
        Self {
            guess,
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
