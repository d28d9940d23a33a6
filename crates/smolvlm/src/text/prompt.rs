//! Prompts: messages and pictures to token ids, as
//! [`Idefics3Processor`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/idefics3/processing_idefics3.py)
//! writes them.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{
    error::{Error, Result},
    text::{
        chat_template::{ChatTemplate, SpecialTokens},
        message::{Content, IMAGE, Message, Role},
    },
};

/// The image tokens of one picture in a prompt: its tiles row by row, then the whole picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Rows and columns of tiles; `(0, 0)` for the whole picture alone.
    pub grid: (usize, usize),
    /// Image tokens of each tile, and of the whole picture.
    pub tokens: usize,
}

const FAKE: &str = "<fake_token_around_image>";
const GLOBAL: &str = "<global-img>";
/// The token that ends a message, and therefore a caption.
pub(crate) const END_OF_UTTERANCE: &str = "<end_of_utterance>";

/// The chat template and tokenizer of a checkpoint: messages to token ids and back.
pub struct Prompter {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    image_token_id: u32,
}

impl std::fmt::Debug for Prompter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prompter")
            .field("image_token_id", &self.image_token_id)
            .finish_non_exhaustive()
    }
}

/// The token ids of a prompt, and the positions that image features take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// All token ids, `<image>` tokens included.
    pub ids: Vec<u32>,
    /// Start and length of each run of `<image>` tokens, in positions of `ids`: tiles row by row, whole picture last.
    pub images: Vec<(usize, usize)>,
}

impl Prompt {
    /// Checks that all ids are below `vocab_size`, that the runs of image tokens do not overlap, and that the last token
    /// is no image token.
    pub(crate) fn check(&self, vocab_size: usize) -> Result<()> {
        let count = self.ids.len();
        if count == 0 {
            return Err(Error::Prompt("it has no tokens".into()));
        }
        self.ids
            .iter()
            .try_for_each(|id| check_token(*id, vocab_size))?;
        let mut previous_end = 0;
        for &(start, len) in &self.images {
            match start.checked_add(len) {
                Some(end) if len > 0 && start >= previous_end && end < count => {
                    previous_end = end;
                }
                _ => {
                    return Err(Error::Prompt(format!(
                        "a picture has {len} tokens from {start} on, of {count}: a picture's tokens must not be missing, overlap \
                         another's, or end the prompt"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Checks that a token id is below `vocab_size`.
pub(crate) fn check_token(token: u32, vocab_size: usize) -> Result<()> {
    match (token as usize) < vocab_size {
        true => Ok(()),
        false => Err(Error::Prompt(format!(
            "the token {token} is not one of the model's {vocab_size}"
        ))),
    }
}

/// Image tokens of one picture with its tiles, at most: more than any model has positions for.
const MAX_IMAGE_TOKENS: usize = 1 << 20;

impl Span {
    /// Checks that the picture takes 1 to [`MAX_IMAGE_TOKENS`] tokens.
    fn check(&self) -> Result<()> {
        let (rows, cols) = self.grid;
        let tiles = rows
            .checked_mul(cols)
            .filter(|tiles| (*tiles == 0) == (self.grid == (0, 0)));
        let tokens = tiles.and_then(|tiles| tiles.checked_add(1)?.checked_mul(self.tokens));
        match tokens {
            Some(1..=MAX_IMAGE_TOKENS) => Ok(()),
            _ => Err(Error::Prompt(format!(
                "a picture can't have {rows} × {cols} tiles of {} tokens",
                self.tokens
            ))),
        }
    }
}

impl Prompter {
    /// A prompter of Jinja source, which gets no special tokens and isn't tried on a picture, and of a tokenizer.
    ///
    /// Errors if the template doesn't parse or the tokenizer has no `<image>`.
    pub fn new(template: String, tokenizer: Tokenizer) -> Result<Self, String> {
        let path = Path::new("chat_template.jinja");
        let template = ChatTemplate::parse(&template, path, SpecialTokens::new());
        Self::with_template(template.map_err(|e| e.to_string())?, tokenizer)
    }

    /// A prompter of a parsed template and a tokenizer. The error is a reason without the tokenizer's file.
    pub fn with_template(template: ChatTemplate, mut tokenizer: Tokenizer) -> Result<Self, String> {
        // A truncation in tokenizer.json would cut a tiled prompt, a padding would lengthen it.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        let image_token_id = tokenizer
            .token_to_id(IMAGE)
            .ok_or_else(|| format!("the token `{IMAGE}` is missing"))?;
        Ok(Self {
            template,
            tokenizer,
            image_token_id,
        })
    }

    /// Checks that every token of the tokenizer has an id below `vocab_size`. The error is a reason without its file.
    pub(crate) fn check_vocabulary(&self, vocab_size: usize) -> Result<(), String> {
        let tokens = self.tokenizer.get_vocab(true).into_iter();
        // Tokens that the post-processor adds need not be in the vocabulary.
        let added = self.tokenizer.encode("", true).map_err(|e| e.to_string())?;
        let added = added
            .get_tokens()
            .iter()
            .cloned()
            .zip(added.get_ids().iter().copied());
        match tokens.chain(added).max_by_key(|(_, id)| *id) {
            Some((token, id)) if id as usize >= vocab_size => Err(format!(
                "has the token `{token}` with the id {id}, but the model's `vocab_size` is {vocab_size}"
            )),
            _ => Ok(()),
        }
    }

    /// The id of a token by its text, if the tokenizer has it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Renders the messages by the chat template, each picture still one `<image>`.
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
                        "`{text}` contains `{IMAGE}`, the placeholder of a picture; leave it out"
                    ),
                });
            }
        }
        self.template.render(messages)
    }

    /// Encodes messages, whose pictures take `spans` in order.
    ///
    /// Errors if a text contains `<image>`, if the template fails, or if it writes another number of pictures.
    pub fn encode(&self, messages: &[Message], spans: &[Span]) -> Result<Prompt> {
        spans.iter().try_for_each(Span::check)?;
        let rendered = self.render(messages)?;
        let mut parts = rendered.split(IMAGE);
        let mut text = parts.next().unwrap_or_default().to_owned();
        let placeholders = rendered.matches(IMAGE).count();
        if placeholders != spans.len() {
            return Err(self
                .template
                .placeholder_error(placeholders, spans.len(), messages));
        }
        for (part, span) in parts.zip(spans) {
            push_image_tokens(&mut text, *span);
            text.push_str(part);
        }
        // As in transformers: a template may write the BOS token that the tokenizer would add.
        let bos = self.template.bos_token();
        let add_special_tokens = !bos.is_some_and(|bos| rendered.starts_with(bos));
        let encoding = self
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(|e| Error::Prompt(format!("the tokenizer fails: {e}")))?;
        let ids = encoding.get_ids().to_vec();
        if ids.is_empty() {
            return Err(Error::Prompt("it is empty after tokenization".into()));
        }
        let images = runs(&ids, self.image_token_id);
        let pictures = spans.iter().map(|s| s.grid.0 * s.grid.1 + 1).sum::<usize>();
        if images.len() != pictures {
            return Err(Error::Prompt(format!(
                "{} runs of image tokens for {pictures} pictures after tokenization",
                images.len()
            )));
        }
        Ok(Prompt { ids, images })
    }

    /// Encodes a text without special tokens, as a model would write it.
    pub(crate) fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| Error::Prompt(format!("the tokenizer fails: {e}")))
    }

    /// Decodes generated ids to text without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|e| Error::Prompt(format!("the tokenizer can't decode: {e}")))
    }
}

/// Appends the tokens of one picture: its tiles, a newline after each row, then the whole picture.
fn push_image_tokens(text: &mut String, Span { grid, tokens }: Span) {
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
        push_image_tokens(
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
}
