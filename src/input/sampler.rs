//! Chooses the frames to describe.

use gst::{ClockTime, prelude::*};

/// Which frames are due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SamplerSettings {
    pub(crate) interval: ClockTime,
    /// Frames of a clip; 1 for single frames.
    pub(crate) frames: u32,
    pub(crate) every_nth: u32,
    pub(crate) scene_threshold: f64,
    /// Part of a step, 0 to 1, by which the grid starts before the first frame.
    pub(crate) phase: f64,
}

impl SamplerSettings {
    /// Time from one frame of a clip to the next.
    pub(crate) fn step(&self) -> ClockTime {
        (self.interval / u64::from(self.frames)).max(ClockTime::from_nseconds(1))
    }

    /// Time from the start of the grid to the first frame.
    fn lead(&self) -> ClockTime {
        self.step()
            .mul_div_floor((self.phase * 1e6) as u64, 1_000_000)
            .unwrap_or_default()
    }

    /// Due frames from the start of one clip to the start of the next, those that `every_nth` skips included.
    pub(crate) fn period(&self) -> u64 {
        u64::from(self.frames) * u64::from(self.every_nth)
    }
}

/// Divides playback time into cells, `frames` to an interval, from the first frame of the segment on. A frame is due
/// when it is in another cell than the last frame that was due, so the sampling does not drift, and the first frame
/// behind a gap is due at once.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    grid: Option<Grid>,
    /// The cell of the last due frame.
    cell: u64,
    /// Due frames since the clip period began, up to [`SamplerSettings::period`].
    passed: u64,
    /// Number of frames taken of the clip in progress, if there is one.
    clip: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grid {
    first_frame: ClockTime,
    /// How long before the first frame the first cell starts.
    lead: ClockTime,
    /// Length of the cells.
    step: ClockTime,
}

impl Sampler {
    /// Decides about the frame at this playback time. With an interval of 0, or without a known time, every frame
    /// is due, but a clip begins only when the worker wants one: when `is_wanted`.
    pub(crate) fn sample(
        &mut self,
        elapsed: Option<ClockTime>,
        settings: &SamplerSettings,
        is_wanted: bool,
    ) -> Option<DueFrame> {
        let on_grid = elapsed.filter(|_| !settings.interval.is_zero());
        let is_due = on_grid.is_none_or(|elapsed| self.enters_cell(elapsed, settings));
        if is_due {
            self.passed += 1;
            // every_nth counts from the first clip: 1, n + 1, 2n + 1, …
            if self.passed == 1 {
                self.clip.get_or_insert(0);
            }
            if self.passed >= settings.period() {
                self.passed = 0;
            }
        }
        // On the grid the worker need not want one: the newest clip wins its slot.
        let index = self.clip?;
        if !is_due || !(is_wanted || on_grid.is_some() || index > 0) {
            return None;
        }
        let is_last = index + 1 >= settings.frames;
        self.clip = (!is_last).then_some(index + 1);
        Some(DueFrame {
            is_first: index == 0,
            is_last,
            slot: on_grid.and_then(|_| self.cell_start(0)).or(elapsed),
        })
    }

    /// Playback time at which the next clip will be complete, for a frame that lasts from `elapsed` to `end`.
    pub(crate) fn next_clip_end(
        &self,
        elapsed: ClockTime,
        end: ClockTime,
        settings: &SamplerSettings,
    ) -> ClockTime {
        let frames = u64::from(settings.frames);
        let remaining = match self.passed {
            passed if passed < frames => frames - passed,
            passed => settings.period().saturating_sub(passed) + frames,
        };
        let next = match settings.interval.is_zero() {
            false => self.cell_start(remaining),
            true => None,
        };
        let counted = || (end.saturating_sub(elapsed)).saturating_mul(remaining);
        next.unwrap_or_else(|| elapsed.saturating_add(counted()))
            .max(end)
    }

    /// Start of the cell that is so many cells behind the current one.
    fn cell_start(&self, cells: u64) -> Option<ClockTime> {
        let grid = self.grid?;
        let from_start = grid.step.saturating_mul(self.cell.saturating_add(cells));
        // Where the first cell starts there was no frame.
        let from_first = from_start.saturating_sub(grid.lead);
        Some(grid.first_frame.saturating_add(from_first))
    }

    fn enters_cell(&mut self, elapsed: ClockTime, settings: &SamplerSettings) -> bool {
        let (step, lead) = (settings.step(), settings.lead());
        match self.grid {
            Some(grid) if (grid.step, grid.lead) == (step, lead) => {
                let elapsed = elapsed
                    .saturating_sub(grid.first_frame)
                    .saturating_add(lead);
                let cell = elapsed.nseconds() / step.nseconds();
                std::mem::replace(&mut self.cell, cell) != cell
            }
            // The first frame, or the settings have changed: a new grid starts here.
            _ => {
                let grid = Grid {
                    first_frame: elapsed,
                    lead,
                    step,
                };
                *self = Self {
                    grid: Some(grid),
                    ..Self::default()
                };
                true
            }
        }
    }
}

/// A due frame of a clip; the only one of a clip of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DueFrame {
    pub(crate) is_first: bool,
    pub(crate) is_last: bool,
    /// Playback time at which the frame's cell starts; without a grid that of the frame.
    pub(crate) slot: Option<ClockTime>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: ClockTime = ClockTime::from_mseconds(40);

    fn settings(interval_ms: u64, every_nth: u32) -> SamplerSettings {
        SamplerSettings {
            interval: ClockTime::from_mseconds(interval_ms),
            frames: 1,
            every_nth,
            scene_threshold: 0.0,
            phase: 0.0,
        }
    }

    fn clips(interval_ms: u64, frames: u32, every_nth: u32) -> SamplerSettings {
        SamplerSettings {
            frames,
            ..settings(interval_ms, every_nth)
        }
    }

    /// Numbers of the frames that are due, of those at these milliseconds.
    fn due(ms: impl IntoIterator<Item = u64>, settings: SamplerSettings) -> Vec<usize> {
        let mut sampler = Sampler::default();
        let due = ms
            .into_iter()
            .map(|ms| sampler.sample(Some(ClockTime::from_mseconds(ms)), &settings, true));
        due.enumerate()
            .filter_map(|(i, due)| due.map(|_| i))
            .collect()
    }

    #[test]
    fn the_grid_starts_at_the_first_frame_and_does_not_drift() {
        // 29.97 Hz for 100 s, from an odd start: one frame a second, never one lost to rounding.
        let frames = (0..2997).map(|i| 123 + i * 100_100 / 2997);
        assert_eq!(due(frames, settings(1000, 1)).len(), 101);
        assert_eq!(
            due([500, 900, 1400, 1499, 1500, 2501], settings(1000, 1)),
            [0, 4, 5]
        );
    }

    #[test]
    fn a_phase_makes_the_first_interval_shorter() {
        let shifted = SamplerSettings {
            phase: 0.75,
            ..settings(1000, 1)
        };
        assert_eq!(due([500, 749, 750, 1749, 1750], shifted), [0, 2, 4]);
        assert_eq!(due([0, 900, 2000, 2100], shifted), [0, 1, 2]);
        let mut sampler = Sampler::default();
        let second = ClockTime::SECOND;
        assert!(sampler.sample(Some(second), &shifted, true).is_some());
        let next = sampler.next_clip_end(second, second + PERIOD, &shifted);
        assert_eq!(next, ClockTime::from_mseconds(1250));
    }

    #[test]
    fn a_late_frame_does_not_move_the_grid() {
        assert_eq!(
            due([0, 1900, 2000, 2900, 3000], settings(1000, 1)),
            [0, 1, 2, 4]
        );
    }

    #[test]
    fn every_nth_counts_the_frames_that_are_due() {
        let frames = || (0..100).map(|i| i * 100);
        assert_eq!(due(frames(), settings(1000, 3)), [0, 30, 60, 90]);
        assert_eq!(due(frames().take(10), settings(0, 4)), [0, 4, 8]);
        assert_eq!(due(frames().take(4), settings(0, 1)), [0, 1, 2, 3]);
    }

    #[test]
    fn a_new_interval_counts_from_now() {
        let mut sampler = Sampler::default();
        let mut at = |ms, settings: SamplerSettings| {
            let position = ClockTime::from_mseconds(ms);
            sampler.sample(Some(position), &settings, true).is_some()
        };
        assert!(at(0, settings(1000, 1)));
        assert!(!at(100, settings(1000, 1)));
        assert!(at(200, settings(500, 1)));
        assert!(!at(600, settings(500, 1)));
        assert!(at(700, settings(500, 1)));
    }

    #[test]
    fn without_an_interval_a_busy_worker_is_not_asked() {
        let mut sampler = Sampler::default();
        let busy_then_idle = [true, false, false, true, true];
        let due = busy_then_idle.map(|idle| sampler.sample(None, &settings(0, 2), idle).is_some());
        // The third frame was due, and the fourth is taken instead; the fifth is due as usual.
        assert_eq!(due, [true, false, false, true, true]);
        // On the grid the mailbox decides.
        let mut sampler = Sampler::default();
        assert!(
            sampler
                .sample(Some(ClockTime::ZERO), &settings(1000, 1), false)
                .is_some()
        );
    }

    #[test]
    fn without_a_playback_time_every_frame_is_due() {
        let mut sampler = Sampler::default();
        assert!(sampler.sample(None, &settings(1000, 1), true).is_some());
        assert!(sampler.sample(None, &settings(1000, 1), true).is_some());
    }

    #[test]
    fn next_clip_end_is_where_the_next_due_frame_is() {
        let second = ClockTime::SECOND;
        let mut sampler = Sampler::default();
        let every_third = settings(1000, 3);
        assert!(sampler.sample(Some(second), &every_third, true).is_some());
        assert_eq!(
            sampler.next_clip_end(second, second + PERIOD, &every_third),
            4 * second
        );
        assert_eq!(sampler.sample(Some(2 * second), &every_third, true), None);
        assert_eq!(
            sampler.next_clip_end(2 * second, 2 * second + PERIOD, &every_third),
            4 * second
        );
        assert_eq!(sampler.sample(Some(3 * second), &every_third, true), None);
        assert_eq!(
            sampler.next_clip_end(3 * second, 3 * second + PERIOD, &every_third),
            4 * second
        );

        let mut sampler = Sampler::default();
        assert!(
            sampler
                .sample(Some(second), &settings(0, 2), true)
                .is_some()
        );
        assert_eq!(
            sampler.next_clip_end(second, second + PERIOD, &settings(0, 2)),
            second + 2 * PERIOD
        );
        // Frames longer than the interval.
        let mut sampler = Sampler::default();
        assert!(
            sampler
                .sample(Some(second), &settings(100, 1), true)
                .is_some()
        );
        assert_eq!(
            sampler.next_clip_end(second, 2 * second, &settings(100, 1)),
            2 * second
        );
    }

    /// The milliseconds of the frames that are due, those of a clip together, of frames every 100 ms.
    fn taken(
        settings: &SamplerSettings,
        frames: usize,
        idle: impl Fn(u64) -> bool,
    ) -> Vec<Vec<u64>> {
        let mut sampler = Sampler::default();
        let mut clips = Vec::new();
        for ms in (0..).step_by(100).take(frames) {
            let position = ClockTime::from_mseconds(ms);
            let Some(due) = sampler.sample(Some(position), settings, idle(ms)) else {
                continue;
            };
            if due.is_first {
                clips.push(vec![]);
            }
            let clip = clips.last_mut().unwrap();
            clip.push(ms);
            assert_eq!(due.is_last, clip.len() == settings.frames as usize);
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
        // In a row, from when the worker is idle, whatever it does then.
        let idle = |ms| ms == 300 || ms > 700;
        assert_eq!(
            taken(&clips(0, 3, 1), 12, idle),
            [[300, 400, 500], [800, 900, 1000]]
        );
        // On the grid the mailbox decides.
        assert_eq!(taken(&clips(200, 2, 1), 4, |_| false).len(), 2);
    }

    #[test]
    fn a_clip_is_complete_when_its_last_frame_comes() {
        let mut sampler = Sampler::default();
        let settings = clips(1000, 4, 2);
        let whole = (0..30).map(|i| {
            let position = ClockTime::from_mseconds(100 * i);
            sampler.sample(Some(position), &settings, true);
            let next = sampler.next_clip_end(position, position, &settings);
            next.mseconds()
        });
        let whole: Vec<_> = whole.collect();
        assert_eq!([whole[0], whole[5], whole[7]], [750; 3]);
        assert_eq!([whole[8], whole[15], whole[25]], [2750; 3]);
        assert_eq!([whole[28], whole[29]], [4750; 2]);
        let mut sampler = Sampler::default();
        sampler.sample(Some(ClockTime::ZERO), &clips(0, 3, 1), true);
        let next = sampler.next_clip_end(ClockTime::ZERO, PERIOD, &clips(0, 3, 1));
        assert_eq!(next, 2 * PERIOD);
    }
}
