//! One HTTP request on a thread of its own, so that whoever waits for the answer can stop waiting at any moment.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use ureq::{
    Agent, Body, Proxy,
    http::{HeaderValue, Response, Uri, header},
    tls::{Certificate, RootCerts, TlsConfig},
    unversioned::{
        resolver::DefaultResolver,
        transport::{ConnectProxyConnector, Connector, RustlsConnector, SocksConnector},
    },
};
use vlmnarrate_engine::threads;

use crate::transport::{CancelToken, CancellableTcp};

/// For the name of the host, and for the connection. A cancel need not wait for either.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// llama-server and vLLM close an idle connection after 5 s.
const MAX_IDLE: Duration = Duration::from_secs(4);
/// Pieces that may wait to be read: a server that sends faster than it is listened to must wait.
const PIECES: usize = 8;
/// Bytes of a piece at most.
const PIECE: usize = 16 << 10;

/// What comes of a request, in this order.
#[derive(Debug)]
pub(crate) enum Piece {
    Head(Head),
    Body(Vec<u8>),
    End,
    /// The connection failed or broke.
    Failed(ureq::Error),
}

/// Status and headers of an answer.
#[derive(Debug, Default)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) retry_after: Option<String>,
    pub(crate) location: Option<String>,
}

/// An agent for one server, with idle connections that all elements share.
pub(crate) fn agent(url: &Uri, authorities: Option<Vec<Certificate<'static>>>) -> Agent {
    let roots = authorities.map_or(RootCerts::WebPki, RootCerts::from);
    let proxy = Proxy::try_from_env().filter(|_| !url.host().is_some_and(is_loopback));
    let config = Agent::config_builder()
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .proxy(proxy)
        // A redirect could lead the key and the pictures anywhere.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(concat!("vlmnarrate/", env!("CARGO_PKG_VERSION")))
        .max_response_header_size(64 << 10)
        .max_idle_age(MAX_IDLE)
        .max_idle_connections(256)
        .max_idle_connections_per_host(256)
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .build();
    let connector =
        ().chain(SocksConnector::default())
            .chain(ConnectProxyConnector::default())
            .chain(CancellableTcp)
            .chain(RustlsConnector::default());
    Agent::with_parts(config, connector, DefaultResolver::default())
}

/// Whether a host is this machine, which no proxy reaches.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// A request.
#[derive(Clone)]
pub(crate) struct HttpRequest {
    pub(crate) url: Uri,
    pub(crate) authorization: Option<HeaderValue>,
    /// JSON to post; `None` to get.
    pub(crate) body: Option<Arc<[u8]>>,
}

/// A request in progress. Dropping it closes the connection, unless the answer is complete.
pub(crate) struct Call {
    pieces: Receiver<Piece>,
    token: CancelToken,
    ended: bool,
}

impl Call {
    /// Begins a request.
    ///
    /// # Errors
    ///
    /// The system refuses another thread.
    pub(crate) fn start(agent: &Agent, request: HttpRequest) -> io::Result<Self> {
        let (sender, pieces) = sync_channel(PIECES);
        let token = CancelToken::default();
        let (agent, of_request) = (agent.clone(), token.clone());
        threads::spawn("vlmnarrate-http", move || {
            of_request.scope(|| {
                let last = match exchange(&agent, request, &sender) {
                    Ok(()) => Piece::End,
                    Err(error) => Piece::Failed(error),
                };
                // Nobody listens to a request that was cancelled.
                let _ = sender.send(last);
            });
        })?;
        Ok(Self {
            pieces,
            token,
            ended: false,
        })
    }

    /// The next piece; `None` if none comes in time.
    pub(crate) fn next(&mut self, timeout: Duration) -> Option<Piece> {
        let piece = match self.pieces.recv_timeout(timeout) {
            Ok(piece) => piece,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                Piece::Failed(io::Error::other("the thread of the request panicked").into())
            }
        };
        self.ended |= matches!(piece, Piece::End | Piece::Failed(_));
        Some(piece)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.ended {
            self.token.cancel();
        }
    }
}

fn exchange(
    agent: &Agent,
    request: HttpRequest,
    pieces: &SyncSender<Piece>,
) -> Result<(), ureq::Error> {
    let mut response = send(agent, &request)?;
    let text = |name| {
        let value = response.headers().get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let head = Head {
        status: response.status().as_u16(),
        content_type: text(header::CONTENT_TYPE).unwrap_or_default(),
        retry_after: text(header::RETRY_AFTER),
        location: text(header::LOCATION),
    };
    if pieces.send(Piece::Head(head)).is_err() {
        return Ok(());
    }
    let mut body = response.body_mut().as_reader();
    loop {
        let mut piece = vec![0; PIECE];
        let len = body.read(&mut piece).map_err(ureq::Error::from)?;
        piece.truncate(len);
        if len == 0 || pieces.send(Piece::Body(piece)).is_err() {
            return Ok(());
        }
    }
}

fn send(agent: &Agent, request: &HttpRequest) -> Result<Response<Body>, ureq::Error> {
    let authorized = |builder: ureq::http::request::Builder| match &request.authorization {
        Some(key) => builder.header(header::AUTHORIZATION, key),
        None => builder,
    };
    let builder = ureq::http::Request::builder().uri(&request.url);
    match &request.body {
        None => {
            let builder = authorized(builder.method("GET"));
            agent.run(builder.body(()).map_err(ureq::Error::Http)?)
        }
        Some(body) => {
            let builder = authorized(builder.method("POST"))
                .header(header::CONTENT_TYPE, "application/json")
                .header(header::ACCEPT, "text/event-stream, application/json");
            agent.run(builder.body(&body[..]).map_err(ureq::Error::Http)?)
        }
    }
}
