//! Copies the streams of the input, and adds what the pipeline makes: FFmpeg does it, in step with the captions.
//!
//! FFmpeg reads the input itself. What the pipeline makes comes through a pipe as Matroska. FFmpeg writes packets in the
//! order of their times, so it waits for the pipe, and the file is always as far as the captions are.

mod copier;
mod plan;

use anyhow::anyhow;

pub use self::{
    copier::Copier,
    plan::{Plan, matroska_can_turn},
};
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

fn not_installed(error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => anyhow!(
            "ffmpeg is not installed; install the package ffmpeg, or name an output such as -o out.vtt"
        ),
        _ => anyhow!("ffmpeg can't be started: {error}"),
    }
}
