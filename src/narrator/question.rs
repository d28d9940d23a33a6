//! What is asked of an engine, apart from pictures.

use std::time::Duration;

use super::engine::{Checkpoint, Clip, Engine, Error, ErrorKind, Picture, Request, Sampling};

/// What to say about a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The picture is the whole frame, to be cut into tiles.
    pub splitting: bool,
    pub system: Option<String>,
    pub prompt: String,
    pub max_tokens: u32,
    pub sampling: Sampling,
    pub stop_strings: Vec<String>,
    /// What the caption is one of; empty for anything.
    pub choices: Vec<String>,
    /// Tell of the text at each token.
    pub partial: bool,
}

impl Question {
    pub(super) fn request<'a>(
        &'a self,
        pictures: &'a [&'a Picture],
        clip: Option<&'a Clip>,
    ) -> Request<'a> {
        Request {
            pictures,
            clip,
            splitting: self.splitting,
            system: self.system.as_deref(),
            prompt: &self.prompt,
            max_tokens: self.max_tokens as usize,
            sampling: self.sampling,
            stop_strings: &self.stop_strings,
            choices: &self.choices,
        }
    }
}

/// What the settings ask about every frame or clip.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    pub question: Question,
    pub frames: usize,
    /// Of the pictures; 0 for that of the model.
    pub side: u32,
}

impl Turn {
    /// Whether the engine can answer what the settings ask. What can't be answered now is for the settings to change,
    /// whatever it is of one frame.
    pub(super) fn check(
        &self,
        engine: &dyn Engine,
        checkpoint: &dyn Checkpoint,
    ) -> Result<(), Error> {
        let side = match self.side {
            0 => checkpoint.image_size(),
            side => side,
        };
        let blank = Picture {
            width: side,
            height: side,
            rgb: vec![0; 3 * (side as usize).pow(2)],
        };
        let clip = (self.frames > 1).then(|| Clip {
            times: vec![Duration::ZERO; self.frames],
            duration: Duration::ZERO,
        });
        let pictures = vec![&blank; self.frames];
        let checked = engine.check(&self.question.request(&pictures, clip.as_ref()));
        checked.map_err(|error| match error.kind {
            ErrorKind::Failed => Error::new(ErrorKind::Settings, error.message),
            _ => error,
        })
    }
}
