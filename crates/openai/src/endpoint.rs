//! A server, shared by all elements of the process that ask it.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{Arc, Mutex, TryLockError, Weak},
    thread,
    time::{Duration, Instant},
};

use serde::Deserialize;
use ureq::{
    Agent,
    http::{HeaderValue, Uri},
};
use vlmnarrate_engine::{Error, ErrorKind};

use crate::{
    dialect::{Refused, Server},
    failure::{self, Failure, MAX_ERROR_BODY},
    gate::Gate,
    http::{Call, Head, HttpRequest, Piece, agent},
    loader::Address,
};

/// How often whoever waits is asked whether to go on.
pub(crate) const POLL: Duration = Duration::from_millis(50);
/// For a list of models.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a list of models at most. The longest that is known has some 400 kB.
const MAX_LIST: usize = 4 << 20;
/// Requests in flight at a server that doesn't tell how many it can bear.
const DEFAULT_LIMIT: usize = 32;
/// Names of models that an error lists.
const MAX_LISTED: usize = 20;

/// Endpoints in use.
static ENDPOINTS: Mutex<Vec<Weak<Endpoint>>> = Mutex::new(Vec::new());

/// A server, and what is known about it.
pub(crate) struct Endpoint {
    pub(crate) address: Address,
    agent: Agent,
    pub(crate) gate: Arc<Gate>,
    models: Mutex<Option<Arc<Models>>>,
    /// Held by the one that asks for the models.
    discovery: Mutex<()>,
    /// Fields that the server refuses, of each model.
    refused: Mutex<BTreeMap<String, Refused>>,
}

/// The models of a server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Models {
    /// Empty if the server lists none.
    pub(crate) ids: Vec<String>,
    pub(crate) server: Server,
    /// Requests that the server works on at once, if it tells.
    slots: Option<usize>,
}

#[derive(Deserialize)]
struct List {
    data: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    id: String,
    #[serde(default)]
    owned_by: Option<String>,
}

/// What llama-server tells of itself.
#[derive(Deserialize)]
struct Props {
    total_slots: Option<usize>,
}

impl Models {
    /// Requests to have in flight, where the user sets no limit.
    pub(crate) fn limit(&self) -> usize {
        // Some wait in the server, so that a slot that becomes free is taken at once.
        self.slots
            .map_or(DEFAULT_LIMIT, |slots| slots.saturating_mul(2).max(1))
    }
}

impl Endpoint {
    /// The endpoint of this address, which is made if nobody uses it yet.
    pub(crate) fn shared(address: Address) -> Arc<Self> {
        let mut endpoints = ENDPOINTS.lock().unwrap();
        endpoints.retain(|endpoint| endpoint.strong_count() > 0);
        let known = endpoints.iter().filter_map(Weak::upgrade);
        if let Some(endpoint) = known.into_iter().find(|known| known.address == address) {
            return endpoint;
        }
        let endpoint = Arc::new(Self {
            agent: agent(&address.base, address.certificates()),
            address,
            gate: Arc::default(),
            models: Mutex::default(),
            discovery: Mutex::default(),
            refused: Mutex::default(),
        });
        endpoints.push(Arc::downgrade(&endpoint));
        endpoint
    }

    /// For messages about this server.
    pub(crate) fn server(&self) -> failure::Server<'_> {
        failure::Server {
            url: &self.address.url,
            key: self.address.key(),
        }
    }

    pub(crate) fn refused(&self, model: &str) -> Refused {
        let refused = self.refused.lock().unwrap();
        refused.get(model).cloned().unwrap_or_default()
    }

    pub(crate) fn refuse(&self, model: &str, fields: Vec<&'static str>) {
        let mut refused = self.refused.lock().unwrap();
        refused.entry(model.to_owned()).or_default().extend(fields);
    }

    /// Begins to post a body to the path for chats.
    pub(crate) fn post(&self, body: Vec<u8>) -> Result<Call, Failure> {
        self.call_at(&self.address.base, "/chat/completions", Some(body.into()))
    }

    /// The models, which the first caller asks for.
    pub(crate) fn models(
        &self,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Arc<Models>, Failure> {
        if let Some(models) = self.known_models() {
            return Ok(models);
        }
        let _discovery = loop {
            match self.discovery.try_lock() {
                Ok(guard) => break guard,
                Err(TryLockError::Poisoned(guard)) => break guard.into_inner(),
                Err(TryLockError::WouldBlock) => (),
            }
            if go_on().is_break() {
                return Err(Failure::Cancelled);
            }
            thread::sleep(POLL / 5);
        };
        // Another one may have asked meanwhile.
        if let Some(models) = self.known_models() {
            return Ok(models);
        }
        let models = Arc::new(self.list(go_on)?);
        *self.models.lock().unwrap() = Some(models.clone());
        Ok(models)
    }

    /// Lets the next caller ask for the models again, unless somebody has asked since these were told.
    pub(crate) fn forget_models(&self, told: &Arc<Models>) {
        let mut models = self.models.lock().unwrap();
        models.take_if(|models| Arc::ptr_eq(models, told));
    }

    /// The models, if somebody has asked for them.
    pub(crate) fn known_models(&self) -> Option<Arc<Models>> {
        self.models.lock().unwrap().clone()
    }

    fn list(&self, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<Models, Failure> {
        let (head, body) = self.get("/models", go_on)?;
        let server = self.server();
        let mut failure = match head.status {
            200 => match serde_json::from_slice::<List>(&body) {
                Ok(list) => return Ok(self.identified(list, go_on)),
                Err(_) => {
                    let start = String::from_utf8_lossy(&body[..body.len().min(200)]);
                    let start = server.scrubbed(&failure::one_line(&start));
                    let message = format!(
                        "it is not an OpenAI-compatible server: /models answers {start:?}. Set endpoint to the \
                         base URL of one, which usually ends in /v1"
                    );
                    server.error(ErrorKind::Settings, message).into()
                }
            },
            // transformers serve, whose list is of a cache that may be empty.
            500 | 501 => Failure::NotFound(format!("/models answers {}", head.status)),
            _ => server.status(&head, &body),
        };
        // The most frequent mistake.
        let lacks_v1 = !self.address.base.path().ends_with("/v1");
        if lacks_v1 && matches!(failure, Failure::NotFound(_) | Failure::Error(_)) {
            let (head, body) = self.get("/v1/models", go_on)?;
            if head.status == 200 && serde_json::from_slice::<List>(&body).is_ok() {
                let url = &self.address.url;
                let message = format!("the path lacks /v1. Set endpoint={url}/v1");
                failure = server.error(ErrorKind::Settings, message).into();
            }
        }
        match failure {
            // Some gateways list nothing, and answer all the same.
            Failure::NotFound(_) => Ok(Models {
                ids: Vec::new(),
                server: Server::of("", &self.address.host),
                slots: None,
            }),
            failure => Err(failure),
        }
    }

    fn identified(&self, list: List, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Models {
        let owner = list
            .data
            .first()
            .and_then(|model| model.owned_by.as_deref());
        let server = Server::of(owner.unwrap_or_default(), &self.address.host);
        let slots = match server {
            Server::LlamaCpp => {
                let answer = self.get_at(&self.address.root(), "/props", go_on).ok();
                let props =
                    answer.and_then(|(_, body)| serde_json::from_slice::<Props>(&body).ok());
                props.and_then(|props| props.total_slots)
            }
            _ => None,
        };
        Models {
            ids: list.data.into_iter().map(|model| model.id).collect(),
            server,
            slots,
        }
    }

    /// The error of a model that the server doesn't have, or of a path that is none.
    pub(crate) fn no_model(&self, model: Option<&str>, models: &Models, said: &str) -> Error {
        let listed = match models.ids.len() {
            0..=MAX_LISTED => models.ids.join(", "),
            more => {
                let first = models.ids[..MAX_LISTED].join(", ");
                format!("{first}, and {} more", more - MAX_LISTED)
            }
        };
        let listed = failure::one_line(&listed);
        let message = match (model, models.ids.is_empty()) {
            (Some(model), false) => {
                format!(
                    "it has no model {model:?} ({said}). Set model to one that it has: {listed}"
                )
            }
            (None, false) => format!("it has several models. Set model to one of them: {listed}"),
            (Some(model), true) => format!(
                "{said}. Either it has no model {model:?}, or endpoint is not the base URL of an \
                 OpenAI-compatible server, which usually ends in /v1"
            ),
            (None, true) => {
                "it lists no models. Set model to the one to ask, and check that endpoint is the \
                 base URL of an OpenAI-compatible server, which usually ends in /v1"
                    .to_owned()
            }
        };
        self.server().error(ErrorKind::NotFound, message)
    }

    fn get(
        &self,
        path: &str,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<(Head, Vec<u8>), Failure> {
        self.get_at(&self.address.base, path, go_on)
    }

    /// Gets a path below a base.
    fn get_at(
        &self,
        base: &Uri,
        path: &str,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<(Head, Vec<u8>), Failure> {
        let server = self.server();
        let mut call = self.call_at(base, path, None)?;
        let deadline = Instant::now() + TIMEOUT;
        let mut answer = (Head::default(), Vec::new());
        loop {
            match call.next(POLL) {
                Some(Piece::Head(head)) => answer.0 = head,
                Some(Piece::Body(piece)) => {
                    answer.1.extend_from_slice(&piece);
                    let max = match answer.0.status {
                        200 => MAX_LIST,
                        _ => MAX_ERROR_BODY,
                    };
                    if answer.1.len() > max {
                        answer.1.truncate(max);
                        return Ok(answer);
                    }
                }
                Some(Piece::End) => return Ok(answer),
                Some(Piece::Failed(error)) => return Err(server.connection(&error)),
                None => (),
            }
            if go_on().is_break() {
                return Err(Failure::Cancelled);
            }
            if Instant::now() > deadline {
                let message = format!("no answer within {} s", TIMEOUT.as_secs());
                let error = server.error(ErrorKind::Unavailable, message);
                return Err(Failure::Away(error, None));
            }
        }
    }

    fn call_at(&self, base: &Uri, path: &str, body: Option<Arc<[u8]>>) -> Result<Call, Failure> {
        let failed = |error: &dyn std::fmt::Display| {
            let message = format!("the request can't be made: {error}");
            Failure::Error(self.server().error(ErrorKind::Failed, message))
        };
        let url = format!("{}{path}", base.to_string().trim_end_matches('/'));
        let request = HttpRequest {
            url: Uri::try_from(url).map_err(|error| failed(&error))?,
            authorization: self.address.key.clone(),
            body,
        };
        Call::start(&self.agent, request).map_err(|error| failed(&error))
    }
}

impl Address {
    /// The URL without `/v1`.
    fn root(&self) -> Uri {
        let text = self.base.to_string();
        let root = text.trim_end_matches('/').trim_end_matches("/v1");
        Uri::try_from(root).unwrap_or_else(|_| self.base.clone())
    }

    fn key(&self) -> Option<&str> {
        let value = self.key.as_ref().map(HeaderValue::as_bytes)?;
        std::str::from_utf8(value).ok()?.strip_prefix("Bearer ")
    }
}
