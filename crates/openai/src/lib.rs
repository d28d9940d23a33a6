//! Models behind an OpenAI-compatible server: the remote engine of vlmnarrate.
//!
//! [`OpenAiLoader`] implements the [contract](vlmnarrate_engine) for vLLM, llama-server, SGLang, Ollama, NIM, OpenAI and
//! others that take `POST /chat/completions` with pictures. Answers are always streamed, because closing the connection
//! then ends the work of the server too.
//!
//! | module | holds |
//! |---|---|
//! | `loader` | settings: URL, key, certificates |
//! | `endpoint` | a server and its models, shared by all elements that ask it |
//! | `gate` | how many requests it gets, and the pause after a failure |
//! | `dialect` | the body of a request, in the words of each server |
//! | `engine` | from a request to an answer |
//! | `exchange` | one request and the answer that comes, piece by piece |
//! | `stream`, `answer` | server-sent events, and what they say |
//! | `failure` | statuses and errors, and what to do about them |
//! | `http`, `transport` | one request that can be cancelled at any moment |
//! | `picture` | JPEG and PNG |

mod answer;
mod dialect;
mod endpoint;
mod engine;
mod exchange;
mod failure;
mod gate;
mod http;
mod loader;
mod picture;
mod stream;
mod transport;

pub use loader::OpenAiLoader;
// For the fuzzer.
#[doc(hidden)]
pub use stream::{EventParser, LineTooLong, MAX_LINE};

/// Parses the bytes of a streamed answer, in pieces of these sizes, as an answer of at most 20 tokens: its text, or the
/// error.
#[doc(hidden)]
pub fn parse_stream(pieces: &[&[u8]]) -> Result<String, String> {
    let mut reader = exchange::StreamReader::new(20);
    for piece in pieces {
        reader.push(piece).map_err(|error| error.to_string())?;
    }
    let answer = reader.finish().map_err(|error| error.to_string())?;
    Ok(answer.text().to_owned())
}
