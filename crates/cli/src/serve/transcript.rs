//! What was said of a recorded video, and when.

use gst::ClockTime;
use gstvlmnarrate::Caption;

use crate::{
    captions::{
        lines::one_line,
        subtitles::{Cue, Subtitles},
    },
    output::Format,
    pages::escape,
    run::named,
    units::clock,
};

/// The captions so far; the same one several times in a row makes one line.
#[derive(Default)]
pub struct Transcript {
    lines: Vec<Line>,
    /// The model that the captions are from.
    pub model: Option<String>,
    /// Time up to which the video is described.
    pub position: ClockTime,
}

/// One line; it lasts until the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub start: ClockTime,
    /// Empty where nothing was said.
    pub text: String,
}

impl Transcript {
    /// Returns the line, if the caption is not that of the line before.
    pub fn add(&mut self, caption: &Caption) -> Option<Line> {
        self.model.get_or_insert_with(|| one_line(&named(caption)));
        let start = caption.stamp.stream_time.unwrap_or(self.position);
        self.position = self.position.max(start);
        let text = one_line(&caption.text);
        if self.lines.last().is_some_and(|line| line.text == text) {
            return None;
        }
        let line = Line { start, text };
        self.lines.push(line.clone());
        Some(line)
    }

    /// The lines with their ends.
    pub fn cues(&self) -> Vec<Cue> {
        let ends = (self.lines.iter().skip(1))
            .map(|line| line.start)
            .chain([self.position]);
        (self.lines.iter().zip(ends))
            .filter(|(line, end)| !line.text.is_empty() && *end > line.start)
            .map(|(line, end)| Cue {
                start: line.start,
                end,
                text: line.text.clone(),
            })
            .collect()
    }

    /// The cues as a WebVTT file.
    pub fn vtt(&self) -> Vec<u8> {
        let mut file = Vec::new();
        let model = self.model.as_deref().unwrap_or("no model yet");
        let mut write = || {
            let mut subtitles = Subtitles::new(&mut file, Format::Vtt, model)?;
            for cue in self.cues() {
                subtitles.write(&cue)?;
            }
            subtitles.flush()
        };
        write().expect("memory can be written");
        file
    }

    /// The cues as items of a list.
    pub fn html(&self) -> String {
        let item = |cue: &Cue| {
            let (start, end) = (cue.start.seconds_f64(), cue.end.seconds_f64());
            format!(
                "<li><button type=\"button\" data-start=\"{start:.3}\" data-end=\"{end:.3}\">\
                 <time>{}</time> <span>{}</span></button></li>\n",
                clock(cue.start),
                escape(&cue.text)
            )
        };
        self.cues().iter().map(item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_last_until_the_next() {
        let mut transcript = Transcript::default();
        for (seconds, text) in [(1, "<a> --> b"), (2, "<a> --> b"), (3, " "), (4, "c\nd")] {
            let mut caption = Caption::default();
            caption.stamp.stream_time = Some(ClockTime::from_seconds(seconds));
            caption.text = text.into();
            caption.model = "m".into();
            let is_new = transcript.add(&caption).is_some();
            assert_eq!(is_new, seconds != 2, "{text}");
        }
        transcript.position = ClockTime::from_mseconds(4500);
        let vtt = String::from_utf8(transcript.vtt()).unwrap();
        let (_, cues) = vtt.split_once(" with m\n\n").unwrap();
        assert_eq!(
            cues,
            "00:00:01.000 --> 00:00:03.000\n&lt;a&gt; --&gt; b\n\n00:00:04.000 --> 00:00:04.500\nc d\n\n"
        );
        assert_eq!(
            transcript.html().lines().next().unwrap(),
            "<li><button type=\"button\" data-start=\"1.000\" data-end=\"3.000\"><time>0:01</time> \
             <span>&lt;a&gt; --&gt; b</span></button></li>"
        );
    }
}
