//! From jobs to captions: the loop of a worker whose model is loaded.

use std::{
    ops::ControlFlow,
    thread,
    time::{Duration, Instant},
};

use crate::{
    caption::{Caption, Cost},
    remedies::worded,
    worker::{
        callbacks::CaptionUpdate,
        thread::{Job, Shared, Urgency},
    },
};
use vlmnarrate_engine::{Answer, Engine, EngineInfo, Error, ErrorKind, Event, Picture, Priority};
use vlmnarrate_mailbox::Epoch;

/// Takes jobs and hands them to the engine.
pub(super) struct DescribeLoop<'a> {
    shared: &'a Shared,
    info: &'a EngineInfo,
    /// Since when the server has been away.
    away_since: Option<Instant>,
    /// Whether the last caption was later than its deadline.
    is_late: bool,
}

/// What waits for a turn.
#[derive(Clone, Copy)]
struct Waiting {
    urgency: Urgency,
    priority: Priority,
}

impl Waiting {
    fn of(job: &Job) -> Self {
        Self {
            urgency: job.urgency,
            priority: match job.stamp.request_id {
                0 => Priority::Normal,
                _ => Priority::High,
            },
        }
    }
}

/// Why an engine was stopped.
#[derive(Debug)]
enum Stop {
    /// A request has come while a job without one waited for its turn.
    Requested,
    /// The epoch of the job is over.
    Cancelled,
    /// The deadline of the job has passed.
    Late,
    /// The server is away, for longer than the job can wait.
    Away(Error),
}

/// How the description of a job ends.
enum Outcome {
    /// With the engine that made it, if it is not the usual one.
    Answered(Box<Answer>, Option<Box<EngineInfo>>),
    /// For this frame.
    Failed(Error),
    /// Nothing is to be said about the frame itself.
    Stopped(Stop),
    /// For good.
    Ended(Error),
}

impl<'a> DescribeLoop<'a> {
    pub(super) fn new(shared: &'a Shared, info: &'a EngineInfo) -> Self {
        Self {
            shared,
            info,
            away_since: None,
            is_late: false,
        }
    }

    /// Describes jobs until the mailbox is closed.
    ///
    /// # Errors
    ///
    /// No later job can succeed either.
    pub(super) fn run(mut self, engine: &mut dyn Engine) -> Result<(), Error> {
        while let Some((epoch, waiting)) = self.shared.mailbox.wait_for_job(Waiting::of) {
            // The newest frame is taken when the engine's turn has come.
            let waited = self.wait_turn(engine, epoch, waiting, Instant::now());
            if let Err(Outcome::Stopped(Stop::Cancelled | Stop::Requested)) = waited {
                continue;
            }
            let Some((epoch, job)) = self.shared.mailbox.try_take() else {
                engine.give_up_turn();
                continue;
            };
            let outcome = match waited {
                Ok(is_away) => self.describe(engine, epoch, &job, is_away),
                Err(outcome) => outcome,
            };
            self.report(epoch, &job, outcome)?;
            self.shared.recycle(job);
        }
        Ok(())
    }

    /// Waits until the engine would begin at once. Returns whether its server is away all the same: then another
    /// engine takes its place.
    fn wait_turn(
        &mut self,
        engine: &mut dyn Engine,
        epoch: Epoch,
        Waiting { urgency, priority }: Waiting,
        since: Instant,
    ) -> Result<bool, Outcome> {
        let mut stop = None;
        let mut is_away = false;
        let waited = engine.wait_turn(priority, &mut |event| {
            if self.shared.mailbox.epoch() != epoch {
                stop = Some(Stop::Cancelled);
                return ControlFlow::Break(());
            }
            if priority == Priority::Normal && !self.shared.mailbox.has_room_for_request() {
                stop = Some(Stop::Requested);
                return ControlFlow::Break(());
            }
            if let Event::Unavailable(error) = event {
                is_away = true;
                self.note_away(error);
                let waits = match urgency {
                    Urgency::Live { .. } => false,
                    Urgency::Recorded { patience } => since.elapsed() < patience,
                };
                if !waits {
                    stop = Some(Stop::Away(error.clone()));
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        match (waited, stop) {
            (Ok(()), _) => Ok(is_away),
            (Err(_), Some(Stop::Away(error))) if !urgency.is_live() => {
                Err(Outcome::Ended(given_up(error, since.elapsed())))
            }
            (Err(_), Some(stop)) => Err(Outcome::Stopped(stop)),
            (Err(error), None) => Err(Outcome::Failed(error)),
        }
    }

    fn describe(
        &mut self,
        engine: &mut dyn Engine,
        epoch: Epoch,
        job: &Job,
        mut is_away: bool,
    ) -> Outcome {
        let pictures: Vec<&Picture> = job.pictures.iter().map(AsRef::as_ref).collect();
        let mut request = job.settings.request(&pictures, job.clip.as_ref());
        request.deadline = job.deadline();
        let queue = job.queue();
        let start = Instant::now();
        loop {
            let mut stop = None;
            let mut answered_by = None;
            let result = engine.describe(&request, &mut |event| {
                if self.shared.mailbox.epoch() != epoch {
                    stop = Some(Stop::Cancelled);
                    return ControlFlow::Break(());
                }
                if request.deadline.is_some_and(|end| Instant::now() >= end) {
                    stop = Some(Stop::Late);
                    return ControlFlow::Break(());
                }
                match event {
                    Event::Text { text, tokens } if job.settings.partial => {
                        let mut answer = Answer::new(text);
                        answer.tokens = tokens;
                        // Which of the choices it will be is not known yet.
                        answer.probability = Some(1.0);
                        let info = answered_by.as_deref().unwrap_or(self.info);
                        self.shared.call_back_in(epoch, |callbacks| {
                            callbacks.caption(CaptionUpdate {
                                caption: caption(job, info, answer, true),
                                epoch,
                                queue,
                            });
                        });
                    }
                    Event::AnsweredBy(info) => answered_by = Some(Box::new(info.clone())),
                    Event::Unavailable(error) => {
                        is_away = true;
                        self.note_away(error);
                    }
                    Event::Ignored(setting) => {
                        let told = |callbacks: &dyn super::WorkerCallbacks| {
                            callbacks.setting_ignored(setting);
                        };
                        self.shared.call_back(told);
                    }
                    _ => (),
                }
                ControlFlow::Continue(())
            });
            let error = match result {
                Ok(answer) => {
                    if !is_away {
                        self.note_back();
                    }
                    return Outcome::Answered(Box::new(answer), answered_by);
                }
                Err(error) => error,
            };
            match (error.kind, stop) {
                (_, Some(stop @ Stop::Cancelled)) => return Outcome::Stopped(stop),
                (ErrorKind::Unavailable, _) => {
                    self.note_away(&error);
                    let Urgency::Recorded { patience } = job.urgency else {
                        return Outcome::Stopped(Stop::Away(error));
                    };
                    if start.elapsed() >= patience {
                        return Outcome::Ended(given_up(error, start.elapsed()));
                    }
                    // Later it may succeed.
                    self.pause(epoch);
                    // Taken already: it must not make way for a request.
                    let waiting = Waiting {
                        priority: Priority::High,
                        ..Waiting::of(job)
                    };
                    match self.wait_turn(engine, epoch, waiting, start) {
                        Ok(away) => is_away = away,
                        Err(outcome) => return outcome,
                    }
                }
                (_, Some(stop)) => return Outcome::Stopped(stop),
                (ErrorKind::Device | ErrorKind::NotFound | ErrorKind::NotAuthorized, None) => {
                    return Outcome::Ended(error);
                }
                (_, None) => return Outcome::Failed(error),
            }
        }
    }

    /// Gives a server that is away a little time, for engines that don't wait by themselves.
    fn pause(&self, epoch: Epoch) {
        const PAUSE: Duration = Duration::from_millis(100);
        let end = Instant::now() + PAUSE;
        while Instant::now() < end && self.shared.mailbox.epoch() == epoch {
            thread::sleep(PAUSE / 10);
        }
    }

    /// Reports how the description of a job has ended. The outcome of a cancelled job is not reported.
    fn report(&mut self, epoch: Epoch, job: &Job, outcome: Outcome) -> Result<(), Error> {
        let shared = self.shared;
        match outcome {
            Outcome::Answered(answer, answered_by) => {
                self.is_late = false;
                let caption = caption(
                    job,
                    answered_by.as_deref().unwrap_or(self.info),
                    *answer,
                    false,
                );
                shared.call_back_in(epoch, |callbacks| {
                    callbacks.caption(CaptionUpdate {
                        caption,
                        epoch,
                        queue: job.queue(),
                    });
                });
            }
            Outcome::Failed(error) => {
                let error = worded(error);
                shared.call_back_in(epoch, |callbacks| {
                    callbacks.frame_failed(epoch, &job.stamp, &error);
                });
            }
            Outcome::Stopped(Stop::Cancelled | Stop::Requested) => (),
            Outcome::Stopped(Stop::Late) => {
                let deadline = job.urgency.deadline().unwrap_or_default();
                if !std::mem::replace(&mut self.is_late, true) {
                    shared.call_back_in(epoch, |callbacks| callbacks.captions_late(deadline));
                }
                let message = format!(
                    "no caption within the deadline of {} s",
                    deadline.as_secs_f64()
                );
                self.report_unanswered(epoch, job, &Error::new(ErrorKind::Unavailable, message));
            }
            Outcome::Stopped(Stop::Away(error)) => self.report_unanswered(epoch, job, &error),
            // Reported when the worker exits.
            Outcome::Ended(error) => return Err(worded(error)),
        }
        Ok(())
    }

    fn report_unanswered(&self, epoch: Epoch, job: &Job, error: &Error) {
        self.shared.call_back_in(epoch, |callbacks| {
            callbacks.frame_unanswered(epoch, &job.stamp, error);
        });
    }

    fn note_away(&mut self, error: &Error) {
        if self.away_since.is_none() {
            self.away_since = Some(Instant::now());
            let error = worded(error.clone());
            self.shared
                .call_back(|callbacks| callbacks.server_away(&error));
        }
    }

    fn note_back(&mut self) {
        if let Some(since) = self.away_since.take() {
            self.shared
                .call_back(|callbacks| callbacks.server_back(since.elapsed()));
        }
    }
}

impl Urgency {
    fn is_live(self) -> bool {
        matches!(self, Self::Live { .. })
    }

    fn deadline(self) -> Option<Duration> {
        match self {
            Self::Live { deadline } => deadline,
            Self::Recorded { .. } => None,
        }
    }
}

impl Job {
    /// Time that the job waits for the worker.
    fn queue(&self) -> Duration {
        self.sampled_at.elapsed().saturating_sub(self.scaling)
    }

    fn deadline(&self) -> Option<Instant> {
        self.sampled_at.checked_add(self.urgency.deadline()?)
    }
}

/// The error of a recording that has waited long enough.
fn given_up(error: Error, waited: Duration) -> Error {
    let message = format!(
        "{error}. It has been away for {:.0} s, as long as endpoint-timeout allows. Start it, or set \
         fallback-model, and describe the file again",
        waited.as_secs_f64()
    );
    Error::new(ErrorKind::Device, message)
}

fn caption(job: &Job, info: &EngineInfo, answer: Answer, partial: bool) -> Caption {
    Caption {
        stamp: job.stamp,
        arrival_time: None,
        text: printable(answer.text),
        element: String::new(),
        prompt: job.settings.prompt.clone(),
        model: info.model.clone(),
        revision: info.revision.clone(),
        device: info.device.clone(),
        device_name: info.device_name.clone(),
        device_memory: info.device_memory,
        sequence: 0,
        tokens: answer.tokens.try_into().unwrap_or(u32::MAX),
        probability: answer.probability,
        truncated: answer.truncated,
        repeated: false,
        partial,
        cost: Cost {
            latency: job.sampled_at.elapsed(),
            preprocess: job.scaling + answer.timings.preprocess,
            vision: answer.timings.vision,
            prefill: answer.timings.prefill,
            decode: answer.timings.decode,
        },
    }
}

/// The text without control characters: GLib's strings end at a NUL, and terminals obey the others.
fn printable(text: String) -> String {
    let is_bad = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    match text.contains(is_bad) {
        true => text.replace(is_bad, "\u{fffd}"),
        false => text,
    }
}
