//! What a model is asked, and what of that is certain to fail whatever a picture shows.

use std::time::Duration;

use super::{
    Content, Message, Model, Picture, Processor, Result, Sampling, Span, choices::Choices,
    question, video,
};

/// What to describe and how.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// In the order of the prompt: squares, already of the side that the encoder is to run at, or
    /// with `splitting` whatever there is.
    pub pictures: &'a [&'a Picture],
    /// They are frames of a video, oldest first.
    pub clip: Option<&'a Clip>,
    /// Cut each picture into tiles as the reference's processor does, for detail.
    pub splitting: bool,
    pub system: Option<&'a str>,
    pub prompt: &'a str,
    /// Most tokens of the caption.
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Each ends the caption where it comes up, and is no part of it.
    pub stop_strings: &'a [String],
    /// What the caption is one of; empty for anything. Then `max_tokens` doesn't count.
    pub choices: &'a [String],
}

impl Request<'_> {
    /// What a chat template makes a prompt of.
    pub(super) fn messages(&self) -> Vec<Message> {
        let places = match self.clip {
            Some(clip) => {
                let seconds: Vec<_> = clip.times.iter().map(Duration::as_secs).collect();
                video(&seconds, clip.duration.as_secs())
            }
            None => vec![Content::Image; self.pictures.len()],
        };
        question(self.system, places, self.prompt)
    }

    /// Most tokens of the answer.
    pub(super) fn room(&self, choices: &Choices) -> usize {
        match self.choices {
            [] => self.max_tokens,
            _ => choices.longest(),
        }
    }
}

/// When the frames of a video were taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clip {
    /// One for each picture, from the start of the clip.
    pub times: Vec<Duration>,
    pub duration: Duration,
}

impl Model {
    /// Whether requests as this one can be answered whatever their pictures show: of these only the number counts, and
    /// the side where they are not cut into tiles.
    ///
    /// # Errors
    ///
    /// A prompt that the chat template refuses or that holds a picture's place, choices that can't be written, and more
    /// tokens than the model has positions.
    pub fn check(&self, request: &Request<'_>) -> Result<()> {
        let choices = self.choices(request.choices)?;
        let whole = Processor::new(&self.preprocessor).side;
        let spans = request.pictures.iter().map(|picture| Span {
            // Nobody knows yet how many tiles there will be.
            grid: (0, 0),
            tokens: self.config.tokens_per_picture(match request.splitting {
                true => whole as usize,
                false => picture.width as usize,
            }),
        });
        let spans: Vec<_> = spans.collect();
        let prompt = self.prompter.encode(&request.messages(), &spans)?;
        self.capacity(prompt.ids.len(), request.room(&choices))?;
        Ok(())
    }
}
