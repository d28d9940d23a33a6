//! From a request to a caption: pictures, prompt, prefill, clean text.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use crate::{
    backends::network::{Network, Tensors},
    error::{Error, Result},
    image::{self, Processed, Processor},
    run::{
        decode::{Decoded, before_stop},
        device::pooled,
        memory::{Work, has_room},
        model::Model,
        request, sampling,
        session::{Last, Question, Session},
    },
    text::{
        choices::Choices,
        prompt::{Prompt, Span, check_token},
    },
};
use vlmnarrate_engine::{Answer, Observer, Picture, Request, Timings};

/// A square picture: its features, or the pixels to make them of.
enum Sight {
    Known(Tensor),
    New(Tensor),
}

/// Splits the time that passes into stages.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

impl Model {
    /// Describes the pictures; `observer` is asked at each layer and each token whether to go on.
    pub fn describe(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Answer> {
        session.check(self.id)?;
        sampling::check(&request.sampling)?;
        match &self.network {
            Network::Tensors(_) => self
                .pool
                .install(|| pooled(|| self.run(session, request, observer))),
            // Callers that wait for a GPU must not wait for each other.
            #[cfg(feature = "cuda")]
            Network::Cuda(_) => self.run(session, request, observer),
        }
    }

    fn run(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Answer> {
        let mut watch = Stopwatch(Instant::now());
        let mut timings = Timings::default();
        let Posed {
            choices,
            prompt,
            tiled,
            room,
        } = self.pose(session, request)?;
        if room == 0 {
            let mut answer = Answer::new("");
            answer.truncated = true;
            answer.probability = Some(1.0);
            answer.timings = timings;
            return Ok(answer);
        }
        let squares: Vec<&Picture> = match &tiled {
            Some(tiled) => tiled.iter().flat_map(|p| &p.pictures).collect(),
            None => request.pictures.to_vec(),
        };
        // Put back once there is another: of one that isn't finished the cache holds parts.
        let last = session.last.take();
        let asked = Asked {
            request,
            choices: &choices,
            prompt: &prompt,
            squares: &squares,
            room,
            last: last.as_ref(),
        };
        timings.preprocess = watch.lap();
        let (decoded, features) = match &self.network {
            Network::Tensors(tensors) => {
                self.run_tensors(tensors, session, &asked, &mut timings, observer)?
            }
            #[cfg(feature = "cuda")]
            Network::Cuda(network) => {
                let decoded = self.run_cuda(network, session, &asked, &mut timings, observer)?;
                (decoded, Vec::new())
            }
        };
        let Decoded {
            ids,
            stopped,
            probability,
        } = decoded;

        let text = self.prompter.decode(&ids)?;
        let tokens = ids.len();
        let mut kept = last.map_or_else(Vec::new, |last| last.squares);
        match tiled {
            Some(tiled) => kept = tiled.into_iter().flat_map(|p| p.pictures).collect(),
            // Where those of the last were: new memory would take longer than to copy.
            None => {
                kept.truncate(squares.len());
                let mut squares = squares.into_iter();
                for (kept, square) in kept.iter_mut().zip(&mut squares) {
                    kept.clone_from(square);
                }
                kept.extend(squares.cloned());
            }
        }
        session.last = Some(Last {
            prompt,
            squares: kept,
            features,
            ids,
        });
        let text = before_stop(&text, request.stop_strings).unwrap_or(&text);
        // max-tokens may have come between two bytes of a character.
        let text = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let mut answer = Answer::new(text.trim());
        answer.tokens = tokens;
        answer.truncated = !stopped;
        answer.probability = Some(probability);
        answer.timings = timings;
        Ok(answer)
    }

    /// The request as tokens, and its pictures as squares.
    fn pose(&self, session: &mut Session, request: &Request<'_>) -> Result<Posed> {
        for picture in request.pictures {
            match request.whole_frames {
                true => image::check(picture)?,
                false => self.check_picture(picture)?,
            }
        }
        let choices = self.choices(request.choices)?;
        let messages = request::messages(request);
        let pictures = request.pictures.iter().copied();
        let room = request::room(request, &choices);
        let processor = request
            .whole_frames
            .then(|| Processor::new(&self.preprocessor));
        let grid = |picture: &Picture| match &processor {
            Some(processor) => processor.tiles(picture.width, picture.height),
            None => (0, 0),
        };
        let side = |picture: &Picture| processor.as_ref().map_or(picture.width, |p| p.side);
        let squares = pictures.clone().map(|p| {
            let (rows, cols) = grid(p);
            rows * cols + 1
        });
        // Small tiles are many: no more are cut than there is room for.
        self.capacity(squares.clone().sum(), room)?;
        let spans = pictures.clone().map(|p| Span {
            grid: grid(p),
            tokens: self.config.tokens_per_picture(side(p) as usize),
        });
        let question = Question {
            messages,
            spans: spans.collect(),
        };
        let prompt = session.prompt(&self.prompter, question)?;
        prompt.check(self.config.text_config.vocab_size)?;
        self.has_room(&Work {
            squares: squares.clone().sum(),
            tiles: squares.max().unwrap_or(0),
            side: pictures.clone().map(side).max().unwrap_or(0) as usize,
            tokens: prompt.ids.len(),
            capacity: self.capacity(prompt.ids.len(), room)?,
            packed: self.is_packed(),
        })?;
        let tiled = processor.map(|processor| pictures.map(|p| processor.split(p)).collect());
        Ok(Posed {
            choices,
            prompt,
            tiled,
            room,
        })
    }

    /// With candle's tensors. Returns the features too.
    fn run_tensors(
        &self,
        tensors: &Tensors,
        session: &mut Session,
        asked: &Asked<'_>,
        timings: &mut Timings,
        observer: &mut Observer<'_>,
    ) -> Result<(Decoded, Vec<Tensor>)> {
        let Asked {
            prompt, last, room, ..
        } = *asked;
        let mut watch = Stopwatch(Instant::now());
        let sights = asked.squares.iter().enumerate().map(|(i, square)| {
            let known = last.and_then(|last| last.features(i, square));
            Ok(match known {
                Some(features) => Sight::Known(features),
                None => Sight::New(self.pixels(square)?),
            })
        });
        let sights = sights.collect::<Result<Vec<_>>>()?;
        timings.preprocess += watch.lap();

        let known = |sight: &&Sight| matches!(sight, Sight::Known(_));
        let same = sights.iter().take_while(known).count();
        let features = sights.into_iter().map(|sight| match sight {
            Sight::Known(features) => Ok(features),
            Sight::New(pixels) => tensors.vision.forward(&pixels, observer),
        });
        let features = features.collect::<Result<Vec<_>>>()?;
        // A GPU has only been told so far.
        tensors.device.synchronize()?;
        timings.vision = watch.lap();

        let last = last.filter(|_| tensors.decoder.is_exact());
        let in_common = last.map_or(0, |last| last.in_common(prompt, same));
        let logits = self.run_prompt(
            tensors,
            session,
            in_common,
            prompt,
            (&features, room),
            observer,
        )?;
        timings.prefill = watch.lap();

        let is_same = in_common == prompt.ids.len();
        let decoded = self.continue_from(session, asked, logits, is_same, observer)?;
        timings.decode = watch.lap();
        Ok((decoded, features))
    }

    /// `tokens` of a prompt and `room` more, if the model has so many positions.
    pub(crate) fn capacity(&self, tokens: usize, room: usize) -> Result<usize> {
        let limit = self.config.text_config.max_position_embeddings;
        match tokens.checked_add(room) {
            Some(capacity) if capacity <= limit => Ok(capacity),
            _ => Err(Error::Prompt(format!(
                "{tokens} tokens and max-tokens {room} exceed the model's {limit}; lower frames, \
                 image-size or max-tokens, or shorten the prompt"
            ))),
        }
    }

    /// That each picture's features fit the place that the prompt has for them.
    fn check_features(&self, prompt: &Prompt, features: &[Tensor]) -> Result<()> {
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

    /// Whether kernels of our own do all of it.
    fn is_packed(&self) -> bool {
        matches!(&self.network, Network::Tensors(t) if t.vision.is_packed() && t.decoder.is_exact())
    }

    fn has_room(&self, work: &Work) -> Result<()> {
        let bytes = match &self.network {
            Network::Tensors(tensors) if tensors.device.is_cpu() => {
                work.bytes(&self.config, tensors.dtype)
            }
            // An allocation that fails on a GPU is an error and no more.
            _ => return Ok(()),
        };
        has_room(bytes).map_err(|shortage| Error::Memory {
            megabytes: bytes / 1_000_000,
            pictures: work.squares,
            tokens: work.capacity,
            shortage: shortage.to_string(),
        })
    }

    /// Runs the prompt, pictures' features in their places, through an emptied cache with room for `room`
    /// tokens more, and returns the logits that choose the first of them.
    ///
    /// Refuses a session of another model, tokens that the model doesn't have, features that don't fit their places,
    /// and a picture at the very end, behind which there is nothing to answer.
    pub fn prefill(
        &self,
        session: &mut Session,
        prompt: &Prompt,
        features: &[Tensor],
        room: usize,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        session.check(self.id)?;
        prompt.check(self.config.text_config.vocab_size)?;
        self.check_features(prompt, features)?;
        self.has_room(&Work {
            squares: 0,
            tiles: 0,
            side: 0,
            tokens: prompt.ids.len(),
            capacity: self.capacity(prompt.ids.len(), room)?,
            packed: self.is_packed(),
        })?;
        session.last = None;
        match &self.network {
            Network::Tensors(tensors) => {
                self.run_prompt(tensors, session, 0, prompt, (features, room), observer)
            }
            #[cfg(feature = "cuda")]
            Network::Cuda(network) => self.prefill_cuda(network, session, prompt, (features, room)),
        }
    }

    /// As [`prefill`](Self::prefill), with so many of the first tokens in the cache from the last time.
    fn run_prompt(
        &self,
        tensors: &Tensors,
        session: &mut Session,
        in_common: usize,
        prompt: &Prompt,
        (features, room): (&[Tensor], usize),
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let capacity = self.capacity(prompt.ids.len(), room)?;
        let decoder = &tensors.decoder;
        let cache = session.cache.tensors();
        let embeds = decoder.embed(&prompt.ids)?;
        for (&(start, _), features) in prompt.images.iter().zip(features) {
            embeds.slice_set(&features.contiguous()?, 0, start)?;
        }
        // The last is run in any case, for what follows it.
        cache.truncate(in_common.min(prompt.ids.len() - 1));
        cache.reserve(capacity, embeds.dtype(), embeds.device())?;
        // Nothing is held where there was no room.
        let held = cache.len();
        let embeds = embeds.narrow(0, held, prompt.ids.len() - held)?;
        let logits = decoder.forward(embeds, 1, cache, observer)?;
        Ok(logits.squeeze(0)?)
    }

    /// Runs one more token, for which [`prefill`](Self::prefill) has left room, and returns the logits that choose the
    /// next.
    pub fn step(
        &self,
        session: &mut Session,
        token: u32,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        session.check(self.id)?;
        check_token(token, self.config.text_config.vocab_size)?;
        let mut logits = self.network.run(&mut session.cache, &[token], observer)?;
        Ok(logits.remove(0))
    }
}

/// A request as the model takes it.
struct Posed {
    choices: Choices,
    prompt: Prompt,
    /// Pictures that were cut.
    tiled: Option<Vec<Processed>>,
    /// Tokens that the caption may have.
    room: usize,
}

/// The same with what is known from before.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) request: &'a Request<'a>,
    pub(crate) choices: &'a Choices,
    pub(crate) prompt: &'a Prompt,
    pub(crate) squares: &'a [&'a Picture],
    pub(crate) room: usize,
    pub(crate) last: Option<&'a Last>,
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use vlmnarrate_engine::{Event, Quantization, Sampling};

    use super::*;
    use crate::{Checkpoint, LoadOptions, Prompter, Source};

    fn demo(quantization: Quantization) -> Model {
        let checkpoint = Checkpoint::open(&Source::Demo).unwrap();
        let options = LoadOptions {
            quantization,
            ..Default::default()
        };
        Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(())).unwrap()
    }

    /// What was said before shows in the time only: guesses that come true, in part or not at all give the same
    /// tokens as a session that knows nothing. So does a picture that is known, and a prompt in part.
    #[test]
    fn what_was_said_before_changes_nothing() {
        let mut model = demo(Quantization::Q8_0);
        assert!(model.network.is_exact());
        // To go on behind the end, where it isn't sure of anything.
        model.stop.clear();
        let side = model.config.vision_config.image_size as u32;
        let mut rng = fastrand::Rng::with_seed(5);
        let prompts = ["Describe this frame in one sentence.", "What?"];
        let plain = Sampling::default();
        let hot = Sampling {
            temperature: 1.5,
            repetition_penalty: 1.1,
            ..plain
        };
        let (mut session, mut steps) = (model.session(), 0);
        let (mut rgb, mut prompt, mut sampling) = ([0; 3], prompts[0], plain);
        for i in 0..90 {
            // A colour that stays for a while, sometimes with another question.
            match i % 6 {
                0 => rgb = std::array::from_fn(|_| rng.u8(..)),
                2 => rgb[0] = rgb[0].wrapping_add(3),
                3 => prompt = prompts[rng.usize(..2)],
                4 => sampling = [plain, hot][rng.usize(..2)],
                _ => (),
            }
            let count = 1 + i / 2 % 2;
            let pixels = rgb.repeat((side * side) as usize);
            let picture = Picture::new(side, side, pixels).unwrap();
            let black = Picture::new(side, side, vec![0; (side * side * 3) as usize]).unwrap();
            let both = [&black, &picture];
            let mut request = Request::new(&both[2 - count..], prompt);
            request.max_tokens = 36;
            request.sampling = Sampling {
                seed: i as u64 / 3,
                ..sampling
            };
            let mut said = [Vec::new(), Vec::new()];
            let describe = |session: &mut Session, said: &mut Vec<String>| {
                let observer = &mut |event: Event<'_>| {
                    if let Event::Text { text, .. } = event {
                        said.push(text.to_owned());
                    }
                    ControlFlow::Continue(())
                };
                model.describe(session, &request, observer).unwrap();
                session.last.as_ref().unwrap().ids.clone()
            };
            let [known, fresh] = &mut said;
            let ids = describe(&mut session, known);
            assert_eq!(describe(&mut model.session(), fresh), ids, "caption {i}");
            assert_eq!(known, fresh);
            steps += ids.len();
        }
        assert_eq!(steps, 90 * 36);
    }

    fn refused(model: &Model, pictures: &[&Picture], splitting: bool) -> String {
        let mut request = Request::new(pictures, "");
        request.whole_frames = splitting;
        request.max_tokens = 1;
        let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
        let described = model.describe(&mut model.session(), &request, go_on);
        described.unwrap_err().to_string()
    }

    #[test]
    fn more_tiles_than_positions_are_not_cut() {
        let mut model = demo(Quantization::None);
        model.preprocessor.size.longest_edge = 4096;
        model.preprocessor.max_image_size.longest_edge = 1;
        let picture = Picture::new(64, 48, vec![0; 64 * 48 * 3]).unwrap();
        // 4096 × 3072, and the whole picture.
        let error = refused(&model, &[&picture], true);
        assert!(error.contains("12582913 tokens"), "{error}");
    }

    #[test]
    fn a_prompt_of_nothing_is_an_error() {
        let mut model = demo(Quantization::None);
        let tokenizer = Checkpoint::open(&Source::Demo)
            .and_then(|checkpoint| checkpoint.tokenizer())
            .unwrap();
        model.prompter = Prompter::new(String::new(), tokenizer).unwrap();
        let error = refused(&model, &[], false);
        assert!(error.contains("after tokenization"), "{error}");
    }
}
