//! The engine against scripted servers.

mod cancel;
mod common;
mod environment;
mod failures;
mod hostile;
mod outages;
mod requests;
