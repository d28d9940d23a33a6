//! Where captions stand in time on the text pad: cues and gaps that follow each other without a
//! hole and without overlap, each before the frame it starts with.

use std::ops::Range;

use gst::ClockTime;

/// What a frame whose duration nobody knows is taken to last, on the text pad only.
pub(crate) const UNKNOWN: ClockTime = ClockTime::from_mseconds(40);

/// Longest cue in live mode, so that a newer caption never waits longer for its place.
const SLICE: ClockTime = ClockTime::from_mseconds(500);

/// How long a cue lasts that starts with this frame.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cue {
    /// Until the next frame will be described: known, because nothing overtakes in recorded mode.
    Until(ClockTime),
    /// A slice that is repeated for as long as the caption is current: in live mode nobody knows
    /// when the next will come.
    Slice(ClockTime),
}

/// What to send before a frame. Both are contiguous with what was sent before.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Items {
    pub(crate) gap: Option<Range<ClockTime>>,
    pub(crate) text: Option<Range<ClockTime>>,
}

/// What the text pad's timeline is filled with so far.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    /// The last cue or gap.
    last: Option<Range<ClockTime>>,
    /// The caption of the last cue, by number.
    shown: Option<u64>,
}

impl Timeline {
    /// Fills the timeline up to a frame and, if `caption` (by its number) is current, with it.
    pub(crate) fn frame(
        &mut self,
        position: ClockTime,
        duration: Option<ClockTime>,
        caption: Option<u64>,
        cue: Cue,
    ) -> Items {
        let end = frame_end(position, duration);
        let mut cursor = match &self.last {
            // A frame before all that was sent: the stream jumped back, and so do we.
            Some(last) if position >= last.start => last.end,
            _ => position,
        };
        let until = match cue {
            Cue::Until(until) => until,
            Cue::Slice(interval) => position.saturating_add(interval.min(SLICE)).max(end),
        };
        // In recorded mode a caption may start behind its frame, where the frame before was given
        // more time than it took; in live mode a cue never starts before its frame.
        let fits = match cue {
            Cue::Until(until) => caption != self.shown && until > cursor,
            Cue::Slice(_) => false,
        };
        let mut items = Items::default();
        match caption {
            Some(_) if position >= cursor || fits => {
                if position > cursor {
                    items.gap = Some(cursor..position);
                    cursor = position;
                }
                items.text = Some(cursor..until.max(end));
                self.shown = caption;
            }
            None if end > cursor => items.gap = Some(cursor..end),
            _ => (),
        }
        let first = items.gap.as_ref().or(items.text.as_ref());
        let last = items.text.as_ref().or(items.gap.as_ref());
        if let Some((first, last)) = first.zip(last) {
            self.last = Some(first.start..last.end);
        }
        items
    }

    /// A last cue for a caption that came too late for any frame.
    pub(crate) fn end(
        &mut self,
        caption: Option<u64>,
        length: ClockTime,
    ) -> Option<Range<ClockTime>> {
        let last = self.last.take()?;
        caption.filter(|_| caption != self.shown)?;
        Some(last.end..last.end.saturating_add(length))
    }
}

/// How long a cue lasts that no frame is left for.
pub(crate) fn late_cue(interval: ClockTime) -> ClockTime {
    interval.min(SLICE).max(UNKNOWN)
}

/// Where a frame ends, as far as one can tell.
pub(crate) fn frame_end(position: ClockTime, duration: Option<ClockTime>) -> ClockTime {
    position.saturating_add(duration.unwrap_or(UNKNOWN))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: u64 = 40;

    fn ms(ms: u64) -> ClockTime {
        ClockTime::from_mseconds(ms)
    }

    fn span(range: Range<u64>) -> Option<Range<ClockTime>> {
        Some(ms(range.start)..ms(range.end))
    }

    fn at(timeline: &mut Timeline, position: u64, caption: Option<u64>, cue: Cue) -> Items {
        timeline.frame(ms(position), Some(ms(PERIOD)), caption, cue)
    }

    fn gap(range: Range<u64>) -> Items {
        Items {
            gap: span(range),
            text: None,
        }
    }

    fn text(range: Range<u64>) -> Items {
        Items {
            gap: None,
            text: span(range),
        }
    }

    #[test]
    fn gaps_follow_the_frames() {
        let mut t = Timeline::default();
        let cue = Cue::Slice(ms(1000));
        assert_eq!(at(&mut t, 80, None, cue), gap(80..120));
        assert_eq!(at(&mut t, 120, None, cue), gap(120..160));
        // A lost frame leaves no hole, an early one no overlap.
        assert_eq!(at(&mut t, 200, None, cue), gap(160..240));
        assert_eq!(at(&mut t, 230, None, cue), gap(240..270));
    }

    #[test]
    fn recorded_cues_last_until_the_next_due_frame() {
        let mut t = Timeline::default();
        let until = |ms_| Cue::Until(ms(ms_));
        assert_eq!(at(&mut t, 0, Some(0), until(1000)), text(0..1000));
        assert_eq!(at(&mut t, 40, Some(0), until(1000)), Items::default());
        assert_eq!(at(&mut t, 960, Some(0), until(1000)), Items::default());
        let items = at(&mut t, 1001, Some(1), until(2000));
        assert_eq!(
            items,
            Items {
                gap: span(1000..1001),
                text: span(1001..2000)
            }
        );
        // No new caption (the picture did not change): the old one goes on.
        assert_eq!(at(&mut t, 2000, Some(1), until(3000)), text(2000..3000));
        // A frame that comes before its predecessor's time is up still gets its place.
        assert_eq!(at(&mut t, 2990, Some(2), until(4000)), text(3000..4000));
    }

    #[test]
    fn live_cues_are_repeated_and_wait_for_their_turn() {
        let mut t = Timeline::default();
        let cue = Cue::Slice(ms(200));
        assert_eq!(at(&mut t, 0, None, cue), gap(0..40));
        assert_eq!(at(&mut t, 40, Some(0), cue), text(40..240));
        assert_eq!(at(&mut t, 80, Some(1), cue), Items::default());
        assert_eq!(at(&mut t, 200, Some(1), cue), Items::default());
        assert_eq!(at(&mut t, 240, Some(1), cue), text(240..440));
        assert_eq!(at(&mut t, 440, Some(1), cue), text(440..640));
        // At least a frame, at most half a second.
        assert_eq!(at(&mut t, 640, Some(1), Cue::Slice(ms(0))), text(640..680));
        assert_eq!(
            at(&mut t, 680, Some(1), Cue::Slice(ms(60_000))),
            text(680..1180)
        );
    }

    #[test]
    fn a_jump_back_starts_over() {
        let mut t = Timeline::default();
        let cue = Cue::Slice(ms(1000));
        assert_eq!(at(&mut t, 5000, Some(0), cue), text(5000..5500));
        assert_eq!(at(&mut t, 0, Some(0), cue), text(0..500));
    }

    #[test]
    fn the_last_caption_gets_its_cue() {
        let mut t = Timeline::default();
        assert_eq!(t.end(Some(0), ms(1000)), None);
        at(&mut t, 0, Some(0), Cue::Slice(ms(1000)));
        assert_eq!(t.end(Some(0), ms(1000)), None);
        let mut t = Timeline::default();
        at(&mut t, 0, None, Cue::Slice(ms(1000)));
        assert_eq!(t.end(Some(0), ms(500)), span(40..540));
    }
}
