//! Words and pictures to token ids, as the reference's processor writes them.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::{
    error::{Error, Result},
    text::chat_template::{ChatTemplate, SpecialTokens},
};

/// The role of a message; `capitalize`d by the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

/// A piece of a message, in the form that chat templates expect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Content {
    Text {
        text: String,
    },
    /// The place of the next picture.
    Image,
}

impl Content {
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: Vec<Content>,
}

/// How one picture stands in the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Rows and columns of tiles, zero for the whole picture alone.
    pub grid: (usize, usize),
    /// Tokens of each tile and of the whole picture.
    pub tokens: usize,
}

pub(crate) const IMAGE: &str = "<image>";
const FAKE: &str = "<fake_token_around_image>";
const GLOBAL: &str = "<global-img>";
/// The token that ends a turn and so a caption.
pub(crate) const END_OF_UTTERANCE: &str = "<end_of_utterance>";

/// Chat template and tokenizer of one checkpoint.
pub struct Prompter {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    image: u32,
}

impl std::fmt::Debug for Prompter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prompter")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

/// Token ids and where the pictures' features go among them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// First position of each run of `<image>` tokens and its length: tiles row by row, whole picture last.
    pub images: Vec<(usize, usize)>,
}

impl Prompt {
    /// That all tokens are of a vocabulary of so many, and each picture has a place of its own before the last token,
    /// which the answer follows.
    pub(crate) fn check(&self, vocabulary: usize) -> Result<()> {
        let count = self.ids.len();
        if count == 0 {
            return Err(Error::Prompt("it has no tokens".into()));
        }
        self.ids
            .iter()
            .try_for_each(|id| check_token(*id, vocabulary))?;
        let mut free = 0;
        for &(start, len) in &self.images {
            match start.checked_add(len) {
                Some(end) if len > 0 && start >= free && end < count => free = end,
                _ => {
                    return Err(Error::Prompt(format!(
                        "a picture takes {len} of {count} tokens from {start} on; each has some of its own, and text \
                         behind it"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// That a token is one of a vocabulary of so many.
pub(crate) fn check_token(token: u32, vocabulary: usize) -> Result<()> {
    match (token as usize) < vocabulary {
        true => Ok(()),
        false => Err(Error::Prompt(format!(
            "the token {token} is not one of the model's {vocabulary}"
        ))),
    }
}

/// The most tokens that one picture may take with its tiles, which no model has positions for.
const MOST_PLACES: usize = 1 << 20;

impl Span {
    /// Of all its tiles and the whole picture.
    fn check(&self) -> Result<()> {
        let (rows, cols) = self.grid;
        let tiles = rows
            .checked_mul(cols)
            .filter(|tiles| (*tiles == 0) == (self.grid == (0, 0)));
        let places = tiles.and_then(|tiles| tiles.checked_add(1)?.checked_mul(self.tokens));
        match places {
            Some(1..=MOST_PLACES) => Ok(()),
            _ => Err(Error::Prompt(format!(
                "a picture of {rows} × {cols} tiles and {} tokens each is none that a model reads",
                self.tokens
            ))),
        }
    }
}

impl Prompter {
    /// `template` is Jinja source that knows no special tokens, and need not write a picture's place.
    pub fn new(template: String, tokenizer: Tokenizer) -> Result<Self, String> {
        let path = Path::new("chat_template.jinja");
        let template = ChatTemplate::parse(&template, path, SpecialTokens::new());
        Self::with_template(template.map_err(|e| e.to_string())?, tokenizer)
    }

    /// The error is a reason without the tokenizer's file.
    pub fn with_template(template: ChatTemplate, mut tokenizer: Tokenizer) -> Result<Self, String> {
        // Saved truncation would cut a tiled prompt, saved padding would lengthen it.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        let image = tokenizer
            .token_to_id(IMAGE)
            .ok_or_else(|| format!("the token `{IMAGE}` is missing"))?;
        Ok(Self {
            template,
            tokenizer,
            image,
        })
    }

    /// That the tokenizer writes tokens of a vocabulary of so many alone. The error is a reason without its file.
    pub(crate) fn check_vocabulary(&self, vocabulary: usize) -> Result<(), String> {
        let tokens = self.tokenizer.get_vocab(true).into_iter();
        // What a post-processor adds need not be a token by name.
        let added = self.tokenizer.encode("", true).map_err(|e| e.to_string())?;
        let added = added
            .get_tokens()
            .iter()
            .cloned()
            .zip(added.get_ids().iter().copied());
        match tokens.chain(added).max_by_key(|(_, id)| *id) {
            Some((token, id)) if id as usize >= vocabulary => Err(format!(
                "has the token `{token}` with the number {id}, and the model's `vocab_size` is {vocabulary}"
            )),
            _ => Ok(()),
        }
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The messages as text, each picture still one `<image>`.
    fn render(&self, messages: &[Message]) -> Result<String> {
        for message in messages {
            let text = message.content.iter().find_map(|content| match content {
                Content::Text { text } if text.contains(IMAGE) => Some(text),
                _ => None,
            });
            if let Some(text) = text {
                return Err(Error::Setting {
                    property: match message.role {
                        Role::System => "system-prompt",
                        _ => "prompt",
                    },
                    reason: format!(
                        "`{text}` contains `{IMAGE}`, which marks a picture's place; leave it out"
                    ),
                });
            }
        }
        self.template.render(messages)
    }

    /// Ids of `messages`, whose pictures take the `spans` in order.
    pub fn encode(&self, messages: &[Message], spans: &[Span]) -> Result<Prompt> {
        spans.iter().try_for_each(Span::check)?;
        let rendered = self.render(messages)?;
        let mut parts = rendered.split(IMAGE);
        let mut text = parts.next().unwrap_or_default().to_owned();
        let places = rendered.matches(IMAGE).count();
        if places != spans.len() {
            return Err(self.template.wrong_places(places, spans.len(), messages));
        }
        for (part, span) in parts.zip(spans) {
            expand(&mut text, *span);
            text.push_str(part);
        }
        // A template may write what the tokenizer adds, as the reference knows.
        let bos = self.template.bos_token();
        let add = !bos.is_some_and(|bos| rendered.starts_with(bos));
        let encoding = self
            .tokenizer
            .encode(text, add)
            .map_err(|e| Error::Prompt(format!("the tokenizer fails: {e}")))?;
        let ids = encoding.get_ids().to_vec();
        if ids.is_empty() {
            return Err(Error::Prompt(
                "nothing is left of it after tokenization".into(),
            ));
        }
        let images = runs(&ids, self.image);
        let pictures = spans.iter().map(|s| s.grid.0 * s.grid.1 + 1).sum::<usize>();
        if images.len() != pictures {
            return Err(Error::Prompt(format!(
                "{} places for {pictures} pictures after tokenization",
                images.len()
            )));
        }
        Ok(Prompt { ids, images })
    }

    /// Ids of a text as a model would write it.
    pub(crate) fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| Error::Prompt(format!("the tokenizer fails: {e}")))
    }

    /// Text of generated ids without special tokens, as the reference decodes it.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|e| Error::Prompt(format!("the tokenizer can't decode: {e}")))
    }
}

/// Writes the tokens of one picture: its tiles, a newline after each row, then the whole picture.
fn expand(text: &mut String, Span { grid, tokens }: Span) {
    let (rows, cols) = grid;
    for row in 1..=rows {
        for col in 1..=cols {
            text.push_str(FAKE);
            text.push_str(&format!("<row_{row}_col_{col}>"));
            text.push_str(&IMAGE.repeat(tokens));
        }
        text.push('\n');
    }
    if rows > 0 {
        text.push('\n');
    }
    text.push_str(FAKE);
    text.push_str(GLOBAL);
    text.push_str(&IMAGE.repeat(tokens));
    text.push_str(FAKE);
}

/// Start and length of each run of `token`.
fn runs(ids: &[u32], token: u32) -> Vec<(usize, usize)> {
    let mut position = 0;
    ids.chunk_by(|a, b| a == b)
        .filter_map(|run| {
            let start = position;
            position += run.len();
            (run[0] == token).then_some((start, run.len()))
        })
        .collect()
}

/// The message list of a caption: an optional system message, then pictures or a [`video`] and the question
/// from the user.
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

/// What stands for a video in a message (SmolVLM2): its frames, each behind its time in seconds, after the
/// reference's
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

/// As `num2words` writes them, up to the reference's most frames (64).
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
    fn runs_are_found_where_they_stand() {
        assert_eq!(runs(&[5, 9, 9, 1, 9], 9), [(1, 2), (4, 1)]);
        assert!(runs(&[], 9).is_empty());
    }

    #[test]
    fn tiles_are_written_row_by_row() {
        let mut text = String::new();
        expand(
            &mut text,
            Span {
                grid: (1, 2),
                tokens: 1,
            },
        );
        let fake = FAKE;
        assert_eq!(
            text,
            format!(
                "{fake}<row_1_col_1><image>{fake}<row_1_col_2><image>\n\n{fake}<global-img><image>{fake}"
            )
        );
    }

    #[test]
    fn numbers_are_spelled() {
        let words = [1, 4, 13, 20, 64].map(number_in_words);
        assert_eq!(words, ["one", "four", "thirteen", "twenty", "sixty-four"]);
    }
}
