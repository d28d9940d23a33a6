//! The engine against scripted servers.

mod cancel;
mod common;
mod failures;
mod hostile;
mod outages;
mod requests;
