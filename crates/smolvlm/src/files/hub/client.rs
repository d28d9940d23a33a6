//! Requests to the hub. Its token is for the endpoint alone, wherever that redirects to.

use std::time::Duration;

use ureq::{
    Agent, Body,
    http::{
        HeaderMap, HeaderValue, Response, StatusCode, Uri,
        header::{AUTHORIZATION, LOCATION, RANGE},
    },
};

use crate::files::hub::{Token, is_commit};

/// As many as browsers follow.
const MAX_REDIRECTS: usize = 20;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection could not be made, or broke.
    Broken(String),
    /// The server said no, with this `X-Error-Code`.
    Refused(StatusCode, String),
    /// The server said what a hub doesn't say.
    Unexpected(String),
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

/// What the hub says of a file before it redirects to where the file is.
#[derive(Debug, Default)]
pub(crate) struct Linked {
    pub(crate) etag: Option<String>,
    pub(crate) commit: Option<String>,
}

impl Linked {
    /// Notes what is new in the headers of an answer; a redirect's own ETag is none of the file's.
    fn add(&mut self, headers: &HeaderMap, is_redirect: bool) {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let etag = text("x-linked-etag").or(text("etag").filter(|_| !is_redirect));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        self.etag = self.etag.take().or(etag);
        let commit = text("x-repo-commit").filter(|commit| is_commit(commit));
        self.commit = self.commit.take().or(commit.map(str::to_owned));
    }
}

pub(crate) struct Client {
    agent: Agent,
    endpoint: Uri,
    token: Option<HeaderValue>,
}

impl Client {
    pub(crate) fn new(
        endpoint: &str,
        token: Option<&Token>,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let endpoint = Uri::try_from(endpoint).ok();
        let endpoint = endpoint.filter(is_web).ok_or_else(|| {
            Failure::Unexpected("that is no address that begins with https:// or http://".into())
        })?;
        let token = token.map(header).transpose()?;
        let config = Agent::config_builder()
            // Followed here: ureq would show the token to another port of the host, or without TLS.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("vlmnarrate/", env!("CARGO_PKG_VERSION")))
            // Of what a shutdown doesn't interrupt.
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout));
        Ok(Self {
            agent: config.build().into(),
            endpoint,
            token,
        })
    }

    /// What ends all requests at once when it is shut down.
    pub(crate) fn agent(&self) -> Agent {
        self.agent.clone()
    }

    /// Asks for a path of the endpoint, from this byte on.
    pub(crate) fn get(
        &self,
        path: &str,
        range: Option<String>,
        shows_token: bool,
    ) -> Result<(Response<Body>, Linked), Failure> {
        let mut uri = join(
            &self.endpoint,
            &format!("{}{path}", self.endpoint.path().trim_end_matches('/')),
        )?;
        let mut linked = Linked::default();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&uri);
            if let Some(range) = &range {
                request = request.header(RANGE, range);
            }
            if let Some(token) = self
                .token
                .as_ref()
                .filter(|_| shows_token && self.may_see_token(&uri))
            {
                request = request.header(AUTHORIZATION, token);
            }
            let response = request.call()?;
            let (status, headers) = (response.status(), response.headers());
            if is_same_origin(&uri, &self.endpoint) {
                linked.add(headers, is_redirect(status));
            }
            let location = headers.get(LOCATION).filter(|_| is_redirect(status));
            let Some(location) = location else {
                if status.is_success() {
                    return Ok((response, linked));
                }
                let code = headers
                    .get("x-error-code")
                    .and_then(|code| code.to_str().ok());
                return Err(Failure::Refused(status, code.unwrap_or_default().into()));
            };
            uri = follow(&uri, location)?;
        }
        Err(Failure::Unexpected("it redirects in a circle".into()))
    }

    /// Whether nobody but the endpoint would see it on the way.
    fn may_see_token(&self, uri: &Uri) -> bool {
        is_same_origin(uri, &self.endpoint) && !self.is_read_by_proxy(uri)
    }

    fn is_read_by_proxy(&self, uri: &Uri) -> bool {
        let proxy = self.agent.config().proxy();
        uri.scheme_str() == Some("http") && proxy.is_some_and(|proxy| !proxy.is_no_proxy(uri))
    }

    /// Whether there is a token that is kept from a proxy.
    pub(crate) fn withholds_token(&self) -> bool {
        self.token.is_some() && self.is_read_by_proxy(&self.endpoint)
    }
}

fn header(token: &Token) -> Result<HeaderValue, Failure> {
    let mut header = HeaderValue::try_from(format!("Bearer {}", token.0)).map_err(|_| {
        Failure::Unexpected("the token (HF_TOKEN) has characters that no token has".into())
    })?;
    header.set_sensitive(true);
    Ok(header)
}

/// A status that says where else to ask.
fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn is_web(uri: &Uri) -> bool {
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

/// Where a redirect from `uri` leads.
fn follow(uri: &Uri, location: &HeaderValue) -> Result<Uri, Failure> {
    let bad = || Failure::Unexpected("it redirects to what is no address".into());
    let location = location.to_str().map_err(|_| bad())?;
    // Which browsers take for slashes.
    if location.contains('\\') {
        return Err(bad());
    }
    // What is behind `#` is never sent.
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
    if !is_web(&next) {
        return Err(bad());
    }
    if uri.scheme_str() == Some("https") && next.scheme_str() == Some("http") {
        return Err(Failure::Unexpected(
            "it redirects from https to http".into(),
        ));
    }
    Ok(next)
}

/// Another path of the same server.
fn join(uri: &Uri, path: &str) -> Result<Uri, Failure> {
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = path.parse().ok();
    let joined = parts
        .path_and_query
        .is_some()
        .then(|| Uri::from_parts(parts).ok());
    joined
        .flatten()
        .ok_or_else(|| Failure::Unexpected("it names a path that is none".into()))
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
            let next = follow(&from, &HeaderValue::from_static(location)).unwrap();
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
            let next = follow(&from, &HeaderValue::from_static(location));
            assert!(next.is_err(), "{location}: {next:?}");
        }
    }

    #[test]
    fn the_token_is_for_the_endpoint_alone() {
        let token = Token("hf_secret".into());
        let client = Client::new("https://Hub.co", Some(&token), Duration::from_secs(1)).unwrap();
        for same in [
            "https://hub.co/x",
            "https://HUB.CO:443/x",
            "https://me@hub.co",
        ] {
            assert!(client.may_see_token(&uri(same)), "{same}");
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
            assert!(!client.may_see_token(&uri(other)), "{other}");
        }
        assert!(!format!("{:?}", client.token).contains("secret"));
        let bad = Token("hf_se\ncret".into());
        let Err(Failure::Unexpected(reason)) =
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
