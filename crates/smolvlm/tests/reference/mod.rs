//! Reading what `tools/reference` writes.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use vlmnarrate_engine::Clip;
use vlmnarrate_smolvlm::{Content, Message, Role, video};

/// The metadata that the reference's video processor was given.
#[derive(Deserialize)]
pub struct Video {
    fps: Option<f64>,
    duration: Option<f64>,
    frames_indices: Vec<u64>,
}

impl Video {
    /// With the reference's defaults: 24 frames a second, and the last frame's time as duration.
    pub fn clip(&self) -> Clip {
        let fps = self.fps.unwrap_or(24.0);
        let times = self.frames_indices.iter();
        let times = times.map(|&i| Duration::from_secs_f64(i as f64 / fps));
        let times = times.collect::<Vec<_>>();
        let last = *times.last().unwrap();
        let duration = self.duration.map_or(last, Duration::from_secs_f64);
        Clip { times, duration }
    }

    fn content(&self) -> Vec<Content> {
        video(&self.clip())
    }
}

/// Messages in the chat template's form, `{"type": "video"}` replaced by its frames.
pub fn messages(json: &Value, video: Option<&Video>) -> Vec<Message> {
    let message = |message: &Value| Message {
        role: serde_json::from_value::<Role>(message["role"].clone()).unwrap(),
        content: message["content"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|content| match content["type"].as_str().unwrap() {
                "video" => video.unwrap().content(),
                _ => vec![serde_json::from_value(content.clone()).unwrap()],
            })
            .collect(),
    };
    json.as_array().unwrap().iter().map(message).collect()
}
