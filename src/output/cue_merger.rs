//! Cues for files (`merge-captions`): identical captions in a row are one cue, which ends where the next caption starts.

use std::{ops::Range, sync::Arc};

use gst::ClockTime;

use crate::{caption::Caption, output::timeline::frame_end};

/// Longest cue: a muxer keeps the video of that time in memory until the cue has ended.
const MAX_CUE: ClockTime = ClockTime::from_seconds(300);

/// A gap or cue to push on the text pad. Each starts where the one before ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TextItem {
    Gap(Range<ClockTime>),
    Cue(Range<ClockTime>, Arc<Caption>),
}

/// Merges captions into cues. Holds one cue back, because its end is unknown.
#[derive(Debug, Default)]
pub(crate) struct CueMerger {
    cue: Option<OpenCue>,
    /// End of the items returned so far.
    cursor: Option<ClockTime>,
}

#[derive(Debug)]
struct OpenCue {
    caption: Arc<Caption>,
    start: ClockTime,
    /// End of the last frame on which the caption was current.
    end: ClockTime,
    /// Latest end of the cue.
    expires_at: ClockTime,
}

impl CueMerger {
    /// Advances to a frame. A caption that is current on the frame comes with the time at which it expires and the time
    /// at which the frames that it describes begin.
    pub(crate) fn frame(
        &mut self,
        position: ClockTime,
        duration: Option<ClockTime>,
        caption: Option<(&Arc<Caption>, ClockTime, ClockTime)>,
    ) -> Vec<TextItem> {
        let end = frame_end(position, duration);
        let mut items = Vec::new();
        let start = self.cue.as_ref().map(|cue| cue.start).or(self.cursor);
        if start.is_some_and(|start| position < start) {
            // The stream has jumped back.
            items.extend(self.finish());
            self.cursor = None;
        }
        if let (Some(cue), Some((caption, expires_at, _))) = (&mut self.cue, caption)
            && cue.caption.text == caption.text
            && position.saturating_sub(cue.start) < MAX_CUE
        {
            cue.end = cue.end.max(end);
            cue.expires_at = expires_at;
            return items;
        }
        // In live mode a caption is ready some frames after the one that it describes; that of a clip describes all
        // frames of the clip.
        let begin = match caption {
            Some((caption, _, caption_start)) if self.is_new(caption) => {
                caption_start.clamp(start.unwrap_or(position).min(position), position)
            }
            _ => position,
        };
        if let Some(cue) = &mut self.cue {
            cue.end = begin.min(cue.expires_at.max(cue.end));
        }
        items.extend(self.finish());
        let begin = begin.max(self.cursor.unwrap_or(begin));
        match caption {
            Some((caption, expires_at, _)) => {
                // Nothing was sent so far. A sink that waits for its first item would block the video, and with it the
                // end of this cue; an empty gap lets it go on.
                if self.cursor.is_none() {
                    items.push(TextItem::Gap(begin..begin));
                }
                items.extend(self.gap(begin));
                self.cue = Some(OpenCue {
                    caption: caption.clone(),
                    start: begin,
                    end: end.max(begin),
                    expires_at,
                });
            }
            None => {
                self.cursor.get_or_insert(position);
                items.extend(self.gap(end));
            }
        }
        items
    }

    /// Ends the cue in progress.
    pub(crate) fn finish(&mut self) -> Option<TextItem> {
        let cue = self.cue.take()?;
        self.cursor = Some(cue.end);
        (cue.start < cue.end).then_some(TextItem::Cue(cue.start..cue.end, cue.caption))
    }

    /// Ends the stream. A caption that came too late for any frame gets a cue of this length.
    pub(crate) fn end(
        &mut self,
        caption: Option<&Arc<Caption>>,
        length: ClockTime,
    ) -> Vec<TextItem> {
        let late = caption.filter(|caption| self.is_new(caption));
        let mut items = Vec::from_iter(self.finish());
        if let Some((caption, start)) = late.zip(self.cursor) {
            let end = start.saturating_add(length);
            items.push(TextItem::Cue(start..end, caption.clone()));
        }
        *self = Self::default();
        items
    }

    fn is_new(&self, caption: &Caption) -> bool {
        let held = self.cue.as_ref();
        held.is_none_or(|cue| cue.caption.text != caption.text)
    }

    /// A gap from the end of the items so far to `end`.
    fn gap(&mut self, end: ClockTime) -> Option<TextItem> {
        let start = self.cursor.replace(end)?;
        if start > end {
            self.cursor = Some(start);
        }
        (start < end).then_some(TextItem::Gap(start..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::FrameStamp;

    fn ms(ms: u64) -> ClockTime {
        ClockTime::from_mseconds(ms)
    }

    /// A caption of the frame at `start`.
    fn caption(text: &str, start: u64) -> Arc<Caption> {
        Arc::new(Caption {
            stamp: FrameStamp {
                timestamp: Some(ms(start)),
                first_timestamp: Some(ms(start)),
                ..FrameStamp::default()
            },
            text: text.into(),
            ..Caption::default()
        })
    }

    /// A merger that gets frames of 40 ms, and its items as text.
    #[derive(Default)]
    struct Harness(CueMerger, Vec<String>);

    impl Harness {
        fn record(&mut self, items: impl IntoIterator<Item = TextItem>) {
            let ms = |span: &Range<ClockTime>| (span.start.mseconds(), span.end.mseconds());
            self.1.extend(items.into_iter().map(|item| match item {
                TextItem::Gap(span) => format!("{:?}", ms(&span)),
                TextItem::Cue(span, caption) => format!("{:?} {}", ms(&span), caption.text),
            }));
        }

        fn at(&mut self, position: u64, caption: Option<&Arc<Caption>>) -> &mut Self {
            let start = |caption: &Arc<Caption>| caption.stamp.first_timestamp.unwrap();
            let caption = caption.map(|caption| (caption, ms(1_000_000), start(caption)));
            let items = self.0.frame(ms(position), Some(ms(40)), caption);
            self.record(items);
            self
        }

        fn end(&mut self, caption: Option<&Arc<Caption>>) -> &[String] {
            let items = self.0.end(caption, ms(500));
            self.record(items);
            &self.1
        }
    }

    #[test]
    fn identical_captions_are_one_cue_that_ends_where_the_next_starts() {
        let mut harness = Harness::default();
        let (a, again, b) = (caption("a", 0), caption("a", 1000), caption("b", 2010));
        harness
            .at(0, Some(&a))
            .at(960, Some(&a))
            .at(1000, Some(&again));
        // The time of a lost frame belongs to the caption too.
        harness.at(2010, Some(&b)).at(2050, Some(&b));
        let items = harness.end(Some(&b));
        assert_eq!(items, ["(0, 0)", "(0, 2010) a", "(2010, 2090) b"]);
    }

    #[test]
    fn stretches_without_a_caption_are_gaps() {
        let mut harness = Harness::default();
        harness.at(0, None).at(40, None);
        harness
            .at(80, Some(&caption("a", 80)))
            .at(120, None)
            .at(200, None);
        let items = harness.end(None);
        assert_eq!(
            items,
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
    fn a_live_cue_starts_with_the_frame_that_it_describes() {
        let mut harness = Harness::default();
        let (a, b) = (caption("a", 0), caption("b", 400));
        // Not the first: its frame is already covered by a gap.
        harness.at(0, None).at(40, Some(&a)).at(400, Some(&a));
        harness.at(440, Some(&a)).at(480, Some(&b));
        assert_eq!(
            harness.end(Some(&b)),
            ["(0, 40)", "(40, 400) a", "(400, 520) b"]
        );
    }

    #[test]
    fn a_cue_does_not_outlast_its_caption() {
        let mut merger = CueMerger::default();
        let a = caption("a", 0);
        let expiring = Some((&a, ms(100), ms(0)));
        let nothing = TextItem::Gap(ms(0)..ms(0));
        assert_eq!(merger.frame(ms(0), Some(ms(40)), expiring), [nothing]);
        // The next frame is late.
        let items = merger.frame(
            ms(5000),
            Some(ms(40)),
            Some((&caption("b", 5000), ms(9000), ms(5000))),
        );
        let text = TextItem::Cue(ms(0)..ms(100), a);
        assert_eq!(items, [text, TextItem::Gap(ms(100)..ms(5000))]);
    }

    #[test]
    fn no_cue_goes_on_for_ever() {
        let mut harness = Harness::default();
        let a = caption("a", 0);
        harness.at(0, Some(&a)).at(299_960, Some(&a));
        harness.at(300_000, Some(&a)).at(300_040, Some(&a));
        let items = harness.end(None);
        assert_eq!(items[1..], ["(0, 300000) a", "(300000, 300080) a"]);
    }

    #[test]
    fn a_jump_back_starts_over() {
        let mut harness = Harness::default();
        harness.at(5000, Some(&caption("a", 5000)));
        harness.at(0, Some(&caption("a", 0)));
        let items = harness.end(None);
        let expected = ["(5000, 5000)", "(5000, 5040) a", "(0, 0)", "(0, 40) a"];
        assert_eq!(items, expected);
    }

    #[test]
    fn the_last_caption_gets_its_cue() {
        let mut harness = Harness::default();
        assert_eq!(harness.at(0, None).end(Some(&caption("a", 0))).len(), 2);
        assert_eq!(harness.1[1], "(40, 540) a");
        // There was no frame.
        assert_eq!(Harness::default().end(Some(&caption("a", 0))), [""; 0]);
    }
}
