//! Subtitle files, from the cues of the text pad.

use std::{
    io::{self, BufWriter, Write},
    sync::mpsc::{self, Receiver},
};

use anyhow::{Context, Result};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::Caption;

use super::{Ended, Writer};
use crate::{
    captions::subtitles::{Cue, Subtitles},
    output::{Format, Output},
    run::named,
};

/// Writes WebVTT or SubRip.
pub struct SubtitleWriter {
    format: Format,
    output: Option<Output>,
    cues: Option<Receiver<Cue>>,
    /// Known from the first caption on; the file begins with it.
    model: Option<String>,
    begun: bool,
    written: u64,
}

impl SubtitleWriter {
    pub fn new(format: Format, output: Option<Output>) -> Self {
        Self {
            format,
            output,
            cues: None,
            model: None,
            begun: false,
            written: 0,
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        let (Some(cues), Some(model)) = (&self.cues, &self.model) else {
            return Ok(());
        };
        let cues: Vec<_> = cues.try_iter().collect();
        if cues.is_empty() && self.begun {
            return Ok(());
        }
        let file: Box<dyn Write> = match &mut self.output {
            Some(output) => Box::new(BufWriter::new(output.file())),
            None => Box::new(io::stdout().lock()),
        };
        let mut subtitles = if self.begun {
            Subtitles::resume(file, self.format, self.written)
        } else {
            Subtitles::new(file, self.format, model)?
        };
        for cue in &cues {
            subtitles.write(cue)?;
        }
        subtitles.flush()?;
        self.begun = true;
        self.written += cues.len() as u64;
        Ok(())
    }
}

impl Writer for SubtitleWriter {
    fn launch(&self) -> String {
        // Text comes one cue after its video.
        "fakesink narrator.text_src ! queue max-size-buffers=0 max-size-bytes=0 max-size-time=0 \
         ! text/x-raw,format=utf8 ! appsink name=cues sync=false async=false"
            .into()
    }

    fn connect(&mut self, pipeline: &gst::Pipeline) -> Result<()> {
        let sink = pipeline
            .by_name("cues")
            .and_downcast::<gst_app::AppSink>()
            .context("no appsink")?;
        let (sender, receiver) = mpsc::channel();
        self.cues = Some(receiver);
        sink.set_callbacks(
            gst_app::AppSinkCallbacks::builder()
                .new_sample(move |sink| {
                    let sample = sink.pull_sample().map_err(|_| gst::FlowError::Eos)?;
                    if let Some(cue) = sample.buffer().and_then(cue) {
                        let _ = sender.send(cue);
                    }
                    Ok(gst::FlowSuccess::Ok)
                })
                .build(),
        );
        Ok(())
    }

    fn caption(&mut self, caption: &Caption, _: &gst::StructureRef) -> io::Result<()> {
        self.model.get_or_insert_with(|| named(caption));
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        self.drain().context("the subtitles can't be written")
    }

    fn finish(
        mut self: Box<Self>,
        ended: &Ended,
        _: &mut dyn FnMut(ClockTime),
    ) -> Result<Option<String>> {
        self.model.get_or_insert_with(|| ended.model.clone());
        self.check()?;
        match self.output {
            Some(output) => output.finish(ended.failed),
            None => Ok(None),
        }
    }
}

fn cue(buffer: &gst::BufferRef) -> Option<Cue> {
    let start = buffer.pts()?;
    let text = buffer.map_readable().ok()?;
    Some(Cue {
        start,
        end: start + buffer.duration()?,
        text: String::from_utf8_lossy(&text).into_owned(),
    })
}
