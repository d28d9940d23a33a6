//! The worker: one thread that loads a model and describes one frame at a time.
//!
//! Frames come in through a mailbox with one slot: the newest due frame replaces an older one that
//! still waits, so a slow model falls behind by one frame at most and never by a queue. A frame
//! that somebody asked about has a slot of its own and is not replaced. A caller that must not
//! lose a frame submits it and waits.
//!
//! A flush moves the *epoch* on: work of an older epoch is cancelled at the model's next layer or
//! token and what it says is no longer heard. The loaded model outlives flushes.
//!
//! Nothing in here knows of GStreamer but its clock times.

pub(crate) mod progress;
pub(crate) mod worker;
