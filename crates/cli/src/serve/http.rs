//! The HTTP server: its address, who may ask, and how long a client may take.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    time::{Instant, Sleep, sleep},
};

use crate::input::said;

/// The address where nobody but this machine can ask.
pub const DEFAULT: &str = "127.0.0.1:8080";

/// Reads an address for the command line.
///
/// # Errors
///
/// What to write instead.
pub fn address(text: &str) -> Result<String, String> {
    match parse(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("expected an address such as {DEFAULT}")),
    }
}

/// A port that is ours, before anybody is answered.
pub struct Port {
    listener: std::net::TcpListener,
    address: SocketAddr,
}

impl Port {
    /// Takes the port that the user named with `option`: `HOST:PORT`, `PORT` or `HOST`.
    ///
    /// # Errors
    ///
    /// What is wrong with the address, and what to write instead.
    pub fn open(option: &str, text: &str) -> Result<Self> {
        let (host, port) = parse(text).context("not an address")?;
        let addresses: Vec<_> = (host, port)
            .to_socket_addrs()
            .map_err(|_| {
                anyhow!(
                    "{option} {text}: no machine is named {host}; use {option}={DEFAULT}, or \
                     {option}=0.0.0.0:{port} for all addresses of this machine"
                )
            })?
            .collect();
        let listener = std::net::TcpListener::bind(&addresses[..])
            .map_err(|error| anyhow!("{}", refused(option, host, port, &error)))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Starts to answer.
    ///
    /// # Errors
    ///
    /// There are no threads for it.
    pub fn serve(self, router: Router, patience: Option<Duration>) -> Result<Server> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("server")
            .enable_all()
            .build()?;
        let router = router
            .layer(middleware::map_response(private))
            .layer(middleware::from_fn_with_state(self.address.ip(), guard));
        let _entered = runtime.enter();
        let listener = Listener {
            listener: TcpListener::from_std(self.listener)?,
            patience,
        };
        runtime.spawn(async { axum::serve(listener, router).await });
        Ok(Server {
            runtime: Some(runtime),
            address: self.address,
        })
    }
}

/// Host and port.
fn parse(text: &str) -> Option<(&str, u16)> {
    if let Ok(port) = text.parse() {
        return Some(("127.0.0.1", port));
    }
    let (host, port) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        Some((host, "")) => (host, 8080),
        Some((host, port)) => (host, port.strip_prefix(':')?.parse().ok()?),
        None => match text.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => (text, 8080),
            Some((host, port)) => (host, port.parse().ok()?),
            None => (text, 8080),
        },
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-.:%".contains(c);
    (!host.is_empty() && host.chars().all(plain)).then_some((host, port))
}

/// Why there is no port, and what to do.
fn refused(option: &str, host: &str, port: u16, error: &io::Error) -> String {
    let shown = match host.contains(':') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    };
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "port {port} is in use; choose another with {option}={shown}:{}",
            if port == u16::MAX { 8080 } else { port + 1 }
        ),
        io::ErrorKind::PermissionDenied => format!(
            "port {port} is reserved for root; choose one from 1024 up with {option}={shown}:8080"
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "{host} is not an address of this machine; use {option}={DEFAULT}, or {option}=0.0.0.0:{port} for all \
             addresses of this machine"
        ),
        _ => format!("{option}={shown}:{port}: {}", said(error)),
    }
}

/// A server that ends when this is dropped.
pub struct Server {
    runtime: Option<Runtime>,
    address: SocketAddr,
}

impl Server {
    /// Where a browser on this machine finds it, and who else does.
    pub fn invitation(&self) -> String {
        let port = self.address.port();
        match self.address.ip() {
            ip if ip.is_loopback() => {
                format!("http://{} for this machine only", self.address)
            }
            ip if ip.is_unspecified() => format!(
                "http://localhost:{port} for everyone who can reach port {port} of this machine"
            ),
            _ => format!(
                "http://{} for everyone who can reach this address",
                self.address
            ),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody waits for a client that reads slowly.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_millis(200));
        }
    }
}

/// Refuses another site's name that has come to mean this machine: its scripts could look at the pictures.
async fn guard(State(own): State<IpAddr>, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST);
    if own.is_loopback() && !host.is_some_and(|host| is_own(host, own)) {
        return (
            StatusCode::FORBIDDEN,
            "This page answers only to the name or address that it was started with.\n",
        )
            .into_response();
    }
    next.run(request).await
}

fn is_own(host: &HeaderValue, own: IpAddr) -> bool {
    let Ok(host) = host.to_str() else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip == own || ip.is_loopback())
}

/// Keeps what is shown here out of caches and of other sites' pages.
async fn private(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_SECURITY_POLICY, "frame-ancestors 'none'"),
        (
            header::HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

struct Listener {
    listener: TcpListener,
    patience: Option<Duration>,
}

impl axum::serve::Listener for Listener {
    type Io = Patient;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Patient, SocketAddr) {
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        // Words come one by one.
        let _ = stream.set_nodelay(true);
        let client = Patient {
            stream,
            patience: self.patience,
            waiting: None,
        };
        (client, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A client that is let go if it takes nothing for too long.
struct Patient {
    stream: TcpStream,
    patience: Option<Duration>,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn written<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let Some(patience) = self.patience.filter(|_| written.is_pending()) else {
            self.waiting = None;
            return written;
        };
        let waiting = self
            .waiting
            .get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(waiting.as_mut().poll(context));
        waiting.as_mut().reset(Instant::now() + patience);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, buffer);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        for (text, expected) in [
            ("8000", Some(("127.0.0.1", 8000))),
            ("0.0.0.0:80", Some(("0.0.0.0", 80))),
            ("[::1]:8081", Some(("::1", 8081))),
            ("[::]", Some(("::", 8080))),
            ("::1", Some(("::1", 8080))),
            ("localhost", Some(("localhost", 8080))),
            ("localhost:http", None),
            ("127.0.0.1:65536", None),
            ("http://localhost:8080", None),
            ("", None),
            (":8080", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_port_that_cannot_be_had_has_a_remedy() {
        for (kind, words) in [
            (io::ErrorKind::AddrInUse, ["port 80 ", "--listen=[::1]:81"]),
            (
                io::ErrorKind::PermissionDenied,
                ["root", "--listen=[::1]:8080"],
            ),
            (
                io::ErrorKind::AddrNotAvailable,
                ["not an address", "--listen=0.0.0.0:80"],
            ),
        ] {
            let text = refused("--listen", "::1", 80, &kind.into());
            for word in words {
                assert!(text.contains(word), "{text}");
            }
        }
    }

    #[test]
    fn a_client_that_takes_nothing_is_let_go() {
        use tokio::io::AsyncWriteExt;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut listener = Listener {
                listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
                patience: Some(Duration::from_millis(50)),
            };
            let address = listener.listener.local_addr().unwrap();
            let _asleep = std::net::TcpStream::connect(address).unwrap();
            let (mut client, _) = axum::serve::Listener::accept(&mut listener).await;
            let endless = async { while client.write_all(&[0; 1 << 16]).await.is_ok() {} };
            let ended = tokio::time::timeout(Duration::from_secs(10), endless).await;
            assert!(ended.is_ok());
        });
    }

    #[test]
    fn only_own_names_are_answered_to() {
        let own = "127.0.0.1".parse().unwrap();
        for (host, expected) in [
            ("localhost:8080", true),
            ("127.0.0.1", true),
            ("[::1]:8080", true),
            ("::1", false),
            ("elsewhere.example:8080", false),
            ("localhost.elsewhere.example", false),
            ("192.0.2.1:8080", false),
        ] {
            assert_eq!(
                is_own(&HeaderValue::from_static(host), own),
                expected,
                "{host}"
            );
        }
    }
}
