//! The answering side of a connection.

use std::{
    io::{self, BufReader, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustls::{ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::{
    exchange::Exchange,
    wait::{CLOSED, Woken, wait},
};

/// Bytes to and from a client.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &stream.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(bytes),
            Self::Tls(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    /// Nothing was sent.
    Pending,
    /// Chunks follow.
    Streaming,
    /// The client knows that there is no more.
    Complete,
    /// The handler wrote bytes of its own.
    Raw,
}

/// Connection to a client, with one request that waits for its response.
///
/// Everything is sent at once, without buffers. When the handler returns, the connection stays open for the next
/// request if the response is complete. Otherwise the connection is closed: a client sees a truncated answer if the
/// handler returns in the middle of a stream, or after [`raw`](Self::raw).
///
/// # Errors
///
/// All methods return the error of the socket; mostly that the client has closed the connection. Handlers pass errors
/// on with `?`, which ends the connection.
pub struct Connection {
    stream: BufReader<Stream>,
    response: Response,
    /// Name of the model that the request asked for.
    model: String,
}

impl Connection {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream: BufReader::new(stream),
            response: Response::Pending,
            model: String::new(),
        }
    }

    /// Waits for a request. `None` if the client closed the connection, or asked nothing for `idle`.
    pub(crate) fn next_exchange(
        &mut self,
        number: u64,
        idle: Option<Duration>,
    ) -> io::Result<Option<Exchange>> {
        if let Some(idle) = idle
            && self.stream.buffer().is_empty()
        {
            let until = Some(Instant::now() + idle);
            let readable = rustix::event::PollFlags::IN;
            if wait(self.socket(), readable, None, until) == Woken::Time {
                return Ok(None);
            }
        }
        let exchange = Exchange::read(&mut self.stream, number)?;
        if let Some(exchange) = &exchange {
            self.response = Response::Pending;
            self.model = exchange.body["model"].as_str().unwrap_or_default().into();
        }
        Ok(exchange)
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.response == Response::Complete
    }

    /// Tells the client that nothing was cut off.
    pub(crate) fn close_notify(&mut self) {
        if let Stream::Tls(stream) = self.stream.get_mut() {
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    }

    fn socket(&self) -> &TcpStream {
        self.stream.get_ref().socket()
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let stream = self.stream.get_mut();
        stream.write_all(bytes)?;
        stream.flush()
    }

    /// Sends a complete response with a JSON body.
    pub fn json(&mut self, status: u16, body: &Value) -> io::Result<()> {
        self.json_with_headers(status, &[], body)
    }

    /// Sends a complete response with a JSON body and further headers.
    pub fn json_with_headers(
        &mut self,
        status: u16,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> io::Result<()> {
        self.respond(status, headers, "application/json", &body.to_string())
    }

    /// Sends a complete response with an error as OpenAI and vLLM word it.
    pub fn error(&mut self, status: u16, message: &str) -> io::Result<()> {
        let error = json!({"message": message, "type": "scripted", "param": null, "code": status});
        self.json(status, &json!({"error": error}))
    }

    /// Sends a complete response with any body.
    pub fn text(&mut self, status: u16, content_type: &str, body: &str) -> io::Result<()> {
        self.respond(status, &[], content_type, body)
    }

    fn respond(
        &mut self,
        status: u16,
        headers: &[(&str, &str)],
        content_type: &str,
        body: &str,
    ) -> io::Result<()> {
        let mut response = head(status, content_type);
        for (name, value) in headers {
            response += &format!("{name}: {value}\r\n");
        }
        response += &format!("content-length: {}\r\n\r\n{body}", body.len());
        self.response = Response::Complete;
        self.send(response.as_bytes())
    }

    /// Begins an event stream (SSE) in chunked transfer coding.
    pub fn stream_head(&mut self) -> io::Result<()> {
        self.response = Response::Streaming;
        let head = head(200, "text/event-stream; charset=utf-8");
        self.send(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes())
    }

    /// Sends bytes as one chunk of the transfer coding: comments, or what is no event at all.
    pub fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend(bytes);
        chunk.extend(b"\r\n");
        self.send(&chunk)
    }

    /// Sends an event.
    pub fn event(&mut self, data: &Value) -> io::Result<()> {
        self.chunk(format!("data: {data}\n\n").as_bytes())
    }

    fn choice(&mut self, delta: Value, finish_reason: Value) -> io::Result<()> {
        let choice = json!({"index": 0, "delta": delta, "finish_reason": finish_reason});
        self.completion_chunk(json!([choice]), Value::Null)
    }

    fn completion_chunk(&mut self, choices: Value, usage: Value) -> io::Result<()> {
        let mut chunk = json!({
            "id": "chatcmpl-scripted",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": self.model,
            "choices": choices,
        });
        if !usage.is_null() {
            chunk["usage"] = usage;
        }
        self.event(&chunk)
    }

    /// Sends a part of the answer.
    pub fn delta(&mut self, text: &str) -> io::Result<()> {
        self.choice(json!({"content": text}), Value::Null)
    }

    /// Sends why the answer ends: `stop` or `length`.
    pub fn finish(&mut self, reason: &str) -> io::Result<()> {
        self.choice(json!({}), reason.into())
    }

    /// Sends numbers of tokens, with `choices: []`.
    pub fn usage(&mut self, prompt: u32, completion: u32) -> io::Result<()> {
        let usage = json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        });
        self.completion_chunk(json!([]), usage)
    }

    /// Sends `[DONE]` and ends the stream.
    pub fn done(&mut self) -> io::Result<()> {
        self.chunk(b"data: [DONE]\n\n")?;
        self.end()
    }

    /// Ends the stream without `[DONE]`, as transformers serve does.
    pub fn end(&mut self) -> io::Result<()> {
        self.response = Response::Complete;
        self.send(b"0\r\n\r\n")
    }

    /// Sends bytes as they are. The connection is closed when the handler returns.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.response = Response::Raw;
        self.send(bytes)
    }

    /// Closes the connection with a reset (RST) when the handler returns.
    pub fn reset(&mut self) -> io::Result<()> {
        self.response = Response::Raw;
        rustix::net::sockopt::set_socket_linger(self.socket(), Some(Duration::ZERO))?;
        // The TLS stream is not told: nothing may be sent any more.
        Ok(())
    }

    /// Waits for the client to close the connection. Returns how long that took, or `None` after `limit`.
    ///
    /// A server that is dropped counts as a client that closes.
    pub fn closed_within(&self, limit: Duration) -> Option<Duration> {
        let start = Instant::now();
        self.closed_until(start + limit).then(|| start.elapsed())
    }

    /// Waits until a point in time, exact to 0.1 ms. Returns true, and early, if the client closes the connection.
    pub fn closed_until(&self, until: Instant) -> bool {
        wait(self.socket(), CLOSED, None, Some(until)) == Woken::First
    }

    /// Waits for `signal` to be readable. Returns false if the client closes the connection first.
    pub(crate) fn wait_for(&self, signal: &dyn AsFd) -> bool {
        wait(self.socket(), CLOSED, Some(signal), None) == Woken::Second
    }
}

fn head(status: u16, content_type: &str) -> String {
    let reason = match status {
        200 => "OK",
        400..500 => "Client Error",
        500..600 => "Server Error",
        _ => "Scripted",
    };
    format!("HTTP/1.1 {status} {reason}\r\ncontent-type: {content_type}\r\n")
}
