//! From a request to an answer.

use std::{
    collections::BTreeSet,
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{
    Answer, Engine, EngineInfo, Error, ErrorKind, Event, Observer, Priority, Request, Result,
    Setting, Timings,
};

use crate::{
    answer::{Finish, StreamedAnswer},
    dialect::{Body, BodyParts, Server, chosen, is_smolvlm, refused_fields},
    endpoint::{Endpoint, Models},
    exchange::{Exchange, Interrupted},
    failure::{Failure, one_line},
    gate::Permit,
    loader::AskSettings,
    picture::data_url,
};

/// Requests made for one answer: each teaches which fields the server refuses.
const MAX_ATTEMPTS: usize = 6;

/// A model behind an endpoint.
pub(crate) struct OpenAi {
    endpoint: Arc<Endpoint>,
    /// As it was set.
    model: Option<String>,
    ask: AskSettings,
    info: EngineInfo,
    /// The turn to ask, until a request uses it.
    permit: Option<Permit>,
    /// Settings to tell of at the next request.
    to_tell: BTreeSet<Setting>,
    /// Settings that were told of.
    told: BTreeSet<Setting>,
}

impl OpenAi {
    pub(crate) fn new(
        endpoint: Arc<Endpoint>,
        model: Option<String>,
        ask: AskSettings,
        ignored: &[Setting],
    ) -> Self {
        let mut info = EngineInfo::default();
        info.model = model.clone().unwrap_or_default();
        info.device = "remote".into();
        info.device_name = endpoint.address.host.clone();
        Self {
            endpoint,
            model,
            ask,
            info,
            permit: None,
            to_tell: ignored.iter().copied().collect(),
            told: BTreeSet::new(),
        }
    }

    /// Asks the server for its models. A server that is away is no error: the first request asks again.
    pub(crate) fn connect(&mut self, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<()> {
        // The gate is not waited for: while it is closed, another element has found the server away.
        let closed = |_: Option<&Error>| ControlFlow::Break(());
        let Ok(permit) = self
            .endpoint
            .gate
            .acquire(usize::MAX, Priority::Normal, closed)
        else {
            return Ok(());
        };
        match self.identify(go_on) {
            Ok(_) => {
                permit.answered();
                Ok(())
            }
            Err(Failure::Cancelled) => Err(Error::cancelled()),
            // A name that was never known is a mistake, or a network that is not there yet.
            Err(Failure::Away(error, _))
                if error.kind == ErrorKind::NotFound && !self.ask.has_fallback =>
            {
                Err(error)
            }
            Err(
                Failure::Away(error, retry_after)
                | Failure::Internal(error, retry_after)
                | Failure::Overloaded(error, retry_after),
            ) => {
                permit.away(error, retry_after);
                Ok(())
            }
            Err(failure) => Err(self.error_of(failure)),
        }
    }

    /// The model's name, and the server that has it.
    fn identify(
        &mut self,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> std::result::Result<(String, Arc<Models>), Failure> {
        let models = self.endpoint.models(go_on)?;
        let no_model = |said: &str| {
            let model = self.model.as_deref();
            Failure::Error(self.endpoint.no_model(model, &models, said))
        };
        let model = match (&self.model, &models.ids[..]) {
            (None, [only]) => only.clone(),
            (None, _) => return Err(no_model("")),
            // These answer for no other name; gateways and llama-server may.
            (Some(model), [_, ..])
                if matches!(models.server, Server::Vllm | Server::Sglang)
                    && !models.ids.contains(model) =>
            {
                return Err(no_model("it is not listed"));
            }
            (Some(model), _) => model.clone(),
        };
        self.info.model.clone_from(&model);
        Ok((model, models))
    }

    fn limit(&self) -> usize {
        match self.ask.max_requests {
            0 => {
                let models = self.endpoint.known_models();
                // Until the server is known, one finds out.
                models.map_or(1, |models| models.limit())
            }
            limit => limit,
        }
    }

    /// Tells of settings that are ignored, each once.
    fn tell(&mut self, ignored: &[Setting], observer: &mut Observer<'_>) {
        let mut news = std::mem::take(&mut self.to_tell);
        news.extend(ignored);
        for setting in news {
            if self.told.insert(setting) {
                // A `Break` comes again with the next event.
                let _ = observer(Event::Ignored(setting));
            }
        }
    }

    fn ask(
        &mut self,
        request: &Request<'_>,
        observer: &mut Observer<'_>,
    ) -> std::result::Result<Answer, Failure> {
        let start = Instant::now();
        let (mut model, mut models) = self.identify(&mut || observer(Event::Layer))?;
        let pictures = request.pictures.iter();
        let pictures = pictures.map(|picture| data_url(picture, self.ask.image_format));
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        let mut may_be_stale = true;
        for _ in 0..MAX_ATTEMPTS {
            let Body { fields, ignored } = BodyParts {
                server: models.server,
                model: &model,
                request,
                pictures: &pictures,
                refused: &self.endpoint.refused(&model),
                options: &self.ask.options,
            }
            .build();
            self.tell(&ignored, observer);
            let body = serde_json::to_vec(&fields).map_err(|error| {
                let message = format!("the request can't be written: {error}");
                Error::new(ErrorKind::Failed, message)
            })?;
            let preprocess = start.elapsed();
            let exchange = Exchange {
                endpoint: &self.endpoint,
                request,
                timeout: self.ask.timeout,
                info: &self.info,
                call: self.endpoint.post(body)?,
                may_be_stale,
            };
            match exchange.answer(observer) {
                Ok(answer) => return self.finished(answer, request, preprocess, observer),
                Err(Interrupted::Stale) => may_be_stale = false,
                Err(Interrupted::Failure(Failure::Refused {
                    parameter,
                    message,
                    error,
                })) => {
                    let refused =
                        refused_fields(&fields, &self.ask.options, parameter.as_deref(), &message);
                    if refused.is_empty() {
                        // transformers serve: "Server is pinned to 'a'; requested 'b'."
                        return Err(match message.contains(&format!("requested '{model}'")) {
                            true => self.no_model(&model, &models, &one_line(&message)),
                            false => error.into(),
                        });
                    }
                    self.endpoint.refuse(&model, refused);
                }
                Err(Interrupted::Failure(Failure::NotFound(said))) => {
                    // The server may have come back with another model.
                    self.endpoint.forget_models(&models);
                    let current = self.identify(&mut || observer(Event::Layer))?;
                    if current.0 == model {
                        return Err(self.no_model(&model, &current.1, &said));
                    }
                    (model, models) = current;
                }
                Err(Interrupted::Failure(failure)) => return Err(failure),
            }
        }
        let message = "it refuses the request in ever new ways";
        Err(self
            .endpoint
            .server()
            .error(ErrorKind::Failed, message)
            .into())
    }

    fn no_model(&self, model: &str, models: &Models, said: &str) -> Failure {
        self.endpoint.no_model(Some(model), models, said).into()
    }

    /// The answer in the contract's words.
    fn finished(
        &mut self,
        streamed: StreamedAnswer,
        request: &Request<'_>,
        preprocess: Duration,
        observer: &mut Observer<'_>,
    ) -> std::result::Result<Answer, Failure> {
        let server = self.endpoint.server();
        let failed = |message: &dyn std::fmt::Display| {
            Failure::Error(server.error(ErrorKind::Failed, message))
        };
        if streamed.finish == Some(Finish::Filtered) {
            return Err(failed(&"its content filter ended the answer"));
        }
        if streamed.is_only_reasoning() {
            return Err(failed(
                &"the model has thought for max-tokens and said nothing. Raise max-tokens, or turn its thinking off, for \
                  example by request-options='{\"chat_template_kwargs\": {\"enable_thinking\": false}}'",
            ));
        }
        let choice = chosen(request.choices, streamed.text());
        if choice.is_none() && !request.choices.is_empty() {
            let text = one_line(streamed.text());
            let error = failed(&format_args!("the answer {text:?} is none of the choices"));
            self.tell(&[Setting::Choices], observer);
            return Err(error);
        }
        let model = streamed.model.as_deref().map(one_line);
        if let Some(model) = model.filter(|model| *model != self.info.model) {
            self.info.model = model;
            let _ = observer(Event::AnsweredBy(&self.info));
        }
        if streamed
            .prompt_tokens
            .is_some_and(|tokens| has_tiles(request, &self.info.model, tokens))
        {
            self.tell(&[Setting::NoImageSplitting], observer);
        }
        let (prefill, decode) = streamed.prefill_and_decode();
        let mut answer = Answer::new(choice.map_or(streamed.text(), String::as_str));
        answer.tokens = streamed.tokens();
        answer.truncated = streamed.finish == Some(Finish::Length) && choice.is_none();
        answer.probability = request.choices.is_empty().then_some(1.0);
        answer.timings = Timings {
            preprocess,
            prefill,
            decode,
            ..Timings::default()
        };
        Ok(answer)
    }

    fn error_of(&self, failure: Failure) -> Error {
        match failure {
            Failure::Cancelled => Error::cancelled(),
            Failure::Error(error)
            | Failure::Away(error, _)
            | Failure::Internal(error, _)
            | Failure::Overloaded(error, _)
            | Failure::Refused { error, .. } => error,
            Failure::NotFound(said) => self.endpoint.server().error(ErrorKind::NotFound, said),
        }
    }
}

impl Engine for OpenAi {
    fn info(&self) -> EngineInfo {
        self.info.clone()
    }

    fn wait_turn(&mut self, priority: Priority, observer: &mut Observer<'_>) -> Result<()> {
        if self.permit.is_some() {
            return Ok(());
        }
        let permit = self.endpoint.gate.acquire(self.limit(), priority, |error| {
            observer(error.map_or(Event::Layer, Event::Unavailable))
        });
        self.permit = Some(permit.map_err(|_| Error::cancelled())?);
        Ok(())
    }

    fn give_up_turn(&mut self) {
        self.permit = None;
    }

    fn describe(&mut self, request: &Request<'_>, observer: &mut Observer<'_>) -> Result<Answer> {
        let mut was_tried = false;
        loop {
            self.wait_turn(Priority::Normal, observer)?;
            let Some(permit) = self.permit.take() else {
                return Err(Error::cancelled());
            };
            let failure = match self.ask(request, observer) {
                Ok(answer) => {
                    permit.succeeded();
                    return Ok(answer);
                }
                // One camera's pictures must not close the gate for all others.
                Err(Failure::Internal(mut error, _)) if permit.others_succeed() => {
                    permit.answered();
                    if !std::mem::replace(&mut was_tried, true) {
                        continue;
                    }
                    error.kind = ErrorKind::Failed;
                    return Err(error);
                }
                Err(Failure::Internal(error, retry_after)) => Failure::Away(error, retry_after),
                Err(failure) => failure,
            };
            match &failure {
                Failure::Away(error, retry_after) => permit.away(error.clone(), *retry_after),
                Failure::Overloaded(error, retry_after) => {
                    permit.overloaded(error.clone(), *retry_after);
                    if permit.closed_by().is_none() {
                        // There is room for others, and soon for this one.
                        continue;
                    }
                }
                // Nothing came of it, and nothing is known.
                Failure::Cancelled => (),
                _ => permit.answered(),
            }
            let is_away = matches!(failure, Failure::Away(..) | Failure::Overloaded(..));
            let mut error = self.error_of(failure);
            if is_away {
                error.kind = ErrorKind::Unavailable;
                let _ = observer(Event::Unavailable(&error));
            } else if error.kind == ErrorKind::Settings {
                // Of the endpoint, not of this request: no other one will do better.
                error.kind = ErrorKind::Device;
            }
            return Err(error);
        }
    }
}

/// Whether the server has cut pictures into tiles although it should not: then the prompt has more tokens than its texts
/// have bytes and the whole pictures have tokens.
fn has_tiles(request: &Request<'_>, model: &str, prompt_tokens: u64) -> bool {
    /// Of a SmolVLM's square and what is around it: 64 or 81.
    const PICTURE: usize = 100;
    /// Of the chat template.
    const TEMPLATE: usize = 100;
    let texts = request.prompt.len() + request.system.map_or(0, str::len);
    let frames = request.pictures.len();
    // The times of a clip are written out.
    let most = texts + TEMPLATE + frames * (PICTURE + 30);
    !request.whole_frames && is_smolvlm(model) && prompt_tokens > most as u64
}
