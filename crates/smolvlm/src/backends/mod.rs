//! What computes: encoder, decoder and cache of a loaded model.
//!
//! `run/` is written once, over [`Backend`]. [`candle`] runs wherever candle does, [`cpu`] puts kernels of our own in
//! the place of quantized layers, and [`cuda`] is a network of our own kernels.

pub(crate) mod candle;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod request_size;

use std::{any::Any, fmt, ops::ControlFlow, time::Duration};

use candle_core::Tensor;
use vlmnarrate_engine::{Event, Observer, Picture};

use self::request_size::{RequestMemory, RequestSize};
use crate::{
    error::{Error, Result},
    text::prompt::Prompt,
};

/// The most draft tokens that are verified at once.
pub(crate) const MAX_DRAFT: usize = 16;

/// The network of a loaded model, on one device. Immutable: what changes is in a [`SequenceSlot`].
pub(crate) trait Backend: fmt::Debug + Send + Sync {
    /// An empty slot, which only this backend can use.
    fn new_slot(&self) -> Box<dyn SequenceSlot>;

    /// Whether logits are the same to the bit whatever rows are run at once, so that draft tokens can be verified and
    /// sequences be batched.
    fn is_batch_invariant(&self) -> bool;

    /// What it takes at once.
    fn limits(&self) -> BatchLimits;

    /// Runs work on the threads that suit the backend.
    fn install(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }

    /// Bytes of the machine's memory that a request takes at most; `None` where an allocation that fails is an error
    /// and no more.
    fn memory(&self, size: &RequestSize) -> Option<RequestMemory>;

    /// Makes room in a slot. What no longer fits where it is is forgotten.
    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()>;

    /// Encodes pictures into features, `[tokens, hidden]` each, which the slots then hold.
    ///
    /// The observer is asked at each layer whether to go on. A failure is that of all sequences.
    fn encode(&self, batch: &mut [EncodeJob<'_>], observer: &mut Observer<'_>) -> Result<()>;

    /// Runs rows of several sequences at once. Returns what came of each: a result of its own, because logits that are
    /// not finite are one sequence's.
    ///
    /// The observer is asked at each layer whether to go on. After a failure the slots hold what they held before.
    fn step(&self, batch: &mut [StepJob<'_>], observer: &mut Observer<'_>) -> Result<Stepped>;

    /// Puts features into a slot that were made before, one tensor a picture.
    fn set_features(&self, slot: &mut dyn SequenceSlot, features: &[Tensor]) -> Result<()>;

    /// The states of the encoder after the embedding, after each layer and after the last norm, and the features: what
    /// tests hold against the reference stage by stage.
    fn vision_states(&self, picture: &Picture) -> Result<(Vec<Tensor>, Tensor)>;

    /// The features of one picture: `[tokens, hidden]`.
    fn features(&self, picture: &Picture, _observer: &mut Observer<'_>) -> Result<Tensor> {
        Ok(self.vision_states(picture)?.1)
    }

    /// The connector alone: from `[patches, hidden]` of a grid of rows and columns to features. `None` where it can't be
    /// run alone.
    fn connect(&self, _states: &Tensor, _grid: (usize, usize)) -> Option<Result<Tensor>> {
        None
    }
}

/// What a backend takes at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchLimits {
    /// Sequences in a step.
    pub(crate) sequences: usize,
    /// Pictures to encode.
    pub(crate) pictures: usize,
    /// Whether pictures are encoded and steps made at once, as threads do.
    pub(crate) overlaps: bool,
    /// Rows in a step: beyond this a prompt is run in parts, so that others don't wait for it.
    pub(crate) rows: usize,
    /// Rows of one answer: the logits of others are not returned.
    pub(crate) answer_rows: usize,
}

/// What a backend keeps of one sequence from caption to caption: keys and values, and features of pictures.
pub(crate) trait SequenceSlot: Any + fmt::Debug + Send {
    /// Tokens held.
    fn len(&self) -> usize;

    /// Number of tokens that there is room for beside those held.
    fn room(&self) -> usize;

    /// Forgets every token but the first `len`.
    fn truncate(&mut self, len: usize);

    /// Pictures from the first on whose features the slot still holds when it is reserved for these needs.
    fn kept_features(&self, needs: &Needs) -> usize;

    /// Tokens that there is memory for.
    fn capacity(&self) -> usize;
}

/// The slot as the backend that made it knows it.
fn own<S: SequenceSlot>(slot: &mut dyn SequenceSlot) -> Result<&mut S> {
    (slot as &mut dyn Any)
        .downcast_mut()
        .ok_or_else(|| Error::Session("its cache is another backend's".into()))
}

/// How much a slot is to hold.
#[cfg_attr(
    not(feature = "cuda"),
    expect(dead_code, reason = "for backends that generate by themselves")
)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    /// Tokens of prompt and answer.
    pub(crate) capacity: usize,
    /// Tokens of the answer.
    pub(crate) max_tokens: usize,
    /// Pictures, tiles included.
    pub(crate) pictures: usize,
    /// Rows of features, all pictures'.
    pub(crate) feature_rows: usize,
    /// Bytes of the pictures that are encoded at once.
    pub(crate) picture_bytes: usize,
}

/// Pictures of one sequence to encode.
pub(crate) struct EncodeJob<'a> {
    pub(crate) slot: &'a mut dyn SequenceSlot,
    pub(crate) pictures: &'a [EncodePicture<'a>],
}

/// A square picture to encode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EncodePicture<'a> {
    pub(crate) picture: &'a Picture,
    /// Its number among the sequence's pictures.
    pub(crate) index: usize,
    /// The first of its rows of features.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "for backends that place features by row")
    )]
    pub(crate) first_row: usize,
}

/// Rows of one sequence to run.
pub(crate) struct StepJob<'a> {
    pub(crate) slot: &'a mut dyn SequenceSlot,
    pub(crate) input: StepInput<'a>,
    /// For an answer of the likeliest tokens, which a backend may generate by itself.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "for backends that generate by themselves")
    )]
    pub(crate) greedy: Option<Greedy<'a>>,
}

/// Which rows to run, behind those that the slot holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StepInput<'a> {
    /// Tokens of a prompt up to here, the slot's features in the places of its pictures.
    Prompt(&'a Prompt, usize),
    /// Tokens of the answer, for which there is room, and draft tokens.
    Tokens(&'a [u32]),
}

impl StepInput<'_> {
    /// Rows to run in a slot that holds so many tokens.
    pub(crate) fn rows(&self, held: usize) -> usize {
        match self {
            Self::Prompt(_, end) => end - held,
            Self::Tokens(tokens) => tokens.len(),
        }
    }

    /// The last rows, of which logits are wanted: of a part of a prompt none.
    pub(crate) fn logits(&self) -> usize {
        match self {
            Self::Prompt(prompt, end) => usize::from(*end == prompt.ids.len()),
            Self::Tokens(tokens) => tokens.len(),
        }
    }
}

/// An answer of the likeliest tokens.
#[cfg_attr(
    not(feature = "cuda"),
    expect(dead_code, reason = "for backends that generate by themselves")
)]
pub(crate) struct Greedy<'a> {
    /// Tokens to generate at most in this step.
    pub(crate) max_tokens: usize,
    /// Tokens that they may begin with.
    pub(crate) draft: &'a [u32],
    /// Called with all tokens of this step so far, now and then; `Break` ends it.
    pub(crate) on_tokens: &'a mut OnTokens<'a>,
}

/// Called with all tokens so far; `Break` ends the answer.
pub(crate) type OnTokens<'a> = dyn FnMut(&[u32]) -> ControlFlow<()> + Send + 'a;

/// What came of a step.
#[derive(Debug)]
pub(crate) struct Stepped {
    /// Of each job.
    pub(crate) outputs: Vec<Result<StepOutput>>,
    /// Where the backend knows them better than a clock around its calls.
    pub(crate) times: Option<StepTimes>,
}

/// Where the time of a step went.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepTimes {
    /// Of pictures that were encoded since the last step.
    pub(crate) vision: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

/// What came of one sequence's rows.
#[derive(Debug)]
pub(crate) enum StepOutput {
    /// Logits behind each of the last rows of which they were wanted: `[vocabulary]`, f32, on the CPU.
    Logits(Vec<Tensor>),
    /// Tokens that the backend has generated. The slot holds all but the last.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "for backends that generate by themselves")
    )]
    Generated {
        tokens: Vec<u32>,
        /// Whether a stop token ended the answer.
        stopped: bool,
    },
}

/// Reports that a layer is done.
///
/// # Errors
///
/// [`Error::Cancelled`] if the observer doesn't want to go on.
pub(crate) fn layer_done(observer: &mut Observer<'_>) -> Result<()> {
    match observer(Event::Layer) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}
