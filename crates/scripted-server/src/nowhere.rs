//! Addresses where nobody answers.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::OwnedFd,
    time::Duration,
};

use rustix::net::{AddressFamily, SocketType, bind, listen, socket};

/// Address that takes no connection, for as long as this value lives.
pub struct Nowhere {
    address: SocketAddr,
    /// Keep the port, and the backlog full.
    _sockets: (TcpListener, Vec<TcpStream>),
}

impl Nowhere {
    /// Refuses each connection.
    pub(crate) fn refusing() -> io::Result<Self> {
        // Bound, so that nobody else gets the port, but never listening.
        let listener = TcpListener::from(bound()?);
        Ok(Self {
            address: listener.local_addr()?,
            _sockets: (listener, Vec::new()),
        })
    }

    /// Lets each connect hang: the backlog is full, and the kernel drops further SYN packets.
    pub(crate) fn hanging() -> io::Result<Self> {
        let socket = bound()?;
        listen(&socket, 0)?;
        let listener = TcpListener::from(socket);
        let address = listener.local_addr()?;
        let mut waiting = Vec::new();
        while waiting.len() < 16 {
            match TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
                Ok(stream) => waiting.push(stream),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Ok(Self {
                        address,
                        _sockets: (listener, waiting),
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("the kernel has no end to its backlog"))
    }

    /// Address with its port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:PORT/v1`
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }
}

fn bound() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    Ok(socket)
}
