//! Playback time of frames: how much of the stream has been played, whatever its timestamps do.

use gst::ClockTime;

use crate::output::timeline::DEFAULT_FRAME_DURATION;

/// Frames in a row whose timestamps may fail to advance, because decoders may give some out of order, before frames are
/// counted instead.
const MAX_STALLED: u32 = 2;

/// Frames by which a timestamp may step back; more is a jump.
const MAX_REORDERED: u64 = 5;

/// Longest gap that counts as played. Timestamps that jump by centuries must not use up the clock's range.
const MAX_GAP: ClockTime = ClockTime::from_seconds(3600);

/// A clock that advances with the frames and never runs backwards.
///
/// The clock follows timestamps that advance in the direction of playback, over gaps too. A missing timestamp continues
/// from the last one. Where timestamps jump back or stand still, each frame counts for its duration.
#[derive(Debug, Default)]
pub(crate) struct PlaybackClock {
    reverse: bool,
    /// Position of the first frame of the segment, if the frame has no timestamp.
    origin: ClockTime,
    /// Playback time of the last frame.
    elapsed: ClockTime,
    /// A position in the stream and its playback time; `None` before the first frame of the segment.
    anchor: Option<(ClockTime, ClockTime)>,
    /// Position of the last frame.
    last: ClockTime,
    /// Duration of the last frame; `None` before the first frame of the stream.
    step: Option<ClockTime>,
    /// Whether a frame of this segment had a timestamp.
    is_timed: bool,
    /// Frames since the timestamps last advanced.
    stalled: u32,
}

/// Time of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameTime {
    /// Position in the stream: the timestamp, or the one that the frame would have.
    pub(crate) position: ClockTime,
    /// Playback time at which the frame begins; never less than that of the frame before.
    pub(crate) elapsed: ClockTime,
    /// Whether the timestamps have jumped back or by more than an hour, or a segment has begun.
    pub(crate) jumped: bool,
    /// How far the timestamps have jumped within the segment.
    pub(crate) jump_size: ClockTime,
}

impl PlaybackClock {
    /// Begins a segment; the playback time goes on.
    pub(crate) fn segment(&mut self, segment: &gst::FormattedSegment<ClockTime>) {
        self.reverse = segment.rate() < 0.0;
        let origin = match self.reverse {
            true => segment.stop(),
            false => segment.start(),
        };
        self.origin = origin.unwrap_or_default();
        self.anchor = None;
        self.is_timed = false;
    }

    /// Advances to a frame. `None` if neither this frame nor any before has had a timestamp or a duration.
    pub(crate) fn advance(
        &mut self,
        pts: Option<ClockTime>,
        duration: Option<ClockTime>,
    ) -> Option<FrameTime> {
        if pts.is_none() && duration.is_none() && self.step.is_none() {
            return None;
        }
        let last_step = self.step;
        let step = last_step.unwrap_or_default();
        let guess = match (self.anchor, self.reverse) {
            (None, false) => self.origin,
            (None, true) => self.origin.saturating_sub(duration.unwrap_or_default()),
            (Some(_), false) => self.last.saturating_add(step),
            (Some(_), true) => self.last.saturating_sub(step),
        };
        let position = pts.unwrap_or(guess);
        // Until a frame has a timestamp, positions are guesses from the segment's start.
        let anchor = self.anchor.filter(|_| self.is_timed || pts.is_none());
        let (mut seen, mut jumped, mut jump_size) = (None, false, ClockTime::ZERO);
        match anchor {
            Some((start, since)) => {
                let by_time = i128::from(since.nseconds()) + self.ahead(start, position);
                let by_time = u64::try_from(by_time.max(0)).unwrap_or(u64::MAX);
                let by_time = ClockTime::try_from(by_time).unwrap_or(ClockTime::MAX);
                let reordered = i128::from(step.nseconds()) * i128::from(MAX_REORDERED);
                if by_time > self.elapsed.saturating_add(MAX_GAP) {
                    jumped = true;
                    jump_size = by_time - self.elapsed;
                    self.elapsed = self.elapsed.saturating_add(MAX_GAP);
                } else if by_time > self.elapsed {
                    // A gap is not the duration of a frame.
                    seen = Some((by_time - self.elapsed).min(ClockTime::SECOND));
                    self.elapsed = by_time;
                    self.stalled = 0;
                } else if -self.ahead(self.last, position) > reordered {
                    jumped = true;
                    jump_size = position.absdiff(self.last);
                } else {
                    self.stalled = self.stalled.saturating_add(1);
                    let frames = match self.stalled {
                        0..=MAX_STALLED => 0,
                        stalled if stalled == MAX_STALLED + 1 => u64::from(stalled),
                        _ => 1,
                    };
                    self.elapsed = self.elapsed.saturating_add(step.saturating_mul(frames));
                }
            }
            None => jumped = true,
        }
        if jumped {
            self.elapsed = self.elapsed.saturating_add(step);
            self.anchor = Some((position, self.elapsed));
            self.stalled = 0;
        }
        // A frame of unknown duration lasts as long as the one before.
        self.step = duration
            .or(seen)
            .or(last_step)
            .or(Some(DEFAULT_FRAME_DURATION));
        self.last = position;
        self.is_timed |= pts.is_some();
        Some(FrameTime {
            position: match (self.stalled, self.anchor) {
                // The position that the frame would have if the timestamps were in order.
                (1..=MAX_STALLED, Some((start, since))) => self.moved(start, self.elapsed - since),
                _ => position,
            },
            elapsed: self.elapsed,
            jumped,
            jump_size,
        })
    }

    /// How far `to` is ahead of `from` in the direction of playback, in nanoseconds.
    fn ahead(&self, from: ClockTime, to: ClockTime) -> i128 {
        let forward = i128::from(to.nseconds()) - i128::from(from.nseconds());
        if self.reverse { -forward } else { forward }
    }

    fn moved(&self, from: ClockTime, by: ClockTime) -> ClockTime {
        match self.reverse {
            true => from.saturating_sub(by),
            false => from.saturating_add(by),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> ClockTime {
        ClockTime::from_mseconds(ms)
    }

    fn clock(rate: f64) -> PlaybackClock {
        gst::init().unwrap();
        let mut segment = gst::FormattedSegment::new();
        segment.set_rate(rate);
        segment.set_stop(ms(60_000));
        let mut clock = PlaybackClock::default();
        clock.segment(&segment);
        clock
    }

    /// Milliseconds played at each of these timestamps, of frames of 40 ms.
    fn elapsed(rate: f64, pts: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let mut clock = clock(rate);
        let times = pts.into_iter().map(|pts| {
            let time = clock.advance(Some(ms(pts)), Some(ms(40)));
            time.unwrap().elapsed.mseconds()
        });
        times.collect()
    }

    #[test]
    fn it_follows_the_timestamps_in_either_direction() {
        assert_eq!(elapsed(1.0, [500, 540, 580]), [0, 40, 80]);
        assert_eq!(elapsed(-1.0, [500, 460, 420]), [0, 40, 80]);
        // Over a gap.
        assert_eq!(elapsed(1.0, [0, 40, 9000, 9040]), [0, 40, 9000, 9040]);
    }

    #[test]
    fn where_timestamps_jump_back_frames_are_counted() {
        let looped = (0..100).map(|i| i % 10 * 40);
        let counted: Vec<_> = (0..100).map(|i| i * 40).collect();
        assert_eq!(elapsed(1.0, looped), counted);
        let backwards = [5000, 4500, 4000, 3500];
        assert_eq!(elapsed(1.0, backwards), [0, 40, 80, 120]);
    }

    #[test]
    fn where_timestamps_stand_still_frames_are_counted() {
        assert_eq!(elapsed(1.0, [0; 6]), [0, 0, 0, 120, 160, 200]);
        // Of a clock that is too coarse: no time is counted twice.
        let coarse = (0..100).map(|i| i / 25 * 1000);
        let played = elapsed(1.0, coarse);
        assert!(played.is_sorted(), "{played:?}");
        assert_eq!([played[25], played[50], played[75]], [1000, 2000, 3000]);
        // Back and forth.
        let played = elapsed(1.0, (0..100).map(|i| i % 2 * 40));
        assert!((3800..=4000).contains(&played[99]), "{played:?}");
    }

    #[test]
    fn frames_out_of_order_do_not_hurry_it() {
        let reordered = [0, 120, 40, 80, 160, 280, 200, 240, 320];
        let played = elapsed(1.0, reordered);
        assert_eq!(played, [0, 120, 120, 120, 160, 280, 280, 280, 320]);
    }

    #[test]
    fn a_missing_timestamp_continues_from_the_last() {
        let mut clock = clock(1.0);
        let mut at = |pts: Option<u64>| {
            let time = clock.advance(pts.map(ms), Some(ms(40))).unwrap();
            (time.position.mseconds(), time.elapsed.mseconds())
        };
        // Before the first that is known, from the segment's start on.
        assert_eq!(at(None), (0, 0));
        assert_eq!(at(None), (40, 40));
        assert_eq!(at(Some(100_000)), (100_000, 80));
        assert_eq!(at(None), (100_040, 120));
        assert_eq!(at(None), (100_080, 160));
        assert_eq!(at(Some(100_120)), (100_120, 200));
    }

    #[test]
    fn without_a_duration_a_frame_lasts_as_long_as_the_one_before() {
        let mut clock = clock(1.0);
        assert_eq!(clock.advance(None, None), None);
        let mut at = |pts: Option<u64>| {
            let time = clock.advance(pts.map(ms), None).unwrap();
            (time.position.mseconds(), time.elapsed.mseconds())
        };
        assert_eq!(at(Some(1000)), (1000, 0));
        assert_eq!(at(Some(1100)), (1100, 100));
        assert_eq!(at(None), (1200, 200));
        assert_eq!(at(Some(0)), (0, 300));
    }

    #[test]
    fn a_new_segment_goes_on_from_what_was_played() {
        let mut clock = clock(1.0);
        for pts in [0, 40] {
            clock.advance(Some(ms(pts)), Some(ms(40)));
        }
        let mut segment = gst::FormattedSegment::new();
        segment.set_rate(-2.0);
        segment.set_stop(ms(9000));
        clock.segment(&segment);
        let mut at = |pts: Option<u64>| clock.advance(pts.map(ms), Some(ms(40))).unwrap();
        let expected = FrameTime {
            position: ms(8960),
            elapsed: ms(80),
            jumped: true,
            jump_size: ClockTime::ZERO,
        };
        assert_eq!(at(None), expected);
        assert_eq!(at(Some(8920)).elapsed, ms(120));
        assert_eq!(at(Some(8880)).elapsed, ms(160));
    }

    #[test]
    fn no_timestamp_is_too_much_for_it() {
        let most = ClockTime::MAX.mseconds();
        for rate in [1.0, -1.0] {
            let mut clock = clock(rate);
            for pts in [most, 0, most, most, 1, 0].repeat(1000) {
                clock.advance(Some(ms(pts)), Some(ms(40)));
                clock.advance(None, None);
            }
            // And goes on.
            let before = clock.advance(Some(ms(0)), Some(ms(40))).unwrap();
            let after = clock.advance(Some(ms(30_000)), Some(ms(40))).unwrap();
            assert!(after.elapsed > before.elapsed || rate < 0.0);
            clock.advance(Some(ms(0)), Some(ClockTime::MAX));
            clock.advance(None, None);
        }
    }
}
