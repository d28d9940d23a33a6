//! What becomes of a narration: each kind of output is a [`Writer`].

mod copy;
mod report;
mod subtitles;
mod text;

pub use text::TextWriter;

use std::io;

use anyhow::Result;
use gst::ClockTime;
use gstvlmnarrate::Caption;

use crate::{
    input::Input,
    output::{Format, Output},
};

/// How a run ended, for the last words of a file.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Whether it ended before the video did.
    pub early: bool,
    /// Whether it ended with an error. Then what is there must not replace an older result.
    pub failed: bool,
    /// Time up to which the video was described.
    pub position: ClockTime,
    /// The model and its revision.
    pub model: String,
}

/// One kind of output.
pub trait Writer {
    /// What follows the narrator, as `gst-launch-1.0` writes it. The narrator is named `narrator`.
    fn launch(&self) -> String;

    /// Connects with the elements of [`Self::launch`].
    ///
    /// # Errors
    ///
    /// An element refuses.
    fn connect(&mut self, pipeline: &gst::Pipeline) -> Result<()> {
        let _ = pipeline;
        Ok(())
    }

    /// Takes a caption, which may be unfinished.
    ///
    /// # Errors
    ///
    /// The output can't be written.
    fn caption(&mut self, caption: &Caption, message: &gst::StructureRef) -> io::Result<()> {
        let _ = (caption, message);
        Ok(())
    }

    /// Does what is to be done about ten times a second.
    ///
    /// # Errors
    ///
    /// The output can't be written.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    /// Makes the output whole, after the pipeline has ended. Returns its name, if it has one. `wait` gets the position
    /// while this takes time.
    ///
    /// # Errors
    ///
    /// The output can't be written; then there is none.
    fn finish(
        self: Box<Self>,
        ended: &Ended,
        wait: &mut dyn FnMut(ClockTime),
    ) -> Result<Option<String>>;
}

/// The writer of a format. `output` is `None` for standard output.
///
/// # Errors
///
/// The format can't hold the video, or a program that it needs is not installed.
pub fn writer(
    format: Format,
    output: Option<Output>,
    input: &Input,
    model: &str,
    notice: impl FnMut(&str),
) -> Result<Box<dyn Writer>> {
    Ok(match (format, output) {
        (Format::Mkv | Format::Mp4, Some(output)) => Box::new(copy::CopyWriter::captions(
            input, output, format, model, notice,
        )?),
        (Format::Vtt | Format::Srt, output) => {
            Box::new(subtitles::SubtitleWriter::new(format, output))
        }
        (Format::Html, Some(output)) => Box::new(report::ReportWriter::new(input, output)?),
        (format, output) => Box::new(TextWriter::new(format, output)),
    })
}

/// The writer of a video with its captions drawn on it.
///
/// # Errors
///
/// As for [`writer`].
pub fn burner(
    format: Format,
    output: Output,
    input: &Input,
    notice: impl FnMut(&str),
) -> Result<Box<dyn Writer>> {
    Ok(Box::new(copy::CopyWriter::video(
        input, output, format, notice,
    )?))
}
