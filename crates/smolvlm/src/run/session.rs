//! What a caller keeps from caption to caption, and what the next has of the last.

use std::sync::Arc;

use crate::{
    backends::{Backend, SequenceSlot},
    error::{Error, Result},
    run::{caches::CachePlace, scheduler::Turn},
    text::{
        message::Message,
        prompt::{Prompt, Prompter, Span},
    },
};
use vlmnarrate_engine::Picture;

/// What one caller keeps from caption to caption: the cache, and what the next caption may have in common with
/// the last.
#[derive(Debug)]
pub struct Session {
    /// The model's, by [`Model::session`](super::Model::session).
    model: u64,
    pub(crate) cache: Arc<CachePlace>,
    /// Of the next caption, if it has come already.
    pub(crate) turn: Option<Turn>,
    pub(crate) last: Option<Last>,
    /// The last prompt that was tokenized: mostly it is the next one too.
    encoded: Option<(PromptKey, Prompt)>,
}

impl Session {
    pub(crate) fn new(model: u64, cache: Arc<CachePlace>) -> Self {
        Self {
            model,
            cache,
            turn: None,
            last: None,
            encoded: None,
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

    /// Tokens of a prompt; those of the last are known.
    pub(crate) fn prompt(&mut self, prompter: &Prompter, wanted: PromptKey) -> Result<Prompt> {
        match &self.encoded {
            Some((key, prompt)) if *key == wanted => Ok(prompt.clone()),
            _ => {
                let prompt = prompter.encode(&wanted.messages, &wanted.spans)?;
                self.encoded = Some((wanted, prompt.clone()));
                Ok(prompt)
            }
        }
    }

    /// Makes the next caption as if it were the first, in the same memory.
    pub fn forget(&mut self) {
        self.last = None;
    }

    /// Gives back a turn that no caption needs any more.
    pub(crate) fn give_up_turn(&mut self) {
        self.turn = None;
    }

    /// Runs work on the cache outside of the batch, as tests do.
    pub(crate) fn with_slot<T>(
        &mut self,
        backend: &dyn Backend,
        work: impl FnOnce(&mut dyn SequenceSlot) -> T,
    ) -> T {
        let mut slot = self.cache.take().unwrap_or_else(|| backend.new_slot());
        let result = work(slot.as_mut());
        self.cache.put(slot);
        result
    }
}

/// What a prompt is made of: the same gives the same tokens.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PromptKey {
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
    /// Tokens of the caption.
    pub(crate) tokens: Vec<u32>,
}

impl Last {
    /// Whether this square picture stood in this place, behind as many rows of features.
    pub(crate) fn has(&self, place: usize, square: &Picture, prompt: &Prompt) -> bool {
        fn rows(prompt: &Prompt, place: usize) -> impl Iterator<Item = &usize> {
            prompt.images.iter().take(place + 1).map(|(_, len)| len)
        }
        self.squares.get(place) == Some(square) && rows(&self.prompt, place).eq(rows(prompt, place))
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
