//! What an engine is asked.

use std::time::Instant;

/// What to describe, and how.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Request<'a> {
    /// Pictures in the order of the prompt, of the shape that
    /// [`Checkpoint::image_size`](crate::Checkpoint::image_size) tells, or whole frames.
    pub pictures: &'a [&'a crate::Picture],
    /// The pictures are frames of a video, oldest first.
    pub clip: Option<&'a crate::Clip>,
    /// The pictures are whole frames, of any size and aspect: the engine scales them, or cuts them into tiles.
    pub whole_frames: bool,
    /// What the model is told before the prompt.
    pub system: Option<&'a str>,
    /// What the model is asked about the pictures.
    pub prompt: &'a str,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Each ends the answer where it comes up, and is no part of it.
    pub stop_strings: &'a [String],
    /// The answer is one of these; empty for any answer. With choices `max_tokens` doesn't count.
    pub choices: &'a [String],
    /// After this time the answer is worth nothing. The caller's observer ends the answer then.
    pub deadline: Option<Instant>,
}

impl<'a> Request<'a> {
    /// A request about square pictures, for the likeliest answer of at most 20 tokens.
    pub fn new(pictures: &'a [&'a crate::Picture], prompt: &'a str) -> Self {
        Self {
            pictures,
            clip: None,
            whole_frames: false,
            system: None,
            prompt,
            max_tokens: 20,
            sampling: Sampling::default(),
            stop_strings: &[],
            choices: &[],
            deadline: None,
        }
    }
}

/// Who gets the next turn of an engine that others ask too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// First come, first served.
    #[default]
    Normal,
    /// Before all that are normal: somebody has asked and waits.
    High,
}

/// A setting that an engine may ignore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Setting {
    /// [`Sampling::temperature`].
    Temperature,
    /// [`Sampling::top_p`].
    TopP,
    /// [`Sampling::top_k`].
    TopK,
    /// [`Sampling::min_p`].
    MinP,
    /// [`Sampling::repetition_penalty`].
    RepetitionPenalty,
    /// [`Sampling::seed`].
    Seed,
    /// [`Request::choices`]: the answer is checked, but the model does not know that it must be one of them.
    Choices,
    /// [`Request::whole_frames`] that is false: the server cuts pictures into tiles all the same.
    NoImageSplitting,
    /// [`ModelSettings::device`](crate::ModelSettings::device).
    Device,
    /// [`ModelSettings::dtype`](crate::ModelSettings::dtype).
    DType,
    /// [`ModelSettings::quantization`](crate::ModelSettings::quantization).
    Quantization,
    /// [`ModelSettings::threads`](crate::ModelSettings::threads).
    Threads,
    /// [`ModelSettings::revision`](crate::ModelSettings::revision).
    Revision,
    /// [`ModelSettings::mmproj`](crate::ModelSettings::mmproj).
    Mmproj,
}

/// How the next token is chosen; the default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 always takes the likeliest token.
    pub temperature: f64,
    /// Samples among the likeliest tokens that sum up to this probability; 1 takes all.
    pub top_p: f64,
    /// Samples among so many of the likeliest tokens; 0 takes all.
    pub top_k: usize,
    /// Samples among tokens at least as likely as this share of the likeliest; 0 takes all.
    pub min_p: f64,
    /// Above 1, tokens that are already in the prompt or the answer lose weight.
    pub repetition_penalty: f32,
    /// The same seed gives the same answer.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}
