//! How far a run has come, on stderr.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// A line that a terminal redraws, or lines now and then where there is no terminal.
pub struct Progress {
    bar: Option<ProgressBar>,
    due: Instant,
    quiet: bool,
}

impl Progress {
    /// Shows nothing but what [`Self::say`] says if `quiet`.
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bar = (terminal && !quiet).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5));
            bar.set_style(ProgressStyle::with_template("{msg}").expect("a template of ours"));
            bar
        });
        Self {
            bar,
            due: Instant::now() + EVERY,
            quiet,
        }
    }

    /// Shows the line that `describe` returns, if it is time to.
    pub fn show(&mut self, describe: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            if bar.is_finished() {
                bar.reset();
            }
            bar.set_message(describe());
            bar.tick();
        } else if !self.quiet && Instant::now() >= self.due {
            self.due = Instant::now() + EVERY;
            self.say(&describe());
        }
    }

    /// Prints a line that stays.
    pub fn say(&self, line: &str) {
        self.aside(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
    }

    /// Does something that prints, and draws the line again behind it.
    pub fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Removes the line.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
