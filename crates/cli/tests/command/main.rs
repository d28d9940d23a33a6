//! The command, run as a user runs it.
#![expect(missing_docs, reason = "tests")]

mod common;
mod copying;
mod endings;
mod inputs;
mod launching;
mod outputs;
mod usage;
