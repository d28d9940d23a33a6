//! What servers understand beyond the common part of the protocol.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use vlmnarrate_engine::{Request, Setting};

/// A kind of server, each with fields of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    Vllm,
    LlamaCpp,
    Sglang,
    Ollama,
    OpenAi,
    /// Gets what the most servers understand.
    Other,
}

impl Server {
    /// The server that lists models with this `owned_by`.
    pub(crate) fn of(owned_by: &str, host: &str) -> Self {
        match owned_by {
            "vllm" => Self::Vllm,
            "llamacpp" => Self::LlamaCpp,
            "sglang" => Self::Sglang,
            "library" => Self::Ollama,
            _ if host == "api.openai.com" => Self::OpenAi,
            _ => Self::Other,
        }
    }
}

/// Whether a model is a SmolVLM, by its name. These take squares.
pub(crate) fn is_smolvlm(model: &str) -> bool {
    model.to_ascii_lowercase().contains("smolvlm")
}

/// Fields that a server may refuse, each with the setting that is ignored without it. What has no setting makes no
/// difference to the answer.
const OPTIONAL: [(&str, Option<Setting>); 14] = [
    ("temperature", Some(Setting::Temperature)),
    ("top_p", Some(Setting::TopP)),
    ("top_k", Some(Setting::TopK)),
    ("min_p", Some(Setting::MinP)),
    ("repetition_penalty", Some(Setting::RepetitionPenalty)),
    ("repeat_penalty", Some(Setting::RepetitionPenalty)),
    ("seed", Some(Setting::Seed)),
    // We look for these strings ourselves too.
    ("stop", None),
    ("stream_options", None),
    ("structured_outputs", Some(Setting::Choices)),
    ("grammar", Some(Setting::Choices)),
    ("regex", Some(Setting::Choices)),
    ("response_format", Some(Setting::Choices)),
    // Its successor takes its place.
    (MAX_TOKENS, None),
];
const MAX_TOKENS: &str = "max_tokens";
const MAX_COMPLETION_TOKENS: &str = "max_completion_tokens";

/// How servers say that they don't know or don't take a field: OpenAI, transformers, Pydantic, Mistral.
const UNKNOWN_FIELD: [&str; 7] = [
    "unsupported",
    "not support",
    "unexpected",
    "unrecognized",
    "unknown",
    "not permitted",
    "extra_forbidden",
];

/// Fields that a server has refused.
pub(crate) type Refused = BTreeSet<&'static str>;

/// The fields of `sent` that a refusal names, which the request can do without.
///
/// `parameter` is the field that the server holds responsible, if it says so apart from the message.
pub(crate) fn refused_fields(
    sent: &Map<String, Value>,
    options: &Map<String, Value>,
    parameter: Option<&str>,
    message: &str,
) -> Vec<&'static str> {
    let is_word_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words: Vec<_> = message
        .split(|c| !is_word_part(c))
        .chain(parameter)
        .collect();
    // A value may be wrong although the field is known: that is an error to show.
    let lower = message.to_ascii_lowercase();
    if !UNKNOWN_FIELD.iter().any(|words| lower.contains(words)) {
        return Vec::new();
    }
    let has_successor = words.contains(&MAX_COMPLETION_TOKENS);
    let fields = OPTIONAL.iter().map(|(name, _)| *name);
    fields
        .filter(|name| sent.contains_key(*name) && !options.contains_key(*name))
        // A message about too many tokens names this field as well.
        .filter(|name| *name != MAX_TOKENS || has_successor)
        .filter(|name| words.contains(name))
        .collect()
}

/// A request's body, and what of the request it does not say.
pub(crate) struct Body {
    pub(crate) fields: Map<String, Value>,
    pub(crate) ignored: Vec<Setting>,
}

/// Everything that a body depends on.
pub(crate) struct BodyParts<'a> {
    pub(crate) server: Server,
    pub(crate) model: &'a str,
    pub(crate) request: &'a Request<'a>,
    /// Data URLs of the request's pictures.
    pub(crate) pictures: &'a [String],
    pub(crate) refused: &'a Refused,
    /// Fields of the user, which win.
    pub(crate) options: &'a Map<String, Value>,
}

impl BodyParts<'_> {
    /// The body of a request for a streamed answer.
    pub(crate) fn build(&self) -> Body {
        let mut body = Body {
            fields: Map::new(),
            ignored: Vec::new(),
        };
        let fields = &mut body.fields;
        fields.insert("model".into(), self.model.into());
        fields.insert("messages".into(), self.messages());
        fields.insert("stream".into(), true.into());
        fields.insert("stream_options".into(), json!({ "include_usage": true }));
        fields.insert(MAX_TOKENS.into(), self.max_tokens().into());
        let stop = self.request.stop_strings;
        if !stop.is_empty() && self.server != Server::Other {
            // OpenAI and vLLM take four, and transformers serve fails: we look for all of them.
            fields.insert("stop".into(), json!(&stop[..stop.len().min(4)]));
        }
        self.insert_sampling(&mut body);
        self.insert_choices(&mut body);
        for (name, setting) in OPTIONAL {
            if self.refused.contains(name) && body.fields.remove(name).is_some() {
                body.ignored.extend(setting);
            }
        }
        if self.refused.contains(MAX_TOKENS) {
            let max_tokens = self.max_tokens().into();
            body.fields.insert(MAX_COMPLETION_TOKENS.into(), max_tokens);
        }
        for (name, value) in self.options {
            body.fields.insert(name.clone(), value.clone());
        }
        body
    }

    fn messages(&self) -> Value {
        let text = |text: &str| json!({ "type": "text", "text": text });
        let image = |url: &String| json!({ "type": "image_url", "image_url": { "url": url } });
        let mut content = Vec::new();
        let mut end = String::new();
        match self.request.clip {
            // Pictures come first: SmolVLM's chat template looks at the first part.
            None => content.extend(self.pictures.iter().map(image)),
            Some(clip) => {
                let mut before = clip.introduction();
                for (heading, picture) in clip.headings().zip(self.pictures) {
                    // One part: llama-server writes a line break between two texts.
                    before += &heading;
                    content.extend([text(&before), image(picture)]);
                    before.clear();
                }
                end.push_str(vlmnarrate_engine::Clip::END);
            }
        }
        end += self.request.prompt;
        if !end.is_empty() {
            content.push(text(&end));
        }
        let user = json!({ "role": "user", "content": content });
        match self.request.system {
            None => json!([user]),
            Some(system) => json!([{ "role": "system", "content": [text(system)] }, user]),
        }
    }

    /// Tokens of the answer at most.
    fn max_tokens(&self) -> usize {
        match self.request.choices {
            [] => self.request.max_tokens,
            // No token is shorter than a byte. Room for what is around it in JSON.
            choices => choices.iter().map(String::len).max().unwrap_or(0) + 32,
        }
    }

    fn insert_sampling(&self, body: &mut Body) {
        let sampling = self.request.sampling;
        // Servers have defaults of their own.
        let mut insert = |name: &str, value: Value| body.fields.insert(name.into(), value);
        insert("temperature", sampling.temperature.into());
        let has_extensions = matches!(
            self.server,
            Server::Vllm | Server::LlamaCpp | Server::Sglang | Server::Other
        );
        let penalty = f64::from(sampling.repetition_penalty);
        // The nearest of the shortest numbers, not all digits of the f32.
        let penalty = (penalty * 1e6).round() / 1e6;
        let name = match self.server {
            Server::LlamaCpp => "repeat_penalty",
            _ => "repetition_penalty",
        };
        match (penalty == 1.0, has_extensions) {
            // A model may come with a penalty of its own.
            (true, _) if self.server == Server::Vllm => _ = insert(name, penalty.into()),
            (true, _) => (),
            (false, true) => _ = insert(name, penalty.into()),
            (false, false) => body.ignored.push(Setting::RepetitionPenalty),
        }
        if sampling.temperature == 0.0 {
            return;
        }
        let mut insert = |name: &str, value: Value| body.fields.insert(name.into(), value);
        // vLLM takes no seed of 64 bits, and no 0 for the likeliest token alone.
        insert("seed", (sampling.seed & i64::MAX as u64).into());
        insert("top_p", sampling.top_p.max(1e-6).into());
        let extensions = [
            (
                Setting::TopK,
                "top_k",
                sampling.top_k.into(),
                sampling.top_k > 0,
            ),
            (
                Setting::MinP,
                "min_p",
                sampling.min_p.into(),
                sampling.min_p > 0.0,
            ),
        ];
        for (setting, name, value, is_set) in extensions {
            match (is_set, has_extensions) {
                (true, true) => _ = body.fields.insert(name.into(), value),
                (true, false) => body.ignored.push(setting),
                // Defaults of the server or of the model.
                (false, _) if self.server == Server::LlamaCpp || self.server == Server::Vllm => {
                    body.fields.insert(name.into(), 0.into());
                }
                (false, _) => (),
            }
        }
    }

    fn insert_choices(&self, body: &mut Body) {
        let choices = self.request.choices;
        if choices.is_empty() {
            return;
        }
        let (name, value) = match self.server {
            Server::Vllm => {
                // Constrained to the text alone, a model can't begin with the space that it would begin with.
                let spaced = choices.iter().map(|choice| format!(" {choice}"));
                let choices: Vec<_> = choices.iter().cloned().chain(spaced).collect();
                ("structured_outputs", json!({ "choice": choices }))
            }
            Server::LlamaCpp => ("grammar", grammar(choices).into()),
            Server::Sglang => ("regex", regex(choices).into()),
            Server::Ollama | Server::OpenAi | Server::Other => {
                ("response_format", choice_schema(choices))
            }
        };
        body.fields.insert(name.into(), value);
    }
}

/// A grammar of llama.cpp (GBNF) for one of these texts.
fn grammar(choices: &[String]) -> String {
    let literal = |choice: &String| {
        let mut literal = String::from("\"");
        for c in choice.chars() {
            match c {
                '"' | '\\' => literal.extend(['\\', c]),
                '\n' => literal.push_str("\\n"),
                '\r' => literal.push_str("\\r"),
                '\t' => literal.push_str("\\t"),
                c => literal.push(c),
            }
        }
        literal + "\""
    };
    let literals: Vec<_> = choices.iter().map(literal).collect();
    format!("root ::= \" \"? ({})", literals.join(" | "))
}

/// A regular expression for one of these texts.
fn regex(choices: &[String]) -> String {
    let escaped = |choice: &String| {
        let mut escaped = String::new();
        for c in choice.chars() {
            if c.is_ascii_punctuation() {
                escaped.push('\\');
            }
            escaped.push(c);
        }
        escaped
    };
    let choices: Vec<_> = choices.iter().map(escaped).collect();
    format!(" ?({})", choices.join("|"))
}

/// A JSON schema for an object with one of these texts.
fn choice_schema(choices: &[String]) -> Value {
    json!({
        "type": "json_schema",
        "json_schema": {
            "name": CHOICE,
            "strict": true,
            "schema": {
                "type": "object",
                "properties": { CHOICE: { "type": "string", "enum": choices } },
                "required": [CHOICE],
                "additionalProperties": false,
            },
        },
    })
}

const CHOICE: &str = "choice";

/// The choice that an answer names, as text or as the JSON that was asked for; `None` if it names none of them.
pub(crate) fn chosen<'a>(choices: &'a [String], answer: &str) -> Option<&'a String> {
    let object = serde_json::from_str::<Map<String, Value>>(answer).ok();
    let named = object
        .as_ref()
        .and_then(|object| object.get(CHOICE)?.as_str());
    let named = named.unwrap_or(answer).trim();
    choices.iter().find(|choice| *choice == named)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vlmnarrate_engine::{Clip, Picture};

    use super::*;

    fn build(server: Server, model: &str, request: &Request<'_>, refused: &[&'static str]) -> Body {
        BodyParts {
            server,
            model,
            request,
            pictures: &["data:a".into(), "data:b".into()][..request.pictures.len()],
            refused: &refused.iter().copied().collect(),
            options: &Map::new(),
        }
        .build()
    }

    fn picture() -> Picture {
        Picture::blank(8)
    }

    #[test]
    fn the_common_request() {
        let picture = picture();
        let pictures = [&picture];
        let mut request = Request::new(&pictures, "What?");
        request.system = Some("Be brief.");
        let body = build(Server::Other, "m", &request, &[]);
        let expected = json!({
            "model": "m",
            "stream": true,
            "stream_options": { "include_usage": true },
            "max_tokens": 20,
            "temperature": 0.0,
            "messages": [
                { "role": "system", "content": [{ "type": "text", "text": "Be brief." }] },
                { "role": "user", "content": [
                    { "type": "image_url", "image_url": { "url": "data:a" } },
                    { "type": "text", "text": "What?" },
                ] },
            ],
        });
        assert_eq!(Value::from(body.fields), expected);
        assert_eq!(body.ignored, []);
    }

    #[test]
    fn the_frames_of_a_clip_have_their_times_between_them() {
        let picture = picture();
        let pictures = [&picture, &picture];
        let clip = Clip {
            times: vec![Duration::ZERO, Duration::from_secs(2)],
            duration: Duration::from_secs(4),
        };
        let mut request = Request::new(&pictures, "What?");
        request.clip = Some(&clip);
        let body = build(Server::Vllm, "m", &request, &[]);
        let content = body.fields["messages"][0]["content"].as_array().unwrap();
        let parts: Vec<_> = content
            .iter()
            .map(|part| {
                part["text"]
                    .as_str()
                    .or(part["image_url"]["url"].as_str())
                    .unwrap()
            })
            .collect();
        let introduction = clip.introduction();
        assert_eq!(
            parts,
            [
                &(introduction + "\nFrame from 00:00:"),
                "data:a",
                "\nFrame from 00:02:",
                "data:b",
                "\n\nWhat?"
            ]
        );
    }

    #[test]
    fn each_server_gets_its_own_fields_and_the_rest_is_named() {
        let picture = picture();
        let pictures = [&picture];
        let choices = ["yes".to_owned(), "say \"no\"".to_owned()];
        let mut request = Request::new(&pictures, "");
        request.sampling.temperature = 0.5;
        request.sampling.top_k = 40;
        request.sampling.repetition_penalty = 1.1;
        request.choices = &choices;
        let body = |server| build(server, "HuggingFaceTB/SmolVLM-256M-Instruct", &request, &[]);
        let names = |server, names: &[&str]| {
            let body = body(server);
            for name in names {
                assert!(body.fields.contains_key(*name), "{server:?}: {name}");
            }
            body
        };
        let vllm = names(
            Server::Vllm,
            &["top_k", "min_p", "repetition_penalty", "seed"],
        );
        assert_eq!(
            vllm.fields["structured_outputs"]["choice"],
            json!(["yes", "say \"no\"", " yes", " say \"no\""])
        );
        assert_eq!(vllm.fields["repetition_penalty"], 1.1);
        assert_eq!(vllm.ignored, []);
        let llama = names(Server::LlamaCpp, &["top_k", "min_p", "repeat_penalty"]);
        assert_eq!(
            llama.fields["grammar"],
            r#"root ::= " "? ("yes" | "say \"no\"")"#
        );
        assert_eq!(llama.ignored, []);
        let openai = names(Server::OpenAi, &["response_format", "seed", "top_p"]);
        assert_eq!(openai.ignored, [Setting::RepetitionPenalty, Setting::TopK]);
        let sglang = names(Server::Sglang, &["top_k", "repetition_penalty"]);
        assert_eq!(sglang.fields["regex"], r#" ?(yes|say \"no\")"#);
    }

    #[test]
    fn a_refused_field_is_left_out_and_its_setting_named() {
        let picture = picture();
        let pictures = [&picture];
        let mut request = Request::new(&pictures, "");
        request.sampling.temperature = 1.0;
        request.sampling.top_k = 3;
        let body = build(Server::Other, "m", &request, &[]);
        let refused =
            |parameter, message| refused_fields(&body.fields, &Map::new(), parameter, message);
        assert_eq!(
            refused(
                None,
                "Unexpected keys in the request: {'top_k', 'stream_options'}"
            ),
            ["top_k", "stream_options"]
        );
        assert_eq!(refused(Some("top_k"), "Unknown parameter"), ["top_k"]);
        let message = "temperature must be in [0, 2], got 5";
        assert_eq!(refused(Some("temperature"), message), [""; 0]);
        assert_eq!(
            refused(
                Some("max_tokens"),
                "Unsupported parameter: use 'max_completion_tokens' instead."
            ),
            ["max_tokens"]
        );
        let too_long = "max_tokens and the prompt are longer than the context of 1024 tokens";
        assert_eq!(refused(None, too_long), [""; 0]);
        let mine = Map::from_iter([("top_k".to_owned(), json!(5))]);
        assert_eq!(
            refused_fields(&body.fields, &mine, Some("top_k"), "unknown"),
            [""; 0]
        );

        let body = build(Server::Other, "m", &request, &["top_k", "max_tokens"]);
        assert_eq!(body.ignored, [Setting::TopK]);
        assert!(!body.fields.contains_key("top_k") && !body.fields.contains_key("max_tokens"));
        assert_eq!(body.fields["max_completion_tokens"], 20);
    }

    #[test]
    fn options_of_the_user_win() {
        let picture = picture();
        let pictures = [&picture];
        let request = Request::new(&pictures, "");
        let options = json!({ "max_tokens": 7, "chat_template_kwargs": { "x": 1 } });
        let body = BodyParts {
            server: Server::Vllm,
            model: "m",
            request: &request,
            pictures: &[String::new()],
            refused: &Refused::new(),
            options: options.as_object().unwrap(),
        };
        let fields = body.build().fields;
        assert_eq!(fields["max_tokens"], 7);
        assert_eq!(fields["chat_template_kwargs"]["x"], 1);
    }

    #[test]
    fn an_answer_is_one_of_the_choices_or_none() {
        let choices = ["yes".to_owned(), "no".to_owned()];
        assert_eq!(chosen(&choices, " yes\n"), Some(&choices[0]));
        assert_eq!(chosen(&choices, r#"{"choice": "no"}"#), Some(&choices[1]));
        for other in [
            "Yes, there is",
            "",
            r#"{"choice": "maybe"}"#,
            r#"{"choice": 1}"#,
        ] {
            assert_eq!(chosen(&choices, other), None, "{other}");
        }
    }
}
