//! Messages, as chat templates take them.

use serde::{Deserialize, Serialize};
use vlmnarrate_engine::Clip;

/// The placeholder of a picture in a prompt.
pub(crate) const IMAGE: &str = "<image>";

/// The author of a message. Chat templates write the role with a capital letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The question, with its pictures.
    User,
    /// The model.
    Assistant,
}

/// A part of a message, serialized as chat templates expect it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Content {
    /// Text, without `<image>`.
    Text {
        /// The text.
        text: String,
    },
    /// A placeholder for the next picture.
    Image,
}

impl Content {
    /// A [`Text`](Self::Text) part.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into() }
    }
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who wrote the message.
    pub role: Role,
    /// Texts and pictures in reading order.
    pub content: Vec<Content>,
}

/// The messages of a caption: an optional system message, then one of the user with pictures or a [`video`] and the
/// prompt.
pub fn question(system: Option<&str>, pictures: Vec<Content>, prompt: &str) -> Vec<Message> {
    let mut content = pictures;
    content.push(Content::text(prompt));
    system
        .into_iter()
        .map(|text| Message {
            role: Role::System,
            content: vec![Content::text(text)],
        })
        .chain([Message {
            role: Role::User,
            content,
        }])
        .collect()
}

/// A video as parts of a message (SmolVLM2): an introduction, then each frame behind its timestamp.
pub fn video(clip: &Clip) -> Vec<Content> {
    let frames = clip
        .headings()
        .flat_map(|heading| [Content::text(heading), Content::Image]);
    [Content::text(clip.introduction())]
        .into_iter()
        .chain(frames)
        .chain([Content::text(Clip::END)])
        .collect()
}
