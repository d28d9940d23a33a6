//! From a request to a caption: pictures, prompt, prefill, clean text.

use std::ops::ControlFlow;

use candle_core::Tensor;
use vlmnarrate_engine::{Answer, Observer, Picture, Request, Timings};

use crate::{
    backends::{Greedy, ImageInput, Needs, Next, StartJob, Started},
    error::{Error, Result},
    machine::stopwatch::Stopwatch,
    run::{
        decode::{Generated, before_stop},
        model::Model,
        prepare::{PreparedRequest, Squares},
        sampling,
        session::{Last, Session},
    },
    text::prompt::{Prompt, check_token},
};

impl Model {
    /// Describes the pictures; `observer` is asked at each layer and each token whether to go on.
    ///
    /// # Errors
    ///
    /// [`Error::Cancelled`] after a `Break`, and whatever [`check`](Self::check) refuses.
    pub fn describe(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Answer> {
        session.check(self.id)?;
        sampling::check(&request.sampling)?;
        let mut answer = Err(Error::Cancelled);
        self.backend
            .install(&mut || answer = self.run(session, request, observer));
        answer
    }

    fn run(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Answer> {
        let mut watch = Stopwatch::start();
        let prepared = self.prepare(session, request)?;
        let mut answer = Answer::new("");
        answer.probability = Some(1.0);
        if prepared.max_tokens == 0 {
            answer.truncated = true;
            return Ok(answer);
        }
        let squares: Vec<&Picture> = match &prepared.tiled {
            Some(tiled) => tiled.iter().flat_map(|p| &p.pictures).collect(),
            None => request.pictures.to_vec(),
        };
        // Put back once there is another: of a caption that isn't finished the cache holds parts.
        let last = session.last.take();
        let generated = self.generate(
            session,
            request,
            (&prepared, &squares),
            last.as_ref(),
            (&mut watch, &mut answer.timings),
            observer,
        )?;
        let Generated {
            tokens,
            stopped,
            probability,
        } = generated;

        let text = self.prompter.decode(&tokens)?;
        answer.tokens = tokens.len();
        answer.truncated = !stopped;
        answer.probability = Some(probability);
        let mut kept = last.map_or_else(Vec::new, |last| last.squares);
        match prepared.tiled {
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
            prompt: prepared.prompt,
            squares: kept,
            tokens,
        });
        let text = before_stop(&text, request.stop_strings).unwrap_or(&text);
        // max-tokens may have come between two bytes of a character.
        let text = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        text.trim().clone_into(&mut answer.text);
        Ok(answer)
    }

    /// The tokens of an answer, with what the session holds of the last one.
    fn generate(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        (prepared, squares): (&PreparedRequest, &[&Picture]),
        last: Option<&Last>,
        (watch, timings): (&mut Stopwatch, &mut Timings),
        observer: &mut Observer<'_>,
    ) -> Result<Generated> {
        let PreparedRequest {
            prompt,
            max_tokens,
            choices,
            capacity,
            ..
        } = prepared;
        let feature_rows = prompt.images.iter().map(|(_, len)| len).sum();
        let keeps = self.backend.keeps_features(&*session.slot, feature_rows);
        let known = last.filter(|_| keeps);
        let images: Vec<_> = squares
            .iter()
            .enumerate()
            .map(|(i, square)| match known {
                Some(last) if last.has(i, square, prompt) => ImageInput::CachedFeatures {
                    rows: prompt.images[i].1,
                },
                _ => ImageInput::Pixels(square),
            })
            .collect();
        let is_cached =
            |image: &&ImageInput<'_>| matches!(image, ImageInput::CachedFeatures { .. });
        let same = images.iter().take_while(is_cached).count();
        let bytes = images.iter().map(|image| match image {
            ImageInput::CachedFeatures { .. } => 0,
            ImageInput::Pixels(picture) => picture.rgb.len(),
        });

        let reusable = last.filter(|_| self.backend.is_batch_invariant());
        let in_common = reusable.map_or(0, |last| last.in_common(prompt, same));
        // The last token is run in any case, for what follows it.
        session.slot.truncate(in_common.min(prompt.ids.len() - 1));
        let needs = Needs {
            capacity: *capacity,
            max_tokens: *max_tokens,
            feature_rows,
            picture_bytes: bytes.sum(),
        };
        self.backend.reserve(&mut *session.slot, &needs)?;
        timings.preprocess = watch.lap();

        let draft = reusable.map_or(&[][..], |last| &last.tokens);
        let sampling = &request.sampling;
        let is_greedy = sampling::is_greedy(sampling)
            && sampling.repetition_penalty == 1.0
            && request.choices.is_empty();
        let (mut reported, mut ended) = (0, None);
        let mut on_tokens = |tokens: &[u32], observer: &mut Observer<'_>| {
            while reported < tokens.len() && ended.is_none() {
                reported += 1;
                match self.report(&tokens[..reported], request.stop_strings, observer) {
                    Ok(false) => (),
                    other => ended = Some(other),
                }
            }
            match ended {
                None => ControlFlow::Continue(()),
                Some(_) => ControlFlow::Break(()),
            }
        };
        let job = StartJob {
            images: &images,
            prompt,
            greedy: is_greedy.then_some(Greedy {
                max_tokens: *max_tokens,
                draft,
                on_tokens: &mut on_tokens,
            }),
        };
        let started = self.backend.start(&mut *session.slot, job, observer)?;
        let Started {
            next,
            vision,
            prefill,
            decode,
        } = started;
        (timings.vision, timings.prefill) = (vision, prefill);
        watch.lap();
        match next {
            Next::Generated {
                mut tokens,
                stopped,
            } => {
                let by_string = ended.transpose()?.is_some();
                if by_string {
                    tokens.truncate(reported);
                }
                timings.decode = decode;
                Ok(Generated {
                    tokens,
                    stopped: by_string || stopped,
                    probability: 1.0,
                })
            }
            Next::Logits(logits) => {
                let is_same = in_common == prompt.ids.len();
                let generated = match choices.start() {
                    Some(state) => self.choose(session, state, logits, request, observer),
                    None => {
                        self.decode(session, prompt, logits, request, (draft, is_same), observer)
                    }
                };
                timings.decode = decode + watch.lap();
                generated
            }
        }
    }

    /// Runs the prompt, pictures' features in their places, through an emptied cache with room for `room`
    /// tokens more, and returns the logits that choose the first of them.
    ///
    /// Refuses a session of another model, tokens that the model doesn't have, features that don't fit their places,
    /// and a picture at the very end, behind which there is nothing to answer.
    #[doc(hidden)]
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
        let capacity = self.check_memory(Squares::default(), prompt, room)?;
        session.last = None;
        let slot = &mut *session.slot;
        slot.truncate(0);
        let needs = Needs {
            capacity,
            max_tokens: room,
            feature_rows: prompt.images.iter().map(|(_, len)| len).sum(),
            picture_bytes: 0,
        };
        self.backend.reserve(slot, &needs)?;
        self.backend.set_features(slot, features)?;
        self.backend.prefill(slot, prompt, observer)
    }

    /// Runs one more token, for which [`prefill`](Self::prefill) has left room, and returns the logits that choose the
    /// next.
    #[doc(hidden)]
    pub fn step(
        &self,
        session: &mut Session,
        token: u32,
        observer: &mut Observer<'_>,
    ) -> Result<Tensor> {
        session.check(self.id)?;
        check_token(token, self.config.text_config.vocab_size)?;
        let mut logits = self.run_tokens(session, &[token], observer)?;
        Ok(logits.remove(0))
    }

    /// Runs tokens of the vocabulary behind those in the cache and returns the logits behind each.
    pub(crate) fn run_tokens(
        &self,
        session: &mut Session,
        tokens: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>> {
        let room = session.slot.room();
        if tokens.len() > room {
            return Err(Error::Session(format!(
                "{} tokens are more than the {room} that there is room for; prefill with more room",
                tokens.len()
            )));
        }
        self.backend.decode(&mut *session.slot, tokens, observer)
    }
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

    /// The last caption shows in the time only: a draft that is accepted, in part or not at all gives the same
    /// tokens as a session that knows nothing. So does a picture that is known, and a prompt in part.
    #[test]
    fn what_was_said_before_changes_nothing() {
        let mut model = demo(Quantization::Q8_0);
        assert!(model.backend.is_batch_invariant());
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
                session.last.as_ref().unwrap().tokens.clone()
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
