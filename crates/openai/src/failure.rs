//! What went wrong with a request, and for whom.

use std::{
    io,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use vlmnarrate_engine::{Error, ErrorKind, Remedy};

use crate::{answer::error_text, http::Head};

/// Bytes of an error's body that are read.
pub(crate) const MAX_ERROR_BODY: usize = 16 << 10;
/// Characters of a server's message that are shown.
const MAX_SHOWN: usize = 300;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Someone asked to stop.
    Cancelled,
    /// The settings, for good, or this one request: by the error's kind.
    Error(Error),
    /// The server or the network is away. The error's kind is `NotFound` if nobody knows its name.
    Away(Error, Option<Duration>),
    /// The server failed over this request, or altogether.
    Internal(Error, Option<Duration>),
    /// The server has no room.
    Overloaded(Error, Option<Duration>),
    /// The server refuses the request: perhaps for fields that can be left out.
    Refused {
        parameter: Option<String>,
        message: String,
        error: Error,
    },
    /// There is no such model or path.
    NotFound(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Who failed, for messages.
pub(crate) struct Server<'a> {
    /// The URL that was set.
    pub(crate) url: &'a str,
    /// The key, which no message may show.
    pub(crate) key: Option<&'a str>,
}

impl Server<'_> {
    /// An error about this server.
    pub(crate) fn error(&self, kind: ErrorKind, message: impl std::fmt::Display) -> Error {
        Error::new(kind, format!("{}: {message}", self.url))
    }

    /// The failure that a status and a body mean.
    pub(crate) fn status(&self, head: &Head, body: &[u8]) -> Failure {
        let status = head.status;
        let json = serde_json::from_slice::<Value>(body).ok();
        let message = self.shown(body, json.as_ref());
        let said = match message.is_empty() {
            true => format!("it answers {status}"),
            false => format!("it answers {status}: {message}"),
        };
        let retry_after = head.retry_after.as_deref().and_then(retry_after);
        let away = || self.error(ErrorKind::Unavailable, &said);
        let code = json.as_ref().map(|json| &json["error"]["code"]);
        let has_code = |name: &str| code.and_then(Value::as_str) == Some(name);
        match status {
            300..400 => {
                let to = one_line(head.location.as_deref().unwrap_or("elsewhere"));
                self.error(
                    ErrorKind::Settings,
                    format!("it redirects to {to}. Set endpoint to the URL of the server itself"),
                )
                .into()
            }
            401 | 403 if self.key.is_some() => self
                .error(
                    ErrorKind::NotAuthorized,
                    format!(
                        "{said}. It refuses the API key: set the environment variable \
                         VLMNARRATE_API_KEY, or the file of api-key-file, to another"
                    ),
                )
                .into(),
            401 | 403 => self
                .error(
                    ErrorKind::NotAuthorized,
                    format!(
                        "{said}. It wants an API key: set the environment variable \
                         VLMNARRATE_API_KEY, or api-key-file to a file that has the key"
                    ),
                )
                .into(),
            402 => self.error(ErrorKind::NotAuthorized, said).into(),
            429 if has_code("insufficient_quota") => {
                self.error(ErrorKind::NotAuthorized, said).into()
            }
            404 | 405 | 501 => Failure::NotFound(said),
            413 => self
                .error(
                    ErrorKind::Failed,
                    format!(
                        "{said}. The pictures are too large for it: lower image-size, frames or image-quality, \
                         or raise the limit of the proxy in front of it (nginx: client_max_body_size)"
                    ),
                )
                .into(),
            500 => Failure::Internal(away(), retry_after),
            408 | 502 | 504 => Failure::Away(away(), retry_after),
            429 | 503 | 529 => Failure::Overloaded(away(), retry_after),
            400 | 422 => Failure::Refused {
                parameter: json.as_ref().and_then(|json| {
                    let parameter = json["error"]["param"].as_str()?;
                    Some(parameter.trim_start_matches("body.").to_owned())
                }),
                message: String::from_utf8_lossy(body).into_owned(),
                error: self.error(ErrorKind::Failed, said).with_remedy(
                    // In the words of vLLM, llama-server and OpenAI.
                    ["context", "too long", "max_model_len", "exceed"]
                        .iter()
                        .any(|word| message.contains(word))
                        .then_some(Remedy::ShorterRequest),
                ),
            },
            _ => self.error(ErrorKind::Failed, said).into(),
        }
    }

    /// The failure of a connection.
    pub(crate) fn connection(&self, error: &ureq::Error) -> Failure {
        let settings = |message: String| self.error(ErrorKind::Settings, message).into();
        match error {
            ureq::Error::Rustls(error) => tls_failure(self, error),
            ureq::Error::Io(error) => match inner_tls_error(error) {
                Some(tls) => tls_failure(self, tls),
                None if is_lookup_failure(error) => self.connection(&ureq::Error::HostNotFound),
                None => Failure::Away(
                    self.error(ErrorKind::Unavailable, connection_words(error)),
                    None,
                ),
            },
            ureq::Error::HostNotFound => Failure::Away(
                self.error(
                    ErrorKind::NotFound,
                    "its host name is not known. Check endpoint",
                ),
                None,
            ),
            ureq::Error::Timeout(_) => Failure::Away(
                self.error(
                    ErrorKind::Unavailable,
                    "it did not take a connection in time",
                ),
                None,
            ),
            ureq::Error::InvalidProxyUrl | ureq::Error::ConnectProxyFailed(_) => settings(format!(
                "{error}. Check the environment variables HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY"
            )),
            ureq::Error::Protocol(_) | ureq::Error::Http(_) | ureq::Error::BadUri(_) => {
                let error = one_line(&error.to_string());
                let what = "it does not speak HTTP as it should";
                self.error(ErrorKind::Failed, format!("{what}: {error}"))
                    .into()
            }
            error => Failure::Away(
                self.error(ErrorKind::Unavailable, one_line(&error.to_string())),
                None,
            ),
        }
    }

    /// What a body says, in one line and without the key.
    fn shown(&self, body: &[u8], json: Option<&Value>) -> String {
        let text = match json {
            Some(json) if !json["error"].is_null() => error_text(&json["error"]),
            Some(json) => error_text(json),
            None => without_markup(&String::from_utf8_lossy(body)),
        };
        self.scrubbed(&one_line(&text))
    }

    /// The text without the key.
    pub(crate) fn scrubbed(&self, text: &str) -> String {
        match self.key {
            // A shorter one is no secret, and part of many words.
            Some(key) if key.len() >= 4 => text.replace(key, "…"),
            _ => text.to_owned(),
        }
    }
}

/// The error of rustls inside an I/O error.
fn inner_tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Whether the system knows no address of a name. The standard library has no kind for that.
fn is_lookup_failure(error: &io::Error) -> bool {
    error.to_string().starts_with("failed to lookup address")
}

fn tls_failure(server: &Server<'_>, error: &rustls::Error) -> Failure {
    use rustls::{CertificateError, Error::*};
    let message = match error {
        InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is signed by an authority that is not known. Set ca-file to the PEM file of \
             the authority"
                .to_owned()
        }
        InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is for another host name. Set endpoint to the name in the certificate"
            .to_owned(),
        InvalidCertificate(reason) => format!("its certificate is not valid: {reason}"),
        InvalidMessage(_) => {
            "it does not speak TLS. Set endpoint to a URL that begins with http://".to_owned()
        }
        error => format!("TLS failed: {error}"),
    };
    server.error(ErrorKind::Settings, message).into()
}

fn connection_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "nothing listens there (connection refused)".into(),
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => "it closed the connection".into(),
        _ => one_line(&error.to_string()),
    }
}

/// Whether a connection was closed before anything came, as an idle one may be while it is taken up again.
pub(crate) fn is_stale(error: &ureq::Error) -> bool {
    matches!(error, ureq::Error::Io(error) if matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
    ))
}

/// A `Retry-After`: seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let date = httpdate::parse_http_date(text.trim()).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

/// The text in one line, without control characters, and not too long.
pub(crate) fn one_line(text: &str) -> String {
    let words = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty());
    let mut line = String::new();
    for word in words {
        if !line.is_empty() {
            line.push(' ');
        }
        line.extend(word.chars().take(MAX_SHOWN));
        if line.len() > MAX_SHOWN {
            break;
        }
    }
    if let Some((end, _)) = line.char_indices().nth(MAX_SHOWN) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// The text of a page: what is in angle brackets, in scripts and in styles is left out.
fn without_markup(page: &str) -> String {
    let mut text = String::new();
    let mut rest = page;
    while let Some((before, tag)) = rest.split_once('<') {
        text.push_str(before);
        text.push(' ');
        let name = tag.get(..6).unwrap_or_default().to_ascii_lowercase();
        let end = match name.as_str() {
            "script" => tag.find("</script"),
            _ if name.starts_with("style") => tag.find("</style"),
            _ => None,
        };
        let tag = end.map_or(tag, |end| &tag[end..]);
        rest = tag.split_once('>').map_or("", |(_, rest)| rest);
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Server<'_> = Server {
        url: "http://gpu:8000/v1",
        key: Some("sk-secret"),
    };

    fn failure(status: u16, body: &str) -> Failure {
        let head = Head {
            status,
            retry_after: Some("7".into()),
            location: Some("http://elsewhere/\r\nx: y".into()),
            ..Head::default()
        };
        SERVER.status(&head, body.as_bytes())
    }

    fn error(status: u16, body: &str) -> Error {
        match failure(status, body) {
            Failure::Error(error) | Failure::Refused { error, .. } => error,
            failure => panic!("{failure:?}"),
        }
    }

    #[test]
    fn a_wrong_key_names_the_variable_and_never_the_key() {
        let body = r#"{"error":{"message":"Incorrect API key provided: sk-secret.","code":"invalid_api_key"}}"#;
        let error = error(401, body);
        assert_eq!(error.kind, ErrorKind::NotAuthorized);
        let text = error.to_string();
        assert!(
            text.contains("VLMNARRATE_API_KEY") && text.contains("api-key-file"),
            "{text}"
        );
        assert!(text.contains("Incorrect API key provided: …."), "{text}");
        assert!(!text.contains("secret"), "{text}");
        let without = Server {
            key: None,
            ..SERVER
        };
        let Failure::Error(error) = without.status(
            &Head {
                status: 401,
                ..Head::default()
            },
            b"",
        ) else {
            panic!("no error");
        };
        assert!(error.to_string().contains("It wants an API key"), "{error}");
    }

    #[test]
    fn each_status_means_something() {
        assert!(
            matches!(failure(503, ""), Failure::Overloaded(_, Some(wait)) if wait.as_secs() == 7),
            "{:?}",
            failure(503, "")
        );
        assert!(matches!(failure(502, ""), Failure::Away(..)));
        assert!(matches!(failure(404, ""), Failure::NotFound(_)));
        let quota = r#"{"error":{"message":"no quota","code":"insufficient_quota"}}"#;
        assert_eq!(error(429, quota).kind, ErrorKind::NotAuthorized);
        assert!(matches!(failure(429, "{}"), Failure::Overloaded(..)));
        assert!(
            error(413, "<html><h1>413 Too Large</h1></html>")
                .to_string()
                .contains("413 Too Large. The pictures")
        );
        let redirect = error(302, "");
        assert_eq!(redirect.kind, ErrorKind::Settings);
        assert!(
            redirect
                .to_string()
                .contains("redirects to http://elsewhere/ x: y. Set endpoint"),
            "{redirect}"
        );
        let long = r#"{"error":{"message":"the context has 1024 tokens","param":"body.messages"}}"#;
        let Failure::Refused {
            parameter, error, ..
        } = failure(400, long)
        else {
            panic!("not refused");
        };
        assert_eq!(parameter.as_deref(), Some("messages"));
        assert_eq!(error.remedy, Some(Remedy::ShorterRequest));
    }

    #[test]
    fn a_body_becomes_one_short_line() {
        assert_eq!(one_line(" a\r\n\u{1b}[31mb\0c\t "), "a [31mb c");
        assert!(one_line(&"x".repeat(1 << 20)).chars().count() <= MAX_SHOWN + 1);
        assert!(one_line(&"é ".repeat(1 << 20)).chars().count() <= MAX_SHOWN + 1);
        let page = "<!doctype html><style>p { x }</style><script>if (a<b) { }</script><p>Bad  gateway</p><";
        assert_eq!(one_line(&without_markup(page)), "Bad gateway");
        assert_eq!(without_markup("<é"), " ");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after(" 12 "), Some(Duration::from_secs(12)));
        assert_eq!(
            retry_after("Wed, 21 Oct 2015 07:28:00 GMT"),
            Some(Duration::ZERO)
        );
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
        let wait = retry_after(&soon).unwrap();
        assert!((50..=60).contains(&wait.as_secs()), "{wait:?}");
        assert_eq!(retry_after("soon"), None);
        assert_eq!(retry_after("-1"), None);
    }
}
