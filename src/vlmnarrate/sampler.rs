//! Which frames are due.

use gst::ClockTime;

use super::settings::Pace;

/// Lays a grid of `interval` over stream positions, from the first frame of the segment on: a
/// frame is due when it is in another cell than the last one that was due. So the pace doesn't
/// drift, and a jump of the timestamps in either direction (reverse playback, a source that starts
/// over) makes a frame due rather than silencing the narrator.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    /// Where the grid starts, and its interval.
    grid: Option<(ClockTime, ClockTime)>,
    /// The cell of the last frame whose turn it was.
    cell: i128,
    /// Turns that passed since one was taken, of `every_nth`.
    passed: u32,
    /// A turn was taken while the worker was busy.
    waiting: bool,
    /// Frames in this segment, for those without a timestamp.
    frames: u64,
}

impl Sampler {
    /// Where a frame stands: its timestamp or, without one, its number times the frame duration.
    /// `None` if neither is known.
    pub(super) fn position(
        &mut self,
        pts: Option<ClockTime>,
        period: Option<ClockTime>,
    ) -> Option<ClockTime> {
        let counted = period.and_then(|period| period.nseconds().checked_mul(self.frames));
        self.frames += 1;
        pts.or(counted.map(ClockTime::from_nseconds))
    }

    /// Whether the frame at `position` is due. With an interval of 0, or without a position, it is
    /// every frame's turn, but only when the worker is `free`.
    pub(super) fn is_due(&mut self, position: Option<ClockTime>, pace: &Pace, free: bool) -> bool {
        let on_grid = position.filter(|_| !pace.interval.is_zero());
        let turn = on_grid.is_none_or(|position| self.enters_cell(position, pace.interval));
        if turn {
            self.passed += 1;
            // From the first on: 1, n + 1, 2n + 1, …
            if self.passed == 1 {
                self.waiting = true;
            }
            if self.passed >= pace.every_nth {
                self.passed = 0;
            }
        }
        // A frame on the grid goes to the worker's slot, where the newest wins.
        let due = self.waiting && (free || on_grid.is_some());
        if due {
            self.waiting = false;
        }
        due
    }

    /// When the next frame will be due, seen from one at `position` that ends at `end`.
    pub(super) fn next_due(&self, position: ClockTime, end: ClockTime, pace: &Pace) -> ClockTime {
        let turns = match self.passed {
            0 => 1,
            passed => pace.every_nth.saturating_sub(passed) + 1,
        };
        match self.grid {
            Some((start, interval)) if !pace.interval.is_zero() => {
                let cell = self.cell + i128::from(turns);
                let next = i128::from(start.nseconds()) + cell * i128::from(interval.nseconds());
                u64::try_from(next).map_or(end, |next| {
                    ClockTime::try_from(next).unwrap_or(ClockTime::MAX)
                })
            }
            _ => (end.saturating_sub(position))
                .saturating_mul(turns.into())
                .saturating_add(position),
        }
        .max(end)
    }

    fn enters_cell(&mut self, position: ClockTime, interval: ClockTime) -> bool {
        let cell_in = |start: ClockTime| {
            (i128::from(position.nseconds()) - i128::from(start.nseconds()))
                .div_euclid(i128::from(interval.nseconds()))
        };
        match self.grid {
            Some((start, same)) if same == interval => {
                let cell = cell_in(start);
                std::mem::replace(&mut self.cell, cell) != cell
            }
            // The first frame, or the interval was changed: a new grid starts here.
            _ => {
                self.grid = Some((position, interval));
                self.cell = 0;
                self.passed = 0;
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: ClockTime = ClockTime::from_mseconds(40);

    fn pace(interval_ms: u64, every_nth: u32) -> Pace {
        Pace {
            interval: ClockTime::from_mseconds(interval_ms),
            every_nth,
            scene_threshold: 0.0,
        }
    }

    /// Numbers of the frames that are due, of those at these milliseconds.
    fn due(ms: impl IntoIterator<Item = u64>, pace: Pace) -> Vec<usize> {
        let mut sampler = Sampler::default();
        let due = ms
            .into_iter()
            .map(|ms| sampler.is_due(Some(ClockTime::from_mseconds(ms)), &pace, true));
        due.enumerate()
            .filter(|(_, d)| *d)
            .map(|(i, _)| i)
            .collect()
    }

    #[test]
    fn the_grid_starts_at_the_first_frame_and_does_not_drift() {
        // 29.97 Hz for 100 s, from an odd start: one frame a second, never one lost to rounding.
        let frames = (0..2997).map(|i| 123 + i * 100_100 / 2997);
        assert_eq!(due(frames, pace(1000, 1)).len(), 101);
        assert_eq!(
            due([500, 900, 1400, 1499, 1500, 2501], pace(1000, 1)),
            [0, 4, 5]
        );
    }

    #[test]
    fn a_late_frame_does_not_move_the_grid() {
        assert_eq!(
            due([0, 1900, 2000, 2900, 3000], pace(1000, 1)),
            [0, 1, 2, 4]
        );
    }

    #[test]
    fn backwards_is_a_direction_too() {
        assert_eq!(
            due([3000, 2500, 2000, 1500, 1000], pace(1000, 1)),
            [0, 1, 3]
        );
        // A source that starts over.
        assert_eq!(due([5000, 5500, 0, 500, 1000], pace(1000, 1)), [0, 2, 4]);
    }

    #[test]
    fn every_nth_counts_the_frames_that_are_due() {
        let frames = || (0..100).map(|i| i * 100);
        assert_eq!(due(frames(), pace(1000, 3)), [0, 30, 60, 90]);
        assert_eq!(due(frames().take(10), pace(0, 4)), [0, 4, 8]);
        assert_eq!(due(frames().take(4), pace(0, 1)), [0, 1, 2, 3]);
    }

    #[test]
    fn a_new_interval_counts_from_now() {
        let mut sampler = Sampler::default();
        let mut at =
            |ms, pace: Pace| sampler.is_due(Some(ClockTime::from_mseconds(ms)), &pace, true);
        assert!(at(0, pace(1000, 1)));
        assert!(!at(100, pace(1000, 1)));
        assert!(at(200, pace(500, 1)));
        assert!(!at(600, pace(500, 1)));
        assert!(at(700, pace(500, 1)));
    }

    #[test]
    fn without_an_interval_a_busy_worker_is_not_asked() {
        let mut sampler = Sampler::default();
        let busy_then_free = [true, false, false, true, true];
        let due = busy_then_free.map(|free| sampler.is_due(None, &pace(0, 2), free));
        // The third frame's turn waited for the fourth; the fifth's comes as it should.
        assert_eq!(due, [true, false, false, true, true]);
        // On the grid the mailbox decides.
        let mut sampler = Sampler::default();
        assert!(sampler.is_due(Some(ClockTime::ZERO), &pace(1000, 1), false));
    }

    #[test]
    fn frames_without_timestamps_are_counted() {
        let mut sampler = Sampler::default();
        assert_eq!(sampler.position(None, Some(PERIOD)), Some(ClockTime::ZERO));
        assert_eq!(sampler.position(None, Some(PERIOD)), Some(PERIOD));
        assert_eq!(
            sampler.position(Some(ClockTime::SECOND), None),
            Some(ClockTime::SECOND)
        );
        assert_eq!(sampler.position(None, None), None);
        // Not even that: every frame's turn.
        assert!(sampler.is_due(None, &pace(1000, 1), true));
        assert!(sampler.is_due(None, &pace(1000, 1), true));
    }

    #[test]
    fn next_due_is_where_the_next_due_frame_is() {
        let second = ClockTime::SECOND;
        let mut sampler = Sampler::default();
        let pace_3 = pace(1000, 3);
        assert!(sampler.is_due(Some(second), &pace_3, true));
        assert_eq!(
            sampler.next_due(second, second + PERIOD, &pace_3),
            4 * second
        );
        assert!(!sampler.is_due(Some(2 * second), &pace_3, true));
        assert_eq!(
            sampler.next_due(2 * second, 2 * second + PERIOD, &pace_3),
            4 * second
        );
        assert!(!sampler.is_due(Some(3 * second), &pace_3, true));
        assert_eq!(
            sampler.next_due(3 * second, 3 * second + PERIOD, &pace_3),
            4 * second
        );

        let mut sampler = Sampler::default();
        assert!(sampler.is_due(Some(second), &pace(0, 2), true));
        assert_eq!(
            sampler.next_due(second, second + PERIOD, &pace(0, 2)),
            second + 2 * PERIOD
        );
        // Frames longer than the interval.
        let mut sampler = Sampler::default();
        assert!(sampler.is_due(Some(second), &pace(100, 1), true));
        assert_eq!(
            sampler.next_due(second, 2 * second, &pace(100, 1)),
            2 * second
        );
    }
}
