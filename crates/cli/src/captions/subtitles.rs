//! Subtitle files: WebVTT and SubRip.

use std::io::{self, Write};

use gst::ClockTime;

use super::lines::one_line;
use crate::output::Format;

/// Text with the time in which it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cue {
    pub start: ClockTime,
    pub end: ClockTime,
    pub text: String,
}

/// Writes cues one by one.
pub struct Subtitles<W> {
    file: W,
    format: Format,
    written: u64,
}

impl<W: Write> Subtitles<W> {
    /// Writes what goes before the cues. WebVTT gets a note that names the model; SubRip has no place for one.
    ///
    /// # Errors
    ///
    /// The file can't be written.
    pub fn new(mut file: W, format: Format, model: &str) -> io::Result<Self> {
        if format == Format::Vtt {
            let note = one_line(model).replace("-->", "→");
            write!(
                file,
                "WEBVTT\n\nNOTE Captions by vlmnarrate {} with {note}\n\n",
                env!("CARGO_PKG_VERSION")
            )?;
        }
        Ok(Self {
            file,
            format,
            written: 0,
        })
    }

    /// Goes on behind so many cues.
    pub fn resume(file: W, format: Format, written: u64) -> Self {
        Self {
            file,
            format,
            written,
        }
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    ///
    /// The file can't be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    /// Writes a cue.
    ///
    /// # Errors
    ///
    /// The file can't be written.
    pub fn write(&mut self, cue: &Cue) -> io::Result<()> {
        self.written += 1;
        let text = one_line(&cue.text);
        let (start, end) = (cue.start, cue.end);
        match self.format {
            Format::Vtt => {
                let text = text
                    .replace('&', "&amp;")
                    .replace('<', "&lt;")
                    .replace('>', "&gt;");
                write!(
                    self.file,
                    "{} --> {}\n{text}\n\n",
                    stamp(start, '.'),
                    stamp(end, '.')
                )
            }
            // Players take `<` for markup here too, and have no way to write it.
            _ => write!(
                self.file,
                "{}\n{} --> {}\n{text}\n\n",
                self.written,
                stamp(start, ','),
                stamp(end, ',')
            ),
        }
    }
}

/// `00:01:02.345`
fn stamp(time: ClockTime, point: char) -> String {
    let ms = time.mseconds();
    format!(
        "{:02}:{:02}:{:02}{point}{:03}",
        ms / 3_600_000,
        ms / 60_000 % 60,
        ms / 1000 % 60,
        ms % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(format: Format) -> String {
        let mut file = Vec::new();
        let mut subtitles = Subtitles::new(&mut file, format, "a --> b").unwrap();
        for (start, text) in [(0, "one <b> & two"), (3_725_940, "three\n\nfour")] {
            let start = ClockTime::from_mseconds(start);
            let end = start + ClockTime::SECOND;
            subtitles
                .write(&Cue {
                    start,
                    end,
                    text: text.into(),
                })
                .unwrap();
        }
        String::from_utf8(file).unwrap()
    }

    #[test]
    fn cues_are_escaped_and_stay_in_one_line() {
        let vtt = written(Format::Vtt);
        let (header, cues) = vtt.split_once("\n\nNOTE ").unwrap();
        assert_eq!(header, "WEBVTT");
        let (note, cues) = cues.split_once("\n\n").unwrap();
        assert!(note.ends_with("with a → b"), "{note}");
        assert_eq!(
            cues,
            "00:00:00.000 --> 00:00:01.000\none &lt;b&gt; &amp; two\n\n01:02:05.940 --> 01:02:06.940\nthree four\n\n"
        );
        assert_eq!(
            written(Format::Srt),
            "1\n00:00:00,000 --> 00:00:01,000\none <b> & two\n\n2\n01:02:05,940 --> 01:02:06,940\nthree four\n\n"
        );
    }
}
