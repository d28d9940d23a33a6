//! Cues for files (`merge-captions`): identical captions in a row are one cue, and a cue ends where
//! the next caption starts, which is known only then.

use std::{ops::Range, sync::Arc};

use gst::ClockTime;

use crate::{caption::Caption, output::timeline::frame_end};

/// Longest cue: whoever muxes it keeps the video of that time in memory until it has ended.
const LONGEST: ClockTime = ClockTime::from_seconds(300);

/// What to push next. Each starts where the one before ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Piece {
    Gap(Range<ClockTime>),
    Text(Range<ClockTime>, Arc<Caption>),
}

/// Holds one cue back.
#[derive(Debug, Default)]
pub(crate) struct Merged {
    cue: Option<Cue>,
    /// Where the pieces given so far end.
    cursor: Option<ClockTime>,
}

#[derive(Debug)]
struct Cue {
    caption: Arc<Caption>,
    start: ClockTime,
    /// End of the last frame on which the caption was current.
    end: ClockTime,
    /// When its time is up, whatever comes.
    until: ClockTime,
}

impl Merged {
    /// A frame comes on which `caption` is current, until a time that bounds its cue, and with the time at
    /// which that begins which it is about.
    pub(crate) fn frame(
        &mut self,
        position: ClockTime,
        duration: Option<ClockTime>,
        caption: Option<(&Arc<Caption>, ClockTime, ClockTime)>,
    ) -> Vec<Piece> {
        let end = frame_end(position, duration);
        let mut pieces = Vec::new();
        let start = self.cue.as_ref().map(|cue| cue.start).or(self.cursor);
        if start.is_some_and(|start| position < start) {
            // The stream jumped back, and so do we.
            pieces.extend(self.finish());
            self.cursor = None;
        }
        if let (Some(cue), Some((caption, until, _))) = (&mut self.cue, caption)
            && cue.caption.text == caption.text
            && position.saturating_sub(cue.start) < LONGEST
        {
            cue.end = cue.end.max(end);
            cue.until = until;
            return pieces;
        }
        // Live, a caption is ready some frames after the one it is about; that of a clip is about
        // all its frames.
        let begin = match caption {
            Some((caption, _, about)) if self.is_new(caption) => {
                about.clamp(start.unwrap_or(position).min(position), position)
            }
            _ => position,
        };
        if let Some(cue) = &mut self.cue {
            cue.end = begin.min(cue.until.max(cue.end));
        }
        pieces.extend(self.finish());
        let begin = begin.max(self.cursor.unwrap_or(begin));
        match caption {
            Some((caption, until, _)) => {
                // Nothing was sent so far: a sink that waits for the first of it would hold up the
                // video, and the cue with it. A gap of no length is enough for it.
                if self.cursor.is_none() {
                    pieces.push(Piece::Gap(begin..begin));
                }
                pieces.extend(self.gap(begin));
                self.cue = Some(Cue {
                    caption: caption.clone(),
                    start: begin,
                    end: end.max(begin),
                    until,
                });
            }
            None => {
                self.cursor.get_or_insert(position);
                pieces.extend(self.gap(end));
            }
        }
        pieces
    }

    /// The cue that is held ends here.
    pub(crate) fn finish(&mut self) -> Option<Piece> {
        let cue = self.cue.take()?;
        self.cursor = Some(cue.end);
        (cue.start < cue.end).then_some(Piece::Text(cue.start..cue.end, cue.caption))
    }

    /// The stream ends; a caption that came too late for any frame gets a cue of this length.
    pub(crate) fn end(&mut self, caption: Option<&Arc<Caption>>, length: ClockTime) -> Vec<Piece> {
        let late = caption.filter(|caption| self.is_new(caption));
        let mut pieces = Vec::from_iter(self.finish());
        if let Some((caption, start)) = late.zip(self.cursor) {
            let end = start.saturating_add(length);
            pieces.push(Piece::Text(start..end, caption.clone()));
        }
        *self = Self::default();
        pieces
    }

    fn is_new(&self, caption: &Caption) -> bool {
        let held = self.cue.as_ref();
        held.is_none_or(|cue| cue.caption.text != caption.text)
    }

    /// From what was given so far up to `end`.
    fn gap(&mut self, end: ClockTime) -> Option<Piece> {
        let start = self.cursor.replace(end)?;
        if start > end {
            self.cursor = Some(start);
        }
        (start < end).then_some(Piece::Gap(start..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::{Cost, FrameStamp, Trigger};

    fn ms(ms: u64) -> ClockTime {
        ClockTime::from_mseconds(ms)
    }

    fn said(text: &str, about: u64) -> Arc<Caption> {
        Arc::new(Caption {
            stamp: FrameStamp {
                timestamp: Some(ms(about)),
                stream_time: None,
                running_time: None,
                duration: None,
                first_timestamp: Some(ms(about)),
                frames: 1,
                frame: 0,
                trigger: Trigger::Interval,
                request_id: 0,
            },
            arrival_time: None,
            text: text.into(),
            element: String::new(),
            prompt: String::new(),
            model: String::new(),
            revision: String::new(),
            device: String::new(),
            device_name: String::new(),
            device_memory: 0,
            sequence: 0,
            tokens: 0,
            probability: Some(1.0),
            truncated: false,
            repeated: false,
            partial: false,
            cost: Cost::default(),
        })
    }

    /// A timeline fed with frames of 40 ms; what comes out, as text.
    #[derive(Default)]
    struct Fed(Merged, Vec<String>);

    impl Fed {
        fn note(&mut self, pieces: impl IntoIterator<Item = Piece>) {
            let ms = |span: &Range<ClockTime>| (span.start.mseconds(), span.end.mseconds());
            self.1.extend(pieces.into_iter().map(|piece| match piece {
                Piece::Gap(span) => format!("{:?}", ms(&span)),
                Piece::Text(span, caption) => format!("{:?} {}", ms(&span), caption.text),
            }));
        }

        fn at(&mut self, position: u64, caption: Option<&Arc<Caption>>) -> &mut Self {
            let about = |caption: &Arc<Caption>| caption.stamp.first_timestamp.unwrap();
            let caption = caption.map(|caption| (caption, ms(1_000_000), about(caption)));
            let pieces = self.0.frame(ms(position), Some(ms(40)), caption);
            self.note(pieces);
            self
        }

        fn end(&mut self, caption: Option<&Arc<Caption>>) -> &[String] {
            let pieces = self.0.end(caption, ms(500));
            self.note(pieces);
            &self.1
        }
    }

    #[test]
    fn identical_captions_are_one_cue_that_ends_where_the_next_starts() {
        let mut fed = Fed::default();
        let (a, again, b) = (said("a", 0), said("a", 1000), said("b", 2010));
        fed.at(0, Some(&a)).at(960, Some(&a)).at(1000, Some(&again));
        // A frame was lost in between: its time is the caption's, too.
        fed.at(2010, Some(&b)).at(2050, Some(&b));
        let pieces = fed.end(Some(&b));
        assert_eq!(pieces, ["(0, 0)", "(0, 2010) a", "(2010, 2090) b"]);
    }

    #[test]
    fn stretches_without_a_caption_are_gaps() {
        let mut fed = Fed::default();
        fed.at(0, None).at(40, None);
        fed.at(80, Some(&said("a", 80))).at(120, None).at(200, None);
        let pieces = fed.end(None);
        assert_eq!(
            pieces,
            [
                "(0, 40)",
                "(40, 80)",
                "(80, 120) a",
                "(120, 160)",
                "(160, 240)"
            ]
        );
    }

    #[test]
    fn a_live_cue_starts_with_the_frame_it_is_about() {
        let mut fed = Fed::default();
        let (a, b) = (said("a", 0), said("b", 400));
        // The first can't: what it is about has been given away as a gap.
        fed.at(0, None).at(40, Some(&a)).at(400, Some(&a));
        fed.at(440, Some(&a)).at(480, Some(&b));
        assert_eq!(
            fed.end(Some(&b)),
            ["(0, 40)", "(40, 400) a", "(400, 520) b"]
        );
    }

    #[test]
    fn a_cue_does_not_outlast_its_caption() {
        let mut merged = Merged::default();
        let a = said("a", 0);
        let until = Some((&a, ms(100), ms(0)));
        let nothing = Piece::Gap(ms(0)..ms(0));
        assert_eq!(merged.frame(ms(0), Some(ms(40)), until), [nothing]);
        // The next frame is late.
        let pieces = merged.frame(
            ms(5000),
            Some(ms(40)),
            Some((&said("b", 5000), ms(9000), ms(5000))),
        );
        let text = Piece::Text(ms(0)..ms(100), a);
        assert_eq!(pieces, [text, Piece::Gap(ms(100)..ms(5000))]);
    }

    #[test]
    fn no_cue_goes_on_for_ever() {
        let mut fed = Fed::default();
        let a = said("a", 0);
        fed.at(0, Some(&a)).at(299_960, Some(&a));
        fed.at(300_000, Some(&a)).at(300_040, Some(&a));
        let pieces = fed.end(None);
        assert_eq!(pieces[1..], ["(0, 300000) a", "(300000, 300080) a"]);
    }

    #[test]
    fn a_jump_back_starts_over() {
        let mut fed = Fed::default();
        fed.at(5000, Some(&said("a", 5000)));
        fed.at(0, Some(&said("a", 0)));
        let pieces = fed.end(None);
        let expected = ["(5000, 5000)", "(5000, 5040) a", "(0, 0)", "(0, 40) a"];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn the_last_caption_gets_its_cue() {
        let mut fed = Fed::default();
        assert_eq!(fed.at(0, None).end(Some(&said("a", 0))).len(), 2);
        assert_eq!(fed.1[1], "(40, 540) a");
        // Nothing was ever shown.
        assert_eq!(Fed::default().end(Some(&said("a", 0))), [""; 0]);
    }
}
