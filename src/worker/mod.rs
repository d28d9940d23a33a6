//! The worker: one thread that loads a model and describes one frame or clip at a time.
//!
//! Frames come in through a mailbox with one slot: the newest frame that is due replaces an older one that still
//! waits, so that a slow model is never more than one frame behind. A frame for `describe-now` has a slot of its own
//! and is never replaced. A caller that must not lose a frame submits it and waits.
//!
//! A flush moves the *epoch* on: work of an older epoch is cancelled at the model's next layer or token, and its
//! callbacks are suppressed. The loaded model survives flushes.
//!
//! Of GStreamer, the worker uses clock times only.

mod callbacks;
mod describe;
mod progress;
mod thread;

pub(crate) use callbacks::{
    CaptionUpdate, DownloadProgress, LoadProgress, WorkerCallbacks, WorkerFailure,
};
pub(crate) use progress::percent;
pub(crate) use thread::{Job, Urgency, Worker};
