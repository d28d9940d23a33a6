//! Frames that are described together.

use std::sync::Arc;

use gst::ClockTime;

use crate::caption::FrameStamp;
use vlmnarrate_engine::{Clip, Picture};

/// A frame of a clip.
#[derive(Debug)]
pub(crate) struct ClipFrame {
    pub(crate) picture: Arc<Picture>,
    pub(crate) stamp: FrameStamp,
    /// Position in the stream.
    pub(crate) position: Option<ClockTime>,
    /// Playback time of the frame.
    pub(crate) elapsed: Option<ClockTime>,
    /// Playback time at which the frame's share of the interval starts.
    pub(crate) slot: Option<ClockTime>,
}

/// Collects the frames of a clip.
#[derive(Debug, Default)]
pub(crate) struct ClipBuilder(Vec<ClipFrame>);

impl ClipBuilder {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn push(&mut self, frame: ClipFrame) {
        self.0.push(frame);
    }

    /// Completes the clip with the frames so far. `None` if there are none.
    pub(crate) fn finish(&mut self, interval: ClockTime) -> Option<SampledClip> {
        let mut frames = std::mem::take(&mut self.0);
        let mut stamp = frames.last()?.stamp;
        let step_back = |pair: &[ClipFrame]| pair[1].position < pair[0].position;
        let backwards = frames.len() > 1 && frames.windows(2).all(step_back);
        if backwards {
            // Played backwards: the newest came first.
            frames.reverse();
        }
        let time = |frame: &ClipFrame| match backwards {
            true => frame.position,
            false => frame.elapsed,
        };
        let (first, last) = (frames.first()?, frames.last()?);
        let start = match backwards {
            true => first.position,
            false => first.slot,
        };
        let since = |start: Option<ClockTime>, time: Option<ClockTime>| {
            let both = start.zip(time);
            both.map_or(ClockTime::ZERO, |(start, time)| time.saturating_sub(start))
        };
        let span = since(time(first), time(last));
        // In a row, the last frame lasts as long as the others.
        let steps = frames.len() as u64 - 1;
        let lasting = match (interval.is_zero(), steps) {
            (true, 1..) => span + span / steps,
            _ => span.max(interval),
        };
        let times = frames.iter().map(|frame| since(start, time(frame)).into());
        let clip = Clip {
            times: times.collect(),
            duration: lasting.into(),
        };
        stamp.first_timestamp = first.stamp.timestamp;
        stamp.frames = frames.len() as u32;
        let pictures = frames.into_iter().map(|frame| frame.picture);
        Some(SampledClip {
            pictures: pictures.collect(),
            clip,
            stamp,
        })
    }
}

/// A clip to describe, of one frame or more.
#[derive(Debug)]
pub(crate) struct SampledClip {
    /// Oldest first.
    pub(crate) pictures: Vec<Arc<Picture>>,
    pub(crate) clip: Clip,
    /// The stamp of the frame that came last.
    pub(crate) stamp: FrameStamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clip of frames at these milliseconds, in slots of 250 ms: its times, its duration, and its first and last
    /// timestamp.
    fn clip(ms: &[u64], interval: u64) -> (Vec<u64>, u64, [Option<ClockTime>; 2]) {
        let at = ClockTime::from_mseconds;
        let mut frames = ClipBuilder::default();
        for &ms in ms {
            frames.push(ClipFrame {
                picture: Arc::new(Picture {
                    width: ms as u32,
                    height: 1,
                    rgb: vec![],
                }),
                stamp: FrameStamp {
                    timestamp: Some(at(ms)),
                    ..FrameStamp::default()
                },
                position: Some(at(ms)),
                elapsed: Some(at(ms)),
                slot: Some(at(ms / 250 * 250)),
            });
        }
        let SampledClip {
            pictures,
            clip,
            stamp,
        } = frames.finish(at(interval)).unwrap();
        assert!(pictures.is_sorted_by_key(|picture| picture.width));
        assert_eq!(stamp.frames as usize, ms.len());
        assert!(frames.finish(at(interval)).is_none());
        let times = clip.times.iter().map(|t| t.as_millis() as u64).collect();
        let seen = [stamp.first_timestamp, stamp.timestamp];
        (times, clip.duration.as_millis() as u64, seen)
    }

    #[test]
    fn times_count_from_the_start_of_the_interval() {
        let at = |ms| Some(ClockTime::from_mseconds(ms));
        // A first frame that comes late in its slot does not make the others early.
        let seen = [at(1030), at(1750)];
        let times = vec![30, 250, 500, 750];
        assert_eq!(clip(&[1030, 1250, 1500, 1750], 1000), (times, 1000, seen));
        // Longer than the interval, where frames were missing.
        assert_eq!(clip(&[1000, 5000], 1000).1, 4000);
        // In a row.
        assert_eq!(clip(&[0, 250, 500], 0).1, 750);
        assert_eq!(clip(&[0], 0).1, 0);
    }

    #[test]
    fn backwards_the_oldest_comes_first_still() {
        let at = |ms| Some(ClockTime::from_mseconds(ms));
        let (times, _, seen) = clip(&[1750, 1500, 1250], 1000);
        assert_eq!((times, seen), (vec![0, 250, 500], [at(1250), at(1250)]));
    }
}
