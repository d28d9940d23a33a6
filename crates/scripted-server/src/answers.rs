//! A server that always gives the same answer.

use std::io;

use serde_json::json;

use crate::{Connection, Exchange};

/// Id of the model in the list that [`models`] sends.
pub const MODEL: &str = "scripted";

/// Answers `GET /v1/models`, as vLLM does, with [`MODEL`].
///
/// # Errors
///
/// The client has closed the connection.
pub fn models(client: &mut Connection) -> io::Result<()> {
    let model = json!({"id": MODEL, "object": "model", "created": 0, "owned_by": "vllm"});
    client.json(200, &json!({"object": "list", "data": [model]}))
}

/// Handler that lists its model and answers each chat request with `text`, word by word if asked to stream.
///
/// The numbers of tokens come with `stream_options.include_usage`: 64 of the prompt, one per word of the answer.
pub fn answers(
    text: &str,
) -> impl Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync + use<> {
    let text = text.to_owned();
    move |exchange, client| match (exchange.method.as_str(), exchange.path.as_str()) {
        ("GET", path) if path.ends_with("/models") => models(client),
        _ if !exchange.is_chat() => client.error(404, "Not Found"),
        _ => answer(&text, exchange, client),
    }
}

/// Words with the spaces before them.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?.len_utf8();
        let end = rest[first..]
            .find(' ')
            .map_or(rest.len(), |space| first + space);
        let (word, left) = rest.split_at(end);
        rest = left;
        Some(word)
    })
}

fn answer(text: &str, exchange: &Exchange, client: &mut Connection) -> io::Result<()> {
    let tokens = words(text).count() as u32;
    if exchange.body["stream"] != true {
        return client.json(
            200,
            &json!({
                "id": "chatcmpl-scripted",
                "object": "chat.completion",
                "created": 0,
                "model": exchange.body["model"],
                "choices": [{
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }],
                "usage": {"prompt_tokens": 64, "completion_tokens": tokens, "total_tokens": 64 + tokens},
            }),
        );
    }
    client.stream_head()?;
    for word in words(text) {
        client.delta(word)?;
    }
    end(exchange, client, tokens)
}

/// Ends a streamed answer.
pub(crate) fn end(exchange: &Exchange, client: &mut Connection, tokens: u32) -> io::Result<()> {
    client.finish("stop")?;
    if exchange.body["stream_options"]["include_usage"] == true {
        client.usage(64, tokens)?;
    }
    client.done()
}
