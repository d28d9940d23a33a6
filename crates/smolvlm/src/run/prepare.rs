//! A request as the model takes it, and what of a request is certain to fail whatever its pictures show.

use candle_core::Tensor;
use vlmnarrate_engine::{Picture, Request};

use crate::{
    backends::{SequenceSlot, request_size::RequestSize},
    error::{Error, Result},
    image::{self, Processed, Processor},
    run::{
        caches::Claim,
        model::Model,
        session::{PromptKey, Session},
    },
    text::{
        choices::Choices,
        message::{Content, Message, question, video},
        prompt::{Prompt, Span},
    },
};

/// A request as the model takes it.
pub(crate) struct PreparedRequest {
    pub(crate) choices: Choices,
    pub(crate) prompt: Prompt,
    /// Pictures that were cut into tiles.
    pub(crate) tiled: Option<Vec<Processed>>,
    /// Tokens that the answer may have.
    pub(crate) max_tokens: usize,
    /// Tokens of prompt and answer.
    pub(crate) capacity: usize,
    /// Until the caption is finished.
    pub(crate) claim: Option<Claim>,
}

/// Square pictures that a request's are made into.
#[derive(Clone, Copy, Default)]
pub(crate) struct Squares {
    /// Tiles included, of all pictures.
    count: usize,
    /// The most that one picture is cut into.
    most: usize,
    side: usize,
}

/// What a chat template makes a prompt of.
fn messages(request: &Request<'_>) -> Vec<Message> {
    let places = match request.clip {
        Some(clip) => video(clip),
        None => vec![Content::Image; request.pictures.len()],
    };
    question(request.system, places, request.prompt)
}

/// Most tokens of the answer.
fn max_tokens(request: &Request<'_>, choices: &Choices) -> usize {
    match request.choices {
        [] => request.max_tokens,
        _ => choices.longest(),
    }
}

impl Model {
    /// Checks that requests like this one can be answered whatever their pictures show: of the pictures only the number
    /// counts, and their side where they are not cut into tiles.
    ///
    /// # Errors
    ///
    /// A prompt that the chat template refuses or that holds a picture's place, choices that can't be written, and more
    /// tokens than the model has positions.
    pub fn check(&self, request: &Request<'_>) -> Result<()> {
        let choices = Choices::encode(&self.prompter, &self.name, request.choices)?;
        let whole = Processor::new(&self.preprocessor).side;
        // How many tiles there will be is not known yet.
        let sides = request
            .pictures
            .iter()
            .map(|picture| match request.whole_frames {
                true => whole,
                false => picture.width,
            });
        let spans: Vec<_> = sides.map(|side| self.grid_span((0, 0), side)).collect();
        let prompt = self.prompter.encode(&messages(request), &spans)?;
        self.capacity(prompt.ids.len(), max_tokens(request, &choices))?;
        Ok(())
    }

    /// The request as tokens, and its pictures as squares.
    pub(crate) fn prepare(
        &self,
        session: &mut Session,
        request: &Request<'_>,
    ) -> Result<PreparedRequest> {
        for picture in request.pictures {
            match request.whole_frames {
                true => image::check(picture)?,
                false => self.check_picture(picture)?,
            }
        }
        let choices = Choices::encode(&self.prompter, &self.name, request.choices)?;
        let max_tokens = max_tokens(request, &choices);
        let pictures = request.pictures.iter().copied();
        let processor = request
            .whole_frames
            .then(|| Processor::new(&self.preprocessor));
        let grid = |picture: &Picture| match &processor {
            Some(processor) => processor.tiles(picture.width, picture.height),
            None => (0, 0),
        };
        let side = |picture: &Picture| processor.as_ref().map_or(picture.width, |p| p.side);
        let counts = pictures.clone().map(|p| {
            let (rows, cols) = grid(p);
            rows * cols + 1
        });
        let squares = Squares {
            count: counts.clone().sum(),
            most: counts.max().unwrap_or(0),
            side: pictures.clone().map(side).max().unwrap_or(0) as usize,
        };
        // Small tiles are many: no more are cut than there is room for.
        self.capacity(squares.count, max_tokens)?;
        let spans = pictures.clone().map(|p| self.grid_span(grid(p), side(p)));
        let key = PromptKey {
            messages: messages(request),
            spans: spans.collect(),
        };
        let prompt = session.prompt(&self.prompter, key)?;
        prompt.check(self.config.text_config.vocab_size)?;
        let rows = self.backend.limits().rows;
        let (capacity, claim) = self.claim_memory(session, squares, (&prompt, rows), max_tokens)?;
        let tiled = processor.map(|processor| pictures.map(|p| processor.split(p)).collect());
        Ok(PreparedRequest {
            choices,
            prompt,
            tiled,
            max_tokens,
            capacity,
            claim,
        })
    }

    /// How a square of this side stands in the prompt, behind a grid of tiles of the same side.
    pub(crate) fn grid_span(&self, grid: (usize, usize), side: u32) -> Span {
        Span {
            grid,
            tokens: self.config.tokens_per_picture(side as usize),
        }
    }

    /// `tokens` of a prompt and `room` more, if the model has so many positions.
    pub(crate) fn capacity(&self, tokens: usize, room: usize) -> Result<usize> {
        let limit = self.config.text_config.max_position_embeddings;
        match tokens.checked_add(room) {
            Some(capacity) if capacity <= limit => Ok(capacity),
            _ => Err(Error::TooManyTokens {
                prompt: tokens,
                answer: room,
                limit,
            }),
        }
    }

    /// That each picture's features fit the place that the prompt has for them.
    pub(crate) fn check_features(&self, prompt: &Prompt, features: &[Tensor]) -> Result<()> {
        let (places, width) = (&prompt.images, self.config.text_config.hidden_size);
        if features.len() != places.len() {
            return Err(Error::Picture(format!(
                "features of {} pictures for {} places in the prompt",
                features.len(),
                places.len()
            )));
        }
        for (features, (_, len)) in features.iter().zip(places) {
            if features.dims() != [*len, width] {
                return Err(Error::Picture(format!(
                    "features of shape {:?} in a place of {len} tokens, which takes [{len}, {width}]",
                    features.dims()
                )));
            }
        }
        Ok(())
    }

    /// Claims the memory of a request whose prompt is run so many rows at once; returns the tokens of prompt and answer
    /// too.
    pub(crate) fn claim_memory(
        &self,
        session: &Session,
        squares: Squares,
        (prompt, rows): (&Prompt, usize),
        max_tokens: usize,
    ) -> Result<(usize, Option<Claim>)> {
        let capacity = self.capacity(prompt.ids.len(), max_tokens)?;
        let size = RequestSize {
            squares: squares.count,
            tiles: squares.most,
            side: squares.side,
            tokens: prompt.ids.len(),
            rows: prompt.ids.len().min(rows),
            capacity,
        };
        let Some(mut memory) = self.backend.memory(&size) else {
            return Ok((capacity, None));
        };
        let holds = |slot: &dyn SequenceSlot| slot.capacity() >= capacity;
        if session.cache.look(holds) == Some(true) {
            memory.cache = 0;
        }
        loop {
            match Claim::new(memory) {
                Ok(claim) => return Ok((capacity, Some(claim))),
                Err(_) if self.caches.evict(&session.cache) => (),
                Err(shortage) => {
                    return Err(Error::Memory {
                        megabytes: memory.bytes() / 1_000_000,
                        pictures: size.squares,
                        tokens: size.capacity,
                        shortage: shortage.to_string(),
                    });
                }
            }
        }
    }
}
