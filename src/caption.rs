//! The caption record: the text about one frame, its time and its cost.
//!
//! An application gets captions as bus messages, buffer metas and timed text. [`Caption::try_from`] reads messages and
//! metas.

use std::{fmt, str::FromStr, time::Duration};

use gst::ClockTime;

/// The reason why a frame was described.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trigger {
    /// The frame was due.
    #[default]
    Interval,
    /// The frame was due and its picture had changed (`scene-threshold`).
    Scene,
    /// The application requested a caption (`describe-now`).
    Request,
}

impl Trigger {
    /// The value of the field `trigger`: `interval`, `scene` or `request`.
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

/// Error of a string that names no [`Trigger`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a trigger: expected interval, scene or request")]
pub struct UnknownTrigger;

impl FromStr for Trigger {
    type Err = UnknownTrigger;

    fn from_str(name: &str) -> Result<Self, UnknownTrigger> {
        [Self::Interval, Self::Scene, Self::Request]
            .into_iter()
            .find(|trigger| trigger.as_str() == name)
            .ok_or(UnknownTrigger)
    }
}

/// The frame that a caption describes, or the last frame of a clip.
///
/// Times are converted with the segment in which the frame was sampled; the segment may have changed by the time the
/// caption is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameStamp {
    /// Presentation timestamp of the buffer.
    pub timestamp: Option<ClockTime>,
    /// Stream time of the buffer.
    pub stream_time: Option<ClockTime>,
    /// Running time of the buffer.
    pub running_time: Option<ClockTime>,
    /// Duration of the buffer.
    pub duration: Option<ClockTime>,
    /// Presentation timestamp of the first frame of a clip; the same as `timestamp` for a single frame.
    pub first_timestamp: Option<ClockTime>,
    /// Number of frames of the clip; 1 for a single frame.
    pub frames: u32,
    /// Number of frames that went through the element before this one, since the element started.
    pub frame: u64,
    /// Why the frame was described.
    pub trigger: Trigger,
    /// The id that `describe-now` returned; 0 for frames that were not requested.
    pub request_id: u32,
}

impl Default for FrameStamp {
    /// The stamp of a single frame at an unknown time.
    fn default() -> Self {
        Self {
            timestamp: None,
            stream_time: None,
            running_time: None,
            duration: None,
            first_timestamp: None,
            frames: 1,
            frame: 0,
            trigger: Trigger::default(),
            request_id: 0,
        }
    }
}

/// Time spent on one caption.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cost {
    /// Time from the sampling of the frame to the finished caption.
    pub latency: Duration,
    /// Scaling of the frame and its conversion to pixel values.
    pub preprocess: Duration,
    /// Vision encoder.
    pub vision: Duration,
    /// Prompt, up to the first token.
    pub prefill: Duration,
    /// Further tokens.
    pub decode: Duration,
}

/// A caption of one frame or clip.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Caption {
    /// The frame that the caption describes.
    pub stamp: FrameStamp,
    /// Running time of the pipeline when the caption was ready.
    pub arrival_time: Option<ClockTime>,
    /// The model's answer.
    pub text: String,
    /// Name of the element that made the caption.
    pub element: String,
    /// The prompt that the caption answers.
    pub prompt: String,
    /// Name of the model.
    pub model: String,
    /// Branch, tag or commit of the model; empty if there is none.
    pub revision: String,
    /// Kind of device that the model runs on: `cpu`, `cuda` or `metal`; `remote` behind an endpoint.
    pub device: String,
    /// Name of the device, or host of the endpoint.
    pub device_name: String,
    /// Memory of the device, in bytes; 0 if unknown.
    pub device_memory: u64,
    /// Number of captions before this one, since the element started.
    pub sequence: u64,
    /// Number of generated tokens.
    pub tokens: u32,
    /// Probability of the text among the `choices`; 1 without choices, `None` if the engine can't know it.
    pub probability: Option<f64>,
    /// Whether `max-tokens` cut the text off.
    pub truncated: bool,
    /// Whether the text and the prompt are those of the caption before.
    pub repeated: bool,
    /// Whether the text is unfinished (`partial-captions`).
    pub partial: bool,
    /// Time spent on the caption.
    pub cost: Cost,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trigger_is_parsed_from_its_name() {
        for trigger in [Trigger::Interval, Trigger::Scene, Trigger::Request] {
            assert_eq!(trigger.to_string().parse(), Ok(trigger));
        }
        assert_eq!("timer".parse::<Trigger>(), Err(UnknownTrigger));
    }
}
