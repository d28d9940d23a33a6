//! What is asked of an engine, apart from pictures.

use std::time::Duration;

use vlmnarrate_engine::{Checkpoint, Clip, Engine, Error, ErrorKind, Picture, Request, Sampling};

/// What to say about a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The picture is the whole frame, to be cut into tiles.
    pub whole_frames: bool,
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
    pub(crate) fn request<'a>(
        &'a self,
        pictures: &'a [&'a Picture],
        clip: Option<&'a Clip>,
    ) -> Request<'a> {
        {
            let mut request = Request::new(pictures, &self.prompt);
            request.clip = clip;
            request.whole_frames = self.whole_frames;
            request.system = self.system.as_deref();
            request.max_tokens = self.max_tokens as usize;
            request.sampling = self.sampling;
            request.stop_strings = &self.stop_strings;
            request.choices = &self.choices;
            request
        }
    }
}

/// How large pictures are made for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PictureSize {
    /// Squares of this side, in pixels.
    Square(u32),
    /// Frames as they are.
    Whole,
}

impl PictureSize {
    /// The size that the property `image-size` names, 0 for that of the model.
    pub fn of(image_size: u32, checkpoint: &dyn Checkpoint) -> Self {
        match image_size {
            0 => checkpoint.image_size().map_or(Self::Whole, Self::Square),
            side => Self::Square(side),
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
    pub(crate) fn check(
        &self,
        engine: &dyn Engine,
        checkpoint: &dyn Checkpoint,
    ) -> Result<(), Error> {
        let size = PictureSize::of(self.side, checkpoint);
        let blank = Picture::blank(match size {
            PictureSize::Square(side) => side,
            // Of any size.
            PictureSize::Whole => 64,
        });
        let clip = (self.frames > 1).then(|| Clip {
            times: vec![Duration::ZERO; self.frames],
            duration: Duration::ZERO,
        });
        let pictures = vec![&blank; self.frames];
        let mut request = self.question.request(&pictures, clip.as_ref());
        request.whole_frames |= size == PictureSize::Whole;
        let checked = engine.check(&request);
        checked.map_err(|error| match error.kind {
            ErrorKind::Failed => Error::new(ErrorKind::Settings, error.message),
            _ => error,
        })
    }
}
