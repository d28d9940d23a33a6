//! The HTTP client of the hub, which sends the access token to the endpoint and never to where it redirects.

use std::time::Duration;

use ureq::{
    Agent, Body,
    http::{
        HeaderMap, HeaderValue, Response, StatusCode, Uri,
        header::{AUTHORIZATION, LOCATION, RANGE},
    },
};

use crate::files::hub::{AccessToken, is_commit};

/// The limit of browsers.
const MAX_REDIRECTS: usize = 20;

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// The connection failed or broke.
    Connection(String),
    /// The server answered with an error status and an `X-Error-Code`.
    Status(StatusCode, String),
    /// The server answered as no hub does.
    Protocol(String),
}

impl From<ureq::Error> for ClientError {
    fn from(error: ureq::Error) -> Self {
        Self::Connection(error.to_string())
    }
}

/// A file's ETag and commit from the headers of the endpoint, as
/// [`HfFileMetadata`](https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/file_download.py).
#[derive(Debug, Default)]
pub(crate) struct FileMetadata {
    pub(crate) etag: Option<String>,
    pub(crate) commit: Option<String>,
}

impl FileMetadata {
    /// Takes what is missing from the headers of a response. The `ETag` of a redirect is not the file's.
    fn update(&mut self, headers: &HeaderMap, is_redirect: bool) {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let etag = text("x-linked-etag").or(text("etag").filter(|_| !is_redirect));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        self.etag = self.etag.take().or(etag);
        let commit = text("x-repo-commit").filter(|commit| is_commit(commit));
        self.commit = self.commit.take().or(commit.map(str::to_owned));
    }
}

/// A client for one endpoint and token.
pub(crate) struct Client {
    agent: Agent,
    endpoint: Uri,
    token: Option<HeaderValue>,
}

impl Client {
    pub(crate) fn new(
        endpoint: &str,
        token: Option<&AccessToken>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let endpoint = Uri::try_from(endpoint).ok();
        let endpoint = endpoint.filter(is_http_url).ok_or_else(|| {
            ClientError::Protocol("that is not an https:// or http:// URL".into())
        })?;
        let token = token.map(authorization).transpose()?;
        let config = Agent::config_builder()
            // Followed in `get`: ureq would send the token to another port of the host, or without TLS.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("vlmnarrate/", env!("CARGO_PKG_VERSION")))
            // A shutdown of the agent interrupts neither.
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout));
        Ok(Self {
            agent: config.build().into(),
            endpoint,
            token,
        })
    }

    /// The agent, whose shutdown ends all requests.
    pub(crate) fn agent(&self) -> Agent {
        self.agent.clone()
    }

    /// Requests a path of the endpoint, follows redirects, and returns the response with the file's metadata.
    pub(crate) fn get(
        &self,
        path: &str,
        range: Option<String>,
        send_token: bool,
    ) -> Result<(Response<Body>, FileMetadata), ClientError> {
        let mut uri = join(
            &self.endpoint,
            &format!("{}{path}", self.endpoint.path().trim_end_matches('/')),
        )?;
        let mut metadata = FileMetadata::default();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&uri);
            if let Some(range) = &range {
                request = request.header(RANGE, range);
            }
            if let Some(token) = self
                .token
                .as_ref()
                .filter(|_| send_token && self.may_send_token(&uri))
            {
                request = request.header(AUTHORIZATION, token);
            }
            let response = request.call()?;
            let (status, headers) = (response.status(), response.headers());
            if is_same_origin(&uri, &self.endpoint) {
                metadata.update(headers, is_redirect(status));
            }
            let location = headers.get(LOCATION).filter(|_| is_redirect(status));
            let Some(location) = location else {
                if status.is_success() {
                    return Ok((response, metadata));
                }
                let code = headers
                    .get("x-error-code")
                    .and_then(|code| code.to_str().ok());
                return Err(ClientError::Status(status, code.unwrap_or_default().into()));
            };
            uri = redirect_target(&uri, location)?;
        }
        Err(ClientError::Protocol("it redirects too often".into()))
    }

    /// Whether only the endpoint would see the token.
    fn may_send_token(&self, uri: &Uri) -> bool {
        is_same_origin(uri, &self.endpoint) && !self.is_readable_by_proxy(uri)
    }

    fn is_readable_by_proxy(&self, uri: &Uri) -> bool {
        let proxy = self.agent.config().proxy();
        uri.scheme_str() == Some("http") && proxy.is_some_and(|proxy| !proxy.is_no_proxy(uri))
    }

    /// Whether a token is withheld because a proxy could read it.
    pub(crate) fn withholds_token(&self) -> bool {
        self.token.is_some() && self.is_readable_by_proxy(&self.endpoint)
    }
}

fn authorization(token: &AccessToken) -> Result<HeaderValue, ClientError> {
    let mut header = HeaderValue::try_from(format!("Bearer {}", token.0)).map_err(|_| {
        ClientError::Protocol("the token (HF_TOKEN) has characters that are not allowed".into())
    })?;
    header.set_sensitive(true);
    Ok(header)
}

/// Whether a status is a redirect with a `Location`.
fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn is_http_url(uri: &Uri) -> bool {
    matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.host().is_some_and(|host| !host.is_empty())
}

fn port(uri: &Uri) -> u16 {
    let is_tls = uri.scheme_str() == Some("https");
    uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 })
}

/// Same scheme, host and port.
fn is_same_origin(a: &Uri, b: &Uri) -> bool {
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    (a.scheme_str(), host(a), port(a)) == (b.scheme_str(), host(b), port(b))
}

/// The target of a redirect from `uri`, resolved as browsers do. Errors if it isn't HTTP, or leaves TLS.
fn redirect_target(uri: &Uri, location: &HeaderValue) -> Result<Uri, ClientError> {
    let bad = || ClientError::Protocol("it redirects to an invalid URL".into());
    let location = location.to_str().map_err(|_| bad())?;
    // Browsers take a backslash for a slash.
    if location.contains('\\') {
        return Err(bad());
    }
    // A fragment is never sent.
    let location = location.split('#').next().unwrap_or_default();
    let is_absolute = location.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    });
    let next = if is_absolute {
        Uri::try_from(location).map_err(|_| bad())?
    } else if location.starts_with("//") {
        let scheme = uri.scheme_str().unwrap_or_default();
        Uri::try_from(format!("{scheme}:{location}")).map_err(|_| bad())?
    } else if location.starts_with('/') {
        join(uri, location)?
    } else if location.starts_with('?') {
        join(uri, &format!("{}{location}", uri.path()))?
    } else {
        let folder = uri.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        join(uri, &format!("{folder}/{location}"))?
    };
    if !is_http_url(&next) {
        return Err(bad());
    }
    if uri.scheme_str() == Some("https") && next.scheme_str() == Some("http") {
        return Err(ClientError::Protocol(
            "it redirects from https to http".into(),
        ));
    }
    Ok(next)
}

/// Another path and query on the same server.
fn join(uri: &Uri, path: &str) -> Result<Uri, ClientError> {
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = path.parse().ok();
    let joined = parts
        .path_and_query
        .is_some()
        .then(|| Uri::from_parts(parts).ok());
    joined
        .flatten()
        .ok_or_else(|| ClientError::Protocol("it names an invalid path".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn a_redirect_leads_where_a_browser_would_go() {
        let from = uri("https://hub.co/a/b?c=d");
        for (location, to) in [
            ("/x/y?z", "https://hub.co/x/y?z"),
            ("x#y", "https://hub.co/a/x"),
            ("?q", "https://hub.co/a/b?q"),
            ("//cdn.co/x", "https://cdn.co/x"),
            (
                "HTTPS://cdn.co:8/x?u=http://hub.co",
                "https://cdn.co:8/x?u=http://hub.co",
            ),
            ("/x?u=http://cdn.co", "https://hub.co/x?u=http://cdn.co"),
        ] {
            let next = redirect_target(&from, &HeaderValue::from_static(location)).unwrap();
            assert_eq!(next, uri(to), "{location}");
        }
        for location in [
            "http://hub.co/x",
            "file:///etc/passwd",
            "https://",
            "//",
            "ht tp://a",
            "\\\\cdn.co/",
        ] {
            let next = redirect_target(&from, &HeaderValue::from_static(location));
            assert!(next.is_err(), "{location}: {next:?}");
        }
    }

    #[test]
    fn the_token_is_for_the_endpoint_alone() {
        let token = AccessToken("hf_secret".into());
        let client = Client::new("https://Hub.co", Some(&token), Duration::from_secs(1)).unwrap();
        for same in [
            "https://hub.co/x",
            "https://HUB.CO:443/x",
            "https://me@hub.co",
        ] {
            assert!(client.may_send_token(&uri(same)), "{same}");
        }
        for other in [
            "http://hub.co/x",
            "http://hub.co:443/x",
            "https://hub.co:8443/x",
            "https://cdn.hub.co/x",
            "https://hub.co.evil/x",
            "https://hub.co@evil/x",
            "https://evil/hub.co",
        ] {
            assert!(!client.may_send_token(&uri(other)), "{other}");
        }
        assert!(!format!("{:?}", client.token).contains("secret"));
        let bad = AccessToken("hf_se\ncret".into());
        let Err(ClientError::Protocol(reason)) =
            Client::new("https://hub.co", Some(&bad), Duration::ZERO)
        else {
            panic!("a header of two lines");
        };
        assert!(
            reason.contains("HF_TOKEN") && !reason.contains("cret"),
            "{reason}"
        );
        assert!(Client::new("hub.co", None, Duration::ZERO).is_err());
    }
}
