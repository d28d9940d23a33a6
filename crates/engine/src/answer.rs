//! What an engine says.

use std::time::Duration;

use crate::{EngineInfo, Error, Setting};

/// What an observer is told while an answer is made.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A layer of the encoder or decoder is done, or time has passed.
    Layer,
    /// The answer so far, never cut inside a character.
    Text {
        /// All of it, not what has come since the last event.
        text: &'a str,
        /// Number of tokens so far; more than one may have come since the last event.
        tokens: usize,
    },
    /// The answer is made by another engine than [`Engine::info`](crate::Engine::info) names, or by another model.
    AnsweredBy(&'a EngineInfo),
    /// The engine ignores a setting of the request, because its server has nothing like it. Once for each setting.
    Ignored(Setting),
    /// The server is away. `Continue` waits until it is back, as long as it takes.
    Unavailable(&'a Error),
}

/// A finished answer.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Answer {
    /// Without white space around it.
    pub text: String,
    /// Tokens made, the one that ended the answer not counted.
    pub tokens: usize,
    /// Whether `max_tokens` ended the answer.
    pub truncated: bool,
    /// Probability of this one of the choices, 1 without any; `None` where the engine can't know it.
    pub probability: Option<f64>,
    /// Time spent in each stage.
    pub timings: Timings,
}

impl Answer {
    /// An answer of this text, of which nothing else is known.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }
}

/// Time spent in each stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Pictures and prompt made into what the model takes.
    pub preprocess: Duration,
    /// Vision encoder.
    pub vision: Duration,
    /// Prompt, up to the first token.
    pub prefill: Duration,
    /// Further tokens.
    pub decode: Duration,
}
