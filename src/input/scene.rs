//! Detects whether a picture differs from the last one that was described.

use std::sync::Arc;

use gst::ClockTime;

use crate::{caption::Trigger, prompt::RequestSettings};
use vlmnarrate_engine::Picture;

/// An unchanged picture is described again after this long.
pub(crate) const MAX_SILENCE: ClockTime = ClockTime::from_seconds(30);

/// Cells on a side of the thumbnail.
const SIDE: usize = 16;

/// Mean grey of the cells of a picture, 0 to 1. Coarse, so that noise and small movements average out.
#[derive(Clone, Copy, Debug)]
struct Thumbnail([f32; SIDE * SIDE]);

impl Thumbnail {
    fn new(picture: &Picture) -> Self {
        let (width, height) = (picture.width as usize, picture.height as usize);
        let mut sums = [0u64; SIDE * SIDE];
        let mut pixels = [0u64; SIDE * SIDE];
        for (y, row) in picture.rgb.chunks_exact((3 * width).max(1)).enumerate() {
            for (x, rgb) in row.as_chunks::<3>().0.iter().enumerate() {
                let cell = y * SIDE / height * SIDE + x * SIDE / width;
                // BT.601 luma, in 1/256.
                let [r, g, b] = rgb.map(u64::from);
                sums[cell] += 77 * r + 150 * g + 29 * b;
                pixels[cell] += 1;
            }
        }
        let mut cells = [0.0; SIDE * SIDE];
        for ((cell, sum), pixels) in cells.iter_mut().zip(sums).zip(pixels) {
            *cell = sum as f32 / (pixels.max(1) * 256 * 255) as f32;
        }
        Self(cells)
    }

    fn difference(&self, other: &Self) -> f64 {
        let differences = self.0.iter().zip(&other.0).map(|(a, b)| (a - b).abs());
        f64::from(differences.sum::<f32>()) / (SIDE * SIDE) as f64
    }
}

/// Compares pictures with the last one that was described.
#[derive(Debug, Default)]
pub(crate) struct SceneDetector(Option<LastDescribed>);

#[derive(Debug)]
struct LastDescribed {
    thumbnail: Thumbnail,
    elapsed: Option<ClockTime>,
    prompt: String,
    choices: Vec<String>,
}

impl SceneDetector {
    /// Decides whether to describe these pictures, and why: one that has changed is enough. The last picture is
    /// remembered then. Other prompts and choices count as a change too, because the old caption doesn't answer them.
    pub(crate) fn detect(
        &mut self,
        pictures: &[Arc<Picture>],
        elapsed: Option<ClockTime>,
        settings: &RequestSettings,
        threshold: f64,
    ) -> Option<Trigger> {
        if threshold <= 0.0 {
            self.reset();
            return Some(Trigger::Interval);
        }
        let thumbnails = pictures.iter().map(|picture| Thumbnail::new(picture));
        let thumbnails = thumbnails.collect::<Vec<_>>();
        let trigger = match &self.0 {
            Some(last)
                if (&last.prompt, &last.choices) == (&settings.prompt, &settings.choices) =>
            {
                let silence = elapsed
                    .zip(last.elapsed)
                    .map(|(now, then)| now.saturating_sub(then));
                let differs = |new: &Thumbnail| new.difference(&last.thumbnail) >= threshold;
                if thumbnails.iter().any(differs) {
                    Trigger::Scene
                } else if silence.is_some_and(|silence| silence >= MAX_SILENCE) {
                    Trigger::Interval
                } else {
                    return None;
                }
            }
            _ => Trigger::Interval,
        };
        self.0 = thumbnails.last().map(|thumbnail| LastDescribed {
            thumbnail: *thumbnail,
            elapsed,
            prompt: settings.prompt.clone(),
            choices: settings.choices.clone(),
        });
        Some(trigger)
    }

    /// Forgets the last picture, so that the next one counts as new.
    pub(crate) fn reset(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmnarrate_engine::Sampling;

    fn grey(level: u8) -> Picture {
        Picture {
            width: 50,
            height: 50,
            rgb: vec![level; 50 * 50 * 3],
        }
    }

    fn settings(prompt: &str) -> RequestSettings {
        RequestSettings {
            whole_frames: false,
            system: None,
            prompt: prompt.into(),
            max_tokens: 1,
            sampling: Sampling::default(),
            stop_strings: vec![],
            choices: vec![],
            partial: false,
        }
    }

    #[test]
    fn difference_is_zero_to_one() {
        let [black, mid, white] = [0, 51, 255].map(|level| Thumbnail::new(&grey(level)));
        assert_eq!(black.difference(&black), 0.0);
        assert!((black.difference(&white) - 1.0).abs() < 1e-5);
        assert!((mid.difference(&black) - 0.2).abs() < 1e-5);
        // Smaller than the grid.
        let dot = Picture {
            width: 1,
            height: 1,
            rgb: vec![255; 3],
        };
        assert!(Thumbnail::new(&dot).difference(&black) > 0.0);
    }

    #[test]
    fn silence_until_the_picture_the_prompt_or_the_hour_changes() {
        let mut scene = SceneDetector::default();
        let mut detect = |level, seconds, prompt: &str, threshold| {
            let elapsed = Some(ClockTime::from_seconds(seconds));
            let pictures = [Arc::new(grey(level))];
            scene.detect(&pictures, elapsed, &settings(prompt), threshold)
        };
        assert_eq!(detect(0, 0, "a", 0.1), Some(Trigger::Interval));
        assert_eq!(detect(20, 1, "a", 0.1), None);
        assert_eq!(detect(30, 2, "a", 0.1), Some(Trigger::Scene));
        assert_eq!(detect(10, 3, "a", 0.1), None);
        assert_eq!(detect(30, 31, "a", 0.1), None);
        assert_eq!(detect(30, 32, "a", 0.1), Some(Trigger::Interval));
        assert_eq!(detect(30, 33, "b", 0.1), Some(Trigger::Interval));
        assert_eq!(detect(30, 34, "b", 0.0), Some(Trigger::Interval));
        // Switched on again: nothing is remembered from before.
        assert_eq!(detect(30, 35, "b", 0.1), Some(Trigger::Interval));
    }
}
