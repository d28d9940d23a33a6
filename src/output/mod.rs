//! Captions as GStreamer messages, metas and timed text.

pub(crate) mod cue_merger;
pub(crate) mod encoding;
pub(crate) mod playback_clock;
pub(crate) mod push_watch;
pub(crate) mod text_pad;
pub(crate) mod timeline;
