//! What a client asked.

use std::{
    io::{self, BufRead, Read, Write},
    time::Instant,
};

use serde_json::Value;

/// Longest head of a request, in bytes.
const MAX_HEAD: u64 = 1 << 16;
/// Longest body of a request, in bytes.
const MAX_BODY: u64 = 1 << 28;

/// Request of a client, read to its end.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// `GET`, `POST`.
    pub method: String,
    /// Path with its query, as the client wrote it.
    pub path: String,
    /// Names in lower case, and values, in the client's order.
    pub headers: Vec<(String, String)>,
    /// Body as JSON. A string if the body is no JSON, null if there is none.
    pub body: Value,
    /// When the last byte of the request was read.
    pub arrived: Instant,
    /// Number of the connection, from 0 in the order of accepting.
    pub connection: u64,
}

impl Exchange {
    /// Value of the header of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// Whether this is a `POST` to `…/chat/completions`.
    pub fn is_chat(&self) -> bool {
        self.method == "POST" && self.path.ends_with("/chat/completions")
    }

    /// URLs of the pictures of all messages, in their order.
    pub fn image_urls(&self) -> Vec<&str> {
        self.parts()
            .filter_map(|part| part["image_url"]["url"].as_str())
            .collect()
    }

    /// Text parts of all messages, in their order.
    pub fn texts(&self) -> Vec<&str> {
        self.parts()
            .filter_map(|part| part.as_str().or_else(|| part["text"].as_str()))
            .collect()
    }

    /// Parts of all messages; a content that is a string counts as a part.
    fn parts(&self) -> impl Iterator<Item = &Value> {
        let messages = self.body["messages"].as_array().into_iter().flatten();
        messages.flat_map(|message| match &message["content"] {
            Value::Array(parts) => parts.as_slice(),
            content => std::slice::from_ref(content),
        })
    }

    /// Reads a request. `None` if the client closed the connection before its first byte.
    pub(crate) fn read(
        stream: &mut (impl BufRead + AsWrite),
        connection: u64,
    ) -> io::Result<Option<Self>> {
        let mut left = MAX_HEAD;
        let Some(first) = read_line(stream, &mut left)? else {
            return Ok(None);
        };
        let mut words = first.split(' ').map(str::to_owned);
        let (Some(method), Some(path)) = (words.next(), words.next()) else {
            return Err(malformed("the first line is no request"));
        };
        let mut headers = Vec::new();
        loop {
            let line = read_line(stream, &mut left)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| malformed("a header has no colon"))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut exchange = Self {
            method,
            path,
            headers,
            body: Value::Null,
            arrived: Instant::now(),
            connection,
        };
        if exchange
            .header("expect")
            .is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
        {
            let stream = stream.as_write();
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            stream.flush()?;
        }
        let body = exchange.read_body(stream)?;
        exchange.arrived = Instant::now();
        exchange.body = match serde_json::from_slice(&body) {
            Ok(value) => value,
            Err(_) if body.is_empty() => Value::Null,
            Err(_) => String::from_utf8_lossy(&body).into(),
        };
        Ok(Some(exchange))
    }

    fn read_body(&self, stream: &mut impl BufRead) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if self
            .header("transfer-encoding")
            .is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
        {
            loop {
                let line =
                    read_line(stream, &mut { MAX_HEAD })?.ok_or(io::ErrorKind::UnexpectedEof)?;
                let size = line.split(';').next().unwrap_or_default().trim();
                let size = u64::from_str_radix(size, 16).map_err(|_| malformed("chunk size"))?;
                read_exactly(stream, size, &mut body)?;
                // The end of the chunk, or of the trailers, which have no fields.
                let end =
                    read_line(stream, &mut { MAX_HEAD })?.ok_or(io::ErrorKind::UnexpectedEof)?;
                match (size, end.is_empty()) {
                    (_, false) => return Err(malformed("bytes after a chunk")),
                    (0, true) => return Ok(body),
                    _ => {}
                }
            }
        }
        if let Some(size) = self.header("content-length") {
            let size = size.parse().map_err(|_| malformed("content-length"))?;
            read_exactly(stream, size, &mut body)?;
        }
        Ok(body)
    }
}

/// A reader that can be written to as well.
pub(crate) trait AsWrite {
    fn as_write(&mut self) -> &mut dyn Write;
}

impl<S: Read + Write> AsWrite for io::BufReader<S> {
    fn as_write(&mut self) -> &mut dyn Write {
        self.get_mut()
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {what}"))
}

/// Reads a line without its end. `None` at the end of the stream.
fn read_line(stream: &mut impl BufRead, left: &mut u64) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let read = stream.by_ref().take(*left).read_until(b'\n', &mut line)?;
    *left -= read as u64;
    if read == 0 && *left > 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(malformed("a line without end"));
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    String::from_utf8(line)
        .map(Some)
        .map_err(|_| malformed("a head that is not UTF-8"))
}

fn read_exactly(stream: &mut impl BufRead, size: u64, body: &mut Vec<u8>) -> io::Result<()> {
    if body.len() as u64 + size > MAX_BODY {
        return Err(malformed("a body that is too long"));
    }
    match stream.take(size).read_to_end(body)? as u64 {
        read if read == size => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
