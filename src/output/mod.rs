//! From a caption to what GStreamer carries: messages, metas and timed text.

pub mod encoding;
pub(crate) mod merged;
pub(crate) mod playhead;
pub(crate) mod push_watch;
pub(crate) mod text_pad;
pub(crate) mod timeline;
