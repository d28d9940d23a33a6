//! Scripted OpenAI-compatible HTTP/1.1 server: a closure answers each request, well or badly.
//!
//! Blocking sockets, one thread per connection, no runtime. Dropping a [`Server`] closes its listener and all its
//! connections.
//!
//! ```
//! use std::time::Duration;
//! use vlmnarrate_scripted_server::{Server, models};
//!
//! // Streams half an answer, then waits for the client to lose patience.
//! let server = Server::start(|exchange, client| {
//!     if !exchange.is_chat() {
//!         return models(client);
//!     }
//!     client.stream_head()?;
//!     client.delta("A solid")?;
//!     client.closed_within(Duration::from_secs(60));
//!     Ok(())
//! });
//! assert!(server.url().starts_with("http://127.0.0.1:"));
//! assert_eq!(server.exchanges().len(), 0);
//! ```
//!
//! Ready-made are [`answers`], which always gives the same answer, and [`Slots`], an engine of exact capacity.

mod answers;
mod connection;
mod exchange;
mod nowhere;
mod server;
mod slots;
mod tls;
mod wait;

pub use answers::{MODEL, answers, models};
pub use connection::Connection;
pub use exchange::Exchange;
pub use nowhere::Nowhere;
pub use server::{Builder, Server};
pub use slots::{Capacity, Counters, Slots};
