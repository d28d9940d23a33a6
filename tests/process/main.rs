//! Tests that set environment variables, and need a process each, as `cargo nextest` runs them.

#![expect(unsafe_code, reason = "variables are set")]

#[path = "../element/common/mod.rs"]
mod common;

mod chat_templates;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod hub_network;
mod leaks;
