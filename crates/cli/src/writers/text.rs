//! Lines: text for people, JSON for programs.

use std::io::{self, BufWriter, Write};

use anyhow::Result;
use gst::ClockTime;
use gstvlmnarrate::Caption;

use super::{Ended, Writer};
use crate::{
    captions::{json, lines},
    narrate::on_stdout,
    output::{Format, Output},
};

/// Writes a line per caption.
pub struct TextWriter {
    format: Format,
    output: Option<Output>,
}

impl TextWriter {
    pub fn new(format: Format, output: Option<Output>) -> Self {
        Self { format, output }
    }
}

impl Writer for TextWriter {
    fn launch(&self) -> String {
        "fakesink".into()
    }

    fn caption(&mut self, caption: &Caption, message: &gst::StructureRef) -> io::Result<()> {
        // People do not wait for unfinished captions; whoever asks for them in JSON gets them.
        let line = match self.format {
            Format::Jsonl => json::object(message).to_string(),
            _ if caption.partial => return Ok(()),
            _ => lines::line(caption),
        };
        match &mut self.output {
            Some(output) => writeln!(BufWriter::new(output.file()), "{line}"),
            None => {
                let mut out = io::stdout().lock();
                writeln!(out, "{line}")
                    .and_then(|()| out.flush())
                    .map_err(on_stdout)
            }
        }
    }

    fn finish(
        self: Box<Self>,
        ended: &Ended,
        _: &mut dyn FnMut(ClockTime),
    ) -> Result<Option<String>> {
        match self.output {
            Some(output) => output.finish(ended.failed),
            None => Ok(None),
        }
    }
}
