//! What a model is asked, and what of that is certain to fail whatever a picture shows.

use std::time::Duration;

use crate::{
    error::Result,
    image::Processor,
    run::model::Model,
    text::{
        choices::Choices,
        prompt::{Content, Message, Span, question, video},
    },
};
use vlmnarrate_engine::Request;

/// What a chat template makes a prompt of.
pub(crate) fn messages(request: &Request<'_>) -> Vec<Message> {
    let places = match request.clip {
        Some(clip) => {
            let seconds: Vec<_> = clip.times.iter().map(Duration::as_secs).collect();
            video(&seconds, clip.duration.as_secs())
        }
        None => vec![Content::Image; request.pictures.len()],
    };
    question(request.system, places, request.prompt)
}

/// Most tokens of the answer.
pub(crate) fn room(request: &Request<'_>, choices: &Choices) -> usize {
    match request.choices {
        [] => request.max_tokens,
        _ => choices.longest(),
    }
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
            tokens: self.config.tokens_per_picture(match request.whole_frames {
                true => whole as usize,
                false => picture.width as usize,
            }),
        });
        let spans: Vec<_> = spans.collect();
        let prompt = self.prompter.encode(&messages(request), &spans)?;
        self.capacity(prompt.ids.len(), room(request, &choices))?;
        Ok(())
    }
}
