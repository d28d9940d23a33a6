//! A streamed answer: from the data of events to a text.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use vlmnarrate_engine::{Error, ErrorKind};

use crate::failure::one_line;

/// Bytes of an answer's text at most. 4096 tokens have some 16 kB.
const MAX_TEXT: usize = 256 << 10;

/// A chunk of a streamed answer, or a whole answer that was not streamed. Unknown fields are left out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Chunk {
    model: Option<String>,
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    timings: Option<ServerTimings>,
    error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice {
    delta: Option<Message>,
    message: Option<Message>,
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    content: Option<String>,
    reasoning: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

/// Times of llama-server, in milliseconds.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ServerTimings {
    prompt_ms: Option<f64>,
    predicted_ms: Option<f64>,
}

/// Why the text is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model has ended it.
    Stop,
    /// The limit of tokens cut it off.
    Length,
    /// A filter of the server cut it off.
    Filtered,
}

/// An answer in progress.
#[derive(Debug)]
pub(crate) struct StreamedAnswer {
    /// Everything that has come, with white space around it.
    text: String,
    /// Parts of the text that have come, about as many as tokens.
    parts: usize,
    pub(crate) model: Option<String>,
    pub(crate) finish: Option<Finish>,
    has_reasoning: bool,
    completion_tokens: Option<u64>,
    /// As the server counts.
    pub(crate) prompt_tokens: Option<u64>,
    timings: Option<ServerTimings>,
    sent: Instant,
    first_text: Option<Instant>,
    /// Parts that may come; a server that sends more ignores `max_tokens`.
    max_parts: usize,
}

impl StreamedAnswer {
    /// An answer of at most so many tokens to a request that was just sent.
    pub(crate) fn new(max_tokens: usize) -> Self {
        Self {
            text: String::new(),
            parts: 0,
            model: None,
            finish: None,
            has_reasoning: false,
            completion_tokens: None,
            prompt_tokens: None,
            timings: None,
            sent: Instant::now(),
            first_text: None,
            // A character can be several tokens, and a token several parts.
            max_parts: max_tokens.saturating_mul(8).saturating_add(1000),
        }
    }

    /// Takes the data of an event. Returns whether the text has grown.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Failed`]: it is no chunk, it is an error of the server, or there is no end to the text.
    pub(crate) fn push(&mut self, data: &[u8]) -> Result<bool, Error> {
        if data.trim_ascii() == b"[DONE]" || data.trim_ascii().is_empty() {
            return Ok(false);
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            let start = String::from_utf8_lossy(&data[..data.len().min(80)]);
            failed(format!("the answer is not JSON: {error} in {start:?}"))
        })?;
        if let Some(error) = chunk.error {
            let said = one_line(&error_text(&error));
            return Err(failed(format!("the server failed: {said}")));
        }
        if self.model.is_none() {
            self.model = chunk.model.filter(|model| !model.is_empty());
        }
        if let Some(usage) = chunk.usage {
            self.prompt_tokens = usage.prompt_tokens.or(self.prompt_tokens);
            self.completion_tokens = usage.completion_tokens.or(self.completion_tokens);
        }
        self.timings = chunk.timings.or(self.timings.take());
        let mut has_grown = false;
        for choice in chunk.choices.into_iter().flatten().take(1) {
            let message = choice.delta.or(choice.message).unwrap_or_default();
            let is_text =
                |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
            self.has_reasoning |=
                is_text(&message.reasoning) || is_text(&message.reasoning_content);
            self.parts += 1;
            if let Some(content) = message.content.filter(|content| !content.is_empty()) {
                self.first_text.get_or_insert_with(Instant::now);
                self.text += &content;
                has_grown = true;
            }
            self.finish = match choice.finish_reason.as_deref() {
                None | Some("") => self.finish,
                Some("length") => Some(Finish::Length),
                Some("content_filter") => Some(Finish::Filtered),
                Some(_) => Some(Finish::Stop),
            };
        }
        if self.parts > self.max_parts || self.text.len() > MAX_TEXT {
            return Err(failed("the answer does not end"));
        }
        Ok(has_grown)
    }

    /// The text so far, without white space around it.
    pub(crate) fn text(&self) -> &str {
        self.text.trim()
    }

    /// Cuts the text where one of these strings comes up first. Returns whether one does.
    pub(crate) fn stop_at(&mut self, stop_strings: &[String]) -> bool {
        let found = stop_strings.iter().filter(|stop| !stop.is_empty());
        let end = found.filter_map(|stop| self.text.find(stop.as_str())).min();
        if let Some(end) = end {
            self.text.truncate(end);
            self.finish = Some(Finish::Stop);
        }
        end.is_some()
    }

    /// Tokens so far: as the server counts, or else the parts that have come.
    pub(crate) fn tokens(&self) -> usize {
        let counted = self.completion_tokens.and_then(|n| usize::try_from(n).ok());
        counted.unwrap_or(self.parts)
    }

    /// Whether the model has thought and said nothing.
    pub(crate) fn is_only_reasoning(&self) -> bool {
        self.has_reasoning && self.text().is_empty()
    }

    /// Time until the first text, and from there on.
    pub(crate) fn prefill_and_decode(&self) -> (Duration, Duration) {
        let now = Instant::now();
        let first = self.first_text.unwrap_or(now);
        let (prefill, decode) = (first - self.sent, now - first);
        let told = |ms: Option<f64>| {
            // A server may say anything.
            let seconds = ms.filter(|ms| (0.0..1e9).contains(ms))? / 1e3;
            Some(Duration::from_secs_f64(seconds))
        };
        let timings = self.timings.as_ref();
        (
            timings.and_then(|t| told(t.prompt_ms)).unwrap_or(prefill),
            timings.and_then(|t| told(t.predicted_ms)).unwrap_or(decode),
        )
    }
}

fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Failed, message)
}

/// The message of an error in JSON: an object, a string, or `detail` of FastAPI.
pub(crate) fn error_text(error: &Value) -> String {
    let message = [&error["message"], &error["detail"], error]
        .into_iter()
        .find_map(Value::as_str);
    message.map_or_else(|| error.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(events: &[&str]) -> StreamedAnswer {
        let mut answer = StreamedAnswer::new(20);
        for event in events {
            answer.push(event.as_bytes()).unwrap();
        }
        answer
    }

    #[test]
    fn an_answer_of_vllm() {
        let answer = answer(&[
            r#"{"model":"m","choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"model":"m","choices":[{"delta":{"content":" A red"}}]}"#,
            r#"{"model":"m","choices":[{"delta":{"content":" screen."},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":5}}"#,
            "[DONE]",
        ]);
        assert_eq!(answer.text(), "A red screen.");
        assert_eq!((answer.tokens(), answer.finish), (5, Some(Finish::Stop)));
        assert_eq!(answer.model.as_deref(), Some("m"));
    }

    #[test]
    fn an_answer_of_llama_server() {
        let answer = answer(&[
            r#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#,
            r#"{"choices":[{"delta":{"content":"A"}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"length"}],"timings":{"prompt_ms":12.5,"predicted_ms":7}}"#,
        ]);
        assert_eq!(answer.finish, Some(Finish::Length));
        let times = (Duration::from_micros(12_500), Duration::from_millis(7));
        assert_eq!(answer.prefill_and_decode(), times);
    }

    #[test]
    fn an_answer_that_is_not_streamed() {
        let answer = answer(&[
            r#"{"model":"m","choices":[{"message":{"role":"assistant","content":"Hi."},"finish_reason":"stop"}],"usage":{"completion_tokens":2}}"#,
        ]);
        assert_eq!((answer.text(), answer.tokens()), ("Hi.", 2));
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for (event, expected) in [
            (
                r#"{"error":{"message":"out of memory","code":500}}"#,
                "the server failed: out of memory",
            ),
            (
                r#"{"error":"Unauthorized"}"#,
                "the server failed: Unauthorized",
            ),
            (r#"{"error":{"detail":"busy"}}"#, "the server failed: busy"),
            ("<html>", "the answer is not JSON"),
            ("[1]", "the answer is not JSON"),
            (r#"{"choices":7}"#, "the answer is not JSON"),
        ] {
            let error = StreamedAnswer::new(20).push(event.as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_text_without_an_end_is_an_error() {
        let mut answer = StreamedAnswer::new(20);
        let event = br#"{"choices":[{"delta":{"content":"la "}}]}"#;
        let pushed = (0..10_000).try_for_each(|_| answer.push(event).map(|_| ()));
        assert_eq!(pushed.unwrap_err().to_string(), "the answer does not end");
    }

    #[test]
    fn a_stop_string_ends_the_text() {
        let mut answer = answer(&[r#"{"choices":[{"delta":{"content":" One. Two. Three"}}]}"#]);
        assert!(!answer.stop_at(&["Four".into(), String::new()]));
        assert!(answer.stop_at(&["Three".into(), " Two".into()]));
        assert_eq!(answer.text(), "One.");
    }

    #[test]
    fn thoughts_are_no_text() {
        let answer = answer(&[
            r#"{"choices":[{"delta":{"reasoning_content":"Let me see"}}]}"#,
            r#"{"choices":[{"delta":{"content":null},"finish_reason":"length"}]}"#,
        ]);
        assert!(answer.is_only_reasoning());
    }
}
