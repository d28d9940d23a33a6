//! TCP connections that another thread can close at any moment: while connecting, in a TLS handshake, or while waiting
//! for an answer.
//!
//! `Agent::shutdown` of ureq does not reach a connection that is being made, and ends a whole agent. Here each request
//! has a [`CancelToken`], so that requests of many elements share one agent and its idle connections.

use std::{
    cell::RefCell,
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};
use ureq::{
    Error, Timeout,
    unversioned::transport::{
        Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport,
    },
};

thread_local! {
    /// The token of the request that the thread makes.
    static CURRENT: RefCell<Option<CancelToken>> = const { RefCell::new(None) };
}

/// Closes the connection of one request from another thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct CancelToken(Arc<Mutex<TokenState>>);

#[derive(Debug, Default)]
struct TokenState {
    cancelled: bool,
    /// The connection in use.
    socket: Weak<Socket>,
}

impl CancelToken {
    /// Runs a request whose connections belong to this token.
    pub(crate) fn scope<T>(&self, request: impl FnOnce() -> T) -> T {
        CURRENT.with_borrow_mut(|current| *current = Some(self.clone()));
        let result = request();
        CURRENT.with_borrow_mut(|current| *current = None);
        // The connection may serve another request from now on.
        self.0.lock().unwrap().socket = Weak::new();
        result
    }

    /// Closes the connection, and every later one of the same request.
    pub(crate) fn cancel(&self) {
        let mut state = self.0.lock().unwrap();
        state.cancelled = true;
        if let Some(socket) = state.socket.upgrade() {
            // Wakes a thread in `connect` too. Fails if the connection is closed.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn watch(&self, socket: &Arc<Socket>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if state.cancelled {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        state.socket = Arc::downgrade(socket);
        Ok(())
    }
}

/// Lets the current request's token close this socket.
///
/// # Errors
///
/// The request was cancelled.
fn watch(socket: &Arc<Socket>) -> io::Result<()> {
    CURRENT.with_borrow(|current| match current {
        Some(token) => token.watch(socket),
        None => Ok(()),
    })
}

/// Makes TCP connections that belong to the current request's token.
#[derive(Debug, Default)]
pub(crate) struct CancellableTcp;

impl<In: Transport> Connector<In> for CancellableTcp {
    type Out = Either<In, TcpTransport>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        // A connection through a proxy.
        if let Some(chained) = chained {
            return Ok(Some(Either::A(chained)));
        }
        let deadline = details
            .timeout
            .not_zero()
            .and_then(|timeout| Instant::now().checked_add(*timeout));
        let count = details.addrs.len();
        let mut last_error = None;
        for (i, address) in details.addrs.iter().enumerate() {
            // Each of the remaining addresses gets the same share of the time.
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let share = left.map(|left| left / (count - i) as u32);
            match connect(*address, share) {
                Ok(socket) => {
                    let config = details.config;
                    let buffers =
                        LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size());
                    return Ok(Some(Either::B(TcpTransport { socket, buffers })));
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    return Err(error.into());
                }
                Err(error) => last_error = Some(error),
            }
        }
        let error = last_error.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into());
        Err(match error.kind() {
            io::ErrorKind::TimedOut => Error::Timeout(Timeout::Connect),
            _ => error.into(),
        })
    }
}

fn connect(address: SocketAddr, timeout: Option<Duration>) -> io::Result<Arc<Socket>> {
    let domain = Domain::for_address(address);
    let socket = Arc::new(Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?);
    watch(&socket)?;
    match timeout {
        Some(timeout) => {
            let timeout = timeout.max(Duration::from_millis(1));
            socket.connect_timeout(&address.into(), timeout)?;
        }
        None => socket.connect(&address.into())?,
    }
    // A cancel that came in between finds nothing to shut down.
    watch(&socket)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A TCP connection.
pub(crate) struct TcpTransport {
    socket: Arc<Socket>,
    buffers: LazyBuffers,
}

impl fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpTransport")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

/// The time that is left; an error if there is none.
fn remaining(timeout: NextTimeout) -> Result<Option<Duration>, Error> {
    match timeout.after.is_zero() {
        true => Err(Error::Timeout(timeout.reason)),
        false => Ok(timeout.not_zero().map(|left| *left)),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

impl Transport for TcpTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        watch(&self.socket)?;
        let timeout = timeout.for_write();
        self.socket.set_write_timeout(remaining(timeout)?)?;
        let written = (&*self.socket).write_all(&self.buffers.output()[..amount]);
        written.map_err(|error| match is_timeout(&error) {
            true => Error::Timeout(timeout.reason),
            false => error.into(),
        })
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        watch(&self.socket)?;
        let timeout = timeout.for_read();
        self.socket.set_read_timeout(remaining(timeout)?)?;
        let input = self.buffers.input_append_buf();
        let read = loop {
            match (&*self.socket).read(input) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                read => break read,
            }
        };
        let amount = read.map_err(|error| match is_timeout(&error) {
            true => Error::Timeout(timeout.reason),
            false => error.into(),
        })?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        // An idle connection has nothing to read: neither data that nobody asked for nor its end.
        let mut byte = [0];
        let probed = self.socket.set_nonblocking(true).and_then(|()| {
            let read = (&*self.socket).read(&mut byte);
            self.socket.set_nonblocking(false)?;
            read
        });
        matches!(probed, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}
