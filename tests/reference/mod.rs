//! Reading what `tools/reference` writes.

use gstvlmnarrate::smolvlm::{Content, Message, Role, video};
use serde::Deserialize;
use serde_json::Value;

/// The metadata that the reference's video processor was given.
#[derive(Deserialize)]
pub struct Video {
    fps: Option<f64>,
    duration: Option<f64>,
    frames_indices: Vec<u64>,
}

impl Video {
    /// With the reference's defaults: 24 frames a second, and the last frame's time as duration.
    fn content(&self) -> Vec<Content> {
        let fps = self.fps.unwrap_or(24.0);
        let seconds = self.frames_indices.iter().map(|&i| (i as f64 / fps) as u64);
        let seconds = seconds.collect::<Vec<_>>();
        let last = *seconds.last().unwrap();
        video(&seconds, self.duration.map_or(last, |d| d as u64))
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
