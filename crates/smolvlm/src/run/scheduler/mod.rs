//! One scheduler for all callers of a model, on every device.
//!
//! A caller waits for its [turn](turns::Turns), takes a picture and hands over a [`Sequence`]. The scheduler's thread has
//! all sequences that are under way and goes round: it encodes the next pictures, then runs one step of all sequences
//! together, of some a part of the prompt, of others the next token with a few draft tokens. Weights are read once for
//! all of them. A sequence joins and leaves between steps, and a row's result doesn't depend on the rows beside it: each
//! answer is the one that would be made alone.
//!
//! Text is the callers' work: each hears the tokens of its sequence, decodes them in its own thread, and may cancel.

mod batch;
mod sequence;
#[cfg(test)]
mod tests;
mod turns;

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use vlmnarrate_engine::threads::spawn;

use crate::{
    backends::Backend,
    error::{Error, Result},
};
use batch::Batch;
pub(crate) use sequence::{Caller, Sequence, Update};
pub(crate) use turns::{Turn, Turns};

/// Name of the scheduler's thread.
const THREAD: &str = "vlmnarrate-model";

/// The scheduler of a model. Dropped, it waits until its thread has ended.
#[derive(Debug)]
pub(crate) struct Scheduler {
    turns: Arc<Turns>,
    /// Always there, but while it is dropped.
    inbox: Option<mpsc::Sender<Sequence>>,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] if the system refuses another thread.
    pub(crate) fn new(backend: Arc<dyn Backend>) -> Result<Self> {
        let turns = Turns::new(backend.limits().sequences);
        let (sender, inbox) = mpsc::channel();
        let batch = Batch::new(backend, turns.clone(), inbox);
        let thread = spawn(THREAD, move || batch.serve())
            .map_err(|error| Error::Device(format!("no thread for the model: {error}")))?;
        Ok(Self {
            turns,
            inbox: Some(sender),
            thread: Some(thread),
        })
    }

    /// The places of the batch.
    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// Takes a sequence into the batch.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] if the thread is gone.
    pub(crate) fn submit(&self, sequence: Sequence) -> Result<()> {
        let is_taken = |inbox: &mpsc::Sender<Sequence>| inbox.send(sequence).is_ok();
        match self.inbox.as_ref().is_some_and(is_taken) {
            true => Ok(()),
            false => Err(gone()),
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The error of a caller whose scheduler has ended.
pub(crate) fn gone() -> Error {
    Error::Device("the thread that runs the model is gone".into())
}
