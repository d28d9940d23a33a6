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

use self::request_size::RequestSize;
use crate::{
    error::{Error, Result},
    machine::stopwatch::Stopwatch,
    text::prompt::Prompt,
};

/// The most draft tokens that are verified at once.
pub(crate) const MAX_DRAFT: usize = 16;

/// The network of a loaded model, on one device. Immutable: what changes is in a [`SequenceSlot`].
pub(crate) trait Backend: fmt::Debug + Send + Sync {
    /// An empty slot, which only this backend can use.
    fn new_slot(&self) -> Box<dyn SequenceSlot>;

    /// Whether logits are the same to the bit however many rows are run at once, so that draft tokens can be verified.
    fn is_batch_invariant(&self) -> bool;

    /// Runs one caller's work on the threads that suit the backend.
    fn install(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }

    /// Bytes of the machine's memory that a request takes at most; `None` where an allocation that fails is an error
    /// and no more.
    fn memory(&self, size: &RequestSize) -> Option<u64>;

    /// Whether the slot keeps the features that it holds when it is reserved for so many rows of them.
    fn keeps_features(&self, slot: &dyn SequenceSlot, rows: usize) -> bool;

    /// Makes room in a slot. What no longer fits where it is is forgotten.
    fn reserve(&self, slot: &mut dyn SequenceSlot, needs: &Needs) -> Result<()>;

    /// Encodes pictures into features, `[tokens, hidden]` each, which the slot then holds in this order.
    fn encode(
        &self,
        slot: &mut dyn SequenceSlot,
        images: &[ImageInput<'_>],
        observer: &mut Observer<'_>,
    ) -> Result<()>;

    /// Runs a prompt, the slot's features in the places of its pictures, from the first token that the slot doesn't
    /// hold. Returns the logits that choose the next token: `[vocabulary]`, f32, on the CPU.
    fn prefill(
        &self,
        slot: &mut dyn SequenceSlot,
        prompt: &Prompt,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor>;

    /// Runs tokens behind those that the slot holds, for which it has room. Returns the logits behind each.
    fn decode(
        &self,
        slot: &mut dyn SequenceSlot,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>>;

    /// Encodes, prefills and, where the backend can do so by itself, generates.
    fn start(
        &self,
        slot: &mut dyn SequenceSlot,
        job: StartJob<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Started> {
        let mut watch = Stopwatch::start();
        self.encode(slot, job.images, observer)?;
        let vision = watch.lap();
        let logits = self.prefill(slot, job.prompt, observer)?;
        Ok(Started {
            next: Next::Logits(logits),
            vision,
            prefill: watch.lap(),
            ..Started::default()
        })
    }

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

/// What a backend keeps of one sequence from caption to caption: keys and values, and features of pictures.
pub(crate) trait SequenceSlot: Any + fmt::Debug + Send {
    /// Number of tokens that there is room for beside those held.
    fn room(&self) -> usize;

    /// Forgets every token but the first `len`.
    fn truncate(&mut self, len: usize);
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
    /// Rows of features, all pictures'.
    pub(crate) feature_rows: usize,
    /// Bytes of the pictures that are to be encoded.
    pub(crate) picture_bytes: usize,
}

/// A square picture for the encoder.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ImageInput<'a> {
    /// The same as last time, in the same place: the slot holds its features.
    CachedFeatures {
        /// How many rows of them.
        #[cfg_attr(
            not(feature = "cuda"),
            expect(dead_code, reason = "backends that place features by row")
        )]
        rows: usize,
    },
    /// To be encoded.
    Pixels(&'a Picture),
}

/// What to begin an answer with.
#[cfg_attr(
    not(feature = "cuda"),
    expect(dead_code, reason = "for backends that generate by themselves")
)]
pub(crate) struct StartJob<'a> {
    /// In the order of the prompt.
    pub(crate) images: &'a [ImageInput<'a>],
    pub(crate) prompt: &'a Prompt,
    /// The answer, where the likeliest tokens are taken.
    pub(crate) greedy: Option<Greedy<'a>>,
}

/// An answer of the likeliest tokens.
#[cfg_attr(
    not(feature = "cuda"),
    expect(dead_code, reason = "for backends that generate by themselves")
)]
pub(crate) struct Greedy<'a> {
    pub(crate) max_tokens: usize,
    /// Tokens that the answer may begin with.
    pub(crate) draft: &'a [u32],
    /// Called with all tokens so far whenever there are more.
    pub(crate) on_tokens: OnTokens<'a>,
}

/// Called with all tokens so far; `Break` ends the answer.
pub(crate) type OnTokens<'a> = &'a mut dyn FnMut(&[u32], &mut Observer<'_>) -> ControlFlow<()>;

/// How an answer has begun.
#[derive(Default)]
pub(crate) struct Started {
    pub(crate) next: Next,
    pub(crate) vision: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

/// What comes behind a prompt.
pub(crate) enum Next {
    /// Logits to choose the first token by.
    Logits(Tensor),
    /// The whole answer.
    Generated {
        tokens: Vec<u32>,
        /// Whether a stop token ended the answer.
        stopped: bool,
    },
}

impl Default for Next {
    fn default() -> Self {
        Self::Generated {
            tokens: Vec::new(),
            stopped: false,
        }
    }
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
