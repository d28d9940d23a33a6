//! The command `vlmnarrate`: describes videos in words.

mod arguments;
mod captions;
mod copy;
mod ffmpeg;
mod input;
mod launch;
mod live;
mod manual;
mod model;
mod narrate;
mod output;
mod pages;
mod part;
mod pipeline;
mod probe;
mod processes;
mod progress;
mod properties;
mod run;
mod serve;
mod units;
mod writers;

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{arguments::Command, run::End};

fn main() -> ExitCode {
    match start() {
        Ok(end) => end.status().into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<End> {
    gst::init().context("GStreamer can't start")?;
    gstvlmnarrate::plugin_register_static().context("the elements can't be registered")?;
    let asked = arguments::parse();
    processes::watch_signals().context("signals can't be handled")?;
    match &asked.cli.command {
        None => narrate::narrate(&asked.cli.narrate, &asked.properties),
        Some(Command::Burn(burn)) => narrate::burn(burn, &asked.properties),
        Some(Command::Live(live)) => live::live(live, &asked.properties),
        Some(Command::Serve(serve)) => serve::serve(serve, &asked.properties),
        Some(Command::Model(model)) => model::model(model, &asked.properties),
        Some(Command::Launch(launch)) => launch::launch(launch),
        Some(Command::Completions { shell }) => manual::completions(*shell),
        Some(Command::Man) => manual::manual(),
    }
}
