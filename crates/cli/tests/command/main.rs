//! The command, run as a user runs it.

mod common;
mod copying;
mod endings;
mod endpoints;
mod inputs;
mod launching;
mod live;
mod model;
mod outputs;
mod report;
mod schema;
mod serving;
mod usage;
