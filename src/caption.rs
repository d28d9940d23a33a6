//! The caption record: what was said about one frame, when, and at what cost.
//!
//! Applications meet it as a bus message, as a buffer meta and as timed text; how each is written
//! is `output/encoding.rs`'s business. Here it is plain data.

use std::{fmt, str::FromStr, time::Duration};

use gst::ClockTime;

/// What made a frame worth describing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Its turn had come.
    Interval,
    /// Its turn had come and the picture had changed (`scene-threshold`).
    Scene,
    /// Somebody asked (`describe-now`).
    Request,
}

impl Trigger {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interval => "interval",
            Self::Scene => "scene",
            Self::Request => "request",
        }
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The word is none of `interval`, `scene` and `request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a trigger: one of interval, scene, request was expected")]
pub struct UnknownTrigger;

impl FromStr for Trigger {
    type Err = UnknownTrigger;

    fn from_str(word: &str) -> Result<Self, UnknownTrigger> {
        [Self::Interval, Self::Scene, Self::Request]
            .into_iter()
            .find(|trigger| trigger.as_str() == word)
            .ok_or(UnknownTrigger)
    }
}

/// Which frame a caption is about, the last one of a clip. Times are taken when the frame is
/// sampled, with the segment of that moment: the caption may be ready only after the segment has
/// changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameStamp {
    /// Presentation timestamp of the buffer.
    pub timestamp: Option<ClockTime>,
    pub stream_time: Option<ClockTime>,
    pub running_time: Option<ClockTime>,
    /// Duration of the buffer.
    pub duration: Option<ClockTime>,
    /// Presentation timestamp of the first frame of a clip; of a single one `timestamp` again.
    pub first_timestamp: Option<ClockTime>,
    /// So many frames the clip has, 1 if it is none.
    pub frames: u32,
    /// Frames that went through the element before this one, since it started.
    pub frame: u64,
    pub trigger: Trigger,
    /// What `describe-now` returned; 0 where nobody asked.
    pub request_id: u32,
}

/// What one caption cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// From the moment the frame was sampled until its caption was ready.
    pub latency: Duration,
    /// Scaling the frame and turning it into pixel values.
    pub preprocess: Duration,
    pub vision: Duration,
    pub prefill: Duration,
    pub decode: Duration,
}

/// One caption of one frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Caption {
    pub stamp: FrameStamp,
    /// Running time of the pipeline when the caption was ready.
    pub arrival_time: Option<ClockTime>,
    pub text: String,
    /// Name of the element that made it.
    pub element: String,
    pub prompt: String,
    pub model: String,
    pub revision: String,
    /// `cpu`, `cuda` or `metal`; with the name and the bytes of it.
    pub device: String,
    pub device_name: String,
    pub device_memory: u64,
    /// Captions before this one, since the element started.
    pub sequence: u64,
    /// Tokens generated.
    pub tokens: u32,
    /// With which probability the text is this one of the `choices`; 1 without any, `None` where the engine can't know.
    pub probability: Option<f64>,
    /// The text stops at `max-tokens`, not where the model would have ended it.
    pub truncated: bool,
    /// It answers the same question as the caption that is current, with the same words.
    pub repeated: bool,
    /// The text so far, not yet the whole of it.
    pub partial: bool,
    pub cost: Cost,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trigger_survives_its_word() {
        for trigger in [Trigger::Interval, Trigger::Scene, Trigger::Request] {
            assert_eq!(trigger.to_string().parse(), Ok(trigger));
        }
        assert_eq!("timer".parse::<Trigger>(), Err(UnknownTrigger));
    }
}
