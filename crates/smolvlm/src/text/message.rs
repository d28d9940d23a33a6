//! Messages, as chat templates take them.

use serde::{Deserialize, Serialize};

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
///
/// `frames` are timestamps and `duration` is the length of the video, both in seconds. The texts are those of
/// [`processing_smolvlm.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/smolvlm/processing_smolvlm.py).
pub fn video(frames: &[u64], duration: u64) -> Vec<Content> {
    let clock = |t: u64| format!("{:02}:{:02}", t / 60, t % 60);
    let intro = format!(
        "You are provided the following series of {} frames from a {}:{} [H:MM:SS] video.\n",
        number_in_words(frames.len()),
        duration / 3600,
        clock(duration % 3600),
    );
    let frames = frames.iter().flat_map(|&second| {
        let time = format!("\nFrame from {}:", clock(second));
        [Content::text(time), Content::Image]
    });
    [Content::text(intro)]
        .into_iter()
        .chain(frames)
        .chain([Content::text("\n\n")])
        .collect()
}

/// A number in words as Python's `num2words` writes it, up to 99; transformers samples 64 frames at most.
fn number_in_words(n: usize) -> String {
    const ONES: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 10] = [
        "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    ];
    match n {
        0..20 => ONES[n].into(),
        20..100 if n.is_multiple_of(10) => TENS[n / 10].into(),
        20..100 => format!("{}-{}", TENS[n / 10], ONES[n % 10]),
        _ => n.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelled() {
        let words = [1, 4, 13, 20, 64].map(number_in_words);
        assert_eq!(words, ["one", "four", "thirteen", "twenty", "sixty-four"]);
    }
}
