//! Which frames are due.

use gst::ClockTime;

/// When it is a frame's turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    pub interval: ClockTime,
    /// Of a clip.
    pub frames: u32,
    pub every_nth: u32,
    pub scene_threshold: f64,
}

impl Pace {
    /// From one frame of a clip to the next.
    pub fn step(&self) -> ClockTime {
        (self.interval / u64::from(self.frames)).max(ClockTime::from_nseconds(1))
    }

    /// Turns from one clip to the next.
    pub fn period(&self) -> u64 {
        u64::from(self.frames) * u64::from(self.every_nth)
    }
}

/// Lays a grid over what has been played, `frames` cells to an interval, from the first frame of the
/// segment on: a frame is due when it is in another cell than the last one that was due. So the pace doesn't
/// drift, and holes that the [`Playhead`](super::playhead::Playhead) saw make a frame due at once.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Where the grid starts, and the length of its cells.
    grid: Option<(ClockTime, ClockTime)>,
    /// The cell of the last frame whose turn it was.
    cell: u64,
    /// Turns that passed since a clip began, of `frames` times `every_nth`.
    passed: u64,
    /// A clip is wanted, and so many frames of it were taken.
    clip: Option<u32>,
}

impl Sampler {
    /// Whether the frame is due before which so much was played, and as what. With an interval of 0, or where
    /// nobody knows how much was played, it is every frame's turn, but a clip begins only when the worker is
    /// `free`.
    pub(crate) fn due(
        &mut self,
        elapsed: Option<ClockTime>,
        pace: &Pace,
        free: bool,
    ) -> Option<Due> {
        let on_grid = elapsed.filter(|_| !pace.interval.is_zero());
        let turn = on_grid.is_none_or(|elapsed| self.enters_cell(elapsed, pace.step()));
        if turn {
            self.passed += 1;
            // Of clips, from the first on: 1, n + 1, 2n + 1, …
            if self.passed == 1 {
                self.clip.get_or_insert(0);
            }
            if self.passed >= pace.period() {
                self.passed = 0;
            }
        }
        // A clip on the grid goes to the worker's slot, where the newest wins.
        let index = self.clip?;
        if !turn || !(free || on_grid.is_some() || index > 0) {
            return None;
        }
        let is_last = index + 1 >= pace.frames;
        self.clip = (!is_last).then_some(index + 1);
        Some(Due {
            is_first: index == 0,
            is_last,
            slot: on_grid.and_then(|_| self.slot(0)).or(elapsed),
        })
    }

    /// When the next clip will be whole, seen from a frame that lasts from `elapsed` to `end`.
    pub(crate) fn next_whole(&self, elapsed: ClockTime, end: ClockTime, pace: &Pace) -> ClockTime {
        let frames = u64::from(pace.frames);
        let turns = match self.passed {
            passed if passed < frames => frames - passed,
            passed => pace.period().saturating_sub(passed) + frames,
        };
        let next = match pace.interval.is_zero() {
            false => self.slot(turns),
            true => None,
        };
        let counted = || (end.saturating_sub(elapsed)).saturating_mul(turns);
        next.unwrap_or_else(|| elapsed.saturating_add(counted()))
            .max(end)
    }

    /// Where a cell starts, so many behind the current one.
    fn slot(&self, cells: u64) -> Option<ClockTime> {
        let (start, step) = self.grid?;
        let from_start = step.saturating_mul(self.cell.saturating_add(cells));
        Some(start.saturating_add(from_start))
    }

    fn enters_cell(&mut self, elapsed: ClockTime, step: ClockTime) -> bool {
        match self.grid {
            Some((start, same)) if same == step => {
                let cell = elapsed.saturating_sub(start).nseconds() / step.nseconds();
                std::mem::replace(&mut self.cell, cell) != cell
            }
            // The first frame, or the interval was changed: a new grid starts here.
            _ => {
                *self = Self {
                    grid: Some((elapsed, step)),
                    ..Self::default()
                };
                true
            }
        }
    }
}

/// A frame that is due, as one of a clip: often the only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) is_first: bool,
    pub(crate) is_last: bool,
    /// What had been played where its cell of the grid starts; without a grid what has been played.
    pub(crate) slot: Option<ClockTime>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: ClockTime = ClockTime::from_mseconds(40);

    fn pace(interval_ms: u64, every_nth: u32) -> Pace {
        Pace {
            interval: ClockTime::from_mseconds(interval_ms),
            frames: 1,
            every_nth,
            scene_threshold: 0.0,
        }
    }

    fn clips(interval_ms: u64, frames: u32, every_nth: u32) -> Pace {
        Pace {
            frames,
            ..pace(interval_ms, every_nth)
        }
    }

    /// Numbers of the frames that are due, of those at these milliseconds.
    fn due(ms: impl IntoIterator<Item = u64>, pace: Pace) -> Vec<usize> {
        let mut sampler = Sampler::default();
        let due = ms
            .into_iter()
            .map(|ms| sampler.due(Some(ClockTime::from_mseconds(ms)), &pace, true));
        due.enumerate()
            .filter_map(|(i, due)| due.map(|_| i))
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
    fn every_nth_counts_the_frames_that_are_due() {
        let frames = || (0..100).map(|i| i * 100);
        assert_eq!(due(frames(), pace(1000, 3)), [0, 30, 60, 90]);
        assert_eq!(due(frames().take(10), pace(0, 4)), [0, 4, 8]);
        assert_eq!(due(frames().take(4), pace(0, 1)), [0, 1, 2, 3]);
    }

    #[test]
    fn a_new_interval_counts_from_now() {
        let mut sampler = Sampler::default();
        let mut at = |ms, pace: Pace| {
            let position = ClockTime::from_mseconds(ms);
            sampler.due(Some(position), &pace, true).is_some()
        };
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
        let due = busy_then_free.map(|free| sampler.due(None, &pace(0, 2), free).is_some());
        // The third frame's turn waited for the fourth; the fifth's comes as it should.
        assert_eq!(due, [true, false, false, true, true]);
        // On the grid the mailbox decides.
        let mut sampler = Sampler::default();
        assert!(
            sampler
                .due(Some(ClockTime::ZERO), &pace(1000, 1), false)
                .is_some()
        );
    }

    #[test]
    fn where_nobody_knows_what_was_played_it_is_every_frames_turn() {
        let mut sampler = Sampler::default();
        assert!(sampler.due(None, &pace(1000, 1), true).is_some());
        assert!(sampler.due(None, &pace(1000, 1), true).is_some());
    }

    #[test]
    fn next_whole_is_where_the_next_due_frame_is() {
        let second = ClockTime::SECOND;
        let mut sampler = Sampler::default();
        let pace_3 = pace(1000, 3);
        assert!(sampler.due(Some(second), &pace_3, true).is_some());
        assert_eq!(
            sampler.next_whole(second, second + PERIOD, &pace_3),
            4 * second
        );
        assert_eq!(sampler.due(Some(2 * second), &pace_3, true), None);
        assert_eq!(
            sampler.next_whole(2 * second, 2 * second + PERIOD, &pace_3),
            4 * second
        );
        assert_eq!(sampler.due(Some(3 * second), &pace_3, true), None);
        assert_eq!(
            sampler.next_whole(3 * second, 3 * second + PERIOD, &pace_3),
            4 * second
        );

        let mut sampler = Sampler::default();
        assert!(sampler.due(Some(second), &pace(0, 2), true).is_some());
        assert_eq!(
            sampler.next_whole(second, second + PERIOD, &pace(0, 2)),
            second + 2 * PERIOD
        );
        // Frames longer than the interval.
        let mut sampler = Sampler::default();
        assert!(sampler.due(Some(second), &pace(100, 1), true).is_some());
        assert_eq!(
            sampler.next_whole(second, 2 * second, &pace(100, 1)),
            2 * second
        );
    }

    /// The milliseconds of the frames that are due, those of a clip together, of frames every 100 ms.
    fn taken(pace: &Pace, frames: usize, free: impl Fn(u64) -> bool) -> Vec<Vec<u64>> {
        let mut sampler = Sampler::default();
        let mut clips = Vec::new();
        for ms in (0..).step_by(100).take(frames) {
            let position = ClockTime::from_mseconds(ms);
            let Some(due) = sampler.due(Some(position), pace, free(ms)) else {
                continue;
            };
            if due.is_first {
                clips.push(vec![]);
            }
            let clip = clips.last_mut().unwrap();
            clip.push(ms);
            assert_eq!(due.is_last, clip.len() == pace.frames as usize);
        }
        clips
    }

    #[test]
    fn a_clip_is_spread_over_the_interval() {
        let always = |_| true;
        assert_eq!(
            taken(&clips(1000, 4, 1), 20, always),
            [[0, 300, 500, 800], [1000, 1300, 1500, 1800]]
        );
        assert_eq!(
            taken(&clips(400, 2, 3), 29, always),
            [[0, 200], [1200, 1400], [2400, 2600]]
        );
        // Faster than the frames come: each of them.
        assert_eq!(taken(&clips(100, 2, 1), 4, always), [[0, 100], [200, 300]]);
        // In a row, from when the worker is free, whatever it does then.
        let free = |ms| ms == 300 || ms > 700;
        assert_eq!(
            taken(&clips(0, 3, 1), 12, free),
            [[300, 400, 500], [800, 900, 1000]]
        );
        // On the grid the mailbox decides.
        assert_eq!(taken(&clips(200, 2, 1), 4, |_| false).len(), 2);
    }

    #[test]
    fn a_clip_is_whole_when_its_last_frame_comes() {
        let mut sampler = Sampler::default();
        let pace = clips(1000, 4, 2);
        let whole = (0..30).map(|i| {
            let position = ClockTime::from_mseconds(100 * i);
            sampler.due(Some(position), &pace, true);
            let next = sampler.next_whole(position, position, &pace);
            next.mseconds()
        });
        let whole: Vec<_> = whole.collect();
        assert_eq!([whole[0], whole[5], whole[7]], [750; 3]);
        assert_eq!([whole[8], whole[15], whole[25]], [2750; 3]);
        assert_eq!([whole[28], whole[29]], [4750; 2]);
        let mut sampler = Sampler::default();
        sampler.due(Some(ClockTime::ZERO), &clips(0, 3, 1), true);
        let next = sampler.next_whole(ClockTime::ZERO, PERIOD, &clips(0, 3, 1));
        assert_eq!(next, 2 * PERIOD);
    }
}
