//! One caption in the batch: what is left to do for it, and what its caller hears.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};

use vlmnarrate_engine::{Picture, Timings};

use super::turns::Turn;
use crate::{
    backends::{
        EncodePicture, Greedy, MAX_DRAFT, OnTokens, SequenceSlot, StepInput, StepJob, StepOutput,
        StepTimes,
    },
    error::{Error, Result},
    run::decode::{End, Generation},
    text::prompt::Prompt,
};

/// Work of one caption. Whoever holds it has its cache.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) slot: Box<dyn SequenceSlot>,
    pub(crate) prompt: Prompt,
    /// Square pictures in the order of the prompt.
    pub(crate) squares: Vec<Picture>,
    /// Numbers of the pictures whose features the slot does not hold yet.
    pub(crate) to_encode: VecDeque<usize>,
    pub(crate) generation: Generation,
    pub(crate) timings: Timings,
    /// `None` while it is suspended.
    pub(crate) turn: Option<Turn>,
    pub(crate) caller: Caller,
    /// Tokens of the answer when its turn began.
    pub(crate) since: usize,
}

/// The other end of a sequence.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) updates: Sender<Update>,
    pub(crate) cancelled: Arc<AtomicBool>,
    /// Tokens that were sent.
    pub(crate) sent: usize,
}

impl Caller {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Sends the tokens that have come since. A caller that has gone is not an error.
    fn send(&mut self, answer: &[u32]) {
        if let Some(new) = answer.get(self.sent..).filter(|new| !new.is_empty()) {
            let _ = self.updates.send(Update::Tokens(new.to_vec()));
            self.sent = answer.len();
        }
    }
}

/// What a caller hears of its sequence.
#[derive(Debug)]
pub(crate) enum Update {
    /// New tokens of the answer.
    Tokens(Vec<u32>),
    /// The last update.
    Finished(Box<Sequence>, Result<End>),
}

impl Sequence {
    pub(super) fn is_cancelled(&self) -> bool {
        self.caller.is_cancelled()
    }

    /// Whether the prompt has not been run to its end.
    pub(super) fn is_prompt(&self) -> bool {
        self.generation.tokens().is_empty()
    }

    /// Tokens of the answer since its turn began.
    pub(super) fn used(&self) -> usize {
        self.generation.tokens().len() - self.since
    }

    /// The slot, and the next pictures to encode into it, at most so many.
    pub(super) fn pictures(
        &mut self,
        most: usize,
    ) -> (&mut dyn SequenceSlot, Vec<EncodePicture<'_>>) {
        let picture = |&index: &usize| EncodePicture {
            picture: &self.squares[index],
            index,
            first_row: self.prompt.images[..index].iter().map(|(_, len)| len).sum(),
        };
        let pictures = self.to_encode.iter().take(most).map(picture).collect();
        (self.slot.as_mut(), pictures)
    }

    /// Rows of the next step: of a prompt at most `room`, of an answer one and draft tokens.
    pub(super) fn plan(&mut self, room: usize, most_drafts: usize) -> usize {
        if self.is_prompt() {
            return (self.prompt.ids.len() - self.slot.len()).min(room);
        }
        self.slot.truncate(self.generation.seen());
        self.generation.prepare_rows(most_drafts.min(MAX_DRAFT));
        self.generation.rows().len()
    }
}

/// What a step borrows of a sequence.
pub(super) struct Borrowed<'a> {
    slot: &'a mut dyn SequenceSlot,
    input: StepInput<'a>,
    /// Tokens that a backend may generate at most, and the draft.
    greedy: Option<(usize, &'a [u32])>,
    on_tokens: Box<OnTokens<'a>>,
}

impl Sequence {
    /// So many rows for the next step, in which a backend may generate at most so many tokens.
    pub(super) fn borrow(&mut self, rows: usize, most: usize) -> Borrowed<'_> {
        let input = match self.is_prompt() {
            true => StepInput::Prompt(&self.prompt, self.slot.len() + rows),
            false => StepInput::Tokens(self.generation.rows()),
        };
        let (rest, draft) = self.generation.rest();
        let greedy =
            (self.generation.is_greedy() && input.logits() > 0).then_some((rest.min(most), draft));
        let (generation, caller) = (&self.generation, &mut self.caller);
        Borrowed {
            slot: self.slot.as_mut(),
            input,
            greedy,
            on_tokens: Box::new(move |new| {
                caller.send(&[generation.tokens(), new].concat());
                match caller.is_cancelled() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            }),
        }
    }

    /// Takes what came of a step that took so long; `times` are more exact.
    pub(super) fn accept(
        &mut self,
        output: StepOutput,
        time: Duration,
        times: Option<StepTimes>,
    ) -> Result<()> {
        let is_prompt = self.is_prompt();
        let times = times.unwrap_or(match is_prompt {
            true => StepTimes {
                prefill: time,
                ..StepTimes::default()
            },
            false => StepTimes {
                decode: time,
                ..StepTimes::default()
            },
        });
        // Pictures that were encoded since the last step are those of prompts that begin.
        if is_prompt {
            self.timings.vision += times.vision;
        }
        self.timings.prefill += times.prefill;
        self.timings.decode += times.decode;
        match output {
            StepOutput::Logits(logits) if logits.is_empty() => (),
            StepOutput::Logits(logits) => self.generation.advance(logits)?,
            StepOutput::Generated { tokens, stopped } => {
                self.generation.accept_generated(&tokens, stopped);
            }
        }
        self.caller.send(self.generation.tokens());
        Ok(())
    }

    /// Hands the sequence back to its caller.
    pub(super) fn finish(mut self, result: Result<End>) {
        self.turn = None;
        let updates = self.caller.updates.clone();
        let _ = updates.send(Update::Finished(Box::new(self), result));
    }

    /// How it has ended, if it has.
    pub(super) fn end(&self) -> Option<Result<End>> {
        match self.is_cancelled() {
            true => Some(Err(Error::Cancelled)),
            false => self.generation.ended().map(Ok),
        }
    }
}

impl Borrowed<'_> {
    pub(super) fn job(&mut self) -> StepJob<'_> {
        let Self {
            slot,
            input,
            greedy,
            on_tokens,
        } = self;
        StepJob {
            slot: *slot,
            input: *input,
            greedy: greedy.map(|(max_tokens, draft)| Greedy {
                max_tokens,
                draft,
                on_tokens: on_tokens.as_mut(),
            }),
        }
    }
}
