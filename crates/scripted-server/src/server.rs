//! The listener and its threads.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustls::{ServerConnection, StreamOwned};

use crate::{
    Connection, Exchange, Nowhere,
    connection::Stream,
    tls::{Identity, identity},
    wait::{CLOSED, Woken, wait},
};

type Handler = dyn Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync;

/// Settings of a [`Server`].
#[derive(Clone, Copy, Debug)]
pub struct Builder {
    port: u16,
    tls: bool,
    idle: Option<Duration>,
    kept: usize,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            port: 0,
            tls: false,
            idle: None,
            kept: usize::MAX,
        }
    }
}

impl Builder {
    /// Listens on this port; 0, the default, means any that is free.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Speaks TLS, with a certificate of an authority that is made for this server.
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Closes connections without a request for so long. By default they stay open.
    #[must_use]
    pub fn close_idle_after(mut self, idle: Duration) -> Self {
        self.idle = Some(idle);
        self
    }

    /// Keeps only so many exchanges, the newest, for [`Server::exchanges`]. By default all are kept.
    #[must_use]
    pub fn keep(mut self, exchanges: usize) -> Self {
        self.kept = exchanges;
        self
    }

    /// Starts the server.
    ///
    /// # Panics
    ///
    /// The port is taken.
    #[track_caller]
    pub fn start(
        self,
        handler: impl Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync + 'static,
    ) -> Server {
        self.start_with(Some(Arc::new(handler)))
    }

    /// Starts the server; without a handler, one that never says a byte.
    #[track_caller]
    fn start_with(self, handler: Option<Arc<Handler>>) -> Server {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port))
            .unwrap_or_else(|error| panic!("port {} can't be had: {error}", self.port));
        let address = listener.local_addr().expect("the address of a listener");
        let identity = self.tls.then(|| identity().expect("a certificate"));
        let ca_pem = identity.as_ref().map(|identity| identity.ca_pem.clone());
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = UnixStream::pair().expect("a pair of sockets");
        let accepting = thread::spawn({
            let shared = shared.clone();
            move || shared.accept(&listener, &stopped, self, identity, handler)
        });
        Server {
            address,
            ca_pem,
            shared,
            stop: Some(stop),
            accepting: Some(accepting),
        }
    }
}

/// A server on a port of `127.0.0.1`. Closes its listener and all connections when dropped.
pub struct Server {
    address: SocketAddr,
    ca_pem: Option<String>,
    shared: Arc<Shared>,
    /// Ends the accepting thread when dropped.
    stop: Option<UnixStream>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a server with default settings.
    #[track_caller]
    pub fn start(
        handler: impl Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self::builder().start(handler)
    }

    /// Starts a server that speaks TLS. Clients trust it with [`ca_pem`](Self::ca_pem).
    #[track_caller]
    pub fn start_tls(
        handler: impl Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self::builder().tls().start(handler)
    }

    /// Settings to start a server with.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Starts a server that accepts connections and never reads or says a byte.
    #[track_caller]
    pub fn silent() -> Self {
        Self::builder().start_with(None)
    }

    /// Address that refuses connections.
    ///
    /// # Panics
    ///
    /// The system has no more sockets or ports.
    #[track_caller]
    pub fn refusing() -> Nowhere {
        Nowhere::refusing().expect("a socket and a port")
    }

    /// Address where connecting hangs, because the listener's backlog is full. Takes 0.2 s.
    ///
    /// # Panics
    ///
    /// The system has no more sockets or ports, or accepts without end.
    #[track_caller]
    pub fn unreachable_connect() -> Nowhere {
        Nowhere::hanging().expect("a full backlog")
    }

    /// `http://127.0.0.1:PORT/v1`, or `https://…` of a server that speaks TLS.
    pub fn url(&self) -> String {
        let scheme = if self.ca_pem.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}/v1", self.address)
    }

    /// Address with its port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Certificate of the authority, in PEM.
    ///
    /// # Panics
    ///
    /// The server doesn't speak TLS.
    #[track_caller]
    pub fn ca_pem(&self) -> &str {
        self.ca_pem.as_deref().expect("a server that speaks TLS")
    }

    /// Requests so far, in the order of arrival. Those whose handler still runs are included.
    pub fn exchanges(&self) -> Vec<Arc<Exchange>> {
        self.shared.lock().exchanges.iter().cloned().collect()
    }

    /// Number of connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.lock().accepted
    }

    /// Number of connections that neither side has closed. A client's close is seen when the handler has returned or
    /// failed.
    pub fn open_connections(&self) -> usize {
        self.shared.lock().open.len()
    }

    /// Waits for the `n`th request. Returns [`exchanges`](Self::exchanges).
    ///
    /// # Panics
    ///
    /// Fewer requests arrived within `limit`.
    #[track_caller]
    pub fn wait_for(&self, n: u64, limit: Duration) -> Vec<Arc<Exchange>> {
        if !self.shared.wait(limit, |state| state.arrived >= n) {
            let arrived = self.shared.lock().arrived;
            panic!("{arrived} of {n} requests within {limit:?}");
        }
        self.exchanges()
    }

    /// Waits for the `n`th connection ever.
    ///
    /// # Panics
    ///
    /// Fewer connections were accepted within `limit`.
    #[track_caller]
    pub fn wait_for_accepted(&self, n: u64, limit: Duration) {
        let done = self.shared.wait(limit, |state| state.accepted >= n);
        let accepted = self.accepted();
        assert!(done, "{accepted} of {n} connections within {limit:?}");
    }

    /// Waits until exactly `n` connections are open.
    ///
    /// # Panics
    ///
    /// Another number is open after `limit`.
    #[track_caller]
    pub fn wait_for_open(&self, n: usize, limit: Duration) {
        let done = self.shared.wait(limit, |state| state.open.len() == n);
        let open = self.open_connections();
        assert!(done, "{open} instead of {n} connections after {limit:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        // Handlers that wait see a closed connection.
        for socket in self.shared.lock().open.values() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    accepted: u64,
    arrived: u64,
    exchanges: VecDeque<Arc<Exchange>>,
    open: HashMap<u64, TcpStream>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn wait(&self, limit: Duration, until: impl Fn(&State) -> bool) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while !until(&state) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
        true
    }

    fn accept(
        self: Arc<Self>,
        listener: &TcpListener,
        stopped: &UnixStream,
        settings: Builder,
        identity: Option<Identity>,
        handler: Option<Arc<Handler>>,
    ) {
        for number in 0.. {
            let socket = loop {
                if wait(stopped, CLOSED, Some(listener), None) == Woken::First {
                    return;
                }
                // Errors are of connections that are gone already, or of a process without free descriptors.
                match listener.accept() {
                    Ok((socket, _)) => break socket,
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            };
            // Words leave at once, as those of real servers do.
            let _ = socket.set_nodelay(true);
            let Ok(copy) = socket.try_clone() else {
                continue;
            };
            self.change(|state| {
                state.accepted += 1;
                state.open.insert(number, copy);
            });
            let (shared, handler) = (self.clone(), handler.clone());
            let config = identity.as_ref().map(|identity| identity.config.clone());
            thread::spawn(move || {
                let closing = Closing(&shared, number);
                match (handler, config) {
                    (None, _) => _ = wait(&socket, CLOSED, None, None),
                    (Some(handler), None) => {
                        let client = Connection::new(Stream::Plain(socket));
                        shared.serve(client, number, settings, &*handler);
                    }
                    (Some(handler), Some(config)) => {
                        let tls = ServerConnection::new(config).expect("a valid configuration");
                        let stream = Box::new(StreamOwned::new(tls, socket));
                        let client = Connection::new(Stream::Tls(stream));
                        shared.serve(client, number, settings, &*handler);
                    }
                }
                drop(closing);
            });
        }
    }

    fn serve(&self, mut client: Connection, number: u64, settings: Builder, handler: &Handler) {
        loop {
            let exchange = match client.next_exchange(number, settings.idle) {
                Ok(Some(exchange)) => Arc::new(exchange),
                Ok(None) => return client.close_notify(),
                Err(error) => {
                    if error.kind() == io::ErrorKind::InvalidData {
                        let _ = client.error(400, &error.to_string());
                    }
                    return;
                }
            };
            self.change(|state| {
                state.arrived += 1;
                state.exchanges.push_back(exchange.clone());
                if state.exchanges.len() > settings.kept {
                    state.exchanges.pop_front();
                }
            });
            if handler(&exchange, &mut client).is_err() || !client.is_complete() {
                return;
            }
            if exchange.header("connection") == Some("close") {
                return client.close_notify();
            }
        }
    }
}

/// Takes the connection off the list, after a panic of the handler too.
struct Closing<'a>(&'a Shared, u64);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.change(|state| {
            state.open.remove(&self.1);
        });
    }
}
