//! Chat templates, rendered by minijinja as transformers renders them with Jinja
//! ([`chat_template_utils.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py)).
//!
//! A template comes with the model and is not trusted: instructions, stack and output are limited.

mod generation;
mod python;

use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

use minijinja::{Environment, ErrorKind, Value, context, syntax::SyntaxConfig, value::Serde};
use serde::Serialize;

use crate::{
    error::{Error, Result},
    text::message::{Content, IMAGE, Message, Role, question},
};
use vlmnarrate_engine::threads;

/// minijinja instructions that one rendering may take. A published template takes a few hundred, and about 15 for each
/// frame of a clip.
const FUEL: u64 = 50_000;

/// Stack of the rendering thread in bytes: each instruction may nest a value once more, and dropping a nested value takes
/// a call for each level.
const STACK_SIZE: usize = 64 << 20;

/// Bytes that a template may add to the texts of the messages. Published templates add a hundred; attention grows with
/// the square of the prompt's length.
const MAX_ADDED: usize = 8192;

const NAME: &str = "chat_template";

/// Special tokens by the names that templates use, such as `bos_token`.
pub type SpecialTokens = BTreeMap<String, String>;

/// The chat template of a checkpoint, known to render a question about a picture.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: SpecialTokens,
    /// The file with the template, for errors.
    path: PathBuf,
    content_format: ContentFormat,
}

/// The form in which a template gets the content of a message; `openai` and `string` in vLLM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentFormat {
    /// A list of texts and pictures.
    Parts,
    /// One text, for templates of text models.
    Text,
}

/// A message whose content is one text.
#[derive(Serialize)]
struct TextMessage {
    role: Role,
    content: String,
}

impl ChatTemplate {
    /// Parses Jinja source and tries it on a question about a picture. Errors name the file at `path`.
    pub fn new(source: &str, path: &Path, tokens: SpecialTokens) -> Result<Self> {
        let mut template = Self::parse(source, path, tokens)?;
        template.detect_content_format()?;
        Ok(template)
    }

    /// Parses Jinja source without trying it.
    pub(crate) fn parse(source: &str, path: &Path, tokens: SpecialTokens) -> Result<Self> {
        let failed = |e: minijinja::Error| {
            let reason = format!("the chat template does not parse: {}", reason(&e));
            Error::file(path, reason, REMEDY)
        };
        // Python opens the file with universal newlines.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        python::add_to(&mut environment);
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(failed)?);
        environment
            .add_template_owned(NAME, generation::without_generation(&source))
            .map_err(failed)?;
        Ok(Self {
            environment,
            tokens,
            path: path.to_owned(),
            content_format: ContentFormat::Parts,
        })
    }

    /// Sets the first content format in which both a picture and a text are rendered. Errors if no picture is.
    fn detect_content_format(&mut self) -> Result<()> {
        const TEXT: &str = "What is seen here?";
        let messages = question(None, vec![Content::Image], TEXT);
        let mut tried = [ContentFormat::Parts, ContentFormat::Text].map(|format| {
            self.content_format = format;
            let text = self.render(&messages)?;
            match text.matches(IMAGE).count() {
                1 => Ok((format, text.contains(TEXT))),
                placeholders => Err(self.placeholder_error(placeholders, 1, &messages)),
            }
        });
        let has_text = tried
            .iter()
            .flatten()
            .find(|(_, has_text)| *has_text)
            .copied();
        self.content_format = match has_text {
            Some((format, _)) => format,
            // A template that leaves the text out is odd, not broken.
            None => std::mem::replace(&mut tried[0], Ok((ContentFormat::Parts, false)))?.0,
        };
        Ok(())
    }

    /// The BOS token, which the tokenizer must not add to a prompt that begins with it.
    pub(crate) fn bos_token(&self) -> Option<&str> {
        self.tokens.get("bos_token").map(String::as_str)
    }

    /// Renders the messages, each picture as one `<image>`.
    ///
    /// Errors if the template fails, takes too many instructions or writes too much.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let has_system = has_system(messages);
        let rendered = thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("vlmnarrate-cpu-template".into())
                .stack_size(STACK_SIZE);
            let render = || {
                threads::mark_own();
                let result = self.render_on_this_thread(messages);
                result.map_err(|e| self.error(format!("fails: {}", reason(&e)), has_system))
            };
            match thread.spawn_scoped(scope, render) {
                Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                Err(e) => Err(Error::Prompt(format!(
                    "no thread for the chat template: {e}"
                ))),
            }
        })?;
        let texts = messages.iter().flat_map(|m| &m.content).map(|c| match c {
            Content::Text { text } => text.len(),
            Content::Image => IMAGE.len(),
        });
        let limit = texts.sum::<usize>() + MAX_ADDED;
        if rendered.len() > limit {
            let len = rendered.len();
            let reason =
                format!("makes {len} bytes of the messages, more than the limit of {limit}");
            return Err(self.error(reason, has_system));
        }
        Ok(rendered)
    }

    fn render_on_this_thread(&self, messages: &[Message]) -> Result<String, minijinja::Error> {
        let messages = match self.content_format {
            ContentFormat::Parts => Value::from(Serde(messages)),
            ContentFormat::Text => {
                Value::from(Serde(messages.iter().map(as_text).collect::<Vec<_>>()))
            }
        };
        let tokens = Value::from(Serde(&self.tokens));
        let variables = context! {
            messages, tools => (), documents => (), add_generation_prompt => true, ..tokens
        };
        self.environment.get_template(NAME)?.render(variables)
    }

    /// The error of a template that writes another number of `<image>` than there are pictures.
    pub(crate) fn placeholder_error(
        &self,
        placeholders: usize,
        pictures: usize,
        messages: &[Message],
    ) -> Error {
        let pictures = match pictures {
            1 => "one picture".into(),
            n => format!("{n} pictures"),
        };
        self.error(
            format!("writes {placeholders} times `{IMAGE}` for {pictures}"),
            has_system(messages),
        )
    }

    fn error(&self, reason: String, has_system: bool) -> Error {
        let remedy = match has_system {
            true => {
                "Correct the template, or unset system-prompt if the template does not support one"
            }
            false => REMEDY,
        };
        Error::file(&self.path, format!("the chat template {reason}"), remedy)
    }
}

const REMEDY: &str = "Correct the template, or replace it by that of the published model";

fn has_system(messages: &[Message]) -> bool {
    messages.iter().any(|message| message.role == Role::System)
}

fn as_text(message: &Message) -> TextMessage {
    let texts = message.content.iter().map(|c| match c {
        Content::Text { text } => text.as_str(),
        Content::Image => IMAGE,
    });
    TextMessage {
        role: message.role,
        content: texts.collect(),
    }
}

/// The message of a minijinja error and the line of the template.
fn reason(error: &minijinja::Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("it takes more than {FUEL} instructions"),
        (ErrorKind::InvalidOperation | ErrorKind::SyntaxError, Some(detail)) => detail.into(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(template: &str) -> Result<ChatTemplate> {
        let path = Path::new("m/chat_template.jinja");
        ChatTemplate::parse(template, path, SpecialTokens::new())
    }

    fn rendered(template: &str) -> Result<String> {
        parse(template)?.render(&question(None, vec![Content::Image], "What is it?"))
    }

    /// `tools/reference/templates.py` wrote what transformers makes of each.
    #[test]
    fn every_template_renders_as_in_transformers() {
        #[derive(serde::Deserialize)]
        struct Goldens {
            tokens: SpecialTokens,
            chats: BTreeMap<String, Vec<Message>>,
            templates: Vec<Golden>,
        }
        #[derive(serde::Deserialize)]
        struct Golden {
            name: String,
            template: String,
            /// The rendered prompt of each chat; null where transformers raises an error.
            prompts: BTreeMap<String, Option<String>>,
        }
        let goldens = std::fs::read("tests/data/reference/templates.json").unwrap();
        let goldens: Goldens = serde_json::from_slice(&goldens).unwrap();
        let mut wrong = Vec::new();
        for golden in &goldens.templates {
            let template = ChatTemplate::parse(
                &golden.template,
                Path::new("chat_template.jinja"),
                goldens.tokens.clone(),
            );
            for (chat, expected) in &golden.prompts {
                let rendered = match &template {
                    Ok(template) => template.render(&goldens.chats[chat]),
                    Err(e) => Err(Error::Prompt(e.to_string())),
                };
                if rendered.as_ref().ok() != expected.as_ref() {
                    wrong.push(format!(
                        "{} of {chat}: {rendered:?}, not {expected:?}",
                        golden.name
                    ));
                }
            }
        }
        assert!(goldens.templates.len() > 90);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
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
        // Fuel runs out before the text is that long.
        let doubled = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        let error = rendered(doubled).unwrap_err().to_string();
        assert!(error.contains("the chat template fails"), "{error}");
    }

    /// minijinja drops, writes and compares nested values recursively.
    #[test]
    fn a_template_does_not_overflow_the_stack() {
        let deep = |last: &str| {
            let (open, close) = ("[".repeat(40), "]".repeat(40));
            format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range(500) %}}{{% set ns.x = {open}ns.x{close} %}}\
                 {{% endfor %}}{last}"
            )
        };
        assert_eq!(rendered(&deep("deep")).unwrap(), "deep");
        for last in ["{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x | pprint }}"] {
            rendered(&deep(last)).unwrap_err();
        }
        assert_eq!(rendered(&deep("{{ ns.x == [] }}")).unwrap(), "False");
    }

    #[test]
    fn errors_name_file_line_and_remedy() {
        for (template, says) in [
            (
                "a\n{% if %}",
                "does not parse: unexpected end of block (line 2)",
            ),
            (
                "\n\n{{ nothing.at.all }}",
                "fails: undefined value (line 3)",
            ),
            (
                "{{ raise_exception('No\nway') }}",
                "fails: it raises: No way (line 1)",
            ),
            (
                "{{ messages | gone }}",
                "unknown filter: filter gone is unknown (line 1)",
            ),
            (
                "{% for i in range(99999) %}{% endfor %}",
                "more than 50000 instructions",
            ),
        ] {
            let error = rendered(template).unwrap_err().to_string();
            assert!(
                error.starts_with("m/chat_template.jinja: the chat template "),
                "{error}"
            );
            assert!(error.contains(says), "{error}");
            assert!(error.ends_with(REMEDY), "{error}");
        }
    }

    #[test]
    fn a_template_of_a_text_model_gets_text() {
        let chatml = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}";
        let new = |source| {
            let path = Path::new("m/chat_template.jinja");
            ChatTemplate::new(source, path, SpecialTokens::new())
        };
        let template = new(chatml).unwrap();
        let messages = question(Some("Be brief."), vec![Content::Image], "What?");
        assert_eq!(
            template.render(&messages).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>What?<|im_end|>"
        );
        // Python would write the list of parts.
        let template = new("{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
        assert_eq!(template.render(&messages).unwrap(), "Be brief.<image>What?");
        let error = new("{{ messages[0].role }}").err().unwrap().to_string();
        assert!(
            error.contains("writes 0 times `<image>` for one picture"),
            "{error}"
        );
    }

    #[test]
    fn the_time_is_local_and_formatted_as_in_python() {
        let now = rendered("{{ strftime_now('%d %b %Y %-d%%') }}").unwrap();
        let year = jiff::Zoned::now().year();
        assert!(
            now.contains(&year.to_string()) && now.ends_with('%'),
            "{now}"
        );
        assert!(rendered("{{ strftime_now('%') }}").is_err());
    }
}
