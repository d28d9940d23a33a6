//! Tests that set variables of their process, so that each must be alone in one, as `cargo nextest` runs it.

#![expect(unsafe_code, reason = "variables are set")]

#[path = "../element/common/mod.rs"]
mod common;

mod chat_templates;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod hub_network;
mod leaks;
