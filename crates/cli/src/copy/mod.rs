//! Copies the streams of the input, and adds what the pipeline makes: FFmpeg does it, in step with the captions.
//!
//! FFmpeg reads the input itself. What the pipeline makes comes through a pipe as Matroska. FFmpeg writes packets in the
//! order of their times, so it waits for the pipe, and the file is always as far as the captions are.

mod copier;
mod plan;

pub use self::{copier::Copier, plan::Plan};
use crate::output::Format;

/// What the pipeline makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added<'a> {
    /// Captions, beside all streams; made by the model of this name.
    Captions(&'a str),
    /// The video with the captions drawn on it, in place of the video.
    Video,
}

fn muxer(format: Format) -> &'static str {
    match format {
        Format::Mp4 => "mp4",
        _ => "matroska",
    }
}
