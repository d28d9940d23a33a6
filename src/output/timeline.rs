//! Cues and gaps of the text pad, contiguous and without overlap. Each is sent before the frame that it starts with.

use std::ops::Range;

use gst::ClockTime;

/// Assumed duration of a frame whose duration is unknown.
pub(crate) const DEFAULT_FRAME_DURATION: ClockTime = ClockTime::from_mseconds(40);

/// Longest cue in live mode, which bounds the delay of the next caption.
const MAX_LIVE_CUE: ClockTime = ClockTime::from_mseconds(500);

/// Length of a cue that starts with a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CueLength {
    /// Until the next frame is due, in recorded mode.
    Until(ClockTime),
    /// An interval, repeated while the caption is current: in live mode the time of the next caption is unknown.
    Slice(ClockTime),
}

/// Gap and cue to send before a frame, contiguous with what was sent before.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TimelineItems {
    pub(crate) gap: Option<Range<ClockTime>>,
    pub(crate) cue: Option<Range<ClockTime>>,
}

/// Fills the time of the text pad with cues and gaps.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    /// The last cue or gap.
    last: Option<Range<ClockTime>>,
    /// Sequence number of the caption of the last cue.
    last_caption: Option<u64>,
}

impl Timeline {
    /// Fills the timeline up to a frame, and from the frame on with a cue if a caption, given by its sequence number, is
    /// current.
    pub(crate) fn frame(
        &mut self,
        position: ClockTime,
        duration: Option<ClockTime>,
        caption: Option<u64>,
        cue: CueLength,
    ) -> TimelineItems {
        let end = frame_end(position, duration);
        let mut cursor = match &self.last {
            // The stream has jumped back to before the last item.
            Some(last) if position >= last.start => last.end,
            _ => position,
        };
        let until = match cue {
            CueLength::Until(until) => until,
            CueLength::Slice(interval) => {
                position.saturating_add(interval.min(MAX_LIVE_CUE)).max(end)
            }
        };
        // In recorded mode a cue may start after its frame, if the cue before was longer than its frames; in live mode a
        // cue never starts before its frame.
        let fits = match cue {
            CueLength::Until(until) => caption != self.last_caption && until > cursor,
            CueLength::Slice(_) => false,
        };
        let mut items = TimelineItems::default();
        match caption {
            Some(_) if position >= cursor || fits => {
                if position > cursor {
                    items.gap = Some(cursor..position);
                    cursor = position;
                }
                items.cue = Some(cursor..until.max(end));
                self.last_caption = caption;
            }
            None if end > cursor => items.gap = Some(cursor..end),
            _ => (),
        }
        let first = items.gap.as_ref().or(items.cue.as_ref());
        let last = items.cue.as_ref().or(items.gap.as_ref());
        if let Some((first, last)) = first.zip(last) {
            self.last = Some(first.start..last.end);
        }
        items
    }

    /// Ends the timeline, with a cue of this length if the caption came too late for any frame.
    pub(crate) fn end(
        &mut self,
        caption: Option<u64>,
        length: ClockTime,
    ) -> Option<Range<ClockTime>> {
        let last = self.last.take()?;
        caption.filter(|_| caption != self.last_caption)?;
        Some(last.end..last.end.saturating_add(length))
    }
}

/// Length of the cue of a caption that came too late for any frame.
pub(crate) fn final_cue_length(interval: ClockTime) -> ClockTime {
    interval.min(MAX_LIVE_CUE).max(DEFAULT_FRAME_DURATION)
}

/// End of a frame.
pub(crate) fn frame_end(position: ClockTime, duration: Option<ClockTime>) -> ClockTime {
    position.saturating_add(duration.unwrap_or(DEFAULT_FRAME_DURATION))
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

    fn at(
        timeline: &mut Timeline,
        position: u64,
        caption: Option<u64>,
        cue: CueLength,
    ) -> TimelineItems {
        timeline.frame(ms(position), Some(ms(PERIOD)), caption, cue)
    }

    fn gap(range: Range<u64>) -> TimelineItems {
        TimelineItems {
            gap: span(range),
            cue: None,
        }
    }

    fn one_cue(range: Range<u64>) -> TimelineItems {
        TimelineItems {
            gap: None,
            cue: span(range),
        }
    }

    #[test]
    fn gaps_follow_the_frames() {
        let mut t = Timeline::default();
        let cue = CueLength::Slice(ms(1000));
        assert_eq!(at(&mut t, 80, None, cue), gap(80..120));
        assert_eq!(at(&mut t, 120, None, cue), gap(120..160));
        // A lost frame leaves no hole, an early one no overlap.
        assert_eq!(at(&mut t, 200, None, cue), gap(160..240));
        assert_eq!(at(&mut t, 230, None, cue), gap(240..270));
    }

    #[test]
    fn recorded_cues_last_until_the_next_due_frame() {
        let mut t = Timeline::default();
        let until = |ms_| CueLength::Until(ms(ms_));
        assert_eq!(at(&mut t, 0, Some(0), until(1000)), one_cue(0..1000));
        assert_eq!(
            at(&mut t, 40, Some(0), until(1000)),
            TimelineItems::default()
        );
        assert_eq!(
            at(&mut t, 960, Some(0), until(1000)),
            TimelineItems::default()
        );
        let items = at(&mut t, 1001, Some(1), until(2000));
        assert_eq!(
            items,
            TimelineItems {
                gap: span(1000..1001),
                cue: span(1001..2000)
            }
        );
        // No new caption (the picture did not change): the old one goes on.
        assert_eq!(at(&mut t, 2000, Some(1), until(3000)), one_cue(2000..3000));
        // A frame that comes before its predecessor's time is up still gets its place.
        assert_eq!(at(&mut t, 2990, Some(2), until(4000)), one_cue(3000..4000));
    }

    #[test]
    fn live_cues_are_repeated_and_wait_for_their_turn() {
        let mut t = Timeline::default();
        let cue = CueLength::Slice(ms(200));
        assert_eq!(at(&mut t, 0, None, cue), gap(0..40));
        assert_eq!(at(&mut t, 40, Some(0), cue), one_cue(40..240));
        assert_eq!(at(&mut t, 80, Some(1), cue), TimelineItems::default());
        assert_eq!(at(&mut t, 200, Some(1), cue), TimelineItems::default());
        assert_eq!(at(&mut t, 240, Some(1), cue), one_cue(240..440));
        assert_eq!(at(&mut t, 440, Some(1), cue), one_cue(440..640));
        // At least a frame, at most half a second.
        assert_eq!(
            at(&mut t, 640, Some(1), CueLength::Slice(ms(0))),
            one_cue(640..680)
        );
        assert_eq!(
            at(&mut t, 680, Some(1), CueLength::Slice(ms(60_000))),
            one_cue(680..1180)
        );
    }

    #[test]
    fn a_jump_back_starts_over() {
        let mut t = Timeline::default();
        let cue = CueLength::Slice(ms(1000));
        assert_eq!(at(&mut t, 5000, Some(0), cue), one_cue(5000..5500));
        assert_eq!(at(&mut t, 0, Some(0), cue), one_cue(0..500));
    }

    #[test]
    fn the_last_caption_gets_its_cue() {
        let mut t = Timeline::default();
        assert_eq!(t.end(Some(0), ms(1000)), None);
        at(&mut t, 0, Some(0), CueLength::Slice(ms(1000)));
        assert_eq!(t.end(Some(0), ms(1000)), None);
        let mut t = Timeline::default();
        at(&mut t, 0, None, CueLength::Slice(ms(1000)));
        assert_eq!(t.end(Some(0), ms(500)), span(40..540));
    }
}
