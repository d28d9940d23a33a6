//! Server-sent events: the lines of a streamed answer.
//!
//! The parser holds one line at most, of a limited length. It knows nothing of OpenAI.

/// Bytes of a line at most. An event of a caption has some hundred.
pub const MAX_LINE: usize = 256 << 10;

/// A line is longer than [`MAX_LINE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineTooLong;

/// Splits a stream of bytes into the data of events.
///
/// Each `data:` line is passed on by itself: no server of this protocol spreads JSON over several lines. Comments, names
/// and numbers of events are left out. Lines end with LF, CR LF or CR, and may arrive in pieces.
#[derive(Debug, Default)]
pub struct EventParser {
    line: Vec<u8>,
    /// The last byte was a CR, whose LF may follow.
    after_cr: bool,
}

impl EventParser {
    /// Parses some bytes, and calls `data` with the data of each event that they complete.
    ///
    /// # Errors
    ///
    /// [`LineTooLong`]; the parser is of no use from then on.
    pub fn push(&mut self, bytes: &[u8], mut data: impl FnMut(&[u8])) -> Result<(), LineTooLong> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_cr) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let part = &rest[..end.unwrap_or(rest.len())];
            if self.line.len() + part.len() > MAX_LINE {
                return Err(LineTooLong);
            }
            match end {
                None => {
                    self.line.extend_from_slice(part);
                    return Ok(());
                }
                Some(end) => {
                    self.after_cr = rest[end] == b'\r';
                    rest = &rest[end + 1..];
                    if self.line.is_empty() {
                        data_of(part).into_iter().for_each(&mut data);
                    } else {
                        self.line.extend_from_slice(part);
                        data_of(&self.line).into_iter().for_each(&mut data);
                        self.line.clear();
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends the stream; the last line may lack its end.
    pub fn finish(self, mut data: impl FnMut(&[u8])) {
        data_of(&self.line).into_iter().for_each(&mut data);
    }
}

/// The data of a line; `None` for other lines.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    let data = line.strip_prefix(b"data:")?;
    Some(data.strip_prefix(b" ").unwrap_or(data))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of bytes that arrive in pieces of this size.
    fn events(bytes: &[u8], size: usize) -> Vec<String> {
        let mut events = Vec::new();
        let mut push = |data: &[u8]| events.push(String::from_utf8_lossy(data).into_owned());
        let mut parser = EventParser::default();
        for piece in bytes.chunks(size) {
            parser.push(piece, &mut push).unwrap();
        }
        parser.finish(push);
        events
    }

    #[test]
    fn pieces_of_any_size_give_the_same_events() {
        let stream = ": hello\r\ndata: {\"a\":1}\r\n\r\nevent: x\nid: 7\ndata:{\"b\":\"é\"}\n\ndata: c\r\rdata: [DONE]";
        let expected = ["{\"a\":1}", "{\"b\":\"é\"}", "c", "[DONE]"];
        for size in 1..stream.len() {
            assert_eq!(events(stream.as_bytes(), size), expected, "{size}");
        }
    }

    #[test]
    fn a_line_has_a_limit() {
        let mut parser = EventParser::default();
        let mut parsed = Ok(());
        for _ in 0..100 {
            parsed = parsed.and_then(|()| parser.push(&[b'x'; 10_000], |_| ()));
            assert!(parser.line.capacity() <= 2 * MAX_LINE);
        }
        assert_eq!(parsed, Err(LineTooLong));
        let longest = [b"data:".as_slice(), &vec![b'x'; MAX_LINE - 5], b"\n"].concat();
        assert_eq!(events(&longest, 1000)[0].len(), MAX_LINE - 5);
    }
}
