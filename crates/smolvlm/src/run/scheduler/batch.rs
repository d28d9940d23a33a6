//! The loop that runs the sequences of a batch: pictures, then a step of all, then whoever is done leaves.

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use rayon::prelude::*;
use vlmnarrate_engine::{Event, threads::panic_message};

use super::{sequence::Sequence, turns::Turns};
use crate::{
    backends::{Backend, BatchLimits, EncodeJob, StepOutput, Stepped},
    error::{Error, Result},
};

/// Tokens after which a sequence makes way for others.
const SHARE: usize = 64;
/// Tokens that a backend generates at most before others may join, and if somebody waits to.
const LAUNCH: usize = 64;
const SHORT_LAUNCH: usize = 8;
/// Rows of drafts and answers in a step. Beyond them a draft costs others more than it is likely to save.
const DRAFT_ROWS: usize = 64;
/// Steps that are made at most while pictures are encoded: a thread that waits for the other's part of a picture may be
/// the one that makes them.
const MOST_STEPS: usize = 16;
/// How often the loop looks whether a suspended sequence may go on.
const POLL: Duration = Duration::from_millis(5);

/// The sequences under way.
pub(super) struct Batch {
    backend: Arc<dyn Backend>,
    turns: Arc<Turns>,
    inbox: Receiver<Sequence>,
    limits: BatchLimits,
    running: Vec<Sequence>,
}

impl Batch {
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        turns: Arc<Turns>,
        inbox: Receiver<Sequence>,
    ) -> Self {
        Self {
            limits: backend.limits(),
            backend,
            turns,
            inbox,
            running: Vec::new(),
        }
    }

    /// Runs sequences until none can come any more.
    pub(super) fn serve(mut self) {
        loop {
            let first = match self.turns.has_suspended() {
                true => self.inbox.recv_timeout(POLL),
                false => self.inbox.recv().map_err(RecvTimeoutError::from),
            };
            match first {
                Ok(sequence) => self.running.push(sequence),
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let backend = self.backend.clone();
            backend.install(&mut || self.run());
        }
    }

    /// Runs until nothing is left to run.
    fn run(&mut self) {
        loop {
            self.running.extend(self.inbox.try_iter());
            while let Some(sequence) = self.turns.resume() {
                self.running.push(sequence);
            }
            self.dismiss();
            if self.running.is_empty() {
                return;
            }
            self.encode();
            self.dismiss();
            self.step();
            self.dismiss();
            self.suspend();
        }
    }

    /// Lets sequences go that have ended or that nobody wants any more.
    fn dismiss(&mut self) {
        let ended = |sequence: &mut Sequence| sequence.end().is_some();
        for sequence in self.running.extract_if(.., ended) {
            if let Some(end) = sequence.end() {
                sequence.finish(end);
            }
        }
    }

    /// Lets sequences go that failed.
    fn fail(&mut self, failures: Vec<(usize, Error)>) {
        // From the last on, so that the numbers of the others stay.
        for (index, error) in failures.into_iter().rev() {
            self.running.remove(index).finish(Err(error));
        }
    }

    /// Makes sequences wait that have had their share, if somebody waits for a turn.
    fn suspend(&mut self) {
        let had_share = |sequence: &mut Sequence| sequence.used() >= SHARE;
        if self.turns.has_waiting() {
            for mut sequence in self.running.extract_if(.., had_share) {
                sequence.since = sequence.generation.tokens().len();
                self.turns.suspend(sequence);
            }
        }
    }

    /// Encodes the next pictures, as many as the backend takes at once. The other sequences make steps meanwhile, where
    /// that keeps processors busy that would wait for each other.
    fn encode(&mut self) {
        let mut left = self.limits.pictures;
        let mut chosen = Vec::new();
        for sequence in std::mem::take(&mut self.running) {
            match sequence.to_encode.len().min(left) {
                0 => self.running.push(sequence),
                count => {
                    left -= count;
                    chosen.push((sequence, count));
                }
            }
        }
        if chosen.is_empty() {
            return;
        }
        let backend = self.backend.clone();
        let is_done = AtomicBool::new(false);
        let mut encode = || {
            let errors = encode_all(backend.as_ref(), &mut chosen);
            is_done.store(true, Ordering::Relaxed);
            errors
        };
        let errors = match self.limits.overlaps {
            true => rayon::join(encode, || self.step_until(&is_done)).0,
            false => encode(),
        };
        for ((sequence, _), error) in chosen.into_iter().zip(errors) {
            match error {
                None => self.running.push(sequence),
                Some(error) => sequence.finish(Err(error)),
            }
        }
    }

    /// Makes steps while pictures are encoded.
    fn step_until(&mut self, is_done: &AtomicBool) {
        for _ in 0..MOST_STEPS {
            self.running.extend(self.inbox.try_iter());
            self.dismiss();
            if is_done.load(Ordering::Relaxed) || !self.step() {
                return;
            }
        }
    }

    /// Runs rows of all sequences whose pictures are encoded. Returns whether there were any.
    fn step(&mut self) -> bool {
        let ready: Vec<_> = (0..self.running.len())
            .filter(|i| self.running[*i].to_encode.is_empty())
            .collect();
        let mut failures = Vec::new();
        for ready in ready.chunks(self.limits.sequences) {
            let rows = self.plan(ready);
            match self.step_all(&rows) {
                Ok(failed) => failures.extend(failed),
                // Whose fault it is shows when each is alone.
                Err(_) if rows.len() > 1 => {
                    for one in &rows {
                        match self.step_all(&[*one]) {
                            Ok(failed) => failures.extend(failed),
                            Err(error) => failures.push((one.0, error)),
                        }
                    }
                }
                Err(error) => failures.extend(rows.first().map(|one| (one.0, error))),
            }
        }
        self.fail(failures);
        !ready.is_empty()
    }

    /// The rows that each sequence runs in the next step: answers first, and what is left of prompts.
    fn plan(&mut self, ready: &[usize]) -> Vec<(usize, usize)> {
        let answers = ready.iter().filter(|i| !self.running[**i].is_prompt());
        let answer_rows = (DRAFT_ROWS / answers.count().max(1)).min(self.limits.answer_rows);
        let most_drafts = answer_rows.saturating_sub(1);
        let mut room = self.limits.rows;
        let mut rows = Vec::with_capacity(ready.len());
        for is_prompt in [false, true] {
            for &i in ready {
                let sequence = &mut self.running[i];
                if sequence.is_prompt() == is_prompt && room > 0 {
                    let count = sequence.plan(room, most_drafts);
                    room = room.saturating_sub(count);
                    rows.push((i, count));
                }
            }
        }
        rows.sort_unstable();
        rows
    }

    /// Runs rows of these sequences. Returns which of them failed.
    fn step_all(&mut self, rows: &[(usize, usize)]) -> Result<Vec<(usize, Error)>> {
        let is_alone = rows.len() == self.running.len() && !self.turns.has_waiting();
        let launch = match is_alone {
            true => LAUNCH,
            false => SHORT_LAUNCH,
        };
        let mut chosen = choose(&mut self.running, rows);
        let cancelled: Vec<_> = chosen
            .iter()
            .map(|(sequence, _)| sequence.caller.cancelled.clone())
            .collect();
        let start = Instant::now();
        let mut borrowed: Vec<_> = chosen
            .iter_mut()
            .map(|(sequence, rows)| sequence.borrow(*rows, launch))
            .collect();
        let mut jobs: Vec<_> = borrowed.iter_mut().map(|one| one.job()).collect();
        let Stepped { outputs, times } =
            guard(|| self.backend.step(&mut jobs, &mut observer(&cancelled)))?;
        drop(jobs);
        drop(borrowed);
        let time = start.elapsed();
        let accept =
            |((sequence, _), output): (&mut (&mut Sequence, usize), Result<StepOutput>)| {
                guard(|| sequence.accept(output?, time, times)).err()
            };
        let outputs = chosen.iter_mut().zip(outputs);
        let errors: Vec<_> = match rows.len() {
            1 => outputs.map(accept).collect(),
            _ => {
                let outputs: Vec<_> = outputs.collect();
                outputs.into_par_iter().map(accept).collect()
            }
        };
        let failed = rows.iter().zip(errors);
        Ok(failed
            .filter_map(|((i, _), error)| Some((*i, error?)))
            .collect())
    }
}

/// Encodes so many pictures of each of these sequences. Returns an error for each that failed.
fn encode_all(backend: &dyn Backend, chosen: &mut [(Sequence, usize)]) -> Vec<Option<Error>> {
    let encode = |chosen: &mut [(Sequence, usize)]| -> Result<()> {
        let start = Instant::now();
        let cancelled: Vec<_> = chosen
            .iter()
            .map(|(sequence, _)| sequence.caller.cancelled.clone())
            .collect();
        let mut parts: Vec<_> = chosen
            .iter_mut()
            .map(|(sequence, count)| sequence.pictures(*count))
            .collect();
        let mut jobs: Vec<_> = parts
            .iter_mut()
            .map(|(slot, pictures)| EncodeJob {
                slot: *slot,
                pictures,
            })
            .collect();
        guard(|| backend.encode(&mut jobs, &mut observer(&cancelled)))?;
        for (sequence, count) in chosen {
            sequence.to_encode.drain(..*count);
            sequence.timings.vision += start.elapsed();
        }
        Ok(())
    };
    match encode(chosen) {
        Ok(()) => chosen.iter().map(|_| None).collect(),
        // Whose fault it is shows when each is alone.
        Err(_) if chosen.len() > 1 => {
            let alone = |one| encode(std::slice::from_mut(one)).err();
            chosen.iter_mut().map(alone).collect()
        }
        Err(error) => vec![Some(error)],
    }
}

/// The sequences of these numbers, which ascend, each with what stands beside its number.
fn choose<'a>(
    running: &'a mut [Sequence],
    numbers: &[(usize, usize)],
) -> Vec<(&'a mut Sequence, usize)> {
    let mut numbers = numbers.iter().peekable();
    let chosen = running.iter_mut().enumerate().filter_map(|(i, sequence)| {
        let (_, beside) = numbers.next_if(|(number, _)| *number == i)?;
        Some((sequence, *beside))
    });
    chosen.collect()
}

/// Goes on as long as one caller wants to.
fn observer(cancelled: &[Arc<AtomicBool>]) -> impl FnMut(Event<'_>) -> ControlFlow<()> + Send {
    move |_| {
        let is_over = |flag: &Arc<AtomicBool>| flag.load(Ordering::Relaxed);
        match cancelled.iter().all(is_over) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// A panic as an error: it ends the caption that it came from, not those beside it.
fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::Panic(panic_message(panic.as_ref()).to_owned())))
}
