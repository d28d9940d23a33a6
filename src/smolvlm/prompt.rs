//! Words and pictures to token ids, as the reference's processor writes them.

use minijinja::{Environment, Value, context, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::{Error, Result};

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

const IMAGE: &str = "<image>";
const FAKE: &str = "<fake_token_around_image>";
const GLOBAL: &str = "<global-img>";
/// The token that ends a turn and so a caption.
pub(super) const END_OF_UTTERANCE: &str = "<end_of_utterance>";

/// Instructions a chat template may take: a published one takes a few hundred.
const TEMPLATE_FUEL: u64 = 1_000_000;

/// Bytes that a chat template may add to the messages, of which published ones take a hundred. Attention grows
/// with the square of what it writes.
const MAX_ADDED: usize = 8192;

/// Chat template and tokenizer of one checkpoint.
pub struct Prompter {
    template: Environment<'static>,
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

impl Prompter {
    /// `template` is Jinja source; the error is a reason without the file's name.
    pub fn new(template: String, mut tokenizer: Tokenizer) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(TEMPLATE_FUEL));
        // transformers renders with both, and templates rely on it.
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(|e| e.to_string())?);
        environment
            .add_template_owned(TEMPLATE, template)
            .map_err(|e| format!("the chat template does not parse: {e}"))?;
        // Saved truncation would cut a tiled prompt, saved padding would lengthen it.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        let image = tokenizer
            .token_to_id(IMAGE)
            .ok_or_else(|| format!("the token `{IMAGE}` is missing"))?;
        Ok(Self {
            template: environment,
            tokenizer,
            image,
        })
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The messages as text, each picture still one `<image>`.
    fn render(&self, messages: &[Message]) -> Result<String> {
        let text = messages
            .iter()
            .flat_map(|m| &m.content)
            .find_map(|c| match c {
                Content::Text { text } if text.contains(IMAGE) => Some(text),
                _ => None,
            });
        if let Some(text) = text {
            return Err(Error::Prompt(format!(
                "`{text}` contains `{IMAGE}`, which marks a picture's place; leave it out"
            )));
        }
        let texts = messages.iter().flat_map(|m| &m.content).map(|c| match c {
            Content::Text { text } => text.len(),
            Content::Image => IMAGE.len(),
        });
        let most = texts.sum::<usize>() + MAX_ADDED;
        let template = self.template.get_template(TEMPLATE);
        let messages = Value::from(Serde(messages));
        let rendered = template
            .and_then(|t| t.render(context! { messages, add_generation_prompt => true }))
            .map_err(|e| Error::Prompt(format!("the chat template fails: {e}")))?;
        if rendered.len() > most {
            return Err(Error::Prompt(format!(
                "the chat template makes {} bytes of the messages, at most {most} are read",
                rendered.len()
            )));
        }
        Ok(rendered)
    }

    /// Ids of `messages`, whose pictures take the `spans` in order.
    pub fn encode(&self, messages: &[Message], spans: &[Span]) -> Result<Prompt> {
        let rendered = self.render(messages)?;
        let mut parts = rendered.split(IMAGE);
        let mut text = parts.next().unwrap_or_default().to_owned();
        let mut left = spans.iter();
        for part in parts {
            let span = left
                .next()
                .ok_or_else(|| Error::Prompt("more picture places than pictures".into()))?;
            expand(&mut text, *span);
            text.push_str(part);
        }
        if left.next().is_some() {
            return Err(Error::Prompt("more pictures than picture places".into()));
        }
        let encoding = self
            .tokenizer
            .encode(text, true)
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
    pub(super) fn ids(&self, text: &str) -> Result<Vec<u32>> {
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

const TEMPLATE: &str = "chat_template";

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

    /// Rendered with a question and a picture, by the demo model's tokenizer.
    fn rendered(template: &str) -> Result<String> {
        let checkpoint = super::super::Checkpoint::open(&super::super::Source::Demo)?;
        let prompter = Prompter::new(template.into(), checkpoint.tokenizer()?).unwrap();
        prompter.render(&question(None, vec![Content::Image], "What is it?"))
    }

    #[test]
    fn a_template_writes_no_more_than_a_prompt() {
        assert!(rendered("{{ 'x' * 8000 }}<image>").is_ok());
        for template in [
            "{{ 'x' * 9000 }}<image>",
            "{% for i in range(9000) %}x{% endfor %}",
        ] {
            let error = rendered(template).unwrap_err().to_string();
            assert!(error.contains("the chat template makes 90"), "{error}");
        }
        // It stops before there is that much.
        let doubled = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        let error = rendered(doubled).unwrap_err().to_string();
        assert!(error.contains("the chat template fails"), "{error}");
    }

    #[test]
    fn numbers_are_spelled() {
        let words = [1, 4, 13, 20, 64].map(number_in_words);
        assert_eq!(words, ["one", "four", "thirteen", "twenty", "sixty-four"]);
    }
}
