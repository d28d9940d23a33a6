//! One request and the answer that comes, piece by piece.

use std::time::{Duration, Instant};

use vlmnarrate_engine::{EngineInfo, Error, ErrorKind, Event, Observer, Request, Result};

use crate::{
    answer::{Finish, StreamedAnswer},
    endpoint::{Endpoint, POLL},
    failure::{Failure, MAX_ERROR_BODY, is_stale, one_line},
    http::{Call, Head, Piece},
    stream::EventParser,
};

/// Bytes of an answer at most, events and all.
const MAX_ANSWER: usize = 64 << 20;
/// Bytes of an answer that is not streamed.
const MAX_WHOLE_ANSWER: usize = 4 << 20;
/// An answer may take so many times as long as the server may stay silent.
const LONGEST_ANSWER: u32 = 10;
/// How long the end of an answer is waited for, so that its connection can be used again.
const END_TIMEOUT: Duration = Duration::from_millis(100);
/// Pieces that may come before that end.
const END_PIECES: usize = 4;

/// Why an exchange has no answer.
pub(crate) enum Interrupted {
    /// The server had closed the idle connection that was taken up again.
    Stale,
    Failure(Failure),
}

impl<F: Into<Failure>> From<F> for Interrupted {
    fn from(failure: F) -> Self {
        Self::Failure(failure.into())
    }
}

/// A request that was sent, and the answer that comes.
pub(crate) struct Exchange<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) request: &'a Request<'a>,
    /// How long the server may stay silent.
    pub(crate) timeout: Duration,
    pub(crate) info: &'a EngineInfo,
    pub(crate) call: Call,
    /// Whether the server may have closed the connection before.
    pub(crate) may_be_stale: bool,
}

impl Exchange<'_> {
    /// Reads the answer to its end.
    pub(crate) fn answer(
        mut self,
        observer: &mut Observer<'_>,
    ) -> std::result::Result<StreamedAnswer, Interrupted> {
        let server = self.endpoint.server();
        let start = Instant::now();
        let mut last_progress = start;
        let mut reader = AnswerReader::new(self.request.max_tokens);
        let mut has_text = false;
        loop {
            match self.call.next(POLL) {
                Some(Piece::Head(head)) => {
                    last_progress = Instant::now();
                    reader.head = Some(head);
                }
                Some(Piece::Body(bytes)) => {
                    let progress = reader.push(&bytes).map_err(|error| {
                        server.error(error.kind, server.scrubbed(&error.message))
                    })?;
                    if progress.has_event {
                        last_progress = Instant::now();
                    }
                    if progress.has_grown {
                        if !has_text {
                            has_text = true;
                            self.tell_model(&reader.stream.answer, observer);
                        }
                        let answer = &mut reader.stream.answer;
                        if answer.stop_at(self.request.stop_strings) {
                            // Closing the connection ends the work of the server.
                            return Ok(reader.stream.answer);
                        }
                        // JSON is on its way to a choice, no caption.
                        if self.request.choices.is_empty() {
                            let (text, tokens) = (answer.text(), answer.tokens());
                            if observer(Event::Text { text, tokens }).is_break() {
                                return Err(self.stopped(has_text).into());
                            }
                        }
                    }
                    if progress.is_complete {
                        return self.rest(reader);
                    }
                }
                Some(Piece::End) => return self.rest(reader),
                Some(Piece::Failed(error)) => {
                    return Err(
                        match reader.head.is_none() && self.may_be_stale && is_stale(&error) {
                            true => Interrupted::Stale,
                            false => server.connection(&error).into(),
                        },
                    );
                }
                None => (),
            }
            if observer(Event::Layer).is_break() {
                return Err(self.stopped(has_text).into());
            }
            let now = Instant::now();
            if now - last_progress > self.timeout {
                let seconds = self.timeout.as_secs_f64();
                let error = server.error(
                    ErrorKind::Unavailable,
                    format!("nothing has come from it for {seconds} s (endpoint-timeout)"),
                );
                return Err(Failure::Away(error, None).into());
            }
            if now - start > self.timeout.saturating_mul(LONGEST_ANSWER) {
                let message =
                    "the answer takes too long. Lower max-tokens, or raise endpoint-timeout";
                return Err(server.error(ErrorKind::Failed, message).into());
            }
        }
    }

    /// What a `Break` of the observer means for the endpoint.
    fn stopped(&self, has_text: bool) -> Failure {
        match self.request.deadline {
            // Not a word in time: as good as away.
            Some(deadline) if !has_text && Instant::now() >= deadline => {
                let message = "no word of the answer came before the deadline";
                let error = self
                    .endpoint
                    .server()
                    .error(ErrorKind::Unavailable, message);
                Failure::Away(error, None)
            }
            _ => Failure::Cancelled,
        }
    }

    /// Tells which model answers, if it is not the one that was asked.
    fn tell_model(&self, answer: &StreamedAnswer, observer: &mut Observer<'_>) {
        if let Some(model) = answer
            .model
            .as_ref()
            .filter(|model| **model != self.info.model)
        {
            let mut info = self.info.clone();
            info.model = one_line(model);
            let _ = observer(Event::AnsweredBy(&info));
        }
    }

    /// The complete answer, or the failure that the body tells of.
    fn rest(mut self, reader: AnswerReader) -> std::result::Result<StreamedAnswer, Interrupted> {
        let server = self.endpoint.server();
        for _ in 0..END_PIECES {
            match self.call.next(END_TIMEOUT) {
                Some(Piece::Head(_) | Piece::Body(_)) => (),
                None | Some(Piece::End | Piece::Failed(_)) => break,
            }
        }
        let Some(head) = reader.head else {
            let error = server.error(ErrorKind::Unavailable, "it closed the connection");
            return Err(Failure::Away(error, None).into());
        };
        if head.status != 200 {
            return Err(server.status(&head, &reader.body).into());
        }
        let answer = match reader.is_stream {
            true => reader.stream.finish(),
            false => StreamReader::whole(self.request.max_tokens, &reader.body),
        };
        let answer = answer.map_err(|error| {
            let message = server.scrubbed(&error.message);
            match error.kind {
                ErrorKind::Unavailable => Failure::Away(server.error(error.kind, message), None),
                kind => server.error(kind, message).into(),
            }
        })?;
        Ok(answer)
    }
}

/// What some bytes of an answer brought.
#[derive(Default)]
pub(crate) struct Progress {
    has_event: bool,
    has_grown: bool,
    /// Nothing that follows matters.
    is_complete: bool,
}

/// Reads an answer of any kind: a stream, a whole answer, or an error.
struct AnswerReader {
    head: Option<Head>,
    is_stream: bool,
    /// Of what is not streamed.
    body: Vec<u8>,
    stream: StreamReader,
}

impl AnswerReader {
    fn new(max_tokens: usize) -> Self {
        Self {
            head: None,
            is_stream: false,
            body: Vec::new(),
            stream: StreamReader::new(max_tokens),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<Progress> {
        let head = self.head.as_ref();
        let is_success = head.is_some_and(|head| head.status == 200);
        self.is_stream = is_success
            && head.is_some_and(|head| head.content_type.starts_with("text/event-stream"));
        if self.is_stream {
            return self.stream.push(bytes);
        }
        self.body.extend_from_slice(bytes);
        let is_complete = match is_success {
            false => self.body.len() >= MAX_ERROR_BODY,
            true if self.body.len() > MAX_WHOLE_ANSWER => {
                return Err(Error::new(ErrorKind::Failed, "the answer does not end"));
            }
            true => false,
        };
        Ok(Progress {
            is_complete,
            ..Progress::default()
        })
    }
}

/// Reads a streamed answer.
pub(crate) struct StreamReader {
    parser: EventParser,
    answer: StreamedAnswer,
    bytes: usize,
    is_done: bool,
}

impl StreamReader {
    pub(crate) fn new(max_tokens: usize) -> Self {
        Self {
            parser: EventParser::default(),
            answer: StreamedAnswer::new(max_tokens),
            bytes: 0,
            is_done: false,
        }
    }

    /// An answer that was not streamed.
    fn whole(max_tokens: usize, body: &[u8]) -> Result<StreamedAnswer> {
        let mut answer = StreamedAnswer::new(max_tokens);
        answer.push(body)?;
        answer.finish.get_or_insert(Finish::Stop);
        Ok(answer)
    }

    /// # Errors
    ///
    /// [`ErrorKind::Failed`]: the bytes are no answer, or there is no end to them.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Progress> {
        let mut progress = Progress::default();
        self.bytes += bytes.len();
        if self.bytes > MAX_ANSWER {
            return Err(Error::new(ErrorKind::Failed, "the answer does not end"));
        }
        let mut result = Ok(());
        let (answer, is_done) = (&mut self.answer, &mut self.is_done);
        let parsed = self.parser.push(bytes, |data| {
            push_event(data, answer, is_done, &mut progress, &mut result);
        });
        result?;
        parsed.map_err(|_| Error::new(ErrorKind::Failed, "a line of the answer does not end"))?;
        progress.is_complete = self.is_done;
        Ok(progress)
    }

    /// The answer at the end of the stream.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`]: the stream ended in the middle of the answer.
    pub(crate) fn finish(mut self) -> Result<StreamedAnswer> {
        let mut result = Ok(());
        let (answer, is_done) = (&mut self.answer, &mut self.is_done);
        self.parser.finish(|data| {
            push_event(data, answer, is_done, &mut Progress::default(), &mut result);
        });
        result?;
        match self.answer.finish.is_some() || self.is_done {
            true => Ok(self.answer),
            false => Err(Error::new(
                ErrorKind::Unavailable,
                "it closed the connection in the middle of the answer",
            )),
        }
    }
}

fn push_event(
    data: &[u8],
    answer: &mut StreamedAnswer,
    is_done: &mut bool,
    progress: &mut Progress,
    result: &mut Result<()>,
) {
    if *is_done || result.is_err() {
        return;
    }
    progress.has_event = true;
    *is_done = data.trim_ascii() == b"[DONE]";
    match answer.push(data) {
        Ok(has_grown) => progress.has_grown |= has_grown,
        Err(error) => *result = Err(error),
    }
}
