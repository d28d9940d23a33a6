//! Models of the Hugging Face hub: found in the hub's cache, or downloaded into it.
//!
//! The cache is that of
//! [huggingface_hub](https://huggingface.co/docs/huggingface_hub/guides/manage-cache): `blobs`, links to them in
//! `snapshots`, commits of branches in `refs`, partial downloads in `.incomplete` files and locks in `.locks`. Either
//! library resumes a download that the other began.
//!
//! Requests block, and therefore run on a thread of their own, whose connections are closed when the download is
//! cancelled. Name lookup and connecting can't be interrupted: the thread is not waited for and ends after them.

use std::{
    env, fmt, fs,
    io::{self, ErrorKind as Io},
    ops::ControlFlow,
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use crate::{
    error::{Error, Result},
    files::{
        gguf,
        source::{
            CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, Source, TOKENIZER, WEIGHTS_INDEX,
            weight_files,
        },
    },
};
use vlmnarrate_engine::{ErrorKind, Transfer, threads};

mod client;
mod download;
mod listing;

use client::{Client, ClientError};
use download::{Download, DownloadState};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Files beside the weights, in the order of download; additional chat templates follow, then the weights. A snapshot
/// with weights therefore has all of them.
const CONFIG_FILES: [&str; 10] = [
    CONFIG,
    PREPROCESSOR_CONFIG,
    PROCESSOR_CONFIG,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    TOKENIZER,
    WEIGHTS_INDEX,
];

/// Time between two checks for cancellation.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A model of the Hugging Face hub at a revision, with the settings of huggingface_hub's environment variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    id: String,
    /// Quantization to choose among GGUF files, as in `Q8_0`.
    tag: Option<String>,
    revision: String,
    environment: Environment,
}

/// The settings of huggingface_hub's
/// [environment variables](https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Environment {
    cache: PathBuf,
    endpoint: String,
    token: Option<AccessToken>,
    /// The variable that forbids the network, if one does.
    offline: Option<&'static str>,
    /// How long a server may send nothing.
    timeout: Duration,
}

/// A user access token, hidden from `Debug`.
#[derive(Clone, PartialEq, Eq)]
struct AccessToken(String);

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken")
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

impl Environment {
    fn read() -> Self {
        let folder = |name| {
            let path = PathBuf::from(variable(name)?);
            match (path.strip_prefix("~"), env::home_dir()) {
                (Ok(rest), Some(home)) => Some(home.join(rest)),
                _ => Some(path),
            }
        };
        let home = folder("HF_HOME").unwrap_or_else(|| {
            folder("XDG_CACHE_HOME")
                .unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".cache"))
                .join("huggingface")
        });
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        let token_file = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(token_file).ok());
        let is_set = |name: &&str| {
            let value = variable(name).unwrap_or_default().to_ascii_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        };
        let timeout = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|value| value.parse().ok());
        Self {
            cache: std::path::absolute(&cache).unwrap_or(cache),
            endpoint: endpoint.trim_end_matches('/').into(),
            token: token
                .map(|token| AccessToken(token.trim().to_owned()))
                .filter(|token| !token.0.is_empty()),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
                .into_iter()
                .find(is_set),
            timeout: Duration::from_secs(timeout.unwrap_or(30).max(1)),
        }
    }
}

impl Environment {
    /// The endpoint for messages, without user name and password.
    fn redacted_endpoint(&self) -> String {
        let endpoint = &self.endpoint;
        let Some((scheme, rest)) = endpoint.split_once("://") else {
            return endpoint.clone();
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let host = authority.rsplit('@').next().unwrap_or_default();
        format!("{scheme}://{host}{path}")
    }
}

impl Repository {
    /// The repository `id`, as in `owner/name`.
    ///
    /// `tag` chooses a quantization among GGUF files, as in `Q8_0`; `revision` is a branch, a tag or a commit, `None` or
    /// empty for `main`. Errors if `revision` can't be the name of one.
    pub fn new(id: &str, tag: Option<&str>, revision: Option<&str>) -> Result<Self> {
        let revision = revision.filter(|r| !r.is_empty()).unwrap_or("main");
        // The revision becomes a path in the cache and a part of URLs.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        let mut parts = Path::new(revision).components();
        if !revision.chars().all(plain) || !parts.all(|p| matches!(p, Component::Normal(_))) {
            return Err(Error::Setting {
                property: "revision",
                reason: format!(
                    "`{revision}` is not a valid revision; set a branch, a tag or a commit of model `{id}`"
                ),
            });
        }
        Ok(Self {
            id: id.into(),
            tag: tag.map(str::to_owned),
            revision: revision.into(),
            environment: Environment::read(),
        })
    }

    /// `owner/name` on the hub.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn folder(&self) -> PathBuf {
        let name = self.id.replace('/', "--");
        self.environment.cache.join(format!("models--{name}"))
    }

    /// The snapshot in the cache, if it is complete.
    ///
    /// Makes no request, not even to see whether a branch has moved: a pipeline starts at once, and always with the same
    /// model.
    pub fn cached(&self) -> Option<Source> {
        let commit = match is_commit(&self.revision) {
            true => self.revision.clone(),
            false => fs::read_to_string(self.folder().join("refs").join(&self.revision)).ok()?,
        };
        let snapshot = self.folder().join("snapshots").join(commit.trim());
        let has = |name| snapshot.join(name).exists();
        let is_complete = has(CONFIG)
            && has(TOKENIZER)
            && (has(PREPROCESSOR_CONFIG) || has(PROCESSOR_CONFIG))
            && weight_files(&Source::Folder(snapshot.clone())).is_ok();
        if is_complete && self.tag.is_none() {
            return Some(Source::Folder(snapshot));
        }
        let mut names = gguf::list_files(&snapshot).ok()?;
        // Links may be dangling.
        names.retain(|name| snapshot.join(name).exists());
        let names = gguf::FileNames::choose(&names, self.tag.as_deref()).ok()?;
        // Without a tag, the hub may have a quantization that is preferred to those in the cache, unless the cache has the
        // first choice.
        let is_first = names.is_preferred() && self.id.to_ascii_uppercase().ends_with("-GGUF");
        let is_certain = self.tag.is_some() || is_first || self.environment.offline.is_some();
        is_certain.then(|| names.into_source(&snapshot))
    }

    /// Errors if an environment variable forbids the network.
    pub fn check_online(&self) -> Result<()> {
        let Some(variable) = self.environment.offline else {
            return Ok(());
        };
        Err(self.error(
            ErrorKind::NotFound,
            format!(
                "revision {} is not in the cache {}, or not complete, and {variable} is set",
                self.revision,
                self.environment.cache.display()
            ),
            format!(
                "Start it once without {variable}, or set HF_HOME to the folder that has the model"
            ),
        ))
    }

    /// Downloads missing files into the cache and returns the complete snapshot.
    ///
    /// `progress` is called about 20 times a second and may cancel the download, which then returns
    /// [`Error::Cancelled`]. A partial file is resumed by the next download.
    pub fn download(
        &self,
        progress: &mut dyn FnMut(Transfer) -> ControlFlow<()>,
    ) -> Result<Source> {
        let Environment { token, timeout, .. } = &self.environment;
        let client = Client::new(&self.environment.endpoint, token.as_ref(), *timeout);
        let client = client.map_err(|failure| match failure {
            ClientError::Connection(why) | ClientError::Protocol(why) => {
                self.unreachable_error(why)
            }
            ClientError::Status(status, code) => self.status_error(status.as_u16(), &code, ""),
        })?;
        let agent = client.agent();
        let state = Arc::new(DownloadState::default());
        let (sender, result) = mpsc::channel();
        let download = Download {
            repository: self.clone(),
            state: state.clone(),
            client,
        };
        threads::spawn("vlmnarrate-hub", move || {
            // The receiver is gone if the download was cancelled.
            let _ = sender.send(download.run());
        })
        .map_err(|e| {
            let remedy = "Free some memory or threads".into();
            self.error(ErrorKind::Failed, format!("no thread: {e}"), remedy)
        })?;
        let cancel = || {
            state.cancel();
            agent.clone().shutdown();
            // A thread that is blocked in the system must not hold the lock.
            let _ = result.recv_timeout(POLL_INTERVAL);
            state.unlock();
        };
        let mut last_activity = (0, Instant::now());
        loop {
            match result.recv_timeout(POLL_INTERVAL) {
                Ok(result) => {
                    let _ = progress(state.transfer());
                    return result;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.error(
                        ErrorKind::Failed,
                        "the download panicked".into(),
                        "Download the model with `hf download` instead".into(),
                    ));
                }
                Err(RecvTimeoutError::Timeout) => (),
            }
            if progress(state.transfer()).is_break() {
                cancel();
                return Err(Error::Cancelled);
            }
            let activity = state.activity.load(Relaxed);
            if activity != last_activity.0 {
                last_activity = (activity, Instant::now());
            } else if last_activity.1.elapsed() > *timeout {
                cancel();
                let waited = timeout.as_secs();
                return Err(self.unreachable_error(format!("no data for {waited} s")));
            }
        }
    }

    fn error(&self, kind: ErrorKind, reason: String, remedy: String) -> Error {
        Error::Hub {
            property: "model",
            value: match &self.tag {
                Some(tag) => format!("{}:{tag}", self.id),
                None => self.id.clone(),
            },
            kind,
            // Servers' messages may span lines; the bus shows one.
            reason: reason.replace(['\n', '\r'], " "),
            remedy,
        }
    }

    fn unreachable_error(&self, why: impl std::fmt::Display) -> Error {
        let remedy = "Check the network, or HF_ENDPOINT if that is set, and start again: partial \
                      downloads are kept. A folder with the model needs no network";
        let reason = format!(
            "no download from {}: {why}",
            self.environment.redacted_endpoint()
        );
        self.error(ErrorKind::OpenRead, reason, remedy.into())
    }

    /// The error of an HTTP status and an `X-Error-Code`; `file` is empty for a request about the repository.
    fn status_error(&self, status: u16, code: &str, file: &str) -> Error {
        let (endpoint, token) = (
            self.environment.redacted_endpoint(),
            &self.environment.token,
        );
        let id = &self.id;
        let what = match file {
            "" => String::new(),
            file => format!("{file}: "),
        };
        match (status, code) {
            (404, "RevisionNotFound") => Error::Hub {
                property: "revision",
                value: self.revision.clone(),
                kind: ErrorKind::NotFound,
                reason: format!("{id} has no such branch, tag or commit"),
                remedy: format!("Set one that {endpoint}/{id}/commits/main shows"),
            },
            (404, _) | (401, "RepoNotFound") => self.error(
                ErrorKind::NotFound,
                format!("{what}{endpoint} has no such model or does not show it, and no such folder exists"),
                "Check the spelling; a private model needs the environment variable HF_TOKEN".into(),
            ),
            (401 | 403, _) => self.error(
                ErrorKind::NotAuthorized,
                format!("{what}{endpoint} answers {status}: the model is gated, private, or the token is wrong"),
                match token {
                    None => format!(
                        "Accept its conditions at {endpoint}/{id} and set the environment variable HF_TOKEN"
                    ),
                    Some(_) => format!(
                        "Accept its conditions at {endpoint}/{id} with the account of the token (HF_TOKEN, or \
                         the file that `hf auth login` left) and make sure that it may read the model"
                    ),
                },
            ),
            _ => self.error(
                ErrorKind::OpenRead,
                format!("{what}{endpoint} answers {status}"),
                "Try again later; partial downloads are kept".into(),
            ),
        }
    }

    /// The error of a request without the token, which a proxy on the way to an endpoint without TLS could have read.
    fn withheld_token_error(&self, status: u16) -> Error {
        let endpoint = self.environment.redacted_endpoint();
        self.error(
            ErrorKind::NotAuthorized,
            format!("{endpoint} answers {status}: the token was not sent, because the proxy could read it"),
            "Set HF_ENDPOINT to an https:// URL, or add its host to NO_PROXY".into(),
        )
    }

    /// The error of a cache that can't be written.
    fn write_error(&self, error: &io::Error, transfer: Transfer) -> Error {
        let cache = self.environment.cache.display();
        let full = matches!(
            error.kind(),
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge
        );
        if full {
            return self.error(
                ErrorKind::NoSpaceLeft,
                format!("no space left in {cache}: {error}"),
                format!(
                    "Free {} MB there, or set HF_HOME to a folder with enough space; partial downloads are kept",
                    transfer.total.saturating_sub(transfer.done) / 1_000_000 + 1
                ),
            );
        }
        self.error(
            ErrorKind::Write,
            format!("can't write to the cache {cache}: {error}"),
            "Make that folder writable, or set HF_HOME to another".into(),
        )
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|c| c.is_ascii_hexdigit())
}
