//! From a request to a caption: pictures, prompt, the sequence that the scheduler runs, clean text.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use candle_core::Tensor;
use vlmnarrate_engine::{Answer, Event, Observer, Picture, Priority, Request, Timings};

use crate::{
    backends::{Needs, SequenceSlot, StepInput, StepJob, StepOutput, layer_done},
    error::{Error, Result},
    machine::stopwatch::Stopwatch,
    run::{
        caches::{CachePlace, Claim},
        decode::{End, Generation},
        model::Model,
        prepare::{PreparedRequest, Squares},
        sampling,
        scheduler::{Caller, Sequence, Turn, Update, gone},
        session::{Last, Session},
        speculation::Speculation,
    },
    text::prompt::{Prompt, check_token},
};

/// How often a caller is asked whether to go on while nothing comes.
const POLL: Duration = Duration::from_millis(5);

/// An answer as its caller heard it.
struct Heard {
    tokens: Vec<u32>,
    /// By a stop token or string, not by `max_tokens`.
    stopped: bool,
}

impl Model {
    /// Waits until a caption would begin at once. The next caption of the session uses the turn up.
    ///
    /// # Errors
    ///
    /// [`Error::Cancelled`] after a `Break`, [`Error::Session`] for a session of another model.
    pub fn wait_turn(
        &self,
        session: &mut Session,
        priority: Priority,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        session.check(self.id)?;
        if session.turn.is_none() {
            session.turn = Some(self.turn(priority, observer)?);
        }
        Ok(())
    }

    fn turn(&self, priority: Priority, observer: &mut Observer<'_>) -> Result<Turn> {
        let turn = self
            .scheduler
            .turns()
            .wait(priority, || observer(Event::Layer));
        turn.map_err(|_| Error::Cancelled)
    }

    /// Describes the pictures; `observer` is called with the text of each token and every few milliseconds, and may end
    /// the caption.
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
        let turn = match session.turn.take() {
            Some(turn) => turn,
            None => self.turn(Priority::Normal, observer)?,
        };
        let mut watch = Stopwatch::start();
        let prepared = self.prepare(session, request)?;
        if prepared.max_tokens == 0 {
            let mut answer = Answer::new("");
            answer.probability = Some(1.0);
            answer.truncated = true;
            return Ok(answer);
        }
        // Before the work rather than in it: a caller that doesn't want to go on costs nothing.
        layer_done(observer)?;
        let (updates, heard) = mpsc::channel();
        let caller = Caller {
            updates,
            cancelled: Arc::new(AtomicBool::new(false)),
            sent: 0,
        };
        let cancelled = caller.cancelled.clone();
        let (mut sequence, _claim) = self.sequence(session, request, prepared, (turn, caller))?;
        sequence.timings.preprocess = watch.lap();
        self.scheduler.submit(sequence)?;
        let (sequence, heard) = self.listen(request, &heard, &cancelled, observer)?;

        let Sequence {
            slot,
            prompt,
            squares,
            generation,
            timings,
            ..
        } = *sequence;
        session.cache.put(slot);
        let Heard { tokens, stopped } = heard?;
        let text = self.prompter.decode(&tokens)?;
        let text = before_stop(&text, request.stop_strings).unwrap_or(&text);
        // max-tokens may have come between two bytes of a character.
        let text = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let mut answer = Answer::new(text.trim());
        answer.tokens = tokens.len();
        answer.truncated = !stopped;
        answer.probability = Some(generation.probability());
        answer.timings = timings;
        session.last = Some(Last {
            prompt,
            squares,
            tokens,
        });
        Ok(answer)
    }

    /// The work of a caption, with what the session holds of the last one.
    fn sequence(
        &self,
        session: &mut Session,
        request: &Request<'_>,
        prepared: PreparedRequest,
        (turn, caller): (Turn, Caller),
    ) -> Result<(Sequence, Option<Claim>)> {
        let PreparedRequest {
            choices,
            prompt,
            tiled,
            max_tokens,
            capacity,
            claim,
        } = prepared;
        // Put back once there is another: of a caption that isn't finished the cache holds parts.
        let last = session.last.take();
        let mut slot = session
            .cache
            .take()
            .unwrap_or_else(|| self.backend.new_slot());
        let shown: Vec<&Picture> = match &tiled {
            Some(tiled) => tiled.iter().flat_map(|p| &p.pictures).collect(),
            None => request.pictures.to_vec(),
        };
        let mut needs = Needs {
            capacity,
            max_tokens,
            pictures: shown.len(),
            feature_rows: prompt.images.iter().map(|(_, len)| len).sum(),
            picture_bytes: 0,
        };
        let kept = slot.kept_features(&needs);
        let is_known = |(i, square): (usize, &&Picture)| match &last {
            Some(last) => i < kept && last.has(i, square, &prompt),
            None => false,
        };
        let known: Vec<bool> = shown.iter().enumerate().map(is_known).collect();
        let to_encode = (0..shown.len()).filter(|i| !known[*i]).collect::<Vec<_>>();
        needs.picture_bytes = to_encode.iter().map(|i| shown[*i].rgb.len()).sum();
        let same = known.iter().take_while(|known| **known).count();

        let reusable = last.as_ref().filter(|_| self.backend.is_batch_invariant());
        let in_common = reusable.map_or(0, |last| last.in_common(&prompt, same));
        // The last token is run in any case, for what follows it.
        slot.truncate(in_common.min(prompt.ids.len() - 1));
        self.reserve(slot.as_mut(), &needs, &session.cache)?;

        let draft = reusable.map_or_else(Vec::new, |last| last.tokens.clone());
        let speculation = Speculation::new(draft, in_common == prompt.ids.len());
        let generation = Generation::new(
            &prompt,
            (max_tokens, self.stop.clone()),
            request.sampling,
            choices.start(),
            speculation,
        );
        let mut squares = last.map_or_else(Vec::new, |last| last.squares);
        match tiled {
            Some(tiled) => squares = tiled.into_iter().flat_map(|p| p.pictures).collect(),
            // Where those of the last were: new memory would take longer than to copy.
            None => {
                squares.truncate(shown.len());
                for (i, square) in shown.into_iter().enumerate() {
                    match squares.get_mut(i) {
                        Some(_) if known[i] => (),
                        Some(old) => old.clone_from(square),
                        None => squares.push(square.clone()),
                    }
                }
            }
        }
        let sequence = Sequence {
            slot,
            prompt,
            squares,
            to_encode: to_encode.into(),
            generation,
            timings: Timings::default(),
            turn: Some(turn),
            caller,
            since: 0,
        };
        Ok((sequence, claim))
    }

    /// Makes room in a slot, that of caches which nobody uses if there is no other.
    fn reserve(
        &self,
        slot: &mut dyn SequenceSlot,
        needs: &Needs,
        place: &Arc<CachePlace>,
    ) -> Result<()> {
        loop {
            match self.backend.reserve(slot, needs) {
                Err(_) if self.caches.evict(place) => (),
                result => return result,
            }
        }
    }

    /// Hears what comes of a sequence until it has ended. Returns it, and the answer unless that has failed.
    fn listen(
        &self,
        request: &Request<'_>,
        heard: &Receiver<Update>,
        cancelled: &AtomicBool,
        observer: &mut Observer<'_>,
    ) -> Result<(Box<Sequence>, Result<Heard>)> {
        // Those of choices are not looked for.
        let stop_strings = match request.choices {
            [] => request.stop_strings,
            _ => &[],
        };
        let (mut tokens, mut ended) = (Vec::new(), None);
        loop {
            match heard.recv_timeout(POLL) {
                Ok(Update::Tokens(new)) => {
                    for token in new {
                        if ended.is_none() {
                            tokens.push(token);
                            ended = match self.report(&tokens, stop_strings, observer) {
                                Ok(false) => None,
                                end => Some(end.map(|_| ())),
                            };
                        }
                    }
                }
                Ok(Update::Finished(sequence, result)) => {
                    let stopped = ended.is_some();
                    let end = ended.unwrap_or(Ok(()));
                    let heard = match (end, result) {
                        (Err(error), _) => Err(error),
                        (Ok(()), _) if stopped => Ok(Heard { tokens, stopped }),
                        (Ok(()), Ok(end)) => Ok(Heard {
                            tokens,
                            stopped: end == End::Stopped,
                        }),
                        (Ok(()), Err(error)) => Err(error),
                    };
                    return Ok((sequence, heard));
                }
                Err(RecvTimeoutError::Timeout) => {
                    if ended.is_none() && observer(Event::Layer).is_break() {
                        ended = Some(Err(Error::Cancelled));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
            if ended.is_some() {
                cancelled.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Shows the text so far, unless its last character is still missing bytes. Says whether one of
    /// the strings that end it has come.
    fn report(
        &self,
        ids: &[u32],
        stop_strings: &[String],
        observer: &mut Observer<'_>,
    ) -> Result<bool> {
        let text = self.prompter.decode(ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(false);
        }
        let before = before_stop(&text, stop_strings);
        let event = Event::Text {
            text: before.unwrap_or(&text).trim_start(),
            tokens: ids.len(),
        };
        match observer(event) {
            ControlFlow::Continue(()) => Ok(before.is_some()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
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
        let (capacity, _claim) =
            self.claim_memory(session, Squares::default(), (prompt, usize::MAX), room)?;
        session.last = None;
        let needs = Needs {
            capacity,
            max_tokens: room,
            pictures: features.len(),
            feature_rows: prompt.images.iter().map(|(_, len)| len).sum(),
            picture_bytes: 0,
        };
        let place = session.cache.clone();
        session.with_slot(self.backend.as_ref(), |slot| {
            slot.truncate(0);
            self.reserve(slot, &needs, &place)?;
            self.backend.set_features(slot, features)?;
            let input = StepInput::Prompt(prompt, prompt.ids.len());
            Ok(self.logits(slot, input, observer)?.remove(0))
        })
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
        session.with_slot(self.backend.as_ref(), |slot| {
            if slot.room() == 0 {
                return Err(Error::Session(
                    "there is no room for another token; prefill with more room".into(),
                ));
            }
            let input = StepInput::Tokens(&[token]);
            Ok(self.logits(slot, input, observer)?.remove(0))
        })
    }

    /// Logits behind each row that wants them, outside of the batch.
    fn logits(
        &self,
        slot: &mut dyn SequenceSlot,
        input: StepInput<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Tensor>> {
        let job = StepJob {
            slot,
            input,
            greedy: None,
        };
        let mut stepped = self.backend.step(&mut [job], observer)?;
        match stepped.outputs.remove(0)? {
            StepOutput::Logits(logits) => Ok(logits),
            StepOutput::Generated { .. } => Err(Error::Session("it generated by itself".into())),
        }
    }
}

/// What stands before the first of these strings, if one is there.
fn before_stop<'t>(text: &'t str, stop_strings: &[String]) -> Option<&'t str> {
    let ends = stop_strings.iter().filter(|stop| !stop.is_empty());
    let end = ends.filter_map(|stop| text.find(stop.as_str())).min()?;
    Some(&text[..end])
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

    #[test]
    fn the_first_stop_string_counts() {
        let stop = ["b", "", "ab"].map(str::to_owned);
        assert_eq!(before_stop("xaby", &stop), Some("x"));
        assert_eq!(before_stop("xay", &stop), None);
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
