//! How much of the stream has been played, whatever its timestamps do.

use gst::ClockTime;

use crate::output::timeline::UNKNOWN;

/// Frames whose timestamps don't advance before their number counts instead: decoders give some out of order.
const PATIENCE: u32 = 2;

/// A step back of more than so many frames is a jump.
const REORDERED: u64 = 5;

/// Longest hole that counts as played. Timestamps that leap by centuries must not use up the clock.
const HOLE: ClockTime = ClockTime::from_seconds(3600);

/// A clock that runs with the frames and never back.
///
/// It follows the timestamps where they advance in the direction of playback, through holes too. A missing
/// timestamp is taken to continue from the last. Where timestamps jump back or stand still, each frame counts
/// for its duration.
#[derive(Debug, Default)]
pub(crate) struct Playhead {
    reverse: bool,
    /// Where a segment begins whose first frame has no timestamp.
    origin: ClockTime,
    /// What had been played when the last frame began.
    elapsed: ClockTime,
    /// A position in the stream, and what had been played there; none until the segment's first frame.
    anchor: Option<(ClockTime, ClockTime)>,
    /// Position of the last frame.
    last: ClockTime,
    /// How long the last frame lasts; `None` before the very first.
    step: Option<ClockTime>,
    /// A frame of this segment had a timestamp.
    is_timed: bool,
    /// Frames since the timestamps last advanced.
    behind: u32,
}

/// Where a frame stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    /// In the stream: the timestamp, or where it would be.
    pub(crate) position: ClockTime,
    /// What had been played when the frame began. Never less than for the frame before.
    pub(crate) elapsed: ClockTime,
    /// The timestamps have jumped back or by more than an hour, or a segment has begun.
    pub(crate) jumped: bool,
    /// How far they have jumped within the segment.
    pub(crate) leap: ClockTime,
}

impl Playhead {
    /// What comes is in another segment; what had been played counts on.
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

    /// A frame begins. `None` where it has neither a timestamp nor a duration, and none before had one.
    pub(crate) fn advance(
        &mut self,
        pts: Option<ClockTime>,
        duration: Option<ClockTime>,
    ) -> Option<Moment> {
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
        let (mut seen, mut jumped, mut leap) = (None, false, ClockTime::ZERO);
        match anchor {
            Some((start, since)) => {
                let by_time = i128::from(since.nseconds()) + self.ahead(start, position);
                let by_time = u64::try_from(by_time.max(0)).unwrap_or(u64::MAX);
                let by_time = ClockTime::try_from(by_time).unwrap_or(ClockTime::MAX);
                let reordered = i128::from(step.nseconds()) * i128::from(REORDERED);
                if by_time > self.elapsed.saturating_add(HOLE) {
                    jumped = true;
                    leap = by_time - self.elapsed;
                    self.elapsed = self.elapsed.saturating_add(HOLE);
                } else if by_time > self.elapsed {
                    // A hole is no frame.
                    seen = Some((by_time - self.elapsed).min(ClockTime::SECOND));
                    self.elapsed = by_time;
                    self.behind = 0;
                } else if -self.ahead(self.last, position) > reordered {
                    jumped = true;
                    leap = position.absdiff(self.last);
                } else {
                    self.behind = self.behind.saturating_add(1);
                    let frames = match self.behind {
                        0..=PATIENCE => 0,
                        behind if behind == PATIENCE + 1 => u64::from(behind),
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
            self.behind = 0;
        }
        // Where nobody says how long it lasts: as long as the one before did.
        self.step = duration.or(seen).or(last_step).or(Some(UNKNOWN));
        self.last = position;
        self.is_timed |= pts.is_some();
        Some(Moment {
            position: match (self.behind, self.anchor) {
                // Where the timestamps would be if they were in order.
                (1..=PATIENCE, Some((start, since))) => self.moved(start, self.elapsed - since),
                _ => position,
            },
            elapsed: self.elapsed,
            jumped,
            leap,
        })
    }

    /// How far the second position is ahead of the first, in the direction of playback.
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

    fn playhead(rate: f64) -> Playhead {
        gst::init().unwrap();
        let mut segment = gst::FormattedSegment::new();
        segment.set_rate(rate);
        segment.set_stop(ms(60_000));
        let mut playhead = Playhead::default();
        playhead.segment(&segment);
        playhead
    }

    /// Milliseconds played at each of these timestamps, of frames of 40 ms.
    fn elapsed(rate: f64, pts: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let mut playhead = playhead(rate);
        let moments = pts.into_iter().map(|pts| {
            let moment = playhead.advance(Some(ms(pts)), Some(ms(40)));
            moment.unwrap().elapsed.mseconds()
        });
        moments.collect()
    }

    #[test]
    fn it_follows_the_timestamps_in_either_direction() {
        assert_eq!(elapsed(1.0, [500, 540, 580]), [0, 40, 80]);
        assert_eq!(elapsed(-1.0, [500, 460, 420]), [0, 40, 80]);
        // Over a hole.
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
        let mut playhead = playhead(1.0);
        let mut at = |pts: Option<u64>| {
            let moment = playhead.advance(pts.map(ms), Some(ms(40))).unwrap();
            (moment.position.mseconds(), moment.elapsed.mseconds())
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
        let mut playhead = playhead(1.0);
        assert_eq!(playhead.advance(None, None), None);
        let mut at = |pts: Option<u64>| {
            let moment = playhead.advance(pts.map(ms), None).unwrap();
            (moment.position.mseconds(), moment.elapsed.mseconds())
        };
        assert_eq!(at(Some(1000)), (1000, 0));
        assert_eq!(at(Some(1100)), (1100, 100));
        assert_eq!(at(None), (1200, 200));
        assert_eq!(at(Some(0)), (0, 300));
    }

    #[test]
    fn a_new_segment_goes_on_from_what_was_played() {
        let mut playhead = playhead(1.0);
        for pts in [0, 40] {
            playhead.advance(Some(ms(pts)), Some(ms(40)));
        }
        let mut segment = gst::FormattedSegment::new();
        segment.set_rate(-2.0);
        segment.set_stop(ms(9000));
        playhead.segment(&segment);
        let mut at = |pts: Option<u64>| playhead.advance(pts.map(ms), Some(ms(40))).unwrap();
        let expected = Moment {
            position: ms(8960),
            elapsed: ms(80),
            jumped: true,
            leap: ClockTime::ZERO,
        };
        assert_eq!(at(None), expected);
        assert_eq!(at(Some(8920)).elapsed, ms(120));
        assert_eq!(at(Some(8880)).elapsed, ms(160));
    }

    #[test]
    fn no_timestamp_is_too_much_for_it() {
        let most = ClockTime::MAX.mseconds();
        for rate in [1.0, -1.0] {
            let mut playhead = playhead(rate);
            for pts in [most, 0, most, most, 1, 0].repeat(1000) {
                playhead.advance(Some(ms(pts)), Some(ms(40)));
                playhead.advance(None, None);
            }
            // And goes on.
            let before = playhead.advance(Some(ms(0)), Some(ms(40))).unwrap();
            let after = playhead.advance(Some(ms(30_000)), Some(ms(40))).unwrap();
            assert!(after.elapsed > before.elapsed || rate < 0.0);
            playhead.advance(Some(ms(0)), Some(ClockTime::MAX));
            playhead.advance(None, None);
        }
    }
}
